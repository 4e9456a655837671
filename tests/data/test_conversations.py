"""Conversations: pairs of turns as samples, the forms files have, and every reason to refuse one."""

import json
import pickle

import pytest

from unialign_jax.data.jsonl import ConversationSource
from unialign_jax.data.report import CorpusError
from unialign_jax.data.rows import count_pairs, parse_conversation
from unialign_jax.data.samples import Cause, Refused, Sample


def talk(*texts, speakers=("human", "gpt")):
    return [{"from": speakers[i % 2], "value": text} for i, text in enumerate(texts)]


ROW = {"id": "7", "image": "a.png", "conversations": talk("<image>\nhow many?", "two", "of what?", "cats")}


def parse(row, pair=0, task=None):
    return parse_conversation(json.dumps(row).encode(), task, pair, lambda path: "/data/" + path)


def test_each_pair_of_turns_is_a_sample():
    assert parse(ROW) == Sample("answer", "/data/a.png", question="how many?", answer="two")
    assert parse(ROW, 1, "answer") == Sample("answer", "/data/a.png", question="of what?", answer="cats")
    assert parse(ROW, 1, "caption") == Sample("caption", "/data/a.png", caption="cats", instruction="cats")
    assert parse(ROW | {"image": ["a.png"]}) == parse(ROW)
    user = {"conversations": [{"from": "system", "value": "be kind"}, *talk("x?", "y", speakers=("user", "assistant"))]}
    assert parse(ROW | user) == Sample("answer", "/data/a.png", question="x?", answer="y")
    assert [count_pairs(json.dumps(row).encode()) for row in (ROW, ROW | user)] == [2, 1]


@pytest.mark.parametrize(
    ("row", "cause", "words"),
    [
        ({"conversations": ROW["conversations"]}, Cause.MISSING_KEY, "'image'"),
        ({"image": "a.png"}, Cause.MISSING_KEY, "'conversations'"),
        (ROW | {"image": ["a.png", "b.png"]}, Cause.IMAGE_COUNT, "expected 1, found 2"),
        (ROW | {"image": 3}, Cause.WRONG_TYPE, "'image'"),
        (ROW | {"image": ""}, Cause.MISSING_IMAGE, "empty"),
        (ROW | {"conversations": []}, Cause.WRONG_TYPE, "'conversations'"),
        (ROW | {"conversations": [3, 4]}, Cause.WRONG_TYPE, "'conversations'"),
        (ROW | {"conversations": [{"from": "system", "value": "x"}]}, Cause.TURNS_OUT_OF_ORDER, "found 0 turns"),
        (ROW | {"conversations": talk("x?", "y", "z?")}, Cause.TURNS_OUT_OF_ORDER, "found 3 turns"),
        (ROW | {"conversations": talk("y", "x?", speakers=("gpt", "human"))}, Cause.TURNS_OUT_OF_ORDER, "from 'gpt'"),
        (ROW | {"conversations": [{"value": "x"}] * 2}, Cause.MISSING_KEY, "'conversations'[0]: 'from'"),
        (ROW | {"conversations": talk("x?", None)}, Cause.WRONG_TYPE, "'conversations'[1]: 'value'"),
        (ROW | {"conversations": talk("<image>\n", "y")}, Cause.EMPTY_TEXT, "question"),
        (ROW | {"conversations": talk("x?", " ")}, Cause.EMPTY_TEXT, "answer"),
        ([1], Cause.MALFORMED_JSON, "list"),
    ],
)
def test_unusable_conversations_are_refused_by_cause(row, cause, words):
    with pytest.raises(Refused) as caught:
        parse(row)
    assert caught.value.cause is cause and words in caught.value.detail
    assert count_pairs(json.dumps(row).encode()) >= 1


ROWS = [ROW, ROW | {"image": "é.png"}, {"image": "c.png"}, ROW | {"conversations": talk("q?", "é")}]


@pytest.mark.parametrize("form", ["lines", "array", "indented array"])
def test_both_forms_of_a_file_hold_the_same_samples(tmp_path, form):
    if form == "lines":
        content = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
    else:
        content = "\ufeff \n" + json.dumps(ROWS, ensure_ascii=False, indent=2 if "indented" in form else None) + "\n"
    path = tmp_path / "talks.json"
    path.write_text(content.replace("cats", "cats \U0001f408\x85\xa0"), encoding="utf-8")
    source = pickle.loads(pickle.dumps(ConversationSource(path)))
    assert len(source) == 6
    cats = "cats \U0001f408"
    assert [source[i].answer for i in (5, 0, 1, 2, 3)] == ["é", "two", cats, "two", cats]
    assert source[2].target == str(tmp_path / "é.png")
    with pytest.raises(Refused, match="missing key: 'conversations'"):
        source[4]
    unit, numbers = ("line", (1, 3, 5, 7)) if form == "lines" else ("row", (1, 2, 3, 4))
    expected = [(numbers[0], 1), (numbers[0], 2), (numbers[1], 1), (numbers[1], 2), (numbers[2], 1), (numbers[3], 1)]
    assert [source.place(i) for i in range(6)] == [f"{unit} {row}, pair {pair}" for row, pair in expected]
    assert source.fingerprint()["samples"] == 6


def test_files_that_are_no_conversations(tmp_path):
    with pytest.raises(CorpusError, match="absent.json: expected a file of JSON rows, found no such file"):
        ConversationSource(tmp_path / "absent.json")
    path = tmp_path / "talks.json"
    for content in ('[{"image": 3}]\n[3]', '["x"]\n{"image": 3}'):  # what follows would be lost
        path.write_text(content)
        with pytest.raises(CorpusError, match="talks.json: expected an array of JSON objects: .* is followed by"):
            ConversationSource(path)
    for content in ("[", "[}", '[{"image": 3}', "[" * 100_000, "\ufeff[1 2"):
        path.write_text(content)
        with pytest.raises(CorpusError, match="talks.json: expected an array of JSON objects"):
            ConversationSource(path)
    for content in ("", "[]", "\n"):
        path.write_text(content)
        with pytest.raises(CorpusError, match="talks.json: expected JSON objects, one per line, found no rows"):
            ConversationSource(path)
    with pytest.raises(ValueError, match="conversations are for answer, caption or generate, not for 'edit'"):
        ConversationSource(path, "edit")
