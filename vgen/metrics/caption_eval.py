"""Whether what a captioner says of scenes holds."""

import dataclasses
from typing import Any

import numpy as np

from vgen.data.scene_oracle import read
from vgen.data.scene_text import TEMPLATES, parse
from vgen.data.scenes import World
from vgen.metrics.encoder_eval import examples
from vgen.metrics.scenes import METRICS, judge


@dataclasses.dataclass(frozen=True)
class CaptionQuality:
    """Called with a `vgen.system.System` that writes, gives {"protocol", "scores"}: of its captions of `pictures`
    held-out scenes and, "_training_pairs", of other scenes of training pairs.

    understood: share of the captions that are of the scenes' language.  The others are shares of what these claim that
    holds in the picture, as the oracle reads it (`metrics.scenes`); scene_exact: share of all captions that are true
    and count the objects right.
    world: arguments of World; the seed of the scenes is `scene_seed`, another one than training has.
    """

    world: dict[str, Any]
    pictures: int = 256
    scene_seed: int = 1

    def __call__(self, system) -> dict[str, Any]:
        world, name = World(**self.world | {"seed": self.scene_seed}), system.names[-1]
        scores = {}
        for split, suffix in (("heldout", ""), ("train", "_training_pairs")):
            images = examples(world, system.size, self.pictures, split)["image"]
            scores[name + suffix] = scored(images, system.write(images), world)
        protocol = {
            "pictures": self.pictures, "scene_seed": self.scene_seed, "decode": system.tasks[name].decode,
            "knobs": dict(system.settings.knobs.get(name, {})), "judge": "vgen.metrics.scenes.judge",
        }  # fmt: skip
        return {"protocol": protocol, "scores": scores}


def scored(images, captions, world: World) -> dict[str, float]:
    """The metrics of CaptionQuality; NaN for those of which no caption says anything."""
    verdicts = []
    for image, caption in zip(images, captions, strict=True):
        try:
            claims = parse(caption, world.templates + TEMPLATES)
        except ValueError:
            continue
        verdicts.append(judge(read(np.asarray(image), world), claims))
    found = {"understood": len(verdicts) / len(captions)}
    for metric in METRICS:
        held = [each for verdict in verdicts for each in getattr(verdict, metric)]
        found[metric] = float(np.mean(held)) if held else float("nan")
    return found | {"scene_exact": sum(all(verdict.scene_exact) for verdict in verdicts) / len(captions)}
