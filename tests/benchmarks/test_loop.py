"""The benchmark of the loop, with few steps: what it reports. Its times are not judged here."""

import json

from unialign_jax.benchmarks import loop, suites


def test_report(tmp_path, monkeypatch):
    for name, value in {"_STEPS": 4, "_WARM_UP": 1, "_ROUNDS": 2}.items():
        monkeypatch.setattr(loop, name, value)
    report = suites.run("loop", tmp_path / "a" / "loop.json")
    assert json.loads((tmp_path / "a" / "loop.json").read_text()) == report
    assert report["suite"] == "loop" and report["steps_per_turn"] == 4 and report["devices"] == 1
    assert len(report["bare_step_seconds"]) == 3 and len(report["loop_step_seconds"]) == 2
    low, high = report["ratio"]["quartiles"]
    assert 0 < low <= report["ratio"]["median"] <= high
