"""Building blocks shared by the networks: a linear layer with named axes, and the norms."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp


def matmul_precision(dtype: jnp.dtype) -> jax.lax.Precision | None:
    """Full precision when float32 was asked for: TPUs and GPUs would round float32 inputs of a matmul otherwise."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


class Dense(nn.Module):
    """Linear layer `[..., in] -> [..., features]` whose parameters carry logical axis names.

    Attributes:
      features: output width.
      axes: logical names of the kernel's (input, output) axes, see `parallel.RULES`.
      use_bias: whether to add `bias [features]`.
      dtype: compute dtype; parameters are float32.
      kernel_init: initializer of `kernel [in, features]`.
    """

    features: int
    axes: tuple[str | None, str | None]
    use_bias: bool = True
    dtype: jnp.dtype = jnp.bfloat16
    kernel_init: Callable = nn.initializers.xavier_uniform()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param(
            "kernel",
            nn.with_logical_partitioning(self.kernel_init, self.axes),
            (x.shape[-1], self.features),
            jnp.float32,
        )
        y = jnp.dot(x.astype(self.dtype), kernel.astype(self.dtype), precision=matmul_precision(self.dtype))
        if self.use_bias:
            bias = self.param(
                "bias",
                nn.with_logical_partitioning(nn.initializers.zeros_init(), self.axes[1:]),
                (self.features,),
                jnp.float32,
            )
            y = y + bias.astype(self.dtype)
        return y


class RMSNorm(nn.Module):
    """Root-mean-square norm with a learned scale, no mean, no bias (T5, SD3.5's q/k norms, Qwen2.5-VL).

    The mean square is taken in float32 whatever the input's dtype; the output has `dtype`.
    """

    epsilon: float = 1e-6
    dtype: jnp.dtype = jnp.bfloat16
    axis: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param(
            "scale",
            nn.with_logical_partitioning(nn.initializers.ones_init(), (self.axis,)),
            (x.shape[-1],),
            jnp.float32,
        )
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.epsilon)
        return (x * scale).astype(self.dtype)


def layer_norm(x: jax.Array, epsilon: float = 1e-6) -> jax.Array:
    """LayerNorm over the last axis without learned affine, in float32: `[..., D] -> float32 [..., D]`."""
    x = x.astype(jnp.float32)
    mean = jnp.mean(x, axis=-1, keepdims=True)
    centred = x - mean
    return centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + epsilon)


def mean_tokens(x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Mean over the tokens `[B, S, D] -> float32 [B, D]`: of all, or of those where `mask` (bool `[B, S]`) is True."""
    if mask is None:
        return jnp.mean(x, axis=1, dtype=jnp.float32)
    kept = mask[..., None]
    return jnp.sum(jnp.where(kept, x, 0), axis=1, dtype=jnp.float32) / jnp.sum(kept, axis=1)
