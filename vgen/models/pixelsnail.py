"""PixelSNAIL: causal convolutions and causal attention over the tokens of a grid in raster order.

Source: Chen et al. 2017, "PixelSNAIL: an improved autoregressive generative model", arXiv:1712.09763; the prior of
VQ-VAE-2 (Razavi et al. 2019, arXiv:1906.00446) as rosinality/vq-vae-2-pytorch has it.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int

from vgen.layers.attention import Site, attention


class WNConv(nn.Module):
    """A convolution whose kernel is a direction of length 1 per output channel, times a gain (Salimans & Kingma 2016).

    padding: ((top, bottom), (left, right)).  hidden: so many columns at the end of the last row are hidden.
    Parameters: direction [h, w, in, out], gain [out], bias [out].
    """

    channels: int
    size: tuple[int, int] = (1, 1)
    padding: tuple[tuple[int, int], tuple[int, int]] = ((0, 0), (0, 0))
    hidden: int = 0
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, "b h w _"]) -> Float[Array, "b h w c"]:
        shape = (*self.size, x.shape[-1], self.channels)
        kernel = self.param("direction", nn.initializers.normal(0.05), shape)
        gain = self.param("gain", nn.initializers.ones_init(), (self.channels,))
        bias = self.param("bias", nn.initializers.zeros_init(), (self.channels,))
        if self.hidden:
            seen = np.ones((*self.size, 1, 1), np.float32)
            seen[-1, -self.hidden :] = 0
            kernel = kernel * seen
        kernel = kernel * (gain * jax.lax.rsqrt(jnp.square(kernel).sum((0, 1, 2))))
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), self.padding, dimension_numbers=numbers) + bias


class GatedResBlock(nn.Module):
    """ELU, convolution, ELU, convolution to twice the channels, half of it gated by the other, added to the input.

    channels: between the convolutions.  kernel: their size; one larger than 1 sees only places before its own.
    Parameters: conv1, conv2 and, where `beside` is given, beside (1x1).
    """

    channels: int
    kernel: int = 1
    dropout: float = 0.0
    dtype: Any = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], beside: Float[Array, "b h w _"] | None = None, train: bool = False
    ) -> Float[Array, "b h w c"]:
        half = self.kernel // 2
        padding = ((self.kernel - 1, 0), (half, half))
        sizes = dict(size=(self.kernel,) * 2, padding=padding, hidden=half + 1 if half else 0, dtype=self.dtype)
        h = WNConv(self.channels, **sizes, name="conv1")(nn.elu(x))
        if beside is not None:
            h = h + WNConv(self.channels, dtype=self.dtype, name="beside")(nn.elu(beside))
        h = nn.Dropout(self.dropout, deterministic=not train)(nn.elu(h))
        h = WNConv(2 * x.shape[-1], **sizes, name="conv2")(h)
        a, b = jnp.split(h, 2, axis=-1)
        return x + a * nn.sigmoid(b)


class Block(nn.Module):
    """Residual blocks of causal convolutions, then attention to the places before each one.

    width: channels of attention and of what is around it.  The rest: see PixelSNAIL.
    Parameters: res_i, and key_res, query_res, query, key, value, out_res; without attention out.
    """

    width: int
    res_width: int
    res_blocks: int
    kernel: int
    attention: bool
    heads: int
    dropout: float
    dtype: Any = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], places: Float[Array, "b h w 2"], train: bool
    ) -> Float[Array, "b h w c"]:
        res = lambda channels, name, kernel=1: GatedResBlock(channels, kernel, self.dropout, self.dtype, name=name)
        given = x
        for i in range(self.res_blocks):
            x = res(self.res_width, f"res_{i}", self.kernel)(x, train=train)
        with_places = jnp.concatenate([x, places], -1)
        if not self.attention:
            return WNConv(self.width, dtype=self.dtype, name="out")(with_places)
        key = res(self.width, "key_res")(jnp.concatenate([given, x, places], -1), train=train)
        query = res(self.width, "query_res")(with_places, train=train)
        found = self._look(query, key, train)
        return res(self.width, "out_res")(x, found, train=train)

    def _look(self, query, key, train):
        b, rows, columns = query.shape[:3]
        n, width = rows * columns, self.width // 2
        project = lambda x, name: WNConv(width, dtype=self.dtype, name=name)(x).reshape(b, n, self.heads, -1)
        q, k, v = project(query, "query"), project(key, "key"), project(key, "value")
        before = jnp.tril(jnp.ones((1, 1, n, n), bool), -1)
        found = attention(q, k, v, mask=before, site=Site("self", "/".join(self.path)))
        return found.reshape(b, rows, columns, width)


class PixelSNAIL(nn.Module):
    """Tokens [b, n] int32, a grid row by row, to logits [b, n, vocab]; those of token i depend on tokens before i only.

    vocab: tokens are in [0, vocab).  grid: rows and columns.  width: channels.  kernel: odd, of the convolutions.
    depth: blocks, each of `res_blocks` residual blocks of width `res_width` between their convolutions, and attention
      of `heads`, half as wide as `width`, unless `attention` is off.  out_blocks: residual blocks ahead of the logits.
    dropout: inside of residual blocks.

    What it does not see: the last token of the row above, in columns more than kernel // 2 ahead of it. Features of a
    place know what is before that place, and only those of the row's end know of it.

    Parameters: above, left, block_i, out_i, logits.
    Raises ValueError for tokens that are not of the grid, an even kernel, and heads that do not divide width / 2.
    """

    vocab: int
    grid: tuple[int, int]
    width: int = 256
    kernel: int = 5
    depth: int = 4
    res_blocks: int = 4
    res_width: int = 256
    attention: bool = True
    heads: int = 8
    out_blocks: int = 0
    dropout: float = 0.1
    dtype: Any = None

    @nn.compact
    def __call__(self, tokens: Int[Array, "b n"], train: bool = False) -> Float[Array, "b n v"]:
        """train: dropout (rng "dropout") is on."""
        rows, columns = self.grid
        if tokens.shape[1] != math.prod(self.grid):
            raise ValueError(
                f"PixelSNAIL: tokens {tokens.shape} are not {math.prod(self.grid)}, those of a grid {self.grid}"
            )
        if self.kernel % 2 == 0 or (self.attention and self.width // 2 % self.heads):
            raise ValueError(
                f"PixelSNAIL: kernel must be odd and heads divide width / 2, got kernel {self.kernel}, width "
                f"{self.width} and {self.heads} heads"
            )
        b, half = tokens.shape[0], self.kernel // 2
        hot = jax.nn.one_hot(tokens, self.vocab, dtype=self.dtype or jnp.float32).reshape(b, rows, columns, self.vocab)
        # Both are moved by a place, so that neither sees the token itself: down a row, and along a column.
        above = WNConv(self.width, (half, self.kernel), ((half - 1, 0), (half, half)), dtype=self.dtype, name="above")
        left = WNConv(self.width, (half + 1, half), ((half, 0), (half - 1, 0)), dtype=self.dtype, name="left")
        x = jnp.pad(above(hot), ((0, 0), (1, 0), (0, 0), (0, 0)))[:, :-1]
        x = x + jnp.pad(left(hot), ((0, 0), (0, 0), (1, 0), (0, 0)))[:, :, :-1]
        places = jnp.stack(
            jnp.meshgrid(*((jnp.arange(n) - n / 2) / n for n in self.grid), indexing="ij"), -1
        ).astype(x.dtype)  # fmt: skip
        places = jnp.broadcast_to(places, (b, *places.shape))
        for i in range(self.depth):
            sizes = (self.res_width, self.res_blocks, self.kernel, self.attention, self.heads, self.dropout)
            x = Block(self.width, *sizes, self.dtype, name=f"block_{i}")(x, places, train)
        for i in range(self.out_blocks):
            x = GatedResBlock(self.res_width, 1, self.dropout, self.dtype, name=f"out_{i}")(x, train=train)
        return WNConv(self.vocab, dtype=self.dtype, name="logits")(nn.elu(x)).reshape(*tokens.shape, self.vocab)
