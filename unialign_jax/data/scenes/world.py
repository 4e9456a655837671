"""What a scene is: up to four things on a 3 x 3 grid, how scenes are drawn at random, and which are never trained on.

    attribute    values
    shape        8, `SHAPES`
    colour       8, `COLOURS`
    size         2, `SIZES`
    place        9, `PLACES`; at most one thing at each
    direction    4, `DIRECTIONS`: where the thing's marker (a black dot off its centre) points
    background   4, `BACKGROUNDS`, of the scene

No two things of a scene have both colour and shape in common, so "the red circle" always means one thing. Depth is not
an attribute of its own: **a thing further down is nearer, and of two in one row the one further right**. Things are
kept in this order (that of reading, farthest first), so equal scenes are equal objects, and the order in which they are
given means nothing.

Language never tells the direction (see `language`): scenes that differ in it alone are the same to every caption, and
`Scene.spoken` is what they have in common.
"""

import dataclasses
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

SHAPES = ("circle", "square", "triangle", "diamond", "cross", "star", "ring", "heart")
# Any two of these 13 colours (with the markers' black) are more than 100 apart in RGB.
COLOURS = {
    "red": (225, 30, 40),
    "orange": (245, 130, 20),
    "yellow": (255, 230, 50),
    "green": (40, 170, 70),
    "cyan": (60, 210, 230),
    "blue": (50, 80, 230),
    "purple": (150, 50, 190),
    "pink": (250, 150, 200),
}
BACKGROUNDS = {"white": (245, 245, 245), "grey": (130, 130, 130), "brown": (105, 65, 30), "navy": (25, 25, 95)}
SIZES = ("small", "large")
PLACES = ("top left", "top", "top right", "left", "centre", "right", "bottom left", "bottom", "bottom right")
DIRECTIONS = ("up", "right", "down", "left")
MOST_THINGS = 4

# Of each colour and of each shape one combination is never trained on ...
HELD_OUT_PAIRS = frozenset((colour, SHAPES[(3 * i + 1) % 8]) for i, colour in enumerate(COLOURS))
# ... nor are these arrangements of two shapes, anywhere in a scene.
HELD_OUT_RELATIONS = (
    ("star", "above", "circle"),
    ("heart", "above", "cross"),
    ("square", "left of", "ring"),
    ("diamond", "left of", "triangle"),
)
SPLITS = ("train", "test", "attributes", "relations")
_TEST_SHARE = 16  # one in so many of the scenes that could be trained on is kept for testing


@dataclasses.dataclass(frozen=True)
class Thing:
    """One thing of a scene; each attribute is a member of the vocabulary that is called like it."""

    shape: str
    colour: str
    size: str
    place: str
    direction: str = "up"

    @property
    def row(self) -> int:
        """0 (top) to 2."""
        return PLACES.index(self.place) // 3

    @property
    def column(self) -> int:
        """0 (left) to 2."""
        return PLACES.index(self.place) % 3


_VOCABULARIES = {"shape": SHAPES, "colour": COLOURS, "size": SIZES, "place": PLACES, "direction": DIRECTIONS}


@dataclasses.dataclass(frozen=True)
class Scene:
    """Things on a background, farthest first (see above); they may be given in any order.

    Raises:
      ValueError: more than four things, two at one place or of one colour and shape, or a word of no vocabulary.
    """

    things: tuple[Thing, ...]
    background: str

    def __post_init__(self):
        if self.background not in BACKGROUNDS:
            raise ValueError(f"no background {self.background!r}; there are {', '.join(BACKGROUNDS)}")
        for thing in self.things:
            for name, words in _VOCABULARIES.items():
                if getattr(thing, name) not in words:
                    raise ValueError(f"no {name} {getattr(thing, name)!r}; there are {', '.join(words)}")
        if len(self.things) > MOST_THINGS:
            raise ValueError(f"{len(self.things)} things; a scene has at most {MOST_THINGS}")
        object.__setattr__(self, "things", tuple(sorted(self.things, key=lambda thing: PLACES.index(thing.place))))
        places = [thing.place for thing in self.things]
        if len(set(places)) < len(places):
            raise ValueError(f"two things at one place: {', '.join(places)}")
        names = [f"{thing.colour} {thing.shape}" for thing in self.things]
        if len(set(names)) < len(names):
            raise ValueError(f"two things of one colour and shape: {', '.join(names)}")

    def spoken(self) -> "Scene":
        """What language can tell of the scene: all but the directions, which become "up"."""
        return dataclasses.replace(self, things=tuple(dataclasses.replace(t, direction="up") for t in self.things))

    def to_json(self) -> dict[str, Any]:
        """What `from_json` makes the scene from, of lists, dicts and strings."""
        return {"things": [dataclasses.asdict(thing) for thing in self.things], "background": self.background}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Scene":
        """The scene of a `to_json`."""
        return cls(tuple(Thing(**thing) for thing in value["things"]), value["background"])

    def find(self, colour: str, shape: str) -> Thing | None:
        """The thing of that colour and shape, or None."""
        return next((thing for thing in self.things if (thing.colour, thing.shape) == (colour, shape)), None)


def holds(relation: str, a: Thing, b: Thing) -> bool:
    """Whether `a` is "left of", "right of", "above" or "below" `b`: in a column or row further to that side."""
    return {
        "left of": a.column < b.column,
        "right of": a.column > b.column,
        "above": a.row < b.row,
        "below": a.row > b.row,
    }[relation]


RELATIONS = ("left of", "right of", "above", "below")


def split_of(scene: Scene) -> str:
    """The one split a scene belongs to; directions do not matter.

    "attributes": a thing is of `HELD_OUT_PAIRS`. "relations": none is, and two things stand as in
    `HELD_OUT_RELATIONS`. "test": neither, and the scene's hash (one in 16) keeps it from training. "train": the rest.
    """
    if any((thing.colour, thing.shape) in HELD_OUT_PAIRS for thing in scene.things):
        return "attributes"
    for first, relation, second in HELD_OUT_RELATIONS:
        for a in scene.things:
            if a.shape == first and any(b.shape == second and holds(relation, a, b) for b in scene.things):
                return "relations"
    words = [f"{thing.size} {thing.colour} {thing.shape} {thing.place}" for thing in scene.things]
    return "test" if zlib.crc32(";".join([scene.background, *words]).encode()) % _TEST_SHARE == 0 else "train"


def draw_scene(rng: np.random.Generator, split: str | None = "train", counts: Sequence[int] = (1, 2, 3, 4)) -> Scene:
    """A random scene: every attribute uniform, as far as the split allows.

    Args:
      split: one of `SPLITS`; None draws from all of them.
      counts: the numbers of things to choose from.

    Raises:
      ValueError: no such split or number, or scenes of the split that can't exist ("relations" needs two things).
    """
    if split is not None and split not in SPLITS:
        raise ValueError(f"no split {split!r}; there are {', '.join(SPLITS)}")
    if not counts or not all(1 <= count <= MOST_THINGS for count in counts):
        raise ValueError(f"counts is {tuple(counts)}, expected numbers from 1 to {MOST_THINGS}")
    if split == "relations" and max(counts) < 2:
        raise ValueError(f"counts is {tuple(counts)}, but the split 'relations' needs at least 2 things")
    while True:
        scene = _draw_any(rng, counts[int(rng.integers(len(counts)))])
        if split is None or split_of(scene) == split:
            return scene


_COLOUR_NAMES, _BACKGROUND_NAMES = tuple(COLOURS), tuple(BACKGROUNDS)


def _draw_any(rng: np.random.Generator, count: int) -> Scene:
    places, pairs = rng.permutation(9)[:count].tolist(), rng.permutation(64)[:count].tolist()
    rest = rng.integers(8, size=count).tolist()
    things = tuple(
        Thing(SHAPES[pair % 8], _COLOUR_NAMES[pair // 8], SIZES[other % 2], PLACES[place], DIRECTIONS[other // 2])
        for place, pair, other in zip(places, pairs, rest, strict=True)
    )
    return Scene(things, _BACKGROUND_NAMES[int(rng.integers(4))])
