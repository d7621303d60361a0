"""SA-1B as it is published (Kirillov et al. 2023, arXiv:2304.02643): sa_N.jpg beside sa_N.json with its masks."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool
from PIL import Image

from vgen.data.images import DataError, load
from vgen.data.preprocess import SAM, reshape, scaled

FILL = (124, 116, 104)  # ImageNet's mean: nearly 0 once a picture is normalised, as SAM's padding is
SMALLER = 4  # how many times the masks are smaller than the picture


class SA1B:
    """Pictures with some of their masks; pictures below `pattern`, in sorted order.

    An example is {"image": uint8 [size, size, 3], the longer side resized and the rest filled up below or at the right;
    "masks": bool [masks, size / 4, size / 4], empty ones where there are fewer; "name"}.  Which ones, where there are
    more, is drawn with the number of the picture.
    masks: how many.  count: pictures, 0 for all.
    Raises DataError where there is no picture, or an annotation cannot be read; ValueError for a size not divided by 4.
    """

    def __init__(self, pattern: str | os.PathLike, size: int, masks: int = 64, count: int = 0):
        if size % SMALLER or masks < 1:
            raise ValueError(f"SA1B: size must be a multiple of {SMALLER} and masks at least 1, got {size}, {masks}")
        self.size, self.masks = size, masks
        self.paths = sorted(Path(pattern).rglob("*.jpg"))
        self.paths = self.paths[: count or None]
        if not self.paths:
            raise DataError(f"sa1b:{pattern}", "no pictures", "sa_N.jpg beside sa_N.json", "check the folder")

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> dict[str, Any]:
        path = self.paths[i]
        image = reshape(load(path), SAM._replace(size=self.size))
        h, w = image.shape[:2]
        whole = np.empty((self.size, self.size, 3), np.uint8)
        whole[:] = FILL
        whole[:h, :w] = image
        try:
            found = json.loads(path.with_suffix(".json").read_text())["annotations"]
            chosen = found
            if len(found) > self.masks:
                chosen = np.random.default_rng(i).choice(len(found), self.masks, replace=False)
                chosen = [found[k] for k in np.sort(chosen)]
            masks = [self._fitted(decode(each["segmentation"])) for each in chosen]
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            raise DataError(
                f"{path.with_suffix('.json')}", repr(error), "annotations with segmentation in COCO's run lengths",
                "fetch the file again",
            ) from error  # fmt: skip
        side = self.size // SMALLER
        masks = np.stack([*masks, *np.zeros((self.masks - len(masks), side, side), bool)])
        return {"image": whole, "masks": masks, "name": os.fspath(path)}

    def _fitted(self, mask) -> Bool[np.ndarray, "h w"]:
        """A mask of the file's picture in the frame of the smaller masks: pixels that are covered by half."""
        side = self.size // SMALLER
        h, w = scaled(*mask.shape, SAM._replace(size=side))
        small = Image.fromarray(mask.astype(np.uint8) * 255).resize((max(w, 1), max(h, 1)), Image.Resampling.BOX)
        out = np.zeros((side, side), bool)
        out[: small.height, : small.width] = np.asarray(small) > 127
        return out


def decode(rle: Mapping[str, Any]) -> Bool[np.ndarray, "h w"]:
    """A mask from COCO's run lengths: {"size": [height, width], "counts": a list, or the string that packs it}.

    Runs go down the columns, the first one outside of the mask.  In the string each number is in groups of five bits,
    the lowest first, 32 in a character for more to come; from the fourth number on what is told is the difference to
    the one two before.
    Raises ValueError for runs that do not fill the mask.
    """
    (h, w), counts = rle["size"], rle["counts"]
    if isinstance(counts, (str, bytes)):
        counts = _unpacked(counts.encode() if isinstance(counts, str) else counts)
    counts = np.asarray(counts, np.int64)
    if counts.sum() != h * w or (counts < 0).any():
        raise ValueError(f"run lengths of {counts.sum()} pixels for a mask of {h} x {w}")
    values = np.arange(len(counts)) % 2 == 1
    return np.repeat(values, counts).reshape(w, h).T


def _unpacked(text: bytes) -> list[int]:
    counts: list[int] = []
    value = shift = 0
    for byte in text:
        byte -= 48
        value |= (byte & 31) << shift
        shift += 5
        if byte & 32:
            continue
        if byte & 16:  # a negative number
            value -= 1 << shift
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
        value = shift = 0
    return counts
