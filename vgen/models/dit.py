"""Diffusion transformers (DiT; Peebles & Xie 2022, arXiv:2212.09748), and the block that PixArt shares with them.

Patches of a noisy latent are tokens of a plain transformer, whose norms are scaled, shifted and gated by time and class
(adaLN-zero); every block begins as the identity.  The numbers are the authors': all norms have epsilon 1e-6, and the
slowest of the time's frequencies is 1/10000^(127/128).
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from vgen.layers.attention import MultiHeadAttention, attention
from vgen.layers.conv import depth_to_space
from vgen.layers.embed import PatchEmbed, sincos_2d, sinusoids
from vgen.layers.linear import linear
from vgen.layers.transformer import MLP, Stacked, norm_layer
from vgen.types import AttentionControl, Step

SMALL = dict(depth=12, width=384, heads=6)
BASE = dict(depth=12, width=768, heads=12)
LARGE = dict(depth=24, width=1024, heads=16)
XLARGE = dict(depth=28, width=1152, heads=16)  # with patches of 2: 675M parameters

NORMAL = nn.initializers.normal(0.02)  # of what embeds time, class and text


def shift_scale(x: Array, shift: Array, scale: Array) -> Array:
    """x (1 + scale) + shift, for x [b, n, width], shift and scale [b, width]."""
    return x * (1 + scale[:, None]) + shift[:, None]


def embed_numbers(values: Array | np.ndarray, width: int, *, dtype: Any, param_dtype: Any, name: str) -> Array:
    """Numbers [b, ...] -> [b, ..., width]: 256 cosines and sines, then two linear layers with silu between them.

    dtype: of the result; the sinusoids have float32 at least.  Call it in a compact method.
    """
    values = jnp.asarray(values, jnp.promote_types(dtype, jnp.float32))
    kwargs = dict(dtype=dtype, param_dtype=param_dtype, kernel_init=NORMAL, name=name)
    return MLP(width, "silu", out_dim=width, **kwargs)(sinusoids(values, 256).astype(dtype))


def unpatchify(x: Float[Array, "b n d"], grid: tuple[int, int], patch_size: int) -> Float[Array, "b h w c"]:
    """Tokens of (rows, columns) = grid, each a patch of [patch_size, patch_size, c] in a row, as an image."""
    return depth_to_space(x.reshape(x.shape[0], *grid, -1), patch_size)


class Compress(nn.Module):
    """One token for every ratio x ratio of them, channel by channel, then LayerNorm (PixArt-Sigma, section 3.2).

    It begins as the mean.  Rows and columns that fill no whole square are dropped.
    Parameters: kernel [ratio, ratio, width], bias, norm.
    """

    ratio: int
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b n c"], grid: tuple[int, int]) -> Float[Array, "b m c"]:
        b, _, c = x.shape
        r, (rows, columns) = self.ratio, grid
        mean = nn.initializers.constant(1 / r**2)
        kernel = self.param("kernel", mean, (r, r, c), self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (c,), self.param_dtype)
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        x = x.reshape(b, rows, columns, c)[:, : rows // r * r, : columns // r * r]
        x = x.reshape(b, rows // r, r, columns // r, r, c) * kernel[:, None]
        x = x.sum((2, 4)).reshape(b, -1, c) + bias
        return norm_layer("layer", 1e-5, "norm", dtype=self.dtype, param_dtype=self.param_dtype)(x)


class DiTBlock(nn.Module):
    """Self-attention, cross-attention where a context is given, MLP; the first and the last modulated and gated.

    shared: the modulation is `cond` itself plus a learned table [6, width] (adaLN-single; PixArt-alpha, Chen et al.
      2023, section 2.3); otherwise it is linear in silu(cond) and zero at first (adaLN-zero).  Its six parts are
      shift, scale, gate of the attention and shift, scale, gate of the MLP.
    cross: whether there is cross-attention: without norm and gate, its last layer zero at first (PixArt-alpha).
    compress: ratio by which keys and values of self-attention are compressed along both sides, see `Compress`.
    first: index of the stack's first layer, for AttentionControl.
    Parameters: mod or table [6, width], attn, compress, cross, mlp.
    """

    heads: int
    mlp_dim: int
    shared: bool = False
    cross: bool = False
    compress: int = 1
    first: int = 0
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b n width"],
        *,
        cond: Array,
        grid: tuple[int, int],
        context: Array | None = None,
        context_mask: Array | None = None,
        contexts: Mapping[str, tuple] = {},
        layer: Any = 0,
        control: AttentionControl | None = None,
        step: Step | None = None,
    ) -> Float[Array, "b n width"]:
        """cond: [b, any], or [b, 6, width] where shared.  grid: (rows, columns) of the tokens.

        context, context_mask, contexts: of the cross-attention, see `MultiHeadAttention`.
        """
        kwargs = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        b, width = x.shape[0], x.shape[-1]
        if self.shared:
            table = self.param("table", nn.initializers.normal(width**-0.5), (6, width), self.param_dtype)
            mod = cond + table.astype(cond.dtype)
        else:
            zeros = dict(kernel_init=nn.initializers.zeros, name="mod")
            mod = linear(6 * width, **zeros, **kwargs)(jax.nn.silu(cond)).reshape(b, 6, width)
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = jnp.moveaxis(mod, 1, 0)
        probe = dict(layer=self.first + layer, control=control, step=step)

        shorten = Compress(self.compress, name="compress", **kwargs) if self.compress > 1 else None

        def compressed(q, k, v, **rest):  # one layer for keys and values, ahead of the split into heads
            k, v = (shorten(a.reshape(b, -1, width), grid).reshape(b, -1, *a.shape[2:]) for a in (k, v))
            return attention(q, k, v, **rest)

        y = shift_scale(norm_layer("layer_plain", 1e-6, **kwargs)(x), shift_attn, scale_attn)
        core = compressed if shorten else attention
        x = x + gate_attn[:, None] * MultiHeadAttention(self.heads, name="attn", **kwargs)(y, core=core, **probe)
        if self.cross:
            look = MultiHeadAttention(self.heads, out_init=nn.initializers.zeros, name="cross", **kwargs)
            x = x + look(x, context, context_mask, contexts=contexts, **probe)
        y = shift_scale(norm_layer("layer_plain", 1e-6, **kwargs)(x), shift_mlp, scale_mlp)
        return x + gate_mlp[:, None] * MLP(self.mlp_dim, name="mlp", **kwargs)(y)


class DiT(Stacked):
    """Noisy latents, time and class -> what the network is trained to predict (adaLN-zero form of the paper).

    depth, width, heads: see SMALL, BASE, LARGE, XLARGE.  mlp_dim: 4 width by default.  patch_size: 2, 4 or 8.
    in_channels: of the latents.  out_channels: twice as many where the variance is learned (the second half).
    num_classes: the label `num_classes` is that of no class, for guidance and for dropping classes in training.
    sample_size: side of the latents that it is trained for; the fixed positions of others are those of this grid,
      stretched.
    Other fields: see `vgen.layers.transformer.Stacked`.
    Parameters: patches, time {fc1, fc2}, classes [num_classes + 1, width], layers [depth, ...] (`DiTBlock`), out_mod,
      out.
    """

    depth: int = 28
    width: int = 1152
    heads: int = 16
    mlp_dim: int | None = None
    patch_size: int = 2
    in_channels: int = 4
    out_channels: int = 8
    num_classes: int = 1000
    sample_size: int = 32
    param_dtype: Any = jnp.float32

    @property
    def label_rows(self) -> int:
        """How many labels there are, that of no class among them."""
        return self.num_classes + 1

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"] | Float[np.ndarray, "b h w c"],
        t: Array | np.ndarray,
        labels: Int[Array, "b"] | Int[np.ndarray, "b"],
        *,
        train: bool = False,
        control: AttentionControl | None = None,
        step: Step | None = None,
    ) -> Float[Array, "b h w c_out"]:
        """x: latents.  t: [b], 0 .. 1000, integers or not.  labels: 0 .. num_classes.  train: changes nothing here.

        control, step: see `vgen.layers.attention.attention`.
        Raises ValueError where x is no multiple of the patches or has another number of channels.
        """
        dtype = self.dtype or jnp.promote_types(x.dtype, self.param_dtype)
        kwargs = dict(dtype=dtype, param_dtype=self.param_dtype)
        x, grid = embed_patches(self, jnp.asarray(x), self.sample_size)
        cond = embed_numbers(t, self.width, name="time", **kwargs)
        cond = cond + nn.Embed(self.num_classes + 1, self.width, embedding_init=NORMAL, name="classes", **kwargs)(
            labels
        )
        block = DiTBlock(self.heads, self.mlp_dim or 4 * self.width, name="layers", **kwargs)
        x = self.run_stack(block, x, depth=self.depth, cond=cond, grid=grid, control=control, step=step)
        zeros = dict(kernel_init=nn.initializers.zeros, **kwargs)
        shift, scale = jnp.split(linear(2 * self.width, name="out_mod", **zeros)(jax.nn.silu(cond)), 2, axis=-1)
        x = shift_scale(norm_layer("layer_plain", 1e-6, **kwargs)(x), shift, scale)
        x = linear(self.patch_size**2 * self.out_channels, name="out", **zeros)(x)
        return unpatchify(x, grid, self.patch_size)


def embed_patches(net: nn.Module, x: Array, sample_size: int, interpolation: float = 1.0) -> tuple[Array, tuple]:
    """(tokens [b, n, width] with their fixed positions, (rows, columns)) of latents; call it in a compact method.

    Raises ValueError where x is no multiple of the patches or has another number of channels than net.in_channels.
    """
    if x.shape[-1] != net.in_channels:
        raise ValueError(f"{type(net).__name__}: in_channels is {net.in_channels}, got latents {x.shape}")
    p, dtype = net.patch_size, net.dtype or jnp.promote_types(x.dtype, net.param_dtype)
    grid = (x.shape[1] // p, x.shape[2] // p)
    x = PatchEmbed((p, p), net.width, dtype=dtype, param_dtype=net.param_dtype, name="patches")(x)
    return x + positions(grid, net.width, sample_size // p, interpolation).astype(dtype), grid


def positions(grid: tuple[int, int], width: int, base: int, interpolation: float = 1.0) -> np.ndarray:
    """The fixed positions [rows * columns, width], float32 as the published files hold them; see `sincos_2d`."""
    return sincos_2d(*grid, width, base=base, interpolation=interpolation).astype(np.float32)
