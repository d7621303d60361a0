"""MaskGIT's transformer: masked image tokens, given a class (Chang et al. 2022, arXiv:2202.04200)."""

import math

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vgen.layers.embed import Positions
from vgen.layers.transformer import Block, Stacked, activation, norm_layer

EPS = 1e-12  # of every norm, as BERT
IMAGENET_256 = dict(codebook=1024, classes=1000, length=257, depth=24, width=768, heads=16, mlp_dim=3072)
IMAGENET_512 = dict(IMAGENET_256, length=1025)


class MaskGIT(Stacked):
    """BERT over [class, token 1, ..., token n], output tied to the embedding (google-research/maskgit, Apache-2.0).

    One table holds the codebook's ids, then the classes', then the mask's, `codebook + classes`.
    length: tokens and the class.  heads: the released code has 16, the paper says 8.
    Other fields: see `vgen.layers.transformer.Stacked`.
    Parameters: embed, positions, embed_norm, layers [depth, ...], head, head_norm, head_bias.
    """

    codebook: int
    classes: int
    length: int
    depth: int
    width: int
    heads: int
    mlp_dim: int
    dropout: float = 0.0

    @property
    def mask_id(self) -> int:
        return self.codebook + self.classes

    @property
    def vocab(self) -> int:
        return self.codebook

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of the largest square picture that fits."""
        return (math.isqrt(self.length - 1),) * 2

    @nn.compact
    def __call__(
        self, ids: Int[Array, "b n"], *, train: bool = False, control=None, step=None
    ) -> Float[Array, "b n ids"]:
        """ids: int32 [b, up to length], the class first -> logits over all codebook + classes + 1 ids."""
        init = nn.initializers.truncated_normal(0.02)
        embed = nn.Embed(self.mask_id + 1, self.width, dtype=self.dtype, embedding_init=init, name="embed")
        x = Positions(self.length, dtype=self.dtype, name="positions")(embed(ids))
        x = norm_layer("layer", EPS, "embed_norm", dtype=self.dtype)(x)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        block = Block(
            self.heads,
            self.mlp_dim,
            order="post",
            eps=EPS,
            dropout=self.dropout,
            dtype=self.dtype,
            kernel_init=init,
            name="layers",
        )
        x = self.run_stack(
            block,
            x,
            depth=self.depth,
            train=train,
            control=control,
            step=step,
        )
        x = activation("gelu_tanh")(nn.Dense(self.width, dtype=self.dtype, kernel_init=init, name="head")(x))
        x = norm_layer("layer", EPS, "head_norm", dtype=self.dtype)(x)
        bias = self.param("head_bias", nn.initializers.zeros, (self.mask_id + 1,))
        logits = embed.attend(x) + bias
        return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))

    def image_logits(
        self, tokens: Int[Array, "b n"], label: Int[Array, "b"], keep: Bool[Array, "b"] | None = None, **kwargs
    ) -> Float[Array, "b n codebook"]:
        """tokens: int32 in [0, codebook) or mask_id; label: int32 in [0, classes) -> logits over the codebook.

        keep: False where the class is left out, which is then masked like a token; not in the paper.  None keeps all.
        """
        first = self.codebook + label if keep is None else jnp.where(keep, self.codebook + label, self.mask_id)
        ids = jnp.concatenate([first[:, None], tokens], axis=1)
        return self(ids, **kwargs)[:, 1:, : self.codebook]
