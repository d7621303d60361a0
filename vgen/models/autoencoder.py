"""The autoencoder with a Gaussian latent that latent diffusion works in (Rombach et al. 2022, arXiv:2112.10752).

Encoder and decoder are those of the taming VQGAN (`vgen.models.vqgan`); the encoder gives mean and log variance.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Key

from vgen.models.vqgan import TAMING, Decoder, Encoder, Layout, resolve_layout

KL_F8 = dict(channels=128, multipliers=(1, 2, 4, 4), blocks=2, latent_channels=4)  # Stable Diffusion 1 and 2
KL_F4 = dict(channels=128, multipliers=(1, 2, 4), blocks=2, latent_channels=3)
SDXL = dict(KL_F8, scaling_factor=0.13025)
SD3 = dict(KL_F8, latent_channels=16, quant_conv=False, post_quant_conv=False)
SD3 |= dict(scaling_factor=1.5305, shift_factor=0.0609)


class Gaussian(NamedTuple):
    """A normal distribution with a diagonal covariance; logvar is clipped to [-30, 20]."""

    mean: Array
    logvar: Array

    def mode(self) -> Float[Array, "b h w d"]:
        """The mean."""
        return self.mean

    def sample(self, key: Key[Array, ""]) -> Float[Array, "b h w d"]:
        """One draw, in the shape and dtype of the mean."""
        return self.mean + jnp.exp(self.logvar / 2) * jax.random.normal(key, self.mean.shape, self.mean.dtype)

    def kl(self) -> Float[Array, "b"]:
        """KL(self || N(0, 1)) of each sample in nats, summed over places and channels."""
        terms = jnp.square(self.mean) + jnp.exp(self.logvar) - 1 - self.logvar
        return terms.sum(tuple(range(1, terms.ndim))) / 2


class AutoencoderKL(nn.Module):
    """Images [b, h, w, 3] in [-1, 1] to a Gaussian over latents [b, h / f, w / f, latent_channels], and back.

    channels, multipliers, blocks, attention_levels, groups, remat: see `vgen.models.vqgan.VQGAN`;
      f = patch 2^(levels - 1).  layout, patch: see `vgen.models.vqgan`; published are taming and 1.
    mid_attention: attention at the lowest resolution, with one head.
    quant_conv, post_quant_conv: 1x1 convolutions behind the encoder and ahead of the decoder; SD3 and FLUX have none.
    scaling_factor, shift_factor, latents_mean, latents_std: of `normalize`, the last two one number per channel.

    Parameters: encoder, decoder and, where they exist, quant_conv and post_quant_conv.
    """

    channels: int = 128
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    blocks: int = 2
    attention_levels: tuple[int, ...] = ()
    latent_channels: int = 4
    mid_attention: bool = True
    quant_conv: bool = True
    post_quant_conv: bool = True
    scaling_factor: float = 0.18215
    shift_factor: float = 0.0
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None
    image_channels: int = 3
    groups: int = 32
    remat: bool = False
    layout: str | Layout = TAMING
    patch: int = 1
    dtype: Any = None

    def setup(self):
        layout = dataclasses.replace(resolve_layout(self.layout), mid_attention=self.mid_attention)
        common = dict(
            channels=self.channels,
            multipliers=self.multipliers,
            attention_levels=self.attention_levels,
            layout=layout,
            patch=self.patch,
            image_channels=self.image_channels,
            groups=self.groups,
            remat=self.remat,
            dtype=self.dtype,
        )
        moments = 2 * self.latent_channels
        self.encoder = Encoder(blocks=self.blocks, latent_channels=moments, **common)
        self.decoder = Decoder(
            blocks=self.blocks + layout.decoder_extra, latent_channels=self.latent_channels, **common
        )
        if self.quant_conv:
            self.after = nn.Conv(moments, (1, 1), dtype=self.dtype, name="quant_conv")
        if self.post_quant_conv:
            self.ahead = nn.Conv(self.latent_channels, (1, 1), dtype=self.dtype, name="post_quant_conv")

    @property
    def downsampling(self) -> int:
        """Pixels per latent along each axis."""
        return self.patch * 2 ** (len(self.multipliers) - 1)

    def moments(self, images: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d2"]:
        """Mean and log variance one behind the other along the channels, as the network gives them, not clipped."""
        h = self.encoder(images)
        return self.after(h) if self.quant_conv else h

    def encode(self, images: Float[Array, "b h w c"]) -> Gaussian:
        """Images to the distribution of their latents, not normalised; in float32 or wider."""
        moments = self.moments(images)
        moments = moments.astype(jnp.promote_types(moments.dtype, jnp.float32))
        mean, logvar = jnp.split(moments, 2, axis=-1)
        return Gaussian(mean, jnp.clip(logvar, -30.0, 20.0))

    def decode(self, z: Float[Array, "b h2 w2 d"]) -> Float[Array, "b h w c"]:
        """Latents as `encode` gives them (not normalised) to images, nominally in [-1, 1], not clipped."""
        z = z if self.dtype is None else jnp.asarray(z, self.dtype)
        return self.decoder(self.ahead(z) if self.post_quant_conv else z)

    def normalize(self, z: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        """Latents to those that diffusion models see: (z - shift) scale, or (z - mean) scale / std per channel."""
        shift, scale = self._affine()
        return (z - shift.astype(z.dtype)) * scale.astype(z.dtype)

    def denormalize(self, z: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        """The inverse of `normalize`."""
        shift, scale = self._affine()
        return z / scale.astype(z.dtype) + shift.astype(z.dtype)

    def _affine(self) -> tuple[np.ndarray, np.ndarray]:
        if (self.latents_mean is None) != (self.latents_std is None):
            raise ValueError("AutoencoderKL: latents_mean and latents_std must be given together")
        if self.latents_mean is None:
            return np.asarray(self.shift_factor), np.asarray(self.scaling_factor)
        return np.asarray(self.latents_mean), self.scaling_factor / np.asarray(self.latents_std)

    def __call__(
        self, images: Float[Array, "b h w c"], key: Key[Array, ""] | None = None
    ) -> tuple[Float[Array, "b h w c"], Gaussian]:
        """Reconstructions and the posterior: of a draw where a key is given, else of the mode."""
        posterior = self.encode(images)
        return self.decode(posterior.mode() if key is None else posterior.sample(key)), posterior
