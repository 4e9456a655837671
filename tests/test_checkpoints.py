"""Checkpoints: what is saved comes back bit for bit, and whatever is wrong is said instead of passed over."""

import functools
import json
import os
import shutil
import threading
import zlib
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from unialign_jax.checkpoints import Checkpoints, Replaced
from unialign_jax.saved_step import CheckpointError, DamagedCheckpoint, WrongArchitecture
from unialign_jax.tree_checks import checksum

# Orbax reads leaves concurrently; after the first that fails it drops the others, which asyncio remarks upon later.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

OPTIMIZER = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.adamw(
        optax.warmup_constant_schedule(0.0, 1e-2, 3), mask={"dense": {"kernel": True, "bias": False}, "t": True}
    ),
)


@flax.struct.dataclass
class State:
    step: Any
    params: Any
    opt_state: Any
    ema: Any


def make_state(step=0, width=4, ema=True, seed=0) -> State:
    keys = jax.random.split(jax.random.key(seed), 3)
    params = {
        "dense": {"kernel": jax.random.normal(keys[0], (3, width)), "bias": jax.random.normal(keys[1], (width,))},
        "t": jax.random.normal(keys[2], (2, 5)).astype(jnp.bfloat16),
    }
    average = jax.tree.map(lambda x: x * 2, params) if ema else None
    return State(jnp.int32(step), params, OPTIMIZER.init(params), average)


@jax.jit
def _update(state: State, x):
    def loss(params):
        return jnp.mean((x @ params["dense"]["kernel"] + params["dense"]["bias"]) ** 2) + jnp.mean(params["t"] ** 2)

    value, grads = jax.value_and_grad(loss)(state.params)
    updates, opt_state = OPTIMIZER.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = None if state.ema is None else optax.incremental_update(params, state.ema, 0.1)
    return State(state.step + 1, params, opt_state, ema), value


train_step = jax.jit(_update, donate_argnums=0)


def batch(step: int) -> jax.Array:
    return jax.random.normal(jax.random.fold_in(jax.random.key(7), step), (8, 3))


def abstract(state):
    return jax.eval_shape(lambda: state)


def assert_identical(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("ema", [True, False])
def test_round_trip_is_bit_exact(tmp_path, ema):
    state, _ = train_step(make_state(6, ema=ema), batch(0))  # moments and counters that are not zero
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(7, state, {"position": 12}, {"stage": "pretrain", "config": {"a": [1, 2]}})
        restored, data_state, meta = checkpoints.restore(abstract(state))
        assert_identical(restored, state)
        assert (restored.ema is None) == (not ema)
        assert data_state == {"position": 12}
        assert meta == {"stage": "pretrain", "config": {"a": [1, 2]}} == checkpoints.meta(7)


def test_buffers_may_be_donated_right_after_save(tmp_path):
    state = make_state()
    for _ in range(3):
        state, _ = train_step(state, batch(1))
    expected = jax.tree.map(np.array, state)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, state, None, {})
        for step in range(5):
            state, _ = train_step(state, batch(step))
        jax.block_until_ready(state)
        assert_identical(checkpoints.restore(abstract(state))[0], expected)


def test_training_goes_on_while_files_are_written(tmp_path, monkeypatch):
    may_commit, rename = threading.Event(), os.rename

    def late_rename(source, target):
        assert may_commit.wait(60)
        rename(source, target)

    state, _ = train_step(make_state(), batch(0))
    with Checkpoints(tmp_path) as checkpoints:
        monkeypatch.setattr(os, "rename", late_rename)  # with which Orbax makes a step complete
        checkpoints.save(1, state, None, {})
        for step in range(1, 4):
            state, _ = train_step(state, batch(step))
        assert int(state.step) == 4 and not (tmp_path / "1").exists()
        may_commit.set()
        checkpoints.wait()
        assert (tmp_path / "1").is_dir()


def test_an_error_of_the_background_write_is_raised_by_the_next_call(tmp_path, monkeypatch, caplog):
    def full_disk(source, target):
        raise OSError("no space left on device")

    with pytest.raises(RuntimeError, match="the loss"), Checkpoints(tmp_path / "a") as checkpoints:
        checkpoints.save(1, make_state(1), None, {})
        checkpoints.wait()
        monkeypatch.setattr(os, "rename", full_disk)
        checkpoints.save(2, make_state(2), None, {})
        with pytest.raises(CheckpointError, match=r"could not be written \(OSError: no space left"):
            checkpoints.wait()
        checkpoints.save(3, make_state(3), None, {})
        raise RuntimeError("the loss")  # what ends the run stays what is said
    assert "no space left" in caplog.text


def test_a_failed_save_does_not_cost_the_next_one(tmp_path, monkeypatch, caplog):
    """Whose state is newer. Twice in a row is an error."""
    rename = os.rename

    def full_disk(source, target):
        if os.path.basename(target) in ("2", "4", "6", "7"):
            raise OSError("no space left on device")
        rename(source, target)

    monkeypatch.setattr(os, "rename", full_disk)
    with Checkpoints(tmp_path) as checkpoints:
        for step in (1, 2, 3, 4, 5):
            caplog.clear()
            checkpoints.save(step, make_state(step), None, {})
            assert ("no space left" in caplog.text) == (step in (3, 5))
        assert checkpoints.all_steps() == [1, 3, 5]
        assert not list(tmp_path.glob("*tmp*"))  # they would take the room of the next
        checkpoints.save(6, make_state(6), None, {})
        checkpoints.save(7, make_state(7), None, {})
        with pytest.raises(CheckpointError, match=r"could not be written \(OSError: no space left"):
            checkpoints.save(8, make_state(8), None, {})
    with Checkpoints(tmp_path) as checkpoints:
        restored, _, _ = checkpoints.restore(make_state())
        assert int(restored.step) == 5


def test_resumed_run_equals_the_uninterrupted_one(tmp_path):
    def advance(state, steps):
        losses = []
        for step in steps:
            state, loss = train_step(state, batch(step))
            losses.append(float(loss))
        return state, losses

    uninterrupted, losses = advance(make_state(), range(8))
    half, _ = advance(make_state(), range(4))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(4, half, None, {})
    with Checkpoints(tmp_path) as checkpoints:
        resumed, _, _ = checkpoints.restore(abstract(make_state(seed=3)))
    resumed, later_losses = advance(resumed, range(4, 8))
    assert_identical(resumed, uninterrupted)
    assert later_losses == losses[4:]


def test_parameters_alone(tmp_path):
    state = make_state(2)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(2, state, None, {})
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert_identical(checkpoints.restore_params(abstract(state.params)), state.params)
        assert_identical(checkpoints.restore_params(which="ema"), state.ema)
        with pytest.raises(
            WrongArchitecture, match=r"dense/bias is float32\[4\] in the checkpoint, expected float32\[9\]"
        ):
            checkpoints.restore_params(abstract(make_state(width=9).params))
        with pytest.raises(CheckpointError, match="expected 'params' or 'ema'"):
            checkpoints.restore_params(which="opt_state")


def test_some_networks_alone_and_each_with_its_checksum(tmp_path):
    state = make_state(2)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(2, state, None, {})
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        some = {"t": abstract(state.ema["t"])}
        assert_identical(checkpoints.restore_params(some, which="ema"), {"t": state.ema["t"]})
        with pytest.raises(WrongArchitecture, match=r"ema/u float32\[2\] is not in the checkpoint"):
            checkpoints.restore_params({"u": jnp.ones(2)}, which="ema")
        with pytest.raises(CheckpointError, match="opened to be read only"):
            checkpoints.save(3, make_state(3), None, {})
    meta = tmp_path / "2" / "meta" / "metadata"
    content = json.loads(meta.read_text())
    content["checksums"]["ema"]["dense"] += 1
    meta.write_text(json.dumps(content))
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert_identical(checkpoints.restore_params(some, which="ema"), {"t": state.ema["t"]})
        with pytest.raises(DamagedCheckpoint, match="checksum of ema"):
            checkpoints.restore_params(which="ema")


def test_parameters_average_that_was_not_kept(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(2, make_state(2, ema=False), None, {})
        with pytest.raises(CheckpointError, match="has no 'ema'"):
            checkpoints.restore_params(which="ema", step=2)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (make_state(width=5), r"params/dense/kernel is float32\[3, 4\] in the checkpoint, expected float32\[3, 5\]"),
        (make_state(ema=False), r"ema/t bfloat16\[2, 5\] is only in the checkpoint"),
        (make_state().replace(params={}), r"params/dense/bias float32\[4\] is only in the checkpoint"),
        (make_state().replace(ema={"new": jnp.ones(2)}), r"ema/new float32\[2\] is not in the checkpoint"),
        (
            make_state().replace(ema=jax.tree.map(lambda x: x.astype(jnp.float16), make_state().ema)),
            r"ema/t is bfloat16\[2, 5\] in the checkpoint, expected float16\[2, 5\]",
        ),
    ],
)
def test_another_architecture_is_refused_by_leaf(tmp_path, wanted, message):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(0, make_state(), None, {})
        with pytest.raises(WrongArchitecture, match=message):
            checkpoints.restore(abstract(wanted))


def test_of_two_runs_in_one_directory_the_one_that_saved_before_the_other_began_to_ends(tmp_path):
    """Nothing is locked: a run that was killed leaves nothing that would keep the next one out."""
    with Checkpoints(tmp_path / "steps") as first:
        first.save(1, make_state(1), None, {}, wait=True)
        with Checkpoints(tmp_path / "steps") as refused:  # one that is refused before it saves disturbs nobody
            with pytest.raises(CheckpointError, match="already has step 1"):
                refused.save(1, make_state(1), None, {})
        first.save(2, make_state(2), None, {}, wait=True)
        with Checkpoints(tmp_path / "steps") as second:
            second.save(3, make_state(3), None, {}, wait=True)
            with pytest.raises(Replaced, match="steps: another run has begun to save here"):
                first.save(4, make_state(4), None, {})
            second.save(4, make_state(4), None, {})
        assert first.all_steps() == [2, 3, 4]


def _damage(path, how):
    files = {file: file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}
    if how == "no metadata":
        (path / "meta" / "metadata").unlink()
    elif how == "no tree":
        (path / "state" / "_METADATA").unlink()
    elif how == "no state":
        shutil.rmtree(path / "state")
    elif how == "truncated":
        for file, content in files.items():
            if file.parent.name == "d":
                file.write_bytes(content[: len(content) // 2])
    elif how in ("truncated arrays", "no arrays"):  # the index that says where they lie is whole
        for file, content in files.items():
            if file.parent.parent.name.startswith("ocdbt.process"):
                file.write_bytes(content[:99]) if how == "truncated arrays" else file.unlink()
    elif how == "altered":
        for file, content in files.items():
            if file.parent.name == "d":
                middle = len(content) // 2
                file.write_bytes(content[:middle] + bytes([content[middle] ^ 0x55]) + content[middle + 1 :])
    elif how == "iterator":
        (path / "data" / "metadata").write_text("{")
    elif how == "checksum":
        meta = path / "meta" / "metadata"
        content = json.loads(meta.read_text())
        content["checksums"]["opt_state"] += 1
        meta.write_text(json.dumps(content))


@pytest.mark.parametrize(
    "how",
    [
        *("no metadata", "no tree", "no state", "truncated", "truncated arrays", "no arrays", "altered", "iterator"),
        *("checksum", "other step"),
    ],
)
def test_damaged_newest_step_names_the_newest_good_one(tmp_path, how):
    make = functools.partial(make_state, width=400)  # smaller arrays lie in the index
    state = make()
    with Checkpoints(tmp_path) as checkpoints:
        for step in (10, 20, 30):
            checkpoints.save(step, make(step, seed=step), step, {})
    if how == "other step":
        shutil.rmtree(tmp_path / "30")
        shutil.copytree(tmp_path / "10", tmp_path / "30")
    else:
        _damage(tmp_path / "30", how)
    _damage(tmp_path / "20", "truncated arrays" if how.endswith("arrays") else "truncated")
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(DamagedCheckpoint, match=r"30 is damaged.*--config.resume_step=10"):
            checkpoints.restore(abstract(state))
        if how == "no metadata":  # of step 20, nothing more is asked for here
            with pytest.raises(DamagedCheckpoint, match=r"30 is damaged.*--config.resume_step=20"):
                checkpoints.meta()
        restored, data_state, _ = checkpoints.restore(abstract(state), step=10)
        assert_identical(restored, make(10, seed=10))
        assert data_state == 10
        with pytest.raises(DamagedCheckpoint, match="20 is damaged"):
            checkpoints.restore_params(step=20)
    _damage(tmp_path / "10", "no metadata")
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(DamagedCheckpoint, match="No older step"):
        checkpoints.restore(abstract(state))


def test_existing_and_older_steps_are_refused(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(5, make_state(5), None, {})
        for step in (5, 4):
            with pytest.raises(CheckpointError, match="already has step 5"):
                checkpoints.save(step, make_state(step), None, {})
        with pytest.raises(CheckpointError, match="step 6 is at step 3"):
            checkpoints.save(6, make_state(3), None, {})
        with pytest.raises(TypeError):
            checkpoints.save(6, make_state(6), {"position": np.ones(3)}, {})
        assert checkpoints.all_steps() == [5]


def test_retention_by_count_and_by_period(tmp_path):
    with Checkpoints(tmp_path, max_to_keep=2, keep_period=20) as checkpoints:
        for step in range(10, 80, 10):
            checkpoints.save(step, make_state(step), None, {}, wait=True)
        assert checkpoints.all_steps() == [20, 40, 60, 70]
        assert checkpoints.latest_step() == 70


def test_leftovers_of_a_killed_save_are_removed_but_not_by_readers(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, make_state(1), None, {})
    leftover = tmp_path / "2.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "1", leftover)
    (leftover / "commit_success.txt").unlink()
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.all_steps() == [1]
    assert leftover.exists()
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.all_steps() == [1]
        checkpoints.save(2, make_state(2), None, {}, wait=True)
        assert checkpoints.all_steps() == [1, 2]
    assert not leftover.exists()


def test_steps_after_the_chosen_one_are_set_aside(tmp_path):
    directory = tmp_path / "steps"
    with Checkpoints(directory, max_to_keep=9) as checkpoints:
        for turn in range(2):
            for step in (10, 20, 30)[turn:]:
                checkpoints.save(step, make_state(step, seed=step), None, {}, wait=True)
            assert checkpoints.set_aside_after(10) == [20, 30]
            assert checkpoints.all_steps() == [10]
    assert sorted(p.name for p in (tmp_path / "steps-set-aside").iterdir()) == ["20", "20.1", "30", "30.1"]


def test_missing_checkpoints(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such checkpoint directory"):
        Checkpoints(tmp_path / "none", read_only=True)
    with Checkpoints(tmp_path / "empty") as checkpoints:
        assert checkpoints.latest_step() is None
        with pytest.raises(FileNotFoundError, match="holds no complete checkpoint"):
            checkpoints.restore(abstract(make_state()))
        checkpoints.save(3, make_state(3), None, {})
        with pytest.raises(FileNotFoundError, match="no step 4; there are 3"):
            checkpoints.restore(abstract(make_state()), step=4)


def test_checksum_formula_and_what_it_notices():
    values = np.array([[1.5, -2.0, 0.0], [3.0, 4.0, 5.0]], np.float32)
    bits = values.view(np.uint32).astype(object).ravel()
    expected = (zlib.crc32(b"a/b") | 1) * sum(int(b) * (2 * i + 1) for i, b in enumerate(bits)) % 2**32
    assert checksum({"a": {"b": jnp.asarray(values)}}) == expected
    assert checksum(None) == checksum({}) == 0
    base = {"x": jnp.arange(4.0), "y": jnp.arange(4.0) + 1, "flag": jnp.array([True, False])}
    others = [
        {**base, "x": jnp.array([1.0, 0.0, 2.0, 3.0])},  # exchanged elements
        {**base, "x": base["y"], "y": base["x"]},  # exchanged arrays
        {**base, "flag": jnp.array([False, True])},
        {**base, "x": jnp.array([-0.0, 1.0, 2.0, 3.0])},  # a sign alone
    ]
    assert len({checksum(tree) for tree in [base, *others]}) == 5


@pytest.mark.parametrize(
    "error",
    [
        PermissionError("403"),
        OSError("502"),
        ValueError("PERMISSION_DENIED: 403"),
        ValueError("ABORTED: All 32 retry attempts failed: Error reading: HTTP response code: 503"),  # TensorStore's
    ],
)
def test_what_cannot_be_read_for_the_moment_is_not_damaged(tmp_path, monkeypatch, error):
    """A run that was told to go back once would do so again."""
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(10, make_state(10), {}, {"config": {"resume_step": 5}})
    with Checkpoints(tmp_path) as checkpoints:
        monkeypatch.setattr(ocp.JsonCheckpointHandler, "restore", lambda *_, **__: (_ for _ in ()).throw(error))
        with pytest.raises(CheckpointError, match="10 can't be read now") as raised:
            checkpoints.meta(10)
        assert not isinstance(raised.value, DamagedCheckpoint)
