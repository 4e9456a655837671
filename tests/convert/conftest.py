"""Small public checkpoints in the layouts that conversion has to understand."""

import json
import pathlib
import shutil

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
WEIGHTS = {
    "transformer": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
}


@pytest.fixture
def pipeline(tmp_path):
    """A copy of the recorded pipeline directory that a test may change."""
    target = tmp_path / "pipeline"
    target.mkdir()
    for part in ("transformer", "text_encoder", "vae", "scheduler"):
        shutil.copytree(GOLDEN / part, target / part)
    shutil.copyfile(GOLDEN / "model_index.json", target / "model_index.json")
    return target


@pytest.fixture
def edit_weights():
    """`edit(folder, change)`: applies `change(dict of tensors)` to a component's safetensors file."""

    def edit(folder, change):
        file = folder / WEIGHTS.get(folder.name.removesuffix("_3"), "model.safetensors")
        tensors = load_file(file)
        change(tensors)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata={"format": "pt"})

    return edit


@pytest.fixture
def edit_json():
    """`edit(file, **changes)`: changes keys of a JSON file; a value of `...` removes the key."""

    def edit(file, **changes):
        value = {**json.loads(file.read_text()), **changes}
        file.write_text(json.dumps({key: v for key, v in value.items() if v is not ...}))

    return edit


@pytest.fixture
def sd3(pipeline):
    """A plain SD3 directory, made by diffusers, and its transformer: (directory, module)."""
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=16, num_layers=3, attention_head_dim=16, num_attention_heads=4,
        joint_attention_dim=48, caption_projection_dim=64, pooled_projection_dim=24, out_channels=16,
        pos_embed_max_size=24,
    )  # fmt: skip
    for name, parameter in transformer.named_parameters():
        if name.endswith("bias"):  # diffusers starts some at zero
            torch.nn.init.normal_(parameter, std=0.1)
    shutil.rmtree(pipeline / "transformer")
    transformer.save_pretrained(pipeline / "transformer")
    (pipeline / "text_encoder").rename(pipeline / "text_encoder_3")
    (pipeline / "model_index.json").write_text('{"_class_name": "StableDiffusion3Pipeline"}')
    return pipeline, transformer.eval()


@pytest.fixture
def qwen(tmp_path):
    """A whole Qwen2.5-VL of transformers, small: (directory, module)."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(0)
    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 40, "patch_size": 14,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 112, "fullatt_block_indexes": [1],
    }  # fmt: skip
    text = {
        "hidden_size": 40, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "vocab_size": 90, "pad_token_id": 0,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 4, 4], "rope_theta": 1e4},
    }  # fmt: skip
    module = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(vision_config=vision, text_config=text))
    module.save_pretrained(tmp_path / "qwen")
    return tmp_path / "qwen", module


@pytest.fixture
def as_bytes():
    """`as_bytes(file)`: name -> (dtype, shape, bytes) of a safetensors file, as the library reads it."""

    def read(file):
        numpy = {torch.bfloat16: ml_dtypes.bfloat16, torch.float16: np.float16, torch.float32: np.float32}
        return {
            name: (numpy[t.dtype].__name__, tuple(t.shape), t.contiguous().view(torch.uint8).numpy().tobytes())
            for name, t in load_file(file).items()
        }

    return read
