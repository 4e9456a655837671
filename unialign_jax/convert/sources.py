"""Networks of public checkpoints as found on disk: config fields, and every tensor under one naming, checked."""

import dataclasses
import pathlib
import pickle
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from unialign_jax.convert import completion, configs, names, tensors
from unialign_jax.convert.errors import ConversionError
from unialign_jax.convert.tensors import MadeTensor, Tensor

_BLOCK_BYTES = 64 * 2**20
# Both layouts that transformers has given Qwen2.5-VL, against ours.
_TEACHER_PREFIXES = {
    "model.visual.": "visual.",
    "visual.": "visual.",
    "model.language_model.embed_tokens.": "model.embed_tokens.",
    "model.embed_tokens.": "model.embed_tokens.",
}


@dataclasses.dataclass(frozen=True)
class Component:
    """One network of a public checkpoint.

    Attributes:
      folder: where it is.
      fields: of our config dataclass.
      rows: its name table.
      tensors: by the names of the table.
      problems: tensors that are missing, extra, misshapen or contradict each other, one line each.
      initialised, dropped: see `completion.Completed`.
    """

    folder: pathlib.Path
    fields: dict[str, Any]
    rows: tuple[names.Row, ...]
    tensors: dict[str, Tensor]
    problems: tuple[str, ...] = ()
    initialised: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()


def read_fields(folder: pathlib.Path, network: str, absent: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The config fields of the network in a component directory.

    Args:
      folder: with config.json.
      network: one of `names.NETWORKS`, or "pixel_codec".
      absent: values of keys that config.json does not give.

    Raises:
      ConversionError: see `configs.from_public`.
    """
    file = folder / "config.json"
    raw = {**(absent or {}), **configs.read_json(file)}
    if network == "teacher":
        processor = folder / "preprocessor_config.json"
        raw = configs.flatten_teacher(raw, configs.read_json(processor) if processor.exists() else {}, file)
    return configs.from_public(network, raw, file)


def open_transformer(folder: pathlib.Path, absent: Mapping[str, Any], seed: int) -> Component:
    """A transformer of UniAlignment, D-DiT or SD3; `seed` of what is drawn. Otherwise as `read_fields`."""
    fields = read_fields(folder, "transformer", absent)
    rows = names.table("transformer", fields)
    shapes = names.torch_shapes(rows)
    stored = tensors.open_tensors(folder)
    if configs.is_sd3(folder / "config.json"):
        completed = completion.complete_sd3(stored, shapes, fields["num_layers"], seed)
    elif completion.lacks_adapters(stored):
        completed = completion.complete_adapters(stored, shapes, seed)
    else:
        completed = completion.Completed(dict(stored), (), ())
    problems = _differences(rows, completed.tensors, stored) or _position_problems(rows, completed.tensors)
    return Component(folder, fields, rows, completed.tensors, tuple(problems), completed.initialised, completed.dropped)


def open_text_encoder(folder: pathlib.Path, mask_token: pathlib.Path | None, mask_token_id: int) -> Component:
    """A T5 encoder, with the embedding of one id replaced where a file says so (`read_mask_token`)."""
    fields = read_fields(folder, "text_encoder")
    rows = names.table("text_encoder", fields)
    stored: dict[str, Tensor] = dict(tensors.open_tensors(folder))
    problems = []
    for alias, name in names.ALIASES["text_encoder"].items():
        other = stored.pop(alias, None)
        if other is None:
            continue
        if name in stored and not _equal(other, stored[name]):
            problems.append(f"{alias} and {name} must hold the same values but differ")
        stored.setdefault(name, other)
    problems = _differences(rows, stored, stored) + problems
    if mask_token is not None and not problems:
        vector = read_mask_token(mask_token, fields["d_model"])
        stored["shared.weight"] = _with_row(stored["shared.weight"], mask_token_id, vector)
    return Component(folder, fields, rows, stored, tuple(problems))


def open_autoencoder(folder: pathlib.Path) -> Component:
    """An AutoencoderKL."""
    fields = read_fields(folder, "autoencoder")
    rows, stored = names.table("autoencoder", fields), tensors.open_tensors(folder)
    return Component(folder, fields, rows, dict(stored), tuple(_differences(rows, stored, stored)))


def open_teacher(folder: pathlib.Path) -> Component:
    """The vision tower and the embedding table of a Qwen2.5-VL; its language model is left where it is."""
    fields = read_fields(folder, "teacher")
    rows = names.table("teacher", fields)
    stored: dict[str, Tensor] = {}
    for name, tensor in tensors.open_tensors(folder).items():
        prefix = next((p for p in _TEACHER_PREFIXES if name.startswith(p)), None)
        if prefix is not None:
            stored[_TEACHER_PREFIXES[prefix] + name.removeprefix(prefix)] = tensor
    return Component(folder, fields, rows, stored, tuple(_differences(rows, stored, stored)))


def open_component(folder: pathlib.Path, network: str) -> Component:
    """One network by itself, exactly as stored: nothing replaced; what SD3 or D-DiT lack is drawn from seed 0."""
    if network == "transformer":
        return open_transformer(folder, {}, 0)
    if network == "text_encoder":
        return open_text_encoder(folder, None, 0)
    return {"autoencoder": open_autoencoder, "teacher": open_teacher}[network](folder)


def raise_problems(components: Sequence[Component]) -> None:
    """Raises one ConversionError with the problems of all components, if there are any."""
    lines = [f"{component.folder}: {problem}" for component in components for problem in component.problems]
    if lines:
        raise ConversionError("; ".join(lines))


def read_mask_token(file: pathlib.Path, width: int) -> np.ndarray:
    """The learned embedding of the mask token: a `.pth` file that holds one tensor of `width` numbers.

    Returns:
      float32 `[width]`.

    Raises:
      ConversionError: if torch is not installed, or the file holds anything else. Code in it is never run.
    """
    try:
        import torch
    except ImportError as error:
        raise ConversionError(
            f"reading {file} needs PyTorch, which is not installed: pip install torch (or 'unialign_jax[convert]')"
        ) from error
    try:
        value = torch.load(file, weights_only=True, map_location="cpu")
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConversionError(f"{file} is not a tensor that PyTorch can load without running code: {reason}") from error
    if not isinstance(value, torch.Tensor):
        raise ConversionError(f"{file} holds a {type(value).__name__}; expected one tensor of {width} numbers")
    if value.numel() != width or not value.is_floating_point():
        raise ConversionError(
            f"{file} holds a {value.dtype} tensor of shape {tuple(value.shape)}; expected {width} numbers, the text "
            "encoder's d_model"
        )
    return value.detach().reshape(-1).float().numpy()


def _with_row(table: Tensor, row: int, vector: np.ndarray) -> Tensor:
    def make(start: int, stop: int) -> np.ndarray:
        rows = table.read(start, stop)
        if start <= row < stop:
            rows[row - start] = vector.astype(table.dtype)
        return rows

    return MadeTensor(table.shape, table.dtype, make)


def _differences(rows: Sequence[names.Row], found: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> list[str]:
    """What keeps `found` from being the network's tensors, one line per kind."""
    expected = names.torch_shapes(rows)
    if not expected.keys() & stored.keys():
        some = ", ".join(sorted(stored)[:3]) or "no tensors"
        return [
            f"a checkpoint of another architecture: it holds {some} ..., none of {', '.join(sorted(expected)[:3])} ..."
        ]
    missing = [name for name in expected if name not in found]
    extra = sorted(found.keys() - expected.keys())
    misshapen = [
        f"{name} is {list(found[name].shape)}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name].shape != shape
    ]
    # One array per stacked leaf means one dtype for all of its blocks.
    mixed = [
        f"{row.torch} is stored in several dtypes ({', '.join(sorted(map(str, dtypes)))})"
        for row in rows
        if len(dtypes := {found[name].dtype for name in row.names if name in found}) > 1
    ]
    kinds = (("missing", missing), ("extra", extra), ("misshapen", misshapen), ("mixed", mixed))
    return [f"{kind} tensors: {', '.join(lines)}" for kind, lines in kinds if lines]


def _position_problems(rows: tuple[names.Row, ...], found: Mapping[str, Tensor]) -> list[str]:
    """Whether the position table is one of two coordinates with equal features, which is all that a leaf can hold."""
    row = next(row for row in rows if row.torch == names.POSITION_TABLE)
    table = found[names.POSITION_TABLE].read()
    made = row.layout.to_torch(row.layout.to_jax(table), row.shape)
    if made.tobytes() == table.tobytes():
        return []
    different = int(np.count_nonzero(made != table))
    return [
        f"{names.POSITION_TABLE} is no table of two coordinates with the same features, the width's first: "
        f"{different} of {table.size} values differ; it cannot be honoured"
    ]


def _equal(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    step = max(1, _BLOCK_BYTES // max(1, tensors.nbytes(a) // a.shape[0]))
    blocks = ((i, min(i + step, a.shape[0])) for i in range(0, a.shape[0], step))
    # As bytes: a copy is meant, and NaN is equal to itself.
    return all(a.read(*block).tobytes() == b.read(*block).tobytes() for block in blocks)
