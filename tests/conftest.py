"""Fixtures shared by all tests: the recorded cases and the small networks they were recorded with."""

import dataclasses
import json
import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The tests' programs are tiny: compiling them is most of the time, and this more than halves it.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_llvm_disable_expensive_passes=true"

import jax.numpy as jnp
import numpy as np
import pytest

from unialign_jax import convert
from unialign_jax.models.t5 import T5Config, T5Encoder
from unialign_jax.models.unialign import TransformerConfig, UniAlign

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
