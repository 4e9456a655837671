"""SemGen-Bench: what a model makes of its long and complex prompts and edits, laid out as its scorer reads it.

Its scores are a language model's (Qwen2.5-VL 72B), given by its own programs: `test_bench_score.py` and
`calculate_statistics.py` of the public repository.
"""

import dataclasses
import io
import json
from typing import Any

from etils import epath
from PIL import Image

from unialign_jax import agreement, storage
from unialign_jax.sampling import Job, sample
from unialign_jax.sampling.outputs import PngFiles

GROUPS = {"generate": ("t2i_long", "t2i_complex"), "edit": ("edit_multi", "edit_complex")}
# What the public generator stretches its sources to, whatever their aspect; results are judged beside these.
_SIDE = 512


def draw(benchmark: epath.PathLike, job: Job) -> None:
    """Makes every image that the benchmark asks for. All processes call it with the same arguments.

    Interrupted, it goes on where it was. `job.output` gets `rows/` (what is asked for), `made/` (two sampling runs) and
    `fullset/GROUP/K.png`, with `K_SRCIMG.png` beside edits, K from 0: the places where the scorer looks.

    Args:
      benchmark: directory with `semgen_bench.jsonl` and `images/`.
      job: how to sample, and where to; task and prompts are set here.

    Raises:
      FileNotFoundError: the benchmark, or one of its images, is not there.
      ValueError: its rows are of another form; see `sample`.
    """
    output = storage.absolute(job.output)
    agreement.primary(lambda: _prepare(storage.absolute(benchmark), output), FileNotFoundError, ValueError)
    for task, groups in GROUPS.items():
        run = dataclasses.replace(job, task=task, prompts=_rows_file(output, task), output=output / "made" / task)
        total = sample(run).rows
        agreement.primary(lambda run=run, groups=groups, total=total: _place(run, groups, total, output))


def _rows_file(output: epath.Path, task: str) -> epath.Path:
    return output / "rows" / f"{task}.jsonl"


def _prepare(benchmark: epath.Path, output: epath.Path) -> None:
    file = benchmark / "semgen_bench.jsonl"
    if not file.exists():
        raise FileNotFoundError(f"{benchmark}: expected semgen_bench.jsonl, found none; it is SemGen-Bench/benchmark")
    # Of JSON only this byte ends a line: texts may hold what else Unicode has for it.
    lines = enumerate(storage.read(file).split(b"\n"), 1)
    rows = [_parse(f"{file}, line {number}", line) for number, line in lines if line.strip()]
    (output / "rows").mkdir(parents=True, exist_ok=True)
    for task, groups in GROUPS.items():
        lines = []
        for group in groups:
            (output / "fullset" / group).mkdir(parents=True, exist_ok=True)
            for key, row in enumerate(rows):
                line = {"prompt": row[group]}
                if task == "edit":
                    line["image"] = str(output / "fullset" / group / f"{key}_SRCIMG.png")
                    # The published rows name their images where they once were.
                    _stretch(benchmark / "images" / epath.Path(row["image_path"]).name, epath.Path(line["image"]))
                lines.append(json.dumps(line, ensure_ascii=False) + "\n")
        storage.write_whole(_rows_file(output, task), "".join(lines).encode())


def _parse(place: str, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{place}: expected a JSON object, found a {type(row).__name__}")
    keys = ("image_path", *GROUPS["generate"], *GROUPS["edit"])
    if absent := [key for key in keys if key not in row]:
        raise ValueError(f"{place}: expected {', '.join(absent)}, found {', '.join(row)}")
    for key in keys:
        if not isinstance(row[key], str):
            raise ValueError(f"{place}: {key} is {row[key]!r}; expected a text")
    return row


def _stretch(source: epath.Path, target: epath.Path) -> None:
    if target.exists():
        return
    if not source.exists():
        raise FileNotFoundError(f"{source}: no such image of the benchmark")
    stretched = io.BytesIO()
    with source.open("rb") as file:
        Image.open(file).convert("RGB").resize((_SIDE, _SIDE)).save(stretched, "PNG")
    storage.write_whole(target, stretched.getvalue())


def _place(run: Job, groups: tuple[str, ...], total: int, output: epath.Path) -> None:
    """Copies what was made, of one group after the other, to where the scorer looks."""
    made, each = PngFiles(epath.Path(run.output), total), total // len(groups)
    for index in range(total):
        if made.path(index).exists():  # else its row is named in a file beside the others
            target = output / "fullset" / groups[index // each] / f"{index % each}.png"
            storage.write_whole(target, storage.read(made.path(index)))
