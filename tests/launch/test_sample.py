"""The sampling command, run as a user runs it."""

import os
import pathlib
import subprocess
import sys

import pytest
from PIL import Image

ROOT = pathlib.Path(__file__).parents[2]


def sample(*arguments):
    return subprocess.run(
        [sys.executable, "launch/sample.py", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_images_from_flags(stage, tmp_path):
    flags = (
        f"--checkpoint={stage[0]}", "--task=generate", "--prompt=a red square", f"--output={tmp_path / 'out'}",
        "--count=3", "--seed=5", "--steps=2", "--guidance=3", "--size=8,24", "--grid=2", "--dtype=float32",
        f"--compilation_cache={tmp_path / 'cache'}",
    )  # fmt: skip
    made = sample(*flags)
    assert made.returncode == 0, made.stderr
    assert made.stdout.split() == [f"{tmp_path}/out/{i:03d}.png" for i in range(3)]
    assert "3/3" in made.stderr and "image/s" in made.stderr and "left" in made.stderr
    image = Image.open(tmp_path / "out/001.png")
    assert image.size == (24, 8) and image.text["guidance"] == "3.0" and image.text["seed"] == "6"
    assert Image.open(tmp_path / "out/grid.png").size == (49, 8)
    assert (tmp_path / "cache").is_dir()  # what is kept there, and when, is test_compilation_cache.py's


@pytest.mark.parametrize(
    ("flags", "message", "code"),
    [
        (("--task=generate",), "generate needs --prompt", 78),
        (("--task=edit", "--prompt=a"), "edit needs --image", 78),
        (("--task=generate", "--prompt=a", "--size=8"), "--size=8 is not of the form height,width", 1),
        (("--task=generate", "--prompts=nowhere.txt"), "nowhere.txt", 1),
        (("--task=generate", "--prompt=a"), "or the name of a shipped checkpoint, of which this package has", 1),
    ],
)
def test_errors_are_one_line(tmp_path, flags, message, code):
    run = sample("--checkpoint=nowhere", f"--output={tmp_path / 'out'}", "--compilation_cache=", *flags)
    assert run.returncode == code
    assert message in run.stderr and len(run.stderr.strip().splitlines()) == 1, run.stderr
