"""The exported directory, run by PyTorch: the same latents for generate, edit and compose, the same caption tokens."""

import shutil

import jax
import numpy as np
import pytest

from unialign_jax import convert, torch_check
from unialign_jax.data.tokenizer import Tokenizer
from unialign_jax.inference.presets import Protocol
from unialign_jax.networks import build_networks
from unialign_jax.pipeline import UniAlignPipeline

LENGTH = 256  # of the published texts, which directories without a run are sampled with
PIXEL_MODEL = {
    "pixel_codec": {"patch": 4, "scaling_factor": 2.0, "shift_factor": 0.1},
    "transformer": {
        "sample_size": 8, "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 4, "in_channels": 48,
        "out_channels": 48, "joint_attention_dim": 24, "caption_projection_dim": 64, "pos_embed_max_size": 6,
        "vocab_size": 80, "adapter_hidden": 8, "semantic_dim": 12, "mask_token_id": 79,
    },
    "text_encoder": {"vocab_size": 80, "d_model": 24, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 4},
}  # fmt: skip


def tokenizer(size):
    rng = np.random.default_rng(0)
    words = ["".join(chr(97 + c) for c in rng.integers(0, 26, 5)) for _ in range(400)]
    return Tokenizer.learn([" ".join(words), torch_check.PROMPT], size)


@pytest.fixture(scope="module")
def directories(tmp_path_factory, golden):
    """Public pipeline directories by the codec of their model; every weight is random and not zero."""
    root = tmp_path_factory.mktemp("exported")
    for part in ("transformer", "text_encoder", "vae", "scheduler"):
        shutil.copytree(golden / part, root / "autoencoder" / part)
    tokenizer(320).save(root / "autoencoder" / "tokenizer")

    tokenizer(80).save(root / "words")
    shapes = jax.eval_shape(build_networks(PIXEL_MODEL).init, jax.random.key(0))
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda x: (0.15 * rng.normal(size=x.shape)).astype(np.float32), shapes)
    assert all((leaf != 0).all() for leaf in jax.tree.leaves(params))
    # Exported from parameters in memory, as a run is.
    convert.write_torch(PIXEL_MODEL, params, root / "pixels", tokenizer=root / "words", progress=False)
    return root


@pytest.mark.slow
@pytest.mark.parametrize("codec", ["autoencoder", "pixels"])
def test_pytorch_samples_the_same(directories, codec):
    found = torch_check.compare(directories / codec, directories / codec, steps=4)
    assert [difference.task for difference in found] == ["generate", "edit", "compose", "caption"]
    for difference in found:
        assert difference.same, str(difference)
    assert found[0].pixels <= 1 and found[0].limit == 1e-3 and found[-1].limit == 0


def test_a_difference_is_seen(directories, tmp_path):
    shutil.copytree(directories / "pixels", tmp_path / "other")
    leaves = convert.load_torch(tmp_path / "other/transformer", "transformer")
    leaves["image_head"]["bias"][0] += 0.1
    encoder = convert.load_torch(tmp_path / "other/text_encoder", "text_encoder")
    shutil.rmtree(tmp_path / "other")
    networks = {"transformer": leaves, "text_encoder": encoder}
    convert.write_torch(PIXEL_MODEL, networks, tmp_path / "other", tokenizer=directories / "words", progress=False)
    found = torch_check.compare(directories / "pixels", tmp_path / "other", steps=1)
    assert not found[0].same and "DIFFERENT" in str(found[0])
    assert found[3].same  # the image head has no part in captions


def test_a_public_directory_is_read_without_a_copy(directories, tmp_path):
    convert.to_jax(directories / "pixels", tmp_path / "jax", progress=False)
    public, converted = (
        UniAlignPipeline.from_pretrained(path, dtype="float32", progress=False)
        for path in (directories / "pixels", tmp_path / "jax")
    )
    jax.tree.map(np.testing.assert_array_equal, public.params, converted.params)
    assert public.size == converted.size == (32, 32) and public.text_length == LENGTH
    assert public.networks == converted.networks and public.shift == 3.0
    few = {"protocol": Protocol(steps=1, caption_length=8, caption_steps=1)}
    np.testing.assert_array_equal(public.generate("a", **few), converted.generate("a", **few))


def test_a_directory_to_start_training_from_is_not_sampled(directories, tmp_path):
    from safetensors.numpy import load_file, save_file

    shutil.copytree(directories / "autoencoder", tmp_path / "started")
    file = tmp_path / "started/transformer/diffusion_pytorch_model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(file).items() if name != "null_image_embd"}
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="null_image_embd"):
        UniAlignPipeline.from_pretrained(tmp_path / "started")
