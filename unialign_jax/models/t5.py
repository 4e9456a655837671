"""T5 v1.1's encoder: SD3's text encoder (`text_encoder_3`) and, in a small configuration, one trained from scratch.

Raffel et al., arXiv 1910.10683; v1.1 gates the MLP (Shazeer, arXiv 2002.05202). The public counterpart is the class
`T5EncoderModel` of `transformers`.
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from unialign_jax.models.layers import Dense, RMSNorm, matmul_precision
from unialign_jax.parallel import constrain, in_parts

_WEIGHTS_BYTES = 2**25  # of attention weights at a time: two samples of 256 tokens with 64 heads


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Shape of the encoder; field names are those of the public `text_encoder/config.json`. The defaults are T5-XXL.

    Raises:
      ValueError: if the relative position buckets contradict each other.
    """

    vocab_size: int = 32128
    d_model: int = 4096
    d_kv: int = 64
    d_ff: int = 10240
    num_layers: int = 24
    num_heads: int = 64
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6

    def __post_init__(self):
        buckets, distance = self.relative_attention_num_buckets, self.relative_attention_max_distance
        if buckets < 4 or buckets % 2:
            raise ValueError(f"relative_attention_num_buckets is {buckets}; it must be even and at least 4")
        if distance <= buckets // 4:
            raise ValueError(
                f"relative_attention_max_distance is {distance}; with {buckets} buckets it must exceed {buckets // 4}, "
                "the distances that have a bucket of their own"
            )


def relative_position_buckets(length: int, config: T5Config) -> np.ndarray:
    """Bucket of each (query, key) pair's distance, int32 `[length, length]` in `[0, num_buckets)`.

    Keys after the query use the upper half of the buckets. In each half, the first half of the buckets hold one
    distance each, the rest grow logarithmically up to `relative_attention_max_distance`, and the last one takes all
    that is farther (arXiv 1910.10683, section 2.1).
    """
    half = config.relative_attention_num_buckets // 2
    exact = half // 2
    steps, limit = half - exact, config.relative_attention_max_distance

    def one_side(distance: int) -> int:
        if distance < exact:
            return distance
        # floor(steps * log(distance / exact) / log(limit / exact)), in integers: powers of two fall on its jumps,
        # where a rounded logarithm may land on either side.
        return exact + sum(distance**steps * exact**k >= limit**k * exact**steps for k in range(1, steps))

    table = np.array([one_side(distance) for distance in range(length)], np.int32)
    offset = np.arange(length)[None, :] - np.arange(length)[:, None]
    return (table[np.abs(offset)] + half * (offset > 0)).astype(np.int32)


def _normal(fan: int) -> nn.initializers.Initializer:
    """T5's own initial scale. Attention has no `d_kv ** -0.5`: the queries' kernel carries it instead."""
    return nn.initializers.normal(fan**-0.5)


class _Table(nn.Module):
    """A lookup table: `ids [...] -> float32 [..., features]`; an id past the end gives NaN, never another's row."""

    rows: int
    features: int
    axes: tuple[str | None, str | None]
    init: nn.initializers.Initializer

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        init = nn.with_logical_partitioning(self.init, self.axes)
        table = self.param("embedding", init, (self.rows, self.features), jnp.float32)
        return jnp.take(table, ids, axis=0)


class _Block(nn.Module):
    """Self-attention and gated MLP, both pre-norm, on a residual stream kept in float32."""

    config: T5Config
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, bias: jax.Array):
        config = self.config
        width, inner = config.d_model, config.num_heads * config.d_kv
        dense = functools.partial(Dense, use_bias=False, dtype=self.dtype)
        norm = functools.partial(RMSNorm, config.layer_norm_epsilon, self.dtype)

        y = norm(name="attention_norm")(x)
        query, key, value = (
            dense(inner, ("embed", "heads"), kernel_init=_normal(fan), name=name)(y).reshape(
                *y.shape[:-1], config.num_heads, config.d_kv
            )
            for name, fan in (("query", width * config.d_kv), ("key", width), ("value", width))
        )
        y = _attend(query, key, value, bias).reshape(*y.shape[:-1], inner)
        x = x + dense(width, ("heads", "embed"), kernel_init=_normal(inner), name="out")(y)

        y = norm(name="mlp_norm")(x)
        gate = dense(config.d_ff, ("embed", "mlp"), kernel_init=_normal(width), name="gate")(y)
        up = dense(config.d_ff, ("embed", "mlp"), kernel_init=_normal(width), name="up")(y)
        y = nn.gelu(gate, approximate=True) * up
        x = x + dense(width, ("mlp", "embed"), kernel_init=_normal(config.d_ff), name="down")(y)
        return constrain(x, "batch", "sequence", None), None


def _attend(query: jax.Array, key: jax.Array, value: jax.Array, bias: jax.Array) -> jax.Array:
    """Unscaled softmax attention of `[B, T, H, d_kv]` with an added float32 bias `[H, T, T]`.

    It stands beside `attention.attend`, whose kernels take no bias. Weights are made for so many samples at a time as
    a TPU's vector memory can hold: those of T5-XXL's 64 heads for a whole batch would go through its main memory.
    """
    precision = matmul_precision(query.dtype)

    def some(rows: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        query, key, value = rows
        logits = jnp.einsum("bqhd,bkhd->bhqk", query, key, precision=precision, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(logits + bias, axis=-1).astype(query.dtype)
        return jnp.einsum("bhqk,bkhd->bqhd", weights, value, precision=precision)

    return in_parts(some, (query, key, value), max(_WEIGHTS_BYTES // (4 * bias.size), 1))


class T5Encoder(nn.Module):
    """The encoder. There is no attention mask: padding is attended to, as the published model does.

    Parameters are made in float32, at T5's own scales. The residual stream, norms and softmax are float32 whatever
    the compute dtype: T5-XXL's stream grows to values at which bfloat16 would drop what later blocks add.

    Attributes:
      config: shape of the network.
      dtype: compute dtype of the matmuls, and dtype of the result.
    """

    config: T5Config
    dtype: jnp.dtype = jnp.bfloat16

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        """Token ids int32 `[B, T]` in `[0, vocab_size)` -> states `[B, T, d_model]` in `dtype`, after the final norm.

        An id of `vocab_size` or more gives NaN states.
        """
        config = self.config
        width, heads, buckets = config.d_model, config.num_heads, config.relative_attention_num_buckets
        x = _Table(config.vocab_size, width, ("vocab", "embed"), nn.initializers.normal(1.0), name="token_embed")(ids)
        x = constrain(x, "batch", "sequence", None)
        bias = _Table(buckets, heads, (None, None), _normal(width), name="relative_bias")(
            relative_position_buckets(ids.shape[1], config)
        )
        blocks = nn.scan(
            _Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=config.num_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        x, _ = blocks(config, self.dtype, name="blocks")(x, jnp.moveaxis(bias, -1, 0))
        return RMSNorm(config.layer_norm_epsilon, self.dtype, name="final_norm")(x)
