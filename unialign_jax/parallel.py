"""The one parallel plan: a mesh of four axes, and one table that says which of them splits which logical axis.

Mesh axes: `data` (copies of the model, and slices), `fsdp` (batch and parameters), `sequence` (tokens), `tensor`
(heads, MLP, vocabulary). Parameters, optimizer moments and moving average are split alike; so are the frozen encoders.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "sequence", "tensor")
BATCH_AXES = ("data", "fsdp")

# Logical axis of a parameter or activation -> mesh axes that split it. A name that is not here is an error.
RULES: dict[str, str | tuple[str, ...] | None] = {
    # activations
    "batch": BATCH_AXES,
    "sequence": "sequence",
    # parameters
    "layers": None,  # the scan over blocks walks this axis
    "embed": "fsdp",
    "text_embed": None,  # its kernel is split over the other axis
    "heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    "channels_in": None,
    "channels_out": "fsdp",
}

# Largest share of parameter bytes that may be left whole on every device because no axis of theirs can be split.
MAX_REPLICATED = 0.02


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes. One of them may be -1: it takes the devices that the others leave.

    Attributes:
      data: copies of the model. Across slices connected by a data-centre network: a multiple of `slices`.
      fsdp: parts of the batch, and of the parameters.
      sequence: parts of the token axis, for long sequences.
      tensor: parts of heads and MLP.
      slices: TPU slices (or hosts of a GPU cluster) that only the `data` axis spans.
    """

    data: int = 1
    fsdp: int = -1
    sequence: int = 1
    tensor: int = 1
    slices: int = 1

    def __post_init__(self):
        sizes = [getattr(self, axis) for axis in AXES]
        if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes) or self.slices < 1:
            raise ValueError(f"mesh sizes {dict(zip(AXES, sizes, strict=True))}: each is 1 or more, at most one is -1")

    def shape(self, devices: int) -> tuple[int, ...]:
        """The sizes of `AXES` on this many devices.

        Raises:
          ValueError: the sizes do not multiply to the number of devices, or `slices` does not divide `data`.
        """
        sizes = [getattr(self, axis) for axis in AXES]
        fixed = math.prod(size for size in sizes if size != -1)
        named = " x ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
        if devices % fixed or (-1 not in sizes and fixed != devices):
            raise ValueError(
                f"the mesh {named} takes {'a multiple of ' if -1 in sizes else ''}{fixed} devices, but there are "
                f"{devices}; change config.mesh"
            )
        shape = tuple(devices // fixed if size == -1 else size for size in sizes)
        if shape[0] % self.slices:
            raise ValueError(f"mesh data={shape[0]} must be a multiple of slices={self.slices}: only it spans slices")
        return shape


# Named meshes for configs; a config may change their sizes.
STRATEGIES: dict[str, MeshConfig] = {
    "data": MeshConfig(data=-1, fsdp=1),
    "fsdp": MeshConfig(),
    "fsdp+tensor": MeshConfig(tensor=4),
    "fsdp+sequence": MeshConfig(sequence=4),
}


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over all devices (or the given ones), laid out so that neighbours in it are neighbours in the network.

    Raises:
      ValueError: see `MeshConfig.shape`.
    """
    devices = jax.devices() if devices is None else list(devices)
    shape = config.shape(len(devices))
    if config.slices > 1:
        within = (shape[0] // config.slices, *shape[1:])
        across = (config.slices, *(1 for _ in shape[1:]))
        layout = mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)
    else:
        layout = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(layout, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def check_batch(mesh: Mesh, batch: int, micro_batches: int = 1) -> None:
    """Refuses a global batch that the mesh cannot split evenly.

    Raises:
      ValueError: naming the batch, the parts and what to change.
    """
    parts = math.prod(mesh.shape[axis] for axis in BATCH_AXES) * micro_batches
    if batch % parts:
        raise ValueError(
            f"a global batch of {batch} cannot be split over data={mesh.shape['data']} x fsdp={mesh.shape['fsdp']} "
            f"devices and {micro_batches} micro-batch(es); make it a multiple of {parts}"
        )


def partition(names: Sequence[str | None], shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
    """How an array with these logical axis names is split: by `RULES`, whole where an axis does not divide.

    Raises:
      KeyError: for a logical name that is not in `RULES`.
    """
    parts = []
    for name, size in zip(names, shape, strict=True):
        axes = RULES[name] if name is not None else None
        axes = (axes,) if isinstance(axes, str) else axes or ()
        divides = size % math.prod(mesh.shape[axis] for axis in axes) == 0
        parts.append((axes if len(axes) > 1 else axes[0]) if axes and divides else None)
    return PartitionSpec(*parts)


def param_shardings(abstract: Any, mesh: Mesh, *, check: bool = True) -> Any:
    """Shardings of a parameter tree, after which its metadata boxes can come off.

    Args:
      abstract: boxed shapes, from `jax.eval_shape` of a module's init.
      mesh: where they go.
      check: refuse a plan that leaves more than `MAX_REPLICATED` of the bytes unsplit.

    Returns:
      The unboxed tree with `NamedSharding` leaves.

    Raises:
      ValueError: too much would be replicated; the message names the largest leaves.
    """

    def one(leaf):
        if isinstance(leaf, nn.LogicallyPartitioned):
            return NamedSharding(mesh, partition(leaf.names, leaf.value.shape, mesh))
        return NamedSharding(mesh, PartitionSpec())

    shardings = jax.tree.map(one, abstract, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))
    if check:
        _check_replication(nn.unbox(abstract), shardings, mesh)
    return shardings


def replicated_share(abstract: Any, shardings: Any) -> tuple[float, list[tuple[str, int]]]:
    """Share of bytes whole on every device, and those leaves by size: `(share, [(path, bytes), ...])`."""
    total, whole = 0, []
    for (path, leaf), sharding in zip(jax.tree.leaves_with_path(abstract), jax.tree.leaves(shardings), strict=True):
        size = math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
        total += size
        if sharding.shard_shape(leaf.shape) == leaf.shape:
            whole.append((jax.tree_util.keystr(path, simple=True, separator="/"), size))
    return sum(size for _, size in whole) / max(total, 1), sorted(whole, key=lambda item: -item[1])


def _check_replication(abstract: Any, shardings: Any, mesh: Mesh) -> None:
    if mesh.shape["fsdp"] * mesh.shape["tensor"] == 1:
        return  # copies are what was asked for
    share, whole = replicated_share(abstract, shardings)
    if share > MAX_REPLICATED:
        largest = ", ".join(f"{name} ({size / 2**20:.1f} MiB)" for name, size in whole[:5])
        raise ValueError(
            f"{share:.1%} of the parameter bytes would be copied to every device of the mesh {dict(mesh.shape)}, more "
            f"than {MAX_REPLICATED:.0%}: {largest}; choose axis sizes that divide them"
        )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of arrays with a leading batch axis."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """Of scalars, keys and what has no batch axis."""
    return NamedSharding(mesh, PartitionSpec())


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Pins an activation to the plan under the ambient mesh (`jax.set_mesh`); without one, returns it as it is.

    An axis that the mesh does not divide is left to the compiler.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, partition(names, x.shape, mesh))


def describe(shardings: Mapping[str, Any], abstract: Mapping[str, Any]) -> str:
    """One line a leaf, `path shape dtype spec`, sorted: what the reviewed snapshots of the plan hold."""
    lines = []
    for (path, leaf), sharding in zip(jax.tree.leaves_with_path(abstract), jax.tree.leaves(shardings), strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        spec = ", ".join("+".join(p) if isinstance(p, tuple) else str(p or "-") for p in sharding.spec)
        lines.append(f"{name} {list(leaf.shape)} {np.dtype(leaf.dtype).name} ({spec})")
    return "\n".join(sorted(lines)) + "\n"
