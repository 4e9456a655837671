"""A whole run in an object store: data, tokenizer, logs, profile, checkpoints, and the model read from there.

The real clients talk to a local server: TensorStore reads and writes the arrays, gcsfs all other files.
"""

import importlib.util
import io
import json
import pathlib
import runpy
import sys
import tarfile

import fsspec
import jax
import numpy as np
import pytest
from cloud_storage import Server
from etils import epath
from etils.epath import backend
from fsspec.registry import _registry
from gcsfs import GCSFileSystem
from PIL import Image
from tensorboardX.proto.event_pb2 import Event

from unialign_jax import exports, pretrained, sampling, storage
from unialign_jax.checkpoints import Checkpoints
from unialign_jax.convert import workspace
from unialign_jax.data import images, scenes
from unialign_jax.data.build import build
from unialign_jax.data.jsonl import ConversationSource, JsonlSource
from unialign_jax.data.samples import Refused
from unialign_jax.data.sources import SourceConfig, open_source
from unialign_jax.data.tokenizer import Tokenizer
from unialign_jax.data.webdataset import TarSource
from unialign_jax.networks import build_networks
from unialign_jax.sampling.rows import FileRows
from unialign_jax.training import loop, run_config, tokenizers, writers
from unialign_jax.training.caching import caches_of
from unialign_jax.training.precompute import precompute

pytestmark = pytest.mark.usefixtures("shared_compilations")
CONFIGS = pathlib.Path(__file__).parents[1] / "configs"


@pytest.fixture(scope="module")
def server():
    """What serves the bucket, to look at its objects and count its requests."""
    server = Server().start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", server.address)  # gcsfs, Google's client
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", server.address)
        patch.setenv("CLOUD_STORAGE_EMULATOR_ENDPOINT", server.address)  # ArrayRecord's reader
        patch.setenv(
            "GCE_METADATA_ROOT", server.address.removeprefix("http://")
        )  # there are no credentials to be found
        patch.setenv("FSSPEC_GCS_TOKEN", "anon")  # of worker processes
        patch.setitem(fsspec.config.conf, "gcs", fsspec.config.conf["gcs"] | {"token": "anon"})
        backend.fsspec_backend._get_filesystem.cache_clear()
        yield server
        backend.fsspec_backend._get_filesystem.cache_clear()
    server.shutdown()


@pytest.fixture
def bucket(server):
    """A bucket's address."""
    return "gs://bucket"


def test_a_missing_client_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    monkeypatch.delitem(_registry, "gcs", raising=False)
    with pytest.raises(ValueError, match=r"gs://bucket/a: .*pip install 'unialign_jax\[gcs\]'"):
        storage.absolute("gs://bucket/a")


def test_paths():
    assert str(storage.absolute("gs://bucket/a")) == "gs://bucket/a" and storage.is_remote(epath.Path("gs://bucket"))
    assert storage.absolute("a") == epath.Path(pathlib.Path.cwd() / "a") and not storage.is_remote("a")


@pytest.mark.parametrize("remote", [True, False])
def test_a_file_that_is_written_locally_appears_whole(bucket, tmp_path, remote):
    path = epath.Path(bucket) / "shard" if remote else epath.Path(tmp_path) / "shard"
    with pytest.raises(RuntimeError), storage.whole_file(path) as local:
        pathlib.Path(local).write_bytes(b"half")
        raise RuntimeError
    assert not path.exists()
    content = bytes(range(256)) * 8192
    with storage.whole_file(path) as local:
        pathlib.Path(local).write_bytes(content)
        assert not path.exists()
    assert path.read_bytes() == content
    storage.write_whole(path, b"again")
    assert path.read_bytes() == b"again"


def test_only_what_a_killed_write_has_left_is_cleared(tmp_path):
    """A conversion beside it is at work, and the user's files are named as he likes."""
    (tmp_path / "deep").mkdir()
    with storage.whole_file(epath.Path(tmp_path) / "deep" / "shard") as partial:
        pathlib.Path(partial).write_bytes(b"whole")
    pathlib.Path(partial).write_bytes(b"half")  # as after a kill
    (tmp_path / "notes.partial-2").write_text("mine")
    with workspace.new_directory(tmp_path / "model", 1) as converting:
        (converting / "model.json").write_text("{}")
        storage.clear_partial(epath.Path(tmp_path))
    assert (tmp_path / "notes.partial-2").exists() and (tmp_path / "model" / "model.json").exists()
    assert not pathlib.Path(partial).exists() and (tmp_path / "deep" / "shard").exists()


def test_tokenizer(bucket, tmp_path):
    tokenizer = Tokenizer.learn(["a red ball", "grün"], 24)
    tokenizer.save(f"{bucket}/t")
    tokenizer.save(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (epath.Path(bucket) / "t" / name).read_bytes() == (tmp_path / name).read_bytes()
    ids = tokenizer.encode("a grün ball", 9)
    np.testing.assert_array_equal(Tokenizer.load(f"{bucket}/t").encode("a grün ball", 9), ids)
    with pytest.raises(FileNotFoundError, match="gs://bucket/none has no tokenizer.json"):
        Tokenizer.load(f"{bucket}/none")


def _values(event: Event):
    return [(event.step, value) for value in event.summary.value]


def losses(folder: epath.Path) -> dict[int, float]:
    found = {}
    for path in sorted(folder.glob("events.out.tfevents.*")):
        data = path.read_bytes()
        while data:
            size = 16 + int.from_bytes(data[:8], "little")
            event = Event.FromString(data[12 : size - 4])
            found |= {step: value.simple_value for step, value in _values(event) if value.tag == "loss"}
            data = data[size:]
    return found


def test_an_outage_while_logging_loses_nothing(bucket, monkeypatch, caplog):
    writer = writers.make_writer(f"{bucket}/log")
    real = GCSFileSystem.open
    monkeypatch.setattr(GCSFileSystem, "open", lambda *_, **__: (_ for _ in ()).throw(OSError("outage")))
    writer.write_scalars(1, {"loss": 0.5})
    writer.flush()
    assert "outage" in caplog.text
    monkeypatch.setattr(GCSFileSystem, "open", real)
    writer.write_scalars(2, {"loss": 0.25})
    writer.flush()
    assert losses(epath.Path(bucket) / "log") == {1: 0.5, 2: 0.25}
    written = []

    def noting(self, path, *arguments, **options):
        written.append(path)
        return real(self, path, *arguments, **options)

    monkeypatch.setattr(GCSFileSystem, "open", noting)
    writer.flush()
    assert not written  # nothing is new
    monkeypatch.setattr(writers, "_LARGE", 1)
    for step in range(3, 6):  # each flush fills a file, and the next one begins
        writer.write_scalars(step, {"loss": step})
        writer.flush()
    assert len(set(written)) == len(written) == 3
    writer.close()
    expected = [(1, 0.5), (2, 0.25), (3, 3), (4, 4), (5, 5)]
    assert writers.read_scalars(epath.Path(bucket) / "log") == {"loss": expected}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_run(bucket, tmp_path, capsys):
    scenes.write_corpus(f"{bucket}/corpus", count=8, size=16, chosen=["generate"])
    spec = importlib.util.spec_from_file_location("photos_tiny", CONFIGS / "photos_tiny.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    config.model.teacher = None
    config.update_from_flattened_dict(
        {
            "steps": 3,
            "data.sources.photos.path": f"{bucket}/corpus/generate.jsonl",
            "model.transformer.num_layers": 1,
            "model.transformer.num_attention_heads": 1,
            "model.transformer.caption_projection_dim": 32,
            "model.transformer.vocab_size": 50,
            "model.transformer.mask_token_id": 49,
            "model.text_encoder.vocab_size": 50,
            "model.text_encoder.num_layers": 1,
            "tokenizer.learn_vocab_size": 50,
            "objective.semantic_depth": 1,
            "data.global_batch": 2,
            "data.height": 16,
            "data.width": 16,
            "data.text_length": 8,
            "data.threads": 1,
            "log.samples_every": 0,
            "checkpoint.every": 1,
            "checkpoint.keep": 2,
        }
    )
    state = loop.train(config, f"{bucket}/run", profile_steps=(2, 2))
    stage = epath.Path(bucket) / "run" / "photos"
    assert len(list(stage.glob("plugins/profile/*/*.xplane.pb"))) == 1
    first = losses(stage)
    assert sorted(first) == [1, 2, 3]
    with Checkpoints(stage / "checkpoints", read_only=True) as checkpoints:
        assert checkpoints.all_steps() == [2, 3]

    config.resume_step = 2
    again = loop.train(config, f"{bucket}/run")
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)
    assert losses(stage) == first
    assert "resuming after step 2" in capsys.readouterr().out
    assert sorted(path.name for path in (stage / "checkpoints-set-aside").iterdir()) == ["3", "README"]

    job = sampling.Job(
        f"{bucket}/run/photos", "generate", f"{bucket}/made", prompt="a red square", options={"steps": 1}
    )
    assert sampling.sample(job).failed == 0
    assert Image.open(io.BytesIO((epath.Path(bucket) / "made" / "000.png").read_bytes())).size == (16, 16)

    exports.to_jax(f"{bucket}/run/photos", tmp_path / "weights", progress=False)
    for place in (f"{bucket}/run/photos", tmp_path / "weights"):
        check_model(pretrained.load(place, dtype="float32"), state)


@pytest.mark.parametrize("form", ["png", "webdataset"])
def test_sampling_writes_into_a_bucket_and_goes_on_there(stage, bucket, form):
    output = epath.Path(bucket) / f"sampled-{form}"
    settings = {"options": {"steps": 1}, "dtype": "float32", "batch": 4, "prompt": "a red square", "count": 6}
    settings |= {"format": form} | ({"grid": 4} if form == "png" else {})
    job = sampling.Job(stage[0], "generate", str(output), **settings)
    assert sampling.sample(job).failed == 0
    made = {path.name: path.read_bytes() for path in output.iterdir()}
    assert sum(name.endswith((".png", ".tar")) for name in made) == (7 if form == "png" else 1)
    if form == "png":
        (output / "002.png").unlink()
    assert sampling.sample(job).failed == 0
    assert {path.name: path.read_bytes() for path in output.iterdir()} == made


def check_model(model, state):
    for name, tree in state.ema.items():
        for a, b in zip(jax.tree.leaves(model.params[name]), jax.tree.leaves(tree), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_caches(bucket, tmp_path):
    """Made in a bucket and read from there, of a dataset that is there as well: as on a local disk."""
    scenes.write_corpus(tmp_path / "corpus", count=6, size=16, chosen=["generate"])
    build(JsonlSource(tmp_path / "corpus" / "generate.jsonl"), f"{bucket}/shards", rows_per_shard=4)
    get_config = runpy.run_path(str(pathlib.Path(__file__).parent / "caches" / "config.py"))["get_config"]
    held = []
    for place in (f"{bucket}/caches", str(tmp_path / "caches")):
        config = get_config("").lock()
        with config.unlocked():
            config.data.sources = {"draw": {"path": f"{bucket}/shards", "format": "tfds", "task": "generate"}}
        config.cached, config.cache_directory = ("latents", "instructions"), place
        precompute(config, place, rows_per_shard=4, batch=2)
        assert len(list((epath.Path(place) / "draw" / "16x16").glob("*/*.array_record"))) == 4
        run = run_config.read(config)
        tokenizer = tokenizers.make(run, None)
        caches = caches_of(run, build_networks(run.model, dtype=run.dtype), tokenizer, None)
        source = open_source(run.data.sources[0])
        opened = caches.open(0, source, np.arange(6), (16, 16), 0)
        rows = [cache.read(row, cache.digest(source[row])) for cache in opened.values() for row in range(6)]
        held.append((rows, opened["instructions"].null_states()))
    assert len(held[0][0]) == 12
    jax.tree.map(np.testing.assert_array_equal, *held)


def test_a_file_is_scanned_in_few_requests(bucket, server, tmp_path):
    """fsspec alone would send one for each line, and fetch 5 MB with it."""
    turns = [{"from": "gpt", "value": "x" * 99}]
    rows = [{"image": "a.png", "conversations": [{"from": "human", "value": f"{i}?"}, *turns]} for i in range(1000)]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for i in range(200):
            for suffix, content in (("txt", b"a word"), ("png", bytes(1000))):
                about = tarfile.TarInfo(f"{i}.{suffix}")
                about.size = len(content)
                tar.addfile(about, io.BytesIO(content))
    for name, content in (("p.txt", lines), ("c.jsonl", lines), ("a.tar", (tmp_path / "a.tar").read_bytes())):
        (epath.Path(bucket) / "scan" / name).write_bytes(content)
    server.requests.clear()
    prompts = FileRows("generate", 0, f"{bucket}/scan/p.txt")
    assert [row.prompt for row in prompts] == lines.decode().splitlines()
    conversations = ConversationSource(f"{bucket}/scan/c.jsonl")
    assert len(conversations) == 1000 and len(TarSource(f"{bucket}/scan/a.tar")) == 200
    assert max(server.requests.values()) < 12, server.requests
    server.requests.clear()
    assert conversations[7].question == "7?"
    assert server.requests == {("GET", "scan/c.jsonl"): 1}


def test_an_image_is_one_request(bucket, server):
    picture = io.BytesIO()
    Image.effect_noise((300, 200), 50).convert("RGB").save(picture, "PNG")
    (epath.Path(bucket) / "pictures" / "a.png").write_bytes(picture.getvalue())
    server.requests.clear()
    assert images.upright_size(f"{bucket}/pictures/a.png") == (200, 300)
    assert images.load(f"{bucket}/pictures/a.png", 20, 30).shape == (20, 30, 3)
    assert server.requests == {("GET", "pictures/a.png"): 2}
    with pytest.raises(Refused, match="no such file"):
        images.upright_size(f"{bucket}/pictures/b.png")


def test_a_build_by_several_processes(bucket, tmp_path):
    """What one process has listed, others write into."""
    scenes.write_corpus(tmp_path, count=8, size=16, chosen=["generate"])
    source = JsonlSource(tmp_path / "generate.jsonl")
    build(source, f"{bucket}/built", rows_per_shard=2, processes=2)
    built = open_source(SourceConfig(f"{bucket}/built", "tfds"))
    assert [built[i].caption for i in range(len(built))] == [source[i].caption for i in range(8)]


def test_images_of_prompts_may_lie_elsewhere(bucket):
    (epath.Path(bucket) / "rows" / "edits.jsonl").write_text('{"image": "../pictures/a.png", "instruction": "turn it"}')
    [row] = FileRows("edit", 0, f"{bucket}/rows/edits.jsonl")
    assert row.images == (f"{bucket}/pictures/a.png",)


def test_an_upload_that_fails_leaves_nothing(bucket, server, monkeypatch):
    """A shard that is there counts as complete."""
    monkeypatch.setattr(server, "broken", "shards/a")
    with (
        pytest.raises(OSError, match="shards/a: HttpError: broken, 400"),
        storage.whole_file(epath.Path(bucket) / "shards" / "a") as local,
    ):
        pathlib.Path(local).write_bytes(bytes(60 * 2**20))  # in more than one part
    assert ("bucket", "shards/a") not in server.objects
    monkeypatch.undo()
    with storage.whole_file(epath.Path(bucket) / "shards" / "a") as local:
        pathlib.Path(local).write_bytes(bytes(60 * 2**20))
    assert len(server.objects["bucket", "shards/a"][0]) == 60 * 2**20
