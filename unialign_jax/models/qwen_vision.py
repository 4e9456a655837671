"""Qwen2.5-VL's vision tower for still images, batched at one static size.

Computation: the Qwen2.5-VL report (arXiv 2502.13923, section 2.1) and transformers' `Qwen2_5_VLVisionConfig` model; the
preprocessing is that of its image processor. Every image of a batch has the same grid of patches, so the public code's
packed sequences become plain arrays: tokens keep their place in a `[rows, columns]` grid, windows are tiles of it, and
no index tables are needed. The public order of tokens (by merge group, then by window) is a permutation that neither
attention nor the merger sees, because positions enter through the rotation of queries and keys alone.
"""

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from unialign_jax.models.attention import attend
from unialign_jax.models.layers import Dense, RMSNorm
from unialign_jax.parallel import constrain

CHANNELS = 3
# CLIP's statistics of RGB in [0, 1], which Qwen's processor uses.
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
ROTARY_BASE = 10000.0
MAX_ASPECT = 200


@dataclasses.dataclass(frozen=True)
class QwenVisionConfig:
    """Shape of the tower and of its input; field names are those of the public `vision_config` and image processor.

    The defaults are Qwen2.5-VL-7B's. `window_size` is in pixels; `fullatt_block_indexes` lists the blocks that attend
    to the whole image. An image is resized so that its area in pixels lies within `min_pixels..max_pixels`;
    `min_pixels=0` leaves small images small.

    Raises:
      ValueError: if the fields contradict each other.
    """

    depth: int = 32
    hidden_size: int = 1280
    intermediate_size: int = 3420
    num_heads: int = 16
    patch_size: int = 14
    spatial_merge_size: int = 2
    temporal_patch_size: int = 2
    window_size: int = 112
    out_hidden_size: int = 3584
    fullatt_block_indexes: tuple[int, ...] = (7, 15, 23, 31)
    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 16384

    def __post_init__(self):
        # A list, as JSON has it, would make the config unhashable.
        object.__setattr__(self, "fullatt_block_indexes", tuple(self.fullatt_block_indexes))
        if self.hidden_size % (4 * self.num_heads):
            raise ValueError(
                f"hidden_size {self.hidden_size} must be a multiple of 4 x num_heads ({self.num_heads}): the rotation "
                "needs four quarters per head"
            )
        if self.window_size < self.resize_factor:
            raise ValueError(
                f"window_size {self.window_size} is smaller than one merged patch of "
                f"patch_size x spatial_merge_size = {self.resize_factor} pixels"
            )
        outside = [index for index in self.fullatt_block_indexes if not 0 <= index < self.depth]
        if outside:
            raise ValueError(f"fullatt_block_indexes {outside} lie outside the {self.depth} blocks of depth")
        if not self.min_pixels <= self.max_pixels:
            raise ValueError(f"min_pixels {self.min_pixels} is larger than max_pixels {self.max_pixels}")

    @property
    def resize_factor(self) -> int:
        """Pixels that both sides of the resized image are a multiple of: one merged patch."""
        return self.patch_size * self.spatial_merge_size

    @property
    def window_patches(self) -> int:
        """Side of an attention window in patches, a whole number of merged patches."""
        return self.window_size // self.resize_factor * self.spatial_merge_size

    @property
    def patch_values(self) -> int:
        """Numbers in one flattened patch, in the order channel, time, row, column."""
        return CHANNELS * self.temporal_patch_size * self.patch_size**2


def resized_size(config: QwenVisionConfig, height: int, width: int) -> tuple[int, int]:
    """Size in pixels that Qwen's processor (`smart_resize`) gives an image, a multiple of `resize_factor`.

    Raises:
      ValueError: if one side is more than 200 times the other, as the processor does.
    """
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise ValueError(f"image size {height}x{width}: one side is more than {MAX_ASPECT} times the other; crop it")
    factor = config.resize_factor
    # Python's round, ties to even, is what the processor uses.
    new_height, new_width = round(height / factor) * factor, round(width / factor) * factor
    if new_height * new_width > config.max_pixels:
        shrink = math.sqrt(height * width / config.max_pixels)
        new_height, new_width = (math.floor(side / shrink / factor) * factor for side in (height, width))
    elif new_height * new_width < config.min_pixels:
        grow = math.sqrt(config.min_pixels / (height * width))
        new_height, new_width = (math.ceil(side * grow / factor) * factor for side in (height, width))
    return max(factor, new_height), max(factor, new_width)


def extract_patches(config: QwenVisionConfig, images: jax.Array) -> jax.Array:
    """Images in [-1, 1] `[B, H, W, 3]` -> normalised patches, float32 `[B, rows, columns, patch_values]`.

    As published, pixels are clipped to [0, 1] before the resize and are not rounded to 8 bits after it. The resize is
    the antialiased bicubic one of torchvision and Pillow: equal to torch's float resize to about 1e-6, and within the
    8-bit rounding of Pillow's (about 2e-2 after normalisation). Still images fill every time step of a patch.
    """
    batch, height, width, _ = images.shape
    height, width = resized_size(config, height, width)
    pixels = jnp.clip((images.astype(jnp.float32) + 1) / 2, 0, 1)
    pixels = jax.image.resize(pixels, (batch, height, width, CHANNELS), "cubic", antialias=True)
    pixels = (pixels - MEAN) / STD
    patch = config.patch_size
    rows, columns = height // patch, width // patch
    patches = pixels.reshape(batch, rows, patch, columns, patch, CHANNELS).transpose(0, 1, 3, 5, 2, 4)
    patches = jnp.repeat(patches[:, :, :, :, None], config.temporal_patch_size, axis=4)
    return patches.reshape(batch, rows, columns, config.patch_values)


def _rotary(rows: int, columns: int, head_width: int) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of the 2-D rotation, float32 `[rows, columns, 1, head_width / 2]`: rows' angles first."""
    quarter = head_width // 4
    frequencies = (1.0 / ROTARY_BASE ** (np.arange(quarter) / quarter)).astype(np.float32)
    shape = (rows, columns, quarter)
    down = jnp.broadcast_to((np.arange(rows, dtype=np.float32)[:, None] * frequencies)[:, None], shape)
    across = jnp.broadcast_to((np.arange(columns, dtype=np.float32)[:, None] * frequencies)[None], shape)
    angles = jnp.concatenate([down, across], axis=-1)[:, :, None]
    return jnp.cos(angles), jnp.sin(angles)


def _rotate(x: jax.Array, cosine: jax.Array, sine: jax.Array) -> jax.Array:
    """Rotates the halves of the last axis of `[B, rows, columns, heads, head_width]` into each other, in float32."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)
    return rotated.astype(x.dtype)


def _attend_all(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Attention of all tokens of `[B, rows, columns, heads, head_width]` to all tokens of their image."""
    flat = (x.reshape(x.shape[0], -1, *x.shape[3:]) for x in (query, key, value))
    return attend(*flat, backend="xla").reshape(query.shape)


def _attend_windows(query: jax.Array, key: jax.Array, value: jax.Array, *, side: int) -> jax.Array:
    """Attention within tiles of `side` x `side` tokens; those at the bottom and right edges may be smaller.

    The edge tiles are padded to full ones, and segments keep the padding apart.
    """
    batch, rows, columns, *rest = query.shape
    height, width = min(side, rows), min(side, columns)
    pad_rows, pad_columns = -rows % height, -columns % width
    down, across = (rows + pad_rows) // height, (columns + pad_columns) // width

    def split(x):
        x = jnp.pad(x, ((0, 0), (0, pad_rows), (0, pad_columns)) + ((0, 0),) * (x.ndim - 3))
        x = x.reshape(x.shape[0], down, height, across, width, *x.shape[3:])
        return jnp.swapaxes(x, 2, 3).reshape(-1, height * width, *x.shape[5:])

    segments = None
    if pad_rows or pad_columns:
        segments = split(jnp.ones((batch, rows, columns), jnp.int32))
    attended = attend(*map(split, (query, key, value)), segments, backend="xla")
    attended = jnp.swapaxes(attended.reshape(batch, down, across, height, width, *rest), 2, 3)
    return attended.reshape(batch, down * height, across * width, *rest)[:, :rows, :columns]


class _Block(nn.Module):
    """Attention of either kind, then a SwiGLU MLP, both after an RMS norm."""

    config: QwenVisionConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, attends_all: jax.Array, cosine: jax.Array, sine: jax.Array):
        config = self.config
        dense = functools.partial(Dense, dtype=self.dtype)
        heads = (*x.shape[:-1], config.num_heads, config.hidden_size // config.num_heads)

        y = RMSNorm(dtype=self.dtype, name="norm1")(x)
        query, key, value = (
            dense(config.hidden_size, ("embed", "heads"), name=name)(y).reshape(heads)
            for name in ("query", "key", "value")
        )
        # Both kinds of block have the same parameters, so one stack of any depth and pattern is scanned, and the flag
        # chooses at run time which attention runs. (Whole-image attention under a window mask would cost every block
        # the square of all tokens; a scan over groups of blocks would tie the tree's layout to the pattern.)
        attended = jax.lax.cond(
            attends_all,
            _attend_all,
            functools.partial(_attend_windows, side=config.window_patches),
            _rotate(query, cosine, sine),
            _rotate(key, cosine, sine),
            value,
        )
        x = x + dense(config.hidden_size, ("heads", "embed"), name="out")(attended.reshape(x.shape))

        y = RMSNorm(dtype=self.dtype, name="norm2")(x)
        gate = nn.silu(dense(config.intermediate_size, ("embed", "mlp"), name="gate")(y))
        y = gate * dense(config.intermediate_size, ("embed", "mlp"), name="up")(y)
        x = x + dense(config.hidden_size, ("mlp", "embed"), name="down")(y)
        return constrain(x, "batch", None, None, None), None


class _Merger(nn.Module):
    """Joins each square of `spatial_merge_size` patches into one token of the language model's width."""

    config: QwenVisionConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        batch, rows, columns, width = x.shape
        merge = self.config.spatial_merge_size
        x = RMSNorm(dtype=self.dtype, name="norm")(x)
        x = x.reshape(batch, rows // merge, merge, columns // merge, merge, width)
        x = jnp.swapaxes(x, 2, 3).reshape(batch, -1, merge * merge * width)
        x = nn.gelu(Dense(x.shape[-1], ("embed", "mlp"), dtype=self.dtype, name="up")(x), approximate=False)
        return Dense(self.config.out_hidden_size, ("mlp", "embed"), dtype=self.dtype, name="down")(x)


class QwenVisionTower(nn.Module):
    """The tower. Parameters are made in float32; `dtype` is the compute dtype."""

    config: QwenVisionConfig
    dtype: jnp.dtype = jnp.bfloat16

    @nn.compact
    def __call__(self, patches: jax.Array) -> jax.Array:
        """Merged tokens of one grid of patches per image.

        Args:
          patches: `[B, rows, columns, patch_values]` from `extract_patches`; rows and columns are multiples of
            `spatial_merge_size`.

        Returns:
          `[B, rows / merge * columns / merge, out_hidden_size]`, row-major, in the compute dtype.
        """
        config = self.config
        _, rows, columns, _ = patches.shape
        x = Dense(config.hidden_size, (None, "embed"), use_bias=False, dtype=self.dtype, name="patch_embed")(patches)
        x = constrain(x, "batch", None, None, None)
        blocks = nn.scan(
            _Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast),
            length=config.depth,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        attends_all = jnp.isin(jnp.arange(config.depth), jnp.array(config.fullatt_block_indexes, jnp.int32))
        cosine, sine = _rotary(rows, columns, config.hidden_size // config.num_heads)
        x, _ = blocks(config, self.dtype, name="blocks")(x, attends_all, cosine, sine)
        return _Merger(config, self.dtype, name="merger")(x)
