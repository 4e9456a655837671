"""The dual-stream loss against the recorded terms and gradients, and the exactness that accumulation relies on."""

import dataclasses
import functools
import types

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unialign_jax.batch import Draws, Features
from unialign_jax.convert import names
from unialign_jax.diffusion import masked_text
from unialign_jax.objectives import Objective, alignment_loss, contrastive_loss

CASES = ("loss_generate", "loss_generate_prompted", "loss_edit", "loss_compose")
TERMS = {
    "image": "loss_image",
    "text": "loss_caption",
    "contrastive": "loss_contrastive",
    "image_align": "loss_image_align",
    "text_align": "loss_text_align",
}
RECORDED = Objective(semantic_depth=2, mask_token_id=319)


def unpack(recorded):
    """A recorded case as what the objective takes."""
    ids = recorded["caption_ids"].astype(np.int32)
    features = Features(
        target=recorded["target_latents"],
        caption_ids=ids,
        caption_loss_mask=recorded.get("label_mask", np.ones_like(ids)).astype(bool),
        instruction_ids=recorded["instruction_ids"].astype(np.int32),
        null_ids=np.zeros(ids.shape[1], np.int32),
        references=recorded.get("reference_latents"),
        teacher_image=recorded["semantic_image"],
        teacher_text=recorded["semantic_text"],
    )
    draws = Draws(
        noise=recorded["noise"],
        image_time=recorded["u"],
        text_drop=recorded["dropout_uniform"],
        reference_drop=np.zeros_like(recorded["dropout_uniform"]),  # every sample, were there a drop-out rate
        text_time=masked_text.antithetic_times(recorded["text_eps_uniform"]),
        text_mask=recorded["text_mask_uniform"],
        posterior=np.zeros(()),
    )
    return features, draws


def apply(objective, transformer, encode, features, draws):
    """The objective on what an encoder makes of its texts."""
    ids = objective.texts(features, draws)
    states = None if ids is None else encode(ids.reshape(-1, ids.shape[-1])).reshape(*ids.shape, -1)
    return objective(transformer, states, features, draws)


@pytest.fixture(scope="module")
def value_and_grad(transformer, text_encoder):
    """Loss, terms and gradients of an objective on a case; the null states are the recorded ones."""
    model, _ = transformer
    encoder, text_params = text_encoder

    @functools.partial(jax.jit, static_argnums=0)
    def compute(objective, params, features, draws, null_text):
        def encode(ids):
            is_null = jnp.all(ids == features.null_ids, axis=1)[:, None, None]
            return jnp.where(is_null, null_text, encoder.apply({"params": text_params}, ids))

        def loss(params):
            return apply(objective, functools.partial(model.apply, {"params": params}), encode, features, draws)

        return jax.value_and_grad(loss, has_aux=True)(params)

    return compute


@pytest.mark.parametrize("name", CASES)
def test_terms_match_recorded(name, case, transformer, value_and_grad):
    recorded = case(name)
    (total, terms), _ = value_and_grad(RECORDED, transformer[1], *unpack(recorded), recorded["null_text"])
    for ours, theirs in TERMS.items():
        np.testing.assert_allclose(terms[ours], recorded[theirs], rtol=1e-5, err_msg=ours)
    np.testing.assert_allclose(total, recorded["loss_total"], rtol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_every_gradient_norm_matches_recorded(name, case, grad_norms, transformer, value_and_grad):
    recorded = case(name)
    model, params = transformer
    _, grads = value_and_grad(RECORDED, params, *unpack(recorded), recorded["null_text"])
    by_name = {}
    leaves = flax.traverse_util.flatten_dict(grads, sep="/")
    for row in names.table("transformer", dataclasses.asdict(model.config)):
        leaf = np.asarray(leaves.pop(row.path), np.float64)
        by_name.update(zip(row.names, leaf if row.layers else [leaf], strict=True))
    assert not leaves
    expected = grad_norms(name)
    assert not by_name.pop("pos_embed.pos_embed").any()  # fixed
    assert set(expected) == set(by_name)
    for public, norm in expected.items():
        ours = np.linalg.norm(by_name[public])
        np.testing.assert_allclose(ours, max(norm, 0), rtol=1e-4, atol=1e-9, err_msg=public)


def _slice(tree, start, stop, size):
    return jax.tree.map(lambda x: x[start:stop] if x.shape[:1] == (size,) else x, tree)


def test_micro_batches_average_to_the_full_batch(case, transformer, value_and_grad):
    """Without the contrastive term two halves give exactly the whole: terms and gradients."""
    recorded = case("loss_edit")
    objective = dataclasses.replace(RECORDED, contrastive_weight=0.0)
    features, draws = unpack(recorded)
    run = functools.partial(value_and_grad, objective, transformer[1])
    (total, terms), grads = run(features, draws, recorded["null_text"])
    parts = [run(_slice(features, i, i + 2, 4), _slice(draws, i, i + 2, 4), recorded["null_text"]) for i in (0, 2)]
    np.testing.assert_allclose(np.mean([p[0][0] for p in parts]), total, rtol=1e-6)
    for name in set(terms) - {"contrastive"}:
        np.testing.assert_allclose(np.mean([p[0][1][name] for p in parts]), terms[name], rtol=1e-6)
    mean = jax.tree.map(lambda a, b: (a + b) / 2, parts[0][1], parts[1][1])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-7), mean, grads)
    # The contrastive term is the exception that the docstring names: fewer negatives, a smaller loss.
    assert np.mean([p[0][1]["contrastive"] for p in parts]) < terms["contrastive"]


def test_prompt_positions_are_neither_masked_nor_learned(case, transformer, value_and_grad):
    recorded = case("loss_generate_prompted")
    features, draws = unpack(recorded)
    changed = dataclasses.replace(draws, text_mask=np.where(features.caption_loss_mask, draws.text_mask, 0.0))
    run = functools.partial(value_and_grad, RECORDED, transformer[1])
    (a, _), _ = run(features, draws, recorded["null_text"])
    (b, _), _ = run(features, changed, recorded["null_text"])
    np.testing.assert_array_equal(a, b)


def test_dropped_references_are_masked_apart_from_the_text(case):
    """What the image pass is given; that a masked reference is as good as none is tested with the transformer."""

    class Seen(Exception):
        pass

    def given(objective, features, draws):
        def transformer(image_pass, *_, **kwargs):
            raise Seen(image_pass.reference_mask, image_pass.text_states)

        with pytest.raises(Seen) as seen:
            apply(objective, transformer, lambda ids: jnp.zeros((*ids.shape, 3)) + ids[..., None], features, draws)
        return seen.value.args

    features, draws = unpack(case("loss_edit"))
    draws = draws.replace(reference_drop=np.array([0.2, 0.3, 0.9, 0.1]), text_drop=np.array([0.0, 0.5, 0.0, 0.5]))
    dropping = dataclasses.replace(RECORDED, reference_dropout=0.3)
    mask, states = given(dropping, features, draws)
    assert mask.tolist() == [[False], [True], [True], [False]]
    published_mask, published_states = given(RECORDED, features, draws)
    assert published_mask is None  # all of them
    np.testing.assert_array_equal(states, published_states)
    assert (states[:, 0, 0] == 0).tolist() == [True, False, True, False]
    masked = features.replace(reference_mask=np.array([[True], [False]] * 2))
    assert given(dropping, masked, draws)[0].tolist() == [[False], [False], [True], [False]]
    assert given(dropping, *unpack(case("loss_generate")))[0] is None


@pytest.mark.slow
def test_unpadded_pooling_ignores_what_padding_holds(case, transformer, text_encoder):
    """By option the pooled text features stop at the first end token; the published default averages everything."""
    features, draws = unpack(case("loss_generate"))
    ids = np.array(features.caption_ids)
    ids[:, 5:] = 1
    features = dataclasses.replace(features, caption_ids=ids)
    model, params = transformer
    encoder, text_params = text_encoder
    hidden_shift = np.zeros((4, 12, 64), np.float32)
    hidden_shift[:, 7:] = 1.0

    def terms(objective, shift):
        def shifted(*args, **kwargs):
            outputs = model.apply({"params": params}, *args, **kwargs)
            return [out._replace(text_hidden=out.text_hidden + shift) for out in outputs]

        encode = functools.partial(encoder.apply, {"params": text_params})
        return {name: float(term) for name, term in apply(objective, shifted, encode, features, draws)[1].items()}

    masked = dataclasses.replace(RECORDED, pool_padding=False)
    without, whole = terms(masked, 0.0), terms(RECORDED, 0.0)
    assert without == terms(masked, hidden_shift)
    assert whole["contrastive"] != terms(RECORDED, hidden_shift)["contrastive"]
    # The adapter of the text reads the same tokens.
    assert whole["text_align"] != without["text_align"] and whole["image_align"] == without["image_align"]


def test_contrastive_loss_against_torch():
    import torch

    rng = np.random.default_rng(0)
    image, text = rng.normal(size=(2, 6, 16)).astype(np.float32)
    logits = torch.nn.functional.normalize(torch.tensor(image)) @ torch.nn.functional.normalize(torch.tensor(text)).T
    labels = torch.arange(6)
    entropy = torch.nn.functional.cross_entropy
    expected = (entropy(logits / 0.07, labels) + entropy(logits.T / 0.07, labels)) / 2
    np.testing.assert_allclose(contrastive_loss(image, text, 0.07), expected, rtol=1e-5)


def test_alignment_of_a_zero_vector_is_finite():
    zero, one = jnp.zeros((2, 4)), jnp.ones((2, 4))
    value, grad = jax.value_and_grad(alignment_loss)(zero, one)
    assert value == 1 and np.isfinite(grad).all()
    np.testing.assert_allclose(alignment_loss(2 * one, one), 0, atol=1e-6)


@pytest.mark.parametrize("changes", [{"text_pass": 0.0}, {"image_pass": 0.0}])
def test_a_pass_that_is_left_out_is_not_run_and_the_other_is_as_before(changes, case, transformer, text_encoder):
    features, draws = unpack(case("loss_edit"))
    (model, params), (encoder, text_params) = transformer, text_encoder
    passes = []

    def loss(objective):
        def run(*items, **kwargs):
            passes.extend("image" if item.want_image else "text" for item in items)
            return model.apply({"params": params}, *items, **kwargs)

        return apply(objective, run, functools.partial(encoder.apply, {"params": text_params}), features, draws)

    _, both = loss(RECORDED)
    del passes[:]
    total, terms = loss(dataclasses.replace(RECORDED, **changes, image_weight=2.0))
    left = "image" if "text_pass" in changes else "text"
    assert passes == [left] and set(terms) == {left, f"{left}_align"}
    for name, value in terms.items():
        np.testing.assert_allclose(value, both[name], rtol=1e-6)
    weight = {"image": 2.0, "text": 0.2}[left]
    np.testing.assert_allclose(total, weight * terms[left] + 0.1 * terms[f"{left}_align"], rtol=1e-6)


@pytest.mark.slow
def test_the_factor_of_a_pass_scales_its_terms_alone(case, transformer, value_and_grad):
    recorded = case("loss_generate")
    run = functools.partial(value_and_grad, params=transformer[1], null_text=recorded["null_text"])
    features, draws = unpack(recorded)
    values = [
        run(dataclasses.replace(RECORDED, text_pass=factor), features=features, draws=draws)[0] for factor in (1.0, 3.0)
    ]
    terms = values[0][1]
    expected = 2 * (0.2 * terms["text"] + 0.1 * terms["text_align"])
    np.testing.assert_allclose(values[1][0] - values[0][0], expected, rtol=1e-4)


@pytest.mark.parametrize("space", ["x0", "velocity"])
def test_shifted_times_and_the_space_of_the_image_loss(space, case):
    """Against a network that predicts a known velocity: the loss by hand, in float64, at SD3's shifted levels."""
    features, draws = unpack(case("loss_generate"))
    shift, factor = 4.0, 0.7
    seen = {}

    def network(item, **kwargs):
        seen["times"] = item.timesteps
        return [types.SimpleNamespace(image=factor * item.latents, image_semantic=jnp.ones((len(item.latents), 40)))]

    objective = dataclasses.replace(RECORDED, time_shift=shift, image_loss=space, text_pass=0.0)
    _, terms = apply(objective, network, lambda ids: jnp.zeros((*ids.shape, 48)), features, draws)
    sigma = (1000 - np.floor(np.asarray(draws.image_time, np.float64) * 1000)) / 1000
    sigma = (shift * sigma / (1 + (shift - 1) * sigma))[:, None, None, None]
    clean, noise = np.asarray(features.target, np.float64), np.asarray(draws.noise, np.float64)
    noisy = (1 - sigma) * clean + sigma * noise
    error = factor * noisy - (noise - clean)
    expected = np.mean((error if space == "velocity" else sigma * error) ** 2)
    np.testing.assert_allclose(seen["times"], 1000 * sigma[:, 0, 0, 0], rtol=1e-6)
    np.testing.assert_allclose(terms["image"], expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_pass": 0.0, "text_pass": 0.0}, "one above 0"),
        ({"text_pass": -1.0}, "text_pass -1"),
        ({"time_shift": 0.0}, "time_shift is 0"),
        ({"image_loss": "noise"}, "image_loss is 'noise'; choose one of"),
    ],
)
def test_an_objective_that_means_nothing_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Objective(**changes)
