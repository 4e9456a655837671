"""Where a run's numbers go: TensorBoard files through clu's asynchronous writer, without TensorFlow.

What was flushed survives the process: local files are synchronised with the disk, those in an object store are there.
"""

import io
import os
import sys
import time
import types
from collections.abc import Mapping
from typing import Any

import numpy as np
from absl import logging
from etils import epath
from google.protobuf.message import DecodeError
from tensorboardX import record_writer, summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

_SUMMARY_MODULE = "clu.metric_writers.summary_writer"
_LARGE = 4 << 20  # bytes that are not to be sent again with every point


class _RemoteFile:
    """A file in an object store, which has no appending: it is written anew, as a whole, when a flush finds more in it.

    Once it is large, another goes on where it ends, whose name comes next; readers of event files take both.
    """

    def __init__(self, path: str):
        self._first, self._part, self._closed = path, 0, False
        self._content, self._written = io.BytesIO(), 0

    def write(self, data: bytes) -> None:
        self._content.write(data)

    def flush(self) -> None:
        # An outage, whatever the client raises, must not end the run. Nothing is lost yet: the next flush writes all.
        try:
            self._save()
        except Exception as error:
            logging.warning("%s could not be written, will try again: %s", self._path(), error)

    def _path(self) -> str:
        return f"{self._first}.{self._part:04d}"

    def _save(self) -> None:
        if self._content.tell() == self._written:
            return
        epath.Path(self._path()).write_bytes(self._content.getvalue())
        self._written = self._content.tell()
        if self._written > _LARGE:
            self._part, self._content, self._written = self._part + 1, io.BytesIO(), 0

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._save()  # the last chance: what can't be written now is lost, and that is an error


class _RemoteFiles:
    """What tensorboardX wants to know of a storage."""

    open = staticmethod(_RemoteFile)

    @staticmethod
    def directory_check(path: str) -> None:
        """Object stores have no directories to make."""


# In place of tensorboardX's own, which wants another client library than all else here that reads and writes gs://.
record_writer.register_writer_factory("gs", _RemoteFiles)


class SummaryWriter:
    """Of clu's `MetricWriter` what a run writes, scalars, images and texts, on tensorboardX's file format.

    Not on tensorboardX's own writer: its queue is not emptied by a flush, so that a killed run would lose points.

    Args:
      logdir: where the event file goes, local or `gs://`.
      start_step: TensorBoard forgets what an interrupted run wrote from this step on; None forgets nothing.
    """

    def __init__(self, logdir: str, start_step: int | None = None):
        record_writer.directory_check(logdir)
        # A file of its own for every start, also of two starts within a second.
        self._events = EventsWriter(f"{logdir.rstrip('/')}/events", f".{os.getpid()}.{start_step or 0}")
        if start_step is not None:
            self._write(start_step, session_log=SessionLog(status=SessionLog.START))

    def _write(self, step: int, **content: Any) -> None:
        self._events.write_event(Event(wall_time=time.time(), step=step, **content))

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        for name, value in scalars.items():
            self._write(step, summary=summary.scalar(name, float(value)))

    def write_images(self, step: int, images: Mapping[str, Any]) -> None:
        """Images `[N, H, W, C]` or `[H, W, C]`, uint8 in [0, 255] or floating in [0, 1]; C is 1 or 3."""
        for name, value in images.items():
            stack = np.asarray(value)
            stack = stack[None] if stack.ndim == 3 else stack
            for index, image in enumerate(stack):
                tag = f"{name}/{index}" if len(stack) > 1 else name
                self._write(step, summary=summary.image(tag, image, dataformats="HWC"))

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        for name, value in texts.items():
            self._write(step, summary=summary.text(name, value))

    def flush(self) -> None:
        """All that was written is where it stays when this returns."""
        self._events.flush()

    def close(self) -> None:
        self._events.close()


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
    return metric_writers.AsyncMultiWriter([SummaryWriter(str(logdir), start_step + 1)])


def read_scalars(directory: epath.PathLike) -> dict[str, list[tuple[int, float]]]:
    """What runs have written to a directory: `(step, value)` by tag, in order.

    As TensorBoard does, of an interrupted run what came after the step that it was resumed from is left out, and so is
    what the end of a killed run's file holds in part.

    Raises:
      ValueError: a file is damaged.
    """
    files = []
    for path in epath.Path(directory).glob("events.out.tfevents.*"):
        data, events, at = path.read_bytes(), [], 0
        while len(data) >= at + 8 and len(data) >= (end := at + 16 + int.from_bytes(data[at : at + 8], "little")):
            try:
                events.append(Event.FromString(data[at + 12 : end - 4]))  # length, its checksum, event, its checksum
            except DecodeError as error:
                raise ValueError(f"{path}: damaged from byte {at} on; cut it there, or remove it") from error
            at = end
        if events:
            files.append(events)
    scalars: dict[str, dict[int, float]] = {}
    for event in (event for events in sorted(files, key=lambda events: events[0].wall_time) for event in events):
        if event.session_log.status == SessionLog.START:
            for points in scalars.values():
                for step in [step for step in points if step >= event.step]:
                    del points[step]
        for value in event.summary.value:
            if value.HasField("simple_value"):
                scalars.setdefault(value.tag, {})[event.step] = value.simple_value
    return {tag: sorted(points.items()) for tag, points in scalars.items() if points}
