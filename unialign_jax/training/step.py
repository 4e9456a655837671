"""The one training step, for every stage and task: draws, encoders, objective, gradients, update."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from unialign_jax import tuning
from unialign_jax.batch import Batch, sample_draws
from unialign_jax.networks import Networks, Params
from unialign_jax.objectives import Objective
from unialign_jax.state import OptimizerConfig, TrainState, apply_gradients, learning_rate

Metrics = dict[str, jax.Array]


def make_train_step(
    networks: Networks,
    objective: Objective,
    optimizer: OptimizerConfig,
    *,
    merge: Callable[[Params, Params], Params] = tuning.merge,
    micro_batches: int = 1,
) -> Callable[[TrainState, Params, Batch, jax.Array], tuple[TrainState, Metrics]]:
    """Builds `(state, frozen, batch, key) -> (state, metrics)`, a pure function to be jitted with `state` donated.

    `frozen` holds the parameters that `state.params` does not; `merge(frozen, state.params)` is the whole model. `key`
    is the run's key; the step's own is folded in from `state.step`, so step k draws the same numbers in any run, on any
    number of devices.

    With `micro_batches` n > 1 the batch is worked off in n equal parts and their gradients averaged: exactly the full
    batch's gradient for every term but the contrastive one, whose negatives are then a part's own samples.

    Metrics: the objective's terms, `loss` (their weighted sum), `grad_norm` before clipping, `learning_rate`; float32
    scalars.
    """

    def loss(params: Params, frozen: Params, batch: Batch, draws):
        everything = merge(frozen, params)
        features = networks.encode(everything, batch, draws.posterior)
        return objective(
            functools.partial(networks.denoise, everything),
            functools.partial(networks.encode_text, everything),
            features,
            draws,
        )

    gradient = jax.value_and_grad(loss, has_aux=True)

    def train_step(state: TrainState, frozen: Params, batch: Batch, key: jax.Array):
        draws = sample_draws(jax.random.fold_in(key, state.step), batch, networks.latent_shape_of(batch))
        if micro_batches == 1:
            (total, terms), grads = gradient(state.params, frozen, batch, draws)
        else:
            null = {"null_ids": batch.null_ids, "null_states": batch.null_states}  # these have no batch axis
            parts = _split(batch.replace(null_ids=None, null_states=None), draws, micro_batches)

            def part_gradient(part):
                return gradient(state.params, frozen, part[0].replace(**null), part[1])

            def add(sums, part):
                return jax.tree.map(jnp.add, sums, part_gradient(part)), None

            shapes = jax.eval_shape(lambda: part_gradient(jax.tree.map(lambda x: x[0], parts)))
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
            sums, _ = jax.lax.scan(add, zeros, parts)
            (total, terms), grads = jax.tree.map(lambda x: x / micro_batches, sums)
        metrics = {
            **terms,
            "loss": total,
            "grad_norm": optax.global_norm(grads),
            "learning_rate": jnp.asarray(learning_rate(optimizer)(state.step), jnp.float32),
        }
        return apply_gradients(state, grads, optimizer), metrics

    return train_step


def _split(batch: Batch, draws, parts: int):
    """`(batch, draws)` with a leading axis of `parts`.

    Part k holds every `parts`-th sample from k on, so that all devices have their share of each.
    """
    size = batch.caption_ids.shape[0]
    if size % parts:
        raise ValueError(f"a batch of {size} cannot be split in {parts} equal micro-batches; change one of them")
    return jax.tree.map(lambda x: jnp.swapaxes(x.reshape(size // parts, parts, *x.shape[1:]), 0, 1), (batch, draws))
