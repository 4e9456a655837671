"""The input pipeline alone, beside a PyTorch DataLoader that decodes and resizes the same files.

Both make batches of 512 x 512 pixels of JPEG photographs of 640 x 480: from image files, and ours from ArrayRecord
shards as well, and from caches, in which the latents of such images lie ready. Ours also shuffles, counts and tokenizes
captions. What to compare is images per second of CPU time, of this process and its workers: it does not depend on what
else the machine is doing.
"""

import itertools
import json
import multiprocessing
import os
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from absl import logging
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from unialign_jax.benchmarks.photos import Photos
from unialign_jax.data import caches
from unialign_jax.data.build import build
from unialign_jax.data.config import DataConfig
from unialign_jax.data.jsonl import JsonlSource
from unialign_jax.data.pipeline import make_batches
from unialign_jax.data.sources import SourceConfig
from unialign_jax.data.tokenizer import Tokenizer

SIZE = 512
BATCH = 16
_PHOTOS = 256
_WORKERS = (0, os.cpu_count())
_WARM_UP = 4  # batches
_ROUNDS = 3
_BATCHES = 20  # per round


def run() -> dict[str, Any]:
    """Times every loader on drawn photograph-like images, in this process and with one worker process per core.

    Returns:
      `{"settings": ..., "results": [{"loader", "workers", "images_per_cpu_second", "images_per_second"}, ...]}`; rates
      are medians of the rounds, in which the loaders take turns. PyTorch's is absent where it is not installed.
    """
    with tempfile.TemporaryDirectory() as folder:
        rows = _draw_photos(pathlib.Path(folder))
        shards = os.path.join(folder, "shards")
        build(JsonlSource(rows), shards, name="photos", rows_per_shard=64, refused_share=0.5)
        source = JsonlSource(rows)
        files = [source[i].target for i in range(len(source))]
        tokenizer = Tokenizer.learn([f"a photograph number {i}" for i in range(100)], 40)
        cached = _draw_latents(pathlib.Path(folder) / "caches", rows)
        results = []
        for workers in _WORKERS:
            makers = {
                "ours, image files": lambda w: _ours(SourceConfig(rows, task="generate"), tokenizer, w),
                "ours, ArrayRecord": lambda w: _ours(SourceConfig(shards, "tfds", "generate"), tokenizer, w),
                "ours, cached latents": lambda w: _ours(SourceConfig(rows, task="generate"), tokenizer, w, cached),
                "PyTorch DataLoader": lambda w: _torch(files, w),
            }
            results += _compare(makers, workers)
    settings = {"size": SIZE, "batch": BATCH, "images": len(files)}
    return {"settings": settings, "results": results}


def _compare(makers: dict[str, Callable[[int], Iterator]], workers: int) -> list[dict[str, Any]]:
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in makers}
    for _ in range(_ROUNDS):
        for name, make in makers.items():
            try:
                batches = make(workers)
            except ModuleNotFoundError as error:
                logging.warning("%s is left out: %s", name, error)
                continue
            rates[name].append(_rates(batches))
    return [
        {
            "loader": name,
            "workers": workers,
            "images_per_cpu_second": round(float(np.median([rate[0] for rate in measured])), 1),
            "images_per_second": round(float(np.median([rate[1] for rate in measured])), 1),
        }
        for name, measured in rates.items()
        if measured
    ]


def _rates(batches: Iterator) -> tuple[float, float]:
    """Images per second of CPU time and of the clock."""
    for batch in itertools.islice(batches, _WARM_UP):
        assert np.shape(batch)[0] == BATCH
    cpu, clock = _cpu_seconds(), time.perf_counter()
    images = sum(len(batch) for batch in itertools.islice(batches, _BATCHES))
    cpu, clock = _cpu_seconds() - cpu, time.perf_counter() - clock
    batches.close()
    return images / cpu, images / clock


def _cpu_seconds() -> float:
    """User and system time so far, of this process and of its live children."""
    ticks = 0
    for child in multiprocessing.active_children():
        # After the name, which may hold spaces: fields 14 and 15 of proc(5).
        fields = pathlib.Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def _ours(
    source: SourceConfig, tokenizer: Tokenizer, workers: int, cached: caches.Caches | None = None
) -> Iterator[np.ndarray]:
    config = DataConfig((source,), BATCH, SIZE, SIZE, text_length=64, threads=1, workers=workers, refused_share=0.5)
    with make_batches(config, tokenizer, caches=cached) as batches:
        for batch in batches:
            yield batch["moments" if cached else "target"]


def _torch(files: list[str], workers: int) -> Iterator[Any]:
    # Late: a machine that trains has no need of it.
    import torch.utils.data

    torch.set_num_threads(1)  # as in its workers: threads that wait for work would count as CPU time
    loader = torch.utils.data.DataLoader(
        Photos(files, SIZE),
        BATCH,
        sampler=torch.utils.data.RandomSampler(files, replacement=True, num_samples=1 << 30),
        num_workers=workers,
        multiprocessing_context="spawn" if workers else None,
    )

    def batches() -> Iterator[Any]:
        yield from loader

    return batches()


def _draw_latents(directory: pathlib.Path, rows: str) -> caches.Caches:
    """A cache of what an autoencoder might make of the rows: mean and log variance of 16 channels, an eighth a side."""
    made = caches.Caches(str(directory), ("photos",), {"latents": {}})
    source, rng = JsonlSource(rows, "generate"), np.random.default_rng(0)
    numbers, side = np.arange(len(source)), SIZE // 8
    description = caches.Description(
        settings=made.all_settings("latents", source, numbers, references=0),
        weights=0,
        arrays={"moments": ("float32", (1, side, side, 32))},
        rows=len(source),
        rows_per_shard=64,
    )
    path = pathlib.Path(made.path(0, (SIZE, SIZE), "latents"))
    path.mkdir(parents=True)
    (path / caches.DESCRIPTION_FILE).write_text(description.to_json())
    for shard in range(description.shards):
        writer = ArrayRecordWriter(str(path / description.shard_name(shard)), caches.WRITER_OPTIONS)
        for row in description.shard_rows(shard):
            arrays = {"moments": rng.standard_normal((1, side, side, 32), np.float32)}
            writer.write(caches.usable_record(caches.digest(source[row], source), arrays, description))
        writer.close()
    return made


def _draw_photos(folder: pathlib.Path) -> str:
    """Coarse shapes and fine grain, which JPEG packs about as it does photographs."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(_PHOTOS):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((640, 480), Image.BICUBIC)
        pixels = np.asarray(coarse) + rng.normal(0, 6, (480, 640, 1))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{i}.jpg", quality=90)
        caption = f"a photograph number {i}"
        rows.append({"image": [f"{i}.jpg"], "conversations": [{"from": "human", "value": caption}]})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "rows.jsonl")
