"""A small text encoder that is trained with the generator, for scales without a pretrained one."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vgen.layers.embed import Positions
from vgen.layers.transformer import Block, norm_layer, stack


class TextTransformer(nn.Module):
    """Bidirectional pre-norm transformer with learned positions: tokens [b, l] -> (states [b, l, width], mask [b, l]).

    vocab: number of token ids.  length: the longest text, in tokens.
    Parameters: embed, positions, layers [depth, ...], norm.
    """

    vocab: int
    length: int
    depth: int
    width: int
    heads: int
    mlp_dim: int
    dropout: float = 0.0
    remat: str = "none"
    unroll: int = 1
    constrain: Any = None
    dtype: Any = None

    @nn.compact
    def __call__(
        self, tokens: Int[Array, "b l"], mask: Bool[Array, "b l"] | None = None, *, train: bool = False
    ) -> tuple[Float[Array, "b l width"], Bool[Array, "b l"]]:
        """mask: True for text, False for padding, which no other token sees; all True by default."""
        mask = jnp.ones(tokens.shape, bool) if mask is None else mask
        x = nn.Embed(
            self.vocab, self.width, dtype=self.dtype, name="embed", embedding_init=nn.initializers.normal(0.02)
        )(tokens)
        x = Positions(self.length, dtype=self.dtype, name="positions")(x)
        block = Block(self.heads, self.mlp_dim, dropout=self.dropout, dtype=self.dtype, name="layers")
        x = stack(
            block,
            x,
            depth=self.depth,
            remat=self.remat,
            unroll=self.unroll,
            constrain=self.constrain,
            mask=mask,
            train=train,
        )
        return norm_layer("layer", 1e-6, "norm", dtype=self.dtype)(x), mask
