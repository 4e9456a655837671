"""safetensors files, read and written one tensor at a time with plain file access.

The format (huggingface.co/docs/safetensors): 8 bytes of little-endian header length, a JSON header of names, dtypes,
shapes and byte ranges, then the bytes. The library's NumPy interface has no bfloat16, keeps the whole file mapped (its
pages count as resident memory) and writes whole dictionaries only; conversion must stay within bounded memory.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

import ml_dtypes
import numpy as np

from unialign_jax.convert.errors import ConversionError

DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
PICKLES = (".bin", ".pth", ".pt", ".ckpt", ".pkl")
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_MAX_HEADER = 100_000_000  # the library's own limit


class Tensor(Protocol):
    """A tensor that is read when asked for: `StoredTensor`, `MadeTensor`."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype:
        """float32, float16 or (of `ml_dtypes`) bfloat16."""
        ...

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows `[start:stop]` of the first axis, by default all."""
        ...


@dataclasses.dataclass(frozen=True)
class MadeTensor:
    """A tensor that is computed when asked for.

    Attributes:
      shape, dtype: of the result of `make`.
      make: (start, stop) -> rows `[start:stop]` of the first axis.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[int, int], np.ndarray]

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """See `Tensor`."""
        return self.make(start, self.shape[0] if stop is None else stop).astype(self.dtype, copy=False)


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file; `offset` is the position of its first byte."""

    file: pathlib.Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """See `Tensor`. Raises ConversionError if the file has become shorter than its header says."""
        shape = self.shape
        if shape:
            shape = ((shape[0] if stop is None else stop) - start, *shape[1:])
        row = math.prod(self.shape[1:]) * self.dtype.itemsize
        count = math.prod(shape)
        values = np.fromfile(self.file, self.dtype, count, offset=self.offset + start * row)
        if values.size != count:
            raise ConversionError(f"{self.file} ends early: it is truncated or still being copied; copy it again")
        return values.reshape(shape)


def nbytes(tensor: Tensor) -> int:
    """Size of a tensor's values."""
    return math.prod(tensor.shape) * tensor.dtype.itemsize


def read_header(file: pathlib.Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file, by name.

    Raises:
      ConversionError: naming the file, if it is not a safetensors file, is truncated, or holds a dtype other than
        float32, float16, bfloat16.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or not 2 <= length <= _MAX_HEADER:
            raise ConversionError(f"{file} is not a safetensors file")
        if 8 + length > size:
            raise ConversionError(f"{file} is truncated within its header: copy it again")
        raw = stream.read(length)
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        entries = {
            name: (e["dtype"], tuple(map(int, e["shape"])), *map(int, e["data_offsets"])) for name, e in header.items()
        }
        return {name: _stored(file, size, 8 + length, name, *entry) for name, entry in entries.items()}
    except ConversionError:
        raise
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise ConversionError(f"{file} is not a safetensors file: its header cannot be read ({error})") from error


def _stored(file: pathlib.Path, size: int, base: int, name: str, code: str, shape: tuple, begin: int, end: int):
    if code not in DTYPES:
        raise ConversionError(f"{file}: tensor {name} is stored as {code}; only F32, F16 and BF16 can be converted")
    tensor = StoredTensor(file, DTYPES[code], shape, base + begin)
    if begin < 0 or min(shape, default=0) < 0 or end - begin != nbytes(tensor):
        raise ConversionError(f"{file}: its header gives tensor {name} {end - begin} bytes for shape {shape} in {code}")
    if base + end > size:
        raise ConversionError(
            f"{file} is truncated: tensor {name} should end at byte {base + end}, the file ends at {size}: copy it anew"
        )
    return tensor


def open_tensors(source: pathlib.Path) -> dict[str, StoredTensor]:
    """The tensors of a component: one safetensors file, or a directory with one file or an index of shards.

    Where a directory has variants (`model.safetensors`, `model.fp16.safetensors`) the plain name is taken.

    Raises:
      ConversionError: if there is no such file, or several without a plain name, or only pickles; if a shard or a
        tensor that the index names is not there; else see `read_header`.
    """
    if source.is_file():
        if source.suffix in PICKLES:
            raise ConversionError(_pickles([source]))
        return read_header(source)
    if not source.is_dir():
        raise ConversionError(f"{source} does not exist")
    index = _one_of(source, sorted(source.glob("*.safetensors.index*.json")))
    if index is not None:
        return _open_index(index)
    file = _one_of(source, sorted(source.glob("*.safetensors")))
    if file is not None:
        return read_header(file)
    pickles = sorted(path for path in source.iterdir() if path.suffix in PICKLES)
    raise ConversionError(_pickles(pickles) if pickles else f"{source} holds no .safetensors file")


def _one_of(source: pathlib.Path, found: Sequence[pathlib.Path]) -> pathlib.Path | None:
    plain = [p for p in found if p.name.split(".")[1:] in (["safetensors"], ["safetensors", "index", "json"])]
    found = plain or found
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise ConversionError(f"{source} holds several checkpoints ({names}) and nothing says which to use: keep one")
    return found[0] if found else None


def _open_index(index: pathlib.Path) -> dict[str, StoredTensor]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = sorted(set(weight_map.values()))
        outside = [name for name in shards if pathlib.PurePath(name).name != name]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConversionError(f"{index} is not an index of safetensors shards ({error})") from error
    if outside:
        raise ConversionError(f"{index} names shards outside its own directory: {', '.join(outside)}")
    absent = [name for name in shards if not (index.parent / name).is_file()]
    if absent:
        raise ConversionError(f"{index} names shards that are not there: {', '.join(absent)}; copy them too")
    headers = {name: read_header(index.parent / name) for name in shards}
    lost = sorted(f"{name} (in {shard})" for name, shard in weight_map.items() if name not in headers[shard])
    if lost:
        raise ConversionError(f"{index} names tensors that their shard does not hold: {', '.join(lost)}")
    return {name: headers[shard][name] for name, shard in weight_map.items()}


def _pickles(files: Iterable[pathlib.Path]) -> str:
    return (
        f"{', '.join(map(str, files))}: pickled weights are never opened, because unpickling can run code; "
        "save the model as safetensors (save_pretrained(..., safe_serialization=True))"
    )


def write_sharded(
    folder: pathlib.Path,
    stem: str,
    tensors: Mapping[str, Tensor],
    shard_size: int,
    written: Callable[[int], None],
) -> None:
    """Writes tensors one after another as `STEM.safetensors`, or as `STEM-0000i-of-0000N.safetensors` and an index.

    Args:
      folder: an existing directory.
      stem: file name without suffix.
      tensors: by name; each is read once, when its turn comes.
      shard_size: a shard holds at most this many bytes of tensors (one larger tensor gets a shard of its own).
      written: called with the number of bytes after each tensor.
    """
    shards: list[list[str]] = [[]]
    room = shard_size
    # Four-byte types first, as the library does: every tensor then starts at a multiple of its item size.
    for name in sorted(tensors, key=lambda n: (-tensors[n].dtype.itemsize, n)):
        if shards[-1] and nbytes(tensors[name]) > room:
            shards.append([])
            room = shard_size
        shards[-1].append(name)
        room -= nbytes(tensors[name])
    if len(shards) == 1:
        _write_file(folder / f"{stem}.safetensors", {n: tensors[n] for n in shards[0]}, written)
        return
    files = [f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for file, names in zip(files, shards, strict=True):
        _write_file(folder / file, {n: tensors[n] for n in names}, written)
    index = {
        "metadata": {"total_size": sum(map(nbytes, tensors.values()))},
        "weight_map": dict(sorted((n, file) for file, names in zip(files, shards, strict=True) for n in names)),
    }
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_file(file: pathlib.Path, tensors: Mapping[str, Tensor], written: Callable[[int], None]) -> None:
    header: dict = {"__metadata__": {"format": "pt"}}  # transformers refuses files that do not say so
    position = 0
    for name, tensor in tensors.items():
        end = position + nbytes(tensor)
        header[name] = {"dtype": _CODES[tensor.dtype], "shape": tensor.shape, "data_offsets": [position, end]}
        position = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with file.open("wb") as stream:
        stream.write(len(raw).to_bytes(8, "little") + raw)
        for tensor in tensors.values():
            values = np.ascontiguousarray(tensor.read())
            stream.write(values.reshape(-1).view(np.uint8).data)
            written(values.nbytes)
