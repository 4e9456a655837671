"""From SD3 and D-DiT to UniAlignment: what is renamed, what is dropped, what has to be initialised.

SD3-medium's last block has no text half of its own: its text tokens only serve as keys and values, are normed by an
"adaLN continuous" (scale, then shift), and go no further. Its transformer gives an image and nothing else. All that the
two share is copied. What is new starts so that the image which SD3's weights compute does not change:

- the last block's text modulation gets SD3's shift and scale before attention (in our order: shift, then scale); the
  gates and the MLP's modulation are zero (adaLN-Zero, DiT section 3.2), so text tokens pass through that block
  unchanged at first, and its output projection and MLP, drawn at random, come in as training opens the gates;
- the text head, the semantic adapters and the null tokens are drawn as for training from scratch.

D-DiT has UniAlignment's tensors but for the adapters.
"""

import dataclasses
import re
import zlib
from collections.abc import Mapping

import numpy as np

from unialign_jax.convert.tensors import MadeTensor, Tensor

_RENAMED = {"norm_out.linear.": "image_norm_out.linear.", "proj_out.": "image_proj_out."}
_DROPPED = "time_text_embed.text_embedder."  # SD3's pooled CLIP text
_ADAPTERS = ("siglip_adapter_img.", "siglip_adapter_text.")


@dataclasses.dataclass(frozen=True)
class Completed:
    """A transformer's tensors under UniAlignment's names.

    Attributes:
      tensors: by name.
      initialised: names of the tensors that the source does not hold, or holds only in part.
      dropped: names of the source's tensors that have no place.
    """

    tensors: dict[str, Tensor]
    initialised: tuple[str, ...]
    dropped: tuple[str, ...]


def lacks_adapters(tensors: Mapping[str, Tensor]) -> bool:
    """Whether a checkpoint has no semantic adapters at all, as those of SD3 and D-DiT."""
    return not any(name.startswith(_ADAPTERS) for name in tensors)


def complete_sd3(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple], num_layers: int, seed: int) -> Completed:
    """Completes an SD3 transformer.

    Args:
      tensors: as stored.
      shapes: UniAlignment's names and shapes.
      num_layers: number of blocks.
      seed: of what is drawn.
    """
    last = f"transformer_blocks.{num_layers - 1}."
    result: dict[str, Tensor] = {}
    dropped, widened = [], []
    for name, tensor in tensors.items():
        prefix = next((p for p in _RENAMED if name.startswith(p)), None)
        if prefix is not None:
            name = _RENAMED[prefix] + name.removeprefix(prefix)
        if name.startswith(_DROPPED):
            dropped.append(name)
            continue
        if name.startswith(f"{last}norm1_context.linear.") and tensor.shape[0] * 3 == shapes.get(name, (0,))[0]:
            tensor = _six_vectors(tensor)
            widened.append(name)
        result[name] = tensor
    new = (f"{last}attn.to_add_out.", f"{last}ff_context.", "text_proj_out.", "null_image_embd", *_ADAPTERS)
    drawn = _draw(result, shapes, new, seed)
    return Completed({**result, **drawn}, (*widened, *drawn), tuple(dropped))


def complete_adapters(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple], seed: int) -> Completed:
    """Completes a D-DiT transformer. Arguments as of `complete_sd3`."""
    drawn = _draw(tensors, shapes, _ADAPTERS, seed)
    return Completed({**tensors, **drawn}, tuple(drawn), ())


def _six_vectors(source: Tensor) -> Tensor:
    """[scale, shift] of adaLN continuous -> [shift, scale, 0, 0, 0, 0] of a block's modulation."""

    def make(start: int, stop: int) -> np.ndarray:
        scale, shift = np.split(source.read(), 2)
        return np.concatenate([shift, scale, *[np.zeros_like(scale)] * 4])[start:stop]

    return MadeTensor((3 * source.shape[0], *source.shape[1:]), source.dtype, make)


def _draw(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple], new: tuple[str, ...], seed: int) -> dict:
    absent = [name for name in shapes if name.startswith(new) and name not in tensors]
    return {name: _drawn(name, shapes[name], _dtype_beside(name, tensors), seed) for name in absent}


def _drawn(name: str, shape: tuple[int, ...], dtype: np.dtype, seed: int) -> Tensor:
    """The initial values of training from scratch: Glorot-uniform kernels, zero biases, null tokens of unit length.

    Each tensor has its own stream of random numbers, so it does not depend on which others are drawn.
    """

    def make(start: int, stop: int) -> np.ndarray:
        random = np.random.default_rng([seed, zlib.crc32(name.encode())])
        if name == "null_image_embd":
            values = random.standard_normal(shape, np.float32) * shape[-1] ** -0.5
        elif len(shape) == 1:
            values = np.zeros(shape, np.float32)
        else:
            values = (random.random(shape, np.float32) * 2 - 1) * (6 / sum(shape)) ** 0.5
        return values[start:stop]

    return MadeTensor(shape, dtype, make)


def _dtype_beside(name: str, tensors: Mapping[str, Tensor]) -> np.dtype:
    """The dtype of the tensor that will share a stacked leaf with this one, or of the patch embedding."""
    for neighbour in (re.sub(r"^transformer_blocks\.\d+\.", "transformer_blocks.0.", name), "pos_embed.proj.weight"):
        if neighbour in tensors:
            return tensors[neighbour].dtype
    return np.dtype(np.float32)
