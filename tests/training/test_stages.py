"""Three stages of a very small model on a few scenes: what starts from what, interruptions, adapters, refusals."""

import copy
import itertools
import pathlib
import runpy
import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unialign_jax import convert, exports, pretrained
from unialign_jax.checkpoints import Checkpoints
from unialign_jax.data import scenes
from unialign_jax.data.schedule import next_stream
from unialign_jax.data.tokenizer import Tokenizer
from unialign_jax.models.unialign import Pass
from unialign_jax.networks import build_networks
from unialign_jax.saved_step import DamagedCheckpoint
from unialign_jax.state import TrainState
from unialign_jax.training import loop, run_config, saved_config, stages
from unialign_jax.training.run_config import ConfigError
from unialign_jax.training.saved_config import ConfigChanged
from unialign_jax.training.stages import StageNotFinished
from unialign_jax.tuning import Tuning

pytestmark = pytest.mark.usefixtures("shared_compilations")
CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
NAMES = ("pretrain", "unify", "personalize")
STEPS = 2
VOCABULARY = 96
TINY = {
    "steps": STEPS,
    "unroll": 1,
    "model.transformer.num_layers": 2,
    "model.transformer.num_attention_heads": 2,
    "model.transformer.attention_head_dim": 8,
    "model.transformer.caption_projection_dim": 16,
    "model.transformer.joint_attention_dim": 16,
    "model.transformer.vocab_size": VOCABULARY,
    "model.transformer.mask_token_id": VOCABULARY - 1,
    "model.text_encoder.vocab_size": VOCABULARY,
    "model.text_encoder.d_model": 16,
    "model.text_encoder.d_kv": 8,
    "model.text_encoder.d_ff": 16,
    "model.text_encoder.num_layers": 1,
    "model.text_encoder.num_heads": 2,
    "tokenizer.learn_vocab_size": VOCABULARY,
    "data.global_batch": 4,
    "data.height": 16,
    "data.width": 16,
    "data.text_length": 12,
    "optimizer.learning_rate": 2e-3,
    "optimizer.warmup_steps": 0,
    "optimizer.decay_steps": 0,
    "log.samples_every": 0,
    "checkpoint.every": 1,
    "checkpoint.keep": 10,
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    directory = tmp_path_factory.mktemp("corpus")
    scenes.write_corpus(directory, count=8, size=16)
    return directory


def make_config(corpus, stage="all"):
    """The shipped config made tiny: one new task in each stage, and at the end a rate of 0, so that nothing moves."""
    get_config = runpy.run_path(str(CONFIGS / "scenes_tiny.py"))["get_config"]
    config = get_config(stage)
    for name, section in config.stages.items() if stage == "all" else [(stage, config)]:
        kept = {"pretrain": ("generate",), "unify": ("generate", "edit"), "personalize": ("edit",)}[name]
        section.model.teacher = None
        section.data.sources = {task: section.data.sources[task] for task in kept}
        section.update_from_flattened_dict(TINY)
        if name == "personalize":
            section.optimizer.learning_rate = 0.0
    config.data.root = str(corpus)
    return config.lock()


def saved(workdir, stage, which="params", step=None):
    with Checkpoints(workdir / stage / "checkpoints", read_only=True) as checkpoints:
        return jax.tree.map(np.asarray, checkpoints.restore_params(which=which, step=step))


def assert_identical(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    assert stages.train(make_config(corpus), workdir)
    return workdir


def test_every_stage_starts_from_the_average_of_the_one_before(finished):
    before, after = saved(finished, "unify", "ema"), saved(finished, "personalize")  # whose rate is 0
    assert_identical(after, before)
    same = jax.tree.map(np.array_equal, before, saved(finished, "unify"))
    assert not all(jax.tree.leaves(same))  # the average is not the last parameters
    for stage, start in zip(NAMES, (None, "../pretrain/checkpoints/2", "../unify/checkpoints/2"), strict=True):
        with Checkpoints(finished / stage / "checkpoints", read_only=True) as checkpoints:
            assert checkpoints.all_steps() == [1, 2]
            assert checkpoints.meta()["init"] == start and checkpoints.meta()["stage"] == stage
    tokenizers = {(finished / stage / "tokenizer" / "tokenizer.json").read_bytes() for stage in NAMES}
    assert len(tokenizers) == 1 and b"question" not in tokenizers.pop()


def test_a_stage_whose_start_was_trained_anew_is_not_gone_on_from(finished, corpus, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "pretrain")
    config = make_config(corpus)
    config.stages.pretrain.seed = 9
    with pytest.raises(StageNotFinished, match="checkpoints of stage 'unify' and none of 'pretrain'.*put those back"):
        stages.train(config, tmp_path / "run")
    assert not (tmp_path / "run" / "pretrain").exists()
    assert stages.train(config.stages.pretrain, tmp_path / "run")
    with pytest.raises(
        ValueError, match="unify started from .*/pretrain/checkpoints/2, where another checkpoint is now"
    ):
        stages.train(config, tmp_path / "run")


@pytest.mark.slow
def test_a_recipe_interrupted_at_every_step_ends_the_same(finished, corpus, tmp_path, monkeypatch, capsys):
    class Interrupted(Exception):
        pass

    save = Checkpoints.save

    def save_then_stop(self, *arguments):
        save(self, *arguments)
        raise Interrupted

    monkeypatch.setattr(Checkpoints, "save", save_then_stop)
    for _ in range(len(NAMES) * STEPS):
        with pytest.raises(Interrupted):
            stages.train(make_config(corpus), tmp_path / "run")
    # The last time nothing is left, and the working directory may be another one.
    shutil.move(tmp_path / "run", tmp_path / "moved")
    capsys.readouterr()
    assert stages.train(make_config(corpus), tmp_path / "moved")
    assert capsys.readouterr().out == ""
    for stage, which in itertools.product(NAMES, ("params", "ema")):
        assert_identical(saved(tmp_path / "moved", stage, which), saved(finished, stage, which))
    model = pretrained.load(tmp_path / "moved" / "personalize", dtype="float32")
    assert_identical(model.params["transformer"], saved(finished, "personalize", "ema")["transformer"])


def test_a_runs_weights_alone_are_the_same_model(finished, tmp_path):
    report = exports.to_jax(finished / "unify", tmp_path / "weights", progress=False)
    run, alone = (pretrained.load(path, dtype="float32") for path in (finished / "unify", tmp_path / "weights"))
    assert_identical(alone.params, run.params)
    for name in ("text_length", "size", "shift", "protocol"):
        assert getattr(alone, name) == getattr(run, name), name
    assert run.protocol == "scenes"
    assert alone.tokenizer.encode("a red circle", 8).tolist() == run.tokenizer.encode("a red circle", 8).tolist()
    # Training can start from it as from the run.
    networks = build_networks(run.description)
    abstract, key = nn.unbox(networks.abstract()), jax.random.key(0)
    assert_identical(
        pretrained.initial_params(networks, key, abstract, tmp_path / "weights"),
        pretrained.initial_params(networks, key, abstract, finished / "unify"),
    )
    assert sorted(report.sizes) == ["text_encoder", "transformer"]
    with pytest.raises(ValueError, match="already; copy it"):
        exports.to_jax(tmp_path / "weights", tmp_path / "again")
    with pytest.raises(ValueError, match="weights exists and is not empty"):
        exports.to_jax(finished / "unify", tmp_path / "weights")


def test_a_stage_told_to_stop_is_not_followed_by_the_next(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(loop.distributed.Preemption, "reached", lambda self: True)
    assert not stages.train(make_config(corpus), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["pretrain"]


def test_a_signal_between_two_stages_is_not_lost(corpus, tmp_path, monkeypatch):
    answers = iter([False, False, True])  # after both steps of the first stage, and before the second
    monkeypatch.setattr(loop.distributed.Preemption, "reached", lambda self: next(answers))
    assert not stages.train(make_config(corpus), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["pretrain"] and len(saved(tmp_path, "pretrain")) == 2


def test_a_stage_that_went_back_does_so_once(finished, corpus, tmp_path):
    """The same command again, as after a preemption, goes on; `all` leaves the stage that is finished."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    config = make_config(corpus)
    config.stages.personalize.resume_step = 1
    for _ in range(2):
        assert stages.train(config, tmp_path)
        aside = list((tmp_path / "personalize").glob("checkpoints-set-aside*/*"))
        assert len(aside) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data.sources.edit.path": "absent.jsonl"}, "absent.jsonl: expected a file of JSON rows, found no such file"),
        (
            {"data.global_batch": 16},
            "8 rows don't fill one batch; lower data.global_batch .16., or leave .* weight of 0",
        ),
        ({"data.global_batch": 3, "micro_batches": 2}, "global batch of 3 cannot be split .* 2 micro-batch"),
    ],
)
def test_what_ends_the_last_stage_is_said_before_the_first(corpus, tmp_path, change, message):
    config = make_config(corpus)
    config.stages.personalize.update_from_flattened_dict(change)
    with pytest.raises(ValueError, match=message):
        stages.train(config, tmp_path)
    assert not list(tmp_path.iterdir())


def test_one_stage_alone_needs_the_one_before(finished, corpus, tmp_path):
    config = make_config(corpus, "unify")
    with pytest.raises(StageNotFinished, match=r"'unify' goes on from 'pretrain', but in .* no checkpoint of it"):
        stages.train(config, tmp_path)
    shutil.copytree(finished / "pretrain", tmp_path / "pretrain")
    shutil.rmtree(tmp_path / "pretrain" / "checkpoints" / "2")
    with pytest.raises(StageNotFinished, match=r"it is at step 1 of 2; train that stage first"):
        stages.train(config, tmp_path)
    assert not (tmp_path / "unify").exists()
    with pytest.raises(ValueError, match="'unify' goes on from 'pretrain'"):
        loop.train(config, tmp_path)
    # Where the config says what to start from, nothing else is asked for.
    elsewhere = copy.deepcopy(config)
    elsewhere.init = str(finished / "pretrain")
    elsewhere.steps = 1
    assert stages.train(elsewhere, tmp_path)
    assert_identical(saved(tmp_path, "unify", step=1), saved(finished, "unify", step=1))


def test_an_interrupted_stage_needs_no_more_of_the_one_before_than_it_reads(finished, corpus, tmp_path):
    shutil.copytree(finished / "unify", tmp_path / "unify")
    shutil.rmtree(tmp_path / "unify" / "checkpoints" / "2")
    assert stages.train(make_config(corpus, "unify"), tmp_path)
    assert_identical(saved(tmp_path, "unify"), saved(finished, "unify"))


def test_a_damaged_last_step_is_named_and_can_be_gone_back_from(finished, corpus, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run/personalize/checkpoints/2/meta/metadata").unlink()
    config = make_config(corpus)
    with pytest.raises(DamagedCheckpoint, match=r"step before it is 1: .*--config.stages.personalize.resume_step"):
        stages.train(config, tmp_path / "run")
    config.stages.personalize.resume_step = 1
    assert stages.train(config, tmp_path / "run")
    assert_identical(saved(tmp_path / "run", "personalize"), saved(finished, "personalize"))


def test_a_finished_stage_whose_config_has_changed_is_refused(finished, corpus):
    config = make_config(corpus)
    config.stages.pretrain.optimizer.learning_rate = 0.5
    with pytest.raises(ConfigChanged, match=r"learning_rate was 0\.002, is 0\.5"):
        stages.train(config, finished)


@pytest.mark.parametrize(
    ("stage", "changes", "message"),
    [
        ("unify", {"after": "personalize"}, "'[a-z]+' does not lead to a first stage"),
        ("personalize", {"after": "pretrain"}, "personalize and unify both go on from 'pretrain'"),
        ("unify", {"stage": "other"}, "stages.unify.stage: expected 'unify', found 'other'"),
        ("unify", {"steps": 0}, "stages.unify: steps is 0"),
        ("unify", {"data.sources.edit.path": None}, "stages.unify.data.sources.edit.path"),
        ("unify", {"data.sources.edit.image_pass": 0.0}, "stages.unify.data.sources.edit: .* one above 0"),
    ],
)
def test_stages_that_make_no_sequence_are_refused(corpus, tmp_path, stage, changes, message):
    config = make_config(corpus)
    with config.stages[stage].ignore_type():
        config.stages[stage].update_from_flattened_dict(changes)
    with pytest.raises(ConfigError, match=message):
        stages.train(config, tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_quick_recipe_trains_every_task_and_every_term():
    config = runpy.run_path(str(CONFIGS / "scenes_tiny.py"))["get_config"]("quick")
    runs = {name: run_config.read(stage, name) for name, stage in config.stages.items()}
    assert stages.in_order(runs) == list(NAMES)
    assert any(source.image_pass and source.text_pass for source in runs["pretrain"].data.sources)
    sources = {name for run in runs.values() for name in run.source_names}
    assert sources == {"generate", "caption", "edit", "perceive", "answer", "compose"}
    assert all(run.checkpoint.every == run.steps for run in runs.values())


@pytest.mark.parametrize("family", ["scenes_tiny", "sd3_medium"])
def test_earlier_tasks_are_rehearsed_by_their_weights(family):
    config = runpy.run_path(str(CONFIGS / f"{family}.py"))["get_config"]("all")
    config.data.root = "rows"
    runs = {name: run_config.read(stage, name) for name, stage in config.stages.items()}
    assert stages.in_order(runs) == list(NAMES)
    tasks = {name: {source.task for source in run.data.sources} for name, run in runs.items()}
    assert tasks["pretrain"] == {"generate", "caption"}
    assert tasks["unify"] == tasks["pretrain"] | {"edit", "perceive", "answer"}
    assert tasks["personalize"] == tasks["unify"] | {"compose"}
    for run in runs.values():
        weights, drawn = [source.weight for source in run.data.sources], [0] * len(run.data.sources)
        for _ in range(400):
            drawn[next_stream(weights, drawn)] += 1
        np.testing.assert_allclose(np.array(drawn) / 400, np.array(weights) / sum(weights), atol=1 / 200)
        assert all(source.path == f"rows/{source.task}.jsonl" for source in run.data.sources)
    config.stages.pretrain.data.sources.caption.path = "~/mine.jsonl"
    [mine] = [s.path for s in run_config.read(config.stages.pretrain, "").data.sources if s.task == "caption"]
    assert mine == str(pathlib.Path("~/mine.jsonl").expanduser())


def test_adapters_alone_are_saved_and_merge_for_pytorch(corpus, tmp_path):
    """The exported model, read back, computes what its base with adapters does in the training step."""
    config = make_config(corpus, "pretrain")
    networks = build_networks(config.model.to_dict(), dtype="float32")
    random = np.random.default_rng(0)

    def draw(tree):
        return jax.tree.map(lambda x: jnp.asarray(0.2 * random.normal(size=x.shape), jnp.float32), tree)

    def save(stage, params, init):
        Tokenizer.learn(["a red square on a green field", "a blue disc"], 40).save(tmp_path / stage / "tokenizer")
        meta = {"config": saved_config.as_json(config), "init": init}
        with Checkpoints(tmp_path / stage / "checkpoints") as checkpoints:
            checkpoints.save(STEPS, TrainState(jnp.int32(STEPS), draw(params), {}, params), {}, meta)

    shapes = {name: tree for name, tree in nn.unbox(networks.abstract()).items() if name in config.trained}
    base = draw(shapes)
    save("pretrain", base, None)
    config.lora.update(rank=2, targets=("transformer/blocks/*/query", "transformer/blocks/*/mlp_up"), alpha=8.0)
    tuning = Tuning.of(config.to_dict())
    adapters = draw(tuning.trained_of(base, jax.random.key(0)))
    save("adapted", adapters, "../pretrain/checkpoints/2")
    inputs = [jnp.asarray(random.normal(size=shape), jnp.float32) for shape in ((2, 8, 8, 12), (2, 12, 16))]

    @jax.jit
    def velocity(params):
        return networks.denoise(params, Pass(*inputs, jnp.array([300.0, 900.0])))[0].image

    expected = velocity(tuning.merge(base, adapters))
    assert np.abs(expected - velocity(base)).max() > 1e-3

    model = pretrained.load(tmp_path / "adapted", dtype="float32")
    convert.write_torch(
        model.description, model.params, tmp_path / "torch", tokenizer=model.tokenizer_directory, progress=False
    )
    convert.to_jax(tmp_path / "torch", tmp_path / "back", progress=False)
    back = pretrained.load(tmp_path / "back", dtype="float32")
    np.testing.assert_allclose(velocity(back.params), expected, atol=1e-5)
    # Another stage starts from the merged model.
    start = pretrained.initial_params(networks, jax.random.key(0), shapes, tmp_path / "adapted")
    np.testing.assert_allclose(velocity(start), expected, atol=1e-6)
