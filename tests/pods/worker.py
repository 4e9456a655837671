"""One process of a run on several devices: trains what it is told to, and prints what it saw as JSON.

    worker.py JOBS COORDINATOR NUM_PROCESSES PROCESS_ID

A job is a mapping: `workdir`; `changes` of the config; `copy`, a directory that `workdir` starts as a copy of.
"""

import json
import pathlib
import runpy
import shutil
import sys

import jax
import numpy as np

from unialign_jax import agreement, distributed
from unialign_jax.training import loop
from unialign_jax.training.metrics import DelayedMetrics
from unialign_jax.training.program import Program
from unialign_jax.tree_checks import checksum

get_config = runpy.run_path(str(pathlib.Path(__file__).parent / "config.py"))["get_config"]


def train(corpus: str, workdir: str, changes: dict, copy: str | None = None) -> dict:
    """Runs a job: losses and rows by step, what the last state sums to, and where it stopped."""
    losses, rows = {}, {}

    class Recorded(DelayedMetrics):
        def push(self, step, source, metrics, *rest):
            # On CPUs two steps under way at once could take each other's threads, and wait for ever.
            losses[step] = jax.block_until_ready(metrics)["loss"]
            super().push(step, source, metrics, *rest)

    class Watched(Program):
        def place(self, arrays, shared):
            texts = [np.asarray(ids).tolist() for ids in arrays["caption_ids"]]
            rows[len(rows)] = dict(zip(self.rows(), texts, strict=True))
            return super().place(arrays, shared)

    loop.DelayedMetrics, loop.Program = Recorded, Watched
    if copy is not None:
        agreement.primary(lambda: shutil.copytree(copy, workdir) and None)
    config = get_config(corpus).lock()
    config.update_from_flattened_dict({key: tuple(v) if isinstance(v, list) else v for key, v in changes.items()})
    state = loop.train(config, workdir)
    return {
        "losses": {step: float(loss) for step, loss in losses.items()},
        "rows": [rows[batch] for batch in sorted(rows)],
        "state": {part: checksum(getattr(state, part)) for part in ("params", "opt_state", "ema")},
        "step": int(state.step),
        "devices": jax.device_count(),
    }


if __name__ == "__main__":
    jobs, coordinator, processes, process = sys.argv[1:]
    if int(processes) > 1:
        distributed.initialize(coordinator, int(processes), int(process), timeout=60)
    print("\n" + json.dumps([train(**job) for job in json.loads(jobs)]))
