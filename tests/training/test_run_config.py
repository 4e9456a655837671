"""Typed configs: the shipped files fit, and whatever does not is refused by its key."""

import dataclasses
import importlib.util
import pathlib

import ml_collections
import pytest

from unialign_jax.models.autoencoder import AutoencoderConfig
from unialign_jax.models.t5 import T5Config
from unialign_jax.models.teachers import QwenTeacherConfig
from unialign_jax.models.unialign import TransformerConfig
from unialign_jax.networks import build_networks
from unialign_jax.objectives import Objective
from unialign_jax.state import OptimizerConfig
from unialign_jax.training.run_config import ConfigError, read

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"


def load(name: str, **changes) -> ml_collections.ConfigDict:
    spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config().lock()
    config.update_from_flattened_dict(changes)
    return config


def test_published_size_and_values():
    paths = {"data.sources.generate.path": "g.jsonl", "data.sources.edit.path": "e.jsonl"}
    run = read(load("sd3_medium", **paths))
    networks = build_networks(run.model, dtype=run.dtype, remat=run.remat)
    assert networks.transformer.config == TransformerConfig()
    assert networks.text_encoder.config == T5Config()
    assert networks.codec.config == AutoencoderConfig()
    assert networks.teacher.config == QwenTeacherConfig()
    assert run.optimizer == OptimizerConfig(
        learning_rate=3e-5, warmup_steps=2000, weight_decay=1e-2, clip_norm=2.0, ema_rate=0.9995
    )
    assert run.objective == Objective(
        text_weight=0.2, contrastive_weight=0.05, alignment_weight=0.1, semantic_depth=8, text_dropout=0.1
    )
    assert (run.data.global_batch, run.data.height, run.data.width, run.data.text_length) == (384, 512, 512, 256)
    # Sources are in alphabetical order, and of equal weight, so that they take turns.
    assert run.source_names == ("edit", "generate")
    assert [(s.path, s.references, s.weight) for s in run.data.sources] == [("e.jsonl", 1, 1.0), ("g.jsonl", 0, 1.0)]


def test_tiny_networks_fit_together():
    run = read(load("photos_tiny"))
    networks = build_networks(run.model, dtype=run.dtype, remat=run.remat)
    config = networks.transformer.config
    height, width, channels = networks.latent_shape(run.data.height, run.data.width)
    assert channels == config.in_channels
    assert max(height, width) // config.patch_size <= config.pos_embed_max_size
    assert run.objective.semantic_depth <= config.num_layers
    assert run.tokenizer.learn_vocab_size == config.vocab_size == config.mask_token_id + 1


def test_the_seed_of_the_data_follows_the_seed():
    assert read(load("photos_tiny", seed=7)).data.seed == 7


def test_int_fits_float_and_placeholders_may_stay_empty():
    run = read(load("photos_tiny", **{"optimizer.clip_norm": 2, "checkpoint.keep_period": 100}))
    assert run.optimizer.clip_norm == 2.0 and isinstance(run.optimizer.clip_norm, float)
    assert run.checkpoint.keep_period == 100 and run.resume_step is None and run.init is None


def changed(path: str, value) -> ml_collections.ConfigDict:
    """A config whose file has something else at a key: what a lock does not guard against."""
    config = load("photos_tiny").unlock()
    *sections, key = path.split(".")
    section = config
    for name in sections:
        section = section[name]
    if value is None:
        del section[key]
    else:
        with section.ignore_type():
            section[key] = value
    return config


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("setps", 3, r"setps: unknown key; known are .*steps"),
        ("optimizer.learning_rates", 3.0, r"optimizer\.learning_rates: unknown key"),
        ("data.sources.photos.weights", 3.0, r"data\.sources\.photos\.weights: unknown key"),
        ("steps", None, r"^steps: missing"),
        ("data.height", None, r"data\.height: missing"),
        ("steps", "many", r"^steps: expected int, found 'many'"),
        ("steps", True, r"^steps: expected int, found True"),
        ("steps", 0, r"steps is 0, expected 1 or more"),
        ("optimizer.clip_norm", "2", r"optimizer\.clip_norm: expected float, found '2'"),
        ("optimizer", 3, r"optimizer: expected a section, found 3"),
        ("data.sources", 3, r"data\.sources: expected one section per source"),
        ("tokenizer.more_texts", ("a.jsonl",), r"^tokenizer\.more_texts: expected one section per source"),
        ("tokenizer.more_texts", {"a": {"paths": "a.jsonl"}}, r"^tokenizer\.more_texts\.a\.paths: unknown key"),
        ("data.prefetch", 0, r"data: prefetch is 0, expected 1 or more"),
        ("trained", (), r"trained is empty"),
        ("trained", (3,), r"trained\[0\]: expected str, found 3"),
        ("objective.mask_token_id", 5, r"objective\.mask_token_id: not a key of the config"),
        ("tokenizer.path", "dir", r"tokenizer: path and learn_vocab_size are both set"),
        ("checkpoint.every", 0, r"checkpoint: every is 0"),
        ("log.every", 0, r"log: every is 0"),
        ("checkpoint.keep_period", 0, r"checkpoint: keep_period is 0, expected 1 or more, or None"),
        ("log.guidance", -1.0, r"log: .*guidance -1.0, 0 or more"),
        ("log.sample_steps", 0, r"log: .*sample_steps 0, 1 to 1000"),
        ("optimizer.clip_norm", 0.0, r"optimizer: clip_norm is 0.0, expected more than 0"),
        ("optimizer.ema_rate", 1.0, r"optimizer: ema_rate is 1.0"),
        ("objective.text_dropout", 2.0, r"objective: text_dropout is 2.0, expected a probability"),
        ("objective.temperature", 0.0, r"objective: temperature is 0.0"),
        ("micro_batches", 0, r"micro_batches is 0, expected 1 or more"),
        ("data.caption_prompt", ":", r"caption_prompt is ':', but protocol 'unialignment' samples captions after ''"),
        ("protocol", "nosuch", r"protocol is 'nosuch', expected one of .*unialignment"),
        ("model.techer", {}, r"model.techer: unknown key; known are .*teacher"),
    ],
)
def test_what_does_not_fit_is_refused_by_its_key(path, value, message):
    with pytest.raises(ConfigError, match=message):
        read(changed(path, value))


def test_a_small_corpus_takes_one_flag():
    """Its vocabulary is set in five places."""
    run = read(load("photos_tiny", **{"tokenizer.learn_vocab_size": 167}))
    networks = build_networks(run.model)
    transformer = networks.transformer.config
    assert (transformer.vocab_size, transformer.mask_token_id, run.tokenizer.learn_vocab_size) == (167, 166, 167)
    assert networks.text_encoder.config.vocab_size == networks.teacher.vocab_size == 167


def test_a_source_of_weight_0_is_left_out():
    config = load("sd3_medium")
    config.data.sources.edit.weight = 0.0
    config.data.sources.generate.path = "g.jsonl"
    run = read(config)
    assert run.source_names == ("generate",) and [source.path for source in run.data.sources] == ["g.jsonl"]
    config.data.sources.generate.weight = 0.0
    with pytest.raises(ConfigError, match="sources is empty; expected at least one, of a weight above 0"):
        read(config)


def test_a_value_that_must_be_given_is_asked_for():
    with pytest.raises(ConfigError, match=r"--config\.data\.sources\.edit\.path="):
        read(load("sd3_medium"))


def test_unknown_stage_names_the_known_ones():
    spec = importlib.util.spec_from_file_location("photos_tiny", CONFIGS / "photos_tiny.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.raises(ValueError, match="no stage 'all'; this config has photos"):
        module.get_config("all")


def test_every_field_of_the_published_optimizer_is_written_down():
    """A default that changes must not change what the published config means."""
    assert set(load("sd3_medium").optimizer) == {field.name for field in dataclasses.fields(OptimizerConfig)}


def test_what_all_stages_of_the_published_size_share_is_set_once():
    spec = importlib.util.spec_from_file_location("sd3_medium", CONFIGS / "sd3_medium.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config("all").lock()
    config.update_from_flattened_dict(
        {
            "init": "gs://b/converted",
            "strategy": "data+fsdp=64",
            "remat": "attention",
            "micro_batches": 2,
            "data.root": "gs://b/rows",
            "data.global_batch": 1024,
        }
    )
    for name, stage in config.stages.items():
        run = read(stage, name)
        assert (run.strategy, run.remat, run.micro_batches, run.data.global_batch) == (
            "data+fsdp=64",
            "attention",
            2,
            1024,
        )
        assert run.init == ("gs://b/converted" if name == "pretrain" else None)
        assert all(source.path.startswith("gs://b/rows/") for source in run.data.sources)
