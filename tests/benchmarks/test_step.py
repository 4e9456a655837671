"""The benchmark of the train step: what it reports. Its times are not judged here."""

import importlib.util
import pathlib

import jax
import pytest

from unialign_jax import parallel
from unialign_jax.benchmarks import step, suites
from unialign_jax.training import run_config
from unialign_jax.training.program import Program

pytestmark = pytest.mark.slow


def test_report(tmp_path, monkeypatch):
    for name, value in {"_SMALLEST": 1, "_LARGEST": 2, "_ROUNDS": 1, "_STEPS": 1, "_WARM_UP": 1}.items():
        monkeypatch.setattr(step, name, value)
    devices = len(jax.devices())
    kind = jax.devices()[0].device_kind
    monkeypatch.setitem(step._PEAKS, kind, 1e12)
    report = suites.run("step", None)
    one, two = report["rows"]
    assert report["model"] == "small" and (one["batch"], two["batch"]) == (devices, 2 * devices)
    assert one["images_per_second"] == pytest.approx(devices / one["step_seconds"], rel=0.2)
    assert 0 < one["peak_gib"] < two["peak_gib"] < 4 and one["attention"] == "xla"
    assert 0 < one["mfu"] < 1


def test_utilization_is_of_all_devices():
    """An H100 does 989 TFLOP/s in bfloat16 (its data sheet), two twice that."""
    assert step.utilization(989e12, 2.0, 2, "NVIDIA H100 80GB HBM3") == pytest.approx(0.25, rel=1e-3)
    assert step.utilization(1e12, 1.0, 1, "a new one") is None
    v5 = [step.utilization(1e14, 1.0, 1, f"TPU {name}") for name in ("v5", "v5p", "v5 lite", "v5e")]
    assert v5[0] == v5[1] == pytest.approx(100 / 459, abs=1e-4) and v5[2] == v5[3] == pytest.approx(100 / 197, abs=1e-4)
    assert step.utilization(1e12, 1.0, 1, "NVIDIA H100 PCIe") is None  # slower than the one of that name


def test_a_device_that_holds_no_batch_is_an_error(monkeypatch):
    def full(*arguments):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr(step, "_measure", full)
    with pytest.raises(ValueError, match="use more devices"):
        step.run()


def test_the_published_step_is_that_of_the_config():
    """Same program, so that what is measured is what is trained."""
    file = pathlib.Path(__file__).parents[2] / "configs" / "sd3_medium.py"
    spec = importlib.util.spec_from_file_location("sd3_medium", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config("published").unlock()
    config.data.sources.generate.path = "unread.jsonl"
    del config.data.sources["edit"]
    measured = run_config.read(step._published_config())
    config.cached, config.cache_directory = measured.cached, "caches"
    config.remat, config.data.global_batch = measured.remat, measured.data.global_batch
    mesh = parallel.make_mesh("fsdp", jax.devices()[:1])
    ours, theirs = Program(measured, mesh), Program(run_config.read(config), mesh)
    assert ours.parts(measured.data.sources[0]) == theirs.parts(theirs.run.data.sources[0])
    assert ours.run.objective == theirs.run.objective and ours.run.dtype == theirs.run.dtype
    assert ours.model_flops(measured.data.sources[0]) == theirs.model_flops(theirs.run.data.sources[0])
