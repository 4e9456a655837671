"""Fixtures of tests of caches: a corpus of scenes, the config of a run over it, and its caches."""

import importlib.util
import pathlib

import pytest
from absl import flags

from unialign_jax.data import scenes
from unialign_jax.training.precompute import precompute

HERE = pathlib.Path(__file__).parent


@pytest.fixture(scope="session")
def make_config():
    """The config over a corpus, with changes by dotted key."""

    def make(corpus, **changes):
        spec = importlib.util.spec_from_file_location("config", HERE / "config.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        config = module.get_config(str(corpus)).lock()
        config.update_from_flattened_dict(changes)
        return config

    return make


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """Scenes of two tasks, 12 rows each, one with 1 to 3 references, and an image that is none: generation's row 5."""
    directory = tmp_path_factory.mktemp("corpus")
    scenes.write_corpus(directory, count=12, size=16, chosen=["generate", "compose"])
    (directory / "images" / "generate_000005.png").write_bytes(b"no image")
    return directory


@pytest.fixture(scope="session")
def cached(make_config, corpus, tmp_path_factory):
    """A directory with all caches, of two shards each."""
    flags.FLAGS.mark_as_parsed()  # Grain's workers read its flags
    directory = tmp_path_factory.mktemp("caches")
    every = ("latents", "instructions", "teacher")
    # With a worker process: refusals cross its boundary. A batch is more than is read together, and than a shard holds.
    config = make_config(corpus, cached=every, **{"data.workers": 1})
    precompute(config, directory, rows_per_shard=7, batch=12)
    return directory
