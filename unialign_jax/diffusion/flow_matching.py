"""Flow matching on image latents: noise, loss, sampler. It knows a callable that predicts velocities, not a network.

x_sigma = (1 - sigma) x0 + sigma noise, velocity = noise - x0 (SD3, arXiv 2403.03206, section 3; UniAlignment's image
pass). Times are t = 1000 sigma.
"""

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

NUM_TRAIN_TIMES = 1000
LOSS_SPACES = ("x0", "velocity")

Velocity = Callable[[jax.Array, jax.Array, Any], jax.Array]


def logit_normal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """`sigmoid(N(0, 1))` draws, float32 in (0, 1) (SD3 section 3.1, location 0 and scale 1)."""
    return jax.nn.sigmoid(jax.random.normal(key, shape))


def noise_levels(u: jax.Array) -> jax.Array:
    """Draws `u` in (0, 1) -> sigma in {1/1000 .. 1}, float32: the training times are the 1000 discrete ones."""
    index = jnp.clip(jnp.floor(u * NUM_TRAIN_TIMES), 0, NUM_TRAIN_TIMES - 1)
    return (NUM_TRAIN_TIMES - index) / NUM_TRAIN_TIMES


def shift_levels(sigma: Any, shift: float) -> Any:
    """Noise levels moved toward noise, `shift sigma / (1 + (shift - 1) sigma)` (SD3 section 5.3.2); 1 moves nothing."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def _per_sample(sigma: jax.Array, like: jax.Array) -> jax.Array:
    return sigma.reshape(sigma.shape + (1,) * (like.ndim - sigma.ndim))


def add_noise(clean: jax.Array, noise: jax.Array, sigma: jax.Array) -> jax.Array:
    """`[B, ...]` latents at noise level `sigma [B]`."""
    sigma = _per_sample(sigma, clean)
    return (1 - sigma) * clean + sigma * noise


def clean_estimate(noisy: jax.Array, velocity: jax.Array, sigma: jax.Array) -> jax.Array:
    """The x0 that a velocity points to: `[B, ...]`, float32."""
    return noisy - _per_sample(sigma, noisy) * velocity


def loss(velocity: jax.Array, noisy: jax.Array, clean: jax.Array, sigma: jax.Array, *, space: str = "x0") -> jax.Array:
    """Mean squared error of the estimate, a float32 scalar.

    Args:
      velocity: predicted, `[B, ...]`.
      noisy, clean: latents at `sigma` and at 0, float32 `[B, ...]`.
      sigma: noise levels above 0, float32 `[B]`.
      space: a member of `LOSS_SPACES`: "x0" compares clean latents (published), "velocity" velocities. As the error of
        x0 is sigma times that of the velocity, the second weighs a sample 1 / sigma^2 times as much.
    """
    error = clean_estimate(noisy, velocity.astype(jnp.float32), sigma) - clean
    if space == "velocity":
        error = error / _per_sample(sigma, error)
    return jnp.mean(jnp.square(error))


def euler_sigmas(num_steps: int, shift: float = 3.0) -> np.ndarray:
    """Noise levels of an Euler sampler, float32 `[num_steps + 1]`, from 1 down to 0.

    diffusers' `FlowMatchEulerDiscreteScheduler` with `shift`: levels are spread evenly between 1 and the shifted
    1/1000, then shifted (again), sigma' = shift sigma / (1 + (shift - 1) sigma), and a final 0 is appended.

    Raises:
      ValueError: if num_steps < 1 or shift <= 0.
    """
    if num_steps < 1 or shift <= 0:
        raise ValueError(f"num_steps must be at least 1 and shift above 0, not {num_steps} and {shift}")

    # The public scheduler keeps its table in float32 and spreads the steps over times in [0, 1000].
    lowest = shift_levels(np.float32(1 / NUM_TRAIN_TIMES), shift)
    times = np.linspace(NUM_TRAIN_TIMES, np.float32(lowest * NUM_TRAIN_TIMES), num_steps)
    return np.append(shift_levels(times / NUM_TRAIN_TIMES, shift), 0).astype(np.float32)


def check_interval(interval: Any) -> None:
    """Refuses what is no interval of noise levels `(low, high)` in [0, 1].

    Raises:
      ValueError: naming it.
    """
    numbers = isinstance(interval, Sequence) and all(isinstance(x, int | float) for x in interval)
    if not numbers or len(interval) != 2 or not 0 <= interval[0] <= interval[1] <= 1:
        raise ValueError(f"guidance_interval is {interval!r}; expected two noise levels, 0 <= low <= high <= 1")


def guided_runs(
    sigmas: np.ndarray, interval: tuple[float, float] = (0.0, 1.0), *, guided: bool = True
) -> list[tuple[int, int, bool]]:
    """The steps of a sampler as runs `(start, stop, is_guided)` of equal kind: guidance acts where sigma lies in
    `interval` (arXiv 2404.07724), and nowhere if not `guided`. All of it is known before tracing.
    """
    low, high = interval
    kinds = [guided and bool(low <= sigma <= high) for sigma in sigmas[:-1]]
    runs = [list(run) for _, run in groupby(range(len(kinds)), key=kinds.__getitem__)]
    return [(run[0], run[-1] + 1, kinds[run[0]]) for run in runs]


def guide(velocity: Velocity, conditions: Sequence[Any], scales: Sequence[Any]) -> Callable:
    """Classifier-free guidance on a chain of conditions, from the weakest to the full one, evaluated as one batch.

    The result is `v_0 + sum_k scales[k - 1] (v_k - v_(k-1))`. One scale on (negative, full) is the usual guidance; two
    on (nothing, references alone, references and text) are InstructPix2Pix's (arXiv 2211.09800, section 3.2.1).

    Args:
      velocity: `(latents [B, ...], timesteps [B] in [0, 1000], condition) -> velocity [B, ...]`.
      conditions: one or more pytrees of arrays `[B, ...]`, alike in structure.
      scales: one fewer; numbers or float32 scalars.

    Returns:
      `(latents [B, ...], timesteps [B]) -> velocity [B, ...]`, float32.
    """
    count = len(conditions)
    joined = conditions[0] if count == 1 else jax.tree.map(lambda *leaves: _interleave(leaves), *conditions)

    def guided(latents, times):
        repeated = latents, times
        if count > 1:
            repeated = (_interleave([array] * count) for array in repeated)
        made = velocity(*repeated, joined).astype(jnp.float32)
        steps = jnp.moveaxis(made.reshape(len(latents), count, *latents.shape[1:]), 1, 0)
        out = steps[0]
        for scale, weaker, stronger in zip(scales, steps[:-1], steps[1:], strict=True):
            out = out + scale * (stronger - weaker)
        return out

    return guided


def euler(predict: Callable, latents: jax.Array, sigmas: jax.Array, start: Any, stop: Any) -> jax.Array:
    """Euler steps `start` to `stop` (exclusive) over noise levels `sigmas [N + 1]`, one network evaluation each.

    `start` and `stop` may be traced: one compiled program serves any number of steps.

    Args:
      predict: `(latents [B, ...], timesteps [B] in [0, 1000]) -> velocity [B, ...]`.
      latents: at noise level `sigmas[start]`.

    Returns:
      Latents at `sigmas[stop]`, float32.
    """
    sigmas = jnp.asarray(sigmas, jnp.float32)

    def step(i, latents):
        times = jnp.full((len(latents),), sigmas[i] * NUM_TRAIN_TIMES)
        return latents + (sigmas[i + 1] - sigmas[i]) * predict(latents, times).astype(jnp.float32)

    return jax.lax.fori_loop(start, stop, step, latents.astype(jnp.float32))


def _interleave(arrays: Sequence[jax.Array]) -> jax.Array:
    """K arrays `[B, ...]` -> `[K B, ...]`, row by row: a batch that is split over devices stays where it is."""
    return jnp.stack(arrays, axis=1).reshape(-1, *arrays[0].shape[1:])
