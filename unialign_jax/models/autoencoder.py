"""SD3's image autoencoder: `diffusers`' AutoencoderKL with 16 latent channels and no quantisation convolutions.

Upper floors see it through `AutoencoderCodec`, which has the interface `pixel_codec.Codec`.
"""

import dataclasses
import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from unialign_jax import parallel
from unialign_jax.models.attention import attend
from unialign_jax.models.layers import Dense, matmul_precision

LOG_VARIANCE_RANGE = (-30.0, 20.0)
QUERIES = 1024  # pixels that attend to all others at a time
# Image pixels that a device works at: half a million take 2 GiB, mostly feature maps of full resolution.
PIXELS = 2**19
CHANNELS = ("channels_in", "channels_out")


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
    """Shape of the autoencoder; field names are those of the public `vae/config.json`. The defaults are SD3's.

    Raises:
      ValueError: if a block's width cannot be divided into the norms' groups.
    """

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 16
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    scaling_factor: float = 1.5305
    shift_factor: float = 0.0609

    def __post_init__(self):
        object.__setattr__(self, "block_out_channels", tuple(self.block_out_channels))  # a list when read from JSON
        if not self.block_out_channels or any(width % self.norm_num_groups for width in self.block_out_channels):
            raise ValueError(
                f"block_out_channels is {self.block_out_channels}; it must hold at least one width, "
                f"and multiples of norm_num_groups = {self.norm_num_groups} only"
            )

    @property
    def downsample(self) -> int:
        """Image pixels per latent pixel, in each direction."""
        return 2 ** (len(self.block_out_channels) - 1)


def check_image_size(height: int, width: int, multiple: int) -> None:
    """Refuses image sizes that do not fill whole latent pixels.

    Raises:
      ValueError: naming the size and the multiple it needs.
    """
    if height % multiple or width % multiple or not (height and width):
        raise ValueError(
            f"image size {height}x{width} (height x width) must be a multiple of {multiple} in both directions; "
            "resize or crop it"
        )


def sample_posterior(mean: jax.Array, logvar: jax.Array, noise: jax.Array | None) -> jax.Array:
    """Latent drawn from the encoder's Gaussian with a given standard normal `noise`; its mean where `noise` is None.

    All arrays and the result are float32 `[..., h, w, C]`, unscaled.
    """
    return mean if noise is None else mean + jnp.exp(0.5 * logvar) * noise


def scale(latents: jax.Array, config) -> jax.Array:
    """Autoencoder latents -> the diffusion's: `(z - shift_factor) * scaling_factor` of a codec's config."""
    return (latents - config.shift_factor) * config.scaling_factor


def unscale(latents: jax.Array, config) -> jax.Array:
    """Inverse of `scale`."""
    return latents / config.scaling_factor + config.shift_factor


def _conv(features: int, name: str, dtype: jnp.dtype, *, size: int = 3, stride: int = 1, padding=1, axes=CHANNELS):
    """A convolution whose kernel travels to the images: XLA by itself sends a device all images for its channels."""

    def convolve(x, kernel, *arguments, **options):
        whole = parallel.gathered(kernel, (None, None, *axes))
        return parallel.constrain(
            jax.lax.conv_general_dilated(x, whole, *arguments, **options), "batch", None, None, None
        )

    return nn.Conv(
        features,
        (size, size),
        strides=stride,
        padding=padding,
        dtype=dtype,
        precision=matmul_precision(dtype),
        kernel_init=nn.with_logical_partitioning(nn.initializers.lecun_normal(), (None, None, *axes)),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros_init(), axes[1:]),
        conv_general_dilated=convolve,
        name=name,
    )


def _norm(groups: int, name: str) -> nn.GroupNorm:
    """GroupNorm in float32, whatever its input is."""
    return nn.GroupNorm(groups, epsilon=1e-6, dtype=jnp.float32, use_fast_variance=False, name=name)


class _Resnet(nn.Module):
    """Two normed convolutions beside a shortcut: `[B, H, W, C] -> [B, H, W, features]`."""

    features: int
    groups: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = _conv(self.features, "conv1", self.dtype)(nn.silu(_norm(self.groups, "norm1")(x)))
        y = _conv(self.features, "conv2", self.dtype)(nn.silu(_norm(self.groups, "norm2")(y)))
        if x.shape[-1] != self.features:
            x = _conv(self.features, "shortcut", self.dtype, size=1, padding=0)(x)
        return x + y


class _Attention(nn.Module):
    """Plain self-attention of all pixels, one head as wide as the feature map, beside a shortcut.

    Few queries at a time attend to all keys: of all of them, a latent of 128 x 128 has weights of 1 GiB, in float32.
    """

    groups: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        batch, height, width, channels = x.shape
        dense = functools.partial(Dense, channels, CHANNELS, dtype=self.dtype)
        y = _norm(self.groups, "norm")(x).reshape(batch, height * width, channels)
        query, key, value = (dense(name=name)(y)[:, :, None] for name in ("query", "key", "value"))
        pixels = height * width
        if pixels > QUERIES:
            padded = jnp.pad(query, ((0, 0), (0, -pixels % QUERIES), (0, 0), (0, 0)))
            parts = jnp.moveaxis(padded.reshape(batch, -1, QUERIES, 1, channels), 1, 0)
            y = jnp.moveaxis(jax.lax.map(lambda part: attend(part, key, value), parts), 0, 1)
            y = y.reshape(batch, -1, channels)[:, :pixels]
        else:
            y = attend(query, key, value)[:, :, 0]
        return x + dense(name="out")(y).reshape(x.shape)


class _Mid(nn.Module):
    """The blocks at the lowest resolution, of the encoder and of the decoder."""

    config: AutoencoderConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        resnet = functools.partial(_Resnet, self.config.block_out_channels[-1], self.config.norm_num_groups, self.dtype)
        x = resnet(name="resnet_0")(x)
        x = _Attention(self.config.norm_num_groups, self.dtype, name="attention")(x)
        return resnet(name="resnet_1")(x)


class _Down(nn.Module):
    """One resolution of the encoder."""

    config: AutoencoderConfig
    features: int
    last: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i in range(self.config.layers_per_block):
            x = _Resnet(self.features, self.config.norm_num_groups, self.dtype, name=f"resnet_{i}")(x)
        if self.last:
            return x
        # The published weights were trained with padding at the bottom and the right only.
        return _conv(self.features, "downsample", self.dtype, stride=2, padding=((0, 1), (0, 1)))(x)


class _Up(nn.Module):
    """One resolution of the decoder."""

    config: AutoencoderConfig
    features: int
    last: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i in range(self.config.layers_per_block + 1):
            x = _Resnet(self.features, self.config.norm_num_groups, self.dtype, name=f"resnet_{i}")(x)
        if self.last:
            return x
        x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
        return _conv(self.features, "upsample", self.dtype)(x)


class _Encoder(nn.Module):
    config: AutoencoderConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        config, widths = self.config, self.config.block_out_channels
        x = _conv(widths[0], "conv_in", self.dtype, axes=(None, "channels_out"))(x)
        for i, width in enumerate(widths):
            x = _Down(config, width, i == len(widths) - 1, self.dtype, name=f"down_{i}")(x)
        x = nn.silu(_norm(config.norm_num_groups, "norm_out")(_Mid(config, self.dtype, name="mid")(x)))
        # The last convolution is next to nothing in cost, and its result is what everything else reads: float32.
        return _conv(2 * config.latent_channels, "conv_out", jnp.float32, axes=("channels_in", None))(x)


class _Decoder(nn.Module):
    config: AutoencoderConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        config, widths = self.config, self.config.block_out_channels[::-1]
        x = _conv(widths[0], "conv_in", self.dtype, axes=(None, "channels_out"))(x)
        x = _Mid(config, self.dtype, name="mid")(x)
        for i, width in enumerate(widths):
            x = _Up(config, width, i == len(widths) - 1, self.dtype, name=f"up_{i}")(x)
        x = nn.silu(_norm(config.norm_num_groups, "norm_out")(x))
        # In bfloat16 the result's steps would be half of an 8-bit pixel's.
        return _conv(config.out_channels, "conv_out", jnp.float32, axes=("channels_in", None))(x)


class Autoencoder(nn.Module):
    """The network: `encode` and `decode` are its methods (`apply(..., method="encode")`). Parameters: made in float32.

    Attributes:
      config: shape of the network.
      dtype: compute dtype; norms, the softmax and the results are float32.
    """

    config: AutoencoderConfig
    dtype: jnp.dtype = jnp.bfloat16

    def setup(self):
        self.encoder = _Encoder(self.config, self.dtype)
        self.decoder = _Decoder(self.config, self.dtype)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Images -> their reconstruction from the posterior's mean; touches every parameter, so `init` uses it."""
        return self.decode(self.encode(images)[0])

    def encode(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The posterior of images `[B, H, W, in_channels]` in [-1, 1].

        Returns:
          Mean and log-variance, float32 `[B, H / downsample, W / downsample, latent_channels]`, unscaled; the
          log-variance is clipped to [-30, 20], as `diffusers` does.

        Raises:
          ValueError: for an image size that is not a multiple of `config.downsample`.
        """
        check_image_size(*images.shape[1:3], self.config.downsample)
        mean, logvar = jnp.split(self.encoder(images), 2, axis=-1)
        return mean, jnp.clip(logvar, *LOG_VARIANCE_RANGE)

    def decode(self, latents: jax.Array) -> jax.Array:
        """Unscaled latents `[B, h, w, latent_channels]` -> images, float32 `[B, h * downsample, w * downsample,
        out_channels]`, about [-1, 1] and not clipped.
        """
        return self.decoder(latents)


def _tile_starts(length: int, tile: int, overlap: int) -> np.ndarray:
    """Where tiles begin along one axis: as few as cover it with at least `overlap` between them, evenly spread."""
    count = 1 if length <= tile else -(-(length - overlap) // (tile - overlap))
    return np.round(np.linspace(0, length - tile, count)).astype(int)


def _blend_weights(starts: np.ndarray, tile: int) -> np.ndarray:
    """Each tile's weights along one axis, float32 `[tiles, tile]`: linear ramps over the overlaps; they sum to one."""
    position = np.arange(tile)
    weights = np.ones((len(starts), tile))
    for i, shared in enumerate(starts[:-1] + tile - starts[1:]):  # pixels that tiles i and i + 1 have in common
        rising = (position + 1) / (shared + 1)
        weights[i + 1] = np.minimum(weights[i + 1], rising)
        weights[i] = np.minimum(weights[i], rising[::-1])
    total = np.zeros(starts[-1] + tile)
    for start, weight in zip(starts, weights, strict=True):
        total[start : start + tile] += weight
    return np.stack([w / total[s : s + tile] for s, w in zip(starts, weights, strict=True)]).astype(np.float32)


def decode_tiled(decode_fn: Callable[[jax.Array], jax.Array], latents: jax.Array, tile: int, overlap: int) -> jax.Array:
    """Decodes latents in overlapping tiles of one size, one after the other, blended linearly where they overlap.

    The working memory is that of one tile of the batch, and `decode_fn` is compiled once. Latents that fit one tile are
    decoded as they are. Otherwise the result is that of `decode_fn` up to what a tile does not see beyond its edge: for
    the autoencoder that is the convolutions' surroundings, and the norms' and the attention's view of the whole image.

    Args:
      decode_fn: `[B, h, w, C] -> float32 [B, h * f, w * f, c]` for some integer f.
      latents: `[B, H, W, C]`, any size.
      tile: side of a tile, in latent pixels.
      overlap: latent pixels that neighbouring tiles share at least; 0 gives visible seams.

    Returns:
      `[B, H * f, W * f, c]`.

    Raises:
      ValueError: unless `0 <= overlap < tile`.
    """
    if not 0 <= overlap < tile:
        raise ValueError(f"overlap is {overlap} and tile is {tile} latent pixels; 0 <= overlap < tile must hold")
    batch, height, width, channels = latents.shape
    if max(height, width) <= tile:
        return decode_fn(latents)

    size = (batch, min(height, tile), min(width, tile), channels)
    shape = jax.eval_shape(decode_fn, jax.ShapeDtypeStruct(size, latents.dtype)).shape
    factor = shape[1] // size[1]
    tops, lefts = (_tile_starts(n, m, overlap) for n, m in zip((height, width), size[1:3], strict=True))
    rows, columns = (
        _blend_weights(starts * factor, m * factor) for starts, m in zip((tops, lefts), size[1:3], strict=True)
    )

    def paint(canvas: jax.Array, index: tuple[jax.Array, ...]):
        i, j, top, left = index
        image = decode_fn(jax.lax.dynamic_slice(latents, (0, top, left, 0), size))
        image = image * (jnp.asarray(rows)[i][:, None] * jnp.asarray(columns)[j][None, :])[..., None]
        corner = (0, top * factor, left * factor, 0)
        painted = jax.lax.dynamic_slice(canvas, corner, shape) + image
        return jax.lax.dynamic_update_slice(canvas, painted, corner), None

    i, j = (axis.ravel() for axis in np.mgrid[: len(tops), : len(lefts)])
    canvas = jnp.zeros((batch, height * factor, width * factor, shape[-1]), jnp.float32)
    return jax.lax.scan(paint, canvas, (i, j, tops[i], lefts[j]))[0]


def _at_once(height: int, width: int) -> int:
    """How many images of a size, in pixels, a device works at."""
    return max(1, PIXELS // max(1, height * width))


@dataclasses.dataclass(frozen=True)
class AutoencoderCodec:
    """The autoencoder as a `pixel_codec.Codec`; latents wider or higher than `tile` go through `decode_tiled`."""

    config: AutoencoderConfig = AutoencoderConfig()
    dtype: jnp.dtype = jnp.bfloat16
    tile: int = 128
    overlap: int = 32

    @property
    def latent_channels(self) -> int:
        return self.config.latent_channels

    @property
    def downsample(self) -> int:
        return self.config.downsample

    @property
    def module(self) -> Autoencoder:
        return Autoencoder(self.config, self.dtype)

    def init(self, key: jax.Array) -> dict:
        image = jnp.zeros((1, self.downsample, self.downsample, self.config.in_channels))
        return self.module.init(key, image)["params"]

    def moments(self, params: dict, images: jax.Array) -> jax.Array:
        def encode(images):
            return jnp.concatenate(self.module.apply({"params": params}, images, method="encode"), axis=-1)

        return parallel.in_parts(encode, images, _at_once(*images.shape[1:3]))

    def draw(self, moments: jax.Array, noise: jax.Array | None = None) -> jax.Array:
        mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
        return scale(sample_posterior(mean, logvar, noise), self.config)

    def encode(self, params: dict, images: jax.Array) -> jax.Array:
        return self.draw(self.moments(params, images))

    def decode(self, params: dict, latents: jax.Array) -> jax.Array:
        def decode(latents):
            decode_fn = functools.partial(self.module.apply, {"params": params}, method="decode")
            return decode_tiled(decode_fn, unscale(latents, self.config), self.tile, self.overlap)

        sides = (min(side, self.tile) * self.downsample for side in latents.shape[1:3])
        return parallel.in_parts(decode, latents, _at_once(*sides))
