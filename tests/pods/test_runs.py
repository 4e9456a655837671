"""Whole runs on several devices: through a stop, bit for bit the run that was not stopped."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from unialign_jax.checkpoints import Checkpoints
from unialign_jax.data import scenes

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]
STEPS = 8


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    directory = tmp_path_factory.mktemp("corpus")
    scenes.write_corpus(directory, count=24, size=16)
    return directory


@pytest.fixture(scope="module")
def start(corpus, tmp_path_factory):
    """Starts a command in so many processes with so many devices each; compiled programs are kept between the runs."""
    cache = tmp_path_factory.mktemp("xla")

    def start(command, *, processes, devices):
        with socket.create_server(("127.0.0.1", 0)) as server:
            coordinator = f"127.0.0.1:{server.getsockname()[1]}"
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": str(ROOT),
            # Collectives that don't depend on each other run at once on CPUs, each on a thread that it holds: too few
            # threads, or devices that begin with different ones, and they wait for ever.
            "NPROC": str(16 * devices),
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0 "
            "--xla_llvm_disable_expensive_passes=true --xla_cpu_multi_thread_eigen=false "
            "--xla_cpu_enable_concurrency_optimized_scheduler=false "
            "--xla_cpu_collective_call_terminate_timeout_seconds=600 --xla_cpu_collective_timeout_seconds=600",
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
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
        text = json.dumps([{"corpus": str(corpus)} | job for job in jobs])
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


def finish(running, timeout=1800):
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
