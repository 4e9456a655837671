"""What is to be done for the caches of a stage: which shards, of which parts, and by whom."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Self

import jax
from etils import epath

from unialign_jax import agreement, storage
from unialign_jax.data import caches
from unialign_jax.data.caches import CacheMismatch, Caches, Description
from unialign_jax.data.report import CorpusError
from unialign_jax.data.sources import Source
from unialign_jax.data.streams import Stream
from unialign_jax.training.program import Program


@dataclasses.dataclass(frozen=True)
class Target:
    """One cache to be made: of one part and stream."""

    path: epath.Path
    description: Description

    def claim(self) -> list[int]:
        """Notes in the directory what it will hold, or checks what is noted there. Returns the missing shards."""
        try:
            begun = caches.read_description(self.path)
        except FileNotFoundError:
            self.path.mkdir(parents=True, exist_ok=True)
            storage.write_whole(self.path / caches.DESCRIPTION_FILE, self.description.to_json().encode())
            return list(range(self.description.shards))
        begun.check(self.path, self.description.settings)
        begun.check_weights(self.path, self.description.weights)
        if begun.rows_per_shard != self.description.rows_per_shard:
            raise CacheMismatch(
                f"{self.path} was begun with {begun.rows_per_shard} rows per shard, not "
                f"{self.description.rows_per_shard}; go on with that, or remove the directory"
            )
        storage.clear_partial(self.path)
        return begun.missing(self.path)

    def check_seen(self) -> None:
        """Refuses a directory that another process has claimed and this one can't see."""
        if not (self.path / caches.DESCRIPTION_FILE).exists():
            raise CorpusError(f"{self.path} is not there on every host; expected a directory that all of them share")


def make_targets(
    streams: Sequence[Stream],
    opened: Sequence[Source],
    places: Caches,
    weights: Mapping[str, int],
    program: Program,
    rows_per_shard: int,
) -> list[dict[str, Target]]:
    """The caches of each stream, by part."""
    targets = []
    for stream in streams:
        config, source = program.run.data.sources[stream.source], opened[stream.source]
        batch = program.batch(config, stream.size)
        parts = {}
        for part in program.run.cached:
            leaves = {name: getattr(batch, name) for name in caches.PARTS[part]}
            description = Description(
                settings=places.all_settings(part, source, stream.rows, config.references),
                weights=weights[part],
                arrays={name: (leaf.dtype.name, leaf.shape[1:]) for name, leaf in leaves.items()},
                rows=len(stream.rows),
                rows_per_shard=rows_per_shard,
            )
            parts[part] = Target(places.path(stream.source, stream.size, part), description)
        targets.append(parts)
    return targets


def estimate(targets: Sequence[Mapping[str, Target]], missing: Sequence[Mapping[str, list[int]]]) -> str:
    """What will be written: a line for each cache, and the sum."""
    lines, total = [], 0
    for parts, lacking in zip(targets, missing, strict=True):
        for part, target in parts.items():
            about, shards = target.description, lacking[part]
            todo = sum(len(about.shard_rows(shard)) for shard in shards) * about.row_bytes
            total += todo
            lines.append(
                f"{target.path}: {about.rows} rows x {about.row_bytes / 1e6:.3g} MB; {len(shards)} of {about.shards} "
                f"shards to make, {todo / 1e9:.3g} GB"
            )
    return "\n".join([*lines, f"{total / 1e9:.3g} GB to write"])


def _by_parts(missing: Mapping[str, list[int]]) -> dict[tuple[str, ...], list[int]]:
    """Shards by the parts that they are missing of: images are decoded once for all of these."""
    shards: dict[tuple[str, ...], list[int]] = {}
    for shard in sorted(set().union(*missing.values())):
        shards.setdefault(tuple(part for part in missing if shard in missing[part]), []).append(shard)
    return shards


@dataclasses.dataclass(frozen=True)
class Job:
    """Shards of one stream, of the same parts."""

    stream: Stream
    source: Source
    targets: Mapping[str, Target]
    shards: Sequence[int]

    @property
    def description(self) -> Description:
        """Of any of the parts: their shards hold the same rows."""
        return next(iter(self.targets.values())).description

    @property
    def rows(self) -> int:
        return sum(len(self.description.shard_rows(shard)) for shard in self.shards)


@dataclasses.dataclass(frozen=True)
class Share:
    """Which part of every global batch this process has.

    Attributes:
      sizes: rows of a batch that each group of processes holds; groups work at shards of their own.
      group: this process's.
      writes: whether this process writes for its group.
    """

    sizes: tuple[int, ...]
    group: int
    writes: bool

    @classmethod
    def of(cls, program: Program) -> Self:
        mine = list(program.rows())
        everyone = agreement.gather(mine)
        groups = sorted({tuple(rows) for rows in everyone})
        writer = everyone.index(mine)
        return cls(tuple(map(len, groups)), groups.index(tuple(mine)), writer == jax.process_index())


@dataclasses.dataclass(frozen=True)
class Round:
    """One shard for each group, as long as there are some.

    Attributes:
      shard: of this group; None: the others work.
      steps: the stream's rows, by place, that this group puts into each batch; some are empty.
      counts: rows in each batch, over all groups.
    """

    shard: int | None
    steps: tuple[range, ...]
    counts: tuple[int, ...]


def make_jobs(
    streams: Sequence[Stream],
    opened: Sequence[Source],
    targets: Sequence[Mapping[str, Target]],
    missing: Sequence[Mapping[str, Sequence[int]]],
) -> list[Job]:
    """All that is missing.

    Args:
      streams: of the stage.
      opened: its sources.
      targets, missing: of each stream, by part.
    """
    return [
        Job(stream, opened[stream.source], {part: parts[part] for part in which}, shards)
        for stream, parts, lacking in zip(streams, targets, missing, strict=True)
        for which, shards in _by_parts(lacking).items()
    ]


def rounds(job: Job, share: Share) -> Iterator[Round]:
    """The work of a job, shard by shard for each group."""
    groups = len(share.sizes)
    for start in range(0, len(job.shards), groups):
        shards = job.shards[start : start + groups]
        steps = [
            [rows[first : first + size] for first in range(0, len(rows), size)]
            for rows, size in zip(map(job.description.shard_rows, shards), share.sizes, strict=False)
        ]
        longest = max(map(len, steps))
        steps = [[*group, *[range(0)] * (longest - len(group))] for group in steps]
        here = share.group < len(shards)
        yield Round(
            shards[share.group] if here else None,
            tuple(steps[share.group] if here else [range(0)] * longest),
            tuple(sum(map(len, step)) for step in zip(*steps, strict=True)),
        )
