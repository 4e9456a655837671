"""Paths that may be local or in an object store (`gs://`). What differs between the two is decided here.

`epath` reads and writes both, but its `resolve` takes a `gs://` address for a relative path.
"""

import contextlib
import os
import pathlib
import tempfile
from collections.abc import Iterator

import fsspec
from etils import epath


def is_remote(path: epath.PathLike) -> bool:
    """Whether the path is in an object store. There, directories exist only as far as there are files in them."""
    return "://" in str(path)


def absolute(path: epath.PathLike) -> epath.Path:
    """The path without `~` and, if local, from the root on.

    Raises:
      ValueError: it is in Google Cloud Storage, whose client is not installed.
    """
    if str(path).startswith("gs://"):
        try:
            fsspec.get_filesystem_class("gcs")
        except ImportError as error:
            raise ValueError(f"{path}: gs:// needs another package: pip install 'unialign_jax[gcs]'") from error
    return epath.Path(path) if is_remote(path) else epath.Path(path).expanduser().resolve()


@contextlib.contextmanager
def whole_file(path: epath.Path) -> Iterator[str]:
    """A local file to be written, for code that can't write elsewhere; on leaving it becomes `path`, all at once.

    After an exception, or a kill, there is no such file, or still the one that was there before.
    """
    if is_remote(path):
        with tempfile.TemporaryDirectory() as folder:
            local = epath.Path(folder) / path.name
            yield str(local)
            local.copy(path, overwrite=True)
        return
    partial = f"{path}.partial"
    yield partial
    with open(partial, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)


def write_whole(path: epath.Path, data: bytes) -> None:
    """Writes a file that others see complete or not at all (as object stores do anyway)."""
    if is_remote(path):
        path.write_bytes(data)
        return
    with whole_file(path) as partial:
        pathlib.Path(partial).write_bytes(data)
