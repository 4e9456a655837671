"""The drawn corpus: reproducible, true to its descriptions, and readable as published rows."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from unialign_jax.data import scenes
from unialign_jax.data.scenes import Scene, Thing
from unialign_jax.data.sources import JsonlSource


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_same_arguments_write_the_same_bytes(tmp_path):
    for name, count, seed in (("a", 6, 3), ("b", 6, 3), ("c", 6, 4), ("d", 9, 3)):
        scenes.write_corpus(tmp_path / name, count, 16, seed)
    a, b, c, d = (contents(tmp_path / name) for name in "abcd")
    assert len(a) == 14 and a == b and a.keys() == c.keys() and a != c
    # A larger corpus begins with the smaller one.
    assert all(d[path] == data for path, data in a.items() if path.suffix == ".png")


def test_captions_and_instructions():
    one = Thing("circle", "red", "small", "top left")
    two = Thing("square", "blue", "large", "centre")
    assert Scene((one,), "grey").caption() == "a small red circle at the top left on a grey background"
    assert Scene((one, two), "white").caption() == (
        "a small red circle at the top left and a large blue square at the centre on a white background"
    )
    rng = np.random.default_rng(0)
    for _ in range(50):
        scene = scenes.draw_scene(rng)
        after, instruction = scenes.recolour(scene, rng)
        (changed,) = [new for old, new in zip(scene.things, after.things, strict=True) if old != new]
        assert instruction == f"make the {changed.shape} {changed.colour}"
        assert changed.colour not in {thing.colour for thing in scene.things}
        assert [thing.shape for thing in scene.things].count(changed.shape) == 1
        assert len({thing.place for thing in after.things}) == len(after.things)


@pytest.mark.parametrize("size", [24, 96])
def test_pixels_show_what_the_description_says(size):
    for place, (x, y) in scenes.PLACES.items():
        for number, shape in enumerate(scenes.SHAPES):
            colour = list(scenes.COLOURS)[number]
            areas = []
            for extent in scenes.SIZES:
                pixels = np.asarray(scenes.render(Scene((Thing(shape, colour, extent, place),), "white"), size))
                assert pixels.shape == (size, size, 3)
                assert pixels[int(y * size), int(x * size)].tolist() == list(scenes.COLOURS[colour])
                other = (0 if y > 0.5 else size - 1, 0 if x > 0.5 else size - 1)
                assert pixels[other].tolist() == list(scenes.BACKGROUNDS["white"])
                # How much of each pixel is covered, from any channel that differs.
                fore, back = (np.array(c, float) for c in (scenes.COLOURS[colour], scenes.BACKGROUNDS["white"]))
                cover = ((pixels - back) @ (fore - back)) / ((fore - back) @ (fore - back))
                areas.append(cover.sum() / size**2)
            radius = np.array(list(scenes.SIZES.values()))
            unit = {"circle": np.pi, "square": (2 * 0.9) ** 2, "triangle": 3 * np.sqrt(3) / 4}[shape]
            np.testing.assert_allclose(areas, unit * radius**2, rtol=0.2 if size < 50 else 0.06)


def test_rows_read_back_as_samples(tmp_path):
    scenes.write_corpus(tmp_path, 5, 16)
    generate, edit = (JsonlSource(tmp_path / name) for name in ("generate.jsonl", "edit.jsonl"))
    assert len(generate) == len(edit) == 5
    for i in range(5):
        assert generate[i].task == "generate" and edit[i].task == "edit"
        assert edit[i].references == (generate[i].target,)
        with Image.open(edit[i].target) as after, Image.open(generate[i].target) as before:
            assert after.size == before.size == (16, 16)
            assert np.asarray(after).tolist() != np.asarray(before).tolist()
        colour = edit[i].instruction.split()[-1]
        assert colour in edit[i].caption and colour not in generate[i].caption


def test_command(tmp_path):
    command = [sys.executable, "-m", "unialign_jax.data.scenes", f"--target={tmp_path}"]
    done = subprocess.run([*command, "--count=2", "--size=8"], capture_output=True, text=True)
    assert done.returncode == 0 and "2 scenes" in done.stdout
    assert len((tmp_path / "edit.jsonl").read_text().splitlines()) == 2
    assert json.loads((tmp_path / "generate.jsonl").read_text().splitlines()[0])["image"] == ["images/000000.png"]
    assert subprocess.run([*command, "--count=0"], capture_output=True).returncode != 0
