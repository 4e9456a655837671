"""Where results go: one file a row, or shards. Every file appears whole or not at all, and says what is done.

Units of work are runs of rows `[start, stop)`. What a process has to write of a unit has one name however often it is
made, so a unit that was interrupted is made again, with the same result.
"""

import io
import json
import pathlib
import re
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath
from PIL import Image, PngImagePlugin

from unialign_jax import storage
from unialign_jax.data.images import image_grid
from unialign_jax.data.samples import TEXT_TASKS
from unialign_jax.sampling.rows import Row
from unialign_jax.storage import write_whole

FORMATS = ("png", "array_record", "webdataset")
_ROWS_PER_DIRECTORY = 10_000

# A row and what was made of it; the error's text where nothing could be.
Made = tuple[Row, np.ndarray | str | None, str | None]


class Output(Protocol):
    """One way of writing results."""

    def missing(self, start: int, stop: int, owned: np.ndarray) -> bool:
        """Whether anything of a unit that this process owns rows of (`owned`, bool `[stop - start]`) is not there."""
        ...

    def write(self, start: int, stop: int, made: Sequence[Made], facts: dict[str, Any]) -> None:
        """Writes what this process owns of a unit.

        Args:
          start, stop: the unit.
          made: its results.
          facts: what every result's metadata says besides its own row.
        """
        ...

    def told(self, start: int, stop: int, made: Sequence[Made]) -> list[str]:
        """What a user is told of a unit: texts themselves; of images, the files that they are in."""
        ...

    def failures(self) -> int:
        """How many rows the files that were there at first say could not be made, by any process."""
        ...


def make_output(format_name: str, directory: epath.Path, task: str, count: int) -> Output:
    """The output of a run.

    Args:
      format_name: of images, in `FORMATS`; texts always become JSONL shards (`task` says which they are).
      directory: where files go.
      task: of the run.
      count: rows in all.
    """
    if task in TEXT_TASKS:
        return _Shards(directory, "jsonl", _jsonl)
    if format_name == "png":
        return PngFiles(directory, count)
    kind = {"array_record": ("array_record", _array_record), "webdataset": ("tar", _tar)}[format_name]
    return _Shards(directory, *kind)


def is_result(path: epath.Path) -> bool:
    """Whether something in a run's directory was made by a run, in any format; `run.json` and the grid are not."""
    return bool(re.fullmatch(r"shard-\d.*\.(jsonl|array_record|tar)|\d{3,}(\.png|\.error\.json)|\d{5}", path.name))


class PngFiles:
    """`DIRECTORY/NNN.png` with its metadata as PNG text, or `NNN.error.json`; sub-directories of 10 000 for many."""

    def __init__(self, directory: epath.Path, count: int):
        self._directory = directory
        self._digits, self._nested = max(3, len(str(count - 1))), count > _ROWS_PER_DIRECTORY
        found = directory.glob("*/*" if self._nested else "*")
        self._there = {path.name for path in found}

    def path(self, index: int) -> epath.Path:
        """Of a row's image."""
        folder = self._directory / f"{index // _ROWS_PER_DIRECTORY:05d}" if self._nested else self._directory
        return folder / f"{index:0{self._digits}d}.png"

    def missing(self, start: int, stop: int, owned: np.ndarray) -> bool:
        names = [self.path(index).name for index in np.flatnonzero(owned) + start]
        return any(n not in self._there and n.replace(".png", ".error.json") not in self._there for n in names)

    def write(self, start: int, stop: int, made: Sequence[Made], facts: dict[str, Any]) -> None:
        for row, image, error in made:
            path = self.path(row.index)
            failed = path.with_name(f"{path.stem}.error.json")
            path.parent.mkdir(parents=True, exist_ok=True)
            # First what an earlier attempt at this unit has left: a row with neither file is made again.
            outdated = failed if error is None else path
            if outdated.name in self._there:
                outdated.unlink()
            if error is None:
                write_whole(path, encode_png(image, _metadata(row, facts)))
            else:
                write_whole(failed, _json_line(row, facts, error=error))

    def told(self, start: int, stop: int, made: Sequence[Made]) -> list[str]:
        return [str(self.path(row.index)) for row, _, error in made if error is None]

    def failures(self) -> int:
        return sum(name.endswith(".error.json") for name in self._there)

    def write_grid(self, count: int) -> None:
        """Lays the first `count` images out in `DIRECTORY/grid.png`; rows that could not be made are left out."""
        images = []
        for path in map(self.path, range(count)):
            if path.exists():
                with path.open("rb") as file:
                    images.append(np.asarray(Image.open(file)))
        if images:
            grid = image_grid(np.stack(images), columns=int(np.ceil(np.sqrt(len(images)))))
            write_whole(self._directory / "grid.png", encode_png(grid, {}))


class _Shards:
    """`DIRECTORY/shard-START-STOP[-iofn].EXTENSION`, one for each unit and process, beside it `.errors.jsonl`."""

    def __init__(self, directory: epath.Path, extension: str, encode: Callable):
        self._directory, self._extension, self._encode = directory, extension, encode
        count = jax.process_count()
        self._process = f"-{jax.process_index():04d}of{count:04d}" if count > 1 else ""
        self._there = {path.name for path in directory.glob("shard-*")}

    def _name(self, start: int, stop: int) -> str:
        return f"shard-{start:09d}-{stop:09d}{self._process}.{self._extension}"

    def missing(self, start: int, stop: int, owned: np.ndarray) -> bool:
        return bool(owned.any()) and self._name(start, stop) not in self._there

    def write(self, start: int, stop: int, made: Sequence[Made], facts: dict[str, Any]) -> None:
        if not made:
            return
        path = self._directory / self._name(start, stop)
        errors = path.with_name(f"{path.stem}.errors.jsonl")
        # Of an earlier attempt at this unit. The shard, by which the unit counts as done, goes first and comes last.
        for outdated in (path, errors):
            if outdated.name in self._there:
                outdated.unlink()
        failed = [_json_line(row, facts, error=error) for row, _, error in made if error is not None]
        if failed:
            write_whole(errors, b"".join(failed))
        write_whole(path, self._encode([(row, item) for row, item, error in made if error is None], facts))

    def told(self, start: int, stop: int, made: Sequence[Made]) -> list[str]:
        texts = [item for _, item, error in made if error is None and isinstance(item, str)]
        return texts if self._extension == "jsonl" else [str(self._directory / self._name(start, stop))] * bool(made)

    def failures(self) -> int:
        files = self._directory.glob("shard-*.errors.jsonl")
        return sum(len(storage.read(path).splitlines()) for path in files)


def encode_png(image: np.ndarray, metadata: dict[str, Any]) -> bytes:
    """uint8 `[H, W, 3]` as PNG with its metadata as international text chunks; the same bytes every time."""
    text = PngImagePlugin.PngInfo()
    for key, value in metadata.items():
        value = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        text.add_itxt(key, value.encode("utf-8", "backslashreplace").decode())  # names of files may be no UTF-8
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", pnginfo=text)
    return buffer.getvalue()


def _metadata(row: Row, facts: dict[str, Any]) -> dict[str, Any]:
    images = {"images": list(row.images)} if row.images else {}
    prompt = {"prompt": row.prompt} if row.prompt else {}
    return {"index": row.index, **prompt, **images, "seed": row.seed, **facts}


def _json_line(row: Row, facts: dict[str, Any], **more: Any) -> bytes:
    text = json.dumps(_metadata(row, facts) | more, ensure_ascii=False)
    return text.encode("utf-8", "backslashreplace") + b"\n"


def _jsonl(made: Sequence[tuple[Row, str]], facts: dict[str, Any]) -> bytes:
    return b"".join(_json_line(row, facts, text=text) for row, text in made)


def _array_record(made: Sequence[tuple[Row, np.ndarray]], facts: dict[str, Any]) -> bytes:
    """One PNG with its metadata a record, readable one by one."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "shard"
        writer = ArrayRecordWriter(str(path), "group_size:1")
        for row, image in made:
            writer.write(encode_png(image, _metadata(row, facts)))
        writer.close()
        return path.read_bytes()


def _tar(made: Sequence[tuple[Row, np.ndarray]], facts: dict[str, Any]) -> bytes:
    """WebDataset: NNN.png, NNN.json and NNN.txt (the prompt) for each row."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for row, image in made:
            metadata = _metadata(row, facts)
            files = {
                "png": encode_png(image, metadata),
                "json": json.dumps(metadata, ensure_ascii=False).encode("utf-8", "backslashreplace"),
                "txt": row.prompt.encode(),
            }
            for extension, data in files.items():
                info = tarfile.TarInfo(f"{row.index:09d}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()
