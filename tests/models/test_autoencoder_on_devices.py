"""The autoencoder on several devices: what each of them holds of the images, and how many it works at."""

import itertools
import json
import os
import re
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unialign_jax import parallel
from unialign_jax.models import autoencoder
from unialign_jax.models.autoencoder import AutoencoderCodec, AutoencoderConfig


def work_on_eight_devices():
    """Prints, for several limits of what a device works at: the largest error, and what the compiled program holds."""
    config = AutoencoderConfig(latent_channels=16, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4)
    codec = AutoencoderCodec(config, jnp.float32)
    boxed, params = jax.eval_shape(codec.init, jax.random.key(0)), nn.unbox(codec.init(jax.random.key(0)))
    for strategy, (name, shape) in itertools.product(
        ("fsdp", "data=2+fsdp"), {"decode": (32, 8, 8, 16), "moments": (32, 16, 16, 3)}.items()
    ):
        mesh, call = parallel.make_mesh(strategy), getattr(codec, name)
        split = parallel.batch_sharding(mesh)
        x = jax.random.normal(jax.random.key(1), shape)
        autoencoder.PIXELS = 10**9
        expected = jax.jit(lambda *arguments, call=call: call(*arguments))(params, x)
        arguments = jax.device_put((params, x), (parallel.param_shardings(boxed, mesh, check=False), split))
        for at_once, pixels in ((4, 10**9), (2, 3 * 16**2), (1, 1)):
            autoencoder.PIXELS = pixels
            with jax.set_mesh(mesh):
                program = jax.jit(lambda *arguments, call=call: call(*arguments), out_shardings=split)
                compiled = program.lower(*arguments).compile()
                error = np.abs(compiled(*arguments) - expected).max()
            text = compiled.as_text()
            held = set(map(int, re.findall(r"f32\[(\d+),(?:8|16|18),(?:8|16|18),\d+\]", text)))
            loops = re.findall(r'known_trip_count":{"n":"(\d+)"', text)
            print(json.dumps([at_once, float(error), sorted(held), loops]))


@pytest.mark.slow
def test_images_stay_on_their_devices_and_are_worked_off_in_parts():
    """Kernels are split over the devices that split the batch: they travel, the 32 images must not."""
    code = f"import runpy; runpy.run_path({__file__!r})['work_on_eight_devices']()"
    # Sharded programs on few cores deadlock unless there are more threads than devices.
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    virtual = {"NPROC": "16", "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | virtual, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = list(map(json.loads, done.stdout.splitlines()))
    assert len(results) == 12
    for at_once, error, held, loops in results:
        assert error < 2e-5
        assert at_once in held and max(held) == 4, held
        assert loops == ([] if at_once == 4 else [str(4 // at_once)])
