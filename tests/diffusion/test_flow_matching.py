"""Flow matching against the recorded samplers, diffusers' scheduler and closed forms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unialign_jax.diffusion import flow_matching


@pytest.mark.parametrize("name", ["generate", "edit"])
def test_sampler_matches_recorded(name, case, transformer):
    recorded = case(f"sample_{name}")
    model, params = transformer

    def velocity(latents, time, condition):
        return model.apply({"params": params}, latents, condition["text"], time, references=condition.get("refs")).image

    condition = {"text": recorded["text"]}
    if name == "edit":
        condition["refs"] = recorded["reference_latents"]
    sigmas = flow_matching.euler_sigmas(int(recorded["num_steps"]), float(recorded["shift"]))
    if "sigmas" in recorded:
        np.testing.assert_allclose(sigmas, recorded["sigmas"], rtol=1e-6)
    latents = flow_matching.sample(
        velocity,
        recorded["init_latents"],
        condition,
        sigmas,
        negative={**condition, "text": recorded["negative_text"]},
        guidance_scale=float(recorded["guidance_scale"]),
    )
    np.testing.assert_allclose(latents, recorded["latents"], atol=1e-3, rtol=0)


@pytest.mark.parametrize(("steps", "shift"), [(1, 3.0), (6, 3.0), (28, 1.0), (50, 3.0)])
def test_sigmas_are_those_of_diffusers(steps, shift):
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    np.testing.assert_allclose(flow_matching.euler_sigmas(steps, shift), scheduler.sigmas.numpy(), rtol=2e-6)


def test_training_levels_are_the_public_table():
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler()
    u = np.array([0.0, 0.0004, 0.25, 0.4999, 0.9999, 1.0], np.float32)
    index = np.minimum((u * 1000).astype(int), 999)
    np.testing.assert_allclose(flow_matching.noise_levels(u), scheduler.sigmas.numpy()[index], rtol=1e-6)


def test_loss_is_zero_for_the_true_velocity_and_scales_with_sigma():
    clean, noise, error = jax.random.normal(jax.random.key(0), (3, 4, 2, 2, 3))
    sigma = jnp.array([0.1, 0.5, 0.9, 1.0])
    noisy = flow_matching.add_noise(clean, noise, sigma)
    assert flow_matching.loss(noise - clean, noisy, clean, sigma) < 1e-12
    expected = np.mean(np.square(np.asarray(sigma)[:, None, None, None] * error))
    np.testing.assert_allclose(flow_matching.loss(noise - clean + error, noisy, clean, sigma), expected, rtol=1e-5)


def straight(latents, time, condition):
    """Velocity of the straight path to the condition: Euler is exact on it for any steps."""
    return (latents - condition) / (time / 1000)[:, None]


def test_euler_follows_a_straight_path_exactly():
    target = jnp.array([[1.0, -2.0], [0.5, 3.0]])
    noise = jax.random.normal(jax.random.key(0), (2, 2))
    got = flow_matching.sample(straight, noise, target, flow_matching.euler_sigmas(5))
    np.testing.assert_allclose(got, target, atol=1e-5)


def test_guidance_acts_inside_its_interval_only_and_costs_the_stated_evaluations():
    """Constant velocities: the end point counts the guided share of the path."""
    sizes = []

    def velocity(latents, time, condition):
        sizes.append(latents.shape[0])
        return jnp.broadcast_to(condition, latents.shape)

    sigmas = np.linspace(1, 0, 11).astype(np.float32)
    run = functools.partial(
        flow_matching.sample, velocity, jnp.zeros((3, 1)), jnp.ones((3, 1)), sigmas, negative=jnp.zeros((3, 1))
    )
    np.testing.assert_allclose(run(guidance_scale=4.0), -4.0, rtol=1e-5)
    assert sizes == [6]  # one traced body, doubled batch
    sizes.clear()
    # Steps starting at 0.7, 0.6, 0.5, 0.4 are guided: four tenths of the path at speed 4, the rest at speed 1.
    np.testing.assert_allclose(run(guidance_scale=4.0, guidance_interval=(0.35, 0.75)), -(1.6 + 0.6), rtol=1e-5)
    assert sizes == [3, 6, 3]
    sizes.clear()
    np.testing.assert_allclose(run(guidance_scale=1.0), -1.0, rtol=1e-5)
    assert sizes == [3]


def test_guidance_without_a_negative_is_refused():
    with pytest.raises(ValueError, match="guidance_scale 7.0 needs the negative"):
        flow_matching.sample(straight, jnp.zeros((1, 1)), jnp.zeros((1, 1)), np.ones(2), guidance_scale=7.0)


@pytest.mark.parametrize(("steps", "shift"), [(0, 3.0), (5, 0.0)])
def test_impossible_schedules_are_refused(steps, shift):
    with pytest.raises(ValueError, match="num_steps must be at least 1"):
        flow_matching.euler_sigmas(steps, shift)
