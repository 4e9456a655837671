"""One JSON object, in a published form or as a conversation -> a checked sample.

Published forms; images are paths, relative to the file (absolute and `gs://` allowed):

    generate, caption   {"image": [target], "conversations": [{"from": ..., "value": caption}, ...]}
    edit, perceive      {"image": [source, target], "conversations": [... caption ...], "instruction": ...}
    compose             {"original_images": [1..N], "generated_images": [target], "edit_prompt": ..., "caption": ...}

and one more for question answering: {"image": [target], "question": ..., "answer": ...}. Other keys are ignored. A
single image may be given without its list.

Conversations, as LLaVA has them, alternate between one who asks and one who answers; each pair is a sample:

    {"image": target,
     "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}, ...]}

The placeholder "<image>" in a question is dropped.
"""

import json
from collections.abc import Callable

from unialign_jax.data.samples import Cause, Image, Refused, Sample

Find = Callable[[str], Image]
_ASKS, _ANSWERS = ("human", "user"), ("gpt", "assistant")
_PLACEHOLDER = "<image>"
_IMAGE_KEYS = {"image", "original_images", "generated_images"}
_TEXT_KEYS = {"conversations", "instruction", "question", "answer", "edit_prompt"}


def parse_row(line: bytes, task: str | None, find: Find) -> Sample:
    """One JSON object in a published form -> a checked sample.

    Args:
      line: UTF-8.
      task: see `jsonl.JsonlSource`.
      find: the image that a name in the row stands for.

    Raises:
      Refused: it can't be used, and why.
    """
    row = _object(line)
    task = task or _task_of(row)
    if task == "compose":
        references = _images(row, "original_images", find)
        (target,) = _images(row, "generated_images", find, count=1)
        # Published prompts come wrapped in quotes and backslashes.
        prompt = _text(row, "edit_prompt").strip(' \\"')
        return Sample(task, target, references, caption=_text(row, "caption"), instruction=prompt)
    if task in ("edit", "perceive"):
        source, target = _images(row, "image", find, count=2)
        return Sample(
            task, target, (source,), caption=_turn_text(_turns(row), 0), instruction=_text(row, "instruction")
        )
    (target,) = _images(row, "image", find, count=1)
    if task == "answer":
        return Sample(task, target, question=_text(row, "question"), answer=_text(row, "answer"))
    caption = _turn_text(_turns(row), 0)
    if "<image>" in caption:  # published rows have it in the second turn, which is not read
        raise Refused(
            Cause.TURNS_OUT_OF_ORDER,
            f"'conversations'[0] shows the image, {caption[:80]!r} is no caption; expected format=conversations",
        )
    return Sample(task, target, caption=caption, instruction=caption)


def is_row(line: bytes) -> bool:
    """Whether a JSON object is meant as a row in a published form: it names images, and has a text of such a row.

    Args:
      line: UTF-8.

    Raises:
      Refused: it is no JSON object.
    """
    keys = _object(line).keys()
    return bool(keys & _IMAGE_KEYS) and bool(keys & _TEXT_KEYS)


def parse_conversation(line: bytes, task: str | None, pair: int, find: Find) -> Sample:
    """One question of a conversation and its answer -> a checked sample. The turns before them are not part of it.

    Args:
      line: one JSON object, UTF-8.
      task: None or 'answer'; or 'caption' or 'generate', for which the answer is the caption and the question is not
        used.
      pair: which pair of turns, from 0.
      find: the image that a name in the row stands for.

    Raises:
      Refused: it can't be used, and why.
    """
    row = _object(line)
    (target,) = _images(row, "image", find, count=1)
    turns = _without_system(_turns(row))
    if not turns or len(turns) % 2:
        raise Refused(Cause.TURNS_OUT_OF_ORDER, f"'conversations': expected pairs of turns, found {len(turns)} turns")
    for index, speakers in ((2 * pair, _ASKS), (2 * pair + 1, _ANSWERS)):
        speaker = _turn_text(turns, index, "from")
        if speaker not in speakers:
            raise Refused(
                Cause.TURNS_OUT_OF_ORDER,
                f"'conversations'[{index}]: expected a turn from {speakers[0]!r}, found one from {speaker!r}",
            )
    question = _turn_text(turns, 2 * pair).replace(_PLACEHOLDER, "").strip()
    answer = _turn_text(turns, 2 * pair + 1).strip()
    if task in (None, "answer"):
        return Sample("answer", target, question=question, answer=answer)
    return Sample(task, target, caption=answer, instruction=answer)


def count_pairs(line: bytes) -> int:
    """How many samples a conversation holds; 1 of a row that can't be used, so that it is met and refused."""
    try:
        return max(1, len(_without_system(_turns(_object(line)))) // 2)
    except Refused:
        return 1


def _object(line: bytes) -> dict:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise Refused(Cause.MALFORMED_JSON, str(error)) from None
    if not isinstance(row, dict):
        raise Refused(Cause.MALFORMED_JSON, f"expected an object, found {type(row).__name__}")
    return row


def _without_system(turns: list[dict]) -> list[dict]:
    return turns[1:] if turns[0].get("from") == "system" else turns


def _task_of(row: dict) -> str:
    if {"original_images", "generated_images", "edit_prompt"} & row.keys():
        return "compose"
    if {"question", "answer"} & row.keys():
        return "answer"
    return "edit" if "instruction" in row else "generate"


def _value(row: dict, key: str):
    if key not in row:
        raise Refused(Cause.MISSING_KEY, f"{key!r}; the row has {', '.join(map(repr, row)) or 'no keys'}")
    return row[key]


def _text(row: dict, key: str) -> str:
    value = _value(row, key)
    if not isinstance(value, str):
        raise Refused(Cause.WRONG_TYPE, f"{key!r}: expected text, found {type(value).__name__}")
    return value


def _turns(row: dict) -> list[dict]:
    turns = _value(row, "conversations")
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise Refused(Cause.WRONG_TYPE, '\'conversations\': expected a list of {"from", "value"}')
    return turns


def _turn_text(turns: list[dict], index: int, key: str = "value") -> str:
    try:
        return _text(turns[index], key)
    except Refused as refused:
        raise Refused(refused.cause, f"'conversations'[{index}]: {refused.detail}") from None


def _images(row: dict, key: str, find: Find, count: int | None = None) -> tuple[Image, ...]:
    paths = _value(row, key)
    if isinstance(paths, str):
        paths = [paths]
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
        raise Refused(Cause.WRONG_TYPE, f"{key!r}: expected a list of paths")
    if count is not None and len(paths) != count:
        raise Refused(Cause.IMAGE_COUNT, f"{key!r}: expected {count}, found {len(paths)}")
    if not all(paths):
        raise Refused(Cause.MISSING_IMAGE, f"{key!r}: a path is empty")
    return tuple(find(path) for path in paths)
