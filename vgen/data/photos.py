"""The real photographs that scikit-image and scikit-learn carry inside their wheels: real input without a download."""

import importlib.util
import io
from pathlib import Path

import numpy as np
from PIL import Image

from vgen.data.images import DataError, to_rgb8

# name: (package, file, caption); the colour photographs of everyday things.  Left out: drawings and test patterns,
# microscopy, the retina, the star field, and the right half of the motorcycle stereo pair.
PHOTOS = {
    "astronaut": ("skimage", "data/astronaut.png", "a portrait of an astronaut"),
    "chelsea": ("skimage", "data/chelsea.png", "a photograph of a cat"),
    "coffee": ("skimage", "data/coffee.png", "a photograph of a cup of coffee"),
    "motorcycle": ("skimage", "data/motorcycle_left.png", "a photograph of a motorcycle"),
    "rocket": ("skimage", "data/rocket.jpg", "a photograph of a rocket"),
    "china": ("sklearn", "datasets/images/china.jpg", "a photograph of a temple"),
    "flower": ("sklearn", "datasets/images/flower.jpg", "a photograph of a flower"),
}


class Photos:
    """Square crops, uint8 [size, size, 3], of the photographs that scikit-image and scikit-learn carry in their wheels.

    The last quarter of each photograph along its longer side is the "heldout" split, the rest "train": no pixel is in
    both.  Example i is one fixed crop: photograph i % 7, place and scale drawn from (seed, i).
    min_scale: crops are shrunk by a factor drawn from [min_scale, 1] (1 never shrinks).
    Raises DataError if the packages are missing or `size` is larger than every region.
    """

    def __init__(
        self, size: int, split: str = "train", count: int | None = None, seed: int = 0, min_scale: float = 0.5
    ):
        if split not in ("train", "heldout"):
            raise ValueError(f"photos: split must be train or heldout, got {split!r}")
        if not 0 < min_scale <= 1:
            raise ValueError(f"photos: min_scale must be in (0, 1], got {min_scale}")
        self.size, self.split, self.seed, self.min_scale = size, split, seed, min_scale
        self.count = (50_000 if split == "train" else 1_000) if count is None else count
        regions = {name: _region(name, split) for name in PHOTOS}
        self._regions = {name: region for name, region in regions.items() if min(region.shape[:2]) >= size}
        self.classes = sorted(PHOTOS)
        if not self._regions:
            raise DataError(
                "photos",
                f"size {size}",
                f"at most {max(min(r.shape[:2]) for r in regions.values())} pixels for split {split!r}",
                "use a smaller size",
            )

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> dict:
        if not 0 <= i < self.count:
            raise IndexError(f"photos: index {i} of {self.count}")
        name = list(self._regions)[i % len(self._regions)]
        region = self._regions[name]  # [h, w, 3]
        scale, down, right = np.random.Generator(np.random.Philox(key=[self.seed, i])).random(3)
        side = round(self.size / (self.min_scale + (1 - self.min_scale) * scale))
        side = min(side, *region.shape[:2])
        top, left = int(down * (region.shape[0] - side + 1)), int(right * (region.shape[1] - side + 1))
        crop = Image.fromarray(
            region[top : top + side, left : left + side]
        )  # cut first: the filter sees nothing outside
        image = np.asarray(crop.resize((self.size, self.size), Image.Resampling.LANCZOS))
        return {
            "image": image,
            "caption": PHOTOS[name][2],
            "label": self.classes.index(name),
            "name": f"photos/{name}#{i}",
        }


def _region(name: str, split: str) -> np.ndarray:
    package, file, _ = PHOTOS[name]
    spec = importlib.util.find_spec(package)
    path = Path(spec.submodule_search_locations[0]) / file if spec else None
    if path is None or not path.is_file():
        raise DataError(
            "photos",
            f"no {file} of {package}",
            "scikit-image and scikit-learn installed from wheels",
            "pip install scikit-image scikit-learn",
        )
    photo = to_rgb8(Image.open(io.BytesIO(path.read_bytes())))
    axis = int(photo.shape[1] > photo.shape[0])  # the longer side
    train, heldout = np.split(photo, [photo.shape[axis] * 3 // 4], axis)
    return np.ascontiguousarray(train if split == "train" else heldout)
