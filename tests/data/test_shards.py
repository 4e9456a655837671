"""ArrayRecord shards: as many as are wanted may be open, and each error says what it is."""

import concurrent.futures
import multiprocessing
import os
import pickle
import resource
import types

import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from unialign_jax.data import shards
from unialign_jax.data.report import CorpusError
from unialign_jax.data.shards import DamagedRecord, DamagedShard, Shards

COUNT = 50


@pytest.fixture
def files(tmp_path):
    """Shards of two records each, the k-th record b"k"."""
    for i in range(COUNT):
        writer = ArrayRecordWriter(str(tmp_path / str(i)), "group_size:1,uncompressed")
        for k in (2 * i, 2 * i + 1):
            writer.write(str(k).encode())
        writer.close()
    file = types.SimpleNamespace
    return [file(filename=str(tmp_path / str(i)), skip=0, take=2, examples_in_shard=2) for i in range(COUNT)]


@pytest.fixture
def few_files():
    """The soft limit allows ten more open files; nobody has raised it yet."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free + 10, before[1]))
    shards._raise_limit_of_open_files.cache_clear()
    yield free + 10
    shards._raise_limit_of_open_files.cache_clear()
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def read_all(records):
    return [records[i] for i in range(len(records))]


def test_more_shards_than_the_soft_limit_are_read(files, few_files):
    records = pickle.loads(pickle.dumps(Shards(files)))
    assert read_all(records) == [str(k).encode() for k in range(2 * COUNT)]
    limit, highest = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert limit == highest


def with_few_files(records, limit):
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    return read_all(records)


def test_so_they_are_in_worker_processes(files):
    # Not a `Pool`, which waits for ever for a worker that has died.
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        assert len(pool.submit(with_few_files, Shards(files), 40).result()) == 2 * COUNT


def test_the_limit_is_named_where_it_can_not_be_raised(files, few_files, monkeypatch):
    monkeypatch.setattr(resource, "setrlimit", lambda *_: (_ for _ in ()).throw(ValueError("not allowed")))
    with pytest.raises(CorpusError, match=rf"/\d+ can't be read: .*may have {few_files} files open .* here 50: raise"):
        read_all(Shards(files))
    monkeypatch.undo()


def test_damage_is_told_from_what_may_pass(files, tmp_path):
    whole = (tmp_path / "1").read_bytes()
    (tmp_path / "0").unlink()
    (tmp_path / "1").write_bytes(bytes(len(whole)))
    (tmp_path / "2").write_bytes(b"")
    (tmp_path / "3").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "4").write_bytes((tmp_path / "4").read_bytes().replace(b"\1\x019", b"\1\1?"))
    records = Shards(files)
    with pytest.raises(CorpusError, match="/0 can't be read: .*No such file") as caught:
        records[1]
    assert not isinstance(caught.value, DamagedShard)
    for k in (2, 3, 4, 7):
        with pytest.raises(DamagedShard, match=f"/{k // 2} can't be read: ") as caught:
            records[k]
        assert not isinstance(caught.value, DamagedRecord)
    with pytest.raises(DamagedRecord, match="/4 can't be read: "):
        records[9]
    assert records[8] == b"8"
