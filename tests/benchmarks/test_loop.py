"""The benchmark of the loop: its arithmetic, and with few steps what it reports. Its times are not judged here."""

import json

import pytest

from unialign_jax.benchmarks import loop, suites

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("shared_compilations")]


def test_summary():
    bare = [(1.0, 0.1), (2.0, 0.2), (1.0, 0.1), (1.0, 0.1)]
    result = loop.summary(bare, [(1.5, 0.13), (3.0, 0.12), (1.02, 0.12)])
    assert result["bare_step_seconds"] == [1, 2, 1, 1] and result["loop_host_seconds"] == [0.13, 0.12, 0.12]
    assert result["ratio"] == {"median": 1.02, "quartiles": [1.0, 2.0]}
    assert result["host_share"] == pytest.approx(0.02)


def test_report(tmp_path, monkeypatch):
    config = loop.small_config

    def smaller(rows):
        made = config(rows)
        made.steps, made.data.global_batch = 3, 2
        made.model.transformer.num_layers = made.model.text_encoder.num_layers = made.objective.semantic_depth = 1
        return made

    for name, value in {"_STEPS": 1, "_WARM_UP": 1, "_ROUNDS": 2, "small_config": smaller}.items():
        monkeypatch.setattr(loop, name, value)
    report = suites.run("loop", tmp_path / "a" / "loop.json")
    assert json.loads((tmp_path / "a" / "loop.json").read_text()) == report
    assert report["suite"] == "loop" and report["steps_per_turn"] == 1 and report["devices"] == 1
    assert len(report["bare_step_seconds"]) == 3 and len(report["loop_step_seconds"]) == 2
    low, high = report["ratio"]["quartiles"]  # of two rounds, beyond both: they may be anything
    assert low <= report["ratio"]["median"] <= high and report["ratio"]["median"] > 0
