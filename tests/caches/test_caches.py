"""Caches: training from them is training online, and no other is accepted."""

import io
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unialign_jax.batch import Batch
from unialign_jax.data.caches import CacheMismatch
from unialign_jax.data.pipeline import make_batches
from unialign_jax.data.report import CorpusError
from unialign_jax.networks import build_networks
from unialign_jax.training import loop, run_config, tokenizers
from unialign_jax.training.caching import caches_of, null_text
from unialign_jax.training.metrics import DelayedMetrics
from unialign_jax.training.run_config import CACHED

pytestmark = pytest.mark.usefixtures("shared_compilations")
ALL = ("latents", "instructions", "teacher")


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
def networks(make_config, corpus):
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
def test_training_from_caches_is_training_online(make_config, corpus, cached, tmp_path):
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
def test_a_part_alone_stands_in_for_its_network(make_config, corpus, cached, networks, part):
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
def test_a_cache_of_anything_else_is_refused(make_config, corpus, cached, tmp_path, spoil, error, message):
    shutil.copytree(corpus, tmp_path / "corpus")
    shutil.copytree(cached, tmp_path / "caches")
    config = make_config(tmp_path / "corpus", cached=ALL, cache_directory=str(tmp_path / "caches"))
    spoil(tmp_path / "corpus", config)
    with pytest.raises(error, match=message):
        loop.train(config, tmp_path / "run")
    assert not list((tmp_path / "run").rglob("checkpoints/*"))
