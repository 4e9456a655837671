"""Masked text diffusion against the recorded sampler runs, brute force, and known distributions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unialign_jax.diffusion import masked_text
from unialign_jax.models.unialign import Pass

MASK = 319


@pytest.fixture(scope="module")
def logits_of(transformer, text_encoder):
    """Builds `ids -> logits` for an image."""
    model, params = transformer
    encoder, text_params = text_encoder

    def bind(latents):
        def logits(ids):
            states = encoder.apply({"params": text_params}, ids)
            item = Pass(latents, states, jnp.zeros(len(ids)), want_image=False)
            return model.apply({"params": params}, item)[0].text_logits

        return jax.jit(logits)

    return bind


@pytest.mark.parametrize("name", ["caption", "answer"])
def test_ancestral_sampler_matches_recorded(name, case, logits_of):
    recorded = case(f"sample_{name}")
    logits = logits_of(recorded["image_latents"])
    probe = recorded["probe_ids"].astype(np.int32)
    log_probs = masked_text.log_probs(logits(probe), probe, MASK)
    np.testing.assert_allclose(log_probs, recorded["probe_log_probs"], rtol=1e-5, atol=2e-5)
    uniforms = jnp.asarray(recorded["uniforms"])
    tokens = jax.jit(
        lambda ids, known: masked_text.sample_ancestral(
            logits, ids, known, lambda i: uniforms[i], num_steps=int(recorded["num_steps"]), mask_id=MASK
        )
    )(recorded["prompt_ids"], recorded["prompt_mask"])
    np.testing.assert_array_equal(tokens, recorded["tokens"])


def test_loss_is_the_brute_force_sum():
    rng = np.random.default_rng(0)
    vocabulary, mask = 11, 10
    ids = rng.integers(0, 10, (3, 6)).astype(np.int32)
    masked = np.where(rng.random((3, 6)) < 0.6, mask, ids).astype(np.int32)
    learned = rng.random((3, 6)) < 0.8
    time = np.array([0.2, 0.5, 0.97], np.float32)
    logits = rng.normal(size=(3, 6, vocabulary)).astype(np.float32)
    allowed = np.delete(logits.astype(np.float64), mask, axis=-1)
    log_p = allowed - np.log(np.exp(allowed).sum(-1, keepdims=True))
    expected = 0.0
    for b in range(3):
        sigma = -np.log1p(-(1 - 1e-3) * float(time[b]))
        weight = (1 - 1e-3) / (1 - (1 - 1e-3) * float(time[b])) / np.expm1(sigma)
        for t in range(6):
            if masked[b, t] == mask and learned[b, t]:
                expected -= weight * log_p[b, t, ids[b, t]]
    got = masked_text.loss(logits, masked, ids, time, learned, mask)
    np.testing.assert_allclose(got, expected / 18, rtol=1e-5)
    # The same through SUBS log-probabilities, which the sampler uses.
    subs = np.take_along_axis(np.asarray(masked_text.log_probs(logits, masked, mask)), ids[..., None], -1)[..., 0]
    np.testing.assert_allclose(
        subs[masked == mask], np.take_along_axis(log_p, ids[..., None], -1)[..., 0][masked == mask], rtol=1e-4
    )
    np.testing.assert_array_equal(subs[masked != mask], 0)


def test_times_cover_the_range_evenly():
    times = np.asarray(masked_text.antithetic_times(jax.random.uniform(jax.random.key(3), (64,))))
    assert times.min() >= 1e-3 and times.max() < 1
    assert len(set(np.floor((times - 1e-3) / (1 - 1e-3) * 64).astype(int))) == 64


def test_masking_has_the_stated_rate_and_spares_the_prompt():
    ids = jnp.zeros((4, 20000), jnp.int32)
    time = jnp.array([0.1, 0.5, 0.9, 1.0])
    u = jax.random.uniform(jax.random.key(0), ids.shape)
    maskable = jnp.arange(20000)[None] >= 100
    masked = np.asarray(masked_text.mask_tokens(ids, time, u, jnp.broadcast_to(maskable, ids.shape), 7))
    assert not (masked[:, :100] == 7).any()
    np.testing.assert_allclose((masked[:, 100:] == 7).mean(1), (1 - 1e-3) * time, atol=0.02)


def independent_tokens(log_p):
    """A 'network' for which the tokens are independent: log-probabilities `[T, V]` whatever is revealed."""
    return lambda ids: jnp.broadcast_to(log_p, (*ids.shape, log_p.shape[-1]))


def test_ancestral_samples_have_the_models_distribution():
    vocabulary, mask = 5, 4
    p = np.array([[0.5, 0.3, 0.15, 0.05], [0.1, 0.1, 0.1, 0.7]])
    log_p = jnp.asarray(np.concatenate([np.log(p), np.zeros((2, 1))], axis=1), jnp.float32)
    batch = 20000
    key = jax.random.key(0)
    tokens = masked_text.sample_ancestral(
        independent_tokens(log_p),
        jnp.zeros((batch, 2), jnp.int32),
        jnp.zeros((batch, 2), bool),
        lambda i: jax.random.uniform(jax.random.fold_in(key, i), (batch, 2, vocabulary)),
        num_steps=16,
        mask_id=mask,
    )
    for position in range(2):
        share = np.bincount(np.asarray(tokens[:, position]), minlength=5)[:4] / batch
        np.testing.assert_allclose(share, p[position], atol=0.015)


def test_cache_changes_nothing(case, logits_of):
    """Recomputing the probabilities at every step, in plain Python, gives the same tokens as the cached program."""
    recorded = case("sample_caption")
    logits, uniforms = logits_of(recorded["image_latents"]), recorded["uniforms"]
    steps = 24  # more steps than tokens: many reveal nothing
    many = np.random.default_rng(1).random((steps, *uniforms.shape[1:])).astype(np.float32)
    ids = np.full((1, 12), MASK, np.int32)
    times = np.linspace(1, 1e-5, steps + 1, dtype=np.float32)
    for i in range(steps):
        p = np.exp(np.asarray(masked_text.log_probs(logits(ids), ids, MASK)))
        q = p * np.float32((1 - 1e-5) / steps)
        q[..., MASK] = times[i] - np.float32((1 - 1e-5) / steps)
        drawn = (q / (1e-10 - np.log(many[i] + np.float32(1e-10)))).argmax(-1)
        ids = np.where(ids == MASK, drawn, ids).astype(np.int32)
    expected = np.asarray(masked_text.log_probs(logits(ids), ids, MASK)).argmax(-1)
    many = jnp.asarray(many)
    got = masked_text.sample_ancestral(
        logits,
        jnp.zeros((1, 12), jnp.int32),
        jnp.zeros((1, 12), bool),
        lambda i: many[i],
        num_steps=steps,
        mask_id=MASK,
    )
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("steps", [1, 3, 4, 7])
def test_confident_decoding_reveals_all_in_order_of_confidence(steps):
    calls = []
    rng = np.random.default_rng(0)
    log_p = jnp.asarray(rng.normal(size=(7, 12)), jnp.float32)

    def logits(ids):
        jax.debug.callback(lambda x: calls.append(np.asarray(x)), ids, ordered=True)
        return jnp.broadcast_to(log_p, (*ids.shape, 12))

    known = jnp.array([[True, True] + [False] * 5, [False] * 7])
    prompt = jnp.full((2, 7), 3, jnp.int32)
    tokens = masked_text.sample_confident(logits, prompt, known, num_steps=steps, mask_id=11, end_id=-1)
    jax.effects_barrier()
    assert len(calls) == steps
    best = np.asarray(log_p)[:, :11].argmax(-1)
    np.testing.assert_array_equal(tokens, np.where(known, 3, best))
    left = [(ids == 11).sum(axis=1) for ids in calls]
    for sample, total in ((0, 5), (1, 7)):
        assert [n[sample] for n in left] == [total - int(np.ceil(total * i / steps)) for i in range(steps)]
    if steps == 7:  # one token at a time: the order is the order of confidence
        probability = np.asarray(jax.nn.log_softmax(log_p[:, :11])).max(-1)
        first_revealed = next(i for i in range(7) if calls[1][1, i] != 11)
        assert first_revealed == probability.argmax()


@pytest.mark.parametrize(("certainty", "text"), [(0.85, [2, 3, 0, 0]), (0.95, [0, 0, 0, 0])])
def test_ends_wait_for_words_unless_they_are_certain(certainty, text):
    """A text is "2 3" or nothing: its ends are more probable than its words until one of those is fixed."""

    def logits(ids):
        worded = jnp.any((ids == 2) | (ids == 3), axis=1)[:, None]
        end = jnp.array([[0.5, 0.5, certainty, certainty]])
        end = jnp.where(worded, jnp.array([[0.01, 0.01, 0.99, 0.99]]), end)
        end = jnp.where(jnp.any(ids == 0, axis=1)[:, None] & ~worded, 0.99, end)
        word = jnp.arange(5) == jnp.array([2, 3, 2, 2])[:, None]
        return jnp.log(jnp.where(jnp.arange(5) == 0, end[..., None], jnp.where(word, 1.01 - end[..., None], 1e-9)))

    unknown = jnp.zeros((1, 4), bool)
    ids = masked_text.sample_confident(logits, jnp.zeros((1, 4)), unknown, num_steps=4, mask_id=4, end_id=0)
    np.testing.assert_array_equal(ids[0], text)


def test_confident_decoding_of_the_recorded_network_is_argmax_at_the_end(case, logits_of):
    recorded = case("sample_answer")
    logits = logits_of(recorded["image_latents"])
    decode = functools.partial(masked_text.sample_confident, logits, mask_id=MASK, end_id=1, num_steps=4)
    tokens = np.asarray(decode(recorded["prompt_ids"], recorded["prompt_mask"]))
    assert not (tokens == MASK).any()
    np.testing.assert_array_equal(tokens[recorded["prompt_mask"]], recorded["prompt_ids"][recorded["prompt_mask"]])


def test_text_ends_at_its_first_end_token_after_the_prompt():
    ids = jnp.array([[1, 5, 6, 1, 7, 8], [5, 6, 7, 8, 9, 3]])
    known = jnp.array([[True] + [False] * 5, [False] * 6])
    cut = masked_text.cut_at_end(ids, known, 1)
    np.testing.assert_array_equal(cut, [[1, 5, 6, 1, 1, 1], [5, 6, 7, 8, 9, 3]])
