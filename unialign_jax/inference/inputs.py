"""What callers hand in, made into arrays or refused with one clear error, before anything is compiled."""

import contextlib
import hashlib
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from unialign_jax.data import images as image_files
from unialign_jax.data.samples import Cause, Refused
from unialign_jax.models.unialign import check_latent_size
from unialign_jax.networks import Networks

# All items of a request have room for the most that one of them has, each as many tokens as the image itself.
MAX_REFERENCES = 16

ImageLike = Image.Image | np.ndarray | str | os.PathLike


def is_image(value: Any) -> bool:
    """Whether this is one image, not a list of them."""
    return isinstance(value, str | Image.Image | os.PathLike) or (isinstance(value, np.ndarray) and value.ndim <= 3)


def as_list(images: Any, texts: str | Sequence[str], image_name: str, text_name: str) -> list[ImageLike]:
    """The images as a list; one image goes with one text, a list with a list of the same length.

    Raises:
      ValueError: they do not go together.
    """
    single = is_image(images)
    if not single:
        check_list(images, image_name)
    if not isinstance(texts, str):
        check_list(texts, text_name)
    if single != isinstance(texts, str) or (not single and len(images) != len(texts)):
        count = 1 if single else len(images)
        raise ValueError(
            f"{count} {image_name}(s) and {1 if isinstance(texts, str) else len(texts)} {text_name}(s) "
            "do not go together: give one of each, or two lists of one length"
        )
    return [images] if single else list(images)


def _is_list(values: Any) -> bool:
    return values.ndim > 0 if isinstance(values, np.ndarray) else isinstance(values, list | tuple)


def check_list(values: Any, name: str) -> None:
    """Refuses what is neither one of something, which was found before, nor a list of them.

    Raises:
      ValueError: naming it.
    """
    if not _is_list(values):
        raise ValueError(f"{name} is a {type(values).__name__}; expected one {name}, or a list")


def check_texts(texts: str | Sequence[Any], name: str) -> list[str]:
    """One text or several as a list.

    Raises:
      ValueError: the list is empty, or holds something that is no text.
    """
    if isinstance(texts, str):
        texts = [texts]
    check_list(texts, name)
    if not len(texts):
        raise ValueError("there is nothing to do: the list is empty")
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"{name} {index} is a {type(text).__name__}; a text was expected")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{name} {index} is no Unicode text: {error.reason} at {error.start}") from error
    return list(texts)


def check_seeds(seed: int | Sequence[int], count: int) -> np.ndarray:
    """One seed an item, uint32 `[count]`: as given, or `seed + i` of a single one.

    Raises:
      ValueError: another number of seeds, or one outside [0, 2**32).
    """
    if not _is_list(seed) and not isinstance(seed, range):
        check_number("seed", seed, 0, 2**32 - 1, whole=True)
        seed = range(int(seed), int(seed) + count)
    seeds = list(seed)
    whole = all(isinstance(s, int | np.integer) and 0 <= s < 2**32 for s in seeds)
    if len(seeds) != count or not whole:
        raise ValueError(f"{count} item(s) need as many seeds in [0, 2**32), not {seeds[:5]} ({len(seeds)})")
    return np.asarray(seeds, np.uint32)


def check_number(name: str, value: Any, low: float, high: float = math.inf, *, whole: bool = False) -> None:
    """Refuses what is no finite number in [low, high].

    Raises:
      ValueError: naming it.
    """
    kinds = int | np.integer if whole else int | float | np.integer | np.floating
    if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high or math.isinf(value):
        limits = f"of at least {low:g}" if high == math.inf else f"from {low:g} to {high:.10g}"
        raise ValueError(f"{name} is {value!r}; a{' whole' if whole else ''} number {limits} was expected")


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    """Refuses what is none of some values; 1 is not True.

    Raises:
      ValueError: naming the option, its value, and what it can be.
    """
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        raise ValueError(f"{name} is {value!r}; choose of {', '.join(map(repr, choices))}")


def image_size(
    networks: Networks, default: tuple[int, int], size: tuple[int, int] | None, aspect: str | float | None
) -> tuple[int, int]:
    """(height, width) in pixels of a request.

    Args:
      networks: whose patches and position table set the limits.
      default: the size that the model was trained on.
      size: as wanted, or None.
      aspect: width over height, a number or "16:9": the size of this shape with about the default's area, or as much
        of it as the position table holds. None: see `size`.

    Raises:
      ValueError: both are given, or the size is none that the network can make.
    """
    config = networks.transformer.config
    factor = networks.codec.downsample * config.patch_size
    if size is not None and aspect is not None:
        raise ValueError(f"size {size} and aspect {aspect!r} are both given; give one")
    if aspect is not None:
        ratio = check_aspect(aspect)
        cells = math.prod(default) / factor**2
        rows, columns = math.sqrt(cells / ratio), math.sqrt(cells * ratio)
        shrink = min(1.0, config.pos_embed_max_size / max(rows, columns))
        height, width = (max(1, round(extent * shrink)) * factor for extent in (rows, columns))
    else:
        size = default if size is None else size
        whole = _is_list(size) and all(isinstance(extent, int | np.integer) for extent in size)
        if not whole or len(size) != 2:
            raise ValueError(f"size is {size!r}; expected (height, width) in pixels")
        height, width = map(int, size)
    if min(height, width) < factor or height % factor or width % factor:
        raise ValueError(f"image size {height}x{width} must be a positive multiple of {factor} pixels on both sides")
    check_latent_size(config, *networks.latent_shape(height, width)[:2])
    return height, width


def check_aspect(aspect: str | float) -> float:
    """Width over height of "16:9" or 1.5.

    Raises:
      ValueError: it is neither.
    """
    parts = aspect.split(":") if isinstance(aspect, str) else [aspect]
    try:
        numbers = [float(part) for part in parts]
        ratio = numbers[0] / (numbers[1] if len(numbers) > 1 else 1.0)
    except (ValueError, TypeError, ZeroDivisionError):
        ratio = math.nan
    if len(parts) > 2 or not 0 < ratio < math.inf:
        raise ValueError(f"aspect is {aspect!r}; expected width over height, such as '16:9' or 1.5")
    return ratio


def pixels(image: ImageLike, height: int, width: int) -> np.ndarray:
    """A path, a PIL image of any mode, or an array -> uint8 `[height, width, 3]`, scaled to cover and cropped.

    Args:
      image: arrays are uint8 `[H, W, 3]`, `[H, W, 4]` (transparency is laid over white) or `[H, W]` (grey).
      height, width: in pixels.

    Raises:
      ValueError: it is none of these, or no whole image.
      OSError: it is there and can't be read.
    """
    with _told():
        if isinstance(image, str | os.PathLike):
            return image_files.load(os.path.expanduser(image), height, width)
        if isinstance(image, np.ndarray):
            grey = image.ndim == 2
            if image.dtype != np.uint8 or not (grey or (image.ndim == 3 and image.shape[-1] in (3, 4))):
                raise ValueError(
                    f"an image array must be uint8 [H, W, 3], [H, W, 4] or [H, W], not {image.dtype} "
                    f"{list(image.shape)}"
                )
            if not image.size:
                raise ValueError(f"an image array of shape {list(image.shape)} has no pixels")
            image = Image.fromarray(image)
        if isinstance(image, Image.Image) and 0 in image.size:
            raise ValueError(f"an image of {image.width} x {image.height} has no pixels")
        if not isinstance(image, Image.Image):
            raise ValueError(f"an image is a path, a PIL image or an array, not a {type(image).__name__}")
        return _fitted(image, height, width)


def digest(path: str) -> str:
    """Of an image file's bytes: what tells it from another that takes its place.

    Raises:
      ValueError: there is no such file.
      OSError: it is there and can't be read.
    """
    with _told():
        return hashlib.sha256(image_files.read(os.path.expanduser(path))).hexdigest()


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Makes of what is refused within the error that callers are told: ValueError, or OSError where it may pass."""
    try:
        yield
    except Refused as refused:
        if refused.cause == Cause.UNREADABLE_IMAGE:  # by now: it may be readable later
            raise OSError(str(refused)) from refused
        raise ValueError(str(refused)) from refused


def _fitted(image: Image.Image, height: int, width: int) -> np.ndarray:
    try:  # a PIL image is decoded only now
        return image_files.fit(image_files.to_rgb(ImageOps.exif_transpose(image)), height, width)
    except (OSError, SyntaxError) as error:  # Pillow's for files that are cut short or broken
        width, height = image.size
        raise ValueError(f"{image.format or 'PIL'} image of {width} x {height} can't be decoded: {error}") from error


def reference_pixels(references: Sequence[Sequence[ImageLike]], height: int, width: int):
    """References of the items of a request, each with its own number of them.

    Returns:
      uint8 `[B, N, height, width, 3]` with N the largest number, and bool `[B, N]`, False where an item has no such
      reference.

    Raises:
      ValueError, OSError: see `pixels`; or more than `MAX_REFERENCES`.
    """
    room = max(map(len, references))
    if room > MAX_REFERENCES:
        raise ValueError(f"{room} reference images for one image; expected at most {MAX_REFERENCES}")
    stack = np.zeros((len(references), room, height, width, 3), np.uint8)
    mask = np.zeros((len(references), room), bool)
    for i, images in enumerate(references):
        for j, image in enumerate(images):
            stack[i, j], mask[i, j] = pixels(image, height, width), True
    return stack, mask
