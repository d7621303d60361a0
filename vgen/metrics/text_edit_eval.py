"""Measure methods on a system that is told a text, on the embedded world: guidance, Prompt-to-Prompt, MultiDiffusion.

Each study is built from a config's `eval` and called with a `vgen.system.System`; it gives {"protocol", "scores": {row:
{metric: number}}} of the last generating stage, whose task is a `vgen.tasks.diffuse.Diffuse`.  All rows of a study are
drawn from the same noise.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, UInt8

from vgen.config import UserError
from vgen.data.scene_draw import SceneObject
from vgen.data.scene_oracle import Reading, coverage, read
from vgen.data.scene_text import COLOURS, SHAPES, TEMPLATES, Claims, Thing, parse
from vgen.data.scenes import World, prompts, relation
from vgen.edit import align
from vgen.edit.multidiffusion import multidiffusion, windows
from vgen.edit.prompt_to_prompt import LocalBlend, prompt_to_prompt
from vgen.hosts import whole
from vgen.metrics.edit_eval import protocol, sampler
from vgen.metrics.scene_eval import diversity, quality
from vgen.metrics.scenes import judge, score

MOST_PSNR = 60.0  # what equal pictures count as
OPEN = -1.0  # a threshold of LocalBlend that every place is above


def _told(system, texts: Sequence[str]) -> dict[str, np.ndarray]:
    """The conditions of texts; UserError for a system without."""
    if system.text is None:
        raise UserError("this study is for systems that are told a text")
    return dict(zip(("text", "text_mask"), system.text(list(texts))))


def _mean(values) -> float:
    return float(np.mean(values)) if len(values) else float("nan")


# ------------------------------------------------------------------------------------------------------- guidance


@dataclasses.dataclass(frozen=True)
class CfgStudy:
    """Scales of classifier-free guidance: what the captions claim and hold, and how much pictures of one differ.

    Rows "scale_<s>" and, for every phi of `rescale` but 0, "scale_<s>_rescale_<phi>"; metrics those of
    `vgen.metrics.scenes`, and `vgen.metrics.scene_eval.diversity`.
    world: a World's keyword arguments.  captions, split, prompt_seed: how many, of which split's scenes.
    each: pictures of a caption.  seed: of sampling.  scales: 1 is no guidance.
    rescale: phi of `vgen.guidance.rescaled`, 0 for none; each compiles once.
    """

    world: dict[str, Any]
    captions: int = 64
    each: int = 2
    split: str = "heldout"
    prompt_seed: int = 0
    seed: int = 0
    scales: tuple[float, ...] = (1.0, 1.5, 2.0, 3.0, 5.0, 8.0)
    rescale: tuple[float, ...] = (0.0, 0.7)

    def __call__(self, system) -> dict[str, Any]:
        world = World(**self.world)
        texts = [t for t in prompts(world, self.captions, self.split, self.prompt_seed) for _ in range(self.each)]
        told, scores = _told(system, texts), {}
        for phi in self.rescale:
            draw = sampler(system, told=True, method=None, picture=None, rescale=phi)
            for scale in self.scales:
                pictures = draw(told, self.seed, guidance_scale=scale)
                row = f"scale_{scale:g}" + (f"_rescale_{phi:g}" if phi else "")
                scores[row] = score(pictures, texts, world) | diversity(pictures, texts)
        return {"protocol": protocol(system, self, judge="vgen.metrics.scenes.score"), "scores": scores}


# -------------------------------------------------------------------------------------------------- Prompt-to-Prompt


class Swap(NamedTuple):
    """An edit of a caption by one word: `attribute` ("colour" or "shape") of object `thing` of its claims to `word`."""

    caption: str
    edited: str
    claims: Claims
    thing: int
    attribute: str
    word: str

    @property
    def wanted(self) -> Claims:
        """What the edited caption claims."""
        objects = list(self.claims.objects)
        objects[self.thing] = objects[self.thing]._replace(**{self.attribute: self.word})
        return self.claims._replace(objects=tuple(objects))


def swaps(world: World, n: int, split: str = "train", seed: int = 0) -> list[Swap]:
    """One Swap for each of `n` captions of a split, colours as often as shapes where both can be had.

    The new (colour, shape) occurs in training and not in the caption; captions that allow none are left out.
    """
    rng = np.random.default_rng(seed)
    found = [_swap(caption, world, rng) for caption in prompts(world, n, split, seed)]
    return [swap for swap in found if swap is not None]


def _swap(caption: str, world: World, rng: np.random.Generator) -> Swap | None:
    claims = parse(caption, world.templates + TEMPLATES)
    there = {(thing.colour, thing.shape) for thing in claims.objects}
    ways: dict[str, list[tuple[int, str]]] = {}
    for i, thing in enumerate(claims.objects):
        for attribute, words in (("colour", world.colours), ("shape", world.shapes)):
            for word in words:
                new = thing._replace(**{attribute: word})
                if (new.colour, new.shape) in world.training and (new.colour, new.shape) not in there:
                    ways.setdefault(attribute, []).append((i, word))
    if not ways:
        return None
    attribute = sorted(ways)[rng.integers(len(ways))]
    i, word = ways[attribute][rng.integers(len(ways[attribute]))]
    words, known = caption.split(), dict(colour=COLOURS, shape=SHAPES)[attribute]
    at = [j for j, each in enumerate(words) if each.strip(",") in known][i]
    words[at] = words[at].replace(getattr(claims.objects[i], attribute), word)
    for j in range(len(words) - 1):
        if words[j] in ("a", "an"):
            words[j] = "an" if words[j + 1][0] in "aeiou" else "a"
    return Swap(caption, " ".join(words), claims, i, attribute, word)


def judge_edit(
    source: UInt8[np.ndarray, "s s 3"], edited: UInt8[np.ndarray, "s s 3"], swap: Swap, world: World, margin: int = 2
) -> dict[str, bool | float]:
    """What an edit did to a picture that shows all its caption claims and nothing else.

    changed: where the object stood, within its radius, one of the wanted colour and shape is read.
    kept: all other objects are read at their places as they were, the stated relations hold between what stands
      there, the background is the same and nothing was added.
    exact: the edited caption holds, wherever its objects are.
    psnr_outside: dB, of the pixels that are more than `margin` from the object, as read in the source and, where it
      stood, in the edited picture; MOST_PSNR at most.
    """
    before, after = read(source, world), read(edited, world)
    things, wanted = swap.claims.objects, swap.wanted
    was = [next(o for o in before.objects if (o.colour, o.shape) == (t.colour, t.shape)) for t in things]
    now = [_standing(after, o) for o in was]
    own, aim = now[swap.thing], wanted.objects[swap.thing]
    others = [(a, b) for i, (a, b) in enumerate(zip(was, now)) if i != swap.thing]
    kept = (
        len(after.objects) == len(was) and not after.unknown and after.background == before.background
        and own is not None and all(b is not None and _words(a) == _words(b) for a, b in others)
        and all(relation(now[i], now[j], dominance=1.0) == name for i, name, j in swap.claims.relations)
    )  # fmt: skip
    inside = object_mask(was[swap.thing], len(source), margin)
    if own is not None:
        inside |= object_mask(own, len(source), margin)
    error = (source.astype(np.float32) - edited)[~inside]
    return dict(
        changed=own is not None and (own.colour, own.shape) == (aim.colour, aim.shape),
        kept=kept,
        exact=judge(after, wanted).scene_exact[0],
        psnr_outside=min(MOST_PSNR, float(10 * np.log10(255**2 / max(np.square(error).mean(), 1e-9)))),
    )


def _words(o: SceneObject | Thing) -> tuple:
    return o.colour, o.shape, o.texture, o.size


def _standing(reading: Reading, o: SceneObject) -> SceneObject | None:
    """The object whose centre is nearest to o's and within its radius."""
    away = [(np.hypot(each.x - o.x, each.y - o.y), i) for i, each in enumerate(reading.objects)]
    distance, i = min(away, default=(np.inf, 0))
    return reading.objects[i] if distance <= o.radius else None


def object_mask(o: SceneObject, size: int, margin: int = 0) -> Bool[np.ndarray, "size size"]:
    """Pixels of a picture that an object touches, or that are within `margin` pixels of one (its square if unknown)."""
    centres = (np.arange(size) + 0.5) / size
    x, y, reach = (centres - o.x) / o.radius, (centres - o.y) / o.radius, (1 + 2 * margin) / (o.radius * size)
    if o.shape not in SHAPES:
        near = lambda u: np.abs(u) < 1 + reach / 2
        return near(y)[:, None] & near(x)[None]
    return coverage(o.shape, x, y, reach) > 0


def _setting(cross_replace: float, self_replace: float, threshold: float | None) -> tuple[str, dict[str, float]]:
    name = f"cross_{cross_replace:g}_self_{self_replace:g}" + ("" if threshold is None else f"_blend_{threshold:g}")
    threshold = OPEN if threshold is None else threshold
    return name, dict(cross_replace=cross_replace, self_replace=self_replace, threshold=threshold)


@dataclasses.dataclass(frozen=True)
class PromptToPromptStudy:
    """Prompt-to-Prompt on captions in which one word is swapped, see `swaps`, against sampling the new caption anew.

    Rows: "resample", which has the source's noise and no edit, then one for each of `settings`.  Metrics: means of
    `judge_edit`; changed_colour and changed_shape, of those swaps alone; success, the share of cases that are changed
    with a psnr_outside of at least `least`.
    world: a World's keyword arguments.  cases: how many, of which the oracle reads all that the source's caption claims
      in the source's picture and nothing else; they are the first such of at most `tries` captions, and the protocol
      says how many were tried.  prompt_seed: of the captions.  seed: of the noise.
    settings: of cross_replace, self_replace, and the threshold of LocalBlend on the swapped words, None for no blend.
    factor, blend_start: of LocalBlend.  margin: of `judge_edit`.
    Everything is drawn by one compiled program.
    """

    world: dict[str, Any]
    cases: int = 64
    tries: int = 512
    prompt_seed: int = 0
    seed: int = 0
    settings: tuple[tuple[float, float, float | None], ...] = (
        (0.8, 0.4, None), (0.8, 0.4, 0.3), (0.8, 0.4, 0.6), (0.4, 0.2, 0.6), (0.0, 0.0, 0.6)
    )  # fmt: skip
    factor: int = 2
    blend_start: float = 0.2
    margin: int = 2
    least: float = 25.0

    def __call__(self, system) -> dict[str, Any]:
        world = World(**self.world)
        tried = swaps(world, self.tries, seed=self.prompt_seed)
        draw = _Drawer(system, self)
        resample = dict(cross_replace=0.0, self_replace=0.0, threshold=OPEN)
        sources, count = self._sources(draw, tried, world)
        scores = {}
        for row, setting in [("resample", resample), *(_setting(*each) for each in self.settings)]:
            edited = draw.edits(tried, list(sources), setting)
            scores[row] = self._scores([(tried[i], sources[i], edited[i]) for i in sources], world)
        more = dict(judge="vgen.metrics.text_edit_eval.judge_edit", cases=len(sources), tried=count)
        return {"protocol": protocol(system, self, **more), "scores": scores}

    def _sources(self, draw, tried, world):
        """({place in `tried`: its picture} of the cases, how many were looked at)."""
        sources, count = {}, 0
        for rows, new in draw.system.batches(len(tried), draw.size):
            pictures = draw.sources(tried, rows)
            for i, picture in zip(rows[:new].tolist(), pictures):
                if len(sources) == self.cases:
                    return sources, count
                count += 1
                if _exact(picture, tried[i], world):
                    sources[i] = picture
        return sources, count

    def _scores(self, cases, world) -> Mapping[str, float]:
        found = [judge_edit(source, edited, swap, world, self.margin) for swap, source, edited in cases]
        scores = {key: _mean([each[key] for each in found]) for key in ("changed", "kept", "exact", "psnr_outside")}
        for kind in ("colour", "shape"):
            own = [each["changed"] for each, (swap, *_) in zip(found, cases) if swap.attribute == kind]
            scores[f"changed_{kind}"] = _mean(own)
        both = [each["changed"] and each["psnr_outside"] >= self.least for each in found]
        return scores | dict(success=_mean(both))


def _exact(picture, swap: Swap, world: World) -> bool:
    return judge(read(picture, world), swap.claims).scene_exact[0]


class _Drawer:
    """Sources, and edits with their sources, by one program."""

    def __init__(self, system, study: PromptToPromptStudy):
        name = system.names[-1]
        task = dataclasses.replace(system.tasks[name], method=None, picture=None)
        self.system, self.params, self.knobs = system, system.params[name], system.knobs(name, {})
        self.size = max(2, system.batch_size - system.batch_size % 2)
        self.key = jax.random.key(study.seed)
        self.shape = task.latent_shape()

        def draw(params, key, conds, knobs, alignment, words, setting, start):
            setting = dict(setting)
            blend = LocalBlend(words, study.factor, setting.pop("threshold"), study.blend_start)
            edit = prompt_to_prompt(alignment, knobs["steps"], blend=blend, **setting)
            return task.sample(params, key, conds, edit=edit, start=start, **knobs)["image_out"]

        self._draw = jax.jit(draw)

    def _pictures(self, texts, cases, source, setting) -> np.ndarray:
        """Pictures of texts; cases: numbers that the noise of each follows from."""
        conds = _told(self.system, texts)
        tokens, mask = conds["text"], conds["text_mask"]
        noise = [jax.random.normal(jax.random.fold_in(self.key, int(case)), self.shape) for case in cases]
        plan = align.replace(tokens, mask, source), align.swapped(tokens, mask, source)
        setting = {name: np.float32(value) for name, value in setting.items()}
        with jax.set_mesh(self.system.run.mesh):
            drawn = self._draw(self.params, self.key, conds, self.knobs, *plan, setting, jnp.stack(noise))
        return whole(drawn)

    def sources(self, tried, rows) -> np.ndarray:
        """Plain pictures of `size` captions."""
        setting = dict(cross_replace=0.0, self_replace=0.0, threshold=OPEN)
        return self._pictures([tried[i].caption for i in rows], rows, list(range(self.size)), setting)

    def edits(self, tried, cases, setting) -> dict[int, np.ndarray]:
        """{case: its edited picture}."""
        half, found = self.size // 2, {}
        for rows, new in self.system.batches(len(cases), half):
            chosen = [cases[row] for row in rows]
            texts = [tried[i].caption for i in chosen] + [tried[i].edited for i in chosen]
            pictures = self._pictures(texts, chosen * 2, [*range(half)] * 2, setting)
            found |= dict(zip(chosen[:new], pictures[half:]))
        return found


# ---------------------------------------------------------------------------------------------------- MultiDiffusion


@dataclasses.dataclass(frozen=True)
class MultiDiffusionStudy:
    """Pictures `times` as wide as the system's, from windows that overlap, against as many pictures side by side.

    Rows: "separate" for windows that do not overlap, which are pictures of their own, and "windows_<n>".
    seam: see `seam`, at the windows' borders.  scene: the share of the squares, one every half picture, that the oracle
    reads as scenes of the world, see `vgen.metrics.scene_eval.is_scene`.
    world: a World's keyword arguments.  panoramas: how many, of as many captions of `split`; seed: of the noise.
    overlaps: how many strides a window is wide, 1 for "separate"; each compiles once.
    """

    world: dict[str, Any]
    panoramas: int = 32
    times: int = 4
    overlaps: tuple[int, ...] = (1, 2, 4)
    split: str = "train"
    prompt_seed: int = 0
    seed: int = 0

    def __call__(self, system) -> dict[str, Any]:
        world, name = World(**self.world), system.names[-1]
        task, scores = system.tasks[name], {}
        told = _told(system, prompts(world, self.panoramas, self.split, self.prompt_seed))
        height, width, _ = task.latent_shape()
        for overlap in self.overlaps:
            stride = max(1, width // overlap)
            edit = multidiffusion((height, width), (height, stride))
            draw = sampler(system, told=True, method=edit, picture=(task.size, self.times * task.size))
            pictures = draw(told, self.seed)
            places, begins = task.size // height, windows(self.times * width, width, stride)
            borders = {each * places for begin in begins for each in (begin, begin + width)}
            row = "separate" if overlap == 1 else f"windows_{len(begins)}"
            scores[row] = dict(seam=seam(pictures, sorted(borders), places), scene=self._scene(pictures, world))
        return {"protocol": protocol(system, self, judge="vgen.metrics.scene_eval.is_scene"), "scores": scores}

    def _scene(self, pictures, world: World) -> float:
        side = pictures.shape[1]
        crops = [pictures[:, :, x : x + side] for x in range(0, pictures.shape[2] - side + 1, side // 2)]
        return quality(np.concatenate(crops), world)["scene"]


def seam(pictures: UInt8[np.ndarray, "n h w 3"], borders: Sequence[int], places: int = 1) -> float:
    """The mean absolute difference of neighbouring pixels across borders, over that elsewhere: 1 is no seam at all.

    borders: columns of pixels, each the first behind a border.  places: pixels per place of the denoiser's x; elsewhere
    means between two places that no border parts, because a decoder of latents has an edge of its own at each.
    """
    columns = np.arange(places, pictures.shape[2], places)
    wide = pictures.astype(np.float32)
    across = np.abs(wide[:, :, columns] - wide[:, :, columns - 1]).mean((0, 1, 3))
    at = np.isin(columns, borders)
    return _mean(across[at]) / _mean(across[~at])
