"""Checkpoints of real processes: saved on one set of devices and restored on others, and refused by all or by none."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import flax.struct
import jax
import numpy as np
import pytest

from unialign_jax.checkpoints import Checkpoints

ROOT = pathlib.Path(__file__).parents[1]

# Every process of every run executes this; what it saw goes to standard output as JSON.
PROGRAM = """
import json, os, pathlib, sys
count, index, port, directory = json.loads(sys.argv[1])
import jax, jax.numpy as jnp, numpy as np, flax.struct
from typing import Any
if count > 1:
    jax.distributed.initialize(f"127.0.0.1:{port}", count, index)
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from unialign_jax import agreement
from unialign_jax.checkpoints import Checkpoints
from unialign_jax.saved_step import CheckpointError, DamagedCheckpoint

@flax.struct.dataclass
class State:
    step: Any
    params: Any
    opt_state: Any
    ema: Any

mesh = Mesh(np.array(jax.devices()).reshape(-1, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
SPLIT = {"kernel": P("fsdp", "data"), "bias": P(("data", "fsdp")), "scale": P()}

def make_state(step, seed):
    rng = np.random.default_rng(seed)
    tree = {"net": {"kernel": rng.normal(size=(8, 16)), "bias": rng.normal(size=16), "scale": rng.normal(size=3)}}
    def place(tree):
        return {"net": {name: jax.make_array_from_callback(
            value.shape, NamedSharding(mesh, SPLIT[name]), lambda part, value=value: value[part].astype(np.float32))
            for name, value in tree["net"].items()}}
    whole = NamedSharding(mesh, P())
    number = jax.make_array_from_callback((), whole, lambda _: np.int32(step))
    return State(number, place(tree), (place(tree), number), place(jax.tree.map(lambda x: 2 * x, tree)))

def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)

def same(left, right):
    return all(a.sharding == b.sharding and bool((a == b).all()) for a, b in zip(
        jax.tree.leaves(left), jax.tree.leaves(right), strict=True))

def refusal(call):
    try:
        call()
    except Exception as error:
        return type(error).__name__, str(error)

seen = {}
"""

SAVE = """
with Checkpoints(directory, max_to_keep=9) as checkpoints:
    for step in (10, 20, 30, 40):
        checkpoints.save(step, make_state(step, seed=step), {"drawn": step}, {"stage": "s"})
"""

# Process 1 alone finds step 40 damaged, then refuses step 30; then all go on from step 20.
RESUME = """
wanted = abstract(make_state(0, seed=0))
class Damaged(Checkpoints):
    error = DamagedCheckpoint("40 is damaged here")

    def _saved(self, step):
        saved = super()._saved(step)
        if index == 1 and step >= 30 and not (step == 30 and isinstance(self.error, DamagedCheckpoint)):
            def fail():
                raise self.error
            saved.data_state = fail
        return saved

with Damaged(directory, max_to_keep=9) as checkpoints:
    seen["steps"] = checkpoints.all_steps()
    seen["damaged"] = refusal(lambda: checkpoints.restore(wanted))
    checkpoints.error = CheckpointError("process 1 does not want it")
    seen["refused"] = refusal(lambda: checkpoints.restore(wanted, 30))
    checkpoints.error = LookupError("unknown")
    seen["unknown"] = refusal(lambda: checkpoints.restore(wanted, 30))
    state, data_state, meta = checkpoints.restore(wanted, 20)
    seen["same"] = same(state, make_state(20, seed=20)) and (data_state, meta) == ({"drawn": 20}, {"stage": "s"})
    seen["aside"] = checkpoints.set_aside_after(20)
    seen["differ"] = refusal(lambda: checkpoints.save(25, make_state(25, seed=25), {"drawn": index}, {"stage": "s"}))
    seen["json"] = refusal(lambda: checkpoints.save(25, make_state(25, seed=25), {"drawn": {1}} if index else 0, {}))
    checkpoints.save(25, make_state(25, seed=25), {"drawn": 25}, {"stage": "s"})
    checkpoints.wait()
    check = checkpoints._manager.check_for_errors
    if index == 1:
        def full():
            raise OSError("quota exceeded")
        checkpoints._manager.check_for_errors = full
    seen["background"] = refusal(checkpoints.wait)[1]
    checkpoints._manager.check_for_errors = check
    seen["after"] = checkpoints.all_steps()
with Checkpoints(directory, read_only=True) as checkpoints:
    params = abstract(make_state(0, seed=0).params)
    seen["params"] = same(checkpoints.restore_params(params, which="ema"), make_state(25, seed=25).ema)
    seen["meta"] = checkpoints.meta()
seen["long"] = [len(text) for text in agreement.gather("x" * (3000 * index))]
seen["missing"] = refusal(lambda: Checkpoints(directory + "-none", read_only=True))
import unialign_jax.checkpoints as module
from etils import epath
module.storage.absolute = lambda path: epath.Path(path) / f"disk {index}" / "checkpoints"
seen["blind"] = refusal(lambda: Checkpoints(directory + "-local"))
seen["left"] = [path.name for path in pathlib.Path(directory + "-local").glob("*/*.seen-*")]
"""

RESTORE = """
with Checkpoints(directory, read_only=True) as checkpoints:
    state, data_state, _ = checkpoints.restore(abstract(make_state(0, seed=0)))
    seen = {"same": same(state, make_state(25, seed=25)), "data": data_state, "devices": jax.device_count()}
"""


# Told to stop while a step is saved, far beyond as many as this start has taken.
PREEMPTED = """
import signal, time
from unialign_jax import distributed
asked = []
with distributed.Preemption() as preemption, Checkpoints(directory) as checkpoints:
    before = [preemption.reached() for _ in range(3)]
    checkpoints.save(10_000, make_state(10_000, seed=0), {}, {})
    if index == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    after = []
    for _ in range(500):  # both ask equally often, while the notice goes round in the background
        time.sleep(0.1)
        after.append(preemption.reached())
        if after[-4:].count(True) == 4:
            break
seen = {"before": before, "after": after}
"""


def run(task: str, directory: pathlib.Path, *, processes: int, devices: int) -> list[dict]:
    """Runs a task in so many processes with so many devices each, and returns what each saw."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "NPROC": str(16 * devices),  # on few threads collectives can deadlock
    }
    running = []
    try:
        for index in range(processes):
            arguments = json.dumps([processes, index, port, str(directory)])
            code = PROGRAM + task + "\nprint(json.dumps(seen))\n"
            command = [sys.executable, "-c", code, arguments]
            running.append(
                subprocess.Popen(
                    command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
                )
            )
        outcomes = [process.communicate(timeout=300) for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0] * processes, [err[-3000:] for _, err in outcomes]
    return [json.loads(out.splitlines()[-1]) for out, _ in outcomes]


@flax.struct.dataclass
class State:
    step: jax.Array
    params: dict
    opt_state: tuple
    ema: dict


@pytest.fixture(scope="module")
def history(tmp_path_factory):
    """(directory, what two processes saw): four steps saved on 8 devices of one process, resumed on 2 x 2 devices."""
    directory = tmp_path_factory.mktemp("run") / "checkpoints"
    run(SAVE, directory, processes=1, devices=8)
    return directory, run(RESUME, directory, processes=2, devices=2)


def test_sigterm_during_a_save_is_not_lost(tmp_path):
    one, other = run(PREEMPTED, tmp_path / "checkpoints", processes=2, devices=1)
    assert one == other  # both stop after the same step
    assert not any(one["before"]) and one["after"][-1]
    assert one["after"] == sorted(one["after"])  # once True, it stays so


def test_another_mesh_on_more_processes_restores_the_same_bits(history):
    for seen in history[1]:
        assert seen["steps"] == [10, 20, 30, 40] and seen["same"]


def test_what_one_process_finds_wrong_all_refuse_alike(history):
    first, second = history[1]
    alone = {"unknown": None}
    assert first | alone == second | alone
    assert first["damaged"][0] == "DamagedCheckpoint"
    assert "40 is damaged here. The newest good step before it is 30" in first["damaged"][1]
    assert first["refused"] == ["CheckpointError", "process 1 does not want it"]
    assert first["missing"][0] == "FileNotFoundError"
    assert first["blind"][0] == "FileNotFoundError" and not first["left"]
    assert "on process 1 is not that of process 0" in first["blind"][1]


def test_an_error_of_an_unknown_kind_ends_all_too(history):
    first, second = history[1]
    assert first["unknown"] == ["FailedElsewhere", "process 1 failed: LookupError: unknown"]
    assert second["unknown"] == ["LookupError", "unknown"]


def test_what_one_process_can_not_write_all_are_told(history):
    for seen in history[1]:
        assert "a step could not be written (OSError: quota exceeded)" in seen["background"]


def test_processes_save_one_step_together(history):
    directory, (first, _) = history
    assert first["aside"] == [30, 40] and first["after"] == [10, 20, 25]
    assert first["differ"][0] == "CheckpointError" and "processes differ" in first["differ"][1]
    assert first["json"][0] == "TypeError"
    assert first["params"] and first["meta"] == {"stage": "s"}
    assert first["long"] == [0, 3000]
    aside = sorted(path.name for path in (directory.parent / "checkpoints-set-aside").iterdir())
    assert aside == ["30", "40"]


def test_fewer_processes_and_other_meshes_restore_what_several_saved(history):
    directory, _ = history
    (eight,) = run(RESTORE, directory, processes=1, devices=8)
    assert eight == {"same": True, "data": {"drawn": 25}, "devices": 8}
    rng = np.random.default_rng(25)  # and here, on one device, with nothing said about where arrays go
    net = {"kernel": rng.normal(size=(8, 16)), "bias": rng.normal(size=16), "scale": rng.normal(size=3)}
    with Checkpoints(directory, read_only=True) as checkpoints:
        restored = checkpoints.restore_params()["net"]
    for name, value in net.items():
        np.testing.assert_array_equal(restored[name], value.astype(np.float32))
