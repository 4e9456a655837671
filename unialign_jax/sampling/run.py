"""A sampling run: rows in, files out, on one mesh over any number of processes, resumable.

Every process streams all rows, but reads images, and writes results, only of those that its devices work on. The run is
a sequence of units (a batch, or the batches of one shard). A unit is always made of the same batches, so one that was
interrupted is made again bit by bit; which are left is read from the files that are there.
"""

import collections
import concurrent.futures
import dataclasses
import json
import math
import sys
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import tqdm
from absl import logging
from etils import epath

from unialign_jax import agreement, lineage, parallel, storage
from unialign_jax.data.samples import TEXT_TASKS
from unialign_jax.diffusion import flow_matching
from unialign_jax.inference import inputs, presets, programs
from unialign_jax.inference.batches import Batches
from unialign_jax.pipeline import TASKS, UniAlignPipeline
from unialign_jax.sampling.making import Maker, make_units
from unialign_jax.sampling.outputs import FORMATS, is_result, make_output
from unialign_jax.sampling.rows import FileRows, FlagRows, Rows
from unialign_jax.storage import write_whole

SETTINGS_FILE = "run.json"
_BAR = "{desc}{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}, {remaining} left, {rate_fmt}]"
# Options that are numbers: lowest, highest, whether whole.
_NUMBERS = {
    "steps": (1, programs.MAX_STEPS, True),
    "guidance": (0, math.inf, False),
    "reference_guidance": (0, math.inf, False),
}
_SHOWN = 100  # results that a run from flags names on standard output


@dataclasses.dataclass(frozen=True)
class Job:
    """What a run does.

    Attributes:
      checkpoint: see `UniAlignPipeline.from_pretrained`. A run's newest step is looked up once: a sampling run that
        goes on takes the step that it began with.
      task: in `pipeline.TASKS`.
      output: directory of the results, made if absent. With results of this very run in it, the run goes on.
      prompts: a text or JSONL file (`FileRows`); None: one request, `prompt` and `images`, made `count` times.
      prompt, images, count: see `FlagRows`.
      seed: of row 0; row i has seed + i where it says nothing else.
      options: of the pipeline's method: steps, guidance, size, ...
      dtype: compute dtype.
      batch: rows worked on at once over all devices; None: 8 for each part that the mesh splits a batch into. Fewer
        rows than that make a smaller batch.
      strategy: of the mesh over all devices, see `parallel.make_mesh`; weights are split as in training.
      format: of images, in `outputs.FORMATS`; texts become JSONL.
      shard_rows: rows of a shard, rounded up to whole batches.
      grid: images of an overview, grid.png; 0: none.
      average: of a run's checkpoint, take the moving average.
      progress: show a bar on standard error, or that nothing was left to do.
    """

    checkpoint: epath.PathLike
    task: str
    output: epath.PathLike
    prompts: epath.PathLike | None = None
    prompt: str | None = None
    images: tuple[str, ...] = ()
    count: int = 1
    seed: int = 0
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    dtype: str = "bfloat16"
    batch: int | None = None
    strategy: str = "fsdp"
    format: str = "png"
    shard_rows: int = 1024
    grid: int = 0
    average: bool = True
    progress: bool = True


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run has left behind.

    Attributes:
      rows: in all.
      failed: rows that this process could not make now, or, where all were done before, that no process could; files
        name them.
      shown: texts or files of the first results, of a run from flags that made them just now.
    """

    rows: int
    failed: int
    shown: tuple[str, ...]


class WrongJob(ValueError):
    """A request that can't be served as it is."""

    final = True  # see `cli.run`


class NothingMade(ValueError):
    """Not one row of a run could be made."""

    final = True  # see `cli.run`


def sample(job: Job) -> Result:
    """Does what a job says, or what is left of it. All processes call it with the same job.

    Raises:
      WrongJob: a request that can't be served, or `output` holds another run.
      NothingMade: not one of the rows could be made.
      FileNotFoundError: no such checkpoint or prompts.
    """
    rows = agreement.everywhere(lambda: _check(job), WrongJob, FileNotFoundError)
    requests = agreement.gather([rows.count, rows.digest])
    if differing := [i for i, request in enumerate(requests) if request != requests[0]]:
        raise WrongJob(f"{job.prompts} in process {differing[0]} is not what it is in process 0; expected one file")
    mesh = parallel.make_mesh(job.strategy)
    batch = _batch_size(job, mesh, rows.count)
    unit = batch if job.format == "png" and job.task not in TEXT_TASKS else -(-job.shard_rows // batch) * batch
    directory = storage.absolute(job.output)
    newest = lineage.pinned(job.checkpoint)
    identity = _identity(newest)
    weights, recorded = agreement.primary(lambda: _claim(job, directory, rows, batch, unit, newest, identity), WrongJob)
    if weights != newest:
        identity = _identity(weights)
    if None not in (identity, recorded) and identity != recorded:
        raise WrongJob(
            f"{directory} was begun with {weights}, where other weights are now, trained or converted anew since: "
            "choose another directory"
        )
    agreement.everywhere(lambda: _check_seen(directory), ValueError)
    output = make_output(job.format, directory, job.task, rows.count)
    batches = Batches(mesh, batch, single=True)
    owned = np.tile(batches.owned(batch), unit // batch)
    units = [(start, min(start + unit, rows.count)) for start in range(0, rows.count, unit)]
    missing = [output.missing(start, stop, owned[: stop - start]) for start, stop in units]
    # A unit that any process lacks is made by all of them.
    missing = np.any([_unpack(packed, len(units)) for packed in agreement.gather(_pack(missing))], axis=0)
    left = [span for span, is_missing in zip(units, missing, strict=True) if is_missing]

    failed, shown, why = 0, [], None
    speaks = job.progress and jax.process_index() == 0
    if not left:
        failed = agreement.primary(output.failures)
        if speaks:
            but = f", but for {failed} that could not be made" if failed else ""
            print(f"all {rows.count} rows are in {directory} already, made of {weights}{but}", file=sys.stderr)
        all_failed = failed
    else:
        agreement.everywhere(lambda: _check_images(job), ValueError)
        pipeline = UniAlignPipeline.from_pretrained(
            weights,
            mesh,
            job.dtype,
            average=job.average,
            max_batch=batch,
            single_size=True,
            progress=False,
        )
        make = Maker(pipeline, job.task, job.options, batch, strict=rows.strict)
        agreement.everywhere(lambda: make.check(rows), ValueError)
        facts = {"task": job.task, "dtype": job.dtype, **make.settled, "checkpoint": weights}
        done = rows.count - sum(stop - start for start, stop in left)
        unit_name = "text" if job.task in TEXT_TASKS else "image"
        with (
            tqdm.tqdm(total=rows.count, initial=done, unit=unit_name, disable=not speaks, bar_format=_BAR) as bar,
            concurrent.futures.ThreadPoolExecutor(2) as pool,
        ):
            writes: collections.deque[concurrent.futures.Future] = collections.deque()
            for (start, stop), made in make_units(make, rows, left, batch, bar, pool):
                errors = [error for _, _, error in made if error is not None]
                failed += len(errors)
                why = why or next(iter(errors), None)
                if isinstance(rows, FlagRows) and len(shown) < _SHOWN:
                    shown += output.told(start, stop, made)
                writes.append(pool.submit(output.write, start, stop, made, facts))
                if len(writes) > 2:  # results wait in memory for no more than this
                    writes.popleft().result()
            for write in writes:
                write.result()
        all_failed = sum(agreement.gather(failed))  # and all files are written
    if job.grid:
        agreement.primary(lambda: output.write_grid(min(job.grid, rows.count)))
    if failed:
        logging.warning("%d of %d rows could not be made; *.error* files in %s say why", failed, rows.count, directory)
    if all_failed == rows.count:
        raise NothingMade(
            f"not one of {rows.count} rows could be made; *.error* files in {directory} say why"
            + (f", the first: {why}" if why else "")
        )
    return Result(rows.count, failed, tuple(shown[:_SHOWN]))


def _check(job: Job) -> Rows:
    """The job's rows; refuses what can be known to be wrong before a model is read."""
    try:
        return _rows(job)
    except ValueError as error:
        raise WrongJob(str(error)) from error


def _rows(job: Job) -> Rows:
    if job.task not in TASKS:
        raise ValueError(f"task {job.task!r} is unknown; choose one of {', '.join(TASKS)}")
    if job.format not in FORMATS:
        raise ValueError(f"format {job.format!r} is unknown; choose one of {', '.join(FORMATS)}")
    if job.grid and (job.format != "png" or job.task in TEXT_TASKS):
        raise ValueError("a grid is made of PNG files; leave it out, or choose format png and a task that makes images")
    inputs.check_number("seed", job.seed, 0, 2**32 - 1, whole=True)
    for name in ("count", "shard_rows", "batch"):
        if getattr(job, name) is not None:
            inputs.check_number(name, getattr(job, name), 1, whole=True)
    if job.task in TEXT_TASKS:
        names = ("guidance", "reference_guidance", "guidance_interval", "negative_prompt")
        given = [name for name in names if name in job.options]
        if given:
            raise ValueError(f"{job.task} takes no {' or '.join(given)}: it makes text")
    elif "fast" in job.options:
        raise ValueError(f"{job.task} takes no fast: it makes images")
    for name, (low, high, whole) in _NUMBERS.items():
        if name in job.options:
            inputs.check_number(name, job.options[name], low, high, whole=whole)
    if "guidance_interval" in job.options:
        flow_matching.check_interval(job.options["guidance_interval"])
    if "protocol" in job.options:
        presets.protocol(job.options["protocol"])
    if job.options.get("aspect") is not None:
        inputs.check_aspect(job.options["aspect"])
        if job.options.get("size") is not None:
            raise ValueError("size and aspect are both given; give one")
    if job.task == "generate" and job.options.get("reference_guidance", 1) != 1:
        raise ValueError("generate takes no reference_guidance: it has no reference images")
    if job.prompts is None:
        return FlagRows(job.task, job.seed, job.prompt, job.images, job.count)
    if job.prompt or job.images or job.count != 1:
        raise ValueError("a file of prompts says what to make; leave prompt, images and count out")
    return FileRows(job.task, job.seed, job.prompts)


def _check_images(job: Job) -> None:
    """Reads each image that flags name once, before a model is read."""
    for path in dict.fromkeys(job.images):
        inputs.pixels(path, 8, 8)


def _batch_size(job: Job, mesh: jax.sharding.Mesh, count: int) -> int:
    parts = Batches(mesh, 1).sizes[0]
    if job.batch is not None:
        parallel.check_batch(mesh, job.batch)
    largest = job.batch or 8 * parts
    sizes = Batches(mesh, largest).sizes
    return next((size for size in sizes if size >= count), largest)


def _identity(weights: str) -> dict[str, Any] | None:
    """See `lineage.identity_of`; of a public directory there is none. Weights that are gone are missed when read."""
    if lineage.is_public(weights):
        return None
    try:
        return lineage.identity_of(str(lineage.locate(weights)))
    except FileNotFoundError:
        return None


def _claim(
    job: Job, directory: epath.Path, rows: Rows, batch: int, unit: int, newest: str, identity: dict[str, Any] | None
) -> tuple[str, dict[str, Any] | None]:
    """Notes in the directory what is made there, and of which weights: these, or those that it was begun with.

    Refuses a directory in which something else was made. Returns where the weights are, and which they were.
    """
    settings = {
        "task": job.task,
        "checkpoint": str(job.checkpoint),
        "average": job.average,
        "rows": rows.count,
        "requests": rows.digest,
        "seed": job.seed,
        "options": {key: list(value) if isinstance(value, tuple) else value for key, value in job.options.items()},
        "dtype": job.dtype,
        "batch": batch,
        "unit": unit,
        "format": job.format,
    }
    if job.format != "png" or job.task in TEXT_TASKS:
        settings["processes"] = jax.process_count()  # each has shards of its own
    file = directory / SETTINGS_FILE
    directory.mkdir(parents=True, exist_ok=True)
    found = json.loads(file.read_text()) if file.exists() else {}
    changed = [
        # Of the requests, only a digest is kept.
        "other prompts or images" if key == "requests" else f"{key} was {found.get(key)!r} and is {value!r}"
        for key, value in settings.items()
        if found.get(key) != value
    ]
    # A run that failed before it made anything leaves its settings, which bind nobody.
    binding = any(map(is_result, directory.glob("*")))  # not `iterdir`: nothing is in a bucket that is not a file
    if binding and not found:
        raise WrongJob(f"{directory} holds results, and no {SETTINGS_FILE} that says of what; choose another directory")
    if binding and changed:
        raise WrongJob(
            f"{directory} holds another sampling run ({'; '.join(changed)}); go on with its settings, or choose "
            "another directory"
        )
    storage.clear_partial(directory)
    if not binding:
        found = settings | {"weights": newest, "identity": identity}
        write_whole(file, json.dumps(found, indent=2).encode() + b"\n")
    weights = found.get("weights", newest)
    if weights != newest and not epath.Path(weights).exists():
        raise WrongJob(
            f"{directory} was begun with {weights}, which training has removed since: choose another directory, and "
            "keep what is sampled from (checkpoint.keep_period)"
        )
    return weights, found.get("identity")


def _check_seen(directory: epath.Path) -> None:
    if not (directory / SETTINGS_FILE).exists():
        raise WrongJob(f"output {directory} is not there on every host; expected a directory that all of them share")


def _pack(flags: list[bool]) -> str:
    return np.packbits(flags).tobytes().hex()


def _unpack(packed: str, count: int) -> np.ndarray:
    return np.unpackbits(np.frombuffer(bytes.fromhex(packed), np.uint8), count=count).astype(bool)
