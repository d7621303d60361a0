"""Parameters as files: a published layout that PyTorch's libraries read, or vgen's own form."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vgen import trees
from vgen.config import UserError
from vgen.convert import families, formats, hub, sources
from vgen.convert.rules import exported, exported_shapes
from vgen.types import Params

SHARD = 5 * 10**9  # bytes of a file, as the published libraries choose
PER_FILE = (
    "dtype",
    "torch_dtype",
    "quantization_config",
    "transformers_version",
    "_diffusers_version",
    "_name_or_path",
)


def export(
    where: str | Path,
    model: Any,
    params: Params,
    family: str,
    *,
    config: Mapping[str, Any] | None = None,
    shard: int = SHARD,
) -> None:
    """Write a network in the published layout of a family ("vgen.convert.module:NAME").

    where: a new folder, for safetensors, in shards above `shard` bytes, and the layout's config.json, if it has one;
      or a new .safetensors or .npz file.
    config: of the checkpoint that the parameters came from; its entries are kept where the family has none of its own.
    Raises UserError if `where` holds something already, ConvertError for parameters that the layout has no name for.
    """
    kind, path = families.get(family), Path(where)
    arrays = exported(trees.flatten(params), kind.table(model))
    if path.suffix in (".safetensors", ".npz"):
        new_folder(path)
        write = formats.write_safetensors if path.suffix == ".safetensors" else lambda p, found: np.savez(p, **found)
        write(path, dict(arrays))
        return
    settings = None
    if kind.config is not None:
        kept = {key: value for key, value in (config or {}).items() if key not in PER_FILE}
        settings = kept | kind.config(model)
    stem = "diffusion_pytorch_model" if settings and "_class_name" in settings else "model"
    new_folder(path)
    write_folder(path, arrays, stem, shard)
    if settings is not None:
        (path / "config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")


def save(
    where: str | Path,
    model: Any,
    params: Params,
    family: str,
    *,
    config: Mapping[str, Any] | None = None,
    shard: int = SHARD,
) -> None:
    """Write a network in vgen's own form: a new folder with safetensors of flattened paths, and vgen.json.

    family, config: as for `export`; beside them vgen.json holds the shapes that the published layout would have, from
    which networks without a config are built.  `vgen.load` reads the folder again; so does `InitConfig.file`.
    """
    kind, path = families.get(family), Path(where)
    flat = trees.flatten(params)
    shapes = exported_shapes(flat, kind.table(model))
    settings = dict(config or (kind.config(model) if kind.config is not None else {}))
    new_folder(path)
    write_folder(path, ((name, np.asarray(value)) for name, value in flat.items()), "model", shard)
    text = json.dumps(dict(family=family, config=settings, shapes=shapes), sort_keys=True)
    (path / sources.OWN).write_text(text + "\n")


def new_folder(path: str | Path) -> Path:
    """Make a folder, or the folder of a file, and return the path; UserError if something is there."""
    path = Path(path)
    try:
        if path.is_dir() and any(path.iterdir()) or path.is_file():
            raise UserError(f"{path} is not empty: name a new place, nothing is written over")
        (path.parent if path.suffix in (".safetensors", ".npz") else path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {path}: {error.strerror or error}") from None
    return path


def write_folder(path: Path, arrays: Iterable[tuple[str, np.ndarray]], stem: str, shard: int) -> None:
    """Write named arrays as STEM.safetensors or, above `shard` bytes, as STEM-00001-of-0000N and an index.

    Arrays are taken one after the other; at most one shard of them is held.
    """
    files: list[list[str]] = []
    batch: dict[str, np.ndarray] = {}
    size = total = 0

    def flush() -> None:
        formats.write_safetensors(path / f"{stem}-{len(files)}.part", batch)
        files.append(list(batch))
        batch.clear()

    for name, array in arrays:
        if batch and size + array.nbytes > shard:
            flush()
            size = 0
        batch[name] = array
        size, total = size + array.nbytes, total + array.nbytes
    flush()
    names = [f"{stem}-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    if len(files) == 1:
        names = [f"{stem}.safetensors"]
    for i, name in enumerate(names):
        (path / f"{stem}-{i}.part").replace(path / name)
    if len(files) > 1:
        places = {name: file for file, held in zip(names, files) for name in held}
        index = dict(metadata=dict(total_size=total), weight_map=places)
        (path / f"{stem}.safetensors{hub.INDEX}").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
