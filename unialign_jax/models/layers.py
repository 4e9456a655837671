"""Building blocks shared by the networks: a linear layer with named axes, and the norms."""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from unialign_jax.parallel import gathered, weight_gradient

# Name of every linear layer's product, for `jax.checkpoint` policies by name.
PRODUCTS = "products"


def matmul_precision(dtype: jnp.dtype) -> jax.lax.Precision | None:
    """Full precision when float32 was asked for: TPUs and GPUs would round float32 inputs of a matmul otherwise."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _matmul(xs: tuple[jax.Array, ...], kernel: jax.Array, axes: tuple[str | None, str | None]) -> tuple[jax.Array, ...]:
    """`x [..., in] @ kernel [in, out]` of each x, with the parallel plan's collectives, forward and backward.

    The kernel is gathered once for all of them, and their gradients of it are reduced together. Only its parts are kept
    for the backward pass, which gathers them again.
    """
    whole = gathered(kernel, axes)
    return tuple(jnp.dot(x, whole, precision=matmul_precision(x.dtype)) for x in xs)


def _matmul_forward(xs, kernel, axes):
    return _matmul(xs, kernel, axes), (xs, kernel)


def _matmul_backward(axes, kept, gradients):
    xs, kernel = kept
    whole = gathered(kernel, axes).T
    back = tuple(jnp.dot(gradient, whole, precision=matmul_precision(gradient.dtype)) for gradient in gradients)
    return back, weight_gradient(xs, gradients, axes)


_matmul.defvjp(_matmul_forward, _matmul_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def spread(x: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """`x`, of a bias `[D]` or a gate `[B, 1, D]`, broadcast to `shape` in `dtype`; its gradient is summed in float32,
    that of a bias over samples: within one in `dtype`.

    The transpose of a plain broadcast sums in `dtype`: of tens of thousands of bfloat16 tokens that push into one
    direction, as those of biases do, it loses per cents, on CPUs up to half.
    """
    return jnp.broadcast_to(x.astype(dtype), shape)


def _spread_forward(x, shape, dtype):
    return spread(x, shape, dtype), x


def _spread_backward(shape, dtype, x, gradient):
    if x.ndim == 1 and len(shape) > 2:
        # Within a sample in `dtype`: in float32, XLA for TPUs would part it from other work, which costs 1 % of a step.
        gradient = jax.lax.reduce_sum(gradient, tuple(range(1, len(shape) - 1)))
        return (jnp.sum(gradient, 0, jnp.float32).astype(x.dtype),)
    axes = tuple(i for i, size in enumerate(shape) if i < len(shape) - x.ndim or x.shape[i - len(shape)] != size)
    return (jnp.sum(gradient, axes, jnp.float32).reshape(x.shape).astype(x.dtype),)


spread.defvjp(_spread_forward, _spread_backward)


class Dense(nn.Module):
    """Linear layer `[..., in] -> [..., features]` whose parameters carry logical axis names.

    Of a list of inputs it makes a list: over a mesh the kernel is gathered, and its gradient reduced, once for all.

    Attributes:
      features: output width.
      axes: logical names of the kernel's (input, output) axes, see `parallel.RULES`.
      use_bias: whether to add `bias [features]`.
      dtype: compute dtype; parameters are made in float32.
      kernel_init: initializer of `kernel [in, features]`.
    """

    features: int
    axes: tuple[str | None, str | None]
    use_bias: bool = True
    dtype: jnp.dtype = jnp.bfloat16
    kernel_init: Callable = nn.initializers.xavier_uniform()

    @nn.compact
    def __call__(self, x: jax.Array | list[jax.Array]) -> jax.Array | list[jax.Array]:
        xs = x if isinstance(x, list) else [x]
        kernel = self.param(
            "kernel",
            nn.with_logical_partitioning(self.kernel_init, self.axes),
            (xs[0].shape[-1], self.features),
            jnp.float32,
        )
        products = _matmul(tuple(x.astype(self.dtype) for x in xs), kernel.astype(self.dtype), self.axes)
        ys = [checkpoint_name(y, PRODUCTS) for y in products]
        if self.use_bias:
            bias = self.param(
                "bias",
                nn.with_logical_partitioning(nn.initializers.zeros_init(), self.axes[1:]),
                (self.features,),
                jnp.float32,
            )
            ys = [y + spread(bias, y.shape, self.dtype) for y in ys]
        return ys if isinstance(x, list) else ys[0]


class RMSNorm(nn.Module):
    """Root-mean-square norm with a learned scale, no mean, no bias (T5, SD3.5's q/k norms, Qwen2.5-VL).

    The mean square is taken in float32 whatever the input's dtype; the output has `dtype`.
    """

    epsilon: float = 1e-6
    dtype: jnp.dtype = jnp.bfloat16

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.with_logical_partitioning(nn.initializers.ones_init(), (None,))
        scale = self.param("scale", init, (x.shape[-1],), jnp.float32)
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.epsilon)
        return (x * scale).astype(self.dtype)


def layer_norm(x: jax.Array) -> jax.Array:
    """LayerNorm over the last axis without learned affine, in float32: `[..., D] -> float32 [..., D]`."""
    x = x.astype(jnp.float32)
    mean = jnp.mean(x, axis=-1, keepdims=True)
    centred = x - mean
    return centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + 1e-6)


def mean_tokens(x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Mean over the tokens `[B, S, D] -> float32 [B, D]`: of all, or of those where `mask` (bool `[B, S]`) is True.

    Of no tokens it is 0.
    """
    if mask is None:
        return jnp.mean(x, axis=1, dtype=jnp.float32)
    kept = mask[..., None]
    return jnp.sum(jnp.where(kept, x, 0), axis=1, dtype=jnp.float32) / jnp.maximum(jnp.sum(kept, axis=1), 1)
