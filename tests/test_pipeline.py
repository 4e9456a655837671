"""The pipeline on a tiny random model: every task, independence of the batch, and refusals before any compilation."""

import jax
import numpy as np
import pytest
from PIL import Image

from unialign_jax.data.tokenizer import Tokenizer
from unialign_jax.networks import build_networks
from unialign_jax.pipeline import UniAlignPipeline

WORDS = "a red blue green small large circle square triangle on grey what colour is the left right of make it"


@pytest.fixture(scope="module")
def pipeline():
    tokenizer = Tokenizer.learn([WORDS, WORDS[::-1]], 60)
    networks = build_networks(
        {
            "pixel_codec": {"patch": 2},
            "transformer": {
                "sample_size": 8,
                "in_channels": 12,
                "out_channels": 12,
                "num_layers": 1,
                "attention_head_dim": 8,
                "num_attention_heads": 2,
                "caption_projection_dim": 16,
                "joint_attention_dim": 8,
                "pos_embed_max_size": 6,
                "vocab_size": tokenizer.vocab_size,
                "mask_token_id": tokenizer.mask_id,
                "adapter_hidden": 4,
                "semantic_dim": 4,
            },
            "text_encoder": {
                "vocab_size": tokenizer.vocab_size,
                "d_model": 8,
                "d_kv": 4,
                "d_ff": 8,
                "num_layers": 1,
                "num_heads": 2,
            },
        },
        dtype="float32",
    )
    shapes = jax.eval_shape(networks.init, jax.random.key(0))
    rng = np.random.default_rng(0)
    # Random everywhere: what starts at zero would hide whether a condition arrives.
    params = jax.tree.map(lambda x: (0.4 * rng.normal(size=x.shape)).astype(np.float32), shapes)
    return UniAlignPipeline(networks, params, tokenizer, text_length=40, size=(16, 16), max_batch=4)


def picture(seed, height=20, width=30):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


FEW = {"steps": 2}


def test_an_item_alone_is_the_item_in_a_batch(pipeline):
    prompts = ["a red circle", "a blue square", "a small green triangle", "a large circle", "grey"]
    together = pipeline.generate(prompts, seed=[5, 6, 7, 8, 9], **FEW)
    assert len(together) == 5 and all(image.size == (16, 16) for image in together)
    for i in (0, 2, 4):  # of the first batch, of its middle, of the padded rest
        alone = pipeline.generate(prompts[i], seed=5 + i, **FEW)
        np.testing.assert_allclose(np.int32(alone), np.int32(together[i]), atol=1)
    texts = pipeline.caption([picture(i) for i in range(5)], seed=3, **FEW)
    assert pipeline.caption(picture(2), seed=5, **FEW) == texts[2]


def test_every_condition_matters(pipeline):
    """Prompt, seed, reference, guidance and negative prompt each change the image."""
    base = {"image": picture(0), "instruction": "make it red", "seed": 1, **FEW}
    image = np.int32(pipeline.edit(**base))
    for change in (
        {"image": picture(1)},
        {"instruction": "make it blue"},
        {"seed": 2},
        {"guidance": 3.0},
        {"negative_prompt": "circle"},
        {"guidance_interval": (0.95, 1.0)},
    ):
        assert np.abs(np.int32(pipeline.edit(**(base | change))) - image).max() > 2, change
    np.testing.assert_array_equal(np.int32(pipeline.perceive(**base)), image)


def test_compose_masks_what_an_item_does_not_have(pipeline):
    several = pipeline.compose([[picture(0)], [picture(1), picture(2)]], ["a circle", "a square"], seed=4, **FEW)
    alone = pipeline.compose([picture(0)], "a circle", seed=4, **FEW)
    np.testing.assert_allclose(np.int32(several[0]), np.int32(alone), atol=1)


def test_text_tasks_answer_in_kind(pipeline):
    assert isinstance(pipeline.caption(picture(0), **FEW), str)
    answers = pipeline.answer([picture(0), picture(1)], ["what colour is it", "is it red"], **FEW)
    assert len(answers) == 2 and not any("colour is it" in text for text in answers)
    assert pipeline.caption(picture(0), fast=True, steps=4) == pipeline.caption(picture(0), fast=True, steps=4, seed=9)


def test_images_of_any_kind_are_taken(pipeline, tmp_path):
    pixels = picture(0)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    expected = pipeline.caption(pixels, **FEW)
    assert pipeline.caption(str(tmp_path / "a.png"), **FEW) == expected
    assert pipeline.caption(Image.fromarray(pixels).convert("RGBA"), **FEW) == expected
    assert isinstance(pipeline.caption(Image.fromarray(pixels).convert("L"), **FEW), str)
    wide = pipeline.generate("a circle", size=(8, 24), **FEW)
    assert wide.size == (24, 8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: p.generate([]), "the list is empty"),
        (lambda p: p.generate("a", size=(16, 18)), "16x18 must be a positive multiple of 4"),
        (lambda p: p.generate("a", size=(16, 64)), "position table holds 6x6"),
        (lambda p: p.generate("a", seed=-1), "seeds in"),
        (lambda p: p.generate(["a", "b"], seed=[1]), "2 item"),
        (lambda p: p.edit([picture(0)], ["a", "b"]), "1 image.s. and 2 instruction.s."),
        (lambda p: p.edit(picture(0), ["a", "b"]), "do not go together"),
        (lambda p: p.compose([], "a"), "at least one"),
        (lambda p: p.answer([picture(0), picture(1)], ["a"]), "2 image.s. and 1 question"),
        (lambda p: p.caption("nowhere.png"), "nowhere.png"),
        (lambda p: p.caption(picture(0).astype(np.float32)), "must be uint8"),
    ],
)
def test_bad_requests_are_refused(pipeline, call, message):
    with pytest.raises(ValueError, match=message):
        call(pipeline)


def test_a_directory_that_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="is no checkpoint: expected a run's stage directory"):
        UniAlignPipeline.from_pretrained(tmp_path)
