"""Makes the caches of a stage: its frozen networks, on a mesh over all hosts, encode every row of its sources once.

Networks and batches are split as in training. The hosts work in step, each at shards of its own: a global batch holds
rows of as many shards as there are hosts (or groups of hosts, where several hold parts of the same samples). A shard
is written while its rows come, and appears once it is complete; whoever starts again, with any number of hosts, makes
those that are missing.
"""

import collections
import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any

import grain
import jax
import ml_collections
import numpy as np
import tqdm
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath

from unialign_jax import agreement, lineage, parallel, pretrained, storage
from unialign_jax.batch import Batch
from unialign_jax.data import caches
from unialign_jax.data.caches import CacheMismatch
from unialign_jax.data.config import DataConfig
from unialign_jax.data.report import CorpusError, Report
from unialign_jax.data.samples import Cause, Refused, Sample
from unialign_jax.data.sources import Source, open_source
from unialign_jax.data.streams import Stream, in_chunks, make_streams, read_ahead
from unialign_jax.networks import Params
from unialign_jax.training import caching, run_config, tokenizers
from unialign_jax.training.cache_jobs import Job, Share, Target, estimate, make_jobs, make_targets, rounds
from unialign_jax.training.program import Program
from unialign_jax.training.run_config import CACHED, ConfigError, RunConfig

_BATCH_PER_PART = 8
_BAR = "{desc}{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}, {remaining} left, {rate_fmt}]"
_BLANK = Sample("caption", "", caption=".", instruction=".")  # its ids stand where a row can't be used


def precompute(
    config: ml_collections.ConfigDict,
    directory: epath.PathLike,
    *,
    sources: Sequence[str] = (),
    rows_per_shard: int = 2000,
    batch: int | None = None,
) -> None:
    """Makes the caches that a stage's `cached` names, or what is missing of them. All processes call it together.

    Args:
      config: of one stage, as `loop.train` takes it. A stage that goes on from another needs `init` here.
      directory: of all caches, local or `gs://`: training's `cache_directory`. It may hold caches of other sources,
        parts and image sizes too.
      sources: names of those to work on; empty: all.
      rows_per_shard: rows in a file; a kill costs each host the one that it was at.
      batch: rows encoded at once, over all devices; None: 8 for each part that the mesh splits a batch into.

    Raises:
      ConfigError: nothing to cache, no such source, or no place to take the networks from.
      CacheMismatch: a cache that is there was made with something else.
      CorpusError: a source can't be read, or too many of its rows can't be used.
      ValueError, FileNotFoundError: see `loop.train`.
    """
    run = _read(config, directory, sources)
    if rows_per_shard < 1:
        raise ValueError(f"rows_per_shard is {rows_per_shard}, expected 1 or more")
    if sources and run.tokenizer.learn_vocab_size is None:  # one that is learned needs the texts of all
        kept = [i for i, name in enumerate(run.source_names) if name in sources]
        names = tuple(run.source_names[i] for i in kept)
        run = dataclasses.replace(
            run,
            source_names=names,
            data=dataclasses.replace(run.data, sources=tuple(run.data.sources[i] for i in kept)),
        )
    mesh = parallel.make_mesh(run.strategy)
    batch = batch or _BATCH_PER_PART * parallel.batch_parts(mesh)
    batches = dataclasses.replace(run.data, global_batch=batch)
    program = Program(dataclasses.replace(run, micro_batches=1, data=batches), mesh)
    init = str(lineage.locate(run.init)) if run.init else None
    tokenizer = tokenizers.make(run, init)
    teacher_tokenizer = tokenizers.of_teacher(run, program.networks, tokenizer, init)
    opened = tuple(open_source(source) for source in run.data.sources)
    streams = make_streams(run.data, opened, tokenizer, teacher_tokenizer)
    if sources:  # where the texts of all were learned from
        streams = tuple(stream for stream in streams if run.source_names[stream.source] in sources)

    init_key, _ = program.make_keys()
    networks = {name: tree for name, tree in (program.params | program.unread).items() if name in _makers(run)}
    params = pretrained.initial_params(program.networks, init_key, networks, source=init, average=run.init_average)
    targets = make_targets(
        streams,
        opened,
        caching.caches_of(run, program.networks, tokenizer, teacher_tokenizer),
        caching.weights(run.cached, params),
        program,
        rows_per_shard,
    )
    # One process claims the directories: the others would find what it has written.
    claimed = agreement.primary(
        lambda: [[target.claim() for target in parts.values()] for parts in targets], CacheMismatch, CorpusError
    )
    agreement.everywhere(lambda: [target.check_seen() for parts in targets for target in parts.values()], CorpusError)
    missing = [dict(zip(parts, shards, strict=True)) for parts, shards in zip(targets, claimed, strict=True)]
    speaks = jax.process_index() == 0
    if speaks:
        print(estimate(targets, missing), flush=True)
    encode = _Encoder(program, params)
    if "instructions" in run.cached:
        places = [parts["instructions"].path / caches.NULL_STATES_FILE for parts in targets]
        lacking = agreement.primary(lambda: [str(place) for place in places if not place.exists()])
        states = encode.null_states(tokenizer.encode(" ", run.data.text_length)) if lacking else None
        if speaks:
            for place in map(epath.Path, lacking):
                storage.write_whole(place, states.tobytes())

    jobs = make_jobs(streams, opened, targets, missing)
    reports = [Report(source.path, len(source), run.data.refused_share, in_order=True) for source in opened]

    def count_finished() -> None:
        for stream, parts, lacking in zip(streams, targets, missing, strict=True):
            _count_finished(tuple(parts.values()), set().union(*lacking.values()), reports[stream.source])

    agreement.primary(count_finished, CorpusError)
    rows, left = sum(len(stream.rows) for stream in streams), sum(job.rows for job in jobs)
    share = Share.of(program)
    with tqdm.tqdm(total=rows, initial=rows - left, unit="row", disable=not speaks, bar_format=_BAR) as bar:
        for job in jobs:
            parts = next(parts for stream, parts in zip(streams, targets, strict=True) if stream is job.stream)
            others = [target for part, target in parts.items() if part not in job.targets]
            _work(job, others, share, encode, run.data, reports[job.stream.source], bar)
    states = agreement.gather([report.state() for report in reports])  # and so all files are written
    for report, parts in zip(reports, zip(*states, strict=True), strict=True):
        report.restore(Report.merge(parts))
        if report.refused.total() > report.limit * report.rows:  # each process has seen but its own
            raise report.too_many()
        if speaks and report.refused:
            print(report)
    if speaks:
        print(f"caches are in {run.cache_directory}: train with the same config and cache_directory set to it")


def _read(config: ml_collections.ConfigDict, directory: epath.PathLike, sources: Sequence[str]) -> RunConfig:
    """The stage, with `directory` as its cache directory; refuses what can't be cached."""
    if "stages" in config:
        raise ConfigError(f"caches are made for one stage; name one behind the config file: {', '.join(config.stages)}")
    run = dataclasses.replace(run_config.read(config), cache_directory=str(storage.absolute(directory)))
    if not run.cached:
        raise ConfigError(
            f"cached is empty; say what to cache, of {', '.join(caches.PARTS)}: --config.cached=\"('latents', …)\""
        )
    if unknown := set(sources) - set(run.source_names):
        raise ConfigError(f"no source {min(unknown)!r}; the config has {', '.join(run.source_names)}")
    if run.init is None and run.after is not None:
        raise ConfigError(
            f"stage {run.stage!r} goes on from {run.after!r}; set init to where its frozen networks are, such as the "
            "init of the first stage"
        )
    return run


def _makers(run: RunConfig) -> set[str]:
    """Names of the networks that make what is cached."""
    return {CACHED[part] for part in run.cached}


def _work(
    job: Job,
    others: Sequence[Target],
    share: Share,
    encode: "_Encoder",
    config: DataConfig,
    report: Report,
    bar: tqdm.tqdm,
) -> None:
    """Makes the shards of a job; the stream's `others` have these shards already."""
    turns = tuple(rounds(job, share))
    needs_pixels = any(part != "instructions" for part in job.targets)
    rooms = in_chunks(range(share.sizes[share.group]))
    chunks = tuple((step[room.start : room.stop], len(room)) for turn in turns for step in turn.steps for room in rooms)
    read = _Read(job.source, job.stream, chunks, needs_pixels)
    elements = iter(read_ahead(grain.MapDataset.range(len(chunks)).map(read), config))
    number = 0
    try:
        for turn in turns:
            with contextlib.ExitStack() as stack:
                writers, refusals, known = {}, [], {}
                if share.writes and turn.shard is not None:
                    known = _refusals(others, turn.shard)
                    writers = {
                        name: stack.enter_context(_shard_writer(target, turn.shard))
                        for name, target in job.targets.items()
                    }
                # While the devices encode a batch, the one before is written.
                encoded: collections.deque[tuple[_Element, dict[str, jax.Array]]] = collections.deque()
                for count in turn.counts:
                    parts = []
                    for _ in rooms:
                        parts.append(next(elements, None))
                        if parts[-1] is None or parts[-1].pop("index") != number:
                            # Grain goes on silently without the elements of a worker process that was killed.
                            raise ChildProcessError(f"{job.source.path}: a worker process died; start again")
                        number += 1
                    element = _joined(parts, rooms)
                    encoded.append((element, encode(element.pop("arrays"), tuple(job.targets))))
                    if len(encoded) > 1:
                        refusals += _write(*encoded.popleft(), job, writers, known, report)
                    bar.update(count)
                while encoded:
                    refusals += _write(*encoded.popleft(), job, writers, known, report)
                for target in job.targets.values() if writers else ():  # before the shards appear
                    account = _refusals_path(target, turn.shard)
                    if refusals:
                        storage.write_whole(account, json.dumps(refusals).encode())
                    else:
                        account.unlink(missing_ok=True)  # of an attempt that was interrupted
    finally:
        elements.close()


_Element = dict[str, Any]
_Refusal = tuple[int, str, str, str]  # row, its place, cause, detail; see `Report.add`


def _joined(parts: Sequence[_Element], rooms: Sequence[range]) -> _Element:
    """The rows of this host in a batch. Only the last parts have fewer than they have room for."""
    return {
        "rows": [row for part in parts for row in part["rows"]],
        "digests": [mark for part in parts for mark in part["digests"]],
        "refusals": {
            room.start + place: refused
            for part, room in zip(parts, rooms, strict=True)
            for place, refused in part["refusals"].items()
        },
        "arrays": {name: np.concatenate([part["arrays"][name] for part in parts]) for name in parts[0]["arrays"]},
    }


def _write(
    element: _Element,
    encoded: Mapping[str, jax.Array],
    job: Job,
    writers: Mapping[str, ArrayRecordWriter],
    known: Mapping[int, _Refusal],
    report: Report,
) -> list[_Refusal]:
    """Appends the records of a batch to a shard of every part; the rows that can't be used, as the report has them.

    Those that are `known` from other parts, which read more of a row, are counted as well.
    """
    if not writers:
        return []
    refusals = []
    arrays = {name: _rows_here(array) for name, array in encoded.items()}
    for slot, (row, mark) in enumerate(zip(element["rows"], element["digests"], strict=True)):
        refused = element["refusals"].get(slot)
        if refused is not None:
            refusals.append((row, job.source.place(row), str(refused.cause), refused.detail))
        report.add(0, known.get(row) if refused is None else refusals[-1])
        for part, writer in writers.items():
            if refused is not None:
                writer.write(caches.refused_record(mark, refused))
            else:
                row_arrays = {name: arrays[name][slot] for name in caches.PARTS[part]}
                writer.write(caches.usable_record(mark, row_arrays, job.targets[part].description))
    return refusals


def _refusals_path(target: Target, shard: int) -> epath.Path:
    """Of the file that names a shard's refused rows, if there are any."""
    return target.path / f"{target.description.shard_name(shard)}.refused.json"


def _refusals(targets: Sequence[Target], shard: int) -> dict[int, _Refusal]:
    """The refused rows of a shard by number, of all these parts: one that reads no images alone misses bad ones."""
    found = {}
    for target in targets:
        with contextlib.suppress(FileNotFoundError):
            for refusal in json.loads(_refusals_path(target, shard).read_text()):
                found.setdefault(refusal[0], tuple(refusal))
    return found


def _count_finished(targets: Sequence[Target], missing: Set[int], report: Report) -> None:
    """Counts the rows of the shards that all parts have: the limit is for all rows, however often one starts again."""
    first = targets[0]  # the shards of all parts hold the same rows
    there = {file.name for target in targets for file in target.path.iterdir()}  # to ask for each file takes long
    for shard in sorted(set(range(first.description.shards)) - missing):
        refusals = _refusals(targets, shard) if _refusals_path(first, shard).name in there else {}
        report.read += len(first.description.shard_rows(shard)) - len(refusals)
        for refusal in refusals.values():
            report.add(0, refusal)


def _rows_here(array: jax.Array) -> np.ndarray:
    """The rows of a global array that this process's devices hold, in order; each once."""
    parts = {shard.index[0].indices(len(array))[0]: shard.data for shard in array.addressable_shards}
    return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])


@contextlib.contextmanager
def _shard_writer(target: Target, shard: int) -> Iterator[ArrayRecordWriter]:
    with storage.whole_file(target.path / target.description.shard_name(shard)) as file:
        writer = ArrayRecordWriter(file, caches.WRITER_OPTIONS)
        yield writer
        writer.close()


@dataclasses.dataclass(frozen=True)
class _Read:
    """Number of a chunk -> its rows, a part of this host's in a batch, ready to be encoded. Runs in the workers.

    Attributes:
      source, stream: of the rows.
      chunks: places in the stream, and how many rows there is room for.
      needs_pixels: whether images are read.
    """

    source: Source
    stream: Stream
    chunks: tuple[tuple[range, int], ...]
    needs_pixels: bool

    def __call__(self, index: int) -> _Element:
        """`index`; `rows`, `digests` and, by place, `refusals`; `arrays` `[room, ...]` as in `pipeline.Batches`."""
        places, room = self.chunks[index]
        rows = list(map(int, self.stream.rows[places.start : places.stop]))
        digests, refusals, samples = [], {}, []
        for slot, row in enumerate(rows):
            mark, arrays = None, self._blank()
            try:
                sample = self.source[row]
                mark = caches.digest(sample, self.source)
                arrays = self._arrays(sample)
            except Refused as refused:
                if refused.cause == Cause.UNREADABLE_IMAGE:
                    raise CorpusError(
                        f"{self.source.path}, {self.source.place(row)}: {refused.detail}. What can't be read now may "
                        "be readable later, and a cache would leave it out for good: see to the file, and start again"
                    ) from refused
                refusals[slot] = refused
            digests.append(mark)
            samples.append(arrays)
        samples += [self._blank()] * (room - len(samples))
        arrays = {name: np.stack([sample[name] for sample in samples]) for name in samples[0]}
        return {"index": index, "rows": rows, "digests": digests, "refusals": refusals, "arrays": arrays}

    def _arrays(self, sample: Sample) -> dict[str, np.ndarray]:
        prepare = self.stream.prepare
        return (prepare.pixels(sample) if self.needs_pixels else {}) | prepare.texts(sample)

    def _blank(self) -> dict[str, np.ndarray]:
        prepare = self.stream.prepare
        arrays = prepare.texts(_BLANK)
        if self.needs_pixels:
            image = np.zeros((prepare.height, prepare.width, 3), np.uint8)
            arrays["target"] = image
            if prepare.references:
                arrays["references"] = np.stack([image] * prepare.references)
            if prepare.masks_references:
                arrays["reference_mask"] = np.zeros(prepare.references, bool)
        return arrays


class _Encoder:
    """The networks on the mesh; compiled anew for each image size, number of references and choice of parts."""

    def __init__(self, program: Program, params: Params):
        self._program, self._params = program, params
        networks = program.networks

        def encode(params: Params, batch: Batch, parts: tuple[str, ...]) -> dict[str, jax.Array]:
            made = {}
            if "latents" in parts:
                made["moments"] = networks.image_moments(params, batch)
            if "instructions" in parts:
                made["instruction_states"] = networks.encode_text(params, batch.instruction_ids)
            if "teacher" in parts:
                made["teacher_image"], made["teacher_text"] = networks.teacher_vectors(params, batch)
            return made

        self._encode = jax.jit(encode, static_argnames="parts", out_shardings=parallel.batch_sharding(program.mesh))
        self._encode_text = jax.jit(networks.encode_text, out_shardings=parallel.replicated(program.mesh))

    def __call__(self, arrays: Mapping[str, np.ndarray], parts: tuple[str, ...]) -> dict[str, jax.Array]:
        """The arrays of these parts, `[batch, ...]`, of a batch of which every process gives its rows; queued."""
        with jax.set_mesh(self._program.mesh):
            made = self._encode(self._params, self._program.place(arrays, {}), parts=parts)
        for array in made.values():
            array.copy_to_host_async()
        return made

    def null_states(self, null_ids: np.ndarray) -> np.ndarray:
        """The text encoder's states of one text, int32 `[T]` -> `[T, E]`."""
        mesh = self._program.mesh
        with jax.set_mesh(mesh):
            return np.asarray(self._encode_text(self._params, parallel.replicate(null_ids[None], mesh)))[0]
