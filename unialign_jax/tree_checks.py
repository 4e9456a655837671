"""Comparing pytrees of arrays: by name, shape and dtype, and by a checksum of their bits."""

import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

_SHOWN = 12


def flat_leaves(tree: Any) -> dict[tuple[str, ...], Any]:
    """The leaves of a pytree by path, e.g. `('params', 'blocks', 'kernel')`; empty nodes and None are left out.

    Named tuples, dataclasses and dicts give the same paths that Orbax stores, so a saved tree compares with a live one.
    """
    flat = ocp.tree.to_flat_dict(ocp.tree.serialize_tree(tree, keep_empty_nodes=True))
    return {tuple(map(str, path)): leaf for path, leaf in flat.items() if hasattr(leaf, "shape")}


def describe_differences(saved: dict, wanted: dict, prefix: str = "") -> str:
    """Says on one line where two results of `flat_leaves` differ in name, shape or dtype; empty where nowhere."""
    lines = []
    for path in sorted(saved.keys() | wanted.keys()):
        name = prefix + "/".join(path)
        if path not in saved:
            lines.append(f"{name} {_shape(wanted[path])} is not in the checkpoint")
        elif path not in wanted:
            lines.append(f"{name} {_shape(saved[path])} is only in the checkpoint")
        elif _shape(saved[path]) != _shape(wanted[path]):
            lines.append(f"{name} is {_shape(saved[path])} in the checkpoint, expected {_shape(wanted[path])}")
    shown = "; ".join(lines[:_SHOWN])
    return f"{shown}; and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else shown


def _shape(leaf: Any) -> str:
    return f"{jnp.dtype(leaf.dtype).name}{list(leaf.shape)}"


def checksum(tree: Any) -> int:
    """A 32-bit checksum of the names, positions and bits of all elements; an empty tree gives 0.

    It is a wrapping integer sum, so it depends neither on the order of summation nor on how arrays are sharded, and
    costs one read of the arrays on the devices that hold them.
    """
    leaves = {path: leaf for path, leaf in flat_leaves(tree).items() if leaf.size}
    if not leaves:
        return 0
    salts = [np.uint32(zlib.crc32("/".join(path).encode()) | 1) for path in leaves]
    return int(_sum_of_bits(list(leaves.values()), salts))


@jax.jit
def _sum_of_bits(leaves: list[jax.Array], salts: list[np.uint32]) -> jax.Array:
    total = jnp.uint32(0)
    for leaf, salt in zip(leaves, salts, strict=True):
        bits = leaf if leaf.dtype == jnp.bool_ else jax.lax.bitcast_convert_type(leaf, f"uint{8 * leaf.dtype.itemsize}")
        position = jnp.zeros(leaf.shape, jnp.uint32)
        for axis in range(leaf.ndim):
            position = position * leaf.shape[axis] + jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
        # An odd weight per position makes exchanged elements show, an odd salt per name exchanged arrays.
        total += salt * jnp.sum(bits.astype(jnp.uint32) * (2 * position + 1), dtype=jnp.uint32)
    return total
