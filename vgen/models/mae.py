"""Masked autoencoder (He et al. 2021, arXiv:2111.06377): an encoder of visible patches and a light decoder of all."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from vgen.layers.conv import space_to_depth
from vgen.layers.embed import sincos_2d
from vgen.layers.linear import linear
from vgen.models.vit import Features, Tower, ViT

BASE = dict(width=768, depth=12, heads=12, mlp_dim=3072, patch_size=16)
LARGE = dict(width=1024, depth=24, heads=16, mlp_dim=4096, patch_size=16)
HUGE = dict(width=1280, depth=32, heads=16, mlp_dim=5120, patch_size=14)


class Masking(NamedTuple):
    """keep: int [b, k], the visible patches.  restore: int [b, n], each patch's place among visible ones, then masked
    ones.  mask: float [b, n], 1 for masked patches."""

    keep: Array
    restore: Array
    mask: Array


class Reconstruction(NamedTuple):
    """loss: scalar.  pred: [b, n, rows * columns * c], pixels of every patch.  mask: [b, n], 1 where masked.
    tokens: [b, 1 + k, width], what the encoder gave."""

    loss: Array
    pred: Array
    mask: Array
    tokens: Array


def random_masking(noise: Float[Array, "b n"], ratio: float) -> Masking:
    """The patches with the least noise stay: int(n (1 - ratio)) of them, in the order of their noise."""
    count = int(noise.shape[1] * (1 - ratio))
    order = jnp.argsort(noise, axis=1)
    restore = jnp.argsort(order, axis=1)
    return Masking(order[:, :count], restore, (restore >= count).astype(noise.dtype))


def reconstruction_loss(
    pred: Float[Array, "b n d"],
    images: Float[Array, "b h w c"],
    mask: Float[Array, "b n"],
    patch_size: int,
    norm_pix: bool = True,
) -> Float[Array, ""]:
    """Mean squared error of the masked patches' pixels (section 3).

    norm_pix: every patch of the target is normalised by its own mean and standard deviation.
    """
    target = space_to_depth(images, patch_size).reshape(pred.shape)
    if norm_pix:
        # QUIRK: the variance is the unbiased one, of n - 1 (torch's var in models_mae.py)
        variance = target.var(axis=-1, ddof=1, keepdims=True)
        target = (target - target.mean(axis=-1, keepdims=True)) / jnp.sqrt(variance + 1e-6)
    error = jnp.square(pred - target).mean(axis=-1)
    return (error * mask).sum() / mask.sum()


class MAEDecoder(Tower):
    """Encoded visible patches -> pixels of all patches, [b, n, pixels]; the fields are those of `vit.Tower`.

    Parameters: embed, mask_token [width], layers [depth, ...], norm, pred.
    """

    pixels: int = 768

    @nn.compact
    def __call__(
        self, tokens: Float[Array, "b m d"], restore: Int[Array, "b n"], grid: tuple[int, int], *, train: bool = False
    ) -> Float[Array, "b n pixels"]:
        """tokens: the class token, then visible patches.  restore: see `Masking`.  grid: (rows, columns) of patches."""
        x = linear(self.width, name="embed", **self.dtypes)(tokens)
        b, n = restore.shape
        masked = self.param("mask_token", nn.initializers.normal(0.02), (self.width,), self.param_dtype)
        masked = jnp.broadcast_to(masked.astype(x.dtype), (b, n + 1 - x.shape[1], self.width))
        patches = jnp.concatenate([x[:, 1:], masked], axis=1)
        patches = jnp.take_along_axis(patches, restore[..., None], axis=1)
        patches = patches + sincos_2d(*grid, self.width).astype(np.float32).astype(x.dtype)
        x, _ = self.run_layers(jnp.concatenate([x[:, :1], patches], axis=1), train=train)
        return linear(self.pixels, name="pred", **self.dtypes)(self.norm_of("norm")(x))[:, 1:]


class MAE(Tower):
    """Images [b, h, w, c], normalised by ImageNet's mean and deviation -> Reconstruction.

    patch_size, image_size: in pixels; another image size recomputes the fixed positions.
    decoder_...: sizes of the decoder.  mask_ratio: share of patches that the encoder does not see.
    norm_pix: see `reconstruction_loss`.  The other fields are the encoder's, see `vit.Tower`.
    Parameters: encoder (a `ViT` without learned positions), decoder (`MAEDecoder`).
    """

    patch_size: int = 16
    image_size: int = 224
    channels: int = 3
    decoder_width: int = 512
    decoder_depth: int = 8
    decoder_heads: int = 16
    decoder_mlp_dim: int = 2048
    mask_ratio: float = 0.75
    norm_pix: bool = True

    def setup(self):
        names = Tower.__dataclass_fields__.keys() - {"parent", "name"}
        shared = {name: getattr(self, name) for name in names}
        self.encoder = ViT(
            patch_size=self.patch_size, image_size=self.image_size, posemb="sincos", token_std=0.02, **shared
        )
        sizes = dict(
            width=self.decoder_width,
            depth=self.decoder_depth,
            heads=self.decoder_heads,
            mlp_dim=self.decoder_mlp_dim,
            pixels=self.patch_size**2 * self.channels,
            dropout=0.0,
            drop_path=0.0,
        )
        self.decoder = MAEDecoder(**(shared | sizes))

    def __call__(
        self, images: Float[Array, "b h w c"], noise: Float[Array, "b n"] | None = None, *, train: bool = False
    ) -> Reconstruction:
        """noise: decides which patches are masked, see `random_masking`; drawn with the rng "mask" where not given."""
        rows, columns = images.shape[1] // self.patch_size, images.shape[2] // self.patch_size
        if noise is None:
            noise = jax.random.uniform(self.make_rng("mask"), (len(images), rows * columns))
        masking = random_masking(noise, self.mask_ratio)
        tokens = self.encoder(images, keep=masking.keep, train=train).tokens
        pred = self.decoder(tokens, masking.restore, (rows, columns), train=train)
        loss = reconstruction_loss(pred, images, masking.mask, self.patch_size, self.norm_pix)
        return Reconstruction(loss, pred, masking.mask, tokens)

    def encode(self, images: Float[Array, "b h w c"], *, train: bool = False) -> Features:
        """All patches through the encoder, as for fine-tuning."""
        return self.encoder(images, train=train)
