"""The autoencoder against the recorded case and `diffusers`, tiled decoding, and the codec interface."""

import dataclasses
import functools
import json
import pathlib
import re

import diffusers
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from safetensors.numpy import load_file

from unialign_jax.models import autoencoder
from unialign_jax.models.autoencoder import (
    Autoencoder,
    AutoencoderCodec,
    AutoencoderConfig,
    decode_tiled,
    sample_posterior,
    scale,
    unscale,
)
from unialign_jax.models.pixel_codec import PixelCodec, PixelCodecConfig

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
SMALL = AutoencoderConfig(latent_channels=5, block_out_channels=(4, 8, 12), layers_per_block=1, norm_num_groups=4)
RENAMES = [
    (r"(down|up)_blocks\.(\d+)", r"\1_\2"),
    (r"mid_block\.attentions\.0", "mid.attention"),
    (r"mid_block", "mid"),
    (r"resnets\.(\d+)", r"resnet_\1"),
    (r"downsamplers\.0\.conv", "downsample"),
    (r"upsamplers\.0\.conv", "upsample"),
    (r"conv_shortcut", "shortcut"),
    (r"conv_norm_out", "norm_out"),
    (r"group_norm", "norm"),
    (r"to_q", "query"),
    (r"to_k", "key"),
    (r"to_v", "value"),
    (r"to_out\.0", "out"),
]


def from_torch(tensors: dict) -> dict:
    """The parameter tree of a public state dict: independent of the converter, so that each checks the other."""
    tree = {}
    for name, value in tensors.items():
        for pattern, replacement in RENAMES:
            name = re.sub(pattern, replacement, name)
        *path, leaf = name.split(".")
        if leaf == "weight":
            leaf = "scale" if value.ndim == 1 else "kernel"
            value = jnp.transpose(value, {1: (0,), 2: (1, 0), 4: (2, 3, 1, 0)}[value.ndim])
        functools.reduce(lambda node, key: node.setdefault(key, {}), path, tree)[leaf] = jnp.asarray(value)
    return tree


def torch_vae(config: AutoencoderConfig, seed=0):
    """A `diffusers` autoencoder whose every parameter matters, in float64 (so that its own rounding takes no part in a
    comparison), and the same parameters as our tree."""
    torch.manual_seed(seed)
    blocks = len(config.block_out_channels)
    model = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        use_quant_conv=False,
        use_post_quant_conv=False,
        **dataclasses.asdict(config),
    ).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)
    params = from_torch({name: value.numpy() for name, value in model.state_dict().items()})
    return model.double(), params


@pytest.fixture(scope="module")
def small():
    return torch_vae(SMALL)


def images_of(height, width, batch=2, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (batch, height, width, 3)).astype(np.float32)


def to_torch(x):
    return torch.from_numpy(np.moveaxis(np.asarray(x, np.float64), -1, 1))


def to_numpy(x):
    return np.moveaxis(x.numpy(), 1, -1)


def golden_vae(dtype=jnp.float32):
    fields = json.loads((GOLDEN / "vae/config.json").read_text())
    config = AutoencoderConfig(**{field.name: fields[field.name] for field in dataclasses.fields(AutoencoderConfig)})
    params = from_torch(load_file(GOLDEN / "vae/diffusion_pytorch_model.safetensors"))
    return Autoencoder(config, dtype), {"params": params}


def test_matches_recorded_case():
    module, variables = golden_vae()
    recorded = {name: np.moveaxis(value, 1, -1) for name, value in np.load(GOLDEN / "vae.npz").items()}
    mean, logvar = jax.jit(functools.partial(module.apply, method="encode"))(variables, recorded["image"])
    np.testing.assert_allclose(mean, recorded["latent_mean"], rtol=0, atol=2e-5)
    np.testing.assert_allclose(logvar, recorded["latent_logvar"], rtol=0, atol=2e-5)
    images = jax.jit(functools.partial(module.apply, method="decode"))(variables, recorded["latent_mean"])
    np.testing.assert_allclose(images, recorded["decoded"], rtol=0, atol=2e-5)


@pytest.mark.parametrize(("height", "width", "queries"), [(4, 4, 1024), (20, 36, 1024), (52, 12, 7)])
def test_matches_diffusers(small, monkeypatch, height, width, queries):
    monkeypatch.setattr(autoencoder, "QUERIES", queries)  # 39 pixels attend by seven
    reference, params = small
    module, images = Autoencoder(SMALL, jnp.float32), images_of(height, width)
    with torch.no_grad():
        posterior = reference.encode(to_torch(images)).latent_dist
        decoded = to_numpy(reference.decode(posterior.mean).sample)
    mean, logvar = jax.jit(functools.partial(module.apply, method="encode"))({"params": params}, images)
    latents = to_numpy(posterior.mean)
    assert mean.shape == (2, height // 4, width // 4, 5) and mean.dtype == logvar.dtype == jnp.float32
    np.testing.assert_allclose(mean, latents, rtol=0, atol=2e-5)
    np.testing.assert_allclose(logvar, to_numpy(posterior.logvar), rtol=0, atol=2e-5)
    ours = jax.jit(functools.partial(module.apply, method="decode"))({"params": params}, latents.astype(np.float32))
    assert ours.shape == images.shape and ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, decoded, rtol=0, atol=2e-5)


def test_posterior_matches_diffusers(small):
    """Log-variances that diffusers clips, and a draw with a given noise."""
    reference, params = torch_vae(SMALL, seed=1)
    offsets = np.linspace(-60, 60, 5)
    reference.encoder.conv_out.bias.data[5:] += torch.from_numpy(offsets)
    params["encoder"]["conv_out"]["bias"] = params["encoder"]["conv_out"]["bias"].at[5:].add(offsets)
    images = images_of(8, 12)
    with torch.no_grad():
        posterior = reference.encode(to_torch(images)).latent_dist
    assert isinstance(posterior, DiagonalGaussianDistribution)
    encode = jax.jit(functools.partial(Autoencoder(SMALL, jnp.float32).apply, method="encode"))
    mean, logvar = encode({"params": params}, images)
    assert logvar.min() == -30 and logvar.max() == 20
    np.testing.assert_allclose(logvar, to_numpy(posterior.logvar), rtol=0, atol=5e-5)
    noise = np.random.default_rng(0).normal(size=mean.shape).astype(np.float32)
    expected = to_numpy(posterior.mean + posterior.std * to_torch(noise))
    np.testing.assert_allclose(sample_posterior(mean, logvar, noise), expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(sample_posterior(mean, logvar, None), mean)


def test_full_size_shapes_are_the_published_ones():
    published = json.loads((GOLDEN / "state_dict_manifest.json").read_text())["vae"]
    abstract = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in published.items()}
    ours = jax.eval_shape(AutoencoderCodec().init, jax.random.key(0))
    assert nn.unbox(ours) == jax.eval_shape(from_torch, abstract)


def test_bfloat16_stays_close_to_float32(small):
    variables, images = {"params": small[1]}, images_of(24, 40)
    latents = np.random.default_rng(1).normal(size=(2, 6, 10, 5)).astype(np.float32)

    @functools.partial(jax.jit, static_argnums=0)
    def run(dtype):
        module = Autoencoder(SMALL, dtype)
        return *module.apply(variables, images, method="encode"), module.apply(variables, latents, method="decode")

    results = [run(jnp.float32), run(jnp.bfloat16)]
    for exact, rounded in zip(*results, strict=True):
        assert rounded.dtype == jnp.float32
        assert np.linalg.norm(rounded - exact) < 0.03 * np.linalg.norm(exact)


@pytest.mark.parametrize(("height", "width"), [(20, 22), (30, 24), (0, 8)])
def test_image_size_is_refused_by_name(height, width):
    codec = AutoencoderCodec(SMALL)
    with pytest.raises(ValueError, match=f"image size {height}x{width} .* multiple of 4"):
        jax.eval_shape(codec.encode, {}, jax.ShapeDtypeStruct((1, height, width, 3), jnp.float32))


def test_sd3_needs_multiples_of_eight():
    with pytest.raises(ValueError, match="image size 512x508 .* multiple of 8"):
        jax.eval_shape(AutoencoderCodec().encode, {}, jax.ShapeDtypeStruct((1, 512, 508, 3), jnp.float32))


@pytest.mark.parametrize("widths", [(8, 10), ()])
def test_widths_that_do_not_group_are_refused(widths):
    with pytest.raises(ValueError, match="block_out_channels"):
        AutoencoderConfig(block_out_channels=widths, norm_num_groups=4)


# --- tiled decoding


def enlarge(latents, factor=3):
    """A decoder that sees one latent pixel at a time: tiling must not change it at all."""
    pixels = jnp.repeat(jnp.repeat(latents, factor, axis=1), factor, axis=2)
    return jnp.stack([pixels.sum(-1), pixels[..., 0] ** 2], axis=-1)


@pytest.mark.parametrize(
    ("size", "tile", "overlap"),
    [
        ((16, 16), 8, 2),
        ((17, 29), 8, 3),
        ((9, 8), 8, 0),
        ((8, 23), 8, 4),
        ((5, 40), 8, 7),
        ((31, 6), 10, 6),
        ((13, 11), 1, 0),
    ],
)
def test_tiles_of_a_local_decoder_join_without_trace(size, tile, overlap):
    latents = jnp.asarray(np.random.default_rng(0).normal(size=(2, *size, 4)), jnp.float32)
    tiled = jax.jit(lambda z: decode_tiled(enlarge, z, tile, overlap))(latents)
    np.testing.assert_allclose(tiled, enlarge(latents), rtol=0, atol=2e-6)


def test_tiles_are_blended_linearly():
    """Each tile decodes to one number; across the overlap the result must run straight from one to the other."""

    def flat(z):
        return jnp.broadcast_to(z[:, :1, :1, :1], (len(z), 2 * z.shape[1], 2 * z.shape[2], 1))

    latents = jnp.arange(11.0).reshape(1, 1, 11, 1)
    row = np.asarray(decode_tiled(flat, latents, 7, 3))[0, 0, :, 0]  # tiles begin at latents 0 and 4
    np.testing.assert_allclose(row[:8], 0, atol=1e-6)
    np.testing.assert_allclose(row[8:14], 4 * np.arange(1, 7) / 7, rtol=1e-5)
    np.testing.assert_allclose(row[14:], 4, rtol=1e-6)


def test_every_tile_has_one_shape_and_is_compiled_once():
    shapes = []

    def decode_fn(z):
        shapes.append(z.shape)
        return enlarge(z)

    jax.jit(lambda z: decode_tiled(decode_fn, z, 8, 2)).lower(jnp.zeros((2, 37, 21, 4)))
    assert set(shapes) == {(2, 8, 8, 4)}
    assert len(shapes) <= 3  # traced for its shape and for the loop, not for each of the 24 tiles


def test_latents_of_one_tile_are_decoded_as_they_are(small):
    _, params = small
    latents = jnp.asarray(np.random.default_rng(0).normal(size=(1, 6, 9, 5)), jnp.float32)
    decode = jax.jit(functools.partial(Autoencoder(SMALL, jnp.float32).apply, {"params": params}, method="decode"))
    np.testing.assert_array_equal(decode_tiled(decode, latents, 9, 2), decode(latents))


def test_tiled_autoencoder_is_close_on_smooth_content():
    """Content that repeats within a tile, and residual branches weak enough that the network is about local: within 2 %
    of the untiled result (root mean square, against its standard deviation), 10 % anywhere, and at least as close as
    `diffusers` comes with the same tiles.
    """
    config = dataclasses.replace(SMALL, norm_num_groups=2)
    reference, _ = torch_vae(config)
    for name, parameter in reference.named_parameters():
        if "conv2" in name or "to_out" in name:
            parameter.data *= 0.1
    params = from_torch({name: value.float().numpy() for name, value in reference.state_dict().items()})
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:44, :37] * 2 * np.pi / 12
    angles, phases = rng.uniform(0, 2 * np.pi, (2, 5))
    waves = [np.sin(columns * np.cos(a) + rows * np.sin(a) + p) for a, p in zip(angles, phases, strict=True)]
    latents = jnp.asarray(np.stack(waves, axis=-1)[None], jnp.float32)

    decode = functools.partial(Autoencoder(config, jnp.float32).apply, {"params": params}, method="decode")
    whole = np.asarray(jax.jit(decode)(latents))
    ours = np.asarray(jax.jit(lambda z: decode_tiled(decode, z, 24, 8))(latents))
    reference.enable_tiling()
    reference.tile_latent_min_size, reference.tile_sample_min_size, reference.tile_overlap_factor = 24, 96, 8 / 24
    with torch.no_grad():
        theirs = to_numpy(reference.decode(to_torch(latents)).sample)
    assert ours.shape == theirs.shape == whole.shape
    assert np.std(ours - whole) < 0.02 * np.std(whole)
    assert np.abs(ours - whole).max() < 0.1 * np.std(whole)
    assert np.std(ours - whole) <= np.std(theirs - whole)


def test_tiling_bounds_the_memory(small):
    _, params = small
    decode = functools.partial(Autoencoder(SMALL, jnp.float32).apply, {"params": params}, method="decode")
    latents = jax.ShapeDtypeStruct((1, 48, 48, 5), jnp.float32)

    def working_bytes(decode_fn):
        return jax.jit(decode_fn).lower(latents).compile().memory_analysis().temp_size_in_bytes

    whole = working_bytes(decode)
    tiled = working_bytes(lambda z: decode_tiled(decode, z, 12, 4))
    assert tiled < whole / 6


@pytest.mark.parametrize(("tile", "overlap"), [(8, 8), (8, -1), (0, 0)])
def test_impossible_tiles_are_refused(tile, overlap):
    with pytest.raises(ValueError, match=f"overlap is {overlap} and tile is {tile}"):
        decode_tiled(enlarge, jnp.zeros((1, 9, 9, 4)), tile, overlap)


# --- codecs


def test_autoencoder_codec_speaks_scaled_latents(small):
    reference, params = small
    codec, images = AutoencoderCodec(SMALL, jnp.float32), images_of(12, 20)
    with torch.no_grad():
        posterior = reference.encode(to_torch(images)).latent_dist
    noise = np.random.default_rng(0).normal(size=(2, 3, 5, 5)).astype(np.float32)
    drawn = to_numpy(posterior.mean + posterior.std * to_torch(noise))
    encode = jax.jit(codec.encode)
    np.testing.assert_allclose(encode(params, images), (to_numpy(posterior.mean) - 0.0609) * 1.5305, atol=5e-5)
    latents = jax.jit(lambda *given: codec.draw(codec.moments(*given[:2]), given[2]))(params, images, noise)
    np.testing.assert_allclose(latents, (drawn - 0.0609) * 1.5305, atol=5e-5)
    assert latents.shape == (2, 12 // codec.downsample, 20 // codec.downsample, codec.latent_channels)
    with torch.no_grad():
        decoded = to_numpy(reference.decode(torch.from_numpy(np.moveaxis(drawn, -1, 1))).sample)
    np.testing.assert_allclose(jax.jit(codec.decode)(params, latents), decoded, atol=1e-4)


def test_autoencoder_codec_tiles_what_exceeds_its_tile(small):
    _, params = small
    codec = AutoencoderCodec(SMALL, jnp.float32, tile=6, overlap=2)
    latents = np.random.default_rng(0).normal(size=(1, 7, 5, 5)).astype(np.float32)
    decode = functools.partial(Autoencoder(SMALL, jnp.float32).apply, {"params": params}, method="decode")
    expected = jax.jit(lambda z: decode_tiled(decode, unscale(z, SMALL), 6, 2))(latents)
    tiled = jax.jit(codec.decode)(params, latents)
    untiled = jax.jit(dataclasses.replace(codec, tile=7).decode)(params, latents)
    np.testing.assert_allclose(tiled, expected, atol=1e-5)
    assert np.abs(tiled - untiled).max() > 1e-3


def test_scale_and_unscale_are_inverse():
    latents = np.random.default_rng(0).normal(size=(2, 3, 4, 16)).astype(np.float32)
    config = AutoencoderConfig()
    np.testing.assert_allclose(scale(np.float32(0.0609), config), 0, atol=1e-7)
    np.testing.assert_allclose(unscale(scale(latents, config), config), latents, atol=1e-6)


def test_codec_init_names_the_axes():
    boxed = jax.eval_shape(AutoencoderCodec(SMALL).init, jax.random.key(0))
    specs = nn.get_partition_spec(boxed)["encoder"]
    assert tuple(specs["down_1"]["resnet_0"]["conv1"]["kernel"]) == (None, None, "channels_in", "channels_out")
    assert tuple(specs["mid"]["attention"]["query"]["kernel"]) == ("channels_in", "channels_out")
    assert tuple(specs["conv_in"]["kernel"]) == (None, None, None, "channels_out")  # three colours divide by nothing


@pytest.mark.parametrize(("patch", "height", "width"), [(1, 3, 5), (2, 4, 10), (5, 20, 15)])
def test_pixel_codec_round_trip(patch, height, width):
    codec = PixelCodec(PixelCodecConfig(patch, scaling_factor=2.0, shift_factor=0.1))
    params, images = codec.init(jax.random.key(0)), images_of(height, width)
    latents = jax.jit(codec.encode)(params, images)
    assert params == {}
    assert latents.dtype == jnp.float32 and codec.latent_channels == 3 * patch**2 and codec.downsample == patch
    assert latents.shape == (2, height // patch, width // patch, codec.latent_channels)
    np.testing.assert_allclose(jax.jit(codec.decode)(params, latents), images, atol=1e-6)


def test_pixel_codec_channel_order_and_scale():
    images = np.arange(2 * 4 * 3, dtype=np.float32).reshape(1, 2, 4, 3)
    latents = PixelCodec(PixelCodecConfig(2, scaling_factor=0.5, shift_factor=1.0)).encode({}, images)
    second = [images[0, row, column, colour] for row in (0, 1) for column in (2, 3) for colour in range(3)]
    np.testing.assert_array_equal(latents[0, 0, 1], (np.array(second) - 1) / 2)
    unshuffled = torch.nn.functional.pixel_unshuffle(torch.from_numpy(np.moveaxis(images, -1, 1)), 2)
    expected = unshuffled.reshape(1, 3, 2, 2, 1, 2).permute(0, 4, 5, 2, 3, 1).reshape(1, 1, 2, 12).numpy()
    np.testing.assert_array_equal(latents, (expected - 1) / 2)


def test_pixel_codec_ignores_noise():
    codec, images = PixelCodec(PixelCodecConfig(4)), images_of(8, 8)
    noise = np.ones((2, 2, 2, 48), np.float32)
    np.testing.assert_array_equal(codec.draw(codec.moments({}, images), noise), codec.encode({}, images))


def test_pixel_codec_refusals():
    with pytest.raises(ValueError, match="image size 8x10 .* multiple of 4"):
        PixelCodec(PixelCodecConfig(4)).encode({}, images_of(8, 10))
    with pytest.raises(ValueError, match="patch is 0"):
        PixelCodecConfig(0)
    with pytest.raises(ValueError, match="scaling_factor is 0"):
        PixelCodecConfig(4, scaling_factor=0)
