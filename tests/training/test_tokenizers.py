"""Which tokenizer a teacher reads with: the config's, the one that came with its weights, or the text encoder's."""

import dataclasses
import json
import types

import pytest

from unialign_jax.checkpoints import Checkpoints
from unialign_jax.convert import store
from unialign_jax.data.tokenizer import Tokenizer
from unialign_jax.training import tokenizers


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
