"""The querying transformer of BLIP-2 (Li et al. 2023, arXiv:2301.12597): a few learned queries read an image encoder.

It is a BERT whose text tokens and queries share self-attention and have MLPs of their own; queries look at the image.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vgen.layers.attention import MultiHeadAttention
from vgen.layers.linear import linear
from vgen.layers.transformer import MLP, norm_layer
from vgen.models.bert import LanguageHead, TextEmbeddings
from vgen.models.vit import ViT

BASE = dict(depth=12, width=768, heads=12, mlp_dim=3072)
# BLIP-2's vision tower, 39 of the 40 layers of EVA-CLIP's ViT-g/14.  It was trained without a bias of the keys, which
# files hold as zeros; the softmax does not see it.
EVA_G = dict(width=1408, depth=39, heads=16, mlp_dim=6144, patch_size=14, image_size=224, resize="bicubic")


class QFormerOutput(NamedTuple):
    """queries: [b, q, width].  text: [b, l, width].  logits: [b, l, vocab] of the next words, None without a head."""

    queries: jax.Array
    text: jax.Array
    logits: jax.Array | None = None


class QFormerLayer(nn.Module):
    """Post-norm: self-attention of queries and text, cross-attention of the queries if `cross`, an MLP for each.

    text: whether there is an MLP for text.
    Parameters: attn, cross, mlp, text_mlp, each with its _norm.
    """

    heads: int
    mlp_dim: int
    cross: bool = False
    text: bool = False
    act: str = "gelu"
    eps: float = 1e-12
    dropout: float = 0.0
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, queries: int, mask=None, context=None, context_mask=None, **kwargs):
        """x: [b, queries + l, width] -> the same shape; kwargs: layer, control, step, and train for the dropout."""
        dtypes = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        train = kwargs.pop("train", False)

        def residual(x, y, name):
            y = nn.Dropout(self.dropout, deterministic=not train)(y)
            return norm_layer("layer", self.eps, name + "_norm", **dtypes)(x + y)

        def mlp(x, name):
            return residual(x, MLP(self.mlp_dim, self.act, dropout=0.0, name=name, **dtypes)(x), name)

        attn = MultiHeadAttention(self.heads, name="attn", **dtypes)
        x = residual(x, attn(x, mask=mask, **kwargs), "attn")
        x, text = x[:, :queries], x[:, queries:]
        if self.cross and context is not None:
            look = MultiHeadAttention(self.heads, name="cross", **dtypes)
            x = residual(x, look(x, context, context_mask, **kwargs), "cross")
        x = mlp(x, "mlp")
        return jnp.concatenate([x, mlp(text, "text_mlp")], axis=1) if self.text else x


class QFormer(nn.Module):
    """Queries and text tokens to their states; the front end of a language model, or an image-text matcher.

    context_width: of the image features.  num_queries: learned queries, or 0 where they are always given.
    cross_every: layers 0, n, 2 n, ... look at the image.  text: whether there are MLPs for text; vocab: its words, or
    None.  head: predicts words, for captions.
    Parameters: queries [num_queries, width], embed {words, positions}, embed_norm, layers_i, head.
    """

    depth: int = 12
    width: int = 768
    heads: int = 12
    mlp_dim: int = 3072
    context_width: int = 1408
    num_queries: int = 32
    cross_every: int = 2
    text: bool = False
    vocab: int | None = None
    max_length: int = 512
    head: bool = False
    act: str = "gelu"
    eps: float = 1e-12
    dropout: float = 0.0
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        context: Float[Array, "b m c"] | None = None,
        tokens: Int[Array, "b l"] | None = None,
        mask: Bool[Array, "b l"] | None = None,
        *,
        queries: Float[Array, "b q width"] | None = None,
        context_mask: Bool[Array, "b m"] | None = None,
        use_queries: bool = True,
        causal: bool = False,
        control=None,
        step=None,
        train: bool = False,
    ) -> QFormerOutput:
        """context: features of the image, or None for text alone.  tokens, mask: text, and False for its padding.

        queries: in place of the learned ones.  use_queries: False for text alone.  causal: for captions; words see the
        queries and the words before them, queries see no word.  If not, all see all (image-text matching).
        Raises ValueError for a context of another width, text where there is none, and where nothing is given.
        """
        if tokens is not None and (not self.text or self.vocab is None):
            raise ValueError("QFormer: tokens need text=True and a vocab")
        if context is not None and context.shape[-1] != self.context_width:
            raise ValueError(f"QFormer: context {context.shape}, expected a width of {self.context_width}")
        kwargs = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        parts, count = [], 0
        if self.num_queries:
            learned = self.param(
                "queries", nn.initializers.normal(0.02), (self.num_queries, self.width), self.param_dtype
            )
        if use_queries:
            if queries is None and not self.num_queries:
                raise ValueError("QFormer: num_queries is 0, queries must be given")
            if queries is None:
                batch = (tokens if context is None else context).shape[0]
                queries = jnp.broadcast_to(learned, (batch, *learned.shape))
            parts, count = [queries], queries.shape[1]
        embed = None
        if tokens is not None:
            embed = TextEmbeddings(self.vocab, self.width, self.max_length, name="embed", **kwargs)
            parts.append(embed(tokens))
        if not parts:
            raise ValueError("QFormer: neither queries nor tokens are given")
        x = norm_layer("layer", self.eps, "embed_norm", **kwargs)(jnp.concatenate(parts, axis=1))
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        visible = _visible(count, tokens, mask, causal)
        for i in range(self.depth):
            x = QFormerLayer(
                self.heads, self.mlp_dim, i % self.cross_every == 0, self.text, self.act, self.eps, self.dropout,
                name=f"layers_{i}", **kwargs,
            )(x, count, visible, context, context_mask, layer=i, control=control, step=step, train=train)  # fmt: skip
        states, text, logits = x[:, :count], x[:, count:], None
        if self.head and embed is not None:
            logits = LanguageHead(self.vocab, self.act, self.eps, name="head", **kwargs)(text, embed.attend)
        return QFormerOutput(states, text, logits)


def _visible(queries, tokens, mask, causal):
    """Who sees whom: None for all, else bool [b or 1, 1, queries + l, queries + l]."""
    if tokens is None:
        return None
    length = tokens.shape[1]
    keys = None if mask is None else jnp.pad(mask, ((0, 0), (queries, 0)), constant_values=True)[:, None, None]
    if not causal:
        return keys
    order = jnp.arange(queries + length)
    seen = (order < queries)[None] | ((order[:, None] >= queries) & (order[None] <= order[:, None]))
    return seen[None, None] if keys is None else seen & keys


class ImagePrompt(NamedTuple):
    """features: [b, n, d] of the vision tower.  queries: [b, q, width].  prompt: [b, q, projection], or None."""

    features: jax.Array
    queries: jax.Array
    prompt: jax.Array | None = None


class Blip2(nn.Module):
    """Images to what a language model is shown of them: vision tower, Q-Former and a projection.

    vision: a ViT whose tokens are behind its final norm; images normalised by `vgen.models.blip`'s MEAN and STD.
    projection: width of the language model's embeddings, or None.  Parameters: vision, qformer, project.
    """

    vision: ViT
    qformer: QFormer
    projection: int | None = None

    @nn.compact
    def __call__(self, images: Float[Array, "b h w c"]) -> ImagePrompt:
        features = self.vision(images).tokens
        queries = self.qformer(features).queries
        if self.projection is None:
            return ImagePrompt(features, queries)
        kwargs = dict(dtype=self.qformer.dtype, param_dtype=self.qformer.param_dtype)
        return ImagePrompt(features, queries, linear(self.projection, name="project", **kwargs)(queries))
