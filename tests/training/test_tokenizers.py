"""What a tokenizer is learned from. Which one a teacher reads with: the config's, the one that came with its weights,
or the text encoder's."""

import dataclasses
import json
import pathlib
import runpy
import types

import pytest

from unialign_jax.checkpoints import Checkpoints
from unialign_jax.convert import store
from unialign_jax.data import scenes
from unialign_jax.data.build import build
from unialign_jax.data.jsonl import JsonlSource
from unialign_jax.data.report import CorpusError
from unialign_jax.data.tokenizer import Tokenizer
from unialign_jax.training import run_config, tokenizers

CONFIG = pathlib.Path(__file__).parents[2] / "configs" / "scenes_tiny.py"


@dataclasses.dataclass
class Reader:
    """As much of a network as is asked for."""

    vocab_size: int

    @property
    def config(self):
        return self


def networks(teacher, text_encoder=40):
    return types.SimpleNamespace(teacher=teacher and Reader(teacher), text_encoder=Reader(text_encoder))


@pytest.fixture
def mine():
    return Tokenizer.learn(["a red square"], 20)


@pytest.fixture
def converted(tmp_path):
    """A converted directory, as far as its tokenizers go."""
    directory = tmp_path / "converted"
    Tokenizer.learn(["ein rotes Quadrat"], 24).save(directory / store.TEACHER_TOKENIZER)
    (directory / store.MODEL_FILE).write_text(json.dumps(store.HEADER))
    return directory


def test_all_texts_are_learned_from_in_whatever_format_they_are(tmp_path):
    scenes.write_corpus(tmp_path, count=8, size=16)
    config = runpy.run_path(str(CONFIG))["get_config"]("pretrain")
    config.data.root = str(tmp_path)
    config.tokenizer.learn_vocab_size = 96
    rows = tokenizers.make(run_config.read(config), None)
    for task, source in [*config.data.sources.items(), *config.tokenizer.more_texts.items()]:
        source.update(path=str(tmp_path / "built" / task), format="tfds")
        build(JsonlSource(tmp_path / f"{task}.jsonl", task), tmp_path / "built" / task)
        (tmp_path / f"{task}.jsonl").unlink()
    assert tokenizers.make(run_config.read(config), None).fingerprint() == rows.fingerprint()
    del config.tokenizer.more_texts["edit"]
    assert tokenizers.make(run_config.read(config), None).fingerprint() != rows.fingerprint()
    config.tokenizer.more_texts.answer.format = "rows"
    with pytest.raises(CorpusError, match="built/answer: expected a file of JSON rows"):
        tokenizers.make(run_config.read(config), None)


def test_rows_that_no_text_can_be_taken_from_are_named(tmp_path):
    config = runpy.run_path(str(CONFIG.with_name("photos_tiny.py")))["get_config"]()
    (tmp_path / "rows.jsonl").write_text('{"img": "a.png", "caption": "a red square"}\n' * 3)
    config.data.sources.photos.path = str(tmp_path / "rows.jsonl")
    with pytest.raises(
        run_config.ConfigError, match=r"is empty.*rows.jsonl, line 1: missing key: 'image'; the row has"
    ):
        tokenizers.make(run_config.read(config), None)


def test_it_comes_with_the_weights_however_many_stages_ago(converted, mine, tmp_path, monkeypatch):
    run = types.SimpleNamespace(teacher_tokenizer=None)
    theirs = tokenizers.of_teacher(run, networks(50), mine, str(converted)).fingerprint()
    assert theirs != mine.fingerprint()
    starts = {"pretrain": str(converted), "unify": "../pretrain/checkpoints/7"}
    for stage in starts:
        (tmp_path / "run" / stage / "checkpoints" / {"pretrain": "7", "unify": "9"}[stage]).mkdir(parents=True)
    monkeypatch.setattr(Checkpoints, "meta", lambda self, step: {"init": starts[self.directory.parent.name]})
    unify = tmp_path / "run" / "unify" / "checkpoints" / "9"
    assert tokenizers.of_teacher(run, networks(50), mine, str(unify)).fingerprint() == theirs
    named = types.SimpleNamespace(teacher_tokenizer=str(converted / store.TEACHER_TOKENIZER))
    assert tokenizers.of_teacher(named, networks(50), mine, None).fingerprint() == theirs


def test_ids_are_shared_only_where_both_know_as_many(converted, mine):
    run = types.SimpleNamespace(teacher_tokenizer=None)
    assert tokenizers.of_teacher(run, networks(None), mine, None) is None
    assert tokenizers.of_teacher(run, networks(40), mine, None) is mine
    with pytest.raises(FileNotFoundError, match=r"teacher \(50 ids\).*\(40\).*no converted directory"):
        tokenizers.of_teacher(run, networks(50), mine, None)
    (converted / store.TEACHER_TOKENIZER).rename(converted / "elsewhere")
    with pytest.raises(FileNotFoundError, match="converted has no teacher_tokenizer"):
        tokenizers.of_teacher(run, networks(50), mine, str(converted))
