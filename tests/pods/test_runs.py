"""Whole runs on several devices and processes: the same samples and curve whatever the mesh, and through stops.

The loop over blocks is written out: XLA for CPUs keeps no order between the collectives of several loops.
"""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from unialign_jax.checkpoints import Checkpoints
from unialign_jax.data import scenes

pytestmark = pytest.mark.slow

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]
STEPS = 8
UNROLLED = {"unroll": 2}  # as many as there are blocks


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    directory = tmp_path_factory.mktemp("corpus")
    scenes.write_corpus(directory, count=24, size=16)
    return directory


@pytest.fixture(scope="module")
def start():
    """Starts a command in so many processes with so many devices each."""

    def start(command, *, processes, devices):
        with socket.create_server(("127.0.0.1", 0)) as server:
            coordinator = f"127.0.0.1:{server.getsockname()[1]}"
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": str(ROOT),
            # Each collective under way holds a thread: too few threads, or devices that begin with different ones, and
            # they wait for ever. Read from a compilation cache, programs lose the order of their collectives.
            "NPROC": str(16 * devices),
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0 "
            "--xla_llvm_disable_expensive_passes=true --xla_cpu_multi_thread_eigen=false "
            "--xla_cpu_enable_concurrency_optimized_scheduler=false "
            "--xla_cpu_collective_call_terminate_timeout_seconds=600 --xla_cpu_collective_timeout_seconds=600",
            "JAX_ENABLE_COMPILATION_CACHE": "false",
        }
        return [
            subprocess.Popen(
                [sys.executable, *command(coordinator, index)],
                env=environment,
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for index in range(processes)
        ]

    return start


@pytest.fixture(scope="module")
def run(corpus, start):
    """Runs jobs (see worker.py) one after the other; returns what each process saw of each."""

    def run(*jobs, processes, devices):
        text = json.dumps([{"corpus": str(corpus)} | job | {"changes": UNROLLED | job["changes"]} for job in jobs])
        worker = str(HERE / "worker.py")
        running = start(
            lambda coordinator, index: [worker, text, coordinator, str(processes), str(index)],
            processes=processes,
            devices=devices,
        )
        outcomes = finish(running)
        assert [process.returncode for process in running] == [0] * processes, [told(e) for _, e in outcomes]
        return [json.loads(out.splitlines()[-1]) for out, _ in outcomes]

    return run


def finish(running, timeout=900):
    try:
        return [process.communicate(timeout=timeout) for process in running]
    finally:
        for process in running:
            process.kill()


def told(errors: str) -> str:
    """The end of what a process wrote, and what ended it: the libraries' lines that begin with E or F."""
    return "\n".join([line for line in errors.splitlines() if line[:2] in ("E1", "E0", "F1", "F0")] + [errors[-3000:]])


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def whole(run, work):
    """(an uninterrupted run on 8 devices of one process, the same taken up again after its second step)."""
    again = {"copy": str(work / "whole"), "workdir": str(work / "again"), "changes": {"resume_step": 2}}
    ((first, second),) = run({"workdir": str(work / "whole"), "changes": {}}, again, processes=1, devices=8)
    return first, second


def stage(directory) -> pathlib.Path:
    return directory / "photos" / "checkpoints"


def batches(seen) -> list[list]:
    """The rows of every global batch, put together from those of all processes (`{row: ids}` each)."""
    merged = [{k: v for part in parts for k, v in part.items()} for parts in zip(*seen, strict=True)]
    return [[batch[key] for key in sorted(batch, key=int)] for batch in merged]


def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(whole, work):
    first, second = whole
    assert first["devices"] == 8 and first["step"] == second["step"] == STEPS
    assert second["losses"] == {step: loss for step, loss in first["losses"].items() if int(step) > 2}
    assert second["rows"] == first["rows"][2:] and second["state"] == first["state"]
    states = []
    for name in ("whole", "again"):
        with Checkpoints(stage(work / name), read_only=True) as checkpoints:
            states.append((checkpoints.restore_params(), checkpoints.restore_params(which="ema")))
    for ours, theirs in zip(*map(leaves, states), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def leaves(tree):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def test_other_meshes_and_numbers_of_processes_go_on_with_the_same_curve(whole, run, work):
    """8 devices, then 4, then 2 processes x 4, then 2 x 1; both pairs also train the whole."""
    first, _ = whole
    fours = {"steps": 4, "resume_step": 2, "allow_changed": ["steps"]}
    ((four,),) = run(
        {"copy": str(work / "whole"), "workdir": str(work / "chain"), "changes": fours}, processes=1, devices=4
    )
    # They also make samples together, of weights that are split over them.
    two_by_four = run(
        {"workdir": str(work / "pair"), "changes": {"log.samples_every": 4}},
        {"workdir": str(work / "chain"), "changes": {"steps": 6, "allow_changed": ["steps"]}},
        processes=2,
        devices=4,
    )
    two = run(
        {"workdir": str(work / "chain"), "changes": {"allow_changed": ["steps"]}},
        {"workdir": str(work / "twins"), "changes": {"strategy": "tensor=2"}},
        processes=2,
        devices=1,
    )

    # Two processes train what one does: the same samples, losses equal to 1e-6, in all processes.
    for index, (pair, _) in enumerate(two_by_four):
        assert pair["devices"] == 8 and pair["step"] == STEPS
        assert [int(row) for row in pair["rows"][0]] == list(range(4 * index, 4 * index + 4))
        np.testing.assert_allclose(list(pair["losses"].values()), list(first["losses"].values()), rtol=1e-6)
    assert two_by_four[0][0]["state"] == two_by_four[1][0]["state"]
    assert batches([pair["rows"] for pair, _ in two_by_four]) == batches([first["rows"]])

    # Two that hold halves of the weights, and so all rows each.
    for _, twin in two:
        assert batches([twin["rows"]]) == batches([first["rows"]]) and twin["step"] == STEPS
        np.testing.assert_allclose(list(twin["losses"].values()), list(first["losses"].values()), rtol=1e-5)
    assert two[0][1]["state"] == two[1][1]["state"]

    # The chain sees what the uninterrupted run saw, and its losses.
    parts = [[four], [seen[1] for seen in two_by_four], [seen[0] for seen in two]]
    assert [part[0]["devices"] for part in parts] == [4, 8, 2]
    chain = [batch for part in parts for batch in batches([seen["rows"] for seen in part])]
    assert chain == batches([first["rows"]])[2:]
    losses = [loss for part in parts for loss in part[0]["losses"].values()]
    np.testing.assert_allclose(losses, list(first["losses"].values())[2:], rtol=1e-5)


def test_sigterm_to_one_of_two_processes_ends_both_with_the_same_step_saved(start, corpus, tmp_path):
    """The command itself, with its flags; the step is at no multiple of the checkpoints' period."""
    flags = [f"--config={HERE / 'config.py'}:{corpus}", f"--workdir={tmp_path}", "--config.steps=100000"]
    flags += ["--config.checkpoint.every=100000", "--preempted_exit_code=75", "--num_processes=2"]
    flags += [f"--config.{key}={value}" for key, value in UNROLLED.items()]
    running = start(
        lambda coordinator, index: ["launch/train.py", *flags, f"--coordinator={coordinator}", f"--process_id={index}"],
        processes=2,
        devices=4,
    )
    for line in running[0].stdout:
        if "step 3/" in line:
            break
    running[1].send_signal(signal.SIGTERM)
    (output, errors), (other, _) = finish(running)
    assert [process.returncode for process in running] == [75, 75], told(errors)
    with Checkpoints(stage(tmp_path), read_only=True) as checkpoints:
        (step,) = checkpoints.all_steps()
    assert step > 3 and f"told to stop: saved step {step}" in output
    assert "step" not in other.replace("[Gloo]", ""), other  # one process alone speaks
    assert len(list(tmp_path.rglob("events.out.tfevents.*"))) == 1  # and writes
