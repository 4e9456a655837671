"""The sampler as a program on a mesh: what enters, what comes out, what it needs."""

import dataclasses
import pathlib
import runpy

import jax
import jax.numpy as jnp
import pytest

from unialign_jax import parallel
from unialign_jax.data.sources import SourceConfig
from unialign_jax.training import flops, scaling, verdict
from unialign_jax.training.run_config import ConfigError
from unialign_jax.training.sample_program import SampleProgram

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"


@pytest.fixture(scope="module")
def program():
    verdict.prepare("v5e:4x4")
    config = runpy.run_path(str(CONFIGS / "photos_tiny.py"))["get_config"]().lock()
    config.update_from_flattened_dict({"data.global_batch": 32, "log.sample_steps": 3, "log.guidance": 5.0})
    return SampleProgram(scaling.read_config(config), parallel.make_mesh("data=2+fsdp=8", verdict.describe("v5e:4x4")))


@pytest.mark.parametrize("references", [0, 2])
def test_images_come_out_for_every_prompt(program, references):
    source = SourceConfig("rows.jsonl", references=references)
    size = program.run.data.height
    lowered = program.lower(source)
    assert lowered.out_info.shape == (32, size, size, 3) and lowered.out_info.dtype == jnp.uint8
    parts = program.parts(source)
    assert set(parts) == {"parameters", "frozen", "batch"} and "teacher" not in parts["frozen"]
    split = {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(parts["batch"])}
    assert split == {16}


def test_what_the_samplers_would_not_do_is_not_judged(program):
    """They refuse sizes that the networks can't take, and mask no references where all are there."""
    run = dataclasses.replace(program.run, data=dataclasses.replace(program.run.data, height=49))
    with pytest.raises(ConfigError, match="images of 49 x 48 pixels: both sides must be multiples of 2"):
        SampleProgram(run, program.mesh)
    given = [
        set(program.parts(SourceConfig("rows.jsonl", task=task, references=count))["batch"][-1:]) != {None}
        for task, count in (("edit", 1), ("compose", 2))
    ]
    assert given == [False, True]


def test_guidance_and_steps_multiply_the_network(program):
    source = SourceConfig("rows.jsonl")
    config = program.networks.transformer.config
    side = program.networks.latent_shape(program.run.data.height, program.run.data.width)[0] // config.patch_size
    one = flops.image_pass_flops(config, side * side, program.run.data.text_length)
    assert program.model_flops(source) == 32 * 3 * 2 * one
    # One negative prompt is needed; that all 16 devices encode it is not.
    assert program.frozen_flops(source) * 15 == program.recomputed_flops(source) * 33 > 0
