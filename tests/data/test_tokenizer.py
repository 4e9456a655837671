"""Tokenizers against transformers' own reading of the same files, and the rules of the ids."""

import json
import logging
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, T5TokenizerFast

from unialign_jax.data.tokenizer import PlainTokenizer, Tokenizer

CORPUS = [
    "A red circle is above a blue square.",
    "A blue circle is left of a green triangle.",
    "Two yellow stars are below a red square!",
    "The cat's photo: a black cat, sleeping on a red sofa.",
    "Un café très chaud, 3 tables.",
    "猫が赤いソファで眠っている。",
    "Красный круг над синим квадратом",
]
SCRIPTS = [
    "A red circle is above a blue square.",
    "  spaces \t\n everywhere  ",
    "猫が赤いソファ",
    "مربع أزرق",
    "नीला वर्ग",
    "emoji 🟥🔵 and 👩‍👩‍👧",
    "\x00control\x07",
    "ﬁne ① ｆｕｌｌ",
]


@pytest.fixture(scope="module")
def learned():
    return Tokenizer.learn(CORPUS, 160)


@pytest.fixture(scope="module")
def learned_directory(learned, tmp_path_factory):
    directory = tmp_path_factory.mktemp("learned")
    learned.save(directory)
    return directory


@pytest.fixture(scope="module")
def t5_directory(tmp_path_factory):
    """A small T5 tokenizer as transformers itself saves one: 100 extra ids, `<extra_id_0>` last."""
    words = "▁a ▁red ▁circle ▁is ▁above ▁blue ▁square ▁ . , ? ▁What ▁color".split()
    characters = sorted(set("abcdefghijklmnopqrstuvwxyzAW"))
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(word, -2.0) for word in words] + [(character, -5.0) for character in characters]
    pieces += [(f"<extra_id_{index}>", 0.0) for index in reversed(range(100))]
    directory = tmp_path_factory.mktemp("t5")
    T5TokenizerFast(vocab=pieces).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def qwen_directory(tmp_path_factory):
    """A small byte-level tokenizer in Qwen's form: no unknown token, no mask token."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_special_tokens(["<|endoftext|>", "<|im_end|>"])
    directory = tmp_path_factory.mktemp("qwen")
    wrapped = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    wrapped.save_pretrained(directory)
    return directory


class Records(logging.Handler):
    def __init__(self):
        super().__init__()
        self.messages = []

    def emit(self, record):
        self.messages.append(record.getMessage())


@pytest.fixture
def warnings():
    """Messages that absl logs during the test."""
    records, logger = Records(), logging.getLogger("absl")
    logger.addHandler(records)
    yield records.messages
    logger.removeHandler(records)


@pytest.mark.parametrize("text", [*SCRIPTS, "", "What color is a red circle?"])
@pytest.mark.parametrize("length", [1, 6, 40])
def test_t5_ids_equal_transformers(t5_directory, text, length):
    """The published data sets: pad token = end token, padded and truncated to the length."""
    oracle = T5TokenizerFast.from_pretrained(t5_directory)
    oracle.pad_token = oracle.eos_token
    expected = oracle(text, padding="max_length", truncation=True, max_length=length).input_ids
    ids = Tokenizer.load(t5_directory).encode(text, length)
    assert ids.tolist() == expected
    assert ids.dtype == np.int32
    assert ids[-1] == 1


def test_t5_special_ids(t5_directory):
    tokenizer = Tokenizer.load(t5_directory)
    assert tokenizer.end_id == 1
    assert tokenizer.mask_id == tokenizer.vocab_size - 1 == len(T5TokenizerFast.from_pretrained(t5_directory)) - 1


@pytest.mark.parametrize("text", [*SCRIPTS, *CORPUS, "", "unseen wordforms 42"])
def test_learned_files_read_by_transformers(learned, learned_directory, text):
    expected = [*learned.encode(text, 200)[: len(learned._text_ids(text))], learned.end_id]
    for oracle_class in (PreTrainedTokenizerFast, AutoTokenizer):
        assert oracle_class.from_pretrained(learned_directory)(text).input_ids == expected
    # transformers 5 rebuilds a T5 tokenizer from the vocabulary and forgets the NFKC normalizer.
    t5 = T5TokenizerFast.from_pretrained(learned_directory)
    if learned._backend.normalizer.normalize_str(text) == text:
        assert t5(text).input_ids == expected
    assert len(t5) == learned.vocab_size
    assert (t5.pad_token_id, t5.eos_token_id, t5.unk_token_id) == (0, 1, 2)


def test_save_and_load_round_trip(learned, learned_directory, t5_directory, tmp_path):
    again = Tokenizer.load(learned_directory)
    assert (again.vocab_size, again.end_id, again.mask_id) == (160, 1, 159)
    for text in SCRIPTS + CORPUS:
        assert np.array_equal(again.encode(text, 64), learned.encode(text, 64))
    Tokenizer.load(t5_directory).save(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert json.loads((tmp_path / name).read_text()) == json.loads((t5_directory / name).read_text())


def test_workers_can_receive_a_tokenizer(learned):
    copied = pickle.loads(pickle.dumps(learned))
    assert np.array_equal(copied.encode(CORPUS[0], 30), learned.encode(CORPUS[0], 30))
    assert copied.mask_id == learned.mask_id


@pytest.mark.parametrize("text", CORPUS)
def test_decode_gives_the_text_back(learned, text):
    assert learned.decode(learned.encode(text, 200)) == text


def test_decode_stops_at_the_first_end_and_drops_special_tokens(learned):
    red, square = learned._text_ids("red"), learned._text_ids("square")
    ids = [0, *red, learned.mask_id, 2, *square, 1, *red, 1]
    assert learned.decode(np.array(ids)) == "red square"
    assert learned.decode([1, *red]) == ""
    assert learned.decode([]) == ""
    assert learned.decode(np.array([*red, *square])) == "red square"


@pytest.mark.parametrize("text", ["a </s> red <extra_id_0> circle <pad>", "a</s>red<extra_id_0>circle"])
def test_text_cannot_forge_control_tokens(learned, t5_directory, text):
    for tokenizer in (learned, Tokenizer.load(t5_directory)):
        ids = tokenizer.encode(text, 40)
        content = ids[: np.argmax(ids == tokenizer.end_id)]
        assert tokenizer.mask_id not in ids
        assert 0 not in ids  # padding
        assert tokenizer.decode(ids) == "a red circle"
        assert len(content) == np.sum(ids != tokenizer.end_id)


def test_empty_text_is_all_end_tokens(learned):
    for text in ("", " ", "\n"):
        assert learned.encode(text, 5).tolist() == [1] * 5


def test_long_text_is_cut_and_logged_once(learned_directory, warnings):
    tokenizer = Tokenizer.load(learned_directory)
    full = tokenizer._text_ids("a red circle " * 2000)
    ids = tokenizer.encode("a red circle " * 2000, 16)
    assert ids.tolist() == [*full[:15], 1]
    assert len(warnings) == 1
    assert f"{len(full)} tokens was cut to 15" in warnings[0]
    assert tokenizer.decode(full[15:30]) in warnings[0]
    assert len(warnings[0]) < 400
    tokenizer.encode("a blue square " * 2000, 16)
    tokenizer.encode_masked("a blue square " * 2000, 16)
    assert len(warnings) == 1
    Tokenizer.load(learned_directory).encode("a red circle " * 9, 4)
    assert len(warnings) == 2


def test_text_that_just_fits_is_not_cut(learned_directory, warnings):
    tokenizer = Tokenizer.load(learned_directory)
    content = tokenizer._text_ids(CORPUS[0])
    assert tokenizer.encode(CORPUS[0], len(content) + 1).tolist() == [*content, 1]
    ids, mask = tokenizer.encode_masked(CORPUS[0], len(content))
    assert ids.tolist() == content
    assert mask.all()
    assert not warnings


def test_prompt_and_answer(learned):
    prompt, answer = learned._text_ids("What color?"), learned._text_ids("red")
    ids, mask = learned.encode_prompted("What color?", "red", 40)
    padding = 40 - len(prompt) - len(answer)
    assert ids.tolist() == [*prompt, *answer, *[1] * padding]
    assert mask.tolist() == [False] * len(prompt) + [True] * (len(answer) + padding)
    assert ids.dtype == np.int32
    assert mask.dtype == bool


def test_prompt_and_answer_that_do_not_fit(learned_directory, warnings):
    tokenizer = Tokenizer.load(learned_directory)
    prompt, answer = tokenizer._text_ids("What color?"), tokenizer._text_ids("a red circle above a blue square")
    ids, mask = tokenizer.encode_prompted("What color?", "a red circle above a blue square", len(prompt) + 3)
    assert ids.tolist() == [*prompt, *answer[:2], 1]
    assert mask.tolist() == [False] * len(prompt) + [True] * 3
    ids, mask = tokenizer.encode_prompted("What color?", "red", 4)
    assert ids.tolist() == [*prompt[:3], 1]
    assert mask.tolist() == [False, False, False, True]
    assert len(warnings) == 1


@pytest.mark.parametrize("text", [*SCRIPTS, ""])
def test_teacher_ids_equal_transformers(qwen_directory, text):
    oracle = PreTrainedTokenizerFast.from_pretrained(qwen_directory)
    expected = oracle(text, padding="max_length", max_length=80)
    ids, mask = PlainTokenizer.load(qwen_directory).encode_masked(text, 80)
    assert mask.tolist() == [bool(kept) for kept in expected.attention_mask]
    assert ids[mask].tolist() == [i for i, kept in zip(expected.input_ids, mask, strict=True) if kept]
    assert ids.dtype == np.int32
    assert mask.dtype == bool


def test_the_learned_tokenizer_serves_a_teacher_too(learned, learned_directory):
    ids, mask = PlainTokenizer.load(learned_directory).encode_masked("a red circle", 12)
    assert ids[mask].tolist() == learned._text_ids("a red circle")
    assert not mask[-1]
    assert np.array_equal(ids, learned.encode_masked("a red circle", 12)[0])


def test_learned_vocabulary(learned):
    vocab = learned._backend.get_vocab()
    assert sorted(vocab.values()) == list(range(160))
    assert [vocab[token] for token in ("<pad>", "</s>", "<unk>", "<extra_id_0>")] == [0, 1, 2, 159]
    assert "▁circle" in vocab  # a word of the corpus that shares its inside with no other
    assert not [piece for piece in vocab if "▁" in piece[1:]]
    content = learned._text_ids("a red circle")
    assert len(content) == 3
    assert 2 in learned._text_ids("🟥")


def test_learning_is_deterministic(learned):
    """In other processes, where the library's hash maps have another order, and for another order of the corpus."""
    program = (
        "import sys, json; from unialign_jax.data.tokenizer import Tokenizer; "
        "print(Tokenizer.learn(json.load(sys.stdin), 160)._backend.to_str())"
    )
    for corpus in (CORPUS, CORPUS[::-1]):
        ran = subprocess.run(
            [sys.executable, "-c", program],
            input=json.dumps(corpus),
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        )
        assert json.loads(ran.stdout) == json.loads(learned._backend.to_str())


@pytest.mark.parametrize("corpus", [[], [""], [" \n", "\t"]])
def test_an_empty_corpus_is_refused(corpus):
    with pytest.raises(ValueError, match="corpus .* is empty"):
        Tokenizer.learn(corpus, 100)


def test_impossible_vocabulary_sizes_name_the_limits():
    corpus = ["red red blue", "red"]  # r e d b l u ▁; merges: red, ▁red, blue, ...
    for size in (-3, 0, 4, 10):
        with pytest.raises(ValueError, match=f"vocab_size {size} .* at least 11"):
            Tokenizer.learn(corpus, size)
    assert Tokenizer.learn(corpus, 11).vocab_size == 11
    with pytest.raises(ValueError, match="vocab_size 900 .* at most (1[0-9]) ids") as refused:
        Tokenizer.learn(corpus, 900)
    most = int(str(refused.value).split("at most ")[1].split()[0])
    assert Tokenizer.learn(corpus, most).vocab_size == most


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"{tmp_path} has no tokenizer.json; .*AutoTokenizer"):
        Tokenizer.load(tmp_path)
    (tmp_path / "spiece.model").write_bytes(b"\n")
    with pytest.raises(FileNotFoundError, match=r"only spiece.model\); .*AutoTokenizer"):
        Tokenizer.load(tmp_path)


def test_unreadable_files_are_named(learned, tmp_path):
    learned.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ValueError, match="tokenizer_config.json holds a list"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match="tokenizer_config.json is not JSON"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="tokenizer.json is not a tokenizer"):
        Tokenizer.load(tmp_path)


def test_missing_tokens_are_named(qwen_directory, t5_directory, tmp_path):
    with pytest.raises(ValueError, match=rf"{qwen_directory} has no mask token '<extra_id_0>'"):
        Tokenizer.load(qwen_directory)
    Tokenizer.load(t5_directory).save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<stop>"}}))
    with pytest.raises(ValueError, match="has no end token '<stop>'"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    assert Tokenizer.load(tmp_path).end_id == 1


def test_length_without_room_is_refused(learned):
    with pytest.raises(ValueError, match="text length 0"):
        learned.encode("a", 0)
    with pytest.raises(ValueError, match="text length 0"):
        learned.encode_prompted("a", "b", 0)
