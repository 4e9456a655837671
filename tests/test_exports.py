"""A run's weights as files: one network in memory at a time, nothing written or left where it can't be."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unialign_jax import convert, exports, pretrained
from unialign_jax.checkpoints import Checkpoints
from unialign_jax.convert import ConversionError, load_torch
from unialign_jax.data.tokenizer import PlainTokenizer, Tokenizer
from unialign_jax.state import TrainState


@pytest.mark.slow
@pytest.mark.parametrize("to", [exports.to_jax, exports.to_torch])
def test_one_network_is_in_memory_at_a_time(stage, float32_bytes, tmp_path, to):
    directory, average = stage
    to(directory, tmp_path / "out", progress=False)
    sizes = [sum(x.nbytes for x in jax.tree.leaves(network)) for network in average.values()]
    assert sorted(float32_bytes) == sorted(sizes)
    if to is exports.to_jax:
        written = pretrained.load(tmp_path / "out", dtype="float32").params
    else:
        written = {name: load_torch(tmp_path / "out" / name, name) for name in average}
    jax.tree.map(np.testing.assert_array_equal, {name: written[name] for name in average}, average)
    # What a sampler takes where it is told nothing else is that of the run.
    assert _sampling(tmp_path / "out") == _sampling(directory)


def test_a_teachers_tokenizer_comes_along(stage, tmp_path, monkeypatch):
    """As training found it: by its name, in which ~ is home; what is named and gone is missed."""
    monkeypatch.setenv("HOME", str(tmp_path))
    directory, average = stage
    with Checkpoints(directory / "checkpoints", read_only=True) as checkpoints:
        config = checkpoints.meta(3)["config"]
    config["model"]["teacher"] = {
        "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "patch_size": 8, "window_size": 16,
        "out_hidden_size": 12, "fullatt_block_indexes": [0], "min_pixels": 256, "max_pixels": 256, "vocab_size": 50,
    }  # fmt: skip
    config["teacher_tokenizer"] = "~/theirs"
    with Checkpoints(tmp_path / "run/checkpoints") as checkpoints:
        checkpoints.save(3, TrainState(jnp.int32(3), average, {}, average), {}, {"config": config, "init": None})
    shutil.copytree(directory / "tokenizer", tmp_path / "run/tokenizer")
    with pytest.raises(FileNotFoundError, match="teacher_tokenizer is ~/theirs, which is no directory"):
        exports.to_jax(tmp_path / "run", tmp_path / "without", progress=False)
    Tokenizer.learn(["ein rotes Quadrat"], 24).save(tmp_path / "theirs")
    exports.to_jax(tmp_path / "run", tmp_path / "out", progress=False)
    written = PlainTokenizer.load(tmp_path / "out/teacher_tokenizer")
    assert written.fingerprint() == PlainTokenizer.load(tmp_path / "theirs").fingerprint()


def test_a_shipped_checkpoint_is_exported_by_its_name(tmp_path):
    exports.to_torch("scenes", tmp_path / "torch", progress=False)
    written = load_torch(tmp_path / "torch" / "transformer", "transformer")
    params = pretrained.load("scenes", dtype="float32").params["transformer"]
    jax.tree.map(np.testing.assert_array_equal, written, params)
    assert _sampling(tmp_path / "torch") == _sampling("scenes") == (34, (32, 32), "scenes")
    convert.to_jax(tmp_path / "torch", tmp_path / "back", progress=False)
    assert _sampling(tmp_path / "back") == _sampling("scenes")


def _sampling(directory):
    model = pretrained.load(directory, dtype="float32")
    return model.text_length, model.size, model.protocol


def test_what_is_public_already_is_not_exported(golden, tmp_path):
    with pytest.raises(ConversionError, match="is a public pipeline directory already"):
        exports.to_torch(golden, tmp_path / "out")


def test_a_damaged_run_leaves_no_target(stage, tmp_path, monkeypatch):
    def damaged(*_, **__):
        raise ConversionError("cut short")

    monkeypatch.setattr(pretrained, "step_params", damaged)
    for to in (exports.to_jax, exports.to_torch):
        with pytest.raises(ConversionError, match="cut short"):
            to(stage[0], tmp_path / "out", progress=False)
    assert not list(tmp_path.iterdir())


REMOTE = "gs://bucket/x"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda here, stage: exports.to_jax(stage, REMOTE), "target gs://bucket/x: .* copy that afterwards"),
        (lambda here, stage: exports.to_torch(stage, REMOTE), "target gs://bucket/x"),
        (lambda here, stage: convert.to_jax(REMOTE, here / "a"), "source gs://bucket/x: .* copy it here first"),
        (lambda here, stage: convert.to_jax(here, REMOTE), "target gs://bucket/x"),
        (lambda here, stage: convert.to_jax(here, here / "a", teacher=REMOTE), "teacher gs://bucket/x"),
        (lambda here, stage: convert.to_jax(here, here / "a", mask_token=REMOTE), "mask_token gs://bucket/x"),
        (lambda here, stage: convert.to_torch(REMOTE, here / "a"), "source gs://bucket/x"),
        (lambda here, stage: convert.to_torch(here, REMOTE), "target gs://bucket/x"),
    ],
)
def test_weights_are_converted_on_local_disks(stage, tmp_path, monkeypatch, call, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConversionError, match=message):
        call(tmp_path, stage[0])
    assert not list(tmp_path.iterdir())


def test_home_is_understood_in_every_path(stage, golden, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").symlink_to(stage[0])
    (tmp_path / "public").symlink_to(golden)
    exports.to_jax("~/run", "~/weights", progress=False)
    exports.to_torch("~/run", "~/torch", progress=False)
    convert.to_jax("~/public", "~/converted", progress=False)
    report = convert.to_torch("~/converted", "~/back", progress=False)
    assert report.target == tmp_path / "back"
    made = {"run", "public", "weights", "torch", "converted", "back"}
    assert {path.name for path in tmp_path.iterdir()} == made
