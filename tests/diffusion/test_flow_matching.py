"""Flow matching against the recorded samplers, diffusers' scheduler and closed forms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unialign_jax import parallel
from unialign_jax.diffusion import flow_matching
from unialign_jax.inference import programs
from unialign_jax.models.autoencoder import AutoencoderCodec, AutoencoderConfig
from unialign_jax.networks import Networks


def sample(velocity, noise, conditions, sigmas, scales=(), interval=(0.0, 1.0)):
    """From noise to data as the pipeline goes: all conditions within the interval, the last one outside."""
    for start, stop, guided in flow_matching.guided_runs(sigmas, interval, guided=len(conditions) > 1):
        predict = flow_matching.guide(velocity, conditions if guided else conditions[-1:], scales if guided else ())
        noise = flow_matching.euler(predict, noise, sigmas, start, stop)
    return noise


@pytest.mark.parametrize("name", ["generate", "edit"])
def test_sampler_matches_recorded(name, case, transformer, text_encoder):
    """The program that the pipeline runs, from the recorded noise and text states."""
    recorded = case(f"sample_{name}")
    model, params = transformer
    encoder, _ = text_encoder
    mesh = parallel.first_device()
    advance = programs.image_programs(Networks(model, AutoencoderCodec(AutoencoderConfig()), encoder), mesh).advance
    condition = {"text": recorded["text"]}
    if name == "edit":
        condition["references"] = recorded["reference_latents"]
    steps = int(recorded["num_steps"])
    sigmas = programs.sigma_table(steps, float(recorded["shift"]))
    if "sigmas" in recorded:
        np.testing.assert_allclose(sigmas[: steps + 1], recorded["sigmas"], rtol=1e-6)
    conditions = ({**condition, "text": recorded["negative_text"]}, condition)
    scales = np.float32([recorded["guidance_scale"]])
    with jax.set_mesh(mesh):
        latents = advance({"transformer": params}, recorded["init_latents"], conditions, scales, sigmas, 0, steps)
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
    got = sample(straight, noise, [target], flow_matching.euler_sigmas(5))
    np.testing.assert_allclose(got, target, atol=1e-5)


def test_guidance_acts_inside_its_interval_only_and_costs_the_stated_evaluations():
    """Constant velocities: the end point counts the guided share of the path."""
    sizes = []

    def velocity(latents, time, condition):
        sizes.append(latents.shape[0])
        return jnp.broadcast_to(condition, latents.shape)

    sigmas = np.linspace(1, 0, 11).astype(np.float32)
    run = functools.partial(sample, velocity, jnp.zeros((3, 1)))
    guided = [jnp.zeros((3, 1)), jnp.ones((3, 1))]
    np.testing.assert_allclose(run(guided, sigmas, [4.0]), -4.0, rtol=1e-5)
    assert sizes == [6]  # one traced body, doubled batch
    sizes.clear()
    # Steps starting at 0.7, 0.6, 0.5, 0.4 are guided: four tenths of the path at speed 4, the rest at speed 1.
    np.testing.assert_allclose(run(guided, sigmas, [4.0], (0.35, 0.75)), -(1.6 + 0.6), rtol=1e-5)
    assert sizes == [3, 6, 3]
    sizes.clear()
    np.testing.assert_allclose(run(guided[1:], sigmas), -1.0, rtol=1e-5)
    assert sizes == [3]


def test_two_scales_are_those_of_instruct_pix2pix():
    """Speeds 1, 3 and 7 for nothing, the references alone, and both: 1 + s_I (3 - 1) + s_T (7 - 3)."""
    conditions = [jnp.full((2, 1), speed) for speed in (1.0, 3.0, 7.0)]

    def velocity(latents, time, condition):
        return jnp.broadcast_to(condition, latents.shape)

    sigmas = np.linspace(1, 0, 4).astype(np.float32)
    run = functools.partial(sample, velocity, jnp.zeros((2, 1)))
    np.testing.assert_allclose(run(conditions, sigmas, [1.5, 7.5]), -(1 + 1.5 * 2 + 7.5 * 4), rtol=1e-5)
    # A reference scale of 1 is the single guidance, from the references alone.
    single = run(conditions[1:], sigmas, [7.5])
    np.testing.assert_allclose(run(conditions, sigmas, [1.0, 7.5]), single, rtol=1e-5)


def test_one_compiled_program_serves_any_number_of_steps():
    traces = []

    @jax.jit
    def steps(latents, sigmas, start, stop):
        traces.append(1)
        return flow_matching.euler(lambda x, time: straight(x, time, 2.0), latents, sigmas, start, stop)

    sigmas = np.pad(flow_matching.euler_sigmas(6), (0, 3))
    noise = jax.random.normal(jax.random.key(0), (3, 1))
    whole = steps(noise, sigmas, 0, 6)
    np.testing.assert_allclose(steps(steps(noise, sigmas, 0, 2), sigmas, 2, 6), whole, atol=1e-6)
    np.testing.assert_allclose(whole, 2.0, atol=1e-5)
    assert len(traces) == 1


@pytest.mark.parametrize(("steps", "shift"), [(0, 3.0), (5, 0.0)])
def test_impossible_schedules_are_refused(steps, shift):
    with pytest.raises(ValueError, match="num_steps must be at least 1"):
        flow_matching.euler_sigmas(steps, shift)
