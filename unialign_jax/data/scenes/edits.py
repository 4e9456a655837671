"""Edits: what can be done to a scene, in scenes and in words.

An instruction names a thing by its colour and shape, which are unique in a scene. Several edits in one instruction are
done at once: all names mean the scene as it was.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from unialign_jax.data.scenes import templates
from unialign_jax.data.scenes.language import Unread
from unialign_jax.data.scenes.world import (
    BACKGROUNDS,
    COLOURS,
    DIRECTIONS,
    MOST_THINGS,
    PLACES,
    SHAPES,
    SIZES,
    Scene,
    Thing,
)

# Training wordings, then one that is held out. "replace" keeps size, place and direction.
WORDINGS = {
    "recolour": (
        "make the {colour} {shape} {new_colour}",
        "change the {colour} {shape} to {new_colour}",
        "make {new_colour} the {colour} {shape}",
    ),
    "move": (
        "move the {colour} {shape} to the {new_place}",
        "put the {colour} {shape} at the {new_place}",
        "move to the {new_place} the {colour} {shape}",
    ),
    "resize": (
        "make the {colour} {shape} {new_size}",
        "change the {colour} {shape} to {new_size}",
        "make {new_size} the {colour} {shape}",
    ),
    "replace": (
        "replace the {colour} {shape} with a {new_colour} {new_shape}",
        "change the {colour} {shape} to a {new_colour} {new_shape}",
        "with a {new_colour} {new_shape} replace the {colour} {shape}",
    ),
    "add": (
        "add a {new_size} {new_colour} {new_shape} at the {new_place}",
        "put a {new_size} {new_colour} {new_shape} at the {new_place}",
        "at the {new_place} add a {new_size} {new_colour} {new_shape}",
    ),
    "remove": (
        "remove the {colour} {shape}",
        "take the {colour} {shape} out",
        "take out the {colour} {shape}",
    ),
    "background": (
        "make the background {background}",
        "change the background to {background}",
        "make {background} the background",
    ),
}
KINDS = tuple(WORDINGS)
_JOINT = " and "


@dataclasses.dataclass(frozen=True)
class Edit:
    """One change. Fields that its kind (one of `KINDS`) does not use are empty.

    colour, shape: of the thing that is meant.
    new_*: what it, or the thing that is added, gets.
    background: the new one.
    direction: of a thing that is added; words do not tell it.
    """

    kind: str
    colour: str = ""
    shape: str = ""
    new_colour: str = ""
    new_shape: str = ""
    new_size: str = ""
    new_place: str = ""
    background: str = ""
    direction: str = "up"


class NotPossible(ValueError):
    """An edit that can't be done to this scene."""


def apply(scene: Scene, edits: Sequence[Edit]) -> Scene:
    """The scene after the edits, which are done at once.

    Raises:
      NotPossible: a thing that is meant is not there, or is meant twice; or the result is no scene.
    """
    things = {(thing.colour, thing.shape): thing for thing in scene.things}
    meant, added, background = set(), [], scene.background
    for edit in edits:
        name = (edit.colour, edit.shape)
        if edit.kind == "background":
            background = edit.background
            continue
        if edit.kind == "add":
            added.append(Thing(edit.new_shape, edit.new_colour, edit.new_size, edit.new_place, edit.direction))
            continue
        thing = scene.find(*name)
        if thing is None or name in meant:
            why = "is not in the scene" if thing is None else "is to be changed twice"
            raise NotPossible(f"{edit.kind}: the {edit.colour} {edit.shape} {why}")
        meant.add(name)
        if edit.kind == "remove":
            del things[name]
            continue
        new = {key: getattr(edit, f"new_{key}") for key in ("colour", "shape", "size", "place")}
        things[name] = dataclasses.replace(thing, **{key: value for key, value in new.items() if value})
    try:
        return Scene((*things.values(), *added), background)
    except ValueError as error:
        raise NotPossible(str(error)) from None


def instruct(edits: Sequence[Edit], rng: np.random.Generator, held_out: bool = False) -> str:
    """The edits in words, each in a random wording."""
    parts = []
    for edit in edits:
        *training, kept = WORDINGS[edit.kind]
        template = kept if held_out else training[int(rng.integers(len(training)))]
        parts.append(templates.fill(template, dataclasses.asdict(edit)))
    return _JOINT.join(parts)


def parse_instruction(text: str) -> tuple[Edit, ...] | Unread:
    """The edits that an instruction in any of the wordings tells; or why it tells none."""
    edits = []
    for part in templates.normalize(text).split(_JOINT):
        found = (
            Edit(kind, **slots)
            for kind, wordings in WORDINGS.items()
            for template in wordings
            if (slots := templates.match(template, part)) is not None
        )
        edit = next(found, None)
        if edit is None:
            return Unread(f"no instruction of the language: {part[:200]!r}")
        edits.append(edit)
    return tuple(edits)


def draw_edits(scene: Scene, count: int, rng: np.random.Generator) -> tuple[tuple[Edit, ...], Scene]:
    """`count` random edits that each change something, of kinds that are equally likely, and the scene after them.

    At least one thing stays, each thing is changed once, and at most one edit is of the background.

    Args:
      count: 1, or up to 1 + the number of things.

    Raises:
      ValueError: count is more than that.
    """
    if not 1 <= count <= 1 + len(scene.things):
        raise ValueError(f"{count} edits; a scene of {len(scene.things)} has room for 1 to {1 + len(scene.things)}")
    while True:
        kinds = [KINDS[i] for i in rng.integers(len(KINDS), size=count)]
        order = rng.permutation(len(scene.things))
        if sum(kind not in ("add", "background") for kind in kinds) > len(order) or kinds.count("background") > 1:
            continue
        if kinds.count("remove") >= len(order) or len(order) + kinds.count("add") > MOST_THINGS:
            continue
        targets = iter([scene.things[i] for i in order])
        edits = tuple(
            _draw_edit(kind, None if kind in ("add", "background") else next(targets), scene, rng) for kind in kinds
        )
        try:
            return edits, apply(scene, edits)
        except NotPossible:  # a place or a name that is taken: draw again
            continue


def _draw_edit(kind: str, target: Thing | None, scene: Scene, rng: np.random.Generator) -> Edit:
    def other(words: Sequence[str], *present: str) -> str:
        left = [word for word in words if word not in present]
        return left[int(rng.integers(len(left)))]

    if kind == "background":
        return Edit(kind, background=other(tuple(BACKGROUNDS), scene.background))
    taken = [thing.place for thing in scene.things]
    new = {
        "new_colour": other(tuple(COLOURS), *([target.colour] if target else [])),
        "new_shape": other(SHAPES, *([target.shape] if target else [])),
        "new_size": other(SIZES, *([target.size] if target else [])),
        "new_place": other(PLACES, *taken),
    }
    if kind == "add":
        return Edit(kind, **new, direction=DIRECTIONS[int(rng.integers(len(DIRECTIONS)))])
    used = {
        "recolour": ("new_colour",),
        "move": ("new_place",),
        "resize": ("new_size",),
        "replace": ("new_colour", "new_shape"),
        "remove": (),
    }[kind]
    return Edit(kind, colour=target.colour, shape=target.shape, **{key: new[key] for key in used})
