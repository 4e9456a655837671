"""Paths that may be local or in an object store (`gs://`). What differs between the two is decided here.

`epath` reads and writes both, but its `resolve` takes a `gs://` address for a relative path.
"""

from etils import epath


def is_remote(path: epath.PathLike) -> bool:
    """Whether the path is in an object store. There, directories exist only as far as there are files in them."""
    return "://" in str(path)


def absolute(path: epath.PathLike) -> epath.Path:
    """The path without `~` and, if local, from the root on."""
    return epath.Path(path) if is_remote(path) else epath.Path(path).expanduser().resolve()
