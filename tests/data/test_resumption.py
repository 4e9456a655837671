"""The input pipeline taken up again: on any number of hosts and workers, exactly what was not seen comes next."""

import itertools
import json
import multiprocessing
import os
import pathlib
import subprocess
import sys
import time

import numpy as np
import pytest
from small_batches import Bytes, config, levels, take

from unialign_jax.data import streams
from unialign_jax.data.pipeline import DataChanged, make_batches, merge_states
from unialign_jax.data.sources import SourceConfig
from unialign_jax.data.tokenizer import Tokenizer


@pytest.mark.parametrize("rows", [12, 13])
def test_hosts_make_parts_of_the_same_batches(write_rows, rows):
    path = write_rows(rows, absent=(5,))
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
def test_restarts_on_other_numbers_of_hosts_yield_exactly_what_was_not_seen(write_rows, monkeypatch, chunk):
    """1 -> 2 -> 4 -> 3 (two of which hold the same samples) -> 1 hosts, in the middle of passes."""
    monkeypatch.setattr(streams, "CHUNK", chunk)
    sources = write_rows(30, "a.jsonl", absent=(3, 17)), SourceConfig(write_rows(13, "b.jsonl", first=100), weight=0.5)
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


def test_states_that_make_no_whole_are_refused(write_rows):
    setting = config(write_rows(12))
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


def test_hosts_that_could_use_different_rows_of_those_they_share_are_refused(write_rows):
    """A file that is missing on one of them: its stand-in would be mixed with the other's row."""
    path = write_rows(8)
    setting = config(path, refused_share=0.2)
    one, other = (make_batches(setting, Bytes()) for _ in range(2))
    with one, other:
        take(one, 2)
        image = pathlib.Path(path).parent / json.loads(pathlib.Path(path).read_text().splitlines()[5])["image"][0]
        image.unlink()
        take(other, 2)
        with pytest.raises(DataChanged, match=r"process 1 and another one make the same rows.*line 6, missing image"):
            merge_states([one.get_state(), other.get_state()])


def test_resuming_yields_exactly_what_was_not_seen(write_rows):
    sources = write_rows(30, "a.jsonl", absent=(3, 17)), SourceConfig(write_rows(13, "b.jsonl", first=100), weight=0.5)
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


def test_states_of_another_pipeline_are_refused(write_rows):
    path = write_rows(8)
    with make_batches(config(path), Bytes()) as batches:
        next(batches)
        state = batches.get_state()
    others = {
        "seed": make_batches(config(path, seed=1), Bytes()),
        "global_batch": make_batches(config(path, batch=2), Bytes()),
        "weights": make_batches(config(path, path), Bytes()),
        "fingerprints": make_batches(config(write_rows(9)), Bytes()),
    }
    for key, batches in others.items():
        with pytest.raises(ValueError, match=f"was saved with {key} = "):
            batches.set_state(state)


@pytest.fixture
def learned():
    """A real tokenizer: worker processes can't import what this test module defines."""
    return Tokenizer.learn([f"a caption number {i}" for i in range(40)], 60)


def test_worker_processes_change_nothing(write_rows, learned):
    path = write_rows(20, absent=(4,))
    other = write_rows(9, "b.jsonl", first=100)

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


RUN = """
import multiprocessing, sys, time
from absl import flags
from small_batches import Bytes, config
from unialign_jax.data.pipeline import make_batches

if __name__ == "__main__":
    flags.FLAGS(sys.argv)
    batches = make_batches(config(sys.argv[1], workers=2), Bytes())
    next(batches)
    print(*(worker.pid for worker in multiprocessing.active_children()), flush=True)
    time.sleep(600)
"""


def test_workers_end_with_a_run_that_is_killed(write_rows, tmp_path):
    (tmp_path / "run.py").write_text(RUN)
    here = os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parent)}
    run = subprocess.Popen(
        [sys.executable, str(tmp_path / "run.py"), str(write_rows(40))], stdout=subprocess.PIPE, text=True, env=here
    )
    workers = [int(pid) for pid in run.stdout.readline().split()]
    run.kill()
    run.wait()
    assert len(workers) == 2
    until = time.monotonic() + 60
    while alive := [pid for pid in workers if pathlib.Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < until, f"{alive} still run"
        time.sleep(0.1)


def test_workers_that_are_told_to_stop_go_on(write_rows, learned):
    """A signal may go to all processes of a run, which still takes steps before it saves and stops."""
    path, others = write_rows(200), set(multiprocessing.active_children())
    with make_batches(config(path), learned) as batches:
        expected = take(batches, 60)
    with make_batches(config(path, workers=2), learned) as batches:
        taken = take(batches, 2)
        for worker in set(multiprocessing.active_children()) - others:
            worker.terminate()
        assert taken + take(batches, 58) == expected


def test_a_killed_worker_is_an_error_not_missing_data(write_rows, learned):
    others = set(multiprocessing.active_children())
    with make_batches(config(write_rows(200), workers=2), learned) as batches:
        expected = take(batches, 2)
        assert len(expected) == 2
        (set(multiprocessing.active_children()) - others).pop().kill()
        with pytest.raises((ChildProcessError, RuntimeError), match="terminated unexpectedly|worker process died"):
            take(batches, 200)
        with pytest.raises((ChildProcessError, RuntimeError)):
            next(batches)
