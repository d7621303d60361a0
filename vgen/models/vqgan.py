"""Convolutional image tokenizers: the taming VQGAN and the MaskGIT/Muse tokenizer, as two layouts of one network.

Sources: Esser et al. 2021, "Taming Transformers" (CompVis/taming-transformers); Chang et al. 2022, "MaskGIT"
(google-research/maskgit); Chang et al. 2023, "Muse", which publishes sizes but no code: base width 128, two residual
blocks per level, factor 16 or 8, 8192 codes of width 256; a fine-tuned decoder of width 256 with four blocks per level.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from vgen.layers.conv import (
    Downsample,
    GroupNorm,
    ResBlock,
    SpatialAttention,
    Upsample,
    depth_to_space,
    space_to_depth,
)
from vgen.layers.quantize import Quantized, VectorQuantizer
from vgen.sharding import constrain


@dataclasses.dataclass(frozen=True)
class Layout:
    """What tells the families apart beside their sizes.

    bias: of the residual blocks' convolutions. stem_bias: of the encoder's first. shortcut, downsample: see
    `vgen.layers.conv`. out_kernel: size of the encoder's last convolution. mid_blocks: residual blocks at the lowest
    resolution (None: as many as per level). mid_attention: attention after the first of them.
    decoder_extra: residual blocks per decoder level beyond the encoder's.
    local: every latent is made from its own patch of the image alone: the encoder works on each patch by itself, with
      1x1 convolutions and norms over a patch's channels. Codes then say what is in a patch and nothing of what is
      around it, and so serve in pictures unlike those of training. Takes one level, whose factor is `patch`; the
      decoder sees all latents.
    """

    bias: bool = True
    stem_bias: bool = True
    shortcut: str = "input"
    downsample: str = "pad"
    out_kernel: int = 3
    mid_blocks: int | None = 2
    mid_attention: bool = True
    decoder_extra: int = 1
    local: bool = False


TAMING = Layout()
MASKGIT = Layout(
    bias=False,
    stem_bias=False,
    shortcut="branch",
    downsample="average",
    out_kernel=1,
    mid_blocks=None,
    mid_attention=False,
    decoder_extra=0,
)


def resolve_layout(layout: str | Layout) -> Layout:
    """The layout of a name, "taming" or "maskgit"; a Layout is returned as it is. Raises ValueError otherwise."""
    if isinstance(layout, Layout):
        return layout
    if layout == "taming":
        return TAMING
    if layout == "maskgit":
        return MASKGIT
    raise ValueError(f"layout: got {layout!r}, accepted: 'taming', 'maskgit' or a vqgan.Layout")


def count_res_blocks(
    levels: int, blocks: int, layout: str | Layout = "maskgit", decoder_blocks: int | None = None
) -> int:
    """Residual blocks of encoder and decoder together.

    MaskGIT's layout with two per level has 24 at factor 16 (five levels: 2 * 5 + 2 in each half) and 20 at factor 8.
    Muse speaks of 19 without listing them; five levels of two in each half already make 20, so its figure follows from
    no layout that keeps its own "two per level", and vgen takes MaskGIT's.
    """
    layout = resolve_layout(layout)
    decoder_blocks = blocks + layout.decoder_extra if decoder_blocks is None else decoder_blocks
    return sum(levels * n + (n if layout.mid_blocks is None else layout.mid_blocks) for n in (blocks, decoder_blocks))


class Level(nn.Module):
    """Residual blocks at one resolution, each followed by attention where asked; parameters block_i, attn_i."""

    channels: int
    blocks: int
    attention: tuple[bool, ...]
    layout: Layout
    groups: int
    remat: bool
    dtype: Any
    kernel: int = 3

    @nn.compact
    def __call__(self, x: Float[Array, "b h w _"]) -> Float[Array, "b h w c"]:
        block, attn = (nn.remat(m) if self.remat else m for m in (ResBlock, SpatialAttention))
        for i in range(self.blocks):
            x = block(
                self.channels,
                self.layout.bias,
                self.layout.shortcut,
                self.groups,
                dtype=self.dtype,
                kernel=self.kernel,
                name=f"block_{i}",
            )(x)
            if self.attention[i]:
                x = attn(groups=self.groups, dtype=self.dtype, name=f"attn_{i}")(x)
        return constrain(x)


class _Half(nn.Module):
    """Fields that encoder and decoder share; see VQGAN for their meaning."""

    channels: int = 128
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    blocks: int = 2
    attention_levels: tuple[int, ...] = ()
    latent_channels: int = 256
    layout: str | Layout = "maskgit"
    image_channels: int = 3
    image_range: tuple[float, float] = (-1.0, 1.0)
    patch: int = 1
    groups: int = 32
    remat: bool = False
    dtype: Any = None

    kernel = 3  # of the residual blocks

    @property
    def factor(self) -> int:
        return self.patch * 2 ** (len(self.multipliers) - 1)

    def level(self, i: int, name: str) -> Level:
        attention = (i in self.attention_levels,) * self.blocks
        channels = self.channels * self.multipliers[i]
        layout = resolve_layout(self.layout)
        sizes = (channels, self.blocks, attention, layout, self.groups, self.remat, self.dtype, self.kernel)
        return Level(*sizes, name=name)

    def mid(self) -> Level:
        layout = resolve_layout(self.layout)
        blocks = self.blocks if layout.mid_blocks is None else layout.mid_blocks
        attention = tuple(layout.mid_attention and i == 0 for i in range(blocks))
        channels = self.channels * self.multipliers[-1]
        sizes = (channels, blocks, attention, layout, self.groups, self.remat, self.dtype, self.kernel)
        return Level(*sizes, name="mid")

    def conv(self, channels: int, size: int, name: str, bias: bool = True) -> nn.Conv:
        return nn.Conv(channels, (size, size), use_bias=bias, dtype=self.dtype, name=name)


class Encoder(_Half):
    """Images [b, h, w, 3] in [-1, 1] to latents [b, h / f, w / f, latent_channels], f = 2^(levels - 1).

    Parameters: conv_in, down_i (block_j, attn_j), downsample_i, mid (block_j, attn_0), norm_out, conv_out;
    i counts from the image's resolution down. Raises ValueError if h or w is no multiple of f, or if a local layout
    has more than one level.
    """

    @property
    def kernel(self) -> int:
        return 1 if resolve_layout(self.layout).local else 3

    @nn.compact
    def __call__(self, images: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        layout, factor = resolve_layout(self.layout), self.factor
        if images.shape[1] % factor or images.shape[2] % factor:
            raise ValueError(
                f"Encoder: height and width of images {images.shape} must be multiples of the factor {factor}; "
                "resize or crop them"
            )
        low, high = self.image_range
        if (low, high) != (-1.0, 1.0):
            # QUIRK: MaskGIT's tokenizer takes images in [0, 1] (its release reads uint8 / 255); vgen's are in [-1, 1].
            images = (images + 1) * ((high - low) / 2) + low
        x = space_to_depth(images, self.patch)
        grid = x.shape[:3]
        if layout.local:
            if len(self.multipliers) > 1:
                raise ValueError(
                    f"Encoder: a local layout has one level, got multipliers {self.multipliers}; set patch instead"
                )
            x = x.reshape(-1, 1, 1, x.shape[-1])  # [b * h / f * w / f, 1, 1, c]: every patch a picture of its own
        x = self.conv(self.channels, self.kernel, "conv_in", layout.stem_bias)(x)
        for i in range(len(self.multipliers)):
            x = self.level(i, f"down_{i}")(x)
            if i + 1 < len(self.multipliers):
                x = Downsample(layout.downsample, self.dtype, name=f"downsample_{i}")(x)
        x = self.mid()(x)
        x = nn.swish(GroupNorm(self.groups, dtype=self.dtype, name="norm_out")(x))
        x = self.conv(self.latent_channels, self.kernel if layout.local else layout.out_kernel, "conv_out")(x)
        return x.reshape(*grid, -1) if layout.local else x


class Decoder(_Half):
    """Latents [b, h, w, latent_channels] to images [b, h * f, w * f, 3], nominally in [-1, 1], not clipped.

    `blocks` counts this decoder's own residual blocks per level: taming has one more than its encoder.

    Parameters: conv_in, mid (block_j, attn_0), up_i (block_j, attn_j), upsample_i, norm_out, conv_out; i counts from
    the image's resolution down, so levels run from the last to the first. `conv_out/kernel` is the "last layer" of the
    adaptive GAN weight.
    """

    @nn.compact
    def __call__(self, z: Float[Array, "b h2 w2 d"]) -> Float[Array, "b h w c"]:
        if z.shape[-1] != self.latent_channels:
            raise ValueError(f"Decoder: latents {z.shape} must have latent_channels={self.latent_channels} channels")
        x = self.conv(self.channels * self.multipliers[-1], 3, "conv_in")(z)
        x = self.mid()(x)
        for i in reversed(range(len(self.multipliers))):
            x = self.level(i, f"up_{i}")(x)
            if i:
                x = Upsample(self.dtype, name=f"upsample_{i}")(x)
        x = nn.swish(GroupNorm(self.groups, dtype=self.dtype, name="norm_out")(x))
        images = depth_to_space(self.conv(self.image_channels * self.patch**2, 3, "conv_out")(x), self.patch)
        low, high = self.image_range
        if (low, high) != (-1.0, 1.0):
            images = (images - low) * (2 / (high - low)) - 1  # QUIRK: the encoder's map, undone
        return images


class Tokenizer(nn.Module):
    """What tokenizers of images share; theirs are `encoder`, `quantizer`, `decoder`, num_codes, dtype, downsampling."""

    @property
    def num_tokens(self) -> int:
        """Codebook size: tokens are in [0, num_tokens)."""
        return self.num_codes

    def encode(self, images: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        """Images to latents of the codes' width, before quantisation."""
        return self.encoder(images)

    def quantize(self, z: Float[Array, "b h2 w2 d"]) -> Quantized:
        """Latents to codes (straight-through), token indices, loss terms and codebook statistics."""
        return self.quantizer(z)

    def tokenize(self, images: Float[Array, "b h w c"]) -> Int[Array, "b h2 w2"]:
        """Images to tokens."""
        return self.quantizer(self.encode(images)).indices

    def decode(self, z_q: Float[Array, "b h2 w2 d"]) -> Float[Array, "b h w c"]:
        """Codes, or any latents of their width, to images, not clipped."""
        return self.decoder(z_q if self.dtype is None else jnp.asarray(z_q, self.dtype))

    def decode_indices(self, tokens: Int[Array, "b h2 w2"]) -> Float[Array, "b h w c"]:
        """Tokens to images, not clipped."""
        return self.decode(self.quantizer.lookup(tokens))

    def __call__(self, images: Float[Array, "b h w c"]) -> tuple[Float[Array, "b h w c"], Quantized]:
        """Reconstructions and what the quantizer said."""
        quantized = self.quantize(self.encode(images))
        return self.decode(quantized.z_q), quantized


class VQGAN(Tokenizer):
    """Encoder, vector quantizer and decoder; images in [-1, 1] at its edges, tokens int32 in between.

    channels, multipliers: width at the image's resolution and its multiples, one per level; the downsampling factor is
      patch * 2^(levels - 1). blocks: residual blocks per encoder level.
    attention_levels: indices of levels with attention (taming at factor 16: (4,), its 16 x 16 level). By level, where
      the taming code goes by nominal resolution, so any image size takes the same network.
    latent_channels: width between the halves and the quantizer. num_codes: codebook size K.
    code_dim: None, codes as wide as the latents and no convolution between (MaskGIT); a number, 1x1 convolutions
      quant_conv and post_quant_conv to and from it (taming: 256; ViT-VQGAN's factorised codes: 32 and less).
    decoder_channels, decoder_blocks: for a decoder of another size (None: the encoder's width, its blocks plus the
      layout's extra). layout: "maskgit", "taming" or a `Layout`.
    image_range: the range the network itself works in; MaskGIT's weights want (0, 1).
    patch: both ends work on patches of this many pixels a side as channels (space to depth, as the sub-pixel layers of
      Shi et al. 2016), which multiplies the downsampling factor; 1 in the published models.
    groups: of every GroupNorm. remat: recompute blocks in the backward pass. The rest: see `VectorQuantizer`.

    Parameters: encoder, decoder, quantizer (codebook, ...) and, with code_dim, quant_conv and post_quant_conv.
    """

    channels: int = 128
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    blocks: int = 2
    attention_levels: tuple[int, ...] = ()
    latent_channels: int = 256
    num_codes: int = 8192
    code_dim: int | None = None
    decoder_channels: int | None = None
    decoder_blocks: int | None = None
    layout: str | Layout = "maskgit"
    image_channels: int = 3
    image_range: tuple[float, float] = (-1.0, 1.0)
    patch: int = 1
    groups: int = 32
    remat: bool = False
    ema: bool = False
    codebook_weight: float = 1.0
    commitment_weight: float = 0.25
    legacy: bool = False
    entropy_weight: float = 0.0
    entropy_temperature: float = 0.01
    normalize: bool = False
    init_scale: float | None = None
    dtype: Any = None

    def setup(self):
        common = {
            name: getattr(self, name)
            for name in (
                "multipliers", "attention_levels", "latent_channels", "layout", "image_channels", "image_range",
                "patch", "groups", "remat", "dtype",
            )
        }  # fmt: skip
        self.encoder = Encoder(channels=self.channels, blocks=self.blocks, **common)
        decoder_blocks = self.decoder_blocks
        if decoder_blocks is None:
            decoder_blocks = self.blocks + resolve_layout(self.layout).decoder_extra
        decoder_channels = self.channels if self.decoder_channels is None else self.decoder_channels
        self.decoder = Decoder(channels=decoder_channels, blocks=decoder_blocks, **common)
        self.quantizer = VectorQuantizer(
            self.num_codes,
            self.latent_channels if self.code_dim is None else self.code_dim,
            ema=self.ema,
            codebook_weight=self.codebook_weight,
            commitment_weight=self.commitment_weight,
            legacy=self.legacy,
            entropy_weight=self.entropy_weight,
            entropy_temperature=self.entropy_temperature,
            normalize=self.normalize,
            init_scale=self.init_scale,
        )
        if self.code_dim is not None:
            self.quant_conv = nn.Conv(self.code_dim, (1, 1), dtype=self.dtype)
            self.post_quant_conv = nn.Conv(self.latent_channels, (1, 1), dtype=self.dtype)

    @property
    def downsampling(self) -> int:
        """Pixels per token along each axis."""
        return self.patch * 2 ** (len(self.multipliers) - 1)

    def encode(self, images: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        """Images to latents of the codes' width, before quantisation."""
        z = self.encoder(images)
        return z if self.code_dim is None else self.quant_conv(z)

    def decode(self, z_q: Float[Array, "b h2 w2 d"]) -> Float[Array, "b h w c"]:
        """Codes, or any latents of their width, to images, not clipped."""
        if self.dtype is not None:
            z_q = jnp.asarray(z_q, self.dtype)
        return self.decoder(z_q if self.code_dim is None else self.post_quant_conv(z_q))
