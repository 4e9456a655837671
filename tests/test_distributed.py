"""Start-up, barriers and preemption, with real processes on this machine."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time

import jax
import pytest

from unialign_jax import distributed, rendezvous

ROOT = pathlib.Path(__file__).parents[1]
CLUSTER_VARIABLES = ("JAX_COORDINATOR", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "SLURM_", "OMPI_", "KUBERNETES_")

# One process of a program: it starts, adds up over all processes, misses one barrier if it is told to, and then takes
# steps until all are to stop. What it saw goes to standard output as JSON.
PROGRAM = """
import json, os, signal, sys, time
from unialign_jax import distributed
late, preempted = json.loads(sys.argv[1])
distributed.initialize(timeout=60)
import jax, numpy as np
from jax.experimental import multihost_utils
me = jax.process_index()
seen = {"process": me, "of": jax.process_count(), "primary": distributed.is_primary()}
seen["all"] = multihost_utils.process_allgather(np.float32(me)).tolist()
for _ in range(2):
    distributed.barrier("used twice", 30)
if me == late:
    time.sleep(2.5)
else:
    try:
        distributed.barrier("one is missing", 1.5)
    except TimeoutError as error:
        seen["timeout"] = str(error)
distributed.barrier("all again", 30)
with distributed.Preemption() as preemption:
    for step in range(1, 3000):
        time.sleep(0.01)
        if step == 5 and me == preempted:
            os.kill(os.getpid(), signal.SIGTERM)
        if preemption.reached(step):
            seen["stopped"] = step
            break
try:
    distributed.initialize()
except RuntimeError as error:
    seen["again"] = str(error)
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


def run_all(environments: list[dict[str, str]], *arguments: str) -> list[dict]:
    """Starts one process per environment and returns what each printed, in their order."""
    base = {k: v for k, v in os.environ.items() if not k.startswith(CLUSTER_VARIABLES)}
    base |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    command = [sys.executable, "-c", PROGRAM, *arguments]
    processes = [
        subprocess.Popen(command, env=base | env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for env in environments
    ]
    try:
        outcomes = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * len(processes), [err[-800:] for _, err in outcomes]
    return [json.loads(out.splitlines()[-1]) for out, _ in outcomes]  # gloo writes there too


def by_hand(count: int, port: int) -> list[dict[str, str]]:
    return [
        {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": str(count), "JAX_PROCESS_ID": str(i)}
        for i in range(count)
    ]


def by_slurm(count: int, port: int) -> list[dict[str, str]]:
    shared = {
        "SLURM_JOB_ID": "77",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": str(count),
        "JAX_COORDINATOR_PORT": str(port),
    }
    return [shared | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)} for i in range(count)]


@pytest.mark.parametrize(("count", "environments"), [(2, by_slurm), (4, by_hand)])
def test_processes_start_together_miss_each_other_at_a_barrier_and_stop_at_the_same_step(count, environments):
    late, preempted = count - 1, count // 2
    results = run_all(environments(count, free_port()), json.dumps([late, preempted]))

    assert [r["process"] for r in results] == list(range(count))
    assert all(r["of"] == count and r["all"] == list(range(count)) for r in results)
    assert [r["primary"] for r in results] == [True] + [False] * (count - 1)
    missing = f"missing: {late} ({socket.gethostname()})."
    for result in results[:-1]:
        assert "'one is missing': after 1.5 s" in result["timeout"] and missing in result["timeout"]
        assert f"{count - 1} of {count} processes" in result["timeout"]
    assert "timeout" not in results[late]
    steps = {r["stopped"] for r in results}
    assert len(steps) == 1 and steps.pop() > 5
    assert all("called before" in r["again"] for r in results)


def test_a_process_on_its_own_stays_as_it_is(no_cluster):
    distributed.initialize()
    assert not jax.distributed.is_initialized()
    assert distributed.is_primary()
    distributed.barrier("alone", 0.001)


def test_one_process_can_be_asked_for(no_cluster):
    address, total, number = distributed._placement(None, 1, None, 5)
    assert address.startswith("127.0.0.1:") and (total, number) == (1, 0)


def test_open_mpi_is_detected(no_cluster, monkeypatch):
    monkeypatch.setenv("OMPI_MCA_orte_hnp_uri", "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "16")
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "3")
    monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_RANK", "3")
    monkeypatch.setenv("JAX_COORDINATOR_PORT", "1234")
    assert distributed._placement(None, None, None, 5) == ("10.96.0.1:1234", 16, 3)


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (("h:1", 2, 2), {}, "process_id=2 with num_processes=2"),
        (("h:1", 2, -1), {}, "process_id=-1 with num_processes=2"),
        (("h:1", 0, 0), {}, "num_processes=0"),
        (("h:1", 2, None), {}, r"coordinator=h:1, num_processes=2 given, but not process_id \(or JAX_PROCESS_ID\)"),
        ((None, None, 1), {}, "process_id=1 given, but not coordinator .* and num_processes"),
        (("h", 2, 0), {}, "'h' is not of the form host:port"),
        (("h:99999", 2, 0), {}, "'h:99999' is not of the form host:port"),
        ((None, None, None), {"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES is 'two'"),
        ((None, None, None), {"JAX_COORDINATOR_ADDRESS": "h:1"}, "coordinator=h:1 given, but not num_processes"),
    ],
)
def test_incomplete_or_contradicting_arguments_are_named(no_cluster, monkeypatch, arguments, environment, message):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        distributed.initialize(*arguments, timeout=1)


def test_an_unreachable_coordinator_is_an_error_that_names_it(no_cluster):
    port = free_port()
    start = time.monotonic()
    with pytest.raises(TimeoutError, match=f"process 1 of 2 .* coordinator localhost:{port} within 1 s .*refused"):
        distributed.initialize(f"localhost:{port}", 2, 1, timeout=1)
    assert time.monotonic() - start < 4
    with pytest.raises(TimeoutError, match="coordinator no-such-host.invalid:1234 within 0.2 s"):
        distributed.initialize("no-such-host.invalid:1234", 2, 1, timeout=0.2)


def test_a_port_in_use_is_an_error_that_names_it(no_cluster):
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(OSError, match=f"process 0 can't listen on port {port}"):
            distributed.initialize(f"localhost:{port}", 2, 0, timeout=5)


class Meeting:
    """Calls of `rendezvous.meet` in threads, and what each ended with: None, or its exception."""

    def __init__(self, timeout: float):
        self.port, self.timeout = free_port(), timeout
        self.ends: list[Exception | None] = []
        self.threads: list[threading.Thread] = []

    def start(self, process_id: int, num_processes: int) -> None:
        slot = len(self.ends)
        self.ends.append(RuntimeError("did not end"))

        def call() -> None:
            try:
                rendezvous.meet(f"localhost:{self.port}", num_processes, process_id, self.timeout)
                self.ends[slot] = None
            except (OSError, ValueError) as error:
                self.ends[slot] = error

        self.threads.append(threading.Thread(target=call))
        self.threads[-1].start()

    def finish(self) -> list[Exception | None]:
        for thread in self.threads:
            thread.join(timeout=20)
        return self.ends


def test_all_meet_in_any_order_beside_strangers():
    meeting = Meeting(timeout=20)
    meeting.start(2, 3)
    meeting.start(0, 3)
    time.sleep(0.3)
    with socket.create_connection(("localhost", meeting.port)) as stranger:
        stranger.sendall(b"GET / HTTP/1.0\r\n\r\n")
        meeting.start(1, 3)
        assert meeting.finish() == [None, None, None]
    rendezvous.meet("nobody:1", 1, 0, timeout=0)  # one process needs no meeting
    with socket.create_server(("", meeting.port)):
        pass  # the port is free again


def test_who_does_not_come_is_named_to_everyone_who_came():
    meeting = Meeting(timeout=1)
    meeting.start(0, 5)
    meeting.start(3, 5)
    host, guest = meeting.finish()
    assert isinstance(host, TimeoutError) and isinstance(guest, TimeoutError) and str(host) == str(guest)
    assert "after 1 s, 3 of 5 processes have not come" in str(host) and "processes 1, 2, 4;" in str(host)


def test_who_leaves_again_is_missing():
    meeting = Meeting(timeout=1)
    meeting.start(0, 3)
    time.sleep(0.2)
    with socket.create_connection(("localhost", meeting.port)) as guest:
        rendezvous._send(guest, {"process": 1, "of": 3, "name": "gone"})
    (end,) = meeting.finish()
    assert isinstance(end, TimeoutError) and "processes 1, 2;" in str(end)


def test_a_number_given_twice_is_told_to_all():
    meeting = Meeting(timeout=15)
    for number in (0, 1, 1):
        meeting.start(number, 3)
    ends = meeting.finish()
    assert all(isinstance(end, ValueError) for end in ends) and len({str(end) for end in ends}) == 1
    assert "two processes say that they are process 1 of 3" in str(ends[0])
    assert str(ends[0]).count(f"{socket.gethostname()} (pid {os.getpid()})") == 2


def test_different_numbers_of_processes_are_told_to_all():
    meeting = Meeting(timeout=15)
    meeting.start(0, 3)
    meeting.start(2, 4)
    ends = meeting.finish()
    assert all(isinstance(end, ValueError) and "process 2 on" in str(end) for end in ends)
    assert "one of 4 processes" in str(ends[0]) and "as one of 3" in str(ends[0])


def test_sigterm_stops_a_process_on_its_own_at_the_next_step():
    before = signal.getsignal(signal.SIGTERM)
    with distributed.Preemption() as preemption:
        assert not preemption.reached(1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert preemption.reached(2) and preemption.reached(3)
        assert signal.getsignal(signal.SIGTERM) == before  # a second signal ends it
    with distributed.Preemption() as preemption:
        assert not preemption.reached(1)
    assert signal.getsignal(signal.SIGTERM) == before
