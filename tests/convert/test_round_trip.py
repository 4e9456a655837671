"""torch -> jax -> torch gives the same bytes; what lies between is what the networks expect."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from unialign_jax import convert
from unialign_jax.convert import store
from unialign_jax.networks import build_networks

FILES = ["transformer/diffusion_pytorch_model", "text_encoder/model", "vae/diffusion_pytorch_model"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["f32", "f16", "bf16"])
def test_every_tensor_keeps_its_bits(pipeline, tmp_path, dtype, as_bytes):
    for file in FILES:
        path = pipeline / f"{file}.safetensors"
        save_file({name: tensor.to(dtype) for name, tensor in load_file(path).items()}, path)
    convert.to_jax(pipeline, tmp_path / "jax", progress=False)
    convert.to_torch(tmp_path / "jax", tmp_path / "torch", progress=False)
    for file in FILES:
        before = as_bytes(pipeline / f"{file}.safetensors")
        assert as_bytes(tmp_path / "torch" / f"{file}.safetensors") == before
        assert len(before) > 20
    assert convert.read_config(tmp_path / "jax")["dtypes"]["transformer"] == [str(dtype).removeprefix("torch.")]


def test_unusual_values_survive(pipeline, tmp_path, edit_weights, as_bytes):
    """NaNs with a payload, infinities, negative zeros and subnormals are copied, not computed with."""
    strange = torch.tensor([0x7FC01234, 0x7F800000, 0x80000000, 0x00000001], dtype=torch.int64).to(torch.int32)
    edit_weights(
        pipeline / "transformer",
        lambda t: t["transformer_blocks.1.attn.to_q.weight"].view(-1)[:4].copy_(strange.view(torch.float32)),
    )
    convert.to_jax(pipeline, tmp_path / "jax", progress=False)
    convert.to_torch(tmp_path / "jax", tmp_path / "torch", progress=False)
    file = f"{FILES[0]}.safetensors"
    assert as_bytes(tmp_path / "torch" / file) == as_bytes(pipeline / file)


def test_shards_and_index_both_ways(golden, tmp_path, as_bytes):
    convert.to_jax(golden, tmp_path / "jax", progress=False)
    convert.to_torch(tmp_path / "jax", tmp_path / "sharded", shard_size=150_000, progress=False)
    folder = tmp_path / "sharded" / "text_encoder"
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    assert len(files) == 2
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    merged = {}
    for file in files:
        part = as_bytes(folder / file)
        assert {index["weight_map"][name] for name in part} == {file}
        assert sum(len(t[2]) for t in part.values()) <= 150_000
        merged.update(part)
    assert merged == as_bytes(golden / f"{FILES[1]}.safetensors")
    assert index["metadata"]["total_size"] == sum(len(t[2]) for t in merged.values())
    # The VAE has many more shards than that; its way back in reads them all.
    convert.to_jax(tmp_path / "sharded", tmp_path / "again", progress=False)
    for network in ("transformer", "text_encoder", "autoencoder"):
        first, second = (convert.restore_network(tmp_path / d, network) for d in ("jax", "again"))
        jax.tree.map(np.testing.assert_array_equal, first, second)


def test_a_position_table_of_other_coordinates_is_honoured(pipeline, tmp_path, as_bytes):
    """Public checkpoints were trained with tables that their config does not tell; theirs is what counts."""
    file = pipeline / f"{FILES[0]}.safetensors"
    weights = load_file(file)
    axis = torch.sin(torch.arange(24 * 32).reshape(24, 32) / 7.0)
    columns, rows = axis[None].expand(24, 24, 32), axis[:, None].expand(24, 24, 32)
    weights["pos_embed.pos_embed"] = torch.cat([columns, rows], dim=2).reshape(1, 576, 64).contiguous()
    save_file(weights, file)
    convert.to_jax(pipeline, tmp_path / "jax", progress=False)
    np.testing.assert_array_equal(convert.restore_network(tmp_path / "jax", "transformer")["positions"], axis)
    convert.to_torch(tmp_path / "jax", tmp_path / "torch", progress=False)
    assert as_bytes(tmp_path / "torch/transformer" / file.name) == as_bytes(file)


def test_restore_places_and_casts(golden, tmp_path):
    convert.to_jax(golden, tmp_path / "jax", progress=False)
    expected = convert.load_torch(golden / "transformer", "transformer")
    as_numpy = convert.restore_network(tmp_path / "jax", "transformer")
    jax.tree.map(np.testing.assert_array_equal, as_numpy, expected)
    mesh = jax.make_mesh((1,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    shardings = jax.tree.map(
        lambda a: jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*[None] * (a.ndim - 1), "fsdp")), expected
    )
    restored = convert.restore_network(tmp_path / "jax", "transformer", dtype="bfloat16", shardings=shardings)
    jax.tree.map(lambda a, s: a.sharding == s or pytest.fail(f"{a.sharding} is not {s}"), restored, shardings)
    jax.tree.map(
        lambda a, e: np.testing.assert_array_equal(np.asarray(a), e.astype(ml_dtypes.bfloat16)), restored, expected
    )


def test_leaves_can_be_read_in_part(golden, tmp_path):
    convert.to_jax(golden, tmp_path / "jax", progress=False)
    leaf = store.open_network(tmp_path / "jax", "transformer")["blocks/text/mlp_up/kernel"]
    weights = load_file(golden / f"{FILES[0]}.safetensors")
    assert (leaf.shape, leaf.dtype) == ((4, 64, 256), np.float32)
    np.testing.assert_array_equal(leaf[2], weights["transformer_blocks.2.ff_context.net.0.proj.weight"].numpy().T)


def test_teacher_takes_its_part_of_a_whole_model(golden, qwen, pipeline, tmp_path, edit_json, edit_weights):
    folder, module = qwen
    module = module.state_dict()
    loaded = convert.load_torch(folder, "teacher")
    width = 32
    for i, name in enumerate(("query", "key", "value")):
        fused = module["model.visual.blocks.1.attn.qkv.weight"][i * width : (i + 1) * width].numpy()
        np.testing.assert_array_equal(loaded["vision"]["blocks"][name]["kernel"][1], fused.T)
    table = module["model.language_model.embed_tokens.weight"].numpy()
    np.testing.assert_array_equal(loaded["token_embed"]["embedding"], table)
    (folder / "tokenizer.json").write_text("{}")

    # The golden adapters are 40 wide, as this teacher is.
    convert.to_jax(pipeline, tmp_path / "jax", teacher=folder, progress=False)
    restored = convert.restore_network(tmp_path / "jax", "teacher")
    jax.tree.map(np.testing.assert_array_equal, restored, loaded)
    assert (tmp_path / "jax/teacher_tokenizer/tokenizer.json").exists()

    convert.to_torch(tmp_path / "jax", tmp_path / "torch", progress=False)
    exported = load_file(tmp_path / "torch/teacher/model.safetensors")
    for name, tensor in exported.items():
        newer = name.replace("visual.", "model.visual.").replace("model.embed", "model.language_model.embed")
        assert torch.equal(tensor, module[newer]), name
    assert len(exported) == len([n for n in module if "visual" in n]) + 1
    # The other layout of names, and a teacher that the pipeline brings along.
    convert.to_jax(tmp_path / "torch", tmp_path / "again", progress=False)
    jax.tree.map(np.testing.assert_array_equal, convert.restore_network(tmp_path / "again", "teacher"), loaded)


def test_a_small_model_with_a_pixel_codec(tmp_path):
    """Parameters in memory, config fields with defaults left out: to PyTorch's files, and back."""
    model = {
        "transformer": {
            "sample_size": 8, "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2, "in_channels": 12,
            "out_channels": 12, "joint_attention_dim": 16, "caption_projection_dim": 16, "pos_embed_max_size": 6,
            "vocab_size": 20, "adapter_hidden": 8, "semantic_dim": 12, "mask_token_id": 19, "qk_norm": "rms_norm",
        },
        "text_encoder": {"vocab_size": 20, "d_model": 16, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2},
        "pixel_codec": {"patch": 2, "scaling_factor": 2.0},
        "teacher": None,
    }  # fmt: skip
    random = np.random.default_rng(0)
    abstract = jax.eval_shape(build_networks(model).init, jax.random.key(0))
    params = jax.tree.map(lambda leaf: random.standard_normal(leaf.shape, np.float32), abstract)
    convert.write_torch(model, params, tmp_path / "torch", progress=False)
    weights = load_file(tmp_path / "torch/transformer/diffusion_pytorch_model.safetensors")
    norms = params["transformer"]["blocks"]["text"]["key_norm"]["scale"]
    np.testing.assert_array_equal(weights["transformer_blocks.1.attn.norm_added_k.weight"], norms[1])
    convert.to_jax(tmp_path / "torch", tmp_path / "jax", progress=False)
    again = convert.read_config(tmp_path / "jax")
    assert build_networks(again) == build_networks(model)
    assert not (tmp_path / "jax/autoencoder").exists()
    for network in ("transformer", "text_encoder"):
        jax.tree.map(np.testing.assert_array_equal, convert.restore_network(tmp_path / "jax", network), params[network])
