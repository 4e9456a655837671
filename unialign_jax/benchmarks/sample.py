"""Sampling throughput against the batch size, until the device is full, and the memory that it takes.

On accelerators the model has the published size and makes 512 x 512 images in bfloat16; its weights are constants, as
time and memory do not depend on them. On a CPU it is the shipped model of scenes, 32 x 32 in float32. Every batch goes
through `UniAlignPipeline.generate`, text encoder and decoder included, with guidance.
"""

import statistics
import sys
import time
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from unialign_jax import parallel
from unialign_jax.data.tokenizer import Tokenizer
from unialign_jax.inference import programs
from unialign_jax.models.autoencoder import AutoencoderConfig
from unialign_jax.models.t5 import T5Config
from unialign_jax.models.unialign import TransformerConfig
from unialign_jax.networks import build_networks
from unialign_jax.pipeline import UniAlignPipeline

_STEPS = 10  # timed; the figures are for _PUBLISHED_STEPS, whose network evaluations take as long
_PUBLISHED_STEPS = 50
_ROUNDS = 3
_LARGEST = 64  # a device
_FULL = 1.03  # a doubling that gains less than this finds the device full


def run() -> dict[str, Any]:
    """Times batches of 1, 2, 4, ... per device.

    Returns:
      `rows`, one for each batch: `batch`, `seconds` of it, `images_per_second` at 50 steps, `peak_gib` of one device
      (what its allocator says, or, where it says nothing, what the compiler planned for the steps); `full_at`, the
      batch from which a doubling gains less than 3 %, or None; `files`: a table and a plot.
    """
    shipped = jax.devices()[0].platform == "cpu"
    mesh = parallel.make_mesh("fsdp")
    pipeline = _pipeline(mesh, shipped)
    rows: list[dict[str, Any]] = []
    for batch in (mesh.size * 2**k for k in range(_LARGEST.bit_length())):
        try:
            rows.append(_measure(pipeline, batch))
            print(rows[-1], file=sys.stderr, flush=True)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            break
        if full_at(rows) is not None:
            break
    return {
        "model": "scenes" if shipped else "published",
        "size": list(pipeline.size),
        "rows": rows,
        "full_at": full_at(rows),
        "files": {"md": table(rows), "svg": plot(rows)},
    }


def full_at(rows: list[dict[str, Any]]) -> int | None:
    """The batch before the last of `rows` if the last gains less than `_FULL` over it, or None."""
    if len(rows) < 2 or rows[-1]["images_per_second"] >= _FULL * rows[-2]["images_per_second"]:
        return None
    return rows[-2]["batch"]


def published_seconds(one: float, many: float) -> float:
    """Seconds of a batch at the published number of steps, from those of one step and of `_STEPS`."""
    return one + (many - one) * (_PUBLISHED_STEPS - 1) / (_STEPS - 1)


def _pipeline(mesh: jax.sharding.Mesh, shipped: bool) -> UniAlignPipeline:
    most = _LARGEST * mesh.size
    if shipped:
        return UniAlignPipeline.from_pretrained("scenes", mesh, "float32", max_batch=most, progress=False)
    model = {"transformer": TransformerConfig(), "text_encoder": T5Config(), "autoencoder": AutoencoderConfig()}
    networks = build_networks({name: vars(config) for name, config in model.items()}, dtype="bfloat16")
    boxed = networks.abstract()
    shardings = parallel.param_shardings(boxed, mesh, check=False)

    # Constants: drawing weights of the published size takes longer than sampling with them.
    def make():
        return jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.01, jnp.bfloat16), nn.unbox(boxed))

    tokenizer = Tokenizer.learn(["a red square on a green field", "a blue disc"], 40)
    params = jax.jit(make, out_shardings=shardings)()
    return UniAlignPipeline(
        networks, params, tokenizer, text_length=256, size=(512, 512), mesh=mesh, max_batch=most, progress=False
    )


def _measure(pipeline: UniAlignPipeline, batch: int) -> dict[str, Any]:
    def seconds(steps: int) -> float:
        start = time.perf_counter()
        pipeline.generate(["a red square"] * batch, steps=steps, output="array")
        return time.perf_counter() - start

    seconds(1)  # compiles
    # The difference is what steps cost; what is left is encoders and hand-over, once a batch.
    one = statistics.median(seconds(1) for _ in range(_ROUNDS))
    many = statistics.median(seconds(_STEPS) for _ in range(_ROUNDS))
    whole = published_seconds(one, many)
    return {
        "batch": batch,
        "seconds": round(whole, 4),
        "images_per_second": round(batch / whole, 4),
        "peak_gib": round(_peak_bytes(pipeline, batch) / 2**30, 4),
    }


def _peak_bytes(pipeline: UniAlignPipeline, batch: int) -> int:
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    made = programs.image_programs(pipeline.networks, pipeline.mesh)
    shape = (batch, *pipeline.networks.latent_shape(*pipeline.size))
    width = pipeline.networks.text_encoder.config.d_model
    split = parallel.batch_sharding(pipeline.mesh)
    latents, states = (
        jax.ShapeDtypeStruct(s, d, sharding=split)
        for s, d in ((shape, jnp.float32), ((batch, pipeline.text_length, width), pipeline.networks.transformer.dtype))
    )
    conditions = ({"text": states}, {"text": states})
    sigmas = jax.ShapeDtypeStruct((programs.MAX_STEPS + 1,), jnp.float32)
    with jax.set_mesh(pipeline.mesh):
        lowered = made.advance.lower(
            pipeline.params, latents, conditions, jax.ShapeDtypeStruct((1,), jnp.float32), sigmas, 0, 1
        )
    memory = lowered.compile().memory_analysis()
    return memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = ["| batch | seconds a batch | images/s | peak memory a device, GiB |", "| ---: | ---: | ---: | ---: |"]
    for row in rows:
        lines.append(
            f"| {row['batch']} | {row['seconds']:.3g} | {row['images_per_second']:.3g} | {row['peak_gib']:.3g} |"
        )
    return "\n".join(lines) + "\n"


def plot(rows: list[dict[str, Any]], width: int = 480, height: int = 300) -> str:
    """Images per second against the batch, on a logarithmic axis, as SVG."""
    left, bottom, top = 64, 44, 16
    highest = max(row["images_per_second"] for row in rows) * 1.1
    step = (width - left - 24) / max(1, len(rows) - 1)
    points = [
        (left + i * step, top + (height - bottom - top) * (1 - row["images_per_second"] / highest))
        for i, row in enumerate(rows)
    ]
    base = height - bottom
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif"',
        ' font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<path d="M{left} {top}V{base}H{width - 16}" fill="none" stroke="black"/>',
        f'<text x="{(width + left) / 2:.0f}" y="{height - 8}" text-anchor="middle">batch</text>',
        f'<text transform="translate(16 {height / 2:.0f}) rotate(-90)" text-anchor="middle">images per second</text>',
        f'<polyline points="{line}" fill="none" stroke="#1f6feb" stroke-width="2"/>',
    ]  # fmt: skip
    for row, (x, y) in zip(rows, points, strict=True):
        parts += [
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="#1f6feb"/>',
            f'<text x="{x:.1f}" y="{base + 16}" text-anchor="middle">{row["batch"]}</text>',
            f'<text x="{x:.1f}" y="{y - 8:.1f}" text-anchor="middle">{row["images_per_second"]:.3g}</text>',
        ]
    return "\n".join([*parts, "</svg>"]) + "\n"
