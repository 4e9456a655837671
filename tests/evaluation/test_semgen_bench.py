"""SemGen-Bench: every image it asks for, where its scorer looks."""

import json

import numpy as np
import pytest
from PIL import Image

from unialign_jax.evaluation import semgen_bench
from unialign_jax.sampling import Job


@pytest.fixture
def benchmark(tmp_path):
    """Two rows in the published form, whose images are named where they were when it was published."""
    (tmp_path / "benchmark" / "images").mkdir(parents=True)
    rows = []
    for number in (1, 2):
        pixels = np.random.default_rng(number).integers(0, 256, (20, 10 * number, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"benchmark/images/{number}.jpg")
        texts = {key: f"{key} {number}" for groups in semgen_bench.GROUPS.values() for key in groups}
        rows.append({"image_id": number, "image_path": f"/gone/benchmark/images/{number}.jpg", **texts})
    (tmp_path / "benchmark/semgen_bench.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "benchmark"


def test_all_that_is_asked_for_lies_where_the_scorer_looks(benchmark, stage, tmp_path):
    job = Job(stage[0], "generate", tmp_path / "mine", options={"steps": 2}, dtype="float32", batch=2, progress=False)
    semgen_bench.draw(benchmark, job)
    for task, groups in semgen_bench.GROUPS.items():
        for place, (group, key) in enumerate((group, key) for group in groups for key in (0, 1)):
            image = Image.open(tmp_path / "mine/fullset" / group / f"{key}.png")
            assert image.text["prompt"] == f"{group} {key + 1}" and image.text["task"] == task
            made = tmp_path / "mine/made" / task / f"{place:03d}.png"
            assert made.read_bytes() == (tmp_path / "mine/fullset" / group / f"{key}.png").read_bytes()
            source = tmp_path / "mine/fullset" / group / f"{key}_SRCIMG.png"
            assert source.exists() == (task == "edit")
            if task == "edit":
                assert json.loads(image.text["images"]) == [str(source)]
                expected = Image.open(benchmark / f"images/{key + 1}.jpg").resize((512, 512))
                np.testing.assert_array_equal(np.asarray(Image.open(source)), np.asarray(expected))
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "mine/made").rglob("*.png")}
    (tmp_path / "mine/fullset/edit_multi/1.png").unlink()
    semgen_bench.draw(benchmark, job)  # nothing is made twice
    assert written == {path: path.stat().st_mtime_ns for path in (tmp_path / "mine/made").rglob("*.png")}
    assert (tmp_path / "mine/fullset/edit_multi/1.png").exists()


def test_what_is_not_the_benchmark_is_refused(benchmark, stage, tmp_path):
    job = Job(stage[0], "generate", tmp_path / "mine")
    with pytest.raises(FileNotFoundError, match=r"expected semgen_bench.jsonl, found none"):
        semgen_bench.draw(tmp_path, job)
    (benchmark / "images/2.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"images/2.jpg: no such image"):
        semgen_bench.draw(benchmark, job)
    (benchmark / "semgen_bench.jsonl").write_text('{"image_path": "1.jpg", "t2i_long": "a"}')
    with pytest.raises(ValueError, match=r"line 1: expected t2i_complex, edit_multi, edit_complex"):
        semgen_bench.draw(benchmark, job)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ("{", "line 3: Expecting property name"),
        ("[]", "line 3: expected a JSON object, found a list"),
        ({"t2i_long": 3}, "line 3: t2i_long is 3; expected a text"),
        ({"image_path": None}, "line 3: image_path is None; expected a text"),
    ],
)
def test_lines_that_are_no_rows_are_named(benchmark, stage, tmp_path, second, message):
    file = benchmark / "semgen_bench.jsonl"
    row = json.loads(file.read_text().splitlines()[0])
    wrong = second if isinstance(second, str) else json.dumps(row | second)
    file.write_text(f"{json.dumps(row)}\n\n{wrong}\n")
    with pytest.raises(ValueError, match=rf"semgen_bench.jsonl, {message}"):
        semgen_bench.draw(benchmark, Job(stage[0], "generate", tmp_path / "mine"))


def test_texts_may_hold_any_character(benchmark, stage, tmp_path):
    file = benchmark / "semgen_bench.jsonl"
    row = json.loads(file.read_text().splitlines()[0]) | {"t2i_long": "above\u2028below\u0085end"}
    file.write_text(json.dumps(row, ensure_ascii=False) + "\n")
    job = Job(stage[0], "generate", tmp_path / "mine", options={"steps": 2}, dtype="float32", batch=2, progress=False)
    semgen_bench.draw(benchmark, job)
    assert Image.open(tmp_path / "mine/fullset/t2i_long/0.png").text["prompt"] == row["t2i_long"]
