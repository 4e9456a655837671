"""Encoded images of any common kind -> uint8 RGB pixels of one size.

Unusual pixels are converted (palette, greyscale, 16 bits, CMYK, transparency, camera orientation); files that are not
whole images are refused by cause, never completed with guesses.
"""

import contextlib
import errno
import functools
import io
from collections.abc import Callable, Iterator
from typing import IO

import numpy as np
from etils import epath
from PIL import Image

from unialign_jax import storage
from unialign_jax.data.samples import Cause, Refused

# Named, so that none of Pillow's other readers (EPS runs an interpreter) is ever reached by training data.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")
# About 270 MB of RGB; larger ones are a mistake or an attack (a "decompression bomb").
MAX_PIXELS = 89_478_485

# How JPEG, PNG, GIF and TIFF files begin.
_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"II*\0", b"MM\0*")
_LONGEST_SIGNATURE = max(map(len, _SIGNATURES))
_ORIENTATION_TAG = 0x0112
# EXIF orientation -> what undoes it; 1 is upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_TURNED = (5, 6, 7, 8)  # those that exchange height and width
_CUT_SHORT = ("truncated", "not enough", "eof", "end of file")
_LONGEST_SHOWN = 300
_NO_FILE = (errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES, errno.EPERM)  # what no later attempt changes
_TIFF_WIDTH, _TIFF_HEIGHT = 256, 257
_PNG_SIGNATURE_BYTES = 8
# The texts of a PNG in which Pillow looks for an orientation, besides its chunk of EXIF.
_PNG_KEYWORDS = (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0", b"xmp\0")
_LONGEST_KEYWORD = max(map(len, _PNG_KEYWORDS))


def load(source: str | bytes, height: int, width: int) -> np.ndarray:
    """`read`, `decode` and `fit` in one: an image file (its path, or its bytes) as uint8 `[height, width, 3]`.

    Raises:
      Refused: see those; the detail names the file.
    """
    data = _bytes(source)
    with _named(source):
        return fit(decode(data), height, width)


def checked(source: str | bytes) -> bytes:
    """The bytes of an image file that `decode` can use.

    Raises:
      Refused: see `read` and `decode`; the detail names the file.
    """
    data = _bytes(source)
    with _named(source):
        decode(data)
    return data


def upright_size(source: str | bytes) -> tuple[int, int]:
    """Height and width in pixels of the image that `decode` would make, with no pixel decoded if it can be helped.

    Only a PNG with EXIF or XMP behind its pixels is decoded.

    Raises:
      Refused: there is no such file, it can't be read, or it does not begin like an image.
    """
    with io.BytesIO(source) if isinstance(source, bytes) else _open(source) as file, _named(source):
        image = _header(file)
        if image.format == "TIFF":  # whose size Pillow, in some versions, has turned already
            width, height = image.tag_v2[_TIFF_WIDTH], image.tag_v2[_TIFF_HEIGHT]
        else:
            width, height = image.size
        getexif = image.getexif
        if image.format == "PNG" and not _has_exif_behind_pixels(file):
            # The reader of PNG would decode the image, in search of what is not there.
            getexif = functools.partial(Image.Image.getexif, image)
        turned = _orientation(getexif) in _TURNED
    return (width, height) if turned else (height, width)


def read(path: str) -> bytes:
    """The bytes of a file, local or `gs://`.

    Raises:
      Refused: there is no such file, or it can't be read.
    """
    with _open(path) as file:
        return file.read()


@contextlib.contextmanager
def _open(path: str) -> Iterator[IO[bytes]]:
    name = _shown(path)
    try:
        if "://" in path and not path.startswith("gs://"):  # `epath` knows more stores, which are not set up
            raise KeyError(path)
        place = epath.Path(path)
    except KeyError:
        raise Refused(Cause.MISSING_IMAGE, f"{name}: expected a local path or gs://") from None
    try:
        # Of a remote file Pillow's many small reads would each be a request.
        with io.BytesIO(storage.read(place)) if storage.is_remote(path) else place.open("rb") as file:
            yield file
    except Refused:
        raise
    except (FileNotFoundError, NotADirectoryError):
        raise Refused(Cause.MISSING_IMAGE, f"{name}: no such file") from None
    except Exception as error:
        if "://" in path:  # whatever the store's client raises: an outage, a request too many
            raise Refused(Cause.UNREADABLE_IMAGE, f"{name}: {type(error).__name__}: {error}") from None
        if isinstance(error, ValueError):  # a NUL or half a surrogate pair: no file can be called that
            raise Refused(Cause.MISSING_IMAGE, f"{name} is not a file name ({error})") from None
        if isinstance(error, OSError):
            cause = Cause.MISSING_IMAGE if error.errno in _NO_FILE else Cause.UNREADABLE_IMAGE
            raise Refused(cause, f"{name}: {error.strerror or error}") from None
        raise


def _shown(path: str) -> str:
    """A path in a message; what stands in its place may be a whole image."""
    return repr(path if len(path) <= _LONGEST_SHOWN else f"{path[:_LONGEST_SHOWN]}…")


def decode(data: bytes) -> Image.Image:
    """The image in `data` (one of `FORMATS`; of an animation the first frame), upright, as 8-bit RGB.

    The EXIF orientation is applied; transparency is laid over white; 16-bit samples are scaled by 255/65535, rounded;
    CMYK and the rest go through Pillow's `convert('RGB')`, without colour profiles, as published.

    Raises:
      Refused: not an image, truncated, corrupt, of more than `MAX_PIXELS`, or with samples of no stated range.
    """
    image = _header(io.BytesIO(data))
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise Refused(Cause.IMAGE_TOO_LARGE, f"{width} x {height} is over the limit of {MAX_PIXELS} pixels")
    try:
        image.load()
        upright = _UPRIGHT.get(_orientation(image.getexif))
        return to_rgb(image if upright is None else image.transpose(upright))
    except (Refused, MemoryError):
        raise
    except Exception as error:
        cut = any(words in str(error).lower() for words in _CUT_SHORT)
        cause = Cause.TRUNCATED_IMAGE if cut else Cause.CORRUPT_IMAGE
        raise Refused(cause, f"{image.format} of {width} x {height}: {error}") from error


def fit(image: Image.Image, height: int, width: int) -> np.ndarray:
    """Resizes (bicubic, antialiased) until `height` x `width` is just covered, then crops the centre.

    For a square this is the published transform, shorter side to the size and centre crop, up to Pillow's rounding
    between its two passes. Only what is inside the crop is computed, so a thin strip of an image costs no more memory.

    Args:
      image: RGB.
      height, width: in pixels.

    Returns:
      uint8 `[height, width, 3]`.
    """
    full_width, full_height = image.size
    if full_width * height >= full_height * width:
        scaled_width, scaled_height = full_width * height // full_height, height
    else:
        scaled_width, scaled_height = width, full_height * width // full_width
    left, top = round((scaled_width - width) / 2), round((scaled_height - height) / 2)
    x_scale, y_scale = full_width / scaled_width, full_height / scaled_height
    box = (left * x_scale, top * y_scale, (left + width) * x_scale, (top + height) * y_scale)
    # Rounding may leave the last corner 1e-13 outside the image, which Pillow refuses.
    box = (*box[:2], min(box[2], full_width), min(box[3], full_height))
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC, box=box))


def _bytes(source: str | bytes) -> bytes:
    return read(source) if isinstance(source, str) else source


@contextlib.contextmanager
def _named(source: str | bytes) -> Iterator[None]:
    """Puts the path, where there is one, before what is said of the file's content."""
    try:
        yield
    except Refused as refused:
        if isinstance(source, bytes):
            raise
        raise Refused(refused.cause, f"{_shown(source)}: {refused.detail}") from refused.__cause__


def _header(file: IO[bytes]) -> Image.Image:
    """What Pillow makes of the beginning of a file, with nothing decoded."""
    start = file.read(_LONGEST_SIGNATURE)
    if not start:
        raise Refused(Cause.TRUNCATED_IMAGE, "the file is empty")
    file.seek(0)
    try:
        return Image.open(file, formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise Refused(Cause.IMAGE_TOO_LARGE, str(error)) from None
    except MemoryError:
        raise
    except Exception as error:  # Pillow's readers raise nearly anything on bytes they don't understand
        if _is_failed_read(error):
            raise
        size = file.seek(0, io.SEEK_END)
        if start.startswith(_SIGNATURES):
            raise Refused(Cause.CORRUPT_IMAGE, f"{size} bytes with a header that is cut short or broken") from error
        raise Refused(Cause.NOT_AN_IMAGE, f"{size} bytes that are none of {', '.join(FORMATS)}") from error


def _orientation(getexif: Callable[[], Image.Exif]) -> int:
    try:
        return int(getexif().get(_ORIENTATION_TAG, 1))
    except Exception as error:  # a broken EXIF block, on which Pillow raises nearly anything, does not spoil the pixels
        if _is_failed_read(error):
            raise
        return 1


def _has_exif_behind_pixels(file: IO[bytes]) -> bool:
    """Whether what may hold an orientation stands behind the pixels of a PNG. Leaves the file where it was."""
    position, found, pixels = file.tell(), False, False
    file.seek(_PNG_SIGNATURE_BYTES)
    while len(head := file.read(8)) == 8 and not found:
        length, kind = int.from_bytes(head[:4]), head[4:]
        begin = file.read(min(length, _LONGEST_KEYWORD))
        pixels |= kind == b"IDAT"
        found = pixels and (kind == b"eXIf" or begin.startswith(_PNG_KEYWORDS))
        file.seek(length - len(begin) + 4, io.SEEK_CUR)  # 4: the checksum
    file.seek(position)
    return found


def _is_failed_read(error: Exception) -> bool:
    """Whether the system has raised it: Pillow's own errors of that class, about what it has read, have no number."""
    return isinstance(error, OSError) and error.errno is not None


def to_rgb(image: Image.Image) -> Image.Image:
    """A decoded image of any mode as 8-bit RGB, see `decode`; RGB images are returned as they are.

    Raises:
      Refused: samples of no stated range.
    """
    if image.mode.startswith(("I", "F")):
        return _deep_to_rgb(image)
    transparent = image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info
    if transparent:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy it


def _deep_to_rgb(image: Image.Image) -> Image.Image:
    """Greyscale of 16 bits (modes I;16*, and I, which some files use for it) to RGB; floats have no stated range."""
    samples = np.asarray(image)
    if image.mode == "F" or samples.min() < 0 or samples.max() > 65535:
        detail = f"mode {image.mode!r} with samples from {samples.min()} to {samples.max()}, expected 0 to 65535"
        raise Refused(Cause.UNSUPPORTED_PIXELS, f"{detail}; save it with 8 or 16 bits per sample")
    grey = (samples.astype(np.uint32) * 255 + 32767) // 65535
    if (transparent := image.info.get("transparency")) is not None:  # one grey level of a PNG
        grey[samples == transparent] = 255
    return Image.fromarray(grey.astype(np.uint8)).convert("RGB")


def image_grid(images: np.ndarray, columns: int) -> np.ndarray:
    """Lays uint8 images `[N, H, W, C]` out row by row with a black line between: uint8 `[rows * (H+1) - 1, ..., C]`.

    A last row that is not full is filled with black.
    """
    count, height, width, channels = images.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    grid = np.zeros((rows * columns, height + 1, width + 1, channels), np.uint8)
    grid[:count, :height, :width] = images
    grid = grid.reshape(rows, columns, height + 1, width + 1, channels).swapaxes(1, 2)
    return grid.reshape(rows * (height + 1), columns * (width + 1), channels)[:-1, :-1]
