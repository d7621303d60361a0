"""Aspect-ratio buckets: pictures keep their shape, a batch holds one size, a position in the data stays a number.

Sources: Podell et al. 2023 (SDXL), section 2.3 and appendix I, whose sizes PixArt-alpha's data sets share.  There, and
here, an example belongs to the bucket of the nearest height / width, is resized to cover it, and cropped.

A bucket gives a batch as soon as it is full; what is left over at the end of an epoch waits for the next one.  Which
batch that is follows from counts alone, so that batch k needs none of those before it (grain has no such grouping: its
batches are of neighbours).
"""

import functools
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from vgen.data import images
from vgen.data.images import DataError, ImageError

MICRO = ("original", "corner", "target")  # what a batch says of each picture
CHUNK = 4096  # pictures asked for their size at a time

# Heights below their widths, in sixteenths of the side of the square: {height: widths}.
_WIDE = {
    8: (32, 31, 30, 29), 9: (28, 27, 26), 10: (25, 24), 11: (23, 22, 21), 12: (21, 20), 13: (19, 18), 14: (18, 17),
    15: (17, 16),
}  # fmt: skip


def published(side: int) -> tuple[tuple[int, int], ...]:
    """The 40 sizes (height, width) of about side^2 pixels that SDXL (1024) and PixArt (256, 512, 1024) train at, from
    ratio 1/4 to 4.

    Raises ValueError for a side that is no multiple of 16.
    """
    if side < 16 or side % 16:
        raise ValueError(f"buckets: the side of the published table must be a multiple of 16, got {side}")
    wide = [(height, width) for height, widths in _WIDE.items() for width in widths]
    tall = [(width, height) for height, width in reversed(wide) if (height, width) != (11, 21)]  # not in the table
    return tuple((height * side // 16, width * side // 16) for height, width in [*wide, (16, 16), *tall])


def table_of(buckets: int | Sequence[Sequence[int]]) -> np.ndarray:
    """int32 [m, 2] of what a config says: sizes (height, width), or the side of `published`.

    Raises ValueError for anything else, and for a size given twice.
    """
    table = published(buckets) if isinstance(buckets, int) else tuple(tuple(size) for size in buckets)
    if not table or any(len(size) != 2 or min(size) < 1 for size in table) or len(set(table)) != len(table):
        raise ValueError(f"buckets: expected different sizes (height, width), or the side of a square, got {buckets!r}")
    return np.array(table, np.int32)


def nearest(sizes: np.ndarray, table: np.ndarray) -> np.ndarray:
    """int32 [n]: for each picture [n, 2] the row of `table` [m, 2] whose height / width is nearest, of two the smaller.

    PixArt rounds the table's ratios to two digits before it compares.
    """
    order = np.argsort(table[:, 0] / table[:, 1], kind="stable")
    ratios, got = (table[:, 0] / table[:, 1])[order], sizes[:, 0] / sizes[:, 1]
    right = np.searchsorted(ratios, got).clip(1, max(len(ratios) - 1, 1))
    right = np.minimum(right, len(ratios) - 1)
    left = np.maximum(right - 1, 0)
    return order[np.where(got - ratios[left] <= ratios[right] - got, left, right)].astype(np.int32)


def scan(source, threads: int = 8) -> np.ndarray:
    """int32 [n, 2]: (height, width) of every picture of a source, from headers; (1, 1) where one cannot be read."""
    from tqdm import tqdm

    def size(i: int) -> tuple[int, int]:
        try:
            return images.size_of(source[i]["image"])
        except (ImageError, OSError):
            return 1, 1  # the pipeline will find it, and name it

    n, sizes = len(source), []
    with ThreadPoolExecutor(threads) as pool, tqdm(total=n, desc="sizes of pictures", disable=None) as bar:
        for start in range(0, n, CHUNK):
            sizes += pool.map(size, range(start, min(start + CHUNK, n)))
            bar.update(len(sizes) - start)
    return np.array(sizes, np.int32)


class Buckets(NamedTuple):
    """The sizes of batches and of the pictures of a source: table int32 [m, 2], sizes int32 [n, 2]."""

    table: np.ndarray
    sizes: np.ndarray


class Row(NamedTuple):
    """A batch of a plan: its bucket, the examples int64 [b], and how many of them are not there to fill it up."""

    bucket: int
    indices: np.ndarray
    valid: int


class Plan:
    """Which examples batch k holds: a pure function of the sizes, the seed and k.

    shuffle: examples come in a new order each epoch.  repeat: endless; else one pass, of whose unfinished buckets `pad`
    makes further batches, filled up.
    Raises DataError where a pass has not one full batch.
    """

    def __init__(self, buckets: Buckets, batch_size: int, seed: int, shuffle: bool, repeat: bool, pad: bool = False):
        self._given = buckets, batch_size, seed, shuffle, repeat, pad
        self.table, self.sizes = buckets
        self.which = nearest(self.sizes, self.table)
        self._size, self._seed, self._shuffle, self._repeat = batch_size, seed, shuffle, repeat
        order = np.argsort(self.which, kind="stable")
        self._counts = np.bincount(self.which, minlength=len(self.table)).tolist()
        self._members = np.split(order, np.cumsum(self._counts)[:-1])  # of each bucket, rising
        self._ends = [b for b, count in enumerate(self._counts) if pad and count % batch_size]
        self._epoch = functools.lru_cache(2)(self._batches_of)
        self._order = functools.lru_cache(2 * len(self.table))(self._order_of)
        if not repeat and not len(self):
            raise DataError(
                "buckets", f"no bucket with {batch_size} pictures", "one full batch", "use a smaller batch_size"
            )

    def __reduce__(self):
        return Plan, self._given  # what is remembered stays behind when a pipeline travels to a worker

    def __len__(self) -> int:
        """Batches in one pass; of an endless plan, batches per epoch (rounded up)."""
        if self._repeat:
            return -(-len(self.which) // self._size)
        return self._before(1) + len(self._ends)

    def __getitem__(self, k: int) -> Row:
        """Batch number k."""
        if not self._repeat:
            full = self._before(1)
            if k >= full:
                bucket = self._ends[k - full]
                return self._filled(bucket, self._counts[bucket] // self._size)
            return self._filled(*self._epoch(0)[k])
        epoch = k * self._size // len(self.which)
        while self._before(epoch + 1) <= k:
            epoch += 1
        return self._filled(*self._epoch(epoch)[k - self._before(epoch)])

    def following(self, i: int) -> int:
        """The next example of the same bucket, to take the place of one that cannot be used."""
        members = self._members[self.which[i]]
        return int(members[(np.searchsorted(members, i) + 1) % len(members)])

    @property
    def mark(self) -> int:
        """A number that another table, or other sizes, would not have."""
        return zlib.crc32(self.which.tobytes(), zlib.crc32(self.table.tobytes()))

    def picture(
        self, data, i: int, rng: Callable[[], np.random.Generator] | None, crop: bool, flip: bool
    ) -> dict[str, np.ndarray]:
        """The picture of example i as its bucket has it: image uint8 [h, w, 3] and, float32 [2], original, corner and
        target (see `vgen.data.pipeline`).

        crop, flip: whether the crop's place is drawn, and whether the picture is mirrored, at random.
        """
        original, target = self.sizes[i], self.table[self.which[i]]
        image = images.decode(data, int(min(original) * max(target / original)))
        image, (top, left), whole = images.cover(image, *target.tolist(), rng() if crop else None)
        if flip and rng().random() < 0.5:
            image, left = image[:, ::-1], whole[1] - left - target[1]
        numbers = zip(MICRO, (original, (top, left), target))
        return {"image": image, **{name: np.array(pair, np.float32) for name, pair in numbers}}

    def _before(self, epoch: int) -> int:
        """The number of batches that were full before an epoch began."""
        return sum(epoch * count // self._size for count in self._counts)

    def _batches_of(self, epoch: int) -> list[tuple[int, int]]:
        """(bucket, how many it gave before) of the batches that become full in an epoch, in that order."""
        came = self.which[_permutation(len(self.which), self._seed, epoch)] if self._shuffle else self.which
        order, found = np.argsort(came, kind="stable"), []
        for bucket, places in enumerate(np.split(order, np.cumsum(self._counts)[:-1])):
            given, waiting = divmod(epoch * self._counts[bucket], self._size)
            full = places[self._size - 1 - waiting :: self._size]  # of the examples that complete a batch
            found += [(place, bucket, given + j) for j, place in enumerate(full.tolist())]
        return [(bucket, j) for _, bucket, j in sorted(found)]

    def _filled(self, bucket: int, j: int) -> Row:
        """Batch j of a bucket: its members in the order of their epochs, one epoch behind the other."""
        count, first = self._counts[bucket], j * self._size
        epochs, places = np.divmod(np.arange(first, first + self._size), count)
        valid = self._size if self._repeat else min(self._size, count - first)
        if not self._repeat:
            epochs[:] = 0
        indices = np.empty(self._size, np.int64)
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            here = epochs == epoch
            indices[here] = self._order(bucket, epoch)[places[here]]
        return Row(bucket, indices, valid)

    def _order_of(self, bucket: int, epoch: int) -> np.ndarray:
        members = self._members[bucket]
        return members[_permutation(len(members), self._seed, epoch, bucket + 1)] if self._shuffle else members


def _permutation(n: int, seed: int, epoch: int, stream: int = 0) -> np.ndarray:
    bits = np.random.Philox(key=np.array([seed, epoch], np.uint64), counter=[0, 0, 0, stream])
    return np.random.Generator(bits).permutation(n)
