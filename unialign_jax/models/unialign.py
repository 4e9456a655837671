"""UniAlignment's transformer: SD3-medium's MMDiT with two output heads and two semantic adapters.

Computation: arXiv 2509.23760, section 3, and its public implementation; the layer names follow the usual MMDiT terms.
One network serves both diffusions: the image head predicts a flow-matching velocity, the text head token logits.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from unialign_jax.models.attention import join_tokens
from unialign_jax.models.blocks import REMAT_POLICIES, ZEROS, Context, JointBlock, TransformerConfig
from unialign_jax.models.layers import Dense, layer_norm
from unialign_jax.parallel import constrain

NUM_NULL_TOKENS = 8
TIME_FEATURES = 256


@dataclasses.dataclass(frozen=True)
class Pass:
    """What one forward pass reads.

    Attributes:
      latents: `[B, H, W, in_channels]`, or None: the learned null tokens stand in for the image.
      text_states: text encoder states `[B, T, joint_attention_dim]`.
      timesteps: `[B]` in [0, 1000]; 0 is clean.
      references: clean latents `[B, N, H, W, in_channels]` of the target's size, or None.
      reference_mask: bool `[B, N]`, False where a sample has no such reference; None: all are present.
      text_pool_mask: bool `[B, T]`, the text tokens that the text adapter averages; None: all (as published).
      want_image, want_text: whether to compute that head.
    """

    latents: jax.Array | None
    text_states: jax.Array
    timesteps: jax.Array
    references: jax.Array | None = None
    reference_mask: jax.Array | None = None
    text_pool_mask: jax.Array | None = None
    want_image: bool = True
    want_text: bool = True


class Outputs(NamedTuple):
    """What one forward pass returns; a part that was not asked for is None.

    image: velocity, float32 `[B, H, W, out_channels]`.
    text_logits: float32 `[B, T, V]`.
    image_hidden: the target's tokens after the final norm, `[B, S, D]` (without image, `[B, 8, D]`: the null tokens
      after the blocks, not normed).
    text_hidden: text tokens after the final norm, `[B, T, D]`.
    image_semantic, text_semantic: adapter outputs, float32 `[B, semantic_dim]`.
    """

    image: jax.Array | None
    text_logits: jax.Array | None
    image_hidden: jax.Array
    text_hidden: jax.Array
    image_semantic: jax.Array | None
    text_semantic: jax.Array | None


def axis_positions(config: TransformerConfig) -> np.ndarray:
    """Sines then cosines of one coordinate of the fixed 2-D position table, float32 `[pos_embed_max_size, D / 2]`.

    The whole table, `[max, max, D]`, has the width coordinate's features in its first half and the height
    coordinate's in the rest (diffusers' `PatchEmbed`). A new model starts from this; a public checkpoint brings its
    own.
    """
    size, base = config.pos_embed_max_size, config.sample_size // config.patch_size
    quarter = config.width // 4
    # The coordinate is rounded to float32, as the public tables are; all else is float64.
    coordinate = (np.arange(size, dtype=np.float32) / (size / base)).astype(np.float64)
    angles = np.outer(coordinate, 1.0 / 10000 ** (np.arange(quarter, dtype=np.float64) / quarter))
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)


def _positions(axis: jax.Array, height: int, width: int) -> jax.Array:
    """The table's centre crop for a grid, `[height * width, D]`, put together from `axis [max, D / 2]`."""
    top, left = ((axis.shape[0] - extent) // 2 for extent in (height, width))
    shape = (height, width, axis.shape[1])
    columns = jnp.broadcast_to(axis[left : left + width][None], shape)
    rows = jnp.broadcast_to(axis[top : top + height][:, None], shape)
    return jnp.concatenate([columns, rows], axis=2).reshape(height * width, -1)


def check_latent_size(config: TransformerConfig, height: int, width: int) -> None:
    """Refuses latent sizes that the patches or the position table cannot take.

    Raises:
      ValueError: naming the size, what was expected and the limit.
    """
    patch, limit = config.patch_size, config.pos_embed_max_size
    if height % patch or width % patch:
        raise ValueError(f"latent size {height}x{width} must be a multiple of the patch size {patch}")
    if max(height, width) // patch > limit:
        raise ValueError(
            f"latent size {height}x{width} needs {height // patch}x{width // patch} positions; "
            f"the position table holds {limit}x{limit} (pos_embed_max_size): use a smaller image"
        )


def _patchify(latents: jax.Array, patch: int) -> jax.Array:
    """`[..., H, W, C] -> [..., H/p * W/p, p * p * C]`, row-major, channel fastest."""
    *lead, height, width, channels = latents.shape
    rows, columns = height // patch, width // patch
    x = latents.reshape(*lead, rows, patch, columns, patch, channels)
    return jnp.swapaxes(x, -4, -3).reshape(*lead, rows * columns, patch * patch * channels)


def _unpatchify(tokens: jax.Array, height: int, width: int, patch: int) -> jax.Array:
    """Inverse of `_patchify`: `[B, S, p * p * C] -> [B, H, W, C]`."""
    batch = tokens.shape[0]
    x = tokens.reshape(batch, height // patch, width // patch, patch, patch, -1)
    return jnp.swapaxes(x, 2, 3).reshape(batch, height, width, -1)


def time_features(timesteps: jax.Array) -> jax.Array:
    """Sinusoid of times in [0, 1000]: float32 `[B] -> [B, 256]`, cosines first (DDPM)."""
    half = TIME_FEATURES // 2
    frequencies = np.exp(-np.log(10000.0) * np.arange(half) / half).astype(np.float32)
    angles = timesteps.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=1)


class _TwoLayer(nn.Module):
    """Linear, SiLU, Linear: the time embedding, and (with a last SiLU) the semantic adapters."""

    hidden: int
    features: int
    last_silu: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.silu(Dense(self.hidden, ("embed", "mlp"), dtype=self.dtype, name="up")(x))
        x = Dense(self.features, ("mlp", "embed"), dtype=self.dtype, name="down")(x)
        return nn.silu(x) if self.last_silu else x


class UniAlign(nn.Module):
    """The transformer. Parameters are made in float32; `dtype` is the compute dtype (float32 throughout by option).

    Attributes:
      config: shape of the network.
      dtype: compute dtype of matmuls and of the residual streams.
      remat: a key of `REMAT_POLICIES`.
      attention: see `attention.attend`.
      unroll: how many blocks one iteration of the loop over blocks holds. More than one compiles longer; on CPUs, where
        what the loop keeps for the backward pass is copied in and out of fresh memory, all of them run faster.
    """

    config: TransformerConfig
    dtype: jnp.dtype = jnp.bfloat16
    remat: str = "none"
    attention: str = "xla"
    unroll: int = 1

    @nn.compact
    def __call__(self, *passes: Pass, semantic_depth: int | None = None) -> list[Outputs]:
        """Forward passes, side by side: each block's weights, split over the mesh, are gathered once for all of them.

        Args:
          *passes: their inputs; they need not agree in anything.
          semantic_depth: number of blocks after which the adapters read the streams; None: no adapters.

        Returns:
          `Outputs` of each.

        Raises:
          ValueError: for sizes or a depth that the network does not have.
        """
        config = self.config
        dense = functools.partial(Dense, dtype=self.dtype)
        if semantic_depth is not None and not 1 <= semantic_depth <= config.num_layers:
            raise ValueError(
                f"semantic_depth {semantic_depth} lies outside the network's 1..{config.num_layers} blocks"
            )
        if self.remat not in REMAT_POLICIES:
            raise ValueError(f"remat policy {self.remat!r} is unknown; choose one of {sorted(REMAT_POLICIES)}")

        images, lengths = self._embed_images(passes)
        text_embed = dense(config.width, ("text_embed", "embed"), name="text_embed")
        texts = text_embed([item.text_states for item in passes])
        texts = [constrain(text, "batch", "sequence", None) for text in texts]
        time_embed = _TwoLayer(config.width, config.width, False, self.dtype, name="time_embed")
        contexts = []
        for item, length in zip(passes, lengths, strict=True):
            time = nn.silu(time_embed(time_features(item.timesteps)))
            segments = None
            if item.references is not None and item.reference_mask is not None:
                segments = _segments(length, item.reference_mask, item.text_states.shape[1])
            contexts.append(Context(time, segments, item.text_pool_mask))

        block = JointBlock
        if self.remat != "none":
            block = nn.remat(block, prevent_cse=False, policy=REMAT_POLICIES[self.remat])
        blocks = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=config.num_layers,
            unroll=self.unroll,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        pool = lengths if semantic_depth is not None else None
        carry, pooled = blocks(config, self.dtype, self.attention, pool, name="blocks")((images, texts), contexts)

        semantics = [(None, None)] * len(passes)
        if semantic_depth is not None:
            adapters = [
                _TwoLayer(config.adapter_hidden, config.semantic_dim, True, self.dtype, name=name)
                for name in ("image_adapter", "text_adapter")
            ]
            semantics = [
                tuple(
                    adapter(means[semantic_depth - 1]).astype(jnp.float32)
                    for adapter, means in zip(adapters, both, strict=True)
                )
                for both in pooled
            ]
        modulation = dense(2 * config.width, ("embed", "mlp"), kernel_init=ZEROS, name="image_modulation")
        features = config.patch_size**2 * config.out_channels
        image_head = dense(features, ("embed", None), kernel_init=ZEROS, name="image_head")
        text_head = dense(config.vocab_size, ("embed", "vocab"), name="text_head")
        outputs = []
        for item, image, text, context, length, semantic in zip(
            passes, *carry, contexts, lengths, semantics, strict=True
        ):
            image, velocity, logits = image[:, :length], None, None
            if item.latents is not None:
                scale, shift = jnp.split(modulation(context.time)[:, None], 2, axis=-1)
                image = (layer_norm(image) * (1 + scale) + shift).astype(self.dtype)
                if item.want_image:
                    tokens = image_head(image).astype(jnp.float32)
                    velocity = _unpatchify(tokens, *item.latents.shape[1:3], config.patch_size)
            text = layer_norm(text).astype(self.dtype)
            if item.want_text:
                logits = constrain(text_head(text).astype(jnp.float32), "batch", "sequence", "vocab")
            outputs.append(Outputs(velocity, logits, image, text, *semantic))
        return outputs

    def _embed_images(self, passes: Sequence[Pass]) -> tuple[list[jax.Array], tuple[int, ...]]:
        """Of each pass its tokens `[target | ref_1 | ... | ref_N]`, and the target's length.

        References share the target's positions.
        """
        config = self.config
        null_tokens = self.param(
            "null_image_tokens",
            nn.with_logical_partitioning(nn.initializers.normal(config.width**-0.5), (None, "embed")),
            (NUM_NULL_TOKENS, config.width),
            jnp.float32,
        )
        # Fixed, yet kept with the parameters: public checkpoints store the table, and theirs is the one to use.
        positions = self.param(
            "positions",
            nn.with_logical_partitioning(lambda key: jnp.asarray(axis_positions(config)), (None, None)),
        )
        patch_embed = Dense(config.width, (None, "embed"), dtype=self.dtype, name="patch_embed")
        out, lengths = [], []
        for item in passes:
            latents, references, batch = item.latents, item.references, len(item.text_states)
            if latents is None:
                if references is not None:
                    raise ValueError("references need a target image: pass latents, or leave references out")
                out.append(jnp.broadcast_to(null_tokens.astype(self.dtype), (batch, *null_tokens.shape)))
                lengths.append(NUM_NULL_TOKENS)
                continue
            check_latent_size(config, *latents.shape[1:3])
            images = latents[:, None]
            if references is not None:
                if references.shape[2:] != latents.shape[1:]:
                    raise ValueError(
                        f"references are {references.shape[2:]} but the target is {latents.shape[1:]}; "
                        "all images of a sample must have one size"
                    )
                images = jnp.concatenate([images, references], axis=1)
            patches = _patchify(images, config.patch_size)
            grid = (latents.shape[1] // config.patch_size, latents.shape[2] // config.patch_size)
            tokens = (patch_embed(patches) + _positions(jax.lax.stop_gradient(positions), *grid)).astype(self.dtype)
            out.append(constrain(tokens.reshape(batch, -1, config.width), "batch", "sequence", None))
            lengths.append(patches.shape[2])
        return out, tuple(lengths)


def _segments(target_length: int, reference_mask: jax.Array, text_length: int) -> jax.Array:
    """Segment ids int32 `[B, (1 + N) * S + T]` of image and text tokens as `join_tokens` has them: 1 for what is there,
    0 for the tokens of absent references.
    """
    batch = reference_mask.shape[0]
    target = jnp.ones((batch, target_length), jnp.int32)
    references = jnp.repeat(reference_mask.astype(jnp.int32), target_length, axis=1)
    images = jnp.concatenate([target, references], axis=1)
    return join_tokens([images, jnp.ones((batch, text_length), jnp.int32)])
