"""The verifier: exact on clean renders, honest about what it can't read, worse the worse the image is."""

import dataclasses
import itertools

import numpy as np
import pytest

from unialign_jax.data.scenes import language, rendering, verify
from unialign_jax.data.scenes.language import Unread
from unialign_jax.data.scenes.world import BACKGROUNDS, PLACES, Scene, Thing, draw_scene
from unialign_jax.evaluation import verifier
from unialign_jax.evaluation.verifier import blur, noise

RED = Thing("circle", "red", "small", "top left", "left")
BLUE = Thing("ring", "blue", "large", "bottom right", "down")


def scenes(count, counts=(1, 2, 3, 4)):
    return [draw_scene(np.random.default_rng([11, i]), None, counts) for i in range(count)]


@pytest.mark.parametrize("size, count", [(32, 1000), (64, 150), (256, 40), (50, 40)])
def test_clean_renders_read_back_as_they_are(size, count):
    for scene in scenes(count):
        assert verify.read_image(rendering.render(scene, size)) == scene


def test_crowded_scenes_of_large_things_read_back():
    """The worst occlusion there is: four large things in a block."""
    block = ("top left", "top", "left", "centre")
    for i, scene in enumerate(scenes(150, (4,))):
        moved = [
            dataclasses.replace(thing, place=place, size="large" if i % 2 else thing.size)
            for thing, place in zip(scene.things, block, strict=True)
        ]
        crowded = Scene(tuple(moved), scene.background)
        assert verify.read_image(rendering.render(crowded, 32)) == crowded


def test_empty_backgrounds_are_scenes():
    for background in BACKGROUNDS:
        assert verify.read_image(rendering.render(Scene((), background), 32)) == Scene((), background)


def test_it_gets_worse_with_noise_and_with_blur():
    items = scenes(60)
    for way, levels, harmless in ((noise, (0, 48, 80, 112, 144), 48), (blur, (0, 0.5, 1, 1.5, 2.5), 0.5)):
        shares = [verifier.shares(way(level), items)["exact"] for level in levels]
        assert all(b <= a for a, b in itertools.pairwise(shares)), shares
        assert shares[levels.index(harmless)] == 1 and shares[-1] < 0.1, shares


def test_a_good_photographic_coding_does_no_harm():
    assert verifier.shares(verifier.jpeg(95), scenes(60))["exact"] == 1


def test_images_that_are_no_scene_are_named():
    clean = rendering.render(Scene((RED, BLUE), "grey"), 32)

    def read(change):
        image = clean.copy()
        change(image)
        return verify.read_image(image)

    def paste(thing):
        def change(image):
            other = rendering.render(Scene((thing,), "grey"), 32)
            differs = (other != BACKGROUNDS["grey"]).any(axis=-1)
            image[differs] = other[differs]

        return change

    twin = read(paste(dataclasses.replace(RED, place="right", size="large")))
    assert twin == Unread("two things of one colour and shape")
    crowd = clean.copy()
    for colour, place in (("green", "top right"), ("pink", "left"), ("cyan", "bottom left")):
        paste(Thing("heart", colour, "small", place))(crowd)
    assert verify.read_image(crowd) == Unread("5 things; a scene has at most 4")

    def blob(image):
        image[8:16, 16:24] = (0, 200, 0)  # between the places

    def colour(image):
        image[(image == (225, 30, 40)).all(axis=-1)] = (120, 255, 160)

    for change in (blob, colour):
        assert "no scene explains the image" in read(change).reason
    half = read(lambda image: image.__setitem__(slice(16, None), 0))
    assert isinstance(half, Unread)


def test_what_counts_as_exact():
    scene = Scene((RED, BLUE), "grey")
    turned = Scene((dataclasses.replace(RED, direction="up"), BLUE), "grey")
    image = rendering.render(scene, 32)
    assert verify.image_exact(image, scene) and verify.image_exact(image, turned)
    others = [
        Scene((RED,), "grey"),
        Scene((RED, BLUE), "white"),
        Scene((RED, BLUE, Thing("star", "pink", "small", "centre")), "grey"),
        *(
            Scene((dataclasses.replace(RED, **{name: value}), BLUE), "grey")
            for name, value in {"shape": "square", "colour": "orange", "size": "large", "place": "top"}.items()
        ),
    ]
    for other in others:
        assert not verify.image_exact(image, other)
        for _, text in language.captions(other):
            assert verify.caption_exact(text, other) and not verify.caption_exact(text, scene)
    assert not verify.image_exact(np.zeros((32, 32, 3), np.uint8), scene)
    assert not verify.caption_exact("a small red circle", scene)
    assert verify.answer_right(" Yes. ", "yes") and not verify.answer_right("yes no", "yes")


def test_scores_of_maps():
    for scene in scenes(20):
        maps = {kind: rendering.render_map(scene, kind, 32) for kind in rendering.MAPS}
        assert verify.segmentation_iou(maps["segmentation"], scene) == 1
        assert verify.depth_error(maps["depth"], scene) == 0
        assert verify.edge_score(maps["edges"], scene) == 1
        assert verify.pose_exact(maps["pose"], scene)
        noisy_pose = noise(40)(maps["pose"], 0)
        assert verify.pose_exact(noisy_pose, scene)
        turned = dataclasses.replace(scene.things[0], direction="up" if scene.things[0].direction != "up" else "left")
        changed = Scene((turned, *scene.things[1:]), scene.background)
        assert not verify.pose_exact(maps["pose"], changed)
        assert not verify.pose_exact(maps["pose"], Scene(scene.things[1:], scene.background))
    # A square of 8 x 8 pixels: intersections by hand.
    square = Scene((Thing("square", "red", "small", "centre"),), "grey")
    mask = rendering.render_map(square, "segmentation", 32)
    half = mask.copy()
    half[:, :16] = 0
    assert verify.segmentation_iou(half, square) == pytest.approx((32 / 64 + 960 / 992) / 2)
    assert verify.segmentation_iou(np.zeros_like(mask), square) == pytest.approx((0 + 960 / 1024) / 2)
    depth = rendering.render_map(square, "depth", 32)
    assert verify.depth_error(np.zeros_like(depth), square) == pytest.approx(64 * (95 + 160 * 4 // 8) / 255 / 1024)
    edges = rendering.render_map(square, "edges", 32)
    assert verify.edge_score(np.zeros_like(edges), square) == 0
    assert verify.edge_score(np.full_like(edges, 255), square) == pytest.approx(2 * 31 / (1024 + 31))


def test_arrays_that_are_no_images():
    for image in (np.zeros((32, 32, 3)), np.zeros((32, 33, 3), np.uint8), np.zeros((32, 32), np.uint8)):
        with pytest.raises(ValueError, match=r"expected a square image, uint8 \[S, S, 3\]"):
            verify.read_image(image)
    with pytest.raises(ValueError, match="16 pixels wide; expected 32, or 35 or more"):
        verify.read_image(np.zeros((16, 16, 3), np.uint8))


def test_every_place_is_told_apart_from_its_neighbours():
    for place in PLACES:
        scene = Scene((dataclasses.replace(BLUE, place=place),), "brown")
        assert verify.read_image(rendering.render(scene, 32)) == scene
