"""The ahead-of-time verdict: does a program fit a TPU topology, and how fast can it be, found without a TPU.

The real program is compiled by the real compiler for described devices; everything said about it is read from the
result: memory from the compiler's own count, kernels, collectives and traffic from the optimized program.
"""

import collections
import dataclasses
import importlib.util
import math
import os
import re
from typing import Any

import jax
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from unialign_jax import accelerator_flags, parallel
from unialign_jax.training import collectives, hlo, roofline
from unialign_jax.training.chips import CHIPS, GIB, Slices
from unialign_jax.training.program import Program
from unialign_jax.training.run_config import RunConfig
from unialign_jax.training.sample_program import SampleProgram

# Share of the usable memory that must stay free: the next batch, the runtime's buffers, fragmentation.
HEADROOM = 0.04
PROGRAMS = ("train", "sample")


def prepare(topology: str, slices: int = 1) -> None:
    """Sets the environment in which libtpu compiles for a topology: the flags of real runs, and no search for a TPU.

    Must come before JAX first uses libtpu in the process, which then holds these flags for good.

    Raises:
      ValueError: an unknown generation, or libtpu is not installed.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError("libtpu, which holds the TPU compiler, is not installed: pip install 'unialign_jax[tpu]'")
    variables = accelerator_flags.environment(_generation(topology), slices)
    for name, flags in variables.items():
        os.environ[name] = f"{flags} {os.environ.get(name, '')}".strip()  # what the user has set comes last, and wins
    if not jax.config.jax_platforms:  # the environment has been read: JAX is imported above
        jax.config.update("jax_platforms", "cpu")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # no metadata server to ask
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # compiling takes no device that others could want


def describe(topology: str, slices: int = 1) -> list[Any]:
    """The devices of a topology such as "v5e:16x16", described only.

    Raises:
      ValueError: the topology is not one that exists.
    """
    from jax.experimental import topologies  # loads libtpu's compiler

    _generation(topology)
    options = {"num_slices": slices} if slices > 1 else {}
    if topology.startswith("v4:"):
        options["chip_config_name"] = "megacore"  # a v4 chip's two cores are one device, as on Cloud's machines
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices)
    except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
        raise ValueError(f"topology {topology!r}: {str(error).splitlines()[0]}") from error


def judge(
    run: RunConfig,
    topology: str,
    *,
    slices: int = 1,
    program: str = "train",
    source: str | None = None,
    hlo_file: epath.PathLike | None = None,
) -> dict:
    """Compiles a program of a run for a topology, and says what is to be known about it.

    Args:
      run: the config. Its `data.global_batch` is over all devices.
      topology: one slice, such as "v5e:16x16".
      slices: how many of them train together.
      program: "train", the step, or "sample", the image sampler with `run.log`'s steps and guidance.
      source: the name of the source whose batches enter; None: that with the most reference images, whose sequences
        are the longest.
      hlo_file: where the compiled program's text goes; None: nowhere.

    Returns:
      Plain JSON values; see `docs/scaling.md` for what each means.

    Raises:
      ValueError: a topology, source or program that is not there, a mesh that the run does not fit, or a program whose
        collectives can't be read.
    """
    if program not in PROGRAMS:
        raise ValueError(f"no program {program!r}; there are {', '.join(PROGRAMS)}")
    if source is not None and source not in run.source_names:
        raise ValueError(f"no source {source!r} in the config; there are {', '.join(run.source_names)}")
    by_name = dict(zip(run.source_names, run.data.sources, strict=True))
    source = source or largest_source(run)
    bucket = by_name[source]
    mesh = parallel.make_mesh(run.strategy, describe(topology, slices))
    built = (Program if program == "train" else SampleProgram)(run, mesh)
    where = Slices.of(_generation(topology), mesh.devices.flat)
    chips = mesh.size // where.chip.devices
    verdict = {
        "topology": topology,
        "slices": slices,
        "chips": chips,
        "program": program,
        "stage": run.stage,
        "source": source,
        "image": [run.data.height, run.data.width],
        "strategy": run.strategy,
        "mesh": dict(mesh.shape),
        "remat": run.remat,
        "cached": list(run.cached),
        "batch": run.data.global_batch,
        "batch_per_chip": run.data.global_batch / chips,
        "flags": accelerator_flags.environment(_generation(topology), slices),
    }
    try:
        compiled = _compile(built.lower(bucket))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return verdict | {"fits": False, "compiler": out_of_memory(str(error))}
    memory = _memory(built.parts(bucket), compiled, where.chip)
    text = compiled.as_text()
    if hlo_file is not None:
        epath.Path(hlo_file).write_text(text)
    module = hlo.Module(text)
    transfers = collectives.read(module, dict(mesh.shape), slices)
    crossed = {where.several(transfer.group) for transfer in transfers}
    if program == "train" and mesh.size > 1 and not crossed >= ({False, True} if slices > 1 else {False}):
        raise ValueError(
            f"in the program for {topology} no collectives {'between slices ' * (False in crossed)}were found, though "
            "gradients must cross: its compiler writes them as is not read yet (training/collectives.py; --hlo writes "
            "the program down)"
        )
    times = roofline.estimate(module, transfers, where)
    return (
        verdict
        | memory
        | {
            "attention": _attention(module),
            "collectives": _summary(transfers, where),
            "activation_gathers": _activation_gathers(transfers, built.parts(bucket)),
        }
        | _speed(built, bucket, times, where, chips)
    )


def largest_source(run: RunConfig) -> str:
    """The name of the first source with the most reference images."""
    references = {name: source.references for name, source in zip(run.source_names, run.data.sources, strict=True)}
    return max(references, key=references.get)


def out_of_memory(message: str) -> str:
    """What a compiler's refusal comes to: the memory that the program asks for, or the kernel that asks too much."""
    kernel = re.search(r"for %([\w.]+) = .*Scoped allocation with size (\S+) and limit (\S+)", message, re.DOTALL)
    if kernel:
        name, asked, limit = kernel.groups()
        return f"{name} needs {asked} of {limit} of vector memory at any batch; of attention, smaller blocks need less"
    used = re.search(r"Used \S+ of \S+ hbm", message)
    return used.group() if used else message.splitlines()[0]


def _generation(topology: str) -> str:
    generation = topology.partition(":")[0]
    if generation not in CHIPS or not re.fullmatch(r"\w+:\d+(x\d+)+", topology):
        raise ValueError(
            f"topology {topology!r}: expected a generation and its chips, such as v5e:16x16; generations are "
            f"{', '.join(CHIPS)}"
        )
    return generation


def _compile(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """Without the persistent cache: what is compiled for described devices can be written there, not read back."""
    enabled = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        return lowered.compile()
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)


def _memory(arguments: dict[str, Any], compiled: jax.stages.Compiled, chip: Any) -> dict:
    """GiB per device, and whether they fit."""
    counted = compiled.memory_analysis()
    parts = {name: _held(tree) / GIB for name, tree in arguments.items()}
    total = (
        counted.argument_size_in_bytes
        + counted.output_size_in_bytes
        - counted.alias_size_in_bytes
        + counted.temp_size_in_bytes
        + counted.generated_code_size_in_bytes
    ) / GIB
    usable = chip.hbm_bytes / chip.devices / GIB
    parts["temporaries"] = total - sum(parts.values())
    return {
        "fits": total <= usable * (1 - HEADROOM),
        "headroom": HEADROOM,
        "hbm_gib": {name: round(value, 3) for name, value in parts.items()}
        | {"total": round(total, 3), "usable": usable, "free": round(usable - total, 3)},
    }


def _held(tree: Any) -> int:
    """Bytes that one device holds of a tree of abstract arrays."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
        if not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.extended)
    )


def _attention(module: hlo.Module) -> str:
    """The transformer's attention kernel, as it stands in the program."""
    found = {re.sub(r"_mha.*", "", name) for name in hlo.kernels(module)}
    return "+".join(sorted(found)) or "xla"


def _summary(transfers: list[collectives.Collective], where: Slices) -> list[dict]:
    """Count and bytes received per device and step, by kind, axes and network."""
    count: collections.Counter = collections.Counter()
    received: collections.Counter = collections.Counter()
    for transfer in transfers:
        key = transfer.kind, transfer.axes, "dcn" if where.several(transfer.group) else "interconnect"
        count[key] += transfer.times
        received[key] += transfer.times * transfer.bytes
    return [
        {"kind": key[0], "axes": key[1], "network": key[2], "count": count[key], "bytes": round(received[key])}
        for key in sorted(count)
    ]


def _but_over_fsdp(leaf: jax.ShapeDtypeStruct) -> tuple[int, ...]:
    """The part of a parameter that a device has once it is gathered over `fsdp`: split over the other axes still."""
    whole = [None if part == "fsdp" else part for part in leaf.sharding.spec]
    return NamedSharding(leaf.sharding.mesh, PartitionSpec(*whole)).shard_shape(leaf.shape)


def _activation_gathers(transfers: list[collectives.Collective], arguments: dict[str, Any]) -> list[dict]:
    """All-gathers whose result is no parameter: where it comes from, count and bytes, largest first."""
    sizes_of_parameters = set()
    for leaf in jax.tree.leaves([arguments["parameters"], arguments["frozen"]]):
        sizes = [size for size in leaf.shape if size > 1]
        sizes_of_parameters |= {math.prod(sizes), math.prod(sizes[1:])}  # of all layers, or of one
        sizes = [size for size in _but_over_fsdp(leaf) if size > 1]  # as `parallel.gathered` makes it
        sizes_of_parameters |= {math.prod(sizes), math.prod(sizes[1:])}
    found: dict[tuple, list] = {}
    for transfer in transfers:
        sizes = [math.prod(int(n) for n in re.findall(r"\d+", shape.partition("[")[2])) for shape in transfer.shapes]
        if transfer.kind == "all-gather" and not all(size in sizes_of_parameters for size in sizes):
            entry = found.setdefault((transfer.op_name, transfer.axes, transfer.shapes), [0, 0.0])
            entry[0] += transfer.times
            entry[1] += transfer.times * transfer.bytes
    ordered = sorted(found.items(), key=lambda item: -item[1][1])
    return [
        {"from": name, "axes": axes, "shapes": list(shapes), "count": count, "bytes": round(received)}
        for (name, axes, shapes), (count, received) in ordered
    ]


def _speed(
    built: Program | SampleProgram, bucket: Any, times: roofline.Roofline, where: Slices, chips: int
) -> dict[str, Any]:
    model, frozen = built.model_flops(bucket), built.frozen_flops(bucket)
    chip, batch = where.chip, built.run.data.global_batch

    def rates(seconds: float) -> dict:
        return {
            "step_s": seconds,
            "images_per_s_per_chip": batch / seconds / chips,
            "mfu": (model + frozen) / (seconds * chips * chip.flops),
            "mfu_transformer": model / (seconds * chips * chip.flops),
        }

    return {
        "flops": {
            "model": model,
            "frozen": frozen,
            "recomputed": built.recomputed_flops(bucket),
            "program": round(times.flops * where.chip.devices * chips),
        },
        "roofline": dataclasses.asdict(times) | {"device": times.device},
        "overlapped": rates(times.overlapped),
        "serial": rates(times.serial),
        "chip": dataclasses.asdict(chip),
    }
