"""The pipeline on a tiny random model: every task, independence of the batch, and refusals before any compilation."""

import dataclasses
import io
import types

import jax
import numpy as np
import pytest
from etils import epath
from PIL import Image

from unialign_jax import EditSession, parallel
from unialign_jax.data.tokenizer import Tokenizer
from unialign_jax.inference import batches, programs
from unialign_jax.inference.inputs import image_size
from unialign_jax.inference.presets import Protocol
from unialign_jax.inference.programs import image_programs
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
    return UniAlignPipeline(networks, params, tokenizer, text_length=96, size=(16, 16), max_batch=4)


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
    # One image needs no list, and a path is an image, of whatever class.
    np.testing.assert_array_equal(pipeline.compose(picture(0), "a circle", seed=4, **FEW), alone)
    mixed = pipeline.compose([[picture(0)], []], ["a circle", "a square"], seed=4, **FEW)
    np.testing.assert_allclose(np.int32(mixed[0]), np.int32(alone), atol=1)
    options = {"seed": 5, "guidance": pipeline.protocol.edit_guidance, **FEW}
    np.testing.assert_allclose(np.int32(mixed[1]), np.int32(pipeline.generate("a square", **options)), atol=1)


def test_references_that_are_all_there_are_not_masked(pipeline, monkeypatch):
    made, masks = image_programs(pipeline.networks, pipeline.mesh), []

    def begin(*arguments):
        masks.append(arguments[5])
        return made.begin(*arguments)

    monkeypatch.setattr(programs, "image_programs", lambda *_: dataclasses.replace(made, begin=begin))
    pipeline.edit(picture(0), "make it red", **FEW)
    pipeline.edit(picture(0), "make it red", reference_guidance=1.5, **FEW)
    pipeline.compose([[picture(0)], []], ["a circle", "a square"], **FEW)
    assert [mask is None for mask in masks] == [True, False, False]


def test_processes_must_ask_for_the_same(monkeypatch):
    """What decides which programs run, by name: else they would wait for each other for ever."""
    made = batches.Batches(parallel.make_mesh("data", jax.devices()[:1]), 4)
    made._mesh = types.SimpleNamespace(is_multi_process=True)
    other = {"items": 3, "steps": 29, "fast": True}
    monkeypatch.setattr(batches.agreement, "gather", lambda mine: [mine, other])
    with pytest.raises(ValueError, match="by process, steps is 28, 29; watched is True, None$"):
        made.check_same(items=3, steps=28, fast=True, watched=True)
    other |= {"steps": 28, "watched": True}
    made.check_same(items=3, steps=28, fast=True, watched=True)


def test_paths_of_any_class_are_images(pipeline, tmp_path):
    Image.fromarray(picture(0)).save(tmp_path / "a.png")
    text = pipeline.caption(picture(0), **FEW)
    for path in (str(tmp_path / "a.png"), tmp_path / "a.png", epath.Path(tmp_path / "a.png")):
        assert pipeline.caption(path, **FEW) == text
    assert pipeline.caption([tmp_path / "a.png"] * 2, seed=[0, 0], **FEW) == [text] * 2


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
    assert pipeline.caption(np.dstack([pixels, np.full((20, 30), 255, np.uint8)]), **FEW) == expected
    grey = pipeline.caption(Image.fromarray(pixels).convert("L"), **FEW)
    assert pipeline.caption(np.asarray(Image.fromarray(pixels).convert("L")), **FEW) == grey
    wide = pipeline.generate("a circle", size=(8, 24), **FEW)
    assert wide.size == (24, 8)


def test_outputs_on_request(pipeline):
    array = pipeline.generate(["a circle", "a square"], output="array", **FEW)
    np.testing.assert_array_equal(array[1], np.asarray(pipeline.generate(["a circle", "a square"], **FEW)[1]))
    latent = pipeline.generate("a circle", output="latent", **FEW)
    assert latent.shape == (8, 8, 12) and latent.dtype == np.float32
    pixels = pipeline.networks.decode_images(pipeline.params, latent[None])[0]
    np.testing.assert_allclose(array[0], np.round((np.clip(pixels, -1, 1) + 1) * 127.5), atol=1)
    ids = pipeline.answer(picture(0), "what colour", output="array", **FEW)
    known = pipeline.tokenizer.encode_prompted("Q: what colour Answer", "", 96)[0]
    assert ids.dtype == np.int32 and (ids[:8] == known[:8]).all()


def test_reference_guidance_is_a_scale_of_its_own(pipeline):
    """Both scales against the formula, one Euler step from the velocities of the three conditions."""
    request = {"image": picture(0), "instruction": "make it red", "steps": 1, "output": "latent"}
    none, reference, both = (
        pipeline.generate(" ", **{"steps": 1, "output": "latent", "guidance": 1.0}),
        pipeline.edit(**(request | {"instruction": " ", "guidance": 1.0})),
        pipeline.edit(**request, guidance=1.0),
    )
    made = pipeline.edit(**request, guidance=5.0, reference_guidance=1.7, negative_prompt=" ")
    expected = none + 1.7 * (reference - none) + 5.0 * (both - reference)
    # Latents of about 40, whose float32 rounding the scales multiply.
    np.testing.assert_allclose(made, expected, atol=1e-3, rtol=0)
    single = pipeline.edit(**request, guidance=5.0, negative_prompt=" ")
    np.testing.assert_allclose(single, reference + 5.0 * (both - reference), atol=1e-3, rtol=0)


def test_previews_come_after_every_step_and_change_nothing(pipeline, capsys):
    seen = []

    def preview(step, steps, images):
        seen.append((step, steps, {index: image.copy() for index, image in images.items()}))

    prompts = ["a circle", "a square", "grey", "a red triangle", "blue"]
    watched = pipeline.generate(prompts, steps=3, output="array", preview=preview, progress=True)
    np.testing.assert_array_equal(watched, pipeline.generate(prompts, steps=3, output="array"))
    assert [(step, steps, sorted(images)) for step, steps, images in seen] == [
        (step, 3, items) for items in ([0, 1, 2, 3], [4]) for step in (1, 2, 3)
    ]
    np.testing.assert_array_equal(seen[-1][2][4], watched[4])  # the last estimate is the image
    bar = capsys.readouterr().err
    assert "100%" in bar and "5/5" in bar and "left" in bar and "image/s" in bar


def test_any_number_of_steps_and_any_guidance_are_served_by_what_is_compiled(pipeline):
    pipeline.warm_up(["generate"], batches=[2])
    programs = image_programs(pipeline.networks, pipeline.mesh)
    before = programs.advance._cache_size()
    for steps, guidance in ((2, 7.0), (5, 3.0), (1, 2.5)):
        pipeline.generate(["a circle", "a square"], steps=steps, guidance=guidance)
    assert programs.advance._cache_size() == before


def test_protocols(pipeline):
    assert pipeline.caption(picture(0), steps=32) == pipeline.caption(picture(0))
    open_ended = pipeline.answer(picture(0), "what colour", protocol="d-dit-open", output="array", steps=2)
    mine = pipeline.answer(picture(0), "Q: what colour A:", protocol=Protocol(question="{}", answer_steps=2))
    assert pipeline.tokenizer.decode(open_ended).endswith(mine)
    ten = pipeline.caption(picture(0), protocol=Protocol(caption_length=10, caption_steps=2), output="array")
    assert ten.shape == (10,)
    prompted = Protocol(caption="a red", caption_steps=2)
    ids = pipeline.caption(picture(0), protocol=prompted, output="array")
    known = pipeline.tokenizer.encode_prompted("a red", "", 96)[1].argmax()
    assert known > 0 and ids[:known].tolist() == pipeline.tokenizer.encode("a red", 96)[:known].tolist()
    text = pipeline.caption(picture(0), protocol=prompted)
    assert text == pipeline.tokenizer.decode(ids[known:])
    own = UniAlignPipeline(
        pipeline.networks, pipeline.params, pipeline.tokenizer, text_length=96, size=(16, 16), protocol=prompted
    )
    assert own.caption(picture(0)) == text


@pytest.mark.parametrize(
    ("aspect", "size"),
    # 16 patches of 4 pixels, and at most 6 a side.
    [("1:1", (16, 16)), ("16:9", (12, 20)), (0.5, (24, 12)), ("3:1", (8, 24)), ("1:50", (24, 4)), (50, (4, 24))],
)
def test_any_aspect_ratio_of_the_position_table(pipeline, aspect, size):
    assert image_size(pipeline.networks, (16, 16), None, aspect) == size


def test_prompts_in_any_script_and_of_any_length(pipeline):
    prompts = [
        "",
        " ",
        "красный круг",
        "红色的圆",
        "دائرة حمراء",
        "🔴 ⭕",
        "</s> <extra_id_0>",
        "a red circle " * 400,
        "\0",
    ]
    assert len(pipeline.generate(prompts, steps=1)) == len(prompts)


def test_up_to_four_references(pipeline):
    """Each of them matters, the last too."""
    made = [
        pipeline.compose([picture(i) for i in numbers], "a circle", seed=4, output="array", **FEW)
        for numbers in ((0, 1, 2), (0, 1, 5), (0, 1, 2, 3), (0, 1, 2, 5), (6, 1, 2, 3))
    ]
    assert all(image.shape == (16, 16, 3) for image in made)
    assert len({image.tobytes() for image in made}) == len(made)


def test_a_session_of_edits(pipeline):
    session = EditSession(pipeline, picture(0), aspect="1:1", steps=2)
    first = session.edit("make it red")
    np.testing.assert_array_equal(first, pipeline.edit(session.images[0], "make it red", steps=2))
    second = session.edit("make it blue", seed=4)
    np.testing.assert_array_equal(second, pipeline.edit(first, "make it blue", steps=2, seed=4))
    assert session.instructions == ["make it red", "make it blue"] and session.image is second
    assert session.undo() is first and session.instructions == ["make it red"]
    session.undo()
    with pytest.raises(ValueError, match="no edit to take back"):
        session.undo()


def test_an_edit_of_a_session_may_have_a_shape_of_its_own(pipeline):
    session = EditSession(pipeline, picture(0), size=(16, 16), steps=1)
    assert session.edit("make it red", aspect=2.0).size == (24, 12)
    assert session.edit("make it blue", size=(8, 16)).size == (16, 8)
    assert session.edit("make it green").size == (16, 16)
    with pytest.raises(ValueError, match="are both given"):
        session.edit("make it red", aspect=2.0, size=(8, 16))
    assert session.instructions == ["make it red", "make it blue", "make it green"]


@pytest.mark.parametrize("option", [{"output": "array"}, {"output": "latent"}, {"gather": False}])
def test_a_session_keeps_images_that_can_be_edited(pipeline, option):
    message = f"{next(iter(option))}: no option of an edit session"
    with pytest.raises(ValueError, match=message):
        EditSession(pipeline, picture(0), **option)
    session = EditSession(pipeline, picture(0), steps=1)
    with pytest.raises(ValueError, match=message):
        session.edit("make it red", **option)
    assert session.instructions == []
    with pytest.raises(ValueError, match="stepz: no such option; there are seed, steps"):
        EditSession(pipeline, picture(0), stepz=5)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_an_opened_image_that_is_cut_short_is_a_bad_request(pipeline, kind):
    file = io.BytesIO()
    Image.fromarray(picture(0, 64, 64)).save(file, kind)
    cut = Image.open(io.BytesIO(file.getvalue()[:-2000]))
    with pytest.raises(ValueError, match=f"{kind} image of 64 x 64 can't be decoded"):
        pipeline.caption(cut, **FEW)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: p.generate([]), "the list is empty"),
        (lambda p: p.generate("a", size=(16, 18)), "16x18 must be a positive multiple of 4"),
        (lambda p: p.generate("a", size=(16, 64)), "position table holds 6x6"),
        (lambda p: p.generate("a", size=32), "size is 32; expected .height, width"),
        (lambda p: p.generate("a", seed=-1), "seed is -1; a whole number from 0"),
        (lambda p: p.generate("a", seed=None), "seed is None"),
        (lambda p: p.generate("a", seed=1.5), "seed is 1.5"),
        (lambda p: p.generate(["a", "b"], seed=2**32 - 1), "2 item.s. need as many seeds in"),
        (lambda p: p.generate(None), "prompt is a NoneType; expected one prompt, or a list"),
        (lambda p: p.edit(None, "a"), "image is a NoneType"),
        (lambda p: p.compose(None, "a"), "images is a NoneType"),
        (lambda p: p.compose([None], ["a"]), "images is a NoneType"),
        (lambda p: p.compose(None, ["a"]), "images is a NoneType"),
        (lambda p: p.compose(Image.new("RGB", (8, 8)), ["a"]), "one image came with a list of prompts"),
        (lambda p: p.compose("a.png", ["a"]), "one image came with a list of prompts"),
        (lambda p: p.caption(Image.new("RGB", (0, 4))), "an image of 0 x 4 has no pixels"),
        (lambda p: p.compose([picture(0)] * 17, "a"), "17 reference images for one image; expected at most 16"),
        (lambda p: p.caption(None), "image is a NoneType"),
        (lambda p: p.answer(picture(0), None), "question is a NoneType"),
        (
            lambda p: p.complete([picture(0)], np.zeros((1, 8), np.int32), np.ones((1, 8), np.int32)),
            "known int32; expected integers and bool",
        ),
        (
            lambda p: p.complete([picture(0)], np.zeros((2, 8), np.int32), np.ones((2, 8), bool)),
            r"1 image\(s\) came with ids \[2, 8\] and known \[2, 8\]; expected one text for each image",
        ),
        (
            lambda p: p.generate("a", guidance_interval=(0.8, 0.2)),
            "is .0.8, 0.2.; expected two noise levels",
        ),
        (lambda p: p.generate("a", guidance_interval=(200, 800)), "0 <= low <= high <= 1"),
        (lambda p: p.generate("a", guidance_interval=None), "guidance_interval is None"),
        (lambda p: p.generate("a", preview="yes"), "preview is 'yes'; a function"),
        (lambda p: p.caption(picture(0), fast="no"), "fast is 'no'; choose of True, False"),
        (lambda p: p.generate("a", protocol=["x"]), "protocol .'x'. is unknown"),
        (lambda p: p.generate(["a", "b"], seed=[1]), "2 item"),
        (lambda p: p.edit([picture(0)], ["a", "b"]), "1 image.s. and 2 instruction.s."),
        (lambda p: p.edit(picture(0), ["a", "b"]), "do not go together"),
        (lambda p: p.compose([], "a"), "at least one"),
        (lambda p: p.answer([picture(0), picture(1)], ["a"]), "2 image.s. and 1 question"),
        (lambda p: p.caption("nowhere.png"), "nowhere.png"),
        (lambda p: p.caption(picture(0).astype(np.float32)), "must be uint8"),
        (lambda p: p.caption(np.zeros((0, 4, 3), np.uint8)), "no pixels"),
        (lambda p: p.caption(["a.png", 3]), "a.png"),
        (lambda p: p.caption(Image.new("F", (4, 4), -1.0)), "expected 0 to 65535"),
        (lambda p: p.generate(["a", 3]), "prompt 1 is a int"),
        (lambda p: p.generate("a \ud800"), "no Unicode text"),
        (lambda p: p.generate("a", steps=0), "steps is 0; a whole number from 1 to 1000"),
        (lambda p: p.generate("a", steps=2.5), "steps is 2.5"),
        (lambda p: p.generate("a", guidance=float("nan")), "guidance is nan"),
        (lambda p: p.generate("a", reference_guidance=2.0), "needs reference images"),
        (lambda p: p.generate("a", size=(16, 16), aspect=1.0), "are both given"),
        (lambda p: p.generate("a", aspect="wide"), "aspect is 'wide'; expected width over height"),
        (lambda p: p.generate("a", output="tensor"), "choose of 'pil', 'array', 'latent'"),
        (lambda p: p.generate("a", protocol="mine"), "protocol 'mine' is unknown; choose one of unialignment"),
        (lambda p: p.generate("a", seed=[1.5]), "seeds in"),
        (lambda p: p.answer(picture(0), "red " * 100), "fills the 96 tokens"),
        (lambda p: p.warm_up(["paint"]), "tasks .'paint'. are unknown"),
    ],
)
def test_bad_requests_are_refused(pipeline, call, message):
    with pytest.raises(ValueError, match=message):
        call(pipeline)


def test_a_directory_that_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="is no checkpoint: expected a run's stage directory"):
        UniAlignPipeline.from_pretrained(tmp_path)
