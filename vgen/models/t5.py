"""T5's encoder, versions 1.0 and 1.1 (Raffel et al. 2020, arXiv:1910.10683; gated MLP: Shazeer 2020)."""

from typing import Any

import flax.linen as nn
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from vgen.layers.embed import RelativeBias
from vgen.layers.transformer import Block, Stacked, norm_layer

XXL = dict(depth=24, width=4096, heads=64, head_dim=64, mlp_dim=10_240)  # version 1.1: t5-v1_1-xxl, flan-t5-xxl
XL = dict(depth=24, width=2048, heads=32, head_dim=64, mlp_dim=5120)
LARGE = dict(depth=24, width=1024, heads=16, head_dim=64, mlp_dim=2816)
BASE = dict(depth=12, width=768, heads=12, head_dim=64, mlp_dim=2048)


class T5Encoder(Stacked):
    """tokens [b, l] -> states [b, l, width], behind the final norm.

    act, gated: "gelu_tanh", True for version 1.1 (and Flan-T5); "relu", False for version 1.0.
    Other fields: see `vgen.layers.transformer.Stacked`.
    Parameters: embed, relative_bias {table}, layers [depth, ...], norm.
    """

    depth: int
    width: int
    heads: int
    head_dim: int
    mlp_dim: int
    vocab: int = 32_128
    act: str = "gelu_tanh"
    gated: bool = True
    buckets: int = 32
    max_distance: int = 128
    eps: float = 1e-6
    param_dtype: Any = np.float32

    @nn.compact
    def __call__(
        self, tokens: Int[Array, "b l"], mask: Bool[Array, "b l"] | None = None, *, control=None, step=None
    ) -> Float[Array, "b l width"]:
        """mask: True for text, False for padding, which no token sees; all True by default.

        float16 overflows in the published weights: use bfloat16.
        """
        kwargs = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        x = nn.Embed(self.vocab, self.width, embedding_init=nn.initializers.normal(1.0), name="embed", **kwargs)(tokens)
        length = tokens.shape[1]
        bias = RelativeBias(
            self.heads, self.buckets, self.max_distance, param_dtype=self.param_dtype, name="relative_bias"
        )(length, length)
        # QUIRK: logits are not divided by sqrt(head_dim); the published weights carry the factor (T5 code, tested)
        block = Block(
            self.heads,
            self.mlp_dim,
            self.head_dim,
            norm="rms",
            eps=self.eps,
            act=self.act,
            gated=self.gated,
            bias=False,
            scale=1.0,
            name="layers",
            **kwargs,
        )
        x = self.run_stack(
            block,
            x,
            depth=self.depth,
            mask=mask,
            bias=bias,
            control=control,
            step=step,
        )
        return norm_layer("rms", self.eps, "norm", **kwargs)(x)
