"""Sources: every data set is a random-access sequence of example dicts, opened by one short spec.

    scenes            the embedded world                        photos           crops of real photographs
    folder:DIR        pictures, with captions or in classes     tfds:NAME        TensorFlow Datasets, no TensorFlow
    arrayrecord:GLOB  written by vgen.data.cache                webdataset:GLOB  tar shards
    npz:FILE          arrays image, label, caption              digits           real handwritten digits
    sa1b:DIR          pictures with masks, as SA-1B has them

An example holds some of: image (uint8 array, or the bytes of an image file, decoded later by the pipeline so that a bad
one can be skipped), caption (str or list of str), label (int), name (what a person would look for), and more arrays.
"""

import inspect
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from vgen.data.cache import ArrayRecords
from vgen.data.digits import Digits
from vgen.data.images import DataError
from vgen.data.photos import Photos
from vgen.data.sa1b import SA1B
from vgen.data.webdataset import WebDataset, caption_of

KINDS = (
    "scenes", "folder:DIR", "tfds:NAME", "arrayrecord:GLOB", "webdataset:GLOB", "npz:FILE", "sa1b:DIR", "photos",
    "digits",
)  # fmt: skip
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
SPLITS = ("train", "val", "valid", "validation", "test", "heldout")


@runtime_checkable
class Source(Protocol):
    """Examples by index.  `__getitems__(indices) -> list`, where a source has it, reads many at once."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Mapping: ...


def open_source(spec: str, *, size: int | None = None, split: str = "train", holdout: float = 0.0, **kwargs) -> Source:
    """Open a data set by its spec (see the top of this file).

    size: pixels; needed by `scenes` and `photos`, which draw at that size; the other sources keep their own.
    split: "train" or "heldout" for scenes, photos and digits; a TFDS split; a sub-folder of `folder:DIR` named like a
      split.
    holdout: for data that come in one piece, the share (evenly spread) that is "heldout" and kept out of "train".
    kwargs: scenes: count, world, labels, masks, closeup.  photos: count, seed, min_scale.  digits: count.  tfds:
      data_dir, keys.  sa1b: masks, count.
    Raises ValueError for an unknown kind or keyword, DataError if there is nothing to read.
    """
    kind, _, where = spec.partition(":")
    if not 0 <= holdout < 1:
        raise ValueError(f"open_source: holdout must be in [0, 1), got {holdout}")
    if kind == "digits":
        if where or holdout:
            raise ValueError(f"open_source: digits takes nothing behind a colon and no holdout, got {spec!r}")
        return _call(Digits, kwargs, split=split)
    if kind in ("scenes", "photos"):
        if where or size is None or holdout:
            raise ValueError(
                f"open_source: {kind} takes a size, nothing behind a colon and no holdout (it has a heldout "
                f"split of its own); got {spec!r}, size={size}, holdout={holdout}"
            )
        if kind == "photos":
            return _call(Photos, kwargs, size=size, split=split)
        from vgen.data.scenes import Scenes

        return _call(Scenes, kwargs, size=size, split=split)
    if kind not in ("folder", "tfds", "arrayrecord", "webdataset", "npz", "sa1b") or not where:
        raise ValueError(f"open_source: spec must be one of {', '.join(KINDS)}, got {spec!r}")
    whole = "train" if holdout and split == "heldout" else split
    if kind == "tfds":
        return _part(_call(Tfds, kwargs, name=where, split=whole), spec, split, holdout, own_splits=True)
    if kind == "folder":
        folder, own_splits = _split_folder(Path(where), whole)
        return _part(_call(Folder, kwargs, folder=folder), spec, split, holdout, own_splits)
    if kind == "sa1b":
        if size is None:
            raise ValueError("open_source: sa1b needs a size, of pictures in pixels")
        kwargs = dict(kwargs, size=size)
    opener = {"sa1b": SA1B, "arrayrecord": ArrayRecords, "webdataset": WebDataset, "npz": Npz}[kind]
    return _part(_call(opener, kwargs, pattern=where), spec, split, holdout, own_splits=False)


def _call(opener, kwargs: Mapping, **given):
    accepted = set(inspect.signature(opener).parameters) - set(given)
    for key in kwargs:
        if key not in accepted:
            raise ValueError(
                f"open_source: {opener.__name__} does not take {key!r}; "
                f"it takes {', '.join(sorted(accepted)) or 'no more keywords'}"
            )
    return opener(**given, **kwargs)


class Subset:
    """The examples of `source` at `indices`, in that order."""

    def __init__(self, source: Source, indices):
        self._source, self._indices = source, np.asarray(indices, np.int64)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, i: int) -> Mapping:
        return self._source[int(self._indices[i])]

    def __getitems__(self, indices: Sequence[int]) -> list:
        indices = self._indices[list(indices)].tolist()
        many = getattr(self._source, "__getitems__", None)
        return many(indices) if many else [self._source[i] for i in indices]


def _part(source: Source, spec: str, split: str, holdout: float, own_splits: bool) -> Source:
    if not holdout:
        if split != "train" and not own_splits:
            raise DataError(
                f"{spec}, split {split!r}",
                "data in one piece",
                "split='train'",
                "set holdout (for example 0.02) to keep that share apart as 'heldout'",
            )
        return source
    if split not in ("train", "heldout"):
        if own_splits:
            return source
        raise ValueError(f"open_source: with holdout, split must be train or heldout, got {split!r}")
    i = np.arange(len(source))
    heldout = np.floor((i + 1) * holdout) > np.floor(i * holdout)
    indices = np.flatnonzero(heldout == (split == "heldout"))
    if not len(indices):
        raise DataError(
            f"{spec}, split {split!r}",
            f"no examples from {len(source)} with holdout={holdout}",
            "at least one",
            "change holdout",
        )
    return Subset(source, indices)


# ------------------------------------------------------------------------------------------------------------- folder


def _split_folder(folder: Path, split: str) -> tuple[Path, bool]:
    """DIR/<split> if the sub-folders of DIR are named like splits, else DIR; and whether that was so."""
    if not folder.is_dir():
        raise DataError(f"folder:{folder}", "no such folder", "a folder of images", "check the path")
    names = [p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith((".", "__"))]
    if not names or not set(names) <= set(SPLITS):
        return folder, False
    if split not in names:
        raise DataError(
            f"folder:{folder}", f"split {split!r}", f"one of its sub-folders {', '.join(sorted(names))}", "set split"
        )
    return folder / split, True


class Folder:
    """Image files below a folder, in sorted order.

    Captions: a metadata.jsonl at the top with rows {file_name, caption or text, label}, or NAME.txt beside NAME.jpg.
    Labels: if every image lies in a sub-folder, the first-level folder names are the classes, sorted (`classes`).
    Raises DataError if there is no image, or a row of metadata.jsonl cannot be read.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder, self.classes = Path(folder), []
        self._rows = self._read_metadata() if (self.folder / "metadata.jsonl").is_file() else self._scan()
        if not self._rows:
            raise DataError(
                f"folder:{self.folder}", "no images", f"files ending in {' '.join(IMAGE_SUFFIXES)}", "check the path"
            )
        self.classes = sorted({label for _, _, label in self._rows if isinstance(label, str)})
        number = {name: i for i, name in enumerate(self.classes)}
        self._rows = [(name, caption, number.get(label, label)) for name, caption, label in self._rows]

    def _scan(self) -> list:
        names = []
        for root, folders, files in os.walk(self.folder, followlinks=True):
            folders[:] = [name for name in folders if not name.startswith((".", "__"))]
            below = Path(root).relative_to(self.folder)
            names += [(below / f).as_posix() for f in files if f.lower().endswith(IMAGE_SUFFIXES) and f[0] != "."]
        nested = all("/" in name for name in names)
        return [(name, None, name.split("/")[0] if nested else None) for name in sorted(names)]

    def _read_metadata(self) -> list:
        rows = []
        for n, line in enumerate((self.folder / "metadata.jsonl").read_text("utf-8-sig").splitlines(), 1):
            if not line.strip():
                continue
            try:
                fields = json.loads(line)
                rows.append((fields["file_name"], caption_of(fields), fields.get("label")))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise DataError(
                    f"{self.folder / 'metadata.jsonl'}, line {n}",
                    f"{line[:80]!r} ({error!r})",
                    'a JSON object with "file_name" and "caption" or "text"',
                    "repair the line",
                ) from error
        return rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: int) -> dict:
        name, caption, label = self._rows[i]
        path = self.folder / name
        example = {"image": path.read_bytes(), "name": os.fspath(path)}
        if caption is None and (text := path.with_suffix(".txt")).is_file():
            caption = " ".join(text.read_text("utf-8-sig", "replace").split())
        if caption is not None:
            example["caption"] = caption
        if isinstance(label, int):
            example["label"] = label
        return example


# --------------------------------------------------------------------------------------------------------------- TFDS


class Tfds:
    """A TensorFlow Datasets data set in array_record form, through tfds.data_source; TensorFlow is not imported.

    data_dir: where it was prepared.  keys: {our key: feature, nested ones as "captions/text"}; by default the feature
    of the same name, else the only Image, ClassLabel or Text feature.  Images stay encoded for the pipeline to decode.
    """

    def __init__(self, name: str, split: str = "train", data_dir: str | None = None, keys: Mapping | None = None):
        self.name, self.split, self.data_dir, self.keys = name, split, data_dir, dict(keys or {})
        self._open()

    def _open(self):
        try:
            import tensorflow_datasets as tfds
        except ImportError as error:
            raise ImportError(
                "tfds: needs TensorFlow Datasets, not TensorFlow: pip install 'tensorflow-datasets>=4.9.10'"
            ) from error
        what, where = f"tfds:{self.name}", {"split": self.split, "data_dir": self.data_dir}
        try:
            features = tfds.builder(self.name, data_dir=self.data_dir).info.features
            self.keys = self.keys or _feature_keys(what, features, tfds.features)
            skip = {path: tfds.decode.SkipDecoding() for path in [self.keys.get("image")] if path and "/" not in path}
            self._data = tfds.data_source(self.name, **where, decoders=skip or None)
        except DataError:
            raise
        except Exception as error:  # tfds raises many kinds, RuntimeError and AttributeError among them
            raise DataError(
                what,
                f"{type(error).__name__}: {str(error).strip()[:400]}",
                f"a prepared data set at {where}",
                "prepare it with file_format='array_record'; an AttributeError from protobuf 7 needs "
                "tensorflow-datasets>=4.9.10",
            ) from error
        label = self.keys.get("label")
        self.classes = list(getattr(features[label], "names", None) or []) if label in features else []

    def __getstate__(self):
        return {key: value for key, value in self.__dict__.items() if key != "_data"}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._open()

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, i: int) -> dict:
        return self.__getitems__([i])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict]:
        raws = self._data.__getitems__([int(i) for i in indices])
        return [self._standard(raw, i) for raw, i in zip(raws, indices)]

    def _standard(self, raw: Mapping, i: int) -> dict:
        example = {"name": f"tfds:{self.name}/{self.split}#{i}"}
        for key, path in self.keys.items():
            value = raw
            for part in path.split("/"):
                value = value[part]
            if key == "caption":
                texts = [t.decode("utf-8", "replace") if isinstance(t, bytes) else str(t) for t in np.atleast_1d(value)]
                value = texts[0] if np.ndim(value) == 0 else texts
            example[key] = int(value) if key == "label" else value
        return example


def _feature_keys(what: str, features, kinds) -> dict[str, str]:
    keys = {}
    for key, kind in (("image", kinds.Image), ("label", kinds.ClassLabel), ("caption", kinds.Text)):
        names = [name for name, feature in features.items() if isinstance(feature, kind)]
        if key in names or len(names) == 1:
            keys[key] = key if key in names else names[0]
        elif names and key == "image":
            raise DataError(
                what, f"several images: {', '.join(names)}", "one feature for image", "set keys={'image': ...}"
            )
    if "image" not in keys:
        raise DataError(what, f"features {', '.join(features)}", "one that is an image", "set keys={'image': ...}")
    return keys


# --------------------------------------------------------------------------------------------------------------- npz


class Npz:
    """Arrays of one .npz file, held in memory: image(s) [n, h, w(, c)], label(s) [n] and caption(s) [n] of str.

    Pickled (object) arrays are refused.  Raises DataError if the file or its arrays do not fit together.
    """

    def __init__(self, pattern: str | os.PathLike):
        self.path = os.fspath(pattern)
        try:
            with np.load(self.path, allow_pickle=False) as file:
                arrays = {key: file[key] for key in file.files}
        except Exception as error:  # zipfile, zlib, numpy and the file system each raise their own
            raise DataError(
                f"npz:{self.path}",
                f"{type(error).__name__}: {error}",
                "an .npz file without pickled objects",
                "check the path; save captions as an array of str",
            ) from error
        singular = {"images": "image", "labels": "label", "captions": "caption"}
        self._arrays = {singular.get(key, key): array for key, array in arrays.items()}
        lengths = {key: array.shape[0] if array.ndim else None for key, array in self._arrays.items()}
        if not lengths.get("image") or len(set(lengths.values())) != 1:
            raise DataError(
                f"npz:{self.path}",
                f"arrays of lengths {lengths}",
                "an array image or images, all as long as it",
                "save it again",
            )

    def __len__(self) -> int:
        return len(self._arrays["image"])

    def __getitem__(self, i: int) -> dict:
        example = {key: array[i] if array.ndim > 1 else array[i].item() for key, array in self._arrays.items()}
        return {"name": f"{self.path}#{i}", **example}
