"""The input pipeline: sources -> host batches of static shape, in an order that is a pure function of the seed.

    a source's rows ─► divided among its buckets: streams ─► each shuffled per pass, endless
    step ─► the schedule's stream, this host's slots ─► decode, tokenize (threads or worker processes)
      ─► batches ─► a few ahead

The order of a stream is one endless sequence of rows: slot j of its k-th batch is at position k · global_batch + j,
whoever reads it. Hence a state is little more than the number of batches drawn, and holds on any number of hosts. A row
that can't be used does not move the others: another one, drawn at random, stands in for it. The refusal travels with
that sample as far as the one place that assembles batches: there it is counted exactly once, in order, whatever the
number of workers.
"""

import dataclasses
import queue
import sys
import threading
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, Self

import grain
import numpy as np

from unialign_jax.data.arrays import Preparation
from unialign_jax.data.buckets import bucket_sizes, divide, target_sizes
from unialign_jax.data.report import CorpusError, Report
from unialign_jax.data.schedule import Schedule, next_stream
from unialign_jax.data.sources import Source, SourceConfig, open_source
from unialign_jax.data.streams import ReadChunk, Stream
from unialign_jax.data.tokenizer import PlainTokenizer, Tokenizer

_STATE_VERSION = 2
_POLL_SECONDS = 0.1
# Samples that travel together: handing over each for itself costs 3 % of a photograph's decoding. 100 MB at 2048².
_CHUNK = 8
# Chunks in flight: enough to keep the threads busy while one slow image is waited for, few enough for large images.
_BUFFER_PER_THREAD = 2
_BUFFER_PER_WORKER = 2
# Smaller arrays (token ids) are cheaper to pickle than to place in shared memory of their own.
_MIN_SHARED_BYTES = 16 << 10


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What batches to make.

    Attributes:
      sources: where the samples come from; every batch is of one source.
      global_batch: samples in a batch, over all hosts.
      height, width: of all images, in pixels; with `max_aspect`, of the images whose aspect ratio is nearest to theirs.
      max_aspect: 1: all images are cropped to `height` x `width`. More: those of other aspect ratios, up to this one,
        are gathered in buckets of other sizes of about the same area, see `buckets`; every batch is of one bucket.
      side_multiple: of the sides of the other buckets, in pixels: what the autoencoder and the patches need, or more
        for fewer buckets, each of which is compiled.
      text_length: token ids per text.
      caption_prompt: stands before every caption, as a question before its answer, and is never masked. The network
        knows a token's place by its distance from others: where all are masked, a first one that never is tells places
        apart. Published: none.
      teacher_length: token ids per caption for the semantic teacher; read only when there is a teacher tokenizer.
      seed: of the shuffles, in [0, 2^32).
      refused_share: highest share of a source's rows that may be unusable, in [0, 1); beyond it training stops.
      threads: reading and decoding threads, of this process or of each worker process.
      workers: worker processes; 0 reads in this process. More than 0 needs a `__main__` guard in the script, and absl
        flags that were parsed.
      prefetch: batches assembled ahead, at least 1.

    Raises:
      ValueError: a value out of its range.
    """

    sources: tuple[SourceConfig, ...]
    global_batch: int
    height: int
    width: int
    max_aspect: float = 1.0
    side_multiple: int = 64
    text_length: int = 256
    caption_prompt: str = ""
    teacher_length: int = 256
    seed: int = 0
    refused_share: float = 0.01
    threads: int = 4
    workers: int = 0
    prefetch: int = 2

    def __post_init__(self):
        if not self.sources:
            raise ValueError("sources is empty; expected at least one")
        positive = ("global_batch", "height", "width", "side_multiple", "text_length", "teacher_length", "threads")
        for name in (*positive, "prefetch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 1 or more")
        if self.workers < 0:
            raise ValueError(f"workers is {self.workers}, expected 0 or more")
        if self.max_aspect < 1:
            raise ValueError(f"max_aspect is {self.max_aspect}, expected 1 or more")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed is {self.seed}, expected 0 to 2^32 - 1")
        if not 0 <= self.refused_share < 1:
            raise ValueError(f"refused_share is {self.refused_share}, expected at least 0 and less than 1")

    def sizes(self) -> tuple[tuple[int, int], ...]:
        """Height and width of every bucket that batches may be of."""
        return bucket_sizes(self.height, self.width, self.side_multiple, self.max_aspect)


def make_batches(
    config: DataConfig,
    tokenizer: Tokenizer,
    teacher_tokenizer: PlainTokenizer | None = None,
    *,
    slots: Sequence[int] | None = None,
) -> "Batches":
    """The endless iterator of this host's part of the batches.

    What is in slot j of the k-th batch of a source is a function of the seed, the sources, k and j alone: however many
    hosts there are, together they make the same batches.

    Args:
      config: what to make.
      tokenizer: of the text encoder; texts longer than `text_length` are cut.
      teacher_tokenizer: of the semantic teacher; None leaves the teacher's arrays out.
      slots: which rows of every global batch this host makes, ascending; None: all. Hosts that hold parts of the same
        samples (model axes that span hosts) have equal slots. They need not be neighbours: a host's chips are not, in
        a mesh that follows the wires between chips.

    Raises:
      CorpusError: a source is missing or empty, or has fewer rows than one batch.
      ValueError: slots that the global batch does not have.
    """
    everything = range(config.global_batch)
    slots = tuple(everything if slots is None else slots)
    if not slots or slots[0] not in everything or slots[-1] not in everything:
        raise ValueError(f"slots is {slots}, expected a part of the global batch, {everything}")
    sources = tuple(open_source(source) for source in config.sources)
    streams = []
    for which, (source, source_config) in enumerate(zip(sources, config.sources, strict=True)):
        if len(source) < config.global_batch:
            raise CorpusError(
                f"{source.path}: {len(source)} rows don't fill one batch; lower global_batch "
                f"({config.global_batch}) or leave this source out"
            )
        if len(config.sizes()) > 1:
            parts = divide(target_sizes(source), config.sizes(), least=config.global_batch)
        else:
            parts = {config.sizes()[0]: np.arange(len(source))}
        for (height, width), rows in parts.items():
            prepare = Preparation(
                height=height,
                width=width,
                references=source_config.references,
                tokenizer=tokenizer,
                text_length=config.text_length,
                caption_prompt=config.caption_prompt,
                teacher_tokenizer=teacher_tokenizer,
                teacher_length=config.teacher_length,
            )
            # Grain counts passes by adding to the seed, so neighbouring seeds would repeat each other's passes.
            seed = int(np.random.SeedSequence([config.seed, len(streams)]).generate_state(1)[0])
            weight = source_config.weight * len(rows) / len(source)
            streams.append(Stream(which, rows, prepare, weight, seed))
    return Batches(_Plan(config, sources, tuple(streams), slots))


def merge_states(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The state of the whole pipeline, which `Batches.set_state` takes on any number of hosts.

    Args:
      states: `Batches.get_state()` of every host, after the same batch.

    Raises:
      ValueError: they are not of one pipeline after one batch, or don't make up whole batches.
    """
    first = states[0]
    for key in first.keys() - {"slots", "reports"}:
        values = [state.get(key) for state in states]
        if any(value != values[0] for value in values):
            raise ValueError(f"the hosts' data states differ in {key}: {values}; expected those of one step of one run")
    by_slots = {tuple(state["slots"]): state for state in states}
    slots = sorted(slot for part in by_slots for slot in part)
    if slots != list(range(first["global_batch"])):
        raise ValueError(
            f"the hosts' data states hold the slots {slots}, expected 0 to {first['global_batch'] - 1}, each once; "
            "give the state of every host"
        )
    reports = zip(*(state["reports"] for state in by_slots.values()), strict=True)
    return first | {"slots": slots, "reports": [Report.merge(parts) for parts in reports]}


class Batches(Iterator[dict[str, np.ndarray]]):
    """Endless host batches; made by `make_batches`. B is the batch of this host, N the source's `references`, H x W the
    bucket's size.

    Each is a dict of

        target             uint8 [B, H, W, 3]
        references         uint8 [B, N, H, W, 3]   absent if N is 0
        reference_mask     bool  [B, N]            absent if N is 0; False where the reference is zeros
        caption_ids        int32 [B, T]            of an answer: the question, then the answer
        caption_loss_mask  bool  [B, T]            False on a question
        instruction_ids    int32 [B, T]            equal to caption_ids where a task has no instruction of its own
        teacher_ids        int32 [B, Tq]           absent without a teacher
        teacher_mask       bool  [B, Tq]           absent without a teacher; False on padding

    Any error is final: every later call raises it again, so that no data can be lost unseen.
    """

    def __init__(self, plan: "_Plan"):
        self._plan = plan
        self._state = plan.initial_state()
        self._error: Exception | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __next__(self) -> dict[str, np.ndarray]:
        """The next batch.

        Raises:
          CorpusError: too many rows can't be used; the message is the report.
          RuntimeError: the iterator was closed, or a worker process died.
        """
        if self._error is not None:
            raise self._error
        if self._thread is None:
            self._start()
        item = self._queue.get()
        if isinstance(item, Exception):
            self._error = item
            self.close()
            raise item
        batch, self._state = item
        return batch

    def get_state(self) -> dict[str, Any]:
        """JSON-able; a pipeline that `set_state` gives it to goes on after the last batch returned here.

        Where several hosts share the batches, `merge_states` makes one state of theirs. It does not depend on threads,
        workers or prefetch, nor on the number of hosts, so these may differ when it is taken up.
        """
        return self._state

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on where `get_state` was called.

        Args:
          state: of the whole pipeline. The host with slot 0 takes over the reports; the others' start from nothing.

        Raises:
          ValueError: the state is of another seed, global batch or set of sources, or of some hosts only.
        """
        self._plan.check(state)
        self.close()
        self._state, self._error = self._plan.take_up(state), None
        self._stop, self._thread = threading.Event(), None

    @property
    def next_source(self) -> int:
        """Which source, by its place in the config, the next batch is of."""
        plan = self._plan
        return plan.streams[next_stream(plan.weights(), self._state["drawn"])].source

    @property
    def reports(self) -> tuple[Report, ...]:
        """One `Report` per source, as of the last batch returned. `str(report)` is for people."""
        return self._plan.reports(self._state)

    def close(self) -> None:
        """Ends threads and worker processes. Calling it again does nothing."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        if self._error is None:
            self._error = RuntimeError("this iterator was closed")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *unused) -> None:
        self.close()

    def _start(self) -> None:
        self._queue: queue.Queue = queue.Queue(self._plan.config.prefetch)
        # The thread must not hold a reference to self, or an iterator that is dropped would never end it.
        arguments = (self._plan, self._state, self._queue, self._stop)
        self._thread = threading.Thread(target=_assemble, args=arguments, name="batches", daemon=True)
        self._thread.start()
        weakref.finalize(self, self._stop.set)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Everything about a pipeline that does not change while it runs."""

    config: DataConfig
    sources: tuple[Source, ...]
    streams: tuple[Stream, ...]
    slots: tuple[int, ...]

    def weights(self) -> list[float]:
        return [stream.weight for stream in self.streams]

    def identity(self) -> dict[str, Any]:
        """What a state and the pipeline that takes it up must have in common."""
        return {
            "version": _STATE_VERSION,
            "seed": self.config.seed,
            "global_batch": self.config.global_batch,
            "weights": [source.weight for source in self.config.sources],
            "fingerprints": [source.fingerprint() for source in self.sources],
            "buckets": [[stream.source, len(stream.rows)] for stream in self.streams],
        }

    def initial_state(self) -> dict[str, Any]:
        return self.state([0] * len(self.streams), self.new_reports())

    def state(self, drawn: list[int], reports: Sequence[Report]) -> dict[str, Any]:
        progress = {"drawn": list(drawn), "reports": [report.state() for report in reports]}
        return self.identity() | {"slots": list(self.slots)} | progress

    def take_up(self, state: dict[str, Any]) -> dict[str, Any]:
        """This host's state, from that of the whole pipeline."""
        reports = self.reports(state) if 0 in self.slots else self.new_reports()
        return self.state(state["drawn"], reports)

    def new_reports(self) -> tuple[Report, ...]:
        return tuple(Report(source.path, len(source), self.config.refused_share) for source in self.sources)

    def reports(self, state: dict[str, Any]) -> tuple[Report, ...]:
        reports = self.new_reports()
        for report, saved in zip(reports, state["reports"], strict=True):
            report.restore(saved)
        return reports

    def check(self, state: dict[str, Any]) -> None:
        for key, here in self.identity().items():
            if state.get(key) != here:
                raise ValueError(
                    f"the data state was saved with {key} = {state.get(key)!r}, this pipeline has {here!r}: it "
                    "can't go on exactly. Use the same configuration and files, or start anew."
                )
        if list(state["slots"]) != list(range(self.config.global_batch)):
            raise ValueError(
                f"the data state is of the slots {state['slots']} alone; expected that of whole batches, which "
                "merge_states makes of all hosts' states"
            )

    def chunks(self) -> tuple[tuple[int, ...], ...]:
        """The slots of this host in parts that are read together."""
        return tuple(self.slots[start : start + _CHUNK] for start in range(0, len(self.slots), _CHUNK))

    def elements(self, drawn: Sequence[int]) -> grain.IterDataset:
        """Prepared samples for this host in chunks, batch after batch, after those drawn."""
        config = self.config
        read = ReadChunk(
            self.sources,
            self.streams,
            Schedule(self.weights(), drawn),
            self.chunks(),
            config.global_batch,
            config.refused_share,
        )
        options = grain.ReadOptions(
            num_threads=config.threads, prefetch_buffer_size=config.threads * _BUFFER_PER_THREAD
        )
        start = sum(drawn) * len(self.chunks())
        elements = grain.MapDataset.range(start, sys.maxsize).map(read).to_iter_dataset(options)
        if not config.workers:
            return elements
        workers = grain.MultiprocessingOptions(num_workers=config.workers, per_worker_buffer_size=_BUFFER_PER_WORKER)
        shared = grain.experimental.DatasetOptions(min_shm_size=_MIN_SHARED_BYTES)
        return grain.experimental.WithOptionsIterDataset(elements, shared).mp_prefetch(workers)


def _assemble(plan: _Plan, state: dict[str, Any], out: queue.Queue, stop: threading.Event) -> None:
    """Thread body: puts (batch, state after it) into `out` until told to stop; an error is the last thing put."""
    drawn, reports = list(state["drawn"]), plan.reports(state)
    weights = plan.weights()
    elements = None
    try:
        elements = iter(plan.elements(drawn))
        while not stop.is_set():
            batch = _next_batch(plan, elements, drawn, reports)
            drawn[next_stream(weights, drawn)] += 1
            _put(out, (batch, plan.state(drawn, reports)), stop)
    except Exception as error:  # handed to the consumer, who raises it
        _put(out, error, stop)
    finally:
        if elements is not None:
            elements.close()


def _next_batch(plan: _Plan, elements: Iterator, drawn: list[int], reports: Sequence[Report]) -> dict[str, np.ndarray]:
    source = plan.streams[next_stream(plan.weights(), drawn)].source
    report = reports[source]
    before = sum(count for count, stream in zip(drawn, plan.streams, strict=True) if stream.source == source)
    parts, chunks = [], plan.chunks()
    for number, chunk in enumerate(chunks):
        element = next(elements, None)
        if element is None or element.pop("index") != sum(drawn) * len(chunks) + number:
            # Grain goes on silently without the elements of a worker process that was killed.
            raise RuntimeError(f"{report.path}: a worker process died, its samples are lost; resume from the state")
        refusals = element.pop("refusals")
        for slot in chunk:
            report.add((before * plan.config.global_batch + slot) // report.rows, refusals.get(slot))
        if not element:
            raise report.too_many()
        parts.append(element)
    if len(parts) == 1:
        return parts[0]
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def _put(out: queue.Queue, item: Any, stop: threading.Event) -> None:
    while not stop.is_set():
        try:
            return out.put(item, timeout=_POLL_SECONDS)
        except queue.Full:
            continue
