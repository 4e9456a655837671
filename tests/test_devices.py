"""The same request alone, in a batch of 7, and on 1, 4 and 8 devices: one result."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

pytestmark = pytest.mark.slow
ROOT = pathlib.Path(__file__).parents[1]
# Runs with eight virtual devices; writes arrays by `NAME-DEVICES` and `NAME-alone-DEVICES`.
CHILD = """
import sys
import jax
import numpy as np
from unialign_jax import parallel
from unialign_jax.pipeline import UniAlignPipeline

out = {}
prompts = [f"a red square {i}" for i in range(7)]
pictures = list(np.random.default_rng(0).integers(0, 256, (7, 16, 16, 3), np.uint8))
few = {"steps": 3, "progress": False}
for dtype in ("float32", "bfloat16"):
    for devices, strategy in ((1, "data"), (4, "fsdp"), (8, "data=2+fsdp")):
        mesh = parallel.make_mesh(strategy, jax.devices()[:devices])
        pipeline = UniAlignPipeline.from_pretrained(sys.argv[1], mesh, dtype, progress=False)
        if devices > 1:
            kernel = pipeline.params["transformer"]["blocks"]["image"]["mlp_up"]["kernel"]
            assert kernel.sharding.shard_shape(kernel.shape) != kernel.shape
        if dtype == "bfloat16":
            out[f"pixels-{devices}"] = pipeline.edit(pictures, prompts, output="array", **few)
            if devices == 1:
                out["pixels-alone-1"] = pipeline.edit(pictures[2], prompts[2], seed=2, output="array", **few)
            continue
        out[f"latents-{devices}"] = pipeline.edit(pictures, prompts, output="latent", **few)
        out[f"tokens-{devices}"] = pipeline.caption(pictures, output="array", **few)
        turned = pipeline.edit(pictures[::-1], prompts[::-1], seed=list(range(7))[::-1], output="latent", **few)
        out[f"turned-{devices}"] = turned[::-1]
        if devices < 8:  # a batch of 7 is filled up to 8, and so is one alone on 8 devices
            alone = pipeline.edit(pictures[2], prompts[2], seed=2, output="latent", **few)
            out[f"latents-alone-{devices}"] = alone
            out[f"tokens-alone-{devices}"] = pipeline.caption(pictures[2], seed=2, output="array", **few)
np.savez(sys.argv[2], **{name: np.stack(x) if isinstance(x, list) else x for name, x in out.items()})
"""


@pytest.fixture(scope="module")
def results(stage, tmp_path_factory):
    file = tmp_path_factory.mktemp("devices") / "results.npz"
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    # Programs over eight devices need as many threads, whatever the machine has.
    environment = {**os.environ, "XLA_FLAGS": flags, "NPROC": "16", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", CHILD, str(stage[0]), str(file)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return dict(np.load(file))


def test_float32_latents_and_texts_are_the_same(results):
    reference, tokens = results["latents-1"], results["tokens-1"]
    assert reference.std() > 0.1 and len(np.unique(tokens)) > 3
    for name, array in results.items():
        kind, _, where = name.partition("-")
        row = slice(2, 3) if "alone" in where else slice(None)
        array = array[None] if "alone" in where else array
        if kind in ("latents", "turned"):
            np.testing.assert_allclose(array, reference[row], atol=1e-3, rtol=0, err_msg=name)
        elif kind == "tokens":
            np.testing.assert_array_equal(array, tokens[row], err_msg=name)


def test_bfloat16_pixels_are_the_same(results):
    """Of 99.9 % of the pixels, to one level of 255."""
    reference = results["pixels-1"].astype(int)
    for name in ("pixels-4", "pixels-8", "pixels-alone-1"):
        found = results[name] if "alone" not in name else results[name][None]
        expected = reference if "alone" not in name else reference[2:3]
        assert (np.abs(found - expected) <= 1).mean() >= 0.999, name
