"""Start-up, barriers and preemption, with real processes on this machine; whole runs are in `pods/`."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys

import jax
import pytest

from unialign_jax import distributed

ROOT = pathlib.Path(__file__).parents[1]
CLUSTER_VARIABLES = ("JAX_COORDINATOR", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "SLURM_", "OMPI_", "PMI_", "KUBERNETES_")

# One process of a program: it meets the others, and misses one barrier if it is the late one.
PROGRAM = """
import json, sys, time
from unialign_jax import distributed
late, arguments, timeout = json.loads(sys.argv[1])
distributed.initialize(*arguments, timeout=timeout)
from jax._src import distributed as state
me = state.global_state.process_id
seen = {"process": me, "of": state.global_state.num_processes}
for _ in range(2):
    distributed.barrier("used twice", 60)
if me == late:
    time.sleep(7)
else:
    try:
        distributed.barrier("one is missing", 5)
    except TimeoutError as error:
        seen["timeout"] = str(error)
distributed.barrier("all again", 60)
print(json.dumps(seen))
"""


@pytest.fixture
def no_cluster(monkeypatch):
    """An environment in which no cluster can be detected."""
    for name in list(os.environ):
        if name.startswith(CLUSTER_VARIABLES):
            monkeypatch.delenv(name)


def free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


def run_all(environments, arguments, late=None, timeout=60):
    """Starts one process per environment and gives (exit code, standard output, standard error) of each."""
    base = {k: v for k, v in os.environ.items() if not k.startswith(CLUSTER_VARIABLES)}
    base |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, json.dumps([late, own, timeout])],
            env=base | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for environment, own in zip(environments, arguments, strict=True)
    ]
    try:
        outcomes = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *outcome) for process, outcome in zip(processes, outcomes, strict=True)]


def by_hand(count):
    port = free_port()
    return [{}] * count, [[f"localhost:{port}", count, i] for i in range(count)]


def by_slurm(count):
    shared = {
        "SLURM_JOB_ID": "77",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": str(count),
        "JAX_COORDINATOR_PORT": str(free_port()),
    }
    return [shared | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)} for i in range(count)], [[]] * count


# One of two processes meets an error that starting again can't mend, the other waits for it.
FINAL = """
import sys, time
from absl import flags
from unialign_jax import cli
start = cli.define_cluster()
cli._OTHERS_COME = 3.0
def main():
    start()
    if flags.FLAGS.process_id == 0:
        time.sleep(60)
    from unialign_jax.data.report import TooManyRefused
    raise TooManyRefused("too many rows")
cli.run(main)
"""


def test_what_starting_again_cannot_mend_is_told_by_the_exit_code_of_one_process_of_many():
    port, base = free_port(), {k: v for k, v in os.environ.items() if not k.startswith(CLUSTER_VARIABLES)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", FINAL, f"--coordinator=localhost:{port}", "--num_processes=2", f"--process_id={i}"],
            env=base | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    try:
        _, errors = processes[1].communicate(timeout=300)
        # JAX would wait half a minute for the other, and then abort with 134.
        assert processes[1].returncode == 78 and errors.endswith("error: too many rows\n")
        # The other sleeps, as if in a collective that nobody else comes to.
        _, errors = processes[0].communicate(timeout=60)
        assert processes[0].returncode == 78 and errors.endswith("error: process 1 failed: too many rows\n")
    finally:
        for process in processes:
            process.kill()
            process.wait()


@pytest.mark.slow
@pytest.mark.parametrize(("count", "start"), [(2, by_slurm), (4, by_hand)])
def test_a_barrier_names_who_is_missing(count, start):
    late = count - 1
    outcomes = run_all(*start(count), late)
    assert [code for code, _, _ in outcomes] == [0] * count, [errors[-800:] for _, _, errors in outcomes]
    results = [json.loads(output.splitlines()[-1]) for _, output, _ in outcomes]
    assert [(r["process"], r["of"]) for r in results] == [(i, count) for i in range(count)]
    for result in results[:-1]:
        assert "'one is missing': after 5 s" in result["timeout"]
        assert f"missing: {late} ({socket.gethostname()})." in result["timeout"]
        assert f"{count - 1} of {count} processes" in result["timeout"]
    assert "timeout" not in results[late]


@pytest.mark.slow
def test_a_process_that_does_not_start_is_named_to_the_others():
    environments, arguments = by_hand(3)
    outcomes = run_all([environments[0], environments[2]], [arguments[0], arguments[2]], timeout=15)
    for code, output, errors in outcomes:
        assert code != 0 and f"at {arguments[0][0]}" in output
        assert "2/3" in errors and "timed out task names:\n1\n" in errors


def test_a_process_on_its_own_stays_as_it_is(no_cluster):
    distributed.initialize()
    distributed.initialize(num_processes=1)
    assert not jax.distributed.is_initialized()
    distributed.barrier("alone", 0.001)


def test_open_mpi_is_detected(no_cluster, monkeypatch):
    monkeypatch.setenv("OMPI_MCA_orte_hnp_uri", "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "16")
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "3")
    monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_RANK", "3")
    monkeypatch.setenv("JAX_COORDINATOR_PORT", "1234")
    assert distributed._placement(None, None, None, 5) == ("10.96.0.1:1234", 16, 3)


@pytest.mark.parametrize("variable", ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_an_mpi_that_jax_does_not_know_is_no_process_on_its_own(no_cluster, monkeypatch, variable):
    monkeypatch.setenv(variable, "1")
    assert distributed._placement(None, None, None, 5) is None
    monkeypatch.setenv(variable, "8")
    with pytest.raises(ValueError, match=rf"started 8 processes \({variable}\).*--coordinator"):
        distributed.initialize(timeout=1)
    assert distributed._placement(None, 1, None, 5) is None
    assert distributed._placement("h:1", 8, 3, 5) == ("h:1", 8, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("h:1", 2, 2), "--process_id=2 with --num_processes=2"),
        (("h:1", 2, None), "--coordinator=h:1, --num_processes=2 without --process_id"),
        ((None, None, 1), "--process_id=1 without --coordinator and --num_processes"),
        (("h", 2, 0), "--coordinator=h is not of the form host:port"),
        (("h:99999", 2, 0), "--coordinator=h:99999 is not of the form host:port"),
    ],
)
def test_incomplete_or_impossible_arguments_are_named(no_cluster, arguments, message):
    with pytest.raises(ValueError, match=message):
        distributed.initialize(*arguments, timeout=1)


def test_a_shell_in_a_slurm_job_is_a_process_on_its_own(no_cluster, monkeypatch):
    """JAX would give it one of the node's GPUs, as the first of one process."""
    [environment], _ = by_slurm(1)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    distributed.initialize(timeout=1)
    assert not jax.distributed.is_initialized()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_a_process_on_its_own_at_the_next_step(number):
    def handlers():
        return [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]

    before = handlers()
    with distributed.Preemption() as preemption:
        assert not preemption.reached()
        os.kill(os.getpid(), number)
        assert preemption.reached() and preemption.reached()
        assert handlers()[1] == before[1]  # a second Ctrl-C ends it
        os.kill(os.getpid(), signal.SIGTERM)  # of a supervisor, where the system has told all processes before
    with distributed.Preemption() as preemption:
        assert not preemption.reached() and handlers() != before
    assert handlers() == before
