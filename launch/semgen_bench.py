"""Makes the images that SemGen-Bench asks for, laid out as its scorer reads them.

    python launch/semgen_bench.py --checkpoint=converted --benchmark=SemGen-Bench/benchmark --output=results/mine

Then, in the benchmark's own directory and environment:

    python test_bench_score.py --image_path=results/mine
    python calculate_statistics.py --model_name=mine --save_path=results

On several hosts, every host starts this command. Started again, it makes what is left.
"""

from absl import flags

from unialign_jax import cli

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "A run's stage directory, a step in it, a converted or public directory, or a shipped name."
)
_BENCHMARK = flags.DEFINE_string("benchmark", None, "Directory with semgen_bench.jsonl and images/.")
_OUTPUT = flags.DEFINE_string("output", None, "Directory for what is made; created if absent.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the first image of each task; image i has seed + i.", 0)
_STEPS = flags.DEFINE_integer("steps", None, "Sampling steps; default: the protocol's; published are 50.", 1)
_GUIDANCE = flags.DEFINE_float(
    "guidance", None, "Classifier-free guidance; default: the protocol's; published are 7, or 9 for edits."
)
_DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ("bfloat16", "float32"), "Compute dtype.")
_AVERAGE = flags.DEFINE_bool("average", True, "Of a run, take the moving average of its parameters where there is one.")
_BATCH = flags.DEFINE_integer(
    "batch", None, "Images worked on at once over all devices; default: 8 for each part of a batch.", 1
)
_STRATEGY = flags.DEFINE_string("strategy", "fsdp", "How the devices split weights and batch, as in training.")
_start = cli.define_cluster()
flags.mark_flags_as_required(["checkpoint", "benchmark", "output"])


def main() -> None:
    from unialign_jax.evaluation import semgen_bench  # late: a wrong flag is said without loading JAX
    from unialign_jax.sampling import Job

    options = {"steps": _STEPS.value, "guidance": _GUIDANCE.value}
    job = Job(
        checkpoint=_CHECKPOINT.value,
        task="generate",
        output=_OUTPUT.value,
        seed=_SEED.value,
        options={name: value for name, value in options.items() if value is not None},
        dtype=_DTYPE.value,
        batch=_BATCH.value,
        strategy=_STRATEGY.value,
        average=_AVERAGE.value,
    )
    _start()
    semgen_bench.draw(_BENCHMARK.value, job)


if __name__ == "__main__":
    cli.run(main)
