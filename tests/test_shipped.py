"""The checkpoint that comes with the package: it is there, small, and does its tasks on scenes it has never seen."""

import json
import pathlib
import re

import pytest

import unialign_jax
from unialign_jax import lineage, saved_step
from unialign_jax.evaluation import scenes
from unialign_jax.pipeline import UniAlignPipeline

DIRECTORY = pathlib.Path(unialign_jax.__file__).parent / "checkpoints_shipped" / "scenes"
COUNT = 8
# Far above chance, and below what it scores: of eight, these many. That the weights work; how well, scores.json tells.
AT_LEAST = {"generate": 6, "caption": 6, "answer": 5, "edit": 3, "compose": 5}
# On held-out scenes of one and two things.
PROMISED = {
    "generate": 0.8, "caption": 0.9, "answer": 0.9, "edit": 0.7, "perceive/segmentation": 0.85, "compose": 0.6,
}  # fmt: skip


@pytest.fixture(scope="module")
def pipeline():
    return UniAlignPipeline.from_pretrained("scenes", dtype="float32", max_batch=COUNT, progress=False)


@pytest.fixture(scope="module")
def scored():
    return json.loads((DIRECTORY / "scores.json").read_text())


def test_it_is_named_and_small():
    assert lineage.shipped() == ["scenes"]
    assert sum(path.stat().st_size for path in DIRECTORY.rglob("*") if path.is_file()) <= 10e6


def test_its_scores_are_those_promised(scored):
    found = overall(scored)
    assert {task.split("/")[0] for task in found} == {"generate", "caption", "answer", "edit", "perceive", "compose"}
    assert scored["count"] >= 200
    assert {task: found[task] for task, least in PROMISED.items() if found[task] < least} == {}


def test_its_scores_are_of_these_weights(scored, pipeline):
    """Else weights were exchanged without `launch/evaluate.py --checkpoint=scenes`, whose scores.json belongs here."""
    weights = saved_step.checksums(pipeline.params)
    assert scored.get("weights") == weights


def overall(scored):
    """Scores by task of held-out scenes of one and two things."""
    rows = scored["tables"]["test, 1-2 things"]
    return {score["task"]: score["estimate"]["value"] for score in rows if not score["kind"]}


def test_the_readme_tells_its_scores(scored):
    readme = (pathlib.Path(unialign_jax.__file__).parents[1] / "README.md").read_text()
    told = re.search(
        r"(\d+) % of drawings, (\d+) % of captions, (\d+) % of answers,\s+(\d+) % of edits and (\d+) %", readme
    )
    found = overall(scored)
    tasks = ("generate", "caption", "answer", "edit", "compose")
    for task, percent in zip(tasks, told.groups(), strict=True):
        assert int(percent) == int(100 * found[task]), task


def test_it_knows_what_it_was_made_for(pipeline):
    assert pipeline.size == (32, 32) and pipeline.text_length == 34 and pipeline.protocol == scenes.PROTOCOL


@pytest.mark.parametrize("task", AT_LEAST)
def test_a_task_on_held_out_scenes(pipeline, task):
    outputs = scenes.run(pipeline, task, COUNT)
    right = sum(all(output.scores.values()) for output in outputs)
    assert right >= AT_LEAST[task], [output.scores for output in outputs]


def test_perception_of_held_out_scenes(pipeline):
    """Maps of all four kinds, each better than anything that does not look at the image."""
    good = {"mIoU": 0.4, "F1": 0.7, "exact": 1.0}  # depth has an error instead
    outputs = scenes.run(pipeline, "perceive", 2 * COUNT)
    assert {output.example.kind for output in outputs} == {"segmentation", "edges", "pose", "depth"}
    fine = [
        score < 0.06 if name == "error" else score >= good[name]
        for output in outputs
        for name, score in output.scores.items()
    ]
    assert sum(fine) >= 1.5 * COUNT, [output.scores for output in outputs]
