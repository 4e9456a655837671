"""What we export, loaded by diffusers and transformers the way the public pipeline class loads it."""

import sys
import types

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ModelMixin
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer, models
from transformers import T5EncoderModel, T5TokenizerFast

from unialign_jax import convert
from unialign_jax.convert.torch_pipeline import SD3JointModelFlexible


class UniAlignmentPipeline(DiffusionPipeline):
    """The public pipeline's components."""

    def __init__(self, transformer, scheduler, vae, text_encoder, tokenizer):
        super().__init__()
        self.register_modules(
            vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, transformer=transformer, scheduler=scheduler
        )


@pytest.fixture
def public_code(monkeypatch):
    """Makes the classes importable under the names that the public repository gives them."""
    for name in ("modules", "modules.unialignment_model"):
        module = types.ModuleType(name)
        module.SD3JointModelFlexible = SD3JointModelFlexible
        module.ModelMixin = ModelMixin  # diffusers looks for the loadable base class in the same module
        monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def exported(pipeline, tmp_path):
    """An export, sharded, with a tokenizer."""
    tokenizer = Tokenizer(models.Unigram([("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁a", -1.0)], 2, False))
    tokenizer.add_special_tokens([AddedToken("<extra_id_0>")])
    (pipeline / "tokenizer").mkdir()
    tokenizer.save(str(pipeline / "tokenizer/tokenizer.json"))
    (pipeline / "model_index.json").unlink()
    convert.to_jax(pipeline, tmp_path / "jax", progress=False)
    convert.to_torch(tmp_path / "jax", tmp_path / "torch", shard_size=150_000, progress=False)
    return tmp_path / "torch"


def test_from_pretrained_of_the_whole_pipeline(exported, golden, public_code):
    pipe = UniAlignmentPipeline.from_pretrained(str(exported))
    assert isinstance(pipe.transformer, SD3JointModelFlexible)
    assert isinstance(pipe.vae, AutoencoderKL)
    assert isinstance(pipe.text_encoder, T5EncoderModel)
    assert isinstance(pipe.tokenizer, T5TokenizerFast)
    assert isinstance(pipe.scheduler, FlowMatchEulerDiscreteScheduler)
    for module, file in (
        (pipe.transformer, "transformer/diffusion_pytorch_model"),
        (pipe.vae, "vae/diffusion_pytorch_model"),
        (pipe.text_encoder, "text_encoder/model"),
    ):
        recorded, loaded = load_file(golden / f"{file}.safetensors"), module.state_dict()
        assert loaded.keys() - recorded.keys() <= {"encoder.embed_tokens.weight"}
        for name, tensor in recorded.items():
            assert torch.equal(loaded[name], tensor), name


def test_each_loader_finds_everything_it_looks_for(exported):
    for loader, folder in (
        (AutoencoderKL, "vae"),
        (SD3JointModelFlexible, "transformer"),
        (T5EncoderModel, "text_encoder"),
    ):
        _, info = loader.from_pretrained(exported / folder, output_loading_info=True)
        assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), (folder, info)


def test_exported_networks_compute_what_was_recorded(exported, golden):
    recorded = np.load(golden / "text_encoder.npz")
    encoder = T5EncoderModel.from_pretrained(exported / "text_encoder").eval()
    with torch.no_grad():
        states = encoder(torch.from_numpy(recorded["ids"]).long())[0].numpy()
    np.testing.assert_allclose(states, recorded["hidden"], atol=2e-5)
    recorded = np.load(golden / "vae.npz")
    vae = AutoencoderKL.from_pretrained(exported / "vae").eval()
    with torch.no_grad():
        mean = vae.encode(torch.from_numpy(recorded["image"])).latent_dist.mean.numpy()
    np.testing.assert_allclose(mean, recorded["latent_mean"], atol=2e-5)
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(exported / "scheduler")
    scheduler.set_timesteps(10)
    expected = FlowMatchEulerDiscreteScheduler.from_pretrained(golden / "scheduler")
    expected.set_timesteps(10)
    assert torch.equal(scheduler.sigmas, expected.sigmas)
