"""The transformer's blocks: two streams, of image and text tokens, joined by one softmax (SD3's MMDiT).

Computation: arXiv 2403.03206, section 4, and the public implementation of arXiv 2509.23760.
"""

import dataclasses
import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from unialign_jax.models.attention import attend, join_tokens, split_tokens
from unialign_jax.models.attention_kernels import KEPT
from unialign_jax.models.layers import PRODUCTS, Dense, RMSNorm, layer_norm, mean_tokens, spread
from unialign_jax.parallel import constrain

# From-scratch training starts with blocks that are the identity and a velocity of zero (adaLN-Zero, DiT section 3.2).
ZEROS = nn.initializers.zeros_init()

_MLP = "mlp"  # name of what an MLP adds to its stream before the gate: only the gate's gradient reads it again

# What a block keeps for the backward pass. Memory and recomputation of each: docs/training.md.
REMAT_POLICIES = {
    "none": None,  # everything is kept
    # Results of linear layers and of the attention kernel are kept; norms and activations are done again.
    "dots+attention": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.save_only_these_names(PRODUCTS), KEPT
    ),
    "dots": jax.checkpoint_policies.save_only_these_names(PRODUCTS),  # attention is done again too
    # A third of what "attention" does again is the MLP's second product.
    "attention+mlp": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.save_only_these_names(_MLP), KEPT
    ),
    "attention": KEPT,  # linear layers are done again
    "full": jax.checkpoint_policies.nothing_saveable,  # only the block's inputs are kept
}


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Shape of the transformer; field names are those of the public `transformer/config.json`.

    The defaults are SD3-medium grown into UniAlignment (2.124 B parameters). `qk_norm` is None (SD3-medium) or
    "rms_norm" (SD3.5's RMS norms on queries and keys).

    Raises:
      ValueError: if the fields contradict each other or name something the network cannot do.
    """

    sample_size: int = 128
    patch_size: int = 2
    in_channels: int = 16
    num_layers: int = 24
    attention_head_dim: int = 64
    num_attention_heads: int = 24
    joint_attention_dim: int = 4096
    caption_projection_dim: int = 1536
    out_channels: int = 16
    pos_embed_max_size: int = 192
    vocab_size: int = 32100
    adapter_hidden: int = 2048
    semantic_dim: int = 3584
    mask_token_id: int = 32099
    qk_norm: str | None = None

    def __post_init__(self):
        if self.caption_projection_dim != self.width:
            raise ValueError(
                f"caption_projection_dim is {self.caption_projection_dim}, but both streams are "
                f"num_attention_heads x attention_head_dim = {self.width} wide; make them equal"
            )
        if self.width % 4:
            raise ValueError(f"width {self.width} must be a multiple of 4: the position table has four quarters")
        if self.qk_norm not in (None, "rms_norm"):
            raise ValueError(f"qk_norm is {self.qk_norm!r}; this network knows None and 'rms_norm'")
        if not 0 <= self.mask_token_id < self.vocab_size:
            raise ValueError(f"mask_token_id {self.mask_token_id} lies outside the vocabulary of {self.vocab_size}")

    @property
    def width(self) -> int:
        """Width D of both streams."""
        return self.num_attention_heads * self.attention_head_dim


class _Modulation(NamedTuple):
    """What a block's modulation makes of a pass's time, for one stream; `[B, 1, D]` each."""

    attention_shift: jax.Array
    attention_scale: jax.Array
    attention_gate: jax.Array
    mlp_shift: jax.Array
    mlp_scale: jax.Array
    mlp_gate: jax.Array


class _Stream(nn.Module):
    """One modality's half of a joint block: its modulation, projections and MLP. Lists hold one array for each pass."""

    config: TransformerConfig
    dtype: jnp.dtype

    def setup(self):
        width = self.config.width
        dense = functools.partial(Dense, dtype=self.dtype)
        self.modulation = dense(6 * width, ("embed", "mlp"), kernel_init=ZEROS)
        self.query, self.key, self.value = (dense(width, ("embed", "heads")) for _ in range(3))
        self.out = dense(width, ("heads", "embed"))
        self.mlp_up = dense(4 * width, ("embed", "mlp"))
        self.mlp_down = dense(width, ("mlp", "embed"))
        if self.config.qk_norm == "rms_norm":
            self.query_norm = RMSNorm(dtype=self.dtype)
            self.key_norm = RMSNorm(dtype=self.dtype)

    def modulate(self, times: list[jax.Array]) -> list[_Modulation]:
        """Of embedded times `[B, D]`."""
        return [_Modulation(*jnp.split(vectors[:, None], 6, axis=-1)) for vectors in self.modulation(times)]

    def project(
        self, xs: list[jax.Array], modulations: list[_Modulation]
    ) -> list[tuple[jax.Array, jax.Array, jax.Array]]:
        """Queries, keys and values of the normed, modulated tokens, each `[B, S, heads, head_dim]`."""
        xs = [self._norm(x, m.attention_shift, m.attention_scale) for x, m in zip(xs, modulations, strict=True)]
        queries, keys, values = (layer(xs) for layer in (self.query, self.key, self.value))
        return [self._heads(*three) for three in zip(queries, keys, values, strict=True)]

    def update(self, xs: list[jax.Array], attended: list[jax.Array], modulations: list[_Modulation]) -> list[jax.Array]:
        """Adds the gated attention output and the gated MLP to the residual streams `[B, S, D]`."""
        outs = self.out([a.reshape(x.shape) for a, x in zip(attended, xs, strict=True)])
        xs = [
            x + spread(m.attention_gate, x.shape, self.dtype) * out
            for x, out, m in zip(xs, outs, modulations, strict=True)
        ]
        ys = self.mlp_up([self._norm(x, m.mlp_shift, m.mlp_scale) for x, m in zip(xs, modulations, strict=True)])
        ys = self.mlp_down([constrain(nn.gelu(y, approximate=True), "batch", "sequence", "mlp") for y in ys])
        return [
            constrain(x + spread(m.mlp_gate, x.shape, self.dtype) * checkpoint_name(y, _MLP), "batch", "sequence", None)
            for x, y, m in zip(xs, ys, modulations, strict=True)
        ]

    def _norm(self, x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
        return (layer_norm(x) * (1 + scale) + shift).astype(self.dtype)

    def _heads(self, query: jax.Array, key: jax.Array, value: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        heads = (*query.shape[:-1], self.config.num_attention_heads, self.config.attention_head_dim)
        query, key, value = (x.reshape(heads) for x in (query, key, value))
        if self.config.qk_norm == "rms_norm":
            query, key = self.query_norm(query), self.key_norm(key)
        return tuple(constrain(x, "batch", "sequence", "heads", None) for x in (query, key, value))


class Context(NamedTuple):
    """What all blocks read of one pass, besides its streams.

    time: embedded, `[B, D]`.
    segments: ids int32 `[B, S]` of all tokens as `join_tokens` has them, see `attend`; None: all attend to all.
    text_pool_mask: bool `[B, T]`, the text tokens whose mean is taken; None: all.
    """

    time: jax.Array
    segments: jax.Array | None
    text_pool_mask: jax.Array | None


class JointBlock(nn.Module):
    """Both streams of each pass, joined by one softmax over `[image | text]`; passes do not see each other."""

    config: TransformerConfig
    dtype: jnp.dtype
    attention: str
    target_lengths: tuple[int, ...] | None  # of each pass, image tokens whose mean comes back as well; None: no means

    @nn.compact
    def __call__(self, carry: tuple[list[jax.Array], list[jax.Array]], contexts: list[Context]):
        """The streams `[B, S, D]` of image and text, each a list over passes -> the same, and the means `[B, D]`."""
        streams = [_Stream(self.config, self.dtype, name=name) for name in ("image", "text")]
        modulations = [stream.modulate([context.time for context in contexts]) for stream in streams]
        projected = [s.project(xs, m) for s, xs, m in zip(streams, carry, modulations, strict=True)]
        attended = []
        for image, text, context in zip(*projected, contexts, strict=True):
            # Kept as products are: the backward pass reads them joined.
            joined = [checkpoint_name(join_tokens(pair), PRODUCTS) for pair in zip(image, text, strict=True)]
            joint = attend(*joined, context.segments, backend=self.attention)
            attended.append(split_tokens(joint, [image[0].shape[1], text[0].shape[1]]))
        parts = [list(part) for part in zip(*attended, strict=True)]
        carry = tuple(s.update(xs, p, m) for s, xs, p, m in zip(streams, carry, parts, modulations, strict=True))
        if self.target_lengths is None:
            return carry, None
        return carry, [
            (mean_tokens(image[:, :length]), mean_tokens(text, context.text_pool_mask))
            for image, text, context, length in zip(*carry, contexts, self.target_lengths, strict=True)
        ]
