"""A small text encoder that is trained with the generator, for scales without a pretrained one."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vgen.layers.embed import Positions
from vgen.layers.transformer import Block, Stacked, norm_layer


class TextTransformer(Stacked):
    """Bidirectional pre-norm transformer with learned positions: tokens [b, l] -> (states [b, l, width], mask [b, l]).

    The embeddings are normalised first, as BERT's: the layers would drown words of small scale.

    vocab: number of token ids.  length: the longest text, in tokens.
    depth: 0 gives each token at its place and nothing of the others: in short captions the quickest to learn from.
    Other fields: see `vgen.layers.transformer.Stacked`.
    Parameters: embed, positions, embed_norm, layers [depth, ...], norm.
    """

    vocab: int
    length: int
    depth: int
    width: int
    heads: int
    mlp_dim: int
    dropout: float = 0.0

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
        x = norm_layer("layer", 1e-6, "embed_norm", dtype=self.dtype)(x)
        if self.depth:
            block = Block(self.heads, self.mlp_dim, dropout=self.dropout, dtype=self.dtype, name="layers")
            x = self.run_stack(block, x, depth=self.depth, mask=mask, train=train)
        return norm_layer("layer", 1e-6, "norm", dtype=self.dtype)(x), mask
