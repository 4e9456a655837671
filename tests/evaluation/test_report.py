"""The report page from a run's event files and an evaluation's directory."""

import base64
import html
import io
import json
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from unialign_jax.data.scenes import draw
from unialign_jax.evaluation import evaluate, report, scenes
from unialign_jax.training.writers import SummaryWriter, read_scalars

ROOT = pathlib.Path(__file__).parents[2]
COUNT = 12  # as many as a page shows


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
    write_run(tmp_path / "run")
    tasks = ["generate", "edit", "caption"]
    common = {"tasks": tasks, "subsets": ["test"], "things": [(1, 2)], "count": COUNT}
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
    assert metrics["halved"] == {"image": False, "text": False}  # of the terms over all data that were written
    assert "A &lt;run&gt;" in page and "&lt;nonsense&gt;" in page and "<nonsense>" not in page
    assert len(re.findall("<polyline", page)) == 3
    row = re.search("<tr><td>caption<td>exact.*?</tr>", page)[0]
    assert row.index("100.0%") < row.index("0.0%") and f"n = {COUNT}" in row
    # Two models, three tasks of twelve examples each; nothing is loaded from elsewhere.
    assert len(re.findall('src="data:image/png;base64', page)) == 2 * 3 * COUNT == page.count("src=")


def test_every_picture_stands_beside_what_was_asked(knowing, tmp_path):
    """Of inputs in one column and in several; "asked" is text, whatever is in it."""
    write_run(tmp_path)
    tasks = ["generate", "edit", "compose", "answer"]
    evaluate.evaluate_scenes(
        knowing(), tmp_path / "scores", tasks=tasks, subsets=["test"], things=[(1, 2)], count=COUNT
    )
    outputs = tmp_path / "scores" / "outputs.jsonl"
    outputs.write_text(outputs.read_text().replace('"asked": "', '"asked": "<b>'))
    report.write(tmp_path, title="", workdir=tmp_path, stages=("pretrain",), evaluations={"x": tmp_path / "scores"})
    page = (tmp_path / "report.html").read_text()
    rows = re.findall(r'<tr><td><img width="\d+" src="data:image/png;base64,(.*?)"><td>&lt;b&gt;(.*?)\s*<td', page)
    examples = [draw(task, i, seed=scenes.SEED, subset="test", counts=(1, 2)) for task in tasks for i in range(COUNT)]
    assert len(rows) == len(examples)
    for (data, asked), example in zip(rows, examples, strict=True):
        assert asked == html.escape(example.question or example.instruction)
        picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
        assert len(picture) == 32
        shown = [] if example.task == "answer" else [reference.render(32) for reference in example.references]
        for place, image in enumerate(shown):
            np.testing.assert_array_equal(picture[:, 33 * place : 33 * place + 32], image)
        np.testing.assert_array_equal(picture[:, -32:], example.target.render(32))


def kept():
    """What `report.write` returns of a run that kept what the quickstart promises, and is no better than it must be."""
    terms = ("image", "text", "contrastive", "image_align", "text_align")
    losses = {term: {"first": 4.0, "last": 2.0, "ratio": 0.5} for term in terms}
    losses["compose/image"] = {"first": 1.0, "last": 0.9, "ratio": 0.9}  # of one source: not promised
    estimate = {"value": 0.5, "low": 0.4, "high": 0.6, "samples": 48}
    rows = [{"task": "caption", "measure": "exact", "kind": "", "estimate": estimate}]
    rows += [{**rows[0], "kind": "long", "estimate": {**estimate, "value": 0.0}}]
    return {"losses": losses, "halved": dict.fromkeys(terms, True), "scores": {"it": {"test, 1 things": rows}}}


def test_a_kept_promise_is_told_from_a_broken_one():
    report.check(kept(), "it")
    risen, absent, poor, unscored = kept(), kept(), kept(), kept()
    risen["halved"]["text"], risen["losses"]["text"]["ratio"] = False, 0.51
    with pytest.raises(ValueError, match="it: .* the loss text ended at 51% of its first value, expected 50% or less"):
        report.check(risen, "it")
    del absent["halved"]["contrastive"], absent["losses"]["contrastive"]
    with pytest.raises(ValueError, match="the loss contrastive is not there"):
        report.check(absent, "it")
    poor["scores"]["it"]["test, 1 things"][0]["estimate"]["value"] = 23 / 48
    with pytest.raises(ValueError, match="47.9% of the captions of one thing are exact, expected 50% or more"):
        report.check(poor, "it")
    unscored["scores"]["it"] = {"test, 1-2 things": unscored["scores"]["it"]["test, 1 things"]}
    with pytest.raises(ValueError, match=r"no captions of one thing were scored .launch/evaluate.py --things=1"):
        report.check(unscored, "it")


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
    assert "generate/image: 8 -> 3 (38%)" in done.stdout and "\nnot halved: image, text\n" in done.stdout
    assert {"test, 1 things", "test, 2 things"} == set(
        json.loads((tmp_path / "page" / "metrics.json").read_text())["scores"]["it"]
    )
    twice = subprocess.run([*command, arguments[-1]], env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert twice.returncode == 1 and "a second 'it'" in twice.stderr
    unknown = subprocess.run([*command, "--check=that"], env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert unknown.returncode == 1 and "--check=that: expected the label of one of --scores" in unknown.stderr
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
