"""The interface between images and latents, and its smallest implementation: space-to-depth, without parameters.

`PixelCodec` stands in for the autoencoder in models small enough to train where nothing pretrained exists; callers see
a `Codec` and need not know which one it is.
"""

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from unialign_jax.models.autoencoder import check_image_size, scale, unscale

COLOURS = 3


class Codec(Protocol):
    """Between images and the latents that the diffusion knows: `PixelCodec`, `autoencoder.AutoencoderCodec`.

    Images are float32 `[B, H, W, 3]` in [-1, 1]; latents are scaled, float32
    `[B, H / downsample, W / downsample, latent_channels]`.
    """

    @property
    def latent_channels(self) -> int: ...

    @property
    def downsample(self) -> int:
        """Image pixels per latent pixel, in each direction."""
        ...

    def init(self, key: jax.Array) -> Any:
        """A fresh parameter tree, leaves boxed with their logical axis names (`nn.unbox` takes them off)."""
        ...

    def moments(self, params: Any, images: jax.Array) -> jax.Array:
        """Images -> float32 `[B, h, w, M]`, all that `draw` needs to know of them: what a cache of latents holds.

        Raises ValueError for an image size that is not a multiple of `downsample`.
        """
        ...

    def draw(self, moments: jax.Array, noise: jax.Array | None = None) -> jax.Array:
        """Moments `[..., h, w, M]` -> scaled latents: a draw with the standard normal `noise`, the mean without."""
        ...

    def encode(self, params: Any, images: jax.Array) -> jax.Array:
        """Images -> scaled latents: the mean of their `moments`."""
        ...

    def decode(self, params: Any, latents: jax.Array) -> jax.Array:
        """Scaled latents -> images, not clipped."""
        ...


@dataclasses.dataclass(frozen=True)
class PixelCodecConfig:
    """How pixels become latents.

    patch: side of the square of pixels that becomes one latent pixel.
    scaling_factor, shift_factor: latents are `(pixel - shift_factor) * scaling_factor`, as for the autoencoder;
      photographs in [-1, 1] have a standard deviation of about 0.5, so 2.0 gives latents of unit variance.

    Raises:
      ValueError: for a patch below 1 or a scaling factor that is not positive.
    """

    patch: int
    scaling_factor: float = 1.0
    shift_factor: float = 0.0

    def __post_init__(self):
        if self.patch < 1:
            raise ValueError(f"patch is {self.patch}; it must be at least 1 pixel")
        if self.scaling_factor <= 0:
            raise ValueError(f"scaling_factor is {self.scaling_factor}; it must be positive")


@dataclasses.dataclass(frozen=True)
class PixelCodec:
    """A `Codec` without parameters or loss: its tree is `{}`, its posterior has no variance.

    A latent pixel's `3 * patch ** 2` channels are (row in the patch, column in the patch, colour), colour fastest.
    """

    config: PixelCodecConfig

    @property
    def latent_channels(self) -> int:
        return COLOURS * self.config.patch**2

    @property
    def downsample(self) -> int:
        return self.config.patch

    def init(self, key: jax.Array) -> dict:
        del key
        return {}

    def moments(self, params: dict, images: jax.Array) -> jax.Array:
        """Images float32 `[B, H, W, 3]` in [-1, 1] -> scaled latents float32 `[B, H/p, W/p, 3*p*p]`.

        Raises:
          ValueError: for an image size that is not a multiple of the patch.
        """
        del params
        patch = self.config.patch
        batch, height, width, colours = images.shape
        check_image_size(height, width, patch)
        x = images.astype(jnp.float32).reshape(batch, height // patch, patch, width // patch, patch, colours)
        x = jnp.swapaxes(x, 2, 3).reshape(batch, height // patch, width // patch, self.latent_channels)
        return scale(x, self.config)

    def draw(self, moments: jax.Array, noise: jax.Array | None = None) -> jax.Array:
        """The moments, which are the latents; noise is unused."""
        del noise
        return moments.astype(jnp.float32)

    def encode(self, params: dict, images: jax.Array) -> jax.Array:
        return self.draw(self.moments(params, images))

    def decode(self, params: dict, latents: jax.Array) -> jax.Array:
        """Inverse of `encode`: scaled latents `[B, h, w, 3*p*p]` -> images float32 `[B, h*p, w*p, 3]`, not clipped."""
        del params
        patch = self.config.patch
        batch, height, width, _ = latents.shape
        x = unscale(latents.astype(jnp.float32), self.config).reshape(batch, height, width, patch, patch, COLOURS)
        return jnp.swapaxes(x, 2, 3).reshape(batch, height * patch, width * patch, COLOURS)
