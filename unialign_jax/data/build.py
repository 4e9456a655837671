"""Any source -> a TFDS dataset in ArrayRecord shards: in parallel, and taken up again where it was interrupted.

A finished dataset holds usable rows only: every image was decoded once, and what can't be used is named in
`refused.json`. What merely can't be read now ends the work: it would be left out for good. Images are stored as the
bytes of their files; the sizes of the targets stand beside the shards.
"""

import concurrent.futures
import contextlib
import functools
import itertools
import json
import math
import multiprocessing
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
import tqdm
from array_record.python import array_record_module
from etils import epath
from tensorflow_datasets.core import example_serializer

from unialign_jax import storage
from unialign_jax.data import images
from unialign_jax.data.buckets import save_sizes
from unialign_jax.data.report import CorpusError, Report
from unialign_jax.data.samples import Cause, Refused, Sample
from unialign_jax.data.sources import Source
from unialign_jax.data.tfds_source import TfdsSource
from unialign_jax.data.workers import end_with_parent

FEATURES = tfds.features.FeaturesDict(
    {
        "task": tfds.features.Text(),
        "target": tfds.features.Image(),
        "references": tfds.features.Sequence(tfds.features.Image()),
        "caption": tfds.features.Text(),
        "instruction": tfds.features.Text(),
        "question": tfds.features.Text(),
        "answer": tfds.features.Text(),
    }
)
REFUSED_FILE = "refused.json"
_TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
# One record is read at a time, and images are compressed already.
_WRITER_OPTIONS = "group_size:1,uncompressed"
_WORK = ".unfinished"
_SPLIT = "train"
_VERSION = 1


def build(
    source: Source,
    directory: epath.PathLike,
    *,
    name: str = "samples",
    rows_per_shard: int = 2000,
    processes: int = 1,
    refused_share: float = 0.01,
) -> Report:
    """Writes a source's usable rows as the split "train" of a TFDS dataset; `TfdsSource(directory)` reads it.

    Called again with the same arguments after an interruption, it makes the shards that are missing.

    Args:
      source: where the samples come from.
      directory: of the dataset, local or `gs://`; made if absent.
      name: of the dataset, as TFDS allows it (lower case, underscores).
      rows_per_shard: rows of the source that go into one file.
      processes: that work at it. More than 1 needs a `__main__` guard in the script.
      refused_share: highest share of rows that may be unusable.

    Returns:
      The account of the rows; it is also in the dataset's `refused.json`.

    Raises:
      CorpusError: too many rows can't be used, or something can't be read that is there.
      ValueError: the directory holds something else, or an argument is out of its range.
    """
    if rows_per_shard < 1 or processes < 1:
        raise ValueError(f"rows_per_shard is {rows_per_shard} and processes {processes}, expected 1 or more of each")
    if not re.fullmatch("[a-z][a-z0-9_]*", name):
        raise ValueError(f"name is {name!r}, expected what TFDS takes: a lower-case letter, then letters, digits and _")
    directory = epath.Path(directory)
    shards = math.ceil(len(source) / rows_per_shard)
    plan = {
        "version": _VERSION,
        "name": name,
        "source": source.path,
        "fingerprint": source.fingerprint(),
        "rows_per_shard": rows_per_shard,
    }
    _begin(directory, plan)
    storage.clear_partial(directory)
    write = functools.partial(_write_shard, str(directory), name, shards, rows_per_shard)
    there = {path.name for path in (directory / _WORK).iterdir()}
    missing = [shard for shard in range(shards) if _account_path(directory, shard).name not in there]
    written = sorted(set(range(shards)) - set(missing))
    report = Report(source.path, len(source), refused_share, in_order=True, max_named=len(source))
    with tqdm.tqdm(total=len(source), desc=f"writing {directory}", unit="row") as bar:
        for account in itertools.chain(
            (_read_account(directory, shard) for shard in written),
            _run(write, source, missing, processes),
        ):
            for _ in range(account["rows"]):
                report.add(0)
            for refusal in account["refusals"]:
                report.add(0, tuple(refusal))
            bar.update(account["rows"] + len(account["refusals"]))
    _finish(directory, plan, shards, report)
    return report


def _begin(directory: epath.Path, plan: dict[str, Any]) -> None:
    work, path = directory / _WORK, directory / _WORK / "plan.json"
    if (directory / "dataset_info.json").exists() and not path.exists():
        raise ValueError(f"{directory} holds a finished dataset; choose another directory, or remove it")
    if path.exists():
        begun = json.loads(path.read_text())
        for key, value in plan.items():
            if begun.get(key) != value:
                raise ValueError(
                    f"{directory} was begun with {key} = {begun.get(key)!r}, not {value!r}; go on with that, or remove "
                    "the directory"
                )
    else:
        work.mkdir(parents=True, exist_ok=True)
        storage.write_whole(path, json.dumps(plan).encode())


def _run(write: functools.partial, source: Source, shards: list[int], processes: int) -> Iterator[dict[str, Any]]:
    """The accounts of the shards, in order."""
    if processes == 1 or len(shards) <= 1:
        yield from (write(source, shard) for shard in shards)
        return
    with concurrent.futures.ProcessPoolExecutor(
        min(processes, len(shards)),
        # Forked processes would inherit the locks of this one's threads.
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_Worker.start,
        initargs=(write, source),
    ) as pool:
        try:
            yield from pool.map(_Worker.write, shards)  # which keeps no account that it has handed on
        except concurrent.futures.process.BrokenProcessPool as error:
            raise ChildProcessError(
                f"{source.path}: a worker process was killed, as happens where memory is short; start again, with "
                "fewer --processes"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


class _Worker:
    """What a worker process is given once: a large source would be slow to send with every shard."""

    @classmethod
    def start(cls, write: functools.partial, source: Source) -> None:
        end_with_parent()
        cls._write = functools.partial(write, source)

    @classmethod
    def write(cls, shard: int) -> dict[str, Any]:
        return cls._write(shard)


def _write_shard(
    directory: str, name: str, shards: int, rows_per_shard: int, source: Source, shard: int
) -> dict[str, Any]:
    """Writes one shard and then its account, which says that the shard is complete."""
    folder = epath.Path(directory)
    serializer = example_serializer.ExampleSerializer(FEATURES.get_serialized_info())
    sizes, refusals, size = [], [], 0
    with (
        storage.whole_file(folder / _shard_name(name, shard, shards)) as file,
        contextlib.closing(array_record_module.ArrayRecordWriter(file, _WRITER_OPTIONS)) as writer,
    ):
        for row in range(shard * rows_per_shard, min((shard + 1) * rows_per_shard, len(source))):
            try:
                example, target_size = _example(source[row])
            except Refused as refused:
                if refused.cause == Cause.UNREADABLE_IMAGE:
                    raise CorpusError(
                        f"{source.path}, {source.place(row)}: {refused.detail}. What can't be read now may be readable "
                        "later, and the dataset would leave it out for good: see to the file, or take the row out, "
                        "and start again"
                    ) from refused
                refusals.append((row, source.place(row), str(refused.cause), refused.detail))
                continue
            record = serializer.serialize_example(FEATURES.encode_example(example))
            writer.write(record)
            sizes.append(target_size)
            size += len(record)
    account = {"rows": len(sizes), "bytes": size, "sizes": sizes, "refusals": refusals}
    storage.write_whole(_account_path(folder, shard), json.dumps(account).encode())
    return account


def _example(sample: Sample) -> tuple[dict[str, Any], tuple[int, int]]:
    """The example, and the height and width of its target. Every image is decoded, to see that it can be."""
    target, *references = (images.checked(image) for image in (sample.target, *sample.references))
    texts = {name: getattr(sample, name) for name in ("task", "caption", "instruction", "question", "answer")}
    return texts | {"target": target, "references": references}, images.upright_size(target)


def _finish(directory: epath.Path, plan: dict[str, Any], shards: int, report: Report) -> None:
    lengths, size, sizes = [], 0, []
    for shard in range(shards):
        account = _read_account(directory, shard)
        lengths.append(account["rows"])
        size += account["bytes"]
        sizes.append(np.array(account["sizes"], np.int32).reshape(-1, 2))
    template = tfds.core.ShardedFileTemplate(
        data_dir=directory,
        dataset_name=plan["name"],
        split=_SPLIT,
        filetype_suffix="array_record",
        template=_TEMPLATE,
    )
    split = tfds.core.SplitInfo(
        name=_SPLIT,
        shard_lengths=lengths,
        num_bytes=size,
        filename_template=template,
    )
    (directory / REFUSED_FILE).write_text(json.dumps(report.state(), indent=1))
    tfds.folder_dataset.write_metadata(
        data_dir=directory,
        features=FEATURES,
        split_infos=[split],
        filename_template=_TEMPLATE,
        description=f"Made of {plan['source']}.",
        check_data=False,
    )
    dataset = TfdsSource(directory)
    save_sizes(epath.Path(dataset.sizes_path), dataset.targets_fingerprint(), np.concatenate(sizes))
    (directory / _WORK).rmtree()


def _shard_name(name: str, shard: int, shards: int) -> str:
    return f"{name}-{_SPLIT}.array_record-{shard:05d}-of-{shards:05d}"


def _account_path(directory: epath.Path, shard: int) -> epath.Path:
    return directory / _WORK / f"{shard:05d}.json"


def _read_account(directory: epath.Path, shard: int) -> dict[str, Any]:
    return json.loads(_account_path(directory, shard).read_text())
