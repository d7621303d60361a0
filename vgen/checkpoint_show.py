"""What a run's checkpoints hold, read from their metadata, with no array loaded: python -m vgen.checkpoint show DIR."""

import argparse
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from vgen.bucket import Bucket, is_url
from vgen.checkpoint import Checkpoints, quiet
from vgen.config import UserError, brief
from vgen.convert.formats import Stored, parse_json, read_json
from vgen.convert.show import size, total, tree

ITEMS = ("weights", "average", "rest")


class Array(NamedTuple):
    """An array of a checkpoint, and how it was split when it was saved.

    mesh: (axis, devices) of each.  split: of the array's first dimensions, the mesh's axis or "".
    """

    stored: Stored
    mesh: tuple[tuple[str, int], ...]
    split: tuple[str, ...]


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, or 2 after a mistake of the caller."""
    parser = argparse.ArgumentParser("vgen.checkpoint", description="Checkpoints of vgen's own runs.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="show")
    show = commands.add_parser("show", help="steps, arrays, shapes, bytes, shardings; nothing is loaded or changed")
    show.add_argument("folder", help="a workdir, or one stage of it; gs://... too")
    show.add_argument("--step", type=int, help="(default: the newest)")
    show.add_argument("--arrays", action="store_true", help="name all arrays, with their shapes")
    options = parser.parse_args(argv)
    try:
        for line in lines(options.folder, options.step, options.arrays):
            print(line, flush=True)
    except UserError as error:
        print(f"vgen.checkpoint: {error}", file=sys.stderr, flush=True)
        return 2
    return 0


def lines(folder: str | Path, step: int | None = None, arrays: bool = False) -> Iterator[str]:
    """The report on a workdir, or on a stage's folder.

    step: the newest by default.  arrays: also a line for each of the weights and averages.
    Raises UserError for a folder without checkpoints, a step that is not there, and metadata that cannot be read.
    """
    if is_url(folder) and not Bucket(str(folder)).native:
        raise UserError(f"{folder}: only gs:// is read where it is; copy it to a folder and show that")
    folder = epath.Path(folder) if is_url(folder) else Path(folder).resolve()
    folder = folder.parent if folder.name == "checkpoints" else folder
    stages = [folder] if (folder / "checkpoints").is_dir() else _stages(folder)
    root = folder if (folder / "config.json").exists() else folder.parent
    if (root / "config.json").exists():
        config = _json(root / "config.json")
        yield f"{root}: {config.get('name')}, seed {config.get('seed')}, stages {', '.join(config.get('order', ()))}"
    for stage in stages:
        yield from _stage(stage, step, arrays)


def _stages(folder: Path | epath.Path) -> list[Path | epath.Path]:
    found = [path.parent for path in folder.glob("*/checkpoints") if path.is_dir()]
    if not found:
        raise UserError(f"{folder} holds no checkpoints: give a workdir, or the folder of a stage in one")
    order = _json(folder / "config.json").get("order", []) if (folder / "config.json").exists() else []
    return sorted(found, key=lambda path: (order.index(path.name) if path.name in order else len(order), path.name))


def _stage(folder: Path | epath.Path, step: int | None, arrays: bool) -> Iterator[str]:
    bucket = Bucket(str(folder)) if is_url(folder) else None
    checkpoints = Checkpoints(bucket.folder if bucket else folder, read_only=True, bucket=bucket)
    steps = checkpoints.steps()
    checkpoints.close()
    if not steps:
        raise UserError(f"{folder / 'checkpoints'} holds no complete checkpoint")
    if step is not None and step not in steps:
        raise UserError(f"--step={step}: {folder / 'checkpoints'} has {', '.join(map(str, steps))}")
    step = steps[-1] if step is None else step
    place = folder / "checkpoints" / str(step)
    others = ", ".join(str(each) for each in steps if each != step)
    sealed = "with checksums" if bucket or place.with_name(f"{step}.crc.json").exists() else "without checksums"
    yield f"{folder.name}: step {step}{f' (also {others})' if others else ''}, {size(_bytes(place))} on disk, {sealed}"
    meta = _json(place / "meta" / "metadata")
    for name in ITEMS:
        if not (place / name).is_dir():
            continue
        held = _arrays(place / name)
        yield f"  {name:<8} {total({path: array.stored for path, array in held.items()})}"
        for split, count in _splits(held).items():
            yield f"           {split}: {count}"
        if arrays and name != "rest":
            yield from (f"    {line}" for line in tree({path: array.stored for path, array in held.items()}))
    if meta.get("data"):
        yield f"  data     {', '.join(f'{key} {value}' for key, value in meta['data'].items())}"
    for path, origin in sorted(meta.get("frozen", {}).items()):
        yield f"  frozen   {path}: {', '.join(f'{key} {value}' for key, value in sorted(origin.items()))}"


def _json(path: Path | epath.Path) -> dict[str, Any]:
    return read_json(path) if isinstance(path, Path) else parse_json(path.read_bytes(), str(path))


def _bytes(folder: Path | epath.Path) -> int:
    return sum(_bytes(path) if path.is_dir() else path.stat().length for path in epath.Path(folder).iterdir())


def _arrays(folder: Path | epath.Path) -> dict[str, Array]:
    """{path: what is known} of an item of a checkpoint."""
    try:
        with quiet(), ocp.StandardCheckpointer() as reader:  # it misses a file of the step in the folder of an item
            found: Any = reader.metadata(folder)
    except Exception as error:  # noqa: BLE001  orbax and tensorstore raise many kinds for a damaged file
        raise UserError(f"{folder}: its metadata cannot be read ({brief(error)})") from None
    found = getattr(found, "item_metadata", found)
    rows = jax.tree_util.tree_flatten_with_path(getattr(found, "tree", found))[0]
    if not rows:  # what orbax makes of damaged files
        raise UserError(f"{folder}: its metadata cannot be read (no array is named)")
    return {jax.tree_util.keystr(path, simple=True, separator="/"): _array(leaf) for path, leaf in rows}


def _array(leaf: Any) -> Array:
    stored = Stored(tuple(leaf.shape), np.dtype(leaf.dtype), lambda: np.empty(0))
    if not hasattr(leaf.sharding, "partition_spec"):
        return Array(stored, (), ())
    placed = leaf.sharding
    split = [axes if isinstance(axes, str) else "+".join(axes or ()) for axes in placed.partition_spec]
    return Array(stored, tuple(zip(placed.axis_names, map(int, placed.shape), strict=True)), tuple(split))


def _splits(held: dict[str, Array]) -> dict[str, str]:
    """{how: how many arrays and bytes}, of those arrays that were split over devices."""
    counts, nbytes = Counter(), Counter()
    for array in held.values():
        axes = {axis for part in array.split for axis in part.split("+")}
        if any(devices > 1 and axis in axes for axis, devices in array.mesh):
            how = f"split as ({', '.join(part or '-' for part in array.split)}) over " + ", ".join(
                f"{axis} {devices}" for axis, devices in array.mesh
            )
            counts[how] += 1
            nbytes[how] += array.stored.nbytes
    return {how: f"{count} arrays, {size(nbytes[how])}" for how, count in counts.most_common()}
