"""The input pipeline: JSONL rows -> host batches of static shape, in an order that is a pure function of the seed.

    source rows ─► shuffle per pass ─► repeat ─► this host's share ─► decode, tokenize (threads or worker processes)
      ─► refused rows counted and left out ─► batches (the schedule says of which source) ─► a few batches ahead

Refused rows travel as elements of their own as far as the one place that assembles batches: there they are counted
exactly once, in order, whatever the number of workers, and the state holds the counts.
"""

import dataclasses
import queue
import threading
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, Self

import grain
import numpy as np

from unialign_jax.data.arrays import Preparation
from unialign_jax.data.samples import Refused
from unialign_jax.data.sources import CorpusError, JsonlSource, Report
from unialign_jax.data.tokenizer import PlainTokenizer, Tokenizer

_STATE_VERSION = 1
_POLL_SECONDS = 0.1
# Elements in flight: enough to keep the threads busy while one slow image is waited for, few enough for large images.
_BUFFER_PER_THREAD = 4
_BUFFER_PER_WORKER = 8
# Smaller arrays (token ids) are cheaper to pickle than to place in shared memory of their own.
_MIN_SHARED_BYTES = 16 << 10


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """One JSONL file and the part it takes in training.

    Attributes:
      path: the file, local or `gs://`.
      task: what its rows are for; None takes it from each row's keys (see `JsonlSource`).
      references: how many reference images its batches have room for. Rows with fewer are padded and masked, rows with
        more are refused. Edit and perceive rows need 1, compose rows as many as they have at most.
      weight: share of the batches, relative to the other sources' weights.
    """

    path: str
    task: str | None = None
    references: int = 0
    weight: float = 1.0


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What batches to make.

    Attributes:
      sources: where the samples come from; every batch is of one source.
      global_batch: samples in a batch, over all hosts.
      height, width: of all images, in pixels.
      text_length: token ids per text.
      teacher_length: token ids per caption for the semantic teacher; read only when there is a teacher tokenizer.
      seed: of the shuffles, in [0, 2^32).
      refused_share: highest share of a source's rows that may be unusable, in [0, 1); beyond it training stops.
      threads: reading and decoding threads per source, or per worker process.
      workers: worker processes, divided among the sources by weight (each gets at least one); 0 reads in this process.
        More than 0 needs a `__main__` guard in the script, and absl flags that were parsed.
      prefetch: batches assembled ahead, at least 1.

    Raises:
      ValueError: a value out of its range.
    """

    sources: tuple[SourceConfig, ...]
    global_batch: int
    height: int
    width: int
    text_length: int = 256
    teacher_length: int = 256
    seed: int = 0
    refused_share: float = 0.01
    threads: int = 4
    workers: int = 0
    prefetch: int = 2

    def __post_init__(self):
        if not self.sources:
            raise ValueError("sources is empty; expected at least one JSONL file")
        for source in self.sources:
            if not source.weight > 0:
                raise ValueError(f"{source.path}: weight is {source.weight}, expected more than 0")
            if source.references < 0:
                raise ValueError(f"{source.path}: references is {source.references}, expected 0 or more")
        for name in ("global_batch", "height", "width", "text_length", "teacher_length", "threads", "prefetch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 1 or more")
        if self.workers < 0:
            raise ValueError(f"workers is {self.workers}, expected 0 or more")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed is {self.seed}, expected 0 to 2^32 - 1")
        if not 0 <= self.refused_share < 1:
            raise ValueError(f"refused_share is {self.refused_share}, expected at least 0 and less than 1")


def make_batches(
    config: DataConfig,
    tokenizer: Tokenizer,
    teacher_tokenizer: PlainTokenizer | None = None,
    *,
    process_index: int = 0,
    process_count: int = 1,
) -> "Batches":
    """The endless iterator of this host's batches.

    The hosts' shares of a source are disjoint and together complete; each source's rows are shuffled anew in every
    pass. The order depends on the seed, the sources and `process_count` alone.

    Args:
      config: what to make.
      tokenizer: of the text encoder; texts longer than `text_length` are cut.
      teacher_tokenizer: of the semantic teacher; None leaves the teacher's arrays out.
      process_index, process_count: this host, and how many there are.

    Raises:
      CorpusError: a source is missing or empty, or has fewer rows than one batch.
      ValueError: the hosts can't share the batch equally.
    """
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index is {process_index}, expected 0 to {process_count - 1}")
    if config.global_batch % process_count:
        raise ValueError(
            f"global_batch is {config.global_batch}, which {process_count} processes can't share equally; "
            f"expected a multiple of {process_count}"
        )
    sources = [JsonlSource(source.path, source.task) for source in config.sources]
    for source in sources:
        if len(source) < config.global_batch:
            raise CorpusError(
                f"{source.path}: {len(source)} rows don't fill one batch; lower global_batch "
                f"({config.global_batch}) or leave this source out"
            )
    return Batches(_Plan(config, tuple(sources), tokenizer, teacher_tokenizer, process_index, process_count))


def next_source(weights: Sequence[float], drawn: Sequence[int]) -> int:
    """Which source the next batch is of: the one furthest behind its share, the first of equals.

    Starting from zeros and counting its own answers, this is the schedule: a pure function of the weights and the step,
    so hosts agree on it without a word. Equal weights take turns.

    Args:
      weights: positive, one per source.
      drawn: batches drawn so far, one per source.
    """
    total, step = sum(weights), sum(drawn) + 1
    return max(range(len(weights)), key=lambda i: (weights[i] * step - drawn[i] * total, -i))


class Batches(Iterator[dict[str, np.ndarray]]):
    """Endless host batches; made by `make_batches`. B is the batch of this host, N the source's `references`.

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

        The state is of this host alone: every process has to keep its own. It does not depend on threads, workers or
        prefetch, so these may differ when it is taken up.
        """
        return self._state

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on where `get_state` was called.

        Raises:
          ValueError: the state is of another seed, number of processes or set of sources.
        """
        self._plan.check(state)
        self.close()
        self._state, self._error = state, None
        self._stop, self._thread = threading.Event(), None

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
    sources: tuple[JsonlSource, ...]
    tokenizer: Tokenizer
    teacher_tokenizer: PlainTokenizer | None
    process_index: int
    process_count: int

    def identity(self) -> dict[str, Any]:
        """What a state and the pipeline that takes it up must have in common."""
        return {
            "version": _STATE_VERSION,
            "seed": self.config.seed,
            "process_index": self.process_index,
            "process_count": self.process_count,
            "weights": [source.weight for source in self.config.sources],
            "fingerprints": [source.fingerprint() for source in self.sources],
        }

    def initial_state(self) -> dict[str, Any]:
        reports = [Report(source.path, len(source), self.config.refused_share) for source in self.sources]
        return self.state([0] * len(self.sources), reports)

    def state(self, drawn: list[int], reports: Sequence[Report]) -> dict[str, Any]:
        # How far a source was read is its report's count: refused rows are read too.
        return self.identity() | {"drawn": list(drawn), "reports": [report.state() for report in reports]}

    def reports(self, state: dict[str, Any]) -> tuple[Report, ...]:
        reports = []
        for source, saved in zip(self.sources, state["reports"], strict=True):
            reports.append(Report(source.path, len(source), self.config.refused_share))
            reports[-1].restore(saved)
        return tuple(reports)

    def check(self, state: dict[str, Any]) -> None:
        for key, here in self.identity().items():
            if state.get(key) != here:
                raise ValueError(
                    f"the data state was saved with {key} = {state.get(key)!r}, this pipeline has {here!r}: it "
                    "can't go on exactly. Use the same configuration, files and number of processes, or start anew."
                )

    def elements(self, which: int, start: int) -> grain.IterDataset:
        """Prepared elements of one source for this host, from its `start`-th on."""
        source, source_config, config = self.sources[which], self.config.sources[which], self.config
        # Grain counts passes by adding to the seed, so neighbouring seeds would repeat each other's passes.
        seed = int(np.random.SeedSequence([config.seed, which]).generate_state(1)[0])
        rows = grain.MapDataset.range(len(source)).shuffle(seed).repeat()
        rows = rows[self.process_index :: self.process_count]
        prepare = Preparation(
            height=config.height,
            width=config.width,
            references=source_config.references,
            tokenizer=self.tokenizer,
            text_length=config.text_length,
            teacher_tokenizer=self.teacher_tokenizer,
            teacher_length=config.teacher_length,
        )
        options = grain.ReadOptions(
            num_threads=config.threads, prefetch_buffer_size=config.threads * _BUFFER_PER_THREAD
        )
        elements = rows.map_with_index(_Read(source, prepare))[start:].to_iter_dataset(options)
        if not config.workers:
            return elements
        share = source_config.weight / sum(source.weight for source in config.sources)
        workers = grain.MultiprocessingOptions(
            num_workers=max(1, round(config.workers * share)), per_worker_buffer_size=_BUFFER_PER_WORKER
        )
        shared = grain.experimental.DatasetOptions(min_shm_size=_MIN_SHARED_BYTES)
        return grain.experimental.WithOptionsIterDataset(elements, shared).mp_prefetch(workers)


@dataclasses.dataclass(frozen=True)
class _Read:
    """(position in the host's stream, row) -> the sample's arrays, or why there are none. Runs in the workers."""

    source: JsonlSource
    prepare: Preparation

    def __call__(self, position: int, row: int) -> dict[str, Any]:
        try:
            return {"position": position} | self.prepare(self.source[row])
        except Refused as refused:
            refusal = (self.source.line(row), str(refused.cause), refused.detail)
            return {"position": position, "refusal": refusal}
        except Exception as error:
            error.add_note(f"while reading {self.source.path}, line {self.source.line(row)}")
            raise


def _assemble(plan: _Plan, state: dict[str, Any], out: queue.Queue, stop: threading.Event) -> None:
    """Thread body: puts (batch, state after it) into `out` until told to stop; an error is the last thing put."""
    streams: dict[int, Iterator] = {}
    drawn, reports = list(state["drawn"]), plan.reports(state)
    weights = [source.weight for source in plan.config.sources]
    try:
        while not stop.is_set():
            which = next_source(weights, drawn)
            if which not in streams:
                streams[which] = iter(plan.elements(which, reports[which].read))
            batch = _next_batch(plan, streams[which], reports[which])
            drawn[which] += 1
            _put(out, (batch, plan.state(drawn, reports)), stop)
    except Exception as error:  # handed to the consumer, who raises it
        _put(out, error, stop)
    finally:
        for stream in streams.values():
            stream.close()


def _next_batch(plan: _Plan, stream: Iterator, report: Report) -> dict[str, np.ndarray]:
    samples = []
    while len(samples) < plan.config.global_batch // plan.process_count:
        element = next(stream, None)
        if element is None or element.pop("position") != report.read:
            # Grain goes on silently without the elements of a worker process that was killed.
            raise RuntimeError(f"{report.path}: a worker process died, its samples are lost; resume from the state")
        pass_index = (plan.process_index + report.read * plan.process_count) // report.rows
        report.add(pass_index, element.get("refusal"))
        if "refusal" not in element:
            samples.append(element)
    return {key: np.stack([sample[key] for sample in samples]) for key in samples[0]}


def _put(out: queue.Queue, item: Any, stop: threading.Event) -> None:
    while not stop.is_set():
        try:
            return out.put(item, timeout=_POLL_SECONDS)
        except queue.Full:
            continue
