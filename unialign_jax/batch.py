"""Every array that enters a training step, with its shape: `Batch` (the data) and `Draws` (the randomness).

Letters: B batch, N references, H x W image pixels, h x w latent pixels, C latent channels, M numbers that a codec's
posterior has per latent pixel, T text length, E width of the text states, S width of the teacher's vectors.
"""

import flax.struct
import jax
import jax.numpy as jnp

from unialign_jax.diffusion import flow_matching, masked_text


@flax.struct.dataclass
class Batch:
    """One bucket's samples: shapes are static, absent parts are None. Generation is the case without references.

    caption_ids: int32 `[B, T]`, the text that the text pass learns, padded with the end token.
    caption_loss_mask: bool `[B, T]`, False on the positions of a prompt (a question).
    target: uint8 `[B, H, W, 3]`, the image that is generated, or described.
    references: uint8 `[B, N, H, W, 3]`, or None.
    reference_mask: bool `[B, N]`, False where a sample has no such reference; None: all samples have all N.
    instruction_ids: int32 `[B, T]`, the text the image pass is conditioned on; for generation the caption.
    null_ids: int32 `[T]`, the ids of " ", the text of a dropped condition.
    teacher_ids: int32 `[B, Tq]`, the caption in the teacher's tokens; None without a teacher.
    teacher_mask: bool `[B, Tq]`, False on padding.

    What a cache provides stands in place of what a frozen network would read, and is not computed again (the masked
    caption is always encoded: it depends on the step's draws):

    moments: floating `[B, 1 + N, h, w, M]`, `Codec.moments` of target and references; instead of the pixels.
    instruction_states, null_states: floating `[B, T, E]` and `[T, E]`, instead of the ids.
    teacher_image, teacher_text: float32 `[B, S]`, instead of the teacher's ids.
    """

    caption_ids: jax.Array
    caption_loss_mask: jax.Array
    target: jax.Array | None = None
    references: jax.Array | None = None
    reference_mask: jax.Array | None = None
    instruction_ids: jax.Array | None = None
    null_ids: jax.Array | None = None
    teacher_ids: jax.Array | None = None
    teacher_mask: jax.Array | None = None
    moments: jax.Array | None = None
    instruction_states: jax.Array | None = None
    null_states: jax.Array | None = None
    teacher_image: jax.Array | None = None
    teacher_text: jax.Array | None = None

    @property
    def images(self) -> int:
        """Images per sample: the target and its references, `1 + N`."""
        if self.moments is not None:
            return self.moments.shape[1]
        return 1 if self.references is None else 1 + self.references.shape[1]


@flax.struct.dataclass
class Features:
    """A batch after the frozen encoders: what the objective reads.

    target: clean scaled latents, float32 `[B, h, w, C]`.
    references: clean scaled latents, float32 `[B, N, h, w, C]`, or None.
    reference_mask: bool `[B, N]`, or None.
    caption_ids, caption_loss_mask, instruction_ids, null_ids, instruction_states, null_states: as in `Batch`.
    teacher_image, teacher_text: float32 `[B, S]`, or None without a teacher.
    """

    target: jax.Array
    caption_ids: jax.Array
    caption_loss_mask: jax.Array
    instruction_ids: jax.Array | None = None
    null_ids: jax.Array | None = None
    instruction_states: jax.Array | None = None
    null_states: jax.Array | None = None
    references: jax.Array | None = None
    reference_mask: jax.Array | None = None
    teacher_image: jax.Array | None = None
    teacher_text: jax.Array | None = None


@flax.struct.dataclass
class Draws:
    """All randomness of one training step, drawn beforehand: losses are deterministic functions of it.

    noise: standard normal `[B, h, w, C]`.
    image_time: in (0, 1) `[B]`, logit-normal; `flow_matching.noise_levels` makes it a sigma.
    text_drop, reference_drop: uniform `[B]`; a sample below the drop-out rate loses its text condition, or all of its
      references; independent of each other, so that guidance can act on either.
    text_time: `[B]` in (0, 1), antithetic over the whole batch (not over a micro-batch).
    text_mask: uniform `[B, T]`.
    posterior: standard normal `[B, 1 + N, h, w, C]`, the autoencoder's posterior draws of target and references.
    """

    noise: jax.Array
    image_time: jax.Array
    text_drop: jax.Array
    reference_drop: jax.Array
    text_time: jax.Array
    text_mask: jax.Array
    posterior: jax.Array


def sample_draws(key: jax.Array, batch: Batch, latent_shape: tuple[int, int, int]) -> Draws:
    """All draws of a step for a batch of any bucket, independent of how the batch is laid out over devices.

    Args:
      key: a key used for nothing else (one per step).
      batch: read for its shapes alone.
      latent_shape: `(h, w, C)` of one image's latent.
    """
    keys = jax.random.split(key, 7)
    size, length = batch.caption_ids.shape
    return Draws(
        noise=jax.random.normal(keys[0], (size, *latent_shape)),
        image_time=flow_matching.logit_normal(keys[1], (size,)),
        text_drop=jax.random.uniform(keys[2], (size,)),
        reference_drop=jax.random.uniform(keys[6], (size,)),
        text_time=masked_text.antithetic_times(jax.random.uniform(keys[3], (size,))),
        text_mask=jax.random.uniform(keys[4], (size, length)),
        posterior=jax.random.normal(keys[5], (size, batch.images, *latent_shape)),
    )


def to_unit_range(images: jax.Array) -> jax.Array:
    """uint8 pixels -> float32 in [-1, 1]."""
    return images.astype(jnp.float32) / 127.5 - 1
