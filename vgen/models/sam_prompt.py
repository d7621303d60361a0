"""Prompts for SAM in slots, and people who click, simulated (Kirillov et al. 2023, arXiv:2304.02643, appendices A, D).

Slots are points of a fixed number, so that prompts of any length are one compiled program: the first two hold the
corners of a box, or "not a point" in the first one where there is no box, the others hold clicks.  What is in no slot
has no effect on the network, whose answers are those to the prompt without slots.

Points are (x, y) in pixels, (0, 0) being the centre of the first one; boxes (x0, y0, x1, y1) name the first and the
last pixel inside, as those of the authors' code.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32

from vgen.models.sam_decoder import ABSENT

BOX_SLOTS = 2
CORNERS = np.array([2, 3], np.int32)  # their labels


class Slots(NamedTuple):
    """points: float32 [..., slots, 2].  labels: int32 [..., slots], see `sam_decoder.PromptEncoder` and ABSENT."""

    points: jax.Array
    labels: jax.Array


def no_prompt(shape: tuple[int, ...], clicks: int) -> Slots:
    """Prompts of that shape without box or click, with room for so many clicks."""
    labels = jnp.full((*shape, BOX_SLOTS + clicks), ABSENT, jnp.int32).at[..., 0].set(-1)
    return Slots(jnp.zeros((*labels.shape, 2), jnp.float32), labels)


def with_boxes(prompt: Slots, boxes: Float[Array, "*b 4"], given: Bool[Array, "*b"] | None = None) -> Slots:
    """The prompts with boxes, where `given` (everywhere by default)."""
    corners = boxes.astype(jnp.float32).reshape(*boxes.shape[:-1], BOX_SLOTS, 2)
    boxed = Slots(prompt.points.at[..., :BOX_SLOTS, :].set(corners), prompt.labels.at[..., :BOX_SLOTS].set(CORNERS))
    if given is None:
        return boxed
    return jax.tree.map(
        lambda a, b: jnp.where(given.reshape(given.shape + (1,) * (a.ndim - given.ndim)), a, b), boxed, prompt
    )


def with_click(
    prompt: Slots, xy: Float[Array, "*b 2"], inside: Bool[Array, "*b"], given: Bool[Array, "*b"] | None = None
) -> Slots:
    """The prompts with one more click, where `given` (everywhere by default); one too many is lost.

    inside: whether it says "this is the object", or "this is not".
    """
    used = (prompt.labels[..., BOX_SLOTS:] != ABSENT).sum(-1)
    here = jnp.arange(prompt.labels.shape[-1]) == (BOX_SLOTS + used)[..., None]
    here = here if given is None else here & given[..., None]
    points = jnp.where(here[..., None], xy[..., None, :], prompt.points)
    return Slots(points, jnp.where(here, inside.astype(jnp.int32)[..., None], prompt.labels))


# ------------------------------------------------------------------------------------------------------------- masks


def boxes_of(masks: Bool[Array, "*b h w"]) -> Float32[Array, "*b 4"]:
    """The first and the last column and row of each mask, (x0, y0, x1, y1); zeros for an empty one."""
    found = []
    for axis in (-2, -1):  # columns, rows
        there = masks.any(axis)
        n = there.shape[-1]
        found.append((there.argmax(-1), n - 1 - there[..., ::-1].argmax(-1)))
    (x0, x1), (y0, y1) = found
    boxes = jnp.stack([x0, y0, x1, y1], -1).astype(jnp.float32)
    return jnp.where(masks.any((-2, -1))[..., None], boxes, 0)


def iou(a: Bool[Array, "*b h w"], b: Bool[Array, "*c h w"]) -> Float32[Array, "..."]:
    """Intersection over union of masks of equal or broadcastable shapes; of two empty ones 1."""
    both, either = ((a & b).sum((-2, -1)), (a | b).sum((-2, -1)))
    return jnp.where(either, both / jnp.maximum(either, 1), 1).astype(jnp.float32)


def shrunk(masks: Bool[Array, "*b h w"], side: int) -> Bool[Array, "*b side side"]:
    """Square masks at a side that divides theirs: pixels of which at least half is covered.

    Raises ValueError for one that does not.
    """
    h, w = masks.shape[-2:]
    if h != w or h % side:
        raise ValueError(f"masks of {h} x {w} pixels do not shrink to {side} x {side}: expected a multiple, square")
    if h == side:
        return masks
    cells = masks.reshape(*masks.shape[:-2], side, h // side, side, h // side)
    return cells.mean((-3, -1), dtype=jnp.float32) >= 0.5


# ------------------------------------------------------------------------------------------------------------ clicks


def drawn_place(key, region: Bool[Array, "*b h w"]) -> Float32[Array, "*b 2"]:
    """(x, y) of a pixel of each region, all as likely; (0, 0) of an empty one."""
    rows = region.sum(-1).cumsum(-1)  # [..., h]
    rank = jnp.floor(jax.random.uniform(key, region.shape[:-2]) * rows[..., -1]).astype(rows.dtype)
    rank = jnp.minimum(rank, rows[..., -1] - 1)[..., None]  # of the pixel among the region's
    y = jnp.minimum((rows <= rank).sum(-1, keepdims=True), region.shape[-2] - 1)
    rank = rank - jnp.where(y > 0, jnp.take_along_axis(rows, jnp.maximum(y - 1, 0), -1), 0)
    row = jnp.take_along_axis(region, y[..., None], -2)[..., 0, :].cumsum(-1)
    x = jnp.minimum((row <= rank).sum(-1, keepdims=True), region.shape[-1] - 1)
    return jnp.where(rows[..., -1:] > 0, jnp.concatenate([x, y], -1), 0).astype(jnp.float32)


def depth_inside(region: Bool[Array, "*b h w"]) -> Float32[Array, "*b h w"]:
    """Distance of every pixel of a region to the nearest pixel that is not in it, 0 outside; the region ends at the
    picture's edge.

    Exact and Euclidean: squares of distances within columns, then their least over the row.
    """
    h, w = region.shape[-2:]
    inside = jnp.pad(region, [(0, 0)] * (region.ndim - 2) + [(1, 1), (1, 1)])
    steps = jnp.arange(h + 2)
    above = jax.lax.cummax(jnp.where(inside, -h, steps[:, None]), inside.ndim - 2)
    below = jax.lax.cummin(jnp.where(inside, 2 * h + 2, steps[:, None]), inside.ndim - 2, reverse=True)
    column = jnp.minimum(steps[:, None] - above, below - steps[:, None]) ** 2  # [..., h + 2, w + 2]

    def nearer(d, best):
        left = jnp.pad(column, [(0, 0)] * (inside.ndim - 1) + [(w + 1, w + 1)], constant_values=4 * (h + w) ** 2)
        shifted = [jax.lax.dynamic_slice_in_dim(left, w + 1 + s * d, w + 2, axis=-1) for s in (1, -1)]
        return jnp.minimum(best, jnp.minimum(*shifted) + d * d)

    squares = jax.lax.fori_loop(1, w + 2, nearer, column)[..., 1:-1, 1:-1]
    return jnp.sqrt(squares.astype(jnp.float32))


def deepest_place(region: Bool[Array, "*b h w"]) -> tuple[Float32[Array, "*b 2"], Float32[Array, "*b"]]:
    """(x, y) of the pixel of each region that is farthest from its border, and how far; the first one among equals."""
    depth = depth_inside(region)
    flat = depth.reshape(*depth.shape[:-2], -1)
    y, x = jnp.divmod(flat.argmax(-1), region.shape[-1])
    return jnp.stack([x, y], -1).astype(jnp.float32), flat.max(-1)


def correction(
    truth: Bool[Array, "*b h w"], guess: Bool[Array, "*b h w"], key=None
) -> tuple[Float32[Array, "*b 2"], Bool[Array, "*b"], Bool[Array, "*b"]]:
    """Where a person clicks to correct a guess: (x, y), whether it is inside the object, whether anything is wrong.

    With a key, as in training: any wrong pixel, all as likely.  Without, as in evaluation: the middle of the larger of
    two regions, what is missing and what is too much: the pixel that is farthest from the region's border.
    """
    wrong = truth ^ guess
    if key is not None:
        xy = drawn_place(key, wrong)
        x, y = xy[..., 0].astype(jnp.int32), xy[..., 1].astype(jnp.int32)
        row = jnp.take_along_axis(truth, y[..., None, None], -2)[..., 0, :]
        return xy, jnp.take_along_axis(row, x[..., None], -1)[..., 0], wrong.any((-2, -1))
    (missing, depth), (extra, other) = deepest_place(truth & ~guess), deepest_place(guess & ~truth)
    inside = depth >= other
    return jnp.where(inside[..., None], missing, extra), inside, wrong.any((-2, -1))


def jittered(
    key, boxes: Float[Array, "*b 4"], size: int, share: float = 0.1, most: float = 20.0
) -> Float[Array, "*b 4"]:
    """Boxes with noise in every coordinate: a deviation of `share` of the side, at most `most` pixels; inside a picture
    of `size` pixels.
    """
    sides = jnp.tile(boxes[..., 2:] - boxes[..., :2] + 1, 2)
    noise = jnp.clip(share * sides * jax.random.normal(key, boxes.shape), -most, most)
    return jnp.clip(boxes + noise, 0, size - 1)


def crops(
    images: Float[Array, "b h w 3"], masks: Bool[Array, "b p m m"], boxes: Float[Array, "b p 4"],
    wider: Float[Array, "b p"], alone: Bool[Array, "b p"], size: int,
) -> Float[Array, "b p size size 3"]:  # fmt: skip
    """Squares about boxes, resized: each `wider` times as wide as the longer side of its box (Kirillov et al. 2023,
    appendix D.5).  What is outside of the picture is 0, and what is outside of the mask where the object is `alone`.
    """
    middle = (boxes[..., :2] + boxes[..., 2:] + 1) / 2
    zoom = size / (jnp.maximum(*jnp.moveaxis(boxes[..., 2:] - boxes[..., :2] + 1, -1, 0)) * wider)

    def cut(x, middle, zoom, shrink):
        scale = jnp.broadcast_to(zoom * shrink, 2)
        shape = (size, size, *x.shape[2:])
        shift = size / 2 - middle[::-1] * zoom  # y, x
        return jax.image.scale_and_translate(x, shape, (0, 1), scale, shift, "linear")

    of_mask = jax.vmap(jax.vmap(functools.partial(cut, shrink=images.shape[1] / masks.shape[-1])))
    of_picture = jax.vmap(jax.vmap(functools.partial(cut, shrink=1.0), (None, 0, 0)))
    inside = of_mask(masks.astype(images.dtype), middle, zoom)
    return of_picture(images, middle, zoom) * jnp.where(alone[..., None, None], inside, 1)[..., None]


def full_size(logits: Float[Array, "*b h w"], size: int) -> Float[Array, "*b size size"]:
    """Logits of masks at the side of the picture, bilinear."""
    if logits.shape[-1] == size:
        return logits
    return jax.image.resize(logits, (*logits.shape[:-2], size, size), "linear", antialias=False)
