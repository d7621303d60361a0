"""Image operations: every kind of file becomes the right RGB, sizes and ranges are exact, bad files are refused."""

import io
import pickle
import struct
import zlib

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from vgen.data import images
from vgen.data.images import DataError, ImageError


def encode(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def smooth(height, width):
    """A picture that JPEG and resizing keep nearly intact: slow ramps in three directions."""
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    return np.stack([255 * x, 255 * y, 127 * (x + y)], -1).round().astype(np.uint8)


def test_grey_and_bilevel_become_rgb():
    grey = np.arange(0, 240, 10, dtype=np.uint8).reshape(4, 6)
    out = images.decode(encode(Image.fromarray(grey)))
    np.testing.assert_array_equal(out, np.repeat(grey[..., None], 3, -1))
    bits = grey > 100
    np.testing.assert_array_equal(images.decode(encode(Image.fromarray(bits)))[..., 1], bits * np.uint8(255))
    np.testing.assert_array_equal(images.to_rgb8(bits), images.decode(encode(Image.fromarray(bits))))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_composited_on_white(mode):
    value, alpha = 40, np.array([[0, 51, 255]], np.uint8)
    pixels = np.dstack([np.full((1, 3, len(mode) - 1), value, np.uint8), alpha])
    want = np.round(value * (alpha / 255) + 255 * (1 - alpha / 255))
    for out in (images.decode(encode(Image.fromarray(pixels, mode))), images.to_rgb8(pixels)):
        np.testing.assert_array_equal(out, np.repeat(want[..., None], 3, -1))


def test_palette_with_and_without_transparency():
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    np.testing.assert_array_equal(images.decode(encode(image))[0], [[255, 0, 0], [0, 255, 0], [0, 0, 255]])
    np.testing.assert_array_equal(images.decode(encode(image, transparency=1))[0, 1], [255, 255, 255])


def test_cmyk_jpeg():
    cmyk = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # no cyan, full magenta and yellow: red
    out = images.decode(encode(cmyk, "JPEG", quality=95))
    assert np.abs(out.astype(int) - [255, 0, 0]).max() < 12


def test_sixteen_bits_are_scaled_not_clipped():
    deep = np.array([[0, 128, 129, 257, 32768, 65535]], np.uint16)
    out = images.decode(encode(Image.fromarray(deep)))
    np.testing.assert_array_equal(out[0, :, 0], np.round(deep[0].astype(float) * 255 / 65535))
    np.testing.assert_array_equal(out, images.to_rgb8(deep))


@pytest.mark.parametrize("orientation, undo", [(3, lambda a: a[::-1, ::-1]), (6, lambda a: np.rot90(a, -1)),
                                               (8, lambda a: np.rot90(a, 1))])  # fmt: skip
def test_exif_rotation_is_applied(orientation, undo):
    pixels = smooth(24, 40)
    exif = Image.Exif()
    exif[0x0112] = orientation
    out = images.decode(encode(Image.fromarray(pixels), "JPEG", quality=98, exif=exif))
    assert out.shape == undo(pixels).shape
    assert np.abs(out.astype(int) - undo(pixels)).mean() < 3


def test_damaged_exif_keeps_the_picture():
    data = encode(Image.fromarray(smooth(16, 16)), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff garbage")
    assert images.decode(data).shape == (16, 16, 3)


def test_huge_jpeg_is_read_reduced(monkeypatch):
    pixels = smooth(400, 640)
    data = encode(Image.fromarray(pixels), "JPEG", quality=95)
    monkeypatch.setattr(images, "MAX_PIXELS", 100_000)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50_000)  # Pillow alone would refuse: more than twice its limit
    out = images.decode(data)
    assert out.shape == (200, 320, 3)
    assert np.abs(out.astype(int) - pixels[::2, ::2]).mean() < 4


def test_draft_never_goes_below_twice_the_size():
    data = encode(Image.fromarray(smooth(256, 256)), "JPEG")
    assert [images.decode(data, size).shape[0] for size in (16, 32, 33, 64, 100)] == [32, 64, 128, 128, 256]


def bomb(width, height):
    """A PNG of a few bytes that claims to be width x height."""
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [9_000, 60_000])
def test_bombs_are_refused(side):
    with pytest.raises(ImageError, match="pixels"):
        images.decode(bomb(side, side))


@pytest.mark.parametrize("spoil", [lambda d: b"", lambda d: b"not an image", lambda d: d[: len(d) // 2],
                                   lambda d: b"\xff\xd8\xff" + b"\0" * 50])  # fmt: skip
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_bad_bytes_raise_image_error(kind, spoil):
    data = encode(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)), kind)
    with pytest.raises(ImageError, match="do not decode"):
        images.decode(spoil(data))


@pytest.mark.parametrize("array", [np.zeros((4, 4, 3), np.float32), np.zeros((4, 4, 5), np.uint8),
                                   np.zeros((0, 4, 3), np.uint8), np.zeros(4, np.uint8)])  # fmt: skip
def test_arrays_of_unknown_meaning_are_refused(array):
    with pytest.raises(ImageError):
        images.to_rgb8(array)


def test_errors_survive_pickling():
    error = pickle.loads(pickle.dumps(ImageError("a", "b", "c", "d")))
    assert type(error) is ImageError and str(error) == "a: got b, expected c; d" and isinstance(error, DataError)


def test_load_names_the_file(tmp_path):
    with pytest.raises(ImageError, match="nothing.png"):
        images.load(tmp_path / "nothing.png")
    (tmp_path / "bad.png").write_bytes(b"bad")
    with pytest.raises(ImageError, match="bad.png"):
        images.load(tmp_path / "bad.png")


# ------------------------------------------------------------------------------------------------------- size and flips


def test_center_crop_and_pad_geometry():
    image = np.zeros((8, 16, 3), np.uint8)
    image[:, 4:12] = 200
    np.testing.assert_array_equal(images.resize(image, 8, "center_crop"), np.full((8, 8, 3), 200))
    padded = images.resize(image, 16, "pad")
    assert (padded[:4] == 255).all() and (padded[12:] == 255).all()
    np.testing.assert_array_equal(padded[4:12], image)
    assert images.resize(image, 4, "resize").shape == (4, 4, 3)


def test_resize_antialiases():
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    small = images.resize(stripes, 8, "resize")
    assert np.abs(small.astype(int) - 127).max() < 12  # nearest or plain bilinear would give 0 or 255


def test_random_crop_depends_on_the_generator_alone():
    image = smooth(40, 60)
    crop = lambda seed: images.resize(image, 16, "random_crop", np.random.default_rng(seed))
    np.testing.assert_array_equal(crop(1), crop(1))
    assert (crop(1) != crop(2)).any()
    with pytest.raises(ValueError, match="rng"):
        images.resize(image, 16, "random_crop")


def test_unknown_way_lists_the_known():
    with pytest.raises(ValueError, match="center_crop, random_crop, inception_crop, resize, pad"):
        images.resize(smooth(4, 4), 4, "crop")


def test_random_flip_mirrors_half_of_the_time():
    image, rng = smooth(2, 4), np.random.default_rng(0)
    flipped = [bool((images.random_flip(image, rng) != image).any()) for _ in range(400)]
    assert 160 < sum(flipped) < 240
    mirrored = next(out for out in (images.random_flip(image, rng) for _ in range(20)) if (out != image).any())
    np.testing.assert_array_equal(mirrored, image[:, ::-1])


# --------------------------------------------------------------------------------------------------- ranges and sheets


def test_uint8_round_trips_through_floats():
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    x = images.to_float(levels)
    assert x.dtype == jnp.float32 and float(x.min()) == -1 and float(x.max()) == 1
    np.testing.assert_array_equal(images.to_uint8(x), levels)
    np.testing.assert_array_equal(images.to_uint8(jnp.array([-2.0, 2.0, jnp.nan])), [0, 255, 0])


def test_downsample_is_the_box_mean():
    x = np.random.default_rng(0).normal(size=(2, 4, 6, 3)).astype(np.float32)
    got = images.downsample(jnp.asarray(x), 2)
    assert got.shape == (2, 2, 3, 3)
    np.testing.assert_allclose(got[1, 0, 2], x[1, 0:2, 4:6].mean((0, 1)), rtol=1e-5)
    with pytest.raises(ValueError, match="divide"):
        images.downsample(jnp.asarray(x), 4)


def test_grid_places_pictures_and_draws_captions():
    pictures = np.stack([np.full((8, 8, 3), 60 * i, np.uint8) for i in range(3)])
    sheet = images.grid(pictures, columns=2, gap=2)
    assert sheet.shape == (2 * (8 + 2 + 2) + 2, 22, 3)
    np.testing.assert_array_equal(sheet[2:10, 12:20], pictures[1])
    blank = images.grid(pictures, columns=3, captions=["", "", ""])
    lettered = images.grid(pictures, columns=3, captions=["a red circle", "", "ünï 漢"])
    assert blank.shape[1] == lettered.shape[1] and (lettered[2 + 128 :] < 128).any() and (blank[2 + 128 :] == 255).all()
    with pytest.raises(ValueError, match="captions"):
        images.grid(pictures, captions=["one"])


def test_save_png_round_trips(tmp_path):
    picture = smooth(5, 7)
    images.save_png(tmp_path / "new" / "a.png", picture)
    np.testing.assert_array_equal(images.load(tmp_path / "new" / "a.png"), picture)
    images.save_png(tmp_path / "b.png", images.to_float(picture))
    np.testing.assert_array_equal(images.load(tmp_path / "b.png"), picture)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b.png", "new"]
