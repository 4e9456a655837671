"""The scenes benchmark on models whose scores are known: one that reads and draws perfectly, and spoilt ones."""

import json
import re

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from unialign_jax.data import scenes as world
from unialign_jax.evaluation import evaluate, metrics, scenes

COUNT = 12


def overall(outputs):
    return {(s.task, s.measure): s.estimate.value for s in scenes.summarize(outputs) if not s.kind}


@pytest.mark.parametrize("task", ["generate", "edit", "perceive", "compose", "caption", "answer"])
def test_a_model_that_knows_scores_best(knowing, task):
    scores = overall(scenes.run(knowing(), task, COUNT))
    assert scores and all(value == (0 if measure == "error" else 1) for (_, measure), value in scores.items())


def test_every_third_output_spoilt_costs_a_third(knowing):
    wrong = knowing(lambda i, result, _: "nonsense" if i % 3 == 0 else result)
    assert overall(scenes.run(wrong, "caption", COUNT)) == {("caption", "exact"): pytest.approx(2 / 3)}
    assert overall(scenes.run(wrong, "answer", COUNT)) == {("answer", "right"): pytest.approx(2 / 3)}
    black = knowing(lambda i, result, _: np.zeros_like(result) if i % 3 == 0 else result)
    assert overall(scenes.run(black, "generate", COUNT)) == {("generate", "exact"): pytest.approx(2 / 3)}


def test_returning_the_source_is_no_edit(knowing):
    lazy = knowing(lambda i, result, references: references[0])
    assert overall(scenes.run(lazy, "edit", COUNT)) == {("edit", "exact"): 0}


def test_files_hold_what_was_made(knowing, tmp_path):
    tables = evaluate.evaluate_scenes(
        knowing(),
        tmp_path,
        tasks=["edit", "caption"],
        subsets=["test"],
        things=[(1, 2)],
        count=COUNT,
        about={"checkpoint": "known"},
    )
    [name] = tables
    saved = json.loads((tmp_path / "scores.json").read_text())
    assert saved["checkpoint"] == "known" and saved["tables"][name][0]["estimate"]["samples"] == COUNT
    kinds = [score for score in tables[name] if score.task == "edit" and score.kind]
    assert sum(score.estimate.samples for score in kinds) == COUNT
    rows = [json.loads(line) for line in (tmp_path / "outputs.jsonl").read_text().splitlines()]
    assert len(rows) == 2 * COUNT and all(row["scores"]["exact"] == 1 for row in rows)
    picture = np.asarray(Image.open(tmp_path / "test-1-2" / "edit.png"))
    truth = world.draw("edit", 0, seed=scenes.SEED, subset="test", counts=(1, 2))
    source, target = truth.references[0].render(32), truth.target.render(32)
    np.testing.assert_array_equal(picture[:32, :98], evaluate.image_grid(np.stack([source, target, target]), 3))


def test_tables_of_several_sets_and_numbers_are_kept_one_by_one(knowing, tmp_path, monkeypatch):
    everything = {"tasks": ["generate"], "subsets": ["test", "relations"], "things": [(1, 2), (3,)], "count": 2}
    tables = evaluate.evaluate_scenes(knowing(), tmp_path / "all", **everything)
    names = ["test, 1-2 things", "test, 3 things", "relations, 1-2 things", "relations, 3 things"]
    assert list(tables) == names == list(json.loads((tmp_path / "all" / "scores.json").read_text())["tables"])
    assert re.findall("## (.*)", (tmp_path / "all" / "scores.md").read_text()) == names
    assert {path.parent.name for path in (tmp_path / "all").glob("*/*.png")} == {
        "test-1-2", "test-3", "relations-1-2", "relations-3",
    }  # fmt: skip
    # What can't be is said before anything is sampled; what fails later leaves the tables before it.
    with pytest.raises(ValueError, match="compositions have at most 3 things"):
        evaluate.evaluate_scenes(None, tmp_path / "none", **everything | {"tasks": ["compose"], "things": [(1,), (4,)]})
    assert not (tmp_path / "none").exists()
    run = scenes.run

    def run_until_three(*args, counts, **kwargs):
        if counts == (3,):
            raise OSError("the machine is gone")
        return run(*args, counts=counts, **kwargs)

    monkeypatch.setattr(scenes, "run", run_until_three)
    with pytest.raises(OSError, match="is gone"):
        evaluate.evaluate_scenes(knowing(), tmp_path / "part", **everything)
    assert list(json.loads((tmp_path / "part" / "scores.json").read_text())["tables"]) == names[:1]


def test_a_directory_holds_scores_by_one_setting(knowing, tmp_path):
    """What other calls by the same settings have made stays; by other settings they are refused before they sample."""
    common = {"subsets": ["test"], "things": [(1, 2)], "count": 2, "about": {"checkpoint": "a"}}
    evaluate.evaluate_scenes(knowing(), tmp_path, tasks=["caption", "edit"], **common)
    found = evaluate.evaluate_scenes(knowing(), tmp_path, tasks=["generate"], **common | {"things": [(1,)]})
    assert list(found) == ["test, 1 things"]
    wrong = knowing(lambda i, result, _: "no")
    [(name, scores)] = evaluate.evaluate_scenes(wrong, tmp_path, tasks=["caption"], **common).items()
    assert {score.task for score in scores} == {"caption"} and scores[0].estimate.value == 0
    tables = json.loads((tmp_path / "scores.json").read_text())["tables"]
    assert list(tables) == [name, "test, 1 things"] and {row["task"] for row in tables[name]} == {"caption", "edit"}
    rows = [json.loads(line) for line in (tmp_path / "outputs.jsonl").read_text().splitlines()]
    exact = {(row["table"], row["task"]): row["scores"]["exact"] for row in rows}
    assert len(rows) == 6 and exact == {(name, "edit"): 1, ("test, 1 things", "generate"): 1, (name, "caption"): 0}
    never = knowing(lambda *_: pytest.fail("sampled"))
    with pytest.raises(ValueError, match="scores by other settings .checkpoint 'a', now 'b'"):
        evaluate.evaluate_scenes(never, tmp_path, tasks=["caption"], **common | {"about": {"checkpoint": "b"}})
    never.params = {"head": {"bias": np.ones(3, np.float32)}}  # trained anew since, in the same place
    with pytest.raises(ValueError, match=r"scores by other settings .weights \{'head': \d+\}, now \{'head': \d+\}"):
        evaluate.evaluate_scenes(never, tmp_path, tasks=["caption"], **common)


def test_earlier_tables_are_whole_whatever_happens_while_more_are_written(knowing, tmp_path):
    common = {"subsets": ["test"], "things": [(1, 2)], "count": 2}
    evaluate.evaluate_scenes(knowing(), tmp_path, tasks=["caption"], **common)
    names = ("scores.json", "scores.md", "outputs.jsonl")
    before = {name: (tmp_path / name).read_text() for name in names}
    opened = {name: (tmp_path / name).open() for name in names}
    evaluate.evaluate_scenes(knowing(), tmp_path, tasks=["generate"], **common)
    for name, file in opened.items():
        with file:
            assert file.read() == before[name] != (tmp_path / name).read_text()


@pytest.mark.parametrize(("name", "kept"), [("scores.json", 0), ("scores.json", 20), ("outputs.jsonl", -9)])
def test_damaged_files_are_named(knowing, tmp_path, name, kept):
    common = {"tasks": ["caption"], "subsets": ["test"], "things": [(1, 2)], "count": 2}
    evaluate.evaluate_scenes(knowing(), tmp_path, **common)
    (tmp_path / name).write_text((tmp_path / name).read_text()[:kept])
    with pytest.raises(ValueError, match=rf"{name} is damaged, or no evaluation's .*; remove {tmp_path}"):
        evaluate.evaluate_scenes(knowing(lambda *_: pytest.fail("sampled")), tmp_path, **common)


def test_sizes_that_scenes_cannot_be_read_at_are_refused(knowing):
    model = knowing()
    for size in ((16, 16), (32, 48), (34, 34)):
        model.size = size
        with pytest.raises(ValueError, match=f"{size[0]}x{size[1]}"):
            scenes.run(model, "caption", 1)


@pytest.mark.parametrize(("right", "of"), [(0, 5), (5, 5), (3, 10), (199, 200)])
def test_share_is_wilsons_interval(right, of):
    estimate = metrics.share([True] * right + [False] * (of - right))
    expected = stats.binomtest(right, of).proportion_ci(0.95, method="wilson")
    np.testing.assert_allclose([estimate.low, estimate.high], [expected.low, expected.high], atol=1e-6)
    assert (estimate.value, estimate.samples) == (right / of, of)


def test_mean_is_students_interval():
    values = np.random.default_rng(0).uniform(0.3, 0.6, size=5)
    estimate = metrics.mean(list(values))
    expected = stats.t.interval(0.95, 4, loc=values.mean(), scale=stats.sem(values))
    np.testing.assert_allclose([estimate.low, estimate.high], expected, atol=1e-6)
    equal = metrics.mean([1.0] * 5)  # which is no proof that all are
    assert (equal.value, equal.low, equal.high) == (1.0, metrics.share([True] * 5).low, 1.0)
    for value, count in ((0.4, 48), (0.7, 12), (0.9211, 13)):  # whose mean is rounded
        equal = metrics.mean([value] * count)
        assert equal.value == value and equal.high - equal.low > 0.05
    with pytest.raises(ValueError, match="no samples"):
        metrics.mean([])
