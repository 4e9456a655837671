"""Commands whose directories are given with a `~`, which bash leaves as it is behind a `=`."""

import json
import os
import pathlib
import subprocess
import sys

from unialign_jax.data import scenes

ROOT = pathlib.Path(__file__).parents[2]


def run(home: pathlib.Path, program: str, *flags: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "HOME": str(home)}
    command = [sys.executable, str(ROOT / "launch" / program), *flags]
    return subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, check=False)


def test_build(tmp_path):
    scenes.write_corpus(tmp_path, count=4, size=16, chosen=["generate"])
    done = run(tmp_path, "build.py", "--source=generate.jsonl", "--target=~/shards", "--processes=1")
    assert done.returncode == 0, done.stderr
    assert f"samples in {tmp_path}/shards" in done.stdout
    assert (tmp_path / "shards" / "dataset_info.json").exists() and not (tmp_path / "~").exists()


def test_evaluate(tmp_path):
    few = ("--tasks=caption", "--things=1", "--count=1", "--steps=1")
    done = run(tmp_path, "evaluate.py", "--checkpoint=scenes", "--output=~/scores", *few)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "scores" / "scores.json").read_text())["count"] == 1
    assert not (tmp_path / "~").exists()
