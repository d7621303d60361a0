"""Images as published networks take them: CLIP's, ViT's, DINOv2's and SAM's resizing, cropping and normalisation.

The numbers are those of transformers' processors on Pillow, and of the authors' code, whose transforms resize with
Pillow too: 8-bit images in, a filter that antialiases when it shrinks, 8 bits between resizing and normalising.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, UInt8
from PIL import Image

from vgen.data.images import DataError

_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
_CODES = {int(code): name for name, code in _FILTERS.items()}  # as preprocessor_config.json numbers them
Triple = tuple[float, float, float]


class Preprocess(NamedTuple):
    """How a network wants its images.

    side: what `size` is: "short", the length of the shorter side, the longer one in proportion and rounded down;
      "long", that of the longer side, the shorter one rounded to nearest; "both", (height, width) or one number for
      both, the proportions lost; "none", images stay as they are.
    filter: "bicubic", "bilinear", "lanczos" or "nearest", Pillow's.
    crop: side of the square cut from the middle, None for none.  crop_rounding: which pixel is first where an odd
      number is left over: "down" (transformers), or "even", to the even half as torchvision's CenterCrop, which the
      authors of CLIP and DINOv2 use: one pixel apart where three, seven, eleven ... are left over.
    pad: side of a square that zeros fill at the right and the bottom, after normalising; None for none.
    mean, std: of each channel, on values in [0, 1].
    """

    size: int | tuple[int, int] = 224
    side: str = "both"
    filter: str = "bicubic"
    crop: int | None = None
    crop_rounding: str = "down"
    pad: int | None = None
    mean: Triple = (0.5, 0.5, 0.5)
    std: Triple = (0.5, 0.5, 0.5)


IMAGENET = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
CLIP = Preprocess(
    224,
    "short",
    crop=224,
    mean=(0.48145466, 0.4578275, 0.40821073),
    std=(0.26862954, 0.26130258, 0.27577711),
)  # other sizes by CLIP._replace(size=336, crop=336)
VIT = Preprocess(224, "both", "bilinear")  # to [-1, 1]
DINOV2 = Preprocess(256, "short", crop=224, **IMAGENET)
SAM = Preprocess(1024, "long", "bilinear", pad=1024, **IMAGENET)


def scaled(height: int, width: int, how: Preprocess) -> tuple[int, int]:
    """(height, width) that an image of this height and width is resized to, ahead of cropping and padding.

    Points and boxes go with it: SAM's prompts are multiplied by new / old.  Raises ValueError for an unknown side.
    """
    if how.side == "none":
        return height, width
    if how.side == "both":
        return (how.size, how.size) if isinstance(how.size, int) else tuple(how.size)
    if how.side == "short":
        long = int(how.size * max(height, width) / min(height, width))
        return (long, how.size) if width <= height else (how.size, long)
    if how.side == "long":
        scale = how.size * 1.0 / max(height, width)
        return int(height * scale + 0.5), int(width * scale + 0.5)
    raise ValueError(f"Preprocess: side must be 'short', 'long', 'both' or 'none', got {how.side!r}")


def reshape(image: UInt8[np.ndarray, "h w 3"], how: Preprocess) -> UInt8[np.ndarray, "h2 w2 3"]:
    """The image resized and cropped, still 8 bits.

    Raises ValueError for an unknown side, filter or crop_rounding, DataError where a crop is larger than what is there.
    """
    if how.filter not in _FILTERS:
        raise ValueError(f"Preprocess: filter must be one of {', '.join(_FILTERS)}, got {how.filter!r}")
    height, width = scaled(*image.shape[:2], how)
    if (height, width) != image.shape[:2]:
        image = np.asarray(Image.fromarray(image).resize((width, height), _FILTERS[how.filter]))
    if how.crop is None:
        return image
    if how.crop > min(height, width):
        got = f"a crop of {how.crop} pixels from {height}x{width}"
        raise DataError("preprocess", got, "a crop that fits", "raise size, or lower crop")
    first = {"down": lambda rest: rest // 2, "even": lambda rest: round(rest / 2)}.get(how.crop_rounding)
    if first is None:
        raise ValueError(f"Preprocess: crop_rounding must be 'down' or 'even', got {how.crop_rounding!r}")
    top, left = first(height - how.crop), first(width - how.crop)
    return image[top : top + how.crop, left : left + how.crop]


def preprocess(image: UInt8[np.ndarray, "h w 3"], how: Preprocess) -> Float32[np.ndarray, "h2 w2 3"]:
    """The image as the network takes it: resized, cropped, normalised, padded; see `vgen.data.images.to_rgb8` for how
    any picture becomes 8-bit RGB.

    Raises what `reshape` raises, and DataError for an image that is larger than its padding.
    """
    x = reshape(image, how).astype(np.float32) / np.float32(255)
    x = (x - np.asarray(how.mean, np.float32)) / np.asarray(how.std, np.float32)
    if how.pad is None:
        return x
    height, width = x.shape[:2]
    if max(height, width) > how.pad:
        got = f"{height}x{width} pixels"
        raise DataError("preprocess", got, f"at most {how.pad}, the padding", "raise pad, or lower size")
    return np.pad(x, ((0, how.pad - height), (0, how.pad - width), (0, 0)))


def normalize(images: Float[Array, "*b h w 3"], how: Preprocess) -> Float[Array, "*b h w 3"]:
    """Images in [-1, 1], of the right size already, to the values that the network takes; differentiable."""
    mean, std = (jnp.asarray(value, images.dtype) for value in (how.mean, how.std))
    return ((images + 1) / 2 - mean) / std


def from_config(config: Mapping[str, Any]) -> Preprocess:
    """What a transformers checkpoint's preprocessor_config.json says.

    Raises DataError for settings that are none of the above.
    """
    size, crop, pad = (config.get(name) for name in ("size", "crop_size", "pad_size"))
    size, side = _size(size, config)
    side = side if config.get("do_resize", True) else "none"
    factor = config.get("rescale_factor", 1 / 255)
    code = config.get("resample", int(Image.Resampling.BILINEAR))
    if code not in _CODES:
        raise _unknown("resample", code, f"one of {sorted(_CODES)}")
    if abs(factor * 255 - 1) > 1e-6 or not config.get("do_rescale", True):
        raise _unknown("rescale_factor", factor, "1 / 255, and do_rescale")
    stats = {name: tuple(config[f"image_{name}"]) for name in ("mean", "std") if config.get("do_normalize", True)}
    return Preprocess(
        size,
        side,
        _CODES[code],
        crop=_square("crop_size", crop) if config.get("do_center_crop") else None,
        pad=_square("pad_size", pad) if config.get("do_pad") else None,
        **(stats or dict(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))),
    )


def _size(size: Any, config: Mapping[str, Any]) -> tuple[int | tuple[int, int], str]:
    """(size, side) of a config; files of 2022 give one number, which only CLIP's class took for the shorter side."""
    if isinstance(size, int):
        return size, "short" if "CLIP" in str(config.get("feature_extractor_type")) else "both"
    sides = {("shortest_edge",): "short", ("longest_edge",): "long", ("height", "width"): "both"}
    side = sides.get(tuple(sorted(size))) if isinstance(size, Mapping) else None
    if side is None:
        raise _unknown("size", size, "a number, shortest_edge, longest_edge, or height and width")
    return (size["height"], size["width"]) if side == "both" else next(iter(size.values())), side


def _square(name: str, size: Any) -> int:
    sides = {size} if isinstance(size, int) else set(size.values()) if isinstance(size, Mapping) else set()
    if len(sides) != 1:
        raise _unknown(name, size, "one number, or height and width alike")
    return sides.pop()


def _unknown(name: str, got: Any, expected: str) -> DataError:
    return DataError("preprocessor_config.json", f"{name} = {got!r}", expected, "preprocess by hand")
