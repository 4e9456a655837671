"""The converted directory: `model.json`, one Orbax PyTree checkpoint per network, the tokenizers' files.

    DIR/model.json      format, version, the networks' config fields, scheduler, stored dtypes
    DIR/<network>/      transformer, text_encoder, autoencoder, teacher
    DIR/tokenizer/      the text encoder's, as in the public pipeline; DIR/teacher_tokenizer/ the teacher's

The Orbax checkpoints are ordinary ones, but they are written and read piece by piece: the stacked leaves of a large
network are larger than the memory that a conversion may take.
"""

import asyncio
import dataclasses
import functools
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath
from flax import traverse_util

from unialign_jax import storage
from unialign_jax.convert import configs, names
from unialign_jax.convert.errors import ConversionError

MODEL_FILE = "model.json"
TEACHER_TOKENIZER = "teacher_tokenizer"
SAMPLING_FILE = "sampling.json"  # in a public pipeline directory: what `model.json` says under `sampling`, and `drawn`
HEADER = {"format": "unialign_jax", "version": 1}
# Arrays are stored in chunks of at most this size, so that a host which holds a shard reads little beside it.
CHUNK_BYTES = 64 * 2**20


@dataclasses.dataclass(frozen=True)
class Stream:
    """An array that is made piece by piece while it is being saved.

    Attributes:
      shape, dtype: of the whole array.
      rows: rows of the first axis in one piece; the last may have fewer.
      pieces: yields the pieces in order.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    rows: int
    pieces: Callable[[], Iterator[np.ndarray]]

    @classmethod
    def of(cls, array: Any) -> "Stream":
        """An array that is there already, as one piece."""
        whole = np.asarray(array)
        return cls(whole.shape, whole.dtype, len(whole), lambda: iter([whole]))


class _StreamHandler(ocp.type_handlers.NumpyHandler):
    """Saves `Stream` leaves; in the finished checkpoint they are ordinary NumPy arrays.

    Attributes:
      checksum: CRC-32 of what was saved, one leaf after the other.
    """

    def __init__(self) -> None:
        super().__init__()
        self.checksum = 0

    async def serialize(self, values, infos, args=None):
        arrays = await asyncio.gather(*map(self._create, values, infos))
        # Every wait ends with a commit of the whole checkpoint's index, so small pieces go together.
        batch, size = [], 0
        try:
            for stream, array in zip(values, arrays, strict=True):
                start = 0
                for piece in stream.pieces():
                    self.checksum = zlib.crc32(np.ascontiguousarray(piece).reshape(-1).view(np.uint8), self.checksum)
                    batch.append(array[start : start + len(piece)].write(piece))
                    start += len(piece)
                    size += piece.nbytes
                    if size >= CHUNK_BYTES:
                        await asyncio.gather(*batch)
                        batch, size = [], 0
        finally:  # also when a piece cannot be read: a write that is under way would bring a removed directory back
            await asyncio.gather(*batch)
        return []

    async def _create(self, stream, info):
        await info.await_path_creation()
        spec = ocp.type_handlers.get_json_tspec_write(
            info,
            use_ocdbt=info.is_ocdbt_checkpoint,
            global_shape=stream.shape,
            local_shape=(stream.rows, *stream.shape[1:]),
            dtype=stream.dtype,
            process_index=0,
            arg=ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES),
        )
        return await ts.open(ts.Spec(spec), create=True, open=True, context=info.ts_context)


def save_network(directory: epath.PathLike, leaves: Mapping[str, Stream]) -> int:
    """Writes one network's parameters as an Orbax PyTree checkpoint, in memory for a few pieces.

    Args:
      directory: the checkpoint; must not exist.
      leaves: "/"-joined path -> stream.

    Returns:
      A checksum of the arrays' bytes, by which the same weights are known.
    """
    streams = _StreamHandler()
    registry = ocp.type_handlers.create_type_handler_registry(
        (Stream, streams), (jax.Array, ocp.type_handlers.ArrayHandler())
    )
    # Weights hardly compress, and trying takes longer than writing them.
    handler = ocp.PyTreeCheckpointHandler(type_handler_registry=registry, use_compression=False)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(storage.absolute(directory), args=ocp.args.PyTreeSave(_nested(leaves)))
    return streams.checksum


@dataclasses.dataclass(frozen=True)
class StoredLeaf:
    """An array of an Orbax checkpoint, of which only what is asked for is read: `leaf[3]`, `leaf[2:5]`, `leaf[...]`.

    Attributes:
      array: the opened array.
      path: where it is, for messages.
    """

    array: ts.TensorStore
    path: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole array."""
        return tuple(self.array.shape)

    @property
    def dtype(self) -> np.dtype:
        """Stored dtype."""
        return self.array.dtype.numpy_dtype

    def __getitem__(self, index: Any) -> np.ndarray:
        with storage.reading(functools.partial(_unreadable, self.path)):
            return self.array[index].read().result()


def open_network(directory: epath.PathLike, network: str) -> dict[str, StoredLeaf]:
    """The leaves of a converted network, by "/"-joined path; nothing is read yet.

    Raises:
      ConversionError: if the checkpoint cannot be read, or its leaves are not those that model.json describes.
    """
    directory = storage.absolute(directory)
    path = directory / network
    with storage.reading(functools.partial(_unreadable, path)):
        metadata = ocp.PyTreeCheckpointHandler().metadata(path)
        use_ocdbt = ocp.type_handlers.is_ocdbt_checkpoint(path)
        context = ocp.type_handlers.get_ts_context(use_ocdbt=use_ocdbt)
        leaves = {}
        for keys, leaf in traverse_util.flatten_dict(metadata.tree).items():
            info = ocp.type_handlers.ParamInfo(
                name=leaf.name,
                parent_dir=path,
                is_ocdbt_checkpoint=use_ocdbt,
                use_zarr3=metadata.use_zarr3,
                ts_context=context,
            )
            spec = ocp.type_handlers.get_json_tspec_read(info, use_ocdbt=use_ocdbt)
            array = ts.open(ts.Spec(spec), open=True, context=context).result()
            leaves["/".join(keys)] = StoredLeaf(array, f"{path}: {'/'.join(keys)}")
    found = {name: leaf.shape for name, leaf in leaves.items()}
    rows = names.table(network, read_config(directory)[network])
    problems = differences(rows, found)
    if problems:
        raise ConversionError(f"{path}: {'; '.join(problems)}")
    return leaves


def differences(rows: tuple[names.Row, ...], found: Mapping[str, tuple[int, ...]]) -> list[str]:
    """What keeps leaves of these shapes from being the network's, one line per kind."""
    expected = {row.path: row.jax_shape for row in rows}
    missing = sorted(expected.keys() - found.keys())
    extra = sorted(found.keys() - expected.keys())
    misshapen = [
        f"{path} is {list(found[path])}, expected {list(shape)}"
        for path, shape in expected.items()
        if path in found and tuple(found[path]) != shape
    ]
    kinds = (("missing", missing), ("extra", extra), ("misshapen", misshapen))
    return [f"{kind} arrays: {', '.join(lines)}" for kind, lines in kinds if lines]


def is_converted(directory: epath.PathLike) -> bool:
    """Whether this is a converted directory."""
    return (epath.Path(directory) / MODEL_FILE).exists()


def read_config(directory: epath.PathLike) -> dict[str, Any]:
    """What `model.json` of a converted directory says, checked.

    Returns:
      Config fields under `transformer`, `text_encoder`, `autoencoder` or `pixel_codec`, and `teacher` where there is
      one (as `networks.build_networks` takes them); besides `scheduler`, `dtypes`, `pipeline`, of a model trained here
      `sampling`: `text_length`, `size` (height and width in pixels) and `protocol`; and of a source that lacked tensors
      that sampling needs `drawn`: their PyTorch names; `checksums` of the networks, by which a run knows its start.

    Raises:
      ConversionError: if there is no such file, or it is of another format or version, or its fields are wrong.
    """
    file = epath.Path(directory) / MODEL_FILE
    if not is_converted(directory):
        raise ConversionError(
            f"{directory} is not a converted checkpoint: it has no {MODEL_FILE} (launch/convert.py --to=jax makes one)"
        )
    model = configs.read_json(file)
    for key, value in HEADER.items():
        if model.get(key) != value:
            raise ConversionError(f"{file}: {key} is {model.get(key)!r}, this package reads {value!r}")
    codec = "pixel_codec" if model.get("pixel_codec") else "autoencoder"
    optional = [*(["teacher"] if model.get("teacher") else []), *(["sampling"] if "sampling" in model else [])]
    for part in ("transformer", "text_encoder", codec, "scheduler", *optional):
        if part not in model:
            raise ConversionError(f"{file}: {part} is missing")
        if not isinstance(model[part], dict):
            raise ConversionError(f"{file}: {part} is {model[part]!r}; expected an object")
        configs.check_fields(part, model[part], f"{file}: {part}")
    if "shift" not in model["scheduler"]:  # what is absent elsewhere has a default
        raise ConversionError(f"{file}: scheduler: key shift is missing")
    return model


def restore_network(
    directory: epath.PathLike, network: str, dtype: Any = None, shardings: Any = None
) -> dict[str, Any]:
    """Reads a converted network's parameters.

    Args:
      directory: a converted directory.
      network: one of `names.NETWORKS`.
      dtype: of the result, or a tree of them; None keeps the stored one.
      shardings: None: NumPy arrays. A `jax.sharding.Sharding`, or a tree of them: jax arrays, of which each host reads
        its own part.

    Returns:
      Nested dict of arrays.

    Raises:
      ConversionError: see `open_network`; also if an array cannot be read.
    """
    leaves = open_network(directory, network)
    tree = _nested(leaves)
    dtypes = dtype if isinstance(dtype, Mapping) else jax.tree.map(lambda leaf: dtype or leaf.dtype, tree)
    if shardings is None:
        args = jax.tree.map(lambda leaf, dtype: ocp.RestoreArgs(restore_type=np.ndarray, dtype=dtype), tree, dtypes)
    else:
        if isinstance(shardings, jax.sharding.Sharding):
            shardings = jax.tree.map(lambda leaf: shardings, tree)
        args = jax.tree.map(
            lambda leaf, dtype, sharding: ocp.ArrayRestoreArgs(
                restore_type=jax.Array, sharding=sharding, global_shape=leaf.shape, dtype=dtype
            ),
            tree,
            dtypes,
            shardings,
        )
    path = storage.absolute(directory) / network
    with storage.reading(functools.partial(_unreadable, path)):
        # Not through a Checkpointer: that waits for the other processes, of which one may have failed.
        return ocp.PyTreeCheckpointHandler().restore(path, args=ocp.args.PyTreeRestore(restore_args=args))


def _nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    return traverse_util.unflatten_dict({tuple(path.split("/")): leaf for path, leaf in leaves.items()})


def _unreadable(path: epath.Path | str, error: Exception) -> ConversionError:
    reason = " ".join(str(error).split())[:300]
    return ConversionError(f"{path} cannot be read ({reason}): it is damaged or incomplete; copy or convert it again")
