"""Image operations: bytes and arrays of any kind to RGB uint8, resizing, the [-1, 1] range, contact sheets.

The host side is NumPy and Pillow (random state is an argument), the device side is jax.numpy. Everything that is wrong
with one image raises ImageError, so that a pipeline can skip that image and go on.
"""

import io
import math
import os
import textwrap
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from PIL import ExifTags, Image, ImageDraw, ImageFont, ImageOps, JpegImagePlugin, UnidentifiedImageError

from vgen.config import UserError

MAX_PIXELS = 2**26  # 67 megapixels, 200 MB as RGB: above this an image is refused instead of filling the memory
WAYS = ("center_crop", "random_crop", "inception_crop", "resize", "pad")
RANDOM_WAYS = ("random_crop", "inception_crop")
PIL_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    EOFError,
    OverflowError,
    ArithmeticError,
    RuntimeError,
    Image.DecompressionBombError,
)  # what Pillow's decoders raise on bad bytes


class DataError(UserError, ValueError):
    """Data cannot be used: says what was looked at, what was got, what was expected and what to do."""

    def __init__(self, what: str, got: str, expected: str, todo: str):
        super().__init__(what, got, expected, todo)  # four args: the error survives pickling between processes

    def __str__(self):
        what, got, expected, todo = self.args
        return f"{what}: got {got}, expected {expected}; {todo}"


class ImageError(DataError):
    """One image cannot be used; others of the same source may."""


# -------------------------------------------------------------------------------------------------- reading one image


def decode(data: bytes | np.ndarray | Image.Image, size: int | None = None) -> np.ndarray:
    """Read an image into uint8 [h, w, 3].

    data: encoded bytes (any format Pillow reads), an array or a Pillow image (see `to_rgb8`).
    size: pixels the shorter side will be resized to; with it a JPEG at least four times as large is decoded at a
      fraction of its size (never below 2 * size), which is many times faster.
    Raises ImageError for bytes that are no image, a truncated image, or one of more than MAX_PIXELS pixels; a huge
    JPEG is read reduced by up to 8 instead.
    """
    if not isinstance(data, bytes):
        return to_rgb8(data)
    try:
        image = _open(data)
        if image.format in ("JPEG", "MPO"):
            _draft(image, size)
        if image.width * image.height > MAX_PIXELS:
            raise ImageError(
                "image",
                f"{image.width}x{image.height} pixels",
                f"at most {MAX_PIXELS} pixels",
                "shrink the file, or raise vgen.data.images.MAX_PIXELS if the memory allows it",
            )
        return to_rgb8(image)
    except ImageError:
        raise
    except PIL_ERRORS as error:
        unknown = isinstance(error, UnidentifiedImageError)
        raise ImageError(
            "image",
            f"{len(data)} bytes that do not decode ({'no known format' if unknown else error})",
            "a complete image file",
            "replace or delete the file",
        ) from error


def size_of(data: bytes | np.ndarray | Image.Image) -> tuple[int, int]:
    """(height, width) that `decode` gives without a size, of encoded bytes from their header alone.

    Raises ImageError for bytes whose header says nothing.
    """
    if not isinstance(data, bytes):
        return np.shape(data)[:2] if isinstance(data, np.ndarray) else to_rgb8(data).shape[:2]
    try:
        image = _open(data)
        lies = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5  # it will be turned by a quarter
    except PIL_ERRORS as error:
        raise ImageError("image", f"{len(data)} bytes without a size", "an image file", "replace it") from error
    return image.size if lies else image.size[::-1]


def _open(data: bytes) -> Image.Image:
    if data[:3] == b"\xff\xd8\xff":  # straight to the JPEG reader: Image.open refuses huge ones before draft() can help
        return JpegImagePlugin.JpegImageFile(io.BytesIO(data))
    return Image.open(io.BytesIO(data))


def _draft(image: JpegImagePlugin.JpegImageFile, size: int | None):
    """Let the JPEG decoder work at 1/2, 1/4 or 1/8 of the size where the result stays large enough."""
    shrink = min(image.size) // (2 * size) if size else 1
    if image.width * image.height > MAX_PIXELS:
        shrink = max(shrink, math.ceil(math.sqrt(image.width * image.height / MAX_PIXELS)))
        shrink = 2 ** math.ceil(math.log2(shrink))  # draft() rounds down to a power of two
    if shrink > 1:
        image.draft(None, (image.width // shrink, image.height // shrink))


def load(path: str | os.PathLike) -> np.ndarray:
    """Read an image file into uint8 [h, w, 3]; raises ImageError naming a file that is missing or does not decode."""
    try:
        return decode(Path(path).read_bytes())
    except OSError as error:
        raise ImageError(str(path), error.strerror or str(error), "an image file", "check the path") from error
    except ImageError as error:
        raise ImageError(str(path), *error.args[1:]) from error


def to_rgb8(image: Image.Image | np.ndarray) -> np.ndarray:
    """Convert any picture to uint8 RGB [h, w, 3].

    Pillow images: EXIF orientation applied; palette, bilevel, grey and CMYK converted (CMYK without a colour profile);
    transparency composited on white; 16-bit scaled by 255 / 65535. Of an animation, the first frame.
    Arrays: uint8, uint16 or bool, [h, w], [h, w, 1] grey, [h, w, 2] grey + alpha, [h, w, 3] RGB, [h, w, 4] RGB + alpha.
    Raises ImageError for floats (their range is unknown) and other shapes.
    """
    if isinstance(image, np.ndarray):
        return _array_to_rgb8(image)
    try:
        image = ImageOps.exif_transpose(image)
    except (SyntaxError, ValueError, TypeError, KeyError, OverflowError):
        pass  # damaged EXIF: the picture itself may be whole; a damaged picture fails again below
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _array_to_rgb8(np.asarray(image).clip(0, 65535).astype(np.uint16))
    if image.mode == "F":
        raise ImageError("image", "32-bit float pixels of unknown range", "8 or 16 bits", "convert the file to PNG")
    if image.mode in ("LA", "PA", "La", "RGBA", "RGBa") or "transparency" in image.info:
        return _array_to_rgb8(np.asarray(image.convert("RGBA")))
    return np.asarray(image.convert("RGB"))


def _array_to_rgb8(image: np.ndarray) -> np.ndarray:
    if image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3 and image.size:
        return image
    if image.ndim == 2:
        image = image[:, :, None]  # [h, w, 1]
    if image.ndim != 3 or image.shape[2] not in (1, 2, 3, 4) or not image.size:
        raise ImageError("image", f"an array of shape {image.shape}", "[h, w] or [h, w, 1 to 4]", "reshape it")
    if image.dtype == np.bool_:
        image = image.astype(np.uint8) * np.uint8(255)
    elif image.dtype == np.uint16:
        image = ((image.astype(np.uint32) + 128) // 257).astype(np.uint8)  # rounds 65535 -> 255, 257 -> 1
    elif image.dtype != np.uint8:
        raise ImageError(
            "image", f"an array of {image.dtype}", "uint8, uint16 or bool", "use to_uint8 on [-1, 1] floats"
        )
    if image.shape[2] in (2, 4):
        color, alpha = image[:, :, :-1].astype(np.uint32), image[:, :, -1:].astype(np.uint32)
        image = ((color * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(image, image.shape[:2] + (3,)))


# ---------------------------------------------------------------------------------------------------- size and flips


def resize(
    image: np.ndarray,
    size: int,
    how: str = "center_crop",
    rng: np.random.Generator | None = None,
    scale: tuple[float, float] | None = None,
    fill: int = 255,
) -> np.ndarray:
    """Bring uint8 [h, w, 3] to [size, size, 3] with Pillow's Lanczos filter, which antialiases when shrinking.

    how: "center_crop" the largest centred square; "random_crop" a random square whose side is `scale` (uniform) of the
      shorter side ((0.8, 1) by default); "inception_crop" a random rectangle of `scale` (uniform; (0.05, 1) by default)
      of the area and of 3/4 to 4/3 as wide as high, aspect lost (Szegedy et al. 2014, arXiv:1409.4842, section 6); both
      need `rng`; "resize" the whole image, aspect lost; "pad" the whole image, aspect kept, centred on `fill`.
    """
    height, width = image.shape[:2]
    if how in RANDOM_WAYS and rng is None:
        raise ValueError(f"resize: how={how!r} needs rng, a numpy Generator")
    if how == "inception_crop":
        top, left, rows, columns = _inception_box(height, width, scale or (0.05, 1.0), rng)
        return _lanczos(image[top : top + rows, left : left + columns], size, size)
    if how == "random_crop":
        scale = scale or (0.8, 1.0)
        share, down, right = rng.random(3)
        side = max(1, round(min(height, width) * (scale[0] + (scale[1] - scale[0]) * share)))
        top, left = int(down * (height - side + 1)), int(right * (width - side + 1))
        return _lanczos(image[top : top + side, left : left + side], size, size)
    if how not in WAYS:
        raise ValueError(f"resize: how must be one of {', '.join(WAYS)}, got {how!r}")
    if height == width == size:
        return image
    if how == "center_crop":
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        return _lanczos(image[top : top + side, left : left + side], size, size)
    if how == "resize":
        return _lanczos(image, size, size)
    factor = size / max(height, width)
    inner = _lanczos(image, max(1, round(height * factor)), max(1, round(width * factor)))
    out = np.full((size, size, 3), fill, np.uint8)
    top, left = (size - inner.shape[0]) // 2, (size - inner.shape[1]) // 2
    out[top : top + inner.shape[0], left : left + inner.shape[1]] = inner
    return out


def _inception_box(height, width, area, rng) -> tuple[int, int, int, int]:
    """(top, left, rows, columns) of a random rectangle; the largest centred square where ten do not fit."""
    for _ in range(10):
        share, ratio = rng.uniform(*area), math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        rows = max(1, round(math.sqrt(share * height * width / ratio)))
        columns = max(1, round(math.sqrt(share * height * width * ratio)))
        if rows <= height and columns <= width:
            top, left = int(rng.integers(height - rows + 1)), int(rng.integers(width - columns + 1))
            return top, left, rows, columns
    side = min(height, width)
    return (height - side) // 2, (width - side) // 2, side, side


def cover(
    image: np.ndarray, height: int, width: int, rng: np.random.Generator | None = None
) -> tuple[np.ndarray, tuple[int, int], tuple[int, int]]:
    """uint8 [h, w, 3] to [height, width, 3]: resized as little as covers that, then cropped.

    rng: for a crop at random, without one it is the middle.
    Also gives the crop's corner (top, left) and the (height, width) that it was cut from.
    """
    h, w = image.shape[:2]
    scale = max(height / h, width / w)
    whole = max(height, round(h * scale)), max(width, round(w * scale))
    rest = whole[0] - height, whole[1] - width
    top, left = (int(r) // 2 if rng is None else int(rng.integers(r + 1)) for r in rest)
    return _lanczos(image, *whole)[top : top + height, left : left + width], (top, left), whole


def _lanczos(image: np.ndarray, height: int, width: int) -> np.ndarray:
    if image.shape[:2] == (height, width):
        return image
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS))


def random_flip(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Mirror [h, w, c] left to right with probability one half (a caption that says "left of" will no longer hold)."""
    return image[:, ::-1] if rng.random() < 0.5 else image


# -------------------------------------------------------------------------------------------------- ranges, on device


def to_float(image: UInt8[Array, "..."] | UInt8[np.ndarray, "..."]) -> Float[Array, "..."]:
    """uint8 in [0, 255] to float32 in [-1, 1]."""
    return jnp.asarray(image, jnp.float32) / 127.5 - 1.0


def standardise(
    image: UInt8[Array, "*b 3"] | UInt8[np.ndarray, "*b 3"], mean: Sequence[float], std: Sequence[float]
) -> Float[Array, "*b 3"]:
    """uint8 pictures with `mean` taken from their channels, in [0, 1], and divided by `std`."""
    return (to_float(image) / 2 + 0.5 - jnp.asarray(mean)) / jnp.asarray(std)


def unstandardise(x: Float[Array, "*b 3"], mean: Sequence[float], std: Sequence[float]) -> UInt8[Array, "*b 3"]:
    """The inverse of `standardise`; what is outside of a picture's range is cut off."""
    return to_uint8(jnp.clip((x * jnp.asarray(std) + jnp.asarray(mean)) * 2 - 1, -1, 1))


def to_uint8(image: Float[Array, "..."] | Float[np.ndarray, "..."]) -> UInt8[Array, "..."]:
    """Float in [-1, 1] to uint8 in [0, 255], rounded to nearest; values outside are clipped, NaN becomes 0."""
    levels = jnp.nan_to_num((jnp.asarray(image).astype(jnp.float32) + 1.0) * 127.5, nan=0.0)
    return jnp.clip(jnp.round(levels), 0.0, 255.0).astype(jnp.uint8)


def downsample(x: Float[Array, "b h w c"], factor: int) -> Float[Array, "b h2 w2 c"]:
    """Shrink by an integer factor with the mean over factor x factor boxes; raises ValueError if it does not divide."""
    b, h, w, c = x.shape
    if factor < 1 or h % factor or w % factor:
        raise ValueError(f"downsample: factor must be >= 1 and divide the {h}x{w} image, got {factor}")
    return x.reshape(b, h // factor, factor, w // factor, factor, c).mean((2, 4))


def resized(x: UInt8[Array, "b h w c"], size: int) -> UInt8[Array, "b size size c"]:
    """The whole pictures as squares, by `resize`'s filter, on the device."""
    if x.shape[1] == x.shape[2] == size:
        return x
    smooth = jax.image.resize(x.astype(jnp.float32), (x.shape[0], size, size, x.shape[3]), "lanczos3")
    return jnp.rint(jnp.clip(smooth, 0, 255)).astype(jnp.uint8)


# --------------------------------------------------------------------------------------------------- looking at images


def grid(
    images, columns: int | None = None, captions: list[str] | None = None, scale: int | None = None, gap: int = 2
) -> np.ndarray:
    """Lay pictures out on one white sheet, uint8 [H, W, 3].

    images: [n, h, w, 3], uint8 or float in [-1, 1].  columns: about square by default.
    captions: n lines, wrapped and drawn under their pictures.
    scale: each pixel is repeated this many times (by default 1; with captions, enough for a 128 px wide picture).
    """
    images = np.asarray(images)
    if images.ndim != 4 or images.shape[3] != 3 or not len(images):
        raise ValueError(f"grid: images must be [n, h, w, 3] with n >= 1, got shape {images.shape}")
    if captions is not None and len(captions) != len(images):
        raise ValueError(f"grid: {len(images)} images need as many captions, got {len(captions)}")
    images = images if images.dtype == np.uint8 else np.asarray(to_uint8(images))
    n, h, w = images.shape[:3]
    scale = scale or (1 if captions is None else max(1, -(-128 // w)))
    columns = columns or math.ceil(math.sqrt(n))
    h, w = h * scale, w * scale
    font = ImageFont.load_default(12)
    lines = [textwrap.wrap(text, max(8, w // 6)) for text in captions or []]
    line_height = 14
    cell = h + gap + max((line_height * len(block) for block in lines), default=0)
    rows = -(-n // columns)
    sheet = Image.new("RGB", (columns * (w + gap) + gap, rows * (cell + gap) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for i, image in enumerate(images):
        left, top = gap + i % columns * (w + gap), gap + i // columns * (cell + gap)
        sheet.paste(Image.fromarray(image.repeat(scale, 0).repeat(scale, 1)), (left, top))
        for row, line in enumerate(lines[i] if lines else []):
            draw.text((left, top + h + gap + row * line_height), line, "black", font)
    return np.asarray(sheet)


def save_png(path: str | os.PathLike, image) -> None:
    """Write [h, w, 3] (uint8, or float in [-1, 1]) as PNG, making folders; readers never see half a file."""
    path, image = Path(path), np.asarray(image)
    image = image if image.dtype == np.uint8 else np.asarray(to_uint8(image))
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        Image.fromarray(image).save(part, "PNG")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
