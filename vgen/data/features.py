"""Features on disk: what frozen encoders say of every example, computed once, in the place of pictures and texts.

A folder of them holds

    manifest.json        what they were made from, and whether they are complete
    data-*.arrayrecord   the examples (see `vgen.data.cache`); each file appears under its name when it is whole
    data-*.json          beside each: which examples of the source, their buckets' sizes, one run after another, and
                         "slots": their places in the order of one process, however many have written them
    empty.npz            what the encoder says of the empty text
"""

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from vgen.config import UserError, diff
from vgen.data.buckets import Buckets
from vgen.data.cache import SUFFIX, WRITER, ArrayRecords, pack
from vgen.data.images import DataError

FORMAT = 1
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


class Features:
    """The features of one data set in `folder`, whole, begun, or not there yet.

    made_from: what they depend on, JSON: another folder's are refused.  where: the config's key for that folder.
    dtype: of the numbers on disk, one of DTYPES.
    Raises UserError for features that were made from something else, with the difference, and DataError for a folder
    of something else.
    """

    def __init__(self, folder: str | os.PathLike, made_from: Mapping[str, Any], dtype: str, where: str = "the folder"):
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
        self.folder, self.dtype = Path(folder), dtype
        self.made_from = json.loads(json.dumps({**made_from, "dtype": dtype, "format": FORMAT}, default=str))
        try:
            self.manifest = json.loads((self.folder / "manifest.json").read_text())
            old = self.manifest["made_from"]
        except FileNotFoundError:
            self.manifest, old = {}, self.made_from
            if self.folder.is_dir() and any(self.folder.iterdir()):
                raise self._error("files but no manifest.json", "a new or empty folder", f"set {where}") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise self._error(f"no manifest ({error!r})", "a folder of features", "delete it") from None
        if lines := diff(old, self.made_from):
            raise UserError(
                f"the features in {self.folder} are stale, they were made from something else: delete the folder, or "
                f"name another one by {where}\n  " + "\n  ".join(lines[:12])
            )

    def _error(self, got: str, expected: str, todo: str) -> DataError:
        return DataError(f"features {self.folder}", got, expected, todo)

    @property
    def complete(self) -> bool:
        return bool(self.manifest.get("complete"))

    def __reduce__(self):
        return Features, (self.folder, self.made_from, self.dtype)

    # -------------------------------------------------------------------------------------------------------- reading

    def __len__(self) -> int:
        return self.manifest["count"]

    @property
    def keys(self) -> tuple[str, ...]:
        """The arrays and labels of every example."""
        return tuple(self.manifest["keys"])

    @property
    def standalone(self) -> bool:
        """Whether nothing of the source is needed any more: its pictures are here, as latents."""
        return self.manifest["standalone"]

    def source(self, pictures=None) -> "FeatureSource":
        """The examples; pictures: the source that they were made from, where it is needed still.

        Raises DataError where files are missing.
        """
        if not self.complete:
            raise self._error("an unfinished set", "a complete one", "go on with --mode=train")
        there = sorted(path.name for path in self.folder.glob(f"data-*{SUFFIX}"))
        if there != self.manifest["files"]:
            lost = sorted(set(self.manifest["files"]) - set(there)) or ["none, but others were added"]
            raise self._error(f"{len(there)} files, missing {lost[0]}", "those of its manifest", "delete the folder")
        return FeatureSource(self.folder, self.dtype, pictures, self._order())

    def buckets(self) -> Buckets | None:
        """The picture sizes that the examples were brought to; None where they were all the same."""
        runs = [run for notes in self._notes() for run in notes["runs"]]
        if any(size is None for size, _ in runs):
            return None
        sizes = np.repeat(np.array([size for size, _ in runs], np.int32), [count for _, count in runs], axis=0)
        sizes = sizes[self._order()]
        return Buckets(np.unique(sizes, axis=0), sizes)

    def indices(self) -> np.ndarray:
        """int64 [n]: the places of the examples in the source."""
        return np.concatenate([np.array(notes["indices"], np.int64) for notes in self._notes()])[self._order()]

    def _order(self) -> np.ndarray:
        """int64 [n]: where in the files, one behind the other, each example is."""
        notes = self._notes()
        if not all("slots" in each for each in notes):
            return np.arange(sum(len(each["indices"]) for each in notes))
        return np.argsort(np.concatenate([np.array(each["slots"], np.int64) for each in notes]))

    def _notes(self) -> list[dict[str, Any]]:
        files = (self.folder / name for name in self.manifest["files"])
        return [json.loads(path.with_suffix(".json").read_text()) for path in files]

    def empty(self) -> dict[str, np.ndarray]:
        """{name: array} of what stands for no text; {} where there is none."""
        path = self.folder / "empty.npz"
        if not path.is_file():
            return {}
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}

    # -------------------------------------------------------------------------------------------------------- writing

    def begin(self, shards: int = 1, layout: Any = None) -> None:
        """Make the folder; drop what killed processes had not finished.  One process calls it, before all others go on.

        layout: JSON, what the files depend on beside `made_from`, such as how many examples are in each.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        gone = set(self.missing(shards) if self.manifest.get("layout") == layout else range(shards))
        kept = {path for k in range(shards) if k not in gone for path in self._files(k, shards)}
        for path in self.folder.glob("*"):
            if path.suffix == ".part" or (path.name.startswith("data-") and path.with_suffix(SUFFIX) not in kept):
                path.unlink()
        self.manifest = {"made_from": self.made_from, "layout": layout, "complete": False}
        _write_json(self.folder / "manifest.json", self.manifest)

    def _files(self, shard: int, shards: int) -> list[Path]:
        return sorted(self.folder.glob(f"{_stem(shard, shards)}*{SUFFIX}"))

    def missing(self, shards: int) -> list[int]:
        """The shards that are not there whole, from as many processes as their files name."""
        whole = lambda files: files and len(files) == int(re.search(r"(?:-of-(\d+))?$", files[0].stem[20:])[1] or 1)
        return [k for k in range(shards) if not whole(self._files(k, shards))]

    def write(
        self, shard: int, shards: int, examples: Iterable[Mapping[str, Any]], process: int = 0, processes: int = 1
    ) -> None:
        """One shard, or this process's part of it, under its name only when it is whole.

        examples: arrays and labels, with "source_index", their place in the source; if they have "slot", that is their
          place among all examples, otherwise the one in which they come.
        Raises DataError for a number that dtype does not hold.
        """
        from array_record.python.array_record_module import ArrayRecordWriter

        path = self.folder / f"{_stem(shard, shards, process, processes)}{SUFFIX}"
        part, runs, indices, slots = path.with_suffix(".part"), [], [], []
        writer = ArrayRecordWriter(os.fspath(part), WRITER)
        try:
            for example in examples:
                slots += [int(example["slot"])] if "slot" in example else []
                stored = {key: self._stored(key, value) for key, value in example.items() if key != "slot"}
                writer.write(pack(stored))
                size = None if "target" not in example else [int(side) for side in example["target"]]
                if not runs or runs[-1][0] != size:
                    runs.append([size, 0])
                runs[-1][1] += 1
                indices.append(int(example["source_index"]))
        finally:
            writer.close()
        _write_json(path.with_suffix(".json"), {"indices": indices, "runs": runs} | ({"slots": slots} if slots else {}))
        part.replace(path)

    def finish(self, standalone: bool, empty: Mapping[str, np.ndarray], process_index: int = 0) -> None:
        """Declare the set complete.

        standalone: whether nothing of the source is needed any more.  empty: what `empty` is to give.
        """
        files = sorted(path.name for path in self.folder.glob(f"data-*{SUFFIX}"))
        first = ArrayRecords(self.folder)[0]
        keys = [key for key in first if key not in ("source_index", "caption", "name")]
        self.manifest = {"made_from": self.made_from, "files": files, "keys": keys, "standalone": standalone}
        self.manifest |= {"count": len(self.indices()), "complete": True}
        if process_index:
            return
        if empty:
            part = self.folder / "empty.npz.part"
            with part.open("wb") as file:
                np.savez(file, **{name: _wide(x) for name, x in empty.items()})
            part.replace(self.folder / "empty.npz")
        _write_json(self.folder / "manifest.json", self.manifest)

    def _stored(self, key: str, value: Any) -> Any:
        """Numbers as they lie on disk: bfloat16 as its bits, which NumPy's files can hold."""
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "fV":
            return value
        if key in ("original", "corner", "target"):  # pixels: to the last one
            return value.astype(np.float32)
        with np.errstate(over="ignore"):
            stored = value.astype(DTYPES[self.dtype])
        if not np.isfinite(stored.astype(np.float32)).all() and np.isfinite(value.astype(np.float32)).all():
            most = np.abs(value.astype(np.float32)).max()
            raise self._error(f"{key} of {most:.3g}", f"what {self.dtype} holds", "set dtype='bfloat16' in the cache")
        return stored.view(np.uint16) if self.dtype == "bfloat16" else stored


class FeatureSource:
    """Examples by index: their features and what else was kept; with `pictures` also all that this source holds.

    order: int [n], the place of each example in the files (default: as they lie there).
    """

    def __init__(self, folder: str | os.PathLike, dtype: str, pictures=None, order: np.ndarray | None = None):
        self._records, self._dtype, self._pictures, self._order = ArrayRecords(folder), dtype, pictures, order

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, i: int) -> dict:
        return self.__getitems__([i])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict]:
        places = indices if self._order is None else [int(self._order[i]) for i in indices]
        examples = self._records.__getitems__(places)
        if self._dtype == "bfloat16":
            bits = lambda x: isinstance(x, np.ndarray) and x.dtype == np.uint16
            examples = [{k: x.view(ml_dtypes.bfloat16) if bits(x) else x for k, x in e.items()} for e in examples]
        if self._pictures is not None:
            examples = [{**example, **self._pictures[example["source_index"]]} for example in examples]
        return examples


class OneCaption:
    """A source whose examples have a caption each, for a pass that sees every example once.

    Reading one with several raises DataError.
    """

    def __init__(self, source):
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, i: int) -> Mapping:
        example = self._source[i]
        if isinstance(example.get("caption"), list) and len(example["caption"]) > 1:
            raise DataError(
                f"captions of {example.get('name', f'example {i}')}", f"{len(example['caption'])}, of which training "
                "draws one each time", "one, because features are computed once",
                "train without a cache, or keep one caption of each",
            )  # fmt: skip
        return example


def _wide(x) -> np.ndarray:
    return np.asarray(x) if x.dtype == bool else np.asarray(x, np.float32)


def _stem(shard: int, shards: int, process: int = 0, processes: int = 1) -> str:
    return f"data-{shard:05d}-of-{shards:05d}" + (f"-{process:03d}-of-{processes:03d}" if processes > 1 else "")


def _write_json(path: Path, value: Any) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value, indent=1))
    part.replace(path)
