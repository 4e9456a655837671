"""What all worker processes of this package do."""

import multiprocessing
import os
import threading


def usable_cpus() -> int:
    """CPUs that this process may use: in a job or a container fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def end_with_parent() -> None:
    """Ends this process with the one that has started it, also if that is killed and can tell it nothing."""

    def follow() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
