"""Every flag of a command reaches what does its work, which is replaced by something that tells what it is given."""

import json

HEAD = """
import dataclasses, json, runpy, sys, types
def tell(*given, **named):
    print("GIVEN", json.dumps([given, named], default=lambda x: dataclasses.asdict(x) if dataclasses.is_dataclass(x) else str(x)))
def run(command):
    sys.argv[0] = command
    runpy.run_path(command, run_name="__main__")
"""  # noqa: E501


def given(command, code, *flags):
    """What `tell` was called with, a pair of positional and named arguments for each call."""
    done = command("-c", HEAD + code, *flags)
    assert done.returncode == 0, done.stderr
    return [json.loads(line.removeprefix("GIVEN ")) for line in done.stdout.splitlines() if line.startswith("GIVEN ")]


def test_sample(command):
    code = """
from unialign_jax import sampling
sampling.sample = lambda job: tell(job) or types.SimpleNamespace(shown=())
run("launch/sample.py")
"""
    flags = {
        **{"checkpoint": "here", "task": "edit", "output": "there", "prompts": "rows.jsonl", "prompt": "a", "seed": 5},
        **{"count": 3, "dtype": "float32", "batch": 4, "strategy": "data", "format": "webdataset", "shard_rows": 7},
        "grid": 2,
    }
    options = {
        **{"steps": 9, "guidance": 2.5, "reference_guidance": 1.5, "negative_prompt": "grey", "aspect": "16:9"},
        **{"fast": True, "protocol": "scenes"},
    }
    lines = [f"--{name}={value}" for name, value in (flags | options).items()]
    lines += ["--image=a.png,b.png", "--guidance_interval=0.1,0.9", "--size=8,24", "--noaverage", "--noprogress"]
    [[[job], _]] = given(command, code, *lines)
    assert job == flags | {
        "images": ["a.png", "b.png"],
        "average": False,
        "progress": False,
        "options": options | {"guidance_interval": [0.1, 0.9], "size": [8, 24]},
    }


def test_evaluate(command, tmp_path):
    code = """
from unialign_jax import parallel
from unialign_jax.evaluation import evaluate
make_mesh = parallel.make_mesh
parallel.make_mesh = lambda strategy: tell(strategy) or make_mesh(strategy)
from unialign_jax.pipeline import UniAlignPipeline
UniAlignPipeline.from_pretrained = lambda *given, **named: tell(*given, **named)
evaluate.evaluate_scenes = lambda *given, **named: tell(*given, **named) or {}
run("launch/evaluate.py")
"""
    flags = (
        *("--checkpoint=scenes", f"--output={tmp_path}", "--tasks=edit,answer", "--sets=attributes,wordings"),
        *("--things=1-3,4", "--count=50", "--steps=6", "--guidance=2", "--noaverage", "--dtype=bfloat16"),
        *("--strategy=data", "--batch=16"),
    )
    ([strategy], _), ([checkpoint, _], load), ([_, output], asked) = given(command, code, *flags)
    assert (strategy, checkpoint) == ("data", "scenes")
    assert load == {"dtype": "bfloat16", "average": False, "max_batch": 16, "single_size": True}
    assert output == str(tmp_path) and asked["count"] == 50
    assert (asked["tasks"], asked["subsets"]) == (["edit", "answer"], ["attributes", "wordings"])
    assert asked["things"] == [[1, 2, 3], [4]]
    protocol, about = asked["protocol"], asked["about"]
    assert {protocol[name] for name in protocol if name.endswith("steps")} == {6}
    assert protocol["generate_guidance"] == protocol["edit_guidance"] == 2
    assert (about["average"], about["dtype"], about["benchmark"]) == (False, "bfloat16", "scenes")


def test_build(command, tmp_path):
    code = """
import collections
from unialign_jax.data import build, sources
sources.open_source = lambda config: tell(config)
report = types.SimpleNamespace(read=1, refused=collections.Counter())
build.build = lambda *given, **named: tell(*given, **named) or report
run("launch/build.py")
"""
    flags = (
        *("--source=coco/2014", f"--target={tmp_path}", "--format=tfds", "--task=caption", "--split=train[:5]"),
        *("--fields=target=image,caption=texts/first", "--data_dir=/data", "--name=mine", "--rows_per_shard=3"),
        *("--processes=2", "--refused_share=0.5"),
    )
    [[[source], _], [[_, target], made]] = given(command, code, *flags)
    assert (source["path"], source["format"], source["task"]) == ("coco/2014", "tfds", "caption")
    assert (source["split"], source["data_dir"]) == ("train[:5]", "/data")
    assert dict(source["fields"]) == {"target": "image", "caption": "texts/first"} and target == str(tmp_path)
    assert made == {"name": "mine", "rows_per_shard": 3, "processes": 2, "refused_share": 0.5}


def test_compile(command, tmp_path):
    code = """
from unialign_jax.training import scaling, verdict
verdict.prepare = tell
verdict.judge = lambda config, *given, **named: tell(config.steps, *given, **named) or {"a": 1}
scaling.summary = lambda found: "said"
run("launch/compile.py")
"""
    flags = (
        *("--config=configs/sd3_medium.py:unify", "--topology=v5e:4x4", "--slices=2", "--program=sample"),
        *("--source=edit", f"--json={tmp_path / 'verdict.json'}", f"--hlo={tmp_path / 'hlo'}", "--config.steps=7"),
    )
    prepared, judged = given(command, code, *flags)
    assert prepared[0] == ["v5e:4x4", 2]
    named = {"slices": 2, "program": "sample", "source": "edit", "hlo_file": str(tmp_path / "hlo")}
    assert judged == [[7, "v5e:4x4"], named]
    assert json.loads((tmp_path / "verdict.json").read_text()) == {"a": 1}
