"""Meshes from config, parameters by rules, activations by one constraint.

Axes: `data` (replicas), `fsdp` (parameters and batch are split), `sequence` (tokens, or rows of a picture, are split
between layers), `tensor` (heads and hidden widths inside a layer).  A batch is split over data and fsdp together.
"""

import math
import re
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from vgen.config import ConfigError

AXES = ("data", "fsdp", "sequence", "tensor")
BATCH = P(("data", "fsdp"))
# Of every transformer here: by columns, so that a device has whole heads, then by rows, so that one sum ends a branch
# (Megatron-LM, Shoeybi et al. 2019, section 3).
TENSOR = (
    (r"(.*/)?(attn|cross|mlp)\w*/(q|k|v|[kv]_\w+|fc1|gate)/kernel", ("fsdp", "tensor")),
    (r"(.*/)?(attn|cross|mlp)\w*/(q|k|v|[kv]_\w+|fc1|gate)/bias", ("tensor",)),
    (r"(.*/)?(attn|cross|mlp)\w*/(out|fc2)/kernel", ("tensor", "fsdp")),
)


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, sequence: int = 1, devices=None) -> Mesh:
    """A mesh with axes data, fsdp, sequence, tensor; one of them may be -1 and takes the devices that are left.

    Raises ConfigError when the sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = {"data": data, "fsdp": fsdp, "sequence": sequence, "tensor": tensor}
    free = [axis for axis, size in sizes.items() if size == -1]
    fixed = int(np.prod([size for size in sizes.values() if size != -1]))
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise ConfigError(f"mesh: sizes must be positive and at most one -1, got {sizes}")
    if free and fixed and len(devices) % fixed == 0:
        sizes[free[0]] = len(devices) // fixed
    if int(np.prod(list(sizes.values()))) != len(devices):
        raise ConfigError(
            f"mesh {sizes} does not cover {len(devices)} devices: the sizes must multiply to {len(devices)}"
        )
    grid = np.asarray(devices, dtype=object).reshape(tuple(sizes[axis] for axis in AXES))
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def spec_for(path: str, shape: Sequence[int], mesh: Mesh, rules: Sequence[tuple[str, Sequence]], min_size: int) -> P:
    """The PartitionSpec of one parameter: the first rule whose regex fully matches, else the default.

    rules: (regex, entries), entries being one mesh axis (or None) per array axis, right-aligned: a rule written for a
      [in, out] kernel also serves a stacked [layers, in, out] one.
    The default splits the largest axis that `fsdp` divides, and where several devices are along `tensor`, what TENSOR
      names as it says, as far as sizes divide; arrays of fewer than `min_size` values are replicated.
    Raises ConfigError when a rule has more entries than the array has axes, names an axis that the mesh has not, or
      one that does not divide.
    """
    for pattern, entries in rules:
        if re.fullmatch(pattern, path):
            entries = tuple(entries)
            if len(entries) > len(shape):
                raise ConfigError(
                    f"sharding rule {pattern!r} has {len(entries)} entries, {path} has shape {tuple(shape)}"
                )
            entries = (None,) * (len(shape) - len(entries)) + entries
            for size, axis in zip(shape, entries):
                names = [axis] if isinstance(axis, str) else axis or []
                if unknown := sorted(set(names) - set(mesh.shape)):
                    raise ConfigError(
                        f"sharding rule {pattern!r}: no mesh axis {unknown[0]!r}; there are {', '.join(AXES)}"
                    )
                ways = int(np.prod([mesh.shape[name] for name in names]))
                if size % ways:
                    raise ConfigError(
                        f"sharding rule {pattern!r}: {path} {tuple(shape)} is not divisible by {ways} ({axis})"
                    )
            return P(*entries)
    return P() if int(np.prod(shape)) < min_size else _default(path, shape, mesh)


def _default(path: str, shape: Sequence[int], mesh: Mesh) -> P:
    """The PartitionSpec of a large parameter that no rule names."""
    divides = lambda axis, size: mesh.shape[axis] > 1 and size % mesh.shape[axis] == 0
    if mesh.shape["tensor"] > 1:
        for pattern, entries in TENSOR:
            if re.fullmatch(pattern, path):
                n = len(entries)
                found = [axis if divides(axis, size) else None for axis, size in zip(entries, shape[-n:])]
                return P(*(None,) * (len(shape) - n), *found)
    candidates = [i for i, size in enumerate(shape) if divides("fsdp", size)]
    if not candidates:
        return P()
    largest = max(candidates, key=lambda i: (shape[i], i))
    return P(*("fsdp" if i == largest else None for i in range(len(shape))))


def param_shardings(flat: Mapping, mesh: Mesh, rules: Sequence = (), min_size: int = 2**14) -> dict[str, NamedSharding]:
    """{path: NamedSharding} for a flat dict of arrays or shape structs."""
    return {path: NamedSharding(mesh, spec_for(path, leaf.shape, mesh, rules, min_size)) for path, leaf in flat.items()}


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh, count: int | None = None) -> NamedSharding:
    """Axis 0 split over data and fsdp; of `count` examples, which may not divide, as `rows` says."""
    return NamedSharding(mesh, BATCH if count is None else P(rows(mesh, count)))


def rows(mesh: Mesh | jax.sharding.AbstractMesh, count: int) -> tuple[str, ...]:
    """The mesh axes over which `count` examples are split: data and fsdp, or data alone, where they divide, or none."""
    for axes in (("data", "fsdp"), ("data",)):
        ways = math.prod(mesh.shape[axis] for axis in axes)
        if ways > 1 and count % ways == 0:
            return axes
    return ()


def constrain(x: jax.Array) -> jax.Array:
    """Pin an activation [batch, tokens or rows, ...] to the current mesh; identity without one.

    Its first axis is split as `rows` says, its second, where there are three or more, over sequence if it divides.
    Called at block edges and behind convolutions, so that the compiler gathers parameters, not activations;
    and of a split sequence the keys and values, or the rows at the edge of a convolution, rather than everything.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or "data" not in mesh.axis_names:
        return x
    examples = rows(mesh, x.shape[0])
    if not examples:
        return x
    ways = mesh.shape.get("sequence", 1)
    tokens = "sequence" if ways > 1 and x.ndim > 2 and x.shape[1] % ways == 0 else None
    return jax.lax.with_sharding_constraint(x, P(*(examples, tokens, *(None,) * x.ndim)[: x.ndim]))
