"""TFDS datasets in ArrayRecord files, with random access: those that `build` makes and any other, by name or directory.

Images are not decoded here: a sample holds the bytes of each image's file.
"""

import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from tensorflow_datasets.core import example_parser

from unialign_jax.data.report import CorpusError
from unialign_jax.data.samples import TASKS, Cause, Refused, Sample, check_task
from unialign_jax.data.shards import DamagedRecord, DamagedShard, Shards

# What `build` writes; of another dataset, fields name the features that stand for these.
FEATURES = ("task", "target", "references", "caption", "instruction", "question", "answer")
_IMAGES = ("target", "references")


class TfdsSource:
    """Examples of one split by index.

    Args:
      path: a directory of a dataset (the one with `dataset_info.json`), or a registered name, "name/config:version".
        TFDS finds a prepared dataset by name without TensorFlow; preparing one may need it.
      task: what every example is for; None takes it from the feature 'task'.
      split: "train", or any slice that TFDS understands.
      fields: which feature stands for a field of a sample, such as {"target": "image", "caption": "captions/text"}; a
        slash enters a nested feature. Of several texts the first is taken; a class label becomes its name. Empty:
        features are called like the fields. For 'generate' and 'caption', the instruction is the caption.
      data_dir: where datasets given by name are kept; None: where TFDS keeps them.

    Raises:
      CorpusError: no such dataset or split, one that TFDS can't load, not in ArrayRecord files, no examples, or a
        feature is missing or can't stand for its field.
      ValueError: no such task or field.
    """

    def __init__(
        self,
        path: epath.PathLike,
        task: str | None = None,
        split: str = "train",
        fields: Mapping[str, str] | None = None,
        data_dir: epath.PathLike | None = None,
    ):
        check_task(path, task)
        if unknown := set(fields or ()) - set(FEATURES):
            raise ValueError(f"{path}: no field {min(unknown)!r}; the fields are {', '.join(FEATURES)}")
        self.path = f"{path}[{split}]"
        builder = _builder(path, data_dir)
        self.sizes_path = str(epath.Path(builder.data_dir) / f"{split}.sizes.npz")
        info = builder.info
        self._task = task
        self._name = info.full_name
        try:
            # The files' own bytes are asked for: TFDS would decode the images, and not from within lists undecoded.
            found = builder.as_data_source(
                split=split,
                deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES,
                file_format="array_record",
            )
        except (ValueError, NotImplementedError) as error:
            raise CorpusError(f"{self.path}: {error}") from None
        if not len(found):
            raise CorpusError(f"{self.path}: expected examples, found none")
        files = found.dataset_info.splits[split].file_instructions
        self._records = Shards(files)
        # Also how many bytes: of a data set that was built anew, names and numbers may be the same.
        shards = [(epath.Path(f.filename).name, f.skip, f.take) for f in files], int(info.dataset_size)
        self._shards = zlib.crc32(repr(shards).encode())
        self._parser = example_parser.ExampleParserNp(info.features.get_serialized_info())
        self._fields = dict(fields) if fields else {name: name for name in FEATURES if name in info.features}
        self._labels = {}
        for field, name in self._fields.items():
            feature = _feature(info.features, name, self.path)
            feature = getattr(feature, "feature", feature)  # of several texts or labels the first is taken
            _check_kind(feature, field, name, self.path)
            if isinstance(feature, tfds.features.ClassLabel):
                self._labels[name] = list(feature.names)
        needed = {"target"} if task else {"target", "task"}
        if missing := needed - self._fields.keys():
            raise CorpusError(
                f"{self.path}: no feature {min(missing)!r}; the dataset has {', '.join(sorted(info.features))}. "
                "Name them with fields, and the task with task"
            )

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Sample:
        """The sample of one example; its images are not decoded.

        Raises:
          Refused: it can't be used; its record may be damaged.
          CorpusError: it can't be read, which says nothing of the example; its shard may be damaged as a whole.
        """
        try:
            record = self._records[index]
        except DamagedRecord as error:
            raise Refused(Cause.UNREADABLE_RECORD, str(error)) from error
        except DamagedShard as error:
            raise CorpusError(
                f"{self.path}, {self.place(index)}: {error}. No record of this file can be: copy or build it again"
            ) from error
        except CorpusError as error:
            raise CorpusError(f"{self.path}, {self.place(index)}: {error}") from error
        try:
            example = self._parser.parse_example(record)
        except Exception as error:  # damaged records raise nearly anything
            raise Refused(Cause.UNREADABLE_RECORD, f"{type(error).__name__}: {error}") from error
        values = {field: self._value(example, field, name) for field, name in self._fields.items()}
        task = self._task or values.get("task")
        if task not in TASKS:
            raise Refused(Cause.UNKNOWN_TASK, f"'task': expected one of {', '.join(TASKS)}, found {task!r}")
        values["task"] = task
        if task in ("generate", "caption"):
            values["instruction"] = values.get("caption", "")
        return Sample(**values)

    def place(self, index: int) -> str:
        """The example's number in the split, from 0."""
        return f"example {index}"

    def fingerprint(self) -> dict[str, Any]:
        """What tells that a run had read another dataset, or read it otherwise."""
        fields = {f"field {field}": name for field, name in self._fields.items()}
        return {"rows": len(self), "name": self._name, "shards": self._shards, "task": self._task} | fields

    def targets_fingerprint(self) -> dict[str, Any]:
        """What tells that the targets are others; they are the same for every task."""
        return {"rows": len(self), "name": self._name, "shards": self._shards, "field target": self._fields["target"]}

    def _value(self, example: dict, field: str, name: str) -> Any:
        value: Any = example
        for part in name.split("/"):
            value = value[part]
        if field == "references":
            return (value,) if isinstance(value, bytes) else tuple(value)
        if isinstance(value, np.ndarray) and value.ndim:
            if not len(value):
                raise Refused(Cause.EMPTY_TEXT, f"{name!r} is an empty list")
            value = value[0]
        if field in _IMAGES:
            return value
        if name in self._labels:
            if not 0 <= value < len(self._labels[name]):  # TFDS writes -1 where there is no label
                raise Refused(Cause.EMPTY_TEXT, f"{name!r}: {value} is none of its {len(self._labels[name])} labels")
            return self._labels[name][value].replace("_", " ")
        try:
            return value.decode("utf-8")
        except (AttributeError, UnicodeDecodeError) as error:
            raise Refused(Cause.MALFORMED_TEXT, f"{name!r}: {error}") from None


def _builder(path: epath.PathLike, data_dir: epath.PathLike | None):
    directory = epath.Path(path)
    if (directory / "dataset_info.json").exists():
        try:
            return tfds.builder_from_directory(directory)
        except Exception as error:  # what its files hold makes TFDS raise nearly anything
            raise CorpusError(
                f"{path}: TFDS can't load it ({type(error).__name__}: {error}); if its dataset_info.json or "
                "features.json is damaged, copy or build it again"
            ) from error
    if directory.exists() or directory.is_absolute():  # no name is
        raise CorpusError(f"{path}: expected the directory of a TFDS dataset, found no dataset_info.json in it")
    try:
        builder = tfds.builder(str(path), data_dir=data_dir, try_gcs=False, file_format="array_record")
    except tfds.core.DatasetNotFoundError:
        raise CorpusError(
            f"{path}: no directory, and no dataset that TFDS knows or has prepared in {data_dir or 'its data_dir'}"
        ) from None
    except Exception as error:  # a dataset's own code may need libraries that are not here
        raise CorpusError(
            f"{path}: TFDS can't load it ({error}); prepare it in {data_dir or 'its data_dir'}"
        ) from error
    if not builder.info.splits:  # TFDS knows how to make it
        raise CorpusError(
            f"{path}: expected a prepared dataset, found none in {builder.data_dir}: set data_dir to where it is, or "
            f"prepare it: tfds.builder({str(path)!r}, data_dir={data_dir and str(data_dir)!r}, "
            "file_format='array_record').download_and_prepare()"
        )
    return builder


def _feature(features: Any, name: str, path: str) -> Any:
    for part in name.split("/"):
        features = getattr(features, "feature", features)  # a sequence's elements
        if not hasattr(features, "keys") or part not in features.keys():
            raise CorpusError(f"{path}: no feature {name!r}; the dataset has {', '.join(sorted(features))}")
        features = features[part]
    return features


def _check_kind(feature: Any, field: str, name: str, path: str) -> None:
    """Refuses a feature whose examples can't hold what the field is of."""
    kind, expected = tfds.features.ClassLabel, "a Text or ClassLabel"
    if field in _IMAGES:
        kind, expected = tfds.features.Image, "an Image, or a Tensor of bytes that are an image file's"
    holds_bytes = isinstance(feature, tfds.features.Tensor) and np.dtype(feature.np_dtype) == object
    if not (holds_bytes or isinstance(feature, kind)):
        raise CorpusError(
            f"{path}: {field!r} is to be the feature {name!r} of kind {type(feature).__name__}; expected {expected}, "
            "or a Sequence of them. Name another with fields"
        )
