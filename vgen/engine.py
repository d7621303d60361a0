"""The data engine: a network helps to make the masks that it is trained on next (Kirillov et al. 2023, SAM,
arXiv:2304.02643, section 4), with a simulated annotator.

Each stage of a config (`vgen.fields.StageConfig.make`) looks at pictures of its own.  Assisted-manual: the annotator
clicks, the network draws.  Semi-automatic: masks that the network is sure of are there already, the annotator adds
those that are missing.  Fully automatic: nobody looks.
"""

import dataclasses
import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vgen import trees
from vgen.automatic_masks import Automatic, generate
from vgen.data.scenes import Scenes, World
from vgen.hosts import whole
from vgen.metrics.segment_eval import SegmentQuality, clicked, matched

KNOWN = 0.5  # IoU from which on an object counts as masked already


@dataclasses.dataclass(frozen=True)
class Annotate:
    """Masks for scenes; called with a `vgen.stages.Run` it gives (examples, report).

    An annotator has a budget of time for each picture, in clicks, and takes the objects from the largest down, those
    left out that have a mask already.  To find one costs `search`.  Where at most `clicks` clicks give a mask of the
    network with an IoU of `good` with it, that mask is taken; elsewhere, which an annotator sees at once, and without a
    network it is drawn by hand, which costs `brush` and gives the true mask.  What would cost more than is left is not
    begun.

    world: arguments of World.  size: pixels.  pictures: how many; scene_seed: of which scenes.
    model: the stage whose network helps, "" for none.  automatic: arguments of Automatic, of masks that are there ahead
    of the annotator, None for none.  room: masks kept of a picture, those found first.
    An example is {"image": uint8 [size, size, 3], "masks": bool [room, size, size]}; pictures without any are left out.
    The report: masks per picture, good ones (IoU of at least 0.75 with an object) and their share, clicks per mask.
    Raises ValueError for automatic masks or clicks without a network.
    """

    world: dict[str, Any]
    size: int
    pictures: int
    scene_seed: int
    model: str = ""
    automatic: dict[str, Any] | None = None
    budget: float = 0.0
    search: float = 2.0
    brush: float = 4.0
    clicks: int = 3
    good: float = 0.9
    room: int = 8
    batch: int = 16

    def __post_init__(self):
        Automatic(**(self.automatic or {}))  # or ValueError
        if self.automatic is not None and not self.model:
            raise ValueError("Annotate: automatic masks need a model, the name of a stage before")
        if self.pictures < 1 or self.room < 1 or self.clicks < 1:
            got = f"{self.pictures}, {self.room}, {self.clicks}"
            raise ValueError(f"Annotate: pictures, room and clicks must be at least 1, got {got}")

    def __call__(self, run) -> tuple[list[dict[str, np.ndarray]], dict[str, float]]:
        world = World(**self.world | {"seed": self.scene_seed})
        scenes = Scenes(self.size, "train", self.pictures, world, masks=True)
        task = params = network = None
        if self.model:
            task, params = run.task(self.model), trees.unflatten(run.weights(self.model)[0])
            network = task.predictor(params) if self.automatic is not None else None
        examples, counts = [], dict.fromkeys(("masks", "good", "objects", "clicks", "by_hand"), 0)
        for start in range(0, self.pictures, self.batch):
            some = [scenes[i] for i in range(start, min(start + self.batch, self.pictures))]
            tries = self._tries(task, params, some)
            for i, each in enumerate(some):
                true = each["masks"][each["masks"].any((1, 2))]
                masks = self._found(network, each["image"])
                masks += self._annotated(true, masks, None if tries is None else tries[:, i], counts)
                self._count(true, masks, counts)
                if masks:
                    kept = np.stack(masks[: self.room])
                    masks = np.pad(kept, ((0, self.room - len(kept)), (0, 0), (0, 0)))
                    examples.append({"image": each["image"], "masks": masks})
        if not examples:
            raise ValueError(
                "Annotate: not one mask was made; raise the budget, or lower what automatic masks must reach"
            )
        return examples, self._report(counts)

    def _tries(self, task, params, some):
        """bool [clicks, b, n, size, size]: what the network draws after 1, 2, ... clicks, None without one."""
        if task is None or not self.budget:
            return None
        some = some + some[-1:] * (self.batch - len(some))  # one shape for every call
        image, masks = (np.stack([each[key] for each in some]) for key in ("image", "masks"))
        return whole(_clicked(task, self.clicks, params, image, masks))

    def _found(self, network, image) -> list[np.ndarray]:
        if network is None:
            return []
        return [mask.segmentation for mask in generate(network, image, Automatic(**self.automatic))]

    def _annotated(self, true, known, tries, counts) -> list[np.ndarray]:
        """The masks that the annotator adds to the known ones."""
        left, added = self.budget, []
        for i in np.argsort(-true.sum((1, 2)), kind="stable"):
            if known and matched(true[i : i + 1], np.stack(known), KNOWN)[0]:
                continue
            drawn = [] if tries is None else list(tries[:, i])
            good = next((k for k, mask in enumerate(drawn) if matched(true[i : i + 1], mask[None], self.good)[0]), None)
            clicks = 0 if good is None else good + 1
            cost = self.search + (self.brush if good is None else clicks)
            if cost > left:
                continue
            left -= cost
            added.append(true[i] if good is None else drawn[good])
            counts["clicks"] += clicks
            counts["by_hand"] += good is None
        return added

    def _count(self, true, masks, counts) -> None:
        counts["objects"] += len(true)
        counts["masks"] += len(masks)
        if masks:
            counts["good"] += matched(true, np.stack(masks))[0]

    def _report(self, counts) -> dict[str, float]:
        masks = max(counts["masks"], 1)
        return {
            "masks_per_picture": counts["masks"] / self.pictures, "good_per_picture": counts["good"] / self.pictures,
            "objects_per_picture": counts["objects"] / self.pictures, "good_share": counts["good"] / masks,
            "clicks_per_mask": counts["clicks"] / masks, "by_hand_share": counts["by_hand"] / masks,
        }  # fmt: skip


@functools.partial(jax.jit, static_argnums=(0, 1))
def _clicked(task, clicks, params, image, masks):
    return jnp.stack(clicked(task, params, task.encode(params, image), jnp.asarray(masks, bool), clicks)[0])


@dataclasses.dataclass(frozen=True)
class EngineReport:
    """Scores: a row for each stage that made masks, as it reported, and those of `quality` of the last network.

    Called with the `vgen.stages.Run` of a config whose stages make their data by Annotate.
    """

    quality: SegmentQuality

    def __call__(self, run) -> dict[str, Any]:
        report = self.quality(run)
        made = [name for name in run.config.order if run.stage(name).make]
        rows = {name: json.loads((run.folder(name) / "made.json").read_text()) for name in made}
        return {"protocol": report["protocol"], "scores": rows | report["scores"]}
