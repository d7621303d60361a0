"""The oracle of the embedded world: from pixels back to the list of objects.

`read` uses nothing but the picture and the vocabulary. In order: estimate the background; cut out what differs from
it; split that into connected blobs; per blob name the colour by vote, un-mix opacity and ink, compare the opacity
with exact antialiased templates of every shape at the size and place that the blob's area and centroid imply, and the
ink with every texture. A blob that resembles no template is counted as unknown instead of being given the nearest
name, so that noise, smears and shuffled patches read as nothing.
"""

import functools
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image

from vgen.data.scene_draw import INK, PALETTE, PERIODS, SceneObject, backdrop, ink, outline_mask
from vgen.data.scenes import DIAMETERS, FULL, World, crowding

READ_SIZE = 128  # larger pictures are averaged down to about this side
BACKGROUND_TOLERANCE = 45.0  # RGB distance within which a pixel may be background
COLOUR_TOLERANCE = 80.0  # RGB distance at which a pixel no longer votes for a colour
MIN_VOTES = 0.12  # of a blob's area, for its colour to count as known
MIXED = 32.0  # RGB distance from every mixture of the background with one tone that makes a pixel foreground
MIN_FIT = 0.8  # soft intersection over union with the best template, for a shape to count as known
MIN_OBJECT = 0.68  # the same, for a blob to count as an object at all, of unknown shape
MIN_TEXTURE = 0.35  # correlation of ink and pattern, for a texture to count as known
SOLID = 0.12  # largest fraction of ink in a solid object
SOFTNESS = (1.0, 1.6, 2.4)  # widths of the box filter that templates are seen through, in pixels of a 32 px picture
_CELLS, _REACH = 512, 1.6  # resolution and half-width in radii of the template tables


class Reading(NamedTuple):
    """What the oracle sees.

    objects: the recognised ones, from the top down; texture may be "unknown", and so may shape, of an almost-object.
      Empty where more blobs are unknown than recognised: such a picture is no scene.
    background: its name, or None where no background of the world covers a fair part of the picture.
    unknown: how many further blobs are in the picture that are no object of this world.
    """

    objects: tuple[SceneObject, ...]
    background: str | None
    unknown: int


def read(image: UInt8[np.ndarray, "h w c"] | Float[np.ndarray, "h w c"], world: World = FULL) -> Reading:
    """Recover the objects of a picture.

    Args:
      image: uint8, or float in [-1, 1]; square, 16 px or more (figures are guaranteed from 32 px).
      world: the vocabulary to read with. Objects must not overlap.

    Raises:
      ValueError: not a square picture of at least 16 px.
    """
    if image.ndim != 3 or image.shape[0] != image.shape[1] or image.shape[0] < 16 or image.shape[2] != 3:
        raise ValueError(f"the oracle reads square pictures [s, s, 3] with s >= 16, got shape {image.shape}")
    pixels = _pixels(image)
    found = _background(pixels, world)
    if found is None:
        return Reading((), None, 0)
    name, back = found
    labels, count = label(_foreground(pixels, back, world))
    blobs = _blobs(labels, count, least=0.35 * _least_area(world, len(pixels)))
    labels = labels * np.isin(labels, [blob[0] for blob in blobs])  # specks belong to nobody
    objects = [_recognise(pixels, back, labels, blob, len(blobs), world) for blob in blobs]
    known = tuple(o for o in objects if o is not None)
    unknown = len(objects) - len(known)
    return Reading(known if unknown <= len(known) else (), name, unknown)


def _pixels(image: np.ndarray) -> np.ndarray:
    """float32 [s, s, 3] in 0 to 255 with s <= READ_SIZE."""
    if image.dtype != np.uint8:
        image = np.rint((np.clip(np.nan_to_num(image, nan=-1.0), -1, 1) + 1) * 127.5).astype(np.uint8)
    if len(image) > READ_SIZE:
        image = np.asarray(Image.fromarray(image).resize((READ_SIZE, READ_SIZE), Image.Resampling.BOX))
    return image.astype(np.float32)


def _background(pixels: np.ndarray, world: World) -> tuple[str, np.ndarray] | None:
    """The background that explains most pixels, and its colour per row [s, 1, 3], shifted as those pixels are."""
    best = (0.0, "", None)
    for name in world.backgrounds:
        off = pixels - backdrop(name, len(pixels))  # [s, s, 3]
        distance = np.sqrt((off * off).sum(-1))
        near = distance < BACKGROUND_TOLERANCE
        score = np.maximum(0, 1 - distance / BACKGROUND_TOLERANCE).mean()
        if score > best[0]:
            best = (score, name, near)
    score, name, near = best
    if near is None or near.mean() < 0.3:
        return None
    back = backdrop(name, len(pixels))
    return name, back + np.median((pixels - back)[near], axis=0)


@functools.lru_cache(maxsize=16)
def _tones(world: World) -> np.ndarray:
    """The world's colours, then ink where it has textures; float32 [c, 3]."""
    tones = [PALETTE[c] for c in world.colours]
    return np.asarray(tones + [INK] * (world.textures != ("solid",)), np.float32)


def _foreground(pixels: np.ndarray, back: np.ndarray, world: World) -> np.ndarray:
    """Pixels that are not background with less than half of one tone over it.

    A fixed threshold on the distance from the background would widen strong colours until neighbours touch, and would
    tear textured objects where colour and ink happen to mix to the background's grey.
    """
    off = pixels - back
    axes = _tones(world) - back  # [s, c, 3]
    contrast = np.sqrt((axes * axes).sum(-1))  # [s, c]
    along = off @ (axes / contrast[..., None]).transpose(0, 2, 1)  # [s, s, c]
    nearest = along.argmax(-1)
    most = along.max(-1)
    aside = np.sqrt(np.maximum(0, (off * off).sum(-1) - most * most))
    half = most > 0.45 * np.take_along_axis(contrast, nearest, 1)
    if world.textures == ("solid",):
        return half
    return half | ((aside > MIXED) & ((off * off).sum(-1) > (2 * MIXED) ** 2))


def label(mask: np.ndarray) -> tuple[Int[np.ndarray, "h w"], int]:
    """4-connected components of a bool mask [h, w]: labels 1..count (0 elsewhere), and count.

    Union-find over the runs of each row.
    """
    height, width = mask.shape
    edges = np.diff(np.pad(mask, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    rows, starts = (a.tolist() for a in np.nonzero(edges == 1))
    ends = np.nonzero(edges == -1)[1].tolist()
    parent = list(range(len(rows)))
    above = 0  # the first run of the row before that may still touch
    for i, row in enumerate(rows):
        while rows[above] < row - 1 or (rows[above] == row - 1 and ends[above] <= starts[i]):
            above += 1
        j = above
        while j < i and rows[j] == row - 1 and starts[j] < ends[i]:
            parent[_root(parent, i)] = _root(parent, j)
            j += 1
    numbers: dict[int, int] = {}
    labels = np.zeros((height, width), np.int32)
    for i, row in enumerate(rows):
        labels[row, starts[i] : ends[i]] = numbers.setdefault(_root(parent, i), len(numbers) + 1)
    return labels, len(numbers)


def _root(parent: list[int], i: int) -> int:
    while parent[i] != i:
        parent[i] = i = parent[parent[i]]
    return i


def _least_area(world: World, size: int) -> float:
    """Area in pixels of the smallest object that this world draws."""
    radius = 0.5 * min(DIAMETERS[s] for s in world.sizes) * crowding(world.max_objects) * size
    return min(_table(s)[-1, -1] for s in world.shapes) * (2 * _REACH / _CELLS * radius) ** 2


def _blobs(labels: np.ndarray, count: int, least: float) -> list[tuple[int, int, int, int, int]]:
    """(label, top, bottom, left, right) of every component of at least `least` pixels."""
    areas = np.bincount(labels.ravel(), minlength=count + 1)
    blobs = []
    for number in range(1, count + 1):
        if areas[number] >= least:
            rows, columns = np.nonzero(labels == number)
            blobs.append((number, int(rows.min()), int(rows.max()) + 1, int(columns.min()), int(columns.max()) + 1))
    return blobs


def _recognise(pixels, back, labels, blob, count: int, world: World) -> SceneObject | None:
    """Name one blob, or None if it is no object of this world."""
    number, top, bottom, left, right = blob
    size, margin = len(pixels), 2 + len(pixels) // 64
    top, bottom = max(0, top - margin), min(size, bottom + margin)
    left, right = max(0, left - margin), min(size, right + margin)
    window, back, labels = pixels[top:bottom, left:right], back[top:bottom], labels[top:bottom, left:right]
    own, others = labels == number, (labels != number) & (labels > 0)
    colour = _colour(window[own], world)
    if colour is None:
        return None
    nearby = own
    for _ in range(margin):
        nearby = _grow(nearby)
    nearby = nearby & ~_grow(others)
    opacity, inked = _unmix(window - back, back, colour, world)
    if world.textures == ("solid",) or inked[own].mean() < SOLID:
        texture = "solid" if "solid" in world.textures else "unknown"
        opacity, _ = _unmix(window - back, back, colour, None)
    else:
        texture = ""
    opacity = opacity * nearby
    fit, shape, x, y, radius = _shape(opacity, max(1.0, size / 32), world)
    diameter = 2 * radius / size / crowding(count)
    sizes = world.sizes
    named = min(sizes, key=lambda s: abs(np.log(diameter / DIAMETERS[s])))
    if fit < MIN_OBJECT or not 0.8 < diameter / DIAMETERS[named] < 1.25:
        return None
    texture = texture or _texture(inked, opacity, x, y, radius, world)
    shape = shape if fit >= MIN_FIT else "unknown"
    return SceneObject(
        shape, colour, texture, named, float(left + x) / size, float(top + y) / size, float(radius) / size
    )


def _colour(inside: np.ndarray, world: World) -> str | None:
    """The colour that explains most of the pixels [m, 3], each as that colour mixed with ink (pure if solid)."""
    tones = np.asarray([PALETTE[c] for c in world.colours], np.float32) - np.float32(INK)
    off = inside[:, None] - np.float32(INK)  # [m, 1, 3]
    share = np.clip((off * tones).sum(-1) / (tones * tones).sum(-1), 0, 1)  # [m, c]
    if world.textures == ("solid",):
        share = np.ones_like(share)
    off = off - share[..., None] * tones
    votes = (share * np.maximum(0, 1 - np.sqrt((off * off).sum(-1)) / COLOUR_TOLERANCE)).sum(0)
    best = int(votes.argmax())
    return world.colours[best] if votes[best] >= MIN_VOTES * len(inside) else None


def _unmix(off: np.ndarray, back: np.ndarray, colour: str, world: World | None) -> tuple[np.ndarray, np.ndarray]:
    """Opacity and ink fraction per pixel, by least squares of pixel = back + a (colour - back) + b (ink - back).

    Without a world the object is taken as solid (b = 0).
    """
    p = np.asarray(PALETTE[colour], np.float32) - back  # [h, 1, 3]
    pp, po = (p * p).sum(-1), (p * off).sum(-1)
    if world is None:
        return np.clip(po / pp, 0, 1), np.zeros(off.shape[:2], np.float32)
    q = np.asarray(INK, np.float32) - back
    qq, pq, qo = (q * q).sum(-1), (p * q).sum(-1), (q * off).sum(-1)
    determinant = pp * qq - pq * pq
    a = np.maximum(0, (po * qq - qo * pq) / determinant)
    b = np.maximum(0, (qo * pp - po * pq) / determinant)
    total = np.maximum(1, a + b)
    return (a + b) / total, b / total


def _grow(mask: np.ndarray) -> np.ndarray:
    """`mask` and its four neighbours."""
    grown = mask.copy()
    grown[1:] |= mask[:-1]
    grown[:-1] |= mask[1:]
    grown[:, 1:] |= mask[:, :-1]
    grown[:, :-1] |= mask[:, 1:]
    return grown


# --------------------------------------------------------------------------------------------------------- templates


@functools.cache
def _table(name: str) -> np.ndarray:
    """Summed-area table [cells + 1, cells + 1] of a shape or a texture's ink over [-_REACH, _REACH]^2 radii."""
    if name in PERIODS:
        u = (np.arange(_CELLS) + 0.5) * (2 * _REACH / _CELLS) - _REACH
        cells = ink(name, u[None, :], u[:, None])
    else:
        middle = _CELLS / 2
        cells = np.asarray(outline_mask(name, _CELLS, _CELLS, middle, middle, middle / _REACH)) > 127
    return np.pad(cells.astype(np.float64).cumsum(0).cumsum(1), ((1, 0), (1, 0)))


@functools.cache
def _moments(shape: str) -> tuple[float, float, float]:
    """Area in radii^2 and centroid (x, y) in radii of a shape."""
    cell = 2 * _REACH / _CELLS
    table = _table(shape)
    u = (np.arange(_CELLS) + 0.5) * cell - _REACH
    columns, rows = np.diff(table[-1]), np.diff(table[:, -1])
    return table[-1, -1] * cell**2, columns @ u / table[-1, -1], rows @ u / table[-1, -1]


def coverage(name: str, x: np.ndarray, y: np.ndarray, width: float) -> np.ndarray:
    """Mean of a table over boxes of side `width` centred at columns x [w], rows y [h] (in radii): [h, w] in [0, 1]."""
    table, scale = _table(name), _CELLS / (2 * _REACH)
    half = width / 2
    rows = table[_corner(y + half)] - table[_corner(y - half)]
    return (rows[:, _corner(x + half)] - rows[:, _corner(x - half)]) / (width * scale) ** 2


def _corner(at: np.ndarray) -> np.ndarray:
    """Index into a table of a coordinate in radii."""
    return np.minimum(np.maximum((at + _REACH) * (_CELLS / (2 * _REACH)) + 0.5, 0), _CELLS).astype(np.int32)


class _Fit(NamedTuple):
    """How well a shape explains an opacity (0 to 1), and the centre and radius it has then, in pixels of the window."""

    fit: float
    shape: str
    x: float
    y: float
    radius: float


def _shape(opacity: np.ndarray, blur: float, world: World) -> _Fit:
    """The best fit of any shape: all of them sharp, then the three best also soft; `blur` scales the softness."""
    likely = sorted((_fit(opacity, shape, 1.0) for shape in world.shapes), reverse=True)[:3]
    return max(likely + [_fit(opacity, each.shape, softness * blur) for each in likely for softness in SOFTNESS])


def _fit(opacity: np.ndarray, shape: str, softness: float) -> _Fit:
    """Soft intersection over union of an opacity [h, w] with a shape of the same area and centroid."""
    height, width = opacity.shape
    columns, rows = np.arange(width) + 0.5, np.arange(height) + 0.5
    mass = float(opacity.sum()) + 1e-6
    area, mx, my = _moments(shape)
    radius = np.sqrt(mass / area)
    x = opacity.sum(0) @ columns / mass - mx * radius
    y = opacity.sum(1) @ rows / mass - my * radius
    template = coverage(shape, (columns - x) / radius, (rows - y) / radius, softness / radius)
    both = np.minimum(template, opacity).sum()
    return _Fit(float(both / (template.sum() + mass - both)), shape, float(x), float(y), float(radius))


def _texture(inked: np.ndarray, opacity: np.ndarray, x: float, y: float, radius: float, world: World) -> str:
    """The texture whose pattern correlates best with the ink inside the object: as it is drawn, else in any phase."""
    height, width = inked.shape
    u, v = (np.arange(width) + 0.5 - x) / radius, (np.arange(height) + 0.5 - y) / radius
    inside = (opacity > 0.9) & (np.hypot(u[None, :], v[:, None]) < 1.4)
    if not inside.any():
        return "unknown"
    seen = inked[inside] - inked[inside].mean()
    best = (MIN_TEXTURE, "unknown")
    for phases in (1, 4):
        for texture in world.textures:
            if texture == "solid":
                continue
            period = PERIODS[texture]
            shifts = np.arange(phases) * period / phases
            for du in shifts if texture != "striped" else shifts[:1]:
                for dv in shifts:
                    pattern = coverage(texture, _fold(u + du, period), _fold(v + dv, period), 1 / radius)[inside]
                    pattern -= pattern.mean()
                    match = pattern @ seen / (np.sqrt((pattern @ pattern) * (seen @ seen)) + 1e-6)
                    best = max(best, (float(match), texture))
        if best[0] > 0.75:
            break
    return best[1]


def _fold(u: np.ndarray, period: float) -> np.ndarray:
    """Coordinates moved by whole periods into [-period / 2, period / 2]."""
    return u - period * np.rint(u / period)
