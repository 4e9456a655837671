"""The input pipeline: what batches hold, their order, and what happens to unusable rows."""

import collections
import dataclasses
import json
import pathlib
import re

import numpy as np
import pytest
from PIL import Image
from small_batches import SIZE, Bytes, config, levels, take

from unialign_jax import agreement
from unialign_jax.data.pipeline import DataChanged, make_batches
from unialign_jax.data.report import CorpusError
from unialign_jax.data.schedule import next_stream
from unialign_jax.data.sources import SourceConfig


def turns(text):
    return [{"from": "human", "value": text}, {"from": "gpt", "value": "<image>"}]


def plain(path, level):
    Image.new("RGB", (SIZE + 2, SIZE), (level, level, level)).save(path)


def write(folder, name, rows):
    path = folder / name
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def test_generation_batch(write_rows):
    with make_batches(config(write_rows(4)), Bytes()) as batches:
        batch = next(batches)
    assert sorted(batch) == ["caption_ids", "caption_loss_mask", "instruction_ids", "target"]
    assert batch["target"].shape == (4, SIZE, SIZE, 3) and batch["target"].dtype == np.uint8
    assert batch["caption_ids"].shape == (4, 6) and batch["caption_ids"].dtype == np.int32
    assert batch["caption_loss_mask"].all() and batch["caption_loss_mask"].dtype == bool
    for level, caption, instruction in zip(levels(batch), batch["caption_ids"], batch["instruction_ids"], strict=True):
        np.testing.assert_array_equal(caption, Bytes().encode(str(level), 6))
        np.testing.assert_array_equal(instruction, caption)


def test_references_are_padded_and_masked(tmp_path):
    for i in range(10):
        plain(tmp_path / f"{i}.png", 10 * i + 1)
    rows = [
        {
            "original_images": [f"{j}.png" for j in range(1, 2 + i)],
            "generated_images": [f"{i + 5}.png"],
            "edit_prompt": f"put {i}",
            "caption": f"cap {i}",
        }
        for i in range(3)
    ]
    rows.append({"image": ["8.png", "9.png"], "conversations": turns("cap 3"), "instruction": "put 3"})
    path = write(tmp_path, "compose.jsonl", rows)
    with make_batches(config(SourceConfig(path, references=3)), Bytes(), Bytes()) as batches:
        batch = next(batches)
    assert batch["references"].shape == (4, 3, SIZE, SIZE, 3) and batch["references"].dtype == np.uint8
    assert batch["reference_mask"].shape == (4, 3) and batch["reference_mask"].dtype == bool
    expected = {51: [11, 0, 0], 61: [11, 21, 0], 71: [11, 21, 31], 91: [81, 0, 0]}
    assert sorted(levels(batch)) == sorted(expected)
    for row, level in enumerate(levels(batch)):
        references = batch["references"][row]
        assert (references == references[:, :1, :1, :1]).all()
        assert references[:, 0, 0, 0].tolist() == expected[level]
        np.testing.assert_array_equal(batch["reference_mask"][row], np.array(expected[level]) > 0)
        i = list(expected).index(level)
        np.testing.assert_array_equal(batch["caption_ids"][row], Bytes().encode(f"cap {i}", 6))
        np.testing.assert_array_equal(batch["instruction_ids"][row], Bytes().encode(f"put {i}", 6))
        np.testing.assert_array_equal(batch["teacher_ids"][row], Bytes().encode(f"cap {i}", 5) + 1000)
    assert batch["teacher_mask"].all()


def test_prompts_of_captions_carry_no_loss(write_rows):
    with make_batches(config(write_rows(4), caption_prompt="x:"), Bytes()) as batches:
        batch = next(batches)
    for level, ids, instruction in zip(levels(batch), batch["caption_ids"], batch["instruction_ids"], strict=True):
        np.testing.assert_array_equal(ids, Bytes().encode(f"x:{level}", 6))
        np.testing.assert_array_equal(instruction, Bytes().encode(str(level), 6))
    assert batch["caption_loss_mask"].tolist() == [[False, False, True, True, True, True]] * 4


def test_questions_carry_no_loss(tmp_path):
    plain(tmp_path / "a.png", 3)
    path = write(tmp_path, "vqa.jsonl", [{"image": ["a.png"], "question": "ab?", "answer": "no"}])
    with make_batches(config(path, batch=1), Bytes(), Bytes()) as batches:
        batch = next(batches)
    np.testing.assert_array_equal(batch["caption_ids"][0], Bytes().encode("ab?no", 6))
    assert batch["caption_loss_mask"][0].tolist() == [False] * 3 + [True] * 3
    np.testing.assert_array_equal(batch["instruction_ids"], batch["caption_ids"])
    np.testing.assert_array_equal(batch["teacher_ids"][0], Bytes().encode("ab? no", 5) + 1000)
    # There must be room for an answer, or its end alone would be learned.
    path = write(tmp_path, "vqa.jsonl", [{"image": ["a.png"], "question": "abcde?", "answer": "no"}])
    with make_batches(config(path, batch=1), Bytes()) as batches, pytest.raises(CorpusError, match="leaves none for"):
        next(batches)


def test_every_pass_holds_every_row_once_in_an_order_of_its_own(write_rows):
    path = write_rows(12)
    runs = []
    for seed in (0, 0, 1):
        with make_batches(config(path, seed=seed), Bytes()) as batches:
            runs.append(take(batches, 9))
    assert runs[0] == runs[1] != runs[2]
    passes = [sum(runs[0][i : i + 3], []) for i in (0, 3, 6)]
    assert all(sorted(rows) == list(range(12)) for rows in passes)
    assert len({tuple(rows) for rows in passes}) == 3


def test_sources_alternate_and_are_shuffled_apart(write_rows):
    files = write_rows(8, "a.jsonl"), write_rows(8, "b.jsonl", first=100)
    with make_batches(config(*files), Bytes()) as batches:
        drawn = take(batches, 16)
    assert all(all((level >= 100) == bool(step % 2) for level in rows) for step, rows in enumerate(drawn))
    orders = [sum(drawn[i::2], []) for i in (0, 1)]
    assert orders[0] != [level - 100 for level in orders[1]]
    # Nor is one source's order another's, a pass later.
    assert orders[0][8:16] != [level - 100 for level in orders[1][:8]] and orders[0][:8] != [
        level - 100 for level in orders[1][8:16]
    ]


def draws(weights, steps):
    counts, order = [0] * len(weights), []
    for _ in range(steps):
        order.append(next_stream(weights, counts))
        counts[order[-1]] += 1
    return order


def test_schedule():
    assert draws((1, 1), 6) == [0, 1] * 3
    assert draws((0.2, 0.2, 0.2), 6) == [0, 1, 2] * 2
    assert collections.Counter(draws((3, 1), 8)) == {0: 6, 1: 2}
    assert draws((3, 1), 8) == draws((3, 1), 4) * 2
    rng = np.random.default_rng(0)
    for _ in range(20):
        weights = rng.uniform(0.05, 1, rng.integers(2, 7)).tolist()
        order = draws(weights, 400)
        counts = np.cumsum(np.eye(len(weights))[order], 0)
        share = np.array(weights) / sum(weights)
        behind = np.abs(counts - share * np.arange(1, 401)[:, None])
        assert behind.max() < 2


def test_for_unusable_rows_others_stand_in_and_nothing_moves(write_rows, tmp_path):
    with make_batches(config(write_rows(200), batch=5), Bytes()) as batches:
        whole = sum(take(batches, 40), [])
    path = write_rows(200, absent=(11, 150))
    with make_batches(config(path, batch=5), Bytes()) as batches:
        rows = sum(take(batches, 40), [])  # one pass
        (report,) = batches.reports
    assert [a for a, b in zip(whole, rows, strict=True) if a != b] == sorted((11, 150), key=whole.index)
    assert set(rows) == set(range(200)) - {11, 150}
    assert set(report.named) == {11, 150} and report.refused == {"missing image": 2} and report.read == 200
    assert report.named[11] == ("line 12", "missing image", f"{str(tmp_path / 'absent11.png')!r}: no such file")


def test_a_corpus_without_a_usable_row_stops_at_once(write_rows):
    with make_batches(config(write_rows(8, absent=range(8)), refused_share=0.99), Bytes()) as batches:
        with pytest.raises(CorpusError, match="missing image: 1"):
            next(batches)


def test_over_the_limit_training_stops_with_the_report(write_rows):
    path = write_rows(100, absent=(3, 50, 70))
    with make_batches(config(path, refused_share=0.02), Bytes()) as batches:
        with pytest.raises(CorpusError) as caught:
            take(batches, 25)
        assert "rows.jsonl: 3 of" in str(caught.value) and "missing image: 3" in str(caught.value)
        for line in (4, 51, 71):
            assert f"line {line}: " in str(caught.value)
        with pytest.raises(CorpusError):  # and stays stopped
            next(batches)


def test_a_source_without_room_for_its_references_says_what_to_set(tmp_path):
    plain(tmp_path / "a.png", 1)
    row = {"image": ["a.png", "a.png"], "conversations": turns("x"), "instruction": "y"}
    path = write(tmp_path, "edit.jsonl", [row] * 4)
    with make_batches(config(path), Bytes()) as batches:
        with pytest.raises(CorpusError, match="wrong number of images: 1\n.*set its references to 1"):
            next(batches)


def test_processes_with_other_data_are_refused(write_rows, monkeypatch):
    """Before the first batch, by the name of what differs."""
    told = []
    monkeypatch.setattr(agreement, "gather", lambda mine: told.append(mine) or [told[0], mine])
    one, other = config(write_rows(8)), config(write_rows(8, "other.jsonl", first=1))
    with make_batches(one, Bytes()), make_batches(one, Bytes()):
        pass
    with pytest.raises(DataChanged, match="other.jsonl: not the same in process 1 and in process 0"):
        make_batches(other, Bytes())
    with pytest.raises(DataChanged, match="the config's weights, or the sizes of images: not the same in process 1"):
        make_batches(dataclasses.replace(one, seed=5), Bytes())


@pytest.mark.parametrize("alone", [True, False])
def test_where_processes_make_the_same_rows_no_other_stands_in_for_what_one_cannot_read(write_rows, monkeypatch, alone):
    path = write_rows(40)
    (image := pathlib.Path(path).with_name("7.png")).unlink()
    image.symlink_to("/proc/self/mem")  # to read it fails
    monkeypatch.setattr(agreement, "gather", lambda mine: [mine] if alone else [mine, mine])
    with make_batches(config(path, refused_share=0.5), Bytes()) as batches:
        if alone:
            assert 7 not in sum(take(batches, 10), [])
            return
        with pytest.raises(CorpusError, match=r"rows.jsonl, line 8: .*7.png.* Another process makes the same row"):
            take(batches, 10)


class Failing(Bytes):
    def encode(self, text, length):
        if text == "7":
            raise TypeError("a defect of the tokenizer")
        return super().encode(text, length)


def test_an_unexpected_error_is_final_and_names_the_row(write_rows):
    with make_batches(config(write_rows(12)), Failing()) as batches:
        for _ in range(2):
            with pytest.raises(TypeError, match="a defect of the tokenizer") as caught:
                take(batches, 3)
            assert any("rows.jsonl, line 8" in note for note in caught.value.__notes__)


def test_a_closed_iterator_says_so(write_rows):
    batches = make_batches(config(write_rows(4)), Bytes())
    next(batches)
    batches.close()
    batches.close()
    with pytest.raises(RuntimeError, match="closed"):
        next(batches)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch": 0}, "global_batch is 0, expected 1 or more"),
        ({"height": -8}, "height is -8"),
        ({"seed": -1}, "seed is -1"),
        ({"refused_share": 1.0}, "refused_share is 1.0"),
        ({"workers": -1}, "workers is -1"),
        ({"prefetch": 0}, "prefetch is 0"),
    ],
)
def test_values_out_of_range(options, words):
    with pytest.raises(ValueError, match=words):
        config("rows.jsonl", **options)


def test_configurations_that_make_no_batches(write_rows):
    path = write_rows(5)
    with pytest.raises(ValueError, match="sources is empty"):
        config()
    with pytest.raises(ValueError, match="rows.jsonl: weight is 0"):
        config(SourceConfig(path, weight=0))
    with pytest.raises(ValueError, match="rows.jsonl: no task 'describe'; the tasks are generate"):
        config(SourceConfig(path, task="describe"))
    with pytest.raises(ValueError, match="rows.jsonl: references is -1"):
        config(SourceConfig(path, references=-1))
    with pytest.raises(CorpusError, match=r"rows.jsonl: 5 rows don't fill one batch; lower data.global_batch \(6\)"):
        make_batches(config(path, batch=6), Bytes())
    for slots in (range(0), range(2, 5), range(-1, 2), range(4, 6)):
        with pytest.raises(ValueError, match=f"slots is {re.escape(str(tuple(slots)))}, expected a part"):
            make_batches(config(path), Bytes(), slots=slots)
