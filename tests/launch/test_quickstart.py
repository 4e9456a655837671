"""The quickstart: its very commands in little, and that it ends with an error if what it promises was not kept."""

import json
import os
import pathlib
import shlex
import shutil
import subprocess
import sys

import pytest

from unialign_jax.training.writers import SummaryWriter

ROOT = pathlib.Path(__file__).parents[2]
STAGES = ("pretrain", "unify", "personalize")
TERMS = ("image", "text", "contrastive", "image_align", "text_align")


def quickstart(checkout: pathlib.Path, python: str) -> subprocess.CompletedProcess:
    """Runs the script in a checkout where the body `python`, in bash, stands for the environment's Python.

    In it `$real` is this test's Python; what asks for pip has nothing to do.
    """
    shutil.copytree(ROOT / "launch", checkout / "launch")
    (checkout / "configs").symlink_to(ROOT / "configs")
    stand_in = checkout / ".venv/bin/python"
    stand_in.parent.mkdir(parents=True)
    head = f'#!/usr/bin/env bash\nset -eu\nreal={shlex.quote(sys.executable)}\ncase "$*" in *pip*) exit 0 ;; esac\n'
    stand_in.write_text(head + python)
    stand_in.chmod(0o755)
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = ["bash", str(checkout / "launch/quickstart.sh")]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_its_commands_in_little(tmp_path):
    """Few scenes and two steps a stage: all is written, and the last line says what was not reached."""
    small = [f"--config.stages.{stage}.{key}" for stage in STAGES for key in ("steps=2", "log.every=1", "unroll=1")]
    done = quickstart(
        tmp_path,
        f"""
case "$*" in
*data.scenes*) set -- "$@" --count=200 ;;
launch/train.py*) set -- "$@" {" ".join(small)} ;;
launch/evaluate.py*) set -- "$@" --count=2 --batch=2 --steps=2 ;;
esac
exec "$real" "$@"
""",
    )
    out = tmp_path / "runs/quickstart"
    assert (out / "metrics.json").exists(), done.stderr
    metrics = json.loads((out / "metrics.json").read_text())
    assert {"image", "text"} <= set(metrics["halved"]) <= set(TERMS) and not all(metrics["halved"].values())
    assert metrics["losses"]["compose/image"]["last"] > 0
    tasks = {"generate", "caption", "answer", "edit", "perceive", "compose"}
    for [rows] in ([*tables.values()] for tables in metrics["scores"].values()):
        assert {row["task"].split("/")[0] for row in rows} == tasks
    assert [len(tables) for tables in metrics["scores"].values()] == [1, 1]
    assert (out / "pytorch/model_index.json").exists() and (out / "report.html").exists()
    assert done.returncode == 1 and "] done: " not in done.stdout
    assert "the run did not keep what the quickstart promises: the loss" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("last", "exact", "broken"),
    [
        ({}, 0.5, None),
        ({"text_align": 4.1}, 0.5, "the loss text_align ended at 51% of its first value"),
        ({}, 23 / 48, "47.9% of the captions of one thing are exact"),
    ],
)
def test_a_broken_promise_is_no_success(tmp_path, last, exact, broken):
    """Of a run that is written here, as training and scoring would."""
    writer = SummaryWriter(str(tmp_path / "made/pretrain"))
    for step in range(1, 3):
        values = {term: 8.0 if step == 1 else last.get(term, 4.0) for term in TERMS}
        writer.write_scalars(step, {**values, "compose/image": 8.0})
    writer.close()
    estimate = {"value": exact, "low": 0.0, "high": 1.0, "samples": 48}
    rows = [{"task": "caption", "measure": "exact", "kind": "", "estimate": estimate}]
    for label, table in (("fresh", "test, 1 things"), ("shipped", "test, 1-2 things")):
        scores = tmp_path / "made/scores" / label
        scores.mkdir(parents=True)
        (scores / "scores.json").write_text(json.dumps({"tables": {table: rows}}))
        (scores / "outputs.jsonl").write_text("")
    done = quickstart(
        tmp_path,
        """
case "$1" in
launch/report.py) exec "$real" "$@" ;;
launch/train.py) cp -r made/. runs/quickstart ;;
esac
""",
    )
    halved = json.loads((tmp_path / "runs/quickstart/metrics.json").read_text())["halved"]
    assert halved == {term: term not in last for term in TERMS}
    if broken is None:
        assert done.returncode == 0 and "] done: runs/quickstart/report.html" in done.stdout, done.stderr
        assert f"at least halved: {', '.join(TERMS)}\n" in done.stdout and "not halved" not in done.stdout
    else:
        assert done.returncode == 1 and "] done: " not in done.stdout
        assert broken in done.stderr.splitlines()[-1]
