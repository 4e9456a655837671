"""From the converted directory, or from parameters in memory, to the layout of the public PyTorch pipeline or ours."""

import logging
import pathlib
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from etils import epath
from flax import traverse_util

from unialign_jax.convert import configs, names, store, tensors, workspace
from unialign_jax.convert.errors import ConversionError
from unialign_jax.convert.importer import Report, local_path
from unialign_jax.convert.names import Row
from unialign_jax.convert.tensors import MadeTensor, Tensor

_LOGGER = logging.getLogger(__name__)
SHARD_SIZE = 5 * 10**9
# Network -> directory and file stem, as diffusers and transformers name them.
_FILES = {
    "transformer": ("transformer", "diffusion_pytorch_model"),
    "text_encoder": ("text_encoder", "model"),
    "autoencoder": ("vae", "diffusion_pytorch_model"),
    "teacher": ("teacher", "model"),
}


class Leaf(Protocol):
    """An array of which parts can be read: NumPy's, JAX's, `store.StoredLeaf`, or what a run's export reads later."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> Any: ...

    def __getitem__(self, index: Any) -> Any: ...


def to_torch(
    source: epath.PathLike,
    target: epath.PathLike,
    *,
    shard_size: int = SHARD_SIZE,
    progress: bool = True,
) -> Report:
    """Writes a converted directory as a public pipeline directory, in memory for a few of the largest tensors.

    Args:
      source: a local converted directory.
      target: a local directory that does not exist or is empty.
      shard_size: largest number of bytes in one safetensors file.
      progress: whether to show a progress bar on standard error.

    Raises:
      ConversionError: if the source is not a converted directory or is damaged. No target is left.
    """
    source, target = local_path(source, "source"), local_path(target, "target")
    workspace.check_target(target)
    model = store.read_config(source)
    networks = {name: store.open_network(source, name) for name in names.NETWORKS if model.get(name)}
    return write_torch(
        model,
        networks,
        target,
        tokenizer=source / "tokenizer",
        teacher_tokenizer=source / store.TEACHER_TOKENIZER,
        shard_size=shard_size,
        progress=progress,
    )


def write_torch(
    model: Mapping[str, Any],
    networks: Mapping[str, Mapping[str, Any]],
    target: epath.PathLike,
    *,
    tokenizer: epath.Path | pathlib.Path | None = None,
    teacher_tokenizer: epath.Path | pathlib.Path | None = None,
    shard_size: int = SHARD_SIZE,
    progress: bool = True,
) -> Report:
    """Writes networks as a public pipeline directory: `model_index.json`, `transformer/`, `text_encoder/`, `vae/`,
    `scheduler/`, `tokenizer/` where there is one, and `teacher/` where there is one (which the public class ignores).

    Args:
      model: config fields as `networks.build_networks` takes them and `store.read_config` returns them; without
        `scheduler`, SD3's is written. `sampling` and `drawn` go into a file that only this package reads.
      networks: network -> parameters, nested or by "/"-joined path; leaves are float32, float16 or bfloat16 `Leaf`s.
        A pixel codec has none, and becomes a `vae/config.json` that only this package reads.
      target, shard_size, progress: see `to_torch`.
      tokenizer, teacher_tokenizer: directories to copy tokenizer files from; None, or without such files: none.

    Raises:
      ConversionError: listing the networks and arrays that are missing, extra, misshapen, or of another dtype.
    """
    target = local_path(target, "target")
    networks = {network: params for network, params in networks.items() if params}
    parts = [*networks, *(["pixel_codec"] if model.get("pixel_codec") else [])]
    exports = {}
    problems = []
    for needed in ("transformer", "text_encoder", "pixel_codec" if model.get("pixel_codec") else "autoencoder"):
        if needed not in parts:
            problems.append(f"{needed}: no parameters are given")
    fields = {part: configs.with_defaults(part, model[part]) for part in parts}
    for network, params in networks.items():
        leaves = traverse_util.flatten_dict(params, sep="/")
        found = _problems(names.table(network, fields[network]), leaves)
        problems += [f"{network}: {problem}" for problem in found]
        if not found:
            exports[network] = _tensors(network, fields[network], leaves)
    if problems:
        raise ConversionError(f"{target} cannot be written: {'; '.join(problems)}")
    if fields["transformer"]["qk_norm"] is not None:
        _LOGGER.warning(
            "%s: this transformer has q/k norms; the public class has none, whatever the config says: it will load the "
            "rest and compute something else",
            target,
        )
    sizes = {network: sum(map(tensors.nbytes, export.values())) for network, export in exports.items()}
    total = sum(sizes.values())
    with workspace.new_directory(target, total) as partial, workspace.progress_bar(total, progress) as bar:
        for network, export in exports.items():
            folder, stem = _FILES[network]
            (partial / folder).mkdir()
            tensors.write_sharded(partial / folder, stem, export, shard_size, bar.update)
        has_tokenizer = workspace.copy_tokenizer(tokenizer, partial / "tokenizer")
        _write_configs(partial, fields, model.get("scheduler", configs.SCHEDULER))
        configs.write_json(partial / "model_index.json", configs.model_index(model, has_tokenizer))
        drawn = {"drawn": model["drawn"]} if model.get("drawn") else {}
        if sampling := {**model.get("sampling", {}), **drawn}:
            configs.write_json(partial / store.SAMPLING_FILE, sampling)
        if "teacher" in exports:
            workspace.copy_tokenizer(teacher_tokenizer, partial / "teacher")
    return Report(target, sizes)


def write_jax(
    model: Mapping[str, Any],
    networks: Mapping[str, Mapping[str, Any]],
    target: epath.PathLike,
    *,
    sampling: Mapping[str, Any],
    tokenizer: epath.Path | pathlib.Path,
    teacher_tokenizer: epath.Path | pathlib.Path | None = None,
    progress: bool = True,
) -> Report:
    """Writes networks as a converted directory, each read when its turn comes.

    Args:
      model: config fields as `networks.build_networks` takes them, and `drawn`, see `store.read_config`.
      networks: network -> parameters, nested or by "/"-joined path; leaves are `Leaf`s. A pixel codec has none.
      target: a local directory that does not exist or is empty.
      sampling: what a sampler takes where it is told nothing else, see `store.read_config`.
      tokenizer, teacher_tokenizer: directories to copy tokenizer files from; of the teacher's may be none.
      progress: whether to show a progress bar on standard error.

    Raises:
      ConversionError: the target is not free, or a network's arrays are not those that its fields describe.
    """
    target = local_path(target, "target")
    leaves = {network: traverse_util.flatten_dict(params, sep="/") for network, params in networks.items() if params}
    parts = [*leaves, *(["pixel_codec"] if model.get("pixel_codec") else [])]
    fields = {part: configs.with_defaults(part, model[part]) for part in parts}
    for network, arrays in leaves.items():
        if problems := _problems(names.table(network, fields[network]), arrays):
            raise ConversionError(f"{target} cannot be written: {network}: {'; '.join(problems)}")
    sizes = {network: sum(map(tensors.nbytes, arrays.values())) for network, arrays in leaves.items()}
    total = sum(sizes.values())
    with workspace.new_directory(target, total) as partial, workspace.progress_bar(total, progress) as bar:
        checksums = {}
        for network, arrays in leaves.items():
            streams = {path: store.Stream.of(array[...]) for path, array in arrays.items()}
            checksums[network] = store.save_network(partial / network, streams)
            del streams  # which holds the network while the next one is read
            bar.update(sizes[network])
        workspace.copy_tokenizer(tokenizer, partial / "tokenizer")
        workspace.copy_tokenizer(teacher_tokenizer, partial / store.TEACHER_TOKENIZER)
        facts = {
            "scheduler": configs.SCHEDULER,
            "dtypes": {k: sorted({str(array.dtype) for array in arrays.values()}) for k, arrays in leaves.items()},
            "pipeline": configs.pipeline_classes({}),
            "sampling": dict(sampling),
            "checksums": checksums,
        }
        if model.get("drawn"):
            facts["drawn"] = list(model["drawn"])
        configs.write_json(partial / store.MODEL_FILE, {**store.HEADER, **fields, **facts})
    return Report(target, sizes)


def _write_configs(directory: pathlib.Path, fields: Mapping[str, Any], scheduler: Mapping[str, Any]) -> None:
    for network in ("transformer", "text_encoder", "autoencoder"):
        if network in fields:
            configs.write_json(
                directory / _FILES[network][0] / "config.json", configs.to_public(network, fields[network])
            )
    if "pixel_codec" in fields:
        (directory / "vae").mkdir()
        configs.write_json(directory / "vae/config.json", configs.to_public("pixel_codec", fields["pixel_codec"]))
    if "teacher" in fields:
        config, processor = configs.unflatten_teacher(fields["teacher"])
        configs.write_json(directory / "teacher/config.json", config)
        configs.write_json(directory / "teacher/preprocessor_config.json", processor)
    (directory / "scheduler").mkdir()
    configs.write_json(directory / "scheduler/scheduler_config.json", configs.to_public("scheduler", scheduler))


def _problems(rows: tuple[Row, ...], leaves: Mapping[str, Leaf]) -> list[str]:
    problems = store.differences(rows, {path: tuple(leaf.shape) for path, leaf in leaves.items()})
    strange = [f"{path} is {leaf.dtype}" for path, leaf in leaves.items() if leaf.dtype not in tensors.DTYPES.values()]
    if strange:
        problems.append(f"arrays of a dtype that cannot be written: {', '.join(strange)}")
    if problems:
        return problems
    fused: dict[str, set[str]] = {}
    for row in rows:
        fused.setdefault(row.torch, set()).add(str(leaves[row.path].dtype))
    mixed = [f"{name} of {', '.join(sorted(dtypes))}" for name, dtypes in fused.items() if len(dtypes) > 1]
    return [f"parts of one tensor have several dtypes: {'; '.join(mixed)}"] if mixed else []


def _tensors(network: str, fields: Mapping[str, Any], leaves: Mapping[str, Leaf]) -> dict[str, Tensor]:
    """Every tensor of the network's PyTorch file, made when it is written."""
    parts: dict[str, list[tuple[Row, Any]]] = {}
    for row in names.table(network, fields):
        for layer, name in enumerate(row.names):
            parts.setdefault(name, []).append((row, layer if row.layers else ...))
    return {name: _tensor(sorted(rows, key=lambda r: r[0].part), leaves) for name, rows in parts.items()}


def _tensor(rows: list[tuple[Row, Any]], leaves: Mapping[str, Leaf]) -> Tensor:
    def make(start: int, stop: int) -> np.ndarray:
        made = [row.layout.to_torch(np.asarray(leaves[row.path][index]), row.part_shape) for row, index in rows]
        return (np.concatenate(made) if len(made) > 1 else made[0])[start:stop]

    row = rows[0][0]
    return MadeTensor(row.shape, np.dtype(leaves[row.path].dtype), make)
