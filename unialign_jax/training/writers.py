"""Where a run's numbers go: TensorBoard files through clu's asynchronous writer, without TensorFlow."""

import sys
import types
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorboardX

_SUMMARY_MODULE = "clu.metric_writers.summary_writer"


class SummaryWriter:
    """clu's `MetricWriter` interface on top of tensorboardX: scalars, images, texts, histograms, hyperparameters.

    Args:
      logdir: where the event file goes.
      start_step: TensorBoard forgets what an interrupted run wrote from this step on; None forgets nothing.
    """

    def __init__(self, logdir: str, start_step: int | None = None):
        self._writer = tensorboardX.SummaryWriter(logdir, purge_step=start_step)

    def write_summaries(self, step: int, values: Mapping[str, Any], metadata: Mapping[str, Any] | None = None) -> None:
        raise NotImplementedError("raw summaries need TensorFlow; write scalars, images, texts or histograms")

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, float(value), global_step=step)

    def write_images(self, step: int, images: Mapping[str, Any]) -> None:
        """Images `[N, H, W, C]` or `[H, W, C]`, uint8 in [0, 255] or floating in [0, 1]; C is 1 or 3."""
        for name, value in images.items():
            stack = np.asarray(value)
            stack = stack[None] if stack.ndim == 3 else stack
            for index, image in enumerate(stack):
                tag = f"{name}/{index}" if len(stack) > 1 else name
                self._writer.add_image(tag, image, global_step=step, dataformats="HWC")

    def write_videos(self, step: int, videos: Mapping[str, Any]) -> None:
        raise NotImplementedError("videos are not written; write images")

    def write_audios(self, step: int, audios: Mapping[str, Any], *, sample_rate: int) -> None:
        raise NotImplementedError("audio is not written")

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        for name, value in texts.items():
            self._writer.add_text(name, value, global_step=step)

    def write_histograms(
        self, step: int, arrays: Mapping[str, Any], num_buckets: Mapping[str, int] | None = None
    ) -> None:
        for name, value in arrays.items():
            bins = (num_buckets or {}).get(name) or "auto"
            self._writer.add_histogram(name, np.asarray(value), global_step=step, bins=bins)

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        self._writer.add_text("hparams", "\n".join(f"{key}: {value}  " for key, value in hparams.items()))

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


# clu's writers (and its periodic actions) need TensorFlow through this one module only. Supplying it before they are
# first imported is what lets them run without; nothing else of the process is touched.
if _SUMMARY_MODULE not in sys.modules:
    _module = types.ModuleType(_SUMMARY_MODULE, "Stands in for clu's TensorFlow writer.")
    _module.SummaryWriter = SummaryWriter
    sys.modules[_SUMMARY_MODULE] = _module

from clu import metric_writers  # noqa: E402  (must follow the lines above)


def make_writer(logdir: str, *, start_step: int = 0, active: bool = True) -> metric_writers.MetricWriter:
    """A writer of TensorBoard files in `logdir` that writes from a background thread.

    Args:
      logdir: made if absent.
      start_step: the step the run starts or resumes at; points after it that an interrupted run left are dropped.
      active: False on every process but one: nothing is written.

    Errors of the background thread are raised by the next call.
    """
    if not active:
        return metric_writers.MultiWriter([])
    return metric_writers.AsyncMultiWriter([SummaryWriter(str(logdir), start_step + 1 if start_step else None)])


def image_grid(images: np.ndarray, columns: int) -> np.ndarray:
    """Lays uint8 images `[N, H, W, C]` out row by row with a black line between: uint8 `[rows * (H+1) - 1, ..., C]`.

    A last row that is not full is filled with black.
    """
    count, height, width, channels = images.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    grid = np.zeros((rows * columns, height + 1, width + 1, channels), np.uint8)
    grid[:count, :height, :width] = images
    grid = grid.reshape(rows, columns, height + 1, width + 1, channels).swapaxes(1, 2)
    return grid.reshape(rows * (height + 1), columns * (width + 1), channels)[:-1, :-1]
