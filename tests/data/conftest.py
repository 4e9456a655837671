"""Fixtures for data tests."""

import io
import json

import numpy as np
import pytest
from absl import flags
from PIL import Image


@pytest.fixture(autouse=True)
def parsed_flags():
    flags.FLAGS.mark_as_parsed()


@pytest.fixture
def encoded():
    """Encodes a plain grey image: the bytes of its file."""

    def encode(level, height=8, width=10, format="PNG", **options):
        buffer = io.BytesIO()
        Image.new("RGB", (width, height), (level, level, level)).save(buffer, format, **options)
        return buffer.getvalue()

    return encode


@pytest.fixture
def write_rows(tmp_path, encoded):
    """Writes generation rows, caption 'i', grey level i; of the size that `size(i)` says. Returns the file."""

    def write(count, name="rows.jsonl", spoil=(), size=lambda i: (8, 10)):
        lines = []
        for i in range(count):
            (tmp_path / f"{i}.png").write_bytes(b"no image" if i in spoil else encoded(i, *size(i)))
            lines.append(json.dumps({"image": [f"{i}.png"], "conversations": [{"from": "human", "value": str(i)}]}))
        path = tmp_path / name
        path.write_text("\n".join(lines))
        return str(path)

    return write


class Bytes:
    """A tokenizer: ids are 2 + the UTF-8 bytes, then 1s."""

    def encode(self, text, length):
        ids = [2 + byte for byte in text.encode()][:length]
        return np.array(ids + [1] * (length - len(ids)), np.int32)

    def encode_prompted(self, prompt, answer, length):
        return self.encode(prompt + answer, length), np.arange(length) >= len(prompt.encode())


@pytest.fixture(scope="session")
def byte_tokenizer():
    return Bytes()
