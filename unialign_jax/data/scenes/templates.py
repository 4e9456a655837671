"""Sentences with slots, read the same way as they are written: one template makes the text and takes it apart."""

import functools
import re
from collections.abc import Mapping

from unialign_jax.data.scenes.world import BACKGROUNDS, COLOURS, PLACES, RELATIONS, SHAPES, SIZES

DISTANCES = ("just", "far")
# What may stand in a slot; `new_colour` takes what `colour` takes, and so does `other_colour`.
_SLOTS = {
    "shape": SHAPES,
    "colour": tuple(COLOURS),
    "size": SIZES,
    "place": PLACES,
    "background": tuple(BACKGROUNDS),
    "relation": RELATIONS,
    "far": DISTANCES,
}
_FREE = ("items",)  # anything


def fill(template: str, slots: Mapping[str, str]) -> str:
    """The template with its slots filled, and "an" where it has to be; slots that it does not have are ignored."""
    return re.sub(r"\ba (?=[aeiou])", "an ", template.format_map(slots))


def match(template: str, text: str) -> dict[str, str] | None:
    """What stands in the slots of a normalized text of this template; None if it is of another form."""
    found = _pattern(template).fullmatch(text)
    return None if found is None else found.groupdict()


def normalize(text: str) -> str:
    """Lower case, single spaces, none before a mark, no full stop at the end, every "an" an "a"."""
    text = re.sub(r"\s+", " ", text.strip().lower())
    text = re.sub(r" ([,.:?])", r"\1", text).removesuffix(".")
    return re.sub(r"\ban\b", "a", text)


def length(text: str) -> int:
    """Number of words and marks: what a tokenizer with one id for each makes of the text."""
    return len(split(text))


def split(text: str) -> list[str]:
    """The words and marks."""
    return re.findall(r"\w+|[^\w\s]", text)


def fixed_words(template: str) -> list[str]:
    """The words and marks of a template outside its slots."""
    return split(re.sub(r"\{\w+\}", " ", template))


@functools.cache
def _pattern(template: str) -> re.Pattern:
    parts = re.split(r"\{(\w+)\}", template)
    pattern = ""
    for i, part in enumerate(parts):
        if i % 2 == 0:
            pattern += re.escape(part)
        elif part in _FREE:
            pattern += f"(?P<{part}>.+)"
        else:
            words = _SLOTS[part.removeprefix("new_").removeprefix("other_")]
            pattern += f"(?P<{part}>{'|'.join(map(re.escape, words))})"
    return re.compile(pattern)
