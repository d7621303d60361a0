"""T5's encoder, versions 1.0 and 1.1 (Raffel et al. 2020, arXiv:1910.10683; gated MLP: Shazeer 2020)."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from vgen.layers.embed import RelativeBias
from vgen.layers.transformer import Block, norm_layer, stack
from vgen.weights import read_weights

XXL = dict(depth=24, width=4096, heads=64, head_dim=64, mlp_dim=10_240)  # version 1.1: t5-v1_1-xxl, flan-t5-xxl
XL = dict(depth=24, width=2048, heads=32, head_dim=64, mlp_dim=5120)
LARGE = dict(depth=24, width=1024, heads=16, head_dim=64, mlp_dim=2816)
BASE = dict(depth=12, width=768, heads=12, head_dim=64, mlp_dim=2048)


class T5Encoder(nn.Module):
    """tokens [b, l] -> states [b, l, width], behind the final norm.

    act, gated: "gelu_tanh", True for version 1.1 (and Flan-T5); "relu", False for version 1.0.
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
    remat: str = "none"
    unroll: int = 1
    constrain: Any = None
    dtype: Any = None
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
        x = stack(
            block,
            x,
            depth=self.depth,
            remat=self.remat,
            unroll=self.unroll,
            constrain=self.constrain,
            mask=mask,
            bias=bias,
            control=control,
            step=step,
        )
        return norm_layer("rms", self.eps, "norm", **kwargs)(x)


_LAYER = r"encoder\.block\.(\d+)\.layer\."
_RULES = (  # name in the checkpoint, path here, whether the matrix is transposed
    (r"shared\.weight", "embed/embedding", False),
    (r"encoder\.block\.0\.layer\.0\.SelfAttention\.relative_attention_bias\.weight", "relative_bias/table", False),
    (r"encoder\.final_layer_norm\.weight", "norm/scale", False),
    (_LAYER + r"0\.SelfAttention\.([qkv])\.weight", r"layers/attn/\2/kernel", True),
    (_LAYER + r"0\.SelfAttention\.o\.weight", "layers/attn/out/kernel", True),
    (_LAYER + r"0\.layer_norm\.weight", "layers/attn_norm/scale", False),
    (_LAYER + r"1\.DenseReluDense\.wi_0\.weight", "layers/mlp/gate/kernel", True),
    (_LAYER + r"1\.DenseReluDense\.wi(?:_1)?\.weight", "layers/mlp/fc1/kernel", True),
    (_LAYER + r"1\.DenseReluDense\.wo\.weight", "layers/mlp/fc2/kernel", True),
    (_LAYER + r"1\.layer_norm\.weight", "layers/mlp_norm/scale", False),
)
_IGNORED = r"encoder\.embed_tokens\.weight|lm_head\.weight|decoder\..*"  # the first is `shared` again


def from_torch_state(state: Mapping[str, np.ndarray]) -> dict:
    """Parameters of a T5Encoder from the arrays of a `transformers` T5 state dict, encoder alone or with its decoder.

    Raises ValueError for names that it does not know, naming them, and for layers whose arrays are not all there.
    """
    flat, unknown = {}, []
    for name, array in state.items():
        rule = next((rule for rule in _RULES if re.fullmatch(rule[0], name)), None)
        if rule is None:
            unknown += [] if re.fullmatch(_IGNORED, name) else [name]
            continue
        match = re.fullmatch(rule[0], name)
        layer = int(match[1]) if rule[1].startswith("layers/") else None
        flat.setdefault(match.expand(rule[1]), {})[layer] = array.T if rule[2] else array
    depth = len(flat.get("layers/attn/q/kernel", {}))
    short = [path for path, found in flat.items() if set(found) not in ({None}, set(range(depth)))]
    missing = {"embed/embedding", "relative_bias/table", "norm/scale"} - set(flat)
    if unknown or short or missing:
        raise ValueError(
            f"from_torch_state: unknown names {unknown}, parameters without an array for each of "
            f"{depth} layers {short}, missing {sorted(missing)}"
        )
    params: dict = {}
    for path, found in flat.items():
        *parents, leaf = path.split("/")
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = found[None] if None in found else np.stack([found[i] for i in range(depth)])
    return params


def load(path: str | Path) -> dict:
    """Parameters of a T5Encoder from a weight file with `transformers`' names (see `vgen.weights.read_weights`)."""
    return from_torch_state(read_weights(path))
