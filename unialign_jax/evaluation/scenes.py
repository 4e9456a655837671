"""The scenes benchmark: all six tasks on held-out scenes, each output checked exactly (`data.scenes.verify`).

Outputs come from `UniAlignPipeline`, the path that users call. Example i of a task is the same in every evaluation with
one seed, so checkpoints are compared on the same scenes.
"""

import collections
import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from unialign_jax.data import scenes
from unialign_jax.data.samples import TEXT_TASKS
from unialign_jax.data.scenes import verify
from unialign_jax.evaluation import metrics
from unialign_jax.inference.presets import PROTOCOLS, Protocol
from unialign_jax.pipeline import UniAlignPipeline

PROTOCOL = PROTOCOLS["scenes"]
# Of the examples. Training's seed is 0, and a split shares nothing with it anyway.
SEED = 1

_IMAGE_EXACT = {"exact": lambda made, truth: verify.image_exact(made, truth.target.scene)}
# Task, or task and kind of example -> measure -> score of one output. What is bool is a share, the rest a mean.
MEASURES: Mapping[str, Mapping[str, Callable[[np.ndarray | str, scenes.Example], bool | float]]] = {
    "generate": _IMAGE_EXACT,
    "edit": _IMAGE_EXACT,
    "compose": _IMAGE_EXACT,
    "caption": {"exact": lambda made, truth: verify.caption_exact(made, truth.target.scene)},
    "answer": {"right": lambda made, truth: verify.answer_right(made, truth.answer)},
    "perceive/segmentation": {"mIoU": lambda made, truth: verify.segmentation_iou(made, truth.target.scene)},
    "perceive/depth": {"error": lambda made, truth: verify.depth_error(made, truth.target.scene)},
    "perceive/edges": {"F1": lambda made, truth: verify.edge_score(made, truth.target.scene)},
    "perceive/pose": {"exact": lambda made, truth: verify.pose_exact(made, truth.target.scene)},
}


@dataclasses.dataclass(frozen=True)
class Output:
    """What the model made of one example: an image uint8 `[S, S, 3]` or a text, and its scores by measure."""

    example: scenes.Example
    made: np.ndarray | str
    scores: Mapping[str, bool | float]


@dataclasses.dataclass(frozen=True)
class Score:
    """One line of the table.

    Attributes:
      task, measure: what was scored, keys of `MEASURES`; of perception the map is part of the task's name.
      kind: the kind of example (of edit, question, ...), or "" for all of a task.
      estimate: mean and 95 % interval.
    """

    task: str
    measure: str
    kind: str
    estimate: metrics.Estimate


def run(
    pipeline: UniAlignPipeline,
    task: str,
    count: int,
    *,
    subset: str = "test",
    counts: Sequence[int] = (1, 2),
    protocol: Protocol = PROTOCOL,
) -> list[Output]:
    """Has the model do a task on held-out scenes and checks what it makes; it draws with an example's number as seed.

    Args:
      pipeline: the model; images are of its size, which must be square, of 32 pixels a side or of 35 and more.
      task: one of `data.samples.TASKS`.
      count: number of examples.
      subset: one of `data.scenes.SETS`.
      counts: numbers of things in the scenes.
      protocol: steps and guidance.

    Raises:
      ValueError: for a task or set that there is none of, or a size that scenes can't be read at.
    """
    height, width = pipeline.size
    if height != width or not verify.is_readable(height):
        raise ValueError(
            f"the model's images are {height}x{width}; scenes are square, of {verify.SIDE} pixels a side or of "
            f"{verify.LEAST_AVERAGED} and more"
        )
    examples = [scenes.draw(task, i, seed=SEED, subset=subset, counts=counts) for i in range(count)]
    made = _make(pipeline, task, examples, height, {"protocol": protocol, "seed": 0})
    outputs = []
    for example, result in zip(examples, made, strict=True):
        measures = MEASURES[task if task in MEASURES else f"{task}/{example.kind}"]
        outputs.append(Output(example, result, {name: score(result, example) for name, score in measures.items()}))
    return outputs


def _make(pipeline: UniAlignPipeline, task: str, examples: Sequence[scenes.Example], size: int, options: dict) -> list:
    if task == "generate":
        return pipeline.generate([example.instruction for example in examples], output="array", **options)
    if task in TEXT_TASKS:
        images = [example.target.render(size) for example in examples]
        if task == "caption":
            return pipeline.caption(images, **options)
        return pipeline.answer(images, [example.question for example in examples], **options)
    references = [[picture.render(size) for picture in example.references] for example in examples]
    instructions = [example.instruction for example in examples]
    return pipeline.compose(references, instructions, output="array", **options)


def summarize(outputs: Sequence[Output]) -> list[Score]:
    """Scores of one task's outputs: over all, then by kind of example where there are several."""
    groups = collections.defaultdict(list)
    for output in outputs:
        example = output.example
        name = example.task if example.task in MEASURES else f"{example.task}/{example.kind}"
        for measure, score in output.scores.items():
            groups[name, measure, ""].append(score)
            if name == example.task:
                groups[name, measure, example.kind].append(score)
    return [
        Score(task, measure, kind, (metrics.share if isinstance(values[0], bool | np.bool_) else metrics.mean)(values))
        for (task, measure, kind), values in sorted(groups.items())
    ]


def table(scores: Sequence[Score]) -> str:
    """The scores as a Markdown table; shares and scores in [0, 1] in percent."""
    lines = ["| task | kind | measure | score | 95 % interval | samples |", "| --- | --- | --- | --- | --- | --- |"]
    for score in scores:
        value, low, high = (f"{100 * x:.1f}" for x in dataclasses.astuple(score.estimate)[:3])
        lines.append(
            f"| {score.task} | {score.kind or 'all'} | {score.measure} | {value} % | {low} to {high} | "
            f"{score.estimate.samples} |"
        )
    return "\n".join(lines)
