"""Whether a model computes the same here and in PyTorch: same prompt, same noise, both sides, differences."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable

import jax
import numpy as np
from etils import epath

from unialign_jax.convert import ConversionError
from unialign_jax.inference import programs
from unialign_jax.pipeline import UniAlignPipeline

TOLERANCE = 1e-3  # of latents, which have about unit variance
PROMPT = "a photograph of a red bicycle that leans against a white wall"


@dataclasses.dataclass(frozen=True)
class Difference:
    """One task on both sides.

    Attributes:
      task: what was sampled.
      largest: largest difference of the latents; of text, the number of tokens that differ.
      pixels: largest difference of the images, of 255; None for text.
      limit: what `largest` may be.
    """

    task: str
    largest: float
    pixels: int | None
    limit: float

    @property
    def same(self) -> bool:
        return self.largest <= self.limit

    def __str__(self) -> str:
        verdict = "same" if self.same else "DIFFERENT"
        if self.pixels is None:
            return f"{self.task}: {self.largest:g} tokens differ: {verdict}"
        found = f"latents differ by {self.largest:.2e} (limit {self.limit:g}), pixels by {self.pixels}"
        return f"{self.task}: {found}: {verdict}"


def compare(
    ours: epath.PathLike,
    theirs: epath.PathLike,
    *,
    prompt: str = PROMPT,
    steps: int = 8,
    seed: int = 0,
    average: bool = True,
) -> list[Difference]:
    """Samples generate, edit, compose (two references) and caption on both sides in float32 with the same draws.

    One side is freed before the other is read.

    Args:
      ours: a directory that `UniAlignPipeline.from_pretrained` reads.
      theirs: a local public pipeline directory.
      prompt, steps, seed: of all tasks. The reference images are drawn from the seed.
      average: see `pretrained.load`.

    Raises:
      ConversionError: PyTorch, diffusers or transformers is not installed, or a part is missing.
    """
    try:
        from unialign_jax.convert.torch_pipeline import TorchPipeline
    except ImportError as error:
        raise ConversionError(
            f"the comparison needs PyTorch, diffusers and transformers ({error}): pip install 'unialign_jax[convert]'"
        ) from error
    pipeline = UniAlignPipeline.from_pretrained(ours, dtype="float32", average=average, progress=False)
    tokenizer, networks, size = pipeline.tokenizer, pipeline.networks, pipeline.size
    length = pipeline.text_length
    pictures = np.random.default_rng(seed).integers(0, 256, (2, *size, 3), np.uint8)
    protocol = pipeline.protocol
    image_tasks: dict[str, tuple[Callable, np.ndarray | None, float]] = {
        "generate": (pipeline.generate, None, protocol.generate_guidance),
        "edit": (functools.partial(pipeline.edit, pictures[0]), pictures[None, :1], protocol.edit_guidance),
        "compose": (functools.partial(pipeline.compose, list(pictures)), pictures[None], protocol.edit_guidance),
    }
    finish = programs.image_programs(networks, pipeline.mesh).finish
    made, requests = {}, {}
    for task, (call, references, guidance) in image_tasks.items():
        latents = call(prompt, seed=seed, steps=steps, guidance=guidance, output="latent")
        made[task] = latents, np.asarray(finish(pipeline.params, latents[None])[0])
        requests[task] = references, guidance
    ids = pipeline.caption(pictures[0], seed=seed, steps=steps, fast=False, output="array")
    noise = np.asarray(programs.initial_noise(networks, np.uint32([seed]), size))
    vocabulary = networks.transformer.config.vocab_size
    del pipeline, image_tasks, call  # the parameters with them

    torch_pipeline = TorchPipeline(pathlib.Path(theirs))
    prompt_ids = tokenizer.encode(prompt, length)[None]
    negative_ids = tokenizer.encode(protocol.negative_prompt, length)
    out = []
    for task, (references, guidance) in requests.items():
        latents = torch_pipeline.sample_image(
            noise, prompt_ids, negative_ids, references, steps=steps, guidance=guidance
        )
        our_latents, our_pixels = made[task]
        pixels = int(np.abs(our_pixels.astype(int) - torch_pipeline.decode(latents)[0]).max())
        out.append(Difference(task, float(np.abs(our_latents - latents[0]).max()), pixels, TOLERANCE))

    def uniforms(step: int) -> np.ndarray:
        draw = programs.step_uniforms(jax.random.key(seed), step, (len(ids), vocabulary))
        return np.array(draw)[None]

    caption_ids, learned = tokenizer.encode_prompted(protocol.caption, "", len(ids))
    tokens = torch_pipeline.sample_text(
        pictures[:1],
        caption_ids[None],
        ~learned[None],
        uniforms,
        steps=steps,
        mask_id=tokenizer.mask_id,
        end_id=tokenizer.end_id,
    )
    out.append(Difference("caption", int((tokens[0] != ids).sum()), None, 0))
    return out
