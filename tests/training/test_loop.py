"""The whole loop on a few drawn scenes with a very small network: what it writes, how it resumes, what it refuses."""

import importlib.util
import io
import pathlib
import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event

from unialign_jax import pretrained
from unialign_jax.checkpoints import Checkpoints
from unialign_jax.data import scenes
from unialign_jax.networks import build_networks
from unialign_jax.training import loop, program
from unialign_jax.training.metrics import NonFiniteLoss
from unialign_jax.training.saved_config import ConfigChanged

pytestmark = pytest.mark.usefixtures("shared_compilations")
CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
STEPS, EVERY = 6, 2


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    directory = tmp_path_factory.mktemp("corpus")
    scenes.write_corpus(directory, count=12, size=16)
    return directory


def make_config(corpus, **changes):
    """The shipped small config made tiny, with a generation and an edit source that take turns."""
    spec = importlib.util.spec_from_file_location("photos_tiny", CONFIGS / "photos_tiny.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config().copy_and_resolve_references()  # one size of the vocabulary can be set alone
    config.data.sources = {
        "draw": {"path": str(corpus / "generate.jsonl"), "task": "generate", "references": 0, "weight": 1.0},
        "recolour": {"path": str(corpus / "edit.jsonl"), "task": "edit", "references": 1, "weight": 1.0},
    }
    config.lock()
    vocabulary = 64
    config.update_from_flattened_dict(
        {
            "steps": STEPS,
            "model.transformer.num_layers": 2,
            "model.transformer.num_attention_heads": 1,
            "model.transformer.caption_projection_dim": 32,
            "model.transformer.joint_attention_dim": 16,
            "model.transformer.vocab_size": vocabulary,
            "model.transformer.mask_token_id": vocabulary - 1,
            "model.transformer.adapter_hidden": 8,
            "model.transformer.semantic_dim": 8,
            "model.text_encoder.vocab_size": vocabulary,
            "model.text_encoder.d_model": 16,
            "model.text_encoder.d_kv": 8,
            "model.text_encoder.d_ff": 16,
            "model.text_encoder.num_layers": 1,
            "model.text_encoder.num_heads": 2,
            "model.teacher.depth": 1,
            "model.teacher.fullatt_block_indexes": (0,),
            "model.teacher.hidden_size": 16,
            "model.teacher.intermediate_size": 16,
            "model.teacher.num_heads": 2,
            "model.teacher.out_hidden_size": 8,
            "model.teacher.vocab_size": vocabulary,
            "model.teacher.min_pixels": 16 * 16,
            "model.teacher.max_pixels": 16 * 16,
            "tokenizer.learn_vocab_size": vocabulary,
            "data.global_batch": 4,
            "data.height": 16,
            "data.width": 16,
            "data.text_length": 12,
            "data.teacher_length": 12,
            "data.threads": 1,
            "optimizer.warmup_steps": 1,
            "log.every": 3,
            "log.samples_every": 0,
            "checkpoint.every": EVERY,
            "checkpoint.keep": 10,
        }
        | changes
    )
    return config


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    """(working directory, state after the last step, console output) of an uninterrupted run with samples."""
    workdir = tmp_path_factory.mktemp("run")
    config = make_config(corpus, **{"log.samples_every": STEPS, "log.sample_count": 2, "log.sample_steps": 2})
    output = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdout", output)
        state = loop.train(config, workdir)
    return workdir, jax.tree.map(np.asarray, state), output.getvalue()


def event_values(directory):
    events = []
    for path in sorted(directory.glob("events.out.tfevents.*")):
        data = path.read_bytes()
        while data:
            length = int.from_bytes(data[:8], "little")
            events.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return {(event.step, value.tag): value for event in events for value in event.summary.value}


def assert_identical(left, right):
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_what_a_run_leaves(finished):
    workdir, state, output = finished
    stage = workdir / "photos"
    assert int(state.step) == STEPS and set(state.params) == {"transformer", "text_encoder"}
    assert (stage / "tokenizer" / "tokenizer.json").is_file()
    with Checkpoints(stage / "checkpoints", read_only=True) as checkpoints:
        assert checkpoints.all_steps() == [2, 4, 6]
        meta = checkpoints.meta()
        assert meta["stage"] == "photos" and meta["config"]["steps"] == STEPS
        assert [source["rows"] for source in meta["data"]] == [12, 12] and "jax" in meta["versions"]
        assert_identical(checkpoints.restore_params(), state.params)
    values = event_values(stage)
    terms = ("loss", "image", "text", "contrastive", "image_align", "text_align", "grad_norm", "learning_rate")
    for tag in (*terms, *(f"{source}/{term}" for source in ("draw", "recolour") for term in terms)):
        assert np.isfinite(values[STEPS, tag].simple_value)
    times = [values[STEPS, f"time/{part}_seconds"].simple_value for part in ("step", "wait_for_data", "compute")]
    assert times[0] == pytest.approx(times[1] + times[2], rel=1e-3) and min(times) >= 0
    for rate in ("steps_per_second", "images_per_second", "model_tflops_per_second"):
        assert values[STEPS, f"throughput/{rate}"].simple_value > 0
    grid = Image.open(io.BytesIO(values[STEPS, "samples"].image.encoded_image_string))
    assert grid.size == (2 * 17 - 1, 2 * 17 - 1)  # two samples, each its target and what was made
    assert "| given | true | sampled |" in values[STEPS, "captions/text_summary"].tensor.string_val[0].decode()
    assert "step 4/6 (67%)" in output and "compiled the step for 'recolour'" in output and "done at step 6" in output


@pytest.mark.slow
def test_each_source_has_its_passes_grids_are_of_the_average_and_steps_are_kept(corpus, tmp_path, monkeypatch):
    config = make_config(
        corpus,
        **{"steps": 4, "log.samples_every": 4, "checkpoint.every": 1, "checkpoint.keep": 1, "optimizer.ema_rate": 0.5},
    )
    with config.unlocked():
        shared = {"path": str(corpus / "generate.jsonl"), "references": 0, "weight": 1.0}
        config.data.sources = {  # their batches are alike
            "draw": shared | {"task": "generate", "text_pass": 0.0},
            "read": shared | {"task": "caption", "image_pass": 0.0},
        }
        config.checkpoint.keep_period = 2
    shown = []
    monkeypatch.setattr(
        loop, "sample_grid", lambda _, params, *rest: shown.append(params) or (np.zeros((1, 8, 8, 3), np.uint8), "text")
    )
    state = loop.train(config, tmp_path)
    tags = {tag for _, tag in event_values(tmp_path / "photos")}
    assert {"draw/image", "read/text"} <= tags and not {"draw/text", "read/image"} & tags
    params = shown[-1]
    assert_identical(params["transformer"], state.ema["transformer"])
    same = jax.tree.map(np.array_equal, state.ema["transformer"], state.params["transformer"])
    assert not all(jax.tree.leaves(same))
    with Checkpoints(tmp_path / "photos" / "checkpoints", read_only=True) as checkpoints:
        assert checkpoints.all_steps() == [2, 4]


def test_a_resumed_run_equals_the_uninterrupted_one(finished, corpus, tmp_path):
    """Parameters, optimizer, average, data order and metrics, bit for bit; it also goes back on request."""
    workdir, state, _ = finished
    shutil.copytree(workdir, tmp_path / "run")
    config = make_config(corpus, resume_step=2, allow_changed=("log",))
    resumed = loop.train(config, tmp_path / "run")
    assert_identical(resumed, state)
    checkpoints = tmp_path / "run" / "photos" / "checkpoints"
    assert sorted(p.name for p in checkpoints.iterdir() if p.name.isdigit()) == ["2", "4", "6"]
    aside = tmp_path / "run" / "photos" / "checkpoints-set-aside"
    assert sorted(p.name for p in aside.iterdir()) == ["4", "6"]
    with (
        Checkpoints(checkpoints, read_only=True) as again,
        Checkpoints(workdir / "photos" / "checkpoints", read_only=True) as first,
    ):
        for step in (4, 6):
            pair = [source.restore(state, step) for source in (again, first)]
            assert_identical(pair[0][0], pair[1][0])
            assert pair[0][1] == pair[1][1]  # the data iterator's state
    # The window of steps 3 to 6 of the resumed run holds what the uninterrupted one had in 4 to 6.
    files = {name: event_values(path / "photos") for name, path in (("first", workdir), ("again", tmp_path / "run"))}
    assert files["again"][6, "loss"].simple_value == pytest.approx(files["first"][6, "loss"].simple_value, rel=1e-6)


@pytest.mark.slow
def test_going_back_to_the_same_step_again_is_no_silent_matter(finished, corpus, tmp_path, capsys):
    shutil.copytree(finished[0], tmp_path / "run")
    config = make_config(corpus, resume_step=4, allow_changed=("log",))
    loop.train(config, tmp_path / "run")
    assert "was gone back to before" not in capsys.readouterr().out
    loop.train(config, tmp_path / "run")
    assert "resume_step=4 was gone back to before; this goes on from step 6" in capsys.readouterr().out


@pytest.mark.parametrize(("failing", "saved"), [(0, []), (2, [2])])
def test_a_grid_that_fails_costs_no_step(corpus, tmp_path, monkeypatch, failing, saved):
    """The first comes with the first step, so that one need not wait for its failure; the others after the save."""
    drawn = []

    def grid(*arguments):
        drawn.append(arguments)
        if len(drawn) == 1 + failing // 2:
            raise MemoryError("no room")
        return np.zeros((8, 8, 3), np.uint8), "a table"

    monkeypatch.setattr(loop, "sample_grid", grid)
    with pytest.raises(MemoryError, match="no room"):
        loop.train(make_config(corpus, **{"log.samples_every": 2}), tmp_path)
    with Checkpoints(tmp_path / "photos" / "checkpoints", read_only=True) as checkpoints:
        assert checkpoints.all_steps() == saved


@pytest.mark.slow
def test_what_a_run_started_from_may_have_moved(corpus, tmp_path):
    def config(init, **changes):
        return make_config(corpus, init=str(tmp_path / init), **changes)

    loop.train(make_config(corpus, stage="source", steps=1), tmp_path)
    loop.train(config("source", steps=2), tmp_path / "run")
    loop.train(make_config(corpus, stage="source", steps=2, allow_changed=("steps",)), tmp_path)  # it has gone on
    (tmp_path / "source").rename(tmp_path / "moved")
    moved = config("moved", steps=4, allow_changed=("init", "steps"))
    with pytest.raises(ConfigChanged, match="init was"):
        loop.train(config("moved", steps=2), tmp_path / "run")
    shutil.copytree(tmp_path / "moved" / "checkpoints" / "2", tmp_path / "other" / "checkpoints" / "1")
    other = config("other", steps=4, allow_changed=("init", "steps"))
    with pytest.raises(ValueError, match="other/checkpoints/1 is not the checkpoint that this run started from"):
        loop.train(other, tmp_path / "run")
    assert int(loop.train(moved, tmp_path / "run").step) == 4
    with Checkpoints(tmp_path / "run" / "photos" / "checkpoints", read_only=True) as checkpoints:
        assert checkpoints.meta()["init"] == str(tmp_path / "moved" / "checkpoints" / "1")


@pytest.mark.slow
def test_one_unusable_image_in_a_hundred_ends_no_run_and_wide_images_have_a_bucket(tmp_path, capsys):
    scenes.write_corpus(tmp_path / "corpus", count=100, size=16, chosen=["generate", "edit"])
    images = tmp_path / "corpus" / "images"
    (images / "generate_000042.png").write_bytes(b"no image")
    for i in range(50, 100):
        Image.new("RGB", (32, 8), (i, i, i)).save(images / f"generate_{i:06d}.png")
    changes = {"data.max_aspect": 4.0, "data.side_multiple": 8, "steps": 30, "checkpoint.every": 30}
    config = make_config(tmp_path / "corpus", **changes)
    config.data.sources = {"draw": config.data.sources["draw"]}
    state = loop.train(config, tmp_path / "run")
    assert int(state.step) == 30
    output = capsys.readouterr().out
    assert "generate.jsonl: 1 of 120 rows read refused" in output and "not an image: 1" in output
    assert "line 43: " in output and output.count("compiled the step") == 2


@pytest.mark.slow
def test_a_stage_starts_from_another_ones_parameters(finished, corpus, tmp_path, capsys):
    first, state, _ = finished
    config = make_config(corpus, stage="second", init=str(first / "photos"), steps=1, seed=7)
    loop.train(config, tmp_path)
    source = first / "photos" / "checkpoints" / str(STEPS)
    assert f"starts from {source}" in capsys.readouterr().out
    tokenizers = [(d / "tokenizer" / "tokenizer.json").read_bytes() for d in (first / "photos", tmp_path / "second")]
    assert tokenizers[0] == tokenizers[1]
    with Checkpoints(tmp_path / "second" / "checkpoints", read_only=True) as checkpoints:
        assert checkpoints.meta()["init"] == str(source)

    networks = build_networks(config.model.to_dict(), dtype="float32")
    shapes = nn.unbox(networks.abstract())
    key = jax.random.key(0)
    made = pretrained.initial_params(networks, key, shapes, first / "photos")
    assert_identical({name: made[name] for name in state.ema}, state.ema)
    made = pretrained.initial_params(networks, key, shapes, source, average=False)
    assert_identical({name: made[name] for name in state.params}, state.params)
    # What neither of the two trained is what it was in the first, through the second one's record of where it started.
    teacher = {"teacher": shapes["teacher"]}
    init_key, _ = jax.random.split(jax.random.key(0))
    random = pretrained.initial_params(networks, init_key, teacher, None)
    assert_identical(pretrained.initial_params(networks, key, teacher, tmp_path / "second"), random)
    assert_identical(made["teacher"], random["teacher"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.transformer.num_layers": 3}, "transformer.num_layers is 2 there and 3 in the config"),
        ({"model.teacher.depth": 2}, "teacher.depth is 1 there and 2 in the config"),
        # Nothing has another shape, but every number would be another.
        ({"model.pixel_codec.scaling_factor": 1.25}, "autoencoder.scaling_factor is 2.0 there and 1.25 in the config"),
    ],
)
def test_a_start_from_another_architecture_is_refused(finished, corpus, tmp_path, changes, message):
    config = make_config(corpus, stage="second", init=str(finished[0] / "photos"), **changes)
    with pytest.raises(ValueError, match=message):
        loop.train(config, tmp_path)
    assert not list((tmp_path / "second" / "checkpoints").iterdir())


def test_a_finished_run_has_nothing_to_do(finished, corpus, tmp_path, capsys):
    workdir, state, _ = finished
    shutil.copytree(workdir, tmp_path / "run")
    config = make_config(corpus, allow_changed=("log",))
    assert_identical(loop.train(config, tmp_path / "run"), state)
    assert "compiled" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"optimizer.learning_rate": 0.5}, ConfigChanged, r"optimizer\.learning_rate was 0\.001, is 0\.5"),
        ({"model.transformer.num_layers": 3}, ConfigChanged, r"model\.transformer\.num_layers was 2, is 3"),
        (
            {"model.transformer.num_layers": 3, "allow_changed": ("log", "model")},
            ValueError,
            r"blocks.*\[2, .*expected .*\[3, ",
        ),
        ({"seed": 5, "allow_changed": ("log", "seed")}, ConfigChanged, "seed was 0, is 5. seed can't change in a run"),
        ({"resume_step": 3}, FileNotFoundError, "no step 3; there are 2, 4, 6"),
        (
            {"model.transformer.mask_token_id": 5, "allow_changed": ("log", "model")},
            ValueError,
            "mask_token_id is 5, but the tokenizer masks with id 63",
        ),
        ({"model.transformer.vocab_size": 70, "allow_changed": ("log", "model")}, ValueError, "vocab_size 70"),
    ],
)
def test_a_resume_that_would_not_continue_the_run_is_refused(finished, corpus, tmp_path, changes, error, message):
    shutil.copytree(finished[0], tmp_path / "run")
    with pytest.raises(error, match=message):
        loop.train(make_config(corpus, **{"allow_changed": ("log",)} | changes), tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strategy": "fsdp=2"}, "strategy 'fsdp=2' takes 2 devices, but there are 1"),
        ({"strategy": "fsdp+tensor=2"}, "takes a multiple of 2 devices, but there are 1"),
        ({"strategy": "model"}, "strategy 'model': 'model' is wrong"),
        ({"micro_batches": 3}, "batch of 4 cannot be split .* 3 micro-batch"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused_before_anything_is_made(corpus, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        loop.train(make_config(corpus, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_adapters_of_nothing_are_refused(corpus, tmp_path):
    with pytest.raises(ValueError, match=r"lora.rank is 2, but .* starts from random parameters"):
        loop.train(make_config(corpus, **{"lora.rank": 2}), tmp_path / "run")


def test_a_loss_that_is_not_finite_ends_the_run_and_is_never_saved(corpus, tmp_path, monkeypatch):
    def make_failing_step(*_, **__):
        def step(state, frozen, batch, key):
            finite = jnp.where(state.step < 4, 1.0, jnp.nan)
            params = jax.tree.map(lambda x: x * finite, state.params)
            return state.replace(step=state.step + 1, params=params), {"loss": finite, "image": jnp.float32(2)}

        return step

    monkeypatch.setattr(program, "make_train_step", make_failing_step)
    with pytest.raises(NonFiniteLoss, match=r"step 5 \((draw|recolour)\): loss=nan"):
        loop.train(make_config(corpus), tmp_path)
    with Checkpoints(tmp_path / "photos" / "checkpoints", read_only=True) as checkpoints:
        assert checkpoints.all_steps() == [2, 4]
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(checkpoints.restore_params()))
