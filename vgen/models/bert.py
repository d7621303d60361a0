"""BERT's text transformer (Devlin et al. 2018, arXiv:1810.04805) as image-text models have it: encoder or decoder."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vgen.layers.embed import Positions
from vgen.layers.linear import linear
from vgen.layers.transformer import Block, activation, norm_layer, stack


class TextEmbeddings(nn.Module):
    """Tokens [b, l] to words plus positions [b, l, width]; parameters words, positions {table}.

    `attend` gives the logits of the words themselves: states [b, l, width] to [b, l, vocab].
    """

    vocab: int
    width: int
    max_length: int = 512
    dtype: Any = None
    param_dtype: Any = jnp.float32

    def setup(self):
        kwargs = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        self.words = nn.Embed(self.vocab, self.width, embedding_init=nn.initializers.normal(0.02), **kwargs)
        self.positions = Positions(self.max_length, **kwargs)

    def __call__(self, tokens: Int[Array, "b l"]) -> Float[Array, "b l width"]:
        return self.positions(self.words(tokens))

    def attend(self, x: Float[Array, "b l width"]) -> Float[Array, "b l vocab"]:
        return self.words.attend(x)


class LanguageHead(nn.Module):
    """States to logits: dense, GELU, norm, then the words' own embeddings and a bias of its own.

    attend: `TextEmbeddings.attend`.  Parameters: dense, norm, bias [vocab].
    """

    vocab: int
    act: str = "gelu"
    eps: float = 1e-12
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b l width"], attend) -> Float[Array, "b l vocab"]:
        kwargs = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        x = activation(self.act)(linear(x.shape[-1], name="dense", **kwargs)(x))
        logits = attend(norm_layer("layer", self.eps, "norm", **kwargs)(x))
        return logits + self.param("bias", nn.initializers.zeros, (self.vocab,), self.param_dtype).astype(logits.dtype)


class Bert(nn.Module):
    """Tokens [b, l] to states [b, l, width], or to logits [b, l, vocab] with `head`; post-norm layers.

    cross: every layer looks at a context behind its self-attention (BLIP's text decoder).
    Parameters: embed {words, positions}, embed_norm, layers [depth, ...], head.
    """

    vocab: int = 30_522
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_dim: int = 3072
    max_length: int = 512
    cross: bool = False
    head: bool = False
    act: str = "gelu"
    eps: float = 1e-12
    dropout: float = 0.0
    remat: str = "none"
    unroll: int = 1
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "b l"],
        mask: Bool[Array, "b l"] | None = None,
        context: Float[Array, "b m c"] | None = None,
        context_mask: Bool[Array, "b m"] | None = None,
        *,
        causal: bool = False,
        control=None,
        step=None,
        train: bool = False,
    ) -> Float[Array, "b l d"]:
        """mask: True for text, False for padding, which no token sees.  causal: a token sees itself and those before.

        train: whether dropout (rng "dropout") is on.  Raises ValueError for more than max_length tokens, or a context
        that `cross` does not announce.
        """
        kwargs = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        embed = TextEmbeddings(self.vocab, self.width, self.max_length, name="embed", **kwargs)
        x = norm_layer("layer", self.eps, "embed_norm", **kwargs)(embed(tokens))
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        block = Block(
            self.heads, self.mlp_dim, cross=self.cross, order="post", eps=self.eps, act=self.act, dropout=self.dropout,
            name="layers", **kwargs,
        )  # fmt: skip
        x = stack(
            block, x, depth=self.depth, remat=self.remat, unroll=self.unroll, mask=mask, causal=causal,
            context=context, context_mask=context_mask, control=control, step=step, train=train,
        )  # fmt: skip
        if not self.head:
            return x
        return LanguageHead(self.vocab, self.act, self.eps, name="head", **kwargs)(x, embed.attend)
