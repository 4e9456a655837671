"""`UniAlignPipeline`: the six tasks on one set of weights, from Python.

The same two jitted programs, one for images and one for text, serve every caller (this class, `launch/sample.py`, the
image grids of training). They are compiled once per shape and kept by JAX.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from PIL import Image, ImageOps

from unialign_jax import pretrained
from unialign_jax.batch import to_unit_range
from unialign_jax.data import images as image_files
from unialign_jax.data.samples import Refused
from unialign_jax.data.tokenizer import Tokenizer
from unialign_jax.diffusion import flow_matching, masked_text
from unialign_jax.models.unialign import check_latent_size
from unialign_jax.networks import Networks
from unialign_jax.parallel import constrain

# What the published sampling scripts use.
NEGATIVE_PROMPT = (
    "low quality, blurry, low resolution, backlit, cartoon, animated, deformed, oversaturated, undersaturated, "
    "out of frame"
)
STEPS = 50
GENERATE_GUIDANCE = 7.0
EDIT_GUIDANCE = 9.0
CAPTION_STEPS = 32
QUESTION = "Q: {} Answer the question using a single word or phrase. A:"

ImageLike = Image.Image | np.ndarray | str


@functools.partial(jax.jit, static_argnames=("networks", "size", "steps", "guidance", "interval"))
def _image_program(
    params, keys, ids, negative_ids, references, reference_mask, *, networks, size, steps, guidance, interval
):
    """Keys `[B]`, ids int32 `[B, T]`, negative ids `[T]`, references uint8 `[B, N, H, W, 3]` -> images, uint8."""
    batch = ids.shape[0]
    states = networks.encode_text(params, jnp.concatenate([ids, negative_ids[None]]))
    condition = {"text": states[:batch]}
    if references is not None:
        flat = to_unit_range(references.reshape(-1, *references.shape[2:]))
        latents = networks.encode_images(params, flat)
        condition["references"] = latents.reshape(*references.shape[:2], *latents.shape[1:])
        condition["mask"] = reference_mask
    negative = condition | {"text": jnp.broadcast_to(states[batch:], condition["text"].shape)}
    # Each sample has a key of its own, so its noise does not depend on the batch it sits in.
    noise = jax.vmap(lambda key: jax.random.normal(key, networks.latent_shape(*size)))(keys)

    def velocity(latents, times, condition):
        return networks.denoise(
            params,
            latents,
            condition["text"],
            times,
            references=condition.get("references"),
            reference_mask=condition.get("mask"),
            want_text=False,
        ).image

    sigmas = flow_matching.euler_sigmas(steps)
    latents = flow_matching.sample(
        velocity,
        noise,
        condition,
        sigmas,
        negative=negative,
        guidance_scale=guidance,
        guidance_interval=interval,
    )
    pixels = networks.decode_images(params, latents)
    images = jnp.round((jnp.clip(pixels, -1, 1) + 1) * 127.5).astype(jnp.uint8)
    return constrain(images, None, None, None, None)  # whole on every device: each process of a run reads them


@functools.partial(jax.jit, static_argnames=("networks", "steps", "fast", "mask_id", "end_id"))
def _text_program(params, keys, images, ids, known, *, networks, steps, fast, mask_id, end_id):
    """Images uint8 `[B, H, W, 3]`, prompt ids int32 `[B, T]` where `known` -> int32 `[B, T]`, cut at the first end."""
    latents = networks.encode_images(params, to_unit_range(images))
    vocabulary = networks.transformer.config.vocab_size

    def logits(ids):
        states = networks.encode_text(params, ids)
        return networks.denoise(params, latents, states, jnp.zeros(len(ids)), want_image=False).text_logits

    def uniforms(step):
        draw = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, step), (ids.shape[1], vocabulary)))
        return draw(keys)

    if fast:
        tokens = masked_text.sample_confident(logits, ids, known, num_steps=steps, mask_id=mask_id)
    else:
        tokens = masked_text.sample_ancestral(logits, ids, known, uniforms, num_steps=steps, mask_id=mask_id)
    return constrain(masked_text.cut_at_end(tokens, known, end_id), None, None)


class UniAlignPipeline:
    """Images and text from one model. Every method takes one item or a list, and answers in kind.

    Attributes:
      networks, params: the model; `params` holds all networks by name.
      tokenizer: of the text encoder.
      text_length: T, the number of tokens of every text.
      size: (height, width) in pixels of images where a call gives none.
      max_batch: most items worked on at once; longer lists are cut up, shorter ones padded to a power of two.
    """

    def __init__(
        self,
        networks: Networks,
        params: dict[str, Any],
        tokenizer: Tokenizer,
        *,
        text_length: int,
        size: tuple[int, int],
        max_batch: int = 8,
    ):
        self.networks, self.params, self.tokenizer = networks, params, tokenizer
        self.text_length, self.size, self.max_batch = text_length, size, max_batch

    @classmethod
    def from_pretrained(
        cls, directory: epath.PathLike, *, dtype: str = "bfloat16", average: bool = True, max_batch: int = 8
    ) -> "UniAlignPipeline":
        """Reads a checkpoint of any kind: a run's stage directory, one of its steps, or a converted directory.

        Args:
          directory: local or `gs://`.
          dtype: compute dtype, "bfloat16" or "float32".
          average: of a run, take the moving average of the parameters where there is one.
          max_batch: see the class.

        Raises:
          FileNotFoundError, ValueError: what is wrong with the directory, and what was expected.
        """
        model = pretrained.load(directory, dtype=dtype, average=average)
        return cls(
            model.networks,
            model.params,
            model.tokenizer,
            text_length=model.text_length,
            size=model.size,
            max_batch=max_batch,
        )

    def generate(self, prompt: str | Sequence[str], **options) -> Image.Image | list[Image.Image]:
        """Text -> image. See `_images` for the options; guidance 7 and 50 steps by default, as published."""
        return self._images(prompt, None, **{"guidance": GENERATE_GUIDANCE} | options)

    def edit(
        self, image: ImageLike | Sequence[ImageLike], instruction: str | Sequence[str], **options
    ) -> Image.Image | list[Image.Image]:
        """Image and instruction -> image; guidance 9 by default, as published. Perception is an edit by its words."""
        references = [[item] for item in _as_list(image, instruction, "image", "instruction")]
        return self._images(instruction, references, **{"guidance": EDIT_GUIDANCE} | options)

    perceive = edit

    def compose(
        self, images: Sequence[ImageLike] | Sequence[Sequence[ImageLike]], prompt: str | Sequence[str], **options
    ) -> Image.Image | list[Image.Image]:
        """One or more reference images and a prompt -> image; a list of lists for a list of prompts."""
        references = [list(images)] if isinstance(prompt, str) else [list(item) for item in images]
        return self._images(prompt, references, **{"guidance": EDIT_GUIDANCE} | options)

    def caption(self, image: ImageLike | Sequence[ImageLike], **options) -> str | list[str]:
        """Image -> text. See `_texts` for the options."""
        return self._texts(image, None, **options)

    def answer(
        self, image: ImageLike | Sequence[ImageLike], question: str | Sequence[str], **options
    ) -> str | list[str]:
        """Image and question -> a word or phrase, under the published protocol (`QUESTION`)."""
        _as_list(image, question, "image", "question")
        return self._texts(image, question, **options)

    def _images(
        self,
        prompt: str | Sequence[str],
        references: list[list[ImageLike]] | None,
        *,
        seed: int | Sequence[int] = 0,
        steps: int = STEPS,
        guidance: float,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        negative_prompt: str = NEGATIVE_PROMPT,
        size: tuple[int, int] | None = None,
    ) -> Image.Image | list[Image.Image]:
        """The image tasks.

        Args:
          prompt: what the image is of, or what to do.
          references: per item its reference images, or None; fewer than the batch's largest number are masked.
          seed: one per item, or one from which item i takes seed + i.
          steps: Euler steps.
          guidance: classifier-free guidance; 1 is none.
          guidance_interval: noise levels at which it acts.
          negative_prompt: what guidance steers away from.
          size: (height, width) in pixels.

        Raises:
          ValueError: an empty list, lists of different lengths, a size or seed that cannot be; before any compilation.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        height, width = self._checked_size(size)
        seeds = _seeds(seed, len(prompts))
        if references is not None and (len(references) != len(prompts) or not all(references)):
            raise ValueError(
                f"{len(prompts)} prompt(s) came with {[len(r) for r in references]} reference image(s); "
                "each prompt needs a list of at least one"
            )
        ids = np.stack([self.tokenizer.encode(text, self.text_length) for text in prompts])
        negative_ids = self.tokenizer.encode(negative_prompt, self.text_length)
        pixels = mask = None
        if references is not None:
            room = max(map(len, references))
            pixels = np.zeros((len(prompts), room, height, width, 3), np.uint8)
            mask = np.zeros((len(prompts), room), bool)
            for i, images in enumerate(references):
                for j, image in enumerate(images):
                    pixels[i, j], mask[i, j] = _pixels(image, height, width), True

        def run(keys, ids, *pictures):
            pictures = pictures or (None, None)
            return _image_program(
                self.params,
                keys,
                ids,
                negative_ids,
                *pictures,
                networks=self.networks,
                size=(height, width),
                steps=steps,
                guidance=float(guidance),
                interval=tuple(guidance_interval),
            )

        out = self._in_batches(run, seeds, ids, *(() if pixels is None else (pixels, mask)))
        made = [Image.fromarray(item) for item in out]
        return made[0] if isinstance(prompt, str) else made

    def _texts(
        self,
        image: ImageLike | Sequence[ImageLike],
        question: str | Sequence[str] | None,
        *,
        seed: int | Sequence[int] = 0,
        steps: int = CAPTION_STEPS,
        fast: bool = False,
        size: tuple[int, int] | None = None,
    ) -> str | list[str]:
        """The text tasks.

        Args:
          image: resized and cropped to `size`.
          question: None for a caption.
          seed: as for images.
          steps: of the ancestral sampler (published: 32 for captions), or of the fast one.
          fast: confidence-ordered parallel decoding, which takes 8 to 16 steps and is deterministic.
          size: (height, width) in pixels.

        Raises:
          ValueError: as for images.
        """
        single = _is_image(image)
        images = [image] if single else list(image)
        height, width = self._checked_size(size)
        seeds = _seeds(seed, len(images))
        pixels = np.stack([_pixels(item, height, width) for item in images])
        if question is None:
            ids = np.zeros((len(images), self.text_length), np.int32)
            known = np.zeros(ids.shape, bool)
        else:
            questions = [question] if single else list(question)
            pairs = [self.tokenizer.encode_prompted(QUESTION.format(q), "", self.text_length) for q in questions]
            ids, known = np.stack([pair[0] for pair in pairs]), ~np.stack([pair[1] for pair in pairs])

        def run(keys, pixels, ids, known):
            return _text_program(
                self.params,
                keys,
                pixels,
                ids,
                known,
                networks=self.networks,
                steps=steps,
                fast=fast,
                mask_id=self.tokenizer.mask_id,
                end_id=self.tokenizer.end_id,
            )

        tokens = self._in_batches(run, seeds, pixels, ids, known)
        texts = [self.tokenizer.decode(row[~prompt]) for row, prompt in zip(tokens, known, strict=True)]
        return texts[0] if single else texts

    def _in_batches(self, run, seeds: Sequence[int], *arrays: np.ndarray) -> np.ndarray:
        """Runs a program on slices of at most `max_batch` items, padded by repetition to a power of two."""
        out = []
        for start in range(0, len(seeds), self.max_batch):
            part = [array[start : start + self.max_batch] for array in (np.asarray(seeds, np.uint32), *arrays)]
            count = len(part[0])
            padded = 1 << (count - 1).bit_length()
            part = [np.concatenate([a, np.repeat(a[-1:], padded - count, axis=0)]) for a in part]
            keys = jax.vmap(jax.random.key)(part[0])
            out.append(np.asarray(run(keys, *part[1:]))[:count])
        return np.concatenate(out)

    def _checked_size(self, size: tuple[int, int] | None) -> tuple[int, int]:
        height, width = size or self.size
        factor = self.networks.codec.downsample * self.networks.transformer.config.patch_size
        if min(height, width) < factor or height % factor or width % factor:
            raise ValueError(
                f"image size {height}x{width} must be a positive multiple of {factor} pixels on both sides"
            )
        check_latent_size(self.networks.transformer.config, *self.networks.latent_shape(height, width)[:2])
        return height, width


def _is_image(value: Any) -> bool:
    return isinstance(value, str | Image.Image | epath.Path) or (isinstance(value, np.ndarray) and value.ndim <= 3)


def _as_list(images: Any, texts: str | Sequence[str], image_name: str, text_name: str) -> list:
    """The images as a list; one image goes with one text, a list with a list of the same length."""
    single = _is_image(images)
    if single != isinstance(texts, str) or (not single and len(images) != len(texts)):
        count = 1 if single else len(images)
        raise ValueError(
            f"{count} {image_name}(s) and {1 if isinstance(texts, str) else len(texts)} {text_name}(s) "
            "do not go together: give one of each, or two lists of one length"
        )
    return [images] if single else list(images)


def _seeds(seed: int | Sequence[int], count: int) -> list[int]:
    seeds = [seed + i for i in range(count)] if isinstance(seed, int | np.integer) else list(seed)
    if not count:
        raise ValueError("there is nothing to do: the list is empty")
    if len(seeds) != count or not all(0 <= s < 2**32 for s in seeds):
        raise ValueError(f"{count} item(s) need as many seeds in [0, 2**32), not {seeds[:5]} ({len(seeds)})")
    return seeds


def _pixels(image: ImageLike, height: int, width: int) -> np.ndarray:
    """A path, a PIL image of any mode, or uint8 `[H, W, 3]` -> uint8 `[height, width, 3]`."""
    if isinstance(image, str | epath.Path):
        try:
            return image_files.load(str(image), height, width)
        except Refused as refused:
            raise ValueError(f"image {refused}") from refused
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
            raise ValueError(f"an image array must be uint8 [H, W, 3], not {image.dtype} {list(image.shape)}")
        image = Image.fromarray(image)
    return image_files.fit(image_files.to_rgb(ImageOps.exif_transpose(image)), height, width)
