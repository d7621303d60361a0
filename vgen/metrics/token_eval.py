"""Measure parallel decoding by class on the embedded world: mask schedules and steps, and pictures edited in a box."""

import dataclasses
import itertools
from typing import Any

import numpy as np

from vgen.config import UserError
from vgen.data.scene_text import Claims, Thing
from vgen.data.scenes import World, classes
from vgen.edit.inpaint_tokens import box_mask
from vgen.metrics.edit_eval import Holes, Pictures, cuts, protocol, psnr, sampler, scenes
from vgen.metrics.scene_eval import diversity
from vgen.metrics.scenes import score_claims


@dataclasses.dataclass(frozen=True)
class TokenStudy:
    """Called with a `vgen.system.System` of classes, gives {"protocol", "scores": {row: {metric: number}}} of its last
    stage, whose task is a `vgen.tasks.tokens.MaskedTokens`.

    Class accuracy is `scene_exact`: the share of pictures in which the oracle reads one object of the asked colour and
    shape and nothing else.
    Rows: "<stage>", with the settings of `generate`, and "<stage>_guidance_off"; "<schedule>_steps_<n>" for all
    `schedules` and `steps` of decoding, without second thoughts (`revise`), with the training left as it was.
    "outpaint": scenes whose object is cut by a straight line, its other side found again with the same class;
    "inpaint": the box of the object made anew with the same class; "replace": with another one, which is what the
    oracle is asked for.  kept: PSNR in dB outside of what was made anew.
    world: a World's keyword arguments, for scenes of one object.  labels: what its classes are, as of
      `vgen.data.scenes.classes`.
    pictures: of the first two rows; table: of each of the table's; edits: scenes of seed `scene_seed` that are edited.
    margin: pixels around an object that are made anew with it.  seed: of sampling.
    """

    world: dict[str, Any]
    labels: str = "pair"
    pictures: int = 256
    table: int = 128
    schedules: tuple[str, ...] = ("cosine", "linear", "square", "cubic", "arccos")
    steps: tuple[int, ...] = (4, 8, 12)
    edits: int = 64
    margin: int = 4
    scene_seed: int = 1
    seed: int = 0

    def __call__(self, system) -> dict[str, Any]:
        name, world = system.names[-1], World(**self.world | {"seed": self.scene_seed})
        kinds = classes(world, self.labels)
        if getattr(system.tasks[name], "classes", 0) != len(kinds):
            raise UserError(f"stage {name} is not told one of the {len(kinds)} classes that this study asks for")
        said = [Claims((Thing(*kind),)) for kind in kinds]
        right = lambda images, labels: score_claims(images, [said[label] for label in labels], world)
        draw, scores = sampler(system, told=True), {}
        runs = {name: {}}
        if "guidance_scale" in system.settings.knobs.get(name, {}):
            runs[f"{name}_guidance_off"] = {"guidance_scale": 0.0}
        labels = np.arange(self.pictures, dtype=np.int32) % len(kinds)
        for row, knobs in runs.items():
            images = draw({"label": labels}, self.seed, **knobs)
            scores[row] = right(images, labels) | diversity(images, labels.tolist())
        labels = labels[: self.table]
        plain = {"revise": 0.0} if "revise" in system.settings.knobs.get(name, {}) else {}
        for schedule in self.schedules:
            other = sampler(system, told=True, schedule=schedule)
            for steps in self.steps:
                images = other({"label": labels}, self.seed, steps=steps, **plain)
                scores[f"{schedule}_steps_{steps}"] = right(images, labels)
        for row, (truths, masks, labels) in self._edits(world, kinds, system.size).items() if self.edits else ():
            images = draw({"label": labels, "image": truths, "mask": masks}, self.seed)
            kept = psnr(np.where(masks[..., None], truths, images), truths)
            scores[row] = right(images, labels) | {"kept": kept}
        return {"protocol": protocol(system, self), "scores": scores}

    def _edits(self, world: World, kinds, size: int) -> dict[str, tuple[Pictures, Holes, np.ndarray]]:
        """{row: (pictures, what is made anew, classes that are asked for)}."""

        def label(o) -> int:
            said = o.colour if self.labels != "shape" else "", o.shape if self.labels != "colour" else ""
            return kinds.index(said)

        def stacked(images, masks, labels):
            return np.stack(images), np.stack(masks), np.array(labels, np.int32)

        cut = cuts(world, size, self.edits)
        whole = list(itertools.islice(scenes(world, size, self.edits), self.edits))
        boxes = np.concatenate([each["boxes"][:1] for each in whole]) + np.array([-1, -1, 1, 1]) * self.margin
        masks = box_mask(boxes.round().astype(int).clip(0, size), size, size)
        own = [label(each["objects"][0]) for each in whole]
        shift = np.random.default_rng(self.seed).integers(1, len(kinds), len(own))  # to any class but the same
        images = [each["image"] for each in whole]
        return {
            "outpaint": stacked(
                [each.image for each in cut], [each.hole for each in cut], [label(each.objects[0]) for each in cut]
            ),
            "inpaint": stacked(images, masks, own),
            "replace": stacked(images, masks, (np.array(own) + shift) % len(kinds)),
        }
