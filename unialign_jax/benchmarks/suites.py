"""The benchmarks of `launch/benchmark.py` by name, and what all of them report about where they ran."""

import importlib
import json
import os
import platform
from typing import Any

from etils import epath

# Name -> module with a function `run() -> dict` of JSON values, and what it measures. Under `files` a suite may return
# texts by extension (a table, a plot), which are written beside the JSON.
SUITES = {
    "data": ("unialign_jax.benchmarks.data", "the input pipeline alone, beside a PyTorch DataLoader on the same files"),
    "sample": ("unialign_jax.benchmarks.sample", "images per second and peak memory of sampling against the batch"),
    "step": ("unialign_jax.benchmarks.step", "the train step's time, memory and MFU against the batch"),
    "loop": ("unialign_jax.benchmarks.loop", "what the training loop adds to the bare compiled step"),
}


def run(suite: str, file: epath.PathLike | None) -> dict[str, Any]:
    """Runs a suite and returns its results, with the machine that they are of; also as JSON in `file`, if given."""
    import jax  # late: the names of the suites are known without it

    results = importlib.import_module(SUITES[suite][0]).run()
    files = results.pop("files", {})
    report = {
        "suite": suite,
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "jax": jax.__version__,
        **results,
    }
    if file is not None:
        path = epath.Path(file)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=2) + "\n")
        for extension, text in files.items():
            path.with_suffix(f".{extension}").write_text(text)
    return report
