"""The input pipeline: what batches hold, their order, exact resumption, and what happens to unusable rows."""

import collections
import itertools
import json
import multiprocessing
import re

import numpy as np
import pytest
from PIL import Image

from unialign_jax.data import pipeline
from unialign_jax.data.config import DataConfig
from unialign_jax.data.pipeline import make_batches, merge_states
from unialign_jax.data.report import CorpusError
from unialign_jax.data.schedule import next_stream
from unialign_jax.data.sources import SourceConfig
from unialign_jax.data.tokenizer import Tokenizer

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


def turns(text):
    return [{"from": "human", "value": text}, {"from": "gpt", "value": "<image>"}]


def plain(path, level):
    Image.new("RGB", (SIZE + 2, SIZE), (level, level, level)).save(path)


def write(folder, name, rows):
    path = folder / name
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def corpus(tmp_path):
    """Writes `count` generation rows; row i is an image of grey level i, captioned 'i'. Returns the file."""

    def build(count, name="rows.jsonl", spoil=(), first=0):
        rows = []
        for i in range(first, first + count):
            plain(tmp_path / f"{i}.png", i)
            rows.append({"image": [f"{i}.png"], "conversations": turns(str(i))})
        for i in spoil:
            rows[i - first]["image"] = [f"absent{i}.png"]
        return write(tmp_path, name, rows)

    return build


def config(*files, batch=4, **options):
    defaults = {"height": SIZE, "width": SIZE, "text_length": 6, "teacher_length": 5, "threads": 2}
    made = tuple(file if isinstance(file, SourceConfig) else SourceConfig(file) for file in files)
    return DataConfig(made, batch, **(defaults | options))


def levels(batch):
    """Which rows a batch holds."""
    return batch["target"][:, 0, 0, 0].tolist()


def take(batches, count):
    return [levels(batch) for batch in itertools.islice(batches, count)]


def test_generation_batch(corpus):
    with make_batches(config(corpus(4)), Bytes()) as batches:
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


def test_prompts_of_captions_carry_no_loss(corpus):
    with make_batches(config(corpus(4), caption_prompt="x:"), Bytes()) as batches:
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


def test_every_pass_holds_every_row_once_in_an_order_of_its_own(corpus):
    path = corpus(12)
    runs = []
    for seed in (0, 0, 1):
        with make_batches(config(path, seed=seed), Bytes()) as batches:
            runs.append(take(batches, 9))
    assert runs[0] == runs[1] != runs[2]
    passes = [sum(runs[0][i : i + 3], []) for i in (0, 3, 6)]
    assert all(sorted(rows) == list(range(12)) for rows in passes)
    assert len({tuple(rows) for rows in passes}) == 3


@pytest.mark.parametrize("rows", [12, 13])
def test_hosts_make_parts_of_the_same_batches(corpus, rows):
    path = corpus(rows, spoil=(5,))
    options = {"refused_share": 0.2}
    with make_batches(config(path, **options), Bytes()) as batches:
        alone = take(batches, 10)
    for slots in (range(2), range(2, 4), range(3, 4), (0, 1, 3)):
        with make_batches(config(path, **options), Bytes(), slots=slots) as batches:
            assert take(batches, 10) == [[rows[slot] for slot in slots] for rows in alone]


def hosts(count, *arguments):
    """The iterators of `count` hosts; the last two of more than two hold the same slots."""
    parts = min(count, 2) if count == 3 else count
    slots = [range(4 * i // parts, 4 * (i + 1) // parts) for i in range(parts)]
    slots += slots[-1:] * (count - parts)
    return [make_batches(*arguments, slots=part) for part in slots]


@pytest.mark.parametrize("chunk", [8, 3])
def test_restarts_on_other_numbers_of_hosts_yield_exactly_what_was_not_seen(corpus, monkeypatch, chunk):
    """1 -> 2 -> 4 -> 3 (two of which hold the same samples) -> 1 hosts, in the middle of passes."""
    monkeypatch.setattr(pipeline, "_CHUNK", chunk)
    sources = corpus(30, "a.jsonl", spoil=(3, 17)), SourceConfig(corpus(13, "b.jsonl", first=100), weight=0.5)
    setting = config(*sources, refused_share=0.1, seed=5)
    with make_batches(setting, Bytes()) as batches:
        alone, end = take(batches, 25), batches.get_state()
    seen, state = [], None
    for count in (1, 2, 4, 3, 1):
        running = hosts(count, setting, Bytes())
        for batches in running:
            if state is not None:
                batches.set_state(state)
        parts = [take(batches, 5) for batches in running]
        distinct = parts[:2] if count == 3 else parts
        seen += [sum(rows, []) for rows in zip(*distinct, strict=True)]
        state = json.loads(json.dumps(merge_states([batches.get_state() for batches in running])))
        for batches in running:
            batches.close()
    assert seen == alone
    for merged, expected in zip(state["reports"], end["reports"], strict=True):
        assert merged["refused"] == expected["refused"] and merged["read"] == expected["read"]
        assert sorted(merged["named"]) == sorted(expected["named"])
        assert (merged["pass"], merged["refused_in_pass"]) == (expected["pass"], expected["refused_in_pass"])
    assert end["reports"][0]["refused"]["missing image"] > 2


def test_states_that_make_no_whole_are_refused(corpus):
    setting = config(corpus(12))
    first, second = hosts(2, setting, Bytes())
    with first, second:
        next(first), next(second)
        one, other = first.get_state(), second.get_state()
        with pytest.raises(ValueError, match=r"of the slots \[2, 3\] alone; expected that of whole batches"):
            second.set_state(other)
        for states in ([one], [one, one]):
            with pytest.raises(ValueError, match=r"hold the slots \[0, 1\], expected 0 to 3"):
                merge_states(states)
        next(second)
        with pytest.raises(ValueError, match=r"states differ in drawn: \[\[1\], \[2\]\]"):
            merge_states([one, second.get_state()])
        assert merge_states([other, one])["drawn"] == [1]


def test_sources_alternate_and_are_shuffled_apart(corpus):
    files = corpus(8, "a.jsonl"), corpus(8, "b.jsonl", first=100)
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


def test_resuming_yields_exactly_what_was_not_seen(corpus):
    sources = corpus(30, "a.jsonl", spoil=(3, 17)), SourceConfig(corpus(13, "b.jsonl", first=100), weight=0.5)
    options = {"refused_share": 0.1, "seed": 5}
    with make_batches(config(*sources, **options), Bytes()) as batches:
        states, rows = [batches.get_state()], []
        for _ in range(24):
            rows.append(levels(next(batches)))
            states.append(batches.get_state())
        final = str(batches.reports[0])
    for step in (0, 1, 5, 11, 23):
        state = json.loads(json.dumps(states[step]))
        # Neither threads nor the depth of the prefetch are part of the state.
        with make_batches(config(*sources, threads=1 + step % 3, prefetch=1 + step % 4, **options), Bytes()) as batches:
            batches.set_state(state)
            assert take(batches, 24 - step) == rows[step:]
            assert str(batches.reports[0]) == final
            batches.set_state(states[0])  # and back, on an iterator in use
            assert take(batches, 3) == rows[:3]


def test_states_of_another_pipeline_are_refused(corpus):
    path = corpus(8)
    with make_batches(config(path), Bytes()) as batches:
        next(batches)
        state = batches.get_state()
    others = {
        "seed": make_batches(config(path, seed=1), Bytes()),
        "global_batch": make_batches(config(path, batch=2), Bytes()),
        "weights": make_batches(config(path, path), Bytes()),
        "fingerprints": make_batches(config(corpus(9)), Bytes()),
    }
    for key, batches in others.items():
        with pytest.raises(ValueError, match=f"was saved with {key} = "):
            batches.set_state(state)


@pytest.fixture
def learned():
    """A real tokenizer: worker processes can't import what this test module defines."""
    return Tokenizer.learn([f"a caption number {i}" for i in range(40)], 60)


def test_worker_processes_change_nothing(corpus, learned):
    path = corpus(20, spoil=(4,))
    other = corpus(9, "b.jsonl", first=100)

    def run(workers, state=None, count=12):
        with make_batches(config(path, other, refused_share=0.05, workers=workers), learned) as batches:
            if state is not None:
                batches.set_state(state)
            return list(itertools.islice(batches, count)), batches.get_state()

    here, end = run(0)
    early, state = run(3, count=5)
    late, resumed_end = run(0, state, 7)
    assert resumed_end == end and end["reports"][0]["refused"] == {"missing image": 2}
    for expected, batch in zip(here, early + late, strict=True):
        assert expected.keys() == batch.keys()
        for key in expected:
            np.testing.assert_array_equal(expected[key], batch[key])


def test_a_killed_worker_is_an_error_not_missing_data(corpus, learned):
    with make_batches(config(corpus(200), workers=2), learned) as batches:
        expected = take(batches, 2)
        assert len(expected) == 2
        multiprocessing.active_children()[0].kill()
        with pytest.raises(RuntimeError, match="terminated unexpectedly|worker process died"):
            take(batches, 200)
        with pytest.raises(RuntimeError):
            next(batches)


def test_for_unusable_rows_others_stand_in_and_nothing_moves(corpus, tmp_path):
    with make_batches(config(corpus(200), batch=5), Bytes()) as batches:
        whole = sum(take(batches, 40), [])
    path = corpus(200, spoil=(11, 150))
    with make_batches(config(path, batch=5), Bytes()) as batches:
        rows = sum(take(batches, 40), [])  # one pass
        (report,) = batches.reports
    assert [a for a, b in zip(whole, rows, strict=True) if a != b] == sorted((11, 150), key=whole.index)
    assert set(rows) == set(range(200)) - {11, 150}
    assert set(report.named) == {11, 150} and report.refused == {"missing image": 2} and report.read == 200
    assert report.named[11] == ("line 12", "missing image", f"{str(tmp_path / 'absent11.png')!r}: no such file")


def test_a_corpus_without_a_usable_row_stops_at_once(corpus):
    with make_batches(config(corpus(8, spoil=range(8)), refused_share=0.99), Bytes()) as batches:
        with pytest.raises(CorpusError, match="missing image: 1"):
            next(batches)


def test_over_the_limit_training_stops_with_the_report(corpus):
    path = corpus(100, spoil=(3, 50, 70))
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


class Failing(Bytes):
    def encode(self, text, length):
        if text == "7":
            raise TypeError("a defect of the tokenizer")
        return super().encode(text, length)


def test_an_unexpected_error_is_final_and_names_the_row(corpus):
    with make_batches(config(corpus(12)), Failing()) as batches:
        for _ in range(2):
            with pytest.raises(TypeError, match="a defect of the tokenizer") as caught:
                take(batches, 3)
            assert any("rows.jsonl, line 8" in note for note in caught.value.__notes__)


def test_a_closed_iterator_says_so(corpus):
    batches = make_batches(config(corpus(4)), Bytes())
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


def test_configurations_that_make_no_batches(corpus):
    path = corpus(5)
    with pytest.raises(ValueError, match="sources is empty"):
        config()
    with pytest.raises(ValueError, match="rows.jsonl: weight is 0"):
        config(SourceConfig(path, weight=0))
    with pytest.raises(ValueError, match="rows.jsonl: references is -1"):
        config(SourceConfig(path, references=-1))
    with pytest.raises(CorpusError, match=r"rows.jsonl: 5 rows don't fill one batch; lower global_batch \(6\)"):
        make_batches(config(path, batch=6), Bytes())
    for slots in (range(0), range(2, 5), range(-1, 2), range(4, 6)):
        with pytest.raises(ValueError, match=f"slots is {re.escape(str(tuple(slots)))}, expected a part"):
            make_batches(config(path), Bytes(), slots=slots)
