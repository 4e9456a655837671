"""Scenes -> examples of the six tasks. Example number i of a task is a pure function of the seed, the split and i.

    task       references                          texts
    generate   none                                caption = instruction: any complete caption
    caption    none                                the same
    edit       the scene before                    caption of the scene after; instruction of one or two edits
    perceive   a scene                             caption "a depth map"; instruction "depth map", "show the pose", ...
    compose    1 to 3 things, each large or        caption of the scene; instruction that names each thing by its shape
               small on its own, and maybe a       or its colour, and tells its place; size and the other attribute
               background                          are to be seen in the references alone
    answer     none                                question and answer

In a composition no two things have a shape or a colour in common, and references show their thing at the centre, in any
direction and on any background. If the instruction ends "on this background", the last reference is the empty
background.

An example is of a split if its target scene is; of the split "train" all its scenes are (an empty background is no
scene), so that nothing that is held out is ever seen in training.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from unialign_jax.data.samples import TASKS
from unialign_jax.data.scenes import edits, language, questions, rendering, templates
from unialign_jax.data.scenes.world import (
    BACKGROUNDS,
    MOST_THINGS,
    SPLITS,
    Scene,
    draw_scene,
    split_of,
)

# The splits of `world`, and the test scenes again in wordings that are held out.
SETS = (*SPLITS, "wordings")

_MAP_NAMES = {"depth": "depth map", "edges": "canny edges", "pose": "pose", "segmentation": "segmentation"}
# Training wordings, then one that is held out.
_REQUESTS = ("{map}", "show the {map}", "the {map} is what?")
_COMPOSE_ITEMS = {"shape": "the {shape} at the {place}", "colour": "the {colour} object at the {place}"}
_COMPOSE_GROUNDS = ("on a {background} background", "on this background")
_COMPOSE_WHOLES = ("{items} {ground}", "put {items} {ground}", "{ground} put {items}")


@dataclasses.dataclass(frozen=True)
class Picture:
    """A scene, or a map of it: `kind` is "image" or one of `rendering.MAPS`."""

    scene: Scene
    kind: str = "image"

    def render(self, size: int) -> np.ndarray:
        """Uint8 `[size, size, 3]`."""
        return (
            rendering.render(self.scene, size)
            if self.kind == "image"
            else rendering.render_map(self.scene, self.kind, size)
        )


@dataclasses.dataclass(frozen=True)
class Example:
    """What a `data.samples.Sample` is, with pictures instead of files.

    kind: what scores are told apart by: the kinds of the edits, joined by "+"; the map; the kind of question; of a
      caption its wording's kind; of a composition the number of things, as a word.
    """

    task: str
    target: Picture
    references: tuple[Picture, ...] = ()
    caption: str = ""
    instruction: str = ""
    question: str = ""
    answer: str = ""
    kind: str = ""

    def row(self, target: str, references: Sequence[str]) -> dict[str, Any]:
        """The published JSONL row, with these names for the images.

        Two keys more, which readers ignore, are for scoring: "scene" (`Scene.to_json` of the target) and "kind".
        """
        return self._published(target, references) | {"scene": self.target.scene.to_json(), "kind": self.kind}

    def _published(self, target: str, references: Sequence[str]) -> dict[str, Any]:
        turns = [{"from": "human", "value": self.caption}, {"from": "gpt", "value": "<image>"}]
        if self.task in ("edit", "perceive"):
            return {"image": [*references, target], "conversations": turns, "instruction": self.instruction}
        if self.task == "compose":
            return {
                "original_images": list(references),
                "generated_images": [target],
                "edit_prompt": self.instruction,
                "caption": self.caption,
            }
        if self.task == "answer":
            return {"image": [target], "question": self.question, "answer": self.answer}
        return {"image": [target], "conversations": turns}


def draw(
    task: str, index: int, *, seed: int = 0, subset: str = "train", counts: Sequence[int] = (1, 2, 3, 4)
) -> Example:
    """Example number `index` of a task, the same on any machine, in any process and order.

    (NumPy reserves the right to change what a generator draws between its versions.)

    Args:
      task: one of `data.samples.TASKS`.
      index: 0 or more; there is no end.
      seed: different seeds share no random draw.
      subset: one of `SETS`.
      counts: numbers of things in the target scene (of compositions, those from 1 to 3).

    Raises:
      ValueError: no such task or set, or counts that allow no example.
    """
    counts = usable_counts(task, subset, counts)
    rng = np.random.default_rng([seed, SETS.index(subset), TASKS.index(task), index])
    held_out = subset == "wordings"
    return _DRAW[task](rng, "test" if held_out else subset, counts, held_out)


def usable_counts(task: str, subset: str, counts: Sequence[int]) -> list[int]:
    """Those numbers of things that target scenes of a task can have.

    Raises:
      ValueError: no such task, set or number, or none of the numbers can be.
    """
    if task not in TASKS:
        raise ValueError(f"no task {task!r}; the tasks are {', '.join(TASKS)}")
    if subset not in SETS:
        raise ValueError(f"no set {subset!r}; there are {', '.join(SETS)}")
    if not counts or not all(1 <= count <= MOST_THINGS for count in counts):
        raise ValueError(f"counts is {tuple(counts)}, expected numbers of things from 1 to {MOST_THINGS}")
    usable = [count for count in counts if task != "compose" or count < MOST_THINGS]
    if not usable:
        raise ValueError(f"counts is {tuple(counts)}, but compositions have at most {MOST_THINGS - 1} things")
    if subset == "relations" and max(usable) < 2:
        raise ValueError(f"counts is {tuple(counts)}, but the set 'relations' needs at least 2 things")
    return usable


def _described(task: str, rng: np.random.Generator, split: str, counts: Sequence[int], held_out: bool) -> Example:
    scene = draw_scene(rng, split, counts)
    kind, caption = language.draw_caption(scene, rng, held_out)
    return Example(task, Picture(scene), caption=caption, instruction=caption, kind=kind)


def _edited(rng: np.random.Generator, split: str, counts: Sequence[int], held_out: bool) -> Example:
    number = 2 if rng.integers(4) == 0 else 1
    while True:
        before = draw_scene(rng, "train" if split == "train" else None, counts)
        changes, after = edits.draw_edits(before, number, rng)
        # With a thing added or taken out the scene may have more or fewer than asked for.
        if len(after.things) in counts and split_of(after) == split:
            break
    return Example(
        "edit",
        Picture(after),
        (Picture(before),),
        caption=language.draw_caption(after, rng, held_out)[1],
        instruction=edits.instruct(changes, rng, held_out),
        kind="+".join(sorted(edit.kind for edit in changes)),
    )


def _perceived(rng: np.random.Generator, split: str, counts: Sequence[int], held_out: bool) -> Example:
    scene = draw_scene(rng, split, counts)
    kind = rendering.MAPS[int(rng.integers(len(rendering.MAPS)))]
    *training, kept = _REQUESTS
    request = kept if held_out else training[int(rng.integers(len(training)))]
    name = _MAP_NAMES[kind]
    return Example(
        "perceive",
        Picture(scene, kind),
        (Picture(scene),),
        caption=templates.fill("a {map}", {"map": name}),
        instruction=templates.fill(request, {"map": name}),
        kind=kind,
    )


def _composed(rng: np.random.Generator, split: str, counts: Sequence[int], held_out: bool) -> Example:
    while True:
        scene = draw_scene(rng, split, counts)
        if all(len({getattr(t, name) for t in scene.things}) == len(scene.things) for name in ("shape", "colour")):
            break
    references = []
    for thing in scene.things:
        while True:
            alone = Scene((dataclasses.replace(thing, place="centre"),), _pick(rng, tuple(BACKGROUNDS)))
            if split != "train" or split_of(alone) == "train":
                break
            # The thing can't be shown on this background: it is a test scene. On another one it can.
        references.append(Picture(alone))
    by = _pick(rng, ("shape", "colour"))
    items = " and ".join(templates.fill(_COMPOSE_ITEMS[by], dataclasses.asdict(thing)) for thing in scene.things)
    ground = _pick(rng, _COMPOSE_GROUNDS)
    if ground == _COMPOSE_GROUNDS[1]:
        references.append(Picture(Scene((), scene.background)))
    *training, kept = _COMPOSE_WHOLES
    whole = kept if held_out else _pick(rng, training)
    ground = templates.fill(ground, {"background": scene.background})
    return Example(
        "compose",
        Picture(scene),
        tuple(references),
        caption=language.draw_caption(scene, rng, held_out)[1],
        instruction=templates.fill(whole, {"items": items, "ground": ground}),
        kind=questions.NUMBERS[len(scene.things)],
    )


def _asked(rng: np.random.Generator, split: str, counts: Sequence[int], held_out: bool) -> Example:
    scene = draw_scene(rng, split, counts)
    while True:
        kind = _pick(rng, tuple(questions.KINDS))
        drawn = questions.draw_question(scene, rng, kind, held_out)
        if drawn is not None:
            return Example("answer", Picture(scene), question=drawn[0], answer=drawn[1], kind=kind)


def _pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]


_DRAW = {
    "generate": functools.partial(_described, "generate"),
    "caption": functools.partial(_described, "caption"),
    "edit": _edited,
    "perceive": _perceived,
    "compose": _composed,
    "answer": _asked,
}
