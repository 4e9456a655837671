"""Readers of the published JSONL rows, with random access.

Published forms, one JSON object per line; image paths are relative to the JSONL file (absolute and `gs://` allowed):

    generate, caption   {"image": [target], "conversations": [{"from": ..., "value": caption}, ...]}
    edit, perceive      {"image": [source, target], "conversations": [... caption ...], "instruction": ...}
    compose             {"original_images": [1..N], "generated_images": [target], "edit_prompt": ..., "caption": ...}

and one more for question answering: {"image": [target], "question": ..., "answer": ...}. Other keys are ignored.
"""

import json

import numpy as np
from etils import epath

from unialign_jax.data.report import CorpusError
from unialign_jax.data.samples import TASKS, Cause, Refused, Sample

_CHUNK = 16 << 20


class JsonlSource:
    """Rows of a JSONL file by index; the file's lines stay on disk, only their offsets are held (8 bytes a row).

    Blank lines are not rows. Picklable; may be read from several threads and processes at once.

    Args:
      path: the file, local or `gs://`.
      task: what every row is for; None takes it from each row's keys, which can't tell 'perceive' from 'edit' nor
        'caption' from 'generate' (these pairs share a form).

    Raises:
      CorpusError: no such file, or no rows in it.
      ValueError: no such task.
    """

    def __init__(self, path: epath.PathLike, task: str | None = None):
        if task is not None and task not in TASKS:
            raise ValueError(f"{path}: no task {task!r}; the tasks are {', '.join(TASKS)}")
        self.path = str(path)
        self._file = epath.Path(path)
        self._task = task
        try:
            self._starts, self._ends, self._lines = _index_rows(self._file)
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            raise CorpusError(f"{path}: expected a JSONL file, found no such file") from None
        if not len(self._starts):
            raise CorpusError(f"{path}: expected one JSON object per line, found no rows")

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> Sample:
        """The sample of one row; its images are not looked at.

        Raises:
          Refused: the row can't be used.
        """
        start = int(self._starts[index])
        with self._file.open("rb") as file:
            file.seek(start)
            line = file.read(int(self._ends[index]) - start)
        return parse_row(line, self._task, self._file.parent)

    def line(self, index: int) -> int:
        """The row's line number in the file, from 1."""
        return int(self._lines[index])

    def fingerprint(self) -> dict[str, int]:
        """What tells that a file is no longer the one a run had read: rows, and where the last one ends."""
        return {"rows": len(self), "bytes": int(self._ends[-1])}


def parse_row(line: bytes, task: str | None, folder: epath.Path) -> Sample:
    """One JSONL line -> a checked sample.

    Args:
      line: UTF-8.
      task: see `JsonlSource`.
      folder: what relative image paths are relative to.

    Raises:
      Refused: it can't be used, and why.
    """
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise Refused(Cause.MALFORMED_JSON, str(error)) from None
    if not isinstance(row, dict):
        raise Refused(Cause.MALFORMED_JSON, f"expected an object, found {type(row).__name__}")
    task = task or _task_of(row)
    if task == "compose":
        references = _images(row, "original_images", folder)
        (target,) = _images(row, "generated_images", folder, count=1)
        # Published prompts come wrapped in quotes and backslashes.
        prompt = _text(row, "edit_prompt").strip(' \\"')
        return Sample(task, target, references, caption=_text(row, "caption"), instruction=prompt)
    if task in ("edit", "perceive"):
        source, target = _images(row, "image", folder, count=2)
        return Sample(task, target, (source,), caption=_first_turn(row), instruction=_text(row, "instruction"))
    (target,) = _images(row, "image", folder, count=1)
    if task == "answer":
        return Sample(task, target, question=_text(row, "question"), answer=_text(row, "answer"))
    caption = _first_turn(row)
    return Sample(task, target, caption=caption, instruction=caption)


def _index_rows(file: epath.Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Start, end (exclusive, without the line break) and number of every line that is not blank; int64 `[rows]`."""
    breaks, returns = [], []  # offsets of line feeds; whether a carriage return stands before each
    size, last = 0, b""
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            data = np.frombuffer(last[-1:] + chunk, np.uint8)
            at = np.flatnonzero(data[len(last[-1:]) :] == ord("\n"))
            before = at - 1 + len(last[-1:])
            returns.append((before >= 0) & (data[before] == ord("\r")))
            breaks.append(at + size)
            size += len(chunk)
            last = chunk
    if size and not last.endswith(b"\n"):
        breaks.append(np.array([size]))
        returns.append(np.array([last.endswith(b"\r")]))
    if not size:
        return (np.zeros(0, np.int64),) * 3
    feeds = np.concatenate(breaks)
    starts = np.concatenate([[0], feeds[:-1] + 1])
    ends = feeds - np.concatenate(returns)
    lines = np.flatnonzero(ends > starts)
    return starts[lines], ends[lines], lines + 1


def _task_of(row: dict) -> str:
    if {"original_images", "generated_images", "edit_prompt"} & row.keys():
        return "compose"
    if {"question", "answer"} & row.keys():
        return "answer"
    return "edit" if "instruction" in row else "generate"


def _value(row: dict, key: str):
    if key not in row:
        raise Refused(Cause.MISSING_KEY, f"{key!r}; the row has {', '.join(map(repr, row)) or 'no keys'}")
    return row[key]


def _text(row: dict, key: str) -> str:
    value = _value(row, key)
    if not isinstance(value, str):
        raise Refused(Cause.WRONG_TYPE, f"{key!r}: expected text, found {type(value).__name__}")
    return value


def _first_turn(row: dict) -> str:
    """The caption: the first turn of 'conversations'."""
    turns = _value(row, "conversations")
    if not isinstance(turns, list) or not turns or not isinstance(turns[0], dict):
        raise Refused(Cause.WRONG_TYPE, '\'conversations\': expected a list of {"from", "value"}')
    try:
        return _text(turns[0], "value")
    except Refused as refused:
        raise Refused(refused.cause, f"'conversations'[0]: {refused.detail}") from None


def _images(row: dict, key: str, folder: epath.Path, count: int | None = None) -> tuple[str, ...]:
    paths = _value(row, key)
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
        raise Refused(Cause.WRONG_TYPE, f"{key!r}: expected a list of paths")
    if count is not None and len(paths) != count:
        raise Refused(Cause.IMAGE_COUNT, f"{key!r}: expected {count}, found {len(paths)}")
    if not all(paths):
        raise Refused(Cause.MISSING_IMAGE, f"{key!r}: a path is empty")
    return tuple(path if "://" in path else str(folder / path) for path in paths)
