"""Flow matching on image latents: noise, loss, sampler. It knows a callable that predicts velocities, not a network.

x_sigma = (1 - sigma) x0 + sigma noise, velocity = noise - x0 (SD3, arXiv 2403.03206, section 3; UniAlignment's image
pass). Times are t = 1000 sigma.
"""

from collections.abc import Callable
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


def _interleave(first: jax.Array, second: jax.Array) -> jax.Array:
    """Two `[B, ...]` -> `[2 B, ...]`, row by row: a batch that is split over devices stays where it is."""
    return jnp.stack([first, second], axis=1).reshape(-1, *first.shape[1:])


def sample(
    velocity: Velocity,
    noise: jax.Array,
    condition: Any,
    sigmas: np.ndarray,
    *,
    negative: Any = None,
    guidance_scale: float = 1.0,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
) -> jax.Array:
    """Euler sampling with classifier-free guidance: one traced program, `len(sigmas) - 1` network evaluations.

    Guided steps evaluate negative and condition at once, as one batch of twice the size, and follow
    `v_negative + guidance_scale (v_condition - v_negative)`; the other steps evaluate `condition` alone.

    Args:
      velocity: `(latents [B, ...], timesteps [B] in [0, 1000], condition) -> velocity [B, ...]`.
      noise: starting latents at sigma 1, `[B, ...]`.
      condition: pytree of arrays `[B, ...]` handed to `velocity` (text states, references, ...).
      sigmas: static noise levels `[N + 1]` from `euler_sigmas`.
      negative: pytree like `condition`, for guidance (the negative prompt's); None: no guidance.
      guidance_scale: 1 is no guidance; the published values are 7 (generation) and 9 (editing).
      guidance_interval: guidance acts where sigma lies in it (arXiv 2404.07724); all steps by default.

    Returns:
      Latents at sigma 0, float32 `[B, ...]`.

    Raises:
      ValueError: if guidance_scale is not 1 but there is no `negative`.
    """
    if guidance_scale != 1.0 and negative is None:
        raise ValueError(f"guidance_scale {guidance_scale} needs the negative condition; pass negative, or scale 1")
    batch = noise.shape[0]
    low, high = guidance_interval
    both = None
    if negative is not None and guidance_scale != 1.0:
        both = jax.tree.map(_interleave, negative, condition)

    def plain(latents, time):
        return velocity(latents, jnp.full((batch,), time), condition)

    def guided(latents, time):
        doubled = velocity(_interleave(latents, latents), jnp.full((2 * batch,), time), both)
        v_negative, v_condition = jnp.moveaxis(doubled.astype(jnp.float32).reshape(batch, 2, *latents.shape[1:]), 1, 0)
        return v_negative + guidance_scale * (v_condition - v_negative)

    # Which steps are guided is known before tracing, so each run of equal steps is one scan without branches.
    steps = [
        (both is not None and low <= now <= high, now, after) for now, after in zip(sigmas, sigmas[1:], strict=False)
    ]
    latents = noise.astype(jnp.float32)
    for is_guided, run in groupby(steps, key=lambda step: step[0]):
        predict = guided if is_guided else plain

        def euler(latents, step, predict=predict):
            now, after = step
            return latents + (after - now) * predict(latents, now * NUM_TRAIN_TIMES).astype(jnp.float32), None

        levels = np.array([step[1:] for step in run], np.float32)
        latents, _ = jax.lax.scan(euler, latents, (levels[:, 0], levels[:, 1]))
    return latents
