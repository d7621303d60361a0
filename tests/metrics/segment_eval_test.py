"""Masks after clicks, and automatic ones: measured on a network that knows the truth, and on a tiny trained one."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from tests.automatic_masks_test import Colours, flat
from vgen.config import build
from vgen.data.scene_draw import PALETTE
from vgen.data.scenes import Scenes, World, scene
from vgen.metrics import segment_eval
from vgen.models.sam_decoder import Masks

ROOT = Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True)
class Paint:
    """A "network" that masks what has the colour of the last click, or of a box's centre; the third mask is the right
    one, the first is empty, and it likes the one that `likes` says. One that is wrong masks all there is to the left of
    the click as well until it hears of it.
    """

    likes: int = 2
    wrong: bool = False

    def encode(self, params, image):
        return jnp.asarray(image, jnp.float32)

    def decode(self, params, embedding, prompt, logits=None, multimask=True):
        boxed = prompt.labels[..., 0] == 2
        place = jnp.where(boxed[..., None], prompt.points[..., :2, :].mean(-2), prompt.points[..., 2, :])
        x, y = jnp.round(place).astype(int)[..., 0], jnp.round(place).astype(int)[..., 1]
        b = jnp.arange(len(x))[:, None]
        right = (embedding[:, None] == embedding[b, y, x][:, :, None, None]).all(-1)
        told = (prompt.labels[..., 3:] == 0).any(-1)  # by a click outside of the object
        left = jnp.arange(right.shape[-1]) < x[..., None, None]
        mask = right | (left & ~told[..., None, None]) if self.wrong else right
        masks = jnp.stack([mask & False, mask | True, mask] if multimask else [mask], 2)
        iou = jnp.zeros(masks.shape[:3]).at[..., self.likes if multimask else 0].set(1.0)
        return Masks(jnp.where(masks, 5.0, -5.0), iou)


def scores(task):
    masks, image = flat()
    masks = np.concatenate([masks, np.zeros((1, 32, 32), bool)])  # and none
    row, _ = segment_eval.interactive(task, None, image[None], masks[None])
    return row, segment_eval.means([row]), masks


def test_a_network_that_knows():
    row, found, _ = scores(Paint())
    assert found == dict(iou_one_click=1.0, iou_three_clicks=1.0, iou_box=1.0, iou_best_of_three=1.0)
    assert row["valid"].tolist() == [[True, True, True, False]]


def test_the_mask_that_it_likes_counts():
    _, found, masks = scores(Paint(likes=1))
    assert found["iou_one_click"] == found["iou_box"] == pytest.approx(masks[:3].mean((1, 2)).mean())
    assert found["iou_best_of_three"] == found["iou_three_clicks"] == 1.0
    assert scores(Paint(likes=0))[1]["iou_one_click"] == 0.0


def test_clicks_go_where_it_is_wrong():
    _, found, _ = scores(Paint(wrong=True))
    assert found["iou_one_click"] < 0.7 and found["iou_three_clicks"] == 1.0
    masks, image = flat()
    _, kept = segment_eval.interactive(Paint(wrong=True), None, image[None], masks[None])
    assert (np.asarray(kept["three"][0]) == masks).all() and not (np.asarray(kept["one"][0]) == masks).all()


def test_agreement():
    truth, _ = flat()
    assert segment_eval.matched(truth, truth) == (3, 3)
    assert segment_eval.matched(truth, np.zeros((0, 32, 32), bool)) == (0, 0)
    half = truth[:1].copy()
    half[0, :, 3:6] = False
    assert segment_eval.matched(truth, half) == (0, 0)  # 6 of 9 columns
    assert segment_eval.matched(truth, half, 0.6) == (1, 1)
    assert segment_eval.matched(truth, np.concatenate([truth[:2], truth[:1]])) == (2, 3)


def test_painted():
    masks, image = flat()
    out = segment_eval.painted(image[None], masks[None])[0]
    assert (out[~masks.any(0)] == image[~masks.any(0)]).all() and (out[masks.any(0)] != image[masks.any(0)]).any()


def test_automatic_masks_are_counted():
    class Task:
        def predictor(self, params):
            return Colours().predictor()

    masks, image = flat()
    examples = [{"image": image, "masks": np.concatenate([masks, np.zeros((1, 32, 32), bool)])}] * 2
    quality = segment_eval.SegmentQuality({}, automatic=dict(points_per_side=6))
    assert quality._automatic(Task(), None, examples) == dict(
        recall=1.0, precision=0.75, masks_per_picture=4.0, objects_per_picture=3.0
    )
    with pytest.raises(ValueError, match="some must be 1 to pictures=4"):
        segment_eval.SegmentQuality({}, pictures=4, some=5)


class Told(Paint):
    """Masks what is of the colour that it is told: words are that colour's RGB."""

    size = 32

    def words_of(self, params, tokens, mask):
        return tokens

    def decode(self, params, embedding, prompt, logits=None, multimask=True, text=None):
        apart = jnp.abs(embedding[:, None] - text[:, :, None, None]).max(-1)
        masks = jnp.stack([apart < 100] * 3, 2)
        return Masks(jnp.where(masks, 5.0, -5.0), jnp.ones(masks.shape[:3]))


def test_objects_by_words():
    """Each object by its own words, and by those of the other in the picture."""
    colours = ("red", "green", "blue")
    plain = dict(colours=colours, textures=("solid",), sizes=("large",), backgrounds=("white",))
    world = World(**plain, max_objects=2)
    said = lambda texts: (np.array([PALETTE[text.split()[1]] for text in texts], np.float32), None)
    quality = segment_eval.SegmentQuality({}, pictures=40, some=8)
    found = quality._texts(Told(), None, Scenes(32, "heldout", 40, world, masks=True), said)
    alike = lambda i: len({(each.colour, each.shape) for each in scene(world, i, 32, "heldout")["objects"]})
    assert found["objects"] == 2 * sum(alike(i) == 2 for i in range(40))
    assert found["iou"] > 0.6 > found["iou_by_the_words_for_another"] + 0.2, found
    with pytest.raises(ValueError, match="none of 40"):
        quality._texts(Told(), None, Scenes(32, "heldout", 40, World(**plain, max_objects=1), masks=True), said)


def test_a_tiny_network_is_measured(tiny_runs):
    run = tiny_runs(ROOT / "configs" / "sam.py")
    report = build(run.config.eval)(run)
    assert set(report["scores"]) == {"interactive", "automatic_masks"}
    assert all(0 <= value <= 1 for value in report["scores"]["interactive"].values())
    assert (
        0 <= report["scores"]["automatic_masks"]["recall"] <= 1
        and report["protocol"]["automatic"]["points_per_side"] == 2
    )
