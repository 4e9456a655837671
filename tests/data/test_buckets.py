"""Aspect buckets: their sizes, how rows are divided among them, measuring images, and batches of several buckets."""

import collections
import concurrent.futures
import dataclasses
import functools
import io
import itertools
import json
import pathlib
import tarfile
import threading

import jax
import numpy as np
import pytest
from etils import epath
from PIL import Image

from unialign_jax import distributed
from unialign_jax.data import buckets
from unialign_jax.data.buckets import agreed_sizes, bucket_sizes, divide, target_sizes
from unialign_jax.data.config import DataConfig
from unialign_jax.data.jsonl import JsonlSource
from unialign_jax.data.pipeline import make_batches, merge_states
from unialign_jax.data.report import CorpusError
from unialign_jax.data.sources import SourceConfig, open_source
from unialign_jax.data.webdataset import TarSource

# Of the rows of the corpus, by i % 4: wide, square, tall, square.
SIZES = {0: (16, 36), 1: (24, 24), 2: (72, 32), 3: (24, 24)}


def test_sizes_fill_the_area_and_are_multiples():
    assert bucket_sizes(512, 512, 64, 1.0) == ((512, 512),)
    sizes = bucket_sizes(512, 512, 64, 2.0)
    assert sizes == ((384, 640), (448, 576), (512, 512), (576, 448), (640, 384))
    for height, width, multiple, aspect in [(512, 512, 16, 3.0), (256, 384, 32, 2.5), (33, 20, 4, 4.0)]:
        sizes = bucket_sizes(height, width, multiple, aspect)
        assert (height, width) in sizes
        ratios = [h / w for h, w in sizes]
        assert ratios == sorted(set(ratios)) and max(ratios) <= max(aspect, height / width)
        for h, w in set(sizes) - {(height, width)}:
            assert h % multiple == w % multiple == 0 and h * w <= height * width
            # One more multiple on the longer side would be over the area.
            assert h * w + multiple * min(h, w) > height * width
    with pytest.raises(ValueError, match="max_aspect is 0.5"):
        bucket_sizes(8, 8, 8, 0.5)


def test_rows_go_to_the_nearest_bucket_and_small_buckets_are_given_up():
    sizes = ((10, 40), (10, 20), (10, 10), (20, 10))
    measured = np.array([[10, 41], [10, 27], [10, 15], [300, 301], [0, 0], [50, 10], [17, 10], [0, 7], [11, 40]])
    rows = {size: found.tolist() for size, found in divide(measured, sizes, least=1).items()}
    assert rows == {(10, 40): [0, 4, 8], (10, 20): [1, 2], (10, 10): [3], (20, 10): [5, 6, 7]}
    rows = {size: found.tolist() for size, found in divide(measured, sizes, least=2).items()}
    assert rows == {(10, 40): [0, 4, 8], (10, 20): [1, 2, 3], (20, 10): [5, 6, 7]}
    assert [len(rows) for rows in divide(measured, sizes, least=100).values()] == [9]
    assert [len(rows) for rows in divide(np.zeros((9, 2), int), sizes, least=2).values()] == [9]
    # Few squares and many files that are not there: no bucket is mostly of these.
    measured = np.array([[10, 20]] * 900 + [[10, 10]] * 40 + [[0, 0]] * 100)
    parts = divide(measured, sizes, least=30)
    assert {size: int((rows >= 940).sum()) for size, rows in parts.items()} == {(10, 20): 96, (10, 10): 4}
    rng = np.random.default_rng(0)
    for _ in range(50):
        measured = rng.integers(0, 50, (rng.integers(1, 200), 2))
        parts = divide(measured, bucket_sizes(32, 32, 4, 3.0), least=int(rng.integers(1, 60)))
        assert sorted(np.concatenate(list(parts.values())).tolist()) == list(range(len(measured)))


def test_images_are_measured_once_upright_and_from_their_headers(tmp_path, encoded, monkeypatch):
    turned = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (30, 20)).save(turned, "JPEG", exif=exif)
    files = [encoded(1, 20, 30), turned.getvalue(), b"no image", encoded(1, 8, 9, "WEBP"), encoded(1, 20, 30)[:60]]
    rows = []
    for i, data in enumerate(files):
        (tmp_path / f"{i}.png").write_bytes(data)
        rows.append({"image": [f"{i}.png"], "conversations": [{"from": "human", "value": "x"}]})
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, [*rows, {"image": ["absent.png"]}])))
    expected = [[20, 30], [30, 20], [0, 0], [8, 9], [20, 30], [0, 0]]
    np.testing.assert_array_equal(target_sizes(JsonlSource(path)), expected)
    (tmp_path / "0.png").unlink()
    np.testing.assert_array_equal(target_sizes(JsonlSource(path)), expected)
    (tmp_path / "0.png").write_bytes(encoded(1, 40, 50))
    with path.open("a") as file:  # another state of the file: measured anew
        file.write("\n" + json.dumps(rows[3]))
    np.testing.assert_array_equal(target_sizes(JsonlSource(path)), [[40, 50], *expected[1:], [8, 9]])
    kept = pathlib.Path(JsonlSource(path).sizes_path)
    for damaged in (kept.read_bytes()[:100], b"", b"text"):  # half copied: measured anew
        kept.write_bytes(damaged)
        np.testing.assert_array_equal(target_sizes(JsonlSource(path)), [[40, 50], *expected[1:], [8, 9]])


def test_images_that_were_missing_are_looked_for_again(tmp_path, write_rows, encoded, in_processes, caplog):
    path = write_rows(4, size=lambda i: (8, 10 + i), spoil=(2,), absent=(1,))
    expected = [[8, 10], [0, 0], [0, 0], [8, 13]]
    for sizes in in_processes(*[functools.partial(agreed_sizes, JsonlSource(path))] * 2):
        np.testing.assert_array_equal(sizes, expected)
    assert caplog.text.count(f"1 of the 4 rows of {path} are of unknown size") == 1
    (tmp_path / "absent1.png").write_bytes(encoded(1, 30, 20))
    (tmp_path / "0.png").unlink()  # was measured
    expected[1] = [30, 20]
    np.testing.assert_array_equal(target_sizes(JsonlSource(path)), expected)
    assert [file.name for file in tmp_path.glob("*.npz*")] == ["rows.jsonl.sizes.npz"]


def test_sizes_are_kept_where_a_tar_lacks_what_its_rows_name(tmp_path, encoded):
    """What is not in a tar can't come later: another tar is measured anew."""
    row = {"image": ["0.jpg"], "conversations": [{"from": "human", "value": "x"}]}
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, data in (("0.png", encoded(0)), ("0.json", json.dumps(row).encode())):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    np.testing.assert_array_equal(target_sizes(TarSource(tmp_path / "a.tar")), [[0, 0]])
    assert [file.name for file in tmp_path.glob("*.npz*")] == ["a.tar.sizes.npz"]


def test_an_image_that_can_not_be_read_now_is_not_measured_as_unknown(tmp_path, write_rows):
    path = write_rows(3)
    (tmp_path / "1.png").unlink()
    (tmp_path / "1.png").symlink_to("/proc/self/mem")  # to read it fails, as on a file system that is not well
    with pytest.raises(CorpusError, match=r"rows.jsonl, line 2: .*1.png.*may be readable later"):
        target_sizes(JsonlSource(path))
    assert not list(tmp_path.glob("*.npz*"))


@pytest.fixture
def in_processes(monkeypatch):
    """Calls functions at once, as a process each of one run; gives their results, or the errors that they raised."""
    here, texts = threading.local(), {}

    def call(*functions):
        barrier = threading.Barrier(len(functions), timeout=60)

        def exchange(_, text, timeout):
            texts[here.index] = text
            barrier.wait()
            exchanged = [texts[index] for index in range(len(functions))]
            barrier.wait()
            return exchanged

        def process(index):
            here.index = index
            try:
                return functions[index]()
            except Exception as error:
                return error

        monkeypatch.setattr(jax, "process_count", lambda: len(functions))
        monkeypatch.setattr(jax, "process_index", lambda: here.index)
        monkeypatch.setattr(distributed, "exchange", exchange)
        with concurrent.futures.ThreadPoolExecutor(len(functions)) as pool:
            return list(pool.map(process, range(len(functions))))

    return call


class Elsewhere(JsonlSource):
    """A source as another host sees it, with other images."""

    def __getitem__(self, index):
        sample = super().__getitem__(index)
        return dataclasses.replace(sample, target=sample.target.replace("0.png", "1.png"))


def test_one_process_measures_and_all_have_its_sizes(tmp_path, write_rows, in_processes):
    path = write_rows(3, size=lambda i: (8, 10 + i))
    here, there = in_processes(*(functools.partial(agreed_sizes, kind(path)) for kind in (JsonlSource, Elsewhere)))
    np.testing.assert_array_equal(here, [[8, 10], [8, 11], [8, 12]])
    np.testing.assert_array_equal(there, here)
    assert [file.name for file in tmp_path.glob("*.npz*")] == ["rows.jsonl.sizes.npz"]


def test_processes_that_see_other_sizes_are_refused(tmp_path, write_rows, in_processes, monkeypatch):
    def refuse(*_):
        raise OSError("read-only")

    monkeypatch.setattr(buckets, "save_sizes", refuse)
    path = write_rows(3, size=lambda i: (8, 10 + i))
    agree = in_processes(*[functools.partial(agreed_sizes, JsonlSource(path))] * 2)
    np.testing.assert_array_equal(*agree)
    for error in in_processes(*(functools.partial(agreed_sizes, kind(path)) for kind in (JsonlSource, Elsewhere))):
        assert isinstance(error, CorpusError) and "other sizes in process 1 than in process 0" in str(error)


@pytest.fixture
def corpus(write_rows):
    """41 rows, the image of row i of grey level i."""
    return write_rows(41, size=lambda i: (90, 10) if i == 40 else SIZES[i % 4], spoil=(9,))


def setting(*paths, **options):
    sources = tuple(SourceConfig(path, weight=1 + i) for i, path in enumerate(paths))
    sizes = {"height": 24, "width": 24, "side_multiple": 4, "max_aspect": 2.25}
    return DataConfig(sources, 4, text_length=6, threads=1, refused_share=0.1, **(sizes | options))


def levels(batch):
    return batch["target"][:, 0, 0, 0].tolist()


def test_every_batch_is_of_one_bucket_and_every_row_comes_once_per_pass(corpus, byte_tokenizer):
    wide, square, tall = (16, 36), (24, 24), (36, 16)
    with make_batches(setting(corpus), byte_tokenizer) as batches:
        seen = collections.defaultdict(list)
        for batch in itertools.islice(batches, 123):  # 12 passes
            seen[batch["target"].shape[1:3]] += levels(batch)
    # Row 40 is taller than any bucket; row 9 is no image, and stands among the square ones, where they are most.
    rows = {wide: set(range(0, 40, 4)), tall: {*range(2, 40, 4), 40}, square: set(range(1, 41, 2))}
    assert {size: set(levels) for size, levels in seen.items()} == rows | {square: rows[square] - {9}}
    for size, levels_seen in seen.items():
        length = len(rows[size])
        assert abs(len(levels_seen) - 12 * length) <= 4  # the bucket's share of the batches
        for start in range(0, len(levels_seen) - length + 1, length):
            assert rows[size] - set(levels_seen[start : start + length]) <= {9}


def test_hosts_agree_on_the_buckets_and_restarts_are_exact(corpus, write_rows, byte_tokenizer):
    config = setting(corpus, write_rows(20, "more.jsonl", size=lambda i: SIZES[i % 2]))
    with make_batches(config, byte_tokenizer) as batches:
        expected = []
        for _ in range(30):
            source = batches.next_source
            batch = next(batches)
            expected.append((source, batch["target"].shape[1:], levels(batch)))
        sources = collections.Counter(source for source, _, _ in expected)
        assert sources == {0: 10, 1: 20} and len({shape for _, shape, _ in expected}) == 3
    state = None
    for count in (1, 2, 4):
        hosts = [make_batches(config, byte_tokenizer, slots=range(i, 4, count)) for i in range(count)]
        for host in hosts:
            if state is not None:
                host.set_state(state)
        for _ in range(10):
            source, shape, rows = expected.pop(0)
            for i, host in enumerate(hosts):
                assert host.next_source == source
                batch = next(host)
                assert batch["target"].shape[1:] == shape and levels(batch) == rows[i::count]
        state = json.loads(json.dumps(merge_states([host.get_state() for host in hosts])))
        for host in hosts:
            host.close()


def test_sizes_are_kept_for_each_task(corpus, monkeypatch):
    """Two sources of one file are measured once each, not each time anew in turns."""
    asked = [SourceConfig(corpus, task=task) for task in ("generate", "caption")]
    first = [target_sizes(open_source(source)) for source in asked]
    monkeypatch.setattr(buckets, "_measure", None)
    for source, sizes in zip(asked, first, strict=True):
        np.testing.assert_array_equal(target_sizes(open_source(source)), sizes)


def test_a_state_of_other_rows_in_equally_large_buckets_is_refused(corpus, byte_tokenizer):
    with make_batches(setting(corpus), byte_tokenizer) as batches:
        state = batches.get_state()
    source = open_source(SourceConfig(corpus))
    sizes = target_sizes(source)
    wide, tall = (int(np.flatnonzero((sizes == size).all(axis=1))[0]) for size in (SIZES[0], SIZES[2]))
    sizes[[wide, tall]] = sizes[[tall, wide]]
    buckets.save_sizes(epath.Path(source.sizes_path), source.targets_fingerprint(), sizes)
    with make_batches(setting(corpus), byte_tokenizer) as batches:
        with pytest.raises(ValueError, match="was saved with buckets = "):
            batches.set_state(state)


def test_a_state_of_other_buckets_is_refused(corpus, byte_tokenizer):
    with make_batches(setting(corpus), byte_tokenizer) as batches:
        state = batches.get_state()
    with make_batches(setting(corpus, max_aspect=1.0), byte_tokenizer) as batches:
        with pytest.raises(ValueError, match="was saved with buckets = "):
            batches.set_state(state)
