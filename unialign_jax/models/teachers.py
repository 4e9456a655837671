"""Semantic teachers: frozen networks that give one vector per image and one per caption, which training aligns to.

Source: arXiv 2509.23760, intrinsic-modal alignment. `Teacher` is all that the rest of the package knows of one.
"""

import dataclasses
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp

from unialign_jax import parallel
from unialign_jax.models.layers import mean_tokens
from unialign_jax.models.qwen_vision import QwenVisionConfig, QwenVisionTower, extract_patches, resized_size

Params = Any  # a tree of arrays
# Of attention weights that a device holds at a time: 20 images of 512 x 512 pixels, one of 1024 x 1024.
_WEIGHTS_BYTES = 2 << 30


class Teacher(Protocol):
    """A frozen network with an image and a text side of one width. Its vectors are compared by their cosine alone."""

    @property
    def dim(self) -> int:
        """Width of both kinds of vector."""

    @property
    def vocab_size(self) -> int:
        """How many ids it knows."""

    def init(self, key: jax.Array) -> Params:
        """Random parameters, float32, boxed with logical axis names (see `flax.linen.unbox`)."""

    def image_vectors(self, params: Params, images: jax.Array) -> jax.Array:
        """Images `[B, H, W, 3]` in [-1, 1] -> float32 `[B, dim]`."""

    def text_vectors(self, params: Params, ids: jax.Array, mask: jax.Array) -> jax.Array:
        """Ids of the teacher's tokenizer, int32 `[B, T]`, and bool `[B, T]`, False on padding -> float32 `[B, dim]`."""


@dataclasses.dataclass(frozen=True)
class QwenTeacherConfig(QwenVisionConfig):
    """The vision tower's config and the rows of the input-embedding table, whose width is `out_hidden_size`."""

    vocab_size: int = 152064


@dataclasses.dataclass(frozen=True)
class QwenTeacher:
    """Qwen2.5-VL's vision tower and input-embedding table; the language model between them is not used.

    Attributes:
      config: shapes; the defaults are Qwen2.5-VL-7B's.
      dtype: compute dtype of the tower; vectors are always averaged and returned in float32.

    The parameters are `{"vision": ..., "token_embed": {"embedding": [vocab_size, out_hidden_size]}}`.
    """

    config: QwenTeacherConfig
    dtype: jnp.dtype = jnp.bfloat16

    @property
    def dim(self) -> int:
        """Width of both kinds of vector: the language model's."""
        return self.config.out_hidden_size

    @property
    def vocab_size(self) -> int:
        """How many ids it knows."""
        return self.config.vocab_size

    @property
    def _tower(self) -> QwenVisionTower:
        return QwenVisionTower(self.config, self.dtype)

    def init(self, key: jax.Array) -> Params:
        """Random parameters, float32, boxed with logical axis names."""
        config = self.config
        vision_key, text_key = jax.random.split(key)
        merge = config.spatial_merge_size
        patches = jnp.zeros((1, merge, merge, config.patch_values))
        embed = nn.with_logical_partitioning(nn.initializers.normal(0.02), ("vocab", "embed"))
        return {
            "vision": self._tower.init(vision_key, patches)["params"],
            "token_embed": {"embedding": embed(text_key, (config.vocab_size, self.dim), jnp.float32)},
        }

    def image_vectors(self, params: Params, images: jax.Array) -> jax.Array:
        """Mean of the merged vision tokens of each image: float32 `[B, H, W, 3]` in [-1, 1] -> float32 `[B, dim]`.

        Raises:
          ValueError: for an aspect ratio above 200.
        """
        config = self.config
        height, width = resized_size(config, *images.shape[1:3])
        weights = 4 * config.num_heads * (height * width // config.patch_size**2) ** 2

        def vectors(images: jax.Array) -> jax.Array:
            return mean_tokens(self._tower.apply({"params": params["vision"]}, extract_patches(config, images)))

        return parallel.in_parts(vectors, images, max(_WEIGHTS_BYTES // weights, 1))

    def text_vectors(self, params: Params, ids: jax.Array, mask: jax.Array) -> jax.Array:
        """Mean of the input embeddings of each caption: int32, bool `[B, T]` -> float32 `[B, dim]`.

        Padding is left out, so a caption's vector does not depend on its batch; the published code averages it in. A
        caption without tokens gives zeros; an id outside the table gives NaN.
        """
        embedded = jnp.take(params["token_embed"]["embedding"], ids, axis=0, mode="fill")
        return mean_tokens(embedded, mask)
