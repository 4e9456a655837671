"""The collectives of a compiled program: what is sent, how often, how many bytes, across which mesh axes.

Bytes are those that each device must receive from others for one execution by the best algorithm: of an array of which
n devices hold parts (or copies), all-gather, reduce-scatter and all-to-all move the (n-1)/n that a device lacks,
all-reduce twice that, a permutation all of it.

What crosses slices is written as a `send` and a `recv` of the hosts (the "megascale" runtime), each device exchanging
with those in its place in the other slices.
"""

import dataclasses
import re
from collections.abc import Mapping

import numpy as np

from unialign_jax.training.hlo import COLLECTIVES, Instruction, Module


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program.

    Attributes:
      kind: one of `hlo.COLLECTIVES`.
      axes: the mesh axes in which its partners differ, joined by "+".
      group: devices that exchange with each other (of a permutation a sender and its receiver), positions in the mesh.
      shapes: what it makes, as written in the program.
      times: executions per step.
      bytes: received per device and execution.
      op_name: where in the traced Python program it comes from.
    """

    kind: str
    axes: str
    group: tuple[int, ...]
    shapes: tuple[str, ...]
    times: int
    bytes: float
    op_name: str


def read(module: Module, mesh_shape: Mapping[str, int], slices: int = 1) -> list[Collective]:
    """All collectives of a program that was compiled for a mesh, in the order of its schedule.

    A collective that the compiler has fused with computation appears in several fusions; it counts once.

    Args:
      module: the program.
      mesh_shape: sizes of the mesh axes by name, outermost first.
      slices: how many slices the outermost axis spans.
    """
    found, seen = [], set()
    devices = int(np.prod(list(mesh_shape.values())))
    for step in module.steps():
        for inner in (step.instruction, *step.inner):
            kind = _kind(inner)
            if kind not in COLLECTIVES:
                continue
            chain = re.search(r'chain_id="(\d+)"', inner.text)
            name = (step.computation, kind, chain.group(1) if chain else inner.name)
            if name in seen:
                continue
            seen.add(name)
            between_slices = inner.opcode == "recv"
            groups = np.arange(devices).reshape(slices, -1).T if between_slices else _groups(inner, devices)
            if not len(groups) or len(groups[0]) < 2:
                continue
            # The result of an asynchronous start holds the operands too, and the context of a permutation.
            arrays = inner.shape
            if between_slices:
                arrays = arrays[:1]  # beside it a context and a token
            elif inner.opcode.endswith("-start") and kind != "all-reduce":
                arrays = arrays[1:2] if kind == "collective-permute" else arrays[len(arrays) // 2 :]
            found.append(
                Collective(
                    kind,
                    _axes(groups, mesh_shape),
                    tuple(int(device) for device in groups[0]),
                    tuple(f"{array.dtype}{list(array.dims)}" for array in arrays),
                    step.times,
                    _received(kind, sum(array.bytes for array in arrays), len(groups[0])),
                    inner.op_name,
                )
            )
    return found


def _kind(instruction: Instruction) -> str:
    transfer = re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.text)
    if instruction.opcode == "recv" and transfer:
        return transfer.group(1).lower().replace("_", "-")
    return instruction.opcode.removesuffix("-start")


def _received(kind: str, made: float, devices: int) -> float:
    if kind == "collective-permute":
        return made
    if kind == "reduce-scatter":
        return made * (devices - 1)
    return made * (devices - 1) / devices * (2 if kind == "all-reduce" else 1)


def _axes(groups: np.ndarray, mesh_shape: Mapping[str, int]) -> str:
    """The axes along which partners differ."""
    coordinates = np.stack(np.unravel_index(groups, tuple(mesh_shape.values())))
    differ = (coordinates != coordinates[:, :, :1]).any(axis=(1, 2))
    return "+".join(name for name, differs in zip(mesh_shape, differ, strict=True) if differs)


def _groups(instruction: Instruction, devices: int) -> np.ndarray:
    """The groups of a collective, `[groups, devices of one]`; of a permutation the pairs that are no copies."""
    text = instruction.text
    if pairs := re.search(r"source_target_pairs=\{(\{[^=]*\})\}", text):
        numbers = np.array([[int(n) for n in pair.split(",")] for pair in re.findall(r"\{([\d,]+)\}", pairs.group(1))])
        return numbers[numbers[:, 0] != numbers[:, 1]]
    if explicit := re.search(r"replica_groups=\{(\{[\d,{}]*\})\}", text):
        return np.array(
            [[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", explicit.group(1))]
        )
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        shape, source = (tuple(int(n) for n in iota.group(i).split(",")) for i in (1, 2))
        numbers = np.arange(devices).reshape(source)
        if iota.group(3):
            numbers = numbers.transpose([int(n) for n in iota.group(3).split(",")])
        return numbers.reshape(shape)
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\](.*?)\s*\{([^}]*)\}", text):
        return _mesh_groups(*mesh.groups())
    if "replica_groups=" in text and "replica_groups={}" not in text:
        raise ValueError(f"{instruction.name}: its replica_groups are of no known form: {text[:200]}")
    return np.arange(devices)[None]  # no groups: all devices


def _mesh_groups(mesh: str, order: str, axes: str) -> np.ndarray:
    """Groups written as axes of a named mesh: `mesh['a'=4,'b'=2] {'a','b':(1)2}`; `:(pre)size` is a part of an axis."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
    numbers = np.arange(int(np.prod(list(sizes.values()))))
    if ids := re.search(r"device_ids=\(?\[([\d,]+)\](?:T\(([\d,]+)\))?", order):
        numbers = numbers.reshape([int(n) for n in ids.group(1).split(",")])
        if ids.group(2):
            numbers = numbers.transpose([int(n) for n in ids.group(2).split(",")])
    split, taken = [], []
    wanted: dict[str, tuple[int, int] | None] = {}
    for name, pre, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes):
        wanted[name] = (int(pre), int(size)) if size else None
    for name, size in sizes.items():
        if name not in wanted:
            split.append(size)
        elif wanted[name] is None:
            taken.append(len(split))
            split.append(size)
        else:
            pre, part = wanted[name]
            split += [pre, part, size // (pre * part)]
            taken.append(len(split) - 2)
    numbers = np.moveaxis(numbers.reshape(split), taken, range(-len(taken), 0))
    return numbers.reshape(-1, int(np.prod([split[axis] for axis in taken])))
