"""What a sampling run is asked for, row by row: from flags, a text file or JSONL, streamed."""

import abc
import codecs
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

from etils import epath

from unialign_jax import storage
from unialign_jax.data.samples import TEXT_TASKS
from unialign_jax.inference import inputs

NEEDS_IMAGE = ("edit", "perceive", "compose", *TEXT_TASKS)
NEEDS_PROMPT = ("generate", "edit", "perceive", "compose", "answer")
# As in the published rows that models are trained on, too.
_PROMPT_KEYS = ("prompt", "instruction", "edit_prompt", "question")
_IMAGE_KEYS = ("image", "images", "original_images")


@dataclasses.dataclass(frozen=True)
class Row:
    """One thing to make.

    Attributes:
      index: its number, from 0.
      prompt: what to draw, the instruction or the question; "" for captions.
      images: paths of its images.
      seed: in [0, 2**32).
      error: why it can't be made, or None.
    """

    index: int
    prompt: str
    images: tuple[str, ...]
    seed: int
    error: str | None = None


class Rows(abc.ABC):
    """The rows of a run, in order. Iterating streams them; only their number is known beforehand.

    Attributes:
      count: how many there are.
      digest: of the file's content; of flags, of the flags.
      strict: a row that can't be made ends the run, instead of being reported in it.
    """

    def __init__(self, task: str, seed: int):
        self.task, self.seed = task, seed
        self.count, self.digest, self.strict = 0, "", False

    @abc.abstractmethod
    def __iter__(self) -> Iterator[Row]: ...

    def _row(self, index: int, prompt: Any, images: Any, seed: Any = None) -> Row:
        seed = (self.seed + index) % 2**32 if seed is None else seed
        images = [images] if isinstance(images, str) else images
        prompt = prompt if self.task in NEEDS_PROMPT else ""
        images = images if self.task in NEEDS_IMAGE else ()
        try:
            if not isinstance(images, list | tuple) or not all(isinstance(path, str) for path in images):
                raise ValueError(f"images are {images!r}; a path or a list of paths was expected")
            if "" in images:
                raise ValueError(f"images are {list(images)!r}; a path is empty")
            _check_given(self.task, prompt, images)
            inputs.check_texts([prompt or ""], "prompt")
            inputs.check_seeds([seed], 1)
        except ValueError as error:
            return Row(index, "", (), 0, str(error))
        return Row(index, prompt or "", tuple(images), int(seed))


def _check_given(task: str, prompt: Any, images: Sequence[str], said: tuple[str, str] = ("a prompt", "an image")):
    for needs, given, name in ((NEEDS_PROMPT, prompt, said[0]), (NEEDS_IMAGE, images, said[1])):
        if (task in needs) != bool(given):  # of rows, what a task does not need has been left out before
            raise ValueError(f"{task} {'needs' if task in needs else 'takes no'} {name}")
    if task in ("edit", "perceive", *TEXT_TASKS) and len(images) != 1:
        raise ValueError(f"{task} takes one image a row, not {len(images)}")
    if len(images) > inputs.MAX_REFERENCES:
        raise ValueError(f"{task} takes at most {inputs.MAX_REFERENCES} images a row, not {len(images)}")


def _published(task: str, row: dict[str, Any]) -> tuple[Any, Any]:
    """Prompt and images of a row, which may be one that models are trained on, see `data.rows`."""
    prompt = next((row[key] for key in _PROMPT_KEYS if key in row), None)
    images = next((row[key] for key in _IMAGE_KEYS if key in row), [])
    match row:
        case {"conversations": [{"value": str() as caption}, *_]} if task == "generate" and prompt is None:
            prompt = None if "<image>" in caption else caption  # else a question about an image
        case {"conversations": _, "instruction": _, "image": [source, _]} if task in ("edit", "perceive"):
            images = [source]
        case {"edit_prompt": str() as quoted, "generated_images": _} if prompt is quoted:
            prompt = quoted.strip(' \\"')
    return prompt, images


class FlagRows(Rows):
    """One request from the command line, made `count` times with seeds from `seed` on.

    The images of `generate` and `compose` all belong to one request; other tasks have one for each of their images.
    """

    def __init__(self, task: str, seed: int, prompt: str | None, images: Sequence[str], count: int):
        super().__init__(task, seed)
        said = ("--prompt", "--image")
        _check_given(task, prompt, images if task == "compose" else images[:1], said)
        groups = [tuple(images)] if task in ("generate", "compose") else [(image,) for image in images]
        self._requests = [(prompt, group) for group in groups for _ in range(count)]
        self.count, self.strict = len(self._requests), True
        contents = [inputs.digest(image) for image in images if image]
        self.digest = hashlib.sha256(json.dumps([self._requests, contents]).encode()).hexdigest()[:16]

    def __iter__(self) -> Iterator[Row]:
        for index, (prompt, images) in enumerate(self._requests):
            row = self._row(index, prompt, images)
            if row.error is not None:
                raise ValueError(row.error)
            yield row


class FileRows(Rows):
    """The lines of a file: JSON objects if its name ends in .jsonl or .ndjson, else prompts. Empty ones are left out.

    An object has `prompt` (or `instruction`, `edit_prompt`, `question`), `image` (or `images`, `original_images`: a
    path or a list) and `seed`; what the task does not need and other keys are ignored. Paths are relative to the file.
    Rows of training data will do: `generate` takes their caption, `edit` and `perceive` the first of two images.

    Raises:
      ValueError: it has no rows, or is of another form, or in a store that can't be read, see `storage.absolute`.
      FileNotFoundError: there is no such file.
    """

    def __init__(self, task: str, seed: int, path: epath.PathLike):
        super().__init__(task, seed)
        # A local link is kept: what it leads to may be named otherwise, and have no images beside it.
        self._path = storage.absolute(path) if storage.is_remote(path) else epath.Path(path).expanduser()
        if self._path.suffix.lower() == ".json":
            raise ValueError(
                f"{self._path}: expected JSONL, one object a line, in a file named .jsonl, or prompts as text; "
                "jq -c '.[]' makes JSONL of an array"
            )
        self._is_json = self._path.suffix.lower() in (".jsonl", ".ndjson")
        if not self._is_json and task in NEEDS_IMAGE:
            raise ValueError(f"{self._path}: lines of a text file are prompts, but {task} needs images: use JSONL")
        digest = hashlib.sha256()
        with storage.open_to_scan(self._path) as file:
            for line in file:
                if not self.count and line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                    raise ValueError(f"{self._path} is UTF-16; save it as UTF-8")
                digest.update(line)
                self.count += bool(line.strip())
        if not self.count:
            raise ValueError(f"{self._path} has no rows")
        self.digest = digest.hexdigest()[:16]

    def __iter__(self) -> Iterator[Row]:
        index = 0
        with storage.open_to_scan(self._path) as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield self._parse(index, number, line)
                    index += 1

    def _parse(self, index: int, number: int, line: bytes) -> Row:
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            if not self._is_json:
                return self._row(index, text, [])
            value = json.loads(text)
            if not isinstance(value, dict):
                raise ValueError(f"a JSON object was expected, not a {type(value).__name__}")
        except (ValueError, RecursionError) as error:
            return Row(index, "", (), 0, f"{self._path}, line {number}: {error}")
        prompt, images = _published(self.task, value)
        row = self._row(index, prompt, images, value.get("seed"))
        if row.error is not None:
            return dataclasses.replace(row, error=f"{self._path}, line {number}: {row.error}")
        return dataclasses.replace(row, images=tuple(storage.beside(self._path, path) for path in row.images))
