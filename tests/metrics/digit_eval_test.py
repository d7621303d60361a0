"""Drawn digits are judged by real ones."""

import types

import numpy as np
import pytest

from vgen.metrics.digit_eval import DigitQuality, _all

pytest.importorskip("sklearn")


class Fake:
    """A system that draws real held-out digits, of what it is asked for or of something else."""

    names, settings = ["prior"], types.SimpleNamespace(knobs={"prior": {"guidance_scale": 1.5}})

    def __init__(self, shift=0):
        self.images, self.labels = _all("heldout")
        self.shift = shift

    def __call__(self, prompts, seed):
        rng, wanted = np.random.default_rng(seed), [(int(p) + self.shift) % 10 for p in prompts]
        return {"prior": np.stack([self.images[rng.choice(np.flatnonzero(self.labels == w))] for w in wanted])}


def test_real_digits_are_what_they_are():
    out = DigitQuality(pictures=60)(Fake())
    assert out["scores"]["real"]["accuracy"] > 0.95 and out["scores"]["prior"]["accuracy"] > 0.9
    assert out["scores"]["prior"]["diversity"] > 0.1 and out["protocol"]["knobs"]["prior"]["guidance_scale"] == 1.5
    assert DigitQuality(pictures=60)(Fake(shift=3))["scores"]["prior"]["accuracy"] < 0.1


def test_the_same_picture_over_and_over_is_not_diverse():
    images, labels = _all("heldout")
    one = np.flatnonzero(labels == 4)[:1].repeat(5)
    scores = DigitQuality(neighbours=3).judged(images[one], labels[one])
    assert scores == {"accuracy": 1.0, "diversity": 0.0}
