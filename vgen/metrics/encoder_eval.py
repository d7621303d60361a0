"""What encoders know of scenes; each is called with the `vgen.stages.Run` of a trained encoder and gives
{"protocol", "scores"}.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vgen import trees
from vgen.data.scene_text import Claims, Thing, write
from vgen.data.scenes import Scenes, World, classes
from vgen.hosts import whole
from vgen.metrics import probe, retrieval
from vgen.models.clip import unit

TEMPLATES = ("{}", "a picture of {}", "an image showing {}", "there is {}")


def encoded(function: Callable[..., Any], params: Any, *arrays: np.ndarray, batch: int = 64) -> np.ndarray:
    """float32 [n, d]: function(params, *rows) for all rows of the arrays, compiled once."""
    run, found = jax.jit(function), []
    n = len(arrays[0])
    for start in range(0, n, batch):
        rows = np.arange(start, start + batch).clip(max=n - 1)
        found.append(whole(run(params, *(array[rows] for array in arrays)))[: n - start].astype(np.float32))
    return np.concatenate(found)


def examples(world: World, size: int, count: int, split: str, labels: str = "") -> dict[str, Any]:
    """{"image": uint8 [n, size, size, 3], "caption": list, "label": int [n] with labels} of the first scenes."""
    drawn = list(itertools.islice(Scenes(size, split, count, world, labels), count))
    found = {"image": np.stack([each["image"] for each in drawn]), "caption": [each["caption"] for each in drawn]}
    return found | ({"label": np.array([each["label"] for each in drawn])} if labels else {})


@dataclasses.dataclass(frozen=True)
class ClipQuality:
    """Scores {"retrieval", "zero_shot"}, of held-out pairs, and the same of other scenes of training pairs.

    Retrieval: recall among `pictures` scenes and their captions, equal captions being one.  Zero-shot: the class of a
    single object, of all (colour, shape) pairs of the world, by the nearest of the classes' texts: each the mean of
    unit vectors over `templates`, made a unit vector again (Radford et al. 2021, section 3.1.4).
    world: arguments of World; the seed of the scenes is `scene_seed`, another one than training has.
    """

    world: dict[str, Any]
    pictures: int = 256
    templates: tuple[str, ...] = TEMPLATES
    scene_seed: int = 1
    stage: str = "clip"

    def __call__(self, run) -> dict[str, Any]:
        task, params = run.task(self.stage), trees.unflatten(run.weights(self.stage)[0])
        world, text = World(**self.world | {"seed": self.scene_seed}), run.text_tokenizer()
        image = functools.partial(encoded, task.encode_image, params)
        words = lambda texts: encoded(task.encode_text, params, *text(list(texts)))
        one = dataclasses.replace(world, min_objects=1, max_objects=1)
        pairs = classes(one, "pair")
        weights = [words(write(Claims((Thing(*pair),)), template) for pair in pairs) for template in self.templates]
        weights = np.asarray(unit(jnp.asarray(np.mean(weights, 0))))
        scores: dict[str, Any] = {}
        for split, name in (("heldout", ""), ("train", "_training_pairs")):
            shown = examples(world, task.size, self.pictures, split)
            _, kinds = np.unique(shown["caption"], return_inverse=True)
            similarity = image(shown["image"]) @ words(shown["caption"]).T
            scores["retrieval" + name] = retrieval.recalls(similarity, kinds, kinds)
            alone = examples(one, task.size, self.pictures, split, "pair")
            found = (image(alone["image"]) @ weights.T).argmax(1)
            scores["zero_shot" + name] = {"accuracy": float((found == alone["label"]).mean())}
        protocol = {
            "pictures": self.pictures, "scene_seed": self.scene_seed, "classes": len(pairs),
            "templates": list(self.templates),
        }  # fmt: skip
        return {"protocol": protocol, "scores": scores}


@dataclasses.dataclass(frozen=True)
class EncoderProbe:
    """Scores {"trained", "random"}: a linear probe and 20 nearest neighbours on an encoder's features, and the same on
    those of the encoder as it begins.

    The classes are the (colour, shape) pairs of single objects; features are the mean of the patches' tokens.
    world: arguments of World.  train, test: how many scenes; the test's have the seed `scene_seed`.
    """

    world: dict[str, Any]
    train: int = 2048
    test: int = 1024
    scene_seed: int = 1
    stage: str = "mae"

    def __call__(self, run) -> dict[str, Any]:
        task = run.task(self.stage)
        trained = trees.unflatten(run.weights(self.stage)[0])
        size = run.data_arguments(self.stage, False)["size"]
        seeds = {"train": self.scene_seed + 1, "test": self.scene_seed}
        parts = {
            name: examples(World(**self.world | {"seed": seed}), size, getattr(self, name), "train", "pair")
            for name, seed in seeds.items()
        }
        begun = task.init(jax.random.key(run.config.seed), {"image": parts["test"]["image"][:1]})
        scores = {}
        for name, params in (("trained", trained), ("random", begun)):
            x = {part: encoded(task.features_of, params, parts[part]["image"]) for part in parts}
            given = (x["train"], parts["train"]["label"], x["test"], parts["test"]["label"])
            scores[name] = {"linear_probe": probe.linear_probe(*given), "knn_20": probe.knn(*given)}
        protocol = {"train": self.train, "test": self.test, "scene_seed": self.scene_seed, "features": "patch mean"}
        return {"protocol": protocol, "scores": scores}
