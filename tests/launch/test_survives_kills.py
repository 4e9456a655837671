"""Training killed with SIGKILL at random moments, some of them inside a save, is the uninterrupted run, bit for bit.

Three kills by default; UNIALIGN_KILLS=20 kills twenty times (about a quarter of a minute each).
"""

import itertools
import json
import os
import pathlib
import random
import re
import subprocess
import sys
import textwrap
import time

import jax
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from unialign_jax.data import scenes

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[2]
KILLS = int(os.environ.get("UNIALIGN_KILLS", "3"))
STEPS, EVERY = 24 * KILLS + 24, 4  # a kill is seldom later than 24 steps after the one before it
SMALL = {
    "steps": STEPS,
    "model.transformer.num_layers": 1,
    "model.transformer.num_attention_heads": 1,
    "model.transformer.caption_projection_dim": 32,
    "model.transformer.joint_attention_dim": 16,
    "model.transformer.vocab_size": 64,
    "model.transformer.mask_token_id": 63,
    "model.transformer.adapter_hidden": 8,
    "model.transformer.semantic_dim": 8,
    "model.text_encoder.vocab_size": 64,
    "model.text_encoder.d_model": 16,
    "model.text_encoder.d_kv": 8,
    "model.text_encoder.d_ff": 16,
    "model.text_encoder.num_layers": 1,
    "model.text_encoder.num_heads": 2,
    "tokenizer.learn_vocab_size": 64,
    "objective.semantic_depth": 1,
    "data.global_batch": 4,
    "data.height": 16,
    "data.width": 16,
    "data.text_length": 12,
    "data.threads": 1,
    "optimizer.warmup_steps": 1,
    "log.every": 1,
    "log.samples_every": 0,
    "checkpoint.every": EVERY,
    "checkpoint.keep": 2,
}


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """The training command, without its working directory."""
    folder = tmp_path_factory.mktemp("corpus")
    scenes.write_corpus(folder, count=12, size=16, chosen=["generate"])
    config = folder / "config.py"
    config.write_text(
        textwrap.dedent(f"""
        import importlib.util

        def get_config():
            spec = importlib.util.spec_from_file_location("photos_tiny", {str(ROOT / "configs" / "photos_tiny.py")!r})
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            config = module.get_config()
            config.data.sources.photos.path = {str(folder / "generate.jsonl")!r}
            config.model.teacher = None
            config.lock()
            config.update_from_flattened_dict({SMALL!r})
            return config
        """)
    )
    train = [sys.executable, str(ROOT / "launch" / "train.py"), f"--config={config}"]
    return [*train, f"--compilation_cache={tmp_path_factory.mktemp('xla')}"]


class Attempt:
    """One process of a run, and what it has said."""

    def __init__(self, command, workdir: pathlib.Path, *flags: str):
        self.output = workdir.parent / f"{workdir.name}-{time.time_ns()}.txt"
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
        with self.output.open("wb") as file:
            self.process = subprocess.Popen(
                [*command, f"--workdir={workdir}", *flags], stdout=file, stderr=subprocess.STDOUT, env=environment
            )

    @property
    def text(self) -> str:
        return self.output.read_text()

    def steps(self) -> list[int]:
        return [int(step) for step in re.findall(r"\] step (\d+)/", self.text)]

    def wait_until(self, condition) -> bool:
        """False if the process ended before."""
        deadline = time.monotonic() + 300
        while self.process.poll() is None:
            if condition():
                return True
            assert time.monotonic() < deadline, self.text
            time.sleep(0.001)
        return False

    def finish(self) -> None:
        try:
            assert self.process.wait(timeout=600) == 0, self.text
        finally:
            self.process.kill()


def complete_steps(workdir: pathlib.Path) -> list[int]:
    checkpoints = workdir / "photos" / "checkpoints"
    return sorted(int(p.name) for p in checkpoints.iterdir() if p.name.isdigit()) if checkpoints.is_dir() else []


def unfinished(workdir: pathlib.Path) -> list[pathlib.Path]:
    return list((workdir / "photos" / "checkpoints").glob("*.orbax-checkpoint-tmp*"))


def curves(workdir: pathlib.Path) -> dict[tuple[int, str], float]:
    """(step, tag) -> value, of all that a run's processes wrote; what was computed twice must have come out alike."""
    files = []
    for path in (workdir / "photos").glob("events.out.tfevents.*"):
        data, events = path.read_bytes(), []
        while len(data) >= 12 and len(data) >= (size := 16 + int.from_bytes(data[:8], "little")):  # not cut short
            events.append(Event.FromString(data[12 : size - 4]))
            data = data[size:]
        if events:  # none if it was killed before the first flush
            files.append(events)
    values = {}
    for event in (event for events in sorted(files, key=lambda events: events[0].wall_time) for event in events):
        for value in event.summary.value:
            if not value.tag.startswith(("time/", "throughput/")):
                assert values.setdefault((event.step, value.tag), value.simple_value) == value.simple_value
        if event.session_log.status == SessionLog.START:  # TensorBoard forgets what came after the resumed step
            values = {key: value for key, value in values.items() if key[0] < event.step}
    return values


def last_step(workdir: pathlib.Path) -> list[dict]:
    """Checksums of parameters, optimizer and average, and the data's position, after the last step."""
    step = workdir / "photos" / "checkpoints" / str(STEPS)
    meta, data = (json.loads((step / item / "metadata").read_text()) for item in ("meta", "data"))
    return [meta["checksums"], data]


def kill_somewhere(attempt: Attempt, workdir: pathlib.Path, how: str, rng: random.Random, start_seconds: float) -> None:
    """Kills inside the second save, some steps after the start, or while the process starts."""
    before = complete_steps(workdir)
    if how == "start":
        moment = time.monotonic() + rng.uniform(0.1, start_seconds)  # or its first steps, if it starts sooner this time
        attempt.wait_until(lambda: time.monotonic() >= moment or "trained parameters" in attempt.text)
    else:
        attempt.wait_until(lambda: "trained parameters" in attempt.text)  # what earlier kills left is cleared by then
        if how == "save":
            attempt.wait_until(lambda: complete_steps(workdir)[-1:] > before[-1:])
            attempt.wait_until(lambda: unfinished(workdir))
        else:
            few = rng.randint(1, 6)
            attempt.wait_until(lambda: len(attempt.steps()) >= few)
        time.sleep(rng.uniform(0, 0.01 if how == "save" else 0.2))
    attempt.process.kill()
    attempt.process.wait()


def test_a_run_killed_at_random_moments_is_the_uninterrupted_one(command, tmp_path):
    rng = random.Random(20)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    reference, begin = Attempt(command, whole, "--profile_steps=5:8"), time.monotonic()
    reference.wait_until(lambda: "trained parameters" in reference.text)
    start_seconds = 1.3 * (time.monotonic() - begin)
    reference.finish()

    begin = time.monotonic()
    inside, resumed_at, log = 0, 0, []
    for number in itertools.count():
        newest = max(complete_steps(killed), default=0)
        assert newest >= resumed_at  # never further back than before
        resumed_at = newest
        attempt = Attempt(command, killed)
        over = number >= KILLS and (inside or number >= KILLS + 3)  # once more if a save was quicker than the kill
        if over:
            attempt.finish()
        else:
            how = "save" if number >= KILLS else ("save", "step", "start")[number % 3]
            kill_somewhere(attempt, killed, how, rng, start_seconds)
            inside += how == "save" and bool(unfinished(killed))
        expected = f"resuming after step {newest}" if newest else "starting at step 0"
        started = re.search(r"(resuming after|starting at) step \d+", attempt.text)
        assert started is None or started[0] == expected
        assert newest < STEPS, "all was done before the last kill"
        log.append(f"{number}: {expected}, ended {attempt.process.returncode} after steps {attempt.steps()[-1:]}")
        if over:
            break
    print(f"{number} kills, {inside} of them inside a save, {time.monotonic() - begin:.0f} s", *log, sep="\n")

    assert inside
    expected = curves(whole)
    assert {step for step, tag in expected if tag == "loss"} >= {STEPS - 1, STEPS}
    assert curves(killed) == expected
    assert last_step(killed) == last_step(whole)

    (profile,) = (whole / "photos" / "plugins" / "profile").glob("*/*.xplane.pb")
    events = [event for plane in jax.profiler.ProfileData.from_file(str(profile)).planes for line in plane.lines
              for event in line.events]  # fmt: skip
    steps = {value for event in events if event.name == "train" for name, value in event.stats if name == "step_num"}
    assert steps == {5, 6, 7, 8} and str(profile.parent) in reference.text
