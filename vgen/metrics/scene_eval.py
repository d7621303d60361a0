"""Measure a text-to-image system on the embedded world: prompts it has never seen, read back by the scene oracle."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from vgen.data.scenes import World, prompts
from vgen.metrics.scenes import score


@dataclasses.dataclass(frozen=True)
class SceneEval:
    """Called with a `vgen.stages.System`, gives {"protocol": ..., "scores": {stage: {metric: share}}}.

    world: a World's keyword arguments.  prompts, split, prompt_seed: how many captions of which split's scenes.
    seed: of sampling.  guidance_off: also measure with guidance scale 0, as "<stage>_guidance_off".
    Guidance, steps and temperatures are the config's defaults and are written into the protocol.
    """

    world: dict[str, Any]
    prompts: int = 256
    split: str = "heldout"
    prompt_seed: int = 0
    seed: int = 0
    guidance_off: bool = True

    def __call__(self, system) -> dict[str, Any]:
        world = World(**self.world)
        texts = prompts(world, self.prompts, self.split, self.prompt_seed)
        scores: dict[str, Mapping[str, float]] = {}
        for suffix, knobs in (("", {}), ("_guidance_off", {"guidance_scale": 0.0}))[: 1 + self.guidance_off]:
            for stage, images in system(texts, seed=self.seed, **knobs).items():
                scores[stage + suffix] = score(images, texts, world)
        protocol = {
            "prompts": self.prompts, "split": self.split, "prompt_seed": self.prompt_seed, "seed": self.seed,
            "images_per_prompt": 1, "knobs": {name: dict(system.settings.knobs.get(name, {})) for name in system.names},
            "judge": "vgen.metrics.scenes.score",
        }  # fmt: skip
        return {"protocol": protocol, "scores": scores}
