"""The one parallel plan: a mesh of four axes, and one table that says which of them splits which logical axis.

Mesh axes: `data` (copies of the model, and slices), `fsdp` (batch and parameters), `sequence` (tokens), `tensor`
(heads, MLP, vocabulary). Parameters, optimizer moments and moving average are split alike; so are the frozen encoders.
"""

import collections
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "sequence", "tensor")
BATCH_AXES = ("data", "fsdp")
DEFAULT_SIZES = {"sequence": 4, "tensor": 4}  # of axes that a strategy names without a size

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
FREE_BYTES = 2**20  # so many may be whole in any case: the biases of a very small model are a large share of it


class PlanError(ValueError):
    """A strategy, or what it is to split, that the devices can't take."""

    final = True  # see `cli.run`


def mesh_shape(strategy: str, devices: int, slices: int = 1) -> tuple[int, int, int, int]:
    """The sizes of `AXES` that a strategy means on a number of devices.

    A strategy names axes, joined by "+", each at most once and optionally with its size: "fsdp", "fsdp+tensor=8",
    "data=2+fsdp+sequence". Without a size, `sequence` and `tensor` are 4, and the one of `data` and `fsdp` that has
    none takes the devices that are left. Axes that are not named are 1, but `data` as many as there are slices.

    Args:
      strategy: see above.
      devices: how many there are.
      slices: groups of devices that a data-centre network connects. Only the `data` axis spans them.

    Raises:
      ValueError: an unknown or repeated axis, a wrong size, or sizes that do not multiply to the number of devices.
    """
    sizes: dict[str, int | None] = {}
    for part in strategy.split("+"):
        axis, equals, size = part.partition("=")
        if axis not in AXES or axis in sizes or (equals and not (size.isdecimal() and int(size) > 0)):
            raise PlanError(
                f"strategy {strategy!r}: {part!r} is wrong; expected axes of {', '.join(AXES)}, each at most once and "
                "optionally with a size, joined by '+', such as fsdp+tensor=8"
            )
        sizes[axis] = int(size) if equals else DEFAULT_SIZES.get(axis)
    rest = [axis for axis, size in sizes.items() if size is None]
    if len(rest) > 1:
        raise PlanError(f"strategy {strategy!r}: one of data and fsdp needs a size, such as data=2+fsdp")
    sizes = {axis: sizes.get(axis, slices if axis == "data" else 1) for axis in AXES}
    fixed = math.prod(size for size in sizes.values() if size is not None)
    if devices % fixed or (not rest and fixed != devices):
        raise PlanError(
            f"strategy {strategy!r} takes {'a multiple of ' if rest else ''}{fixed} devices, but there are {devices}"
            + (f" in {slices} slices" if slices > 1 else "")
        )
    shape = tuple(devices // fixed if size is None else size for size in sizes.values())
    if shape[0] % slices:
        raise PlanError(
            f"strategy {strategy!r}: data={shape[0]} is no multiple of the {slices} slices, which only it can span"
        )
    return shape


def make_mesh(strategy: str, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over all devices (or the given ones), laid out so that neighbours in it are neighbours in the network.

    Raises:
      ValueError: see `mesh_shape`; or two processes would hold some of the same rows of a batch, but not all.
    """
    devices = jax.devices() if devices is None else list(devices)
    # Of TPUs only: GPUs count every host as a slice, and their network lets any axis span hosts.
    is_tpu = devices[0].platform == "tpu"
    slices = len({getattr(device, "slice_index", 0) for device in devices}) if is_tpu else 1
    shape = mesh_shape(strategy, len(devices), slices)
    if slices > 1:
        within = (shape[0] // slices, *shape[1:])
        across = (slices, *(1 for _ in shape[1:]))
        layout = mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)
    else:
        layout = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    _check_processes(layout, strategy)
    return Mesh(layout, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _check_processes(layout: np.ndarray, strategy: str) -> None:
    """Refuses devices `[data, fsdp, sequence, tensor]` of which two processes share a part of their rows only: whole
    processes read, count and cache rows together, or none.
    """
    held = collections.defaultdict(set)
    for place, device in np.ndenumerate(layout):
        held[device.process_index].add(place[: len(BATCH_AXES)])
    groups = {frozenset(rows) for rows in held.values()}
    if sum(map(len, groups)) > math.prod(layout.shape[: len(BATCH_AXES)]):
        raise PlanError(
            f"strategy {strategy!r}: sequence x tensor = {layout.shape[2]} x {layout.shape[3]} devices lie across "
            f"processes of {layout.size // len(held)}, so that two hold some of the same samples but not all; choose "
            "sizes whose product divides the devices of a process, or is a multiple of them"
        )


def first_device() -> Mesh:
    """The mesh of one device, the first of this process."""
    return make_mesh("data", jax.local_devices()[:1])


def mesh_of(params: Any) -> Mesh:
    """The mesh that parameters are on; of arrays without one that of the first device."""
    for leaf in jax.tree.leaves(params):
        mesh = getattr(getattr(leaf, "sharding", None), "mesh", None)
        if isinstance(mesh, Mesh):
            return mesh
    return first_device()


def batch_parts(mesh: Mesh | jax.sharding.AbstractMesh) -> int:
    """Into how many parts a mesh splits a batch."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def check_batch(mesh: Mesh, batch: int, micro_batches: int = 1) -> None:
    """Refuses a global batch that the mesh cannot split evenly.

    Raises:
      ValueError: naming the batch, the parts and what to change.
    """
    parts = batch_parts(mesh) * micro_batches
    if batch % parts:
        raise PlanError(
            f"a global batch of {batch} cannot be split over data={mesh.shape['data']} x fsdp={mesh.shape['fsdp']} "
            f"devices and {micro_batches} micro-batch(es); make it a multiple of {parts}"
        )


def check_heads(mesh: Mesh, heads: int) -> None:
    """Refuses attention heads that the mesh cannot split evenly.

    Raises:
      ValueError: naming both numbers and what to change.
    """
    if heads % mesh.shape["tensor"]:
        raise PlanError(
            f"{heads} attention heads cannot be split over tensor={mesh.shape['tensor']} devices; choose a strategy "
            "whose tensor size divides them"
        )


def partition(names: Sequence[str | None], shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
    """How an array with these logical axis names is split: by `RULES`, whole where an axis does not divide.

    Raises:
      KeyError: for a logical name that is not in `RULES`.
    """
    parts = []
    for name, size in zip(names, shape, strict=True):
        axes = _axes(name) if name is not None else ()
        divides = size % math.prod(mesh.shape[axis] for axis in axes) == 0
        parts.append((axes if len(axes) > 1 else axes[0]) if axes and divides else None)
    return PartitionSpec(*parts)


def _axes(name: str) -> tuple[str, ...]:
    axes = RULES[name]
    return (axes,) if isinstance(axes, str) else axes or ()


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


def copied_share(abstract: Any, shardings: Any, parts: int) -> tuple[float, list[tuple[str, float]]]:
    """Share of the bytes that each device holds beside its part, and where: `(share, [(path, bytes), ...])`.

    A leaf that is whole everywhere counts whole, one in all `parts` not at all; in between lies one that some axis does
    not divide.
    """
    total, copied = 0, []
    for (path, leaf), sharding in zip(jax.tree.leaves_with_path(abstract), jax.tree.leaves(shardings), strict=True):
        size = math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
        total += size
        held = math.prod(sharding.shard_shape(leaf.shape)) / max(math.prod(leaf.shape), 1)
        if held > 1 / parts:
            beside = size * (held - 1 / parts) / (1 - 1 / parts)
            copied.append((jax.tree_util.keystr(path, simple=True, separator="/"), beside))
    return sum(size for _, size in copied) / max(total, 1), sorted(copied, key=lambda item: -item[1])


def _check_replication(abstract: Any, shardings: Any, mesh: Mesh) -> None:
    parts = mesh.shape["fsdp"] * mesh.shape["tensor"]
    if parts == 1:
        return  # copies are what was asked for
    share, copied = copied_share(abstract, shardings, parts)
    if share > MAX_REPLICATED and sum(size for _, size in copied) > FREE_BYTES:
        largest = ", ".join(f"{name} ({size / 2**20:.1f} MiB)" for name, size in copied[:5])
        raise PlanError(
            f"{share:.1%} of the parameter bytes would be copied to every device of the mesh {dict(mesh.shape)}, more "
            f"than {MAX_REPLICATED:.0%}: {largest}; choose axis sizes that divide them"
        )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of arrays with a leading batch axis."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """Of scalars, keys and what has no batch axis."""
    return NamedSharding(mesh, PartitionSpec())


def placed(leaf: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    """A description of an array with the sharding that it is to have."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def replicate(array: np.ndarray, mesh: Mesh) -> jax.Array:
    """A host array, the same in every process, whole on every device of the mesh."""
    return jax.make_array_from_callback(array.shape, replicated(mesh), lambda index: array[index])


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Pins an activation to the plan under the ambient mesh (`jax.set_mesh`); without one, returns it as it is.

    An axis that the mesh does not divide is whole on every device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, partition(names, x.shape, mesh))


def in_parts(call: Callable[[Any], jax.Array], xs: Any, most: int) -> jax.Array:
    """`call(xs)` for a batch of independent samples, with no more than `most` on a device at a time.

    One part after the other is worked off; each has samples of every device, so that none moves or waits.

    Args:
      call: takes such a tree of any batch to an array `[B, ...]`.
      xs: array, or a tree of arrays, `[B, ...]`; other axes than the first may be split too, and stay so.
      most: samples.
    """
    mesh = jax.sharding.get_abstract_mesh()
    devices = 1 if mesh.empty else batch_parts(mesh)
    batch = len(jax.tree.leaves(xs)[0])
    here = batch // devices
    if batch % devices or here <= most:
        return call(xs)
    parts = next(n for n in range(1, here + 1) if here % n == 0 and here // n <= most)

    def stay(x: jax.Array) -> jax.Array:
        if mesh.empty or mesh.size == 1:
            return x
        rest = (PartitionSpec.UNCONSTRAINED for _ in x.shape[1:])
        return jax.lax.with_sharding_constraint(x, PartitionSpec(BATCH_AXES, *rest))

    split = jax.tree.map(lambda x: jnp.swapaxes(x.reshape(-1, parts, *x.shape[1:]), 0, 1), xs)
    made = jax.lax.map(lambda part: call(jax.tree.map(stay, part)), split)
    return jnp.swapaxes(made, 0, 1).reshape(batch, *made.shape[2:])


def gathered(weight: jax.Array, names: Sequence[str | None]) -> jax.Array:
    """A parameter as a matrix product takes it: whole over `fsdp`, still split over `tensor`.

    Left alone, XLA keeps the parts where they are and sends them round a ring while it multiplies by one after the
    other. On 256 devices that makes a product over 1536 into 256 products over 6, where a TPU's matrix unit is 128 or
    256 wide. Gathered, the parts travel in whole messages while other work runs.
    """
    return constrain(weight, *(None if name is None or "fsdp" in _axes(name) else name for name in names))


def weight_gradient(xs: Sequence[jax.Array], gradients: Sequence[jax.Array], names: Sequence[str | None]) -> jax.Array:
    """Gradient `[in, out]` of the weight in `y = x @ weight` for each x, reduced straight to where the weight lies.

    Each device multiplies its own samples and tokens, and one reduce-scatter over `fsdp` adds up. XLA by itself makes
    an all-reduce of this, which moves twice the bytes, or the same ring as for `gathered`.

    Args:
      xs: each `[B, ..., in]`, of one B; with three axes the second is tokens.
      gradients: of each y, `[B, ..., out]`.
      names: logical axis names of the weight.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = {} if mesh.empty else dict(mesh.shape)
    batch = tuple(axis for axis in BATCH_AXES if axes.get(axis, 1) > 1)

    def product(x, gradient):
        x, gradient = (array.reshape(-1, array.shape[-1]) for array in (x, gradient))
        precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
        return jax.lax.dot_general(x, gradient, (((0,), (0,)), ((), ())), precision=precision)

    def products(xs, gradients):
        return functools.reduce(jnp.add, map(product, xs, gradients))

    size = math.prod(axes[axis] for axis in batch)
    if not batch or AxisType.Manual in mesh.axis_types or any(len(x) % size for x in xs):
        return constrain(products(xs, gradients), *names)
    rows = [batch, *(None for _ in xs[0].shape[1:-1])]
    if axes["sequence"] > 1 and all(x.ndim == 3 and x.shape[1] % axes["sequence"] == 0 for x in xs):
        rows[1] = "sequence"
    spec = partition(names, (xs[0].shape[-1], gradients[0].shape[-1]), mesh)
    within = [axis if axis == "tensor" else None for axis in spec]

    def local(xs, gradients):
        total = products(xs, gradients)
        others = [axis for row in rows if row for axis in ([row] if isinstance(row, str) else row)]
        if "fsdp" in spec and "fsdp" in others:
            total = jax.lax.psum_scatter(total, "fsdp", scatter_dimension=spec.index("fsdp"), tiled=True)
            others.remove("fsdp")
        return jax.lax.psum(total, others) if others else total

    specs = tuple(PartitionSpec(*rows, last) for last in within)
    return jax.shard_map(local, in_specs=specs, out_specs=spec, check_vma=False)(tuple(xs), tuple(gradients))
