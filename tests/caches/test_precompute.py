"""Caches: training from them is training online, they are taken up where a kill left them, and no other is accepted."""

import importlib.util
import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from unialign_jax.data import scenes
from unialign_jax.data.caches import Cache, CacheMismatch, read_description
from unialign_jax.data.pipeline import make_batches
from unialign_jax.data.report import CorpusError
from unialign_jax.data.samples import Refused
from unialign_jax.training import loop, precompute as precompute_module, run_config, tokenizers
from unialign_jax.training.caching import caches_of
from unialign_jax.training.metrics import DelayedMetrics
from unialign_jax.training.precompute import precompute
from unialign_jax.networks import build_networks

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]
ALL = ("latents", "instructions", "teacher")
ROWS, SPOILT = 12, 5


@pytest.fixture(scope="module", autouse=True)
def shared_compilations(tmp_path_factory):
    """The runs of this file compile the same programs; on disk they are compiled once."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("xla")),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


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
    directory = tmp_path_factory.mktemp("caches")
    precompute(make_config(corpus, cached=ALL), directory, rows_per_shard=7, batch=4)
    return directory


def run_loop(config, workdir, monkeypatch):
    """(state, metrics by step) of a run."""
    metrics = []
    push = DelayedMetrics.push

    def note(self, step, source, values, *rest):
        metrics.append((source, values))
        push(self, step, source, values, *rest)

    monkeypatch.setattr(DelayedMetrics, "push", note)
    state = loop.train(config, workdir)
    return state, [(source, {name: float(value) for name, value in values.items()}) for source, values in metrics]


@pytest.fixture(scope="module")
def online(corpus, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        return run_loop(make_config(corpus, steps=6), tmp_path_factory.mktemp("online"), patch)


@pytest.mark.parametrize("parts", [ALL, ("latents",)])
def test_training_from_caches_is_training_online(corpus, cached, online, parts, tmp_path, monkeypatch, capsys):
    """Losses and all parameters over both sources; with everything cached, images are not even there."""
    files = tmp_path / "corpus"
    shutil.copytree(corpus, files)
    if parts == ALL:
        shutil.rmtree(files / "images")
    config = make_config(files, cached=parts, cache_directory=str(cached), steps=6)
    state, metrics = run_loop(config, tmp_path / "run", monkeypatch)
    assert {source for source, _ in metrics} == {"draw", "join"}
    for (source, here), (source_there, there) in zip(metrics, online[1], strict=True):
        assert source == source_there and here.keys() == there.keys() and len(here) == 8
        for name, value in there.items():
            np.testing.assert_allclose(here[name], value, rtol=2e-5, err_msg=f"{source}/{name}")
    assert set(state.params) == {"transformer"}
    # Adam divides by the size of a gradient, so that its rounding shows; the rate is 1e-3.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), state.params, online[0].params)
    output = capsys.readouterr().out
    assert "generate.jsonl: 1 of 12 rows read refused" in output and "not an image: 1" in output
    assert f"line {SPOILT + 1}: " in output
