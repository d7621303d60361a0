"""DALL-E's dVAE as OpenAI released it: encoder.pkl and decoder.pkl, or both halves in one state dict."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from vgen.convert.family import Family
from vgen.convert.pieces import Shapes, count
from vgen.convert.rules import CONV, Rule, Table
from vgen.models.dvae import DVAE, GROUPS, DVAEDecoder, DVAEEncoder


def _conv(src: str, dst: str) -> list[Rule]:
    """The authors' convolution calls its parameters w and b."""
    return [Rule(f"{src}.w", f"{dst}/kernel", CONV), Rule(f"{src}.b", f"{dst}/bias")]


def half_rules(blocks: int, src: str = "", dst: str = "") -> list[Rule]:
    """One half, its names behind the prefixes `src` and `dst`; the file counts groups and blocks from 1."""
    rules = _conv(f"{src}blocks.input", f"{dst}conv_in") + _conv(f"{src}blocks.output.conv", f"{dst}conv_out")
    for i in range(GROUPS):
        for j in range(blocks):
            at, to = f"{src}blocks.group_{i + 1}.block_{j + 1}", f"{dst}group_{i}_block_{j}"
            rules += _conv(f"{at}.id_path", f"{to}/shortcut")
            rules += [r for n in range(1, 5) for r in _conv(f"{at}.res_path.conv_{n}", f"{to}/conv{n}")]
    return rules


def _blocks(shapes: Shapes, prefix: str) -> int:
    first = f"{prefix}blocks.group_1.block_{{}}.res_path.conv_1.w"
    return count({first.format(0): (), **shapes}, first) - 1  # the file counts from 1


def _encoder_sizes(shapes: Shapes, prefix: str = "") -> dict[str, int]:
    channels, image = shapes[f"{prefix}blocks.input.w"][:2]
    codes = shapes[f"{prefix}blocks.output.conv.w"][0]
    return dict(channels=channels, image_channels=image, num_codes=codes, blocks=_blocks(shapes, prefix))


def _decoder_sizes(shapes: Shapes, prefix: str = "") -> dict[str, int]:
    stem, codes = shapes[f"{prefix}blocks.input.w"][:2]
    statistics, channels = shapes[f"{prefix}blocks.output.conv.w"][:2]
    sizes = dict(channels=channels, image_channels=statistics // 2, num_codes=codes, blocks=_blocks(shapes, prefix))
    return sizes | {"stem": stem}


def _build(config: Mapping[str, Any], shapes: Shapes) -> DVAE:
    return DVAE(**_encoder_sizes(shapes, "encoder."), decoder_stem=shapes["decoder.blocks.input.w"][0])


def _images(module: DVAE | DVAEEncoder, rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {"images": rng.uniform(-1, 1, (2, 16, 24, module.image_channels)).astype(np.float32)}


def _codes(module: DVAEDecoder, rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {"codes": np.eye(module.num_codes, dtype=np.float32)[rng.integers(0, module.num_codes, (2, 2, 3))]}


def _table(module: DVAE) -> Table:
    halves = (half_rules(module.blocks, f"{half}.", f"{half}/") for half in ("encoder", "decoder"))
    return Table(tuple(rule for half in halves for rule in half))


def _half_table(module: DVAEEncoder | DVAEDecoder) -> Table:
    return Table(tuple(half_rules(module.blocks)))


DVAE_BOTH = Family(
    _build, _table, _images, outputs=lambda result: dict(zip(("reconstruction", "logits"), result, strict=True))
)
ENCODER = Family(
    lambda config, shapes: DVAEEncoder(**_encoder_sizes(shapes)),
    _half_table,
    _images,
    outputs=lambda logits: {"logits": logits},
)
DECODER = Family(
    lambda config, shapes: DVAEDecoder(**_decoder_sizes(shapes)),
    _half_table,
    _codes,
    outputs=lambda statistics: {"statistics": statistics},
)
