"""The data engine: what the annotator has time for, masks that are there already, and stages that train on them."""

import json
import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tests.automatic_masks_test import HOW, Colours
from tests.conftest import quick_compilation
from tests.metrics.segment_eval_test import Paint
from vgen import recipes
from vgen.automatic_masks import Predictor
from vgen.config import build
from vgen.data.scenes import Scenes
from vgen.engine import Annotate
from vgen.stages import Run

ROOT = Path(__file__).parents[1]
WORLD = recipes.FREE | dict(min_objects=3, max_objects=3, backgrounds=("white",))
PLAIN = dict(world=WORLD, size=32, pictures=6, scene_seed=5, room=4)


class Sure(Paint):
    """Draws what has the clicked colour, and finds all masks in the same way."""

    def predictor(self, params):
        net = Colours()
        return Predictor(net.encode, net.decode, HOW)


def run(task=None):
    return SimpleNamespace(task=lambda name: task or Sure(), weights=lambda name: ({"x": np.zeros(1)}, 1))


def test_by_hand():
    """Six clicks' time for finding an object and drawing it: one of three, the largest one, and it is true."""
    examples, report = Annotate(**PLAIN, budget=6.0)(run())
    source = Scenes(32, "train", 6, WORLD | dict(seed=5), masks=True)
    for i, each in enumerate(examples):
        true = source[i]["masks"]
        assert each["masks"].shape == (4, 32, 32) and not each["masks"][1:].any()
        np.testing.assert_array_equal(each["masks"][0], true[true.sum((1, 2)).argmax()])
        np.testing.assert_array_equal(each["image"], source[i]["image"])
    assert report["masks_per_picture"] == report["good_per_picture"] == report["by_hand_share"] == 1.0
    assert report["objects_per_picture"] == 3.0 and report["clicks_per_mask"] == 0.0
    assert Annotate(**PLAIN, budget=12.0)(run())[1]["masks_per_picture"] == 2.0


def test_with_a_network_there_is_time_for_more():
    """Where a click is enough, an object takes half of the time; the masks are those that the network drew."""
    _, by_hand = Annotate(**PLAIN, budget=6.0)(run())
    examples, report = Annotate(**PLAIN, budget=6.0, model="start", good=0.6)(run())
    assert 2.0 >= report["masks_per_picture"] > 1.5 > by_hand["masks_per_picture"]  # of equal colours it takes both
    assert report["clicks_per_mask"] < 1.5 and report["by_hand_share"] == 0.0
    source = Scenes(32, "train", 6, WORLD | dict(seed=5), masks=True)
    true = source[0]["masks"].any(0)
    drawn = examples[0]["masks"].any(0)
    assert (true & drawn).sum() < true.sum()  # rims have other colours
    _, picky = Annotate(**PLAIN, budget=9.0, model="start", good=1.0)(run(Sure(likes=0)))
    assert picky["masks_per_picture"] == picky["by_hand_share"] == 1.0 and picky["clicks_per_mask"] == 0.0


def test_masks_that_are_there_are_not_drawn_again():
    sure = dict(points_per_side=8, largest=0.5)
    examples, report = Annotate(**PLAIN, model="start", automatic=sure)(run())
    assert report["clicks_per_mask"] == 0.0 and report["masks_per_picture"] >= 2.5
    _, more = Annotate(**PLAIN, model="start", automatic=sure, budget=6.0, good=0.6)(run())
    assert more["masks_per_picture"] >= report["masks_per_picture"]
    assert more["good_per_picture"] <= 3.0 and len(examples) == 6


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match="automatic masks need a model"):
        Annotate(**PLAIN, automatic={})
    with pytest.raises(ValueError, match="not one mask was made"):
        Annotate(**PLAIN, budget=1.0)(run())
    with pytest.raises(ValueError, match="must be at least 1, got 0, 4, 3"):
        Annotate(**PLAIN | dict(pictures=0))


def test_the_stages_of_the_config(tmp_path):
    """Every stage makes its masks with the network before it, begins with its weights, and is not made twice."""
    module = runpy.run_path(str(ROOT / "configs" / "sam.py"))
    config, small = module["get_config"]("engine"), module["get_config"]("tiny").stages.sam
    for stage in config.stages.values():
        stage.task, stage.evaluate, stage.data.size = small.task, {}, 16
        with config.ignore_type():
            stage.train = dict(small.train.to_dict(), steps=1, checkpoint_every=0)
        stage.make.update(dict(size=16, pictures=9, batch=3, clicks=1))
        if stage.make.get("budget"):
            stage.make.budget = 40.0  # an untrained network helps nobody, and all is drawn by hand
        if "automatic" in stage.make:
            stage.make.automatic = dict(points_per_side=2, points_per_batch=4, predicted_iou=-9.0, stability=0.0)
    config.mesh = dict()
    config.eval.quality.update(dict(pictures=4, some=1, batch=4, automatic=module["get_config"]("tiny").eval.automatic))
    made = Run(config, tmp_path)
    made.claim()
    with quick_compilation():
        for name in made.stages:
            made.train_stage(name)
        report = build(made.config.eval)(made)
    rows = ["start", "assisted", "semi", "automatic", "interactive", "automatic_masks"]
    assert list(report["scores"]) == rows
    for name in made.stages:
        told = json.loads((made.folder(name) / "made.json").read_text())
        assert report["scores"][name] == told and told["masks_per_picture"] > 0
        before = (made.folder(name) / "made" / "cache.json").stat().st_mtime_ns
        made._make(name)
        assert (made.folder(name) / "made" / "cache.json").stat().st_mtime_ns == before
    with made.batches("semi") as batches:
        batch = next(iter(batches))
    assert batch["image"].shape == (8, 16, 16, 3) and batch["masks"].shape == (8, 8, 16, 16)
