"""Caches: what the frozen networks make of the rows of a source, in ArrayRecord shards, by row as the source itself.

    DIRECTORY/SOURCE/HEIGHTxWIDTH/PART/cache.json                    a `Description`: what is in it, what made it
                                       00000-of-00012.array_record
                                       null_states                   of `instructions`: those of the text " "

A cache is of one part (of `PARTS`) and one stream: the rows of one source that go into one bucket. Record k is of the
stream's k-th row:

    8 bytes   digest of the sample, by which a row that has changed since is noticed
    1 byte    1: the arrays follow, one after the other; 0: the refusal follows, JSON `[cause, detail]`

`training.precompute` writes caches; the input pipeline reads them through `Caches`.
"""

import dataclasses
import functools
import hashlib
import json
import math
import zlib
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath

from unialign_jax.data.report import CorpusError
from unialign_jax.data.samples import Cause, Refused, Sample
from unialign_jax.data.shards import DamagedShard, Shards
from unialign_jax.data.sources import Source

# Part -> the arrays of `batch.Batch` that it provides.
PARTS = {
    "latents": ("moments",),
    "instructions": ("instruction_states",),
    "teacher": ("teacher_image", "teacher_text"),
}
DESCRIPTION_FILE, NULL_STATES_FILE = "cache.json", "null_states"
# One record is read at a time, and numbers like these hardly compress.
WRITER_OPTIONS = "group_size:1,uncompressed"
_VERSION = 1
DIGEST_BYTES = 8
_DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


class CacheMismatch(ValueError):
    """A cache that is not of this data, these networks or these settings. The message says what differs."""

    final = True  # see `cli.run`


@dataclasses.dataclass(frozen=True)
class Description:
    """What one cache holds.

    Attributes:
      settings: everything but the weights that its numbers depend on, by a name for messages; JSON values.
      weights: checksum of the network that made it.
      arrays: name -> dtype and shape of one row's array; the names are those of `PARTS`.
      rows: records in all.
      rows_per_shard: records of a shard; the last one may have fewer.
    """

    settings: Mapping[str, Any]
    weights: int
    arrays: Mapping[str, tuple[str, tuple[int, ...]]]
    rows: int
    rows_per_shard: int

    @property
    def shards(self) -> int:
        return math.ceil(self.rows / self.rows_per_shard)

    @property
    def row_bytes(self) -> int:
        """Size of the record of a usable row."""
        arrays = (math.prod(shape) * _DTYPES[dtype].itemsize for dtype, shape in self.arrays.values())
        return DIGEST_BYTES + 1 + sum(arrays)

    def shard_rows(self, shard: int) -> range:
        """Which of the stream's rows are in a shard."""
        return range(shard * self.rows_per_shard, min((shard + 1) * self.rows_per_shard, self.rows))

    def shard_name(self, shard: int) -> str:
        return f"{shard:05d}-of-{self.shards:05d}.array_record"

    def missing(self, path: epath.Path) -> list[int]:
        """The shards that are not there. A shard that is there is complete."""
        there = {file.name for file in path.iterdir()}
        return [shard for shard in range(self.shards) if self.shard_name(shard) not in there]

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"

    def check(self, path: epath.Path, settings: Mapping[str, Any]) -> None:
        """Refuses other settings than those that the cache was made with.

        Raises:
          CacheMismatch: naming what differs.
        """
        names = sorted(self.settings.keys() | settings.keys())
        pairs = {name: (self.settings.get(name), settings.get(name)) for name in names}
        if differing := [f"{name} was {old!r}, is {new!r}" for name, (old, new) in pairs.items() if old != new]:
            raise CacheMismatch(f"{path} is not a cache of this data and config: {'; '.join(differing)}. {_ADVICE}")

    def check_weights(self, path: epath.Path, weights: int) -> None:
        """Refuses a network with other weights than the one that made the cache.

        Raises:
          CacheMismatch: it has.
        """
        if self.weights != weights:
            raise CacheMismatch(
                f"{path} was made by a network with other weights: their checksum was {self.weights}, is {weights}. "
                f"{_ADVICE}"
            )


_ADVICE = (
    "Go back to what it was made with, or make a new one in another directory (launch/precompute.py) and name that in "
    "cache_directory"
)


def read_description(path: epath.Path) -> Description:
    """The description of the cache in a directory.

    Raises:
      FileNotFoundError: there is none.
      CorpusError: it can't be read.
    """
    file = path / DESCRIPTION_FILE
    try:
        description = Description(**json.loads(file.read_text()))
    except (ValueError, TypeError) as error:
        raise CorpusError(f"{file}: not a description of a cache ({error}); remove {path} and make it anew") from error
    arrays = {name: (dtype, tuple(shape)) for name, (dtype, shape) in description.arrays.items()}
    return dataclasses.replace(description, arrays=arrays)


def digest(sample: Sample, source: Source) -> bytes:
    """Of all that a sample is made of; an image counts with its bytes, or its path from the source's directory on."""
    base = f"{epath.Path(source.path).parent}/"

    def image(value: str | bytes) -> str:
        return hashlib.blake2b(value).hexdigest() if isinstance(value, bytes) else value.removeprefix(base)

    texts = (sample.task, sample.caption, sample.instruction, sample.question, sample.answer)
    content = json.dumps([texts, *map(image, (sample.target, *sample.references))])
    return hashlib.blake2b(content.encode(), digest_size=DIGEST_BYTES).digest()


def usable_record(sample_digest: bytes, arrays: Mapping[str, np.ndarray], description: Description) -> bytes:
    """The record of a row with its arrays."""
    parts = [sample_digest, b"\1"]
    for name, (dtype, shape) in description.arrays.items():
        array = np.ascontiguousarray(arrays[name])
        if array.dtype != _DTYPES[dtype] or array.shape != shape:
            raise ValueError(f"{name} is {array.dtype}{list(array.shape)}, expected {dtype}{list(shape)}")
        parts.append(array.view(np.uint8).tobytes())
    return b"".join(parts)


def refused_record(sample_digest: bytes | None, refused: Refused) -> bytes:
    """The record of a row that can't be used; without a digest if there was no sample."""
    content = json.dumps([str(refused.cause), refused.detail]).encode()
    return (sample_digest or bytes(DIGEST_BYTES)) + b"\0" + content


class Cache:
    """One cache, by row. Picklable; may be read from several threads and processes at once.

    Args:
      path: its directory.
      part: of `PARTS`.
      settings: see `Description`; what they must be.
      source: whose rows.
      rows: numbers of the stream's rows, see `streams.Stream`.

    Attributes:
      path, part, description: of the cache.

    Raises:
      CacheMismatch: it was made with other settings; or there is none.
      CorpusError: it is unfinished or damaged.
    """

    def __init__(
        self, path: epath.Path, part: str, settings: Mapping[str, Any], source: Source, rows: np.ndarray | range
    ):
        self.path, self.part = path, part
        try:
            self.description = read_description(path)
        except FileNotFoundError:
            sizes = sorted(place.name for place in path.parent.parent.glob("*")) or ["none"]
            raise CacheMismatch(
                f"{path}: no cache of {part} for images of {path.parent.name}; caches of this source there are for "
                f"{', '.join(sizes)}. Make it with launch/precompute.py, or leave {part} out of cached"
            ) from None
        self.description.check(path, settings)
        if missing := self.description.missing(path):
            raise CorpusError(
                f"{path} is unfinished: {len(missing)} of {self.description.shards} shards are missing; the same "
                "launch/precompute.py command makes them"
            )
        self._source, self._rows = source, rows
        self._records = Shards(
            [
                _Shard(str(path / self.description.shard_name(shard)), len(self.description.shard_rows(shard)))
                for shard in range(self.description.shards)
            ]
        )

    def digest(self, sample: Sample) -> bytes:
        """What tells a sample of the source from others; see `digest`."""
        return digest(sample, self._source)

    def read(self, row: int, mark: bytes) -> dict[str, np.ndarray]:
        """The arrays of a row.

        Args:
          row: its number in the source.
          mark: `digest` of the sample that it holds now.

        Raises:
          Refused: as it was when the cache was made.
          CacheMismatch: another sample was in that row then.
          CorpusError: the record can't be read.
        """
        index = row if isinstance(self._rows, range) else int(np.searchsorted(self._rows, row))
        try:
            content = self._records[index]
        except DamagedShard as error:
            raise CorpusError(
                f"{error}; remove this file, and the same launch/precompute.py command makes it again"
            ) from error
        if content[:DIGEST_BYTES] != mark:
            raise CacheMismatch(
                f"{self.path} is not a cache of {self._source.path}: {self._source.place(row)} has changed. {_ADVICE}"
            )
        if not content[DIGEST_BYTES]:
            cause, detail = json.loads(content[DIGEST_BYTES + 1 :])
            raise Refused(Cause(cause), detail)
        arrays, offset = {}, DIGEST_BYTES + 1
        for name, (dtype, shape) in self.description.arrays.items():
            count = math.prod(shape)
            arrays[name] = np.frombuffer(content, _DTYPES[dtype], count, offset).reshape(shape)
            offset += count * _DTYPES[dtype].itemsize
        return arrays

    def null_states(self) -> np.ndarray:
        """Of `instructions`: the states of the text " ", like those of a row."""
        dtype, shape = self.description.arrays["instruction_states"]
        return np.frombuffer((self.path / NULL_STATES_FILE).read_bytes(), _DTYPES[dtype]).reshape(shape)


@dataclasses.dataclass(frozen=True)
class _Shard:
    """What `ArrayRecordDataSource` need not open a file to find out; the names are those of its protocol."""

    filename: str
    take: int
    skip: int = 0

    @property
    def examples_in_shard(self) -> int:
        return self.take


@dataclasses.dataclass(frozen=True)
class Caches:
    """All caches of a stage: where they are, and what they must have been made with.

    Attributes:
      directory: of them all, local or `gs://`.
      names: of the sources, in the order of the config.
      settings: part -> what its numbers depend on besides weights and rows, see `Description`.
    """

    directory: str
    names: tuple[str, ...]
    settings: Mapping[str, Mapping[str, Any]]

    def path(self, which: int, size: tuple[int, int], part: str) -> epath.Path:
        """Of the cache of a part, of a source (by its place in the config) in a bucket of height and width `size`."""
        return epath.Path(self.directory) / self.names[which] / f"{size[0]}x{size[1]}" / part

    def all_settings(self, part: str, source: Source, rows: np.ndarray | range, references: int) -> dict[str, Any]:
        """The settings of a stream's cache, its rows included."""
        numbers = np.arange(rows.start, rows.stop, dtype="<i8") if isinstance(rows, range) else np.asarray(rows, "<i8")
        checksum = zlib.crc32(numbers)
        settings = {"version": _VERSION, "bucket": f"{len(rows)} rows, checksum {checksum}"}
        settings |= {f"source.{name}": value for name, value in source.fingerprint().items()}
        if part != "instructions":  # of a row with more, the images are refused
            settings["references"] = references
        return json.loads(json.dumps(settings | dict(self.settings[part])))

    def open(
        self, which: int, source: Source, rows: np.ndarray | range, size: tuple[int, int], references: int
    ) -> dict[str, Cache]:
        """The caches of a stream by part; see `Cache` for what is refused."""
        make = functools.partial(Cache, source=source, rows=rows)
        return {
            part: make(self.path(which, size, part), part, self.all_settings(part, source, rows, references))
            for part in self.settings
        }
