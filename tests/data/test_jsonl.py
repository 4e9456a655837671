"""Reading rows: every published form, and every reason to refuse one."""

import json
import os
import pickle
import zlib

import pytest
from etils import epath

from unialign_jax import storage
from unialign_jax.data import jsonl
from unialign_jax.data.jsonl import JsonlSource
from unialign_jax.data.report import CorpusError
from unialign_jax.data.rows import parse_row
from unialign_jax.data.samples import Cause, Refused, Sample
from unialign_jax.data.sources import SourceConfig, open_source

TURNS = [{"from": "human", "value": "a cat"}, {"from": "gpt", "value": "<image>"}]
GENERATE = {"dataset": "d", "image": ["a.png"], "conversations": TURNS, "img_w": [1], "img_h": [1]}
EDIT = {"image": ["a.png", "b.png"], "conversations": TURNS, "instruction": "make it red"}
COMPOSE = {
    "original_images": ["a.png", "b.png"],
    "generated_images": ["c.png"],
    "edit_prompt": ' \\"put both on a table\\" ',
    "caption": "both on a table",
}
ANSWER = {"image": ["a.png"], "question": "how many?", "answer": "two"}


def find(path):
    return path if "://" in path else os.path.join("/data", path)


def parse(row, task=None):
    line = row if isinstance(row, bytes) else json.dumps(row).encode()
    return parse_row(line, task, find)


def refusal(row, task=None):
    with pytest.raises(Refused) as caught:
        parse(row, task)
    return caught.value


def test_published_forms():
    cat = {"caption": "a cat", "instruction": "a cat"}
    assert parse(GENERATE) == Sample("generate", "/data/a.png", **cat)
    assert parse(GENERATE, "caption") == Sample("caption", "/data/a.png", **cat)
    edit = {"references": ("/data/a.png",), "caption": "a cat", "instruction": "make it red"}
    assert parse(EDIT) == Sample("edit", "/data/b.png", **edit)
    assert parse(EDIT, "perceive") == Sample("perceive", "/data/b.png", **edit)
    assert parse(COMPOSE) == Sample(
        "compose",
        "/data/c.png",
        ("/data/a.png", "/data/b.png"),
        caption="both on a table",
        instruction="put both on a table",
    )
    assert parse(ANSWER) == Sample("answer", "/data/a.png", question="how many?", answer="two")


def test_paths_are_relative_to_the_file_unless_absolute():
    for path, expected in {"x/a.png": "/data/x/a.png", "/b/a.png": "/b/a.png", "gs://b/a.png": "gs://b/a.png"}.items():
        assert parse(GENERATE | {"image": [path]}).target == expected
        assert parse(GENERATE | {"image": path}).target == expected
    assert parse(COMPOSE | {"original_images": "a.png"}).references == ("/data/a.png",)
    assert storage.beside(epath.Path("/data/rows.jsonl"), "../b.png") == "/data/../b.png"  # which may be a link
    assert storage.beside(epath.Path("gs://b/data/rows.jsonl"), "../a/b.png") == "gs://b/a/b.png"


@pytest.mark.parametrize(
    ("row", "task", "cause", "words"),
    [
        (b'{"image": ["a.png"', None, Cause.MALFORMED_JSON, "delimiter"),
        (b"\xff\xfe{}", None, Cause.MALFORMED_JSON, "utf-8"),
        (b"[" * 100_000, None, Cause.MALFORMED_JSON, ""),
        (b"[1, 2]", None, Cause.MALFORMED_JSON, "expected an object, found list"),
        (b"null", None, Cause.MALFORMED_JSON, "NoneType"),
        ({}, None, Cause.MISSING_KEY, "'image'"),
        ({"image": ["a.png"]}, None, Cause.MISSING_KEY, "'conversations'"),
        (GENERATE, "edit", Cause.IMAGE_COUNT, "'image': expected 2, found 1"),
        (EDIT | {"conversations": [{"from": "human"}]}, None, Cause.MISSING_KEY, "'conversations'[0]: 'value'"),
        ({k: v for k, v in EDIT.items() if k != "instruction"}, "edit", Cause.MISSING_KEY, "'instruction'"),
        ({k: v for k, v in COMPOSE.items() if k != "edit_prompt"}, None, Cause.MISSING_KEY, "'edit_prompt'"),
        (EDIT | {"image": "a.png"}, None, Cause.IMAGE_COUNT, "'image': expected 2, found 1"),
        (GENERATE | {"image": [3]}, None, Cause.WRONG_TYPE, "'image'"),
        (GENERATE | {"conversations": []}, None, Cause.WRONG_TYPE, "'conversations'"),
        (GENERATE | {"conversations": ["a cat"]}, None, Cause.WRONG_TYPE, "'conversations'"),
        (GENERATE | {"conversations": [{"value": None}]}, None, Cause.WRONG_TYPE, "NoneType"),
        (EDIT | {"instruction": 5}, None, Cause.WRONG_TYPE, "'instruction'"),
        (GENERATE | {"conversations": [{"value": " \n"}]}, None, Cause.EMPTY_TEXT, "caption"),
        (EDIT | {"instruction": ""}, None, Cause.EMPTY_TEXT, "instruction"),
        (COMPOSE | {"edit_prompt": ' \\" '}, None, Cause.EMPTY_TEXT, "instruction"),
        (COMPOSE | {"caption": ""}, None, Cause.EMPTY_TEXT, "caption"),
        (ANSWER | {"answer": ""}, None, Cause.EMPTY_TEXT, "answer"),
        (GENERATE | {"conversations": [{"value": "\ud83d"}]}, None, Cause.MALFORMED_TEXT, "caption"),
        (GENERATE | {"image": []}, None, Cause.IMAGE_COUNT, "expected 1, found 0"),
        (GENERATE | {"image": ["a.png", "b.png"]}, None, Cause.IMAGE_COUNT, "expected 1, found 2"),
        (EDIT | {"image": ["a.png"]}, None, Cause.IMAGE_COUNT, "expected 2, found 1"),
        (EDIT | {"image": ["a.png"] * 3}, None, Cause.IMAGE_COUNT, "expected 2, found 3"),
        (COMPOSE | {"original_images": []}, None, Cause.IMAGE_COUNT, "1 or more"),
        (COMPOSE | {"generated_images": ["c.png", "d.png"]}, None, Cause.IMAGE_COUNT, "'generated_images'"),
        (GENERATE | {"image": [""]}, None, Cause.MISSING_IMAGE, "empty"),
        # A conversation of LLaVA's form, read as a published row.
        (
            GENERATE | {"conversations": [{"from": "human", "value": "<image>\nWhat is it?"}]},
            *(None, Cause.TURNS_OUT_OF_ORDER, "expected format=conversations"),
        ),
    ],
)
def test_unusable_rows_are_refused_by_cause(row, task, cause, words):
    refused = refusal(row, task)
    assert refused.cause is cause
    assert words in refused.detail


def test_a_sample_of_no_task_is_a_programming_error():
    with pytest.raises(ValueError, match="no task 'draw'; the tasks are generate"):
        Sample("draw", "a.png", caption="x", instruction="x")
    with pytest.raises(ValueError, match=r"rows.jsonl: no task 'draw'"):
        JsonlSource("rows.jsonl", "draw")
    with pytest.raises(Refused, match="takes no reference"):
        Sample("generate", "a.png", ("b.png",), caption="x", instruction="x")


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 1 << 20])
def test_random_access_to_lines_however_they_are_broken(tmp_path, monkeypatch, chunk):
    """Blank lines, both kinds of line break, a byte order mark, no break at the end; lines split over chunks."""
    monkeypatch.setattr(jsonl, "_CHUNK", chunk)
    rows = [json.dumps(GENERATE | {"image": [f"{i}é.png"]}, ensure_ascii=False).encode() for i in range(4)]
    lines = [b"\xef\xbb\xbf" + rows[0] + b"\r", b"", rows[1], b"\r", b" \t " * 7, b" x", *rows[2:]]
    content = b"\n".join(lines)
    path = tmp_path / "rows.jsonl"
    for ending in (b"", b"\n", b"\r\n", b"\n" + b" " * 20, b"\n\t\r\n"):
        path.write_bytes(content + ending)
        source = JsonlSource(path)
        assert len(source) == 5
        assert [source.place(i) for i in range(5)] == [f"line {n}" for n in (1, 3, 6, 7, 8)]
        for index, i in {0: 0, 4: 3, 1: 1, 3: 2}.items():
            assert source[index].target == str(tmp_path / f"{i}é.png")
        with pytest.raises(Refused, match="malformed JSON"):
            source[2]
        assert source.fingerprint() == {"rows": 5, "checksum": zlib.crc32(content + ending), "task": None}
    assert pickle.loads(pickle.dumps(source))[4] == source[4]


def test_the_same_rows_in_another_order_or_for_another_task_are_another_source(tmp_path):
    rows = [json.dumps(GENERATE | {"image": [f"{i}.png"]}) for i in range(3)]
    prints = []
    for order, task in ((1, None), (1, None), (-1, None), (1, "caption")):
        (tmp_path / "rows.jsonl").write_text("\n".join(rows[::order]))
        prints.append(JsonlSource(tmp_path / "rows.jsonl", task).fingerprint())
    assert prints[0] == prints[1] and prints[0] not in prints[2:]


def test_sources_that_are_no_files(tmp_path):
    with pytest.raises(CorpusError, match=r"absent.jsonl: expected a file of JSON rows, found no such file"):
        JsonlSource(tmp_path / "absent.jsonl")
    with pytest.raises(CorpusError, match="found a directory"):
        JsonlSource(tmp_path)
    for address in ("http://host/rows.jsonl", "s3://bucket/rows.jsonl"):
        with pytest.raises(ValueError, match=f"{address}: expected a local path or gs://"):
            open_source(SourceConfig(address, "rows", "caption"))
    for content in (b"", b"\n\r\n\n", b" " * 20):
        (tmp_path / "empty.jsonl").write_bytes(content)
        with pytest.raises(CorpusError, match=r"empty.jsonl: .* found no rows"):
            JsonlSource(tmp_path / "empty.jsonl")
