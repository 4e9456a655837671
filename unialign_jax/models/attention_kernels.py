"""Flash attention kernels on one device's arrays: splash (TPU) and cuDNN (NVIDIA GPU).

Both take `query [B, Tq, H, D]`, `key, value [B, Tk, H, D]` and segment ids `[B, Tq]` and `[B, Tk]` (both int32, or both
None), and return `[B, Tq, H, D]` in the query's dtype with the softmax in float32. Every query needs a key of its
segment. Neither keeps the `[B, H, Tq, Tk]` weights in memory. Who shards what is `attention.attend`'s business.
"""

import re

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention

# The segment of keys that only fill a block; callers' ids are 0 or more.
PADDING = int(jnp.iinfo(jnp.int32).min)
_RESIDUALS = "attention"  # name of splash's output and log-sum-exp
_CUDNN = "dot_product_attention_fwd_wrapper"  # JAX's primitive of cuDNN's forward pass, whose results are the same two
# A policy of `jax.checkpoint`: what a kernel's backward pass needs of its forward pass is kept.
KEPT = jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.save_only_these_names(_RESIDUALS), lambda primitive, *_, **__: primitive.name == _CUDNN
)

LANES = 128  # width of a TPU's vector registers: splash's blocks are multiples of it
HEAD_UNIT = 64  # head sizes are filled up to a multiple; registers of 128 lanes hold them either way
SPLASH_HEAD_LIMIT = 256
CUDNN_HEAD_LIMIT = 128


def block_sides(queries: int, keys: int, head_size: int, itemsize: int) -> tuple[int, int]:
    """Sides in tokens of splash's blocks for sequences of such lengths: of queries and of keys, multiples of 128.

    Up to 1152 tokens one block holds a sequence; above, it is the side in 640..1152 that pads the sequence least, the
    larger on a tie. Published tunings lie at 512..2048. Where these pad, as they do 4352 tokens (34 x 128) by 3 %,
    which is 6 % of the work, long blocks that do not are taken instead: 256 queries by up to 2176 keys. Heads of more
    than 256 bytes per token (float32, or wider than 128) get blocks of at most 512 tokens, so that all fits the vector
    memory that a kernel gets: 13 MiB on v6e and tpu7x, by their flags, and 16 on others.
    """
    rows, columns = (-(-length // LANES) for length in (queries, keys))
    largest = _largest_block(head_size, itemsize)
    sides = [
        units if units <= largest else min(range(largest, largest // 2, -1), key=lambda side: -units % side)
        for units in (rows, columns)
    ]
    pads = rows % sides[0] or columns % sides[1]
    long = [side for side in range(2 * largest - 1, largest, -1) if columns % side == 0]
    narrow = largest == _largest_block(LANES, 2)  # of wide heads, so many keys were not compiled for the smallest chips
    if pads and long and rows % 2 == 0 and narrow:
        sides = [2, long[0]]
    return sides[0] * LANES, sides[1] * LANES


def _largest_block(head_size: int, itemsize: int) -> int:
    """Side of the largest block, in registers' widths."""
    return 9 if max(head_size, LANES) * itemsize <= 256 else 4


def _block_sizes(
    block_q: int, block_kv: int, keys: int, largest: int, head_size: int, segmented: bool
) -> splash_attention.BlockSizes:
    """The kernel's settings for blocks that divide the padded lengths.

    The forward pass fetches one block of keys at a time. The backward pass fetches as many as two of the largest hold
    (2048 keys if segments or heads wider than 64 need their share of vector memory): fused, which makes dQ, dK and dV
    in five products instead of seven, it writes one partial dQ (in the inputs' dtype) per fetch. Of logits as many are
    made at a time as 1152 queries have with 896 keys, because whole blocks of 1152 spill half the vector memory's worth
    of registers.

    Queries, keys and values lie in memory with their tokens last (`SEQ_MINOR`): tiles of 128 lanes are full then, where
    heads of 64 would fill them half, and the linear layers write them so.
    """
    held = min(2 * largest * LANES, 2048) if segmented or head_size > HEAD_UNIT else 2 * largest * LANES
    most = max(held // block_kv, 1)
    fetch = block_kv * max(n for n in range(1, most + 1) if keys // block_kv % n == 0)
    compute = max(n for n in range(LANES, block_kv + 1, LANES) if block_kv % n == 0 and n * block_q <= 1152 * 896)
    tokens_last = splash_attention.QKVLayout.SEQ_MINOR
    return splash_attention.BlockSizes(
        block_q=block_q,
        block_kv=block_kv,
        block_kv_compute=compute,
        block_q_dkv=block_q,
        block_kv_dkv=fetch,
        block_kv_dkv_compute=compute,
        use_fused_bwd_kernel=True,
        q_layout=tokens_last,
        k_layout=tokens_last,
        v_layout=tokens_last,
    )


def pad_tokens(x: jax.Array, more: int) -> jax.Array:
    """Appends `more` tokens of zeros along axis 1."""
    return jnp.pad(x, ((0, 0), (0, more)) + ((0, 0),) * (x.ndim - 2)) if more else x


def _pad(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    query_segments: jax.Array | None,
    key_segments: jax.Array | None,
    more_queries: int,
    more_keys: int,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None, jax.Array | None]:
    """Appends tokens that no real query attends to. Segments appear only if they are needed for that."""
    if more_keys and key_segments is None:
        query_segments = jnp.zeros(query.shape[:2], jnp.int32)
        key_segments = jnp.zeros(key.shape[:2], jnp.int32)
    if key_segments is not None:
        key_segments = jnp.pad(key_segments, ((0, 0), (0, more_keys)), constant_values=PADDING)
        # The last query's segment: a softmax over no key at all would be undefined.
        query_segments = jnp.pad(query_segments, ((0, 0), (0, more_queries)), mode="edge")
    query = pad_tokens(query, more_queries)
    return query, pad_tokens(key, more_keys), pad_tokens(value, more_keys), query_segments, key_segments


def splash(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    query_segments: jax.Array | None,
    key_segments: jax.Array | None,
    *,
    block: int | None = None,
    interpret: bool = False,
) -> jax.Array:
    """JAX's block-sparse flash attention for TPUs (`jax.experimental.pallas.ops.tpu.splash_attention`).

    Lengths are padded to whole blocks and head sizes to a multiple of 64, and sliced off again; the segment mask is
    left out where there is nothing to mask. float32 inputs work, but a TPU multiplies them in bfloat16 passes.

    Args:
      block: side of square blocks in tokens, a multiple of 128; None: `block_sides` of the lengths.
      interpret: run the kernel's program step by step in plain XLA, on any platform.

    Raises:
      ValueError: for heads wider than 256, which no block fits.
    """
    queries, heads, head_size = query.shape[1:]
    keys = key.shape[1]
    if head_size > SPLASH_HEAD_LIMIT:
        raise ValueError(
            f"attention backend 'splash': head size {head_size} is above {SPLASH_HEAD_LIMIT}; use the backend 'xla'"
        )
    if block is None:
        block_q, block_kv = block_sides(queries, keys, head_size, query.dtype.itemsize)
    else:
        block_q, block_kv = (min(block, -(-n // LANES) * LANES) for n in (queries, keys))
    # The kernel has no scale of its own.
    query = (query.astype(jnp.float32) * head_size**-0.5).astype(query.dtype)
    query, key, value, query_segments, key_segments = _pad(
        query, key, value, query_segments, key_segments, -queries % block_q, -keys % block_kv
    )
    pad_head = ((0, 0), (0, 0), (0, 0), (0, -head_size % HEAD_UNIT))
    query, key, value = (jnp.pad(x.transpose(0, 2, 1, 3), pad_head) for x in (query, key, value))  # [B, H, T, D]
    mask = splash_attention.FullMask((query.shape[2], key.shape[2]))
    largest = _largest_block(head_size, query.dtype.itemsize)
    kernel = splash_attention.make_splash_mha(
        splash_attention.MultiHeadMask([mask] * heads),
        block_sizes=_block_sizes(block_q, block_kv, key.shape[2], largest, head_size, key_segments is not None),
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=_RESIDUALS,
        interpret=interpret,
    )
    segments = None if key_segments is None else splash_attention.SegmentIds(query_segments, key_segments)
    out = jax.vmap(kernel)(query, key, value, segments)
    return out[:, :, :queries, :head_size].transpose(0, 2, 1, 3)


def cudnn_refusal(query: jax.Array) -> str | None:
    """Why cuDNN's flash attention cannot take such inputs, here, or None if it can."""
    head_size = query.shape[-1]
    for device in jax.local_devices():  # none of a GPU that is described only, for which anything is believed
        capability = getattr(device, "compute_capability", "")  # "8.0"; of AMD's, "gfx90a"
        if device.platform == "gpu" and not (re.fullmatch(r"[0-9.]+", capability) and float(capability) >= 8):
            return f"{device.device_kind} ({capability or 'of no known capability'}) is older than NVIDIA's Ampere, 8.0"
    if query.dtype != jnp.bfloat16:
        return f"dtype {query.dtype} is not bfloat16"
    if head_size % 8 or head_size > CUDNN_HEAD_LIMIT:
        return f"head size {head_size} is not a multiple of 8 up to {CUDNN_HEAD_LIMIT}"
    return None


def cudnn(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    query_segments: jax.Array | None,
    key_segments: jax.Array | None,
) -> jax.Array:
    """cuDNN's flash attention, through `jax.nn.dot_product_attention`.

    cuDNN's own mask is a length per sample, which cannot leave out a reference between the target and the text. So
    segments become a boolean mask `[B, 1, Tq, Tk]`, which cuDNN reads as a bias in the inputs' dtype: 2 bytes per pair
    of tokens and sample (11 MB at 2304 tokens), shared by heads and layers. Training takes even lengths only: an odd
    one is padded, with lengths per sample where there are no segments.

    Raises:
      ValueError: for a dtype or head size that cuDNN does not take.
    """
    refusal = cudnn_refusal(query)
    if refusal:
        raise ValueError(f"attention backend 'cudnn': {refusal}; use the backend 'xla' or 'auto'")
    batch, queries, keys = *query.shape[:2], key.shape[1]
    more_queries, more_keys = queries % 2, keys % 2
    masks = {}
    if query_segments is not None:
        query, key, value, query_segments, key_segments = _pad(
            query, key, value, query_segments, key_segments, more_queries, more_keys
        )
        masks["mask"] = query_segments[:, None, :, None] == key_segments[:, None, None, :]
    elif more_queries or more_keys:
        query, key, value = pad_tokens(query, more_queries), pad_tokens(key, more_keys), pad_tokens(value, more_keys)
        masks["query_seq_lengths"] = jnp.full((batch,), queries, jnp.int32)
        masks["key_value_seq_lengths"] = jnp.full((batch,), keys, jnp.int32)
    return jax.nn.dot_product_attention(query, key, value, implementation="cudnn", **masks)[:, :queries]
