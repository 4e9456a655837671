"""The transformer against the recorded forwards, and its own promises: masks, sizes, heads, precision."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unialign_jax.models.blocks import REMAT_POLICIES, Context, JointBlock
from unialign_jax.models.unialign import Pass, TransformerConfig, UniAlign, axis_positions, time_features

TINY = TransformerConfig(
    sample_size=8,
    in_channels=4,
    num_layers=3,
    attention_head_dim=8,
    num_attention_heads=2,
    joint_attention_dim=12,
    caption_projection_dim=16,
    out_channels=4,
    pos_embed_max_size=12,
    vocab_size=40,
    adapter_hidden=10,
    semantic_dim=6,
    mask_token_id=39,
)


@functools.partial(jax.jit, static_argnums=0, static_argnames=("semantic_depth", "want_image", "want_text"))
def apply(model, params, *args, semantic_depth=None, **kwargs):
    """One pass."""
    [out] = model.apply(params, Pass(*args, **kwargs), semantic_depth=semantic_depth)
    return out


def tiny(key=0, **changes):
    """A tiny network whose zero-initialised layers are random, so that every path matters."""
    model = UniAlign(dataclasses.replace(TINY, **changes), dtype=jnp.float32)
    shapes = jax.eval_shape(
        lambda: nn.unbox(
            model.init(
                jax.random.key(0), Pass(jnp.zeros((1, 8, 8, 4)), jnp.zeros((1, 5, 12)), jnp.zeros(1)), semantic_depth=1
            )
        )
    )
    leaves, tree = jax.tree.flatten(shapes["params"])
    keys = jax.random.split(jax.random.key(key), len(leaves))
    leaves = [0.15 * jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)]
    return model, {"params": jax.tree.unflatten(tree, leaves)}


def inputs(batch=2, height=8, width=8, references=0, seed=1):
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    refs = draw(batch, references, height, width, 4) if references else None
    return draw(batch, height, width, 4), draw(batch, 5, 12), jnp.linspace(0, 1000, batch), refs


@pytest.mark.parametrize("name", ["generate", "generate_landscape", "edit", "compose", "text_only"])
def test_forward_matches_recorded(name, case, transformer):
    model, params = transformer
    recorded = case(f"forward_{name}")
    out = apply(
        model,
        {"params": params},
        recorded.get("latents"),
        recorded["text"],
        recorded["timestep"],
        references=recorded.get("reference_latents"),
        semantic_depth=int(recorded["block_depth"]),
    )
    if name == "text_only":
        assert out.image is None
    else:
        np.testing.assert_allclose(out.image, recorded["image_out"], atol=2e-5, rtol=0)
    for field in ("text_logits", "image_hidden", "text_hidden", "image_semantic", "text_semantic"):
        np.testing.assert_allclose(getattr(out, field), recorded[field], atol=2e-5, rtol=0, err_msg=field)


def test_new_positions_are_the_public_table(golden, transformer):
    from safetensors.numpy import load_file

    public = load_file(golden / "transformer" / "diffusion_pytorch_model.safetensors")["pos_embed.pos_embed"]
    axis, size = axis_positions(transformer[0].config), transformer[0].config.pos_embed_max_size
    columns, rows = np.split(public.reshape(size, size, -1), 2, axis=2)
    np.testing.assert_array_equal(columns, np.broadcast_to(axis[None], columns.shape))
    np.testing.assert_array_equal(rows, np.broadcast_to(axis[:, None], rows.shape))


@pytest.mark.parametrize("present", [0, 1, 2])
def test_absent_references_are_as_if_not_there(present):
    model, params = tiny()
    latents, text, time, references = inputs(references=3)
    mask = jnp.arange(3)[None] < jnp.array([[present], [3]])
    padded = apply(model, params, latents, text, time, references=references, reference_mask=mask, semantic_depth=2)
    exact = apply(
        model,
        params,
        latents[:1],
        text[:1],
        time[:1],
        references=references[:1, :present] if present else None,
        semantic_depth=2,
    )
    full = apply(model, params, latents, text, time, references=references, semantic_depth=2)
    for got, alone, every in zip(padded, exact, full, strict=True):
        np.testing.assert_allclose(got[0], alone[0], atol=1e-5)
        np.testing.assert_allclose(got[1], every[1], atol=1e-5)
    assert np.abs(padded.image[0] - full.image[0]).max() > 1e-2  # the mask does hide something


def test_references_matter_and_share_positions():
    model, params = tiny()
    latents, text, time, references = inputs(references=2)
    out = apply(model, params, latents, text, time, references=references)
    swapped = apply(model, params, latents, text, time, references=references[:, ::-1])
    alone = apply(model, params, latents, text, time)
    np.testing.assert_allclose(out.image, swapped.image, atol=1e-5)  # no index tells references apart, as published
    assert np.abs(out.image - alone.image).max() > 1e-2


def test_only_the_wanted_head_is_computed():
    model, params = tiny()
    latents, text, time, _ = inputs()

    def head_weights_used(**wanted):
        """Names of the top-level parameters that the outputs depend on, read from the traced program."""

        def fn(p):
            [out] = model.apply(p, Pass(latents, text, time, **wanted))
            return [x for x in out if x is not None]

        closed = jax.make_jaxpr(fn)(params)
        used = {v for eqn in closed.jaxpr.eqns for v in eqn.invars if not isinstance(v, jax.extend.core.Literal)}
        paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(params)]
        return {p for p, v in zip(paths, closed.jaxpr.invars, strict=True) if v in used}

    image = apply(model, params, latents, text, time, want_text=False)
    words = apply(model, params, latents, text, time, want_image=False)
    assert image.text_logits is None and words.image is None
    assert not any("text_head" in p or "adapter" in p for p in head_weights_used(want_text=False))
    assert not any("image_head" in p for p in head_weights_used(want_image=False))
    both = apply(model, params, latents, text, time)
    np.testing.assert_array_equal(both.image, image.image)
    np.testing.assert_array_equal(both.text_logits, words.text_logits)


def test_passes_side_by_side_are_the_passes_alone():
    """Of different lengths, with and without references, image and heads; gradients add up."""
    model, params = tiny()
    latents, text, time, references = inputs(references=2)
    mask = jnp.array([[True, False], [True, True]])
    passes = [
        Pass(latents, text, time, references=references, reference_mask=mask, want_text=False),
        Pass(latents[::-1], text[:, :3], 0 * time, text_pool_mask=jnp.ones((2, 3), bool), want_image=False),
        Pass(None, 2 * text, time),
    ]

    @jax.jit
    def together(params):
        return model.apply(params, *passes, semantic_depth=2)

    @jax.jit
    def alone(params):
        return [out for item in passes for out in model.apply(params, item, semantic_depth=2)]

    both = zip(jax.tree.leaves(together(params)), jax.tree.leaves(alone(params)), strict=True)
    for got, expected in both:
        np.testing.assert_allclose(got, expected, atol=1e-5)
    got, expected = (
        jax.jit(jax.grad(lambda params, run=run: sum(jnp.sum(jnp.square(x)) for x in jax.tree.leaves(run(params)))))(
            params
        )
        for run in (together, alone)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * (1 + np.abs(b).max())), got, expected)


@pytest.mark.slow
def test_remat_changes_no_gradient():
    model, params = tiny()
    latents, text, time, _ = inputs()

    def loss(params, remat):
        [out] = dataclasses.replace(model, remat=remat).apply(params, Pass(latents, text, time), semantic_depth=1)
        return sum(jnp.sum(jnp.square(x)) for x in out)

    grad = jax.jit(jax.grad(loss), static_argnums=1)
    expected = grad(params, "none")
    for policy in sorted(set(REMAT_POLICIES) - {"none"}):
        got = grad(params, policy)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * (1 + np.abs(b).max())), got, expected)


def test_what_dots_keeps_of_attention_is_joined(capsys):
    """The backward pass reads queries, keys and values of both streams in one array: neither is kept beside it."""
    model, params = tiny()
    block = JointBlock(model.config, jnp.float32, "xla", None)
    one = {"params": jax.tree.map(lambda x: x[0], params["params"]["blocks"])}
    width, heads = model.config.width, model.config.num_attention_heads
    images, texts = jnp.ones((2, 16, width)), jnp.ones((2, 5, width))

    def kept(policy):
        def run(images, texts):
            return block.apply(one, ([images], [texts]), [Context(jnp.ones((2, width)), None, None)])[0]

        jax.ad_checkpoint.print_saved_residuals(jax.checkpoint(run, policy=REMAT_POLICIES[policy]), images, texts)
        return [line for line in capsys.readouterr().out.splitlines() if "argument" not in line]

    joined, apart = f"f32[2,21,{heads},{width // heads}]", (f"f32[2,16,{width}]", f"f32[2,5,{width}]")
    dots = kept("dots")
    assert sum(joined in line for line in dots) == 3, dots
    # Of one stream, what attention's output layer makes; an MLP's result is read for gradients of gates alone.
    assert all(sum(one_stream in line for line in dots) == 1 for one_stream in apart), dots
    assert not any(joined in line for line in kept("full"))


def test_qk_norm_matches_its_definition():
    """With q/k norm the attention logits no longer depend on the scale of queries and keys."""
    model, params = tiny(qk_norm="rms_norm")
    latents, text, time, _ = inputs()
    scaled = jax.tree.map(lambda x: x, params)
    for stream in ("image", "text"):
        for name in ("query", "key"):
            layer = scaled["params"]["blocks"][stream][name]
            scaled["params"]["blocks"][stream][name] = jax.tree.map(lambda x: 64 * x, layer)
    out, same = (apply(model, p, latents, text, time).image for p in (params, scaled))
    np.testing.assert_allclose(out, same, atol=2e-4)  # RMS norm undoes the scale of its input
    plain, other = (apply(tiny()[0], p, latents, text, time).image for p in (params, scaled))
    assert np.abs(plain - other).max() > 1e-2  # without the norms it would have mattered


def test_bfloat16_is_close_to_float32(case, transformer):
    model, params = transformer
    recorded = case("forward_edit")
    out = apply(
        UniAlign(model.config, dtype=jnp.bfloat16),
        {"params": params},
        recorded["latents"],
        recorded["text"],
        recorded["timestep"],
        references=recorded["reference_latents"],
    )
    assert out.image.dtype == jnp.float32 and out.image_hidden.dtype == jnp.bfloat16
    error = np.linalg.norm(out.image - recorded["image_out"]) / np.linalg.norm(recorded["image_out"])
    assert error < 0.02


def test_time_features_put_cosines_first():
    features = np.asarray(time_features(jnp.array([0.0, 10.0])))
    np.testing.assert_array_equal(features[0], [1.0] * 128 + [0.0] * 128)
    np.testing.assert_allclose(features[1, [0, 128]], [np.cos(10.0), np.sin(10.0)], rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"caption_projection_dim": 20}, "caption_projection_dim is 20"),
        ({"qk_norm": "layer_norm"}, "qk_norm is 'layer_norm'"),
        ({"mask_token_id": 40}, "mask_token_id 40"),
    ],
)
def test_contradicting_config_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)


@pytest.mark.parametrize(
    ("height", "width", "call", "message"),
    [
        (7, 8, {}, "multiple of the patch size 2"),
        (8, 26, {}, "position table holds 12x12"),
        (8, 8, {"semantic_depth": 4}, "semantic_depth 4"),
        (8, 8, {"references": jnp.zeros((2, 1, 8, 10, 4))}, "one size"),
    ],
)
def test_bad_calls_are_refused(height, width, call, message):
    model, params = tiny()
    latents, text, time, _ = inputs(height=height, width=width)
    with pytest.raises(ValueError, match=message):
        apply(model, params, latents, text, time, **call)
