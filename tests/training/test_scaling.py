"""The table of docs/scaling.md: made from the verdicts at hand, going on where it stopped."""

import subprocess

import pytest

from unialign_jax.training import scaling

VERDICT = {
    "topology": "v5e:4x4",
    "slices": 2,
    "program": "train",
    "stage": "unify",
    "source": "generate",
    "image": [512, 512],
    "strategy": "fsdp",
    "remat": "full",
    "batch_per_chip": 4.0,
    "fits": True,
    "hbm_gib": {"parameters": 0.5, "optimizer": 1.0, "ema": 0.5, "frozen": 1.0, "temporaries": 3.0, "total": 6.0},
    "attention": "splash",
    "collectives": [
        {"kind": "all-gather", "axes": "fsdp", "network": "interconnect", "count": 24, "bytes": 24e9},
        {"kind": "all-reduce", "axes": "data", "network": "dcn", "count": 7, "bytes": 1e9},
        {"kind": "all-to-all", "axes": "fsdp", "network": "interconnect", "count": 1, "bytes": 10},
    ],
    "roofline": {"compute": 0.4, "hbm": 0.2, "interconnect": 0.3, "dcn": 0.1},
    "overlapped": {"step_s": 0.4, "images_per_s_per_chip": 10.0, "mfu": 0.6, "mfu_transformer": 0.5},
    "serial": {"step_s": 0.8, "images_per_s_per_chip": 5.0, "mfu": 0.3, "mfu_transformer": 0.25},
}
CASES = (scaling.Case("v5e:4x4", 16, 4, "full"), scaling.Case("v5e:4x4", 16, 400, "full"))


def test_an_interrupted_table_keeps_what_is_judged_and_goes_on(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text(f"# Title\n{scaling.MARKER}\nold\n")
    scaling.write(VERDICT, tmp_path / "page" / f"{CASES[0].name}.json")
    monkeypatch.setattr(scaling, "CASES", CASES)
    commands = []

    def fail(command, **_):
        commands.append(command)
        return subprocess.CompletedProcess(command, 1, "", "error: the compiler said no\n")

    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(ValueError, match="b400: error: the compiler said no"):
        scaling.make_table(page)
    assert len(commands) == 1 and "--config.data.global_batch=6400" in commands[0]
    text = page.read_text()
    assert text.startswith("# Title\n") and "old" not in text
    (row,) = [line for line in text.splitlines() if "2 x v5e:4x4" in line]
    assert row.count("|") == text.splitlines()[-3].count("|")
    assert "24 all-gather over fsdp 24.00, 7 all-reduce over data 1.00 (DCN)" in row and "all-to-all" not in row
    assert "60.0% / 30.0% | 50.0% / 25.0%" in row

    def refuse(command, **_):
        too_large = {key: VERDICT[key] for key in list(VERDICT)[:9]} | {"fits": False, "compiler": "out of memory"}
        file = next(part.removeprefix("--json=") for part in command if part.startswith("--json="))
        scaling.write(too_large, file)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", refuse)
    scaling.make_table(page)
    last = page.read_text().splitlines()[-1]
    assert "| no | out of memory |" in last and last.count("|") == row.count("|")


def test_a_page_without_a_place_for_the_table_is_refused(tmp_path):
    (tmp_path / "page.md").write_text("# Title\n")
    with pytest.raises(ValueError, match="expected the line"):
        scaling.make_table(tmp_path / "page.md")


def test_what_does_not_fit_is_said_with_the_compilers_words():
    keys = ("topology", "slices", "program", "stage", "source", "strategy", "batch_per_chip")
    kept = {key: VERDICT[key] for key in keys}
    text = scaling.summary(kept | {"fits": False, "compiler": "Out of memory"})
    assert (
        text == "train of unify/generate on v5e:4x4 x 2 slices, fsdp, 4 samples per chip: does not fit: Out of memory"
    )


def test_every_case_has_a_file_of_its_own():
    names = [case.name for case in scaling.CASES]
    assert len(set(names)) == len(names)
