"""The one schema of a training sample, for every task, and the reasons for which a row can't be one.

| task     | references | caption           | instruction    | question, answer |
|----------|------------|-------------------|----------------|------------------|
| generate | none       | of the target     | = caption      |                  |
| caption  | none       | of the target     | = caption      |                  |
| edit     | 1 (source) | of the target     | what to change |                  |
| perceive | 1 (source) | of the target     | which map      |                  |
| compose  | 1..N       | of the target     | what to make   |                  |
| answer   | none       |                   |                | both             |

A sample feeds both passes of a training step, if its source does not say otherwise: the image pass makes `target` from
`references` and `instruction`; the text pass makes `caption` (or `answer`, after `question`) from `target`.
"""

import dataclasses
import enum

Image = str | bytes
TEXT_TASKS = ("caption", "answer")  # those that make text; the others make images
TASKS = ("generate", "edit", "perceive", "compose", *TEXT_TASKS)


class Cause(enum.StrEnum):
    """Why a row can't be used. Rows are counted by these."""

    MALFORMED_JSON = "malformed JSON"
    UNREADABLE_RECORD = "unreadable record"
    MISSING_KEY = "missing key"
    WRONG_TYPE = "wrong type"
    TURNS_OUT_OF_ORDER = "turns out of order"
    UNKNOWN_TASK = "unknown task"
    EMPTY_TEXT = "empty text"
    MALFORMED_TEXT = "malformed text"
    TEXT_TOO_LONG = "text too long"
    IMAGE_COUNT = "wrong number of images"
    MISSING_IMAGE = "missing image"
    UNREADABLE_IMAGE = "unreadable image"
    NOT_AN_IMAGE = "not an image"
    TRUNCATED_IMAGE = "truncated image"
    CORRUPT_IMAGE = "corrupt image"
    IMAGE_TOO_LARGE = "image too large"
    UNSUPPORTED_PIXELS = "unsupported pixels"


class Refused(ValueError):
    """This row, or this image, can't be used.

    Attributes:
      cause: which kind of trouble.
      detail: the key, value or file, what was expected and, where it helps, what to do.
    """

    def __init__(self, cause: Cause, detail: str):
        super().__init__(cause, detail)  # what it is made of anew behind a process boundary
        self.cause = cause
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.cause}: {self.detail}"


def check_task(path: object, task: str | None) -> None:
    """Refuses, with a ValueError, a source at `path` whose `task` is none of `TASKS` and not None."""
    if task is not None and task not in TASKS:
        raise ValueError(f"{path}: no task {task!r}; the tasks are {', '.join(TASKS)}")


@dataclasses.dataclass(frozen=True)
class Sample:
    """A usable training sample; making one checks it.

    Attributes:
      task: one of `TASKS`.
      target: the image that is generated, or described: its path (local or `gs://`), or the bytes of its file.
      references: the images that condition it, in order; each as `target`.
      caption: what the target shows.
      instruction: the text the image pass is conditioned on.
      question, answer: of task 'answer' alone.

    Raises:
      Refused: a text that the task needs is empty or not valid Unicode, or the number of references is wrong.
      ValueError: no such task.
    """

    task: str
    target: Image
    references: tuple[Image, ...] = ()
    caption: str = ""
    instruction: str = ""
    question: str = ""
    answer: str = ""

    def __post_init__(self):
        if self.task not in TASKS:
            raise ValueError(f"no task {self.task!r}; the tasks are {', '.join(TASKS)}")
        for name in ("question", "answer") if self.task == "answer" else ("caption", "instruction"):
            text = getattr(self, name)
            if not text.strip():
                raise Refused(Cause.EMPTY_TEXT, f"{name} is empty")
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair; no tokenizer takes it
                raise Refused(Cause.MALFORMED_TEXT, f"{name} is not valid Unicode ({error})") from None
        expected = {"edit": "1", "perceive": "1", "compose": "1 or more"}.get(self.task, "no")
        count = len(self.references)
        if (expected == "no" and count) or (expected == "1" and count != 1) or (expected == "1 or more" and not count):
            raise Refused(Cause.IMAGE_COUNT, f"task {self.task!r} takes {expected} reference image(s), found {count}")
