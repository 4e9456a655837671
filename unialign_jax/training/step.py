"""The one training step, for every stage and task: draws, encoders, objective, gradients, update."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from unialign_jax import tuning
from unialign_jax.batch import Batch, Draws, Features, sample_draws
from unialign_jax.networks import Networks, Params
from unialign_jax.objectives import Objective
from unialign_jax.state import OptimizerConfig, TrainState, apply_gradients, learning_rate

Metrics = dict[str, jax.Array]
_ENCODERS = {"autoencoder", "text_encoder", "teacher"}
_TEXTS = 32  # that a frozen text encoder reads at a time, on each device


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

    def encode(
        params: Params, batch: Batch, draws: Draws, most: int | None = None
    ) -> tuple[Features, jax.Array | None]:
        features = networks.encode(params, batch, draws.posterior)
        return features, networks.encode_texts(params, objective.texts(batch, draws), most)

    def loss(params: Params, frozen: Params, data: Batch | Features, states: jax.Array | None, draws: Draws):
        everything = merge(frozen, params)
        if isinstance(data, Batch):  # its encoders are trained
            data, states = encode(everything, data, draws)
        return objective(functools.partial(networks.denoise, everything), states, data, draws)

    gradient = jax.value_and_grad(loss, has_aux=True)

    def train_step(state: TrainState, frozen: Params, batch: Batch, key: jax.Array):
        draws = sample_draws(jax.random.fold_in(key, state.step), batch, networks.latent_shape_of(batch))
        data, states = batch, None
        if not _ENCODERS & state.params.keys():
            # Once for all micro-batches: on a mesh an encoder's parameters are gathered for each call.
            data, states = encode(frozen, batch, draws, _TEXTS)
        if micro_batches == 1:
            (total, terms), grads = gradient(state.params, frozen, data, states, draws)
        else:
            null = {"null_ids": batch.null_ids, "null_states": batch.null_states}  # these have no batch axis
            parts = _split((data.replace(null_ids=None, null_states=None), states, draws), micro_batches)

            def part_gradient(part):
                data, states, draws = part
                return gradient(state.params, frozen, data.replace(**null), states, draws)

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


def _split(arrays: Any, parts: int) -> Any:
    """A tree of arrays `[B, ...]` as `[parts, B / parts, ...]`.

    Part k holds every `parts`-th sample from k on, so that all devices have their share of each.
    """
    size = len(jax.tree.leaves(arrays)[0])
    if size % parts:
        raise ValueError(f"a batch of {size} cannot be split in {parts} equal micro-batches; change one of them")
    return jax.tree.map(lambda x: jnp.swapaxes(x.reshape(size // parts, parts, *x.shape[1:]), 0, 1), arrays)
