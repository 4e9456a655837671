"""Scenes as a TFDS data set in ArrayRecord shards: made in parallel from a seed, no download, no TensorFlow.

    from unialign_jax.data.scenes import builder                    # registers the data set
    scenes = tfds.builder("scenes/edit_32", data_dir=DIR)           # or builder.Scenes(config=ScenesConfig(...))
    scenes.download_and_prepare()
    source = scenes.as_data_source("train")                         # also test, attributes, relations, wordings

Record i of a split is `tasks.draw(task, i, subset=split)`, whatever the number of worker processes.
"""

import concurrent.futures
import dataclasses
import multiprocessing
from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds

from unialign_jax.data.samples import TASKS
from unialign_jax.data.scenes import corpus, tasks
from unialign_jax.data.workers import end_with_parent, usable_cpus

_CHUNK = 256
IMAGE_SIZES = (32, 64, 256)


@dataclasses.dataclass(eq=False)
class ScenesConfig(tfds.core.BuilderConfig):
    """One task at one image size; the names of the ready ones are TASK_SIZE.

    Attributes:
      task: one of `data.samples.TASKS`.
      size: side of the images in pixels.
      train, held_out: examples of the split train, and of each of the others.
      seed, counts: see `tasks.draw`.
    """

    task: str = "generate"
    size: int = 32
    train: int = 50_000
    held_out: int = 1_000
    seed: int = 0
    counts: tuple[int, ...] = (1, 2, 3, 4)


class Scenes(tfds.core.GeneratorBasedBuilder):
    """Coloured shapes: images, captions, edits, maps, compositions, questions. Fields are those of `Sample`.

    Args:
      workers: processes that generate, by default one for each CPU that may be used; 1 generates in this one. More
        need a `__main__` guard in the script.
      **kwargs: of `tfds.core.GeneratorBasedBuilder`.
    """

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [
        ScenesConfig(name=f"{task}_{size}", task=task, size=size) for task in TASKS for size in IMAGE_SIZES
    ]

    def __init__(self, *, workers: int | None = None, file_format: str = "array_record", **kwargs: Any):
        self._workers = usable_cpus() if workers is None else workers
        super().__init__(file_format=file_format, **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        image = {"shape": (self.builder_config.size, self.builder_config.size, 3), "encoding_format": "png"}
        texts = ("task", "caption", "instruction", "question", "answer", "scene", "kind")
        features = {
            "target": tfds.features.Image(**image),
            "references": tfds.features.Sequence(tfds.features.Image(**image)),
            **{name: tfds.features.Text() for name in texts},
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description="Scenes of coloured shapes with exact answers. 'scene' is the target's, as JSON.",
            features=tfds.features.FeaturesDict(features),
            disable_shuffling=True,  # record i is example i
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        del dl_manager
        config = self.builder_config
        return {
            subset: self._generate_examples(subset, config.train if subset == "train" else config.held_out)
            for subset in tasks.SETS
            # One thing alone stands in no relation.
            if not (subset == "relations" and max(config.counts) < 2)
        }

    def _generate_examples(self, subset: str, count: int) -> Iterator[tuple[int, dict[str, Any]]]:
        config = self.builder_config
        jobs = [
            corpus.Job(
                config.task, config.size, config.seed, subset, tuple(config.counts), range(i, min(i + _CHUNK, count))
            )
            for i in range(0, count, _CHUNK)
        ]
        workers = min(self._workers, len(jobs))
        if workers < 2:
            for job in jobs:
                yield from corpus.records(job)
            return
        context = multiprocessing.get_context("spawn")  # forks of a process with threads may hang
        with concurrent.futures.ProcessPoolExecutor(workers, context, initializer=end_with_parent) as pool:
            for records in pool.map(corpus.records, jobs):
                yield from records
