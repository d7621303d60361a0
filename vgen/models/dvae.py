"""DALL-E's discrete VAE: images to a grid of 8192 tokens and back (Ramesh et al. 2021, arXiv:2102.12092)."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int, Key

from vgen.layers.conv import nearest_upsample
from vgen.sharding import constrain

DALL_E = dict(channels=256, blocks=2, num_codes=8192, decoder_stem=128)
GROUPS = 4  # resolutions of each half, as published
EPS = 0.1  # pixels are mapped to [EPS, 1 - EPS], where the logit-Laplace distribution has its mass


def map_pixels(images: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """Images in [-1, 1] to the network's [0.1, 0.9] (the paper's section A.3)."""
    return (images + 1) * (0.5 - EPS) + EPS


def unmap_pixels(x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """The inverse of `map_pixels`, clipped to [-1, 1]."""
    return jnp.clip((x - EPS) / (0.5 - EPS) - 1, -1, 1)


def logit_laplace(
    statistics: Float[Array, "b h w c2"], images: Float[Array, "b h w c"], least_scale: float = 0.0
) -> Float[Array, "b h w c"]:
    """Minus the log density of every value of the pictures, nats (Ramesh et al. 2021, appendix A.3).

    x in (0, 1) has a logit-Laplace distribution where logit x has a Laplace one: with location mu and scale b, its
    density is exp(-|logit x - mu| / b) / (2 b x (1 - x)).
    statistics: mu, then ln b, of `DVAEDecoder`.  images: in [-1, 1], which `map_pixels` takes to [0.1, 0.9].
    least_scale: of b; the density of plain surfaces, which are the same to the last bit, grows without an end at 0.
    """
    mu, log_b = jnp.split(statistics, 2, axis=-1)
    log_b = jnp.maximum(log_b, math.log(least_scale)) if least_scale else log_b
    x = map_pixels(images.astype(statistics.dtype))
    logit = jnp.log(x) - jnp.log1p(-x)
    return jnp.abs(logit - mu) * jnp.exp(-log_b) + log_b + jnp.log(2 * x * (1 - x))


def gumbel_softmax(key: Key[Array, ""], logits: Float[Array, "*b k"], temperature: Any) -> Float[Array, "*b k"]:
    """A draw from the relaxed categorical distribution (Jang et al. 2016; Maddison et al. 2016): nearly one-hot where
    the temperature is low.
    """
    return jax.nn.softmax((logits + jax.random.gumbel(key, logits.shape, logits.dtype)) / temperature)


def kl_to_uniform(logits: Float[Array, "*b k"]) -> Float[Array, "*b"]:
    """KL divergence of the categorical distribution from the uniform one over all codes, nats."""
    log_q = jax.nn.log_softmax(logits)
    return (jnp.exp(log_q) * log_q).sum(-1) + math.log(logits.shape[-1])


class ResBlock(nn.Module):
    """Four convolutions, each after a ReLU, in a residual branch of a fixed gain; there is no normalisation.

    kernels: sizes of the four; their width is a quarter of `channels`.
    Parameters: conv1 ... conv4 and, when the channel count changes, shortcut.
    """

    channels: int
    kernels: tuple[int, ...]
    gain: float
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, "b h w _"]) -> Float[Array, "b h w c"]:
        h, widths = x, (self.channels // 4,) * 3 + (self.channels,)
        for i, (size, width) in enumerate(zip(self.kernels, widths, strict=True), 1):
            h = constrain(nn.Conv(width, (size, size), dtype=self.dtype, name=f"conv{i}")(nn.relu(h)))
        if x.shape[-1] != self.channels:
            x = nn.Conv(self.channels, (1, 1), dtype=self.dtype, name="shortcut")(x)
        return constrain(x + self.gain * h)


class _Half(nn.Module):
    """Fields of both halves; see DVAE."""

    channels: int = 256
    blocks: int = 2
    num_codes: int = 8192
    stem: int | None = None
    image_channels: int = 3
    levels: int = GROUPS
    dtype: Any = None

    def group(self, x, i, channels, kernels):
        for j in range(self.blocks):
            gain = 1 / (self.levels * self.blocks) ** 2
            x = ResBlock(channels, kernels, gain, self.dtype, name=f"group_{i}_block_{j}")(x)
        return x

    def conv(self, channels, size, name):
        layer = nn.Conv(channels, (size, size), dtype=self.dtype, name=name)
        return lambda x: constrain(layer(x))


class DVAEEncoder(_Half):
    """Images [b, h, w, 3] in [-1, 1] to logits [b, h / f, w / f, num_codes] over the codes, f = 2^(levels - 1).

    Parameters: conv_in, group_i_block_j (i from the image's resolution down), conv_out.
    Raises ValueError if h or w is no multiple of f.
    """

    @nn.compact
    def __call__(self, images: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 k"]:
        factor = 2 ** (self.levels - 1)
        if images.shape[1] % factor or images.shape[2] % factor:
            raise ValueError(f"DVAEEncoder: height and width of images {images.shape} must be multiples of {factor}")
        x = self.conv(self.channels, 7, "conv_in")(map_pixels(images))
        for i in range(self.levels):
            x = nn.max_pool(x, (2, 2), (2, 2)) if i else x
            x = self.group(x, i, self.channels * 2**i, (3, 3, 3, 1))
        return self.conv(self.num_codes, 1, "conv_out")(nn.relu(x))


class DVAEDecoder(_Half):
    """Distributions over codes [b, h, w, num_codes] (one-hot, or relaxed in training) to statistics of pixels.

    stem: width behind the first convolution, 128 as published.
    Returns [b, f h, f w, 2 * image_channels]: location mu, then ln b of the logit-Laplace distribution.
    Parameters: conv_in, group_i_block_j (i from the smallest resolution up), conv_out.
    """

    @nn.compact
    def __call__(self, codes: Float[Array, "b h2 w2 k"]) -> Float[Array, "b h w c"]:
        x = self.conv(self.channels // 2 if self.stem is None else self.stem, 1, "conv_in")(codes)
        for i in range(self.levels):
            x = nearest_upsample(x) if i else x
            x = self.group(x, i, self.channels * 2 ** (self.levels - 1 - i), (1, 3, 3, 3))
        return self.conv(2 * self.image_channels, 1, "conv_out")(nn.relu(x))


class DVAE(nn.Module):
    """Both halves; images in [-1, 1] at the edges, tokens int32 in [0, num_codes) in between.

    channels: width at the image's resolution; 2, 4 and 8 times that below.  blocks: per resolution.
    levels: resolutions, 4 as published, with one token for 8 x 8 pixels; 3 has one for 4 x 4.
    decoder_stem: see `DVAEDecoder`.  Parameters: encoder, decoder.
    """

    channels: int = 256
    blocks: int = 2
    num_codes: int = 8192
    decoder_stem: int = 128
    image_channels: int = 3
    levels: int = GROUPS
    dtype: Any = None

    def setup(self):
        common = dict(image_channels=self.image_channels, levels=self.levels, dtype=self.dtype)
        sizes = dict(channels=self.channels, blocks=self.blocks, num_codes=self.num_codes)
        self.encoder = DVAEEncoder(**sizes, **common)
        self.decoder = DVAEDecoder(**sizes, stem=self.decoder_stem, **common)

    @property
    def num_tokens(self) -> int:
        """Codebook size: tokens are in [0, num_tokens)."""
        return self.num_codes

    @property
    def downsampling(self) -> int:
        """Pixels per token along each axis."""
        return 2 ** (self.levels - 1)

    def logits(self, images: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 k"]:
        """Images to logits over the codes."""
        return self.encoder(images)

    def tokenize(self, images: Float[Array, "b h w c"]) -> Int[Array, "b h2 w2"]:
        """Images to their likeliest tokens; DALL-E draws none."""
        return self.encoder(images).argmax(-1).astype(jnp.int32)

    def decode(self, codes: Float[Array, "b h2 w2 k"]) -> Float[Array, "b h w c"]:
        """Distributions over codes to the pixels' statistics, see `DVAEDecoder`."""
        return self.decoder(codes)

    def decode_indices(self, tokens: Int[Array, "b h2 w2"]) -> Float[Array, "b h w c"]:
        """Tokens to images in [-1, 1]: the sigmoid of the pixels' locations, mapped back."""
        codes = jax.nn.one_hot(tokens, self.num_codes, dtype=self.dtype or jnp.float32)
        return self.picture(self.decoder(codes))

    def picture(self, statistics: Float[Array, "b h w c2"]) -> Float[Array, "b h w c"]:
        """Images in [-1, 1] of the pixels' statistics."""
        return unmap_pixels(nn.sigmoid(statistics[..., : self.image_channels]))

    def __call__(self, images: Float[Array, "b h w c"]) -> tuple[Float[Array, "b h w c"], Float[Array, "b h2 w2 k"]]:
        """Reconstructions by the likeliest tokens, and the logits."""
        logits = self.encoder(images)
        return self.decode_indices(logits.argmax(-1).astype(jnp.int32)), logits
