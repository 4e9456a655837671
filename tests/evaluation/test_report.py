"""The report page from a run's event files and an evaluation's directory."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

from unialign_jax.evaluation import evaluate, report
from unialign_jax.training.writers import SummaryWriter, read_scalars

ROOT = pathlib.Path(__file__).parents[2]


def write_run(workdir):
    """Two stages; the first was killed after step 3 and resumed after step 2."""
    first = SummaryWriter(str(workdir / "pretrain"))
    for step, value in ((1, 8.0), (2, 6.0), (3, 100.0)):
        first.write_scalars(step, {"loss": value, "generate/image": value, "generate/learning_rate": 1.0, "image": 9.0})
    first.close()
    again = SummaryWriter(str(workdir / "pretrain"), start_step=3)
    for step, value in ((3, 4.0), (4, 3.0)):
        again.write_scalars(step, {"generate/image": value})
    again.close()
    second = SummaryWriter(str(workdir / "unify"))
    second.write_scalars(5, {"text": 2.0, "loss": 1.0})  # a single source: its losses have no other name
    second.close()


def test_scalars_of_an_interrupted_run_are_those_of_an_uninterrupted_one(tmp_path):
    write_run(tmp_path)
    [file] = [path for path in (tmp_path / "unify").iterdir() if "tfevents" in path.name]
    file.write_bytes(file.read_bytes() + b"\x20\x00\x00\x00\x00\x00\x00\x00cut")
    assert read_scalars(tmp_path / "pretrain")["generate/image"] == [(1, 8.0), (2, 6.0), (3, 4.0), (4, 3.0)]
    assert read_scalars(tmp_path / "unify") == {"text": [(5, 2.0)], "loss": [(5, 1.0)]}
    good = len(file.read_bytes()) - 11
    file.write_bytes(file.read_bytes()[:good] + b"\x02\x00\x00\x00\x00\x00\x00\x00" + b"\xff" * 10)
    with pytest.raises(ValueError, match=f"{file.name}: damaged from byte {good} on"):
        read_scalars(tmp_path / "unify")


def test_stages_are_joined_and_only_losses_are_shown(tmp_path):
    write_run(tmp_path)
    losses, ends = report.curves(tmp_path, ("pretrain", "unify", "personalize"))
    generate = [(1, 8.0), (2, 6.0), (3, 4.0), (4, 3.0)]
    assert losses == {"image": [(1, 9.0), (2, 9.0)], "text": [(9, 2.0)], "generate/image": generate}
    assert list(losses)[-1] == "generate/image"  # sources come after the sums
    assert ends == [4, 9]
    assert report.changes(losses)["generate/image"] == {"first": 8.0, "last": 3.0, "ratio": 0.375}


def test_the_page_holds_everything(knowing, tmp_path):
    count = 12
    write_run(tmp_path / "run")
    tasks = ["generate", "edit", "caption"]
    common = {"tasks": tasks, "subsets": ["test"], "things": [(1, 2)], "count": count}
    evaluate.evaluate_scenes(knowing(), tmp_path / "good", **common)
    wrong = knowing(lambda i, made, _: "<nonsense>" if isinstance(made, str) else made)
    evaluate.evaluate_scenes(wrong, tmp_path / "bad", **common)
    metrics = report.write(
        tmp_path / "page",
        title="A <run>",
        workdir=tmp_path / "run",
        stages=("pretrain", "unify"),
        evaluations={"knowing": tmp_path / "good", "wrong": tmp_path / "bad"},
    )
    assert json.loads((tmp_path / "page" / "metrics.json").read_text()) == metrics
    page = (tmp_path / "page" / "report.html").read_text()
    assert "A &lt;run&gt;" in page and "&lt;nonsense&gt;" in page and "<nonsense>" not in page
    assert len(re.findall("<polyline", page)) == 3
    row = re.search("<tr><td>caption<td>exact.*?</tr>", page)[0]
    assert row.index("100.0%") < row.index("0.0%") and f"n = {count}" in row
    # Two models, two grids and eight images with captions each; nothing is loaded from elsewhere.
    assert len(re.findall('src="data:image/png;base64', page)) == 2 * (2 + 8) == page.count("src=")


def test_the_command(knowing, tmp_path):
    write_run(tmp_path / "run")
    evaluate.evaluate_scenes(
        knowing(), tmp_path / "scores", tasks=["generate"], subsets=["test"], things=[(1,), (2,)], count=2
    )
    arguments = [f"--workdir={tmp_path}/run", f"--output={tmp_path}/page", f"--scores=it={tmp_path}/scores"]
    command = [sys.executable, str(ROOT / "launch" / "report.py"), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "generate/image: 8 -> 3 (38%)" in done.stdout
    assert {"test, 1 things", "test, 2 things"} == set(
        json.loads((tmp_path / "page" / "metrics.json").read_text())["scores"]["it"]
    )
    twice = subprocess.run([*command, arguments[-1]], env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert twice.returncode == 1 and "a second 'it'" in twice.stderr
    command[2] = f"--workdir={tmp_path}/typo"
    refused = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert refused.returncode == 1 and "typo: expected a run, with any of pretrain" in refused.stderr


def test_an_evaluation_that_is_not_there_is_named(tmp_path):
    write_run(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"nowhere/scores.json: not found; .*launch/evaluate.py"):
        report.write(tmp_path, title="", workdir=tmp_path, stages=("pretrain",), evaluations={"x": "nowhere"})
    for name in ("scores.json", "outputs.jsonl"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match=r"scores.json: expected what launch/evaluate.py writes"):
        report.write(tmp_path, title="", workdir=tmp_path, stages=("pretrain",), evaluations={"x": tmp_path})
