"""Fixtures for data tests."""

import io
import json

import pytest
from absl import flags
from PIL import Image
from small_batches import Bytes


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
    """Writes generation rows from `first` on, caption 'i', grey level i, of the size that `size(i)` says; the images of
    `spoil` are none, those of `absent` are not there. Returns the file."""

    def write(count, name="rows.jsonl", spoil=(), size=lambda i: (8, 10), first=0, absent=()):
        lines = []
        for i in range(first, first + count):
            if i not in absent:
                (tmp_path / f"{i}.png").write_bytes(b"no image" if i in spoil else encoded(i, *size(i)))
            image = f"absent{i}.png" if i in absent else f"{i}.png"
            lines.append(json.dumps({"image": [image], "conversations": [{"from": "human", "value": str(i)}]}))
        path = tmp_path / name
        path.write_text("\n".join(lines))
        return str(path)

    return write


@pytest.fixture(scope="session")
def byte_tokenizer():
    return Bytes()
