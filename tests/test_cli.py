"""Commands refuse what is wrong with one line on standard error and an exit code, before anything heavy is loaded."""

import http.server
import json
import os
import pathlib
import subprocess
import sys
import textwrap
import threading

import pytest

ROOT = pathlib.Path(__file__).parents[1]


def run(*arguments, program=ROOT / "launch" / "train.py", cwd=ROOT, **variables):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), **variables}
    return subprocess.run(
        [sys.executable, str(program), *arguments], capture_output=True, text=True, cwd=cwd, env=environment
    )


def assert_refused(result, *parts, code=1):
    assert result.returncode == code
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert result.stderr.startswith("error: ")
    for part in parts:
        assert part in result.stderr


TINY = "--config=configs/photos_tiny.py"


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ((TINY, "--config.setps=3"), ("--config.setps=3", "no key 'setps'", "did you mean 'steps'")),
        ((TINY, "--config.optimizer.rate=3"), ("--config.optimizer.rate=3", "no key 'rate'")),
        ((TINY, "--config.optimizer.rate=3"), ("stages", "--config.stages.STAGE.optimizer.rate")),
        ((TINY, "--profile_steps=5-9"), ("--profile_steps=5-9: expected START:STOP",)),
        ((TINY, "--config.steps=many"), ("--config.steps", "many")),
        ((TINY, "--config.steps=1.5"), ("--config.steps", "1.5")),
        ((TINY, "--config.log=3"), ("--config.log", "not a dict")),
        ((TINY + ":nonsense",), ("error: no stage 'nonsense'; this config has photos",)),
        (("--config=configs/nowhere.py",), ("config file 'configs/nowhere.py' does not exist",)),
        ((TINY, "--config.steps=3", "--nonsense=3"), ("nonsense",)),
        ((TINY, "runs/photos"), ("unexpected argument 'runs/photos'",)),
    ],
)
def test_wrong_flags(arguments, parts, tmp_path):
    assert_refused(run(*arguments, f"--workdir={tmp_path}"), *parts, code=78)


def test_required_flags():
    assert_refused(run(TINY), "--workdir", code=78)
    assert_refused(run("--workdir=runs"), "--config", code=78)


def test_data_that_is_not_there(tmp_path):
    missing = f"--config.data.sources.photos.path={tmp_path}/photos.jsonl"
    assert_refused(run(TINY, missing, f"--workdir={tmp_path}"), f"{tmp_path}/photos.jsonl", "no such file")


def test_a_file_config_with_a_wrong_key(tmp_path):
    text = (ROOT / "configs" / "photos_tiny.py").read_text()
    (tmp_path / "mine.py").write_text(text.replace("config.steps =", "config.setps ="))
    assert_refused(run(f"--config={tmp_path}/mine.py", f"--workdir={tmp_path}"), "setps: unknown key", code=78)


def test_help_explains_the_flags():
    result = run("--help")
    assert "--workdir" in result.stdout and "--config" in result.stdout and "traceback" in run("--helpfull").stdout


@pytest.fixture
def program(tmp_path):
    def write(body: str) -> pathlib.Path:
        path = tmp_path / "program.py"
        path.write_text(
            f"from unialign_jax import cli\n\ndef main():\n{textwrap.indent(body, '    ')}\n\ncli.run(main)\n"
        )
        return path

    return write


def test_defects_keep_their_traceback_and_expected_errors_do_not(program):
    ours = program("raise ValueError('the config is\\nwrong')")
    assert_refused(run(program=ours), "error: the config is wrong")
    assert "Traceback" in run("--traceback", program=ours).stderr
    final = "from unialign_jax.training.metrics import NonFiniteLoss\nraise NonFiniteLoss('step 5: loss=nan')"
    never = run(program=program(final))
    assert never.returncode == 78 and never.stderr.splitlines()[-1] == "error: step 5: loss=nan"
    # As from a worker process: raised by a library's code, but of our class.
    raising = "exec('raise CorpusError(chr(120))', {'CorpusError': CorpusError, '__name__': 'library'})"
    handed_on = program(f"from unialign_jax.data.report import CorpusError\n{raising}")
    assert_refused(run(program=handed_on), "error: x")
    foreign = run(program=program("int('x')\nimport json\njson.loads('{')"))
    assert foreign.returncode == 1 and "error: " in foreign.stderr
    library = run(program=program("import json\njson.loads('{')"))
    assert library.returncode == 1 and "Traceback" in library.stderr and "JSONDecodeError" in library.stderr
    assert_refused(run(program=program("open('/nowhere/at/all')")), "/nowhere/at/all")
    full = program("import jax\nraise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory.\\nBuffers: ...')")
    assert_refused(
        run(program=full), "memory is full: RESOURCE_EXHAUSTED: Out of memory.", "--config.micro_batches", code=78
    )
    other = run(program=program("import jax\nraise jax.errors.JaxRuntimeError('INTERNAL: other')"))
    assert "Traceback" in other.stderr
    assert run(program=program("print('fine')")).returncode == 0
    assert "Traceback" in run(program=program("raise KeyError('x')")).stderr


@pytest.fixture
def refusing_store():
    """`refusing_store(code)`: environment in which a store answers every request with that code."""
    servers = []

    def start(code: int) -> dict[str, str]:
        class Refuse(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(code)
                self.end_headers()
                self.wfile.write(json.dumps({"error": {"code": code, "message": "no access to bucket"}}).encode())

            def log_message(self, *_):
                pass

        servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refuse))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{servers[-1].server_port}"
        return {"STORAGE_EMULATOR_HOST": address, "FSSPEC_GCS_TOKEN": "anon"}

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("code", "parts"),
    [
        (401, ("HttpError: no access to bucket, 401", "gcloud auth application-default login")),
        (403, ("Forbidden", "no access to bucket", "gcloud auth application-default login")),
        (409, ("HttpError: no access to bucket, 409",)),
    ],
)
@pytest.mark.parametrize("do", ["exists()", "read_text()"])
def test_what_a_store_refuses(program, refusing_store, code, parts, do):
    asking = program(f"from unialign_jax import storage\nstorage.absolute('gs://bucket/a').{do}")
    assert_refused(run(program=asking, **refusing_store(code)), *parts)


def test_a_store_that_cannot_be_logged_in_to(program):
    failing = program("import google.auth.exceptions as auth\nraise auth.RefreshError('expired')")
    assert_refused(run(program=failing), "RefreshError: expired; log in with: gcloud auth application-default login")
    assert "Traceback" in run("--traceback", program=failing).stderr
