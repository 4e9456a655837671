"""T5's encoder against the recorded states and against `transformers` with the same random weights."""

import dataclasses
import functools
import json
import os
import pathlib
import re
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file
from transformers.models.t5.modeling_t5 import T5Attention

from unialign_jax.models.t5 import T5Config, T5Encoder, relative_position_buckets

FLOPS = """
import flax.linen as nn, jax, jax.numpy as jnp
from unialign_jax import parallel
from unialign_jax.models.t5 import T5Config, T5Encoder

encoder = T5Encoder(T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4), jnp.float32)
boxed = jax.eval_shape(lambda: encoder.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))
for strategy in ("data=1", "fsdp", "sequence=4", "tensor=4"):
    mesh = parallel.make_mesh(strategy, jax.devices()[: 1 if strategy == "data=1" else 4])
    params = jax.tree.map(parallel.placed, nn.unbox(boxed), parallel.param_shardings(boxed, mesh, check=False))
    ids = jax.ShapeDtypeStruct((4, 64), jnp.int32, sharding=parallel.batch_sharding(mesh))
    with jax.set_mesh(mesh):
        print(jax.jit(encoder.apply).lower(params, ids).compile().cost_analysis()["flops"])
"""
IN_PARTS = """
import flax.linen as nn, jax, jax.numpy as jnp, numpy as np
from unialign_jax import parallel
from unialign_jax.models import t5

encoder = t5.T5Encoder(t5.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4), jnp.float32)
boxed = jax.eval_shape(lambda: encoder.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))
params = nn.unbox(encoder.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))
ids = jax.random.randint(jax.random.key(1), (8, 16), 0, 64)
expected = jax.jit(lambda *x: encoder.apply(*x))(params, ids)
for strategy in ("fsdp", "fsdp=2+sequence=2", "fsdp=2+tensor=2", "tensor=4"):
    mesh = parallel.make_mesh(strategy)
    shardings = parallel.param_shardings(boxed, mesh, check=False), parallel.batch_sharding(mesh)
    placed = jax.device_put((params, ids), shardings)
    gathers = []
    for t5._WEIGHTS_BYTES in (10**9, 1):
        with jax.set_mesh(mesh):
            compiled = jax.jit(lambda *x: encoder.apply(*x)).lower(*placed).compile()
        gathers.append(compiled.as_text().count("all-gather("))
    loops = compiled.as_text().count(" while(")
    print(loops, *gathers, np.abs(compiled(*placed) - expected).max())
"""
GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
SMALL = T5Config(vocab_size=97, d_model=20, d_kv=6, d_ff=36, num_layers=3, num_heads=5)
LAYER_NAMES = {
    "layer.0.layer_norm": ("attention_norm", "scale"),
    "layer.0.SelfAttention.q": ("query", "kernel"),
    "layer.0.SelfAttention.k": ("key", "kernel"),
    "layer.0.SelfAttention.v": ("value", "kernel"),
    "layer.0.SelfAttention.o": ("out", "kernel"),
    "layer.1.layer_norm": ("mlp_norm", "scale"),
    "layer.1.DenseReluDense.wi_0": ("gate", "kernel"),
    "layer.1.DenseReluDense.wi_1": ("up", "kernel"),
    "layer.1.DenseReluDense.wo": ("down", "kernel"),
}


def from_torch(tensors: dict) -> dict:
    """The parameter tree of a public state dict: independent of the converter, so that each checks the other."""
    bias = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    layers = 1 + max(int(m[1]) for m in (re.match(r"encoder\.block\.(\d+)\.", name) for name in tensors) if m)
    blocks = {}
    for public, (module, leaf) in LAYER_NAMES.items():
        stack = jnp.stack([tensors[f"encoder.block.{i}.{public}.weight"] for i in range(layers)])
        blocks[module] = {leaf: stack.swapaxes(1, 2) if leaf == "kernel" else stack}
    return {
        "token_embed": {"embedding": jnp.asarray(tensors["shared.weight"])},
        "relative_bias": {"embedding": jnp.asarray(tensors[bias])},
        "blocks": blocks,
        "final_norm": {"scale": jnp.asarray(tensors["encoder.final_layer_norm.weight"])},
    }


def torch_t5(config: T5Config):
    """A `transformers` encoder as it starts, and the same parameters as our tree."""
    torch.manual_seed(0)
    settings = transformers.T5Config(feed_forward_proj="gated-gelu", **dataclasses.asdict(config))
    model = transformers.T5EncoderModel(settings).eval()
    return model, from_torch({name: value.numpy() for name, value in model.state_dict().items()})


def random_t5(config: T5Config):
    """As `torch_t5`, but with weights that make every part matter: norm scales and position biases of order one."""
    model, _ = torch_t5(config)
    for name, parameter in model.named_parameters():
        if "relative_attention_bias" in name or "layer_norm" in name:
            torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.7)
    return model, from_torch({name: value.numpy() for name, value in model.state_dict().items()})


def tokens(config: T5Config, batch: int, length: int) -> np.ndarray:
    return np.random.default_rng(length).integers(0, config.vocab_size, (batch, length), dtype=np.int32)


def test_matches_recorded_states():
    fields = json.loads((GOLDEN / "text_encoder/config.json").read_text())
    config = T5Config(**{name: fields[name] for name in T5Config.__dataclass_fields__})
    params = from_torch(load_file(GOLDEN / "text_encoder/model.safetensors"))
    recorded = np.load(GOLDEN / "text_encoder.npz")
    states = jax.jit(T5Encoder(config, jnp.float32).apply)({"params": params}, recorded["ids"].astype(np.int32))
    np.testing.assert_allclose(states, recorded["hidden"], rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("length", "config"),
    [
        (1, SMALL),
        (13, SMALL),
        (301, SMALL),  # past the last bucket's distance
        (77, T5Config(61, 16, 4, 24, 2, 3, relative_attention_num_buckets=12, relative_attention_max_distance=40)),
    ],
)
def test_matches_transformers(length, config):
    reference, params = random_t5(config)
    ids = tokens(config, 2, length)
    with torch.no_grad():  # in float64, so that the reference's own rounding takes no part in the comparison
        expected = reference.double()(torch.from_numpy(ids).long()).last_hidden_state.numpy()
    states = jax.jit(T5Encoder(config, jnp.float32).apply)({"params": params}, ids)
    assert states.dtype == jnp.float32
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(states, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(("buckets", "distance"), [(32, 128), (16, 64), (6, 40), (32, 100), (8, 20)])
def test_buckets_match_transformers_at_every_distance(buckets, distance):
    config = T5Config(relative_attention_num_buckets=buckets, relative_attention_max_distance=distance)
    length = 700
    offset = torch.arange(length)[None, :] - torch.arange(length)[:, None]
    expected = T5Attention._relative_position_bucket(offset, True, buckets, distance)
    np.testing.assert_array_equal(relative_position_buckets(length, config), expected)


def test_bfloat16_stays_close_to_float32():
    config = T5Config(97, 32, 8, 64, 6, 4)
    _, params = torch_t5(config)
    ids = tokens(config, 2, 40)
    exact = np.asarray(T5Encoder(config, jnp.float32).apply({"params": params}, ids))
    rounded = T5Encoder(config).apply({"params": params}, ids)
    assert rounded.dtype == jnp.bfloat16
    error = np.asarray(rounded, np.float32) - exact
    assert np.linalg.norm(error) < 0.02 * np.linalg.norm(exact)


def test_small_updates_are_not_lost_in_bfloat16():
    """Sixty-four tiny updates of the same direction: each would be rounded away if the stream were bfloat16."""
    layers = 64
    _, params = random_t5(T5Config(97, 32, 8, 64, 1, 4))
    params["blocks"] = jax.tree.map(lambda x: jnp.repeat(x, layers, axis=0), params["blocks"])
    config = T5Config(97, 32, 8, 64, layers, 4)
    ids = tokens(config, 2, 9)

    def states(dtype, size):
        scaled = {name: {"kernel": size * params["blocks"][name]["kernel"]} for name in ("out", "down")}
        tree = params | {"blocks": params["blocks"] | scaled}
        return np.asarray(T5Encoder(config, dtype).apply({"params": tree}, ids), np.float32)

    exact = states(jnp.float32, 3e-3)
    effect = np.linalg.norm(exact - states(jnp.float32, 0.0))
    assert 0.1 * np.linalg.norm(exact) < effect
    assert np.linalg.norm(states(jnp.bfloat16, 3e-3) - exact) < 0.05 * effect


def test_initial_scales_are_those_of_transformers():
    config = T5Config(vocab_size=500, d_model=64, d_kv=16, d_ff=256, num_layers=2, num_heads=8)
    _, expected = torch_t5(config)
    boxed = jax.jit(T5Encoder(config).init)(jax.random.key(0), jnp.zeros((1, 3), jnp.int32))
    params = nn.unbox(boxed)["params"]
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, expected)
    for path, value in jax.tree.leaves_with_path(params):
        target = jnp.std(functools.reduce(lambda tree, key: tree[key.key], path, expected))
        np.testing.assert_allclose(jnp.std(value), target, rtol=0.12, err_msg=jax.tree_util.keystr(path))
    query = params["blocks"]["query"]["kernel"]
    np.testing.assert_allclose(jnp.std(query[0] - query[1]), 2**0.5 * jnp.std(query), rtol=0.05)  # each layer its own


def test_id_outside_the_vocabulary_is_not_silent():
    _, params = torch_t5(SMALL)
    states = jax.jit(T5Encoder(SMALL, jnp.float32).apply)(
        {"params": params}, jnp.array([[1, 2], [1, SMALL.vocab_size]])
    )
    assert jnp.isfinite(states[0]).all() and jnp.isnan(states[1]).any()


def test_full_size_shapes_are_the_published_ones():
    published = json.loads((GOLDEN / "state_dict_manifest.json").read_text())["text_encoder"]
    abstract = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in published.items()}
    ours = jax.eval_shape(T5Encoder(T5Config()).init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    assert nn.unbox(ours)["params"] == jax.eval_shape(from_torch, abstract)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"relative_attention_num_buckets": 7}, "relative_attention_num_buckets is 7"),
        ({"relative_attention_max_distance": 8}, "relative_attention_max_distance is 8"),
    ],
)
def test_contradicting_config_is_refused(fields, named):
    with pytest.raises(ValueError, match=named):
        T5Config(**fields)


def test_devices_share_the_work_on_every_axis():
    virtual = {"NPROC": "16", "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    done = subprocess.run([sys.executable, "-c", FLOPS], env=os.environ | virtual, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    alone, *shared = map(float, done.stdout.split())
    assert len(shared) == 3 and max(shared) < 0.3 * alone, (alone, shared)


def test_weights_are_made_for_some_samples_at_a_time_where_they_are():
    """In parts, attention on a mesh of four devices gathers no more than whole: heads and tokens stay split."""
    virtual = {"NPROC": "16", "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    done = subprocess.run([sys.executable, "-c", IN_PARTS], env=os.environ | virtual, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = [list(map(float, line.split())) for line in done.stdout.splitlines()]
    assert len(results) == 4
    for loops, whole, in_parts, error in results:
        assert loops == 2 and in_parts <= whole and error < 1e-5, results  # over blocks, and in each over parts
