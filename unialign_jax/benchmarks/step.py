"""The train step against the batch, until the device is full: its time, memory and model FLOPs utilization (MFU).

On accelerators it is the step of the published size on 512 x 512 images, in bfloat16, with all that can be cached
cached; on a CPU that of a small model. Weights and batches are constants: time and memory do not depend on them.
"""

import dataclasses
import statistics
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp

from unialign_jax import parallel
from unialign_jax.benchmarks.loop import small_config
from unialign_jax.benchmarks.sample import full_at
from unialign_jax.models.autoencoder import AutoencoderConfig
from unialign_jax.models.qwen_vision import QwenVisionConfig
from unialign_jax.models.t5 import T5Config
from unialign_jax.models.unialign import TransformerConfig
from unialign_jax.training import run_config
from unialign_jax.training.chips import CHIPS
from unialign_jax.training.program import Program

_WARM_UP = 2
_STEPS = 5  # in each round
_ROUNDS = 3
_SMALLEST, _LARGEST = 4, 64  # a device
# bfloat16 matrix products per second, dense: TPUs' of `chips`, GPUs' by NVIDIA's data sheets (SXM).
_PEAKS = {
    "TPU v4": CHIPS["v4"].flops,
    "TPU v5 lite": CHIPS["v5e"].flops,
    "TPU v5e": CHIPS["v5e"].flops,
    "TPU v5p": CHIPS["v5p"].flops,
    "TPU v5": CHIPS["v5p"].flops,  # what libtpu calls it; the others that begin so come before
    "TPU v6 lite": CHIPS["v6e"].flops,
    "TPU7x": CHIPS["tpu7x"].flops / CHIPS["tpu7x"].devices,
    "A100": 312e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
}


def run() -> dict[str, Any]:
    """Times batches of 4, 8, 16, ... per device, split by the strategy "fsdp".

    Returns:
      `rows`, one for each batch: `batch` over all devices, `step_seconds`, `images_per_second`, `mfu` (None on a device
      of unknown peak), `peak_gib` of one device (what its allocator says, or what the compiler planned) and the
      `attention` kernel in the program; `full_at`, the batch from which a doubling gains less than 3 %, or None.

    Raises:
      ValueError: not even the smallest batch fits.
    """
    small = jax.devices()[0].platform == "cpu"
    mesh = parallel.make_mesh("fsdp")
    rows: list[dict[str, Any]] = []
    batch = _SMALLEST * mesh.size
    while batch <= _LARGEST * mesh.size and full_at(rows) is None:
        try:
            rows.append(_measure(mesh, batch, small))
            print(rows[-1], file=sys.stderr, flush=True)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            break
        batch *= 2
    if not rows:
        raise ValueError(
            f"the {'small' if small else 'published'} model's state and a batch of {batch} do not fit into "
            f"{mesh.size} device(s); the published one takes 56 GiB before any batch: use more devices"
        )
    return {"model": "small" if small else "published", "rows": rows, "full_at": full_at(rows)}


def _measure(mesh: jax.sharding.Mesh, batch: int, small: bool) -> dict[str, Any]:
    config = small_config("unread.jsonl") if small else _published_config()
    config = config.copy_and_resolve_references().unlock()
    config.data.global_batch = batch
    program = Program(run_config.read(config), mesh)
    source = program.run.data.sources[0]
    step = program.lower(source).compile()
    arguments = (program.state, program.frozen, program.batch(source))
    shardings = jax.tree.map(lambda leaf: leaf.sharding, arguments)
    state, *rest = jax.jit(lambda: jax.tree.map(_constant, arguments), out_shardings=shardings)()
    rest.append(jax.device_put(jax.random.key(0), program.key.sharding))

    def seconds(state: Any, count: int) -> tuple[Any, float]:
        start = time.perf_counter()
        for _ in range(count):
            state, _ = step(state, *rest)
        jax.block_until_ready(state)
        return state, (time.perf_counter() - start) / count

    state, _ = seconds(state, _WARM_UP)
    times = []
    for _ in range(_ROUNDS):
        state, each = seconds(state, _STEPS)
        times.append(each)
    each = statistics.median(times)
    needed = program.model_flops(source) + program.frozen_flops(source)
    return {
        "batch": batch,
        "step_seconds": round(each, 4),
        "images_per_second": round(batch / each, 3),
        "mfu": utilization(needed, each, mesh.size, jax.devices()[0].device_kind),
        "peak_gib": round(_peak_bytes(step) / 2**30, 3),
        "attention": _attention(step.as_text()),
    }


def utilization(flops: float, seconds: float, devices: int, kind: str) -> float | None:
    """Share of the devices' peak that so many FLOPs in so many seconds are; None for a kind of unknown peak."""
    slower = "PCIe" in kind or "NVL" in kind  # of the same names, with other clocks
    peak = next((peak for name, peak in _PEAKS.items() if name in kind and not slower), None)
    return None if peak is None else round(flops / (seconds * devices * peak), 4)


def _constant(leaf: jax.ShapeDtypeStruct) -> jax.Array:
    return jnp.full(leaf.shape, 0.01 if jnp.issubdtype(leaf.dtype, jnp.floating) else 1, leaf.dtype)


def _peak_bytes(step: jax.stages.Compiled) -> int:
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    memory = step.memory_analysis()  # its outputs take the place of the donated state
    return memory.argument_size_in_bytes + memory.temp_size_in_bytes


def _attention(program: str) -> str:
    for mark, kernel in (("__cudnn$fmha", "cudnn"), ("splash", "splash")):
        if mark in program:
            return kernel
    return "xla"


def _published_config() -> Any:
    """The stage `published` of `configs/sd3_medium.py`, generation alone."""
    networks = {
        "transformer": TransformerConfig(),
        "autoencoder": AutoencoderConfig(),
        "text_encoder": T5Config(),
        "teacher": QwenVisionConfig(),
    }
    config = small_config("unread.jsonl").unlock()
    config.update(
        dtype="bfloat16",
        remat="attention",
        cached=("latents", "instructions", "teacher"),
        trained=("transformer",),
        objective={"semantic_depth": 8},
    )
    config.model = {name: dataclasses.asdict(network) for name, network in networks.items()}
    config.data.update(height=512, width=512, text_length=256)
    return config
