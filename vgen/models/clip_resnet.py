"""CLIP's convolutional image tower: a ResNet with antialiased strides and attention pooling (Radford et al. 2021)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vgen.layers.attention import MultiHeadAttention
from vgen.layers.conv import BatchNorm
from vgen.layers.embed import Positions
from vgen.sharding import constrain


def _conv(channels: int, size: int, stride: int, name: str, dtype: Any) -> nn.Conv:
    return nn.Conv(channels, (size, size), stride, padding=size // 2, use_bias=False, dtype=dtype, name=name)


def _norm(x: Float[Array, "b h w c"], name: str, dtype: Any) -> Float[Array, "b h w c"]:
    return BatchNorm(dtype=dtype, name=name)(x, False)[0]  # running statistics: CLIP is not trained further here


def _shrink(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    return nn.avg_pool(x, (2, 2), (2, 2))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions around a residual; strides are 2x2 means, in the shortcut too.

    channels: of the inner convolutions; the result has 4 times as many.
    Parameters: conv1 ... conv3, norm1 ... norm3; shortcut, shortcut_norm where stride or channels change.
    """

    channels: int
    stride: int = 1
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, "b h w _"]) -> Float[Array, "b h2 w2 c"]:
        h = x
        for i, size in ((1, 1), (2, 3)):
            h = _conv(self.channels, size, 1, f"conv{i}", self.dtype)(h)
            h = jax.nn.relu(_norm(h, f"norm{i}", self.dtype))
        h = _shrink(h) if self.stride > 1 else h
        h = _norm(_conv(4 * self.channels, 1, 1, "conv3", self.dtype)(h), "norm3", self.dtype)
        if self.stride > 1 or x.shape[-1] != 4 * self.channels:
            x = _shrink(x) if self.stride > 1 else x
            x = _norm(_conv(4 * self.channels, 1, 1, "shortcut", self.dtype)(x), "shortcut_norm", self.dtype)
        return jax.nn.relu(x + h)


class Stem(nn.Module):
    """Three 3x3 convolutions, the first of stride 2, and a 2x2 mean: a quarter of the image's size.

    Parameters: conv1 ... conv3, norm1 ... norm3.
    """

    channels: int
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, "b h w _"]) -> Float[Array, "b h2 w2 c"]:
        for i, (channels, stride) in enumerate(
            [(self.channels // 2, 2), (self.channels // 2, 1), (self.channels, 1)], 1
        ):
            x = _conv(channels, 3, stride, f"conv{i}", self.dtype)(x)
            x = jax.nn.relu(_norm(x, f"norm{i}", self.dtype))
        return _shrink(x)


class AttentionPool(nn.Module):
    """One query, the mean of all places, attends to itself and to them; positions are learned.

    features: width of the result.  Parameters: positions {table [h w + 1, c]}, attn {q, k, v, out}.
    """

    heads: int
    features: int
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b features"]:
        b, h, w, c = x.shape
        x = x.reshape(b, h * w, c)
        x = jnp.concatenate([x.mean(1, keepdims=True), x], axis=1)  # [b, h w + 1, c]
        x = Positions(h * w + 1, c**-0.5, dtype=self.dtype, name="positions")(x)
        attn = MultiHeadAttention(self.heads, out_dim=self.features, dtype=self.dtype, name="attn")
        return attn(x[:, :1], x)[:, 0]


class ResNet(nn.Module):
    """Images [b, image, image, 3], normalised (`vgen.data.preprocess.CLIP`), to (map, features).

    map: [b, image / 32, image / 32, 32 width].  features: [b, features], projected by the attention pool.
    blocks: bottlenecks of the four stages.  width: channels behind the stem.  heads: of the pool, by default width / 2.
    Parameters: stem, layer{i}_{j} (stage i from 1, block j from 0), pool.
    Raises ValueError for images of another size, which the pool's positions do not fit.
    """

    blocks: tuple[int, int, int, int] = (3, 4, 6, 3)
    width: int = 64
    features: int = 1024
    heads: int | None = None
    image: int = 224
    dtype: Any = None

    @nn.compact
    def __call__(self, images: Float[Array, "b h w 3"]) -> tuple[Float[Array, "b h2 w2 c"], Float[Array, "b features"]]:
        if images.shape[1:3] != (self.image, self.image):
            raise ValueError(f"ResNet: images must be {self.image} pixels high and wide, got shape {images.shape}")
        x = Stem(self.width, self.dtype, name="stem")(images)
        for i, blocks in enumerate(self.blocks):
            for j in range(blocks):
                stride = 2 if i and not j else 1
                x = Bottleneck(self.width * 2**i, stride, self.dtype, name=f"layer{i + 1}_{j}")(x)
            x = constrain(x)
        heads = self.width // 2 if self.heads is None else self.heads
        return x, AttentionPool(heads, self.features, self.dtype, name="pool")(x)
