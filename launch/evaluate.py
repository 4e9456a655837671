"""Scores a checkpoint on a benchmark.

    python launch/evaluate.py --checkpoint=runs/scenes/unify --benchmark=scenes --output=runs/scores
    python launch/evaluate.py --checkpoint=... --tasks=caption --sets=test,attributes --things=1-2,3-4 --output=...

Prints the tables, and writes them with the model's outputs and pictures to the output directory, beside those that are
there of other sets, things and tasks by the same settings.
"""

import dataclasses

from absl import flags

from unialign_jax import cli
from unialign_jax.data.samples import TASKS

SETS = ("test", "attributes", "relations", "wordings", "train")

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "A run's stage directory, a step in it, a converted directory, or a shipped checkpoint's name."
)
_BENCHMARK = flags.DEFINE_enum("benchmark", "scenes", ("scenes",), "What to score on.")
_OUTPUT = flags.DEFINE_string("output", None, "Directory for scores and pictures; created if absent.")
_TASKS = flags.DEFINE_list("tasks", list(TASKS), "Which tasks.")
_SETS = flags.DEFINE_list("sets", ["test"], "Sets of scenes, all but train held out: " + ", ".join(SETS) + ".")
_THINGS = flags.DEFINE_list("things", ["1-2", "3-4"], "Numbers of things in the scenes, a table for each: 1-2, 3, ...")
_COUNT = flags.DEFINE_integer("count", 200, "Examples per task and table.", lower_bound=1)
_STEPS = flags.DEFINE_integer("steps", None, "Steps of images and of texts.", lower_bound=1)
_GUIDANCE = flags.DEFINE_float("guidance", None, "Classifier-free guidance of all image tasks.", lower_bound=0)
_AVERAGE = flags.DEFINE_bool("average", True, "Of a run, score the moving average of the parameters.")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ("bfloat16", "float32"), "Compute dtype.")
_STRATEGY = flags.DEFINE_string("strategy", "fsdp", "How the devices split weights and batch, as in training.")
_BATCH = flags.DEFINE_integer("batch", 64, "Most items worked on at once.", lower_bound=1)
_start = cli.define_cluster()
flags.mark_flags_as_required(["checkpoint", "output"])


def _things(text: str) -> tuple[int, ...]:
    first, _, last = text.partition("-")
    if not (first.isdecimal() and (last or first).isdecimal() and 1 <= int(first) <= int(last or first) <= 4):
        raise ValueError(f"--things={text}: expected a number from 1 to 4, or a range such as 1-2")
    return tuple(range(int(first), int(last or first) + 1))


def main() -> None:
    for flag, values, known in (("tasks", _TASKS.value, TASKS), ("sets", _SETS.value, SETS)):
        if unknown := [value for value in values if value not in known]:
            raise ValueError(f"--{flag}: unknown {', '.join(unknown)}; there are {', '.join(known)}")
    things = [_things(text) for text in _THINGS.value]
    # Late: a wrong flag is said without loading JAX.
    import jax

    from unialign_jax import lineage, parallel, storage
    from unialign_jax.evaluation import evaluate, scenes
    from unialign_jax.pipeline import UniAlignPipeline

    changes = dict.fromkeys(("steps", "caption_steps", "answer_steps", "fast_steps"), _STEPS.value)
    changes |= {"generate_guidance": _GUIDANCE.value, "edit_guidance": _GUIDANCE.value}
    protocol = dataclasses.replace(scenes.PROTOCOL, **{k: v for k, v in changes.items() if v is not None})
    _start()
    mesh = parallel.make_mesh(_STRATEGY.value)
    parts = parallel.batch_parts(mesh)
    checkpoint = lineage.pinned(_CHECKPOINT.value)
    pipeline = UniAlignPipeline.from_pretrained(
        checkpoint,
        mesh,
        dtype=_DTYPE.value,
        average=_AVERAGE.value,
        max_batch=-(-min(_BATCH.value, _COUNT.value) // parts) * parts,
        single_size=True,
    )
    tables = evaluate.evaluate_scenes(
        pipeline,
        storage.absolute(_OUTPUT.value),
        tasks=_TASKS.value,
        subsets=_SETS.value,
        things=things,
        count=_COUNT.value,
        protocol=protocol,
        about={
            "checkpoint": checkpoint,
            "average": _AVERAGE.value,
            "benchmark": _BENCHMARK.value,
            "dtype": _DTYPE.value,
        },
    )
    if not jax.process_index():
        for name, scores in tables.items():
            print(f"\n{name}\n{scenes.table(scores)}")


if __name__ == "__main__":
    cli.run(main)
