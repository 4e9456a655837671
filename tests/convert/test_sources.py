"""Sources other than a whole UniAlignment pipeline: plain SD3, D-DiT, the mask token's vector, several files."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from unialign_jax import convert, pretrained
from unialign_jax.models.unialign import Pass, TransformerConfig, UniAlign


def _apply(folder, latents, text, timesteps):
    config = TransformerConfig(**convert.read_config(folder)["transformer"])
    params = convert.restore_network(folder, "transformer", dtype=np.float32)
    latents = jnp.asarray(latents.numpy().transpose(0, 2, 3, 1))
    network = UniAlign(config, dtype=jnp.float32)

    @jax.jit
    def apply(params, *inputs):
        return network.apply({"params": params}, Pass(*inputs))[0]

    return apply(params, latents, text.numpy(), timesteps.numpy())


def test_sd3_weights_compute_the_image_that_diffusers_computes(sd3, tmp_path):
    source, module = sd3
    with torch.no_grad():  # the pooled text, which UniAlignment does not have
        module.time_text_embed.text_embedder.linear_2.weight.zero_()
        module.time_text_embed.text_embedder.linear_2.bias.zero_()
    convert.to_jax(source, tmp_path / "jax", progress=False)
    torch.manual_seed(1)
    latents, text, times = torch.randn(2, 16, 12, 16), torch.randn(2, 7, 48), torch.tensor([3.0, 870.0])
    with torch.no_grad():
        expected = module(latents, text, torch.zeros(2, 24), times, return_dict=False)[0].numpy()
    outputs = _apply(tmp_path / "jax", latents, text, times)
    np.testing.assert_allclose(np.moveaxis(np.asarray(outputs.image), -1, 1), expected, atol=2e-5)
    assert np.abs(expected).max() > 0.1
    assert np.isfinite(outputs.text_logits).all() and np.std(outputs.text_logits) > 0.1


def test_sd3_report_names_what_is_new_and_what_is_dropped(sd3, tmp_path):
    source, module = sd3
    report = convert.to_jax(source, tmp_path / "jax", progress=False)
    convert.to_torch(tmp_path / "jax", tmp_path / "torch", progress=False)
    ours = load_file(tmp_path / "torch/transformer/diffusion_pytorch_model.safetensors")
    theirs = module.state_dict()
    renamed = {re.sub(r"^(?=norm_out\.|proj_out\.)", "image_", name): tensor for name, tensor in theirs.items()}
    copied = {name for name in ours.keys() & renamed.keys() if torch.equal(ours[name], renamed[name])}
    assert set(report.initialised) == ours.keys() - copied
    assert set(report.dropped) == {
        f"time_text_embed.text_embedder.linear_{i}.{p}" for i in (1, 2) for p in ("weight", "bias")
    }
    assert renamed.keys() - copied == {
        *report.dropped,
        *(f"transformer_blocks.2.norm1_context.linear.{part}" for part in ("weight", "bias")),
    }
    assert len(copied) == len(renamed) - 6
    for name in (*report.initialised, *report.dropped):
        assert name in str(report)
    # SD3's context norm gives scale, then shift; ours shift, then scale; the rest of the block starts closed.
    scale, shift = theirs["transformer_blocks.2.norm1_context.linear.weight"].chunk(2)
    six = ours["transformer_blocks.2.norm1_context.linear.weight"].chunk(6)
    assert torch.equal(six[0], shift) and torch.equal(six[1], scale)
    assert all(not part.any() for part in six[2:])


def test_what_is_drawn_depends_on_the_seed_alone(sd3, tmp_path):
    source, _ = sd3
    heads = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        convert.to_jax(source, tmp_path / name, seed=seed, progress=False)
        heads.append(convert.restore_network(tmp_path / name, "transformer"))
    jax.tree.map(np.testing.assert_array_equal, heads[0], heads[1])
    assert not np.array_equal(heads[0]["text_head"]["kernel"], heads[2]["text_head"]["kernel"])
    np.testing.assert_array_equal(heads[0]["text_embed"]["kernel"], heads[2]["text_embed"]["kernel"])
    kernel = heads[0]["image_adapter"]["down"]["kernel"]
    assert np.std(kernel) == pytest.approx((2 / sum(kernel.shape)) ** 0.5, rel=0.01)  # Glorot
    assert np.std(heads[0]["null_image_tokens"]) == pytest.approx(64**-0.5, rel=0.1)


def test_sd3_takes_its_vocabulary_from_the_tokenizer(sd3, tmp_path, qwen, caplog):
    from tokenizers import AddedToken, Tokenizer, models

    source, _ = sd3
    tokenizer = Tokenizer(models.Unigram([("<pad>", 0.0), ("</s>", 0.0), ("▁a", -1.0), ("b", -2.0)], 0, False))
    tokenizer.add_special_tokens([AddedToken("<extra_id_1>"), AddedToken("<extra_id_0>"), AddedToken("<last>")])
    (source / "tokenizer_3").mkdir()
    tokenizer.save(str(source / "tokenizer_3/tokenizer.json"))
    convert.to_jax(source, tmp_path / "jax", teacher=qwen[0], progress=False)
    fields = convert.read_config(tmp_path / "jax")["transformer"]
    assert (fields["vocab_size"], fields["mask_token_id"]) == (7, 5)
    assert fields["semantic_dim"] == 40  # the teacher's width, not the published one's
    convert.to_torch(tmp_path / "jax", tmp_path / "torch", progress=False)
    assert json.loads((tmp_path / "torch/model_index.json").read_text())["tokenizer"][1] == "T5TokenizerFast"
    copied = Tokenizer.from_file(str(tmp_path / "torch/tokenizer/tokenizer.json"))
    assert copied.encode("ab").ids == tokenizer.encode("ab").ids
    for place in ("jax", "torch"):
        caplog.clear()
        pretrained.load(tmp_path / place, dtype="float32")
        assert "which were drawn and not trained: it is a start for training the whole model" in caplog.text
    convert.to_jax(tmp_path / "torch", tmp_path / "again", progress=False)
    drawn = [convert.read_config(tmp_path / place)["drawn"] for place in ("jax", "again")]
    assert drawn[0] == drawn[1] and "sampling" not in convert.read_config(tmp_path / "again")


def test_sd3_stored_in_halves_with_a_variant_beside_it(sd3, tmp_path):
    source, module = sd3
    file = source / "transformer/diffusion_pytorch_model.safetensors"
    half = {name: tensor.half() for name, tensor in load_file(file).items()}
    file.rename(file.with_name("diffusion_pytorch_model.fp32.safetensors"))
    save_file(half, file)
    report = convert.to_jax(source, tmp_path / "jax", progress=False)
    model = convert.read_config(tmp_path / "jax")
    assert model["dtypes"]["transformer"] == ["float16"]  # the plain name wins, and what is drawn follows it
    assert "transformer_blocks.2.ff_context.net.2.weight" in report.initialised
    assert "transformer_blocks.2.ff_context.net.2.weight" in model["drawn"]


def test_d_dit_has_all_but_the_adapters(pipeline, tmp_path, edit_weights, as_bytes):
    adapters = []

    def drop(tensors):
        adapters.extend(name for name in tensors if name.startswith("siglip_adapter"))
        for name in adapters:
            del tensors[name]

    edit_weights(pipeline / "transformer", drop)
    (pipeline / "model_index.json").write_text('{"_class_name": "DualDiffSD3Pipeline"}')
    report = convert.to_jax(pipeline, tmp_path / "jax", progress=False)
    assert set(report.initialised) == set(adapters) and len(adapters) == 8 and not report.dropped
    assert "drawn" not in convert.read_config(tmp_path / "jax")  # adapters are not sampled with
    convert.to_torch(tmp_path / "jax", tmp_path / "torch", progress=False)
    before = as_bytes(pipeline / "transformer/diffusion_pytorch_model.safetensors")
    after = as_bytes(tmp_path / "torch/transformer/diffusion_pytorch_model.safetensors")
    assert {name: after[name] for name in before} == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_mask_token_replaces_its_row_alone(pipeline, tmp_path, dtype):
    vector = torch.linspace(-2, 2, 48).to(dtype)
    torch.save(vector, tmp_path / "mask.pth")
    convert.to_jax(pipeline, tmp_path / "jax", mask_token=tmp_path / "mask.pth", progress=False)
    table = convert.restore_network(tmp_path / "jax", "text_encoder")["token_embed"]["embedding"]
    expected = load_file(pipeline / "text_encoder/model.safetensors")["shared.weight"].numpy().copy()
    expected[319] = vector.float().numpy()
    np.testing.assert_array_equal(table, expected)


def test_embedding_stored_twice(pipeline, tmp_path, edit_weights):
    edit_weights(pipeline / "text_encoder", lambda t: t.update({"encoder.embed_tokens.weight": t["shared.weight"] + 0}))
    twice = convert.load_torch(pipeline / "text_encoder", "text_encoder")
    edit_weights(pipeline / "text_encoder", lambda t: t.pop("shared.weight"))  # as some exporters do
    once = convert.load_torch(pipeline / "text_encoder", "text_encoder")
    jax.tree.map(np.testing.assert_array_equal, once, twice)
    edit_weights(
        pipeline / "text_encoder",
        lambda t: t.update({"shared.weight": t["encoder.embed_tokens.weight"] + 1}),
    )
    with pytest.raises(convert.ConversionError, match=r"embed_tokens.weight and shared.weight .* differ"):
        convert.load_torch(pipeline / "text_encoder", "text_encoder")


def test_kept_in_two_dtypes(pipeline, tmp_path, edit_weights, as_bytes):
    """transformers keeps T5's `wo` in float32 beside a float16 rest."""

    def halve(tensors):
        tensors.update({n: t.half() for n, t in tensors.items() if not n.endswith("wo.weight")})

    edit_weights(pipeline / "text_encoder", halve)
    convert.to_jax(pipeline, tmp_path / "jax", progress=False)
    assert convert.read_config(tmp_path / "jax")["dtypes"]["text_encoder"] == ["float16", "float32"]
    convert.to_torch(tmp_path / "jax", tmp_path / "torch", progress=False)
    file = "text_encoder/model.safetensors"
    assert as_bytes(tmp_path / "torch" / file) == as_bytes(pipeline / file)


def test_qk_norms_of_sd35_are_used(pipeline, tmp_path):
    """SD3.5 without dual attention: diffusers' module with RMS norms, against ours."""
    import shutil

    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    module = SD3Transformer2DModel(
        sample_size=16, num_layers=2, attention_head_dim=16, num_attention_heads=4, joint_attention_dim=48,
        caption_projection_dim=64, pooled_projection_dim=24, pos_embed_max_size=24, qk_norm="rms_norm",
    ).eval()  # fmt: skip
    with torch.no_grad():
        module.time_text_embed.text_embedder.linear_2.weight.zero_()
        module.time_text_embed.text_embedder.linear_2.bias.zero_()
        for name, parameter in module.named_parameters():
            if ".norm_" in name:
                parameter.uniform_(0.5, 2)
    shutil.rmtree(pipeline / "transformer")
    module.save_pretrained(pipeline / "transformer")
    convert.to_jax(pipeline, tmp_path / "jax", progress=False)
    latents, text, times = torch.randn(1, 16, 8, 8), torch.randn(1, 5, 48), torch.tensor([500.0])
    with torch.no_grad():
        expected = module(latents, text, torch.zeros(1, 24), times, return_dict=False)[0].numpy()
    image = _apply(tmp_path / "jax", latents, text, times).image
    np.testing.assert_allclose(np.moveaxis(np.asarray(image), -1, 1), expected, atol=2e-5)
