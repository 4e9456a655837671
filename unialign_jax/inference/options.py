"""The options of `UniAlignPipeline`'s methods, stated once."""

from collections.abc import Callable, Sequence
from typing import Literal, TypedDict

import numpy as np

from unialign_jax.inference.presets import Protocol

# `(step, steps, images)`: steps done and in all; estimates of the finished images, uint8 `[H, W, 3]`, by item.
Preview = Callable[[int, int, dict[int, np.ndarray]], None]


class ImageOptions(TypedDict, total=False):
    """Options of the image tasks; what is left out comes from the protocol.

    seed: one per item, or one from which item i takes seed + i. The other items have no part in it.
    steps: Euler steps, up to 1000.
    guidance: classifier-free guidance on the text; 1 is none, less leads towards the negative prompt (public pipelines
      take it for none).
    reference_guidance: guidance on the reference images (InstructPix2Pix's second scale). 1, the default, is the
      published single guidance: the references are there on both sides of it. Other values cost a third evaluation.
    guidance_interval: noise levels at which guidance acts, (0, 1) by default.
    negative_prompt: what guidance leads away from.
    size: (height, width) in pixels; the default is the model's.
    aspect: width over height, "16:9" or 1.5, instead of a size: of about the model's area.
    output: "pil"; "array": uint8 `[H, W, 3]`; "latent": float32 `[h, w, C]`, scaled, not decoded.
    preview: called after every step; the steps are then waited for one by one.
    progress: show a bar with rate and time left; the pipeline's attribute by default.
    protocol: a name in `presets.PROTOCOLS`, by default the model's, or a `presets.Protocol`.
    gather: with several processes, give every process all results (the default). Otherwise each gets its own share, and
      None in the other places.
    """

    seed: int | Sequence[int]
    steps: int
    guidance: float
    reference_guidance: float
    guidance_interval: tuple[float, float]
    negative_prompt: str
    size: tuple[int, int]
    aspect: str | float
    output: Literal["pil", "array", "latent"]
    preview: Preview
    progress: bool
    protocol: str | Protocol
    gather: bool


class TextOptions(TypedDict, total=False):
    """Options of the text tasks; `seed`, `size`, `aspect`, `progress`, `protocol`, `gather` as in `ImageOptions`.

    steps: times of the ancestral sampler, or evaluations of the fast one.
    fast: confidence-ordered parallel decoding, deterministic, and by default in fewer steps.
    output: "text"; "array": ids int32 `[T]`, a question included.
    """

    seed: int | Sequence[int]
    steps: int
    fast: bool
    size: tuple[int, int]
    aspect: str | float
    output: Literal["text", "array"]
    progress: bool
    protocol: str | Protocol
    gather: bool
