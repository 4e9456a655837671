"""The draws of a training step: distributed as they should be, each independent of the others."""

import itertools

import jax
import numpy as np

from unialign_jax.batch import Batch, sample_draws
from unialign_jax.diffusion.masked_text import EPS

SIZE, LENGTH, LATENT = 4096, 5, (2, 2, 3)


def test_draws_have_their_distributions_and_are_independent():
    ids = np.zeros((SIZE, LENGTH), np.int32)
    pixels = np.zeros((SIZE, 1, 1, 3), np.uint8)
    batch = Batch(target=pixels, references=pixels[:, None], caption_ids=ids, caption_loss_mask=ids == 0)
    draws = jax.tree.map(np.asarray, vars(sample_draws(jax.random.key(3), batch, LATENT)))
    shapes = {"noise": LATENT, "posterior": (2, *LATENT), "text_mask": (LENGTH,)}
    assert {name: array.shape for name, array in draws.items()} == {
        name: (SIZE, *shapes.get(name, ())) for name in draws
    }
    near = 5 / np.sqrt(SIZE)  # five standard errors of a mean or a correlation
    time = draws["image_time"]
    normal = {"noise": draws["noise"], "posterior": draws["posterior"], "logit": np.log(time / (1 - time))}
    for name, array in normal.items():  # a uniform time has logits with a deviation of 1.8
        assert abs(array.mean()) < near and abs(array.std() - 1) < near, name
    for name in ("text_drop", "reference_drop", "text_mask"):
        assert draws[name].min() >= 0 and draws[name].max() < 1
        np.testing.assert_allclose(np.quantile(draws[name], [0.1, 0.5, 0.9]), [0.1, 0.5, 0.9], atol=near)
    # Antithetic: every B-th of the range has one time.
    middles = EPS + (1 - EPS) * (np.arange(SIZE) + 0.5) / SIZE
    np.testing.assert_allclose(np.sort(draws["text_time"]), middles, rtol=0, atol=0.5 / SIZE + 1e-6)
    assert draws["text_time"].std() > 0.28
    columns = {name: array.reshape(SIZE, -1)[:, 0] for name, array in draws.items()} | {
        "posterior of a reference": draws["posterior"][:, 1].reshape(SIZE, -1)[:, 0]
    }
    columns.pop("text_time")  # in the order of the batch
    for (one, x), (other, y) in itertools.combinations(columns.items(), 2):
        assert abs(np.corrcoef(x, y)[0, 1]) < near, (one, other)
