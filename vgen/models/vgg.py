"""The convolutional part of VGG16 (Simonyan & Zisserman 2015), as a feature extractor."""

from typing import Any

import jax
from flax import linen as nn
from jaxtyping import Array, Float

from vgen.sharding import constrain

WIDTHS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class VGG16(nn.Module):
    """Images to the last ReLU maps of the five blocks: relu1_2, relu2_2, relu3_3, relu4_3, relu5_3.

    Takes images as the weights want them (the caller normalises); maps are [b, h / 2^i, w / 2^i, width], i = 0 ... 4.
    Parameters: conv1_1 ... conv5_3, each kernel [3, 3, in, out] and bias.
    """

    dtype: Any = None

    @nn.compact
    def __call__(self, images: Float[Array, "b h w 3"]) -> tuple[Array, ...]:
        x, maps = images, []
        for block, widths in enumerate(WIDTHS, 1):
            if block > 1:
                x = nn.max_pool(x, (2, 2), (2, 2))
            for i, width in enumerate(widths, 1):
                x = constrain(jax.nn.relu(nn.Conv(width, (3, 3), dtype=self.dtype, name=f"conv{block}_{i}")(x)))
            maps.append(x)
        return tuple(maps)
