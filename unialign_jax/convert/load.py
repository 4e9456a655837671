"""One network of a PyTorch checkpoint, whole, in memory: for tests, small models and single networks."""

import pathlib
from typing import Any

import numpy as np
from flax import traverse_util

from unialign_jax.convert import names, sources
from unialign_jax.convert.errors import ConversionError
from unialign_jax.convert.names import Row
from unialign_jax.convert.tensors import Tensor


def load_torch(folder: str | pathlib.Path, network: str, dtype: np.dtype | None = np.float32) -> dict[str, Any]:
    """Reads a network's config.json and safetensors into our parameter tree.

    Args:
      folder: a component directory (`transformer/`, `text_encoder/`, `vae/`, or a whole Qwen2.5-VL).
      network: one of `names.NETWORKS`.
      dtype: of the result; None keeps the stored one.

    Returns:
      Nested dict of NumPy arrays, with the paths and shapes of `names.table`.

    Raises:
      ConversionError: there is no such network, or the config or tensors are not those of it.
    """
    if network not in names.NETWORKS:
        raise ConversionError(f"no network {network!r}; expected one of {', '.join(names.NETWORKS)}")
    component = sources.open_component(pathlib.Path(folder), network)
    sources.raise_problems([component])
    leaves = {}
    for row in component.rows:
        parts = [read_part(row, component.tensors[name]) for name in row.names]
        leaf = np.stack(parts) if row.layers else parts[0]
        leaves[tuple(row.path.split("/"))] = leaf.astype(dtype or leaf.dtype, copy=False)
    return traverse_util.unflatten_dict(leaves)


def read_part(row: Row, tensor: Tensor) -> np.ndarray:
    """One block's (or the only) part of a leaf, in our layout."""
    index, count = row.part
    length = tensor.shape[0] // count
    return np.ascontiguousarray(row.layout.to_jax(tensor.read(index * length, (index + 1) * length)))
