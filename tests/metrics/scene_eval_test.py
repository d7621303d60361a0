"""Evaluations of systems, on systems whose pictures are known."""

from types import SimpleNamespace

import numpy as np
import pytest

from vgen.data.scenes import World, classes, scene
from vgen.metrics.scene_eval import SceneEval, SceneQuality, diversity

WORLD = dict(
    shapes=("circle", "square"), colours=("red", "blue"), textures=("solid",), sizes=("large",), max_objects=1,
    heldout=(), backgrounds=("white", "grey"),
)  # fmt: skip


def drawn(kind):
    """A scene whose object is of that class."""
    world = World(**WORLD)
    for i in range(1000):
        example = scene(world, i, 32)
        first = example["objects"][0]
        if all(said in ("", word) for said, word in zip(kind, (first.colour, first.shape), strict=True)):
            return example["image"]
    raise AssertionError(f"no scene of {kind}")


class Draws:
    """A system that draws what `picture(prompt, knobs)` gives."""

    names = ("net",)
    settings = SimpleNamespace(knobs={"net": {"guidance_scale": 2.0}}, task={"net": {"solver": "ddim"}})

    def __init__(self, picture):
        self.picture = picture

    def __call__(self, prompts, **knobs):
        return {"net": np.stack([self.picture(prompt, knobs) for prompt in prompts])}


@pytest.mark.parametrize("labels", ["pair", "colour", "shape"])
def test_classes_are_read_back(labels):
    kinds = classes(World(**WORLD), labels)
    evaluation = SceneEval(WORLD, prompts=8, labels=labels, off=1.0)
    good = evaluation(Draws(lambda prompt, knobs: drawn(kinds[int(prompt)])))
    assert good["protocol"]["labels"] == labels and set(good["scores"]) == {"net", "net_guidance_off"}
    stated = [name for name in ("colour", "shape") if labels in ("pair", name)]
    assert all(good["scores"]["net"][name] == 1 for name in (*stated, "count", "scene_exact"))
    assert all(np.isnan(good["scores"]["net"][name]) for name in {"colour", "shape"} - set(stated))
    other = evaluation(Draws(lambda prompt, knobs: drawn(kinds[int(prompt) - len(kinds) // 2])))
    assert other["scores"]["net"]["scene_exact"] == 0


def test_another_knob_is_scanned():
    """Its name gives those of the rows; the other keeps its own, and prompts have no diversity."""
    kinds, asked = classes(World(**WORLD), "pair"), []

    def picture(prompt, knobs):
        asked.append({name: value for name, value in knobs.items() if name != "seed"})
        return drawn(kinds[int(prompt)])

    scan = SceneEval(WORLD, prompts=1, labels="pair", knob="classifier_scale", scales=(2.5, 8.0))
    found = scan(Draws(picture))
    assert asked == [{}] + [{"classifier_scale": scale} for scale in (0.0, 2.5, 8.0)]
    assert set(found["scores"]) == {"net", "net_classifier_off", "net_classifier_2.5", "net_classifier_8"}
    assert found["protocol"]["knob"] == "classifier_scale"
    asked.clear()
    usual = SceneEval(WORLD, prompts=1, labels="pair", off=1.0, scales=(4.0,))(Draws(picture))
    assert asked == [{}, {"guidance_scale": 1.0}, {"guidance_scale": 4.0}]
    assert set(usual["scores"]) == {"net", "net_guidance_off", "net_guidance_4"}
    assert "diversity" not in usual["scores"]["net"], "there is one picture of a class"
    said = SceneEval(WORLD, prompts=4, split="train")(Draws(lambda prompt, knobs: drawn(kinds[0])))
    assert "diversity" not in said["scores"]["net"]


def test_a_choice_is_measured_beside_none():
    kinds, asked = classes(World(**WORLD), "pair"), []
    system = Draws(lambda prompt, knobs: asked.append(knobs.get("of")) or drawn(kinds[int(prompt)]))
    system.choice = SimpleNamespace(of=8)
    found = SceneEval(WORLD, prompts=1, labels="pair", guidance_off=False)(system)
    assert asked == [None, 1] and set(found["scores"]) == {"net", "net_unchosen"}
    assert found["protocol"]["drawn_per_prompt"] == 8


def test_diversity_by_hand():
    full = lambda *values: np.stack([np.full((4, 4, 3), value, np.uint8) for value in values])
    # of "a" all pairs, 0.2, 0.4 and 0.6 apart; of "b" one pair, 1 apart; "c" is alone
    pictures, kinds = full(0, 51, 153, 0, 255, 77), ["a", "a", "a", "b", "b", "c"]
    assert diversity(pictures, kinds) == pytest.approx({"diversity": (0.4 + 1.0) / 2})
    order = [3, 1, 5, 0, 4, 2]
    assert diversity(pictures[order], [kinds[i] for i in order]) == diversity(pictures, kinds)
    half = np.zeros((4, 4, 3), np.uint8)
    half[:2] = 255
    assert diversity(np.stack([half, pictures[0]]), [0, 0]) == pytest.approx({"diversity": 0.5**0.5})
    assert diversity(pictures, range(6)) == {}
    noise = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3)).astype(np.uint8)
    same, varied = SceneEval(WORLD, prompts=8, labels="pair"), iter(range(99))
    calm = same(Draws(lambda prompt, knobs: noise[int(prompt)]))["scores"]
    wild = same(Draws(lambda prompt, knobs: noise[next(varied) % 8]))["scores"]
    assert calm["net"]["diversity"] == 0 and wild["net"]["diversity"] > 0.3


def test_scenes_are_told_from_noise_and_their_pairs_counted():
    rng = np.random.default_rng(0)
    noise = lambda: rng.integers(0, 256, (32, 32, 3)).astype(np.uint8)
    world = World(**WORLD)
    pictures = iter([drawn(("red", "circle")), noise(), drawn(("red", "circle")), noise()] * 2)
    found = SceneQuality(WORLD, pictures=4, steps=(2, 5))(Draws(lambda prompt, knobs: next(pictures)))
    assert set(found["scores"]) == {"net_steps_2", "net_steps_5"}
    assert found["scores"]["net_steps_5"] == {"scene": 0.5, "pairs": 0.25}
    assert found["protocol"]["task"] == {"net": {"solver": "ddim"}}
    whole = SceneQuality(WORLD, pictures=40)
    count = iter(range(40))
    assert whole(Draws(lambda prompt, knobs: scene(world, next(count), 32)["image"]))["scores"] == {
        "net": {"scene": 1.0, "pairs": 1.0}
    }
