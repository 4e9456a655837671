"""The one attention entry point. Backends stand behind a small registry; masks have one form, segment ids."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from unialign_jax.models.layers import matmul_precision

AttentionFn = Callable[[jax.Array, jax.Array, jax.Array, jax.Array | None], jax.Array]


def attend(
    query: jax.Array, key: jax.Array, value: jax.Array, segments: jax.Array | None = None, *, backend: str = "xla"
) -> jax.Array:
    """Bidirectional softmax attention at scale `head_dim ** -0.5`.

    Args:
      query, key, value: `[B, S, H, D]`, bfloat16 or float32.
      segments: None (every token attends to every token) or int32 `[B, S]`; a token attends to the tokens of its own
        segment. Padding and absent references carry a segment of their own, so real tokens never see them.
      backend: a key of `BACKENDS`.

    Returns:
      `[B, S, H, D]` in the query's dtype; the softmax is taken in float32.

    Raises:
      ValueError: for an unknown backend.
    """
    if backend not in BACKENDS:
        raise ValueError(f"attention backend {backend!r} is unknown; choose one of {sorted(BACKENDS)}")
    return BACKENDS[backend](query, key, value, segments)


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


BACKENDS: dict[str, AttentionFn] = {"xla": _xla}
