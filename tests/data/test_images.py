"""Image decoding and fitting, against Pillow's plain operations and hand-written files."""

import errno
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps, JpegImagePlugin, PngImagePlugin

from unialign_jax.data import images
from unialign_jax.data.samples import Cause, Refused


@pytest.fixture
def photo():
    """An RGB image without symmetries, smooth with some texture: [37, 61]."""
    y, x = np.mgrid[:37, :61]
    noise = np.random.default_rng(0).normal(0, 4, (37, 61, 3))
    pixels = np.stack([4 * x, 6 * y, 120 + 50 * np.sin((x + 2 * y) / 9)], -1) + noise
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def encode(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def chunk(kind, data):
    """Of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, depth, colour_type, raw=b"", before=b""):
    """A PNG written by hand, unfiltered rows of big-endian samples; `before` are chunks before these."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + before + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")


def decoded(data):
    return np.asarray(images.decode(data)).astype(int)


def refusal(call, *arguments):
    with pytest.raises(Refused) as caught:
        call(*arguments)
    return caught.value


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "PPM", "WEBP", "JPEG2000"])
def test_lossless_formats_keep_every_pixel(photo, format):
    options = {"WEBP": {"lossless": True}, "JPEG2000": {"irreversible": False}}.get(format, {})
    np.testing.assert_array_equal(decoded(encode(photo, format, **options)), np.asarray(photo))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(photo, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(photo, "JPEG", exif=exif, quality=95)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    np.testing.assert_array_equal(decoded(data), np.asarray(expected))
    assert images.decode(data).size == ((61, 37) if orientation < 5 else (37, 61))


@pytest.mark.parametrize("orientation", [1, 3, 6, 7, 9])
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "JPEG2000"])
def test_the_measured_size_is_that_of_the_decoded_image(photo, tmp_path, format, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(photo, format, exif=exif)
    height, width = images.decode(data).size[::-1]
    assert images.upright_size(data) == (height, width)
    turned = orientation in (6, 7) and format in ("JPEG", "PNG", "WEBP", "TIFF")  # the others hold no EXIF
    assert (height, width) == ((61, 37) if turned else (37, 61))
    (tmp_path / "file").write_bytes(data)
    assert images.upright_size(str(tmp_path / "file")) == (height, width)


XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'


def test_an_orientation_behind_the_pixels_of_a_png_is_found(photo, monkeypatch):
    decodings = []
    load = PngImagePlugin.PngImageFile.load
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", lambda self: decodings.append(1) or load(self))
    data, end = encode(photo)[:-12], encode(photo)[-12:]
    exif = Image.Exif()
    exif[0x0112] = 6
    text = (b"tEXt", b"date:create\0" + b"2024-01-01")
    for behind, turned in [
        ([], False),
        ([text], False),
        ([text, (b"eXIf", exif.tobytes())], True),
        ([(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP)], True),
    ]:
        file = data + b"".join(chunk(*content) for content in behind) + end
        decodings.clear()
        assert images.upright_size(file) == ((61, 37) if turned else (37, 61))
        assert bool(decodings) == turned  # all others are measured by their chunks' headers
        assert images.upright_size(file) == images.decode(file).size[::-1]
        assert images.upright_size(file[:-40]) in ((61, 37), (37, 61))


def test_a_tiff_whose_orientation_is_in_its_xmp(photo):
    data = encode(photo, "TIFF", tiffinfo={700: XMP})
    assert images.decode(data).size == (37, 61) and images.upright_size(data) == (61, 37)


def test_a_read_that_fails_is_no_fault_of_the_image(photo, tmp_path, monkeypatch):
    (tmp_path / "a.jpg").write_bytes(encode(photo, "JPEG"))

    def broken(self, fp, filename=None):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(JpegImagePlugin.JpegImageFile, "__init__", broken)
    refused = refusal(images.upright_size, str(tmp_path / "a.jpg"))
    assert refused.cause is Cause.UNREADABLE_IMAGE and "a.jpg': Input/output error" in refused.detail


def test_a_broken_exif_block_does_not_lose_the_image(photo):
    good = encode(photo, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x03\0\0\0\0\0\0")
    bad = good.replace(b"MM\0*", b"XX\xff*")
    assert bad != good
    assert images.decode(bad).size == (61, 37)


def test_cmyk_jpeg_becomes_rgb(photo):
    cmyk = photo.convert("CMYK")
    data = encode(cmyk, "JPEG", quality=95)
    assert Image.open(io.BytesIO(data)).mode == "CMYK"
    assert np.abs(decoded(data) - np.asarray(photo)).mean() < 8


def test_palette_greyscale_and_one_bit(photo):
    palette = photo.quantize(32)
    np.testing.assert_array_equal(decoded(encode(palette)), np.asarray(palette.convert("RGB")))
    grey = photo.convert("L")
    np.testing.assert_array_equal(decoded(encode(grey)), np.repeat(np.asarray(grey)[..., None], 3, -1))
    bits = photo.convert("1")
    np.testing.assert_array_equal(decoded(encode(bits))[..., 0], np.asarray(bits) * 255)


def test_an_animation_gives_its_first_frame(photo):
    frames = [photo.quantize(64), ImageOps.mirror(photo).quantize(64)]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(decoded(data), np.asarray(frames[0].convert("RGB")))


def test_transparency_is_laid_over_white(photo):
    alpha = np.linspace(0, 255, 61).astype(np.uint8)[None].repeat(37, 0)
    rgb = np.asarray(photo).astype(float)
    expected = rgb * (alpha[..., None] / 255) + 255 * (1 - alpha[..., None] / 255)
    rgba = Image.fromarray(np.dstack([np.asarray(photo), alpha]))
    assert np.abs(decoded(encode(rgba)) - expected).max() <= 1
    grey = Image.merge("LA", (photo.convert("L"), Image.fromarray(alpha)))
    assert decoded(encode(grey))[:, 0].min() == 255  # fully transparent column
    # One palette entry, and one grey level, declared transparent.
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    palette.putpalette([10, 20, 30, 40, 50, 60])
    np.testing.assert_array_equal(decoded(encode(palette, transparency=0)), [[[255] * 3, [40, 50, 60]]])
    level = Image.fromarray(np.array([[7, 9]], np.uint8))
    np.testing.assert_array_equal(decoded(encode(level, transparency=7)), [[[255] * 3, [9] * 3]])
    deep = png(3, 1, 16, 0, b"\0" + np.array([0, 128, 65535], ">u2").tobytes(), chunk(b"tRNS", bytes(2)))
    np.testing.assert_array_equal(decoded(deep), [[[255] * 3, [0] * 3, [255] * 3]])


def test_sixteen_bit_samples_are_scaled_not_clipped():
    values = np.array([[0, 128, 129, 257, 300, 32896, 65407, 65535]], np.uint16)
    raw = b"\0" + values.astype(">u2").tobytes()
    expected = np.round(values / 257).astype(int)
    for data in (png(8, 1, 16, 0, raw), encode(Image.fromarray(values), "TIFF")):
        np.testing.assert_array_equal(decoded(data), expected[..., None].repeat(3, -1))
    # 16-bit RGB is reduced by Pillow itself, by dropping the low byte: within one level of the exact scaling.
    colour = np.repeat(values, 3)
    data = png(8, 1, 16, 2, b"\0" + colour.astype(">u2").tobytes())
    assert np.abs(decoded(data) - expected[..., None]).max() <= 1


def test_samples_of_no_stated_range_are_refused():
    for pixels in (np.array([[0.5, 700.0]], np.float32), np.array([[-5, 100_000]], np.int32)):
        assert refusal(images.decode, encode(Image.fromarray(pixels), "TIFF")).cause is Cause.UNSUPPORTED_PIXELS


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("format", ["JPEG", "PNG", "BMP", "TIFF", "GIF", "WEBP"])
def test_a_file_cut_short_is_refused_wherever_it_is_cut(photo, format):
    data = encode(photo, format)
    allowed = {Cause.TRUNCATED_IMAGE, Cause.CORRUPT_IMAGE, Cause.NOT_AN_IMAGE}
    for part in (0, 2, len(data) // 4, len(data) // 2, len(data) * 3 // 4):
        assert refusal(images.decode, data[:part]).cause in allowed
    if format in ("JPEG", "PNG", "GIF", "TIFF"):
        assert refusal(images.decode, data[:12]).cause is not Cause.NOT_AN_IMAGE
    if format in ("JPEG", "PNG"):
        assert refusal(images.decode, data[: len(data) * 3 // 4]).cause is Cause.TRUNCATED_IMAGE


def test_progressive_jpeg_cut_short_is_refused(photo):
    data = encode(photo.resize((300, 200)), "JPEG", progressive=True)
    assert refusal(images.decode, data[: len(data) // 2]).cause is Cause.TRUNCATED_IMAGE


def test_what_is_not_an_image_is_refused(photo):
    for data in (b"hello, this is text", b"<html></html>", bytes(1000), b"%!PS-Adobe-3.0 EPSF-3.0\n", b'{"a": 1}'):
        assert refusal(images.decode, data).cause is Cause.NOT_AN_IMAGE
    spoilt = bytearray(encode(photo))
    spoilt[len(spoilt) // 2] ^= 0xFF
    assert refusal(images.decode, bytes(spoilt)).cause in (Cause.CORRUPT_IMAGE, Cause.TRUNCATED_IMAGE)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [9_500, 30_000])
def test_decompression_bombs_are_refused_by_their_header(side):
    assert refusal(images.decode, png(side, side, 8, 2)).cause is Cause.IMAGE_TOO_LARGE


def test_files_that_are_not_there(tmp_path, photo):
    cases = {
        "absent.png": Cause.MISSING_IMAGE,
        "file.png/inside.png": Cause.MISSING_IMAGE,
        "nul\0.png": Cause.MISSING_IMAGE,
        "half\ud800.png": Cause.MISSING_IMAGE,
        "folder": Cause.MISSING_IMAGE,
        "unwell.png": Cause.UNREADABLE_IMAGE,
        "x" * 400: Cause.MISSING_IMAGE,
    }
    (tmp_path / "file.png").write_bytes(encode(photo))
    (tmp_path / "folder").mkdir()
    (tmp_path / "unwell.png").symlink_to("/proc/self/mem")  # to read it fails
    for name, cause in cases.items():
        refused = refusal(images.load, f"{tmp_path}/{name}", 8, 8)
        assert refused.cause is cause, name
        assert repr(f"{tmp_path}/{name}"[:300])[:-1] in refused.detail and len(refused.detail) < 400
    for address in ("http://host/a.png", "s3://bucket/a.png", "file:///a.png", "data:image/png;base64," + "A" * 10**6):
        refused = refusal(images.load, address, 8, 8)
        assert refused.cause is Cause.MISSING_IMAGE and len(refused.detail) < 400


def test_load_names_the_file_it_refuses(tmp_path):
    (tmp_path / "notes.png").write_bytes(b"not at all")
    assert "notes.png" in refusal(images.load, str(tmp_path / "notes.png"), 8, 8).detail


@pytest.mark.parametrize("size", [(61, 37), (37, 61), (50, 50), (512, 333), (33, 700)])
@pytest.mark.parametrize("target", [32, 64])
def test_square_fit_is_resize_of_the_shorter_side_and_centre_crop(photo, size, target):
    """The published transform (torchvision's Resize and CenterCrop), written out."""
    image = photo.resize(size, Image.Resampling.BICUBIC)
    width, height = size
    if width <= height:
        scaled = (target, int(target * height / width))
    else:
        scaled = (int(target * width / height), target)
    left, top = int(round((scaled[0] - target) / 2.0)), int(round((scaled[1] - target) / 2.0))
    full = image.resize(scaled, Image.Resampling.BICUBIC)
    expected = np.asarray(full.crop((left, top, left + target, top + target))).astype(int)
    got = images.fit(image, target, target)
    assert got.shape == (target, target, 3) and got.dtype == np.uint8
    difference = np.abs(got - expected)
    assert difference.mean() < 0.3 and (difference > 1).mean() < 0.005


def test_fit_to_another_aspect_crops_only_what_is_over():
    stripes = Image.fromarray(np.arange(0, 240, dtype=np.uint8)[None, :, None].repeat(120, 0).repeat(3, -1))
    wide = images.fit(stripes, 30, 60)  # same aspect: nothing is cropped
    assert wide[0, 0, 0] < 4 and wide[0, -1, 0] > 235
    tall = images.fit(stripes, 60, 30)  # the middle quarter of the width remains
    np.testing.assert_allclose(tall[30, [0, -1], 0], [90, 149], atol=3)


def test_fit_of_a_thin_strip_takes_no_memory(monkeypatch):
    resize, sizes = Image.Image.resize, []

    def noted(self, size, *arguments, **options):
        sizes.append(size)
        return resize(self, size, *arguments, **options)

    monkeypatch.setattr(Image.Image, "resize", noted)
    assert images.fit(Image.new("RGB", (60_000, 1), "red"), 64, 64).tolist() == [[[255, 0, 0]] * 64] * 64
    assert images.fit(Image.new("RGB", (1, 60_000), "red"), 64, 32).shape == (64, 32, 3)
    assert sizes and max(width * height for width, height in sizes) <= 64 * 64  # not 60 000 times 64 x 64


def test_image_grid_places_each_image():
    pictures = np.arange(1, 6, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 3, 3), np.uint8)
    grid = images.image_grid(pictures, columns=3)
    assert grid.shape == (2 * 3 - 1, 3 * 4 - 1, 3)
    for index in range(5):
        row, column = divmod(index, 3)
        np.testing.assert_array_equal(grid[row * 3 : row * 3 + 2, column * 4 : column * 4 + 3], pictures[index])
    assert grid[:, 3].max() == grid[2].max() == 0 and grid[3:, 8:].max() == 0
    assert images.image_grid(pictures[:2], columns=8).shape == (2, 7, 3)
