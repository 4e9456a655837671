"""Making caches: taken up where a kill left them, by any number of processes, with every refusal in them."""

import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader
from PIL import Image

from unialign_jax.data.build import build
from unialign_jax.data.caches import DIGEST_BYTES, CacheMismatch, Description
from unialign_jax.data.jsonl import JsonlSource
from unialign_jax.data.report import CorpusError
from unialign_jax.data.samples import Refused
from unialign_jax.data.sources import open_source
from unialign_jax.networks import build_networks
from unialign_jax.training import cache_jobs, run_config, tokenizers
from unialign_jax.training.caching import caches_of
from unialign_jax.training.precompute import precompute

pytestmark = pytest.mark.usefixtures("shared_compilations")
HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]
ALL = ("latents", "instructions", "teacher")
ROWS, SPOILT = 12, 5  # of the corpus


def test_what_cannot_be_read_now_is_not_left_out_for_good(make_config, corpus, tmp_path):
    shutil.copytree(corpus, tmp_path / "corpus")
    image = tmp_path / "corpus" / "images" / "generate_000003.png"
    image.unlink()
    image.symlink_to("/proc/self/mem")  # to read it fails, as on a file system that is not well
    with pytest.raises(CorpusError, match=r"line 4: .*generate_000003.png.*may be readable later"):
        precompute(
            make_config(tmp_path / "corpus", cached=("latents",)), tmp_path / "caches", rows_per_shard=7, batch=4
        )


def test_the_limit_is_for_all_rows_however_often_it_starts(make_config, corpus, cached, tmp_path):
    shutil.copytree(cached, tmp_path / "caches")
    for shard in (tmp_path / "caches" / "draw").rglob("00001-*"):  # without the spoilt row
        shard.unlink()
    config = make_config(corpus, cached=ALL, **{"data.refused_share": 0.01})
    with pytest.raises(CorpusError, match=r"not an image: 1\n +line 6: "):
        precompute(config, tmp_path / "caches", rows_per_shard=7, batch=4)
    # What an interrupted attempt noted of a shard that is then made does not count.
    for part in (tmp_path / "caches" / "draw").glob("*/*"):
        (part / "00000-of-00002.array_record").unlink()
        (part / "00001-of-00002.array_record.refused.json").write_text(json.dumps([[8, "line 9", "not an image", "x"]]))
    precompute(make_config(corpus, cached=ALL), tmp_path / "caches", rows_per_shard=7, batch=4)
    names = sorted({file.name for file in (tmp_path / "caches" / "draw").rglob("*.refused.json")})
    assert names == ["00000-of-00002.array_record.refused.json"]


@pytest.mark.parametrize("missing", ["*/00001-*", "instructions/00000-*"])
def test_the_limit_counts_what_any_part_refuses(make_config, corpus, cached, tmp_path, missing):
    """Made alone, a cache of instructions has a row whose image is none; named first, it may not hide that row."""
    shutil.copytree(cached, tmp_path / "caches")
    for path in [
        *(tmp_path / "caches" / "draw").rglob("instructions/*.refused.json"),
        *(tmp_path / "caches" / "draw").rglob(missing),
    ]:
        path.unlink(missing_ok=True)
    config = make_config(corpus, cached=("instructions", "latents"), **{"data.refused_share": 0.01})
    with pytest.raises(CorpusError, match=r"1 of \d+ rows .*\n  not an image: 1\n +line 6: "):
        precompute(config, tmp_path / "caches", rows_per_shard=7, batch=4, sources=["draw"])


def test_a_shard_that_cannot_be_read_now_is_not_recorded_as_refused(make_config, corpus, tmp_path):
    build(JsonlSource(corpus / "generate.jsonl"), tmp_path / "made", rows_per_shard=2, refused_share=0.2)
    sorted((tmp_path / "made").glob("*.array_record*"))[0].rename(tmp_path / "away")
    config = make_config(corpus, cached=("latents",))
    config.data.sources = {"draw": {"path": str(tmp_path / "made"), "format": "tfds"}}
    with pytest.raises(CorpusError, match=r"made\[train\], example [01]: .*00000-of-00006 can't be read: .*No such"):
        precompute(config, tmp_path / "caches", rows_per_shard=7, batch=4)
    assert not list((tmp_path / "caches").rglob("*.array_record"))


def records(config):
    """(source, part) -> what a cache holds of each row: arrays, or the cause of a refusal."""
    run = run_config.read(config)
    tokenizer = tokenizers.make(run, None)
    caches = caches_of(run, build_networks(run.model, dtype=run.dtype), tokenizer, tokenizer)
    held = {}
    for which, name in enumerate(run.source_names):
        source = open_source(run.data.sources[which])
        references = run.data.sources[which].references
        for part, cache in caches.open(which, source, np.arange(len(source)), (16, 16), references).items():
            held[name, part] = []
            for row in range(len(source)):
                try:
                    held[name, part].append(cache.read(row, cache.digest(source[row])))
                except Refused as refused:
                    held[name, part].append(str(refused.cause))
            with pytest.raises(CacheMismatch, match=f"not a cache of {source.path}: line 1 has changed"):
                cache.read(0, cache.digest(source[1]))
    return held


def assert_close(left, right):
    assert left.keys() == right.keys()
    for part in left:
        for a, b in zip(left[part], right[part], strict=True):
            if isinstance(a, str):
                assert a == b
            else:
                jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), a, b)


KILLED = """
import os, runpy, signal, sys
from unialign_jax import storage

replace, done = os.replace, []

def until_killed(source, target):
    if str(target).endswith(".array_record"):
        done.append(target)
        if len(done) > 4:
            os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)

os.replace = until_killed
sys.argv[0] = "launch/precompute.py"
runpy.run_path("launch/precompute.py", run_name="__main__")
"""


@pytest.mark.slow
def test_killed_on_four_devices_it_goes_on_on_one(make_config, corpus, cached, tmp_path, capsys):
    """The command, killed while it commits the fifth shard of eight, then called again; what is there stays."""
    target = tmp_path / "caches"
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        "NPROC": "64",
        # Else as here: random weights are the same bit by bit only if they are compiled alike.
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4",
    }
    command = [
        *(sys.executable, "-c", KILLED, f"--config={HERE / 'config.py'}:{corpus}", f"--target={target}"),
        *("--config.cached=('latents', 'teacher')", "--rows_per_shard=3", "--batch=4"),
    ]
    killed = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert killed.returncode == -9, killed.stderr
    assert "draw/16x16/latents: 12 rows x 0.00206 MB; 4 of 4 shards to make" in killed.stdout
    shards = sorted(target.rglob("*.array_record"))
    assert len(shards) == 4 and list(target.rglob("*.partial-*"))
    before = [(shard.stat().st_mtime_ns, shard.stat().st_ino) for shard in shards]

    config = make_config(corpus, cached=("latents", "teacher"), cache_directory=str(target))
    with pytest.raises(CorpusError, match=r"draw/16x16/latents is unfinished: 2 of 4 shards are missing"):
        records(config)
    for source in ("draw", "join"):
        precompute(config, target, rows_per_shard=3, batch=4, sources=[source])
    assert [(shard.stat().st_mtime_ns, shard.stat().st_ino) for shard in shards] == before
    output = capsys.readouterr().out
    assert "draw/16x16/teacher: 12 rows x 7.3e-05 MB; 2 of 4 shards to make" in output
    assert not list(target.rglob("*.partial-*"))
    found = records(config)
    assert_close(found, records(make_config(corpus, cached=("latents", "teacher"), cache_directory=str(cached))))
    assert found["draw", "latents"][SPOILT] == found["draw", "teacher"][SPOILT] == "not an image"


@pytest.mark.slow
def test_two_processes_make_what_one_makes(make_config, corpus, tmp_path):
    """Real ones, by the command, of images in two buckets: the same files, with the same rows and refusals in them."""
    shutil.copytree(corpus, tmp_path / "corpus")
    for row in range(1, ROWS, 2):
        path = tmp_path / "corpus" / "images" / f"generate_{row:06d}.png"
        if row != SPOILT:
            Image.open(path).resize((48, 16)).save(path)
    changes = {"cached": ("latents", "instructions"), "data.max_aspect": 4.0, "data.side_multiple": 8}
    precompute(make_config(tmp_path / "corpus", **changes), tmp_path / "one", rows_per_shard=3, batch=4)

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    command = [
        *(sys.executable, "launch/precompute.py", f"--config={HERE / 'config.py'}:{tmp_path / 'corpus'}"),
        *(f"--target={tmp_path / 'two'}", "--rows_per_shard=3", "--batch=4", "--compilation_cache="),
        *(f"--config.{key}={value}" for key, value in changes.items()),
        *(f"--coordinator=127.0.0.1:{port}", "--num_processes=2"),
    ]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "NPROC": "32"}
    pair = [
        subprocess.Popen([*command, f"--process_id={i}"], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
        for i in range(2)
    ]
    try:
        errors = [process.communicate(timeout=600)[1] for process in pair]
    finally:
        for process in pair:
            process.kill()
    assert [process.returncode for process in pair] == [0, 0], errors

    shards = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.array_record"))
    assert shards == sorted(path.relative_to(tmp_path / "two") for path in (tmp_path / "two").rglob("*.array_record"))
    assert {shard.parts[:2] for shard in shards} == {("draw", "16x16"), ("draw", "8x32"), ("join", "16x16")}
    refused = 0
    for shard in shards:
        both = [ArrayRecordReader(str(tmp_path / name / shard)) for name in ("one", "two")]
        alone, together = (reader.read([*range(reader.num_records())]) for reader in both)
        assert len(alone) == len(together)
        for a, b in zip(alone, together, strict=True):
            head = DIGEST_BYTES + 1  # and whether the row can be used
            assert a[:head] == b[:head]
            if a[head - 1]:
                values = (np.frombuffer(record[head:], np.float32) for record in (a, b))
                np.testing.assert_allclose(*values, rtol=1e-4, atol=1e-5)
            else:
                refused += 1
                assert a == b
    assert refused == 6  # one image and two compositions, in both parts


def test_the_hosts_steps_are_in_step():
    """Whatever their shares of a batch: every row once, equally many steps, and counts that add up."""
    description = Description({}, 0, {}, rows=23, rows_per_shard=5)
    job = cache_jobs.Job(None, None, {"latents": cache_jobs.Target(None, description)}, [0, 1, 2, 4])
    hosts = [list(cache_jobs.rounds(job, cache_jobs.Share((2, 3, 1), host, True))) for host in range(3)]
    seen = [row for host in hosts for turn in host for step in turn.steps for row in step]
    assert sorted(seen) == [*range(15), 20, 21, 22]
    for turns in zip(*hosts, strict=True):
        assert len({len(turn.steps) for turn in turns}) == 1 and len({turn.counts for turn in turns}) == 1
        assert turns[0].counts == tuple(sum(map(len, steps)) for steps in zip(*(t.steps for t in turns), strict=True))
        for turn, size in zip(turns, (2, 3, 1), strict=True):
            assert all(len(step) <= size for step in turn.steps)
            rows = [row for step in turn.steps for row in step]
            assert rows == ([] if turn.shard is None else list(description.shard_rows(turn.shard)))


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"cached": ()}, {}, "cached is empty; say what to cache, of latents, instructions, teacher"),
        ({}, {"sources": ["nobody"]}, "no source 'nobody'; the config has draw, join"),
        ({"trained": ("transformer", "text_encoder")}, {}, "cached has instructions, but text_encoder/.* is trained"),
        # A pattern's star crosses networks.
        (
            {"trained": ("transformer", "*query*")},
            {},
            "cached has latents, but autoencoder/.*/query/.* is trained",
        ),
        ({"after": "first"}, {}, "'cached' goes on from 'first'; set init"),
        ({"data.text_length": 10}, {"rows_per_shard": 7}, "instructions .*text_length was 12, is 10"),
        ({}, {"rows_per_shard": 6}, "was begun with 7 rows per shard, not 6"),
    ],
)
def test_what_can_not_be_made_is_refused(make_config, corpus, cached, tmp_path, changes, options, message):
    shutil.copytree(cached, tmp_path / "caches")
    with pytest.raises(ValueError, match=message):
        precompute(make_config(corpus, **{"cached": ALL} | changes), tmp_path / "caches", **options)
