"""Random changes of pictures for training: RandAugment (Cubuk, Zoph, Shlens, Le 2020, arXiv:1909.13719) on Pillow.

Operations and their ranges are those of the authors' TensorFlow code, which ViT's recipes use (Steiner et al. 2021,
AugReg, arXiv:2106.10270); lengths in pixels, which are of pictures of 224 there, are shares of the side here.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageEnhance, ImageOps

TOP = 10.0  # the magnitude that a range's end stands for; RandAugment's go up to 30
GREY = (128, 128, 128)  # what comes in at the sides

# AugReg's names: (layers, magnitude) of RandAugment and the alpha of Mixup, which tasks.classify.Classify takes.
AUGREG = dict(
    none=((0, 0.0), 0.0), light1=((2, 0.0), 0.0), light2=((2, 10.0), 0.2), medium1=((2, 15.0), 0.2),
    medium2=((2, 15.0), 0.5), strong1=((2, 20.0), 0.5), strong2=((2, 20.0), 0.8),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class RandAugment:
    """Called with a picture uint8 [h, w, 3] and a generator, gives one of the same shape: `layers` operations, drawn
    uniformly from `operations`, one behind the other, all of one magnitude.

    magnitude: 0 to 30; beyond 10 the operations go further than their ranges.  operations: names of OPERATIONS.
    Raises ValueError for another magnitude, fewer than 0 layers, or an unknown operation.
    """

    layers: int = 2
    magnitude: float = 10.0
    operations: tuple[str, ...] = ()

    def __post_init__(self):
        object.__setattr__(self, "operations", tuple(self.operations) or tuple(OPERATIONS))
        if self.layers < 0 or not 0 <= self.magnitude <= 30:
            raise ValueError(
                "RandAugment: layers must be at least 0 and magnitude in [0, 30], "
                f"got {self.layers} and {self.magnitude}"
            )
        if unknown := [name for name in self.operations if name not in OPERATIONS]:
            raise ValueError(f"RandAugment: unknown operations {unknown}; there are {', '.join(OPERATIONS)}")

    def __call__(self, image: UInt8[np.ndarray, "h w 3"], rng: np.random.Generator) -> UInt8[np.ndarray, "h w 3"]:
        changed = Image.fromarray(image)
        for _ in range(self.layers):
            operation = OPERATIONS[self.operations[int(rng.integers(len(self.operations)))]]
            changed = operation(changed, self.magnitude / TOP, rng)
        return np.array(changed)


def _sign(rng: np.random.Generator) -> float:
    return 1.0 if rng.random() < 0.5 else -1.0


def _affine(image, *rows):
    return image.transform(image.size, Image.Transform.AFFINE, rows, Image.Resampling.NEAREST, fillcolor=GREY)


def _shear(image, level, rng, along_x):
    by = _sign(rng) * level * 0.3
    return _affine(image, 1, by, 0, 0, 1, 0) if along_x else _affine(image, 1, 0, 0, by, 1, 0)


def _translate(image, level, rng, along_x):
    by = _sign(rng) * level * 100 / 224
    width, height = image.size
    return _affine(image, 1, 0, by * width, 0, 1, 0) if along_x else _affine(image, 1, 0, 0, 0, 1, by * height)


def _cutout(image, level, rng):
    width, height = image.size
    half = level * 40 / 224
    x, y = rng.random() * width, rng.random() * height
    box = (x - half * width, y - half * height, x + half * width, y + half * height)
    changed = image.copy()
    changed.paste(GREY, tuple(int(round(min(max(side, 0), full))) for side, full in zip(box, (width, height) * 2)))
    return changed


def _solarize_add(image, level, rng):
    add = min(int(level * 110), 255)
    return image.point([min(value + add, 255) if value < 128 else value for value in range(256)] * 3)


def _enhance(kind: Callable) -> Callable:
    return lambda image, level, rng: kind(image).enhance(level * 1.8 + 0.1)


# {name: function of (picture, magnitude / TOP, generator)}
OPERATIONS: dict[str, Callable] = {
    "auto_contrast": lambda image, level, rng: ImageOps.autocontrast(image),
    "equalize": lambda image, level, rng: ImageOps.equalize(image),
    "invert": lambda image, level, rng: ImageOps.invert(image),
    "rotate": lambda image, level, rng: image.rotate(_sign(rng) * level * 30, fillcolor=GREY),
    "posterize": lambda image, level, rng: ImageOps.posterize(image, min(max(int(level * 4), 1), 8)),
    "solarize": lambda image, level, rng: ImageOps.solarize(image, min(int(level * 256), 256)),
    "solarize_add": _solarize_add,
    "colour": _enhance(ImageEnhance.Color),
    "contrast": _enhance(ImageEnhance.Contrast),
    "brightness": _enhance(ImageEnhance.Brightness),
    "sharpness": _enhance(ImageEnhance.Sharpness),
    "shear_x": lambda image, level, rng: _shear(image, level, rng, True),
    "shear_y": lambda image, level, rng: _shear(image, level, rng, False),
    "translate_x": lambda image, level, rng: _translate(image, level, rng, True),
    "translate_y": lambda image, level, rng: _translate(image, level, rng, False),
    "cutout": _cutout,
}
GEOMETRIC = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")  # which leave colours as they are
