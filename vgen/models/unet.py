"""The U-Nets of diffusion models, one configurable network: DDPM, ADM and Stable Diffusion.

Sources: Ho et al. 2020 (arXiv:2006.11239); Dhariwal & Nichol 2021, ADM (arXiv:2105.05233); Rombach et al. 2022
(arXiv:2112.10752); Podell et al. 2023, SDXL (arXiv:2307.01952).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int, Num

from vgen.layers.conv import GroupNorm
from vgen.layers.embed import sinusoids
from vgen.layers.transformer import MLP
from vgen.models.unet_blocks import Given, Level

_DDPM = dict(in_channels=3, out_channels=3, resample="pad", eps=1e-6, sin_first=True, endpoint=True)
DDPM_CIFAR10 = dict(_DDPM, widths=(128, 256, 256, 256), attention=(0, 1, 0, 0), dropout=0.1)
DDPM_256 = dict(_DDPM, widths=(128, 128, 256, 256, 512, 512), attention=(0, 0, 0, 0, 1, 0))

_ADM = dict(in_channels=3, out_channels=6, injection="scale_shift", resample="resblock", head_dim=64, num_classes=1000)
ADM_64 = dict(_ADM, widths=(192, 384, 576, 768), blocks=3, attention=(0, 1, 1, 1), dropout=0.1)
ADM_128 = dict(_ADM, widths=(256, 256, 512, 768, 1024), attention=(0, 0, 1, 1, 1), heads=4, head_dim=None)
ADM_256 = dict(_ADM, widths=(256, 256, 512, 512, 1024, 1024), attention=(0, 0, 0, 1, 1, 1))
ADM_512 = dict(
    _ADM, widths=(128, 256, 256, 512, 512, 1024, 1024), time_width=256, attention=(0, 0, 0, 0, 1, 1, 1)
)  # fmt: skip
ADM_64_TO_256 = dict(_ADM, in_channels=6, widths=(192, 192, 384, 384, 768, 768), attention=(0, 0, 0, 1, 1, 1))
ADM_64_TO_256 |= dict(heads=4, head_dim=None)
ADM_128_TO_512 = dict(_ADM, in_channels=6, widths=(192, 192, 384, 384, 768, 768), attention=(0, 0, 0, 0, 1, 1))

SD1 = dict(widths=(320, 640, 1280, 1280), attention=(1, 1, 1, 0), heads=8, context_dim=768)
SD2 = dict(SD1, heads=1, head_dim=64, context_dim=1024, linear_projection=True)
SDXL = dict(SD2, widths=(320, 640, 1280), attention=(0, 2, 10), mid_attention=10, context_dim=2048, added_dim=2816)
SDXL_REFINER = dict(SDXL, widths=(384, 768, 1536, 1536), attention=(0, 4, 4, 0), mid_attention=4, context_dim=1280)
SDXL_REFINER |= dict(added_dim=2560)
X4_UPSCALER = dict(SD2, in_channels=7, widths=(256, 512, 512, 1024), attention=(0, 1, 1, 1), heads=8, head_dim=None)
X4_UPSCALER |= dict(only_cross=(False, True, True, False), num_classes=1000)


class Encoder(nn.Module, kw_only=True):
    """The half of a U-Net that goes down, and its middle; see `UNet` for the fields."""

    in_channels: int = 4
    widths: tuple[int, ...] = (320, 640, 1280, 1280)
    blocks: int = 2
    attention: tuple[int, ...] = (1, 1, 1, 0)
    mid_attention: int = 1
    heads: int | tuple[int, ...] = 1
    head_dim: int | None = None
    context_dim: int | None = None
    only_cross: tuple[bool, ...] = ()
    linear_projection: bool = False
    injection: str = "add"
    resample: str = "same"
    groups: int = 32
    eps: float = 1e-5
    dropout: float = 0.0
    time_width: int | None = None
    sin_first: bool = False
    endpoint: bool = False
    num_classes: int | None = None
    added_dim: int | None = None
    added_time_width: int = 256
    remat: str = "none"
    unroll: int = 1
    dtype: Any = None

    @property
    def label_rows(self) -> int | None:
        """How many labels there are; None where the network is told none."""
        return self.num_classes

    @property
    def downsampling(self) -> int:
        """Pixels of the input per place of the lowest level along each axis."""
        return 2 ** (len(self.widths) - 1)

    def heads_at(self, i: int) -> int:
        """Heads of the attentions of level i."""
        if self.head_dim is not None:
            return self.widths[i] // self.head_dim
        return self.heads if isinstance(self.heads, int) else self.heads[i]

    def level(self, i: int, name: str, blocks: int, resample: str | None = None) -> Level:
        """Level i, counted from the full resolution; "mid" stands for the middle, at the resolution of the last."""
        width, depth = self.widths[i], self.mid_attention if name == "mid" else self.attention[i]
        heads = self.heads_at(i)
        if depth and (not heads or width % heads or (self.head_dim and width % self.head_dim)):
            raise ValueError(f"{name}: width {width} does not divide into heads={self.heads}, head_dim={self.head_dim}")
        common = dict(groups=self.groups, dtype=self.dtype, zero=True)
        attn = dict(common, heads=heads, eps=self.eps)
        if self.context_dim is not None:
            only_cross = bool(self.only_cross) and self.only_cross[i] and name != "mid"
            attn = dict(common, heads=heads, depth=depth, only_cross=only_cross, unroll=self.unroll)
            attn |= dict(dropout=self.dropout)
        return Level(
            width,
            tuple(depth > 0 and not (name == "mid" and j) for j in range(blocks)),
            dict(common, eps=self.eps, injection=self.injection, dropout=self.dropout),
            attn,
            resample,
            self.resample,
            self.remat,
            name=name,
        )

    def check(self, x: Array, context: Any, labels: Any, added: Any) -> None:
        """Raises ValueError for fields that disagree, sizes that do not divide, and conditions missing or unknown."""
        kind = type(self).__name__
        if len(self.attention) != len(self.widths):
            raise ValueError(f"{kind}: attention {self.attention} must have a number for each of widths {self.widths}")
        if self.resample not in ("same", "pad", "resblock"):
            raise ValueError(f"{kind} resample: got {self.resample!r}, accepted: 'same', 'pad', 'resblock'")
        if x.ndim != 4 or x.shape[-1] != self.in_channels:
            raise ValueError(f"{kind}: x must be [b, h, w, {self.in_channels}], got {x.shape}")
        if x.shape[1] % self.downsampling or x.shape[2] % self.downsampling:
            raise ValueError(f"{kind}: height and width of x {x.shape} must be multiples of {self.downsampling}")
        for name, value, wanted in (
            ("context", context, self.context_dim),
            ("labels", labels, self.num_classes),
            ("added", added, self.added_dim),
        ):
            if (value is None) != (wanted is None):
                lacks = "takes none" if wanted is None else "needs one"
                raise ValueError(f"{kind}: {name} is {'missing' if value is None else 'given'}, this network {lacks}")
        if context is not None and context.shape[-1] != self.context_dim:
            raise ValueError(f"{kind}: context must be [b, m, {self.context_dim}], got {context.shape}")

    def embed(self, x: Array, t: Array, labels: Array | None, added: tuple[Array, Array] | None) -> Array:
        """The embedding [b, 4 time_width] of time, class and added numbers that every residual block gets."""
        width = self.time_width or self.widths[0]
        wide = jnp.promote_types(x.dtype, jnp.float32)
        waves = dict(sin_first=self.sin_first, endpoint=self.endpoint)
        mlp = dict(act="silu", out_dim=4 * width, dtype=self.dtype)
        t = jnp.broadcast_to(jnp.asarray(t, wide), x.shape[:1])
        emb = MLP(4 * width, name="time", **mlp)(sinusoids(t, width, **waves))
        if labels is not None:
            init = nn.initializers.normal(1.0)
            emb = emb + nn.Embed(self.num_classes, 4 * width, self.dtype, embedding_init=init, name="labels")(labels)
        if added is not None:
            pooled, numbers = added
            numbers = sinusoids(jnp.asarray(numbers, wide), self.added_time_width, **waves)
            numbers = numbers.reshape(x.shape[0], numbers.shape[1] * numbers.shape[2])
            both = jnp.concatenate([pooled, numbers], axis=1)
            if both.shape[1] != self.added_dim:
                raise ValueError(
                    f"{type(self).__name__}: added must make {self.added_dim} numbers, got {pooled.shape[1]} of the "
                    f"text and {numbers.shape[1]} of the sizes"
                )
            emb = emb + MLP(4 * width, name="added", **mlp)(both)
        return emb

    def down(self, x: Array, given: Given) -> tuple[Array, list[Array]]:
        """(the middle's output, the skips from the stem on)."""
        x = nn.Conv(self.widths[0], (3, 3), dtype=self.dtype, name="conv_in")(x)
        skips = [x]
        for i in range(len(self.widths)):
            last = i + 1 == len(self.widths)
            x, features = self.level(i, f"down_{i}", self.blocks, None if last else "down")(x, given)
            skips += features if last else [*features, x]
        return self.level(-1, "mid", 2)(x, given)[0], skips

    def head(self, x: Array) -> Array:
        """The last norm and activation."""
        return nn.swish(GroupNorm(self.groups, self.eps, self.dtype, name="norm_out")(x))


class UNet(Encoder, kw_only=True):
    """A noisy picture or latent and its time to what a diffusion model predicts, of `out_channels` channels.

    widths: channels of each level; every level but the last halves the resolution.  blocks: residual blocks per level
      on the way down; one more on the way up.
    attention: for each level, 0 for none; with a context, how many transformer blocks follow every residual block;
      without, 1 for plain self-attention.  mid_attention: the same of the middle.
    heads: number of heads, one for all levels or one for each; head_dim: their width, which takes precedence.
    context_dim: width of the text states, None for networks without text.  only_cross: levels whose transformers look
      at the text in place of themselves (SD's x4 upscaler).  linear_projection: checkpoints hold the projections around
      transformers as matrices, not as 1x1 convolutions (SD 2, XL); the network is the same.
    injection: "add" (DDPM) or "scale_shift" (AdaGN).  resample: "same", "pad" (DDPM) or "resblock" (ADM).
    groups, eps: of the GroupNorms; those ahead of transformers have 1e-6.
    time_width: of the sinusoids, widths[0] by default.  sin_first, endpoint: see `sinusoids` (both in DDPM alone).
    num_classes: rows of the table of labels.  added_dim: width of pooled text and embedded sizes together (SDXL:
      1280 + 6 * 256), added_time_width: that of a size's sinusoids.
    remat, unroll: see `vgen.layers.transformer.stack`; of the residual blocks too.

    Parameters: time, labels, added, conv_in, down_i, mid, up_i (i counts from the full resolution; each with block_j,
    attn_j, resample), norm_out, conv_out.  The last convolution of every branch and conv_out start at zero.
    """

    out_channels: int = 4

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"],
        t: Num[Array, "*b"],
        *,
        context: Float[Array, "b m d"] | None = None,
        context_mask: Bool[Array, "b m"] | None = None,
        contexts: Mapping[str, tuple] = {},
        labels: Int[Array, "b"] | None = None,
        added: tuple[Array, Array] | None = None,
        train: bool = False,
        control: Any = None,
        step: Any = None,
        residuals: Sequence[Array] | None = None,
    ) -> Float[Array, "b h w out"]:
        """x: noisy input, with the channels of further pictures behind it where the network takes some.

        t: time, integer or float, [b] or one for all (the published networks: 0 .. 999).
        context, context_mask: text states and which of them may be seen.  contexts: {name: (states, mask or None,
        strength)} for the cross-attentions (IP-Adapter).  labels: int32 in [0, num_classes).
        added: (pooled text [b, e], numbers [b, n]), the sizes and crops of SDXL, in pixels.
        train: whether dropout (rng "dropout") is on.  control, step: see `vgen.layers.attention`.
        residuals: added to the skips, from the stem on, and the last one to the middle's output (ControlNet).
        Returns float32, or wider as x.  Raises ValueError as `check` says, and for a wrong number of residuals.
        """
        self.check(x, context, labels, added)
        emb = self.embed(x, t, labels, added)
        given = Given(emb, context, context_mask, contexts, control, step, train)
        wide = jnp.promote_types(x.dtype, jnp.float32)
        x, skips = self.down(x, given)
        if residuals is not None:
            if len(residuals) != len(skips) + 1:
                raise ValueError(f"UNet: expected {len(skips)} residuals and that of the middle, got {len(residuals)}")
            *rest, mid = residuals
            x, skips = x + mid, [skip + residual for skip, residual in zip(skips, rest, strict=True)]
        blocks = self.blocks + 1
        for i in reversed(range(len(self.widths))):
            x, _ = self.level(i, f"up_{i}", blocks, "up" if i else None)(x, given, skips[-blocks:])
            del skips[-blocks:]
        zeros = nn.initializers.zeros
        x = nn.Conv(self.out_channels, (3, 3), dtype=self.dtype, kernel_init=zeros, name="conv_out")(self.head(x))
        return x.astype(wide)
