"""The abstract side of a run's program: which arrays enter the step, and where they are."""

import dataclasses
import pathlib
import runpy

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from unialign_jax import parallel
from unialign_jax.data.sources import SourceConfig
from unialign_jax.state import create_state
from unialign_jax.training.program import Program
from unialign_jax.training.run_config import read

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"


def load(name: str, **changes):
    config = runpy.run_path(str(CONFIGS / f"{name}.py"))["get_config"]().lock()
    config.update_from_flattened_dict(changes)
    return read(config)


def make_program(strategy="fsdp", devices=8, **changes) -> Program:
    mesh = AbstractMesh(parallel.mesh_shape(strategy, devices), parallel.AXES, axis_types=(AxisType.Auto,) * 4)
    return Program(load("photos_tiny", **changes), mesh)


def specs(tree) -> dict[str, PartitionSpec]:
    return {jax.tree_util.keystr(path): leaf.sharding.spec for path, leaf in jax.tree.leaves_with_path(tree)}


def test_state_is_the_real_one_and_moments_follow_their_parameters():
    program = make_program("fsdp+tensor")
    state, run = program.state, program.run

    def create(key):
        params = program.networks.init(key)
        return create_state({name: params[name] for name in run.trained}, run.optimizer)

    real = jax.eval_shape(create, jax.random.key(0))
    assert jax.tree.structure(state) == jax.tree.structure(real)
    for ours, theirs in zip(jax.tree.leaves(state), jax.tree.leaves(real), strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    params = specs(state.params)
    assert params["['transformer']['blocks']['image']['query']['kernel']"] == PartitionSpec(None, "fsdp", "tensor")
    moments = [
        node for node in jax.tree.leaves(state.opt_state, is_leaf=lambda x: hasattr(x, "mu")) if hasattr(node, "mu")
    ]
    assert [specs(moments[0].mu), specs(moments[0].nu), specs(state.ema)] == [params] * 3
    assert state.step.sharding.spec == moments[0].count.sharding.spec == PartitionSpec()


def test_frozen_networks_are_split_by_the_same_rules():
    published = load("sd3_medium", **{"data.sources.generate.path": "g", "data.sources.edit.path": "e"})
    mesh = AbstractMesh(parallel.mesh_shape("fsdp", 256), parallel.AXES, axis_types=(AxisType.Auto,) * 4)
    program = Program(dataclasses.replace(published, data=dataclasses.replace(published.data, global_batch=256)), mesh)
    assert set(program.frozen) == {"text_encoder", "autoencoder", "teacher"}
    for tree in (program.frozen, program.state):
        leaves = jax.tree.leaves(tree)
        whole = sum(leaf.size for leaf in leaves)
        held = sum(jnp.prod(jnp.array(leaf.sharding.shard_shape(leaf.shape))).item() for leaf in leaves)
        assert held < whole * (1 / 256 + parallel.MAX_REPLICATED)


def test_batches_of_a_source():
    program = make_program("data=2+fsdp+sequence=2")
    batch = program.batch(SourceConfig("rows.jsonl", references=2))
    assert batch.references.shape == (16, 2, 64, 64, 3) and batch.references.dtype == jnp.uint8
    assert batch.teacher_ids.shape == (16, 64) and batch.null_ids.shape == (64,)
    assert specs(batch)[".references"] == PartitionSpec(("data", "fsdp"))
    assert specs(batch)[".null_ids"] == PartitionSpec()
    plain = program.batch(SourceConfig("other.jsonl"))
    assert plain.references is None and plain == program.batch(program.run.data.sources[0])


@pytest.mark.parametrize(
    ("strategy", "changes", "message"),
    [
        ("fsdp", {"data.global_batch": 12}, "batch of 12 .* multiple of 8"),
        ("fsdp", {"micro_batches": 4}, "4 micro-batch"),
        ("tensor=8", {}, "4 attention heads cannot be split over tensor=8"),
        ("fsdp", {"trained": ("transformer", "judge")}, "trained"),
        ("fsdp", {"attention": "flash"}, "attention"),
    ],
)
def test_what_the_mesh_does_not_divide_is_refused_before_anything_runs(strategy, changes, message):
    with pytest.raises(ValueError, match=message):
        make_program(strategy, **changes)


def test_a_network_that_is_not_there_cannot_be_trained():
    program = make_program()
    run = dataclasses.replace(program.run, model=dict(program.run.model) | {"teacher": None}, trained=("teacher",))
    message = "trained: 'teacher' matches no parameter of the model, which has autoencoder, text_encoder, transformer"
    with pytest.raises(ValueError, match=message):
        Program(run, program.mesh)
