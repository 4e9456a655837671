"""What training carries from step to step, and how it changes: parameters, optimizer, moving average."""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
import optax.contrib

from unialign_jax.tuning import ADAPTERS

Params = Any

# Parameters that no loss ever gives a gradient, which weight decay leaves alone as well: the fixed position features,
# and the null tokens, which the published training never feeds. What gets no gradient in this run alone does decay.
UNTRAINED = ("positions", "null_image_tokens")


@flax.struct.dataclass
class TrainState:
    """Everything a checkpoint holds of the model; all leaves are arrays.

    step: int32 scalar, number of finished updates.
    params: what is trained of the networks, by name, float32 (see `tuning.Tuning`).
    opt_state: optax state of the same layout.
    ema: exponential moving average of `params`, float32, or None if none is kept.
    """

    step: jax.Array
    params: Params
    opt_state: Any
    ema: Params | None


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW as published: constant after a linear warm-up, gradients clipped by their global norm.

    By option the blocks' matrices go by Muon: orthogonalized momentum (Jordan 2024; `optax.contrib.muon`), scaled to
    the size of Adam's updates (Liu et al., arXiv 2502.16982), so that rate and decay mean the same for both.

    Attributes:
      learning_rate: reached after `warmup_steps`.
      warmup_steps: linear from 0.
      decay_steps: total steps of a cosine decay to 0; 0 keeps the rate constant (published).
      weight_decay: decoupled, multiplied by the learning rate.
      decay_matrices_only: weight decay for kernels, adapters and embedding tables alone; the published code decays all.
      muon: whether the blocks' matrices go by Muon; published: no. Adapters of LoRA are not among them.
      b1, b2, eps: Adam's constants.
      clip_norm: largest global gradient norm.
      ema_rate: of the moving average; 0 keeps none.
      ema_warmup: starts with a short average, of rate (1 + n) / (10 + n) after n steps until that reaches `ema_rate`:
        for runs so short that the average would still hold the first parameters.

    Raises:
      ValueError: a value out of its range.
    """

    learning_rate: float = 3e-5
    warmup_steps: int = 2000
    decay_steps: int = 0
    weight_decay: float = 1e-2
    decay_matrices_only: bool = False
    muon: bool = False
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    clip_norm: float = 2.0
    ema_rate: float = 0.9995
    ema_warmup: bool = False

    def __post_init__(self):
        for name in ("learning_rate", "warmup_steps", "decay_steps", "weight_decay"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 0 or more")
        if self.clip_norm <= 0:
            raise ValueError(f"clip_norm is {self.clip_norm}, expected more than 0 (a large one clips nothing)")
        for name in ("b1", "b2", "ema_rate"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 0 and less than 1")


def learning_rate(config: OptimizerConfig) -> optax.Schedule:
    """Step -> learning rate: linear warm-up, then constant, or a cosine to 0 at `decay_steps`."""
    if config.decay_steps:
        end = max(config.decay_steps, config.warmup_steps + 1)  # a run may be over before its warm-up is
        return optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, config.warmup_steps, end)
    if not config.warmup_steps:
        return optax.constant_schedule(config.learning_rate)
    return optax.linear_schedule(0.0, config.learning_rate, config.warmup_steps)


def _decayed(params: Params, matrices_only: bool) -> Params:
    """Which leaves weight decay acts on, as a tree of bools."""

    def decide(path, _):
        name = str(path[-1].key)
        if name in UNTRAINED:
            return False
        return not matrices_only or name in ("kernel", "embedding", *ADAPTERS)

    return jax.tree_util.tree_map_with_path(decide, params)


def _block_matrices(params: Params) -> Params:
    """For every leaf that is a stack of matrices `[layers, in, out]`, which axes Muon takes for a matrix; else None."""
    axes = optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2)
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: axes if path[-1].key == "kernel" and leaf.ndim == 3 else None, params
    )


def _resting_without_gradient(muon: optax.GradientTransformation) -> optax.GradientTransformation:
    """Muon whose matrices stay where they are in a step that gives them no gradient.

    Orthogonalizing makes every momentum equally large, however long ago its last gradient was: the last block's text
    matrices, which steps of the image pass alone do not reach, would go on at full speed.
    """

    def update(grads: Params, state: Any, params: Params | None = None) -> tuple[Params, Any]:
        updates, state = muon.update(grads, state, params)

        def rest(axes: Any, grad: jax.Array, update: jax.Array) -> jax.Array:
            return update if axes is None else jnp.where(jnp.any(grad != 0, axis=(1, 2), keepdims=True), update, 0)

        by_muon = _block_matrices(grads)
        return jax.tree.map(rest, by_muon, grads, updates, is_leaf=_is_matrix_or_none), state

    return optax.GradientTransformation(muon.init, update)


def _is_matrix_or_none(leaf: Any) -> bool:
    return leaf is None or isinstance(leaf, optax.contrib.MuonDimensionNumbers)


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Clip, then AdamW; or Muon and, for what is no matrix of a block, AdamW, both with Nesterov's momentum."""
    if config.muon:
        muon = optax.contrib.muon(
            1.0,
            consistent_rms=0.2,
            muon_weight_dimension_numbers=_block_matrices,
            eps=config.eps,
            adam_b1=config.b1,
            adam_b2=config.b2,
        )
        # It is a whole optimizer, whose steps lead downhill.
        direction = optax.chain(_resting_without_gradient(muon), optax.scale(-1.0))
    else:
        direction = optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps)
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        direction,
        optax.add_decayed_weights(config.weight_decay, lambda params: _decayed(params, config.decay_matrices_only)),
        optax.scale_by_learning_rate(learning_rate(config)),
    )


def create_state(params: Params, config: OptimizerConfig) -> TrainState:
    """A fresh state around `params` (float32): step 0, empty moments, the average started from the parameters."""
    # A copy: a donated state must not hold one buffer twice.
    ema = jax.tree.map(jnp.copy, params) if config.ema_rate else None
    return TrainState(jnp.zeros((), jnp.int32), params, make_optimizer(config).init(params), ema)


def apply_gradients(state: TrainState, grads: Params, config: OptimizerConfig) -> TrainState:
    """One update. `grads` has the layout of `state.params`."""
    updates, opt_state = make_optimizer(config).update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = state.ema
    if ema is not None:
        pull = 1 - config.ema_rate
        if config.ema_warmup:
            pull = jnp.maximum(pull, 9 / (10 + state.step))
        # In this form a parameter that does not move leaves its average exactly where it is.
        ema = jax.tree.map(lambda average, new: average + pull * (new - average), ema, params)
    return TrainState(state.step + 1, params, opt_state, ema)
