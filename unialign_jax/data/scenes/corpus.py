"""Examples as files: published JSONL rows and PNG images; and as the records of the TFDS data set."""

import dataclasses
import io
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath
from PIL import Image

from unialign_jax.data.samples import TASKS
from unialign_jax.data.scenes import tasks


def write_corpus(
    directory: epath.PathLike,
    count: int,
    size: int = 32,
    seed: int = 0,
    *,
    subset: str = "train",
    counts: Sequence[int] = (1, 2, 3, 4),
    chosen: Sequence[str] = TASKS,
) -> None:
    """Writes DIRECTORY/TASK.jsonl and DIRECTORY/images/*.png; the same arguments write the same bytes.

    A larger corpus begins with the smaller one.

    Args:
      directory: made if absent; files of an earlier corpus are overwritten.
      count: number of examples of each task.
      size: side of the images in pixels.
      seed, subset, counts: see `tasks.draw`.
      chosen: the tasks.
    """
    directory = epath.Path(directory)
    (directory / "images").mkdir(parents=True, exist_ok=True)
    for task in chosen:
        rows = []
        for i in range(count):
            example = tasks.draw(task, i, seed=seed, subset=subset, counts=counts)
            target, *references = (
                _save(directory, f"images/{task}_{i:06d}{suffix}.png", picture, size)
                for suffix, picture in _named(example)
            )
            rows.append(json.dumps(example.row(target, references)) + "\n")
        (directory / f"{task}.jsonl").write_text("".join(rows))


def _named(example: tasks.Example) -> list[tuple[str, tasks.Picture]]:
    return [("", example.target)] + [(f"_from{i}", picture) for i, picture in enumerate(example.references)]


def _save(directory: epath.Path, name: str, picture: tasks.Picture, size: int) -> str:
    (directory / name).write_bytes(_png(picture.render(size)))
    return name


@dataclasses.dataclass(frozen=True)
class Job:
    """Some examples of one task, see `tasks.draw`."""

    task: str
    size: int
    seed: int
    subset: str
    counts: tuple[int, ...]
    indices: range


def records(job: Job) -> list[tuple[int, dict[str, Any]]]:
    """(number, fields of a TFDS record) of each example; images as PNG. What worker processes do."""
    made = []
    for index in job.indices:
        example = tasks.draw(job.task, index, seed=job.seed, subset=job.subset, counts=job.counts)
        record = {
            "target": _png(example.target.render(job.size)),
            "references": [_png(picture.render(job.size)) for picture in example.references],
            "scene": json.dumps(example.target.scene.to_json()),
        }
        texts = ("task", "caption", "instruction", "question", "answer", "kind")
        made.append((index, record | {name: getattr(example, name) for name in texts}))
    return made


def _png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()
