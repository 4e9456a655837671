"""What a run came from: the tensors that its weights never had."""

import json

import pytest

from unialign_jax import lineage
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
