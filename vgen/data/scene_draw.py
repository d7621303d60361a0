"""How the embedded world looks: colours, outlines, textures, and the painter of objects, pixels and truth."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image, ImageDraw

PALETTE = {
    "red": (215, 25, 35),
    "orange": (255, 125, 0),
    "yellow": (255, 225, 30),
    "green": (25, 150, 55),
    "cyan": (20, 200, 215),
    "blue": (35, 70, 220),
    "purple": (125, 40, 185),
    "pink": (245, 105, 190),
}
INK = (22, 22, 28)  # the second tone of every texture
BACKDROPS = {  # colour at the top and at the bottom
    "white": ((246, 246, 246), (246, 246, 246)),
    "grey": ((150, 150, 150), (150, 150, 150)),
    "beige": ((235, 215, 180), (235, 215, 180)),
    "mint": ((185, 235, 200), (185, 235, 200)),
    "sky": ((150, 200, 245), (232, 243, 252)),
    "dusk": ((200, 185, 235), (248, 222, 200)),
    "mist": ((178, 180, 186), (240, 240, 240)),
}
PERIODS = {"striped": 0.62, "dotted": 0.6, "checkered": 0.96}  # in radii


def _circle(radius: float, points: int = 72, start: float = 0.0, turn: float = 1.0) -> np.ndarray:
    angle = 2 * np.pi * (start + turn * np.arange(points) / points)
    return radius * np.stack([np.cos(angle), np.sin(angle)], -1)


def _star() -> np.ndarray:
    radius = np.where(np.arange(10) % 2, 0.46, 1.0)
    return _circle(1.0, 10, -0.25) * radius[:, None]


def _heart() -> np.ndarray:
    t = 2 * np.pi * np.arange(72) / 72
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([16 * np.sin(t) ** 3, -y], -1)


def _moon() -> np.ndarray:
    """A disc less a disc moved to the right: the outer arc, then the inner one backwards."""
    tip = 0.13  # both arcs end at this fraction of a turn
    x, y = np.cos(2 * np.pi * tip), np.sin(2 * np.pi * tip)
    shift = 0.52
    radius = np.hypot(x - shift, y)
    end = math.atan2(y, x - shift) / (2 * np.pi)
    outer = _circle(1.0, 60, tip, 1 - 2 * tip)
    inner = _circle(radius, 60, -end, -(1 - 2 * end)) + [shift, 0.0]
    return np.concatenate([outer, inner])


def _unit(*outlines: Any, extent: float = 1.0) -> tuple[np.ndarray, ...]:
    """Centre the first outline's box on 0 and scale its larger side to [-extent, extent]; holes follow."""
    first = np.asarray(outlines[0], float)
    low, high = first.min(0), first.max(0)
    return tuple((np.asarray(o, float) - (low + high) / 2) * (2 * extent / (high - low).max()) for o in outlines)


_BAR = 0.36
OUTLINES = {  # shape -> (outline, hole, ...), each [points, 2] within the unit square [-1, 1]^2
    "circle": _unit(_circle(1.0)),
    "square": _unit([(-1, -1), (1, -1), (1, 1), (-1, 1)], extent=0.88),
    "triangle": _unit([(0, -0.87), (1, 0.87), (-1, 0.87)]),
    "star": _unit(_star()),
    "diamond": _unit([(0, -1), (0.8, 0), (0, 1), (-0.8, 0)]),
    "cross": _unit(
        [(-_BAR, -1), (_BAR, -1), (_BAR, -_BAR), (1, -_BAR), (1, _BAR), (_BAR, _BAR)]
        + [(_BAR, 1), (-_BAR, 1), (-_BAR, _BAR), (-1, _BAR), (-1, -_BAR), (-_BAR, -_BAR)],
        extent=0.96,
    ),
    "ring": _unit(_circle(1.0), _circle(0.52)),
    "heart": _unit(_heart()),
    "moon": _unit(_moon()),
}


@dataclasses.dataclass(frozen=True)
class SceneObject:
    """One object: four words and its place. x, y, radius in unit coordinates; the object fits in (x, y) +- radius."""

    shape: str
    colour: str
    texture: str
    size: str
    x: float
    y: float
    radius: float


def ink(texture: str, u: np.ndarray, v: np.ndarray) -> Bool[np.ndarray, "..."]:
    """Where a texture shows INK instead of the object's colour; u, v: place from the centre in radii (broadcast)."""
    if texture == "solid":
        return np.zeros(np.broadcast_shapes(u.shape, v.shape), bool)
    period = PERIODS.get(texture)
    if texture == "striped":
        return np.broadcast_to(np.mod(v / period + 0.25, 1) < 0.5, np.broadcast_shapes(u.shape, v.shape))
    if texture == "dotted":
        return (np.mod(u / period + 0.5, 1) - 0.5) ** 2 + (np.mod(v / period + 0.5, 1) - 0.5) ** 2 < 0.3**2
    if texture == "checkered":
        return (np.mod(u / period, 1) < 0.5) != (np.mod(v / period, 1) < 0.5)
    raise ValueError(f"unknown texture {texture!r}; accepted: solid, {', '.join(PERIODS)}")


def backdrop(name: str, size: int) -> np.ndarray:
    """A background's colours from top to bottom, float32 [size, 1, 3] in 0 to 255."""
    top, bottom = np.asarray(BACKDROPS[name], np.float32)
    t = ((np.arange(size, dtype=np.float32) + 0.5) / size)[:, None, None]
    return top + (bottom - top) * t


def outline_mask(shape: str, width: int, height: int, x: float, y: float, radius: float) -> Image.Image:
    """A shape as a hard-edged greyscale picture of 0 and 255; x, y, radius in its pixels."""
    mask = Image.new("L", (width, height), 0)
    draw = ImageDraw.Draw(mask)
    for i, outline in enumerate(OUTLINES[shape]):
        # Pillow's integer coordinates are pixel centres.
        draw.polygon((outline * radius + (x - 0.5, y - 0.5)).ravel().tolist(), fill=0 if i else 255)
    return mask


def render(
    objects: Sequence[SceneObject], background: str, size: int, masks: bool = False
) -> tuple[UInt8[np.ndarray, "s s 3"], Bool[np.ndarray, "n s s"] | None]:
    """Paint objects back to front on a background, antialiased; with `masks` also each object's visible part."""
    image = _backdrop_image(background, size).copy()
    visible = np.zeros((len(objects), size, size), bool) if masks else None
    fine = 8 if size <= 64 else 4 if size <= 256 else 2  # each object is drawn this much larger, then reduced
    for i, o in enumerate(objects):
        x, y, r = o.x * size, o.y * size, o.radius * size
        left, top = math.floor(x - r), math.floor(y - r)
        width, height = math.ceil(x + r) - left, math.ceil(y + r) - top
        x, y = x - left, y - top
        cover = outline_mask(o.shape, width * fine, height * fine, x * fine, y * fine, r * fine).reduce(fine)
        patch = Image.new("RGB", (width, height), PALETTE[o.colour])
        if o.texture != "solid":
            u = ((np.arange(width * fine, dtype=np.float32) + 0.5) / fine - x) / r
            v = ((np.arange(height * fine, dtype=np.float32) + 0.5) / fine - y) / r
            pattern = ink(o.texture, u[None, :], v[:, None])
            patch.paste(INK, mask=Image.fromarray(pattern * np.uint8(255)).reduce(fine))
        image.paste(patch, (left, top), cover)
        if masks:
            whole = Image.new("L", (size, size), 0)
            whole.paste(cover, (left, top))
            visible[i] = np.asarray(whole) > 127
            visible[:i] &= ~visible[i]
    return np.array(image), visible


@functools.lru_cache(maxsize=64)
def _backdrop_image(name: str, size: int) -> Image.Image:
    rows = np.rint(backdrop(name, size)).astype(np.uint8)
    return Image.fromarray(np.repeat(rows, size, axis=1))


def truths(objects: Sequence[SceneObject], masks: Bool[np.ndarray, "n s s"]) -> dict[str, Any]:
    """Boxes, depth, edges and landmarks of a drawn scene (see `vgen.data.scenes.scene`) from its visible masks."""
    size = masks.shape[-1]
    boxes = np.zeros((len(objects), 4), np.float32)
    for box, mask in zip(boxes, masks, strict=True):
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        if rows.size:
            box[:] = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    wide = np.pad(masks, ((0, 0), (1, 1), (1, 1)))
    inside = wide[:, :-2, 1:-1] & wide[:, 2:, 1:-1] & wide[:, 1:-1, :-2] & wide[:, 1:-1, 2:]
    edges = (masks & ~inside).any(0) * np.uint8(255)
    depth = np.arange(len(objects), dtype=np.int32)[::-1].copy()
    landmarks = tuple(_landmarks(o, size) for o in objects)
    return {"masks": masks, "boxes": boxes, "depth": depth, "edges": edges, "landmarks": landmarks}


def _landmarks(o: SceneObject, size: int) -> np.ndarray:
    outline = OUTLINES[o.shape][0]
    if len(outline) > 12:  # a round shape: its topmost, rightmost, lowest and leftmost points
        outline = outline[
            [outline[:, 1].argmin(), outline[:, 0].argmax(), outline[:, 1].argmax(), outline[:, 0].argmin()]
        ]
    points = np.concatenate([np.zeros((1, 2)), outline])
    return ((points * o.radius + (o.x, o.y)) * size).astype(np.float32)
