"""Examples of the six tasks: reproducible, true, and never of what is held out."""

import collections
import concurrent.futures
import multiprocessing

import numpy as np
import pytest

from unialign_jax.data.samples import TASKS
from unialign_jax.data.scenes import edits, language, questions, rendering, tasks, templates, verify, world
from unialign_jax.data.scenes.tasks import draw
from unialign_jax.data.scenes.world import Scene, split_of
from unialign_jax.data.tokenizer import Tokenizer


def examples(task, count, **options):
    return [draw(task, i, **options) for i in range(count)]


def fingerprint(index):
    """What example `index` of every task is, texts and pixels; run in other processes too."""
    parts = [draw(task, index, seed=5) for task in TASKS]
    return [(example, example.target.render(32).tobytes()) for example in parts]


def test_examples_are_the_same_in_any_process_and_order():
    here = [fingerprint(i) for i in range(12)]
    with concurrent.futures.ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        elsewhere = list(pool.map(fingerprint, reversed(range(12))))
    assert elsewhere[::-1] == here
    assert draw("edit", 3) != draw("edit", 3, seed=1) and draw("edit", 3) != draw("edit", 4)
    scenes = {draw(task, 0, subset=subset).target.scene for task in TASKS for subset in tasks.SETS}
    assert len(scenes) == len(TASKS) * len(tasks.SETS)  # nothing shares its random numbers


def texts_of(example):
    """All that a model reads or writes."""
    return filter(None, (example.caption, example.instruction, f"{example.question} {example.answer}".strip()))


@pytest.mark.parametrize("task", TASKS)
def test_training_never_sees_what_is_held_out(task):
    trained = examples(task, 300)
    pictures = [picture for example in trained for picture in (example.target, *example.references)]
    assert {split_of(picture.scene) for picture in pictures if picture.scene.things} == {"train"}
    texts = {text for example in trained for text in texts_of(example)}
    assert max(map(templates.length, texts)) <= language.LONGEST
    for subset in tasks.SETS[1:]:
        held = examples(task, 60, subset=subset)
        assert {split_of(example.target.scene) for example in held} == {"test" if subset == "wordings" else subset}
        assert not {example.target.scene.spoken() for example in held} & {p.scene.spoken() for p in pictures}
        if subset == "wordings":
            assert not {text for example in held for text in texts_of(example)} & texts - {
                example.caption for example in held if task == "perceive"
            }


@pytest.mark.parametrize("subset", ["train", "wordings"])
def test_captions_and_instructions_tell_the_target(subset):
    for task in ("generate", "caption", "edit", "compose"):
        for example in examples(task, 100, subset=subset):
            truth = example.target.scene
            assert verify.caption_exact(example.caption, truth)
            if task in ("generate", "caption"):
                assert example.instruction == example.caption and not example.references
            if task == "edit":
                (before,) = example.references
                done = edits.parse_instruction(example.instruction)
                assert edits.apply(before.scene, done).spoken() == truth.spoken() != before.scene.spoken()
                assert example.kind == "+".join(sorted(edit.kind for edit in done))


def test_references_and_prompt_of_a_composition_determine_it():
    grounds = collections.Counter()
    for example in examples("compose", 200):
        scenes = [picture.scene for picture in example.references]
        truth = example.target.scene
        things = [scene.things[0] for scene in scenes if scene.things]
        words = example.instruction.split(" on ")[0].removeprefix("put ")
        built = []
        for part in words.split(" and "):
            name, place = part.split(" at the ")
            (thing,) = [t for t in things if {t.shape, t.colour} & set(name.split())]
            built.append(world.Thing(thing.shape, thing.colour, thing.size, place, thing.direction))
        if example.instruction.endswith("on this background"):
            assert not scenes[-1].things and len(scenes) == len(built) + 1
            background = scenes[-1].background
        else:
            background = example.instruction.split()[-2]
        grounds[example.instruction.endswith("this background")] += 1
        assert Scene(tuple(built), background) == truth
        assert all(scene.things[0].place == "centre" for scene in scenes if scene.things)
        assert example.kind == questions.NUMBERS[len(built)] and 1 <= len(built) <= 3
    assert min(grounds.values()) > 70


def test_every_thing_that_is_trained_on_can_be_shown_alone():
    """Else a composition's references would be drawn without end."""
    for colour in world.COLOURS:
        for shape in world.SHAPES:
            for size in world.SIZES:
                thing = world.Thing(shape, colour, size, "centre")
                splits = {split_of(Scene((thing,), background)) for background in world.BACKGROUNDS}
                assert "train" in splits or (colour, shape) in world.HELD_OUT_PAIRS


def test_maps_are_of_the_reference():
    kinds = collections.Counter()
    for example in examples("perceive", 100):
        (source,) = example.references
        assert source.kind == "image" and source.scene == example.target.scene
        image = example.target.render(32)
        assert (image == rendering.render_map(source.scene, example.kind, 32)).all()
        name = {"depth": "depth map", "edges": "canny edges"}.get(example.kind, example.kind)
        assert name in example.instruction and example.caption == f"a {name}"
        kinds[example.kind] += 1
    assert set(kinds) == set(rendering.MAPS) and min(kinds.values()) > 10


def test_counts_are_kept():
    for task in TASKS:
        for counts in ((1,), (1, 2), (4, 3)):
            found = {len(e.target.scene.things) for e in examples(task, 30, counts=counts)}
            assert found == set(counts) - ({4} if task == "compose" else set())
    assert {len(e.references[0].scene.things) for e in examples("edit", 60, counts=(1, 2))} == {1, 2}


def test_what_cant_be_drawn():
    with pytest.raises(ValueError, match="no task 'paint'; the tasks are generate"):
        draw("paint", 0)
    with pytest.raises(ValueError, match="no set 'valid'; there are train"):
        draw("edit", 0, subset="valid")
    with pytest.raises(ValueError, match="counts is .4,., but compositions have at most 3 things"):
        draw("compose", 0, counts=(4,))
    for counts in ((), (0,), (5, 1)):
        with pytest.raises(ValueError, match="expected numbers of things from 1 to 4"):
            draw("generate", 0, counts=counts)
    for task in TASKS:  # none of them searches for ever
        with pytest.raises(ValueError, match="'relations' needs at least 2 things"):
            draw(task, 0, subset="relations", counts=(1,))


def test_a_small_vocabulary_holds_the_language():
    texts = [text for task in TASKS for example in examples(task, 500) for text in texts_of(example)]
    words = {word for text in texts for word in templates.split(text)}
    assert len(words) < 90
    learned = Tokenizer.learn(texts, 256)
    rng = np.random.default_rng(0)
    for i in rng.permutation(len(texts))[:300]:
        ids = learned.encode(texts[i], 32)
        assert learned.decode(ids) == texts[i]
