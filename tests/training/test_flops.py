"""The analytic count, against the parameters it multiplies, and against what XLA counts in an unrolled network."""

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from unialign_jax.models.t5 import T5Config
from unialign_jax.models.unialign import Pass, TransformerConfig, UniAlign
from unialign_jax.training import flops, hlo

SMALL = TransformerConfig(
    sample_size=16,
    num_layers=1,
    attention_head_dim=64,
    num_attention_heads=4,
    joint_attention_dim=96,
    caption_projection_dim=256,
    in_channels=8,
    out_channels=8,
    pos_embed_max_size=16,
    vocab_size=500,
    adapter_hidden=64,
    semantic_dim=48,
    mask_token_id=499,
)
TEXT, SIDE = 24, 16
IMAGE = (SIDE // 2) ** 2


def abstract_params(config):
    network = UniAlign(config, dtype=jnp.float32)
    size = config.patch_size
    variables = jax.eval_shape(
        lambda key: network.init(
            key,
            Pass(
                jnp.zeros((1, size, size, config.in_channels)),
                jnp.zeros((1, 1, config.joint_attention_dim)),
                jnp.zeros(1),
            ),
            semantic_depth=1,
        ),
        jax.random.key(0),
    )
    return nn.unbox(variables)["params"]


@pytest.mark.parametrize("references", [0, 2])
def test_every_kernel_is_counted_once_per_token_that_passes_it(references):
    """With a full-size network: sums 2 x elements x tokens over the actual kernels, by name."""
    config = TransformerConfig()
    image_tokens, text_tokens = 1024, 256
    images = image_tokens * (1 + references)
    depth = config.num_layers

    def multiplied(name, in_image_pass):
        """Tokens that pass a kernel, averaged over the blocks it is stacked for."""
        per_block = {"image": images if in_image_pass else image_tokens, "text": text_tokens}
        last = {"image": image_tokens if in_image_pass else 0, "text": 0 if in_image_pass else text_tokens}
        parts = name.split("/")
        if parts[0] == "blocks":
            _, stream, layer, _ = parts
            if layer == "modulation":
                return 1
            if layer in ("key", "value"):
                return per_block[stream]
            return (per_block[stream] * (depth - 1) + last[stream]) / depth
        return {
            "patch_embed": per_block["image"],
            "text_embed": text_tokens,
            "time_embed": 1,
            "image_modulation": in_image_pass,
            "image_head": in_image_pass * image_tokens,
            "text_head": (not in_image_pass) * text_tokens,
            "image_adapter": in_image_pass,
            "text_adapter": not in_image_pass,
        }[parts[0]]

    kernels = {
        "/".join(str(key.key) for key in path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_params(config))
        if path[-1].key == "kernel"
    }
    expected = 0
    for in_image_pass in (True, False):
        expected += sum(2 * math.prod(leaf.shape) * multiplied(name, in_image_pass) for name, leaf in kernels.items())
        joint = (images if in_image_pass else image_tokens) + text_tokens
        read = image_tokens if in_image_pass else text_tokens
        expected += 4 * joint * config.width * ((depth - 1) * joint + read)
    counted = flops.train_step_flops(
        config, batch=5, image_tokens=image_tokens, text_tokens=text_tokens, references=references, aligned=True
    )
    assert counted == round(3 * 5 * expected)


def xla_flops(function) -> float:
    """What XLA counts, with one layer so that its loop body is all blocks; elementwise work is in it too."""
    arguments = (
        abstract_params(SMALL),
        jax.ShapeDtypeStruct((1, SIDE, SIDE, SMALL.in_channels), jnp.float32),
        jax.ShapeDtypeStruct((1, TEXT, SMALL.joint_attention_dim), jnp.float32),
    )
    return jax.jit(function).lower(*arguments).compile().cost_analysis()["flops"]


def apply(params, latents, states, **wanted):
    network = UniAlign(SMALL, dtype=jnp.float32)
    return network.apply({"params": params}, Pass(latents, states, jnp.ones(1), **wanted))[0]


def test_forward_passes_agree_with_xla():
    """XLA drops what a pass does not read of the last block, as the count does, but for queries and their attention."""

    def not_dropped(unread):
        return unread * (2 * SMALL.width**2 + 4 * (IMAGE + TEXT) * SMALL.width)

    image = flops.image_pass_flops(SMALL, IMAGE, TEXT) + not_dropped(TEXT)
    assert image <= xla_flops(lambda *inputs: apply(*inputs, want_text=False).image) <= 1.02 * image
    text = flops.text_pass_flops(SMALL, IMAGE, TEXT) + not_dropped(IMAGE)
    assert text <= xla_flops(lambda *inputs: apply(*inputs, want_image=False).text_logits) <= 1.02 * text


def test_backward_is_twice_the_forward():
    """With both outputs read, and gradients of the inputs wanted, nothing is dropped."""

    def loss(*inputs):
        outputs = apply(*inputs)
        return jnp.mean(outputs.image**2) + jnp.mean(outputs.text_logits**2)

    width, patch = SMALL.width, SMALL.patch_size**2 * SMALL.in_channels
    twice = dataclasses.replace(SMALL, num_layers=2)
    block = flops.image_pass_flops(twice, IMAGE, TEXT) - flops.image_pass_flops(SMALL, IMAGE, TEXT)
    outside = 2 * IMAGE * patch * width * 2 + 2 * TEXT * width * (SMALL.joint_attention_dim + SMALL.vocab_size)
    outside += 2 * (256 * width + width * width + width * 2 * width)
    needed = 3 * (block + outside)
    assert needed <= 1.01 * xla_flops(jax.value_and_grad(loss, argnums=(0, 1, 2))) <= 1.06 * needed


def test_published_size_is_where_it_should_be():
    """6 x parameters x tokens, the usual rule of thumb, holds within its own accuracy."""
    config = TransformerConfig()
    counted = flops.train_step_flops(config, batch=1, image_tokens=1024, text_tokens=256, references=0, aligned=True)
    per_stream = sum(
        math.prod(leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_params(config))
        if path[0].key == "blocks" and path[1].key == "image" and path[2].key != "modulation"
    )
    rule = 2 * 6 * per_stream * (1024 + 256)
    assert 1.0 < counted / rule < 1.25
    deeper = dataclasses.replace(config, num_layers=48)
    assert flops.image_pass_flops(deeper, 1024, 256) > 1.9 * flops.image_pass_flops(config, 1024, 256)


@pytest.mark.parametrize("remat", ["dots", "attention+mlp", "full"])
def test_what_a_policy_computes_again_is_what_the_program_has_more_of(remat):
    """Counted in the compiled gradient, loops unrolled, against the same network that keeps everything."""
    config = dataclasses.replace(SMALL, num_layers=3)

    def counted(policy):
        network = UniAlign(config, dtype=jnp.float32, remat=policy)

        def loss(params, latents, states):
            [out] = network.apply({"params": params}, Pass(latents, states, jnp.ones(1), want_text=False))
            return jnp.mean(out.image**2)

        arguments = (
            abstract_params(config),
            jax.ShapeDtypeStruct((1, SIDE, SIDE, config.in_channels), jnp.float32),
            jax.ShapeDtypeStruct((1, TEXT, config.joint_attention_dim), jnp.float32),
        )
        module = hlo.Module(jax.jit(jax.grad(loss)).lower(*arguments).compile().as_text())
        return sum(module.flops(step) * step.times for step in module.steps())

    def again(policy):
        sizes = {"batch": 1, "image_tokens": IMAGE, "text_tokens": TEXT, "references": 0, "text_pass": False}
        return flops.recomputed_flops(config, policy, **sizes)

    expected = again(remat) - again("none")
    if remat == "attention+mlp":  # without a kernel there is nothing of attention to keep
        expected += again("full") - again("attention")
    assert counted(remat) - counted("none") == pytest.approx(expected, rel=0.02)


def test_text_encoder_counts_every_kernel_and_both_attention_products():
    config = T5Config(vocab_size=50, d_model=24, d_kv=8, d_ff=40, num_layers=3, num_heads=2)
    kernels = 24 * 16 * 3 + 16 * 24 + 24 * 40 * 3
    expected = 5 * 3 * (2 * 7 * kernels + 2 * 2 * 7 * 7 * 16)
    assert flops.text_encoder_flops(config, texts=5, tokens=7) == expected


def test_a_pass_that_is_left_out_does_not_count():
    count = functools.partial(
        flops.train_step_flops, SMALL, batch=2, image_tokens=IMAGE, text_tokens=TEXT, references=1, aligned=True
    )
    assert count(text_pass=False) + count(image_pass=False) == count()
    assert count(text_pass=False) > 3 * 2 * flops.image_pass_flops(SMALL, IMAGE, TEXT, references=1)
