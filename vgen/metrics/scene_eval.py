"""Measure a system on the embedded world by the scene oracle: by prompts it has never seen, by class, or by steps."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

from vgen.data.scene_oracle import Reading, read
from vgen.data.scene_text import Claims, Thing
from vgen.data.scenes import World, classes, prompts
from vgen.metrics.scenes import score, score_claims


@dataclasses.dataclass(frozen=True)
class SceneEval:
    """Called with a `vgen.system.System`, gives {"protocol": ..., "scores": {stage: {metric: share}}}.

    labels: "" for a system that takes captions, or what its classes are, as of `vgen.data.scenes.classes`: so many
      prompts are then the numbers of the classes, over and over.  `scene_exact` is then the share of pictures that the
      oracle reads as one object of the class and nothing else; there is also `diversity`, see below.
    world: a World's keyword arguments.  prompts, split, prompt_seed: how many captions of which split's scenes.
    seed: of sampling.  guidance_off: also measure without guidance, as "<stage>_guidance_off".
    off: the scale that means none: 0 in Muse's form of guidance and in a classifier's, 1 in that of diffusion.
    scales: further scales to measure, as "<stage>_guidance_<scale>".
    Of a system that chooses among pictures, "<stage>_unchosen" is of those that are drawn first.
    knob: the one whose scales these are; "guidance" stands for its name without "_scale" in those of the rows.
    Guidance, steps and temperatures are the config's defaults and are written into the protocol.
    """

    world: dict[str, Any]
    prompts: int = 256
    split: str = "heldout"
    prompt_seed: int = 0
    seed: int = 0
    guidance_off: bool = True
    off: float = 0.0
    scales: tuple[float, ...] = ()
    labels: str = ""
    knob: str = "guidance_scale"

    def __call__(self, system) -> dict[str, Any]:
        world = World(**self.world)
        if self.labels:
            kinds = classes(world, self.labels)
            texts = [str(i % len(kinds)) for i in range(self.prompts)]
            claims = [Claims((Thing(*kinds[int(text)]),)) for text in texts]
            judged = lambda images: score_claims(images, claims, world) | diversity(images, texts)
        else:
            texts = prompts(world, self.prompts, self.split, self.prompt_seed)
            judged = lambda images: score(images, texts, world)
        scores: dict[str, Mapping[str, float]] = {}
        name = self.knob.removesuffix("_scale")
        runs = {"": {}} | ({f"_{name}_off": {self.knob: self.off}} if self.guidance_off else {})
        runs |= {f"_{name}_{scale:g}": {self.knob: scale} for scale in self.scales}
        of = system.choice.of if getattr(system, "choice", None) else 1
        runs |= {"_unchosen": {"of": 1}} if of > 1 else {}
        for suffix, knobs in runs.items():
            for stage, images in system(texts, seed=self.seed, **knobs).items():
                scores[stage + suffix] = judged(images)
        protocol = {
            "prompts": self.prompts, "split": self.split, "prompt_seed": self.prompt_seed, "seed": self.seed,
            "labels": self.labels, "knob": self.knob,
            "images_per_prompt": 1, "drawn_per_prompt": of,
            "knobs": {name: dict(system.settings.knobs.get(name, {})) for name in system.names},
            "judge": "vgen.metrics.scenes.score",
        }  # fmt: skip
        return {"protocol": protocol, "scores": scores}


def diversity(images: UInt8[np.ndarray, "n h w 3"], kinds: Sequence[Any]) -> dict[str, float]:
    """{"diversity"}: how far apart the pictures of one kind are, mean over the kinds; {} where none has two.

    The distance of two pictures is the root of their mean squared difference over all values, which are in [0, 1]; of
    a kind it is the mean over its pairs.
    kinds: what each picture is of.
    """
    means = []
    for kind in sorted(set(kinds)):
        own = [image / 255 for image, other in zip(images, kinds, strict=True) if other == kind]
        pairs = [np.sqrt(np.mean((a - b) ** 2)) for a, b in itertools.combinations(own, 2)]
        means += [np.mean(pairs)] if pairs else []
    return {"diversity": float(np.mean(means))} if means else {}


@dataclasses.dataclass(frozen=True)
class SceneQuality:
    """Called with a `vgen.system.System` that is told nothing, gives {"protocol", "scores": {stage: {metric: share}}}.

    scene: share of the pictures that the oracle reads as a scene of the world, with as many objects, all known, on a
    known background.  pairs: share of the world's (colour, shape) pairs that are in some such picture.
    world: a World's keyword arguments.  pictures: how many.  seed: of sampling.
    steps: numbers of sampling steps to measure, as "<stage>_steps_<n>"; () is the config's alone, as "<stage>".
    """

    world: dict[str, Any]
    pictures: int = 256
    seed: int = 0
    steps: tuple[int, ...] = ()

    def __call__(self, system) -> dict[str, Any]:
        world = World(**self.world)
        scores: dict[str, Mapping[str, float]] = {}
        for n in self.steps or (None,):
            for stage, images in system([""] * self.pictures, seed=self.seed, steps=n).items():
                scores[stage if n is None else f"{stage}_steps_{n}"] = quality(images, world)
        protocol = {
            "pictures": self.pictures, "seed": self.seed, "judge": "vgen.data.scene_oracle.read",
            "knobs": {name: dict(system.settings.knobs.get(name, {})) for name in system.names},
            "task": {name: dict(changed) for name, changed in system.settings.task.items()},
        }  # fmt: skip
        return {"protocol": protocol, "scores": scores}


def quality(images, world: World) -> dict[str, float]:
    """{"scene", "pairs"} of pictures uint8 [n, s, s, 3], see SceneQuality."""
    readings = [read(np.asarray(image), world) for image in images]
    known = [reading for reading in readings if is_scene(reading, world)]
    pairs = {(o.colour, o.shape) for reading in known for o in reading.objects}
    possible = len(world.colours) * len(world.shapes)
    return {"scene": len(known) / len(readings), "pairs": len(pairs) / possible}


def is_scene(reading: Reading, world: World) -> bool:
    """Whether a picture was read as one of the world: as many objects, all known, on a known background."""
    return (
        reading.background is not None
        and not reading.unknown
        and world.min_objects <= len(reading.objects) <= world.max_objects
        and all(o.shape in world.shapes for o in reading.objects)
    )
