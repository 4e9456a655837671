"""Scenes: what is one, how they are drawn, which are held out."""

import collections
import itertools

import numpy as np
import pytest

from unialign_jax.data.scenes import world
from unialign_jax.data.scenes.world import Scene, Thing, draw_scene, split_of

RED = Thing("circle", "red", "small", "top left", "left")
BLUE = Thing("heart", "blue", "large", "bottom", "up")


def test_the_order_in_which_things_are_given_means_nothing():
    scene = Scene((BLUE, RED), "grey")
    assert scene == Scene((RED, BLUE), "grey") and scene.things == (RED, BLUE)
    assert hash(scene) == hash(Scene((RED, BLUE), "grey"))
    assert scene != Scene((RED, BLUE), "white")
    assert [thing.direction for thing in scene.spoken().things] == ["up", "up"]
    assert Scene.from_json(scene.to_json()) == scene
    assert scene.find("blue", "heart") == BLUE and scene.find("blue", "circle") is None


@pytest.mark.parametrize(
    "things, background, message",
    [
        ((RED, Thing("star", "blue", "small", "top left")), "grey", "two things at one place"),
        ((RED, Thing("circle", "red", "large", "top")), "grey", "of one colour and shape: red circle"),
        ((Thing("cube", "red", "large", "top"),), "grey", "no shape 'cube'; there are circle"),
        ((Thing("star", "red", "large", "top", "north"),), "grey", "no direction 'north'"),
        ((RED,), "black", "no background 'black'; there are white"),
        (
            tuple(Thing("star", c, "small", p) for c, p in zip(world.COLOURS, world.PLACES[:5], strict=False)),
            "grey",
            "5",
        ),
    ],
)
def test_what_is_no_scene(things, background, message):
    with pytest.raises(ValueError, match=message):
        Scene(things, background)


def test_colours_are_far_apart():
    colours = [*world.COLOURS.values(), *world.BACKGROUNDS.values(), (0, 0, 0)]
    distances = [np.linalg.norm(np.subtract(a, b)) for a, b in itertools.combinations(colours, 2)]
    assert len(distances) == 78 and min(distances) > 100


def test_every_attribute_is_drawn_evenly_and_the_same_every_time():
    scenes = [draw_scene(np.random.default_rng(i), None) for i in range(3000)]
    assert scenes[:20] == [draw_scene(np.random.default_rng(i), None) for i in range(20)]
    things = [thing for scene in scenes for thing in scene.things]
    values = {name: [getattr(t, name) for t in things] for name in ("shape", "colour", "size", "place", "direction")}
    values["background"] = [scene.background for scene in scenes]
    values["count"] = [len(scene.things) for scene in scenes]
    for name, kinds in {"shape": 8, "colour": 8, "size": 2, "place": 9, "direction": 4, "background": 4}.items():
        counts = collections.Counter(values[name])
        expected = len(values[name]) / kinds
        assert len(counts) == kinds
        assert all(abs(n - expected) < 5 * expected**0.5 for n in counts.values()), (name, counts)
    assert set(values["count"]) == {1, 2, 3, 4}


def test_splits_are_what_they_say_and_disjoint():
    drawn = {split: {draw_scene(np.random.default_rng(i), split) for i in range(150)} for split in world.SPLITS}
    for split, scenes in drawn.items():
        assert {split_of(scene) for scene in scenes} == {split}
        # The direction of a thing moves no scene from one split to another.
        assert {split_of(scene.spoken()) for scene in scenes} == {split}
    pairs = {split: {(t.colour, t.shape) for s in scenes for t in s.things} for split, scenes in drawn.items()}
    assert len(world.HELD_OUT_PAIRS) == 8
    assert {len({pair[i] for pair in world.HELD_OUT_PAIRS}) for i in (0, 1)} == {8}
    assert not pairs["train"] & world.HELD_OUT_PAIRS and pairs["attributes"] >= world.HELD_OUT_PAIRS
    assert len(pairs["train"]) == 56  # all others are seen
    above = Scene((Thing("star", "red", "small", "top"), Thing("circle", "red", "small", "bottom left")), "grey")
    below = Scene((Thing("star", "red", "small", "bottom"), Thing("circle", "red", "small", "top left")), "grey")
    assert split_of(above) == "relations" and split_of(below) in ("train", "test")
    # One in 16 of what could be trained on is kept for testing.
    splits = collections.Counter(split_of(draw_scene(np.random.default_rng(i), None)) for i in range(4000))
    assert 1 / 22 < splits["test"] / (splits["test"] + splits["train"]) < 1 / 12


def test_scenes_that_cant_be_drawn():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="'relations' needs at least 2 things"):
        draw_scene(rng, "relations", (1,))
    with pytest.raises(ValueError, match="no split 'valid'; there are train"):
        draw_scene(rng, "valid")
    for counts in ((), (0,), (5,)):
        with pytest.raises(ValueError, match="expected numbers from 1 to 4"):
            draw_scene(rng, "train", counts)
