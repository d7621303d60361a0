"""The embedded world: an endless, deterministic, licence-free set of pictures with captions and complete ground truth.

A scene is a background and one to four objects. `scene(world, index, size, split)` draws scene number `index`; the
same index is the same scene at every size, because geometry lives in unit coordinates (x to the right, y down, both
in [0, 1]). `World` narrows every vocabulary, so one world serves from a minutes-long run on a CPU to a hard
benchmark.

Splits: "train" never shows a held-out (colour, shape) pair; every "heldout" scene shows at least one, so that captions
of that split ask for combinations which no training picture contains. `vgen.data.scene_oracle.read` is the way back.
"""

import dataclasses
import functools
import itertools
import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image

from vgen.data import scene_text
from vgen.data.preprocess import CLIP
from vgen.data.scene_draw import SceneObject, render, truths
from vgen.data.scene_text import Claims, Thing

SPLITS = ("train", "heldout")
LABELS = ("", "pair", "colour", "shape")
DIAMETERS = {"small": 0.28, "medium": 0.35, "large": 0.43}  # of the picture's side, with one or two objects
BORDER = 0.03  # least distance between an object and the picture's edge
GAP = 0.06  # least distance between two objects
DOMINANCE = 1.4  # a relation is stated when its axis separates the centres this much more than the other axis


@dataclasses.dataclass(frozen=True)
class World:
    """What may appear in a scene; every vocabulary may be narrowed (sequences become tuples).

    heldout: (colour, shape) pairs kept out of the "train" split; None picks about 15 % of all pairs, the same ones
      every time, so that every colour and every shape still occurs in training.
    occlusion: objects may cover a part of one another (the oracle does not read such scenes).
    lattice: 0, objects stand anywhere and vary a little around their size; n, centres lie on multiples of 1 / n and
      sizes are exact, for one or two objects: far fewer pictures, for runs of minutes.
    canonical: share of the relations "right of" and "below" that are told from the other object, as "left of" and
      "above". Told at random (0), neither order nor relation alone says anything of places, and small models are long
      at a loss; with most told one way they learn that first, and then the exceptions.
    seed: another seed is another endless set of scenes.

    Raises:
      ValueError: a word outside the vocabulary, an empty vocabulary, a bad template, or counts that cannot be drawn.
    """

    shapes: Sequence[str] = scene_text.SHAPES
    colours: Sequence[str] = scene_text.COLOURS
    textures: Sequence[str] = scene_text.TEXTURES
    sizes: Sequence[str] = scene_text.SIZES
    backgrounds: Sequence[str] = scene_text.BACKGROUNDS
    relations: Sequence[str] = scene_text.RELATIONS
    templates: Sequence[str] = scene_text.TEMPLATES
    min_objects: int = 1
    max_objects: int = 4
    heldout: Sequence[Sequence[str]] | None = None
    occlusion: bool = False
    lattice: int = 0
    canonical: float = 0.0
    seed: int = 0

    def __post_init__(self):
        words = ("shapes", "colours", "textures", "sizes", "backgrounds", "relations")
        for name in words:
            chosen, known = tuple(getattr(self, name)), getattr(scene_text, name.upper())
            object.__setattr__(self, name, chosen)
            if unknown := [word for word in chosen if word not in known]:
                raise ValueError(f"World.{name} has unknown {unknown}; accepted: {', '.join(known)}")
            if len(set(chosen)) != len(chosen) or (not chosen and name != "relations"):
                raise ValueError(f"World.{name} must name each word once and at least one, got {chosen}")
        object.__setattr__(self, "templates", tuple(self.templates))
        if not self.templates or any(t.count("{}") != 1 for t in self.templates):
            raise ValueError(f"World.templates must each contain '{{}}' once, got {self.templates}")
        if not 1 <= self.min_objects <= self.max_objects <= 4:
            raise ValueError(
                f"World needs 1 <= min_objects <= max_objects <= 4, got {self.min_objects}, {self.max_objects}"
            )
        if not 0 <= self.canonical <= 1 or (self.canonical and not {"left of", "above"} <= set(self.relations)):
            raise ValueError(
                f"World.canonical must be in [0, 1], and needs the relations 'left of' and 'above' where it is not 0, "
                f"got {self.canonical} with {self.relations}"
            )
        held = _heldout(self.colours, self.shapes) if self.heldout is None else tuple((c, s) for c, s in self.heldout)
        object.__setattr__(self, "heldout", held)
        if unknown := [pair for pair in held if pair[0] not in self.colours or pair[1] not in self.shapes]:
            raise ValueError(f"World.heldout has {unknown}, which are not (colour, shape) pairs of this world")
        if len(self.training) < self.max_objects:
            raise ValueError(
                f"World has {len(self.training)} pairs for training, fewer than max_objects={self.max_objects}"
            )
        if {c for c, _ in self.training} != set(self.colours) or {s for _, s in self.training} != set(self.shapes):
            raise ValueError(
                f"World.heldout={held} leaves a colour or a shape without any training pair; hold out fewer"
            )
        if self.lattice:
            self._check_lattice()

    def _check_lattice(self):
        if self.lattice < 0 or self.max_objects > 2 or self.occlusion:
            raise ValueError(
                f"World.lattice={self.lattice} needs a positive number, max_objects of 1 or 2 and no occlusion, got "
                f"max_objects={self.max_objects}, occlusion={self.occlusion}"
            )
        large = 0.5 * max(DIAMETERS[size] for size in self.sizes)
        room = _lattice_pairs(self.lattice, large, large, 0) if self.max_objects == 2 else _lattice(self.lattice, large)
        if not room:
            raise ValueError(
                f"World.lattice={self.lattice} has no place for {self.max_objects} objects of the largest size; "
                "take a finer lattice, such as 8"
            )

    @functools.cached_property
    def training(self) -> tuple[tuple[str, str], ...]:
        """The (colour, shape) pairs of the "train" split."""
        return tuple(p for p in itertools.product(self.colours, self.shapes) if p not in set(self.heldout))


def _heldout(colours: Sequence[str], shapes: Sequence[str], share: float = 0.15) -> tuple[tuple[str, str], ...]:
    """About `share` of all pairs in a fixed pseudo-random order, spread evenly over colours and shapes."""
    if len(colours) < 2 or len(shapes) < 2:
        return ()
    count = max(1, round(share * len(colours) * len(shapes)))
    room = {c: math.ceil(count / len(colours)) for c in colours} | {s: math.ceil(count / len(shapes)) for s in shapes}
    held = []
    for pair in sorted(itertools.product(colours, shapes), key=lambda p: zlib.crc32(f"{p[0]} {p[1]}".encode())):
        if len(held) < count and room[pair[0]] and room[pair[1]]:
            held.append(pair)
            room[pair[0]] -= 1
            room[pair[1]] -= 1
    return tuple(held)


FULL = World()  # the whole vocabulary


# ---------------------------------------------------------------------------------------------------------- the scene


def scene(world: World, index: int, size: int, split: str = "train", truth: bool = False) -> dict[str, Any]:
    """Draw scene `index` of a split.

    Args:
      size: side in pixels, 16 to 512. The scene does not depend on it.
      split: "train" or "heldout".
      truth: also return what is known of every pixel.

    Returns:
      image uint8 [size, size, 3]; caption str; claims (what the caption states); objects (tuple of SceneObject, back to
      front); background (its name). With `truth` also: masks bool [n, size, size], visible part of each object; boxes
      float32 [n, 4], (x0, y0, x1, y1) in pixels around each mask; depth int32 [n], 0 is nearest; edges uint8 [size,
      size], 255 on the objects' visible rims; landmarks, a tuple of float32 [k, 2] in pixels (x, y): centre, then
      corners (extreme points for round shapes).

    Raises:
      ValueError: size, split or index out of range.
    """
    if not 16 <= size <= 512:
        raise ValueError(f"scene size must be 16 to 512 pixels, got {size}")
    objects, background, claims, caption = compose(world, index, split)
    image, masks = render(objects, background, size, masks=truth)
    example = {"image": image, "caption": caption, "claims": claims, "objects": objects, "background": background}
    return example | truths(objects, masks) if truth else example


def compose(world: World, index: int, split: str = "train") -> tuple[tuple[SceneObject, ...], str, Claims, str]:
    """Decide scene `index` without drawing it: objects, background, claims and caption."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; accepted: {', '.join(SPLITS)}")
    if index < 0:
        raise ValueError(f"scene index must not be negative, got {index}")
    # One draw of uniforms per scene: many small calls to a generator would cost more than the picture.
    rng = np.random.default_rng((world.seed, SPLITS.index(split), index))
    dice = iter(rng.random(192).tolist())
    objects = _layout(world, split, dice)
    background = _pick(world.backgrounds, dice)
    claims = _describe(world, objects, background, dice)
    return objects, background, claims, scene_text.write(claims, _pick(world.templates, dice))


def prompts(world: World, n: int, split: str = "train", seed: int = 0) -> list[str]:
    """`n` distinct captions of a split's scenes, from indices that no data set of fewer than 2^40 scenes reaches.

    Raises:
      ValueError: the world has too few different captions.
    """
    found: dict[str, None] = {}
    start = (seed + 1) << 40
    for index in range(start, start + 50 * n + 1000):
        if len(found) == n:
            return list(found)
        found[compose(world, index, split)[3]] = None
    raise ValueError(
        f"found only {len(found)} different captions of split {split!r}, {n} were asked for; ask for fewer"
    )


@dataclasses.dataclass(frozen=True)
class Scenes:
    """A random-access source of `count` scenes: source[i] is {"image": uint8 [size, size, 3], "caption": str}.

    world: a World or its keyword arguments.
    labels: also "label", int, the class of the first object among `classes(world, labels)`; "" for none.
    masks: also "masks", bool [world.max_objects, size, size]: the visible part of each object, then empty ones.
    closeup: share of the pictures, of worlds of one object, that are a `close_up` instead.
    """

    size: int
    split: str = "train"
    count: int = 1_000_000
    world: World | Mapping[str, Any] = FULL
    labels: str = ""
    masks: bool = False
    closeup: float = 0.0

    def __post_init__(self):
        if not isinstance(self.world, World):
            object.__setattr__(self, "world", World(**self.world))
        if not 0 <= self.closeup <= 1 or (self.closeup and (self.masks or self.world.max_objects > 1)):
            raise ValueError(
                "scenes: closeup must be in [0, 1] and is of worlds of one object, without masks; got "
                f"closeup={self.closeup}, masks={self.masks}, max_objects={self.world.max_objects}"
            )
        if self.labels:
            classes(self.world, self.labels)  # or ValueError

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -self.count <= index < self.count:
            raise IndexError(f"scene {index} is outside a source of {self.count}")
        index = int(index) % self.count
        dice = np.random.default_rng((self.world.seed, 2 + SPLITS.index(self.split), index)) if self.closeup else None
        near = dice is not None and dice.random() < self.closeup
        example = scene(self.world, index, self.size, self.split, truth=self.masks or near)
        if near:
            example["image"] = close_up(example["image"], example["masks"][0], dice.uniform(1, 2), dice.random() < 0.5)
        label = {}
        if self.masks:
            none = self.world.max_objects - len(example["objects"])
            label["masks"] = np.pad(example["masks"], ((0, none), (0, 0), (0, 0)))
        if self.labels:
            first = example["objects"][0]
            said = first.colour if self.labels != "shape" else "", first.shape if self.labels != "colour" else ""
            label["label"] = classes(self.world, self.labels).index(said)
        return {"image": example["image"], "caption": example["caption"]} | label


def close_up(
    image: UInt8[np.ndarray, "s s 3"], mask: Bool[np.ndarray, "s s"], wider: float, alone: bool
) -> UInt8[np.ndarray, "s s 3"]:
    """The square about a mask, `wider` times as wide as the longer side of its box, at the size of the picture.

    What is outside of the picture has CLIP's mean colour, and what is outside of the mask where it is `alone`: as
    `vgen.models.sam_prompt.crops` shows objects to a CLIP.
    """
    plain = np.rint(255 * np.asarray(CLIP.mean)).astype(np.uint8)
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    side = wider * (1 + max(np.ptp(rows), np.ptp(columns)))
    middle = [(each[0] + each[-1] + 1) / 2 for each in (columns, rows)]
    shown = np.where(mask[..., None], image, plain) if alone else image
    around = len(image)  # no square reaches farther: it is at most twice as wide as the picture
    canvas = np.broadcast_to(plain, (3 * around, 3 * around, 3)).copy()
    canvas[around : 2 * around, around : 2 * around] = shown
    box = [around + x + sign * side / 2 for sign in (-1, 1) for x in middle]
    cut = Image.fromarray(canvas).resize((around, around), Image.Resampling.BILINEAR, box=box)
    return np.asarray(cut)


def classes(world: World, labels: str) -> tuple[tuple[str, str], ...]:
    """The (colour, shape) that each class of a world's objects says, "" where it says nothing.

    labels: "pair" (class colour * number of shapes + shape, of their places in the world), "colour" or "shape".
    Raises ValueError for another one.
    """
    if labels not in LABELS[1:]:
        raise ValueError(f"scenes: labels must be one of {', '.join(LABELS[1:])}, got {labels!r}")
    colours = world.colours if labels != "shape" else ("",)
    return tuple(itertools.product(colours, world.shapes if labels != "colour" else ("",)))


def _pick(words: Sequence[Any], dice) -> Any:
    return words[int(next(dice) * len(words))]


def crowding(n: int) -> float:
    """Factor on all diameters in a scene of `n` objects."""
    return 1.0 if n <= 2 else 0.8


def _layout(world: World, split: str, dice) -> tuple[SceneObject, ...]:
    n = world.min_objects + int(next(dice) * (world.max_objects - world.min_objects + 1))
    if split == "heldout" and not world.heldout:
        raise ValueError("this world holds out no (colour, shape) pair, so it has no 'heldout' split; use 'train'")
    pool = list(world.training if split == "train" else world.training + world.heldout)
    pairs = []
    if split == "heldout":
        pairs.append(_pick(world.heldout, dice))
        pool.remove(pairs[0])
    while len(pairs) < n:
        pairs.append(pool.pop(int(next(dice) * len(pool))))
    turn = int(next(dice) * n)  # the held-out pair may stand anywhere in the list
    pairs = pairs[turn:] + pairs[:turn]
    words = [(_pick(world.textures, dice), _pick(world.sizes, dice)) for _ in pairs]
    radii = [0.5 * DIAMETERS[size] * crowding(n) * (0.96 + 0.04 * next(dice)) for _, size in words]
    if world.lattice:
        radii = [0.5 * DIAMETERS[size] for _, size in words]
        places = _on_lattice(world, radii, dice)
    elif n == 1:
        places = [_somewhere(radii[0], dice)]
    elif n == 2:
        places = _two(world, radii, dice)
    else:
        places = _several(world, radii, dice)
    return tuple(
        SceneObject(shape, colour, texture, size, x, y, radius)
        for (colour, shape), (texture, size), radius, (x, y) in zip(pairs, words, radii, places, strict=True)
    )


def _somewhere(radius: float, dice) -> tuple[float, float]:
    low, span = BORDER + radius, 1 - 2 * (BORDER + radius)
    return low + span * next(dice), low + span * next(dice)


def _axes(world: World) -> list[int]:
    """The axes along which this world's relations speak, 0 for x and 1 for y; both where it has no relations."""
    if not world.relations:
        return [0, 1]
    ways = (("left of", "right of"), ("above", "below"))
    return [axis for axis, words in enumerate(ways) if set(words) & set(world.relations)]


def _two(world: World, radii: Sequence[float], dice) -> list[tuple[float, float]]:
    """Two places whose relation is clear: apart along one axis, less so along the other."""
    a, b = radii
    gap = -0.7 * min(radii) if world.occlusion else GAP
    axis = _pick(_axes(world), dice)
    free = 1 - 2 * BORDER - gap - 2 * (a + b)
    first, last = sorted((next(dice), next(dice)))
    p = BORDER + free * first + a
    q = BORDER + free * last + gap + 2 * a + b
    reach = (q - p) / DOMINANCE
    s = BORDER + a + (1 - 2 * (BORDER + a)) * next(dice)
    low, high = max(BORDER + b, s - reach), min(1 - BORDER - b, s + reach)
    t = low + (high - low) * next(dice)
    places = [(p, s), (q, t)] if axis == 0 else [(s, p), (t, q)]
    if next(dice) < 0.5:  # mirrored, so that either object may come first
        places = [tuple(1 - v if i == axis else v for i, v in enumerate(place)) for place in places]
    return places


def _on_lattice(world: World, radii: Sequence[float], dice) -> list[tuple[float, float]]:
    """One or two places on the lattice, every choice as likely; of two, the relation is as clear as in `_two`."""
    if len(radii) == 1:
        return [_pick(_lattice(world.lattice, radii[0]), dice)]
    return list(_pick(_lattice_pairs(world.lattice, *radii, _pick(_axes(world), dice)), dice))


@functools.cache
def _lattice(n: int, radius: float) -> tuple[tuple[float, float], ...]:
    low = BORDER + radius
    inside = [i / n for i in range(n + 1) if low <= i / n <= 1 - low]
    return tuple(itertools.product(inside, inside))


@functools.cache
def _lattice_pairs(n: int, a: float, b: float, axis: int) -> tuple[tuple[tuple[float, float], ...], ...]:
    """Pairs of places for radii a and b, apart along `axis` (0: x), less so along the other."""

    def clear(p, q):
        along, across = abs(p[axis] - q[axis]), abs(p[1 - axis] - q[1 - axis])
        return along >= a + b + GAP and along >= DOMINANCE * across

    return tuple((p, q) for p in _lattice(n, a) for q in _lattice(n, b) if clear(p, q))


def _several(world: World, radii: Sequence[float], dice) -> list[tuple[float, float]]:
    """Places that keep their distance, found by trial; one quadrant each when no trial succeeds."""
    n = len(radii)
    for _ in range(12):
        places = []
        for radius in radii:
            x, y = _somewhere(radius, dice)
            for (u, v), other in zip(places, radii, strict=False):
                gap = -0.7 * min(radius, other) if world.occlusion else GAP
                if max(abs(x - u), abs(y - v)) < radius + other + gap:
                    break
            else:
                places.append((x, y))
                continue
            break
        if len(places) == n:
            return places
    quadrants = [(0, 0), (1, 0), (0, 1), (1, 1)]
    places = []
    for radius in radii:
        column, row = quadrants.pop(int(next(dice) * len(quadrants)))
        slack = 0.5 - BORDER - GAP / 2 - 2 * radius
        x, y = (BORDER + radius + slack * next(dice) for _ in range(2))
        places.append((1 - x if column else x, 1 - y if row else y))
    return places


def relation(a: SceneObject, b: SceneObject, dominance: float = DOMINANCE) -> str | None:
    """The relation of a to b along the dominant axis of their centres, or None where neither axis clearly dominates."""
    dx, dy = b.x - a.x, b.y - a.y
    if abs(dx) >= dominance * abs(dy) and dx:
        return "left of" if dx > 0 else "right of"
    if abs(dy) >= dominance * abs(dx) and dy:
        return "above" if dy > 0 else "below"
    return None


def _describe(world: World, objects: Sequence[SceneObject], background: str, dice) -> Claims:
    """Choose what the caption states: colour and shape always, texture unless solid, size and background sometimes."""
    waiting = sorted(objects, key=lambda _: next(dice))
    order, relations = [], []
    while waiting:
        a = waiting.pop(0)
        for b in waiting:
            pair = (a, b)
            found = relation(a, b, DOMINANCE - 1e-9)  # rounding can push a pair laid out at the limit just below it
            if found and found not in world.relations:
                found = scene_text.OPPOSITE[found]
                pair = (b, a)
            elif world.canonical and found in ("right of", "below") and next(dice) < world.canonical:
                found = scene_text.OPPOSITE[found]
                pair = (b, a)
            if found in world.relations:
                relations.append((len(order), found, len(order) + 1))
                order += pair
                waiting = [o for o in waiting if o is not a and o is not b]
                break
        else:
            order.append(a)
    things = []
    for o in order:
        size = o.size if next(dice) < 0.4 and len(world.sizes) > 1 else None
        things.append(Thing(o.colour, o.shape, None if o.texture == "solid" else o.texture, size))
    stated = background if next(dice) < 0.3 and len(world.backgrounds) > 1 else None
    return Claims(tuple(things), tuple(relations), stated)
