"""What tests of the input pipeline share: a tokenizer of bytes, a small config, and which rows a batch holds."""

import itertools

import numpy as np

from unialign_jax.data.config import DataConfig
from unialign_jax.data.sources import SourceConfig

SIZE = 8


class Bytes:
    """Ids are 2 + the UTF-8 bytes, then 1s."""

    def encode(self, text, length):
        ids = [2 + byte for byte in text.encode()][:length]
        return np.array(ids + [1] * (length - len(ids)), np.int32)

    def encode_prompted(self, prompt, answer, length):
        return self.encode(prompt + answer, length), np.arange(length) >= len(prompt.encode())

    def encode_masked(self, text, length):
        return self.encode(text, length) + 1000, np.arange(length) < len(text.encode())


def config(*files, batch=4, **options):
    defaults = {"height": SIZE, "width": SIZE, "text_length": 6, "teacher_length": 5, "threads": 2}
    made = tuple(file if isinstance(file, SourceConfig) else SourceConfig(file) for file in files)
    return DataConfig(made, batch, **(defaults | options))


def levels(batch):
    """Which rows a batch holds."""
    return batch["target"][:, 0, 0, 0].tolist()


def take(batches, count):
    return [levels(batch) for batch in itertools.islice(batches, count)]
