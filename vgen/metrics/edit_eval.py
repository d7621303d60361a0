"""Studies of sampling and editing methods on a trained system that is told nothing: DDIM, SDEdit, ILVR, RePaint.

Each is called with a `vgen.system.System`, draws with its last stage, under the settings of `generate`, and gives
{"protocol": ..., "scores": {row: {metric: number}}}.  Rows of one study begin from the same noise.  A study compiles
the sampler once for each of its settings that changes the program; steps and strengths are traced.

Scenes are those of another seed than training saw, of its split "train", as far as the oracle reads them right: what
it misreads in a true picture says nothing of an edited one.  Objects are found again by their place, see `found`.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, UInt8

from vgen.config import UserError
from vgen.data.scene_draw import SceneObject
from vgen.data.scene_oracle import Reading, read
from vgen.data.scenes import World, scene
from vgen.diffusion import grids
from vgen.edit import from_image
from vgen.edit.ilvr import low_pass
from vgen.hosts import whole
from vgen.metrics.scene_eval import diversity, is_scene, quality
from vgen.types import Step

Pictures = UInt8[np.ndarray, "n s s 3"]
Holes = Bool[np.ndarray, "n s s"]
NEAR = 0.15  # of the picture's side: how far the centre of an object may have moved


# ----------------------------------------------------------------------------------------------------------- drawing


def sampler(system, told: bool = False, **changed) -> Callable[..., Pictures]:
    """draw(conds, seed, **knobs) -> pictures of the system's last stage, one for each row of conds, compiled once.

    told: whether it may be a system of classes or texts, whose conditions are then among conds.
    changed: settings of the task in the place of its own.  knobs: in the place of the defaults in `generate.knobs`.
    Raises UserError for a system of classes or texts unless told, and for a knob that `generate.knobs` does not have.
    """
    name = system.names[-1]
    task = dataclasses.replace(system.tasks[name], **changed) if changed else system.tasks[name]
    if not told and getattr(task, "conditional", False):
        raise UserError(f"stage {name} takes classes or texts, and this study is for systems that are told nothing")
    function = jax.jit(task.sample)

    def draw(conds: Mapping[str, np.ndarray], seed: int, **overrides) -> UInt8[np.ndarray, "n h w 3"]:
        knobs = system.knobs(name, overrides)
        if unknown := sorted(set(overrides) - set(knobs)):
            raise UserError(f"the study sets {unknown[0]!r}, which is not among config.generate.knobs.{name}")
        n, pictures = len(next(iter(conds.values()))), []
        with jax.set_mesh(system.run.mesh):
            for i, (rows, new) in enumerate(system.batches(n, system.batch_size)):
                key = jax.random.fold_in(jax.random.key(seed), i)
                out = function(system.params[name], key, {k: x[rows] for k, x in conds.items()}, **knobs)
                pictures.append(whole(out["image_out"])[:new])
        return np.concatenate(pictures)

    return draw


def protocol(system, study, judge: str = "vgen.data.scene_oracle.read", **more) -> dict[str, Any]:
    """Everything that the numbers of a study depend on but its world, which config.eval has; what is done with a
    picture, and how all are sampled, is the study's own.

    judge: what reads the pictures.  more: further entries.
    """
    task = {
        name: {key: value for key, value in changed.items() if key not in ("image_edit", "method")}
        for name, changed in system.settings.task.items()
    }
    settings = {field.name: getattr(study, field.name) for field in dataclasses.fields(study) if field.name != "world"}
    knobs = {name: dict(system.settings.knobs.get(name, {})) for name in system.names}
    return settings | dict(size=system.size, judge=judge, knobs=knobs, task=task) | more


# ------------------------------------------------------------------------------------------------------------ scenes


def scenes(world: World, size: int, count: int) -> Iterator[dict[str, Any]]:
    """Endless scenes with their truth, see `vgen.data.scenes.scene`, that the oracle reads right.

    Raises ValueError after 100 scenes for each of `count` that are wanted.
    """
    for index in range(100 * count):
        example = scene(world, index, size, truth=True)
        reading = read(example["image"], world)
        if is_scene(reading, world) and len(reading.objects) == len(example["objects"]):
            if all(found(o, reading) for o in example["objects"]):
                yield example
    raise ValueError(f"scenes: fewer than {count} of {100 * count} scenes of {size} pixels could be used")


def found(o: SceneObject, reading: Reading, words: Sequence[str] = ("colour", "shape")) -> bool:
    """Whether an object was read near the place of `o` with the same `words`."""
    return any(
        all(getattr(seen, word) == getattr(o, word) for word in words) and np.hypot(seen.x - o.x, seen.y - o.y) < NEAR
        for seen in reading.objects
    )


@dataclasses.dataclass(frozen=True)
class Cut:
    """A scene of which a straight cut leaves a part: image uint8 [s, s, 3]; hole bool [s, s], True where it is missing.

    objects: all of them; object number `cut` is partly in the hole, the others are not.
    """

    image: np.ndarray
    hole: np.ndarray
    objects: tuple[SceneObject, ...]
    cut: int


def cuts(world: World, size: int, count: int, hidden: tuple[float, float] = (0.35, 0.65)) -> list[Cut]:
    """`count` scenes cut along a row or a column that hides a share within `hidden` of one object, and of no other.

    Which of the possible cuts it is is drawn at random, the same in every call.
    """
    made, holes = [], _halves(size)
    for example in scenes(world, size, count):
        masks = example["masks"].reshape(len(example["objects"]), -1).astype(float)
        shares = holes.reshape(len(holes), -1) @ masks.T / masks.sum(1)  # [holes, objects]
        once = (shares > 0).sum(1) == 1
        possible = np.argwhere(once[:, None] & (shares >= hidden[0]) & (shares <= hidden[1]))
        if len(possible):
            k, i = possible[np.random.default_rng((world.seed, len(made))).integers(len(possible))]
            made.append(Cut(example["image"], holes[k], example["objects"], int(i)))
        if len(made) == count:
            return made
    raise AssertionError("scenes are endless, or raise")


def _halves(size: int) -> Holes:
    """All holes that end at a row or a column, each side of it."""
    first = np.arange(size)[None] < np.arange(1, size)[:, None]  # [size - 1, size]
    sides = np.concatenate([first, ~first])
    rows = np.broadcast_to(sides[:, :, None], (len(sides), size, size))
    return np.concatenate([rows, rows.swapaxes(1, 2)])


# ---------------------------------------------------------------------------------------------------------- measures


def repainted(images: Pictures, cases: Sequence[Cut], world: World) -> dict[str, float]:
    """{"known_error", "scene", "object", "agreement", "seam"} of the completed pictures of some cuts.

    known_error: largest difference of a known pixel, 0 to 255.  scene: share that is read as a scene of the world.
    object: share in which the cut object is found again; agreement: in which all are, in a scene of the world.
    seam: gradient across the border of the hole, over that of the true pictures there: 1 for the true ones.
    """
    truths, holes = np.stack([case.image for case in cases]), np.stack([case.hole for case in cases])
    readings = [read(image, world) for image in images]
    valid = [is_scene(reading, world) for reading in readings]
    again = [[found(o, reading) for o in case.objects] for case, reading in zip(cases, readings)]
    difference = np.abs(images.astype(int) - truths) * ~holes[..., None]
    return {
        "known_error": float(difference.max()),
        "scene": float(np.mean(valid)),
        "object": float(np.mean([each[case.cut] for case, each in zip(cases, again)])),
        "agreement": float(np.mean([ok and all(each) for ok, each in zip(valid, again)])),
        "seam": border_gradient(images, holes) / max(border_gradient(truths, holes), 1e-9),
    }


def border_gradient(images: Pictures, holes: Holes) -> float:
    """Mean difference, 0 to 255, of the neighbours of which one is in the hole and the other is not."""
    x, across = images.astype(float), []
    for axis in (1, 2):
        border = np.diff(holes.astype(int), axis=axis) != 0
        across.append(np.abs(np.diff(x, axis=axis)).mean(-1)[border])
    return float(np.concatenate(across).mean())


def psnr(a: Pictures, b: Pictures) -> float:
    """Mean PSNR in dB of pairs of pictures; 100 where they are equal."""
    error = np.square((a.astype(float) - b) / 255).mean((1, 2, 3))
    return float(np.mean(-10 * np.log10(error + 1e-10)))


def rms(a: Any, b: Any) -> float:
    """Root of the mean squared difference of all pixels, of a range of 2 (pictures in [-1, 1])."""
    return float(np.sqrt(np.square((np.asarray(a, float) - np.asarray(b, float)) / 127.5).mean()))


def crude(images: Pictures, block: int) -> Pictures:
    """Pictures in which each block of so many pixels a side is its mean: a stand-in for rough strokes of colour.

    Raises ValueError where the pictures are no multiple of it.
    """
    n, s = images.shape[:2]
    if block < 1 or s % block:
        raise ValueError(f"crude: pictures of {s} pixels are no multiple of blocks of {block}")
    means = images.reshape(n, s // block, block, s // block, block, 3).mean((2, 4))
    return np.rint(means).astype(np.uint8).repeat(block, 1).repeat(block, 2)


# ----------------------------------------------------------------------------------------------------------- studies


@dataclasses.dataclass(frozen=True)
class SolverStudy:
    """Pictures of noise by several solvers in few and in many steps: rows "<task>_steps_<n>".

    scene, pairs: of `scene_eval.SceneQuality`.  distance: `rms` to the pictures of the same solver in the most steps,
    from the same noise: how much of a picture the noise it begins from decides (Song et al. 2020, section 5.2).
    tasks: {name: settings of the task, such as solver and solver_knobs}.  steps: numbers of steps, of which all tasks
    have all.  world, pictures, seed: see SceneQuality.
    """

    world: dict[str, Any]
    tasks: dict[str, dict[str, Any]]
    steps: tuple[int, ...] = (10, 20, 50, 100)
    pictures: int = 256
    seed: int = 0

    def __call__(self, system) -> dict[str, Any]:
        world, scores = World(**self.world), {}
        conds = {"label": np.zeros(self.pictures, np.int32)}  # nothing reads it: it says how many
        for name, settings in self.tasks.items():
            draw = sampler(system, **settings)
            made = {n: draw(conds, self.seed, steps=n) for n in self.steps}
            best = made[max(self.steps)]
            for n, images in made.items():
                scores[f"{name}_steps_{n}"] = quality(images, world) | {"distance": rms(images, best)}
        return {"protocol": protocol(system, self), "scores": scores}


@dataclasses.dataclass(frozen=True)
class SdeditStudy:
    """Crude pictures made real, from several noises: rows "strength_<t0>", and "input" of the crude pictures.

    fidelity: `psnr` to the input.  scene: share read as a scene of the world.  colour: share of the objects for which
    one of that colour is found in its place.
    world: a World's keyword arguments, its seed left out.  pictures, scene_seed: how many scenes of which seed.
    block: of `crude`.  strengths: t0, shares of the way from the picture to noise.  seed: of sampling.
    """

    world: dict[str, Any]
    strengths: tuple[float, ...] = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    pictures: int = 64
    block: int = 4
    scene_seed: int = 1
    seed: int = 0

    def __call__(self, system) -> dict[str, Any]:
        world = World(**self.world | {"seed": self.scene_seed})
        true = list(itertools.islice(scenes(world, system.size, self.pictures), self.pictures))
        rough = crude(np.stack([example["image"] for example in true]), self.block)

        def measured(images):
            readings = [read(image, world) for image in images]
            colours = [found(o, reading, ("colour",)) for case, reading in zip(true, readings) for o in case["objects"]]
            scene = [is_scene(reading, world) for reading in readings]
            return {"scene": float(np.mean(scene)), "colour": float(np.mean(colours))}

        draw, scores = sampler(system, image_edit=from_image.usual), {"input": measured(rough)}
        for t0 in self.strengths:
            images = draw({"image": rough}, self.seed, strength=t0)
            scores[f"strength_{t0:g}"] = {"fidelity": psnr(images, rough)} | measured(images)
        return {"protocol": protocol(system, self), "scores": scores}


@dataclasses.dataclass(frozen=True)
class IlvrStudy:
    """Pictures that share the low frequencies of a scene: rows "factor_<N>_range_<r>".

    lowpass_error: `rms` of phi_N of the pictures to that of their references.  scene: share read as a scene of the
    world.  diversity: of the pictures of one reference, see `scene_eval.diversity`.
    ranges: shares of the times, the first ones, in which the reference is held to; range 0 is sampling without one.
    factors: N of phi_N.  references, outputs, scene_seed: so many pictures of each of so many scenes of that seed.
    world: a World's keyword arguments, its seed left out.  seed: of sampling.
    """

    world: dict[str, Any]
    factors: tuple[int, ...] = (2, 4, 8)
    ranges: tuple[float, ...] = (1.0, 0.8, 0.6)
    references: int = 32
    outputs: int = 2
    scene_seed: int = 1
    seed: int = 0

    def __call__(self, system) -> dict[str, Any]:
        world = World(**self.world | {"seed": self.scene_seed})
        true = itertools.islice(scenes(world, system.size, self.references), self.references)
        image = np.stack([example["image"] for example in true]).repeat(self.outputs, 0)
        kinds, scores, free = np.arange(self.references).repeat(self.outputs), {}, None
        for factor in self.factors:
            draw = sampler(system, image_edit=from_image.Ilvr(factor))
            if free is None:
                free = draw({"image": image}, self.seed, strength=0.0)
            made = {0.0: free} | {part: draw({"image": image}, self.seed, strength=part) for part in self.ranges}
            for part, images in made.items():
                low = [low_pass(jnp.asarray(x, jnp.float32), factor) for x in (images, image)]
                scores[f"factor_{factor}_range_{part:g}"] = {
                    "lowpass_error": rms(*low), "scene": quality(images, world)["scene"],
                    **diversity(images, kinds.tolist()),
                }  # fmt: skip
        return {"protocol": protocol(system, self), "scores": scores}


@dataclasses.dataclass(frozen=True)
class RepaintStudy:
    """Scenes cut through an object and completed: rows "repeats_<r>", 1 of which is the plain replacement, and "slow".

    Metrics: see `repainted`; evaluations: calls of the network for a picture.
    slow: also the plain replacement in as many steps as the most repeats take, or as many as the system can.
    hidden: share of the cut object in the hole, see `cuts`; what was in the hole is not handed over.
    jump_length, repeats: of `edit.repaint.repaint`.  cases, scene_seed: so many scenes of that seed.
    world: a World's keyword arguments, its seed left out.  seed: of sampling.
    """

    world: dict[str, Any]
    repeats: tuple[int, ...] = (1, 3, 10)
    jump_length: int = 10
    slow: bool = True
    cases: int = 64
    hidden: tuple[float, float] = (0.35, 0.65)
    scene_seed: int = 1
    seed: int = 0

    def __call__(self, system) -> dict[str, Any]:
        world, name = World(**self.world | {"seed": self.scene_seed}), system.names[-1]
        cases = cuts(world, system.size, self.cases, self.hidden)
        holes = np.stack([case.hole for case in cases])
        kept = np.stack([case.image for case in cases]) * ~holes[..., None] + np.uint8(128) * holes[..., None]
        steps = int(system.knobs(name, {})["steps"])
        most = evaluations(steps, self.jump_length, max(self.repeats))
        rows = {f"repeats_{repeats}": (repeats, steps) for repeats in self.repeats}
        if self.slow:
            rows["slow"] = 1, min(most, getattr(system.tasks[name], "max_steps", most))
        draws, scores = {}, {}
        for row, (repeats, n) in rows.items():
            if repeats not in draws:
                draws[repeats] = sampler(system, image_edit=from_image.Repaint(self.jump_length, repeats))
            images = draws[repeats]({"image": kept, "mask": holes}, self.seed, steps=n)
            scores[row] = repainted(images, cases, world)
            scores[row]["evaluations"] = evaluations(n, self.jump_length, repeats)
        return {"protocol": protocol(system, self), "scores": scores}


def evaluations(steps: int, jump_length: int, repeats: int) -> int:
    """Calls of the network for one picture of RePaint."""
    row = np.arange(steps, dtype=np.int32)
    grid = Step(row, *[row.astype(np.float32)] * 6)
    return int(jax.jit(lambda: grids.rows(grids.resampled(grid, jump_length, repeats)))())
