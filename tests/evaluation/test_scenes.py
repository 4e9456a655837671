"""The scenes benchmark on models whose scores are known: one that reads and draws perfectly, and spoilt ones."""

import json

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from unialign_jax.data import scenes as world
from unialign_jax.data.scenes import language, verify
from unialign_jax.evaluation import evaluate, metrics, scenes

COUNT = 12


class Knowing:
    """Answers as the truth does, found from what a model is given: `spoil` changes what it says or draws."""

    size = (32, 32)

    def __init__(self, spoil=lambda index, result, references: result):
        self.spoil = spoil

    def _truth(self, tasks, asked):
        for task in tasks:
            for i in range(COUNT):
                example = world.draw(task, i, seed=scenes.SEED, subset="test", counts=(1, 2))
                if asked(example):
                    return example
        raise AssertionError("asked for something that is no example")

    def generate(self, prompts, **_):
        # Independent of the examples: the prompt alone says what to draw.
        drawn = [world.render(verify.read_caption(prompt), 32) for prompt in prompts]
        return [self.spoil(i, image, None) for i, image in enumerate(drawn)]

    def compose(self, references, instructions, **_):
        def is_this(example, images, instruction):
            shown = [picture.render(32) for picture in example.references]
            return (
                example.instruction == instruction
                and len(shown) == len(images)
                and all(np.array_equal(a, b) for a, b in zip(shown, images, strict=True))
            )

        out = []
        for i, (images, text) in enumerate(zip(references, instructions, strict=True)):
            example = self._truth(
                ("edit", "perceive", "compose"), lambda e, images=images, text=text: is_this(e, images, text)
            )
            out.append(self.spoil(i, example.target.render(32), images))
        return out

    def caption(self, images, **_):
        # Independent of the examples, too: what is seen in the image is said in words of the language.
        rng = np.random.default_rng(0)
        said = [language.draw_caption(verify.read_image(image), rng)[1] for image in images]
        return [self.spoil(i, text, None) for i, text in enumerate(said)]

    def answer(self, images, questions, **_):
        out = []
        for i, (image, text) in enumerate(zip(images, questions, strict=True)):
            example = self._truth(
                ["answer"],
                lambda e, image=image, text=text: e.question == text and np.array_equal(e.target.render(32), image),
            )
            out.append(self.spoil(i, example.answer, None))
        return out


def overall(outputs):
    return {(s.task, s.measure): s.estimate.value for s in scenes.summarize(outputs) if not s.kind}


@pytest.mark.parametrize("task", ["generate", "edit", "perceive", "compose", "caption", "answer"])
def test_a_model_that_knows_scores_best(task):
    scores = overall(scenes.run(Knowing(), task, COUNT))
    assert scores and all(value == (0 if measure == "error" else 1) for (_, measure), value in scores.items())


def test_every_third_output_spoilt_costs_a_third():
    wrong = Knowing(lambda i, result, _: "nonsense" if i % 3 == 0 else result)
    assert overall(scenes.run(wrong, "caption", COUNT)) == {("caption", "exact"): pytest.approx(2 / 3)}
    assert overall(scenes.run(wrong, "answer", COUNT)) == {("answer", "right"): pytest.approx(2 / 3)}
    black = Knowing(lambda i, result, _: np.zeros_like(result) if i % 3 == 0 else result)
    assert overall(scenes.run(black, "generate", COUNT)) == {("generate", "exact"): pytest.approx(2 / 3)}


def test_returning_the_source_is_no_edit():
    lazy = Knowing(lambda i, result, references: references[0])
    assert overall(scenes.run(lazy, "edit", COUNT)) == {("edit", "exact"): 0}


def test_files_hold_what_was_made(tmp_path):
    tables = evaluate.evaluate_scenes(
        Knowing(),
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


def test_sizes_that_scenes_cannot_be_read_at_are_refused():
    model = Knowing()
    for size in ((16, 16), (32, 48)):
        model.size = size
        with pytest.raises(ValueError, match=f"{size[0]}x{size[1]}"):
            scenes.run(model, "caption", 1)


@pytest.mark.parametrize(("right", "of"), [(0, 5), (5, 5), (3, 10), (199, 200)])
def test_share_is_wilsons_interval(right, of):
    estimate = metrics.share([True] * right + [False] * (of - right))
    expected = stats.binomtest(right, of).proportion_ci(0.95, method="wilson")
    np.testing.assert_allclose([estimate.low, estimate.high], [expected.low, expected.high], atol=1e-6)
    assert (estimate.value, estimate.samples) == (right / of, of)


def test_mean_is_the_normal_interval():
    values = np.random.default_rng(0).uniform(size=50)
    estimate = metrics.mean(list(values))
    expected = stats.norm.interval(0.95, loc=values.mean(), scale=stats.sem(values))
    np.testing.assert_allclose([estimate.low, estimate.high], expected, atol=1e-6)
    with pytest.raises(ValueError, match="no samples"):
        metrics.mean([])
