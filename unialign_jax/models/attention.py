"""The one attention entry point. Kernels stand behind it, masks have one form, segment ids; so does sharding, one rule.

Under a mesh (`jax.set_mesh`) batch, tokens and heads are split by `parallel.RULES`, as far as the mesh has those axes.
"""

import functools
import logging
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec

from unialign_jax.models.attention_kernels import LANES, PADDING, cudnn, cudnn_refusal, pad_tokens, splash
from unialign_jax.models.layers import matmul_precision
from unialign_jax.parallel import BATCH_AXES, RULES

BACKENDS = ("auto", "cpu", "cudnn", "splash", "xla")
SEQUENCE_AXIS, HEADS_AXIS = RULES["sequence"], RULES["heads"]

Kernel = Callable[[jax.Array, jax.Array, jax.Array, jax.Array | None, jax.Array | None], jax.Array]


def attend(
    query: jax.Array, key: jax.Array, value: jax.Array, segments: jax.Array | None = None, *, backend: str = "xla"
) -> jax.Array:
    """Bidirectional softmax attention at scale `head_dim ** -0.5`.

    Args:
      query, key, value: `[B, S, H, D]`, bfloat16 or float32. Without segments and by "xla", the query may have another
        length than the other two.
      segments: None (every token attends to every token) or int32 `[B, S]`, 0 or more; a token attends to the tokens
        of its own segment. Padding and absent references carry a segment of their own, so real tokens never see them.
      backend: one of `BACKENDS`.
        "xla": plain einsums, anywhere; keeps the `[B, H, S, S]` weights in memory.
        "cpu": one head of one sample after the other: XLA gives products with batch axes to its own CPU loops, plain
          ones to a library that is several times as fast. Takes a few megabytes forward; training keeps all weights.
        "splash": the TPU kernel; on other platforms it is interpreted, which is exact and slow. "splash:640" sets the
        side of its blocks, in tokens.
        "cudnn": the kernel of NVIDIA GPUs; bfloat16 only.
        "auto": the kernel of the platform that the program is traced for, "xla" where that one cannot serve (said once
        in the log, for it costs time and memory) and, off the CPU, for sequences of up to 128 tokens, which no kernel
        helps.

    Returns:
      `[B, S, H, D]` in the query's dtype; the softmax is taken in float32.

    Raises:
      ValueError: for an unknown backend or block size, for heads that a kernel can't split over the mesh's `tensor`
        axis, or for a dtype or head size that "cudnn" does not take.
    """
    name, block = _parse(backend)
    platform = _platform()
    if name == "auto":
        name = _choose(query, platform)
    if name == "xla":
        return _xla(query, key, value, segments)  # which the compiler splits, as far as the heads allow
    axes, heads = _mesh_axes(), query.shape[2]
    if heads % axes.get(HEADS_AXIS, 1):
        raise ValueError(
            f"{heads} attention heads cannot be split over the mesh's {HEADS_AXIS!r} axis of {axes[HEADS_AXIS]}; "
            "choose an axis size that divides the heads"
        )
    kernel = {"cpu": _head_by_head, "cudnn": cudnn}.get(name)
    if name == "splash":
        if platform != "tpu":
            _warn_once(f"attention backend 'splash' is interpreted on {platform}: for tests, not for speed")
        kernel = functools.partial(splash, block=block, interpret=platform != "tpu")
    return _on_shards(kernel, axes, query, key, value, segments)


def join_tokens(parts: Sequence[jax.Array]) -> jax.Array:
    """Concatenates arrays `[B, S_i, ...]` to `[B, S, ...]`, in an order of tokens in which none leaves its device.

    Where the mesh splits tokens evenly, each device's share of the result is its share of every part, one after the
    other: attention does not mind the order. In the given order XLA would move most tokens to other devices and back.
    """
    shares = _shares([part.shape[1] for part in parts])
    apart = [part.reshape(part.shape[0], shares, -1, *part.shape[2:]) for part in parts]
    joint = jnp.concatenate(apart, axis=2)
    return joint.reshape(joint.shape[0], -1, *joint.shape[3:])


def split_tokens(joint: jax.Array, lengths: Sequence[int]) -> list[jax.Array]:
    """Undoes `join_tokens`: `[B, S, ...]` to parts `[B, S_i, ...]` whose numbers of tokens S_i are `lengths`."""
    shares = _shares(lengths)
    apart = joint.reshape(joint.shape[0], shares, -1, *joint.shape[2:])
    parts = jnp.split(apart, np.cumsum(lengths[:-1]) // shares, axis=2)
    return [part.reshape(part.shape[0], -1, *part.shape[3:]) for part in parts]


def _shares(lengths: Sequence[int]) -> int:
    """Into how many shares the ambient mesh splits parts of these lengths: 1 if it does not divide one of them."""
    shares = _mesh_axes().get(SEQUENCE_AXIS, 1)
    return 1 if any(length % shares for length in lengths) else shares


def _parse(backend: str) -> tuple[str, int | None]:
    """A backend's name and the block size in it, if any."""
    name, colon, block = backend.partition(":")
    if name not in BACKENDS or (colon and name != "splash"):
        raise ValueError(f"attention backend {backend!r} is unknown; choose one of {', '.join(BACKENDS)}")
    if not colon:
        return name, None
    if not block.isdecimal() or int(block) == 0 or int(block) % LANES:
        raise ValueError(f"attention backend {backend!r}: the block size must be a multiple of {LANES} (splash:640)")
    return name, int(block)


def _platform() -> str:
    """The platform that the program is traced for: the mesh's devices, which may be described only, or the default."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def _choose(query: jax.Array, platform: str) -> str:
    """The backend that "auto" stands for."""
    if platform == "cpu":
        return "cpu"
    if platform not in ("tpu", "gpu", "cuda") or query.shape[1] <= LANES:
        return "xla"
    if platform == "tpu":
        kernel = "splash"
        # The kernel would round float32 products to bfloat16; who asks for float32 means it.
        refusal = None if query.dtype == jnp.bfloat16 else f"dtype {query.dtype} is not bfloat16"
    else:
        kernel, refusal = "cudnn", cudnn_refusal(query)
    if refusal is None:
        return kernel
    _warn_once(f"attention on {platform} falls back from {kernel!r} to 'xla', slower and larger: {refusal}")
    return "xla"


@functools.cache
def _warn_once(message: str) -> None:
    logging.getLogger(__name__).warning(message)


def _xla(query: jax.Array, key: jax.Array, value: jax.Array, segments: jax.Array | None) -> jax.Array:
    """Plain einsums: runs anywhere, keeps the `[B, H, S, S]` weights in memory, and is the oracle of the kernels."""
    precision = matmul_precision(query.dtype)
    logits = jnp.einsum("bqhd,bkhd->bhqk", query, key, precision=precision, preferred_element_type=jnp.float32)
    logits = logits * query.shape[-1] ** -0.5
    if segments is not None:
        same = segments[:, None, :, None] == segments[:, None, None, :]
        logits = jnp.where(same, logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(query.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, value, precision=precision)


def _head_by_head(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segments: jax.Array | None,
    key_segments: jax.Array | None,
) -> jax.Array:
    """As `_xla`, in a loop over samples and heads whose body is plain matrix products."""
    batch, length, heads, size = query.shape
    precision = matmul_precision(query.dtype)
    rows = tuple(jnp.swapaxes(x, 1, 2).reshape(batch * heads, -1, size) for x in (query, key, value))
    ids = None if segments is None else tuple(jnp.repeat(x, heads, axis=0) for x in (segments, key_segments))

    def one(operands):
        (query, key, value), ids = operands
        logits = jnp.dot(query, key.T, precision=precision, preferred_element_type=jnp.float32) * size**-0.5
        if ids is not None:
            logits = jnp.where(ids[0][:, None] == ids[1][None, :], logits, jnp.finfo(jnp.float32).min)
        return jnp.dot(jax.nn.softmax(logits, axis=-1).astype(query.dtype), value, precision=precision)

    attended = jax.lax.map(one, (rows, ids))
    return jnp.swapaxes(attended.reshape(batch, heads, length, size), 1, 2)


def _mesh_axes() -> dict[str, int]:
    """Sizes of the ambient mesh's axes; none inside a `shard_map`, where the caller has split the arrays already."""
    mesh = jax.sharding.get_abstract_mesh()
    return {} if mesh.empty or AxisType.Manual in mesh.axis_types else dict(mesh.shape)


def _batch_axes(axes: dict[str, int], batch: int, length: int) -> tuple[str, ...] | None:
    """The mesh axes that split the batch; None if they do not divide it."""
    parts = math.prod(axes.get(axis, 1) for axis in BATCH_AXES)
    if batch % parts == 0:
        return tuple(axis for axis in BATCH_AXES if axis in axes)
    if length > LANES:  # parameters are made by tracing one sample of a few tokens
        _warn_once(f"attention repeats a batch of {batch} on each of the {parts} devices that it cannot be split over")
    return None


def _on_shards(
    kernel: Kernel,
    axes: dict[str, int],
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segments: jax.Array | None,
) -> jax.Array:
    """Runs a kernel, which XLA cannot partition, on every device's part of the arrays.

    Batch and heads are independent. Tokens, where the mesh splits them, are split as queries: every device all-gathers
    the keys and values of its heads and samples over `sequence`; their gradients come back by reduce-scatter. Not a
    ring, because here one layer's keys and values are small, no causal mask unbalances the work, and a ring would cut
    the kernel into pieces. SD3-medium at 1024x1024 (4352 tokens, width 1536, bfloat16) holds 26.7 MB of them per
    sample and layer; on 4 devices, each receives 20 MB while its share of the block is 91 GFLOP forward: 0.10 ms
    against 0.20 ms at peak on a v5p (200 GB/s per mesh axis, 459 TFLOP/s), 0.20 against 0.46 ms on a v5e (100 GB/s,
    197 TFLOP/s; see `training.chips`). A ring receives the same bytes, and can hide them only
    behind the attention's third of that work, in four kernel calls of 1088 x 1088 tokens whose float32 results are
    rescaled and added. Exchanging heads for tokens (all-to-all) would move half as much on 4 devices, but needs heads
    that `tensor` times `sequence` divides.
    """
    if all(size == 1 for size in axes.values()):
        return kernel(query, key, value, segments, segments)
    batch, length = query.shape[:2]
    more = -length % axes.get(SEQUENCE_AXIS, 1)
    if more:
        segments = jnp.zeros((batch, length), jnp.int32) if segments is None else segments
        segments = jnp.pad(segments, ((0, 0), (0, more)), constant_values=PADDING)
        query, key, value = (pad_tokens(x, more) for x in (query, key, value))
    sequence, heads = (axis if axis in axes else None for axis in (SEQUENCE_AXIS, HEADS_AXIS))
    tokens = PartitionSpec(_batch_axes(axes, batch, length), sequence)
    spec = PartitionSpec(*tokens, heads)

    def on_shard(query, key, value, segments):
        key_segments = segments
        if axes.get(SEQUENCE_AXIS, 1) > 1:
            gather = functools.partial(jax.lax.all_gather, axis_name=SEQUENCE_AXIS, axis=1, tiled=True)
            key, value, key_segments = jax.tree.map(gather, (key, value, segments))
        return kernel(query, key, value, segments, key_segments)

    # Kernels do not say over which axes their results vary, so that cannot be checked.
    split = jax.shard_map(on_shard, in_specs=(spec, spec, spec, tokens), out_specs=spec, check_vma=False)
    return split(query, key, value, segments)[:, :length]
