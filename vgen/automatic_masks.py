"""All masks of a picture, from a grid of points (Kirillov et al. 2023, SAM, arXiv:2304.02643, appendix B).

Defaults, order of the filters and results are those of the authors' SamAutomaticMaskGenerator.  The network sees every
batch of points in one shape, so that it is compiled once, whatever the pictures' sizes; the rest is done on the host.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from vgen.data.preprocess import SAM as SAM_PREPROCESS
from vgen.data.preprocess import Preprocess, preprocess, scaled
from vgen.models import sam_prompt


@dataclasses.dataclass(frozen=True)
class Automatic:
    """How masks are found and which are kept.

    points_per_side: of the grid over the picture.  points_per_batch: of one call of the decoder.
    predicted_iou: what the network must say of a mask, more than that.  stability: least IoU of the mask of logits cut
    at +stability_offset with that cut at -stability_offset.
    box_nms: of two masks of a crop whose boxes have a larger IoU, the one with the lower predicted IoU goes; crop_nms:
    of two of different crops, the one of the larger crop.
    crop_layers: layer i looks at (2^i)^2 crops as well; crop_overlap: of neighbouring ones of the first layer, as a
    share of the picture's shorter side, halved with every further one; crop_points_downscale: points_per_side is
    divided by it with every layer.
    min_region_area: holes and islands of fewer pixels are removed, 0 = none.  edge: masks whose box comes so near, in
    pixels, to the edge of a crop that is not the picture's are dropped.  largest: so are those of a larger share of the
    picture.
    Raises ValueError for numbers out of range.
    """

    points_per_side: int = 32
    points_per_batch: int = 64
    predicted_iou: float = 0.88
    stability: float = 0.95
    stability_offset: float = 1.0
    box_nms: float = 0.7
    crop_layers: int = 0
    crop_nms: float = 0.7
    crop_overlap: float = 512 / 1500
    crop_points_downscale: int = 1
    min_region_area: int = 0
    edge: float = 20.0
    largest: float = 1.0

    def __post_init__(self):
        least = dict(points_per_side=1, points_per_batch=1, crop_layers=0, crop_points_downscale=1, min_region_area=0)
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ValueError(f"Automatic: {name} must be at least {low}, got {getattr(self, name)}")
        for name in ("box_nms", "crop_nms", "crop_overlap", "stability", "largest"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"Automatic: {name} must be in [0, 1], got {getattr(self, name)}")
        if not self.points_per_side // self.crop_points_downscale**self.crop_layers:
            raise ValueError(
                f"Automatic: points_per_side={self.points_per_side} leaves no point in layer {self.crop_layers}; lower "
                "crop_layers or crop_points_downscale"
            )


class AutomaticMask(NamedTuple):
    """One mask; names as in the authors' records.

    segmentation: bool [h, w].  area: pixels.  bbox: (x, y, width, height) from the first to the last pixel inside.
    point_coords: ((x, y),), the point that it was found by.  crop_box: (x, y, width, height) of the crop.
    """

    segmentation: np.ndarray
    area: int
    bbox: tuple[float, ...]
    predicted_iou: float
    point_coords: tuple[tuple[float, float], ...]
    stability_score: float
    crop_box: tuple[float, ...]


class Predictor(NamedTuple):
    """A network for `generate`.

    encode: (pixels float32 [1, size, size, 3]) -> embedding.  decode: (embedding, points float32 [n, 2] in pixels of
    that frame) -> (logits [n, m, y, x], predicted IoU [n, m]).  how: pictures to pixels, their longer side to `size`.
    """

    encode: Callable[[Any], Any]
    decode: Callable[[Any, Any], tuple[Any, Any]]
    how: Preprocess


def predictor(network, params, how: Preprocess = SAM_PREPROCESS) -> Predictor:
    """A `vgen.models.sam.SAM` and its parameters; how: of the published weights, with size and pad of the network."""
    how = how._replace(size=network.image_size, pad=network.image_size)
    return Predictor(functools.partial(_encode, network, params), functools.partial(_decode, network, params), how)


@functools.partial(jax.jit, static_argnums=0)
def _encode(network, params, pixels):
    return network.apply({"params": params}, pixels, method="encode")


@functools.partial(jax.jit, static_argnums=0)
def _decode(network, params, embedding, points):
    prompt = sam_prompt.no_prompt((1, len(points)), 1)
    prompt = sam_prompt.with_click(prompt, points[None], jnp.ones((1, len(points)), bool))
    out = network.apply({"params": params}, embedding, *prompt, slots=True, method="decode")
    return out.logits[0], out.iou[0]


class _Found(NamedTuple):
    """Rows of masks that have passed: masks packed to bits, boxes (x0, y0, x1, y1) in pixels of the picture."""

    bits: np.ndarray
    boxes: np.ndarray
    iou: np.ndarray
    points: np.ndarray
    stability: np.ndarray
    crops: np.ndarray

    def take(self, rows) -> "_Found":
        return _Found(*(field[rows] for field in self))


def generate(
    network: Predictor, image: UInt8[np.ndarray, "h w 3"], how: Automatic | None = None
) -> list[AutomaticMask]:
    """The masks of a picture of any size, those of the highest predicted IoU first (with crops: of the smallest crop).

    Raises ValueError where the picture is not uint8 [h, w, 3].
    """
    how, image = how or Automatic(), np.asarray(image)
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"automatic masks: expected a picture uint8 [h, w, 3], got {image.dtype} {image.shape}")
    size = image.shape[:2]
    crops, layers = crop_boxes(size, how.crop_layers, how.crop_overlap)
    parts = [_of_crop(network, image, crop, layer, how) for crop, layer in zip(crops, layers)]
    found = _Found(*(np.concatenate(field) for field in zip(*parts)))
    if len(crops) > 1:  # the smaller crop saw more of the mask
        area = np.prod(found.crops[:, 2:] - found.crops[:, :2], axis=1)
        found = found.take(nms(found.boxes, 1.0 / area, how.crop_nms))
    masks = _unpacked(found.bits, size)
    if how.min_region_area and len(masks):
        masks, found = _tidied(masks, found, how)
    records = []
    for mask, row in zip(masks, range(len(masks))):
        box, crop = (_corner_and_sides(boxes[row]) for boxes in (found.boxes, found.crops))
        point = tuple(map(float, found.points[row]))
        scores = float(found.iou[row]), float(found.stability[row])
        records.append(AutomaticMask(mask, int(mask.sum()), box, scores[0], (point,), scores[1], crop))
    return records


def _corner_and_sides(box) -> tuple[float, ...]:
    x0, y0, x1, y1 = map(float, box)
    return x0, y0, x1 - x0, y1 - y0


def _of_crop(network: Predictor, image, crop, layer: int, how: Automatic) -> _Found:
    """What is found in one crop, without duplicates, in the frame of the picture."""
    x0, y0, x1, y1 = crop
    part = image[y0:y1, x0:x1]
    shape, frame = part.shape[:2], network.how.pad
    inside = scaled(*shape, network.how)  # (height, width) of the resized crop in the frame
    embedding = network.encode(preprocess(part, network.how)[None])
    places = grid(how.points_per_side // how.crop_points_downscale**layer) * np.array(shape[::-1])
    asked = (places * (np.array(inside[::-1]) / np.array(shape[::-1]))).astype(np.float32)
    ways: list[np.ndarray] | None = None
    rows = []
    for start in range(0, len(places), how.points_per_batch):
        chosen = np.arange(start, start + how.points_per_batch).clip(max=len(places) - 1)
        logits, iou = (np.asarray(x, np.float32) for x in network.decode(embedding, asked[chosen]))
        new = min(how.points_per_batch, len(places) - start)
        ways = ways or [enlarging(logits.shape[-1], frame, inside[i], shape[i]) for i in (0, 1)]
        rows.append(_kept(logits[:new], iou[:new], places[chosen[:new]], ways, crop, image.shape[:2], how))
    found = _Found(*(np.concatenate(field) for field in zip(*rows)))
    return found.take(nms(found.boxes, found.iou, how.box_nms))


def _kept(logits, iou, places, ways, crop, size, how: Automatic) -> _Found:
    """The masks of one batch of points that pass the filters."""
    points = np.repeat(places, logits.shape[1], 0) + crop[:2]
    logits, iou = logits.reshape(-1, *logits.shape[2:]), iou.reshape(-1)
    likely = iou > how.predicted_iou
    logits, iou, points = ways[0] @ logits[likely] @ ways[1].T, iou[likely], points[likely]
    score = stability(logits, how.stability_offset)
    masks = logits > 0
    boxes = boxes_of(masks) + np.tile(crop[:2], 2)
    area = masks.sum((1, 2), dtype=np.int64)
    kept = (score >= how.stability) & (area > 0) & (area <= how.largest * size[0] * size[1])
    kept &= ~near_edge(boxes, crop, size, how.edge)
    whole = np.zeros((int(kept.sum()), *size), bool)
    whole[:, crop[1] : crop[3], crop[0] : crop[2]] = masks[kept]
    crops = np.broadcast_to(np.array(crop), (len(whole), 4))
    bits = np.packbits(whole.reshape(len(whole), size[0] * size[1]), axis=1)
    return _Found(bits, boxes[kept], iou[kept], points[kept], score[kept], crops)


def _unpacked(bits, size) -> Bool[np.ndarray, "n h w"]:
    return np.unpackbits(bits, axis=1, count=size[0] * size[1]).astype(bool).reshape(-1, *size)


def _tidied(masks, found: _Found, how: Automatic):
    """Masks without small holes and islands; of new duplicates those stay that needed no change."""
    tidy = [without_small_regions(mask, how.min_region_area) for mask in masks]
    unchanged = np.array([bool((a == b).all()) for a, b in zip(masks, tidy)])
    masks = np.stack(tidy)
    boxes = boxes_of(masks)
    rows = nms(boxes, unchanged.astype(np.float32), max(how.box_nms, how.crop_nms))
    return masks[rows], found._replace(boxes=boxes).take(rows)


# --------------------------------------------------------------------------------------------------------- its pieces


def grid(side: int) -> Float[np.ndarray, "n 2"]:
    """(x, y) in [0, 1] of the centres of side x side cells, row by row."""
    places = (np.arange(side) + 0.5) / side
    return np.stack(np.meshgrid(places, places), -1).reshape(-1, 2)


def crop_boxes(size: tuple[int, int], layers: int, overlap: float) -> tuple[list[tuple[int, ...]], list[int]]:
    """((x0, y0, x1, y1) of the picture of (height, width) = size and of its crops, the layer of each)."""
    h, w = size
    boxes, numbers = [(0, 0, w, h)], [0]
    for layer in range(1, layers + 1):
        n = 2**layer
        shared = int(overlap * min(h, w) * (2 / n))
        tall, wide = (math.ceil((shared * (n - 1) + side) / n) for side in (h, w))
        for x, y in itertools.product(range(n), repeat=2):
            x0, y0 = x * (wide - shared), y * (tall - shared)
            boxes.append((x0, y0, min(x0 + wide, w), min(y0 + tall, h)))
            numbers.append(layer)
    return boxes, numbers


def enlarging(side: int, frame: int, inside: int, original: int) -> Float[np.ndarray, "original side"]:
    """What makes `original` pixels of `side` logits of a padded frame, along one axis of `models.sam.postprocess`."""
    return (_bilinear(original, inside) @ _bilinear(frame, side)[:inside]).astype(np.float32)


def _bilinear(to: int, of: int) -> np.ndarray:
    """[to, of]: interpolation with the pixels' centres in place and the edges held."""
    place = np.clip((np.arange(to) + 0.5) * (of / to) - 0.5, 0, of - 1)
    return np.maximum(0, 1 - np.abs(place[:, None] - np.arange(of)))


def stability(logits: Float[np.ndarray, "n h w"], offset: float) -> Float[np.ndarray, "n"]:
    """IoU of each mask cut at +offset with that cut at -offset; 0 where the latter is empty."""
    tight, loose = ((logits > cut).sum((1, 2), dtype=np.int64) for cut in (offset, -offset))
    return tight / np.maximum(loose, 1)


def boxes_of(masks: Bool[np.ndarray, "n h w"]) -> Int[np.ndarray, "n 4"]:
    """(x0, y0, x1, y1): first and last column and row inside; zeros for an empty mask."""
    out = np.zeros((len(masks), 4), np.int64)
    for i, axis in enumerate((1, 2)):
        there = masks.any(axis)
        out[:, i], out[:, i + 2] = there.argmax(1), there.shape[1] - 1 - there[:, ::-1].argmax(1)
    return out * masks.any((1, 2))[:, None]


def near_edge(boxes, crop: Sequence[int], size: tuple[int, int], reach: float = 20.0) -> Bool[np.ndarray, "n"]:
    """Which boxes come within `reach` pixels of an edge of the crop, but not of the picture's edge on that side."""
    at_crop = np.abs(boxes - np.array(crop)) <= reach
    at_picture = np.abs(boxes - np.array([0, 0, size[1], size[0]])) <= reach
    return (at_crop & ~at_picture).any(1)


def nms(boxes, scores, threshold: float) -> Int[np.ndarray, "k"]:
    """Rows of the boxes that stay, best scores first: none has a larger IoU than `threshold` with a better one."""
    boxes, order = np.asarray(boxes, np.float64), np.argsort(-np.asarray(scores), kind="stable")
    area = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
    kept = []
    while len(order):
        best, order = order[0], order[1:]
        kept.append(best)
        low, high = np.maximum(boxes[best, :2], boxes[order, :2]), np.minimum(boxes[best, 2:], boxes[order, 2:])
        both = np.prod(np.maximum(high - low, 0), axis=1)
        order = order[~(both > threshold * (area[best] + area[order] - both))]
    return np.array(kept, np.int64)


def without_small_regions(mask: Bool[np.ndarray, "h w"], least: int) -> Bool[np.ndarray, "h w"]:
    """The mask without holes, and then without islands, of fewer than `least` pixels (neighbours also across corners).

    Where all islands are smaller, the largest one stays.
    """
    from scipy import ndimage

    for holes in (True, False):
        regions, count = ndimage.label(mask ^ holes, np.ones((3, 3)))
        sizes = np.bincount(regions.ravel(), minlength=count + 1)
        small = sizes < least
        small[0] = False
        if not small.any():
            continue
        if holes:
            mask = mask | small[regions]
        else:
            if small[1:].all():
                small[1 + sizes[1:].argmax()] = False
            mask = mask & ~small[regions]
    return mask
