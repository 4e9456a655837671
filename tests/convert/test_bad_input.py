"""What cannot be converted is refused with everything that is wrong with it, and leaves nothing behind."""

import json
import shutil
import struct

import pytest
import torch
from safetensors.torch import save_file

from unialign_jax import convert, pretrained
from unialign_jax.convert import tensors, workspace


@pytest.fixture
def refused(tmp_path):
    """`refused(source, *patterns)`: to_jax raises a ConversionError that holds every pattern; nothing is left."""

    def check(source, *parts, **options):
        before = sorted(path.name for path in tmp_path.iterdir())
        with pytest.raises(convert.ConversionError) as caught:
            convert.to_jax(source, tmp_path / "target", progress=False, **options)
        for part in parts:
            assert part in str(caught.value)
        assert sorted(path.name for path in tmp_path.iterdir()) == before
        return str(caught.value)

    return check


def test_all_wrong_tensors_of_all_networks_in_one_error(pipeline, refused, edit_weights):
    def spoil(t):
        del t["transformer_blocks.2.attn.to_q.weight"], t["context_embedder.bias"]
        t["surplus.weight"] = torch.zeros(3)
        t["text_proj_out.weight"] = t["text_proj_out.weight"][:-1]

    edit_weights(pipeline / "transformer", spoil)
    edit_weights(pipeline / "vae", lambda t: t.pop("decoder.conv_out.bias"))
    edit_weights(pipeline / "text_encoder", lambda t: t.update({"lm_head.weight": torch.zeros(2, 2)}))
    message = refused(
        pipeline,
        "missing tensors: context_embedder.bias, transformer_blocks.2.attn.to_q.weight",
        "extra tensors: surplus.weight",
        "misshapen tensors: text_proj_out.weight is [319, 64], expected [320, 64]",
        "missing tensors: decoder.conv_out.bias",
        "extra tensors: lm_head.weight",
    )
    for folder in ("transformer", "vae", "text_encoder"):
        assert str(pipeline / folder) in message


def test_some_adapters_missing_is_no_d_dit(pipeline, refused, edit_weights):
    with pytest.raises(
        convert.ConversionError, match="no network 'vae'; expected one of transformer, text_encoder, auto"
    ):
        convert.load_torch(pipeline / "vae", "vae")
    edit_weights(pipeline / "transformer", lambda t: t.pop("siglip_adapter_img.fc.0.bias"))
    refused(pipeline, "missing tensors: siglip_adapter_img.fc.0.bias")


def test_blocks_of_one_kind_in_two_dtypes(pipeline, refused, edit_weights):
    name = "transformer_blocks.2.attn.to_q.weight"
    edit_weights(pipeline / "transformer", lambda t: t.update({name: t[name].half()}))
    refused(pipeline, "transformer_blocks.{}.attn.to_q.weight is stored in several dtypes (float16, float32)")


def test_position_table_that_is_none(pipeline, refused, edit_weights):
    edit_weights(pipeline / "transformer", lambda t: t["pos_embed.pos_embed"][0, 30, 7].add_(1e-3))
    refused(pipeline, "pos_embed.pos_embed is no table of two coordinates", "1 of 36864 values differ")


def test_position_table_of_another_size(pipeline, refused, edit_json):
    edit_json(pipeline / "transformer/config.json", pos_embed_max_size=20)
    refused(pipeline, "pos_embed.pos_embed is [1, 576, 64], expected [1, 400, 64]")


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("transformer/config.json", {"dual_attention_layers": [0, 1]}, "dual_attention_layers = [0, 1]"),
        ("transformer/config.json", {"qk_norm": "layer_norm"}, "qk_norm is 'layer_norm'"),
        ("transformer/config.json", {"caption_projection_dim": 80}, "caption_projection_dim is 80"),
        ("transformer/config.json", {"use_rotary": True}, "unknown key use_rotary = true"),
        ("transformer/config.json", {"num_layers": "4"}, 'num_layers = "4"; expected a whole number'),
        ("transformer/config.json", {"num_layers": ...}, "key num_layers is missing"),
        ("transformer/config.json", {"_class_name": "FluxTransformer2DModel"}, '"FluxTransformer2DModel"'),
        ("text_encoder/config.json", {"feed_forward_proj": "relu"}, 'feed_forward_proj = "relu"'),
        ("text_encoder/config.json", {"feed_forward_proj": ...}, "(meant by its absence)"),
        ("text_encoder/config.json", {"model_type": "clip_text_model"}, 'model_type = "clip_text_model"'),
        ("text_encoder/config.json", {"quantization_config": {"bits": 8}}, "unknown key quantization_config"),
        ("vae/config.json", {"use_quant_conv": True}, "use_quant_conv = true"),
        ("vae/config.json", {"use_quant_conv": ...}, "use_quant_conv = true (meant by its absence)"),
        ("vae/config.json", {"latent_channels": 4}, "in_channels is 16 but the codec's latent channels is 4"),
        ("vae/config.json", {"_class_name": "AutoencoderTiny"}, '"AutoencoderTiny"'),
        ("vae/config.json", {"shift_factor": None}, "shift_factor = null; expected a number"),
        ("scheduler/scheduler_config.json", {"use_dynamic_shifting": True}, "use_dynamic_shifting = true"),
        ("scheduler/scheduler_config.json", {"shift": ...}, "key shift is missing"),
        ("scheduler/scheduler_config.json", {"shift": None}, "scheduler_config.json: shift = null; expected a number"),
        ("scheduler/scheduler_config.json", {"shift": "3"}, 'shift = "3"; expected a number'),
        ("scheduler/scheduler_config.json", {"shift": 0}, "shift is 0; expected a number above 0"),
        ("scheduler/scheduler_config.json", {"_class_name": "DDIMScheduler"}, '"DDIMScheduler"'),
    ],
)
def test_configs_that_the_network_cannot_honour(pipeline, refused, edit_json, edit_weights, file, changes, message):
    edit_json(pipeline / file, **changes)
    if changes.get("latent_channels") == 4:  # else the tensors would be refused first
        edit_weights(
            pipeline / "vae",
            lambda t: t.update({
                "encoder.conv_out.weight": t["encoder.conv_out.weight"][:8],
                "encoder.conv_out.bias": t["encoder.conv_out.bias"][:8],
                "decoder.conv_in.weight": t["decoder.conv_in.weight"][:, :4],
            }),
        )  # fmt: skip
    refused(pipeline, message)


def test_what_a_public_directory_says_of_sampling(pipeline):
    (pipeline / "sampling.json").write_text('{"size": null}')
    with pytest.raises(convert.ConversionError, match=r"sampling.json: size = null; expected a list of whole numbers"):
        pretrained.load(pipeline)


def test_harmless_keys_are_ignored(pipeline, tmp_path, edit_json):
    edit_json(
        pipeline / "transformer/config.json",
        pooled_projection_dim=7,
        _diffusers_version="0.1",
        dual_attention_layers=[],
    )
    edit_json(pipeline / "text_encoder/config.json", dropout_rate=0.3, dtype="float16", use_cache=True)
    edit_json(pipeline / "vae/config.json", sample_size=1, force_upcast=False)
    convert.to_jax(pipeline, tmp_path / "target", progress=False)


def test_other_architectures(pipeline, tmp_path, refused, edit_weights):
    unet = tmp_path / "unet_pipeline"
    (unet / "unet").mkdir(parents=True)
    (unet / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}')
    refused(unet, "StableDiffusionXLPipeline", "holds no transformer/", "unet")
    # The config says SD3, the tensors are those of something else.
    file = pipeline / "transformer/diffusion_pytorch_model.safetensors"
    save_file({"down_blocks.0.weight": torch.zeros(2)}, file)
    message = refused(pipeline, "a checkpoint of another architecture", "down_blocks.0.weight")
    assert "missing tensors: null_image_embd" not in message


def test_incomplete_directories(pipeline, tmp_path, refused):
    refused(tmp_path / "nowhere", "nowhere is not a directory")
    refused(pipeline / "transformer", "holds no transformer/", "config.json")
    shutil.rmtree(pipeline / "vae")
    shutil.rmtree(pipeline / "scheduler")
    refused(pipeline, "holds no vae/ and no scheduler/")


def test_truncated_and_foreign_files(pipeline, refused):
    file = pipeline / "vae/diffusion_pytorch_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    refused(pipeline, f"{file} is truncated: tensor ")
    file.write_bytes(whole[:50])
    refused(pipeline, f"{file} is truncated within its header")
    file.write_bytes(b"PK\x03\x04 not this format")
    refused(pipeline, f"{file} is not a safetensors file")
    file.write_bytes(b"")
    refused(pipeline, f"{file} is not a safetensors file")
    header = b'{"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}'
    file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    refused(pipeline, f"{file}: its header gives tensor x 4 bytes for shape (2,) in F32")
    header = b'{"x": {"dtype": "I8", "shape": [2], "data_offsets": [0, 2]}}'
    file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    refused(pipeline, f"{file}: tensor x is stored as I8")
    file.unlink()
    refused(pipeline, "vae holds no .safetensors file")


def test_a_file_that_shrinks_while_it_is_read(pipeline):
    file = pipeline / "vae/diffusion_pytorch_model.safetensors"
    opened = tensors.open_tensors(pipeline / "vae")
    last = max(opened.values(), key=lambda tensor: tensor.offset)
    with file.open("r+b") as stream:
        stream.truncate(last.offset + 4)
    with pytest.raises(convert.ConversionError, match="ends early"):
        last.read()


def test_damaged_indexes(pipeline, refused):
    folder = pipeline / "vae"
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "part-1.safetensors", "b": "part-2.safetensors"}}))
    refused(pipeline, "names shards that are not there: part-1.safetensors, part-2.safetensors")
    index.write_text(json.dumps({"weight_map": {"a": "diffusion_pytorch_model.safetensors"}}))
    refused(pipeline, "names tensors that their shard does not hold: a (in diffusion_pytorch_model.safetensors)")
    index.write_text(json.dumps({"weight_map": {"a": "../transformer/diffusion_pytorch_model.safetensors"}}))
    refused(pipeline, "outside its own directory")
    index.write_text("[1, 2]")
    refused(pipeline, f"{index} is not an index")
    index.unlink()
    for variant in ("fp16", "fp32"):
        shutil.copyfile(folder / "diffusion_pytorch_model.safetensors", folder / f"model.{variant}.safetensors")
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    refused(pipeline, "holds several checkpoints (model.fp16.safetensors, model.fp32.safetensors)")


class _Trap:
    """Says so when it is unpickled."""

    def __reduce__(self):
        return (pytest.fail, ("code of a pickle was run",))


def test_pickles_are_not_opened(pipeline, tmp_path, refused):
    (pipeline / "vae/diffusion_pytorch_model.safetensors").unlink()
    torch.save({"x": _Trap()}, pipeline / "vae/diffusion_pytorch_model.bin")
    refused(pipeline, "diffusion_pytorch_model.bin: pickled weights are never opened", "safe_serialization=True")


def test_mask_token_files(pipeline, tmp_path, refused):
    file = tmp_path / "mask.pth"
    torch.save(_Trap(), file)
    refused(pipeline, f"{file} is not a tensor that PyTorch can load", mask_token=file)
    torch.save(torch.zeros(7), file)
    refused(pipeline, f"{file} holds a torch.float32 tensor of shape (7,); expected 48", mask_token=file)
    torch.save({"emb": torch.zeros(48)}, file)
    refused(pipeline, f"{file} holds a dict; expected one tensor of 48 numbers", mask_token=file)
    file.write_bytes(b"nothing of the kind")
    refused(pipeline, f"{file} is not a tensor", mask_token=file)
    refused(pipeline, "absent.pth", mask_token=tmp_path / "absent.pth")


def test_mask_token_without_pytorch(pipeline, tmp_path, refused, monkeypatch):
    torch.save(torch.zeros(48), tmp_path / "mask.pth")
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    refused(pipeline, "needs PyTorch, which is not installed", mask_token=tmp_path / "mask.pth")


def test_teachers_that_do_not_fit(pipeline, qwen, refused, edit_json):
    folder, _ = qwen
    edit_json(pipeline / "transformer/config.json", semantic_dim=41)
    refused(pipeline, "siglip_adapter_img.fc.2.weight is [40, 56], expected [41, 56]", teacher=folder)
    refused(pipeline, "a teacher must be a qwen2_5_vl", teacher=pipeline / "text_encoder")
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["out_hidden_size"] = 64
    (folder / "config.json").write_text(json.dumps(config))
    refused(pipeline, "image and caption vectors must have one width", teacher=folder)


def test_targets(pipeline, tmp_path, monkeypatch):
    target = tmp_path / "target"
    target.mkdir()
    (target / "mine.txt").write_text("kept")
    with pytest.raises(convert.ConversionError, match="exists and is not empty"):
        convert.to_jax(pipeline, target, progress=False)
    assert (target / "mine.txt").read_text() == "kept"
    (target / "mine.txt").unlink()
    (tmp_path / "link").symlink_to(target)
    monkeypatch.chdir(target)
    for other in (tmp_path / "link", ".", target):
        with pytest.raises(convert.ConversionError, match="a link, a mount point or the current directory"):
            convert.to_jax(pipeline, other, progress=False)
    monkeypatch.chdir(tmp_path)
    convert.to_jax(pipeline, target, progress=False)  # an empty directory is taken
    with pytest.raises(convert.ConversionError, match="is a converted checkpoint already"):
        convert.to_jax(target, tmp_path / "other", progress=False)
    with pytest.raises(convert.ConversionError, match="exists and is not empty"):
        convert.to_torch(target, pipeline, progress=False)
    with pytest.raises(convert.ConversionError, match="is not a converted checkpoint: it has no model.json"):
        convert.to_torch(pipeline, tmp_path / "other", progress=False)


def test_a_full_disk_is_noticed_before_the_work(tmp_path):
    with (
        pytest.raises(convert.ConversionError, match=r"needs 1000000000.0 GB but its disk has"),
        workspace.new_directory(tmp_path / "target", 10**18),
    ):
        pytest.fail("entered")


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_conversion_leaves_nothing(pipeline, tmp_path, monkeypatch, stop):
    """Interrupted while the second network is being written, both ways."""
    convert.to_jax(pipeline, tmp_path / "jax", progress=False)
    reads = []

    def read(self, *args):
        reads.append(self)
        if len(reads) > 150:
            raise stop("stopped")
        return original(self, *args)

    original = tensors.StoredTensor.read
    monkeypatch.setattr(tensors.StoredTensor, "read", read)
    with pytest.raises(stop):
        convert.to_jax(pipeline, tmp_path / "target", progress=False)
    assert len(reads) > 150
    assert sorted(path.name for path in tmp_path.iterdir()) == ["jax", "pipeline"]

    reads.clear()
    original = tensors.MadeTensor.read
    monkeypatch.setattr(tensors.MadeTensor, "read", read)
    with pytest.raises(stop):
        convert.to_torch(tmp_path / "jax", tmp_path / "target", progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["jax", "pipeline"]


# Orbax opens arrays concurrently and leaves the others behind when the first one fails.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_damaged_converted_directories(pipeline, tmp_path, edit_json):
    converted = tmp_path / "jax"
    convert.to_jax(pipeline, converted, progress=False)

    def message(do=lambda: convert.to_torch(converted, tmp_path / "torch", progress=False)):
        with pytest.raises(convert.ConversionError) as caught:
            do()
        return str(caught.value)

    edit_json(converted / "model.json", version=2)
    assert "version is 2, this package reads 1" in message()
    edit_json(converted / "model.json", version=1)
    model = json.loads((converted / "model.json").read_text())
    edit_json(converted / "model.json", transformer={**model["transformer"], "num_layers": 3})
    assert "blocks/text/key/bias is [4, 64], expected [3, 64]" in message()
    edit_json(converted / "model.json", transformer={**model["transformer"], "depth": 3})
    assert "transformer has no field depth" in message()
    edit_json(converted / "model.json", **model)
    for wrong, part in (
        ({"scheduler": ...}, "scheduler is missing"),
        ({"scheduler": {}}, "scheduler: key shift is missing"),
        ({"scheduler": {"shift": None}}, "scheduler: shift = null; expected a number"),
        ({"scheduler": {"shift": -1}}, "scheduler: shift is -1; expected a number above 0"),
        ({"sampling": []}, "sampling is []; expected an object"),
        ({"sampling": {"size": None}}, "sampling: size = null; expected a list of whole numbers"),
        ({"sampling": {"size": [512]}}, "sampling: size is [512]; expected height and width"),
        ({"sampling": {"text_length": "256"}}, 'sampling: text_length = "256"; expected a whole number'),
        ({"sampling": {"protocol": 3}}, "sampling: protocol = 3; expected a text"),
        ({"sampling": {"sizes": [16, 16]}}, "sampling has no field sizes"),
    ):
        edit_json(converted / "model.json", **wrong)
        text = message()
        assert f"{converted / 'model.json'}: " in text and part in text
        (converted / "model.json").write_text(json.dumps(model))
    # The values are cut short, then the index, too.
    for file in (converted / "transformer/ocdbt.process_0/d").iterdir():
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    text = message()
    assert f"{converted / 'transformer'}: " in text and "cannot be read" in text
    read = lambda: convert.restore_network(converted, "transformer")  # noqa: E731
    assert f"{converted / 'transformer'} cannot be read" in message(read)
    for file in (converted / "transformer/d").iterdir():
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert f"{converted / 'transformer'} cannot be read" in message()
    assert f"{converted / 'transformer'} cannot be read" in message(read)
    shutil.rmtree(converted / "transformer")
    assert f"{converted / 'transformer'} cannot be read" in message(read)
    (converted / "model.json").write_text("{")
    assert "cannot be read as JSON" in message()


def test_parameters_that_cannot_be_written(golden, tmp_path):
    convert.to_jax(golden, tmp_path / "jax", progress=False)
    model = convert.read_config(tmp_path / "jax")
    params = {name: convert.restore_network(tmp_path / "jax", name) for name in ("transformer", "text_encoder")}

    def message():
        with pytest.raises(convert.ConversionError) as caught:
            convert.write_torch(model, params, tmp_path / "torch", progress=False)
        assert not (tmp_path / "torch").exists()
        return str(caught.value)

    assert "autoencoder: no parameters are given" in message()
    params["autoencoder"] = convert.restore_network(tmp_path / "jax", "autoencoder")
    norm = params["text_encoder"].pop("final_norm")
    params["text_encoder"]["surplus"] = norm["scale"]
    del params["transformer"]["blocks"]["text"]["out"]["bias"]
    text = message()
    assert "text_encoder: missing arrays: final_norm/scale" in text
    assert "text_encoder: extra arrays: surplus" in text
    assert "transformer: missing arrays: blocks/text/out/bias" in text
    params["text_encoder"] = convert.restore_network(tmp_path / "jax", "text_encoder")
    params["text_encoder"]["final_norm"]["scale"] = norm["scale"].astype("float64")
    assert "final_norm/scale is float64" in message()
