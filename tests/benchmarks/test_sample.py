"""The benchmark of sampling: its arithmetic, and with few batches what it reports. Its times are not judged here."""

import json

from unialign_jax.benchmarks import sample, suites


def test_full_at():
    rows = [{"batch": 2**k, "images_per_second": speed} for k, speed in enumerate((1.0, 1.5, 1.55, 1.56))]
    assert [sample.full_at(rows[:n]) for n in range(1, 5)] == [None, None, None, 4]


def test_a_batch_of_the_published_steps_costs_its_first_and_49_more(monkeypatch):
    monkeypatch.setattr(sample, "_STEPS", 5)
    assert sample.published_seconds(one=1.5, many=3.5) == 1.5 + 49 * 0.5


def test_report(tmp_path, monkeypatch):
    for name, value in {"_LARGEST": 2, "_ROUNDS": 1, "_STEPS": 2}.items():
        monkeypatch.setattr(sample, name, value)
    report = suites.run("sample", tmp_path / "sample.json")
    assert json.loads((tmp_path / "sample.json").read_text()) == report
    one, two = report["rows"]
    assert (one["batch"], two["batch"]) == (1, 2) and report["model"] == "scenes"
    assert 0 < one["peak_gib"] < two["peak_gib"] < 1  # of one transformer, and of one batch more
    assert (tmp_path / "sample.md").read_text().count("\n") == 4
    svg = (tmp_path / "sample.svg").read_text()
    assert svg.startswith("<svg") and svg.count("<circle") == 2
