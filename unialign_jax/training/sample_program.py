"""The image sampler on a mesh, as one abstract program that the ahead-of-time compiler judges like the train step."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from unialign_jax import parallel, pretrained
from unialign_jax.data.sources import SourceConfig
from unialign_jax.inference import programs
from unialign_jax.networks import build_networks
from unialign_jax.training import flops
from unialign_jax.training.program import check_size
from unialign_jax.training.run_config import ConfigError, RunConfig


class SampleProgram:
    """The three programs of `inference.programs` in a row: a batch of prompts (and references) to images.

    Args:
      run: `data`'s batch and sizes and `log`'s steps and guidance are read.
      mesh: where; the parameters are split as in training, the batch by sample.

    Raises:
      ConfigError: networks that can't be built, or image sizes that they can't take.
      ValueError: a batch or heads that the mesh does not divide.
    """

    def __init__(self, run: RunConfig, mesh: Mesh):
        self.run, self.mesh = run, mesh
        try:
            self.networks = build_networks(run.model, dtype=run.dtype, attention=run.attention)
            check_size(self.networks, run.data.height, run.data.width)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        parallel.check_batch(mesh, run.data.global_batch)
        parallel.check_heads(mesh, self.networks.transformer.config.num_attention_heads)
        self.params = pretrained.sampled(self.networks, mesh)

    def parts(self, source: SourceConfig) -> dict[str, Any]:
        """The program's arguments by what they are for."""
        frozen = {name: tree for name, tree in self.params.items() if name != "transformer"}
        return {"parameters": self.params["transformer"], "frozen": frozen, "batch": self._inputs(source)}

    def lower(self, source: SourceConfig) -> jax.stages.Lowered:
        """The program for prompts with a source's number of references, ready to be compiled for the mesh's devices."""
        data, log = self.run.data, self.run.log
        made = programs.image_programs(self.networks, self.mesh)
        branches = 1 if log.guidance == 1 else 2

        def sample(params, seeds, ids, negative_ids, references, reference_mask):
            latents, conditions = made.begin(
                params, seeds, ids, negative_ids, references, reference_mask, (data.height, data.width), branches
            )
            # Traced here, the number of steps is a constant, so that the program tells how often it runs.
            latents = made.advance.__wrapped__(
                params,
                latents,
                conditions,
                jnp.full((branches - 1,), log.guidance),
                programs.sigma_table(log.sample_steps, pretrained.PUBLISHED_SHIFT),
                0,
                log.sample_steps,
            )
            return made.finish(params, latents)

        with jax.set_mesh(self.mesh):
            return jax.jit(sample).lower(self.params, *self._inputs(source))

    def model_flops(self, source: SourceConfig) -> int:
        """FLOPs of all network evaluations of a batch, over all devices; guidance makes two of every step."""
        config, data, log = self.networks.transformer.config, self.run.data, self.run.log
        height, width, _ = self.networks.latent_shape(data.height, data.width)
        tokens = (height // config.patch_size) * (width // config.patch_size)
        each = flops.image_pass_flops(config, tokens, data.text_length, source.references)
        return data.global_batch * log.sample_steps * (1 if log.guidance == 1 else 2) * each

    def recomputed_flops(self, source: SourceConfig) -> int:
        """FLOPs of the negative prompt, which every device encodes for itself, beyond the first time."""
        return self._text_flops((self.mesh.size - 1) * (self.run.log.guidance != 1))

    def frozen_flops(self, source: SourceConfig) -> int:
        """FLOPs of the text encoder, for the prompts and the negative one; the image decoder's are left out."""
        return self._text_flops(self.run.data.global_batch + (self.run.log.guidance != 1))

    def _text_flops(self, texts: int) -> int:
        return flops.text_encoder_flops(
            self.networks.text_encoder.config, texts=texts, tokens=self.run.data.text_length
        )

    def _inputs(self, source: SourceConfig) -> tuple[Any, ...]:
        """Seeds, ids, negative ids, references and their mask, as `ImagePrograms.begin` takes them."""
        data = self.run.data
        split, whole = parallel.batch_sharding(self.mesh), parallel.replicated(self.mesh)
        batch, text = data.global_batch, data.text_length
        seeds = jax.ShapeDtypeStruct((batch,), jnp.uint32, sharding=split)
        ids = jax.ShapeDtypeStruct((batch, text), jnp.int32, sharding=split)
        negative = jax.ShapeDtypeStruct((text,), jnp.int32, sharding=whole)
        if not source.references:
            return seeds, ids, negative, None, None
        shape = (batch, source.references)
        references = jax.ShapeDtypeStruct((*shape, data.height, data.width, 3), jnp.uint8, sharding=split)
        # Where all are there, samplers pass no mask: attention without one is faster.
        mask = jax.ShapeDtypeStruct(shape, jnp.bool_, sharding=split) if source.masks_references else None
        return seeds, ids, negative, references, mask
