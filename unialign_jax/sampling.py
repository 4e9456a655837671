"""What the sampling command does: one request in, files out."""

from collections.abc import Sequence

from etils import epath
from PIL import PngImagePlugin

from unialign_jax.pipeline import UniAlignPipeline

NEEDS_IMAGE = ("edit", "perceive", "compose", "caption", "answer")
NEEDS_PROMPT = ("generate", "edit", "perceive", "compose", "answer")
TEXT_TASKS = ("caption", "answer")


def sample_to_directory(
    checkpoint: epath.PathLike,
    task: str,
    output: epath.PathLike,
    *,
    prompt: str | None = None,
    images: Sequence[str] = (),
    count: int = 1,
    seed: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
    dtype: str = "bfloat16",
    batch: int = 8,
) -> list[str]:
    """Serves one request of `launch/sample.py`.

    For `generate` and `compose`, `count` images are made; for the others one result per input image and repetition.
    Images become `NNN.png` with prompt, seed and task in their PNG text; texts are printed and written to `texts.txt`.

    Returns:
      The written paths, or the texts.

    Raises:
      ValueError: a prompt or an image that the task needs is missing, or one it can't use was given.
      FileNotFoundError: no such checkpoint.
    """
    if (task in NEEDS_PROMPT) != bool(prompt):
        raise ValueError(f"--task={task} {'needs' if task in NEEDS_PROMPT else 'takes no'} --prompt")
    if (task in NEEDS_IMAGE) != bool(images):
        raise ValueError(f"--task={task} {'needs' if task in NEEDS_IMAGE else 'takes no'} --image")
    pipeline = UniAlignPipeline.from_pretrained(checkpoint, dtype=dtype, max_batch=batch)
    options = {"seed": seed} | ({} if steps is None else {"steps": steps})
    if guidance is not None:
        if task in TEXT_TASKS:
            raise ValueError(f"--task={task} takes no --guidance: it makes text")
        options["guidance"] = guidance
    directory = epath.Path(output)
    directory.mkdir(parents=True, exist_ok=True)
    each = [image for image in images for _ in range(count)]
    if task in TEXT_TASKS:
        made = (
            pipeline.caption(each, **options)
            if task == "caption"
            else pipeline.answer(each, [prompt] * len(each), **options)
        )
        (directory / "texts.txt").write_text("".join(f"{text}\n" for text in made))
        for text in made:
            print(text)
        return made
    if task == "generate":
        made = pipeline.generate([prompt] * count, **options)
    elif task == "compose":
        made = pipeline.compose([list(images)] * count, [prompt] * count, **options)
    else:
        made = pipeline.edit(each, [prompt] * len(each), **options)
    paths = []
    for i, image in enumerate(made):
        text = PngImagePlugin.PngInfo()
        for key, value in {"prompt": prompt, "seed": seed + i, "task": task, "checkpoint": checkpoint}.items():
            text.add_itxt(key, str(value))
        path = directory / f"{i:03d}.png"
        with path.open("wb") as file:
            image.save(file, "PNG", pnginfo=text)
        paths.append(str(path))
    print("\n".join(paths))
    return paths
