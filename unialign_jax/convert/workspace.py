"""What both directions share: a target directory that appears only when it is complete, and the progress bar."""

import contextlib
import pathlib
import shutil
import uuid
from collections.abc import Iterator

import tqdm
from etils import epath

from unialign_jax.convert.errors import ConversionError

# What the tokenizers of T5 and Qwen consist of; a model's weights may lie beside them.
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "spiece.model",
    "vocab.json", "merges.txt", "chat_template.json", "chat_template.jinja",
)  # fmt: skip


@contextlib.contextmanager
def new_directory(target: pathlib.Path, size: int) -> Iterator[pathlib.Path]:
    """A directory to fill, which is renamed to `target` at the end of the block, and removed if the block fails.

    Args:
      target: must not exist, or be empty.
      size: bytes that will be written.

    Raises:
      ConversionError: if the target is not free, or the disk has less room than `size`.
    """
    check_target(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(target.parent).free
    if size > free:
        raise ConversionError(
            f"{target} needs {size / 1e9:.1f} GB but its disk has {free / 1e9:.1f} GB left: free some or choose another"
        )
    partial = target.parent / f".{target.name}.partial-{uuid.uuid4().hex[:8]}"
    partial.mkdir()
    try:
        yield partial
        if target.exists():
            target.rmdir()
        partial.rename(target)
    except BaseException:  # a cancelled conversion, too, leaves nothing behind
        shutil.rmtree(partial, ignore_errors=True)
        raise


def check_target(target: pathlib.Path) -> None:
    """Refuses a target that holds anything, or that a directory can't be renamed to.

    Raises:
      ConversionError: naming it.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConversionError(f"{target} exists and is not empty: choose another target, or remove it")
    if target.is_symlink() or target.is_mount() or target.absolute() == pathlib.Path.cwd():
        raise ConversionError(
            f"{target} is a link, a mount point or the current directory: name a new directory, in it or elsewhere"
        )


def progress_bar(total: int, shown: bool) -> tqdm.tqdm:
    """A bar in bytes, with rate and time left; advance it with `update(bytes)`."""
    return tqdm.tqdm(total=total, unit="B", unit_scale=True, desc="convert", mininterval=0.5, disable=not shown)


def copy_tokenizer(source: epath.Path | pathlib.Path | None, target: pathlib.Path) -> bool:
    """Copies a tokenizer's files into a directory, which is made if need be. Returns whether there were any.

    Args:
      source: a directory that may hold a tokenizer, beside other things; None: there is none.
      target: the directory to copy to.
    """
    if source is None or not source.is_dir():
        return False
    files = [path for path in sorted(source.iterdir()) if path.is_file() and path.name in _TOKENIZER_FILES]
    if files:
        target.mkdir(exist_ok=True)
    for path in files:
        (target / path.name).write_bytes(path.read_bytes())
    return bool(files)
