"""What docs/scenes.md says of the verifier is what it does."""

import dataclasses
import pathlib

import numpy as np
import pytest

from unialign_jax.data.scenes import Scene, Thing, render
from unialign_jax.evaluation import verifier

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "scenes.md"


def test_shares_by_hand():
    """Of four pictures one is exact up to a direction, one lacks a thing, one is of other colours, one is no scene."""
    red = Thing("circle", "red", "small", "top left", "left")
    blue = Thing("ring", "blue", "large", "bottom right", "down")
    truth = Scene((red, blue), "grey")
    others = [
        Scene((dataclasses.replace(red, direction="up"), blue), "grey"),
        Scene((red,), "grey"),
        Scene((dataclasses.replace(red, colour="pink"), dataclasses.replace(blue, colour="cyan")), "white"),
    ]
    shown = [*(render(scene, 32) for scene in others), np.zeros((32, 32, 3), np.uint8)]
    found = verifier.shares(lambda image, number: shown[number], [truth] * 4)
    assert [found[kind] for kind in ("exact", "no scene, named", "wrong")] == [1 / 4, 1 / 4, 2 / 4]
    of_things = {"places": 5, "shapes": 5, "colours": 3, "sizes": 5, "directions": 4}
    assert {name: found[name] for name in of_things} == {name: right / 8 for name, right in of_things.items()}


def test_what_is_misread_is_found(monkeypatch):
    scenes = verifier.draw(3)
    assert verifier.misread(scenes, 32) == [] and all(right for _, right in verifier.captions(scenes))
    monkeypatch.setattr(verifier, "render", lambda scene, side: render(scenes[0], side))
    assert verifier.misread(scenes, 32) == scenes[1:]


@pytest.mark.slow
def test_nothing_clean_is_misread():
    page = PAGE.read_text()
    for side, count in verifier.CLEAN.items():
        assert verifier.misread(verifier.draw(count), side) == []
        assert f"{count:,}".replace(",", " ") in page
    read = list(verifier.captions(verifier.draw(max(verifier.CLEAN.values()))))
    assert [text for text, right in read if not right] == []
    assert f"{len(read):,} captions".replace(",", " ") in page


@pytest.mark.slow
def test_the_table_of_the_page_is_what_is_found():
    """To two points: other versions of libraries blur, code and round a little differently."""
    head, _, *found = map(cells, verifier.rows())
    page = {row[0]: row for row in map(cells, PAGE.read_text().splitlines())}
    assert page[head[0]] == head
    for name, *values in found:
        np.testing.assert_allclose(np.float64(page[name][1:]), np.float64(values), atol=2, err_msg=name)


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]
