"""Fixtures shared by all tests: the recorded cases and the small networks they were recorded with."""

import dataclasses
import gc
import json
import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Programs of several CPU devices can't be read from a cache, see `compilation_cache`.
os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)
# The tests' programs are tiny: compiling them is most of the time, and this leaves a quarter of it.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_llvm_disable_expensive_passes=true --xla_backend_optimization_level=0"
)

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from unialign_jax import convert
from unialign_jax.checkpoints import Checkpoints
from unialign_jax.data.tokenizer import Tokenizer
from unialign_jax.models.t5 import T5Config, T5Encoder
from unialign_jax.models.unialign import TransformerConfig, UniAlign
from unialign_jax.networks import build_networks
from unialign_jax.state import TrainState

GOLDEN = pathlib.Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def golden():
    """The folder of recorded cases."""
    return GOLDEN


@pytest.fixture(scope="session")
def case():
    """Loads a recorded case by name as a dict of arrays; latents come in PyTorch's order and leave in NHWC."""

    def load(name: str) -> dict[str, np.ndarray]:
        arrays = dict(np.load(GOLDEN / f"{name}.npz"))
        latent_like = ("latents", "init_latents", "reference_latents", "target_latents", "image_latents", "noise")
        for key in arrays:
            if key in latent_like or (key == "image_out" and arrays[key].ndim == 4):
                arrays[key] = np.moveaxis(arrays[key], -3, -1)
        return arrays

    return load


@pytest.fixture(scope="session")
def grad_norms():
    """Loads the recorded gradient norms of a loss case: public parameter name -> norm, -1 for none."""
    return lambda name: json.loads((GOLDEN / f"{name}_grad_norms.json").read_text())


@pytest.fixture(scope="session")
def transformer():
    """(module in float32, parameters) of the recorded transformer."""
    config = json.loads((GOLDEN / "transformer" / "config.json").read_text())
    config.pop("_class_name")
    params = convert.load_torch(GOLDEN / "transformer", "transformer")
    return UniAlign(TransformerConfig(**config), dtype=jnp.float32), params


@pytest.fixture(scope="session")
def text_encoder():
    """(module in float32, parameters) of the recorded text encoder."""
    public = json.loads((GOLDEN / "text_encoder" / "config.json").read_text())
    config = T5Config(**{field.name: public[field.name] for field in dataclasses.fields(T5Config)})
    return T5Encoder(config, dtype=jnp.float32), convert.load_torch(GOLDEN / "text_encoder", "text_encoder")


@pytest.fixture(scope="session")
def stage(tmp_path_factory):
    """(directory, averaged parameters) of a training stage, as far as reading its model needs one."""
    directory = tmp_path_factory.mktemp("run") / "stage"
    model = {
        "transformer": {
            "sample_size": 8, "num_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2, "in_channels": 12,
            "out_channels": 12, "joint_attention_dim": 16, "caption_projection_dim": 16, "pos_embed_max_size": 6,
            "vocab_size": 40, "adapter_hidden": 8, "semantic_dim": 12, "mask_token_id": 39,
        },
        "text_encoder": {"vocab_size": 40, "d_model": 16, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2},
        "pixel_codec": {"patch": 2},
        "teacher": None,
    }  # fmt: skip
    Tokenizer.learn(["a red square on a green field", "a blue disc"], 40).save(directory / "tokenizer")
    abstract = jax.eval_shape(build_networks(model).init, jax.random.key(0))
    trained = {name: abstract[name] for name in ("transformer", "text_encoder")}
    random = np.random.default_rng(0)
    trained, average = (
        jax.tree.map(lambda leaf: jnp.asarray(0.2 * random.standard_normal(leaf.shape, np.float32)), trained)
        for _ in range(2)
    )
    config = {
        "model": model, "trained": ("transformer", "text_encoder"), "seed": 0, "init_average": True,
        "optimizer": {"ema_rate": 0.9}, "data": {"text_length": 8, "height": 16, "width": 16},
    }  # fmt: skip
    with Checkpoints(directory / "checkpoints") as checkpoints:
        state = TrainState(jnp.int32(3), trained, {}, average)
        checkpoints.save(3, state, {}, {"config": config, "init": None})
    return directory, average


@pytest.fixture(scope="module")
def shared_compilations(tmp_path_factory):
    """A file's runs compile the same programs: on disk they are compiled once. After it the cache is what it was."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("xla")),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def pytest_addoption(parser):
    parser.addoption(
        "--sampling-prompts", type=int, default=20, help="Rows of the sampling runs that are killed and restarted."
    )
    parser.addoption("--sampling-kills", type=int, default=1, help="How often they are killed.")


@pytest.fixture
def float32_bytes(monkeypatch):
    """A list that gets, at every read of a run's parameters, the bytes of new float32 arrays that are then alive."""
    seen, restore, before = [], Checkpoints.restore_params, jax.live_arrays()
    known = set(map(id, before))  # `before` keeps them, so that no new array has the id of one

    def noted(self, *arguments, **options):
        params = restore(self, *arguments, **options)
        gc.collect()
        seen.append(sum(x.nbytes for x in jax.live_arrays() if id(x) not in known and x.dtype == jnp.float32))
        return params

    monkeypatch.setattr(Checkpoints, "restore_params", noted)
    return seen
