"""What a run came from: that it is still the same, and the tensors that its weights never had."""

import json

import numpy as np
import pytest

from unialign_jax import convert, lineage
from unialign_jax.checkpoints import Checkpoints
from unialign_jax.convert import store


@pytest.mark.parametrize(
    ("ranks", "drawn"),
    [
        ({}, ["text_proj_out.bias"]),
        ({"adapters": 8}, ["text_proj_out.bias"]),
        ({"pretrain": 0}, []),
        ({"pretrain": 0, "adapters": 8}, []),  # trained before the adapters came
        ({"first": 4, "adapters": 8}, ["text_proj_out.bias"]),
    ],
)
def test_what_was_drawn_stays_so_until_the_whole_model_is_trained(tmp_path, monkeypatch, ranks, drawn):
    """A chain of runs, each from the one before, of which those with a rank train adapters alone."""
    start = tmp_path / "start"
    start.mkdir()
    (start / store.MODEL_FILE).write_text(json.dumps({**store.HEADER, "drawn": ["text_proj_out.bias"]}))
    meta = {}
    for stage, rank in ranks.items():
        (place := tmp_path / "run" / stage / "checkpoints" / "5").mkdir(parents=True)
        meta[stage] = {"init": str(start), "config": {"lora": {"rank": rank}}}
        start = place
    monkeypatch.setattr(store, "read_config", lambda path: json.loads((path / store.MODEL_FILE).read_text()))
    monkeypatch.setattr(Checkpoints, "meta", lambda self, step: meta[self.directory.parent.name])
    assert lineage.drawn_of(start) == drawn
    assert lineage.drawn_of(None) == []


def test_directories_near_a_checkpoint_say_where_it_is(tmp_path):
    for step in (3, 7):
        (tmp_path / "run" / "unify" / "checkpoints" / str(step)).mkdir(parents=True)
        (tmp_path / "run" / "unify" / "checkpoints" / str(step) / "commit_success.txt").touch()
    stage = tmp_path / "run" / "unify"
    assert lineage.locate(stage) == stage / "checkpoints" / "7"
    for wrong, message in (
        (tmp_path / "run", f"holds a run's stages; name one: {stage}"),
        (stage / "checkpoints", f"name the stage, {stage}, or one of its steps"),
        (stage / "checkpoints" / "5", "no step 5; there are 3, 7"),
        (stage / "checkpoints" / "3" / "state", "is no checkpoint: expected a run's stage directory"),
    ):
        with pytest.raises(FileNotFoundError, match=message):
            lineage.locate(wrong)


def test_a_converted_start_is_known_by_its_weights(golden, tmp_path):
    for name in ("here", "there"):
        convert.to_jax(golden, tmp_path / name, progress=False)
    identity = lineage.identity_of(str(tmp_path / "here"))
    assert identity and set(identity) == {"transformer", "text_encoder", "autoencoder"}
    meta = {"init": str(tmp_path / "here"), "init_identity": identity}
    lineage.check_start(meta, tmp_path / "run" / "unify")
    assert lineage.moved_start(meta, tmp_path / "there") == str(tmp_path / "there")

    file = tmp_path / "there" / store.MODEL_FILE
    model = json.loads(file.read_text())
    model["checksums"]["transformer"] += 1
    file.write_text(json.dumps(model))
    with pytest.raises(ValueError, match="there is not the checkpoint that this run started from"):
        lineage.moved_start(meta, tmp_path / "there")
    (tmp_path / "here").rename(tmp_path / "gone")
    (tmp_path / "there").rename(tmp_path / "here")
    with pytest.raises(ValueError, match="unify started from .*here, where another checkpoint is now"):
        lineage.check_start(meta, tmp_path / "run" / "unify")


def test_the_checksum_is_that_of_the_arrays(tmp_path):
    def saved(name, **arrays):
        return store.save_network(tmp_path / name, {key: store.Stream.of(value) for key, value in arrays.items()})

    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(2, np.float32)}
    first = saved("first", **arrays)
    assert saved("same", **arrays) == first
    assert saved("other", **(arrays | {"a": arrays["a"] + 1})) != first
    rows = {
        key: store.Stream(x.shape, x.dtype, 1, lambda x=x: iter(x[i : i + 1] for i in range(len(x))))
        for key, x in arrays.items()
    }
    assert store.save_network(tmp_path / "in_pieces", rows) == first


def test_a_public_directory_is_no_start_before_it_is_converted(golden):
    with pytest.raises(FileNotFoundError, match=rf"convert it first: .*--to=jax --source={golden} --target=DIRECTORY"):
        lineage.locate(golden)
