"""A source's rows in an order without end, and the reading of them: what runs in the pipeline's workers."""

import dataclasses
import functools
import itertools
import math
import signal
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np

from unialign_jax.data.arrays import Preparation
from unialign_jax.data.buckets import agreed_sizes, divide
from unialign_jax.data.caches import Caches
from unialign_jax.data.config import DataConfig
from unialign_jax.data.report import CorpusError, TooFewRows
from unialign_jax.data.samples import Cause, Refused
from unialign_jax.data.schedule import Schedule
from unialign_jax.data.sources import Source
from unialign_jax.data.tokenizer import PlainTokenizer, Tokenizer
from unialign_jax.data.workers import end_with_parent

# Samples that travel together: handing over each for itself costs 3 % of a photograph's decoding. 100 MB at 2048².
CHUNK = 8
# Smaller arrays (token ids) are cheaper to pickle than to place in shared memory of their own.
_MIN_SHARED_BYTES = 16 << 10
# Elements in flight: enough to keep the threads busy while one slow image is waited for, few enough for large images.
_BUFFER_PER_THREAD = 2
_BUFFER_PER_WORKER = 2
# Draws for one in place of a row that can't be used: in a bucket of which half is spoilt they find one.
_STAND_INS = 200


@dataclasses.dataclass(frozen=True)
class Stream:
    """The rows of one source that go into one bucket, in an endless order of their own.

    Attributes:
      source: which one, by its place in the config.
      rows: their numbers, ascending: int64, or the range of all, which costs nothing to hand to worker processes.
      prepare: makes arrays of the bucket's size.
      weight: share of the batches.
      seed: of the order.
    """

    source: int
    rows: np.ndarray | range
    prepare: Preparation
    weight: float
    seed: int

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of its bucket."""
        return self.prepare.height, self.prepare.width

    @functools.cached_property
    def _order(self) -> grain.MapDataset:
        return grain.MapDataset.range(len(self.rows)).shuffle(self.seed).repeat()

    def row(self, position: int) -> int:
        """The row at a position of the order, which holds every row once per pass."""
        return int(self.rows[self._order[position]])

    def stand_ins(self, position: int, count: int) -> Iterator[int]:
        """Rows to take instead of the one at that position, drawn at random."""
        rng = np.random.default_rng([self.seed, position])
        for i in rng.integers(len(self.rows), size=count):
            yield int(self.rows[i])


def in_chunks(slots: Sequence[int]) -> tuple[Sequence[int], ...]:
    """Places of a host's batch in parts of at most `CHUNK`, which are read together; of a range they are ranges."""
    return tuple(slots[start : start + CHUNK] for start in range(0, len(slots), CHUNK))


def check_length(source: Source, config: DataConfig) -> None:
    """Refuses a source with fewer rows than one batch, as `TooFewRows`."""
    if len(source) < config.global_batch:
        raise TooFewRows(
            f"{source.path}: {len(source)} rows don't fill one batch; lower data.global_batch ({config.global_batch}), "
            "or leave this source out with a weight of 0"
        )


def make_streams(
    config: DataConfig,
    sources: Sequence[Source],
    tokenizer: Tokenizer,
    teacher_tokenizer: PlainTokenizer | None,
    caches: Caches | None = None,
) -> tuple[Stream, ...]:
    """The streams of a config: of every source, its rows by bucket. All processes of a run call it together.

    Args:
      config: what batches to make.
      sources: those of the config, opened.
      tokenizer, teacher_tokenizer: see `Preparation`.
      caches: what is read instead of made.

    Raises:
      CorpusError: a source has fewer rows than one batch; see `buckets.agreed_sizes`.
      CacheMismatch, CorpusError: see `caches.Cache`.
    """
    streams = []
    for which, (source, source_config) in enumerate(zip(sources, config.sources, strict=True)):
        check_length(source, config)
        if len(config.sizes()) > 1:
            parts = divide(agreed_sizes(source), config.sizes(), least=config.global_batch)
        else:
            parts = {config.sizes()[0]: range(len(source))}
        for size, rows in parts.items():
            prepare = Preparation(
                height=size[0],
                width=size[1],
                references=source_config.references,
                masks_references=source_config.masks_references,
                tokenizer=tokenizer,
                text_length=config.text_length,
                caption_prompt=config.caption_prompt,
                teacher_tokenizer=teacher_tokenizer,
                teacher_length=config.teacher_length,
                caches={} if caches is None else caches.open(which, source, rows, size, source_config.references),
            )
            # Grain counts passes by adding to the seed, so neighbouring seeds would repeat each other's passes.
            seed = int(np.random.SeedSequence([config.seed, len(streams)]).generate_state(1)[0])
            weight = source_config.weight * len(rows) / len(source)
            streams.append(Stream(which, rows, prepare, weight, seed))
    return tuple(streams)


def read_ahead(elements: grain.MapDataset, config: DataConfig) -> grain.IterDataset:
    """The elements in order, made by the config's threads, in its worker processes if there are any."""
    options = grain.ReadOptions(num_threads=config.threads, prefetch_buffer_size=config.threads * _BUFFER_PER_THREAD)
    dataset = elements.to_iter_dataset(options)
    if not config.workers:
        return dataset
    workers = grain.MultiprocessingOptions(num_workers=config.workers, per_worker_buffer_size=_BUFFER_PER_WORKER)
    shared = grain.experimental.DatasetOptions(min_shm_size=_MIN_SHARED_BYTES)
    return grain.experimental.WithOptionsIterDataset(dataset, shared).mp_prefetch(
        workers, worker_init_fn=_work_to_the_end
    )


def _work_to_the_end(index: int, count: int) -> None:
    """Told to stop with all processes of its group, a worker goes on: the run still takes steps before it saves."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    end_with_parent()


@dataclasses.dataclass(frozen=True)
class ReadChunk:
    """Number of a chunk on this host -> its arrays. Runs in the workers.

    A row that can't be used is replaced by one drawn at random, by the seed and the position alone, so that all other
    rows keep their places. The chunk tells of them by slot, and holds no arrays if none of the rows drawn can be used.

    Attributes:
      sources, streams: of the pipeline; a stream names its source by place.
      schedule: which stream a step is of.
      chunks: the slots of this host, in the parts that are read together.
      global_batch: samples in a batch, over all hosts.
      refused_share: how many rows may be unusable, which tells how often to draw for one in place of another.
      shared: another process makes the same rows; an image that can't be read is then an error, since it might be
        readable there.
    """

    sources: tuple[Source, ...]
    streams: tuple[Stream, ...]
    schedule: Schedule
    chunks: tuple[tuple[int, ...], ...]
    global_batch: int
    refused_share: float
    shared: bool

    def __call__(self, index: int) -> dict[str, Any]:
        """`index`; `refusals`, slot -> (row, place, cause, detail); and arrays `[chunk, ...]`, see `arrays`."""
        step, part = divmod(index, len(self.chunks))
        which, before = self.schedule(step)
        samples, refusals = [], {}
        for slot in self.chunks[part]:
            sample, refusal = self._sample(self.streams[which], before * self.global_batch + slot)
            if refusal is not None:
                refusals[slot] = refusal
            if sample is None:
                return {"index": index, "refusals": refusals}
            samples.append(sample)
        return {"index": index, "refusals": refusals} | _stack(samples)

    def _sample(self, stream: Stream, position: int) -> tuple[dict | None, tuple | None]:
        """The arrays at a position of a stream, and why its row could not be used."""
        source, refusal, unreadable = self.sources[stream.source], None, 0
        for row in itertools.chain([stream.row(position)], stream.stand_ins(position, _STAND_INS)):
            try:
                return _prepared(stream, source, row), refusal
            except Refused as refused:  # a stand-in is counted where it stands in the order itself
                refusal = refusal or (row, source.place(row), str(refused.cause), refused.detail)
                if refused.cause != Cause.UNREADABLE_IMAGE:
                    continue
                if self.shared:
                    raise CorpusError(
                        f"{source.path}, {source.place(row)}: {refused.detail}. Another process makes the same row and "
                        "may be able to read it: both must train on the same. See to the file or the network, and "
                        "start again"
                    ) from refused
                unreadable += 1
                if unreadable > _attempts(self.refused_share):  # an outage: no use in asking for more
                    break
        return None, refusal


def _prepared(stream: Stream, source: Source, row: int) -> dict[str, np.ndarray]:
    try:
        return stream.prepare(source[row], row)
    except Refused:
        raise
    except Exception as error:
        error.add_note(f"while reading {source.path}, {source.place(row)}")
        raise


def _stack(samples: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {key: np.stack([sample[key] for sample in samples]) for key in samples[0]}


def _attempts(refused_share: float) -> int:
    """How many unreadable images are no accident: at this share, all of so many rows are refused once in 10^12."""
    return math.ceil(math.log(1e-12) / math.log(max(refused_share, 0.01)))
