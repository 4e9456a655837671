"""A thousand rows and images with accidents: none ends a run, none costs a good row, each is named or used."""

import io
import itertools
import json
import re
import tarfile

import numpy as np
import pytest
from PIL import Image

from unialign_jax.data.build import build
from unialign_jax.data.config import DataConfig
from unialign_jax.data.jsonl import ConversationSource, JsonlSource
from unialign_jax.data.pipeline import make_batches
from unialign_jax.data.samples import Cause
from unialign_jax.data.sources import SourceConfig
from unialign_jax.data.tfds_source import TfdsSource
from unialign_jax.data.webdataset import TarSource

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL", "ignore:Truncated File Read")

COUNT = 1500
FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP")
VALUES = [None, 3, "", [], {}, [[]], "\ud800", [""], ["\0"], [{"value": ""}], ["absent.png"], {"a": 1}, 1e400, True]


def spoil_text(rng, line):
    """A line with one accident: bytes changed, lost or doubled; a value of another type; a key lost."""
    kind = rng.integers(4)
    if kind == 0:
        data = bytearray(line)
        for _ in range(rng.integers(1, 4)):
            data[rng.integers(len(data))] = rng.choice([c for c in range(256) if c not in b"\r\n"])
        return bytes(data)
    if kind == 1:
        start, end = np.sort(rng.integers(0, len(line), 2))
        return line[:start] + line[end:] if rng.integers(2) else line[:end] + line[start:]
    row = json.loads(line)
    key = str(rng.choice(list(row)))
    if kind == 2:
        del row[key]
    else:
        row[key] = VALUES[rng.integers(len(VALUES))]
    return json.dumps(row).encode()


def spoil_image(rng, data):
    """A file cut off, or with some bytes changed."""
    data = bytearray(data)
    if rng.integers(2):
        return bytes(data[: rng.integers(len(data))])
    for _ in range(rng.integers(1, 12)):
        data[rng.integers(len(data))] = rng.integers(256)
    return bytes(data)


def draw_image(rng, format):
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (12, 9, 3), dtype=np.uint8)).save(file, format)
    return file.getvalue()


def turns(*texts):
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def row(i, name):
    """Row i, of one of the published forms; its text for the text pass is str(i)."""
    return (
        {"image": [name], "conversations": turns(str(i))},
        {"image": [name, name], "conversations": turns(str(i)), "instruction": "x"},
        {"original_images": [name] * 2, "generated_images": [name], "edit_prompt": "x", "caption": str(i)},
        {"image": [name], "question": str(i), "answer": "x"},
    )[i % 4]


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory):
    """(folder with rows.jsonl, numbers of the rows that met with an accident: a thousand)."""
    folder = tmp_path_factory.mktemp("spoilt")
    rng = np.random.default_rng(0)
    unlucky = set(rng.permutation(COUNT)[:1000].tolist())
    lines = []
    for i in range(COUNT):
        name = f"{i}.{FORMATS[i % 6].lower()}"
        line, data = json.dumps(row(i, name)).encode(), draw_image(rng, FORMATS[i % 6])
        if i in unlucky and rng.integers(2):
            line = spoil_text(rng, line) or b"?"
        elif i in unlucky:
            data = spoil_image(rng, data)
        (folder / name).write_bytes(data)
        lines.append(line)
    (folder / "rows.jsonl").write_bytes(b"\n".join(lines))
    return folder, unlucky


def numbers(ids):
    """Which rows made these caption ids."""
    texts = ["".join(chr(i - 2) for i in text if i != 1) for text in ids.tolist()]
    return {int(text) for text in (re.sub("x$", "", text) for text in texts) if text.isdecimal()}


@pytest.fixture(scope="module")
def account(spoilt, byte_tokenizer):
    """(rows that one pass of the input pipeline yields, its report)."""
    folder, _ = spoilt
    source = SourceConfig(str(folder / "rows.jsonl"), references=2)
    seen = set()
    config = DataConfig((source,), 50, height=8, width=8, text_length=8, refused_share=0.9, threads=2)
    with make_batches(config, byte_tokenizer) as batches:
        for batch in itertools.islice(batches, COUNT // 50):
            seen |= numbers(batch["caption_ids"])
        return seen, batches.reports[0]


def test_rows_are_used_or_named(spoilt, account):
    _, unlucky = spoilt
    seen, report = account
    assert seen >= set(range(COUNT)) - unlucky
    assert report.read == COUNT and set(report.named) <= unlucky
    # Accidents that leave a row usable may change its number, so only the refused are told apart exactly.
    assert report.refused.total() == len(report.named) > 600
    assert len(report.refused) >= 11 and set(report.refused) <= set(map(str, Cause))
    for place, cause, detail in report.named.values():
        assert re.fullmatch(r"line \d+", place) and (detail or cause)


def test_building_refuses_the_same_rows(spoilt, account, tmp_path):
    folder, _ = spoilt
    source = JsonlSource(folder / "rows.jsonl")
    report = build(source, tmp_path / "made", refused_share=0.9)
    built = {row: cause for row, (_, cause, _) in report.named.items()}
    # But for rows with more references than a batch has room for, which only batches know.
    trained = {row: cause for row, (_, cause, detail) in account[1].named.items() if "is configured for" not in detail}
    assert built == trained
    made = TfdsSource(tmp_path / "made")
    assert [made[i].task for i in range(len(made))] == [source[i].task for i in range(COUNT) if i not in built]


def test_conversations(tmp_path):
    rng = np.random.default_rng(1)
    (tmp_path / "a.png").write_bytes(draw_image(rng, "PNG"))
    talks = [{"image": "a.png", "conversations": turns(str(i), "x", str(i), "x")} for i in range(600)]
    unlucky = set(rng.permutation(600)[:400].tolist())
    lines = [json.dumps(talk).encode() for talk in talks]
    lines = [spoil_text(rng, line) or b"?" if i in unlucky else line for i, line in enumerate(lines)]
    (tmp_path / "talks.jsonl").write_bytes(b"\n".join(lines))
    source = ConversationSource(tmp_path / "talks.jsonl")
    report = build(source, tmp_path / "made", refused_share=0.9)
    made = TfdsSource(tmp_path / "made")
    questions = [made[i].question for i in range(len(made))]
    assert all(questions.count(str(i)) >= 2 for i in range(600) if i not in unlucky)
    lines = {int(re.match(r"line (\d+), pair", place)[1]) - 1 for place, _, _ in report.named.values()}
    assert lines <= unlucky and len(lines) > 200 and len(source) == report.read


def test_tars(tmp_path):
    rng = np.random.default_rng(2)
    unlucky = set(rng.permutation(300)[:200].tolist())
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for i in range(300):
            members = {"png": draw_image(rng, "PNG"), "json": json.dumps(row(4 * i, f"{i}.png")).encode()}
            if i in unlucky:
                kind = rng.integers(4)
                if kind == 0:
                    members["png"] = spoil_image(rng, members["png"])
                elif kind == 1:
                    members["json"] = spoil_text(rng, members["json"])
                else:
                    del members[["png", "json"][kind - 2]]
            for suffix, data in members.items():
                info = tarfile.TarInfo(f"{i}.{suffix}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    report = build(TarSource(tmp_path / "a.tar"), tmp_path / "made", refused_share=0.9)
    made = TfdsSource(tmp_path / "made")
    captions = {made[i].caption for i in range(len(made))}
    assert captions >= {str(4 * i) for i in range(300) if i not in unlucky}
    keys = {int(place.split(", ")[1]) for place, _, _ in report.named.values()}
    assert keys <= unlucky and len(keys) > 100
