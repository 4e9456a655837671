"""Tokenizers in the one form that T5, Qwen and our own small models share: a directory with a `tokenizer.json`.

`Tokenizer` makes the ids that the transformer learns: text, the end token, and end tokens as padding, as the published
training sets have it. `PlainTokenizer` makes ids and a mask, for a teacher's text. Both rest on the `tokenizers`
library alone.
"""

import collections
import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from typing import Self

import numpy as np
import tokenizers
from absl import logging
from etils import epath
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

PAD, END, UNKNOWN, MASK = "<pad>", "</s>", "<unk>", "<extra_id_0>"
TOKENIZER_FILE, CONFIG_FILE = "tokenizer.json", "tokenizer_config.json"
SCORE_ROUNDS = 3
SHOWN_CHARACTERS = 200


class PlainTokenizer:
    """A `tokenizer.json` as it is. Control tokens spelled out in a text are dropped, so no text can forge one."""

    def __init__(self, backend: tokenizers.Tokenizer, config: dict, source: str):
        """Use `load` (or `Tokenizer.learn`).

        Args:
          backend: the library's tokenizer.
          config: the content of `tokenizer_config.json`, written back by `save`.
          source: where it comes from, for messages.
        """
        backend.no_padding()
        backend.no_truncation()
        self._backend, self._config, self._source = backend, config, source
        unknown = self._name_of("unk_token", UNKNOWN)
        added = backend.get_added_tokens_decoder().items()
        self._control_ids = {index for index, token in added if token.special and token.content != unknown}
        self._warned = False

    @classmethod
    def load(cls, directory: epath.PathLike) -> Self:
        """Reads `tokenizer.json`, and `tokenizer_config.json` where there is one, from a directory, local or `gs://`.

        Raises:
          FileNotFoundError: if there is no `tokenizer.json`.
          ValueError: if a file cannot be read, or a token that this class needs is missing.
        """
        directory = epath.Path(directory)
        path, config_path = directory / TOKENIZER_FILE, directory / CONFIG_FILE
        if not path.exists():
            found = " (only spiece.model)" if (directory / "spiece.model").exists() else ""
            raise FileNotFoundError(
                f"{directory} has no {TOKENIZER_FILE}{found}; write one with the transformers library: "
                f"AutoTokenizer.from_pretrained({str(directory)!r}).save_pretrained({str(directory)!r})"
            )
        try:
            backend = tokenizers.Tokenizer.from_buffer(path.read_bytes())
        except Exception as error:  # the library raises nothing more specific
            raise ValueError(f"{path} is not a tokenizer of the tokenizers library: {error}") from error
        config = {}
        if config_path.exists():
            try:
                config = json.loads(config_path.read_bytes())
            except ValueError as error:
                raise ValueError(f"{config_path} is not JSON: {error}") from error
            if not isinstance(config, dict):
                raise ValueError(f"{config_path} holds a {type(config).__name__}; a JSON object was expected")
        return cls(backend, config, str(directory))

    def save(self, directory: epath.PathLike) -> None:
        """Writes the two files that `load` reads, and that transformers' `from_pretrained` reads too."""
        directory = epath.Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / TOKENIZER_FILE).write_bytes(self._backend.to_str(pretty=True).encode())
        text = json.dumps(self._config, indent=2, ensure_ascii=False) + "\n"
        (directory / CONFIG_FILE).write_bytes(text.encode())

    def fingerprint(self) -> str:
        """The same for tokenizers that make the same ids of all texts."""
        content = self._backend.to_str() + json.dumps(self._config, sort_keys=True)
        return hashlib.blake2b(content.encode(), digest_size=8).hexdigest()

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def encode_masked(self, text: str, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids without an end token, int32 `[length]`, and their mask, bool `[length]`, False on padding.

        A longer text is cut at `length`; the first time, a warning shows what was cut. An empty text has no True.
        """
        kept = self._cut(self._text_ids(text), length)
        ids, mask = np.zeros(length, np.int32), np.zeros(length, bool)
        ids[: len(kept)], mask[: len(kept)] = kept, True
        return ids, mask

    def _text_ids(self, text: str) -> list[int]:
        ids = self._backend.encode(text, add_special_tokens=False).ids
        return [index for index in ids if index not in self._control_ids]

    def _cut(self, ids: list[int], room: int) -> list[int]:
        """The first `room` ids; warns once per tokenizer if any are lost."""
        if len(ids) > room and not self._warned:
            self._warned = True
            lost = self._backend.decode(ids[room:])
            shown = lost if len(lost) <= SHOWN_CHARACTERS else lost[:SHOWN_CHARACTERS] + "…"
            logging.warning(
                "A text of %d tokens was cut to %d (said once per tokenizer); lost: %r", len(ids), room, shown
            )
        return ids[:room]

    def _name_of(self, key: str, default: str) -> str:
        """A special token's text: the config has it as a string, or as an object with `content`."""
        token = self._config.get(key) or default
        return token["content"] if isinstance(token, dict) else token

    def _id_of(self, kind: str, token: str) -> int:
        index = self._backend.token_to_id(token)
        if index is None:
            raise ValueError(f"the tokenizer of {self._source} has no {kind} token {token!r}; a T5 tokenizer has one")
        return index


class Tokenizer(PlainTokenizer):
    """The transformer's tokenizer, in T5's form: ids end with the end token, which is also the padding."""

    def __init__(self, backend: tokenizers.Tokenizer, config: dict, source: str):
        super().__init__(backend, config, source)
        self._end_id = self._id_of("end", self._name_of("eos_token", END))
        pad_id = self._id_of("padding", self._name_of("pad_token", PAD))
        self._mask_id = self._id_of("mask", MASK)
        self._control_ids |= {self._end_id, pad_id, self._mask_id}

    @property
    def end_id(self) -> int:
        """Id of the end token, which pads as well (T5: 1)."""
        return self._end_id

    @property
    def mask_id(self) -> int:
        """Id of `<extra_id_0>`, which masks a token in text diffusion (T5: 32099)."""
        return self._mask_id

    def encode(self, text: str, length: int) -> np.ndarray:
        """Ids of a text, the end token, and end tokens up to `length`: int32 `[length]`.

        A longer text is cut so that the last id is the end token; the first time, a warning shows what was cut.

        Raises:
          ValueError: if `length` is less than 1.
        """
        return self._padded(self._text_ids(text), length)

    def encode_prompted(self, prompt: str, answer: str, length: int) -> tuple[np.ndarray, np.ndarray]:
        """A prompt with its answer: ids int32 `[length]` and loss mask bool `[length]`, False on the prompt.

        No end token stands between the two; the answer's end token and the padding are learned, as in captions. Too
        long a text is cut as by `encode`. With an empty answer the mask tells which positions are to be written.

        Raises:
          ValueError: if `length` is less than 1.
        """
        prompt_ids = self._text_ids(prompt)
        ids = self._padded(prompt_ids + self._text_ids(answer), length)
        return ids, np.arange(length) >= min(len(prompt_ids), length - 1)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of ids `[T]` up to the first end token; special tokens are dropped."""
        ids = np.asarray(ids)
        ends = np.flatnonzero(ids == self._end_id)
        if len(ends):
            ids = ids[: ends[0]]
        return self._backend.decode([index for index in ids.tolist() if index not in self._control_ids])

    def _padded(self, ids: list[int], length: int) -> np.ndarray:
        if length < 1:
            raise ValueError(f"text length {length} leaves no room for the end token; at least 1 is needed")
        kept = self._cut(ids, length - 1)
        padded = np.full(length, self._end_id, np.int32)
        padded[: len(kept)] = kept
        return padded

    @classmethod
    def learn(cls, texts: Iterable[str], vocab_size: int) -> Self:
        """Learns a T5-like tokenizer from a corpus; the same corpus gives the same tokenizer, whatever its order.

        Ids: `<pad>` 0, `</s>` 1, `<unk>` 2, pieces, and `<extra_id_0>` last. As in T5 the model is a unigram one over
        words that start with "▁", after NFKC. Its pieces are those of the library's byte-pair trainer and their scores
        come from counting: the library's unigram trainer sums in a random order, so its results differ from run to
        run, and it finds no piece that only one word contains, which leaves a small corpus without whole words.

        Args:
          texts: the corpus.
          vocab_size: number of ids, the four special ones included.

        Raises:
          ValueError: if the corpus is empty, or does not allow that number of ids.
        """
        normalizer = normalizers.NFKC()
        words = collections.Counter(word for text in texts for word in normalizer.normalize_str(text).split())
        if not words:
            raise ValueError("the corpus to learn a tokenizer from is empty")
        pieces = _learn_pieces(words, vocab_size - 1)
        scores = dict.fromkeys(pieces, 0.0)
        for _ in range(SCORE_ROUNDS):
            backend = _unigram(scores, normalizer)
            counts = collections.Counter()
            for word, count in words.items():
                for piece in backend.encode(word, add_special_tokens=False).tokens:
                    counts[piece] += count
            scores = _scores(pieces, counts)
        backend = _unigram(scores | {MASK: 0.0}, normalizer)
        backend.add_special_tokens([PAD, END, UNKNOWN, MASK])
        backend.post_processor = processors.TemplateProcessing(single=["$A", END], special_tokens=[(END, 1)])
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "pad_token": PAD,
            "eos_token": END,
            "unk_token": UNKNOWN,
            "additional_special_tokens": [MASK],
            "extra_ids": 1,
        }
        return cls(backend, config, "a learned corpus")


def _learn_pieces(words: collections.Counter, size: int) -> list[str]:
    """`size` pieces, the special ones first: all characters of the words, then the byte-pair trainer's merges.

    Punctuation stays apart while learning, as sentencepiece keeps scripts apart: "door" and "door." share a piece.
    """
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence([_word_starts(), pre_tokenizers.Punctuation("isolated")])
    special = [PAD, END, UNKNOWN]
    trainer = trainers.BpeTrainer(vocab_size=max(size, 0), special_tokens=special, show_progress=False)
    # Each word as often as it occurs, many to a text: one by one, handing them over takes most of the time.
    texts = (" ".join([word] * min(count - i, 1000)) for word, count in words.items() for i in range(0, count, 1000))
    backend.train_from_iterator(texts, trainer)
    found = backend.get_vocab()
    if len(found) > size:
        raise ValueError(
            f"vocab_size {size + 1} is too small: the corpus has {len(found) - len(special)} different characters, "
            f"which with 4 special tokens needs at least {len(found) + 1}"
        )
    if len(found) < size:
        raise ValueError(
            f"vocab_size {size + 1} is too large for this corpus, which yields at most {len(found) + 1} ids; "
            "lower it or give more text"
        )
    return sorted(found, key=found.get)


def _word_starts() -> pre_tokenizers.PreTokenizer:
    """T5's split: at white space, each word with "▁" in front."""
    return pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])


def _scores(pieces: list[str], counts: collections.Counter) -> dict[str, float]:
    """Log probabilities of the pieces, smoothed by half a count and rounded so that they are the same anywhere."""
    total = counts.total() + len(pieces) / 2
    return {piece: round(math.log((counts[piece] + 0.5) / total), 6) for piece in pieces}


def _unigram(scores: dict[str, float], normalizer: normalizers.Normalizer) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.Unigram(list(scores.items()), unk_id=2))
    backend.normalizer = normalizer
    backend.pre_tokenizer = _word_starts()
    backend.decoder = decoders.Metaspace()
    return backend
