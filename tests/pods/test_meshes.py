"""Any mesh computes the step of one device: losses and updated parameters of generate, edit and compose batches."""

import concurrent.futures
import itertools
import json
import math
import os
import pathlib
import runpy
import subprocess
import sys

import jax
import numpy as np
import pytest

from unialign_jax import parallel
from unialign_jax.data.sources import SourceConfig
from unialign_jax.state import create_state
from unialign_jax.training import run_config
from unialign_jax.training.program import Program

pytestmark = pytest.mark.slow

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]

BUCKETS = {"generate": 0, "edit": 1, "compose": 2}  # and how many references there are
AXES = ("data", "fsdp", "sequence", "tensor")
# Eight devices along one axis that splits the batch, 4 x 2 over every pair of axes, 2 x 2 x 2 over every triple.
STRATEGIES = [
    *("data=8", "fsdp=8"),
    *(f"{a}=4+{b}=2" for a, b in itertools.combinations(AXES, 2)),
    *("+".join(f"{axis}=2" for axis in axes) for axes in itertools.combinations(AXES, 3)),
]
# Buckets take turns, which gives each of them every axis; UNIALIGN_MESHES=all gives each of them every mesh, in some
# ten minutes.
ALL = os.environ.get("UNIALIGN_MESHES") == "all"
CASES = [
    (strategy, bucket, "plain")
    for i, strategy in enumerate(STRATEGIES)
    for j, bucket in enumerate(BUCKETS)
    if ALL or i % 3 == j
]
# One with a teacher that trains its text encoder; with matrices orthogonalized by Muon, and blocks computed again; with
# an autoencoder's posterior, and the batch in parts. What must change nothing, one device does without.
CASES += [
    ("data=2+fsdp=2+tensor=2", "edit", "aligned"),
    ("fsdp=4+tensor=2", "edit", "muon"),
    ("data=2+fsdp=2+sequence=2", "edit", "parts"),
]


def make_run(variant: str, alone: bool):
    config = runpy.run_path(str(HERE / "config.py"))["get_config"](aligned=variant == "aligned")
    # Adam divides by the gradient's size: a larger epsilon keeps the rounding of tiny gradients small.
    config.optimizer.eps = 1e-5
    config.optimizer.warmup_steps = 0
    if variant == "muon":
        config.optimizer.muon = True
        config.remat = "none" if alone else "attention+mlp"
    elif variant == "parts":
        config.model.pixel_codec = None
        config.model.autoencoder = {
            "block_out_channels": (4, 8), "latent_channels": 3, "layers_per_block": 1, "norm_num_groups": 2
        }  # fmt: skip
        config.model.transformer.update(in_channels=3, out_channels=3)
        config.objective.contrastive_weight = 0.0  # of a part's samples alone
        config.micro_batches = 1 if alone else 2
    return run_config.read(config)


def host_batch(program, source, seed: int = 0) -> dict[str, np.ndarray]:
    """Random samples of a source's bucket; one of three references is absent."""
    rng = np.random.default_rng(seed)
    arrays = {}
    for name, leaf in vars(program.batch(source)).items():
        if leaf is None or name == "null_ids":
            continue
        if leaf.dtype == bool:
            arrays[name] = rng.random(leaf.shape) < (0.7 if name == "reference_mask" else 2)
        else:
            arrays[name] = rng.integers(0, 60, leaf.shape).astype(leaf.dtype)
    return arrays


def first_state(program):
    """(state, frozen) on the host; noise on all parameters, for what starts from zeros would pass no gradient on."""
    params = jax.jit(program.networks.init)(jax.random.key(0))
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda x: x + 0.05 * rng.standard_normal(x.shape).astype(np.float32), params)
    trained = {name: params[name] for name in program.run.trained}
    return jax.tree.map(
        np.asarray, (create_state(trained, program.run.optimizer), {name: params[name] for name in program.frozen})
    )


def two_steps(program, compiled, source, start):
    """(metrics of each step, parameters and average after them), on the host."""

    def put(tree, abstract):
        return jax.tree.map(lambda x, leaf: jax.device_put(x, leaf.sharding), tree, abstract)

    state, frozen = put(start[0], program.state), put(start[1], program.frozen)
    key = jax.device_put(jax.random.key(5), program.key.sharding)
    null_ids = parallel.replicate(np.full(program.run.data.text_length, 2, np.int32), program.mesh)
    metrics = []
    for seed in (0, 1):
        batch = program.place(host_batch(program, source, seed), {"null_ids": null_ids})
        state, values = compiled(state, frozen, batch, key)
        metrics.append({name: float(value) for name, value in values.items()})
    return metrics, jax.tree.map(np.asarray, {"params": state.params, "ema": state.ema})


def worst(errors: list[tuple[float, str]]) -> tuple[float, str]:
    return max(errors, key=lambda error: (math.isnan(error[0]), error[0]))


def main() -> None:
    """Prints what `compare` finds of every case."""

    def build(case):
        strategy, bucket, variant = case
        alone = strategy == "fsdp"
        devices = jax.devices()[:1] if alone else jax.devices()
        program = Program(make_run(variant, alone), parallel.make_mesh(strategy, devices))
        source = SourceConfig("rows.jsonl", references=BUCKETS[bucket])
        return program, source, program.lower(source).compile()

    report = []
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for bucket, variant in sorted(
            {case[1:] for case in CASES}
        ):  # all at once, programs fill a process's memory map
            alone = ("fsdp", bucket, variant)
            cases = [case for case in CASES if case[1:] == (bucket, variant)]
            built = dict(zip([alone, *cases], pool.map(build, [alone, *cases]), strict=True))
            start = first_state(built[alone][0])
            results = {}
            for case in [alone, *cases]:
                program, source, compiled = built.pop(case)
                results[case] = two_steps(program, compiled, source, start)
            report += [compare(case, results[case], results[alone], start) for case in cases]
    print("\n" + json.dumps(report))


def compare(case, result, expected, start):
    """The worst relative errors of a case, each with the name of where it is."""
    (metrics, params), (expected_metrics, expected_params) = result, expected
    losses = [
        (abs(value - there[name]) / abs(there[name]), f"step {step} {name}")
        for step, (here, there) in enumerate(zip(metrics, expected_metrics, strict=True))
        for name, value in here.items()
        if not (name == "contrastive" and case[2] == "parts")
    ]
    leaves = [
        (float(np.linalg.norm(x - y) / np.linalg.norm(y)), jax.tree_util.keystr(path))
        for (path, x), y in zip(jax.tree.leaves_with_path(params), jax.tree.leaves(expected_params), strict=True)
    ]
    moved = start[0].params["transformer"]["blocks"]["image"]["query"]["kernel"]
    change = np.linalg.norm(params["params"]["transformer"]["blocks"]["image"]["query"]["kernel"] - moved)
    return {"case": case, "loss": worst(losses), "params": worst(leaves), "change": float(change)}


@pytest.fixture(scope="module")
def report():
    virtual = {
        "NPROC": "128",  # sharded programs deadlock on few threads: each collective under way holds one
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8 --xla_llvm_disable_expensive_passes=true "
        "--xla_backend_optimization_level=0 --xla_cpu_collective_call_terminate_timeout_seconds=600 "
        # Independent collectives run at once: devices that begin with different ones would wait for ever.
        "--xla_cpu_multi_thread_eigen=false --xla_cpu_enable_concurrency_optimized_scheduler=false",
    }
    done = subprocess.run(
        [sys.executable, __file__], env=os.environ | virtual, capture_output=True, text=True, timeout=1500
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {tuple(entry["case"]): entry for entry in json.loads(done.stdout.splitlines()[-1])}


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_the_step_is_that_of_one_device(report, case):
    entry = report[case]
    assert entry["loss"][0] < 1e-5, entry
    assert entry["params"][0] < 1e-5, entry
    assert entry["change"] > 1e-3  # the two steps have moved what they should


if __name__ == "__main__":
    main()
