"""WebDataset tars, with random access. Made to be converted once (`launch/build.py`): opening one reads every header.

The files of a sample stand together and share a name up to the first dot; behind it, case does not count:

    000017.jpg, 000017.txt     an image and its caption
    000017.json, ...           a row in a published form (`rows`), which names its images: other files of the sample

Beside a caption, JSON that is no such row is not read: img2dataset and `launch/sample.py` put what they know of an
image there.
"""

import tarfile
import zlib
from collections.abc import Iterator
from typing import IO

import tqdm
from etils import epath

from unialign_jax import storage
from unialign_jax.data.jsonl import sizes_path
from unialign_jax.data.report import CorpusError
from unialign_jax.data.rows import is_row, parse_row
from unialign_jax.data.samples import Cause, Refused, Sample, check_task

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "jp2")
_CHUNK = 1 << 20
_Members = dict[str, tuple[int, int]]  # suffix, in lower case -> offset and size in the tar


class TarSource:
    """The samples of the tars of a directory, by index.

    Args:
      path: a tar, or a directory of them (read in the order of their names), local or `gs://`; not compressed.
      task: what every sample is for; None takes it from each row's keys; captions are for 'generate'.

    Raises:
      CorpusError: no tars, or no samples in them, or a tar that can't be read, or two files of one name and suffix
        side by side.
      ValueError: no such task.
    """

    def __init__(self, path: epath.PathLike, task: str | None = None):
        check_task(path, task)
        self.path = str(path)
        self.sizes_path = sizes_path(path, task)
        self._task = task
        root = epath.Path(path)
        self._tars = sorted(root.glob("*.tar")) if root.is_dir() else [root]
        if not self._tars:
            raise CorpusError(f"{path}: expected tars (*.tar), found none")
        self._samples: list[tuple[int, str, _Members]] = []
        for number, tar in enumerate(tqdm.tqdm(self._tars, desc=f"indexing {path}", unit="tar")):
            self._samples += [(number, key, members) for key, members in _samples_of(tar)]
        self._checksum = zlib.crc32(repr(self._samples).encode())
        if not self._samples:
            raise CorpusError(f"{path}: expected samples, found no files in its {len(self._tars)} tar(s)")

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Sample:
        """One sample, with the bytes of its images.

        Raises:
          Refused: it can't be used.
        """
        number, key, members = self._samples[index]

        def read(suffix: str) -> bytes:
            offset, size = members[suffix]
            return storage.read_range(self._tars[number], offset, offset + size)

        def find(name: str) -> bytes:
            stem, _, suffix = name.rpartition("/")[2].partition(".")
            if stem != key.rpartition("/")[2] or suffix.lower() not in members:
                raise Refused(Cause.MISSING_IMAGE, f"{name!r}: no such file in the sample {key!r}")
            return read(suffix.lower())

        if "json" in members:
            row = read("json")
            if "txt" not in members or _is_row(row):
                return parse_row(row, self._task, find)
        images = [suffix for suffix in members if suffix in IMAGE_SUFFIXES]
        if len(images) != 1:
            raise Refused(Cause.IMAGE_COUNT, f"expected 1 image, found {len(images)} among {', '.join(members)}")
        if "txt" not in members:
            raise Refused(Cause.MISSING_KEY, f"expected 'txt' or 'json', found {', '.join(members)}")
        try:
            caption = read("txt").decode("utf-8-sig").strip()
        except UnicodeDecodeError as error:
            raise Refused(Cause.MALFORMED_TEXT, f"{key}.txt: {error}") from None
        return Sample(self._task or "generate", read(images[0]), caption=caption, instruction=caption)

    def place(self, index: int) -> str:
        """The tar and the sample's name in it."""
        number, key, _ = self._samples[index]
        return f"{self._tars[number].name}, {key}"

    def fingerprint(self) -> dict[str, int | str | None]:
        """What tells that a run had read other tars, or read them for another task; by names, places and sizes."""
        return {"rows": len(self), "checksum": self._checksum, "task": self._task}

    targets_fingerprint = fingerprint


def _is_row(content: bytes) -> bool:
    """Whether JSON beside a caption is a published row; broken JSON is none, and is not read either."""
    try:
        return is_row(content)
    except Refused:
        return False


def _only_zeros_follow(file: IO[bytes]) -> bool:
    """Whether what is left of a tar is its end: a block of zeros, and any number of more zeros."""
    size = 0
    while chunk := file.read(_CHUNK):
        if chunk.strip(b"\0"):
            return False
        size += len(chunk)
    return size >= tarfile.BLOCKSIZE


def _samples_of(tar: epath.Path) -> Iterator[tuple[str, _Members]]:
    """(name, files) of each sample; files of one sample that don't stand together make several, as in WebDataset."""
    last, members = None, {}
    try:
        with storage.open_to_scan(tar) as file, tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                if not member.isfile():
                    continue
                # Names that are not UTF-8 could not be printed where they are told of.
                printable = member.name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
                folder, slash, name = printable.rpartition("/")
                stem, _, suffix = name.partition(".")
                key = folder + slash + stem
                if key != last and members:
                    yield last, members
                    members = {}
                last = key
                if (kind := suffix.lower()) in members:
                    raise CorpusError(
                        f"{tar}: expected one file {key}.{kind} of a sample (case does not count), found a second, "
                        f"{printable!r}: their contents begin at bytes {members[kind][0]} and {member.offset_data}. "
                        "Samples need names of their own: rename one, and pack the tar anew"
                    )
                members[kind] = (member.offset_data, member.size)
            # A header that is damaged ends the reader's iteration as the end of the tar does.
            # A block of zeros ends it too, such as the one between tars that were written behind each other.
            file.seek(archive.offset)
            if not _only_zeros_follow(file):
                raise CorpusError(
                    f"{tar}: expected a tar that is whole, found neither a header nor the end at "
                    f"byte {archive.offset}: what follows would be lost. Pack its files anew, or take it out"
                )
    except FileNotFoundError:
        raise CorpusError(f"{tar}: expected a tar, found no such file") from None
    except tarfile.TarError as error:
        raise CorpusError(f"{tar}: expected a tar that is whole and not compressed ({error})") from error
    if members:
        yield last, members
