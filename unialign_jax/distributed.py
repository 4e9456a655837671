"""Many processes as one program: start-up, barriers that name who is missing, and stopping at the same step.

`initialize` is called once by a launch program, before anything else touches JAX. Who the other processes are is known
on Cloud TPU (VMs and GKE), under SLURM and under Open MPI 4; elsewhere it is said by hand.

https://docs.jax.dev/en/latest/multi_process.html
"""

import collections
import contextlib
import functools
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any, Self

import jax
from jax._src import clusters  # no public way to ask what JAX would detect
from jax._src import distributed as jax_distributed  # the coordination service's client has no public name
from jax._src.lib import _jax
from jax.experimental import multihost_utils

from unialign_jax.typed import WrongValue

# Seconds by which the processes outwait the coordinator, which says who is missing.
_MARGIN = 20
# Seconds that a process which ends waits for the others: one that failed should say so soon, not after JAX's 300.
_SHUTDOWN = 30
_STOPPING = (signal.SIGTERM, signal.SIGINT)
_KEYS = "unialign_jax/"  # of the coordination service's key-value store
_ENDED = f"{_KEYS}ended"
_WATCHING = 5  # seconds between two looks at it
# How many processes an MPI started, by Open MPI and by MPICH and its kin.
_MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
_exchanges: collections.Counter[str] = collections.Counter()  # how often each was used; equal in all processes


def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout: int = 300,
    preemption: bool = True,
) -> None:
    """Connects this process with the others. What is not given comes from the cluster.

    With no cluster, or with `num_processes=1` alone, the process stays on its own. If processes are missing after the
    time-out, JAX ends all that came, with a message that has the numbers of the missing ones.

    Args:
      coordinator: "host:port" of process 0, reachable from all hosts.
      num_processes: how many processes there are.
      process_id: which one this is, from 0.
      timeout: seconds to wait for the others.
      preemption: whether the program asks for SIGTERM, see `Preemption`. If not, the signal ends it, as elsewhere; JAX
        would only take note of it.

    Raises:
      ValueError: arguments that are incomplete or impossible.
      RuntimeError: it was called before, or JAX was already used.
    """
    placed = _placement(coordinator, num_processes, process_id, timeout)
    if placed is None:
        return
    address, total, number = placed
    print(f"process {number} of {total} on {socket.gethostname()}: meeting the others at {address}", flush=True)
    jax.config.update("jax_enable_preemption_service", preemption)
    with _missing_processes_named(timeout):
        jax.distributed.initialize(
            address,
            total,
            number,
            initialization_timeout=timeout + _MARGIN,
            shutdown_timeout_seconds=_SHUTDOWN,
        )
    _client().key_value_set(f"{_KEYS}host/{number}", socket.gethostname())
    threading.Thread(target=_end_with_the_others, args=(_client(),), daemon=True).start()


def tell_end(message: str, code: int) -> None:
    """Ends the other processes, within seconds and wherever they are, with a message and an exit code.

    Otherwise they wait in a collective for one that has failed, until JAX ends them with a code of its own.
    """
    if _client() is not None:
        number = jax_distributed.global_state.process_id
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # the coordinator is gone, and so the others will be
            _client().key_value_set(_ENDED, json.dumps([number, message, code]), allow_overwrite=True)


def _end_with_the_others(client: Any) -> None:
    """Watches for `tell_end` of another process, and ends this one; runs in a thread of its own."""
    while True:
        time.sleep(_WATCHING)
        try:
            number, message, code = json.loads(client.key_value_try_get(_ENDED))
        except jax.errors.JaxRuntimeError as error:
            if "NOT_FOUND" in str(error):
                continue
            return  # the coordinator has ended, of which JAX tells
        if number != jax_distributed.global_state.process_id:
            print(f"error: process {number} failed: {message}", file=sys.stderr, flush=True)
            os._exit(code)


@contextlib.contextmanager
def _missing_processes_named(timeout: int) -> Iterator[None]:
    """Makes the coordinator started within give up after `timeout` seconds and tell all who is missing.

    Otherwise it waits for an hour, while every process gives up on its own and names nobody.
    """
    make = _jax.get_distributed_runtime_service
    _jax.get_distributed_runtime_service = functools.partial(make, cluster_register_timeout=timeout)
    try:
        yield
    finally:
        _jax.get_distributed_runtime_service = make


def _placement(
    coordinator: str | None, num_processes: int | None, process_id: int | None, timeout: int
) -> tuple[str, int, int] | None:
    """(coordinator, number of processes, this one's number), checked; None for a process on its own."""
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    by_hand = any(value is not None for value in given.values())
    if num_processes == 1 and coordinator is None and process_id in (None, 0):
        return None
    if None in given.values():
        try:
            found = clusters.ClusterEnv.auto_detect_unset_distributed_params(*given.values(), None, None, timeout)
        except RuntimeError as error:
            raise ValueError(
                f"this looks like a cluster of processes, but where the others are can't be found out: {error}. Give "
                "--coordinator, --num_processes and --process_id (--num_processes=1 alone for a single process)"
            ) from error
        given = dict(zip(given, found, strict=False))
        # A cluster of one process, such as a shell in a SLURM job, is none: JAX would give it one of its node's GPUs.
        if not by_hand and (None in given.values() or given["num_processes"] == 1):
            _refuse_unknown_mpi()
            return None
    if missing := [f"--{name}" for name, value in given.items() if value is None]:
        told = ", ".join(f"--{name}={value}" for name, value in given.items() if value is not None)
        raise WrongValue(
            f"{told} without {' and '.join(missing)}: give all three, or none on Cloud TPU, SLURM and Open MPI 4"
        )
    address, total, number = given.values()
    if total < 1 or not 0 <= number < total:
        raise WrongValue(f"--process_id={number} with --num_processes={total}: expected 0 to their number - 1")
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise WrongValue(f"--coordinator={address} is not of the form host:port, such as 10.0.0.2:8476")
    return address, total, number


def _refuse_unknown_mpi() -> None:
    """JAX before 0.11 knows Open MPI 4 alone: started by another, every process would train by itself, in one place."""
    for name in _MPI_SIZES:
        if (size := os.environ.get(name, "1")) != "1":
            rank = name.replace("SIZE", "RANK")
            raise ValueError(
                f"MPI started {size} processes ({name}), but where the others are can't be found out: give each "
                f"--coordinator=HOST0:8476 --num_processes=${name} --process_id=${rank} (--num_processes=1 alone for a "
                "single process), see docs/multihost.md"
            )


def _client():
    return jax_distributed.global_state.client


def barrier(name: str, timeout: float) -> None:
    """Returns once all processes have called it with this name; at once where there is only one. See `exchange`."""
    exchange(name, "", timeout)


def exchange(name: str, text: str, timeout: float) -> list[str]:
    """Each process's text, by process, in all processes, once all have called it with this name.

    It goes through the coordination service, not through the devices: there it could overtake, on a CPU, the last
    collectives of a program that some devices have finished already. A name may be used again. A process that has died
    is noticed by JAX after about 100 seconds, and then ends this one too: longer time-outs only make sense while
    waiting for slow processes.

    Raises:
      TimeoutError: some have not come within `timeout` seconds; the message names them and their hosts.
    """
    client, state = _client(), jax_distributed.global_state
    if client is None or state.num_processes == 1:
        return [text]
    directory = f"{_KEYS}exchange/{name}"
    number = _exchanges[name]
    _exchanges[name] += 1
    use = f"{directory}/{number}"
    client.key_value_set(f"{use}/{state.process_id}", text)
    try:
        client.wait_at_barrier(use, round(timeout * 1000))
    except jax.errors.JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" not in str(error):
            raise
        arrived, hosts = _written_under(use), _written_under(f"{_KEYS}host")
        missing = [f"{i} ({hosts.get(i, 'host unknown')})" for i in range(state.num_processes) if i not in arrived]
        raise TimeoutError(
            f"barrier {name!r}: after {timeout:g} s, {len(arrived)} of {state.num_processes} processes are there; "
            f"missing: {', '.join(missing) or 'none any more, the last came too late'}. See their logs"
        ) from error
    # Who is here has read what was exchanged the time before.
    if state.process_id == 0 and number:
        client.key_value_delete(f"{directory}/{number - 1}/")
    texts = _written_under(use)
    return [texts[i] for i in range(state.num_processes)]


def _written_under(directory: str) -> dict[int, str]:
    """What the processes have written under a directory of the key-value store, by process."""
    return {int(key.rsplit("/", 1)[1]): value for key, value in _client().key_value_dir_get(f"{directory}/")}


class Preemption:
    """Notices SIGTERM, with which clusters announce that a machine goes away, in any process; on its own also Ctrl-C.

    Connected processes agree on a step soon after the signal (JAX's preemption service does it in the background), so
    that all save the same one. A process on its own stops at the next step, on SIGTERM or SIGINT (Ctrl-C). A second
    Ctrl-C then ends it as usual; a second SIGTERM does not, since it may come from a supervisor and the system at once.

        with Preemption() as preemption:
            for step in ...:
                ...
                if preemption.reached():
                    save(step)
                    break

    Raises:
      ValueError: entered outside the main thread, where Python can't handle signals.
    """

    def __init__(self) -> None:
        self._connected = jax.distributed.is_initialized()
        self._signalled = False
        self._asked = 0  # goes on through the stages of a run: JAX agrees on a number that comes after this one

    def reached(self) -> bool:
        """True from the step on at which to save and stop. All processes must ask equally often, at every step."""
        self._asked += 1
        if self._connected and not self._signalled:  # the service names one step only
            self._signalled = multihost_utils.reached_preemption_sync_point(self._asked)
        return self._signalled

    def __enter__(self) -> Self:
        if not self._connected:
            self._previous = {number: signal.signal(number, self._on_signal) for number in _STOPPING}
        return self

    def __exit__(self, *exception: object) -> None:
        if not self._connected:
            for number, handler in self._previous.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True
        signal.signal(signal.SIGINT, self._previous[signal.SIGINT])
