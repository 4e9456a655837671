"""What a run executes, as one compiled program: the place where a config and a mesh become the sharded train step.

Everything here is abstract (shapes, dtypes, shardings), so the mesh may be of devices that are only described. The loop
runs exactly what the ahead-of-time compiler judges and the benchmark times, because all take it from here.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from unialign_jax import parallel
from unialign_jax.batch import Batch
from unialign_jax.data.pipeline import SourceConfig
from unialign_jax.networks import build_networks
from unialign_jax.objectives import Objective
from unialign_jax.state import TrainState, create_state, make_optimizer
from unialign_jax.training import flops
from unialign_jax.training.run_config import RunConfig
from unialign_jax.training.step import make_train_step


class Program:
    """The train step `(state, frozen, batch, key) -> (state, metrics)` of a run on a mesh.

    The state is donated and comes back laid out as it was; moments and average are split as their parameters are,
    frozen networks by the same rules. Metrics and the key are whole on every device, batches split by sample.

    Args:
      run: what is trained.
      mesh: where, see `parallel.make_mesh`.
      end_token_id: id that pads texts, of the run's tokenizer.

    Attributes:
      run, mesh: as given.
      networks: built from `run.model`.
      params: their parameters by name, float32, as trees of `jax.ShapeDtypeStruct` with shardings.
      state, frozen, key: the step's arguments, as such trees. `frozen` holds the parameters that are not trained.

    Raises:
      ValueError: networks that can't be built, or a batch, heads or parameters that the mesh does not divide. Nothing
        has been compiled or allocated by then.
    """

    def __init__(self, run: RunConfig, mesh: Mesh, *, end_token_id: int = 1):
        self.run, self.mesh = run, mesh
        self.networks = build_networks(run.model, dtype=run.dtype, remat=run.remat, attention=run.attention)
        parallel.check_batch(mesh, run.data.global_batch, run.micro_batches)
        parallel.check_heads(mesh, self.networks.transformer.config.num_attention_heads)
        boxed = self.networks.abstract()
        self.params = jax.tree.map(_placed, nn.unbox(boxed), parallel.param_shardings(boxed, mesh))
        run.tuning.check(self.params)
        self.state = self._abstract_state(run.tuning.trained_of(self.params))
        self.frozen = run.tuning.frozen_of(self.params)
        self.key = self._whole(jax.eval_shape(jax.random.key, 0))
        self._end_token_id = end_token_id

    def batch(self, source: SourceConfig) -> Batch:
        """The global batch of a source, abstract. Sources with equal batches and passes share one compiled step."""
        data = self.run.data
        shapes = {
            "target": ((data.height, data.width, 3), jnp.uint8),
            "caption_ids": ((data.text_length,), jnp.int32),
            "caption_loss_mask": ((data.text_length,), jnp.bool_),
            "instruction_ids": ((data.text_length,), jnp.int32),
        }
        if source.references:
            shapes["references"] = ((source.references, data.height, data.width, 3), jnp.uint8)
            shapes["reference_mask"] = ((source.references,), jnp.bool_)
        if self.networks.teacher is not None:
            shapes["teacher_ids"] = ((data.teacher_length,), jnp.int32)
            shapes["teacher_mask"] = ((data.teacher_length,), jnp.bool_)
        split = parallel.batch_sharding(self.mesh)
        return Batch(
            null_ids=self._whole(jax.ShapeDtypeStruct((data.text_length,), jnp.int32)),
            **{
                name: jax.ShapeDtypeStruct((data.global_batch, *shape), dtype, sharding=split)
                for name, (shape, dtype) in shapes.items()
            },
        )

    def lower(self, source: SourceConfig) -> jax.stages.Lowered:
        """The step for batches of a source, traced and ready to be compiled for the mesh's devices."""
        arguments = (self.state, self.frozen, self.batch(source), self.key)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, arguments)
        outputs = (shardings[0], parallel.replicated(self.mesh))
        step = make_train_step(
            self.networks,
            self._objective(source),
            self.run.optimizer,
            merge=self.run.tuning.merge,
            micro_batches=self.run.micro_batches,
        )
        step = jax.jit(step, in_shardings=shardings, out_shardings=outputs, donate_argnums=0)
        with jax.set_mesh(self.mesh):
            return step.lower(*arguments)

    def model_flops(self, source: SourceConfig) -> int:
        """FLOPs that one step on a batch of a source needs, over all devices; see `flops.train_step_flops`."""
        config = self.networks.transformer.config
        height, width, _ = self.networks.latent_shape(self.run.data.height, self.run.data.width)
        return flops.train_step_flops(
            config,
            batch=self.run.data.global_batch,
            image_tokens=(height // config.patch_size) * (width // config.patch_size),
            text_tokens=self.run.data.text_length,
            references=source.references,
            aligned=self.networks.teacher is not None,
            image_pass=source.image_pass > 0,
            text_pass=source.text_pass > 0,
        )

    def _objective(self, source: SourceConfig) -> Objective:
        return dataclasses.replace(
            self.run.objective,
            mask_token_id=self.networks.transformer.config.mask_token_id,
            end_token_id=self._end_token_id,
            image_pass=source.image_pass,
            text_pass=source.text_pass,
        )

    def _abstract_state(self, params: Any) -> TrainState:
        state = jax.eval_shape(lambda params: create_state(params, self.run.optimizer), params)
        opt_state = optax.tree_utils.tree_map_params(
            make_optimizer(self.run.optimizer),
            lambda leaf, param: _placed(leaf, param.sharding),
            state.opt_state,
            params,
            transform_non_params=self._whole,
        )
        ema = None if state.ema is None else params
        return TrainState(self._whole(state.step), params, opt_state, ema)

    def _whole(self, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return _placed(leaf, parallel.replicated(self.mesh))


def _placed(leaf: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
