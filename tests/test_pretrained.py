"""Reading a run's model for sampling: what is in memory meanwhile, in which precision, and where it is looked for."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import _registry

from unialign_jax import exports, pretrained
from unialign_jax.checkpoints import Checkpoints
from unialign_jax.convert import ConversionError
from unialign_jax.networks import build_networks
from unialign_jax.saved_step import WrongArchitecture
from unialign_jax.state import TrainState


def nbytes(tree):
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def no_kernels(tree):
    return sum(x.nbytes for path, x in jax.tree.leaves_with_path(tree) if path[-1].key != "kernel")


def assert_cast(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == (jnp.bfloat16 if path[-1].key == "kernel" else jnp.float32)  # layers cast kernels anyway
        np.testing.assert_array_equal(np.asarray(a), np.asarray(jnp.asarray(b).astype(a.dtype)))


def test_a_run_is_read_in_bfloat16_with_one_network_in_float32_at_a_time(stage, float32_bytes):
    directory, average = stage
    model = pretrained.load(directory)
    assert_cast({name: model.params[name] for name in average}, average)
    # Of the network that was read before, what is no kernel is still there.
    assert len(float32_bytes) == 2 and {"transformer", "text_encoder"} == set(average)
    order = [name for name in model.params if name in average]
    assert float32_bytes == [nbytes(average[order[0]]), nbytes(average[order[1]]) + no_kernels(average[order[0]])]


@pytest.fixture
def half_frozen(stage, tmp_path):
    """(directory, parameters) of a run that started from converted weights and trained the transformer alone."""
    directory, average = stage
    exports.to_jax(directory, tmp_path / "start", progress=False)
    with Checkpoints(directory / "checkpoints", read_only=True) as checkpoints:
        config = checkpoints.meta()["config"] | {"trained": ("transformer",)}
    shutil.copytree(directory / "tokenizer", tmp_path / "run" / "stage" / "tokenizer")
    trained = {"transformer": jax.tree.map(lambda x: x + 1 / 3, average["transformer"])}
    with Checkpoints(tmp_path / "run" / "stage" / "checkpoints") as checkpoints:
        state = TrainState(jnp.int32(3), trained, {}, trained)
        checkpoints.save(3, state, {}, {"config": config, "init": str(tmp_path / "start")})
    return tmp_path / "run" / "stage", average | trained


def test_networks_that_a_run_did_not_train_are_read_in_the_wanted_dtype(half_frozen, float32_bytes, monkeypatch):
    directory, params = half_frozen
    restore, dtypes = pretrained.store.restore_network, {}

    def noted(path, network, **options):
        dtypes[network] = options["dtype"]["blocks"]["query"]["kernel"]
        return restore(path, network, **options)

    monkeypatch.setattr(pretrained.store, "restore_network", noted)
    model = pretrained.load(directory)
    assert_cast({name: model.params[name] for name in params}, params)
    assert dtypes == {"text_encoder": jnp.bfloat16}
    assert float32_bytes == [nbytes(params["transformer"])]  # what was trained is read first, with nothing beside it
    whole = pretrained.load(directory, dtype="float32").params
    jax.tree.map(np.testing.assert_array_equal, {name: whole[name] for name in params}, params)


def test_another_networks_weights_are_refused_for_good(stage):
    directory, _ = stage
    with Checkpoints(directory / "checkpoints", read_only=True) as checkpoints:
        model = checkpoints.meta()["config"]["model"]
    others = {"num_attention_heads": 1, "attention_head_dim": 16}  # of the same shapes
    networks = build_networks(model | {"transformer": model["transformer"] | others})
    abstract = jax.eval_shape(networks.init, jax.random.key(0))
    with pytest.raises(WrongArchitecture, match="num_attention_heads is 2 there and 1 in the config") as caught:
        pretrained.initial_params(networks, jax.random.key(0), abstract, str(directory))
    assert caught.value.final


def test_a_public_directory_is_found_at_home_and_refused_in_a_bucket(golden, tmp_path, monkeypatch):
    shutil.copytree(golden, tmp_path / "public")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/public holds no tokenizer"):
        pretrained.load("~/public")
    monkeypatch.setattr(pretrained.lineage, "is_public", lambda directory: True)
    monkeypatch.setitem(_registry, "gcs", LocalFileSystem)
    with pytest.raises(ConversionError, match=r"gs://bucket/public: .* copy it here first"):
        pretrained.load("gs://bucket/public")
