"""The grid of samples that a run shows: what is asked of the model is what the rows were trained with."""

import numpy as np

from unialign_jax.pipeline import UniAlignPipeline
from unialign_jax.training.run_config import LogConfig
from unialign_jax.training.samples import sample_grid

STEPS = 3


def test_answers_are_sampled_after_their_questions(stage):
    pipeline = UniAlignPipeline.from_pretrained(stage[0], dtype="float32", progress=False)
    tokenizer, length = pipeline.tokenizer, pipeline.text_length
    pairs = [("a red", "square"), ("a blue", "disc"), ("a", "field")]
    texts = [tokenizer.encode_prompted(question, answer, length) for question, answer in pairs]
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8)
    batch = {
        "target": images,
        "caption_ids": np.stack([ids for ids, _ in texts]),
        "caption_loss_mask": np.stack([learned for _, learned in texts]),
        "instruction_ids": np.stack([tokenizer.encode("a disc", length)] * 3),
    }
    settings = LogConfig(sample_steps=STEPS, guidance=2.0)
    grid, table = sample_grid(pipeline.networks, pipeline.params, tokenizer, batch, settings, "plain")
    assert grid.ndim == 3 and grid.dtype == np.uint8
    answers = pipeline.answer(list(images), [question for question, _ in pairs], steps=STEPS, protocol="plain")
    captions = pipeline.caption(list(images), steps=STEPS, protocol="plain")
    assert answers != captions  # or the table could not tell one from the other
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    assert rows == [[q, a, made.strip()] for (q, a), made in zip(pairs, answers, strict=True)]


def test_rows_of_more_references_than_a_sampler_takes_are_drawn_from_the_first(stage):
    pipeline = UniAlignPipeline.from_pretrained(stage[0], dtype="float32", progress=False)
    ids = pipeline.tokenizer.encode("a disc", pipeline.text_length)[None]
    images = np.random.default_rng(0).integers(0, 256, (1, 18, 16, 16, 3), np.uint8)
    batch = {
        "target": images[:, 0],
        "references": images[:, 1:],
        "reference_mask": np.ones((1, 17), bool),
        "caption_ids": ids,
        "caption_loss_mask": np.ones_like(ids, bool),
        "instruction_ids": ids,
    }
    settings = LogConfig(sample_steps=1, guidance=1.0)
    grid, _ = sample_grid(pipeline.networks, pipeline.params, pipeline.tokenizer, batch, settings, "plain")
    made = pipeline.compose(list(images[0, 1:17]), "a disc", steps=1, guidance=1.0, output="array")
    np.testing.assert_array_equal(grid[-16:, -16:], made)
