"""The convert command, run as a user runs it."""

import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from unialign_jax.convert import load_torch
from unialign_jax.data.tokenizer import Tokenizer

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def convert(command):
    """Runs launch/convert.py with flags; the finished process."""
    return lambda **flags: command("launch/convert.py", *(f"--{name}={value}" for name, value in flags.items()))


def test_there_and_back(convert, golden, tmp_path):
    there = convert(to="jax", source=golden, target=tmp_path / "jax")
    assert there.returncode == 0, there.stderr
    assert "transformer: 2.7 MB" in there.stdout and f"wrote {tmp_path / 'jax'}" in there.stdout
    assert "100%" in there.stderr and "B/s" in there.stderr  # the progress bar
    back = convert(to="torch", source=tmp_path / "jax", target=tmp_path / "torch", progress=False)
    assert back.returncode == 0, back.stderr
    assert back.stderr == ""
    for file in ("transformer/diffusion_pytorch_model", "text_encoder/model", "vae/diffusion_pytorch_model"):
        assert (tmp_path / "torch" / f"{file}.safetensors").exists()


def test_a_training_run_becomes_a_pytorch_directory(convert, stage, tmp_path):
    directory, average = stage
    done = convert(to="torch", source=directory, target=tmp_path / "torch")
    assert done.returncode == 0, done.stderr
    written = load_torch(tmp_path / "torch/transformer", "transformer")
    jax.tree.map(np.testing.assert_array_equal, written, average["transformer"])
    assert Tokenizer.load(tmp_path / "torch/tokenizer").vocab_size == 40


@pytest.mark.slow
def test_the_parameters_themselves_and_the_comparison_with_pytorch(convert, stage, tmp_path, monkeypatch):
    directory, average = stage
    monkeypatch.setenv("HOME", str(tmp_path))
    done = convert(to="torch", source=directory, target="~/torch", average=False, check=True, steps=2)
    assert done.returncode == 0, done.stderr
    written = load_torch(tmp_path / "torch/transformer", "transformer")
    assert not np.array_equal(written["text_head"]["bias"], average["transformer"]["text_head"]["bias"])
    for task in ("generate: latents differ by", "edit: latents", "compose: latents", "caption: 0 tokens differ: same"):
        assert task in done.stdout


# The command, with a tensor of what it has written changed before it checks that.
ALTERED = """
import runpy, sys
from safetensors.numpy import load_file, save_file
from unialign_jax import exports

to_torch = exports.to_torch

def altered(source, target, **options):
    report = to_torch(source, target, **options)
    file = f"{target}/transformer/diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["image_proj_out.bias"] = tensors["image_proj_out.bias"] + 0.5
    save_file(tensors, file, metadata={"format": "pt"})
    return report

exports.to_torch = altered
sys.argv[0] = "launch/convert.py"
runpy.run_path("launch/convert.py", run_name="__main__")
"""


@pytest.mark.slow
def test_a_check_that_fails_ends_with_an_error(stage, tmp_path):
    flags = ["--to=torch", f"--source={stage[0]}", f"--target={tmp_path / 'torch'}", "--check", "--steps=2"]
    done = subprocess.run(
        [sys.executable, "-c", ALTERED, *flags], cwd=ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1 and "caption: 0 tokens differ: same" in done.stdout, done.stderr
    assert done.stderr.splitlines()[-1].endswith("differ in generate, edit, compose")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"to": "jax", "source": "nowhere", "target": "t"}, "nowhere is not a directory"),
        ({"to": "torch", "source": "tests", "target": "t"}, "tests is no checkpoint"),
        (
            {"to": "torch", "source": "a", "target": "t", "mask_token": "b"},
            "--mask_token and --teacher go with --to=jax",
        ),
        (
            {"to": "jax", "source": "tests/golden", "target": "gs://bucket/t"},
            "target gs://bucket/t: weights are converted on local disks; give a local directory, and copy that after",
        ),
    ],
)
def test_errors_are_one_line(convert, flags, message):
    assert_refused(convert(**flags), message, 1)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"to": "onnx", "source": "a", "target": "t"}, "should be one of <jax|torch>"),
        ({"to": "jax", "source": "a"}, "--target"),
    ],
)
def test_wrong_flags_are_one_line_and_final(convert, flags, message):
    assert_refused(convert(**flags), message, 78)


def assert_refused(run, message, code):
    assert run.returncode == code
    assert message in run.stderr and "Traceback" not in run.stderr
    assert len(run.stderr.strip().splitlines()) == 1
    assert not (ROOT / "t").exists() and not (ROOT / "gs:").exists()


def test_help(convert):
    run = convert(help=True)
    for word in ("--to=jax", "--to=torch", "--source", "--target", "--mask_token", "--teacher", "SD3-medium"):
        assert word in run.stdout
