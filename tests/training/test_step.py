"""The train step on a small complete model: precision, accumulation, what is trained, and AdamW as published."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unialign_jax.batch import Batch, sample_draws, to_unit_range
from unialign_jax.networks import build_networks
from unialign_jax.objectives import Objective
from unialign_jax.state import OptimizerConfig, apply_gradients, create_state, learning_rate
from unialign_jax.training.step import make_train_step
from unialign_jax.tuning import Tuning

MODEL = {
    "pixel_codec": {"patch": 2},
    "transformer": {
        "sample_size": 8,
        "in_channels": 12,
        "out_channels": 12,
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "caption_projection_dim": 32,
        "joint_attention_dim": 24,
        "pos_embed_max_size": 8,
        "vocab_size": 50,
        "adapter_hidden": 24,
        "semantic_dim": 20,
        "mask_token_id": 49,
    },
    "text_encoder": {"vocab_size": 50, "d_model": 24, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2},
    "teacher": {
        "depth": 2,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_heads": 2,
        "patch_size": 4,
        "window_size": 16,
        "out_hidden_size": 20,
        "fullatt_block_indexes": (1,),
        "min_pixels": 64,
        "vocab_size": 50,
    },
}
TRAINED = [("transformer",), pytest.param(("transformer", "text_encoder"), marks=pytest.mark.slow)]
OBJECTIVE = Objective(semantic_depth=1, mask_token_id=49)
OPTIMIZER = OptimizerConfig(learning_rate=2e-3, warmup_steps=5, ema_rate=0.9)


def batch(size=8, references=0, seed=0):
    rng = np.random.default_rng(seed)
    ids = rng.integers(2, 49, (size, 6)).astype(np.int32)
    ids[:, 4:] = 1
    return Batch(
        target=rng.integers(0, 256, (size, 16, 16, 3)).astype(np.uint8),
        caption_ids=ids,
        caption_loss_mask=np.ones_like(ids, bool),
        instruction_ids=ids[::-1].copy(),
        null_ids=np.ones(6, np.int32),
        references=rng.integers(0, 256, (size, references, 16, 16, 3)).astype(np.uint8) if references else None,
        reference_mask=rng.random((size, references)) < 0.7 if references else None,
        teacher_ids=ids,
        teacher_mask=ids != 1,
    )


@functools.cache
def first_params():
    return jax.jit(build_networks(MODEL, dtype="float32").init)(jax.random.key(0))


def setup(dtype="float32", trained=("transformer",)):
    params = first_params()
    networks = build_networks(MODEL, dtype=dtype)
    return networks, {k: params[k] for k in trained}, {k: v for k, v in params.items() if k not in trained}


def step_of(dtype="float32", objective=OBJECTIVE, optimizer=OPTIMIZER, micro_batches=1):
    return cached_step(dtype, objective, optimizer, micro_batches)


@functools.cache  # by place: it takes the same argument by place and by name for two
def cached_step(dtype, objective, optimizer, micro_batches):
    networks = build_networks(MODEL, dtype=dtype)
    return jax.jit(make_train_step(networks, objective, optimizer, micro_batches=micro_batches))


def run(steps, dtype="float32", data=None, trained=("transformer",), **kwargs):
    _, params, frozen = setup(dtype, trained)
    state, losses = create_state(params, OPTIMIZER), []
    for i in range(steps):
        state, metrics = step_of(dtype, **kwargs)(state, frozen, data or batch(seed=i % 4), jax.random.key(7))
        losses.append(float(metrics["loss"]))
    return state, np.array(losses), metrics


@pytest.mark.slow
def test_bfloat16_loss_stays_within_two_percent_of_float32():
    """50 steps on the same draws, each precision following its own parameters."""
    _, exact, _ = run(50)
    _, coarse, _ = run(50, dtype="bfloat16")
    assert exact[-5:].mean() < 0.9 * exact[:5].mean()  # it does learn: the comparison is not of two constants
    np.testing.assert_allclose(coarse, exact, rtol=0.02)


AUTOENCODED = {key: value for key, value in MODEL.items() if key not in ("pixel_codec", "teacher")} | {
    "autoencoder": {"block_out_channels": (4, 8), "latent_channels": 3, "layers_per_block": 1, "norm_num_groups": 2},
    "transformer": MODEL["transformer"] | {"in_channels": 3, "out_channels": 3},
    "teacher": None,
}


@pytest.mark.slow
def test_an_autoencoder_s_latents_are_drawn_from_its_posterior():
    """Of target and references, with the step's draws."""
    networks, data = build_networks(AUTOENCODED, dtype="float32"), batch(4, references=1)
    params = jax.jit(networks.init)(jax.random.key(0))
    frozen = {name: params[name] for name in ("text_encoder", "autoencoder")}
    state, key = create_state({"transformer": params["transformer"]}, OPTIMIZER), jax.random.key(7)
    step = jax.jit(make_train_step(networks, OBJECTIVE, OPTIMIZER))
    found = {name: float(value) for name, value in step(state, frozen, data, key)[1].items()}

    @jax.jit
    def terms(params, noisy):
        draws = sample_draws(jax.random.fold_in(key, 0), data, (8, 8, 3))
        moments = networks.image_moments(params, data)
        mean, logvar = jnp.split(moments, 2, axis=-1)
        scaling = networks.codec.config
        drawn = mean + noisy * jnp.exp(0.5 * jnp.clip(logvar, -30, 20)) * draws.posterior
        latents = (drawn - scaling.shift_factor) * scaling.scaling_factor
        features = networks.encode(params, data, None).replace(target=latents[:, 0], references=latents[:, 1:])
        states = networks.encode_texts(params, OBJECTIVE.texts(data, draws))
        return OBJECTIVE(functools.partial(networks.denoise, params), states, features, draws)[1]

    expected = terms(params, 1.0)
    for name, value in expected.items():
        assert found[name] == pytest.approx(float(value), rel=1e-5), name
    assert found["image"] != pytest.approx(float(terms(params, 0.0)["image"]), rel=1e-3)


@pytest.mark.slow
def test_kernels_of_frozen_networks_may_be_kept_in_the_compute_dtype():
    """Every layer casts them to it: the step is the same bit for bit."""
    _, params, frozen = setup("bfloat16")
    wanted = Tuning().cast_frozen_kernels(jax.eval_shape(lambda: params | frozen), jnp.bfloat16)
    cast = jax.tree.map(lambda x, like: x.astype(like.dtype), frozen, {name: wanted[name] for name in frozen})
    kept = {leaf.dtype for leaf in jax.tree.leaves({name: wanted[name] for name in params})}
    assert kept == {jnp.dtype("float32")}
    for network, count in (("text_encoder", 7), ("teacher", 7)):
        assert sum(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(cast[network])) >= count
    whole = build_networks(AUTOENCODED | {"teacher": MODEL["teacher"]}, dtype="bfloat16")
    params_of_whole = jax.jit(whole.init)(jax.random.key(1))
    wanted = Tuning().cast_frozen_kernels(jax.eval_shape(lambda: params_of_whole), jnp.bfloat16)
    halved = jax.tree.map(lambda x, like: x.astype(like.dtype), params_of_whole, wanted)
    assert sum(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(halved["autoencoder"])) > 20
    for made in (whole.image_moments, lambda p, data: whole.codec.decode(p["autoencoder"], jnp.ones((2, 8, 8, 3)))):
        pair = (np.asarray(jax.jit(made)(p, batch(size=2))) for p in (params_of_whole, halved))
        np.testing.assert_array_equal(*pair)

    step, data = step_of("bfloat16"), batch(references=1)
    expected, found = (step(create_state(params, OPTIMIZER), f, data, jax.random.key(7)) for f in (frozen, cast))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_terms_are_reported_and_sum_to_the_loss():
    _, _, metrics = run(1, data=batch(references=2))
    o = OBJECTIVE
    total = metrics["image"] * o.image_weight + metrics["text"] * o.text_weight
    total += metrics["contrastive"] * o.contrastive_weight
    total += (metrics["image_align"] + metrics["text_align"]) * o.alignment_weight
    np.testing.assert_allclose(metrics["loss"], total, rtol=1e-6)
    assert metrics["grad_norm"] > 0 and metrics["learning_rate"] == 0  # the first of the warm-up


@pytest.mark.parametrize("trained", TRAINED)
def test_micro_batches_update_like_the_full_batch(trained):
    """Whether the encoders are frozen, which read the whole batch at once, or trained, in each part."""
    objective = dataclasses.replace(OBJECTIVE, contrastive_weight=0.0)
    data = batch(references=1)
    whole, _, a = run(3, data=data, objective=objective, trained=trained)
    parts, _, b = run(3, data=data, objective=objective, trained=trained, micro_batches=4)
    for name in set(a) - {"contrastive"}:
        np.testing.assert_allclose(b[name], a[name], rtol=1e-4, err_msg=name)
    # Adam divides by the gradient's size, so a rounding difference of a tiny gradient shows; half a rate bounds it.
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-4), parts.params, whole.params)


def test_frozen_encoders_read_a_batch_once_whatever_the_micro_batches(monkeypatch):
    """The texts of all samples in one call, however many parts follow; on one device 32 at a time."""
    networks, params, frozen = setup()
    seen = []
    apply = type(networks.text_encoder).apply
    monkeypatch.setattr(
        type(networks.text_encoder), "apply", lambda m, p, ids: seen.append(len(ids)) or apply(m, p, ids)
    )
    for size, read in ((8, 16), (32, 32)):
        step = make_train_step(networks, OBJECTIVE, OPTIMIZER, micro_batches=4)
        jax.eval_shape(step, create_state(params, OPTIMIZER), frozen, batch(size=size), jax.random.key(0))
        assert set(seen) == {read}, (size, seen)
        seen.clear()


def test_unequal_micro_batches_are_refused():
    with pytest.raises(ValueError, match="batch of 8 cannot be split in 3"):
        run(1, micro_batches=3)


def test_steps_draw_by_number_not_by_history():
    """A state set back to an earlier step repeats that step's draws exactly; other steps and keys draw differently."""
    _, params, frozen = setup()
    state = create_state(params, OPTIMIZER)
    step, data = step_of(), batch()
    first, again = (step(state, frozen, data, jax.random.key(7))[1]["loss"] for _ in range(2))
    later = step(state.replace(step=jnp.int32(1)), frozen, data, jax.random.key(7))[1]["loss"]
    other = step(state, frozen, data, jax.random.key(8))[1]["loss"]
    assert first == again and first != later and first != other


@pytest.mark.parametrize("trained", TRAINED)
def test_only_the_trained_networks_change(trained):
    _, params, frozen = setup(trained=trained)
    state = create_state(params, OptimizerConfig(learning_rate=1e-2, warmup_steps=0))
    step = step_of(optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=0))
    # The first step moves only what is not behind a layer that starts at zero; the second moves all.
    for i in range(2):
        state, _ = step(state, frozen, batch(references=1), jax.random.key(i))
    assert set(state.params) == set(trained)
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), state.params, params)
    still = {jax.tree_util.keystr(p) for p, x in jax.tree.leaves_with_path(moved) if not x}
    # Fixed, and unused in training: neither trained nor decayed.
    assert still == {"['transformer']['null_image_tokens']", "['transformer']['positions']"}


def test_update_is_torchs_adamw_with_clipping():
    import torch

    rng = np.random.default_rng(0)
    start = {"kernel": rng.normal(size=(4, 3)).astype(np.float32), "bias": rng.normal(size=3).astype(np.float32)}
    config = OptimizerConfig(learning_rate=3e-2, warmup_steps=3, weight_decay=0.1, clip_norm=2.0, ema_rate=0.75)
    state = create_state(jax.tree.map(jnp.asarray, start), config)
    theirs = {k: torch.nn.Parameter(torch.tensor(v)) for k, v in start.items()}
    optimizer = torch.optim.AdamW(theirs.values(), lr=3e-2, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: min(1.0, k / 3))
    average = {k: v.copy() for k, v in start.items()}
    for i in range(6):
        grads = {k: (10.0**-i) * rng.normal(size=v.shape).astype(np.float32) * 5 for k, v in start.items()}
        state = apply_gradients(state, jax.tree.map(jnp.asarray, grads), config)
        for k, p in theirs.items():
            p.grad = torch.tensor(grads[k])
        torch.nn.utils.clip_grad_norm_(theirs.values(), 2.0)
        optimizer.step()
        schedule.step()
        average = {k: 0.75 * average[k] + 0.25 * theirs[k].detach().numpy() for k in average}
    for k in start:
        np.testing.assert_allclose(state.params[k], theirs[k].detach().numpy(), rtol=2e-5, atol=1e-6)
        np.testing.assert_allclose(state.ema[k], average[k], rtol=2e-5, atol=1e-6)
    assert state.step == 6


def test_the_cosine_of_the_learning_rate():
    """From 0 up to the peak in `warmup_steps`, then half a cosine to 0 at `decay_steps`, and 0 from there."""
    rate = learning_rate(OptimizerConfig(learning_rate=2e-3, warmup_steps=4, decay_steps=20))
    expected = [5e-4 * k for k in range(4)] + [1e-3 * (1 + np.cos(np.pi * k / 16)) for k in range(17)] + [0.0, 0.0]
    np.testing.assert_allclose([rate(k) for k in range(23)], expected, atol=1e-9)
    # A run that ends before its warm-up does.
    short = learning_rate(OptimizerConfig(learning_rate=2e-3, warmup_steps=4, decay_steps=2))
    np.testing.assert_allclose([short(k) for k in range(5)], [5e-4 * k for k in range(5)], atol=1e-9)


def test_by_option_block_matrices_go_by_muon():
    """A first step: the gradient of every stacked matrix orthogonalized, at the size of Adam's; the rest by Adam."""
    rng = np.random.default_rng(0)
    shapes = {"blocks": {"kernel": (2, 4, 6), "bias": (2, 6)}, "head": {"kernel": (4, 6)}}
    start, grads = ({k: {n: rng.normal(size=s) for n, s in v.items()} for k, v in shapes.items()} for _ in range(2))
    config = OptimizerConfig(
        learning_rate=0.1, warmup_steps=0, weight_decay=0.5, decay_matrices_only=True, clip_norm=1e9, muon=True
    )
    arrays = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (start, grads))
    state = apply_gradients(create_state(arrays[0], config), arrays[1], config)
    params = state.params

    def newton_schulz(x):
        x = x / np.linalg.norm(x)
        for _ in range(5):
            square = x @ x.T
            x = 3.4445 * x + (-4.775 * square + 2.0315 * square @ square) @ x
        return x

    direction = np.stack([newton_schulz(x) for x in grads["blocks"]["kernel"]])
    singular = np.linalg.svd(direction)[1]
    assert singular.min() > 0.6 and singular.max() < 1.3
    expected = start["blocks"]["kernel"] * (1 - 0.1 * 0.5) - 0.1 * 0.2 * 6**0.5 * direction
    np.testing.assert_allclose(params["blocks"]["kernel"], expected, atol=2e-5)
    nesterov = 1 + 0.9 / 1.9  # of Adam's first step
    adam = start["blocks"]["bias"] - 0.1 * nesterov * np.sign(grads["blocks"]["bias"])
    np.testing.assert_allclose(params["blocks"]["bias"], adam, atol=2e-5)
    adam = start["head"]["kernel"] * (1 - 0.1 * 0.5) - 0.1 * nesterov * np.sign(grads["head"]["kernel"])
    np.testing.assert_allclose(params["head"]["kernel"], adam, atol=2e-5)

    # Where a step gives a matrix no gradient, its momentum does not move it.
    some = arrays[1] | {"blocks": arrays[1]["blocks"] | {"kernel": arrays[1]["blocks"]["kernel"].at[1].set(0.0)}}
    moved = apply_gradients(state, some, dataclasses.replace(config, weight_decay=0.0)).params["blocks"]["kernel"]
    np.testing.assert_array_equal(moved[1], params["blocks"]["kernel"][1])
    assert np.abs(moved[0] - params["blocks"]["kernel"][0]).min() > 1e-4


def test_decay_of_matrices_only_spares_norms_and_biases():
    params = {name: jnp.ones(2) for name in ("kernel", "bias", "scale", "null_image_tokens")}
    zero = jax.tree.map(jnp.zeros_like, params)
    config = OptimizerConfig(learning_rate=0.1, warmup_steps=0, weight_decay=0.5)
    everything = apply_gradients(create_state(params, config), zero, config).params
    config = dataclasses.replace(config, decay_matrices_only=True)
    matrices = apply_gradients(create_state(params, config), zero, config).params
    shrunk = {name: bool(leaf[0] < 1) for name, leaf in everything.items()}
    assert shrunk == {"kernel": True, "bias": True, "scale": True, "null_image_tokens": False}
    assert {name: bool(leaf[0] < 1) for name, leaf in matrices.items()} == dict.fromkeys(shrunk, False) | {
        "kernel": True
    }
    np.testing.assert_allclose(matrices["kernel"], 0.95)


def test_no_average_is_kept_when_its_rate_is_zero():
    config = OptimizerConfig(ema_rate=0.0)
    params = {"kernel": jnp.ones((2, 2))}
    state = apply_gradients(create_state(params, config), params, config)
    assert state.ema is None


@pytest.mark.slow
@pytest.mark.parametrize("references", [0, 2])
def test_what_a_cache_provides_changes_nothing(references):
    """Losses, gradients and update are those of the step that encodes everything itself."""
    networks, params, frozen = setup()
    whole = batch(references=references)
    everything = {**params, **frozen}
    images = np.concatenate([whole.target[:, None], *([] if not references else [whole.references])], axis=1)
    moments = networks.codec.moments({}, to_unit_range(jnp.asarray(images.reshape(-1, *images.shape[2:]))))
    cached = Batch(
        caption_ids=whole.caption_ids,
        caption_loss_mask=whole.caption_loss_mask,
        reference_mask=whole.reference_mask,
        moments=moments.reshape(*images.shape[:2], *moments.shape[1:]),
        instruction_states=jax.jit(networks.encode_text)(everything, whole.instruction_ids),
        null_states=jax.jit(networks.encode_text)(everything, whole.null_ids[None])[0],
        teacher_image=networks.teacher.image_vectors(frozen["teacher"], to_unit_range(jnp.asarray(whole.target))),
        teacher_text=networks.teacher.text_vectors(frozen["teacher"], whole.teacher_ids, whole.teacher_mask),
    )
    state, key = create_state(params, OPTIMIZER), jax.random.key(3)
    for micro_batches in (1, 2) if references else (1,):
        step = step_of(micro_batches=micro_batches)
        (one, metrics), (other, cached_metrics) = (step(state, frozen, b, key) for b in (whole, cached))
        for name, value in metrics.items():
            np.testing.assert_allclose(cached_metrics[name], value, rtol=1e-5, err_msg=name)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), one.params, other.params)
    # What is cached needs no network: only the text encoder, for the masked captions, is still read.
    jax.eval_shape(step_of(), state, {"text_encoder": frozen["text_encoder"]}, cached, key)


def test_the_average_can_start_short():
    """By option its rate is (1 + n) / (10 + n) after n steps, up to the one configured."""
    config = OptimizerConfig(learning_rate=0.1, warmup_steps=0, ema_rate=0.2, ema_warmup=True)
    state = create_state({"x": {"kernel": jnp.ones((1, 1))}}, config)
    average = 1.0
    for step in range(5):
        state = apply_gradients(state, {"x": {"kernel": jnp.ones((1, 1))}}, config)
        rate = min((1 + step) / (10 + step), 0.2)
        average = rate * average + (1 - rate) * float(state.params["x"]["kernel"][0, 0])
        np.testing.assert_allclose(state.ema["x"]["kernel"][0, 0], average, rtol=1e-6)
