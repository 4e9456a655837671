"""The abstract side of a run's program: which arrays enter the step, and where they are."""

import dataclasses
import math
import os
import pathlib
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from unialign_jax import parallel
from unialign_jax.data.sources import SourceConfig
from unialign_jax.state import create_state
from unialign_jax.training.program import Program
from unialign_jax.training.run_config import read

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
SHARDING = pathlib.Path(__file__).parents[1] / "sharding"


def load(name: str, **changes):
    config = runpy.run_path(str(CONFIGS / f"{name}.py"))["get_config"]().lock()
    config.update_from_flattened_dict(changes)
    return read(config)


def make_program(strategy="fsdp", devices=8, **changes) -> Program:
    mesh = AbstractMesh(parallel.mesh_shape(strategy, devices), parallel.AXES, axis_types=(AxisType.Auto,) * 4)
    return Program(load("photos_tiny", **changes), mesh)


def specs(tree) -> dict[str, PartitionSpec]:
    return {jax.tree_util.keystr(path): leaf.sharding.spec for path, leaf in jax.tree.leaves_with_path(tree)}


def described(tree) -> str:
    """One line a leaf, `path shape dtype (mesh axes by dimension)`, sorted: what the reviewed plans hold."""
    lines = []
    for path, leaf in jax.tree.leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        spec = ", ".join("+".join(axes) if isinstance(axes, tuple) else str(axes or "-") for axes in leaf.sharding.spec)
        lines.append(f"{name} {list(leaf.shape)} {np.dtype(leaf.dtype).name} ({spec})")
    return "\n".join(sorted(lines)) + "\n"


def test_micro_batches_of_one_sample_are_warned_of(caplog):
    make_program(devices=1, **{"data.global_batch": 4, "micro_batches": 2})
    assert not caplog.records
    make_program(devices=1, **{"data.global_batch": 4, "micro_batches": 4})
    assert "nothing to contrast with" in caplog.text


TINY = {
    **{
        "model.transformer.num_layers": 1,
        "model.transformer.num_attention_heads": 1,
        "model.text_encoder.num_layers": 1,
    },
    **{"model.transformer.caption_projection_dim": 32, "model.teacher": None, "unroll": 1, "data.global_batch": 4},
    **{"data.height": 16, "data.width": 16, "data.text_length": 8, "trained": ("transformer",)},
}


@pytest.mark.slow
def test_a_step_with_adapters_is_that_of_the_merged_model():
    """Also in how much they are scaled by."""
    lora = {
        "lora.rank": 2,
        "lora.alpha": 8.0,
        "lora.targets": ("transformer/blocks/*/query", "transformer/blocks/*/out"),
    }
    mesh = parallel.make_mesh("fsdp", jax.devices()[:1])
    adapted, whole = (Program(load("photos_tiny", **TINY, **changes), mesh) for changes in (lora, {}))
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: x + 0.1 * rng.standard_normal(x.shape, np.float32), jax.jit(whole.networks.init)(jax.random.key(0))
    )
    tuning, source = adapted.run.tuning, SourceConfig("rows.jsonl", references=1)
    pair = jax.tree.map(
        lambda x: 0.3 * rng.standard_normal(x.shape, np.float32), tuning.trained_of(params, jax.random.key(1))
    )
    merged = tuning.merge(params, pair)
    arrays = {
        name: rng.integers(1, 60, leaf.shape).astype(leaf.dtype)
        for name, leaf in vars(whole.batch(source)).items()
        if leaf is not None and name != "null_ids"
    }
    batch = whole.place(arrays, {"null_ids": parallel.replicate(np.ones(8, np.int32), mesh)})

    def terms(program, trained, everything):
        state = create_state(jax.tree.map(jnp.array, trained), program.run.optimizer)
        frozen = program.run.tuning.frozen_of(everything)
        _, metrics = program.lower(source).compile()(state, frozen, batch, jax.random.key(2))
        return {name: float(metrics[name]) for name in ("loss", "image", "text", "contrastive")}

    expected = terms(whole, {"transformer": merged["transformer"]}, merged)
    assert terms(adapted, pair, params) == pytest.approx(expected, rel=1e-5)


def test_a_step_is_of_the_passes_of_its_source():
    program = Program(load("photos_tiny", **TINY), parallel.make_mesh("fsdp", jax.devices()[:1]))
    always = {"loss", "grad_norm", "learning_rate"}
    for passes, terms in (
        ({}, {"image", "text", "contrastive"}),
        ({"image_pass": 0.0}, {"text"}),
        ({"text_pass": 0.0}, {"image"}),
    ):
        lowered = program.lower(SourceConfig("rows.jsonl", **passes))
        assert set(lowered.out_info[1]) == terms | always


@pytest.mark.parametrize("muon", [False, True])
def test_state_is_the_real_one_and_moments_follow_their_parameters(muon):
    program = make_program("fsdp+tensor", **{"optimizer.muon": muon})
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
    momenta = specs([node.mu for node in moments])
    assert sorted(momenta.values(), key=str) == sorted(params.values(), key=str)  # each parameter has one momentum
    assert all(params[name.removeprefix("[0]").removeprefix("[1]")] == spec for name, spec in momenta.items())
    assert specs(state.ema) == params and specs(moments[0].nu) == specs(moments[0].mu)
    assert state.step.sharding.spec == moments[0].count.sharding.spec == PartitionSpec()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.height": 67}, "images of 67 x 48 pixels: both sides must be multiples of 2"),
        ({"data.height": 66}, "images of 66 x 48 pixels: latent size 33x24 must be a multiple of the patch size 2"),
        (
            {"data.max_aspect": 8.0, "data.side_multiple": 4},
            r"images of 20 x 112 pixels: latent size 10x56 needs 5x28 positions; .*pos_embed_max_size",
        ),
    ],
)
def test_images_and_buckets_that_the_networks_can_not_take_are_refused(changes, message):
    with pytest.raises(ValueError, match=f"data: {message}.*side_multiple and max_aspect"):
        make_program(**changes)


# Snapshots of how every leaf of the published size is split: a change of the plan shows as a difference of files.
PLANS = [
    ("fsdp", 256),
    ("data+fsdp=64", 256),
    ("fsdp+tensor", 256),
    ("fsdp+sequence", 256),
    ("data=2+fsdp+tensor=8", 512),
]


@pytest.mark.parametrize(("strategy", "devices"), PLANS)
def test_the_published_size_is_split_as_reviewed(strategy, devices):
    """Trained and frozen networks; that moments and average follow their parameters is tested above."""
    run = load(
        "sd3_medium", **{"data.sources.generate.path": "g", "data.sources.edit.path": "e", "data.global_batch": 512}
    )
    mesh = AbstractMesh(parallel.mesh_shape(strategy, devices), parallel.AXES, axis_types=(AxisType.Auto,) * 4)
    program = Program(run, mesh)
    trees = {"trained": program.state.params, "frozen": program.frozen}
    sizes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    lines = [f"{strategy} on {devices} devices: {sizes}"]
    for name, tree in {**trees, "state": program.state}.items():
        leaves = jax.tree.leaves(tree)
        total, held = (
            sum(math.prod(shape) * leaf.dtype.itemsize for leaf, shape in zip(leaves, shapes, strict=True)) / 2**20
            for shapes in ([x.shape for x in leaves], [x.sharding.shard_shape(x.shape) for x in leaves])
        )
        lines.append(f"{name}: {total:.1f} MiB, of which a device holds {held:.1f}")
    found = "\n".join(lines) + "\n" + described(trees)
    file = SHARDING / f"{strategy}-{devices}.txt"
    if os.environ.get("RENEW_SHARDING"):
        file.write_text(found)
        pytest.fail(f"{file} is written anew: review its difference, and run this without RENEW_SHARDING")
    assert found == file.read_text(), (
        f"the plan has changed; RENEW_SHARDING=1 writes {file} anew: review its difference"
    )


def test_batches_of_a_source():
    program = make_program("data=2+fsdp+sequence=2")
    batch = program.batch(SourceConfig("rows.jsonl", references=2))
    size = (program.run.data.height, program.run.data.width)
    assert batch.references.shape == (16, 2, *size, 3) and batch.references.dtype == jnp.uint8
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
        ("fsdp", {"remat": "some"}, "remat"),
        ("fsdp", {"trained": ("teacher",), "cached": ("teacher",)}, "cached has teacher, but teacher/.* trained"),
        ("fsdp", {"objective.semantic_depth": 9}, "semantic_depth is 9, but the transformer has 5 blocks"),
    ],
)
def test_what_the_mesh_does_not_divide_is_refused_before_anything_runs(strategy, changes, message):
    with pytest.raises(ValueError, match=message) as refused:
        make_program(strategy, **changes)
    assert refused.value.final


def test_a_network_that_is_not_there_cannot_be_trained():
    program = make_program()
    run = dataclasses.replace(program.run, model=dict(program.run.model) | {"teacher": None}, trained=("teacher",))
    message = "trained: 'teacher' matches no parameter of the model, which has autoencoder, text_encoder, transformer"
    with pytest.raises(ValueError, match=message):
        Program(run, program.mesh)
