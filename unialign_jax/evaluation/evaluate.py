"""What the evaluating command does: a checkpoint's scores on a benchmark, as files that people and programs read.

OUTPUT/scores.json     every score with its interval, the settings, and checksums of the weights that were scored
OUTPUT/scores.md       the same as tables
OUTPUT/outputs.jsonl   one line an example: what was asked, what was made (texts), the scores
OUTPUT/SET-THINGS/TASK.png   the first examples: references | what was made | truth; for texts the image alone
"""

import dataclasses
import functools
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from PIL import Image

from unialign_jax import agreement, storage
from unialign_jax.data.images import image_grid
from unialign_jax.data.samples import TASKS
from unialign_jax.data.scenes import usable_counts
from unialign_jax.evaluation import metrics, scenes
from unialign_jax.inference.presets import Protocol
from unialign_jax.pipeline import UniAlignPipeline
from unialign_jax.saved_step import checksums

SHOWN = 12  # examples in a picture: one each row


def evaluate_scenes(
    pipeline: UniAlignPipeline,
    output: epath.PathLike,
    *,
    tasks: Sequence[str],
    subsets: Sequence[str],
    things: Sequence[Sequence[int]],
    count: int,
    protocol: Protocol = scenes.PROTOCOL,
    about: Mapping[str, Any] | None = None,
) -> dict[str, list[scenes.Score]]:
    """Scores a model on every combination of held-out set and number of things, and writes the files above.

    With several processes all call it, and process 0 writes. What the files hold of other sets, things and tasks by the
    same settings and weights stays there.

    Args:
      pipeline: the model.
      output: directory, made if absent; local or `gs://`.
      tasks: of `data.samples.TASKS`.
      subsets: of `data.scenes.SETS`.
      things: numbers of things in the scenes, one table for each, such as `[(1, 2), (3, 4)]`.
      count: examples per task and table.
      protocol: steps and guidance.
      about: further facts for scores.json, such as the checkpoint's name.

    Returns:
      Scores by table: "test, 1-2 things" and so on.

    Raises:
      ValueError: a task has no scenes of such a set and so many things, or the directory holds scores by other
        settings or weights, or files that are no evaluation's. Nothing has been sampled by then.
    """
    for subset, counts, task in itertools.product(subsets, things, tasks):
        usable_counts(task, subset, counts)
    directory = epath.Path(output)
    # A checkpoint's name says little: another may have taken its place.
    facts = {**(about or {}), "weights": checksums(pipeline.params), "count": count, "seed": scenes.SEED}
    facts["protocol"] = dataclasses.asdict(protocol)
    written = agreement.primary(lambda: _begin(directory, facts), ValueError)
    tables: dict[str, list[scenes.Score]] = {}
    for subset, counts in itertools.product(subsets, things):
        span = f"{min(counts)}-{max(counts)}" if len(counts) > 1 else str(counts[0])
        name = f"{subset}, {span} things"
        for task in tasks:
            outputs = scenes.run(pipeline, task, count, subset=subset, counts=counts, protocol=protocol)
            _put(written, name, task, [_row(name, item) for item in outputs], scenes.summarize(outputs))
            # All have sampled together and know the same; one writes.
            file = directory / f"{subset}-{span}" / f"{task}.png"
            agreement.primary(functools.partial(_write_picture, file, grid(outputs[:SHOWN], pipeline.size[0])))
        # With each table: an interrupted evaluation keeps the others.
        agreement.primary(functools.partial(_write_scores, directory, facts, written))
        tables[name] = [_score(row) for row in written["tables"][name] if _task(row) in tasks]
    return tables


def _begin(directory: epath.Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Makes the directory, or reads what it holds: `tables` as in scores.json, and the `rows` of outputs.jsonl."""
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / "scores.json"
    if not file.exists():
        return {"tables": {}, "rows": []}
    found, asked = _parse(file, storage.read(file)), json.loads(json.dumps(facts))
    tables = found.pop("tables", {})
    if differing := sorted(key for key in found.keys() | asked.keys() if found.get(key) != asked.get(key)):
        values = "; ".join(f"{key} {found.get(key)!r}, now {asked.get(key)!r}" for key in differing)
        raise ValueError(
            f"{directory} holds scores by other settings ({values}); choose another directory or remove it"
        )
    file = directory / "outputs.jsonl"
    return {"tables": tables, "rows": [_parse(file, line) for line in storage.read(file).splitlines()]}


def _parse(file: epath.Path, text: bytes) -> dict[str, Any]:
    """A JSON object of a file that an evaluation has written."""
    try:
        value = json.loads(text)
        if not isinstance(value, dict):
            raise ValueError(f"a JSON {type(value).__name__}, not an object")
    except ValueError as error:
        raise ValueError(
            f"{file} is damaged, or no evaluation's ({error}); remove {file.parent}, or choose another directory"
        ) from error
    return value


def _put(
    written: dict[str, Any], table: str, task: str, made: Sequence[dict[str, Any]], scores: Sequence[scenes.Score]
) -> None:
    """Takes up what was made of one task, in place of what is there of it."""
    rows = [row for row in written["tables"].get(table, []) if _task(row) != task]
    rows += map(dataclasses.asdict, scores)
    written["tables"][table] = sorted(rows, key=lambda row: TASKS.index(_task(row)))
    written["rows"] = [row for row in written["rows"] if row["table"] != table or row["task"] != task] + list(made)


def _task(row: Mapping[str, Any]) -> str:
    return row["task"].partition("/")[0]  # behind it the kind of map


def _score(row: Mapping[str, Any]) -> scenes.Score:
    return scenes.Score(**{**row, "estimate": metrics.Estimate(**row["estimate"])})


def _write_picture(path: epath.Path, picture: np.ndarray) -> None:
    path.parent.mkdir(exist_ok=True)
    with path.open("wb") as file:
        Image.fromarray(picture).save(file, "PNG")


def _write_scores(directory: epath.Path, facts: Mapping[str, Any], written: Mapping[str, Any]) -> None:
    tables = {name: scenes.table(list(map(_score, rows))) for name, rows in written["tables"].items()}
    report = "\n\n".join(f"## {name}\n\n{table}" for name, table in tables.items()) + "\n"
    storage.write_whole(directory / "outputs.jsonl", "".join(json.dumps(r) + "\n" for r in written["rows"]).encode())
    storage.write_whole(directory / "scores.md", report.encode())
    # Last: where it is there, so are the others.
    storage.write_whole(
        directory / "scores.json", json.dumps({**facts, "tables": written["tables"]}, indent=1).encode()
    )


def grid(outputs: Sequence[scenes.Output], size: int) -> np.ndarray:
    """Rows `[references | made | truth]` of one task's outputs, of text outputs `[truth]`; uint8 `[height, width, 3]`.

    Args:
      outputs: of one task; absent references are black.
      size: side of the model's images.
    """
    room = max(len(item.example.references) for item in outputs)
    blank = np.zeros((size, size, 3), np.uint8)
    pictures, columns = [], room + 1
    for item in outputs:
        references = [picture.render(size) for picture in item.example.references]
        pictures += [*references, *[blank] * (room - len(references))]
        if isinstance(item.made, np.ndarray):
            pictures.append(item.made)
            columns = room + 2
        pictures.append(item.example.target.render(size))
    return image_grid(np.stack(pictures), columns=columns)


def _row(table: str, item: scenes.Output) -> dict[str, Any]:
    example = item.example
    row = {
        "table": table,
        "task": example.task,
        "kind": example.kind,
        "asked": example.question or ("" if example.task == "caption" else example.instruction),
        "truth": example.answer or example.caption,
        "scores": {name: float(score) for name, score in item.scores.items()},
    }
    if isinstance(item.made, str):
        row["made"] = item.made
    return row
