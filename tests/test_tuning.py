"""Which parameters are trained: by name, or adapters beside them; what the optimizer and the mesh make of that."""

import dataclasses
import pathlib
import re
import runpy

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from unialign_jax import parallel
from unialign_jax.state import OptimizerConfig, apply_gradients, create_state
from unialign_jax.training.program import Program
from unialign_jax.training.run_config import read
from unialign_jax.tuning import LoraConfig, Tuning

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
KEY = jax.random.key(3)
EVERYTHING = Tuning(("transformer", "text_encoder"))


def params():
    """Two networks with leaves of the usual names, a stacked kernel, and a network without parameters."""
    random = np.random.default_rng(0)

    def array(*shape):
        return jnp.asarray(random.normal(size=shape), jnp.float32)

    stream = {name: {"kernel": array(3, 4, 6), "bias": array(3, 6)} for name in ("query", "value")}
    return {
        "transformer": {"blocks": {"image": stream, "text": {"query": {"kernel": array(3, 4, 4)}}}, "tokens": array(2)},
        "text_encoder": {"head": {"kernel": array(4, 5)}},
        "autoencoder": {},
    }


def names(tree):
    return set(flax.traverse_util.flatten_dict(tree, sep="/"))


@pytest.mark.parametrize(
    ("tuning", "trained"),
    [
        (Tuning(("text_encoder",)), {"text_encoder/head/kernel"}),
        (
            Tuning(("transformer/blocks/*/query",)),
            {f"transformer/blocks/{leaf}" for leaf in ("image/query/kernel", "image/query/bias", "text/query/kernel")},
        ),
        (
            Tuning(("transformer",), frozen=("*/image", "transformer/tok*")),
            {"transformer/blocks/text/query/kernel"},
        ),
    ],
)
def test_patterns_part_the_leaves_in_two(tuning, trained):
    model = params()
    parts = tuning.frozen_of(model), tuning.trained_of(model)
    assert names(parts[1]) == trained
    assert names(parts[0]) == names(model) - trained
    merged = tuning.merge(*parts)
    assert jax.tree.structure(merged) == jax.tree.structure(model)
    assert all(a is b for a, b in zip(jax.tree.leaves(merged), jax.tree.leaves(model), strict=True))


def test_adapters_are_the_only_thing_trained_and_add_up():
    model = params()
    tuning = dataclasses.replace(EVERYTHING, lora=LoraConfig(2, ("*/query", "text_encoder"), alpha=3.0))
    frozen, adapters = tuning.frozen_of(model), tuning.trained_of(model, KEY)
    assert names(frozen) == names(model)
    kernels = {"transformer/blocks/image/query", "transformer/blocks/text/query", "text_encoder/head"}
    assert names(adapters) == {f"{kernel}/kernel/lora_{part}" for kernel in kernels for part in "ab"}
    for a, b in zip(jax.tree.leaves(tuning.merge(frozen, adapters)), jax.tree.leaves(model), strict=True):
        np.testing.assert_array_equal(a, b)  # the update is zero at first

    adapters = jax.tree.map(lambda x: x + 0.5, adapters)
    merged = tuning.merge(frozen, adapters)
    for leaf, base in flax.traverse_util.flatten_dict(model, sep="/").items():
        expected = np.asarray(base, np.float64)
        if leaf.removesuffix("/kernel") in kernels:
            pair = flax.traverse_util.flatten_dict(adapters, sep="/")
            a, b = (np.asarray(pair[f"{leaf}/lora_{part}"], np.float64) for part in "ab")
            expected = expected + 1.5 * np.einsum("...ir,...ro->...io", a, b)
        found = flax.traverse_util.flatten_dict(merged, sep="/")[leaf]
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_an_update_moves_adapters_alone_and_decays_them_as_matrices():
    """At zero gradient only weight decay acts: on both factors, though only matrices are decayed."""
    model, optimizer = params(), OptimizerConfig(learning_rate=0.1, warmup_steps=0, decay_matrices_only=True)
    tuning = dataclasses.replace(EVERYTHING, lora=LoraConfig(2, ("*/query",)))
    state = create_state(tuning.trained_of(model, KEY), optimizer)
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert len(moments) == 2 * len(jax.tree.leaves(state.params))  # of nothing that is frozen
    updated = apply_gradients(state, jax.tree.map(jnp.zeros_like, state.params), optimizer)
    for new, old in zip(jax.tree.leaves(updated.params), jax.tree.leaves(state.params), strict=True):
        np.testing.assert_allclose(new, old * (1 - 0.1 * 1e-2), rtol=1e-6)


def program(strategy="fsdp=4+tensor=2", **changes):
    config = runpy.run_path(str(CONFIGS / "scenes_tiny.py"))["get_config"]("pretrain").lock()
    config.update_from_flattened_dict(changes)
    mesh = AbstractMesh(parallel.mesh_shape(strategy, 8), parallel.AXES, axis_types=(AxisType.Auto,) * 4)
    return Program(read(config), mesh)


def test_adapters_are_split_as_their_kernels_are():
    made = program(**{"lora.rank": 4, "lora.targets": ("transformer/blocks/*/query", "transformer/blocks/*/out")})
    stream = made.state.params["transformer"]["blocks"]["image"]
    query, out = stream["query"]["kernel"], stream["out"]["kernel"]
    assert query["lora_a"].sharding.spec == PartitionSpec(None, "fsdp", None)
    assert query["lora_b"].sharding.spec == PartitionSpec(None, None, "tensor")
    assert out["lora_a"].sharding.spec == PartitionSpec(None, "tensor", None)
    assert out["lora_b"].shape == (5, 4, 96) and out["lora_b"].sharding.spec == PartitionSpec(None, None, "fsdp")
    assert made.state.ema == made.state.params
    assert names(made.frozen) == names(made.params)


def test_kernels_are_in_the_compute_dtype_unless_they_are_trained_or_adapted():
    made = program(**{"dtype": "bfloat16", "lora.rank": 4, "lora.targets": ("transformer/blocks/*/query",)})
    adapted = "transformer/blocks/.*/query/kernel"
    flat = flax.traverse_util.flatten_dict(made.frozen, sep="/")
    coarse = {name for name, leaf in flat.items() if leaf.dtype == jnp.bfloat16}
    assert coarse == {name for name in flat if name.endswith("/kernel") and not re.fullmatch(adapted, name)}
    assert {leaf.dtype for leaf in jax.tree.leaves(program().params)} == {jnp.dtype("float32")}


def test_frozen_parameters_have_no_moments():
    adam = {"optimizer.muon": False}
    whole, part = program(**adam), program(frozen=("text_encoder", "transformer/blocks/text"), **adam)

    def leaves(made):
        return [len(jax.tree.leaves(tree)) for tree in (made.state.params, made.state.opt_state, made.frozen)]

    gone = leaves(whole)[0] - leaves(part)[0]
    assert gone > 20
    assert leaves(part)[1] == leaves(whole)[1] - 2 * gone and leaves(part)[2] == leaves(whole)[2] + gone
    assert "text" not in part.state.params["transformer"]["blocks"] and "text_encoder" not in part.state.params


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trained": ("decoder",)}, "trained: 'decoder' matches no parameter of the model, which has autoencoder"),
        ({"frozen": ("transformer/blocs",)}, "frozen: 'transformer/blocs' matches no parameter"),
        ({"frozen": ("*",)}, r"without frozen \('\*',\) leaves nothing to train"),
        ({"lora.rank": 2, "lora.targets": ("*/bias",)}, r"lora.targets: '\*/bias' matches no linear kernel, only"),
        ({"lora.rank": 2, "lora.targets": ("*/queri",)}, r"lora.targets: '\*/queri' matches no parameter"),
        ({"lora.rank": -1}, "lora: rank is -1"),
        ({"lora.targets": ()}, "lora: .*targets"),
    ],
)
def test_a_split_that_cannot_be_meant_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        program(**changes)
