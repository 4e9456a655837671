"""Paths that may be local or in an object store (`gs://`). What differs between the two is decided here.

`epath` reads and writes both, but its `resolve` takes a `gs://` address for a relative path.
"""

import contextlib
import importlib.util
import io
import logging
import os
import pathlib
import posixpath
import re
import tempfile
import uuid
from collections.abc import Callable, Iterator
from typing import IO

import fsspec
from etils import epath

from unialign_jax.typed import WrongValue

# gcsfs would ask over gRPC what kind each bucket is, for features that nothing here uses, and where no gRPC gets
# through wait for half a minute each time. It looks when it is imported.
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
# What other processes write has to be seen: gcsfs would keep for good what a directory held when it was first listed.
fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
# Without, gcsfs waits for ever for an answer that a dead connection will not bring. What times out is asked for again.
if importlib.util.find_spec("gcsfs"):
    import aiohttp

    fsspec.config.conf["gcs"].setdefault("requests_timeout", aiohttp.ClientTimeout(sock_connect=30, sock_read=60))
# It logs, each with its traceback, the errors that it then raises.
logging.getLogger("gcsfs").addFilter(lambda record: record.module != "retry")
# What the clients of stores consist of. Their errors are known by these names, for which no command loads them.
_CLIENTS = ("gcsfs", "google.auth", "google.api_core", "aiohttp")
_PARTIAL = ".partial-"  # in the name of a file that is being written, before 32 hexadecimal digits
_READ_AHEAD = 8 * 2**20  # bytes of a remote file that are fetched at once
# What Orbax, TensorStore and json raise for files that are missing, cut short or altered.
_READ_ERRORS = (ValueError, OSError, KeyError, TypeError)


def is_remote(path: epath.PathLike) -> bool:
    """Whether the path is in an object store. There, directories exist only as far as there are files in them."""
    return "://" in str(path)


@contextlib.contextmanager
def reading(refusal: Callable[[Exception], Exception]) -> Iterator[None]:
    """Of what Orbax, TensorStore and json raise within, for files that are missing, cut short or altered, raises
    `refusal` instead.
    """
    try:
        yield
    except _READ_ERRORS as error:
        raise refusal(error) from error
    except Exception as error:
        # Around what a reader of arrays raises, Orbax puts an exception of no class of its own.
        if type(error) is not Exception or not isinstance(error.__cause__, _READ_ERRORS):
            raise
        raise refusal(error.__cause__) from error


def absolute(path: epath.PathLike) -> epath.Path:
    """The path with `~` expanded; a local one absolute.

    Raises:
      WrongValue: it is in Google Cloud Storage, whose client is not installed, or in a store of another kind.
    """
    if is_remote(path):
        if not str(path).startswith("gs://"):
            raise WrongValue(f"{path}: expected a local path or gs://; copy it to one of them")
        try:
            fsspec.get_filesystem_class("gcs")
        except ImportError as error:
            raise WrongValue(f"{path}: gs:// needs another package: pip install 'unialign_jax[gcs]'") from error
    return epath.Path(path) if is_remote(path) else epath.Path(path).expanduser().resolve()


def read(path: epath.Path) -> bytes:
    """A file's content; of a remote one in a single request.

    Raises:
      OSError: also for a store's client's own kinds of error, as `read_range`, `whole_file` and `write_whole`.
    """
    if not is_remote(path):
        return path.read_bytes()
    with _errors(path):
        return _client(path).cat_file(str(path))


def read_range(path: epath.Path, start: int, end: int) -> bytes:
    """Bytes `start` to `end` of a file. Of a remote one these alone are fetched: `open` would fetch megabytes."""
    if is_remote(path):
        with _errors(path):
            return _client(path).cat_file(str(path), start=start, end=end)
    with path.open("rb") as file:
        file.seek(start)
        return file.read(end - start)


def open_to_scan(path: epath.Path) -> IO[bytes]:
    """A file that is read from the front to the back in small pieces, such as lines.

    Of a remote one, large parts are fetched; fsspec alone would send a request for each line, and fetch 5 MB with it.
    """
    return io.BufferedReader(path.open("rb"), _READ_AHEAD) if is_remote(path) else path.open("rb")


@contextlib.contextmanager
def _errors(path: epath.Path) -> Iterator[None]:
    """Makes an OSError of whatever the store's client raises, as a disk would."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"{path}: {_said(error)}") from error


def client_error(error: Exception) -> str | None:
    """What a store's client says by an error, and what to do about it; None if the error is none of a client.

    A client's are the kinds of error that it defines, and the OSErrors and ValueErrors that it raises.
    """
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    raised_in = "" if trace is None else trace.tb_frame.f_globals.get("__name__", "")
    by_client = isinstance(error, OSError | ValueError) and _of_client(raised_in)
    return _said(error) if by_client or _of_client(type(error).__module__) else None


def _of_client(module: str) -> bool:
    return any(f"{module}.".startswith(f"{client}.") for client in _CLIENTS)


def _said(error: Exception) -> str:
    said = str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
    # gcsfs makes a plain OSError of 403.
    denied = getattr(error, "code", None) in (401, 403) or said.startswith("Forbidden: ")
    if denied or type(error).__module__.startswith("google.auth"):
        said += "; log in with: gcloud auth application-default login, or give the service account access to the bucket"
    return said


def _client(path: epath.Path) -> fsspec.AbstractFileSystem:
    scheme = str(path).partition("://")[0]
    return fsspec.filesystem("gcs" if scheme == "gs" else scheme)


def beside(file: epath.Path, name: str) -> str:
    """What a name in a file means: an address as it is, a path from the file's directory on.

    Object stores take `..` for a name like any other, so there it is resolved.
    """
    if "://" in name:
        return name
    scheme, mark, place = str(file.parent / name).partition("://")
    return f"{scheme}{mark}{posixpath.normpath(place)}" if mark else scheme


@contextlib.contextmanager
def whole_file(path: epath.Path) -> Iterator[str]:
    """A local file to be written, for code that can't write elsewhere; on leaving it becomes `path`, all at once.

    After an exception, or a kill, there is no such file, or still the one that was there before. Two processes that
    write the same file do not meet: each has a file of its own until the end.
    """
    if is_remote(path):
        with tempfile.TemporaryDirectory() as folder:
            local = epath.Path(folder) / path.name
            yield str(local)
            # Not `copy`, which closes the file after an error too: what has been sent by then would look whole.
            with _errors(path):
                _client(path).put_file(str(local), str(path))
        return
    partial = f"{path}{_PARTIAL}{uuid.uuid4().hex}"
    try:
        yield partial
        try:
            with open(partial, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(partial, path)
        except FileNotFoundError as error:
            raise OSError(
                f"{path}: gone when it was whole; another process has begun the same work, or someone cleared the "
                "directory. Let one of them finish, then start again"
            ) from error
    finally:
        pathlib.Path(partial).unlink(missing_ok=True)


def clear_partial(directory: epath.Path) -> None:
    """Removes what a killed `whole_file` has left anywhere in a directory. A process that still writes there fails."""
    for file in () if is_remote(directory) else pathlib.Path(directory).rglob(f"*{_PARTIAL}*"):
        # Others are the user's, or directories that a conversion is filling.
        if re.search(rf"{re.escape(_PARTIAL)}[0-9a-f]{{32}}$", file.name) and file.is_file():
            file.unlink(missing_ok=True)


def write_whole(path: epath.Path, data: bytes) -> None:
    """Writes a file that others see complete or not at all (as object stores do anyway)."""
    if is_remote(path):
        with _errors(path):
            path.write_bytes(data)
        return
    with whole_file(path) as partial:
        pathlib.Path(partial).write_bytes(data)
