"""A whole run in an object store: data, tokenizer, logs, profile, checkpoints, and the model read from there.

A local server speaks as much of Cloud Storage's protocol as TensorStore does, which reads and writes the arrays; all
other files go through fsspec, for which a file system stands in that shows the same objects. As in a store there are no
directories but those that have files in them.
"""

import http.server
import importlib.util
import json
import pathlib
import re
import runpy
import sys
import threading
import urllib.parse

import jax
import numpy as np
import pytest
from etils import epath
from etils.epath import backend
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import _registry
from orbax.checkpoint._src.path import gcs_utils
from tensorboardX.proto.event_pb2 import Event

from unialign_jax import exports, pretrained, storage
from unialign_jax.checkpoints import Checkpoints
from unialign_jax.data import scenes
from unialign_jax.data.build import build
from unialign_jax.data.jsonl import JsonlSource
from unialign_jax.data.sources import open_source
from unialign_jax.data.tokenizer import Tokenizer
from unialign_jax.networks import build_networks
from unialign_jax.training import loop, run_config, tokenizers, writers
from unialign_jax.training.caching import caches_of
from unialign_jax.training.precompute import precompute

pytestmark = pytest.mark.usefixtures("shared_compilations")
CONFIGS = pathlib.Path(__file__).parents[1] / "configs"


class Handler(http.server.BaseHTTPRequestHandler):
    """Objects of all buckets as files under `root`: media, list, insert and delete of the JSON API."""

    protocol_version = "HTTP/1.1"
    root: pathlib.Path
    lock = threading.Lock()

    def log_message(self, *_):
        pass

    def answer(self, code: int, content: bytes | dict = b"", headers: dict | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(code)
        for name, value in {"Content-Length": len(body), **(headers or {})}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body)

    def parsed(self):
        """(bucket's folder, object's file or None, parameters)"""
        url = urllib.parse.urlsplit(self.path)
        match = re.fullmatch(r"(?:/upload)?/storage/v1/b/([^/]+)/o(?:/(.+))?", url.path)
        parameters = dict(urllib.parse.parse_qsl(url.query))
        name = parameters.get("name") or (match[2] and urllib.parse.unquote(match[2]))
        folder = self.root / match[1]
        return folder, name and folder / name, parameters

    @staticmethod
    def generation(file: pathlib.Path) -> int:
        return file.stat().st_mtime_ns if file.is_file() else 0

    def do_GET(self):
        folder, file, parameters = self.parsed()
        with self.lock:
            if file is None:
                names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
                low, high = parameters.get("startOffset", ""), parameters.get("endOffset", "\U0010ffff")
                prefix = parameters.get("prefix", "")
                items = [{"name": n, "size": str((folder / n).stat().st_size), "generation": "1"} for n in names
                         if n.startswith(prefix) and low <= n < high]  # fmt: skip
                return self.answer(200, {"kind": "storage#objects", "items": items})
            if not file.is_file():
                return self.answer(404)
            content, generation = file.read_bytes(), self.generation(file)
        span = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        headers = {"x-goog-generation": generation, "x-goog-stored-content-length": len(content)}
        if span:
            start, stop = int(span[1] or 0), int(span[2]) + 1 if span[2] and span[1] else len(content)
            start = start if span[1] else max(0, len(content) - int(span[2]))  # "-5": the last five bytes
            stop = min(stop, len(content))
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
            return self.answer(206, content[start:stop], headers)
        self.answer(200, content, headers)

    def do_POST(self):
        _, file, parameters = self.parsed()
        content = self.rfile.read(int(self.headers["Content-Length"]))
        with self.lock:
            wanted = parameters.get("ifGenerationMatch")
            if wanted is not None and int(wanted) != self.generation(file):
                return self.answer(412)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
            generation = self.generation(file)
        self.answer(200, {"name": file.name, "generation": str(generation)})

    def do_DELETE(self):
        _, file, _ = self.parsed()
        with self.lock:
            if not file.is_file():
                return self.answer(404)
            file.unlink()
        self.answer(204)


class Objects(DirFileSystem):
    """The same objects for fsspec. Directories come with the files in them and go with the last one."""

    protocol = ("gcs", "gs")
    root: pathlib.Path

    def __init__(self, **_):
        super().__init__(path=str(self.root), fs=LocalFileSystem(auto_mkdir=True))

    def mkdir(self, path, *_, **__):
        pass

    makedirs = mkdir

    def mv(self, path1, path2, **_):
        super().mv(path1, path2, recursive=True)

    rename = mv


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    """A bucket's address."""
    root = tmp_path_factory.mktemp("buckets")
    Handler.root = Objects.root = root
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", f"http://127.0.0.1:{server.server_port}")
        patch.setenv(
            "CLOUD_STORAGE_EMULATOR_ENDPOINT", f"http://127.0.0.1:{server.server_port}"
        )  # ArrayRecord's reader
        patch.setenv("GCE_METADATA_ROOT", f"127.0.0.1:{server.server_port}")  # there are no credentials to be found
        patch.setattr(gcs_utils, "is_hierarchical_namespace_enabled", lambda path: False)
        patch.setitem(_registry, "gcs", Objects)
        backend.fsspec_backend._get_filesystem.cache_clear()
        yield "gs://bucket"
        backend.fsspec_backend._get_filesystem.cache_clear()
    server.shutdown()


def test_a_missing_client_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    monkeypatch.delitem(_registry, "gcs", raising=False)
    with pytest.raises(ValueError, match=r"gs://bucket/a: .*pip install 'unialign_jax\[gcs\]'"):
        storage.absolute("gs://bucket/a")


def test_paths(monkeypatch):
    monkeypatch.setitem(_registry, "gcs", Objects)
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
    real = Objects.open
    monkeypatch.setattr(Objects, "open", lambda *_, **__: (_ for _ in ()).throw(OSError("outage")))
    writer.write_scalars(1, {"loss": 0.5})
    writer.flush()
    assert "outage" in caplog.text
    monkeypatch.setattr(Objects, "open", real)
    writer.write_scalars(2, {"loss": 0.25})
    writer.flush()
    assert losses(epath.Path(bucket) / "log") == {1: 0.5, 2: 0.25}
    written = []

    def noting(self, path, *arguments, **options):
        written.append(path)
        return real(self, path, *arguments, **options)

    monkeypatch.setattr(Objects, "open", noting)
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

    exports.to_jax(f"{bucket}/run/photos", tmp_path / "weights", progress=False)
    for place in (f"{bucket}/run/photos", tmp_path / "weights"):
        check_model(pretrained.load(place, dtype="float32"), state)


def check_model(model, state):
    for name, tree in state.ema.items():
        for a, b in zip(jax.tree.leaves(model.params[name]), jax.tree.leaves(tree), strict=True):
            np.testing.assert_array_equal(a, b)


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
