"""The linear layer split over a mesh, against plain NumPy, forward and backward."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np

from unialign_jax import parallel
from unialign_jax.models.layers import Dense, spread

# Strategy, shape of the inputs, logical axes of the kernel. The last two batches are not divided by the mesh.
SPLIT = [
    ("data=2+fsdp=4", (8, 6, 32), ("embed", "mlp")),
    ("fsdp=4+tensor=2", (4, 6, 32), ("embed", "heads")),
    ("fsdp=4+tensor=2", (4, 6, 32), ("heads", "embed")),
    ("fsdp=2+sequence=2+tensor=2", (4, 6, 32), ("mlp", "embed")),
    ("data=2+fsdp=2+sequence=2", (4, 32), ("text_embed", "embed")),
    ("data=2+sequence=4", (4, 6, 32), (None, "embed")),
    ("fsdp", (6, 5, 32), ("embed", "mlp")),
    ("data=2+fsdp=2+sequence=2", (1, 5, 32), ("embed", "mlp")),
]


def split_errors() -> None:
    """Prints the largest relative errors of output and gradients for every case of `SPLIT`; needs 8 devices."""
    errors = []
    for strategy, shape, axes in SPLIT:
        rng = np.random.default_rng(len(errors))
        x, weight, cotangent = (
            rng.normal(size=size).astype(np.float32) for size in (shape, (32, 48), (*shape[:-1], 48))
        )
        layer = Dense(48, axes, use_bias=False, dtype=jnp.float32)

        def product(weight, x, layer=layer):
            return layer.apply({"params": {"kernel": weight}}, x)

        def all_three(weight, x, cotangent, product=product):
            y, back = jax.vjp(product, weight, x)
            return y, *back(cotangent)

        mesh = parallel.make_mesh(strategy)
        with jax.set_mesh(mesh):
            where = jax.sharding.NamedSharding(mesh, parallel.partition(axes, weight.shape, mesh))
            ours = jax.jit(all_three)(jax.device_put(weight, where), x, cotangent)
        rows, back = x.reshape(-1, 32).astype(np.float64), cotangent.reshape(-1, 48).astype(np.float64)
        expected = rows @ weight, rows.T @ back, back @ weight.T
        pairs = [(np.asarray(a).reshape(b.shape), b) for a, b in zip(ours, expected, strict=True)]
        errors.append(float(np.max([np.abs(a - b).max() / np.abs(b).max() for a, b in pairs])))
    print(json.dumps(errors))


def test_split_equals_whole():
    code = f"import runpy; runpy.run_path({__file__!r})['split_errors']()"
    # Sharded programs on few cores deadlock unless there are more threads than devices.
    virtual = {"NPROC": "16", "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | virtual, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    errors = json.loads(done.stdout)
    assert len(errors) == len(SPLIT)
    assert np.max(errors) < 1e-6, errors


def test_gradients_of_many_bfloat16_tokens_lose_nothing():
    """Of gradients that push into one direction, a sum in bfloat16 would drop a growing part."""
    cotangent = np.random.default_rng(0).normal(0.3, 1, (64, 512, 8)).astype(jnp.bfloat16)
    params = {"kernel": jnp.ones((4, 8)), "bias": jnp.zeros(8)}
    layer, x = Dense(8, ("embed", "mlp")), jnp.zeros((64, 512, 4), jnp.bfloat16)
    _, back = jax.vjp(lambda params: layer.apply({"params": params}, x), params)
    [bias] = (made["bias"] for made in back(jnp.asarray(cotangent)))
    np.testing.assert_allclose(bias, cotangent.astype(np.float64).sum((0, 1)), rtol=2e-3)

    gate, update = jnp.ones((64, 1, 8), jnp.bfloat16), jnp.asarray(cotangent)
    _, back = jax.vjp(lambda gate: spread(gate, update.shape, jnp.bfloat16) * update, gate)
    expected = np.square(cotangent.astype(np.float64)).sum(1, keepdims=True)
    np.testing.assert_allclose(np.asarray(back(update)[0], np.float64), expected, rtol=5e-3)  # bfloat16 itself
