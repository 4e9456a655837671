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
import functools
import json
import queue
import sys
import threading
import weakref
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, Self

import grain
import numpy as np

from unialign_jax import agreement
from unialign_jax.data.caches import Cache, Caches
from unialign_jax.data.config import DataConfig
from unialign_jax.data.report import MAX_NAMED, Report
from unialign_jax.data.schedule import Schedule, next_stream
from unialign_jax.data.sources import Source, open_source
from unialign_jax.data.streams import ReadChunk, Stream, in_chunks, make_streams, read_ahead
from unialign_jax.data.tokenizer import PlainTokenizer, Tokenizer

_STATE_VERSION = 3
_POLL_SECONDS = 0.1


def make_batches(
    config: DataConfig,
    tokenizer: Tokenizer,
    teacher_tokenizer: PlainTokenizer | None = None,
    *,
    slots: Sequence[int] | None = None,
    caches: Caches | None = None,
    sources: Sequence[Source] | None = None,
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
      caches: what is read in place of pixels and ids; the order of the samples stays what it is without.
      sources: those of the config, where they are open already.

    Raises:
      CorpusError: a source is missing or empty, or has fewer rows than one batch; a cache is unfinished.
      CacheMismatch: a cache is not of these sources and settings. Of which weights it is must be asked for.
      DataChanged: another process has other data.
      ValueError: slots that the global batch does not have.
    """
    everything = range(config.global_batch)
    slots = tuple(everything if slots is None else slots)
    if not slots or slots[0] not in everything or slots[-1] not in everything:
        raise ValueError(f"slots is {slots}, expected a part of the global batch, {everything}")
    sources = tuple(open_source(source) for source in config.sources) if sources is None else tuple(sources)
    streams = make_streams(config, sources, tokenizer, teacher_tokenizer, caches)
    plan = _Plan(config, sources, streams, slots)
    return Batches(dataclasses.replace(plan, shared=_agreed(plan)))


def _agreed(plan: "_Plan") -> bool:
    """Refuses processes that read other data than process 0; tells whether another one makes the same rows as this."""
    fingerprints = plan.identity["fingerprints"]
    mine = [zlib.crc32(json.dumps(part, sort_keys=True).encode()) for part in (*fingerprints, plan.identity)]
    slots = zlib.crc32(json.dumps(plan.slots).encode())
    everyone = agreement.gather([mine, slots])
    names = [*(source.path for source in plan.sources), "the config's weights, or the sizes of images"]
    for number, (theirs, _) in enumerate(everyone):
        for name, first, other in zip(names, everyone[0][0], theirs, strict=True):
            if first != other:
                raise DataChanged(f"{name}: not the same in process {number} and in process 0; give all hosts the same")
    return [other for _, other in everyone].count(slots) > 1


def merge_states(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The state of the whole pipeline, which `Batches.set_state` takes on any number of hosts.

    Args:
      states: `Batches.get_state()` of every host, after the same batch.

    Raises:
      DataChanged: hosts that make the same rows could not use different ones: their files differ.
      ValueError: they are not of one pipeline after one batch, or don't make up whole batches.
    """
    first = states[0]
    for key in first.keys() - {"slots", "reports"}:
        values = [state.get(key) for state in states]
        if any(value != values[0] for value in values):
            raise ValueError(f"the hosts' data states differ in {key}: {values}; expected those of one step of one run")
    by_slots: dict[tuple[int, ...], dict[str, Any]] = {}
    for number, state in enumerate(states):
        twin = by_slots.setdefault(tuple(state["slots"]), state)
        for here, there in zip(twin["reports"], state["reports"], strict=True):
            if here != there:
                raise DataChanged(_disagreement(number, here, there))
    slots = sorted(slot for part in by_slots for slot in part)
    if slots != list(range(first["global_batch"])):
        raise ValueError(
            f"the hosts' data states hold the slots {slots}, expected 0 to {first['global_batch'] - 1}, each once; "
            "give the state of every host"
        )
    reports = zip(*(state["reports"] for state in by_slots.values()), strict=True)
    return first | {"slots": slots, "reports": [Report.merge(parts) for parts in reports]}


def _disagreement(number: int, here: dict[str, Any], there: dict[str, Any]) -> str:
    """Of two hosts that make the same rows of a source."""
    odd = set(map(tuple, here["named"])) ^ set(map(tuple, there["named"]))
    shown = ": {1}, {2}: {3}".format(*min(odd)) if odd else ""
    return (
        f"{here['path']}: process {number} and another one make the same rows, but a row that one can use the other "
        f"can't{shown}. Both must train on the same: give them the same files, and go on from the newest checkpoint"
    )


class DataChanged(ValueError):
    """A saved state of the pipeline, or another process, is not of this configuration and these files."""

    final = True  # see `cli.run`


class Batches(Iterator[dict[str, np.ndarray]]):
    """Endless host batches; made by `make_batches`. B is the batch of this host, N the source's `references`, H x W the
    bucket's size.

    Each is a dict of

        target             uint8 [B, H, W, 3]
        references         uint8 [B, N, H, W, 3]   absent if N is 0
        reference_mask     bool  [B, N]            absent if every row has N; False where the reference is zeros
        caption_ids        int32 [B, T]            of an answer: the question, then the answer
        caption_loss_mask  bool  [B, T]            False on a question
        instruction_ids    int32 [B, T]            without an instruction: caption_ids, less its prompt
        teacher_ids        int32 [B, Tq]           absent without a teacher
        teacher_mask       bool  [B, Tq]           absent without a teacher; False on padding

    Caches provide other arrays of `batch.Batch` (`caches.PARTS`) in place of those that nothing else is made of.

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
          ChildProcessError, RuntimeError: a worker process died (noticed here, or by Grain).
          RuntimeError: the iterator was closed.
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
          DataChanged: the state is of another seed, global batch or set of sources.
          ValueError: it is of some hosts only.
        """
        self._plan.check(state)
        self.close()
        self._state, self._error = self._plan.take_up(state), None
        self._stop, self._thread = threading.Event(), None

    @property
    def next_source(self) -> int:
        """Which source, by its place in the config, the next batch is of."""
        return self._next_stream.source

    @property
    def next_size(self) -> tuple[int, int]:
        """Height and width of the images, in pixels, that the next batch is of."""
        return self._next_stream.size

    @property
    def sources(self) -> tuple[Source, ...]:
        """Those of the config, opened."""
        return self._plan.sources

    @property
    def caches(self) -> tuple[Cache, ...]:
        """All that are read, of every source, bucket and part."""
        return tuple(cache for stream in self._plan.streams for cache in stream.prepare.caches.values())

    @property
    def _next_stream(self) -> Stream:
        plan = self._plan
        return plan.streams[next_stream(plan.weights(), self._state["drawn"])]

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
    shared: bool = False  # whether another process makes the same rows

    def weights(self) -> list[float]:
        return [stream.weight for stream in self.streams]

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """What a state and the pipeline that takes it up must have in common."""
        return {
            "version": _STATE_VERSION,
            "seed": self.config.seed,
            "global_batch": self.config.global_batch,
            "weights": [source.weight for source in self.config.sources],
            "fingerprints": [source.fingerprint() for source in self.sources],
            "buckets": [[stream.source, len(stream.rows), _checksum(stream.rows)] for stream in self.streams],
        }

    def initial_state(self) -> dict[str, Any]:
        return self.state([0] * len(self.streams), self.new_reports())

    def state(self, drawn: list[int], reports: Sequence[Report]) -> dict[str, Any]:
        progress = {"drawn": list(drawn), "reports": [report.state() for report in reports]}
        return self.identity | {"slots": list(self.slots)} | progress

    def take_up(self, state: dict[str, Any]) -> dict[str, Any]:
        """This host's state, from that of the whole pipeline."""
        reports = self.reports(state) if 0 in self.slots else self.new_reports()
        return self.state(state["drawn"], reports)

    def new_reports(self) -> tuple[Report, ...]:
        # All hosts' accounts are exchanged at every save: together they name about as many as one host would.
        named = max(MAX_NAMED * len(self.slots) // self.config.global_batch, 1)
        share = self.config.refused_share
        return tuple(Report(source.path, len(source), share, max_named=named) for source in self.sources)

    def reports(self, state: dict[str, Any]) -> tuple[Report, ...]:
        reports = self.new_reports()
        for report, saved in zip(reports, state["reports"], strict=True):
            report.restore(saved)
        return reports

    def check(self, state: dict[str, Any]) -> None:
        for key, here in self.identity.items():
            if state.get(key) != here:
                raise DataChanged(
                    f"the data state was saved with {key} = {state.get(key)!r}, this pipeline has {here!r}: it "
                    "can't go on exactly. Use the same configuration and files, or another --workdir, with init set "
                    "to this run to go on from its parameters."
                )
        if list(state["slots"]) != list(range(self.config.global_batch)):
            raise ValueError(
                f"the data state is of the slots {state['slots']} alone; expected that of whole batches, which "
                "merge_states makes of all hosts' states"
            )

    def chunks(self) -> tuple[tuple[int, ...], ...]:
        """The slots of this host in parts that are read together."""
        return in_chunks(self.slots)

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
            self.shared,
        )
        start = sum(drawn) * len(self.chunks())
        return read_ahead(grain.MapDataset.range(start, sys.maxsize).map(read), config)


def _checksum(rows: Sequence[int]) -> int:
    return 0 if isinstance(rows, range) else zlib.crc32(np.asarray(rows, "<i8").tobytes())


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
            raise ChildProcessError(
                f"{report.path}: a worker process died, its samples are lost; resume from the state"
            )
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
