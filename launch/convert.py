"""Converts weights between the public PyTorch checkpoints and this package, both ways.

    python launch/convert.py --to=jax --source=UniAlignment --target=converted
        A UniAlignment, D-DiT or SD3-medium pipeline directory (safetensors) becomes model.json and one Orbax
        checkpoint per network. What SD3 and D-DiT lack is initialised, and listed. Of a run's stage directory, or one
        step in its checkpoints/, the weights alone are written in the same form.

    python launch/convert.py --to=torch --source=converted --target=pipeline
        The way back: a directory that the public pipeline class loads with from_pretrained. The source may also be a
        run's stage directory, or one step in its checkpoints/, of which --noaverage exports the parameters themselves
        instead of their moving average.

    python launch/convert.py --to=torch --source=converted --target=pipeline --check
        Then samples one prompt from the same noise here and in PyTorch, both in float32, and prints the differences.

Between directories weights are streamed: memory holds a few tensors, never a network. Of a run it holds one network, in
float32, and --check one side at a time. All directories are local, but a run may be in gs://.
"""

from absl import flags

from unialign_jax import cli

_TO = flags.DEFINE_enum("to", None, ["jax", "torch"], "Which way to convert.")
_SOURCE = flags.DEFINE_string("source", None, "Directory to read.")
_TARGET = flags.DEFINE_string("target", None, "Directory to write; must not exist, or be empty.")
flags.mark_flags_as_required(["to", "source", "target"])
_MASK_TOKEN = flags.DEFINE_string(
    "mask_token", None, "With --to=jax: .pth file of the mask token's learned embedding, put into the text encoder."
)
_TEACHER = flags.DEFINE_string(
    "teacher", None, "With --to=jax: Qwen2.5-VL directory to take the semantic teacher's tensors from."
)
_SEED = flags.DEFINE_integer("seed", 0, "Of the tensors that the source lacks, and of what --check samples.")
_AVERAGE = flags.DEFINE_bool("average", True, "Of a run, take the moving average of its parameters where there is one.")
_CHECK = flags.DEFINE_bool(
    "check", False, "Sample generate, edit, compose and caption on both sides and fail if they differ."
)
_PROMPT = flags.DEFINE_string("prompt", None, "With --check: what is sampled.")
_STEPS = flags.DEFINE_integer("steps", 8, "With --check: sampling steps.", lower_bound=1)
_PROGRESS = flags.DEFINE_bool("progress", True, "Show a progress bar.")


def main() -> None:
    # Late: a wrong flag is said without loading JAX.
    from unialign_jax import convert, exports, lineage, storage
    from unialign_jax.convert import configs

    is_run, source = lineage.is_run(_SOURCE.value), lineage.pinned(_SOURCE.value)
    if (_MASK_TOKEN.value or _TEACHER.value) and (is_run or _TO.value == "torch"):
        raise convert.ConversionError("--mask_token and --teacher go with --to=jax and a public directory")
    if _CHECK.value and _TO.value == "jax" and (is_run or _MASK_TOKEN.value):
        raise convert.ConversionError(
            "--check with --to=jax compares with the source in PyTorch, which must be a public directory without "
            "--mask_token; convert the result with --to=torch --check instead"
        )
    public = storage.absolute(_SOURCE.value) / "transformer" / "config.json"
    if _CHECK.value and _TO.value == "jax" and public.exists() and configs.is_sd3(public):
        raise convert.ConversionError(
            f"--check: {_SOURCE.value} is a plain SD3, of which PyTorch has no text head to compare with; convert the "
            "result with --to=torch --check instead"
        )
    if _TO.value == "jax" and is_run:
        report = exports.to_jax(source, _TARGET.value, average=_AVERAGE.value, progress=_PROGRESS.value)
    elif _TO.value == "jax":
        report = convert.to_jax(
            _SOURCE.value,
            _TARGET.value,
            mask_token=_MASK_TOKEN.value,
            teacher=_TEACHER.value,
            seed=_SEED.value,
            progress=_PROGRESS.value,
        )
    else:
        report = exports.to_torch(source, _TARGET.value, average=_AVERAGE.value, progress=_PROGRESS.value)
    print(report)
    if _CHECK.value:
        _check(source)


def _check(source: str) -> None:
    from unialign_jax import convert, storage, torch_check

    ours, theirs = (_TARGET.value, source) if _TO.value == "jax" else (source, _TARGET.value)
    options = {"steps": _STEPS.value, "seed": _SEED.value, "average": _AVERAGE.value}
    prompt = _PROMPT.value or torch_check.PROMPT
    found = torch_check.compare(ours, storage.absolute(theirs), prompt=prompt, **options)
    print("\n".join(map(str, found)))
    if different := [difference.task for difference in found if not difference.same]:
        raise convert.ConversionError(f"{ours} and {theirs} differ in {', '.join(different)}")


if __name__ == "__main__":
    cli.run(main)
