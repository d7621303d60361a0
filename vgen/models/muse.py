"""Muse's two networks: masked image tokens, given text (Chang et al. 2023, arXiv:2301.00704).

No code or weights were published, and the paper leaves out heads, biases, activations and the shape of the 632M model.
Chosen here: heads of 64, projections without biases, tanh gelu, 24 layers of 1280 (629M in the layers).
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vgen.layers.embed import Positions2D
from vgen.layers.linear import linear
from vgen.layers.transformer import Block, Stacked, activation, norm_layer

BASE_3B = dict(vocab=8192, grid=(16, 16), depth=48, width=2048, heads=32, mlp_dim=8192)  # published
BASE_632M = dict(vocab=8192, grid=(16, 16), depth=24, width=1280, heads=20, mlp_dim=5120)  # a guess, see above
SUPER_RES = dict(
    vocab=8192,
    grid=(64, 64),
    low_vocab=8192,
    low_grid=(16, 16),
    depth=32,
    low_depth=16,
    width=1024,
    heads=16,
    mlp_dim=4096,
    block=8,
)  # published, but for block and heads


class _Codes(nn.Module):
    """A codebook [vocab, d] -> what a network makes of each code [vocab, width]: dense, gelu, dense.

    Codes that look alike are alike, even where one of them never was a target.
    """

    width: int
    dtype: Any = None

    @nn.compact
    def __call__(self, codes):
        codes = jax.lax.stop_gradient(codes)
        codes = (codes - codes.mean(0)) / (codes.std(0) + 1e-6)
        x = activation("gelu_tanh")(linear(2 * self.width, dtype=self.dtype, name="fc")(codes))
        return linear(self.width, dtype=self.dtype, name="out")(x)


class _Tokens(nn.Module):
    """Token ids 0..vocab (the last is the mask) -> embeddings with learned 2-D positions, normalised.

    The norm is MaskGIT's (and BERT's); the paper is silent. Without it the first branches, of order one, drown the
    small embeddings: in a trial at mini, loss 1.38 against 0.98 after 1300 steps.
    """

    vocab: int
    grid: tuple[int, int]
    width: int
    dtype: Any = None

    @nn.compact
    def __call__(self, tokens, codes=None):
        small = nn.initializers.normal(0.02)
        if codes is None:
            x = nn.Embed(self.vocab + 1, self.width, dtype=self.dtype, name="embed", embedding_init=small)(tokens)
        else:
            mask = self.param("mask", small, (1, self.width)).astype(self.dtype)
            table = _Codes(self.width, self.dtype, name="codes")(codes)
            x = jnp.concatenate([table, mask.astype(table.dtype)])[tokens]
        x = Positions2D(self.grid, dtype=self.dtype, name="positions")(x)
        return norm_layer("layer", 1e-6, "norm", dtype=self.dtype)(x)


class _Head(nn.Module):
    """The output MLP: norm, dense, gelu, dense -> float32 logits over the codebook ("an MLP", section 2.3)."""

    vocab: int
    dtype: Any = None

    @nn.compact
    def __call__(self, x, codes=None):
        width = x.shape[-1]
        x = norm_layer("layer", 1e-6, "norm", dtype=self.dtype)(x)
        x = activation("gelu_tanh")(linear(width, dtype=self.dtype, name="fc")(x))
        if codes is None:
            logits = linear(self.vocab, dtype=self.dtype, name="logits")(x)
        else:
            x = linear(width, dtype=self.dtype, name="to_code")(x)
            logits = 2 * width**-0.5 * x @ _Codes(width, self.dtype, name="codes")(codes).T
        return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))


class BaseTransformer(Stacked):
    """Masked tokens and text -> logits of every token (section 2.3).

    vocab: codebook size; the mask's id is `vocab`.  grid: (rows, columns) of tokens.
    relative: learned biases by offset in the self-attention (`RelativeBias2D`), not in the paper: small models look at
    neighbours from the first step on then, and not after a thousand.
    by_codes: tokens are embedded and scored by a small network of their code in the tokenizer's codebook, not by a
    vector of their own; not in the paper: with few pictures, a token that was never a target can be predicted then.
    Other fields: see `vgen.layers.transformer.Stacked`.
    Parameters: image {embed, positions, norm}, text (projection to the width), layers [depth, ...], head {norm, fc,
    logits}; by_codes: image {codes {fc, out}, mask} and head {to_code, codes} for embed and logits.
    """

    vocab: int
    grid: tuple[int, int]
    depth: int
    width: int
    heads: int
    mlp_dim: int
    act: str = "gelu_tanh"
    bias: bool = False
    dropout: float = 0.0
    relative: bool = False
    by_codes: bool = False

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "b n"],
        text: Float[Array, "b l d"],
        text_mask: Bool[Array, "b l"] | None = None,
        keep_text: Bool[Array, "b"] | None = None,
        *,
        codes: Float[Array, "vocab c"] | None = None,
        train: bool = False,
        control=None,
        step=None,
    ) -> Float[Array, "b n vocab"]:
        """tokens: int32 in [0, vocab], row-major.  text: states of a text encoder.  text_mask: False for padding.

        keep_text: False where a sample's text is dropped: there the cross-attention looks at the image's own tokens,
        with the same weights, so one batched call serves conditional and unconditional samples.  None keeps all.
        codes: the codebook, with by_codes and only then; no gradient reaches it.
        """
        _check_codes(self, codes)
        x = _Tokens(self.vocab, self.grid, self.width, self.dtype, name="image")(tokens, codes)
        text = linear(self.width, use_bias=self.bias, dtype=self.dtype, name="text")(text)
        block = Block(
            self.heads,
            self.mlp_dim,
            cross=True,
            act=self.act,
            bias=self.bias,
            dropout=self.dropout,
            dtype=self.dtype,
            relative=tuple(self.grid) if self.relative else None,
            name="layers",
        )
        x = self.run_stack(
            block,
            x,
            depth=self.depth,
            context=text,
            context_mask=text_mask,
            keep_context=keep_text,
            train=train,
            control=control,
            step=step,
        )
        return _Head(self.vocab, self.dtype, name="head")(x, codes)


def _check_codes(module, *codes):
    if any((given is not None) != module.by_codes for given in codes):
        raise ValueError(f"{type(module).__name__}: by_codes={module.by_codes}, so codes must "
                         + ("be given" if module.by_codes else "not be given"))  # fmt: skip


class SuperResTransformer(Stacked):
    """Masked high-resolution tokens, given low-resolution tokens and text -> logits of every token (section 2.4).

    The low-resolution tokens pass through self-attention layers of their own and are joined with the projected text;
    the high-resolution tokens attend to both.
    vocab, grid: of the high resolution; low_vocab, low_grid: of the low one; mask ids as in BaseTransformer.
    block: side of the blocks of multi-axis self-attention (`vgen.layers.attention.multi_axis`, heads split between
    local and dilated; the paper says "multi-axis" and no more), or None for full self-attention, for small grids.
    relative, by_codes: as in BaseTransformer; full self-attention alone for `relative`.
    aligned: what is said of a low-resolution token is also added to the tokens that it covers, not in the paper: in few
    steps a small model does not learn by cross-attention alone where to look.
    Parameters: low {embed, positions}, low_layers [low_depth, ...], low_norm, image, text, layers [depth, ...], head.
    """

    vocab: int
    grid: tuple[int, int]
    low_vocab: int
    low_grid: tuple[int, int]
    depth: int
    low_depth: int
    width: int
    heads: int
    mlp_dim: int
    block: int | None = None
    act: str = "gelu_tanh"
    bias: bool = False
    dropout: float = 0.0
    relative: bool = False
    by_codes: bool = False
    aligned: bool = False

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "b n"],
        low: Int[Array, "b m"],
        text: Float[Array, "b l d"],
        text_mask: Bool[Array, "b l"] | None = None,
        keep_text: Bool[Array, "b"] | None = None,
        *,
        codes: Float[Array, "vocab c"] | None = None,
        low_codes: Float[Array, "low_vocab c"] | None = None,
        train: bool = False,
        control=None,
        step=None,
    ) -> Float[Array, "b n vocab"]:
        """tokens: int32 in [0, vocab]; low: int32 in [0, low_vocab]; text, text_mask: as in BaseTransformer.

        keep_text: False where a sample's text is dropped.  It still sees the low-resolution tokens: the paper is silent
        here, and guidance is then along the text alone.  codes, low_codes: the two codebooks, with by_codes.
        """
        _check_codes(self, codes, low_codes)
        args = dict(act=self.act, bias=self.bias, dropout=self.dropout, dtype=self.dtype)
        run = dict(train=train, control=control, step=step)
        low = _Tokens(self.low_vocab, self.low_grid, self.width, self.dtype, name="low")(low, low_codes)
        low_grid, grid = (tuple(grid) if self.relative else None for grid in (self.low_grid, self.grid))
        low_block = Block(self.heads, self.mlp_dim, relative=low_grid, name="low_layers", **args)
        low = self.run_stack(low_block, low, depth=self.low_depth, **run)
        low = norm_layer("layer", 1e-6, "low_norm", dtype=self.dtype)(low)

        text_mask = jnp.ones(text.shape[:2], bool) if text_mask is None else text_mask
        text_mask = text_mask if keep_text is None else text_mask & keep_text[:, None]
        text = linear(self.width, use_bias=self.bias, dtype=self.dtype, name="text")(text)
        context = jnp.concatenate([low.astype(text.dtype), text], axis=1)  # [b, m + l, width]
        mask = jnp.concatenate([jnp.ones(low.shape[:2], bool), text_mask], axis=1)

        x = _Tokens(self.vocab, self.grid, self.width, self.dtype, name="image")(tokens, codes)
        if self.aligned:
            x = x + self._above(low).astype(x.dtype)
        axes = None if self.block is None else (*self.grid, self.block)
        block = Block(self.heads, self.mlp_dim, cross=True, axes=axes, relative=grid, name="layers", **args)
        x = self.run_stack(block, x, depth=self.depth, context=context, context_mask=mask, **run)
        return _Head(self.vocab, self.dtype, name="head")(x, codes)

    def _above(self, low):
        """States [b, m, width] of low-resolution tokens, each repeated for the tokens that it covers: [b, n, width]."""
        (rows, columns), (height, width) = self.low_grid, self.grid
        if height % rows or width % columns:
            raise ValueError(f"SuperResTransformer: aligned needs a grid {self.grid} that {self.low_grid} divides")
        low = low.reshape(low.shape[0], rows, columns, low.shape[-1])
        low = low.repeat(height // rows, axis=1).repeat(width // columns, axis=2)
        return low.reshape(low.shape[0], height * width, low.shape[-1])


def layer_parameters(params) -> int:
    """Number of parameters in the transformer layers, the part that the paper's sizes speak of."""
    layers = [params[name] for name in ("layers", "low_layers") if name in params]
    return sum(leaf.size for leaf in jax.tree.leaves(layers))
