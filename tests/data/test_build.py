"""Building ArrayRecord datasets: nothing lost or changed, resumed exactly, readable by TFDS; and reading any TFDS."""

import io
import json
import os
import pickle
import signal
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from etils import epath
from etils.epath import backend
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import _registry
from PIL import Image

from unialign_jax.data import buckets
from unialign_jax.data import build as building
from unialign_jax.data.buckets import target_sizes
from unialign_jax.data.build import build
from unialign_jax.data.jsonl import ConversationSource, JsonlSource
from unialign_jax.data.report import CorpusError
from unialign_jax.data.samples import Cause, Refused, Sample
from unialign_jax.data.tfds_source import TfdsSource


def test_every_kind_of_sample_comes_back_as_it_was(tmp_path, encoded, monkeypatch):
    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes(encoded(i, height=8 + i))
    turns = [{"from": "human", "value": "a é"}]
    rows = [
        {"image": ["0.png"], "conversations": turns},
        {"image": ["1.png", "2.png"], "conversations": turns, "instruction": "do"},
        {
            "original_images": ["0.png", "1.png", "2.png"],
            "generated_images": ["3.png"],
            "edit_prompt": "put",
            "caption": "c",
        },
        {"image": ["2.png"], "question": "q?", "answer": "a"},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = JsonlSource(tmp_path / "rows.jsonl")
    report = build(source, tmp_path / "made", rows_per_shard=3)
    assert report.read == 4 and not report.refused
    made = pickle.loads(pickle.dumps(TfdsSource(tmp_path / "made")))
    assert len(made) == 4 and made.place(2) == "example 2"
    for i in range(4):
        expected = source[i].__dict__ | {
            "target": epath.Path(source[i].target).read_bytes(),
            "references": tuple(epath.Path(path).read_bytes() for path in source[i].references),
        }
        assert made[i].__dict__ == expected
    assert TfdsSource(tmp_path / "made", "caption", "train[:1]")[0].task == "caption"
    # Sizes were noted while building: nothing is measured any more, whatever task a config reads it for.
    with monkeypatch.context() as patch:
        patch.setattr(buckets, "_measure", None)
        for task in (None, "generate"):
            sizes = target_sizes(TfdsSource(tmp_path / "made", task))
            np.testing.assert_array_equal(sizes, [[8, 10], [10, 10], [11, 10], [10, 10]])
    assert epath.Path(made.sizes_path).exists() and not (tmp_path / "made" / ".unfinished").exists()
    decoded = tfds.builder_from_directory(tmp_path / "made").as_data_source(split="train")[1]
    assert decoded["target"].shape == (10, 10, 3) and (decoded["target"] == 2).all() and len(decoded["references"]) == 1


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """An object store's address; what is in it lies in the folder "store". Only `epath` can write there."""

    class Objects(DirFileSystem):
        protocol = ("gcs", "gs")

        def __init__(self, **_):
            super().__init__(path=str(tmp_path / "store"), fs=LocalFileSystem(auto_mkdir=True))

        def mkdir(self, path, *_, **__):  # directories come with the files in them
            pass

        makedirs = mkdir

        def mv(self, path1, path2, **_):
            super().mv(path1, path2, recursive=True)

        rename = mv

    monkeypatch.setitem(_registry, "gcs", Objects)
    backend.fsspec_backend._get_filesystem.cache_clear()
    yield "gs://bucket"
    backend.fsspec_backend._get_filesystem.cache_clear()


def test_a_dataset_in_an_object_store_is_the_same(tmp_path, write_rows, bucket):
    source = JsonlSource(write_rows(7, spoil=(4,)))
    build(source, f"{bucket}/made", rows_per_shard=3, refused_share=0.2)
    build(source, tmp_path / "here", rows_per_shard=3, refused_share=0.2)
    assert files(tmp_path / "store" / "bucket" / "made") == files(tmp_path / "here")
    assert not epath.Path(f"{bucket}/made/.unfinished").exists()
    remote = TfdsSource(f"{bucket}/made")
    np.testing.assert_array_equal(target_sizes(remote), [[8, 10]] * 6)


def test_what_can_not_be_read_now_is_not_left_out_for_good(tmp_path, write_rows):
    path = write_rows(9)
    image = tmp_path / "5.png"
    data = image.read_bytes()
    image.unlink()
    image.symlink_to("/proc/self/mem")  # to read it fails, as on a file system that is not well
    with pytest.raises(CorpusError, match=r"rows.jsonl, line 6: .*5.png.*may be readable later"):
        build(JsonlSource(path), tmp_path / "made", rows_per_shard=3, refused_share=0.5)
    image.unlink()
    image.write_bytes(data)
    assert build(JsonlSource(path), tmp_path / "made", rows_per_shard=3).read == 9
    assert [TfdsSource(tmp_path / "made")[i].caption for i in range(9)] == [str(i) for i in range(9)]


def files(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


def test_an_interrupted_build_goes_on_and_ends_alike(tmp_path, write_rows, monkeypatch):
    source = JsonlSource(write_rows(23, spoil=(4, 16)))
    build(source, tmp_path / "whole", rows_per_shard=5, refused_share=0.1)
    made = []
    write_shard = building._write_shard

    def interrupted(*arguments):
        made.append(arguments[-1])
        if len(made) == 3:
            (tmp_path / "parts" / f"samples-train.array_record-00002-of-00005.partial-{'0a' * 16}").write_bytes(b"half")
            raise KeyboardInterrupt
        return write_shard(*arguments)

    monkeypatch.setattr(building, "_write_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build(source, tmp_path / "parts", rows_per_shard=5, refused_share=0.1)
    with pytest.raises(ValueError, match="was begun with fingerprint = .*'task': None.*not .*'task': 'caption'"):
        build(JsonlSource(source.path, "caption"), tmp_path / "parts", rows_per_shard=5)
    with pytest.raises(ValueError, match="was begun with rows_per_shard = 5, not 6"):
        build(source, tmp_path / "parts", rows_per_shard=6)
    monkeypatch.setattr(building, "save_sizes", lambda *arguments: made.append("end") or sys.exit())
    with pytest.raises(SystemExit):  # killed while it finishes
        build(source, tmp_path / "parts", rows_per_shard=5, refused_share=0.1)
    monkeypatch.setattr(building, "save_sizes", buckets.save_sizes)
    report = build(source, tmp_path / "parts", rows_per_shard=5, refused_share=0.1)
    assert made == [0, 1, 2, 2, 3, 4, "end"]
    assert files(tmp_path / "parts") == files(tmp_path / "whole")
    assert report.read == 23 and set(report.named) == {4, 16} and report.refused == {"not an image": 2}
    assert json.loads((tmp_path / "parts" / "refused.json").read_text())["refused"] == {"not an image": 2}
    captions = [TfdsSource(tmp_path / "parts")[i].caption for i in range(21)]
    assert captions == [str(i) for i in range(23) if i not in (4, 16)]
    with pytest.raises(ValueError, match="holds a finished dataset"):
        build(source, tmp_path / "parts", rows_per_shard=5)


def test_a_second_build_at_the_same_place_ends_one_of_them_and_damages_nothing(tmp_path, write_rows, monkeypatch):
    source = JsonlSource(write_rows(6))
    build(source, tmp_path / "alone", rows_per_shard=6)
    example, others = building._example, []

    def while_another_begins(sample):
        if len(others) < 2:
            others.append(None)
            if len(others) == 1:  # ends in the midst of its shard, as if it were stopped
                with pytest.raises(ChildProcessError):
                    build(source, tmp_path / "both", rows_per_shard=6)
            else:
                raise ChildProcessError("stopped")
        return example(sample)

    monkeypatch.setattr(building, "_example", while_another_begins)
    with pytest.raises(OSError, match="another process has begun the same work"):
        build(source, tmp_path / "both", rows_per_shard=6)
    build(source, tmp_path / "both", rows_per_shard=6)
    assert files(tmp_path / "both") == files(tmp_path / "alone")


class _Deadly:
    """A source whose rows kill who reads them, as the kernel does where memory is short."""

    path = "rows.jsonl"

    def __len__(self):
        return 4

    def __getitem__(self, index):
        os.kill(os.getpid(), signal.SIGKILL)

    def fingerprint(self):
        return {}


def test_a_worker_that_is_killed_is_told(tmp_path):
    with pytest.raises(ChildProcessError, match=r"rows.jsonl: a worker process was killed.*fewer --processes"):
        build(_Deadly(), tmp_path / "made", rows_per_shard=2, processes=2)


def test_processes_change_nothing(tmp_path, write_rows):
    source = JsonlSource(write_rows(9))
    build(source, tmp_path / "one", rows_per_shard=3)
    build(source, tmp_path / "two", rows_per_shard=3, processes=2)
    one, two = TfdsSource(tmp_path / "one"), TfdsSource(tmp_path / "two")
    assert [one[i] for i in range(9)] == [two[i] for i in range(9)]
    assert files(tmp_path / "one").keys() == files(tmp_path / "two").keys()


@pytest.mark.parametrize("name", ["my-photos", "2photos", "a/b", "Photos", ""])
def test_names_that_tfds_would_refuse_at_the_end_are_refused_at_once(tmp_path, write_rows, name):
    with pytest.raises(ValueError, match=f"name is '{name}'"):
        build(JsonlSource(write_rows(2)), tmp_path / "made", name=name)
    assert not (tmp_path / "made").exists()


def test_too_many_unusable_rows_stop_it(tmp_path, write_rows):
    source = JsonlSource(write_rows(20, spoil=(3, 5)))
    with pytest.raises(CorpusError, match="rows.jsonl: 2 of 20 rows read refused"):
        build(source, tmp_path / "made", refused_share=0.05)
    assert not (tmp_path / "made" / "dataset_info.json").exists()
    # A shard without a single usable row is no trouble.
    build(source, tmp_path / "made2", rows_per_shard=1, refused_share=0.1)
    assert len(TfdsSource(tmp_path / "made2")) == 18


class Pets(tfds.core.GeneratorBasedBuilder):
    """A dataset of another form."""

    VERSION = tfds.core.Version("1.2.0")

    def _info(self):
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(),
                    "file": tfds.features.Tensor(shape=(), dtype=np.object_),
                    "size": tfds.features.Scalar(dtype=np.int64),
                    "label": tfds.features.ClassLabel(names=["tabby_cat", "dog"]),
                    "labels": tfds.features.Sequence(tfds.features.ClassLabel(names=["tabby_cat", "dog"])),
                    "captions": tfds.features.Sequence({"text": tfds.features.Text()}),
                }
            )
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(5)}

    def _generate_examples(self, count):
        for i in range(count):
            texts = [{"text": f"caption {i}.{j}"} for j in range(i)]
            file = io.BytesIO()
            Image.new("RGB", (10, 8), (i, i, i)).save(file, "PNG")
            label = i % 2 if i < 4 else -1
            data = file.getvalue()
            images = {"image": data, "file": data, "size": len(data)}
            yield i, images | {"label": label, "labels": [label, 0], "captions": texts}


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """The data directory where TFDS has prepared it."""
    data_dir = tmp_path_factory.mktemp("data")
    Pets(data_dir=data_dir, file_format="array_record").download_and_prepare()
    return data_dir


def test_datasets_of_other_forms_by_name_and_directory(foreign, encoded):
    fields = {"target": "image", "caption": "captions/text"}
    source = TfdsSource("pets", "caption", fields=fields, data_dir=foreign)
    found = {}
    for i in range(5):
        try:
            sample = source[i]
            found[sample.target] = sample.caption
            assert sample.instruction == sample.caption
        except Refused as refused:
            assert refused.cause is Cause.EMPTY_TEXT and "'captions/text' is an empty list" in refused.detail
    assert found == {encoded(i): f"caption {i}.0" for i in range(1, 5)}
    assert source.fingerprint().items() >= {"rows": 5, "name": "pets/1.2.0", "task": "caption"}.items()
    fields = {"target": "file", "question": "labels", "answer": "label"}
    labelled = TfdsSource(foreign / "pets" / "1.2.0", "answer", fields=fields)
    answers = {}
    for i in range(5):
        try:
            answers[labelled[i].target] = labelled[i].question, labelled[i].answer
        except Refused as refused:
            assert refused.cause is Cause.EMPTY_TEXT and "-1 is none of its 2 labels" in refused.detail
    assert answers == {encoded(i): (("tabby cat", "dog")[i % 2],) * 2 for i in range(4)}


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"path": "cats"}, CorpusError, "cats: no directory, and no dataset that TFDS knows"),
        ({"path": "."}, CorpusError, "found no dataset_info.json in it"),
        ({"path": "/absent"}, CorpusError, "/absent: expected .* found no dataset_info.json in it"),
        ({"path": "mnist"}, CorpusError, "mnist: expected a prepared dataset, found none in .*data_dir.*_prepare"),
        ({"split": "test"}, CorpusError, r"pets\[test\]: Unknown split 'test'.* \['train'\]"),
        ({"split": "train[:0]"}, CorpusError, r"pets\[train\[:0\]\]: "),
        ({"fields": {}}, CorpusError, "no feature 'target'; the dataset has captions, file, image, label"),
        ({"fields": {"target": "picture"}}, CorpusError, "no feature 'picture'; the dataset has captions, file, image"),
        ({"fields": {"target": "image", "caption": "captions/words"}}, CorpusError, "no feature 'captions/words'"),
        ({"fields": {"picture": "image"}}, ValueError, "no field 'picture'; the fields are task, target"),
        ({"fields": {"target": "image"}, "task": None}, CorpusError, "no feature 'task'"),
        ({"task": "draw"}, ValueError, "no task 'draw'"),
    ],
)
def test_datasets_that_can_not_be_read_say_why(foreign, arguments, error, words, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=words):
        TfdsSource(**{"path": "pets", "task": "caption", "data_dir": foreign} | arguments)


@pytest.mark.parametrize(
    ("field", "feature", "words"),
    [
        ("target", "label", "kind ClassLabel; expected an Image, or a Tensor of bytes"),
        ("target", "size", "kind Scalar; expected an Image"),
        ("target", "captions", "kind FeaturesDict; expected an Image"),
        ("references", "labels", "kind ClassLabel; expected an Image"),
        ("caption", "size", "kind Scalar; expected a Text or ClassLabel"),
        ("caption", "image", "kind Image; expected a Text or ClassLabel"),
    ],
)
def test_features_that_can_not_stand_for_a_field_are_refused(foreign, field, feature, words):
    with pytest.raises(CorpusError, match=rf"pets\[train\]: '{field}' is to be the feature '{feature}' of {words}"):
        TfdsSource("pets", "caption", fields={"target": "image"} | {field: feature}, data_dir=foreign)


def test_damaged_records_and_strange_tasks_are_refused(tmp_path, write_rows):
    build(JsonlSource(write_rows(40)), tmp_path / "made")
    (shard,) = (tmp_path / "made").glob("*.array_record*")
    data = bytearray(shard.read_bytes())
    at = data.index(b"generate")
    data[at : at + 8] = b"nonsense"
    shard.write_bytes(data)
    source = TfdsSource(tmp_path / "made")
    causes = []
    for i in range(40):
        try:
            assert isinstance(source[i], Sample)
        except Refused as refused:
            causes.append(refused.cause)
    assert len(causes) == 1 and causes[0] in (Cause.UNREADABLE_RECORD, Cause.UNKNOWN_TASK)


def test_a_damaged_record_is_refused_and_a_failed_read_is_an_error(tmp_path, write_rows):
    build(JsonlSource(write_rows(6)), tmp_path / "made", rows_per_shard=3)
    first, second = sorted((tmp_path / "made").glob("*.array_record*"))
    data = bytearray(first.read_bytes())
    at = data.index(b"generate")
    data[at : at + 8] = b"nonsense"
    first.write_bytes(data)
    second.rename(tmp_path / "away")
    source = TfdsSource(tmp_path / "made")
    with pytest.raises(Refused, match="00000-of-00002 can't be read: Corrupted") as refused:
        source[0]
    assert refused.value.cause is Cause.UNREADABLE_RECORD and source[1].caption == "1"
    with pytest.raises(CorpusError, match=r"made\[train\], example 4: .*00001-of-00002 can't be read: .*No such file"):
        source[4]
    (tmp_path / "away").rename(second)  # it was transient
    assert TfdsSource(tmp_path / "made")[4].caption == "4"


@pytest.mark.parametrize("length", [0, 100, 1 << 16, (1 << 16) + 100])
def test_a_shard_that_can_not_be_read_at_all_is_an_error(tmp_path, write_rows, length):
    build(JsonlSource(write_rows(6)), tmp_path / "made", rows_per_shard=3)
    first, _ = sorted((tmp_path / "made").glob("*.array_record*"))
    first.write_bytes(first.read_bytes()[:length])
    source = TfdsSource(tmp_path / "made")
    with pytest.raises(
        CorpusError, match=r"made\[train\], example 1: .*00000-of-00002 can't be read: .*build it again"
    ):
        source[1]
    assert source[3].caption == "3"


@pytest.mark.parametrize("name", ["dataset_info.json", "features.json"])
def test_a_dataset_whose_description_is_damaged_says_so(tmp_path, write_rows, name):
    build(JsonlSource(write_rows(3)), tmp_path / "made")
    file = tmp_path / "made" / name
    text = file.read_text()
    for damaged in (text[: len(text) // 2], "{}", None):
        if damaged is None:
            (tmp_path / "made" / "features.json").unlink()
        else:
            file.write_text(damaged)
        with pytest.raises(CorpusError, match="made: TFDS can't load it .* copy or build it again"):
            TfdsSource(tmp_path / "made")


def test_conversations_become_samples_of_their_own(tmp_path, encoded):
    (tmp_path / "a.png").write_bytes(encoded(1))
    turns = [{"from": ("human", "gpt")[i % 2], "value": str(i)} for i in range(6)]
    (tmp_path / "talks.json").write_text(json.dumps([{"image": "a.png", "conversations": turns}] * 2))
    build(ConversationSource(tmp_path / "talks.json"), tmp_path / "made")
    made = TfdsSource(tmp_path / "made")
    assert [(made[i].question, made[i].answer) for i in range(6)] == [("0", "1"), ("2", "3"), ("4", "5")] * 2
