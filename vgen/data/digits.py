"""The handwritten digits that scikit-learn carries inside its wheel: real pictures with classes, without a download.

1797 digits of 8 x 8 pixels and 17 shades, by 43 people: the test part of UCI's "Optical Recognition of Handwritten
Digits" (Alpaydin & Kaynak 1998).
"""

import importlib.util

import numpy as np

from vgen.data.images import DataError

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


class Digits:
    """uint8 [8, 8, 3], white on black, with label 0 to 9 and a caption; every fifth is of the split "heldout".

    count: only the first so many.  Raises DataError if scikit-learn is missing.
    """

    def __init__(self, split: str = "train", count: int | None = None):
        if split not in ("train", "heldout"):
            raise ValueError(f"digits: split must be train or heldout, got {split!r}")
        if importlib.util.find_spec("sklearn") is None:
            raise DataError(
                "digits", "no scikit-learn", "the package that the pictures are in", "pip install 'vgen[photos]'"
            )
        from sklearn.datasets import load_digits

        digits = load_digits()
        mine = (np.arange(len(digits.target)) % 5 == 4) == (split == "heldout")
        self._images = np.rint(digits.images[mine] * (255 / 16)).astype(np.uint8)[:count]
        self._labels = digits.target[mine][:count]
        self._split = split

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, i: int) -> dict:
        label = int(self._labels[i])
        image = np.repeat(self._images[i][..., None], 3, axis=-1)
        return {
            "image": image, "label": label, "caption": f"a handwritten {NAMES[label]}",
            "name": f"digits/{self._split}#{i}",
        }  # fmt: skip
