"""What U-Nets are made of: a level of residual blocks with attention behind them, and transformers on feature maps."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from vgen.layers.conv import Downsample, GroupNorm, ResBlock, SpatialAttention, Upsample
from vgen.layers.linear import linear
from vgen.layers.transformer import Block, Stacked, rematted
from vgen.sharding import constrain


class Given(NamedTuple):
    """What every block of a U-Net is told beside its features.

    emb: [b, d], the embedding of time and conditions.  context: [b, m, any], text states or None; context_mask: bool
    [b, m], or None.  contexts: named contexts of the cross-attentions, see `MultiHeadAttention`.
    control, step: for AttentionControl.  train: whether dropout is on.
    """

    emb: Array
    context: Array | None = None
    context_mask: Array | None = None
    contexts: Mapping[str, tuple] = {}
    control: Any = None
    step: Any = None
    train: bool = False


class Transformer(Stacked, kw_only=True):
    """Transformer blocks on the places of a feature map, with a residual around them (Rombach et al. 2022, sec. 3.3).

    GroupNorm, a projection, `depth` blocks (self-attention, cross-attention to the text, gated MLP), a projection.
    only_cross: see `Block`.  zero: the last projection starts at zero.
    Parameters: norm, proj_in, proj_out and layer, or layers [depth, ...] where depth > 1, which run as one scan.
    """

    heads: int
    depth: int = 1
    only_cross: bool = False
    groups: int = 32
    dropout: float = 0.0
    zero: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], given: Given) -> Float[Array, "b h w c"]:
        """Raises ValueError if the channels do not divide into the heads."""
        b, h, w, c = x.shape
        if c % self.heads:
            raise ValueError(f"Transformer {self.name!r}: {c} channels do not divide into {self.heads} heads")
        y = GroupNorm(self.groups, 1e-6, self.dtype, name="norm")(x).reshape(b, h * w, c)
        y = linear(c, dtype=self.dtype, name="proj_in")(y)
        block = Block(
            self.heads,
            4 * c,
            cross=True,
            eps=1e-5,
            act="gelu",
            gated=True,
            qkv_bias=False,
            dropout=self.dropout,
            only_cross=self.only_cross,
            dtype=self.dtype,
            name="layers" if self.depth > 1 else "layer",
        )
        cond = given._asdict()
        del cond["emb"]
        if self.depth > 1:
            y = self.run_stack(block, y, depth=self.depth, **cond)
        else:
            y = rematted(lambda block, y: block(y, **cond), self.remat)(block, y)
        init = dict(kernel_init=nn.initializers.zeros) if self.zero else {}
        return x + linear(c, dtype=self.dtype, name="proj_out", **init)(y).reshape(b, h, w, c)


class Level(nn.Module):
    """Residual blocks at one resolution, attention behind some of them, and a change of resolution at the end.

    attention: for every residual block, whether attention follows.  res: arguments of the residual blocks.
    attn: arguments of the attention: a `Transformer` where it has a depth, else `SpatialAttention`.
    resample: None, "down" or "up".  kind: how: "same" or "pad" (`Downsample`; nearest neighbours and a convolution on
      the way up) or "resblock" (a residual block that resamples).  remat: see `vgen.layers.transformer.stack`.
    Parameters: block_i, attn_i, resample.
    """

    channels: int
    attention: tuple[bool, ...]
    res: Mapping[str, Any]
    attn: Mapping[str, Any]
    resample: str | None = None
    kind: str = "same"
    remat: str = "none"

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w _"], given: Given, skips: Sequence[Array] = ()
    ) -> tuple[Float[Array, "b h2 w2 c"], list[Array]]:
        """(the result, what each residual block with its attention gave); skips join the inputs, the last one first."""
        skips, features = list(skips), []
        residual = rematted(lambda block, x: block(x, given.emb, given.train), self.remat)
        look = rematted(lambda attn, x: attn(x, control=given.control, step=given.step), self.remat)
        for i, attentive in enumerate(self.attention):
            x = jnp.concatenate([x, skips.pop()], axis=-1) if skips else x
            x = residual(ResBlock(self.channels, name=f"block_{i}", **self.res), x)
            if attentive and "depth" in self.attn:
                x = Transformer(remat=self.remat, name=f"attn_{i}", **self.attn)(x, given)
            elif attentive:
                x = look(SpatialAttention(name=f"attn_{i}", **self.attn), x)
            features.append(x)
        if self.resample is not None and self.kind == "resblock":
            x = residual(ResBlock(self.channels, resample=self.resample, name="resample", **self.res), x)
        elif self.resample == "down":
            x = Downsample(self.kind, self.res.get("dtype"), name="resample")(x)
        elif self.resample == "up":
            x = Upsample(self.res.get("dtype"), name="resample")(x)
        return constrain(x), features
