"""Measure drawn digits: are they of the class that was asked for, and are they not all the same?"""

import dataclasses
from typing import Any

import numpy as np

from vgen.data.digits import NAMES, Digits
from vgen.metrics.probe import knn
from vgen.metrics.scene_eval import diversity


@dataclasses.dataclass(frozen=True)
class DigitQuality:
    """Called with a `vgen.system.System` of the ten digits, gives {"protocol", "scores": {stage: {metric: share}}}.

    accuracy: share of the pictures that the `neighbours` most alike of the real training digits take for what was asked
    (`probe.knn` on pixels); diversity: see `scene_eval.diversity`.  The row "real" is the same of held-out digits.
    pictures: how many are drawn, the classes in turn.  seed: of sampling.
    """

    pictures: int = 500
    neighbours: int = 5
    seed: int = 0

    def __call__(self, system) -> dict[str, Any]:
        wanted = np.arange(self.pictures) % len(NAMES)
        drawn = system([str(digit) for digit in wanted], seed=self.seed)
        scores = {stage: self.judged(images, wanted) for stage, images in drawn.items()}
        protocol = {
            "pictures": self.pictures, "seed": self.seed, "judge": f"{self.neighbours} nearest neighbours on pixels",
            "knobs": {name: dict(system.settings.knobs.get(name, {})) for name in system.names},
        }  # fmt: skip
        return {"protocol": protocol, "scores": scores | {"real": self.judged(*_all("heldout"))}}

    def judged(self, images: np.ndarray, wanted: np.ndarray) -> dict[str, float]:
        """{"accuracy", "diversity"} of pictures uint8 [n, 8, 8, 3] of the digits `wanted`, int [n]."""
        flat = lambda pictures: pictures.mean(-1).reshape(len(pictures), -1)
        known, labels = _all("train")
        accuracy = knn(flat(known), labels, flat(images), wanted, k=self.neighbours)
        return {"accuracy": accuracy} | diversity(images, wanted.tolist())


def _all(split: str) -> tuple[np.ndarray, np.ndarray]:
    """(images, labels) of a split."""
    digits = Digits(split)
    rows = [digits[i] for i in range(len(digits))]
    return np.stack([row["image"] for row in rows]), np.array([row["label"] for row in rows])
