"""PixelSNAIL in the state dicts of rosinality/vq-vae-2-pytorch, without the conditioning of its lower level."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from vgen.convert.family import Family
from vgen.convert.pieces import Shapes, count
from vgen.convert.rules import CONV, LINEAR, Rule, Table, chain, each, reshape
from vgen.models.pixelsnail import PixelSNAIL

_DENSE = chain(LINEAR, each(lambda a: a[None, None], lambda a: a[0, 0]))  # a linear layer as a convolution of 1x1


def _layer(src: str, dst: str, dense: bool = False) -> list[Rule]:
    """A layer under torch's weight norm."""
    return [
        Rule(f"{src}.weight_v", f"{dst}/direction", _DENSE if dense else CONV),
        Rule(f"{src}.weight_g", f"{dst}/gain", reshape((-1,), (-1, 1) if dense else (-1, 1, 1, 1))),
        Rule(f"{src}.bias", f"{dst}/bias"),
    ]


def _res(src: str, dst: str, inner: str = "conv") -> list[Rule]:
    rules = [rule for n in (1, 2) for rule in _layer(f"{src}.conv{n}.{inner}", f"{dst}/conv{n}")]
    return rules + _layer(f"{src}.aux_conv.conv", f"{dst}/beside")


def table(module: PixelSNAIL) -> Table:
    rules = _layer("horizontal.conv.conv", "above") + _layer("vertical.conv.conv", "left")
    rules += _res("blocks.{i}.resblocks.{j}", "block_{i}/res_{j}", "conv.conv")
    for part in ("key", "query", "out"):
        rules += _res(f"blocks.{{i}}.{part}_resblock", f"block_{{i}}/{part}_res")
    for part in ("query", "key", "value"):
        rules += _layer(f"blocks.{{i}}.causal_attention.{part}", f"block_{{i}}/{part}", dense=True)
    rules += _layer("blocks.{i}.out.conv", "block_{i}/out")
    for i in range(module.out_blocks):
        rules += _res(f"out.{i}", f"out_{i}")
    rules += _layer(f"out.{module.out_blocks + 1}.conv", "logits")
    return Table(tuple(rules), ignore=("background",))  # places of the grid, which the network makes itself


def _build(config: Mapping[str, Any], shapes: Shapes) -> PixelSNAIL:
    width, vocab, _, kernel = shapes["horizontal.conv.conv.weight_v"]
    res = "blocks.0.resblocks.0.conv1.conv.conv.weight_v"
    return PixelSNAIL(
        vocab=vocab, grid=tuple(shapes["background"][2:]), width=width, kernel=kernel,
        depth=count(shapes, "blocks.{}.resblocks.0.conv1.conv.conv.bias"),
        res_blocks=count(shapes, "blocks.0.resblocks.{}.conv1.conv.conv.bias"), res_width=shapes[res][0],
        attention="blocks.0.causal_attention.query.bias" in shapes,
        out_blocks=count(shapes, "out.{}.conv1.conv.bias"),
    )  # fmt: skip


def _tokens(module: PixelSNAIL, rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {"tokens": rng.integers(0, module.vocab, (2, math.prod(module.grid)), np.int32)}


ROSINALITY = Family(_build, table, _tokens, outputs=lambda logits: {"logits": logits})
