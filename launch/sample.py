"""Samples from a checkpoint, one of six tasks: one request, or a file of them on any number of hosts.

    python launch/sample.py --checkpoint=runs/photos/photos --task=generate --prompt="a dog" --output=out/dogs
    python launch/sample.py --checkpoint=... --task=edit --image=dog.png --prompt="make it night" --output=out/edit
    python launch/sample.py --checkpoint=... --task=perceive --image=dog.png --prompt="depth map" --output=out/perceive
    python launch/sample.py --checkpoint=... --task=compose --image=dog.png,hat.png --prompt="hat on" --output=out/hat
    python launch/sample.py --checkpoint=... --task=caption --image=dog.png,cat.png --output=out/caption
    python launch/sample.py --checkpoint=... --task=answer --image=dog.png --prompt="what is it?" --output=out/answer
    python launch/sample.py --checkpoint=... --task=generate --prompts=million.jsonl --output=gs://bucket/out

Images become PNG files with their prompt, seed and settings inside, or shards (--format); texts become JSONL, and are
printed if they were asked for by flags. Started again with the same command, a run makes what is left of it. Prompts
are lines of a text file, or JSONL rows {"prompt": ..., "image": ..., "seed": ...} as far as the task needs them.

On several hosts, every host starts this command. On Cloud TPU, SLURM and Open MPI 4 the processes find each other;
elsewhere give --coordinator, --num_processes and --process_id.
"""  # fmt: skip

from absl import flags

from unialign_jax import cli
from unialign_jax.data.samples import TASKS

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "A run's stage directory, a step in it, a converted or public directory, or a shipped name."
)
_TASK = flags.DEFINE_enum("task", None, TASKS, "What to do.")
_OUTPUT = flags.DEFINE_string("output", None, "Directory for what is made; created if absent.")
_PROMPT = flags.DEFINE_string("prompt", None, "The text: what to draw, the instruction, or the question.")
_IMAGE = flags.DEFINE_list("image", [], "Image files, separated by commas.")
_PROMPTS = flags.DEFINE_string("prompts", None, "Instead of --prompt and --image: a text or JSONL file of requests.")
_COUNT = flags.DEFINE_integer("count", 1, "How often to make what flags ask for, with seeds from --seed on.", 1)
_SEED = flags.DEFINE_integer("seed", 0, "Of the first item; item i has seed + i.", 0)
_STEPS = flags.DEFINE_integer(
    "steps", None, "Sampling steps; default: the protocol's; published are 50, or 32 for text.", 1
)
_GUIDANCE = flags.DEFINE_float(
    "guidance", None, "Classifier-free guidance; default: the protocol's; published are 7, or 9 with images."
)
_REFERENCE_GUIDANCE = flags.DEFINE_float(
    "reference_guidance", None, "Guidance on the reference images apart from the text's; 1, as published, is none."
)
_INTERVAL = flags.DEFINE_list(
    "guidance_interval", None, "Noise levels low,high between 0 and 1 at which guidance acts; default: all."
)
_NEGATIVE = flags.DEFINE_string("negative_prompt", None, "What guidance leads away from; default: the protocol's.")
_SIZE = flags.DEFINE_list("size", None, "Height,width in pixels; default: what the model was trained on.")
_ASPECT = flags.DEFINE_string("aspect", None, "Width over height, such as 16:9, instead of --size.")
_FAST = flags.DEFINE_bool("fast", None, "Texts: confidence-ordered decoding, by default in fewer steps.")
_PROTOCOL = flags.DEFINE_string(
    "protocol", None, "Sets what is left out; default: the model's own. See docs/sampling.md."
)
_DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ("bfloat16", "float32"), "Compute dtype.")
_AVERAGE = flags.DEFINE_bool("average", True, "Of a run, take the moving average of its parameters where there is one.")
_BATCH = flags.DEFINE_integer(
    "batch", None, "Items worked on at once over all devices; default: 8 for each part of a batch.", 1
)
_STRATEGY = flags.DEFINE_string("strategy", "fsdp", "How the devices split weights and batch, as in training.")
_FORMAT = flags.DEFINE_enum("format", "png", ("png", "array_record", "webdataset"), "What images are written as.")
_SHARD_ROWS = flags.DEFINE_integer("shard_rows", 1024, "Rows of a shard, of formats that have them and of texts.", 1)
_GRID = flags.DEFINE_integer("grid", 0, "Lay so many of the first images out in grid.png.", 0)
_PROGRESS = flags.DEFINE_bool("progress", True, "Show a progress bar.")
_start = cli.define_cluster()
flags.mark_flags_as_required(["checkpoint", "task", "output"])


def _interval() -> tuple[float, ...] | None:
    try:
        return None if _INTERVAL.value is None else tuple(map(float, _INTERVAL.value))
    except ValueError:
        raise ValueError(f"--guidance_interval={','.join(_INTERVAL.value)} is not of the form low,high") from None


def _size() -> tuple[int, int] | None:
    if _SIZE.value is None:
        return None
    if len(_SIZE.value) != 2 or not all(part.strip().isdigit() for part in _SIZE.value):
        raise ValueError(f"--size={','.join(_SIZE.value)} is not of the form height,width")
    return int(_SIZE.value[0]), int(_SIZE.value[1])


def main() -> None:
    from unialign_jax import sampling  # late: a wrong flag is said without loading JAX

    options = {
        "steps": _STEPS.value,
        "guidance": _GUIDANCE.value,
        "reference_guidance": _REFERENCE_GUIDANCE.value,
        "guidance_interval": _interval(),
        "negative_prompt": _NEGATIVE.value,
        "size": _size(),
        "aspect": _ASPECT.value,
        "fast": _FAST.value,
        "protocol": _PROTOCOL.value,
    }
    job = sampling.Job(
        checkpoint=_CHECKPOINT.value,
        task=_TASK.value,
        output=_OUTPUT.value,
        prompts=_PROMPTS.value,
        prompt=_PROMPT.value,
        images=tuple(_IMAGE.value),
        count=_COUNT.value,
        seed=_SEED.value,
        options={name: value for name, value in options.items() if value is not None},
        dtype=_DTYPE.value,
        batch=_BATCH.value,
        strategy=_STRATEGY.value,
        format=_FORMAT.value,
        shard_rows=_SHARD_ROWS.value,
        grid=_GRID.value,
        average=_AVERAGE.value,
        progress=_PROGRESS.value,
    )
    _start()
    result = sampling.sample(job)
    for line in result.shown:
        print(line)


if __name__ == "__main__":
    cli.run(main)
