"""The published size on this machine's CPU, from a converted random checkpoint; UNIALIGN_FULL_SIZE=1 runs it.

It takes some minutes, 10 GB of disk and up to 16 GB of memory, which is what it checks.
"""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parent
LIMIT_GIB = 16.0
SIZES = {
    "transformer": {
        **{"sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 24},
        **{"attention_head_dim": 64, "num_attention_heads": 24, "caption_projection_dim": 1536},
        **{"joint_attention_dim": 4096, "pos_embed_max_size": 192, "vocab_size": 32100, "mask_token_id": 32099},
        **{"adapter_hidden": 2048, "semantic_dim": 3584},
    },
    # One of T5-XXL's 24 blocks: its text states are not what is measured.
    "text_encoder": {
        **{"vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 1, "num_heads": 64},
        **{"relative_attention_num_buckets": 32, "relative_attention_max_distance": 128},
    },
    "vae": {
        **{"latent_channels": 16, "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2},
        **{"norm_num_groups": 32, "scaling_factor": 1.5305, "shift_factor": 0.0609},
    },
}
FILES = {
    "transformer": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
}
FORWARD = """
import resource, sys
import flax.linen as nn, jax, jax.numpy as jnp
from unialign_jax.convert import store
from unialign_jax.models.unialign import Pass
from unialign_jax.networks import build_networks
networks = build_networks(store.read_config(sys.argv[1]), dtype="bfloat16")
here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
shardings = jax.tree.map(lambda _: here, nn.unbox(networks.abstract())["transformer"])
params = {"transformer": store.restore_network(sys.argv[1], "transformer", dtype=jnp.bfloat16, shardings=shardings)}
size = sum(x.size for x in jax.tree.leaves(params))
key = jax.random.key(0)
latents, states = jax.random.normal(key, (1, 64, 64, 16)), jax.random.normal(key, (1, 256, 4096), jnp.bfloat16)
[out] = jax.jit(lambda params, *inputs: networks.denoise(params, Pass(*inputs)))(
    params, latents, states, jnp.array([500.0])
)
assert out.image.shape == (1, 64, 64, 16) and out.text_logits.shape == (1, 256, 32100)
assert jnp.isfinite(out.image).all() and jnp.isfinite(out.text_logits).all() and jnp.std(out.image) > 0.01
print(size, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""


def write_pipeline(directory: pathlib.Path) -> None:
    """A public pipeline directory of random float16 tensors, by the recorded manifest of the published checkpoint."""
    import torch
    from diffusers.models.embeddings import get_2d_sincos_pos_embed
    from safetensors.torch import save_file

    shutil.copytree(HERE / "golden", directory, ignore=shutil.ignore_patterns("*.npz", "*grad*", "state*"))
    manifest = json.loads((HERE / "golden" / "state_dict_manifest.json").read_text())
    positions = get_2d_sincos_pos_embed(1536, 192, base_size=64, interpolation_scale=1, output_type="pt")
    draw = torch.Generator().manual_seed(0)
    for name, fields in SIZES.items():
        tensors = {}
        for key, shape in manifest[name].items():
            if name == "text_encoder" and re.search(r"block\.[1-9]", key):
                continue
            scale = 0.5 / shape[-1] ** 0.5 if len(shape) > 1 else 0.02
            offset = float(len(shape) == 1 and "norm" in key and key.endswith("weight"))
            tensors[key] = (torch.randn(shape, generator=draw) * scale + offset).to(torch.float16)
        if name == "transformer":
            tensors["pos_embed.pos_embed"] = positions[None].to(torch.float16)
        if name == "text_encoder":
            tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"].clone()
        save_file(tensors, directory / name / FILES[name], metadata={"format": "pt"})
        file = directory / name / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.mark.skipif(not os.environ.get("UNIALIGN_FULL_SIZE"), reason="minutes and 16 GB: UNIALIGN_FULL_SIZE=1 runs it")
def test_a_forward_pass_of_the_published_size_fits_16_gb(tmp_path):
    write_pipeline(tmp_path / "public")

    def python(*arguments):
        environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
        return subprocess.run(
            [sys.executable, *arguments], check=True, capture_output=True, text=True, cwd=ROOT, env=environment
        ).stdout

    python("launch/convert.py", "--to=jax", f"--source={tmp_path / 'public'}", f"--target={tmp_path / 'jax'}")
    shutil.rmtree(tmp_path / "public")
    parameters, peak = python("-c", FORWARD, str(tmp_path / "jax")).split()[-2:]
    shutil.rmtree(tmp_path / "jax")
    print(f"{int(parameters) / 1e9:.3f} B parameters in bfloat16, peak {float(peak):.1f} GiB")
    assert 2.12e9 < int(parameters) < 2.13e9
    assert float(peak) < LIMIT_GIB
