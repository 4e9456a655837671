"""What the training loop adds to the bare compiled step: data hand-over, metrics, logs, signals, the profiler's hooks.

Both run the same program on the same batches, made beforehand (the input pipeline has a benchmark of its own), and take
turns; saves are not timed. The loop is `training.loop.train` itself: its pace is read off the moments at which it asks
for batches. The processor time of its thread is measured too, which does not depend on what else the machine is doing:
its excess over the bare step's is the most that the loop could add, if the device never ran ahead of it.
"""

import functools
import itertools
import pathlib
import statistics
import tempfile
import time
from typing import Any

import jax
import ml_collections
import numpy as np
from etils import epath

from unialign_jax import compilation_cache, parallel
from unialign_jax.data import scenes
from unialign_jax.data.pipeline import Batches, make_batches
from unialign_jax.data.tokenizer import Tokenizer
from unialign_jax.pretrained import initial_params
from unialign_jax.state import create_state
from unialign_jax.training import run_config
from unialign_jax.training.loop import train
from unialign_jax.training.program import Program

_STEPS = 50  # timed in each turn
_WARM_UP = 10
_ROUNDS = 7
_RECORDED = 8  # batches
_VOCABULARY = 100


def run() -> dict[str, Any]:
    """Times bare steps and the loop in turns.

    Returns:
      `bare_step_seconds`, `loop_step_seconds` and the processor time of the thread, `bare_host_seconds` and
      `loop_host_seconds`, per step, by round; of `ratio`, each round's loop over the mean of the bare turns before and
      after it, the median and the quartiles; `host_share`, the loop's additional processor time over the bare step,
      from the medians.
    """
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        compilation_cache.enable(str(folder / "xla"))
        scenes.write_corpus(folder / "corpus", count=64, chosen=["generate"])
        config = small_config(folder / "corpus" / "generate.jsonl")
        made = []
        _loop_turn(config, folder / "0", made)  # the first turn compiles, and records the batches
        bare_turn = _Bare(config, Tokenizer.load(folder / "0" / "loop" / "tokenizer"), made)
        bare, loop = [bare_turn()], []
        for number in range(1, _ROUNDS + 1):
            loop.append(_loop_turn(config, folder / str(number), made))
            bare.append(bare_turn())
    return summary(bare, loop)


def summary(bare: list[tuple[float, float]], loop: list[tuple[float, float]]) -> dict[str, Any]:
    """The results of `run` from (seconds, processor seconds) per step: one more turn of bare steps than of the loop."""
    ratios = [2 * x[0] / (a[0] + b[0]) for x, (a, b) in zip(loop, itertools.pairwise(bare), strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    times = {
        f"{name}_{kind}_seconds": [round(turn[index], 6) for turn in turns]
        for name, turns in {"bare": bare, "loop": loop}.items()
        for index, kind in enumerate(("step", "host"))
    }
    usual = {name: statistics.median(values) for name, values in times.items()}
    return {
        "steps_per_turn": _STEPS,
        **times,
        "ratio": {"median": round(middle, 4), "quartiles": [round(low, 4), round(high, 4)]},
        "host_share": round((usual["loop_host_seconds"] - usual["bare_host_seconds"]) / usual["bare_step_seconds"], 4),
    }


class _Replayed:
    """Batches that were made before, over and over; notes when each is asked for. All else is the real pipeline's."""

    def __init__(self, batches: Batches, made: list[dict[str, np.ndarray]]):
        while len(made) < _RECORDED:
            made.append(next(batches))
        self._batches, self._made = batches, itertools.cycle(made)
        self.times: list[tuple[float, float]] = []

    def __next__(self) -> dict[str, np.ndarray]:
        self.times.append((time.perf_counter(), time.thread_time()))
        return next(self._made)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._batches, name)


def _loop_turn(
    config: ml_collections.ConfigDict, workdir: pathlib.Path, made: list[dict[str, np.ndarray]]
) -> tuple[float, float]:
    """Seconds and processor seconds per step of a run of the loop."""
    replayed = []

    def make(*args: Any, **kwargs: Any) -> _Replayed:
        replayed.append(_Replayed(make_batches(*args, **kwargs), made))
        return replayed[0]

    train(config, workdir, make_batches=make)
    times = replayed[0].times
    return tuple((end - start) / _STEPS for start, end in zip(times[-1 - _STEPS], times[-1], strict=True))


class _Bare:
    """The same program on the same batches and nothing else; a call gives seconds and processor seconds per step."""

    def __init__(self, config: ml_collections.ConfigDict, tokenizer: Tokenizer, made: list[dict[str, np.ndarray]]):
        run = run_config.read(config)
        program = Program(run, parallel.make_mesh(run.strategy))
        init_key, self._key = jax.device_put(tuple(jax.random.split(jax.random.key(run.seed))), program.key.sharding)
        start = functools.partial(initial_params, program.networks, init_key, source=None)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, program.state)
        create = jax.jit(functools.partial(create_state, config=run.optimizer), out_shardings=shardings)
        self._state, self._frozen = create(start(program.state.params)), start(program.frozen)
        null_ids = parallel.replicate(tokenizer.encode(" ", run.data.text_length), program.mesh)
        self._batches = itertools.cycle([program.place(arrays, {"null_ids": null_ids}) for arrays in made])
        self._step = program.lower(run.data.sources[0], end_token_id=tokenizer.end_id).compile()

    def __call__(self) -> tuple[float, float]:
        for number in range(_WARM_UP + _STEPS):
            if number == _WARM_UP:
                jax.block_until_ready(self._state)
                begin = time.perf_counter(), time.thread_time()
            self._state, _ = self._step(self._state, self._frozen, next(self._batches), self._key)
        jax.block_until_ready(self._state)
        end = time.perf_counter(), time.thread_time()
        return tuple((b - a) / _STEPS for a, b in zip(begin, end, strict=True))


def small_config(rows: epath.PathLike) -> ml_collections.ConfigDict:
    """A model that is small, but whose step takes long enough to be training."""
    return ml_collections.ConfigDict(
        {
            "stage": "loop",
            "seed": 0,
            "steps": _WARM_UP + _STEPS + 1,
            "dtype": "float32",
            "trained": ("transformer", "text_encoder"),
            "model": {
                "transformer": {
                    "sample_size": 16,
                    "patch_size": 2,
                    "in_channels": 12,
                    "out_channels": 12,
                    "num_layers": 4,
                    "attention_head_dim": 32,
                    "num_attention_heads": 4,
                    "caption_projection_dim": 128,
                    "joint_attention_dim": 64,
                    "pos_embed_max_size": 8,
                    "vocab_size": _VOCABULARY,
                    "mask_token_id": _VOCABULARY - 1,
                    "adapter_hidden": 64,
                    "semantic_dim": 64,
                },
                "pixel_codec": {"patch": 2},
                "text_encoder": {
                    "vocab_size": _VOCABULARY,
                    "d_model": 64,
                    "d_kv": 16,
                    "d_ff": 128,
                    "num_layers": 2,
                    "num_heads": 4,
                },
            },
            "tokenizer": {"learn_vocab_size": _VOCABULARY},
            "data": {
                "sources": {"scenes": {"path": str(rows), "task": "generate"}},
                "global_batch": 8,
                "height": 32,
                "width": 32,
                "text_length": 32,
            },
            "objective": {"semantic_depth": 2},
            "optimizer": {"warmup_steps": 10},
            "checkpoint": {"every": 10**9},
            "log": {"every": 20},
        }
    ).lock()
