"""Scores against captions: one on true renders, low on other captions, zero on noise, exact on hand-made readings."""

import math

import numpy as np
import pytest

from vgen.data.scene_oracle import Reading
from vgen.data.scene_text import parse
from vgen.data.scenes import SceneObject, World, scene
from vgen.metrics.scenes import METRICS, judge, score

MINI = World(shapes=("circle", "square", "triangle", "star"), textures=("solid",), max_objects=2)
PAIRS = World(max_objects=2)


@pytest.fixture(scope="module", params=[(MINI, 32), (PAIRS, 64)], ids=["mini", "pairs"])
def batch(request):
    world, size = request.param
    examples = [scene(world, i, size, "heldout") for i in range(100)]
    return np.stack([e["image"] for e in examples]), [e["caption"] for e in examples], world


def test_true_renders(batch):
    images, captions, world = batch
    scores = score(images, captions, world)
    assert tuple(scores) == METRICS
    for name, value in scores.items():
        assert value >= 0.99 or (name == "texture" and math.isnan(value) and world is MINI), name


def test_other_captions(batch):
    images, captions, world = batch
    scores = score(images, captions[1:] + captions[:1], world)
    assert scores["scene_exact"] <= 0.05 and scores["relation"] <= 0.05
    assert scores["colour"] <= 0.4 and scores["shape"] <= 0.45
    assert 0.3 < scores["count"] < 0.7  # half of all pairs of pictures have equally many objects


def test_mirrored_pictures_keep_attributes_and_lose_relations():
    sideways = {"relations": ("left of", "right of"), "min_objects": 2, "max_objects": 2}
    world = World(textures=("solid",), shapes=("circle", "square", "star"), **sideways)
    examples = [scene(world, i, 32) for i in range(60)]
    scores = score([e["image"][:, ::-1] for e in examples], [e["caption"] for e in examples], world)
    assert scores["colour"] == scores["shape"] == scores["size"] == scores["count"] == 1
    assert scores["relation"] == scores["scene_exact"] == 0


def test_noise(batch):
    images, captions, world = batch
    noise = np.random.default_rng(0).integers(0, 256, images.shape).astype(np.uint8)
    assert all(value == 0 for value in score(noise, captions, world).values() if not math.isnan(value))


def test_arguments():
    with pytest.raises(ValueError, match="as many images as captions"):
        score([np.zeros((32, 32, 3), np.uint8)], [])


def thing(colour, shape, x=0.5, y=0.5, texture="solid", size="medium"):
    return SceneObject(shape, colour, texture, size, x, y, 0.17)


def verdict(caption, *objects, unknown=0, background="white"):
    return judge(Reading(objects, background, unknown), parse(caption))


def test_swapped_attributes_are_right_in_colour_only():
    v = verdict("a red circle left of a blue square", thing("red", "square", 0.2), thing("blue", "circle", 0.8))
    assert v.colour == [True, True] and v.shape == [False, False]
    assert v.relation == [True]  # the red one is left of the blue one
    assert v.count == [True] and v.scene_exact == [False]


def test_missing_object_is_wrong_in_everything():
    v = verdict("a red circle left of a small blue striped square", thing("red", "circle", 0.2))
    assert v.colour == v.shape == [True, False]
    assert v.texture == v.size == v.relation == v.count == [False]


def test_details_of_another_object_do_not_count():
    # Nothing shares colour or shape with the claim, so its texture and size are wrong whatever the picture shows.
    v = verdict("a small red striped circle", thing("blue", "star", texture="striped", size="small"))
    assert v.texture == v.size == v.colour == v.shape == [False]


def test_relation_needs_identified_partners():
    caption = "a red circle left of a blue square"
    assert verdict(caption, thing("red", "circle", 0.2), thing("blue", "square", 0.8)).relation == [True]
    assert verdict(caption, thing("red", "circle", 0.8), thing("blue", "square", 0.2)).relation == [False]
    assert verdict(caption, thing("red", "circle", 0.2), thing("green", "square", 0.8)).relation == [False]
    assert verdict(caption, thing("red", "circle", 0.4, 0.2), thing("blue", "square", 0.6, 0.8)).relation == [False]
    same = "a red circle left of a red square"
    assert verdict(same, thing("red", "circle", 0.2), thing("red", "square", 0.8)).relation == [True]
    assert verdict(same, thing("red", "circle", 0.2), thing("red", "star", 0.8)).relation == [False]


def test_extra_objects_break_count_and_exactness():
    one = thing("red", "circle", 0.2)
    assert verdict("a red circle", one).scene_exact == [True]
    more = verdict("a red circle", one, thing("red", "star", 0.8))
    assert more.colour == more.shape == [True] and more.count == more.scene_exact == [False]
    assert verdict("a red circle", one, unknown=1).count == [False]


def test_background_and_best_matching():
    caption = "a large red circle and a red star on a grey background"
    objects = thing("red", "star", 0.2), thing("red", "circle", 0.8, size="large")
    assert verdict(caption, *objects, background="grey").scene_exact == [True]
    wrong = verdict(caption, *objects)
    assert wrong.background == wrong.scene_exact == [False] and wrong.size == [True]
