"""LoRA of torch's modules and deltas of `vgen.adapt.lora`; `vgen.convert.lora_files` has the files that hold them.

There are no names here: modules are called as the family's table calls their weights, and factors go through the rule's
operation as the kernel itself does, which `_carried` checks on numbers before it is relied upon.
"""

import functools
import importlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from vgen import trees
from vgen.adapt.lora import depth_of, factors
from vgen.convert import families
from vgen.convert.load import shapes_of
from vgen.convert.rules import LINEAR, ConvertError, Op, Table, exported_shapes, listed, plan, renamed
from vgen.types import Params


class Part(NamedTuple):
    """A network that LoRA changes: the linen module, and its layout ("vgen.convert.module:NAME")."""

    model: Any
    family: str


class Site(NamedTuple):
    """Where the weight of one torch module is kept: the kernels that it makes, and the row of stacked ones."""

    paths: tuple[str, ...]
    row: int | None
    op: Op


class Low(NamedTuple):
    """One kernel's or one module's change, as `vgen.adapt.lora` keeps it, without a stack, or as torch does.

    down: torch's "A" [rank, in] or [rank, in, h, w].  up: torch's "B" [out, rank] or [out, rank, 1, 1].
    """

    down: np.ndarray
    up: np.ndarray
    scale: float


# -------------------------------------------------------------------------------------------------------------- names


def sites(part: Part) -> tuple[dict[str, Site], Table, dict[str, Any]]:
    """({module, as the table spells it: its place}, the table, {path: shape struct} of the network)."""
    family = families.get(part.family)
    shapes, table = shapes_of(part.model, family), family.table(part.model)
    found: dict[str, Site] = {}
    for match in plan(exported_shapes(shapes, table), shapes, table):
        if not all(path.endswith("/kernel") for path in match.paths):
            continue
        whole = match.stacked or not depth_of(shapes[match.paths[0]].shape)  # and not stacked by the operation
        op = match.op if whole else _of_one(match.op)
        for i, row in enumerate(match.names):
            for k, name in enumerate(row if len(row) == 1 or not whole else ()):  # none of a kernel that joins modules
                if name.endswith(".weight"):
                    number = i if match.stacked else None if whole else k
                    found[name.removesuffix(".weight")] = Site(match.paths, number, op)
    return found, table, shapes


def _of_one(op: Op) -> Op:
    """An operation that stacks what several sources give, for one of them."""
    return Op(lambda x: [stack[0] for stack in op.forward(x)], lambda x: op.backward([a[None] for a in x]))


def library_names(part: Part) -> list[str]:
    """Names of the parameters as the installed transformers or diffusers spells them; [] without the library.

    QUIRK: transformers 5 renamed modules (ViT, DINOv2, a CLIP tower alone), which PEFT looks for by their live names
    and does not translate; the tables keep the published ones.  Tested in tests/convert/lora_test.py.
    """
    family = families.get(part.family)
    if not isinstance(family.reference, str) or family.config is None:
        return []
    package, _, name = family.reference.partition(":")
    try:
        import torch

        kind = getattr(importlib.import_module(package), name)
    except ImportError:
        return []
    config = family.config(part.model)
    with torch.device("meta"):
        module = kind.from_config(config) if hasattr(kind, "load_config") else kind(kind.config_class(**config))
    return [name for name, _ in module.named_parameters()]


def spellings(part: Part, table: Table, names: Iterable[str] | None) -> dict[str, str]:
    """{module as the table spells it: as the given names, or the installed library, do}."""
    names = library_names(part) if names is None else names
    known = renamed((name for name in names if name.endswith(".weight")), table)
    return {name.removesuffix(".weight"): stored.removesuffix(".weight") for name, stored in known.items()}


# ------------------------------------------------------------------------------------------------------------ factors


@functools.lru_cache(maxsize=256)
def _carried(op: Op, shapes: tuple[tuple[int, ...], ...]) -> bool:
    """Whether factors of kernels of these shapes, put through an operation, make what the kernels make of it."""
    rng = np.random.default_rng(0)
    down = rng.integers(-3, 4, (*shapes[0][:-1], 2)).astype(np.float32)  # whole numbers: products are exact
    ups = [rng.integers(-3, 4, (*(1 for _ in s[:-2]), 2, s[-1])).astype(np.float32) for s in shapes]
    try:
        low, (weight,) = _outside(op, down, ups, 1.0), op.backward([down @ up for up in ups])
        product = (low.up.reshape(len(low.up), 2) @ low.down.reshape(2, -1)).reshape(weight.shape)
        again, ups_again = _inside(op, low, len(shapes))
        same = all(a.shape == b.shape and (a == b).all() for a, b in zip([again, *ups_again], [down, *ups]))
    except (ValueError, IndexError, TypeError):
        return False
    return same and bool((product == weight).all())


def _outside(op: Op, down: np.ndarray, ups: list[np.ndarray], scale: float) -> Low:
    """The factors of a module whose kernels share `down`."""
    (torch_down,), (torch_up,) = (op if len(ups) == 1 else LINEAR).backward([down]), op.backward(ups)
    return Low(torch_down, torch_up, scale)


def _inside(op: Op, low: Low, kernels: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """(down, one `up` for each kernel) of a module's factors."""
    (down,) = (op if kernels == 1 else LINEAR).forward([low.down])
    ups = op.forward([low.up])
    if len(ups) != kernels:
        raise ValueError(f"{len(ups)} arrays for {kernels} kernels")
    return down, ups


def _module(op: Op, kernels: list[Low | None], shapes: list[tuple[int, ...]]) -> Low:
    """The factors of a module, in torch's order, that makes several kernels: some of them may have no change.

    One `down` of all stays as it is; several come one after the other, and `up` gets blocks.
    """
    there = [low for low in kernels if low is not None]
    first = there[0]
    if len(there) == len(kernels) and all(
        low.scale == first.scale and np.array_equal(low.down, first.down) for low in there
    ):
        return _outside(op, first.down, [low.up for low in there], first.scale)
    down = np.concatenate([low.down for low in there], axis=-1)
    ups, stop = [], 0
    for low, shape in zip(kernels, shapes, strict=True):
        up = np.zeros((down.shape[-1], shape[-1]), down.dtype)
        if low is not None:
            start, stop = stop, stop + low.down.shape[-1]
            up[start:stop] = times(low.up, low.scale)
        ups.append(up)
    return _outside(op, down, ups, 1.0)


def times(array: np.ndarray, scale: float) -> np.ndarray:
    """An array times a number, computed in float32 at least, in the array's dtype."""
    return np.multiply(array, scale, dtype=np.result_type(array.dtype, np.float32)).astype(array.dtype)


def _row(parts: Mapping[str, np.ndarray], row: int | None) -> Low | None:
    """(down, up, scale) of one layer, without the columns that only fill a stack; None where nothing changes."""
    down, up, scale = (np.asarray(parts[name]) for name in ("down", "up", "scale"))
    if row is not None:
        down, up, scale = down[row], up[row], scale[row]
    used = [i for i in range(down.shape[-1]) if down[..., i].any() or up[..., i, :].any()]
    rank = used[-1] + 1 if used else 0
    return Low(down[..., :rank], up[..., :rank, :], float(scale)) if rank and scale != 0 else None


def lows(part: Part, delta: Params) -> tuple[dict[str, Low], Table]:
    """({module: its change}, the table) of a delta.

    Raises ConvertError listing kernels that are no module's weight in this layout, or whose weight is kept in a way
    that no two factors can be, and for a delta that changes nothing.
    """
    found, table, shapes = sites(part)
    changed, made, problems = factors(delta), {}, []
    problems += [f"no module of {part.family} for {path}" for path in sorted(_lost(changed, found))]
    problems += [line for path, parts in changed.items() if path in shapes and (line := _other(path, parts, shapes))]
    if problems:
        raise ConvertError(listed("the delta cannot be written", problems))
    for module, site in found.items():
        if not any(path in changed for path in site.paths):
            continue
        kernels = [tuple(shapes[path].shape) for path in site.paths]
        kernels = [shape[1:] if site.row is not None else shape for shape in kernels]
        if not _carried(site.op, tuple(kernels)):
            problems.append(f"{module}: its weight is no matrix of the kernels {', '.join(site.paths)}")
            continue
        rows = [_row(changed[path], site.row) if path in changed else None for path in site.paths]
        if any(row is not None for row in rows):
            made[module] = _module(site.op, rows, kernels)
    if problems or not made:
        raise ConvertError(listed("the delta cannot be written", problems or ["it changes nothing"]))
    return made, table


def _lost(changed: Mapping[str, Any], found: Mapping[str, Site]) -> set[str]:
    return set(changed) - {path for site in found.values() for path in site.paths}


def _other(path: str, parts: Mapping[str, np.ndarray], shapes: Mapping[str, Any]) -> str:
    """What is wrong with the shapes of a kernel's change, "" if nothing is."""
    down, up, scale = (tuple(parts[name].shape) for name in ("down", "up", "scale"))
    got, want = (*down[:-1], *up[-1:]), tuple(shapes[path].shape)
    good = got == want and down[-1:] == up[-2:-1] and scale == depth_of(want)
    return "" if good else f"{path}: got down {down}, up {up}, scale {scale} for a kernel {want}"


def delta_of(part: Part, changes: Mapping[str, Low], network: tuple | None = None) -> Params:
    """The delta that the changes {module, in any spelling that the table reads: its factors} make.

    Layers of a stack that have none get zeros, those of a lower rank are filled up with zeros.  Modules that the
    table's layout leaves aside (T5's decoder) are left aside.
    Raises ConvertError listing modules that the network lacks and factors of other shapes than its kernels.
    """
    found, table, shapes = network or sites(part)
    stored = {module + ".weight": low for module, low in changes.items()}
    problems, filled = [], {}
    for name, original in renamed(stored, table).items():
        module, low = name.removesuffix(".weight"), stored[original]
        if module not in found:
            problems.append(f"unread {original.removesuffix('.weight')}: the network has no such module")
            continue
        site = found[module]
        kernels = tuple(tuple(shapes[path].shape[site.row is not None :]) for path in site.paths)
        problems += (wrong := _misfit(module, site, low, kernels))
        if not wrong:
            down, ups = _inside(site.op, low, len(kernels))
            for path, up in zip(site.paths, ups, strict=True):
                filled.setdefault(path, {})[site.row] = Low(down, up, low.scale)
    if problems:
        raise ConvertError(listed(f"the LoRA does not fit {part.family}", problems))
    return trees.unflatten({path: _stacked(rows, tuple(shapes[path].shape)) for path, rows in filled.items()})


def _misfit(module: str, site: Site, low: Low, kernels: tuple[tuple[int, ...], ...]) -> list[str]:
    if not _carried(site.op, kernels):
        return [f"{module}: its weight is no matrix of the kernels {', '.join(site.paths)}"]
    rank = low.down.shape[0]
    ups = [np.broadcast_to(np.float32(0), (*(1 for _ in s[:-2]), rank, s[-1])) for s in kernels]
    want = _outside(site.op, np.broadcast_to(np.float32(0), (*kernels[0][:-1], rank)), ups, 1.0)
    got, expected = ((x.down.shape, x.up.shape) for x in (low, want))
    return [] if got == expected else [f"{module}: got {got[0]} and {got[1]}, expected {expected[0]} and {expected[1]}"]


def _stacked(rows: Mapping[int | None, Low], shape: tuple[int, ...]) -> dict[str, Any]:
    """{"down", "up", "scale"} of a kernel from its only row, or from those of some of its layers."""
    if None in rows:
        low = rows[None]
        return dict(down=jnp.asarray(low.down), up=jnp.asarray(low.up), scale=jnp.asarray(np.float64(low.scale)))
    (depth,), rank = depth_of(shape), max(low.down.shape[-1] for low in rows.values())
    any_row = next(iter(rows.values()))
    dtype = np.result_type(*(x.dtype for low in rows.values() for x in low[:2]))
    down = np.zeros((depth, *any_row.down.shape[:-1], rank), dtype)
    up = np.zeros((depth, *any_row.up.shape[:-2], rank, any_row.up.shape[-1]), dtype)
    scale = np.zeros(depth, np.float64)
    for i, low in rows.items():
        r = low.down.shape[-1]
        down[i, ..., :r], up[i, ..., :r, :], scale[i] = low.down, low.up, low.scale
    return {name: jnp.asarray(value) for name, value in dict(down=down, up=up, scale=scale).items()}
