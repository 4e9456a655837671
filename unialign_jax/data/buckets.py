"""Aspect-ratio buckets: a few image sizes of about equal area, and which rows of a source go into which.

    python -m unialign_jax.data.buckets --source=PATH [--format=...] [--task=...]

measures the images of a source beforehand, from their headers, and keeps the sizes in a file beside it. Training does
that itself where the file is missing, on one host while the others wait.
"""

import concurrent.futures
import io
import json
import math
import zipfile
import zlib
from collections.abc import Sequence

import numpy as np
import tqdm
from absl import flags, logging
from etils import epath

from unialign_jax import agreement, cli, storage
from unialign_jax.data import images
from unialign_jax.data.report import CorpusError
from unialign_jax.data.samples import Cause, Refused
from unialign_jax.data.sources import FORMATS, Source, SourceConfig, open_source

_THREADS = 16
_CHUNK = 256
_NOT_THERE = (-1, -1)  # instead of the size of an image that is missing


def bucket_sizes(height: int, width: int, multiple: int, max_aspect: float) -> tuple[tuple[int, int], ...]:
    """The sizes (height, width), from wide to tall; all of at most the area given, with sides that are multiples.

    Args:
      height, width: one of the sizes; its area is what the others nearly fill.
      multiple: of the other sizes' sides, in pixels.
      max_aspect: longer side by shorter, at most; 1 leaves `(height, width)` alone.

    Raises:
      ValueError: `max_aspect` is less than 1.
    """
    if max_aspect < 1:
        raise ValueError(f"max_aspect is {max_aspect}, expected 1 or more")
    sizes = {(height, width)}
    area = height * width
    for short in range(multiple, math.isqrt(area) + 1, multiple):
        long = area // short // multiple * multiple
        if short < long <= short * max_aspect:
            sizes |= {(short, long), (long, short)}
    return tuple(sorted(sizes, key=lambda size: size[0] / size[1]))


def divide(measured: np.ndarray, sizes: Sequence[tuple[int, int]], least: int) -> dict[tuple[int, int], np.ndarray]:
    """The rows of each bucket: those whose aspect ratio is nearest to its own, by the ratio of the two.

    A bucket with too few rows is given up, the smallest first, and its rows go to the nearest of the others. Rows of
    unknown size, which can't be used, are spread over the buckets in proportion: all in one, they would be most of it.

    Args:
      measured: integers `[rows, 2]`, height and width of each row's target; 0 where unknown.
      sizes: the buckets, from wide to tall.
      least: rows of known size that a bucket must have.

    Returns:
      Size -> row numbers, ascending int64; every row is in one bucket.
    """
    known = measured.min(axis=1) > 0
    aspects = np.log(measured[known, 0] / measured[known, 1])
    sizes = list(sizes)
    while True:
        centres = np.array([math.log(height / width) for height, width in sizes])
        nearest = np.searchsorted((centres[1:] + centres[:-1]) / 2, aspects)
        counts = np.bincount(nearest, minlength=len(sizes))
        if len(sizes) == 1 or counts.min() >= least:
            break
        del sizes[int(counts.argmin())]
    unknown = len(measured) - len(nearest)
    bucket = np.zeros(len(measured), np.int64)
    bucket[known] = nearest
    if len(nearest):
        bucket[~known] = np.sort(nearest)[(2 * np.arange(unknown) + 1) * len(nearest) // (2 * unknown)]
    return {size: np.flatnonzero(bucket == i) for i, size in enumerate(sizes)}


def agreed_sizes(source: Source) -> np.ndarray:
    """`target_sizes`, the same in all processes of a run: the order of the rows depends on them. All call it together.

    Process 0 measures and keeps what it has found, for the others to read.

    Raises:
      CorpusError: see `target_sizes`; or a process that does not see what process 0 has kept found other sizes.
    """
    measured = []
    agreement.primary(lambda: measured.append(target_sizes(source)), CorpusError)
    # Where they can't read it, they measure too; only one of them could write the file.
    sizes = agreement.everywhere(lambda: measured[0] if measured else target_sizes(source, keep=False), CorpusError)
    sums = agreement.gather(zlib.crc32(sizes.astype("<i4").tobytes()))
    if len(set(sums)) > 1:
        first = next(index for index, checksum in enumerate(sums) if checksum != sums[0])
        raise CorpusError(
            f"{source.path}: the images have other sizes in process {first} than in process 0. Give all hosts the same "
            f"files and {source.sizes_path}, which python -m unialign_jax.data.buckets makes"
        )
    return sizes


def target_sizes(source: Source, *, keep: bool = True) -> np.ndarray:
    """Height and width of every row's target, int32 `[rows, 2]`; 0 where the row can't be used.

    They are read from the images' headers once, and kept in `source.sizes_path`; images that were missing then are
    looked for anew.

    Args:
      source: whose.
      keep: whether sizes that had to be measured are kept.

    Raises:
      CorpusError: an image is there and can't be read. Later it may be, and would then belong into another bucket.
    """
    path = epath.Path(source.sizes_path)
    sizes = np.full((len(source), 2), _NOT_THERE, np.int32)
    if path.exists():
        try:
            with np.load(io.BytesIO(path.read_bytes())) as kept:
                if json.loads(str(kept["fingerprint"])) == source.targets_fingerprint():
                    sizes = kept["sizes"]
                else:
                    logging.warning(
                        "%s was made of another state of %s: the images are measured anew", path, source.path
                    )
        except (EOFError, KeyError, ValueError, zipfile.BadZipFile, zlib.error) as error:
            logging.warning("%s is damaged (%s): the images of %s are measured anew", path, error, source.path)
    unknown = np.flatnonzero(sizes[:, 0] < 0)
    chunks = [unknown[start : start + _CHUNK] for start in range(0, len(unknown), _CHUNK)]

    def measure(rows: np.ndarray) -> list[tuple[int, int]]:
        return [_measure(source, int(row)) for row in rows]

    with (
        concurrent.futures.ThreadPoolExecutor(_THREADS) as pool,
        tqdm.tqdm(total=len(unknown), desc=f"measuring the images of {source.path}", unit="image") as bar,
    ):
        for rows, part in zip(chunks, pool.map(measure, chunks), strict=True):
            sizes[rows] = part
            bar.update(len(rows))
    missing = int((sizes[:, 0] < 0).sum())
    if keep and missing:
        logging.warning(
            "%d of the %d rows of %s are of unknown size, since their images are missing: they are looked for again at "
            "the next start",
            *(missing, len(sizes), source.path),
        )
    if keep and missing < len(unknown):
        try:
            save_sizes(path, source.targets_fingerprint(), sizes)
        except OSError as error:
            logging.warning("%s can't be written (%s): the images will be measured again next time", path, error)
    return np.maximum(sizes, 0)


def save_sizes(path: epath.Path, fingerprint: dict, sizes: np.ndarray) -> None:
    """Writes what `target_sizes` reads, all at once."""
    content = io.BytesIO()
    np.savez_compressed(content, fingerprint=json.dumps(fingerprint), sizes=sizes)
    storage.write_whole(path, content.getvalue())


def _measure(source: Source, row: int) -> tuple[int, int]:
    try:
        target = source[row].target
    except Refused:  # for what the fingerprint is of: it lasts as long as the sizes do
        return 0, 0  # counted and named when the row is read
    try:
        return images.upright_size(target)
    except Refused as refused:
        if refused.cause == Cause.UNREADABLE_IMAGE:
            raise CorpusError(
                f"{source.path}, {source.place(row)}: {refused.detail}. What can't be read now may be readable later, "
                "and its size decides where it stands in the order: see to the file, or take the row out, and start "
                "again"
            ) from refused
        return _NOT_THERE if refused.cause == Cause.MISSING_IMAGE else (0, 0)


def _trouble(source: Source) -> str:
    """What keeps the first row from being used."""
    try:
        images.upright_size(source[0].target)
    except Refused as refused:
        return f"{source.place(0)}: {refused}"
    return f"{source.place(0)}: its image has no size"


def main() -> None:
    config = SourceConfig(
        *(_SOURCE.value, _FORMAT.value, _TASK.value), split=_SPLIT.value, fields=_FIELDS(), data_dir=_DATA_DIR.value
    )
    source = open_source(config)
    sizes = target_sizes(source)
    if not sizes.any():
        raise CorpusError(f"{source.path}: none of {len(sizes)} rows can be used; the first, {_trouble(source)}")
    print(f"{len(sizes)} rows, of which {int((sizes.min(axis=1) == 0).sum())} can't be used: {source.sizes_path}")


if __name__ == "__main__":
    _SOURCE = flags.DEFINE_string("source", None, "File or directory, see sources.SourceConfig.", required=True)
    _FORMAT = flags.DEFINE_enum("format", "rows", FORMATS, "What it is.")
    # The same as training has: they say which image of a row is the target, and which rows can be used.
    _TASK = flags.DEFINE_string("task", None, "The source's task in the config.")
    _SPLIT = flags.DEFINE_string("split", "train", "Of a TFDS dataset.")
    _FIELDS = cli.define_pairs("fields", "Of a TFDS dataset: FIELD=FEATURE, ..., see docs/data.md.")
    _DATA_DIR = flags.DEFINE_string("data_dir", None, "Where TFDS datasets given by name are kept.")
    cli.run(main)
