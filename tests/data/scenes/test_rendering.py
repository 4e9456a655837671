"""Pictures and maps: that pixels show what the scene says, at any size."""

import numpy as np
import pytest

from unialign_jax.data.scenes import rendering
from unialign_jax.data.scenes.world import (
    BACKGROUNDS,
    COLOURS,
    DIRECTIONS,
    PLACES,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    draw_scene,
)

# In squared radii, from the definitions. A large ring has its whole marker in its hole, and the marker counts; small
# rings and crosses have it half on them, so they are left out.
AREAS = {
    "circle": np.pi,
    "square": 4,
    "triangle": 1.85,
    "diamond": 2,
    "cross": 4 * 0.5 - 0.25,
    "ring": np.pi * (0.75 + (1.2 / 5.5) ** 2),
}


def alone(shape="circle", colour="red", size="large", place="centre", direction="up", background="white"):
    return Scene((Thing(shape, colour, size, place, direction),), background)


def coverage(scene, size):
    """How much of each pixel the thing covers, its marker included: float `[size, size]`."""
    fore, back = (np.array(c, float) for c in (COLOURS[scene.things[0].colour], BACKGROUNDS[scene.background]))
    pixels = rendering.render(scene, size).astype(float)
    # background + a (fore - background) - m fore: a and m, the marker's part, from least squares over the channels.
    basis = np.stack([fore - back, -back], axis=1)  # thing, marker over background
    return np.linalg.lstsq(basis, (pixels - back).reshape(-1, 3).T, rcond=None)[0].sum(axis=0).reshape(size, size)


@pytest.mark.parametrize("size", [32, 100, 256])
@pytest.mark.parametrize("shape", AREAS)
def test_areas_and_centres(shape, size):
    for extent, radius in (("small", 4 / 32), ("large", 5.5 / 32)):
        if extent == "small" and shape in ("cross", "ring"):
            continue
        for place, (x, y) in {"top left": (8, 8), "right": (24, 16), "bottom": (16, 24)}.items():
            seen = coverage(alone(shape, size=extent, place=place, direction="down"), size)
            area = seen.sum() / (size * radius) ** 2
            assert area == pytest.approx(AREAS[shape], rel=0.025), (extent, place)
            middle = (np.arange(size) + 0.5) / size * 32
            across = (seen.sum(axis=0) * middle).sum() / seen.sum()
            assert across == pytest.approx(x, abs=0.1)
            if shape not in ("triangle", "ring"):  # the one has its weight, the other its marker, below the centre
                assert (seen.sum(axis=1) * middle).sum() / seen.sum() == pytest.approx(y, abs=0.1)


@pytest.mark.parametrize("size", [32, 64])
def test_the_nearer_thing_hides_the_farther_and_no_marker_is_ever_hidden(size):
    squares = {place: Thing("square", colour, "large", place) for place, colour in zip(PLACES, COLOURS, strict=False)}

    def at(x, y):
        return int(y * size / 32), int(x * size / 32)

    row = rendering.render(Scene((squares["top left"], squares["top"]), "grey"), size)
    assert row[at(12, 8)].tolist() == list(COLOURS[squares["top"].colour])
    column = rendering.render(Scene((squares["top left"], squares["left"]), "grey"), size)
    assert column[at(8, 12)].tolist() == list(COLOURS[squares["left"].colour])
    # Within 2.5/32 of its centre, where its marker is, a thing looks as if it were alone.
    middle = slice(-(-27 * size // 64), 37 * size // 64)
    for direction in DIRECTIONS:
        ring = Thing("ring", "pink", "large", "centre", direction)
        free = rendering.render(Scene((ring,), "grey"), size)
        assert free[middle, middle].max(axis=-1).min() < 20
        for front in (
            ("right", "bottom left", "bottom"),
            ("top left", "left", "right"),
            ("top", "top right", "bottom"),
        ):
            crowded = rendering.render(Scene((ring, *(squares[place] for place in front)), "grey"), size)
            assert (crowded[middle, middle] == free[middle, middle]).all()
            assert (crowded != free).any()


def test_pictures_of_a_larger_size_average_to_the_smaller():
    for seed in range(30):
        scene = draw_scene(np.random.default_rng(seed))
        small = rendering.render(scene, 32).astype(float)
        for n in (2, 8):
            large = rendering.render(scene, 32 * n).reshape(32, n, 32, n, 3).mean(axis=(1, 3))
            assert np.abs(large - small).max() < 40 and np.abs(large - small).mean() < 1


def test_maps():
    things = Thing("star", "red", "large", "top left", "right"), Thing("ring", "blue", "small", "bottom right", "down")
    scene = Scene(things, "navy")
    size = 96
    images = {kind: rendering.render_map(scene, kind, size) for kind in rendering.MAPS}
    assert all(image.shape == (size, size, 3) and image.dtype == np.uint8 for image in images.values())
    owner = rendering.owners(scene, size)
    assert set(np.unique(owner)) == {0, 1, 2}
    assert (images["segmentation"][owner == 1] == rendering.SEGMENT_COLOURS["star"]).all()
    assert (images["segmentation"][owner == 2] == rendering.SEGMENT_COLOURS["ring"]).all()
    assert (images["depth"][owner == 1] == 95).all() and (images["depth"][owner == 2] == 255).all()
    for kind in ("segmentation", "depth"):
        assert not images[kind][owner == 0].any()
    # Edges: a pixel is one exactly if a neighbour to the right or below is of another thing.
    padded = np.pad(owner, ((0, 1), (0, 1)), mode="edge")
    expected = (padded[:-1, :-1] != padded[1:, :-1]) | (padded[:-1, :-1] != padded[:-1, 1:])
    assert (images["edges"][..., 0] == 255 * expected).all()
    # Pose: the strokes' ends, in the colours of their directions.
    assert images["pose"][8 * 3, 11 * 3].tolist() == list(rendering.POSE_COLOURS["right"])
    assert images["pose"][27 * 3, 24 * 3].tolist() == list(rendering.POSE_COLOURS["down"])
    assert not images["pose"][24 * 3, 8 * 3].any()


def test_in_maps_too_the_nearer_thing_hides_the_farther():
    """Two large squares, across from 2.5 to 13.5 of 32 and from 10.5 to 21.5: where both are, the nearer is seen."""
    scene = Scene((Thing("square", "red", "large", "top left"), Thing("square", "blue", "large", "top")), "grey")
    assert rendering.owners(scene, 32)[8].tolist() == 3 * [0] + 8 * [1] + 10 * [2] + 11 * [0]
    assert rendering.render_map(scene, "depth", 32)[8, :, 0].tolist() == 3 * [0] + 8 * [95] + 10 * [115] + 11 * [0]
    assert rendering.render_map(scene, "edges", 32)[8, :, 0].nonzero()[0].tolist() == [2, 10, 20]


def test_a_picture_is_a_pure_function_of_the_scene():
    scene = draw_scene(np.random.default_rng(3), counts=(4,))
    first = rendering.render(scene, 32)
    first[:] = 0  # what is returned is the caller's own
    rendering.stamp.cache_clear()
    second = rendering.render(scene, 32)
    assert second.any() and (second == rendering.render(scene, 32)).all()


def test_every_attribute_changes_the_picture():
    pictures = {
        rendering.render(alone(*attributes), 32).tobytes()
        for attributes in [
            (shape, colour, size, "left", direction)
            for shape in SHAPES
            for colour in COLOURS
            for size in SIZES
            for direction in DIRECTIONS
        ]
    }
    assert len(pictures) == 512


def test_bad_arguments():
    with pytest.raises(ValueError, match="size is 7 pixels, expected at least 8"):
        rendering.render(alone(), 7)
    with pytest.raises(ValueError, match="no map 'normals'; there are depth"):
        rendering.render_map(alone(), "normals", 32)
