"""The face recogniser of ArcFace: an improved ResNet, and the margins that it is trained with.

Source: Deng et al. 2018, arXiv:1801.07698 (deepinsight/insightface, recognition/arcface_torch).
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from vgen.layers.conv import BatchNorm

LAYERS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 14, 3), 100: (3, 13, 30, 3), 200: (6, 26, 60, 6)}
WIDTHS = (64, 128, 256, 512)


class PReLU(nn.Module):
    """max(x, 0) + slope min(x, 0), one slope per channel; parameter: slope [c]."""

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        slope = self.param("slope", nn.initializers.constant(0.25), (x.shape[-1],))
        return jnp.where(x >= 0, x, slope.astype(x.dtype) * x)


class _Normed(nn.Module):
    """What blocks and network share: norms that note their new statistics, convolutions without bias."""

    def norm(self, x, name, train, updates):
        y, new = BatchNorm(dtype=self.dtype, name=name)(x, train)
        updates |= {f"{name}/{k}": v for k, v in new.items()}
        return y

    def conv(self, x, channels, size, name, stride=1):
        kernel, padding = (size, size), size // 2
        init = nn.initializers.normal(0.1)
        layer = nn.Conv(
            channels, kernel, stride, padding, use_bias=False, dtype=self.dtype, kernel_init=init, name=name
        )
        return layer(x)


class Block(_Normed):
    """norm, convolution, norm, PReLU, convolution (strided), norm; the shortcut is a 1x1 convolution with norm where
    the block strides.

    Parameters: bn1, conv1, bn2, prelu, conv2, bn3 and, in strided blocks, shortcut_conv and shortcut_bn.
    Returns (map, new running statistics, {} unless train).
    """

    channels: int
    stride: int
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, "b h w _"], train: bool) -> tuple[Float[Array, "b h2 w2 c"], dict[str, Array]]:
        updates: dict[str, Array] = {}
        h = self.conv(self.norm(x, "bn1", train, updates), self.channels, 3, "conv1")
        h = PReLU(name="prelu")(self.norm(h, "bn2", train, updates))
        h = self.norm(self.conv(h, self.channels, 3, "conv2", self.stride), "bn3", train, updates)
        if self.stride > 1:
            x = self.conv(x, self.channels, 1, "shortcut_conv", self.stride)
            x = self.norm(x, "shortcut_bn", train, updates)
        return x + h, updates


class IResNet(_Normed):
    """Aligned faces [b, 112, 112, 3] in [-1, 1] (RGB, (x - 127.5) / 127.5) to features [b, features].

    layers: blocks per stage, see LAYERS.  The features are not normalised; identities are compared by their cosine.
    image_size: the side of the images, a multiple of 16.

    Parameters: conv1, bn1, prelu, layer{1..4}_{i}, bn2, fc, features (a batch norm whose scale stays 1 in training).
    Raises ValueError for images of another size.
    """

    layers: tuple[int, ...] = LAYERS[50]
    features: int = 512
    image_size: int = 112
    dtype: Any = None

    @nn.compact
    def embed(self, images: Float[Array, "b h w 3"], train: bool) -> tuple[Float[Array, "b d"], dict[str, Array]]:
        """Features, and the new running statistics by path, {} unless train (batch statistics normalise then)."""
        if images.shape[1:3] != (self.image_size, self.image_size) or self.image_size % 16:
            raise ValueError(
                f"IResNet: images {images.shape} must have {self.image_size} pixels a side, a multiple of 16"
            )
        updates: dict[str, Array] = {}
        x = self.norm(self.conv(images, WIDTHS[0], 3, "conv1"), "bn1", train, updates)
        x = PReLU(name="prelu")(x)
        for stage, (blocks, width) in enumerate(zip(self.layers, WIDTHS, strict=True), 1):
            for i in range(blocks):
                name = f"layer{stage}_{i}"
                x, new = Block(width, 1 if i else 2, self.dtype, name=name)(x, train)
                updates |= {f"{name}/{k}": v for k, v in new.items()}
        x = self.norm(x, "bn2", train, updates)
        x = nn.Dense(self.features, dtype=self.dtype, name="fc")(x.reshape(x.shape[0], -1))
        return self.norm(x[:, None, None], "features", train, updates)[:, 0, 0], updates

    def __call__(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b d"]:
        """Features in evaluation mode."""
        return self.embed(images, False)[0]


def margin_logits(
    cosine: Float[Array, "b classes"],
    labels: Int[Array, "b"],
    *,
    scale: float = 64.0,
    angle: float = 0.0,
    additive: float = 0.0,
    interclass_filter: float = 0.0,
) -> Float[Array, "b classes"]:
    """Logits for a cross-entropy that pushes each target's angle below those of other classes by a margin.

    cosine: between unit features and unit class weights, in [-1, 1].  labels: int32, -1 for rows without a target
    among these classes, which get no margin (classes may be split over devices).
    angle: radians added to the target's angle (ArcFace: 0.5, eq. 3).  additive: taken off its cosine (CosFace: 0.4).
    interclass_filter: other classes above this cosine are set to 0, as likely mislabelled (0: none).
    Where the angle with its margin passes pi, the logit rises again: the authors' code has no case for it.
    Raises ValueError if both margins are given.
    """
    if angle and additive:
        raise ValueError(f"margin_logits: give angle or additive, got {angle} and {additive}")
    target = jnp.arange(cosine.shape[-1]) == labels[:, None]  # no row of label -1 has one
    if interclass_filter > 0:
        cosine = jnp.where((cosine > interclass_filter) & ~target, 0, cosine)
    if angle:
        shifted = jnp.cos(jnp.arccos(jax.lax.stop_gradient(cosine)) + angle)
        # QUIRK: the authors turn the angle outside of the gradient's tape (arcface_torch/losses.py, ArcFace), so the
        # gradient of every logit is `scale`, not scale sin(angle + margin) / sin(angle).
        return scale * (cosine + jnp.where(target, shifted - jax.lax.stop_gradient(cosine), 0))
    return scale * jnp.where(target, cosine - additive, cosine)
