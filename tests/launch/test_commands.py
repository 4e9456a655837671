"""Commands whose work is tested elsewhere, run as a user runs them: that flags reach it, and what they say."""

import json
import pathlib
import shutil

from PIL import Image

ROOT = pathlib.Path(__file__).parents[2]


def test_the_table_of_scaling_is_that_of_its_verdicts(command, tmp_path):
    """Nothing in the page's table was changed by hand, and every case that it lists has been judged."""
    page = ROOT / "docs" / "scaling.md"
    shutil.copy(page, tmp_path)
    shutil.copytree(page.with_suffix(""), tmp_path / "scaling")
    made = command("launch/compile.py", f"--table={tmp_path / 'scaling.md'}")
    assert made.returncode == 0, made.stderr
    assert (tmp_path / "scaling.md").read_text() == page.read_text()


def test_compile_says_what_is_missing(command):
    refused = command("launch/compile.py", "--topology=v5e:4x4")
    assert refused.returncode == 1 and "--config is missing" in refused.stderr and "Traceback" not in refused.stderr


def test_images_are_measured_by_command(command, tmp_path):
    Image.new("RGB", (64, 32)).save(tmp_path / "wide.png")
    turns = [{"from": "human", "value": "a black picture"}]
    rows = [{"image": name, "conversations": turns} for name in ("wide.png", "absent.png")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = command("-m", "unialign_jax.data.buckets", f"--source={tmp_path / 'rows.jsonl'}", "--task=generate")
    assert made.returncode == 0, made.stderr
    assert "2 rows, of which 1 can't be used" in made.stdout
    assert len(list(tmp_path.glob("*.sizes.npz"))) == 1
    none = command("-m", "unialign_jax.data.buckets", f"--source={tmp_path / 'rows.jsonl'}", "--task=edit")
    assert none.returncode == 1 and "none of 2 rows can be used; the first, line 1: " in none.stderr


def test_semgen_bench_is_asked_for_where_it_is(command, tmp_path):
    made = command(
        "launch/semgen_bench.py", "--checkpoint=scenes", f"--benchmark={tmp_path}", f"--output={tmp_path / 'out'}"
    )
    assert made.returncode == 1 and "semgen_bench.jsonl" in made.stderr and "Traceback" not in made.stderr


def test_benchmarks_are_listed(command):
    made = command("launch/benchmark.py", "--suite=speed")
    assert made.returncode == 78 and "data|sample|step|loop" in made.stderr
