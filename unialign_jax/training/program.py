"""What a run executes, as one compiled program: the place where a config and a mesh become the sharded train step.

Everything here is abstract (shapes, dtypes, shardings), so the mesh may be of devices that are only described. The loop
runs exactly what the ahead-of-time compiler judges and the benchmark times, because all take it from here.
"""

import bisect
import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from unialign_jax import parallel
from unialign_jax.batch import Batch
from unialign_jax.data.sources import SourceConfig
from unialign_jax.models.unialign import check_latent_size
from unialign_jax.networks import Networks, build_networks
from unialign_jax.state import TrainState, create_state, make_optimizer
from unialign_jax.training import flops
from unialign_jax.training.run_config import CACHED, ConfigError, RunConfig
from unialign_jax.training.step import make_train_step

_LOG = logging.getLogger(__name__)


def check_size(networks: Networks, height: int, width: int) -> None:
    """Refuses pixel sizes that the networks of a config can't take, as `ValueError`."""
    factor = networks.codec.downsample
    try:
        if height % factor or width % factor:
            raise ValueError(f"both sides must be multiples of {factor}, the autoencoder's factor")
        check_latent_size(networks.transformer.config, *networks.latent_shape(height, width)[:2])
    except ValueError as error:
        raise ValueError(
            f"data: images of {height} x {width} pixels: {error}. Change height and width, or of the buckets "
            "side_multiple and max_aspect"
        ) from None


class Program:
    """The train step `(state, frozen, batch, key) -> (state, metrics)` of a run on a mesh.

    The state is donated and comes back laid out as it was; moments and average are split as their parameters are,
    frozen networks by the same rules. Metrics and the key are whole on every device, batches split by sample.

    Args:
      run: what is trained.
      mesh: where, see `parallel.make_mesh`.

    Attributes:
      run, mesh: as given.
      networks: built from `run.model`.
      params: the parameters of the networks that the step reads, by name, as trees of `jax.ShapeDtypeStruct` with
        shardings; float32, but kernels that stay as they are have the compute dtype, to which every use casts them.
      unread: likewise those of the networks that it does not read, because a cache holds what they make.
      state, frozen, key: the step's arguments, as such trees. `frozen` holds those of `params` that are not trained.

    Raises:
      ConfigError: networks that can't be built, image sizes that they can't take, or patterns of what is trained that
        match nothing, or what is cached.
      ValueError: a batch, heads or parameters that the mesh does not divide. Nothing has been compiled or allocated by
        then.
    """

    def __init__(self, run: RunConfig, mesh: Mesh):
        self.run, self.mesh = run, mesh
        try:
            self.networks = build_networks(
                run.model, dtype=run.dtype, remat=run.remat, attention=run.attention, unroll=run.unroll
            )
            for size in run.data.sizes():
                check_size(self.networks, *size)
            boxed = self.networks.abstract()
            run.tuning.check(nn.unbox(boxed))
        except ValueError as error:
            raise ConfigError(str(error)) from error
        layers = self.networks.transformer.config.num_layers
        if self.networks.teacher is not None and not 1 <= run.objective.semantic_depth <= layers:
            raise ConfigError(
                f"objective.semantic_depth is {run.objective.semantic_depth}, but the transformer has {layers} blocks; "
                f"expected 1 to {layers}"
            )
        parallel.check_batch(mesh, run.data.global_batch, run.micro_batches)
        if run.data.global_batch == run.micro_batches and run.objective.contrastive_weight:
            _LOG.warning(
                "each micro-batch holds one sample, which the contrastive loss has nothing to contrast with: it is 0; "
                "take fewer micro_batches or a larger data.global_batch"
            )
        parallel.check_heads(mesh, self.networks.transformer.config.num_attention_heads)
        params = jax.tree.map(parallel.placed, nn.unbox(boxed), parallel.param_shardings(boxed, mesh))
        for part in run.cached:
            changed = run.tuning.trained_of({CACHED[part]: params[CACHED[part]]})
            if names := list(flax.traverse_util.flatten_dict(changed, sep="/")):
                raise ConfigError(f"cached has {part}, but {names[0]} is trained: the cache would be out of date")
        params = run.tuning.cast_frozen_kernels(params, jnp.dtype(run.dtype))
        # The text encoder is always read: it encodes the masked captions.
        unread = {CACHED[part] for part in run.cached if part != "instructions"}
        self.params = {name: tree for name, tree in params.items() if name not in unread}
        self.unread = {name: params[name] for name in params if name in unread}
        self.state = self._abstract_state(run.tuning.trained_of(self.params))
        self.frozen = run.tuning.frozen_of(self.params)
        self.key = self._whole(jax.eval_shape(jax.random.key, 0))
        self._codec = params["autoencoder"]
        self._batches: dict[tuple, Batch] = {}

    def make_keys(self) -> tuple[jax.Array, jax.Array]:
        """The run's keys, of its first parameters and of its steps."""
        seed, sharding = self.run.seed, self.key.sharding
        return jax.jit(lambda: tuple(jax.random.split(jax.random.key(seed))), out_shardings=sharding)()

    def batch(self, source: SourceConfig, size: tuple[int, int] | None = None) -> Batch:
        """The global batch of a source, abstract. Sources with equal batches and passes share one compiled step.

        Args:
          source: whose batch.
          size: height and width of its bucket, in pixels; None: those of the config.
        """
        data, cached = self.run.data, self.run.cached
        size = size or (data.height, data.width)
        bucket = (source.references, source.masks_references, size)
        if bucket in self._batches:  # asked for at every step
            return self._batches[bucket]
        text, pixels = (data.text_length,), (*size, 3)
        whole = {}
        shapes = {"caption_ids": (text, jnp.int32), "caption_loss_mask": (text, jnp.bool_)}
        if source.masks_references:
            shapes["reference_mask"] = ((source.references,), jnp.bool_)
        if "latents" in cached:
            shapes["moments"] = ((1 + source.references, *self._moments(pixels)), jnp.float32)
        if "latents" not in cached or (self.networks.teacher is not None and "teacher" not in cached):
            shapes["target"] = (pixels, jnp.uint8)
        if "latents" not in cached and source.references:
            shapes["references"] = ((source.references, *pixels), jnp.uint8)
        if "instructions" in cached:
            states = (*text, self.networks.transformer.config.joint_attention_dim)
            dtype = self.networks.text_encoder.dtype
            shapes["instruction_states"], whole["null_states"] = (states, dtype), (states, dtype)
        else:
            shapes["instruction_ids"], whole["null_ids"] = (text, jnp.int32), (text, jnp.int32)
        if self.networks.teacher is not None and "teacher" in cached:
            vector = (self.networks.teacher.dim,)
            shapes["teacher_image"], shapes["teacher_text"] = (vector, jnp.float32), (vector, jnp.float32)
        elif self.networks.teacher is not None:
            shapes["teacher_ids"] = ((data.teacher_length,), jnp.int32)
            shapes["teacher_mask"] = ((data.teacher_length,), jnp.bool_)
        split = parallel.batch_sharding(self.mesh)
        self._batches[bucket] = Batch(
            **{name: self._whole(jax.ShapeDtypeStruct(*leaf)) for name, leaf in whole.items()},
            **{
                name: jax.ShapeDtypeStruct((data.global_batch, *shape), dtype, sharding=split)
                for name, (shape, dtype) in shapes.items()
            },
        )
        return self._batches[bucket]

    def _moments(self, pixels: tuple[int, int, int]) -> tuple[int, int, int]:
        """`[h, w, M]` of the codec's moments of an image."""
        image = jax.ShapeDtypeStruct((1, *pixels), jnp.float32)
        return jax.eval_shape(self.networks.codec.moments, self._codec, image).shape[1:]

    def rows(self) -> tuple[int, ...]:
        """Which rows of every global batch the devices of this process hold, ascending."""
        held = parallel.batch_sharding(self.mesh).addressable_devices_indices_map((self.run.data.global_batch,))
        return tuple(sorted({row for (part,) in held.values() for row in range(self.run.data.global_batch)[part]}))

    def place(self, arrays: Mapping[str, np.ndarray], shared: Mapping[str, jax.Array]) -> Batch:
        """The global batch, of which every process gives its part.

        Args:
          arrays: `rows()` of a batch, as `data.pipeline.Batches` gives them.
          shared: the batch's arrays without a batch axis, `null_ids` or `null_states`, on all devices of the mesh.
        """
        rows, sharding = self.rows(), parallel.batch_sharding(self.mesh)

        def whole(part: np.ndarray) -> jax.Array:
            def of_device(index):
                rows_of_device = range(self.run.data.global_batch)[index[0]]
                first = bisect.bisect_left(rows, rows_of_device.start)
                return part[first : first + len(rows_of_device)]

            return jax.make_array_from_callback((self.run.data.global_batch, *part.shape[1:]), sharding, of_device)

        return Batch(**shared, **{name: whole(part) for name, part in arrays.items()})

    def lower(
        self, source: SourceConfig, size: tuple[int, int] | None = None, *, end_token_id: int = 1
    ) -> jax.stages.Lowered:
        """The step for batches of a source, traced and ready to be compiled for the mesh's devices.

        Args:
          source, size: see `batch`.
          end_token_id: id that ends and pads texts, of the run's tokenizer.
        """
        run = self.run
        objective = dataclasses.replace(
            run.objective,
            mask_token_id=self.networks.transformer.config.mask_token_id,
            end_token_id=end_token_id,
            image_pass=source.image_pass,
            text_pass=source.text_pass,
        )
        step = make_train_step(
            self.networks, objective, run.optimizer, merge=run.tuning.merge, micro_batches=run.micro_batches
        )
        arguments = (self.state, self.frozen, self.batch(source, size), self.key)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, arguments)
        outputs = (shardings[0], parallel.replicated(self.mesh))
        jitted = jax.jit(step, in_shardings=shardings, out_shardings=outputs, donate_argnums=0)
        with jax.set_mesh(self.mesh):
            return jitted.lower(*arguments)

    def parts(self, source: SourceConfig) -> dict[str, Any]:
        """The step's arguments by what they are for; see `batch`."""
        return {
            "parameters": self.state.params,
            "optimizer": self.state.opt_state,
            "ema": self.state.ema,
            "frozen": self.frozen,
            "batch": self.batch(source),
        }

    def model_flops(self, source: SourceConfig, size: tuple[int, int] | None = None) -> int:
        """FLOPs that one step on a batch of a source needs, over all devices; see `batch`, `flops.train_step_flops`."""
        return flops.train_step_flops(
            self.networks.transformer.config,
            **self._flop_sizes(source, size),
            aligned=self.networks.teacher is not None,
        )

    def recomputed_flops(self, source: SourceConfig, size: tuple[int, int] | None = None) -> int:
        """What the step computes beyond `model_flops`: see `flops.recomputed_flops`."""
        return flops.recomputed_flops(
            self.networks.transformer.config, self.run.remat, **self._flop_sizes(source, size)
        )

    def frozen_flops(self, source: SourceConfig) -> int:
        """Forward FLOPs of the text encoder for a batch: of masked captions, and of instructions if not cached."""
        per_sample = (source.text_pass > 0) + (source.image_pass > 0 and "instructions" not in self.run.cached)
        texts = self.run.data.global_batch * per_sample
        return flops.text_encoder_flops(
            self.networks.text_encoder.config, texts=texts, tokens=self.run.data.text_length
        )

    def _flop_sizes(self, source: SourceConfig, size: tuple[int, int] | None) -> dict[str, int]:
        patch = self.networks.transformer.config.patch_size
        height, width, _ = self.networks.latent_shape(*size or (self.run.data.height, self.run.data.width))
        return {
            "batch": self.run.data.global_batch,
            "image_tokens": (height // patch) * (width // patch),
            "text_tokens": self.run.data.text_length,
            "references": source.references,
            "image_pass": source.image_pass > 0,
            "text_pass": source.text_pass > 0,
        }

    def _abstract_state(self, params: Any) -> TrainState:
        state = jax.eval_shape(lambda params: create_state(params, self.run.optimizer), params)
        opt_state = optax.tree_utils.tree_map_params(
            make_optimizer(self.run.optimizer),
            lambda leaf, param: leaf if isinstance(leaf, optax.MaskedNode) else parallel.placed(leaf, param.sharding),
            state.opt_state,
            params,
            transform_non_params=self._whole,
            is_leaf=lambda leaf: isinstance(leaf, optax.MaskedNode),  # where one of two optimizers has no moments
        )
        ema = None if state.ema is None else params
        return TrainState(self._whole(state.step), params, opt_state, ema)

    def _whole(self, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return parallel.placed(leaf, parallel.replicated(self.mesh))
