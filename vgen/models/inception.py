"""Inception-v3 as FID uses it: the TensorFlow graph of 2015-12-05 (Heusel et al. 2017, arXiv:1706.08500).

It is Szegedy et al. 2015 (arXiv:1512.00567) with 1008 outputs and two traits of its own in its pools, marked below; the
reference is the package pytorch_fid, whose names the parameters keep.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from vgen.layers.conv import BatchNorm

SIZE = 299


class Unit(NamedTuple):
    """A convolution with batch norm and ReLU: its name, channels, kernel, stride; padded unless it strides."""

    name: str
    channels: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1


class Mixed(NamedTuple):
    """Parallel branches, concatenated.

    branches: each a chain of units; a pair in the place of a unit is two units side by side.
    pool: "average" or "max" over 3x3 neighbours, followed by the unit branch_pool of pool_channels; "stride": maxima
      with stride 2, as they are.
    """

    name: str
    branches: tuple[tuple[Any, ...], ...]
    pool: str
    pool_channels: int = 0


def _a(name: str, pool: int) -> Mixed:
    double = (Unit("branch3x3dbl_1", 64), Unit("branch3x3dbl_2", 96, (3, 3)), Unit("branch3x3dbl_3", 96, (3, 3)))
    five = (Unit("branch5x5_1", 48), Unit("branch5x5_2", 64, (5, 5)))
    return Mixed(name, ((Unit("branch1x1", 64),), five, double), "average", pool)


def _b(name: str) -> Mixed:
    double = (Unit("branch3x3dbl_1", 64), Unit("branch3x3dbl_2", 96, (3, 3)), Unit("branch3x3dbl_3", 96, (3, 3), 2))
    return Mixed(name, ((Unit("branch3x3", 384, (3, 3), 2),), double), "stride")


def _c(name: str, c: int) -> Mixed:
    seven = (Unit("branch7x7_1", c), Unit("branch7x7_2", c, (1, 7)), Unit("branch7x7_3", 192, (7, 1)))
    kernels = ((1, 1), (7, 1), (1, 7), (7, 1), (1, 7))
    double = tuple(Unit(f"branch7x7dbl_{i}", 192 if i == 5 else c, k) for i, k in enumerate(kernels, 1))
    return Mixed(name, ((Unit("branch1x1", 192),), seven, double), "average", 192)


def _d(name: str) -> Mixed:
    seven = tuple(Unit(f"branch7x7x3_{i}", 192, k) for i, k in enumerate(((1, 1), (1, 7), (7, 1)), 1))
    three = (Unit("branch3x3_1", 192), Unit("branch3x3_2", 320, (3, 3), 2))
    return Mixed(name, (three, (*seven, Unit("branch7x7x3_4", 192, (3, 3), 2))), "stride")


def _e(name: str, pool: str) -> Mixed:
    def fork(stem: str) -> tuple[Unit, Unit]:
        return Unit(f"{stem}a", 384, (1, 3)), Unit(f"{stem}b", 384, (3, 1))

    double = (Unit("branch3x3dbl_1", 448), Unit("branch3x3dbl_2", 384, (3, 3)), fork("branch3x3dbl_3"))
    three = (Unit("branch3x3_1", 384), fork("branch3x3_2"))
    return Mixed(name, ((Unit("branch1x1", 320),), three, double), pool, 192)


STEM = (  # in pytorch_fid's first two blocks, each ending in a pool
    (Unit("Conv2d_1a_3x3", 32, (3, 3), 2), Unit("Conv2d_2a_3x3", 32, (3, 3)), Unit("Conv2d_2b_3x3", 64, (3, 3))),
    (Unit("Conv2d_3b_1x1", 80), Unit("Conv2d_4a_3x3", 192, (3, 3))),
)
VALID = ("Conv2d_2a_3x3", "Conv2d_4a_3x3")  # not padded, though their stride is 1
MIDDLE = (
    *(_a("Mixed_5b", 32), _a("Mixed_5c", 64), _a("Mixed_5d", 64), _b("Mixed_6a")),
    *(_c("Mixed_6b", 128), _c("Mixed_6c", 160), _c("Mixed_6d", 160), _c("Mixed_6e", 192)),
)
# QUIRK: the last block of the graph pools by maximum where the paper's takes the mean (pytorch_fid, FIDInceptionE_2).
LAST = (_d("Mixed_7a"), _e("Mixed_7b", "average"), _e("Mixed_7c", "max"))


class Features(NamedTuple):
    """low [b, 73, 73, 64], mid [b, 35, 35, 192], high [b, 17, 17, 768]: maps of images of 299 pixels.

    pool [b, 2048]: means of the last map, what FID compares. logits [b, 1008], or None without a classifier.
    """

    low: Array
    mid: Array
    high: Array
    pool: Array
    logits: Array | None


class _Unit(nn.Module):
    unit: Unit
    dtype: Any = None

    @nn.compact
    def __call__(self, x):
        unit = self.unit
        padding = "VALID" if unit.stride > 1 or unit.name in VALID else "SAME"
        x = nn.Conv(
            unit.channels, unit.kernel, unit.stride, padding, use_bias=False, dtype=self.dtype, name="conv"
        )(x)  # fmt: skip
        return nn.relu(BatchNorm(eps=1e-3, dtype=self.dtype, name="bn")(x, train=False)[0])


class _Mixed(nn.Module):
    block: Mixed
    dtype: Any = None

    @nn.compact
    def __call__(self, x):
        def apply(step, x):
            if isinstance(step, Unit):
                return _Unit(step, self.dtype, name=step.name)(x)
            return jnp.concatenate([apply(side, x) for side in step], axis=-1)

        outs = []
        for branch in self.block.branches:
            y = x
            for step in branch:
                y = apply(step, y)
            outs.append(y)
        if self.block.pool == "stride":
            return jnp.concatenate([*outs, nn.max_pool(x, (3, 3), (2, 2))], axis=-1)
        if self.block.pool == "average":
            # QUIRK: at the border, the mean over the pixels that exist (pytorch_fid, FIDInceptionA), as in TensorFlow.
            pooled = nn.avg_pool(x, (3, 3), (1, 1), "SAME", count_include_pad=False)
        else:
            pooled = nn.max_pool(x, (3, 3), (1, 1), "SAME")
        return jnp.concatenate([*outs, apply(Unit("branch_pool", self.block.pool_channels), pooled)], axis=-1)


def resize(images: Float[Array, "b h w c"], size: int = SIZE) -> Float[Array, "b size size c"]:
    """Bilinear between pixel centres, without a filter against aliasing, as pytorch_fid (align_corners=False)."""
    b, _, _, c = images.shape
    return jax.image.resize(images, (b, size, size, c), "linear", antialias=False)


class InceptionV3(nn.Module):
    """Images [b, h, w, 3] in [-1, 1], of any size, to `Features`; in evaluation mode, with the stored statistics.

    resize: to 299 pixels first; without it images must have at least 75.
    classes: 1008 in the published weights; None leaves the classifier out.
    Parameters: Conv2d_..., Mixed_.../branch..., each {conv: kernel, bn: scale, bias, mean, var}, and fc.
    Raises ValueError on smaller images that are not resized.
    """

    resize: bool = True
    classes: int | None = 1008
    dtype: Any = None

    @nn.compact
    def __call__(self, images: Float[Array, "b h w 3"]) -> Features:
        if not self.resize and min(images.shape[1:3]) < 75:
            raise ValueError(f"InceptionV3: images {images.shape} are smaller than 75 pixels; set resize=True")
        x, maps = resize(images) if self.resize else images, []
        for units in STEM:
            for unit in units:
                x = _Unit(unit, self.dtype, name=unit.name)(x)
            x = nn.max_pool(x, (3, 3), (2, 2))
            maps.append(x)
        for blocks in (MIDDLE, LAST):
            for block in blocks:
                x = _Mixed(block, self.dtype, name=block.name)(x)
            maps.append(x)
        pool = maps.pop().mean((1, 2))
        logits = None if self.classes is None else nn.Dense(self.classes, dtype=self.dtype, name="fc")(pool)
        return Features(*maps, pool, logits)
