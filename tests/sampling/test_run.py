"""Sampling runs: rows from anywhere, every result once, killed runs that go on, refusals before a model is read."""

import io
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader
from etils import epath
from PIL import Image

from unialign_jax import exports, sampling
from unialign_jax.pipeline import UniAlignPipeline
from unialign_jax.sampling import outputs
from unialign_jax.sampling.outputs import is_result
from unialign_jax.sampling.rows import Row

ROOT = pathlib.Path(__file__).parents[2]
FEW = {"steps": 2}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A directory of small pictures, one of which is broken."""
    directory = tmp_path_factory.mktemp("pictures")
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 256, (20, 24, 3), np.uint8)
        Image.fromarray(pixels).save(directory / f"{i}.png")
    (directory / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    return directory


@pytest.fixture
def run(stage, tmp_path):
    """Runs a job in this process; keyword arguments of `sampling.Job`."""

    def call(task="generate", output=tmp_path / "out", **job):
        job = {"options": FEW, "dtype": "float32", "batch": 4, "progress": False} | job
        return sampling.sample(sampling.Job(stage[0], task, output, **job))

    return call


def jsonl(path, rows):
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return path


def tar_images(shards):
    """Row -> PNG of all shards, in each of which it is once."""
    images = {}
    for shard in shards:
        with tarfile.open(shard) as tar:
            names = [name for name in tar.getnames() if name.endswith(".png")]
            assert not images.keys() & {int(name[:9]) for name in names}
            images |= {int(name[:9]): tar.extractfile(name).read() for name in names}
    return images


def contents(directory):
    """Name -> bytes of everything below a directory."""
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def test_images_carry_their_prompt_and_are_those_of_the_pipeline(run, stage, tmp_path):
    prompts = ["a red square", "a blue disc", "", "a green field", "красный", "a red disc"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts) + "\n\n")
    result = run(prompts=tmp_path / "prompts.txt", seed=7, grid=4)
    assert (result.rows, result.failed) == (5, 0)
    pipeline = UniAlignPipeline.from_pretrained(stage[0], dtype="float32", progress=False)
    there = [prompt for prompt in prompts if prompt]
    for i, expected in enumerate(pipeline.generate(there, seed=7, **FEW)):
        image = Image.open(tmp_path / f"out/{i:03d}.png")
        np.testing.assert_allclose(np.int32(image), np.int32(expected), atol=1)
        assert image.text["prompt"] == there[i] and image.text["seed"] == str(7 + i) and image.text["steps"] == "2"
        assert image.text["checkpoint"] == str(stage[0] / "checkpoints" / "3") and image.text["guidance"] == "7.0"
    assert Image.open(tmp_path / "out/grid.png").size == (33, 33)


def test_rows_that_cannot_be_made_are_named_and_the_others_are_made(run, pictures, tmp_path, capsys):
    rows = [
        {"instruction": "make it red", "image": "0.png"},
        {"instruction": "make it red", "image": "nowhere.png"},
        {"edit_prompt": "make it blue", "original_images": ["1.png"], "seed": 99},
        {"instruction": "make it red", "image": "broken.png"},
        "not json\n",
        {"instruction": "make it red"},
        {"image": "0.png", "prompt": "\ud800"},
        {"image": "0.png", "prompt": "a", "seed": -1},
        {"image": "", "prompt": "a"},
        {"image": "./", "prompt": "a"},
    ]
    file = jsonl(pictures / "edits.jsonl", rows)
    result = run("edit", prompts=file)
    assert (result.rows, result.failed) == (10, 8)
    found = contents(tmp_path / "out")
    assert sorted(name for name in found if name.endswith(".png")) == ["000.png", "002.png"]
    errors = {name[:3]: json.loads(data)["error"] for name, data in found.items() if "error" in name}
    for row, part in {
        "001": "no such file", "003": "broken.png", "004": "line 5", "005": "edit needs an image",
        "006": "no Unicode text", "007": "seeds in", "008": "a path is empty", "009": "Is a directory",
    }.items():  # fmt: skip
        assert part in errors[row], errors
    assert Image.open(tmp_path / "out/002.png").text["seed"] == "99"
    assert run("edit", prompts=file, progress=True).failed == 8  # nothing is left to make
    said = capsys.readouterr().err
    assert f"all 10 rows are in {tmp_path / 'out'} already" in said and "but for 8 that could not be made" in said
    assert contents(tmp_path / "out") == found
    # What can be made by now is made where its error file is gone; so it is where a unit is made again anyway.
    shutil.copy(pictures / "0.png", pictures / "nowhere.png")
    (tmp_path / "out/000.png").unlink()
    assert run("edit", prompts=file).failed == 1  # of its unit
    (pictures / "nowhere.png").unlink()
    assert contents(tmp_path / "out").keys() == found.keys() - {"001.error.json"} | {"001.png"}


def test_shards(run, pictures, tmp_path):
    rows = [{"prompt": f"a red square {i}", "image": [f"{i % 3}.png"] * (1 + i % 2)} for i in range(10)]
    file = jsonl(pictures / "compose.jsonl", rows)
    png = {"prompts": file, "batch": 2}
    run("compose", output=tmp_path / "png", **png)
    run("compose", output=tmp_path / "tar", format="webdataset", shard_rows=3, **png)
    run("compose", output=tmp_path / "records", format="array_record", shard_rows=8, **png)
    expected = [(tmp_path / f"png/{i:03d}.png").read_bytes() for i in range(10)]

    shards = sorted((tmp_path / "tar").glob("*.tar"))
    assert [s.name for s in shards] == [f"shard-{a:09d}-{b:09d}.tar" for a, b in ((0, 4), (4, 8), (8, 10))]
    images = tar_images(shards)
    assert [images[i] for i in range(10)] == expected
    with tarfile.open(shards[1]) as tar:
        metadata, prompt = (tar.extractfile(f"000000007.{end}").read() for end in ("json", "txt"))
    assert json.loads(metadata)["prompt"] == prompt.decode() == "a red square 7"

    records = []
    for shard in sorted((tmp_path / "records").glob("*.array_record")):
        records += ArrayRecordReader(str(shard)).read_all()
    assert records == expected
    assert Image.open(io.BytesIO(records[3])).text["index"] == "3"


@pytest.mark.parametrize("name", ["array_record", "webdataset"])
def test_a_request_from_flags_as_shards(run, tmp_path, name):
    result = run(prompt="a red square", count=5, format=name, shard_rows=4)
    extension = {"array_record": "array_record", "webdataset": "tar"}[name]
    files = [str(tmp_path / f"out/shard-{a:09d}-{b:09d}.{extension}") for a, b in ((0, 4), (4, 5))]
    assert list(result.shown) == files == [str(path) for path in sorted((tmp_path / "out").glob(f"*.{extension}"))]


def test_a_run_goes_on_with_the_step_that_it_began_with(stage, tmp_path):
    """Though the training run has saved another since."""
    shutil.copytree(stage[0], tmp_path / "stage")
    checkpoints = tmp_path / "stage" / "checkpoints"

    def make(output):
        job = {"options": FEW, "dtype": "float32", "batch": 4, "progress": False, "prompt": "a red square", "count": 8}
        sampling.sample(sampling.Job(tmp_path / "stage", "generate", tmp_path / output, **job))
        return contents(tmp_path / output)

    whole = make("out")
    for i in range(4, 8):
        (tmp_path / f"out/{i:03d}.png").unlink()
    shutil.copytree(checkpoints / "3", checkpoints / "4")
    assert make("out") == whole
    assert Image.open(tmp_path / "out/007.png").text["checkpoint"] == str(checkpoints / "3")
    (tmp_path / "out/007.png").unlink()
    (checkpoints / "3").rename(tmp_path / "3")
    with pytest.raises(ValueError, match="checkpoints/3, which training has removed"):
        make("out")
    make("later")
    assert Image.open(tmp_path / "later/007.png").text["checkpoint"] == str(checkpoints / "4")


def test_a_run_of_which_nothing_can_be_made_fails(run, pictures, tmp_path):
    file = jsonl(pictures / "none.jsonl", [{"image": "nowhere.png"}, {"image": "broken.png", "prompt": "not needed"}])
    with pytest.raises(ValueError, match="not one of 2 rows could be made; .* the first: .*nowhere.png"):
        run("caption", prompts=file)
    assert "broken.png" in (tmp_path / "out/shard-000000000-000000002.errors.jsonl").read_text()
    with pytest.raises(ValueError, match="not one of 2 rows could be made"):  # though nothing is left to do
        run("caption", prompts=file)


def test_other_weights_in_the_place_of_those_it_began_with_are_refused(run, stage, tmp_path):
    exports.to_jax(stage[0], tmp_path / "model", progress=False)
    job = {"options": FEW, "dtype": "float32", "progress": False, "prompt": "a red square"}
    job = sampling.Job(tmp_path / "model", "generate", tmp_path / "out", **job)
    sampling.sample(job)
    assert sampling.sample(job).failed == 0
    shutil.rmtree(tmp_path / "model")
    exports.to_jax(stage[0], tmp_path / "model", average=False, progress=False)
    with pytest.raises(ValueError, match="where other weights are now"):
        sampling.sample(job)


def test_an_image_with_another_content_is_another_request(run, pictures, tmp_path):
    place = tmp_path / "place.png"
    shutil.copy(pictures / "0.png", place)
    run("caption", images=(str(place),))
    shutil.copy(pictures / "1.png", place)
    with pytest.raises(ValueError, match="another sampling run .*other prompts or images"):
        run("caption", images=(str(place),))


def test_names_of_files_need_not_be_unicode(run, pictures, tmp_path):
    name = os.fsdecode(b"caf\xe9.png")
    shutil.copy(pictures / "0.png", tmp_path / name)
    file = jsonl(tmp_path / "rows.JSONL", [{"prompt": "a red square", "image": name}])
    run("edit", prompts=file)
    assert "caf\\udce9.png" in Image.open(tmp_path / "out/000.png").text["images"]
    run("edit", output=tmp_path / "tar", prompts=file, format="webdataset")
    assert len(tar_images((tmp_path / "tar").glob("*.tar"))) == 1


def test_a_file_of_wide_characters_is_refused(run, tmp_path):
    (tmp_path / "wide.txt").write_bytes("a red square\n".encode("utf-16"))
    with pytest.raises(ValueError, match="wide.txt is UTF-16; save it as UTF-8"):
        run(prompts=tmp_path / "wide.txt")


def test_home_is_understood_in_images(run, pictures, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(pictures))
    assert run("caption", images=("~/0.png",)).failed == 0


def test_what_a_killed_write_leaves_is_no_result(tmp_path):
    for name in ("shard-000000000-000000002.jsonl.partial", "20240131", "run.json", "grid.png"):
        assert not is_result(tmp_path / name)
    for name in ("shard-000000000-000000002-0001of0004.jsonl", "00012", "012.png", "012.error.json"):
        assert is_result(tmp_path / name)


@pytest.mark.parametrize("form", ["png", "webdataset"])
def test_a_unit_that_is_made_again_leaves_its_own_results_alone(tmp_path, monkeypatch, form):
    """And where that is interrupted between two files, it does not look done."""
    image = np.zeros((4, 4, 3), np.uint8)
    one, other = (Row(index, "a red square", (), index) for index in range(2))
    first = [(one, image, None), (other, None, "no such file")]
    second = [(one, None, "no such file"), (other, image, None)]

    def output():
        return outputs.make_output(form, epath.Path(tmp_path), "generate", 2)

    write_whole = outputs.write_whole
    for files in (0, 1):
        output().write(0, 2, first, {})
        assert not output().missing(0, 2, np.ones(2, bool)) and output().failures() == 1
        left = iter([write_whole] * files)
        monkeypatch.setattr(outputs, "write_whole", lambda *file, left=left: next(left)(*file))
        with pytest.raises(StopIteration):
            output().write(0, 2, second, {})
        assert output().missing(0, 2, np.ones(2, bool))
        monkeypatch.undo()
    output().write(0, 2, second, {})
    assert output().failures() == 1 and len(list(tmp_path.iterdir())) == 2
    output().write(0, 2, [(one, image, None), (other, image, None)], {})
    assert output().failures() == 0 and not list(tmp_path.glob("*error*"))


def test_texts(run, stage, pictures, tmp_path, capsys):
    result = run("caption", images=tuple(str(pictures / f"{i}.png") for i in range(3)))
    lines = [json.loads(line) for line in (tmp_path / "out/shard-000000000-000000003.jsonl").read_text().splitlines()]
    pipeline = UniAlignPipeline.from_pretrained(stage[0], dtype="float32", progress=False)
    expected = pipeline.caption([str(pictures / f"{i}.png") for i in range(3)], **FEW)
    assert [line["text"] for line in lines] == expected == list(result.shown)
    rows = [{"question": "a", "image": "0.png"}, {"question": "red green blue field " * 9, "image": "1.png"}]
    file = jsonl(pictures / "questions.jsonl", rows)
    answers = run("answer", output=tmp_path / "answers", prompts=file, options=FEW | {"protocol": "plain"})
    assert answers.failed == 1
    [error] = (tmp_path / "answers").glob("*.errors.jsonl")
    assert "leaves no room for an answer" in error.read_text()


def test_a_run_of_another_request_is_not_mixed_in(run, pictures, tmp_path):
    with pytest.raises(ValueError, match="broken.png"):
        run("edit", prompt="a red square", images=(str(pictures / "broken.png"),))
    # That one has made nothing, so the directory is free.
    (tmp_path / "out" / "notes.txt").touch()
    run(prompt="a red square", count=2)
    for change, key in (
        ({"seed": 1}, "seed"),
        ({"prompt": "a blue disc"}, "other prompts"),
        ({"options": {}}, "options"),
    ):
        with pytest.raises(ValueError, match=f"another sampling run .*{key}"):
            run(**({"prompt": "a red square", "count": 2} | change))
    (tmp_path / "out" / "run.json").unlink()
    with pytest.raises(ValueError, match="holds results, and no run.json"):
        run(prompt="a red square", count=2)


@pytest.mark.parametrize(
    ("job", "message"),
    [
        ({}, "generate needs --prompt"),
        ({"prompt": "a", "images": ("a.png",)}, "generate takes no --image"),
        ({"task": "edit", "prompt": "a"}, "edit needs --image"),
        ({"task": "caption", "prompt": "a", "images": ("a.png",)}, "caption takes no --prompt"),
        ({"task": "caption", "images": ("a.png",), "options": {"guidance": 2.0}}, "caption takes no guidance"),
        ({"prompt": "a", "options": {"fast": True}}, "generate takes no fast"),
        ({"prompt": "a", "options": {"reference_guidance": 1.5}}, "generate takes no reference_guidance"),
        ({"prompt": "a", "options": {"aspect": "wide"}}, "aspect is 'wide'"),
        ({"prompt": "a", "options": {"aspect": 1.5, "size": (16, 16)}}, "size and aspect are both given"),
        ({"prompt": "a", "prompts": "a.txt"}, "leave prompt, images and count out"),
        ({"task": "edit", "prompts": "a.txt"}, "edit needs images: use JSONL"),
        ({"prompts": "empty.txt"}, "has no rows"),
        ({"prompt": "a", "format": "webdataset", "grid": 3}, "a grid is made of PNG files"),
        ({"prompt": "a", "batch": 0}, "batch is 0"),
        ({"task": "edit", "prompt": "a", "images": ("nowhere.png",)}, "nowhere.png"),
    ],
)
def test_wrong_jobs_are_refused(run, tmp_path, monkeypatch, job, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(ValueError, match=message):
        run(**job)


CHILD = """
import sys
from unialign_jax import distributed, sampling
checkpoint, prompts, port, count, number, *outputs = sys.argv[1:]
distributed.initialize(*((f"127.0.0.1:{port}", int(count), int(number)) if int(count) > 1 else ()))
for output in outputs:
    how = {"format": "webdataset", "shard_rows": 8} if output.endswith("shards") else {}
    sampling.sample(sampling.Job(checkpoint, "generate", output, prompts=prompts, options={"steps": 2},
                                 dtype="float32", batch=4, progress=False, **how))
"""


def start(stage, prompts, processes, *outputs):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NPROC": "4"}
    return [
        subprocess.Popen(
            [sys.executable, "-c", CHILD, *map(str, (stage, prompts, port, processes, i, *outputs))],
            env=environment,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )  # fmt: skip
        for i in range(processes)
    ]


def finish(processes):
    for process in processes:
        output, _ = process.communicate(timeout=500)
        assert process.returncode == 0, output.decode()


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_run_goes_on_to_the_same_images_each_once(stage, tmp_path, request, processes):
    """Killed without warning at random moments, all processes at once, then started again."""
    count, kills = (request.config.getoption(f"--sampling-{name}") for name in ("prompts", "kills"))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"a red square {i}\n" for i in range(count)))
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    random = np.random.default_rng(processes)
    done = 0
    for kill in range(kills):
        group = start(stage[0], prompts, processes, *([whole, broken] if kill == 0 else [broken]))
        # In the first third of what is left for each: on a slow machine the kill may come some batches later.
        aim = done + 1 + random.integers(0, max(1, (count - done) // (kills - kill) // 3))
        while len(list(broken.glob("*.png"))) < min(aim, count):
            assert all(process.poll() in (None, 0) for process in group), group[0].communicate()
            time.sleep(0.001)
        for process in group:
            process.send_signal(signal.SIGKILL)
        for process in group:
            process.communicate()
        done = len(list(broken.glob("*.png")))
    assert done < count  # the last kill has left something to do
    finish(start(stage[0], prompts, processes, broken, tmp_path / "shards"))
    found, expected = contents(broken), contents(whole)
    assert sum(name.endswith(".png") for name in expected) == count
    assert found == expected
    images = tar_images((tmp_path / "shards").glob("*.tar"))  # of all processes
    assert [images[index] for index in range(count)] == [expected[f"{index:03d}.png"] for index in range(count)]
