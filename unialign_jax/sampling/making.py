"""From rows to results: batches of rows are read ahead, while the pipeline makes those before them."""

import concurrent.futures
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tqdm

from unialign_jax.inference import inputs, presets
from unialign_jax.pipeline import UniAlignPipeline
from unialign_jax.sampling.outputs import Made
from unialign_jax.sampling.rows import Row, Rows


@dataclasses.dataclass
class _Prepared:
    """A batch whose images are read: those of other processes are grey, those of unusable rows too."""

    rows: list[Row]
    images: list[list[np.ndarray]]
    errors: dict[int, str]


class Maker:
    """Turns batches of rows into results.

    Attributes:
      settled: the options, and what the protocol sets where they say nothing.
    """

    def __init__(self, pipeline: UniAlignPipeline, task: str, options: Mapping[str, Any], batch: int, *, strict: bool):
        """See the class.

        Args:
          pipeline: makes one size of batches, `batch`.
          task: in `samples.TASKS`.
          options: of the pipeline's method.
          batch: rows of a batch.
          strict: whether a row that can't be made is an error, see `Rows`.
        """
        self._pipeline, self._task, self._options, self._strict = pipeline, task, options, strict
        self._held, self._owned = pipeline.batches.held(batch), pipeline.batches.owned(batch)
        self._size = inputs.image_size(pipeline.networks, pipeline.size, options.get("size"), options.get("aspect"))
        self._grey = np.full((*self._size, 3), 127, np.uint8)
        protocol = presets.protocol(options["protocol"]) if "protocol" in options else pipeline.protocol
        self.settled = {**options, **protocol.settle(task, **options)}

    def check(self, rows: Rows) -> None:
        """Refuses strict rows whose question is too long, in every process, before any makes one."""
        if self._strict and self._task == "answer":
            for prompt in {row.prompt for row in rows}:
                self._pipeline.encode_question(prompt, self._options.get("protocol"))

    def read(self, rows: list[Row] | None) -> _Prepared | None:
        """Reads the images of the rows that this process works on, and finds out which rows can't be made."""
        if rows is None:
            return None
        images, errors = [], {}
        for i, row in enumerate(rows):
            pictures = [self._grey] * max(len(row.images), self._task != "generate")
            try:
                if row.error is not None:
                    raise ValueError(row.error)
                if self._task == "answer":
                    self._pipeline.encode_question(row.prompt, self._options.get("protocol"))
                if self._held[i]:
                    pictures = [inputs.pixels(path, *self._size) for path in row.images]
            except ValueError as error:
                if self._strict:
                    raise
                errors[i] = str(error)
            images.append(pictures)
        return _Prepared(rows, images, errors)

    def __call__(self, prepared: _Prepared) -> list[Made]:
        """The results of the rows that this process owns."""
        rows, pipeline = prepared.rows, self._pipeline
        if all(row.error is not None for row in rows):  # which all processes know
            return self._owned_of(prepared, [None] * len(rows))
        prompts = [" " if i in prepared.errors else row.prompt for i, row in enumerate(rows)]
        options = dict(self._options) | {"seed": [row.seed for row in rows], "gather": False}
        if self._task == "generate":
            made = pipeline.generate(prompts, output="array", **options)
        elif self._task == "caption":
            made = pipeline.caption([images[0] for images in prepared.images], **options)
        elif self._task == "answer":
            made = pipeline.answer([images[0] for images in prepared.images], prompts, **options)
        else:
            made = pipeline.compose(prepared.images, prompts, output="array", **options)
        return self._owned_of(prepared, made)

    def _owned_of(self, prepared: _Prepared, made: Sequence[np.ndarray | str | None]) -> list[Made]:
        rows = prepared.rows
        errors = [prepared.errors.get(i) for i in range(len(rows))]
        return [x for x, mine in zip(zip(rows, made, errors, strict=True), self._owned, strict=False) if mine]


def make_units(
    make: Maker, rows: Rows, left: list, batch: int, bar: tqdm.tqdm, pool: concurrent.futures.Executor
) -> Iterator[tuple[tuple[int, int], list[Made]]]:
    """Each unit that is left, with the results that this process owns."""
    chunks = _chunks(rows, left, batch)
    # The next batch is read while this one is made.
    following = pool.submit(lambda: make.read(next(chunks, None)))
    for start, stop in left:
        made: list[Made] = []
        for _ in range(start, stop, batch):
            prepared = following.result()
            following = pool.submit(lambda: make.read(next(chunks, None)))
            made += make(prepared)
            bar.update(len(prepared.rows))
        yield (start, stop), made


def _chunks(rows: Rows, left: list[tuple[int, int]], batch: int) -> Iterator[list[Row]]:
    """The rows of the batches of the units that are left."""
    stream = iter(rows)
    for start, stop in left:
        for first in range(start, stop, batch):
            chunk = []
            while len(chunk) < min(batch, stop - first):
                row = next(stream)
                if row.index >= first:
                    chunk.append(row)
            yield chunk
