"""FID's Inception-v3: pytorch_fid's weight file, and the state dict of its wrapper (blocks.i.j)."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from vgen.convert.family import Family
from vgen.convert.pieces import Shapes, batch_norm, conv
from vgen.convert.rules import LINEAR, ConvertError, Rule, Table
from vgen.models.inception import LAST, MIDDLE, STEM, InceptionV3, Unit

IGNORED = (r".*\.num_batches_tracked",)
# The wrapper's places: pools have one too, at the head of its second and third block.
WRAPPED = {f"blocks.0.{i}": unit.name for i, unit in enumerate(STEM[0])}
WRAPPED |= {f"blocks.1.{i}": unit.name for i, unit in enumerate(STEM[1])}
WRAPPED |= {f"blocks.{i}.{j}": block.name for i, blocks in ((2, MIDDLE), (3, LAST)) for j, block in enumerate(blocks)}


def _units(steps: tuple[Any, ...]) -> Iterator[Unit]:
    for step in steps:
        yield from [step] if isinstance(step, Unit) else _units(step)


def table(module: InceptionV3, wrapped: bool = False) -> Table:
    """The published file's names, or the wrapper's."""
    names = {ours: theirs for theirs, ours in WRAPPED.items()} if wrapped else {}
    places = [(names.get(unit.name, unit.name), unit.name) for units in STEM for unit in units]
    for block in (*MIDDLE, *LAST):
        pool = (Unit("branch_pool", block.pool_channels),) if block.pool_channels else ()
        for unit in _units((*block.branches, pool)):
            places.append((f"{names.get(block.name, block.name)}.{unit.name}", f"{block.name}/{unit.name}"))
    rules = [r for src, dst in places for r in conv(f"{src}.conv", f"{dst}/conv", bias=False)]
    rules += [r for src, dst in places for r in batch_norm(f"{src}.bn", f"{dst}/bn")]
    rules += [Rule("fc.weight", "fc/kernel", LINEAR), Rule("fc.bias", "fc/bias")]
    return Table(tuple(rules), ignore=IGNORED)


def _build(config: Mapping[str, Any], shapes: Shapes) -> InceptionV3:
    """ConvertError for torchvision's Inception-v3, whose names are these but whose pools are others."""
    classes = shapes["fc.weight"][0] if "fc.weight" in shapes else None
    if classes not in (None, 1008) or any(name.startswith("AuxLogits.") for name in shapes):
        raise ConvertError(f"an Inception-v3 with {classes} classes is not FID's, which has 1008 and other pools")
    return InceptionV3(classes=classes)


def _images(module: InceptionV3, rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {"images": rng.uniform(-1, 1, (2, 64, 80, 3)).astype(np.float32)}


def _outputs(features: Any) -> dict[str, Any]:
    return {name: value for name, value in features._asdict().items() if value is not None}


PYTORCH_FID = Family(_build, table, _images, outputs=_outputs)
WRAPPER = Family(_build, lambda module: table(module, True), _images, outputs=_outputs)
