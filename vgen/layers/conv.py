"""Convolutional building blocks: GroupNorm, BatchNorm, residual blocks, resampling and spatial self-attention.

One parametrised block serves the family that descends from the DDPM U-Net: the taming VQGAN (biased convolutions,
strided downsampling, attention) and the MaskGIT/Muse tokenizer (bias-free, average pooling). Activations are swish,
images and feature maps NHWC.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from vgen.layers.attention import Site, attention, keeping
from vgen.layers.linear import linear
from vgen.layers.transformer import modulate
from vgen.sharding import constrain


def group_norm(
    x: Float[Array, "b h w c"],
    scale: Float[Array, "c"],
    bias: Float[Array, "c"],
    *,
    groups: int,
    eps: float,
) -> Float[Array, "b h w c"]:
    """Group normalisation (Wu & He 2018, eq. 7) over space and channels of a group, in float32 or wider.

    The variance is that within channels plus that between them, both centred first: no difference of large numbers,
    and spatial reductions keep the channels contiguous, which is several times faster on a CPU than a grouped layout.

    Returns the normalised map in the computing precision (float32, or x's if that is wider).
    """
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    b, c = x.shape[0], x.shape[-1]
    mean = x.mean((1, 2), keepdims=True)  # [b, 1, 1, c]
    within = jnp.square(x - mean).mean((1, 2)).reshape(b, groups, c // groups).mean(-1, keepdims=True)
    mean = mean.reshape(b, groups, c // groups)
    group_mean = mean.mean(-1, keepdims=True)
    var = within + jnp.square(mean - group_mean).mean(-1, keepdims=True)  # [b, g, 1]

    def per_channel(t):
        return jnp.repeat(t[..., 0], c // groups, axis=1)[:, None, None, :]  # [b, 1, 1, c]

    gain = per_channel(jax.lax.rsqrt(var + eps)) * scale
    return x * gain + (bias - per_channel(group_mean) * gain)


class GroupNorm(nn.Module):
    """`group_norm` with a learned scale and bias; parameters `scale` [c] and `bias` [c].

    groups: how many groups the channels fall into (32 in every published model here).
    Raises ValueError if the channels do not divide into them.
    """

    groups: int = 32
    eps: float = 1e-6
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        c = x.shape[-1]
        if c % self.groups:
            raise ValueError(
                f"GroupNorm {self.name!r}: {c} channels do not divide into {self.groups} groups; "
                "choose channels as a multiple of `groups`, or fewer groups"
            )
        scale = self.param("scale", nn.initializers.ones_init(), (c,))
        bias = self.param("bias", nn.initializers.zeros_init(), (c,))
        y = group_norm(x, scale, bias, groups=self.groups, eps=self.eps)
        return y.astype(jnp.promote_types(x.dtype, scale.dtype) if self.dtype is None else self.dtype)


class BatchNorm(nn.Module):
    """Batch normalisation whose running statistics are parameters, their new values returned and not stored.

    momentum: weight of the new batch in the running statistics. In training, the variance that normalises is the
    biased one and the variance that is averaged the unbiased one, as in PyTorch.
    running: False: there are no such statistics, every call normalises by its own batch.

    Parameters: scale, bias, mean, var, each [c]; mean and var are buffers, no gradient reaches them.
    Returns (normalised map, {"mean", "var"} after this batch, or {} when train is False).
    """

    momentum: float = 0.1
    eps: float = 1e-5
    scale_init: Any = nn.initializers.ones_init()
    dtype: Any = None
    running: bool = True

    @nn.compact
    def __call__(
        self, x: Float[Array, "*b c"], train: bool
    ) -> tuple[Float[Array, "*b c"], dict[str, Float[Array, "c"]]]:
        c, out = x.shape[-1], self.dtype
        scale = self.param("scale", self.scale_init, (c,))
        bias = self.param("bias", nn.initializers.zeros_init(), (c,))
        inits = {"mean": nn.initializers.zeros_init(), "var": nn.initializers.ones_init()} if self.running else {}
        old = {k: jax.lax.stop_gradient(self.param(k, init, (c,))) for k, init in inits.items()}
        out = jnp.promote_types(x.dtype, scale.dtype) if out is None else out
        x, rows = x.astype(jnp.promote_types(x.dtype, jnp.float32)), tuple(range(x.ndim - 1))
        if old and not train:
            mean, var, updates = old["mean"], old["var"], {}
        else:
            mean = x.mean(rows)
            var = jnp.square(x - mean).mean(rows)
            n = x.size // c
            batch = {"mean": mean, "var": var * (n / max(n - 1, 1))}
            updates = {
                k: (old[k] + self.momentum * (jax.lax.stop_gradient(batch[k]) - old[k])).astype(old[k].dtype)
                for k in old
            }
        gain = jax.lax.rsqrt(var + self.eps) * scale
        return (x * gain + (bias - mean * gain)).astype(out), updates


class ResBlock(nn.Module):
    """Pre-activation residual block: (GroupNorm, swish, 3x3 convolution) twice, plus a shortcut.

    channels: output channels. bias: whether the convolutions have one.
    shortcut: where the 1x1 projection reads when the channel count changes. "input": the block's input (DDPM, taming).
      "branch": the output of the second convolution, so that the input is dropped (MaskGIT).
    injection: how the embedding of the call enters. "add": a projection of it is added behind the first convolution
      (DDPM); "scale_shift": it scales and shifts what the second norm gives (ADM's AdaGN, Dhariwal & Nichol 2021).
    resample: "down" or "up": a 2x2 mean, or nearest neighbours, ahead of the first convolution and on the shortcut
      (BigGAN's blocks, as ADM has them). dropout: ahead of the second convolution.
    zero: the second convolution starts at zero, so that the block starts as its shortcut. kernel: size of both.

    Parameters: norm1, conv1, norm2, conv2 and, when the channel count changes, shortcut; time where there is an
    embedding. Raises ValueError for an unknown shortcut, injection or resample.
    """

    channels: int
    bias: bool = True
    shortcut: str = "input"
    groups: int = 32
    eps: float = 1e-6
    dtype: Any = None
    injection: str = "add"
    resample: str | None = None
    dropout: float = 0.0
    zero: bool = False
    kernel: int = 3

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w _"], emb: Float[Array, "b d"] | None = None, train: bool = False
    ) -> Float[Array, "b h2 w2 c"]:
        """emb: an embedding of time and conditions, ahead of its activation. train: dropout (rng "dropout") is on."""
        if self.injection not in ("add", "scale_shift"):
            raise ValueError(f"ResBlock injection: got {self.injection!r}, accepted: 'add', 'scale_shift'")

        def conv(name, size, **kwargs):
            return nn.Conv(self.channels, (size, size), use_bias=self.bias, dtype=self.dtype, name=name, **kwargs)

        h = nn.swish(GroupNorm(self.groups, self.eps, self.dtype, name="norm1")(x))
        h, x = _resampled(h, self.resample), _resampled(x, self.resample)
        h = constrain(conv("conv1", self.kernel)(h))
        if emb is not None and self.injection == "add":
            h = h + linear(self.channels, dtype=self.dtype, name="time")(nn.swish(emb))[:, None, None]
        h = GroupNorm(self.groups, self.eps, self.dtype, name="norm2")(h)
        if emb is not None and self.injection == "scale_shift":
            h = modulate(h, emb, dtype=self.dtype, name="time")
        h = nn.Dropout(self.dropout, deterministic=not train)(nn.swish(h))
        h = conv("conv2", self.kernel, **(dict(kernel_init=nn.initializers.zeros) if self.zero else {}))(h)
        if x.shape[-1] == self.channels:
            return constrain(x + h)
        if self.shortcut == "input":
            return constrain(conv("shortcut", 1)(x) + h)
        if self.shortcut == "branch":
            # QUIRK: MaskGIT's ResBlock projects the branch instead of the input (google-research/maskgit,
            # nets/vqgan_tokenizer.py), so its 1x1 kernel is [1, 1, channels, channels]. Tested in vqgan_test.py.
            return constrain(conv("shortcut", 1)(h) + h)
        raise ValueError(f"ResBlock shortcut: got {self.shortcut!r}, accepted: 'input', 'branch'")


def _resampled(x, way):
    """x at half or twice its resolution, or as it is."""
    if way is None:
        return x
    if way == "down":
        return _mean_2x2(x)
    if way == "up":
        return nearest_upsample(x)
    raise ValueError(f"ResBlock resample: got {way!r}, accepted: None, 'down', 'up'")


def _mean_2x2(x):
    b, h, w, c = x.shape
    return x.reshape(b, h // 2, 2, w // 2, 2, c).mean((2, 4))


class Downsample(nn.Module):
    """Halves height and width.

    kind: "pad" pads one row and column at the bottom and right, then a 3x3 convolution of stride 2 (taming, DDPM);
      "same" is a 3x3 convolution of stride 2 with padding 1 (ADM, Stable Diffusion's U-Net);
      "average" is a 2x2 mean with no parameters (MaskGIT, Muse); "stride" a 4x4 convolution of stride 2, padding 1
      (MaskGIT's `conv_downsample`).

    Parameters: conv (none for "average"). Raises ValueError on any other kind.
    """

    kind: str = "pad"
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
        c = x.shape[-1]
        if self.kind == "pad":
            # QUIRK: asymmetric padding (CompVis/taming-transformers, modules/diffusionmodules/model.py).
            return nn.Conv(c, (3, 3), 2, padding=((0, 1), (0, 1)), dtype=self.dtype, name="conv")(x)
        if self.kind == "same":
            return nn.Conv(c, (3, 3), 2, padding=1, dtype=self.dtype, name="conv")(x)
        if self.kind == "average":
            return _mean_2x2(x)
        if self.kind == "stride":
            return nn.Conv(c, (4, 4), 2, padding=1, dtype=self.dtype, name="conv")(x)
        raise ValueError(f"Downsample kind: got {self.kind!r}, accepted: 'pad', 'average', 'stride', 'same'")


def nearest_upsample(x: Float[Array, "b h w c"], factor: int = 2) -> Float[Array, "b h2 w2 c"]:
    """Repeats every pixel `factor` times along height and width."""
    b, h, w, c = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None, :], (b, h, factor, w, factor, c))
    return x.reshape(b, h * factor, w * factor, c)


def space_to_depth(x: Float[Array, "b h w c"], size: int) -> Float[Array, "b h2 w2 c2"]:
    """Each size x size patch becomes one place of size^2 c channels, ordered (row, column, channel)."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // size, size, w // size, size, c).swapaxes(2, 3)
    return x.reshape(b, h // size, w // size, size * size * c)


def depth_to_space(x: Float[Array, "b h w c"], size: int) -> Float[Array, "b h2 w2 c2"]:
    """The inverse of `space_to_depth` (the sub-pixel layer of Shi et al. 2016)."""
    b, h, w, c = x.shape
    x = x.reshape(b, h, w, size, size, c // size**2).swapaxes(2, 3)
    return x.reshape(b, h * size, w * size, c // size**2)


class Upsample(nn.Module):
    """Doubles height and width: nearest neighbour, then a biased 3x3 convolution; parameters: conv."""

    dtype: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
        return constrain(nn.Conv(x.shape[-1], (3, 3), dtype=self.dtype, name="conv")(nearest_upsample(x)))


class SpatialAttention(nn.Module):
    """Residual self-attention over the positions of a feature map, after GroupNorm (taming's AttnBlock).

    heads: 1 in the published tokenizers. zero: the last projection starts at zero.
    Parameters: norm, q, k, v, out (dense [c, c] with bias).
    Raises ValueError if the channels do not divide into the heads.
    """

    heads: int = 1
    groups: int = 32
    eps: float = 1e-6
    dtype: Any = None
    zero: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], control=None, step=None) -> Float[Array, "b h w c"]:
        """control, step: see `vgen.layers.attention`."""
        b, height, width, c = x.shape
        if c % self.heads:
            raise ValueError(f"SpatialAttention {self.name!r}: {c} channels do not divide into {self.heads} heads")
        h = GroupNorm(self.groups, self.eps, self.dtype, name="norm")(x).reshape(b, height * width, c)
        q, k, v = (
            linear(c, dtype=self.dtype, name=name)(h).reshape(b, height * width, self.heads, c // self.heads)
            for name in ("q", "k", "v")
        )  # [b, n, heads, head_dim]
        h = attention(q, k, v, control=keeping(self, control), site=Site("self", "/".join(self.path)), step=step)
        init = dict(kernel_init=nn.initializers.zeros) if self.zero else {}
        return x + linear(c, dtype=self.dtype, name="out", **init)(h.reshape(b, height, width, c))
