"""What encoders know of scenes: on encoders that know everything or nothing, and on tiny trained ones."""

from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from vgen import recipes
from vgen.config import build
from vgen.data.scenes import World, classes
from vgen.metrics.encoder_eval import ClipQuality, EncoderProbe, encoded, examples

ROOT = Path(__file__).parents[2]
WORLD = recipes.CLASSES | dict(lattice=4, backgrounds=("white",), heldout=(("red", "star"),))
COLOURS = World(**WORLD).colours


class Colours:
    """Pictures and words to the colours they have: of a picture that of its most colourful pixel."""

    size = 16

    def __init__(self):
        shown = examples(World(**WORLD | dict(heldout=())), 16, 200, "train", "colour")
        paint = [self.pixel(shown["image"][shown["label"] == i]).mean(0) for i in range(len(COLOURS))]
        self.paint = jnp.asarray(np.stack(paint))

    @staticmethod
    def pixel(images):
        flat = jnp.asarray(images, jnp.float32).reshape(len(images), -1, 3)
        return flat[jnp.arange(len(images)), jnp.ptp(flat, axis=2).argmax(1)]

    def encode_image(self, params, images):
        near = ((self.pixel(images)[:, None] - self.paint) ** 2).sum(-1).argmin(1)
        return jnp.eye(len(COLOURS))[near]

    def encode_text(self, params, tokens, mask):
        return jnp.eye(len(COLOURS))[tokens[:, 0]]


def test_an_encoder_that_knows_colours_alone():
    """Zero-shot it finds the colour, and of the shapes in that colour the first one."""
    text = lambda texts: (
        np.array([[next(i for i, c in enumerate(COLOURS) if c in t)] for t in texts]), np.ones((len(texts), 1), bool)
    )  # fmt: skip
    run = SimpleNamespace(
        task=lambda name: Colours(), weights=lambda name: ({"x": jnp.zeros(1)}, 1), text_tokenizer=lambda: text
    )
    report = ClipQuality(WORLD, pictures=60)(run)
    shown = examples(World(**WORLD | dict(seed=1)), 16, 60, "train", "pair")
    firsts = np.mean([classes(World(**WORLD), "pair")[label][1] == "circle" for label in shown["label"]])
    assert report["scores"]["zero_shot_training_pairs"]["accuracy"] == pytest.approx(firsts)
    assert report["scores"]["zero_shot"]["accuracy"] == 0.0  # every red one is a star there
    found = report["scores"]["retrieval_training_pairs"]
    assert 0 < found["caption_recall_1"] < 0.9 and found["caption_recall_10"] > found["caption_recall_1"]
    assert report["protocol"]["classes"] == 24


def test_the_last_rows_fill_up():
    x = np.arange(10.0)[:, None]
    np.testing.assert_array_equal(encoded(lambda p, x: p * x, 2.0, x, batch=4), 2 * x)


@pytest.mark.parametrize("name, rows", [("clip", ("retrieval", "zero_shot")), ("mae", ("trained", "random"))])
def test_a_tiny_encoder_is_measured(name, rows, tiny_runs):
    run = tiny_runs(ROOT / "configs" / f"{name}.py")
    report = build(run.config.eval)(run)
    assert set(rows) <= set(report["scores"])
    assert all(0 <= value <= 1 for row in report["scores"].values() for value in row.values())
    assert isinstance(build(run.config.eval), ClipQuality if name == "clip" else EncoderProbe)
