"""MaskGIT's transformer in its released form, a Flax tree (google-research/maskgit)."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from vgen.convert.family import Family
from vgen.convert.pieces import Shapes, count
from vgen.convert.rules import ConvertError, Rule, Table, reshape
from vgen.convert.vqgan import FLAX_PARAMS, flax_shapes
from vgen.models.maskgit import IMAGENET_256, MaskGIT


def table(module: MaskGIT) -> Table:
    """Attention kernels are [width, heads, size] and [heads, size, width] in the file, matrices here."""
    head = module.width // module.heads
    split = reshape((module.width, module.width), (module.width, module.heads, head))
    join = reshape((module.width, module.width), (module.heads, head, module.width))
    rules = [
        Rule("params/Embed_0/word_embeddings/embedding", "embed/embedding"),
        Rule("params/Embed_0/position_embeddings/embedding", "positions/table"),
        Rule("params/MlmLayer_0/mlm_bias/bias", "head_bias"),
    ]
    for src, dst in (("Embed_0/embeddings_ln", "embed_norm"), ("MlmLayer_0/mlm_ln", "head_norm")):
        rules += _pair(src, dst, "scale")
    rules += _pair("MlmLayer_0/mlm_dense", "head", "kernel")
    layer = "TransformerLayer_{i}/"
    for name in ("query", "key", "value"):
        src, dst = f"params/{layer}Attention_0/self_attention/{name}", f"layers/attn/{name[0]}"
        bias = reshape((module.width,), (module.heads, head))
        rules += [Rule(f"{src}/kernel", f"{dst}/kernel", split), Rule(f"{src}/bias", f"{dst}/bias", bias)]
    out = f"params/{layer}Attention_0/self_attention/out"
    rules += [Rule(f"{out}/kernel", "layers/attn/out/kernel", join), Rule(f"{out}/bias", "layers/attn/out/bias")]
    rules += _pair(f"{layer}Attention_0/attention_output_ln", "layers/attn_norm", "scale")
    rules += _pair(f"{layer}Mlp_0/intermediate_output", "layers/mlp/fc1", "kernel")
    rules += _pair(f"{layer}Mlp_0/layer_output", "layers/mlp/fc2", "kernel")
    rules += _pair(f"{layer}Mlp_0/layer_output_ln", "layers/mlp_norm", "scale")
    return Table(tuple(rules), rename=FLAX_PARAMS)


def _pair(src: str, dst: str, leaf: str) -> list[Rule]:
    return [Rule(f"params/{src}/{x}", f"{dst}/{x}") for x in (leaf, "bias")]


def _build(config: Mapping[str, Any], shapes: Shapes) -> MaskGIT:
    """The table of ids holds codebook, classes and one mask; how many of them are codes, no shape tells.

    config: {"codebook": ...} where it is not the released 1024.
    """
    shapes = flax_shapes(shapes)
    ids, width = shapes["params/Embed_0/word_embeddings/embedding"]
    codebook = config.get("codebook", IMAGENET_256["codebook"])
    if ids <= codebook:
        raise ConvertError(f"the table of {ids} ids has no room for a codebook of {codebook} and a mask")
    return MaskGIT(
        codebook=codebook,
        classes=ids - codebook - 1,
        length=shapes["params/Embed_0/position_embeddings/embedding"][0],
        depth=count(shapes, "params/TransformerLayer_{}/Mlp_0/layer_output/kernel"),
        width=width,
        heads=shapes["params/TransformerLayer_0/Attention_0/self_attention/query/kernel"][1],
        mlp_dim=shapes["params/TransformerLayer_0/Mlp_0/intermediate_output/kernel"][1],
    )


def _inputs(module: MaskGIT, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """A class, then codes and masks."""
    ids = rng.integers(0, module.codebook, (2, module.length)).astype(np.int32)
    ids[:, 0] = module.codebook + rng.integers(0, module.classes, 2)
    ids[:, 1 : module.length // 2] = module.mask_id
    return {"ids": ids}


MASKGIT = Family(_build, table, _inputs, outputs=lambda logits: {"logits": logits})
