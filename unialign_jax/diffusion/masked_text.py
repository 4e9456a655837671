"""Masked diffusion on token ids: noise, loss, samplers. It knows a callable that predicts logits, not a network.

Absorbing-state diffusion with the log-linear schedule sigma(t) = -log1p(-(1 - eps) t) and the SUBS parameterization
(MDLM, arXiv 2406.07524; Dual Diffusion, arXiv 2501.00289; UniAlignment's text pass).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

EPS = 1e-3  # of the schedule, and the smallest training time
LAST_TIME = 1e-5  # where the ancestral sampler's times end
CERTAIN_END = 0.9  # how probable an end must be to be fixed before words that are less so
NEG_INFINITY = -1e6  # what the mask id's logit gets: the mask is never predicted

Logits = Callable[[jax.Array], jax.Array]


def antithetic_times(u: jax.Array) -> jax.Array:
    """Draws `u [B]` in [0, 1) -> times `[B]` in [EPS, 1): one per B-th of the range, so a batch covers it."""
    batch = u.shape[0]
    spread = (u / batch + jnp.arange(batch, dtype=jnp.float32) / batch) % 1
    return (1 - EPS) * spread + EPS


def mask_tokens(ids: jax.Array, time: jax.Array, u: jax.Array, maskable: jax.Array, mask_id: int) -> jax.Array:
    """Replaces each maskable token by the mask with probability (1 - EPS) time.

    Args:
      ids: int32 `[B, T]`.
      time: `[B]` in (0, 1].
      u: uniform draws `[B, T]`.
      maskable: bool `[B, T]`; False on the positions of a prompt.
      mask_id: the absorbing id.

    Returns:
      int32 `[B, T]`.
    """
    masked = (u < (1 - EPS) * time[:, None]) & maskable
    return jnp.where(masked, mask_id, ids)


def log_probs(logits: jax.Array, ids: jax.Array, mask_id: int) -> jax.Array:
    """SUBS: float32 `[B, T, V]` log-probabilities of the clean tokens given the partly masked `ids [B, T]`.

    The mask itself has none; a revealed token is certain of itself.
    """
    certain = jnp.where(jnp.arange(logits.shape[-1]) == ids[..., None], 0.0, NEG_INFINITY)
    return jnp.where((ids == mask_id)[..., None], jax.nn.log_softmax(_without_mask(logits, mask_id)), certain)


def _without_mask(logits: jax.Array, mask_id: int) -> jax.Array:
    """Logits in float32, in which the mask itself has no probability."""
    return logits.astype(jnp.float32) + jnp.where(jnp.arange(logits.shape[-1]) == mask_id, NEG_INFINITY, 0.0)


def loss(
    logits: jax.Array, masked_ids: jax.Array, ids: jax.Array, time: jax.Array, learned: jax.Array, mask_id: int
) -> jax.Array:
    """The continuous-time bound: sum of -log p(ids) w(time) over masked, learned positions, over B T; float32 scalar.

    Args:
      logits: `[B, T, V]` of the network on `masked_ids`.
      masked_ids, ids: int32 `[B, T]`.
      time: `[B]`; w = sigma' / expm1(sigma) = (1 - EPS) / ((1 - EPS) time) up to rounding.
      learned: bool `[B, T]`, False on a prompt's positions. The divisor stays B T, as published.
      mask_id: the absorbing id.
    """
    logits = _without_mask(logits, mask_id)
    # Only the true token's log-probability is needed: no second [B, T, V] array.
    true_logit = jnp.take_along_axis(logits, ids[..., None], axis=-1)[..., 0]
    nll = jax.nn.logsumexp(logits, axis=-1) - true_logit
    sigma = -jnp.log1p(-(1 - EPS) * time)
    rate = (1 - EPS) / (1 - (1 - EPS) * time)
    weight = rate / jnp.expm1(sigma)
    counted = (masked_ids == mask_id) & learned
    return jnp.sum(jnp.where(counted, nll, 0.0) * weight[:, None]) / ids.size


def sample_ancestral(
    logits: Logits,
    ids: jax.Array,
    known: jax.Array,
    uniforms: Callable[[jax.Array], jax.Array],
    *,
    num_steps: int,
    mask_id: int,
) -> jax.Array:
    """Ancestral sampling with the cache of MDLM: one traced program, at most `num_steps + 1` network evaluations.

    Probabilities are computed again only after a step that revealed a token of any sample; a step that reveals
    nothing would compute the same ones. A last evaluation fills by argmax what is still masked.

    Args:
      logits: `ids int32 [B, T] -> [B, T, V]`.
      ids: int32 `[B, T]`; read where `known`.
      known: bool `[B, T]`, the prompt's positions, kept as they are.
      uniforms: step number `int32 [] -> [B, T, V]` uniform draws in [0, 1) of that step.
      num_steps: number of times, spread evenly from 1 to 1e-5.
      mask_id: the absorbing id.

    Returns:
      int32 `[B, T]` without masks.
    """
    ids = jnp.where(known, ids, mask_id).astype(jnp.int32)
    times = np.linspace(1, LAST_TIME, num_steps + 1, dtype=np.float32)[:-1]
    width = np.float32((1 - LAST_TIME) / num_steps)

    def probabilities(ids):
        return jnp.exp(log_probs(logits(ids), ids, mask_id))

    def step(carry, inputs):
        ids, cache, stale = carry
        number, time = inputs
        cache = jax.lax.cond(stale, lambda ids, _: probabilities(ids), lambda _, cache: cache, ids, cache)
        is_mask = jnp.arange(cache.shape[-1]) == mask_id
        q = jnp.where(is_mask, time - width, cache * (time - (time - width)))
        # The public sampler's Gumbel trick in its own rounding: argmax q / -log(u) draws from q.
        drawn = jnp.argmax(q / (1e-10 - jnp.log(uniforms(number) + 1e-10)), axis=-1).astype(jnp.int32)
        drawn = jnp.where(ids == mask_id, drawn, ids)
        return (drawn, cache, jnp.any(drawn != ids)), None

    shape = jax.eval_shape(probabilities, ids)
    start = (ids, jnp.zeros(shape.shape, shape.dtype), jnp.bool_(True))
    (ids, _, _), _ = jax.lax.scan(step, start, (jnp.arange(num_steps), times))
    return jnp.argmax(log_probs(logits(ids), ids, mask_id), axis=-1).astype(jnp.int32)


def sample_confident(
    logits: Logits, ids: jax.Array, known: jax.Array, *, num_steps: int, mask_id: int, end_id: int
) -> jax.Array:
    """Confidence-ordered parallel decoding (MaskGIT, arXiv 2202.04200): exactly `num_steps` network evaluations.

    Each step fixes the most probable token at the positions where it is most probable, an equal share of the masked
    positions a step. Deterministic, and the fast option: a caption takes 8 to 16 steps instead of 32 to 64.

    Ends that are not certain wait for words. How long a text gets is open before it is worded, so that each word alone
    is improbable and ends are not: fixed in turn from the last position on, they would cut what there is to say.

    Args and returns: as `sample_ancestral`; `end_id` is the token that ends and pads texts.
    """
    ids = jnp.where(known, ids, mask_id).astype(jnp.int32)
    initial = jnp.sum(~known, axis=1)  # each sample's own share: a prompt does not speed up the rest

    def step(ids, number):
        masked = ids == mask_id
        scores = log_probs(logits(ids), ids, mask_id)
        best, score = jnp.argmax(scores, axis=-1).astype(jnp.int32), jnp.max(scores, axis=-1)
        first = masked & ((best != end_id) | (score > np.log(CERTAIN_END)))
        first = jnp.where(jnp.any(first, axis=1, keepdims=True), first, masked)
        order = jnp.argsort(jnp.argsort(-jnp.where(first, score, -jnp.inf), axis=1), axis=1)
        due = -(-initial * (number + 1) // num_steps) - (initial - jnp.sum(masked, axis=1))  # integers: rounded up
        return jnp.where(first & (order < due[:, None]) | masked & (number == num_steps - 1), best, ids), None

    ids, _ = jax.lax.scan(step, ids, jnp.arange(num_steps))
    return ids


def cut_at_end(ids: jax.Array, known: jax.Array, end_id: int) -> jax.Array:
    """Everything after the first end token that is not the prompt's becomes the end token, int32 `[B, T]`."""
    is_end = (ids == end_id) & ~known
    ended = jnp.cumsum(is_end, axis=1) - is_end > 0
    return jnp.where(ended & ~known, end_id, ids)
