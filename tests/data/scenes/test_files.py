"""Scenes as files: JSONL rows that the readers take, and a TFDS data set that is the same however it is made."""

import io
import json
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from unialign_jax.data.jsonl import JsonlSource
from unialign_jax.data.samples import TASKS
from unialign_jax.data.scenes import Scene, builder, draw, verify, write_corpus
from unialign_jax.data.tfds_source import TfdsSource


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_same_arguments_write_the_same_bytes(tmp_path):
    for name, count, seed in (("a", 4, 3), ("b", 4, 3), ("c", 4, 4), ("d", 6, 3)):
        write_corpus(tmp_path / name, count, 16, seed)
    a, b, c, d = (contents(tmp_path / name) for name in "abcd")
    assert a == b and a != c
    # A larger corpus begins with the smaller one.
    assert all(d[path].startswith(data) for path, data in a.items())


def test_rows_read_back_as_samples(tmp_path):
    write_corpus(tmp_path, 8, 32, subset="test", counts=(1, 2))
    for task in TASKS:
        source = JsonlSource(tmp_path / f"{task}.jsonl", task)
        lines = (tmp_path / f"{task}.jsonl").read_text().splitlines()
        assert len(source) == len(lines) == 8
        for i, line in enumerate(lines):
            sample, example = source[i], draw(task, i, subset="test", counts=(1, 2))
            for name in ("task", "caption", "instruction", "question", "answer"):
                assert getattr(sample, name) == getattr(example, name)
            for path, picture in zip(
                (sample.target, *sample.references), (example.target, *example.references), strict=True
            ):
                with Image.open(path) as image:
                    assert (np.asarray(image) == picture.render(32)).all()
            row = json.loads(line)
            assert Scene.from_json(row["scene"]) == example.target.scene and row["kind"] == example.kind
            if task != "perceive":
                with Image.open(sample.target) as image:
                    assert verify.image_exact(np.asarray(image), Scene.from_json(row["scene"]))


def test_command(tmp_path):
    command = [sys.executable, "-m", "unialign_jax.data.scenes", f"--target={tmp_path}"]
    done = subprocess.run([*command, "--count=2", "--size=8", "--things=1"], capture_output=True, text=True)
    assert done.returncode == 0 and "2 scenes a task" in done.stdout
    assert {path.name for path in tmp_path.glob("*.jsonl")} == {f"{task}.jsonl" for task in TASKS}
    rows = [json.loads(line) for line in (tmp_path / "generate.jsonl").read_text().splitlines()]
    assert rows[0]["image"] == ["images/generate_000000.png"] and len(rows[0]["scene"]["things"]) == 1
    bad = subprocess.run([*command, "--count=0"], capture_output=True, text=True)
    assert bad.returncode != 0 and "--count" in bad.stderr


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """The same data set made in this process and by two others."""
    made = []
    for workers in (1, 2):
        config = builder.ScenesConfig(name="small", task="compose", size=32, train=300, held_out=20)
        scenes = builder.Scenes(config=config, workers=workers, data_dir=tmp_path_factory.mktemp(f"workers{workers}"))
        scenes.download_and_prepare()
        made.append(scenes)
    return made


def test_shards_do_not_depend_on_the_number_of_workers(prepared):
    alone, parallel = (
        {path.name: path.read_bytes() for path in scenes.data_path.glob("*array_record*")} for scenes in prepared
    )
    assert alone == parallel and len(alone) == 5


def test_records_are_the_examples(prepared):
    source = prepared[1].as_data_source("train")
    assert len(source) == 300 and len(prepared[1].as_data_source("relations")) == 20
    for i in (0, 7, 299):
        record, example = source[i], draw("compose", i)
        assert (record["target"] == example.target.render(32)).all()
        assert len(record["references"]) == len(example.references)
        for pixels, picture in zip(record["references"], example.references, strict=True):
            assert (pixels == picture.render(32)).all()
        assert record["instruction"].decode() == example.instruction and record["caption"].decode() == example.caption
        assert Scene.from_json(json.loads(record["scene"])) == example.target.scene


def test_the_input_pipeline_reads_it(prepared):
    source = TfdsSource(prepared[1].data_path, split="test")
    assert len(source) == 20
    sample, example = source[3], draw("compose", 3, subset="test")
    assert (sample.task, sample.caption, sample.instruction) == ("compose", example.caption, example.instruction)
    for data, picture in zip((sample.target, *sample.references), (example.target, *example.references), strict=True):
        assert (np.asarray(Image.open(io.BytesIO(data))) == picture.render(32)).all()


def test_ready_configurations(tmp_path):
    ready = tfds.builder("scenes/edit_64", data_dir=tmp_path)
    assert isinstance(ready, builder.Scenes)
    assert (ready.builder_config.task, ready.builder_config.size) == ("edit", 64)
    names = {config.name for config in builder.Scenes.BUILDER_CONFIGS}
    assert {f"{task}_{size}" for task in TASKS for size in (32, 64, 256)} == names
