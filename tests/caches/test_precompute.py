"""Caches: training from them is training online, they are taken up where a kill left them, and no other is accepted."""

import importlib.util
import io
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from array_record.python.array_record_module import ArrayRecordReader
from PIL import Image

from unialign_jax.batch import Batch
from unialign_jax.data import scenes
from unialign_jax.data.build import build
from unialign_jax.data.caches import DIGEST_BYTES, CacheMismatch, Description
from unialign_jax.data.jsonl import JsonlSource
from unialign_jax.data.pipeline import make_batches
from unialign_jax.data.report import CorpusError
from unialign_jax.data.samples import Refused
from unialign_jax.data.sources import open_source
from unialign_jax.networks import build_networks
from unialign_jax.training import cache_jobs, loop, run_config, tokenizers
from unialign_jax.training.caching import caches_of, null_text
from unialign_jax.training.metrics import DelayedMetrics
from unialign_jax.training.precompute import precompute
from unialign_jax.training.run_config import CACHED

pytestmark = pytest.mark.usefixtures("shared_compilations")
HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]
ALL = ("latents", "instructions", "teacher")
ROWS, SPOILT = 12, 5


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Scenes of two tasks, one with 1 to 3 references, and an image that is none."""
    directory = tmp_path_factory.mktemp("corpus")
    scenes.write_corpus(directory, count=ROWS, size=16, chosen=["generate", "compose"])
    (directory / "images" / f"generate_{SPOILT:06d}.png").write_bytes(b"no image")
    return directory


def make_config(corpus, **changes):
    spec = importlib.util.spec_from_file_location("config", HERE / "config.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config(str(corpus)).lock()
    config.update_from_flattened_dict(changes)
    return config


@pytest.fixture(scope="module")
def cached(corpus, tmp_path_factory):
    """A directory with all caches, of two shards each."""
    flags.FLAGS.mark_as_parsed()  # Grain's workers read its flags
    directory = tmp_path_factory.mktemp("caches")
    # With a worker process: refusals cross its boundary. A batch is more than is read together, and than a shard holds.
    precompute(make_config(corpus, cached=ALL, **{"data.workers": 1}), directory, rows_per_shard=7, batch=12)
    return directory


def run_loop(config, workdir):
    """(state, (source, metrics) by step, console output) of a run."""
    metrics, output = [], io.StringIO()
    push = DelayedMetrics.push

    def note(self, step, source, values, *rest):
        metrics.append((source, values))
        push(self, step, source, values, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DelayedMetrics, "push", note)
        patch.setattr("sys.stdout", output)
        state = loop.train(config, workdir)
    numbers = [(source, {name: float(value) for name, value in values.items()}) for source, values in metrics]
    return state, numbers, output.getvalue()


def refusals(output):
    """Causes and rows of the reports in a console output."""
    return [line for line in output.splitlines() if line.startswith("  ")]


@pytest.fixture(scope="module")
def networks(corpus):
    """(networks, the parameters that a run starts with, what they make of a batch)"""
    run = run_config.read(make_config(corpus))
    networks = build_networks(run.model, dtype=run.dtype)
    params = jax.jit(networks.init)(jax.random.split(jax.random.key(run.seed))[0])

    @jax.jit
    def encode(params, batch):
        noise = jnp.full((len(batch.caption_ids), batch.images, *networks.latent_shape_of(batch)), 0.7)
        made = networks.encode(params, batch, noise)
        if batch.instruction_states is None:
            states = [networks.encode_text(params, ids) for ids in (batch.instruction_ids, batch.null_ids[None])]
        else:
            states = [batch.instruction_states, batch.null_states[None]]
        latents = {"target": made.target} | ({} if made.references is None else {"references": made.references})
        vectors = {"teacher_image": made.teacher_image, "teacher_text": made.teacher_text}
        return latents | vectors | dict(zip(("instructions", "null"), states, strict=True))

    return networks, params, encode


@pytest.mark.slow
def test_training_from_caches_is_training_online(corpus, cached, tmp_path):
    """Losses, all parameters and refusals, over both sources; the images are not even there."""
    shutil.copytree(corpus, tmp_path / "corpus")
    shutil.rmtree(tmp_path / "corpus" / "images")
    config = make_config(tmp_path / "corpus", cached=ALL, cache_directory=str(cached))
    state, metrics, output = run_loop(config, tmp_path / "run")
    whole, metrics_online, output_online = run_loop(make_config(corpus), tmp_path / "online")
    assert {source for source, _ in metrics} == {"draw", "join"}
    for (source, here), (source_there, there) in zip(metrics, metrics_online, strict=True):
        assert source == source_there and here.keys() == there.keys() and len(here) == 8
        for name, value in there.items():
            np.testing.assert_allclose(here[name], value, rtol=2e-5, err_msg=f"{source}/{name}")
    # Adam divides by the size of a gradient, so that its rounding shows; the rate is 1e-3.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), state.params, whole.params)
    assert refusals(output) == refusals(output_online) and len(refusals(output)) == 5


@pytest.mark.slow
@pytest.mark.parametrize("part", ALL)
def test_a_part_alone_stands_in_for_its_network(corpus, cached, networks, part):
    """Batches are of the same rows, and what the networks still have to make completes what the cache holds."""
    networks, params, encode = networks
    config = make_config(corpus, cached=(part,), cache_directory=str(cached))
    run = run_config.read(config)
    tokenizer = tokenizers.make(run, None)
    caches = caches_of(run, networks, tokenizer, tokenizer)
    left = {name: tree for name, tree in params.items() if name != CACHED[part]}
    null_ids = tokenizer.encode(" ", run.data.text_length)
    teacher = None if part == "teacher" else tokenizer
    with (
        make_batches(run.data, tokenizer, tokenizer) as online,
        make_batches(run.data, tokenizer, teacher, caches=caches) as batches,
    ):
        shared = null_text(batches.caches, tokenizer, run.data.text_length)
        for _ in range(4):
            whole, here = next(online), next(batches)
            np.testing.assert_array_equal(here["caption_ids"], whole["caption_ids"])
            gone = {"latents": "references", "instructions": "instruction_ids", "teacher": "teacher_ids"}
            assert gone[part] not in here
            made = encode(params, Batch(**whole, null_ids=null_ids))
            found = encode(left, Batch(**here, **shared))
            for name, value in made.items():
                np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-5, err_msg=name)


def test_what_cannot_be_read_now_is_not_left_out_for_good(corpus, tmp_path):
    shutil.copytree(corpus, tmp_path / "corpus")
    image = tmp_path / "corpus" / "images" / "generate_000003.png"
    image.unlink()
    image.symlink_to("/proc/self/mem")  # to read it fails, as on a file system that is not well
    with pytest.raises(CorpusError, match=r"line 4: .*generate_000003.png.*may be readable later"):
        precompute(
            make_config(tmp_path / "corpus", cached=("latents",)), tmp_path / "caches", rows_per_shard=7, batch=4
        )


def test_the_limit_is_for_all_rows_however_often_it_starts(corpus, cached, tmp_path):
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
def test_the_limit_counts_what_any_part_refuses(corpus, cached, tmp_path, missing):
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


def test_a_shard_that_cannot_be_read_now_is_not_recorded_as_refused(corpus, tmp_path):
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
def test_killed_on_four_devices_it_goes_on_on_one(corpus, cached, tmp_path, capsys):
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
def test_two_processes_make_what_one_makes(corpus, tmp_path):
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


def swap_captions(corpus, config):
    """Of two rows: neither the file's size nor the tokenizer learned from it can tell, its content does."""
    lines = (corpus / "generate.jsonl").read_text().splitlines()
    first, second = json.loads(lines[0]), json.loads(lines[1])
    first["conversations"], second["conversations"] = second["conversations"], first["conversations"]
    (corpus / "generate.jsonl").write_text("\n".join([json.dumps(first), json.dumps(second), *lines[2:]]) + "\n")


def add_row(corpus, config):
    with (corpus / "generate.jsonl").open("a") as file:
        file.write((corpus / "generate.jsonl").read_text().splitlines()[0] + "\n")


def change(**changes):
    return lambda corpus, config: config.update_from_flattened_dict(changes)


def remove(pattern):
    return lambda corpus, config: next(pathlib.Path(config.cache_directory).rglob(pattern)).unlink()


def damage(corpus, config):
    shard = next(pathlib.Path(config.cache_directory).rglob("latents/00000*.array_record"))
    shard.write_bytes(bytes(shard.stat().st_size))


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (change(seed=1), CacheMismatch, r"16x16/.* was made by a network with other weights: .* new one"),
        (change(**{"data.text_length": 10}), CacheMismatch, "draw/16x16/instructions .*text_length was 12, is 10.*new"),
        (change(**{"data.teacher_length": 10}), CacheMismatch, "teacher .*teacher_length was 12, is 10"),
        (change(dtype="bfloat16"), CacheMismatch, "dtype was 'float32', is 'bfloat16'"),
        (change(**{"data.height": 32}), CacheMismatch, "no cache of latents for images of 32x16; .* for 16x16"),
        (change(**{"data.sources.join.references": 4}), CacheMismatch, "join/.*references was 3, is 4"),
        (change(**{"model.text_encoder.d_ff": 24}), CacheMismatch, "text_encoder.d_ff was 16, is 24"),
        (change(cache_directory=None), run_config.ConfigError, "cache_directory is not set; .*precompute"),
        (swap_captions, CacheMismatch, "source.checksum was [0-9]+, is .* new one"),
        (add_row, CacheMismatch, "bucket was '12 rows.* is '13 rows.*source.rows was 12, is 13"),
        (remove("latents/*.array_record"), CorpusError, "unfinished: 1 of 2 shards are missing.*precompute"),
        (damage, CorpusError, "00000-of-00002.array_record can't be read.*remove this file"),
    ],
)
def test_a_cache_of_anything_else_is_refused(corpus, cached, tmp_path, spoil, error, message):
    shutil.copytree(corpus, tmp_path / "corpus")
    shutil.copytree(cached, tmp_path / "caches")
    config = make_config(tmp_path / "corpus", cached=ALL, cache_directory=str(tmp_path / "caches"))
    spoil(tmp_path / "corpus", config)
    with pytest.raises(error, match=message):
        loop.train(config, tmp_path / "run")
    assert not list((tmp_path / "run").rglob("checkpoints/*"))


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
def test_what_can_not_be_made_is_refused(corpus, cached, tmp_path, changes, options, message):
    shutil.copytree(cached, tmp_path / "caches")
    with pytest.raises(ValueError, match=message):
        precompute(make_config(corpus, **{"cached": ALL} | changes), tmp_path / "caches", **options)
