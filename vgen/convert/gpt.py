"""The transformer of taming's Net2Net checkpoints, minGPT (CompVis/taming-transformers; karpathy/minGPT)."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from vgen.convert.family import Family
from vgen.convert.pieces import FIRST, Shapes, count, dense, known, norm
from vgen.convert.rules import LINEAR, ConvertError, Rule, Table
from vgen.models.gpt import GPT

# The transformer by itself; its tokenizer is read by `vgen.convert.vqgan`, from the same file too.
_NAMES = ((r"^(tok_emb\.|pos_emb$|blocks\.|ln_f\.|head\.)", r"transformer.\1"),)
_UNREAD = (r"(first_stage_model|cond_stage_model|permuter|loss)\..*", r"transformer\.blocks\.\d+\.attn\.mask")


def table(module: GPT) -> Table:
    """The names of a Net2Net checkpoint; those of the transformer alone are read as well."""
    block = "transformer.blocks.{i}"
    rules = [
        Rule("transformer.tok_emb.weight", "embed/embedding"),
        Rule("transformer.pos_emb", "position", FIRST),
        *norm(f"{block}.ln1", "layers/attn_norm"),
        *norm(f"{block}.ln2", "layers/mlp_norm"),
        *norm("transformer.ln_f", "norm"),
        Rule("transformer.head.weight", "logits/kernel", LINEAR),
    ]
    for ours, name in dict(q="query", k="key", v="value", out="proj").items():
        rules += dense(f"{block}.attn.{name}", f"layers/attn/{ours}")
    for ours, name in dict(fc1=0, fc2=2).items():
        rules += dense(f"{block}.mlp.{name}", f"layers/mlp/{ours}")
    return Table(tuple(rules), ignore=_UNREAD, rename=_NAMES)


def _build(config: Mapping[str, Any], shapes: Shapes) -> GPT:
    """Fields that no shape tells are read from `config`, under their names in GPT: heads (16), classes (None), unmasked
    (0), and grid, without which it is the largest square that the positions have room for.
    """
    shapes = known(shapes, _NAMES)
    if "transformer.pos_emb" not in shapes:
        raise ConvertError("no transformer.pos_emb in the checkpoint: not in the layout of taming's transformers")
    vocab, width = shapes["transformer.tok_emb.weight"]
    length, side = shapes["transformer.pos_emb"][1], math.isqrt(shapes["transformer.pos_emb"][1])
    return GPT(
        vocab=vocab,
        grid=tuple(config.get("grid", (side, side))),
        depth=count(shapes, "transformer.blocks.{}.ln1.weight"),
        width=width,
        heads=config.get("heads", 16),  # of all published ones (section 3.2)
        mlp_dim=shapes["transformer.blocks.0.mlp.0.weight"][0],
        classes=config.get("classes"),
        own_start=False,
        length=length,
        unmasked=config.get("unmasked", 0),
    )


def _inputs(module: GPT, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Tokens of two images, and classes where there are some."""
    label = {} if module.classes is None else {"label": rng.integers(0, module.classes, 2).astype(np.int32)}
    return {"ids": rng.integers(0, module.vocab, (2, module.tokens)).astype(np.int32)} | label


TAMING = Family(_build, table, _inputs, outputs=lambda logits: {"logits": logits})
