"""The compiled programs of inference. Two for every caller: one makes images, one texts.

An image takes three programs, so that the loop between them can be watched without another one: `begin` (encoders and
noise), `advance` (any run of Euler steps), `finish` (the decoder). Each is compiled once per shape and kept by JAX, for
all pipelines on the same networks and mesh.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from unialign_jax import parallel
from unialign_jax.batch import to_unit_range
from unialign_jax.diffusion import flow_matching, masked_text
from unialign_jax.models.unialign import Pass
from unialign_jax.networks import Networks, Params

# The network was trained at 1000 noise levels; a table of this size serves any number of steps.
MAX_STEPS = flow_matching.NUM_TRAIN_TIMES


@dataclasses.dataclass(frozen=True)
class ImagePrograms:
    """The compiled parts of image sampling on one mesh; arrays are split by sample.

    begin: `(params, seeds uint32 [B], ids int32 [B, T], negative_ids int32 [T], references uint8 [B, N, H, W, 3] or
      None, reference_mask bool [B, N] or None, size, branches) -> (noise [B, h, w, C], conditions)`. Conditions go from
      the weakest to the full one; `branches` says how many: 1 is no guidance, 2 guidance on the text, 3 on text and
      references separately.
    advance: `(params, latents, conditions, scales [K - 1], sigmas [MAX_STEPS + 1], start, stop) -> latents`.
    finish: `(params, latents) -> uint8 [B, H, W, 3]`.
    estimate: `(before, after, sigmas, step) -> latents`: the clean image that the Euler step `step` pointed to.
    """

    begin: Callable
    advance: Callable
    finish: Callable
    estimate: Callable


@functools.cache
def image_programs(networks: Networks, mesh: Mesh) -> ImagePrograms:
    """See `ImagePrograms`."""
    split = parallel.batch_sharding(mesh)

    def begin(params, seeds, ids, negative_ids, references, mask, size, branches):
        full = {"text": networks.encode_text(params, ids)}
        if references is not None:
            flat = to_unit_range(references.reshape(-1, *references.shape[2:]))
            latents = networks.encode_images(params, flat)
            full["references"] = latents.reshape(*references.shape[:2], *latents.shape[1:])
            full["mask"] = mask
        negative = networks.encode_text(params, negative_ids[None])
        textless = full | {"text": jnp.broadcast_to(negative, full["text"].shape)}
        conditions = [textless, full]
        if branches == 3:
            conditions.insert(0, textless | {"mask": jnp.zeros_like(mask)})
        return initial_noise(networks, seeds, size), tuple(conditions[-branches:])

    def advance(params, latents, conditions, scales, sigmas, start, stop):
        def velocity(latents, times, condition):
            item = Pass(
                latents,
                condition["text"],
                times,
                references=condition.get("references"),
                reference_mask=condition.get("mask"),
                want_text=False,
            )
            return networks.denoise(params, item)[0].image

        predict = flow_matching.guide(velocity, conditions, [scales[k] for k in range(len(conditions) - 1)])
        return flow_matching.euler(predict, latents, sigmas, start, stop)

    def finish(params, latents):
        pixels = networks.decode_images(params, latents)
        return jnp.round((jnp.clip(pixels, -1, 1) + 1) * 127.5).astype(jnp.uint8)

    def estimate(before, after, sigmas, step):
        velocity = (after - before) / (sigmas[step + 1] - sigmas[step])
        return after - sigmas[step + 1] * velocity

    return ImagePrograms(
        begin=jax.jit(begin, static_argnums=(6, 7), out_shardings=split),
        advance=jax.jit(advance, out_shardings=split),
        finish=jax.jit(finish, out_shardings=split),
        estimate=jax.jit(estimate, out_shardings=split),
    )


def initial_noise(networks: Networks, seeds: jax.Array, size: tuple[int, int]) -> jax.Array:
    """What samples start from, float32 `[B, h, w, C]`: each has a key of its own, whatever batch it sits in."""
    shape = networks.latent_shape(*size)
    return jax.vmap(lambda seed: jax.random.normal(jax.random.key(seed), shape))(seeds)


def sigma_table(steps: int, shift: float) -> np.ndarray:
    """The sampler's noise levels in a table whose size does not depend on them, float32 `[MAX_STEPS + 1]`."""
    table = np.zeros(MAX_STEPS + 1, np.float32)
    table[: steps + 1] = flow_matching.euler_sigmas(steps, shift)
    return table


@functools.cache
def text_program(networks: Networks, mesh: Mesh, steps: int, fast: bool, mask_id: int, end_id: int) -> Callable:
    """The text sampler `(params, seeds [B], images uint8 [B, H, W, 3], ids [B, T], known [B, T]) -> int32 [B, T]`.

    Prompt ids are kept where `known`; what follows the first end token is cut (`masked_text.cut_at_end`).

    Args:
      steps: times of the ancestral sampler, or evaluations of the fast one.
      fast: confidence-ordered decoding instead of the published sampler.
      mask_id, end_id: of the tokenizer.
    """

    def program(params: Params, seeds: jax.Array, images: jax.Array, ids: jax.Array, known: jax.Array) -> jax.Array:
        latents = networks.encode_images(params, to_unit_range(images))
        vocabulary = networks.transformer.config.vocab_size
        keys = jax.vmap(jax.random.key)(seeds)

        def logits(ids):
            states = networks.encode_text(params, ids)
            item = Pass(latents, states, jnp.zeros(len(ids)), want_image=False)
            return networks.denoise(params, item)[0].text_logits

        if fast:
            tokens = masked_text.sample_confident(logits, ids, known, num_steps=steps, mask_id=mask_id, end_id=end_id)
        else:
            shape = (ids.shape[1], vocabulary)
            draw = functools.partial(step_uniforms, shape=shape)
            tokens = masked_text.sample_ancestral(
                logits, ids, known, lambda step: jax.vmap(draw, (0, None))(keys, step), num_steps=steps, mask_id=mask_id
            )
        return masked_text.cut_at_end(tokens, known, end_id)

    return jax.jit(program, out_shardings=parallel.batch_sharding(mesh))


def step_uniforms(key: jax.Array, step: Any, shape: tuple[int, int]) -> jax.Array:
    """One sample's uniform draws `[T, V]` of one step of the ancestral text sampler."""
    return jax.random.uniform(jax.random.fold_in(key, step), shape)
