"""Readers of rows in JSON, with random access: the published JSONL files, and conversations."""

import json
import re
import zlib
from collections.abc import Callable, Iterator

import numpy as np
from etils import epath

from unialign_jax import storage
from unialign_jax.data.report import CorpusError
from unialign_jax.data.rows import count_pairs, parse_conversation, parse_row
from unialign_jax.data.samples import Sample, check_task

_CHUNK = 16 << 20
_SPACE = ord(" ")  # white space is this byte and some below


def sizes_path(path: epath.PathLike, task: str | None) -> str:
    """Where the sizes of a source's images are kept: by task, which says what the targets are, and which rows count."""
    return f"{path}.{task}.sizes.npz" if task else f"{path}.sizes.npz"


class JsonlSource:
    """Published rows of a JSONL file by index; the lines stay on disk, only their offsets are held (12 bytes a row).

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
        check_task(path, task)
        self.path, self.sizes_path = str(path), sizes_path(path, task)
        self._rows = _Rows(epath.Path(path), "line", _index_rows)
        self._task = task

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Sample:
        """The sample of one row; its images are not looked at.

        Raises:
          Refused: the row can't be used.
        """
        return parse_row(self._rows[index], self._task, self._rows.find)

    def place(self, index: int) -> str:
        """The row's line in the file, from 1."""
        return self._rows.place(index)

    def fingerprint(self) -> dict[str, int | str | None]:
        """What tells that a run had read another file, or read it for another task."""
        return self._rows.fingerprint() | {"task": self._task}

    targets_fingerprint = fingerprint  # a row's task says which of its images is the target


class ConversationSource:
    """Conversations, of a JSONL file or a JSON array, by index: each pair of turns is one sample.

    Rows are parsed once to count their pairs, and stay on disk. Picklable; may be read from several threads and
    processes at once.

    Args:
      path: the file, local or `gs://`.
      task: 'answer' (None is the same), 'caption' or 'generate', see `rows.parse_conversation`.

    Raises:
      CorpusError: no such file, no rows in it, or a JSON array that is broken.
      ValueError: another task.
    """

    def __init__(self, path: epath.PathLike, task: str | None = None):
        if task not in (None, "answer", "caption", "generate"):
            raise ValueError(f"{path}: conversations are for answer, caption or generate, not for {task!r}")
        self.path, self.sizes_path = str(path), sizes_path(path, task)
        file = epath.Path(path)
        if _begins_with(file, b"["):
            self._rows = _Rows(file, "row", _index_array)
        else:
            self._rows = _Rows(file, "line", _index_rows)
        self._task = task
        # Which sample is a row's first; one more for the end.
        counts = [count_pairs(line) for line in self._rows]
        self._firsts = np.concatenate([[0], np.cumsum(counts)])

    def __len__(self) -> int:
        return int(self._firsts[-1])

    def __getitem__(self, index: int) -> Sample:
        """The sample of one pair of turns; its image is not looked at.

        Raises:
          Refused: it can't be used.
        """
        row, pair = self._locate(index)
        return parse_conversation(self._rows[row], self._task, pair, self._rows.find)

    def place(self, index: int) -> str:
        """The row's place in the file and the pair of turns, both from 1."""
        row, pair = self._locate(index)
        return f"{self._rows.place(row)}, pair {pair + 1}"

    def fingerprint(self) -> dict[str, int | str | None]:
        """What tells that a run had read another file, or read it for another task."""
        return self._rows.fingerprint() | {"samples": len(self), "task": self._task}

    targets_fingerprint = fingerprint

    def _locate(self, index: int) -> tuple[int, int]:
        row = int(np.searchsorted(self._firsts, index, side="right")) - 1
        return row, index - int(self._firsts[row])


class _Rows:
    """The encoded rows of one file, by index and in order."""

    def __init__(self, file: epath.Path, unit: str, make_index: Callable):
        self._file, self._unit = file, unit
        try:
            starts, ends, numbers, self._checksum = make_index(file)
        except IsADirectoryError:
            raise CorpusError(
                f"{file}: expected a file of JSON rows, found a directory (of tars, format 'webdataset')"
            ) from None
        except (FileNotFoundError, NotADirectoryError):
            raise CorpusError(
                f"{file}: expected a file of JSON rows, found no such file; in a config, data.sources.NAME.path names "
                "it, relative to data.root"
            ) from None
        except (ValueError, RecursionError) as error:
            raise CorpusError(f"{file}: expected an array of JSON objects: {error}") from None
        self._starts, self._lengths = starts, (ends - starts).astype(np.uint32)
        # Every worker process has a copy of these.
        self._numbers = None if np.array_equal(numbers, np.arange(1, len(numbers) + 1)) else numbers
        if not len(starts):
            raise CorpusError(f"{file}: expected JSON objects, one per line, found no rows")

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> bytes:
        start = int(self._starts[index])
        return storage.read_range(self._file, start, start + int(self._lengths[index]))

    def __iter__(self) -> Iterator[bytes]:
        with storage.open_to_scan(self._file) as file:
            for start, length in zip(self._starts, self._lengths, strict=True):
                file.seek(int(start))
                yield file.read(int(length))

    def find(self, path: str) -> str:
        return storage.beside(self._file, path)

    def place(self, index: int) -> str:
        return f"{self._unit} {index + 1 if self._numbers is None else self._numbers[index]}"

    def fingerprint(self) -> dict[str, int]:
        return {"rows": len(self), "checksum": self._checksum}


def _begins_with(file: epath.Path, mark: bytes) -> bool:
    try:
        with file.open("rb") as stream:
            return stream.read(64).decode("utf-8-sig", "replace").lstrip().encode().startswith(mark)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        return False  # said better when it is read


_Index = tuple[np.ndarray, np.ndarray, np.ndarray, int]


def _index_rows(file: epath.Path) -> _Index:
    """Start, end (exclusive, without the line break) and number of every line that is not blank; int64 `[rows]`.

    Beside them the file's CRC-32: a file whose rows stand in another order is another file.
    """
    # Offsets of line feeds, whether a carriage return stands before each; offsets of lines that begin with white space.
    breaks, returns, spaced = [], [], []
    size, last, checksum = 0, b"\n", 0  # as if a line had ended before the file
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            data = np.frombuffer(last[-1:] + chunk, np.uint8)
            at = np.flatnonzero(data == ord("\n"))
            begins = at[at + 1 < len(data)] + 1
            spaced.append(begins[data[begins] <= _SPACE] + size - 1)
            at = at[at > 0]  # the one at 0 belongs to the chunk before
            returns.append(data[at - 1] == ord("\r"))
            breaks.append(at + size - 1)
            checksum = zlib.crc32(chunk, checksum)
            size += len(chunk)
            last = chunk
    if size and not last.endswith(b"\n"):
        breaks.append(np.array([size]))
        returns.append(np.array([last.endswith(b"\r")]))
    if not size:
        return *(np.zeros(0, np.int64),) * 3, checksum
    feeds = np.concatenate(breaks)
    starts = np.concatenate([[0], feeds[:-1] + 1])
    ends = feeds - np.concatenate(returns)
    filled = ends > starts
    spaced = np.searchsorted(starts, np.concatenate(spaced))
    if len(spaced := spaced[filled[spaced]]):  # these may hold white space alone
        with storage.open_to_scan(file) as stream:
            for line in spaced:
                stream.seek(int(starts[line]))
                filled[line] = bool(stream.read(int(ends[line] - starts[line])).strip())
    lines = np.flatnonzero(filled)
    return starts[lines], ends[lines], lines + 1, checksum


def _index_array(file: epath.Path) -> _Index:
    """As `_index_rows`, of the elements of a JSON array, numbered from 1."""
    content = file.read_bytes()
    # A character for each byte: positions are those in the file, and text beyond ASCII, all of which is inside strings,
    # takes no more room than there.
    text = content.decode("latin-1")
    decoder, space = json.JSONDecoder(), re.compile(r"[ \t\r\n,]*")
    starts, ends = [], []
    at = text.index("[") + 1
    while True:
        begin = space.match(text, at).end()
        if text.startswith("]", begin):
            if behind := content[begin + 1 :].strip():
                raise ValueError(f"one that ends at byte {begin} is followed by {behind[:20]!r}")
            break
        at = decoder.raw_decode(text, begin)[1]
        starts.append(begin)
        ends.append(at)
    numbers = np.arange(1, len(starts) + 1)
    return np.array(starts, np.int64), np.array(ends, np.int64), numbers, zlib.crc32(content)
