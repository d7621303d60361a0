"""LPIPS with VGG16: the package's whole state dict, or torchvision's VGG16 and the package's linear heads together."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from vgen.convert.family import Family
from vgen.convert.pieces import Shapes, conv
from vgen.convert.rules import Rule, Table, reshape
from vgen.metrics.lpips import LPIPS
from vgen.models.vgg import WIDTHS

# Index of each convolution in torchvision's `features`, where ReLUs and pools count too.
TORCH_INDEX = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)


def vgg_rules(src: str = "features", dst: str = "") -> list[Rule]:
    """The convolutions of torchvision's VGG16."""
    names = [f"conv{block}_{i}" for block, widths in enumerate(WIDTHS, 1) for i in range(1, len(widths) + 1)]
    return [r for index, name in zip(TORCH_INDEX, names, strict=True) for r in conv(f"{src}.{index}", f"{dst}{name}")]


def heads() -> list[Rule]:
    """The package's weights/v0.1/vgg.pth: one weight per channel of each layer, as a 1x1 convolution."""
    return [Rule(f"lin{i}.model.1.weight", f"lin/lin{i}", reshape((-1,), (1, -1, 1, 1))) for i in range(len(WIDTHS))]


def package_table(module: LPIPS) -> Table:
    """The state dict of `lpips.LPIPS(net="vgg")`, which cuts the network in five slices and keeps each head twice."""
    trunk = [
        rule._replace(src=rule.src.replace("features", f"net.slice{rule.dst.split('conv')[1][0]}"))
        for rule in vgg_rules(dst="vgg/")
    ]
    return Table((*trunk, *heads()), ignore=(r"lins\..*", r"scaling_layer\..*"))


def torchvision_table(module: LPIPS | None = None) -> Table:
    """torchvision's VGG16, whose classifier LPIPS has no use for, and the heads; the package's names are read too."""
    rename = ((r"^net\.slice\d\.", "features."),)
    ignore = (r"classifier\..*", r"lins\..*", r"scaling_layer\..*")
    return Table((*vgg_rules(dst="vgg/"), *heads()), ignore, rename)


def _inputs(module: LPIPS, rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {name: rng.uniform(-1, 1, (2, 32, 48, 3)).astype(np.float32) for name in "xy"}


def _outputs(layers: Any) -> dict[str, Any]:
    return {"layers": layers}


def _build(config: Mapping[str, Any], shapes: Shapes) -> LPIPS:
    return LPIPS()


PACKAGE = Family(_build, package_table, _inputs, outputs=_outputs)
TORCHVISION = Family(_build, torchvision_table, _inputs, outputs=_outputs)
