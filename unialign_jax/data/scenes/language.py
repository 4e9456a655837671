"""Captions: scene -> text in varied wording, and text -> scene.

Every caption is complete: it tells the size, colour, shape and place of every thing, and the background. It leaves one
thing open, the directions. Hence a caption and a scene without directions are the same information, whatever the
wording. There are three kinds:

    short          small red circle top left, large blue star centre, on grey
    long           a small red circle at the top left and a large blue star at the centre on a grey background
    compositional  a small red circle at the top left, just right of it a large blue star, on a grey background

A compositional caption tells a thing's place by where it stands from the thing named before ("it"), if that is in the
same row or column: "just" is the next place of the grid, "far" the one after. Things are named in the order of reading,
in the wordings of `from_last` the other way round; a reader takes any order.
"""

import dataclasses

import numpy as np

from unialign_jax.data.scenes import templates
from unialign_jax.data.scenes.world import BACKGROUNDS, COLOURS, PLACES, RELATIONS, SHAPES, SIZES, Scene, Thing

# No text of the language has more words and marks than this, so that with an end token 32 ids hold it.
LONGEST = 31


@dataclasses.dataclass(frozen=True)
class Unread:
    """Why a text or an image is no scene."""

    reason: str


@dataclasses.dataclass(frozen=True)
class Wording:
    """One way to put a scene into words.

    kind: "short", "long" or "compositional".
    whole: with the slots `items` and `background`.
    item: of one thing.
    joint: between things.
    step: of a thing that is placed from the one before; empty where there are none.
    from_last: the last thing in the order of reading comes first.
    held_out: never used in training. Its words are, in other orders.
    """

    kind: str
    whole: str
    item: str
    joint: str
    step: str = ""
    from_last: bool = False
    held_out: bool = False


_SHORT = "{size} {colour} {shape} {place}"
_LONG = "a {size} {colour} {shape} at the {place}"
_STEP = "{far} {relation} it a {size} {colour} {shape}"
WORDINGS = (
    Wording("short", "{items}, on {background}", _SHORT, ", "),
    Wording("short", "{background}: {items}", _SHORT, ", "),
    Wording("short", "{items}, on {background}", "{place} {size} {colour} {shape}", ", ", held_out=True),
    Wording("long", "{items} on a {background} background", _LONG, " and "),
    Wording("long", "on a {background} background there is {items}", _LONG, " and "),
    Wording("long", "there is {items} on a {background} background", _LONG, " and ", held_out=True),
    Wording("compositional", "{items}, on a {background} background", _LONG, ", ", _STEP),
    Wording("compositional", "on {background}: {items}", _LONG, ", ", _STEP, from_last=True),
    Wording("compositional", "{background}: {items}", _LONG, " and ", _STEP, held_out=True),
)
KINDS = ("short", "long", "compositional")


def captions(scene: Scene, held_out: bool = False) -> list[tuple[Wording, str]]:
    """Every caption of a scene of at least one thing that is not longer than `LONGEST`, with its wording.

    A compositional wording is left out where no two things that follow each other share a row or column.

    Args:
      held_out: those never used in training instead of those that are.
    """
    found = []
    for wording in WORDINGS:
        if wording.held_out == held_out:
            text = _write(scene, wording)
            if text is not None and templates.length(text) <= LONGEST:
                found.append((wording, text))
    return found


def draw_caption(scene: Scene, rng: np.random.Generator, held_out: bool = False) -> tuple[str, str]:
    """(kind, one of `captions`): a random kind, then a random wording of it."""
    found = captions(scene, held_out)
    kinds = [kind for kind in KINDS if any(wording.kind == kind for wording, _ in found)]
    kind = kinds[int(rng.integers(len(kinds)))]
    texts = [text for wording, text in found if wording.kind == kind]
    return kind, texts[int(rng.integers(len(texts)))]


def parse_caption(text: str) -> Scene | Unread:
    """The scene that a caption in any of the wordings tells, all directions "up"; or why it tells none."""
    text = templates.normalize(text)
    unknown = [word for word in templates.split(text) if word not in VOCABULARY]
    if unknown:
        return Unread(f"words that are not of the language: {' '.join(unknown[:5])}")
    reason = "no wording of the language fits"
    for wording in WORDINGS:
        slots = templates.match(wording.whole, text)
        things = None if slots is None else _read_items(slots["items"], wording)
        if isinstance(things, Unread):
            reason = things.reason
        elif things is not None:
            try:
                return Scene(things, slots["background"])
            except ValueError as error:
                reason = str(error)
    return Unread(f"{reason}: {text[:200]!r}")


def _write(scene: Scene, wording: Wording) -> str | None:
    items, before = [], None
    for thing in reversed(scene.things) if wording.from_last else scene.things:
        step = _step_between(before, thing) if wording.step and before is not None else None
        slots = dataclasses.asdict(thing) | (step or {})
        items.append(templates.fill(wording.step if step else wording.item, slots))
        before = thing
    if wording.step and all(templates.match(wording.item, item) for item in items):
        return None
    return templates.fill(wording.whole, {"items": wording.joint.join(items), "background": scene.background})


def _read_items(text: str, wording: Wording) -> tuple[Thing, ...] | Unread | None:
    """The things; None if this is another wording."""
    things, relative = [], False
    for item in text.split(wording.joint):
        slots = templates.match(wording.item, item)
        if slots is None and wording.step and things:
            slots = templates.match(wording.step, item)
            if slots is not None:
                relative = True
                place = _place_after(things[-1], slots["relation"], slots["far"])
                if place is None:
                    return Unread(f"no place is {slots['far']} {slots['relation']} the {things[-1].place}")
                slots["place"] = place
        if slots is None:
            return None
        things.append(Thing(slots["shape"], slots["colour"], slots["size"], slots["place"]))
    return None if wording.step and not relative else tuple(things)


# The step from one place to another, as (columns, rows), of each relation.
_STEPS = dict(zip(RELATIONS, ((-1, 0), (1, 0), (0, -1), (0, 1)), strict=True))


def _step_between(before: Thing, after: Thing) -> dict[str, str] | None:
    columns, rows = after.column - before.column, after.row - before.row
    if columns and rows:
        return None
    distance = abs(columns + rows)
    unit = (columns // distance, rows // distance)
    relation = next(name for name, step in _STEPS.items() if step == unit)
    return {"relation": relation, "far": "just" if distance == 1 else "far"}


def _place_after(before: Thing, relation: str, far: str) -> str | None:
    distance = 1 if far == "just" else 2
    column = before.column + distance * _STEPS[relation][0]
    row = before.row + distance * _STEPS[relation][1]
    return PLACES[3 * row + column] if 0 <= row < 3 and 0 <= column < 3 else None


def _vocabulary() -> frozenset[str]:
    names = (SHAPES, COLOURS, SIZES, PLACES, BACKGROUNDS, RELATIONS, templates.DISTANCES)
    words = {word for group in names for name in group for word in name.split()}
    for wording in WORDINGS:
        for template in (wording.whole, wording.item, wording.step, wording.joint):
            words.update(templates.fixed_words(template))
    return frozenset(words)


VOCABULARY = _vocabulary()
