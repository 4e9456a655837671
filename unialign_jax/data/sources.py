"""Where samples come from: one protocol, and the sources that fulfil it."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any, Protocol

from unialign_jax import storage
from unialign_jax.data.jsonl import ConversationSource, JsonlSource
from unialign_jax.data.samples import Sample, check_task
from unialign_jax.data.webdataset import TarSource

FORMATS = ("rows", "conversations", "tfds", "webdataset")


class Source(Protocol):
    """Samples with random access. Picklable; may be read from several threads and processes at once.

    Attributes:
      path: names the source, in messages too.
      sizes_path: where the sizes of its images are kept, see `buckets.target_sizes`.
    """

    path: str
    sizes_path: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample:
        """One sample; its images are not decoded.

        Raises:
          Refused: the row can't be used, and why.
        """
        ...

    def place(self, index: int) -> str:
        """Where a person finds the row: "line 12"."""
        ...

    def fingerprint(self) -> dict[str, Any]:
        """JSON-able; what tells that a source is no longer the one that a run had read."""
        ...

    def targets_fingerprint(self) -> dict[str, Any]:
        """JSON-able; what tells that its targets are no longer those whose sizes were kept."""
        ...


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """One source and the part it takes in training.

    Attributes:
      path: a file or directory, local or `gs://`; with format 'tfds' also a registered name, "name/config:version".
      format: of `FORMATS`: published JSONL rows, conversations (JSONL or a JSON array), a TFDS dataset of ArrayRecord
        files, or a directory of WebDataset tars.
      task: what its rows are for; None takes it from each row (see the sources).
      references: how many reference images its batches have room for. Rows with fewer are padded and masked, rows with
        more are refused. Edit and perceive rows need 1, compose rows as many as they have at most.
      weight: share of the batches, relative to the other sources' weights. (A config leaves out what it gives 0.)
      image_pass, text_pass: what its samples train, see `objectives.Objective`: factors of the losses of the two
        passes; at 0 that pass does not run. Published: every sample feeds both.
      split: of a TFDS dataset.
      fields: of a TFDS dataset that this package has not made, which of its features make a sample, see `TfdsSource`.
      data_dir: where TFDS datasets given by name are kept; None: where TFDS keeps them.

    Raises:
      ValueError: a value out of its range.
    """

    path: str
    format: str = "rows"
    task: str | None = None
    references: int = 0
    weight: float = 1.0
    image_pass: float = 1.0
    text_pass: float = 1.0
    split: str = "train"
    fields: Mapping[str, str] = dataclasses.field(default_factory=dict)
    data_dir: str | None = None

    def __post_init__(self):
        if self.format not in FORMATS:
            raise ValueError(f"{self.path}: format is {self.format!r}, expected one of {', '.join(FORMATS)}")
        check_task(self.path, self.task)
        if not self.weight > 0:
            raise ValueError(f"{self.path}: weight is {self.weight}, expected more than 0")
        if self.references < 0:
            raise ValueError(f"{self.path}: references is {self.references}, expected 0 or more")
        if self.image_pass < 0 or self.text_pass < 0 or self.image_pass == self.text_pass == 0:
            raise ValueError(
                f"{self.path}: image_pass is {self.image_pass} and text_pass {self.text_pass}; expected 0 or more of "
                "each, and one above 0"
            )

    @property
    def masks_references(self) -> bool:
        """Whether a row may have fewer references than there is room for. Attention without a mask is faster."""
        always_one = ("edit", "perceive", "compose")  # at least; and no more than the room
        return self.references > 1 or (self.references == 1 and self.task not in always_one)


def open_source(config: SourceConfig) -> Source:
    """The source that a config describes.

    Raises:
      CorpusError: it is missing, empty or not of its format.
      ValueError: a task or field that it can't have, or a store whose client is not installed.
    """
    path = os.path.expanduser(config.path)
    if storage.is_remote(path):
        storage.absolute(path)  # says what is missing to read it
    if config.format == "tfds":
        # Late: importing TFDS takes as long as all the rest.
        from unialign_jax.data.tfds_source import TfdsSource

        return TfdsSource(path, config.task, config.split, dict(config.fields), config.data_dir)
    kind = {"rows": JsonlSource, "conversations": ConversationSource, "webdataset": TarSource}[config.format]
    return kind(path, config.task)
