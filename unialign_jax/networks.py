"""The networks of one model as a bundle: the transformer, and what feeds it (codec, text encoder, teacher).

Which of them are trained is not decided here: every method takes the parameters of all networks by name.
"""

import dataclasses
import functools
import typing
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from unialign_jax import parallel, typed
from unialign_jax.batch import Batch, Features, to_unit_range
from unialign_jax.models.autoencoder import AutoencoderCodec, AutoencoderConfig
from unialign_jax.models.pixel_codec import Codec, PixelCodec, PixelCodecConfig
from unialign_jax.models.t5 import T5Config, T5Encoder
from unialign_jax.models.teachers import QwenTeacher, QwenTeacherConfig, Teacher
from unialign_jax.models.unialign import Outputs, Pass, TransformerConfig, UniAlign

Params = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Networks:
    """The four networks. Parameters are a dict with the keys `transformer`, `text_encoder`, `autoencoder`, `teacher`.

    Attributes:
      transformer: the network that both diffusions share.
      codec: images <-> latents: SD3's autoencoder, or pixels rearranged.
      text_encoder: ids -> states.
      teacher: image or caption -> a vector, or None (no alignment with a teacher).

    Raises:
      ValueError: if the widths of two networks that meet do not fit.
    """

    transformer: UniAlign
    codec: Codec
    text_encoder: T5Encoder
    teacher: Teacher | None = None

    def __post_init__(self):
        config = self.transformer.config
        meets = [
            ("transformer.in_channels", config.in_channels, "the codec's latent channels", self.codec.latent_channels),
            ("transformer.out_channels", config.out_channels, "transformer.in_channels", config.in_channels),
            (
                "transformer.joint_attention_dim",
                config.joint_attention_dim,
                "text_encoder.d_model",
                self.text_encoder.config.d_model,
            ),
        ]
        if self.teacher is not None:
            meets.append(("transformer.semantic_dim", config.semantic_dim, "the teacher's width", self.teacher.dim))
        for name, value, other, expected in meets:
            if value != expected:
                raise ValueError(f"{name} is {value} but {other} is {expected}; make them equal")
        if self.text_encoder.config.vocab_size < config.vocab_size:
            raise ValueError(
                f"text_encoder.vocab_size {self.text_encoder.config.vocab_size} is below transformer.vocab_size "
                f"{config.vocab_size}: the text head would predict ids that have no embedding"
            )

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Random float32 parameters of all networks, plain trees without metadata boxes."""
        return nn.unbox(self._init_boxed(key))

    def abstract(self) -> dict[str, Any]:
        """Shapes of `init`'s result, in boxes with the logical axis names that `parallel.param_shardings` reads."""
        return jax.eval_shape(self._init_boxed, jax.random.key(0))

    def _init_boxed(self, key: jax.Array) -> dict[str, Any]:
        keys = jax.random.split(key, 4)
        config = self.transformer.config
        side = config.patch_size
        params = {
            "transformer": self.transformer.init(
                keys[0],
                Pass(
                    jnp.zeros((1, side, side, config.in_channels)),
                    jnp.zeros((1, 1, config.joint_attention_dim)),
                    jnp.zeros((1,)),
                ),
                semantic_depth=1,
            )["params"],
            "text_encoder": self.text_encoder.init(keys[1], jnp.zeros((1, 1), jnp.int32))["params"],
            "autoencoder": self.codec.init(keys[2]),
        }
        if self.teacher is not None:
            params["teacher"] = self.teacher.init(keys[3])
        return params

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """`(h, w, C)` of the latent of an image of `height x width` pixels."""
        factor = self.codec.downsample
        return height // factor, width // factor, self.codec.latent_channels

    def latent_shape_of(self, batch: Batch) -> tuple[int, int, int]:
        """`(h, w, C)` of the latents of a batch, be it of pixels or of cached moments."""
        if batch.moments is not None:
            return *batch.moments.shape[2:4], self.codec.latent_channels
        return self.latent_shape(*batch.target.shape[1:3])

    def denoise(self, params: Params, *passes: Pass, semantic_depth: int | None = None) -> list[Outputs]:
        """`UniAlign.__call__` with the transformer's parameters bound."""
        return self.transformer.apply({"params": params["transformer"]}, *passes, semantic_depth=semantic_depth)

    def encode_text(self, params: Params, ids: jax.Array) -> jax.Array:
        """int32 `[B, T]` -> states `[B, T, E]`."""
        return self.text_encoder.apply({"params": params["text_encoder"]}, ids)

    def encode_texts(self, params: Params, ids: jax.Array | None, most: int | None = None) -> jax.Array | None:
        """`Objective.texts`, int32 `[B, n, T]` -> states `[B, n, T, E]`; in parts of `most` rows a device, if not None.

        One call of the encoder for all: flattened so, a batch that is split over devices stays split.
        """
        if ids is None:
            return None
        rows, encode = ids.reshape(-1, ids.shape[-1]), functools.partial(self.encode_text, params)
        states = encode(rows) if most is None else parallel.in_parts(encode, rows, most)
        return states.reshape(*ids.shape, -1)

    def encode_images(self, params: Params, images: jax.Array) -> jax.Array:
        """float32 `[B, H, W, 3]` in [-1, 1] -> scaled latents `[B, h, w, C]`, the posterior's mean."""
        return self.codec.encode(params["autoencoder"], images)

    def decode_images(self, params: Params, latents: jax.Array) -> jax.Array:
        """Scaled latents `[B, h, w, C]` -> float32 `[B, H, W, 3]`, about [-1, 1], not clipped."""
        return self.codec.decode(params["autoencoder"], latents)

    def image_moments(self, params: Params, batch: Batch) -> jax.Array:
        """`Batch.moments` of a batch's pixels: target and references in one call, `[B, 1 + N, h, w, M]`."""
        images = to_unit_range(batch.target)[:, None]
        if batch.references is not None:
            images = jnp.concatenate([images, to_unit_range(batch.references)], axis=1)
        moments = self.codec.moments(params["autoencoder"], images.reshape(-1, *images.shape[2:]))
        return moments.reshape(*images.shape[:2], *moments.shape[1:])

    def teacher_vectors(self, params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """`Batch.teacher_image` and `Batch.teacher_text` of a batch's targets and captions, float32 `[B, S]`."""
        image = self.teacher.image_vectors(params["teacher"], to_unit_range(batch.target))
        return image, self.teacher.text_vectors(params["teacher"], batch.teacher_ids, batch.teacher_mask)

    def encode(self, params: Params, batch: Batch, posterior: jax.Array | None) -> Features:
        """What the frozen networks make of a batch: clean latents of all images in one call, teacher vectors.

        Args:
          params: all networks' parameters; of those whose work the batch brings along, none are read.
          batch: pixels and ids, or what a cache has made of them.
          posterior: `Draws.posterior`, or None for the posterior's mean.
        """
        moments = self.image_moments(params, batch) if batch.moments is None else batch.moments
        latents = self.codec.draw(moments, posterior)
        teacher_image, teacher_text = batch.teacher_image, batch.teacher_text
        if self.teacher is not None and teacher_image is None:
            teacher_image, teacher_text = self.teacher_vectors(params, batch)
        return Features(
            target=latents[:, 0],
            caption_ids=batch.caption_ids,
            caption_loss_mask=batch.caption_loss_mask,
            instruction_ids=batch.instruction_ids,
            null_ids=batch.null_ids,
            instruction_states=batch.instruction_states,
            null_states=batch.null_states,
            references=latents[:, 1:] if batch.images > 1 else None,
            reference_mask=batch.reference_mask,
            teacher_image=teacher_image,
            teacher_text=teacher_text,
        )


def _make(kind: type, name: str, model: Mapping[str, Any]):
    """A network's config dataclass from its mapping; see `typed.build`."""
    fields = model.get(name)
    if not fields:
        raise ValueError(f"model.{name} is missing")
    hints = typing.get_type_hints(kind)
    for key, value in fields.items():
        least = 0 if key in ("mask_token_id", "min_pixels") else 1  # all else are sizes and counts
        if hints.get(key) is int and type(value) is int and value < least:
            raise ValueError(f"model.{name}.{key} is {value}, expected {least} or more")
    return typed.build(kind, fields, f"model.{name}")


def build_networks(
    model: Mapping[str, Any], *, dtype: str = "bfloat16", remat: str = "none", attention: str = "auto", unroll: int = 1
) -> Networks:
    """The networks that a config's `model` describes.

    Args:
      model: mappings `transformer`, `text_encoder`, one of `autoencoder` and `pixel_codec`, and `teacher` or None, with
        the fields of their config dataclasses.
      dtype: compute dtype, "bfloat16" or "float32" (throughout).
      remat: a key of `models.blocks.REMAT_POLICIES`.
      attention: the transformer's backend, see `models.attention.attend`.
      unroll: see `models.unialign.UniAlign`.

    Raises:
      ValueError: for a network that is missing, or a field that is unknown, missing or wrong, naming it.
    """
    if dtype not in ("bfloat16", "float32"):
        raise ValueError(f"dtype is {dtype!r}; choose 'bfloat16' or 'float32'")
    compute = jnp.dtype(dtype)
    if bool(model.get("pixel_codec")) == bool(model.get("autoencoder")):
        raise ValueError(
            "model: expected one of autoencoder and pixel_codec, found "
            + ("both" if model.get("autoencoder") else "neither")
        )
    if model.get("pixel_codec"):
        codec = PixelCodec(_make(PixelCodecConfig, "pixel_codec", model))
    else:
        codec = AutoencoderCodec(_make(AutoencoderConfig, "autoencoder", model), compute)
    teacher = None
    if model.get("teacher"):
        teacher = QwenTeacher(_make(QwenTeacherConfig, "teacher", model), compute)
    return Networks(
        transformer=UniAlign(
            _make(TransformerConfig, "transformer", model),
            dtype=compute,
            remat=remat,
            attention=attention,
            unroll=unroll,
        ),
        codec=codec,
        text_encoder=T5Encoder(_make(T5Config, "text_encoder", model), dtype=compute),
        teacher=teacher,
    )
