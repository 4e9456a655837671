"""The checkpoint that comes with the package: it is there, small, and does its tasks on scenes it has never seen."""

import json
import pathlib
import re

import pytest

import unialign_jax
from unialign_jax import lineage
from unialign_jax.evaluation import scenes
from unialign_jax.pipeline import UniAlignPipeline

DIRECTORY = pathlib.Path(unialign_jax.__file__).parent / "checkpoints_shipped" / "scenes"
COUNT = 8
# Far above chance, and below what it scores: of eight, these many.
AT_LEAST = {"generate": 6, "caption": 6, "answer": 5, "edit": 3, "compose": 5}


@pytest.fixture(scope="module")
def pipeline():
    return UniAlignPipeline.from_pretrained("scenes", dtype="float32", max_batch=COUNT, progress=False)


def test_it_is_named_small_and_scored():
    assert lineage.shipped() == ["scenes"]
    assert sum(path.stat().st_size for path in DIRECTORY.rglob("*") if path.is_file()) <= 10e6
    scores = json.loads((DIRECTORY / "scores.json").read_text())
    tasks = {score["task"].split("/")[0] for score in scores["tables"]["test, 1-2 things"]}
    assert tasks == {"generate", "caption", "answer", "edit", "perceive", "compose"}


def test_the_readme_tells_its_scores():
    readme = (pathlib.Path(unialign_jax.__file__).parents[1] / "README.md").read_text()
    told = re.search(
        r"(\d+) % of drawings, (\d+) % of captions, (\d+) % of answers,\s+(\d+) % of edits and (\d+) %", readme
    )
    scores = json.loads((DIRECTORY / "scores.json").read_text())["tables"]["test, 1-2 things"]
    found = {score["task"]: score["estimate"]["value"] for score in scores if not score["kind"]}
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
