"""WebDataset tars: captions, rows in a published form, and what is refused."""

import io
import json
import pickle
import tarfile

import numpy as np
import pytest

from unialign_jax.data import images
from unialign_jax.data.build import build
from unialign_jax.data.report import CorpusError
from unialign_jax.data.samples import Cause, Refused, Sample
from unialign_jax.data.tfds_source import TfdsSource
from unialign_jax.data.webdataset import TarSource
from unialign_jax.sampling.outputs import encode_png


def write(path, members):
    with tarfile.open(path, "w") as archive:
        archive.add(path.parent, "a folder", recursive=False)
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def edit(*images):
    row = {"image": images, "conversations": [{"from": "human", "value": "a cat"}], "instruction": "make it red"}
    return json.dumps(row).encode()


def test_samples_of_several_tars_by_index(tmp_path, encoded):
    images = [encoded(level) for level in range(5)]
    write(tmp_path / "b.tar", [("2.Before.png", images[2]), ("2.after.PNG", images[3]),
                               ("2.JSON", edit("2.before.PNG", "2.after.png"))])  # fmt: skip
    write(tmp_path / "a.tar", [("./x/0.jpg", images[0]), ("./x/0.txt", "a é".encode()),
                               ("./x/1.TXT", b"b"), ("./x/1.PNG", images[1])])  # fmt: skip
    source = pickle.loads(pickle.dumps(TarSource(tmp_path)))
    assert len(source) == 3 and source.fingerprint()["rows"] == 3
    assert source[2] == Sample("edit", images[3], (images[2],), caption="a cat", instruction="make it red")
    assert source[0] == Sample("generate", images[0], caption="a é", instruction="a é")
    assert source[1] == Sample("generate", images[1], caption="b", instruction="b")
    assert [source.place(i) for i in range(3)] == ["a.tar, ./x/0", "a.tar, ./x/1", "b.tar, 2"]
    assert TarSource(tmp_path / "a.tar", "caption")[0].task == "caption"


def test_metadata_beside_a_caption_is_no_row(tmp_path, encoded):
    image, caption = encode_png(np.full((8, 10, 3), 7, np.uint8), {"seed": 3}), "a cat"
    metadata = {"url": "https://a.b/c.jpg", "caption": "a cat", "key": "0", "width": 10, "image": "c.jpg"}
    row = {"image": ["2.png"], "question": "what is it?", "answer": "a cat"}
    write(tmp_path / "a.tar", [("0.jpg", image), ("0.txt", b"a cat"), ("0.json", json.dumps(metadata).encode()),
                               ("1.png", image), ("1.txt", b"a cat"), ("1.json", b"{broken"),
                               ("2.png", image), ("2.txt", b"a cat"), ("2.json", json.dumps(row).encode()),
                               ("3.png", image), ("3.json", json.dumps(metadata).encode())])  # fmt: skip
    source = TarSource(tmp_path / "a.tar")
    assert source[0] == Sample("generate", image, caption=caption, instruction=caption)
    assert source[1] == source[0]
    assert source[2] == Sample("answer", image, question="what is it?", answer="a cat")
    with pytest.raises(Refused) as caught:
        source[3]
    assert caught.value.cause is Cause.MISSING_IMAGE


def test_what_sampling_writes_can_be_trained_on(tmp_path):
    """As `sampling.outputs` makes it: an image, its metadata and its prompt."""
    members = []
    for i in range(3):
        metadata = {"index": i, "prompt": f"a ünicorn {i}", "images": ["a.png"] * i, "seed": i, "task": "generate"}
        members += [(f"{i:09d}.png", encode_png(np.full((8, 10, 3), i, np.uint8), metadata)),
                    (f"{i:09d}.json", json.dumps(metadata, ensure_ascii=False).encode()),
                    (f"{i:09d}.txt", metadata["prompt"].encode())]  # fmt: skip
    write(tmp_path / "shard-000000000-000000003.tar", members)
    assert not build(TarSource(tmp_path), tmp_path / "made").refused
    made = TfdsSource(tmp_path / "made")
    assert [made[i].caption for i in range(3)] == [f"a ünicorn {i}" for i in range(3)]
    assert [images.load(made[i].target, 8, 10).max() for i in range(3)] == [0, 1, 2]


@pytest.mark.parametrize(
    ("members", "cause", "words"),
    [
        ([("0.txt", b"x")], Cause.IMAGE_COUNT, "found 0 among txt"),
        ([("0.a.png", b""), ("0.png", b""), ("0.jpg", b""), ("0.txt", b"x")], Cause.IMAGE_COUNT, "found 2"),
        ([("0.png", b"")], Cause.MISSING_KEY, "expected 'txt' or 'json', found png"),
        ([("0.png", b""), ("0.txt", b"\xff")], Cause.MALFORMED_TEXT, "0.txt"),
        ([("0.png", b""), ("0.txt", b" ")], Cause.EMPTY_TEXT, "caption"),
        ([("0.png", b""), ("0.json", b"{")], Cause.MALFORMED_JSON, ""),
        ([("0.png", b""), ("0.json", edit("0.png", "0.jpg"))], Cause.MISSING_IMAGE, "'0.jpg': no such file"),
        ([("0.png", b""), ("0.json", edit("0.png", "1.png"))], Cause.MISSING_IMAGE, "'1.png': no such file"),
    ],
)
def test_unusable_samples_are_refused_by_cause(tmp_path, members, cause, words):
    write(tmp_path / "a.tar", members)
    with pytest.raises(Refused) as caught:
        TarSource(tmp_path / "a.tar")[0]
    assert caught.value.cause is cause and words in caught.value.detail


def test_samples_of_one_name_side_by_side_are_refused(tmp_path, encoded):
    """One would be lost in the other."""
    write(tmp_path / "a.tar", [("0.png", encoded(0)), ("0.txt", b"a"), ("0.PNG", encoded(1)), ("0.txt", b"b")])
    with pytest.raises(
        CorpusError, match=r"a.tar: expected one file 0.png .*'0.PNG': .* bytes \d+ and \d+.*rename one"
    ):
        TarSource(tmp_path)
    write(tmp_path / "a.tar", [("a/0.png", encoded(0)), ("a/0.txt", b"a"), ("b/0.png", encoded(1)), ("b/0.txt", b"b")])
    assert [sample.caption for sample in TarSource(tmp_path)] == ["a", "b"]


def test_names_that_are_not_utf_8_can_be_told_of(tmp_path, encoded):
    write(tmp_path / "a.tar", [("caf\udce9.png", encoded(0)), ("caf\udce9.\udce8", b"x")])
    source = TarSource(tmp_path / "a.tar")
    assert source.place(0) == "a.tar, caf\\xe9"
    with pytest.raises(Refused, match=r"found png, \\xe8") as caught:
        source[0]
    assert caught.value.detail.isascii()


def test_what_is_no_tar_is_said(tmp_path, encoded):
    with pytest.raises(CorpusError, match=r"expected tars \(\*.tar\), found none"):
        TarSource(tmp_path)
    with pytest.raises(CorpusError, match=r"absent.tar: expected a tar, found no such file"):
        TarSource(tmp_path / "absent.tar")
    write(tmp_path / "a.tar", [])
    with pytest.raises(CorpusError, match="expected samples, found no files in its 1 tar"):
        TarSource(tmp_path / "a.tar")
    (tmp_path / "a.tar").write_bytes(b"no tar" * 300)
    with pytest.raises(CorpusError, match="expected a tar that is whole and not compressed"):
        TarSource(tmp_path / "a.tar")
    write(tmp_path / "a.tar", [("0.png", encoded(0) * 40), ("0.txt", b"x")])
    whole = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[:1500])
    with pytest.raises(CorpusError, match="expected a tar that is whole"):
        TarSource(tmp_path / "a.tar")
    # tarfile takes all of these for the end of the archive.
    second = whole.index(b"0.txt")
    hole = whole[:second] + bytes(512) + whole[second + 512 :]
    for damaged in (whole[:second], whole[:second] + b"?" + whole[second + 1 :], hole):
        (tmp_path / "a.tar").write_bytes(damaged)
        with pytest.raises(CorpusError, match=rf"a.tar: expected a tar that is whole.* at byte {second}: what follows"):
            TarSource(tmp_path / "a.tar")
    with pytest.raises(ValueError, match="no task 'draw'"):
        TarSource(tmp_path / "a.tar", "draw")
