"""Window averages that lag behind, what stops a run, and the clock."""

import time

import jax.numpy as jnp
import pytest

from unialign_jax.training import metrics
from unialign_jax.training.metrics import DelayedMetrics, NonFiniteLoss, Stopwatch


def scalars(**values):
    return {name: jnp.float32(value) for name, value in values.items()}


def test_averages_are_over_the_window_and_per_source():
    window = DelayedMetrics(delay=1, by_source=True)
    for step, (source, loss) in enumerate([("generate", 1.0), ("edit", 3.0), ("generate", 2.0)]):
        window.push(step, source, scalars(loss=loss, image=2 * loss), 8, 10)
    window.drain()
    means, work = window.averages()
    assert work == (3, 24, 30)
    assert means == {
        "loss": 2.0,
        "image": 4.0,
        "generate/loss": 1.5,
        "generate/image": 3.0,
        "edit/loss": 3.0,
        "edit/image": 6.0,
    }
    window.push(3, "edit", scalars(loss=7.0), 8, 10)
    window.drain()
    assert window.averages() == ({"loss": 7.0, "edit/loss": 7.0}, (1, 8, 10))  # a window of one source as any other
    assert window.averages() == ({}, (0, 0, 0))


def test_terms_that_only_some_steps_have_are_averaged_over_those():
    window = DelayedMetrics(delay=0)
    window.push(0, "a", scalars(loss=1.0, align=4.0), 8, 10)
    window.push(1, "a", scalars(loss=2.0), 8, 10)
    assert window.averages()[0] == {"loss": 1.5, "align": 4.0}


class Recording:
    """A device scalar that notes when it is looked at."""

    def __init__(self, value, looked_at):
        self.value, self.looked_at = value, looked_at

    def copy_to_host_async(self):
        pass

    def __array__(self, dtype=None, copy=None):
        self.looked_at.append(self.value)
        return jnp.float32(self.value).__array__()


def test_the_current_step_is_not_waited_for():
    looked_at = []
    window = DelayedMetrics(delay=2)
    for step in range(5):
        window.push(step, "a", {"loss": Recording(step, looked_at)}, 8, 10)
        assert looked_at == list(range(step - 1))
    window.drain()
    assert looked_at == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_the_run_naming_step_and_terms(bad):
    window = DelayedMetrics(delay=2)
    window.push(10, "edit", scalars(loss=bad, image=bad, text=1.0), 8, 10)
    window.push(11, "edit", scalars(loss=bad, image=bad, text=1.0), 8, 10)
    with pytest.raises(NonFiniteLoss, match=rf"step 10 \(edit\): image={bad}, loss={bad}\."):
        window.push(12, "edit", scalars(loss=1.0), 8, 10)
    window = DelayedMetrics(delay=2)
    window.push(10, "edit", scalars(loss=bad), 8, 10)
    with pytest.raises(NonFiniteLoss, match="step 10"):
        window.drain()


def test_stopwatch_splits_the_time(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    watch = Stopwatch()

    def spend(seconds):
        now[0] += seconds

    for _ in range(4):
        with watch.waiting():
            spend(0.5)
        spend(1.5)
    with watch.paused():
        spend(1000)
    assert watch.lap(metrics.Work(4, 32, 4 * 10**12)) == {
        "throughput/steps_per_second": 0.5,
        "throughput/images_per_second": 4.0,
        "throughput/model_tflops_per_second": 0.5,
        "time/step_seconds": 2.0,
        "time/wait_for_data_seconds": 0.5,
        "time/compute_seconds": 1.5,
    }
    spend(3)
    assert watch.lap(metrics.Work(1, 8, 0))["time/step_seconds"] == 3.0


@pytest.mark.parametrize(("seconds", "text"), [(59, "0m59s"), (61, "1m01s"), (3 * 3600 + 62, "3h01m")])
def test_progress_line(seconds, text):
    rates = {"throughput/steps_per_second": 0.5, "throughput/images_per_second": 16.0}
    line = metrics.progress_line(100, 100 + seconds * 0.5, rates, {"image": 4.0, "loss": 0.12345, "edit/loss": 9.0})
    assert line.startswith("step 100/")
    assert f"{text} left" in line and line.endswith("left  loss 0.1235  image 4") and "16 images/s" in line
