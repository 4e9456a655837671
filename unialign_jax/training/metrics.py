"""A run's numbers, taken off the device without stopping it: losses by window, throughput, and one line of progress."""

import collections
import contextlib
import math
import time
from collections.abc import Iterator
from typing import NamedTuple

import jax


class NonFiniteLoss(ValueError):
    """A loss term or the gradient norm became infinite or NaN."""

    final = True  # see `cli.run`


class Work(NamedTuple):
    """What finished steps amount to: their number, the images they trained on, the model FLOPs they needed."""

    steps: int = 0
    images: int = 0
    flops: int = 0


class DelayedMetrics:
    """Averages metrics over a window while the device runs ahead.

    Values are copied to the host in the background and looked at `delay` steps later, when they have long been there.
    The host is thus never more than `delay` steps ahead of the device either, which bounds what is queued on it.

    Args:
      delay: number of steps whose values may be outstanding.
      by_source: average the terms of each source apart too.
    """

    def __init__(self, delay: int = 2, *, by_source: bool = False):
        self._delay, self._by_source = delay, by_source
        self._queue: collections.deque[tuple[int, str, dict[str, jax.Array], Work]] = collections.deque()
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}
        self._work = Work()

    def push(self, step: int, source: str, metrics: dict[str, jax.Array], images: int, flops: int) -> None:
        """Takes the scalars of `step`, still being computed, and looks at those of step `step - delay`.

        Args:
          step: number of the update that gives them.
          source: name of the data source of this step; its terms are averaged apart too.
          metrics: float32 scalars by name.
          images, flops: what the step trains on, and the model FLOPs it needs.

        Raises:
          NonFiniteLoss: naming the step and the terms; at most `delay` steps after it happened.
        """
        for value in metrics.values():
            value.copy_to_host_async()
        self._queue.append((step, source, metrics, Work(1, images, flops)))
        while len(self._queue) > self._delay:
            self._take()

    def drain(self) -> None:
        """Waits for all outstanding values and looks at them: before a save, so that no NaN is ever saved."""
        while self._queue:
            self._take()

    def averages(self) -> tuple[dict[str, float], Work]:
        """Means since the last call, of what has been looked at, and the work that these steps were.

        The means are `<term>` over all steps and, by option, `<source>/<term>` over those of a source.
        """
        means = {name: total / self._counts[name] for name, total in self._sums.items()}
        work = self._work
        self._sums, self._counts, self._work = {}, {}, Work()
        return means, work

    def _take(self) -> None:
        step, source, metrics, work = self._queue.popleft()
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        wrong = {name: value for name, value in values.items() if not math.isfinite(value)}
        if wrong:
            terms = ", ".join(f"{name}={value}" for name, value in wrong.items())
            raise NonFiniteLoss(
                f"step {step} ({source}): {terms}. Training stopped; no checkpoint holds this step. "
                "Resume from the newest one with a lower learning rate or a smaller clip norm."
            )
        for name, value in values.items():
            for key in (name, f"{source}/{name}") if self._by_source else (name,):
                self._sums[key] = self._sums.get(key, 0.0) + value
                self._counts[key] = self._counts.get(key, 0) + 1
        self._work = Work(*map(sum, zip(self._work, work, strict=True)))


class Stopwatch:
    """Splits the loop's wall time into waiting for data and the rest, and makes rates of it.

    "Waiting" is the time the host stood in `next(data)`. The device may still have been busy with the steps already
    queued, so it is an upper bound of what faster input would save.
    """

    def __init__(self):
        self._reset()

    def _reset(self) -> None:
        self._start = time.perf_counter()
        self._waited = self._paused = 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around `next(data)`."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Around what is not training: compilation, checkpoints, sampling. Its time counts nowhere."""
        start = time.perf_counter()
        yield
        self._paused += time.perf_counter() - start

    def lap(self, work: Work) -> dict[str, float]:
        """Rates since the last lap, in which `work` was finished; seconds are means per step."""
        elapsed = max(time.perf_counter() - self._start - self._paused, 1e-9)
        rates = {
            "throughput/steps_per_second": work.steps / elapsed,
            "throughput/images_per_second": work.images / elapsed,
            "throughput/model_tflops_per_second": work.flops / elapsed / 1e12,
            "time/step_seconds": elapsed / work.steps,
            "time/wait_for_data_seconds": self._waited / work.steps,
            "time/compute_seconds": (elapsed - self._waited) / work.steps,
        }
        self._reset()
        return rates


def progress_line(step: int, total: int, rates: dict[str, float], losses: dict[str, float]) -> str:
    """One line for the console: where the run is, how fast, how long it still takes, and the losses."""
    speed = rates["throughput/steps_per_second"]
    left = _duration((total - step) / speed)
    names = sorted((name for name in losses if "/" not in name), key=lambda name: (name != "loss", name))
    terms = "  ".join(f"{name} {losses[name]:.4g}" for name in names)
    return (
        f"step {step}/{total} ({step / total:.0%})  {speed:.3g} steps/s  "
        f"{rates['throughput/images_per_second']:.3g} images/s  {left} left  {terms}"
    )


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"
