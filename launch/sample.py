"""Samples from a checkpoint, one of six tasks.

    python launch/sample.py --checkpoint=runs/photos/photos --task=generate --prompt="a dog on a beach" --output=out
    python launch/sample.py --checkpoint=... --task=edit --image=dog.png --prompt="make it night" --output=out
    python launch/sample.py --checkpoint=... --task=perceive --image=dog.png --prompt="depth map" --output=out
    python launch/sample.py --checkpoint=... --task=compose --image=dog.png,hat.png --prompt="dog in hat" --output=out
    python launch/sample.py --checkpoint=... --task=caption --image=dog.png,cat.png --output=out
    python launch/sample.py --checkpoint=... --task=answer --image=dog.png --prompt="what animal is it?" --output=out

Images are written as PNG, texts to texts.txt and to standard output.
"""  # fmt: skip

from absl import flags

from unialign_jax import cli, compilation_cache

TASKS = ("generate", "edit", "perceive", "compose", "caption", "answer")

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "A run's stage directory, a step in it, or a converted directory."
)
_TASK = flags.DEFINE_enum("task", None, TASKS, "What to do.")
_PROMPT = flags.DEFINE_string("prompt", None, "The text: what to draw, the instruction, or the question.")
_IMAGE = flags.DEFINE_list("image", [], "Image files, separated by commas.")
_OUTPUT = flags.DEFINE_string("output", None, "Directory for what is made; created if absent.")
_COUNT = flags.DEFINE_integer("count", 1, "How many images to make, with seeds from --seed on.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Of the first item; item i has seed + i.", lower_bound=0)
_STEPS = flags.DEFINE_integer("steps", None, "Sampling steps; default as published: 50, or 32 for text.", lower_bound=1)
_GUIDANCE = flags.DEFINE_float("guidance", None, "Classifier-free guidance; default as published: 7, or 9 with images.")
_DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ("bfloat16", "float32"), "Compute dtype.")
_BATCH = flags.DEFINE_integer("batch", 8, "Most items worked on at once.", lower_bound=1)
_CACHE = flags.DEFINE_string("compilation_cache", None, compilation_cache.HELP)
flags.mark_flags_as_required(["checkpoint", "task", "output"])


def main() -> None:
    from unialign_jax import sampling  # late: a wrong flag is said without loading JAX

    compilation_cache.enable(_CACHE.value)
    sampling.sample_to_directory(
        _CHECKPOINT.value,
        _TASK.value,
        _OUTPUT.value,
        prompt=_PROMPT.value,
        images=_IMAGE.value,
        count=_COUNT.value,
        seed=_SEED.value,
        steps=_STEPS.value,
        guidance=_GUIDANCE.value,
        dtype=_DTYPE.value,
        batch=_BATCH.value,
    )


if __name__ == "__main__":
    cli.run(main)
