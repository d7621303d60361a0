"""ArcFace's IResNet in the authors' state dict (insightface, arcface_torch)."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from vgen.convert.family import Family
from vgen.convert.inception import IGNORED
from vgen.convert.pieces import Shapes, batch_norm, conv, count
from vgen.convert.rules import LINEAR, Rule, Table, chain, each
from vgen.models.iresnet import WIDTHS, IResNet


def table(module: IResNet) -> Table:
    side, channels = module.image_size // 16, WIDTHS[-1]
    # QUIRK: the authors flatten [channel, row, column], we [row, column, channel]: rows of the kernel change places.
    flatten = each(
        lambda a: a.reshape(channels, side, side, -1).transpose(1, 2, 0, 3).reshape(-1, a.shape[-1]),
        lambda a: a.reshape(side, side, channels, -1).transpose(2, 0, 1, 3).reshape(-1, a.shape[-1]),
    )
    rules = conv("conv1", "conv1", bias=False) + [Rule("prelu.weight", "prelu/slope")]
    for name in ("bn1", "bn2", "features"):
        rules += batch_norm(name, name)
    rules += [Rule("fc.weight", "fc/kernel", chain(LINEAR, flatten)), Rule("fc.bias", "fc/bias")]
    for stage in range(1, len(WIDTHS) + 1):
        src, dst = f"layer{stage}.{{i}}", f"layer{stage}_{{i}}"
        for n in (1, 2, 3):
            rules += batch_norm(f"{src}.bn{n}", f"{dst}/bn{n}")
        rules += conv(f"{src}.conv1", f"{dst}/conv1", False) + conv(f"{src}.conv2", f"{dst}/conv2", False)
        rules += [Rule(f"{src}.prelu.weight", f"{dst}/prelu/slope")]
        rules += conv(f"{src}.downsample.0", f"{dst}/shortcut_conv", False)
        rules += batch_norm(f"{src}.downsample.1", f"{dst}/shortcut_bn")
    return Table(tuple(rules), ignore=IGNORED)


def _build(config: Mapping[str, Any], shapes: Shapes) -> IResNet:
    features, flat = shapes["fc.weight"]
    return IResNet(
        layers=tuple(count(shapes, f"layer{stage}.{{}}.conv1.weight") for stage in range(1, len(WIDTHS) + 1)),
        features=features,
        image_size=16 * round((flat // WIDTHS[-1]) ** 0.5),
    )


def _images(module: IResNet, rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {"images": rng.uniform(-1, 1, (2, module.image_size, module.image_size, 3)).astype(np.float32)}


ARCFACE = Family(_build, table, _images, outputs=lambda features: {"features": features})
