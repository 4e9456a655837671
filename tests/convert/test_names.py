"""The name tables against the full-size public names and the trees of the real modules, without allocating any."""

import dataclasses
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from unialign_jax.convert import names
from unialign_jax.models.autoencoder import AutoencoderCodec, AutoencoderConfig
from unialign_jax.models.t5 import T5Config, T5Encoder
from unialign_jax.models.teachers import QwenTeacher, QwenTeacherConfig
from unialign_jax.models.unialign import Pass, TransformerConfig, UniAlign


def _transformer(config):
    one = jnp.zeros((1, 2, 2, config.in_channels)), jnp.zeros((1, 1, config.joint_attention_dim)), jnp.zeros((1,))
    return lambda: UniAlign(config).init(jax.random.key(0), Pass(*one), semantic_depth=1)["params"]


def _text_encoder(config):
    return lambda: T5Encoder(config).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]


def _autoencoder(config):
    return lambda: AutoencoderCodec(config, jnp.bfloat16).init(jax.random.key(0))


def _teacher(config):
    return lambda: QwenTeacher(config).init(jax.random.key(0))


CASES = {
    "transformer": ("transformer", TransformerConfig(), _transformer),
    "transformer with q/k norms": ("transformer", TransformerConfig(qk_norm="rms_norm"), _transformer),
    "text_encoder": ("text_encoder", T5Config(), _text_encoder),
    "autoencoder": ("autoencoder", AutoencoderConfig(), _autoencoder),
    "autoencoder of other widths": (
        "autoencoder",
        AutoencoderConfig(block_out_channels=(32, 64, 64), layers_per_block=1, latent_channels=4),
        _autoencoder,
    ),
    "teacher": ("teacher", QwenTeacherConfig(), _teacher),
}


@pytest.mark.parametrize("case", CASES)
def test_table_covers_the_module_exactly(case):
    network, config, init = CASES[case]
    abstract = nn.unbox(jax.eval_shape(init(config)))
    ours = {"/".join(path): leaf.shape for path, leaf in traverse_util.flatten_dict(abstract).items()}
    rows = names.table(network, dataclasses.asdict(config))
    assert {row.path: row.jax_shape for row in rows} == ours
    assert len(rows) == len(ours)


MANIFEST = {
    "transformer": ("transformer", TransformerConfig(), "", {}),
    "text_encoder": ("text_encoder", T5Config(), "", {"encoder.embed_tokens.weight": (32128, 4096)}),
    "vae": ("autoencoder", AutoencoderConfig(), "", {}),
    "qwen2_5_vl_visual": ("teacher", QwenTeacherConfig(), "visual.", {}),
}


@pytest.mark.parametrize("part", MANIFEST)
def test_every_public_name_and_shape_maps_one_to_one(golden, part):
    network, config, prefix, repeated = MANIFEST[part]
    public = json.loads((golden / "state_dict_manifest.json").read_text())[part]
    rows = [row for row in names.table(network, dataclasses.asdict(config)) if row.torch.startswith(prefix)]
    mapped = {name.removeprefix(prefix): shape for name, shape in names.torch_shapes(rows).items()}
    assert {**mapped, **repeated} == {name: tuple(shape) for name, shape in public.items()}
    # One to one: every part of every tensor is the place of exactly one row.
    places = [(name, row.part) for row in rows for name in row.names]
    assert len(places) == len(set(places))
    parts = {}
    for name, (index, count) in places:
        parts.setdefault(name, []).append((index, count))
    assert all(sorted(p) == [(i, len(p)) for i in range(len(p))] for p in parts.values())


@pytest.mark.parametrize(
    ("layout", "shape"),
    [
        (names.SAME, (3, 4)),
        (names.LINEAR, (3, 4)),
        (names.CONV, (5, 4, 3, 2)),
        (names.FIRST, (1, 3, 4)),
        (names.PATCH, (5, 4, 2, 3)),
        (names.FLAT_PATCH, (5, 3, 2, 4, 4)),
    ],
)
def test_layouts_invert(layout, shape):
    value = np.arange(np.prod(shape)).reshape(shape)
    ours = layout.to_jax(value)
    assert ours.shape == layout.shape(shape)
    np.testing.assert_array_equal(layout.to_torch(ours, shape), value)


def test_patch_layouts_are_the_convolutions_they_replace():
    """Against torch's convolution: rows of the matmul are ordered as our patches are."""
    import torch

    random = np.random.default_rng(0)
    image = random.standard_normal((1, 4, 6, 10)).astype(np.float32)
    kernel = random.standard_normal((5, 4, 2, 2)).astype(np.float32)
    expected = torch.nn.functional.conv2d(torch.from_numpy(image), torch.from_numpy(kernel), stride=2).numpy()
    patches = image.transpose(0, 2, 3, 1).reshape(1, 3, 2, 5, 2, 4).swapaxes(2, 3).reshape(1, 3, 5, 16)
    np.testing.assert_allclose((patches @ names.PATCH.to_jax(kernel)).transpose(0, 3, 1, 2), expected, atol=1e-5)

    clip = random.standard_normal((1, 3, 2, 4, 4)).astype(np.float32)
    kernel = random.standard_normal((5, 3, 2, 4, 4)).astype(np.float32)
    expected = torch.nn.functional.conv3d(torch.from_numpy(clip), torch.from_numpy(kernel)).numpy().reshape(5)
    np.testing.assert_allclose(clip.reshape(-1) @ names.FLAT_PATCH.to_jax(kernel), expected, atol=1e-5)
