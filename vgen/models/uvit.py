"""aMUSEd's network: masked image tokens, given text and the picture's size (Patil et al. 2024, arXiv:2401.01808).

The open Muse: a U-ViT, that is a transformer between two short stacks of convolutional blocks, on the tokens of a VQGAN
of 16 pixels per token, with CLIP-L/14 in the place of T5.  It has no positions: any grid of tokens goes.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vgen.layers.attention import MultiHeadAttention
from vgen.layers.embed import sinusoids
from vgen.layers.linear import linear
from vgen.layers.transformer import Block, Stacked, activation, modulate, norm_layer

AMUSED_256 = dict(grid=(16, 16))  # published: 603M
AMUSED_512 = dict(grid=(32, 32), resample=True)  # published: 608M


class UVit(Stacked):
    """Masked tokens, text states, a pooled text and five numbers of the picture -> logits over the codebook.

    vocab: codebook size.  ids: rows of the embedding, of which the first `vocab` are codes and the last is the mask
      (the published 8256 are 8193, rounded up).  grid: (rows, columns) of tokens that it is trained for.
    depth, width, heads, mlp_dim: of the transformer, whose norms are scaled and shifted by the conditions.
    embed_dim: width of the embedding and of the head.  channels, res_blocks, block_heads: of the convolutional stacks.
    resample: whether these halve the grid ahead of the transformer and double it behind (the 512 pixel model).
    text_width, pooled_width: of the text encoder's outputs.  micro_width: width of each number's embedding.
    bias: of all projections and convolutions, and of the MLPs' norms.  dropout, attn_dropout: of the transformer and
      the convolutional blocks; of the attention beside the latter.
    Other fields: see `vgen.layers.transformer.Stacked`.
    Parameters: text, text_norm, tokens {embed, norm, project}, cond {fc1, fc2}, down, in_norm, in, layers [depth, ...],
      out_norm, out, up, head {fc, norm, logits}.
    """

    vocab: int = 8192
    ids: int = 8256
    grid: tuple[int, int] = (16, 16)
    depth: int = 22
    width: int = 1024
    heads: int = 16
    mlp_dim: int = 2816
    embed_dim: int = 768
    channels: int = 768
    res_blocks: int = 3
    block_heads: int = 12
    resample: bool = False
    text_width: int = 768
    pooled_width: int = 768
    micro_width: int = 256
    bias: bool = False
    eps: float = 1e-6
    dropout: float = 0.0
    attn_dropout: float = 0.0
    param_dtype: Any = jnp.float32

    @property
    def mask_id(self) -> int:
        """The token that stands for "not known yet"."""
        return self.ids - 1

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "b h w"],
        text: Float[Array, "b l text_width"],
        pooled: Float[Array, "b pooled_width"],
        micro: Float[Array, "b 5"],
        *,
        train: bool = False,
        control=None,
        step=None,
    ) -> Float[Array, "b h w vocab"]:
        """tokens: int32 in [0, vocab) or mask_id.  text: states of CLIP's text encoder ahead of its last layer.

        pooled: its projected embedding.  micro: see `micro_conditions`.
        Raises ValueError where `resample` meets a grid with an odd side.
        """
        b, rows, columns = tokens.shape
        if self.resample and (rows % 2 or columns % 2):
            raise ValueError(f"UVit: with resample the grid's sides must be even, got {rows} x {columns}")
        kwargs = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        dense = dict(use_bias=self.bias, **kwargs)
        norm = lambda name: norm_layer("rms", self.eps, name, **kwargs)
        probe = dict(control=control, step=step)

        text = norm("text_norm")(linear(self.width, name="text", **dense)(text))
        cond = jnp.concatenate([pooled, sinusoids(micro, self.micro_width).reshape(b, -1)], axis=1)
        cond = _Condition(self.width, dense, name="cond")(cond)
        stage = dict(
            channels=self.channels, blocks=self.res_blocks, heads=self.block_heads, eps=self.eps, bias=self.bias,
            dropout=self.dropout, attn_dropout=self.attn_dropout, **kwargs,
        )  # fmt: skip
        x = _Tokens(self.ids, self.embed_dim, self.channels, self.eps, dense, name="tokens")(tokens)
        x = Stage(resample="down" if self.resample else None, name="down", **stage)(x, text, cond, train, probe)
        shape = x.shape
        x = x.reshape(b, -1, self.channels)  # [b, n, channels]
        x = linear(self.width, name="in", **dense)(norm("in_norm")(x))
        block = Block(
            self.heads, self.mlp_dim, self.width // self.heads, cross=True, norm="rms",
            mlp_norm="layer" if self.bias else "layer_nobias", eps=self.eps, act="gelu", gated=True, bias=self.bias,
            dropout=self.dropout, name="layers", **kwargs,
        )  # fmt: skip
        x = self.run_stack(block, x, depth=self.depth, context=text, cond=cond, train=train, **probe)
        x = linear(self.channels, name="out", **dense)(norm("out_norm")(x)).reshape(shape)
        x = Stage(resample="up" if self.resample else None, name="up", **stage)(x, text, cond, train, probe)
        return _Head(self.embed_dim, self.vocab, self.eps, dense, name="head")(x)


def micro_conditions(
    batch: int, height: int, width: int, *, crop: tuple[int, int] = (0, 0), aesthetic: float = 6.0
) -> Float[Array, "b 5"]:
    """What the network is told of a picture beside its text: (width, height, crop, aesthetic score), float32.

    height, width: pixels of the picture, in training of the original one.  crop: where it was cut from that, (0, 0) for
    a picture that looks well framed.  aesthetic: score of LAION's classifier, about 4 to 7 (SDXL, Podell et al. 2023).
    """
    # QUIRK: width comes first here, as in the training code (diffusers' AmusedPipeline says so and does it; tested)
    return jnp.broadcast_to(jnp.asarray([width, height, *crop, aesthetic], jnp.float32), (batch, 5))


class _Condition(nn.Module):
    """The conditions' MLP: [b, pooled_width + 5 micro_width] -> [b, width]."""

    width: int
    dense: Any

    @nn.compact
    def __call__(self, x):
        x = nn.silu(linear(self.width, name="fc1", **self.dense)(x))
        return linear(self.width, name="fc2", **self.dense)(x)


class _Tokens(nn.Module):
    """Token ids [b, h, w] -> features [b, h, w, channels]: embedding, norm, projection."""

    ids: int
    embed_dim: int
    channels: int
    eps: float
    dense: Any

    @nn.compact
    def __call__(self, tokens):
        kwargs = {k: v for k, v in self.dense.items() if k != "use_bias"}
        x = nn.Embed(self.ids, self.embed_dim, embedding_init=nn.initializers.normal(0.02), name="embed", **kwargs)(
            tokens
        )
        x = norm_layer("rms", self.eps, "norm", **kwargs)(x)
        return linear(self.channels, name="project", **self.dense)(x)


class _Head(nn.Module):
    """Features [b, h, w, channels] -> logits [b, h, w, vocab], float32 or wider: projection, norm, projection."""

    embed_dim: int
    vocab: int
    eps: float
    dense: Any

    @nn.compact
    def __call__(self, x):
        kwargs = {k: v for k, v in self.dense.items() if k != "use_bias"}
        x = linear(self.embed_dim, name="fc", **self.dense)(x)
        x = norm_layer("rms", self.eps, "norm", **kwargs)(x)
        x = linear(self.vocab, name="logits", **self.dense)(x)
        return x.astype(jnp.promote_types(x.dtype, jnp.float32))


class Stage(nn.Module):
    """Convolutional blocks, each followed by a block of attention to the text; resampled ahead ("down") or behind
    ("up").

    Parameters: res_i, look_i; resample_norm and resample (a 2 x 2 convolution, transposed for "up").
    """

    channels: int
    blocks: int
    heads: int
    resample: str | None = None
    eps: float = 1e-6
    bias: bool = False
    dropout: float = 0.0
    attn_dropout: float = 0.0
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], text, cond, train, probe) -> Float[Array, "b h2 w2 c"]:
        kwargs = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        block = dict(bias=self.bias, **kwargs)
        if self.resample is not None:
            norm = norm_layer("rms", self.eps, "resample_norm", **kwargs)
            convolve = nn.Conv if self.resample == "down" else nn.ConvTranspose
            conv = convolve(
                self.channels, (2, 2), (2, 2), padding="VALID", use_bias=self.bias, name="resample", **kwargs
            )
        x = conv(norm(x)) if self.resample == "down" else x
        for i in range(self.blocks):
            x = ConvNext(self.eps, self.dropout, name=f"res_{i}", **block)(x, cond, train)
            flat = x.reshape(x.shape[0], -1, self.channels)
            look = _Look(self.heads, self.attn_dropout, name=f"look_{i}", **block)
            x = look(flat, text, train, dict(probe, layer=i)).reshape(x.shape)
        return conv(norm(x)) if self.resample == "up" else x


class ConvNext(nn.Module):
    """A ConvNeXt V2 block (Woo et al. 2023), scaled and shifted by a condition behind its residual.

    Depthwise 3x3 convolution, RMS norm, dense to four times the channels, gelu, global response norm, dense.
    Parameters: depthwise, norm, fc1, response {scale, bias}, fc2, mod.
    """

    eps: float = 1e-6
    dropout: float = 0.0
    bias: bool = False
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], cond: Float[Array, "b d"], train: bool = False):
        c = x.shape[-1]
        kwargs = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        dense = dict(use_bias=self.bias, **kwargs)
        y = nn.Conv(c, (3, 3), padding=1, feature_group_count=c, name="depthwise", **dense)(x)
        y = norm_layer("rms", self.eps, "norm", **kwargs)(y)
        y = activation("gelu")(linear(4 * c, name="fc1", **dense)(y))
        y = GlobalResponseNorm(name="response", **kwargs)(y)
        y = linear(c, name="fc2", **dense)(y)
        x = x + nn.Dropout(self.dropout, deterministic=not train)(y)
        return modulate(x, cond, name="mod", **dense)


class GlobalResponseNorm(nn.Module):
    """x + scale x n + bias, with n the norm of a channel over the picture, over the mean of these (Woo et al. 2023).

    Starts as the identity.  Parameters: scale [c], bias [c].
    """

    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        scale, bias = (self.param(n, nn.initializers.zeros, x.shape[-1:], self.param_dtype) for n in ("scale", "bias"))
        x, scale, bias = nn.dtypes.promote_dtype(x, scale, bias, dtype=self.dtype)
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        norm = jnp.sqrt(jnp.square(wide).sum((1, 2), keepdims=True))  # [b, 1, 1, c]
        norm = norm / (norm.mean(-1, keepdims=True) + 1e-6)
        return scale * (x * norm.astype(x.dtype)) + bias + x


class _Look(nn.Module):
    """Two attentions to the text one behind the other, each with an RMS norm and a residual; no MLP.

    Parameters: attn_norm_i, attn_i, and context where text and x differ in width.
    """

    heads: int
    dropout: float = 0.0
    bias: bool = False
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, text, train, probe):
        kwargs = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        width = x.shape[-1]
        if text.shape[-1] != width:
            text = linear(width, use_bias=self.bias, name="context", **kwargs)(jax.nn.silu(text))
        for i in range(2):
            # QUIRK: eps is 1e-6 here whatever the config's layer_norm_eps (diffusers, SkipFFTransformerBlock; tested)
            h = norm_layer("rms", 1e-6, f"attn_norm_{i}", **kwargs)(x)
            attn = MultiHeadAttention(
                self.heads, width // self.heads, qkv_bias=self.bias, out_bias=self.bias, name=f"attn_{i}", **kwargs
            )
            x = x + nn.Dropout(self.dropout, deterministic=not train)(attn(h, text, **probe))
        return x
