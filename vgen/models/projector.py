"""The small networks on an encoder's features that self-supervision compares (SimCLR, BYOL)."""

from typing import Any

import flax.linen as nn
from jaxtyping import Array, Float

from vgen.layers.conv import BatchNorm
from vgen.layers.linear import linear


class Projector(nn.Module):
    """Features [b, any] -> [b, features]: `layers` hidden ones, each normalised over the batch and rectified, then a
    linear one (Chen et al. 2020, arXiv:2002.05709; Grill et al. 2020, arXiv:2006.07733).

    hidden: width.  bias: of the linear layers.
    Parameters: fc1, norm1 {scale, bias}, ..., out.
    """

    hidden: int = 4096
    features: int = 256
    layers: int = 1
    bias: bool = False
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, "b d"]) -> Float[Array, "b features"]:
        kwargs = dict(use_bias=self.bias, dtype=self.dtype)
        for i in range(1, self.layers + 1):
            x = linear(self.hidden, name=f"fc{i}", **kwargs)(x)
            x, _ = BatchNorm(running=False, dtype=self.dtype, name=f"norm{i}")(x, True)
            x = nn.relu(x)
        return linear(self.features, name="out", **kwargs)(x)
