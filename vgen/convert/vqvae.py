"""VQ-VAE and its gated PixelCNN in the state dicts of ritheshkumar95/pytorch-vqvae; the authors published none."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from vgen.convert.family import Family
from vgen.convert.inception import IGNORED
from vgen.convert.pieces import Shapes, batch_norm, conv, count
from vgen.convert.rules import CONV, CONV_1X1, CONV_TRANSPOSE, COPY, Rule, Table
from vgen.convert.sam import stacked
from vgen.models.pixelcnn import PixelCNN
from vgen.models.vqvae import VQVAE


def vqvae_table(module: VQVAE) -> Table:
    """Places in the authors' lists: two strided convolutions, the residual blocks; the mirror image of that."""
    blocks = module.blocks
    rules = conv("encoder.0", "encoder/down_0") + batch_norm("encoder.1", "encoder/down_norm_0")
    rules += conv("encoder.3", "encoder/down_1") + [Rule("codebook.embedding.weight", "quantizer/codebook")]
    for half, first in (("encoder", 4), ("decoder", 0)):
        for i in range(blocks):
            src, dst = f"{half}.{first + i}.block", f"{half}/block_{i}"
            rules += conv(f"{src}.1", f"{dst}_conv1") + batch_norm(f"{src}.2", f"{dst}_norm1")
            rules += conv(f"{src}.4", f"{dst}_conv2") + batch_norm(f"{src}.5", f"{dst}_norm2")
    for src, dst in ((f"decoder.{blocks + 1}", "decoder/up_1"), (f"decoder.{blocks + 4}", "decoder/conv_out")):
        rules += [Rule(f"{src}.weight", f"{dst}/kernel", CONV_TRANSPOSE), Rule(f"{src}.bias", f"{dst}/bias")]
    return Table((*rules, *batch_norm(f"decoder.{blocks + 2}", "decoder/up_norm_1")), ignore=IGNORED)


def _vqvae(config: Mapping[str, Any], shapes: Shapes) -> VQVAE:
    channels, image = shapes["encoder.0.weight"][:2]
    return VQVAE(
        channels=channels, image_channels=image, num_codes=shapes["codebook.embedding.weight"][0],
        blocks=count(shapes, "decoder.{}.block.1.weight"), layout="batch_norm",
    )  # fmt: skip


def _images(module: VQVAE, rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {"images": rng.uniform(-1, 1, (2, 16, 24, module.image_channels)).astype(np.float32)}


_PARTS = (  # of a layer: name, path, op of its weight
    ("vert_stack", "vert", CONV),
    ("vert_to_horiz", "vert_to_horiz", CONV_1X1),
    ("horiz_stack", "horiz", CONV),
    ("horiz_resid", "horiz_resid", CONV_1X1),
)


def pixelcnn_table(module: PixelCNN) -> Table:
    """The first layer, whose kernel is larger, by itself and the others stacked."""
    rules = [Rule("embedding.weight", "embed/embedding")]
    for place, path in ((0, "hidden"), (2, "logits")):
        src = f"output_conv.{place}"
        rules += [Rule(f"{src}.weight", f"{path}/kernel", CONV_1X1), Rule(f"{src}.bias", f"{path}/bias")]

    def both(name, path, op):
        later = tuple(f"layers.{i}.{name}" for i in range(1, module.depth))
        return [Rule(f"layers.0.{name}", f"first/{path}", op)] + (
            [Rule(later, f"layers/{path}", stacked(op))] if later else []
        )

    for name, path, op in _PARTS:
        rules += both(f"{name}.weight", f"{path}/kernel", op) + both(f"{name}.bias", f"{path}/bias", COPY)
    return Table((*rules, *both("class_cond_embedding.weight", "label/embedding", COPY)))


def _pixelcnn(config: Mapping[str, Any], shapes: Shapes) -> PixelCNN:
    """The file does not say for which grid; config may, as `grid`, which is 8 by 8 as in the authors' training."""
    vocab, width = shapes["embedding.weight"]
    kernels = [shapes[f"layers.{min(i, _depth(shapes) - 1)}.vert_stack.weight"][3] for i in (0, 1)]
    return PixelCNN(
        vocab=vocab, grid=tuple(config.get("grid", (8, 8))), width=width, depth=_depth(shapes), first_kernel=kernels[0],
        kernel=kernels[1], hidden=shapes["output_conv.0.weight"][0],
        classes=shapes["layers.0.class_cond_embedding.weight"][0],
    )  # fmt: skip


def _depth(shapes: Shapes) -> int:
    return count(shapes, "layers.{}.vert_stack.weight")


def _tokens(module: PixelCNN, rng: np.random.Generator) -> dict[str, np.ndarray]:
    tokens = rng.integers(0, module.vocab, (2, math.prod(module.grid)), np.int32)
    return {"tokens": tokens, "label": rng.integers(0, module.classes, 2, np.int32)}


VQ = Family(_vqvae, vqvae_table, _images, outputs=lambda out: {"images": out[0], "tokens": out[1].indices})
PIXELCNN = Family(_pixelcnn, pixelcnn_table, _tokens, outputs=lambda logits: {"logits": logits})
