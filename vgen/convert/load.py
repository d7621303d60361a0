"""Published checkpoints as networks and parameters: `vgen.load`.

Arrays stream one at a time from the file into the pieces that the devices of a mesh hold, in the requested type: the
host never has more than one parameter that is not placed yet, no device more than its share.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, Sharding, SingleDeviceSharding

from vgen import sharding, trees
from vgen.config import UserError
from vgen.convert import families
from vgen.convert.family import Family
from vgen.convert.rules import Match, Rule, Table, prepare, rows
from vgen.convert.sources import Source, open_source
from vgen.types import Params


class Network(NamedTuple):
    """A checkpoint and the network it fits: its family and that family's name, the module, {path: shape struct}."""

    source: Source
    name: str
    family: Family
    model: Any
    shapes: dict[str, jax.ShapeDtypeStruct]

    def table(self) -> Table:
        """The rules that read this checkpoint: the family's, or none where the names are ours already."""
        own = tuple(Rule(path, path) for path in self.shapes)
        return Table(own) if self.source.family else self.family.table(self.model)


def network(source: Source, family: str | None = None) -> Network:
    """Choose a checkpoint's family (see `vgen.convert.families`) and build its network; no array is read.

    family: "vgen.convert.module:NAME", where it does not tell itself.
    """
    name = family or families.find(source)
    kind = families.get(name)
    model = kind.build(source.config, source.shapes)
    return Network(source, name, kind, model, shapes_of(model, kind))


def shapes_of(model: Any, family: Family) -> dict[str, jax.ShapeDtypeStruct]:
    """{path: shape struct} of a network's parameters."""
    inputs = family.inputs(model, np.random.default_rng(0))
    return trees.flatten(jax.eval_shape(model.init, jax.random.key(0), **inputs)["params"])


def load(
    where: str | Path,
    *,
    dtype: Any = None,
    mesh: Mesh | None = None,
    rules: Sequence[tuple[str, Sequence]] = (),
    min_shard_size: int = 2**14,
    family: str | None = None,
    parts: Iterable[str] | None = None,
) -> tuple[Any, Params]:
    """(model, params) of a published checkpoint, or of one in vgen's own form.

    where: a file, a folder, or "hf:owner/name@revision" (see `vgen.convert.sources.open_source`).  A diffusers pipeline
      that `vgen.convert.pipelines` knows gives a `vgen.tasks.diffuse.Diffuse` and its parameters, and so does a single
      file with the whole of Stable Diffusion 1 or XL, for pictures of the published size (see `single_file.load`).
    dtype: of floating-point parameters; None keeps each one's stored type.
    mesh, rules, min_shard_size: where parameters go (see `vgen.sharding.spec_for`); without a mesh, the first device.
    family: "vgen.convert.module:NAME", where the checkpoint does not tell.
    parts: of a pipeline, which then gives ({part: model}, {part: params}).
    Raises UserError for what cannot be read, and ConvertError, which is one, listing every array that is missing,
    left over, of the wrong shape or the wrong kind of number.
    """
    source = open_source(where)
    place = dict(dtype=dtype, mesh=mesh, rules=rules, min_shard_size=min_shard_size)
    if not isinstance(source, dict):
        if parts is not None:
            raise UserError(f"{where}: parts={list(parts)}, but this is one network")
        from vgen.convert import single_file  # it reads parts by this module

        if family is None and (kind := single_file.kind_of(source)):
            return single_file.load_plain(where, kind, **place)
        return load_source(source, family=family, **place)
    if family is not None:
        raise UserError(f"{where}: family={family!r}, but this is a pipeline of {', '.join(source)}")
    from vgen.convert import pipelines  # it reads parts by this module

    if parts is None and not pipelines.by_parts(source):
        return pipelines.load(source, **place)
    names = list(source if parts is None else parts)
    if unknown := [name for name in names if name not in source]:
        raise UserError(f"{where}: has no part {unknown[0]!r}; there are {', '.join(source)}")
    found = {name: network(source[name]) for name in names}  # all, before any of them is read
    params = {name: read(net, **place) for name, net in found.items()}
    return {name: net.model for name, net in found.items()}, params


def load_source(source: Source, *, family: str | None = None, **place) -> tuple[Any, Params]:
    """(model, params) of an open checkpoint; arguments as of `load`."""
    net = network(source, family)
    return net.model, read(net, **place)


def params(where: str | Path) -> Params:
    """The parameters alone, of one network: a reader for `vgen.fields.InitConfig`."""
    source = open_source(where)
    if isinstance(source, dict):
        raise UserError(f"{where} is a pipeline of {', '.join(source)}: name the folder of one of them")
    return load_source(source)[1]


def read(
    net: Network,
    *,
    dtype: Any = None,
    mesh: Mesh | None = None,
    rules: Sequence[tuple[str, Sequence]] = (),
    min_shard_size: int = 2**14,
) -> Params:
    """The parameters of a network, placed; arguments as of `load`."""
    tensors = net.source.tensors
    try:
        matches, known = prepare(tensors, net.table(), net.shapes)
    except UserError as error:
        raise type(error)(f"{net.source.path} as {net.name}: {error}") from None
    if mesh is None:
        device = jax.config.jax_default_device or jax.local_devices()[0]
        places: Mapping[str, Sharding] = dict.fromkeys(net.shapes, SingleDeviceSharding(device))
    else:
        places = sharding.param_shardings(net.shapes, mesh, rules, min_shard_size)
    flat: dict[str, jax.Array] = {}
    for match in matches:
        flat |= _placed(match, lambda name: tensors[known[name]].read(), net.shapes, places, dtype)
    return trees.unflatten(flat)


def _placed(match: Match, read, shapes, places: Mapping[str, Sharding], dtype: Any) -> dict[str, jax.Array]:
    """{path: array on its devices} of one match."""
    pieces: dict[str, _Pieces] = {}
    for i, row in enumerate(rows(match, read)):
        for path, array in zip(match.paths, row):
            if path not in pieces:
                pieces[path] = _Pieces(tuple(shapes[path].shape), _kept(array.dtype, dtype), places[path])
            pieces[path].fill(array, i if match.stacked else None)
        del row, array
    return {path: pieces.pop(path).array() for path in match.paths}


def _kept(stored: np.dtype, wanted: Any) -> np.dtype:
    """The type that an array of type `stored` is kept in: `wanted` for floating-point numbers, if given."""
    if wanted is not None and jax.numpy.issubdtype(stored, jax.numpy.floating):
        return np.dtype(wanted)
    return jax.dtypes.canonicalize_dtype(stored)


class _Pieces:
    """The parts of one parameter that the devices here hold, filled row by row, each part once."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, place: Sharding):
        self.shape, self.place = shape, place
        self.bounds = {
            device: tuple(s.indices(n)[:2] for s, n in zip(index, shape))
            for device, index in place.addressable_devices_indices_map(shape).items()
        }
        self.buffers = {
            bounds: _aligned([stop - start for start, stop in bounds], dtype) for bounds in set(self.bounds.values())
        }

    def fill(self, array: np.ndarray, row: int | None) -> None:
        """Write an array, or row `row` of a stacked one, cast as numpy casts."""
        for bounds, buffer in self.buffers.items():
            if row is not None:
                (start, stop), *bounds = bounds
                if not start <= row < stop:
                    continue
                buffer = buffer[row - start : row - start + 1]
                array_ = array[None]
                bounds = [(0, 1), *bounds]
            else:
                array_ = array
            buffer[...] = array_[tuple(slice(*b) for b in bounds)]

    def array(self) -> jax.Array:
        """The parameter; on a CPU it keeps the buffers, which nothing else may write to from here on."""
        parts = [jax.device_put(self.buffers[bounds], device) for device, bounds in self.bounds.items()]
        return jax.make_array_from_single_device_arrays(self.shape, self.place, parts)


def _aligned(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """An empty array at a multiple of 64 bytes, which JAX on a CPU takes over without copying it."""
    nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = np.empty(nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + nbytes].view(dtype).reshape(shape)
