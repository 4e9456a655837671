"""Questions about a scene, with their answers of one word.

    kind         answers                 example
    count        zero to four            how many objects are red?
    colour       the eight colours       what colour is the star?
    shape        the eight shapes        what shape is the object at the top left?
    existence    yes, no (even)          is there a red star?
    relation     yes, no (even)          is the red star left of the blue ring?
    comparison   yes, no (about even)   is the red star larger than the blue ring?

Questions that ask for a thing by one attribute are asked only where one thing has it. "left of" and the like mean a
column or row further to that side, at any distance. Questions that are answered by no are hard ones: of a star that is
there in another colour, of the opposite relation.
"""

import collections

import numpy as np

from unialign_jax.data.scenes import templates
from unialign_jax.data.scenes.world import COLOURS, PLACES, RELATIONS, SHAPES, SIZES, Scene, Thing, holds

# Training wordings, then one that is held out.
_PAIR = "the {colour} {shape}", "the {other_colour} {other_shape}"
WORDINGS = {
    "count all": ("how many objects are there?", "there are how many objects?"),
    "count colour": ("how many objects are {colour}?", "how many are the {colour} objects?"),
    "count size": ("how many objects are {size}?", "how many are the {size} objects?"),
    "colour of shape": ("what colour is the {shape}?", "the {shape} is what colour?"),
    "colour at place": ("what colour is the object at the {place}?", "the object at the {place} is what colour?"),
    "shape of colour": ("what shape is the {colour} object?", "the {colour} object is what shape?"),
    "shape at place": ("what shape is the object at the {place}?", "the object at the {place} is what shape?"),
    "existence": ("is there a {colour} {shape}?", "a {colour} {shape} is there?"),
    "existence at place": ("is there an object at the {place}?", "at the {place} is there an object?"),
    "relation": (f"is {_PAIR[0]} {{relation}} {_PAIR[1]}?", f"{_PAIR[0]} is {{relation}} {_PAIR[1]}?"),
    "larger": (f"is {_PAIR[0]} larger than {_PAIR[1]}?", f"{_PAIR[0]} is larger than {_PAIR[1]}?"),
    "same size": (f"are {_PAIR[0]} and {_PAIR[1]} the same size?", f"the same size are {_PAIR[0]} and {_PAIR[1]}?"),
}
KINDS = {
    "count": ("count all", "count colour", "count size"),
    "colour": ("colour of shape", "colour at place"),
    "shape": ("shape of colour", "shape at place"),
    "existence": ("existence", "existence at place"),
    "relation": ("relation",),
    "comparison": ("larger", "same size"),
}
NUMBERS = ("zero", "one", "two", "three", "four")
_OPPOSITES = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def draw_question(scene: Scene, rng: np.random.Generator, kind: str, held_out: bool = False) -> tuple[str, str] | None:
    """A random (question, answer) of one of `KINDS` about a scene of at least one thing.

    None if the scene allows no such question (relations and comparisons need two things, for example).
    """
    for i in rng.permutation(len(KINDS[kind])):
        form = KINDS[kind][i]
        drawn = _DRAW[form](scene, _Choice(rng))
        if drawn is not None:
            slots, answer = drawn
            return templates.fill(WORDINGS[form][held_out], slots), answer
    return None


class _Choice:
    def __init__(self, rng: np.random.Generator):
        self._rng = rng

    def one(self, options):
        return options[int(self._rng.integers(len(options)))]

    def two(self, options):
        first, second = self._rng.permutation(len(options))[:2]
        return options[first], options[second]

    def coin(self) -> bool:
        return bool(self._rng.integers(2))


def _count_all(scene: Scene, choose: _Choice):
    return {}, NUMBERS[len(scene.things)]


def _count_colour(scene: Scene, choose: _Choice):
    # Of colours that are there twice as often as of others.
    there = [thing.colour for thing in scene.things]
    colour = choose.one((choose.one(there), choose.one(there), choose.one(tuple(COLOURS))))
    return {"colour": colour}, NUMBERS[there.count(colour)]


def _count_size(scene: Scene, choose: _Choice):
    size = choose.one(SIZES)
    return {"size": size}, NUMBERS[sum(thing.size == size for thing in scene.things)]


def _by_one(known: str, asked: str):
    def draw(scene: Scene, choose: _Choice):
        counts = collections.Counter(getattr(thing, known) for thing in scene.things)
        things = [thing for thing in scene.things if counts[getattr(thing, known)] == 1]
        if not things:
            return None
        thing = choose.one(things)
        return {known: getattr(thing, known)}, getattr(thing, asked)

    return draw


def _existence(scene: Scene, choose: _Choice):
    thing = choose.one(scene.things)
    if choose.coin():
        return {"colour": thing.colour, "shape": thing.shape}, "yes"
    options = [(colour, thing.shape) for colour in COLOURS] + [(thing.colour, shape) for shape in SHAPES]
    colour, shape = choose.one([option for option in options if scene.find(*option) is None])
    return {"colour": colour, "shape": shape}, "no"


def _existence_at_place(scene: Scene, choose: _Choice):
    taken = [thing.place for thing in scene.things]
    if choose.coin():
        return {"place": choose.one(taken)}, "yes"
    return {"place": choose.one([place for place in PLACES if place not in taken])}, "no"


def _names(a: Thing, b: Thing) -> dict[str, str]:
    return {"colour": a.colour, "shape": a.shape, "other_colour": b.colour, "other_shape": b.shape}


def _relation(scene: Scene, choose: _Choice):
    if len(scene.things) < 2:
        return None
    a, b = choose.two(scene.things)
    relation = choose.one([relation for relation in RELATIONS if holds(relation, a, b)])
    if choose.coin():
        return _names(a, b) | {"relation": relation}, "yes"
    return _names(a, b) | {"relation": _OPPOSITES[relation]}, "no"


def _larger(scene: Scene, choose: _Choice):
    if len(scene.things) < 2:
        return None
    sizes = {size: [thing for thing in scene.things if thing.size == size] for size in SIZES}
    if sizes["large"] and sizes["small"] and choose.one((True, True, True, False)):
        # Otherwise no would be the answer of three in four.
        return _names(choose.one(sizes["large"]), choose.one(sizes["small"])), "yes"
    a, b = choose.two(scene.things)
    if a.size == "large":
        a, b = b, a
    return _names(a, b), "no"


def _same_size(scene: Scene, choose: _Choice):
    if len(scene.things) < 2:
        return None
    a, b = choose.two(scene.things)
    return _names(a, b), "yes" if a.size == b.size else "no"


_DRAW = {
    "count all": _count_all,
    "count colour": _count_colour,
    "count size": _count_size,
    "colour of shape": _by_one("shape", "colour"),
    "colour at place": _by_one("place", "colour"),
    "shape of colour": _by_one("colour", "shape"),
    "shape at place": _by_one("place", "shape"),
    "existence": _existence,
    "existence at place": _existence_at_place,
    "relation": _relation,
    "larger": _larger,
    "same size": _same_size,
}
