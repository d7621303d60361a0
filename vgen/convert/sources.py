"""Where checkpoints come from: a file, a folder, a folder of folders, or "hf:owner/name@revision"; names and arrays.

`open_source` reads names, shapes and dtypes; arrays follow one at a time, when asked for.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vgen import bucket
from vgen.config import UserError, brief
from vgen.convert import formats, hub
from vgen.convert.formats import Stored

OWN = "vgen.json"  # beside the weights in vgen's own form: which family, and its config
STEMS = ("model", "diffusion_pytorch_model", "pytorch_model", "flax_model", "open_clip_model")
# Suffixes in the order in which a folder's files are preferred.
SUFFIXES = (".safetensors", ".npz", ".msgpack", ".bin", ".pt", ".pth", ".ckpt", ".pkl")


class Source(NamedTuple):
    """One network's checkpoint, not read yet.

    path: where it is.  tensors: {name: Stored}.  config: of its config.json, {} where there is none.
    family: "vgen.convert.t5:T5" of vgen's own form, whose names are the network's, "" of any other.
    shapes: {name: shape} of the published layout.
    """

    path: Path
    tensors: Mapping[str, Stored]
    config: Mapping[str, Any] = {}
    family: str = ""
    published: Mapping[str, tuple[int, ...]] = {}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return dict(self.published or {name: stored.shape for name, stored in self.tensors.items()})


class Pipeline(dict[str, Source]):
    """{part: checkpoint} of a diffusers pipeline.  path: its folder.  index: what its model_index.json holds."""

    def __init__(self, path: Path, index: Mapping[str, Any], parts: Mapping[str, Source]):
        super().__init__(parts)
        self.path, self.index = path, index


def local(where: str | Path) -> Path:
    """The file or folder of this machine, of the hub ("hf:...") or a bucket (gs://...), without other weights."""
    if isinstance(where, str) and where.startswith("hf:"):
        return hub.fetch(where, weight_files)
    return bucket.local(where, lambda names: hub.choose(names, weight_files))


def open_source(where: str | Path) -> Source | Pipeline:
    """The checkpoint at a path, "hf:owner/name@revision" or gs://...; of a diffusers pipeline {part: checkpoint}.

    A file: .safetensors, .npz, .msgpack (Flax), or PyTorch's .bin, .pt, .pth, .ckpt, .pkl (see `vgen.convert.pickled`).
    A folder: config.json (or open_clip_config.json) beside weights, in one file or in shards with an index; or
    model_index.json and such folders.
    Raises UserError, one sentence, for whatever is missing, damaged or refused.
    """
    path = local(where)
    if not path.is_dir():
        named = path.name in {stem + suffix for stem in STEMS for suffix in SUFFIXES}
        return Source(path, open_file(path), _config(path) if named or _of_open_clip(path) else {})
    if (path / hub.PIPELINE).is_file():
        return _pipeline(path)
    tensors = _folder_tensors(path)
    if tensors is None:
        raise UserError(f"{path}: no weights in this folder ({', '.join(SUFFIXES)}, or an index of shards)")
    if (path / OWN).is_file():
        return Source(path, tensors, *_own(path / OWN))
    return Source(path, tensors, _config(path / _chosen(path)))


def _of_open_clip(weights: Path) -> bool:
    return weights.name.startswith("open_clip_")


def _config(weights: Path) -> dict[str, Any]:
    """config.json beside a weight file, or open_clip's own where the file is open_clip's; {} without one."""
    names = ["config.json", "open_clip_config.json"]
    for name in reversed(names) if _of_open_clip(weights) else names:
        if (path := weights.with_name(name)).is_file():
            return formats.read_json(path)
    return {}


def _own(path: Path) -> tuple[dict[str, Any], str, dict[str, tuple[int, ...]]]:
    """(config, family, shapes of the published layout) of vgen's own form."""
    own = formats.read_json(path)
    kinds = dict(config=dict, family=str, shapes=dict)
    if any(not isinstance(own.get(key), kind) for key, kind in kinds.items()):
        raise UserError(f"{path}: expected family (a string), config and shapes (objects), got {', '.join(own)}")
    if not all(formats.naturals(shape) for shape in own["shapes"].values()):
        raise UserError(f"{path}: shapes must be lists of natural numbers")
    return own["config"], own["family"], {name: tuple(shape) for name, shape in own["shapes"].items()}


def read_weights(where: str | Path) -> dict[str, np.ndarray]:
    """{name: array} of a whole checkpoint of one network, names and layouts as stored; see `open_source`."""
    source = open_source(where)
    if isinstance(source, dict):
        raise UserError(f"{where} is a pipeline of {', '.join(source)}: name the folder of one of them")
    return {name: stored.read() for name, stored in source.tensors.items()}


def open_file(path: Path) -> dict[str, Stored]:
    """The arrays of one weight file; UserError if it is missing, damaged or of no known kind."""
    if not path.is_file():
        raise UserError(f"there is no weight file {path}")
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path} has suffix {path.suffix!r}, expected {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}")
    try:
        tensors = _reader(path.suffix)(path)
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001  every reader has its own exceptions for a damaged file
        raise UserError(f"cannot read {path}: {brief(error)}") from None
    return {name: stored._replace(read=_guarded(stored.read, name, path)) for name, stored in tensors.items()}


def _reader(suffix: str) -> Callable[[Path], dict[str, Stored]]:
    if suffix == ".safetensors":
        return formats.open_safetensors
    if suffix == ".npz":
        return formats.open_npz
    if suffix == ".msgpack":
        return formats.open_msgpack
    from vgen.convert.pickled import open_pickled

    return open_pickled


def _guarded(read: Callable[[], np.ndarray], name: str, path: Path) -> Callable[[], np.ndarray]:
    """`read`, failing with one sentence (a file cut off or taken away meanwhile, a checksum that is wrong)."""

    def guarded() -> np.ndarray:
        try:
            return read()
        except UserError:
            raise
        except Exception as error:  # noqa: BLE001
            raise UserError(f"cannot read {name!r} of {path}: {brief(error)}") from None

    return guarded


# ---------------------------------------------------------------------------------------------------------- folders


def weight_files(names: list[str]) -> list[str]:
    """Of the names of one folder's files, the one to read: weights, or an index of shards; [] where there is none.

    Raises UserError where several would do and none has a usual name.
    """
    for suffix in SUFFIXES:
        for stem in STEMS:
            for name in (stem + suffix, stem + suffix + hub.INDEX):
                if name in names:
                    return [name]
    for suffix in SUFFIXES:
        for end in (suffix + hub.INDEX, suffix):
            if len(found := sorted(name for name in names if name.endswith(end))) > 1:
                raise UserError(f"several weight files, name one of them: {', '.join(found[:10])}")
            if found:
                return found
    return []


def _chosen(folder: Path) -> str | None:
    """The name of a folder's weight file or index, None where it has none."""
    try:
        return next(iter(weight_files([entry.name for entry in folder.iterdir() if entry.is_file()])), None)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None


def _folder_tensors(folder: Path) -> dict[str, Stored] | None:
    """The arrays of a folder's weights, None where it has none."""
    name = _chosen(folder)
    if name is None:
        return None
    path = folder / name
    return _sharded(path) if path.name.endswith(hub.INDEX) else open_file(path)


def shards(index: Mapping[str, Any], where: str | Path) -> dict[str, list[str]]:
    """{file: its arrays} of an index; UserError if it is none, or names a file that is not beside it."""
    places = index.get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(file, str) for file in places.values()):
        raise UserError(f"{where}: expected a weight_map of array names to file names")
    files: dict[str, list[str]] = {}
    for name, file in places.items():
        if not file or file in (".", "..") or any(mark in file for mark in "/\\\0:"):
            raise UserError(f"{where}: points outside its folder: {name!r} in {file!r}")
        if not file.endswith(SUFFIXES):
            raise UserError(f"{where}: {file!r} has none of the suffixes {', '.join(SUFFIXES)}")
        files.setdefault(file, []).append(name)
    return files


def _sharded(path: Path) -> dict[str, Stored]:
    found: dict[str, Stored] = {}
    for file, names in shards(formats.read_json(path), path).items():
        tensors = open_file(path.with_name(file))
        if differing := sorted(set(names) ^ set(tensors)):
            has = "has not" if differing[0] in names else "also has"
            raise UserError(f"{path}: {file} {has} {differing[0]!r} ({len(differing)} such differences)")
        found |= tensors
    return found


def _pipeline(folder: Path) -> Pipeline:
    """{part: checkpoint} of every part that has weights, in the order of model_index.json."""
    found: dict[str, Source] = {}
    index = formats.read_json(folder / hub.PIPELINE)
    for part, kind in index.items():
        if part.startswith("_") or not isinstance(kind, list) or len(kind) != 2 or kind[1] is None:
            continue
        if any(mark in part for mark in "/\\\0:") or part in (".", ".."):
            raise UserError(f"{folder / hub.PIPELINE}: points outside its folder: {part!r}")
        # a part without a folder of weights is a scheduler, a tokenizer or a processor
        if (folder / part).is_dir() and _has_weights(folder / part):
            found[part] = open_source(folder / part)
        elif (folder / part / "config.json").is_file():
            raise UserError(f"{folder / part}: has config.json but no weights; the download may be incomplete")
        elif not (folder / part).exists() and _config(folder / "config").get("_class_name") == kind[1]:
            # QUIRK: folders of one network (google/ddpm-cifar10-32) hold it themselves (diffusers, from_pretrained)
            found[part] = Source(folder, _folder_tensors(folder) or {}, _config(folder / "config"))
    if not found:
        raise UserError(f"{folder}: none of the parts that {hub.PIPELINE} names has weights")
    return Pipeline(folder, index, found)


def _has_weights(folder: Path) -> bool:
    return any(entry.name.endswith((*SUFFIXES, hub.INDEX)) for entry in folder.iterdir())
