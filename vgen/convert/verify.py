"""The PyTorch reference and vgen's network, with one checkpoint's weights, on the same random inputs."""

import contextlib
import importlib
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vgen import trees
from vgen.config import UserError
from vgen.convert import families, formats, load
from vgen.convert.export import export
from vgen.convert.family import Family
from vgen.convert.load import Network
from vgen.convert.rules import exported, exported_shapes
from vgen.convert.sources import Source


def errors(
    source: Source, family: str | None = None, seed: int = 0, layout: str | None = None
) -> dict[str, tuple[float, float]]:
    """{output: (largest absolute difference, the same relative to the reference's largest value)}, in float32.

    layout: "vgen.convert.module:NAME" of another layout of the network, whose reference is asked instead: a checkpoint
      of the authors is compared through an export for the package that has the network.  By default the layout
      itself, or where it has no reference the first one beside it that has one and names for every parameter.
    Raises UserError where no layout has a reference, the package that has it is not installed, or the reference does
    not accept the weights.
    """
    stored = load.network(source, family)
    net = stored if layout is None and _has_reference(stored.family) else _through(stored, layout)
    _import("torch", net)
    inputs = net.family.inputs(net.model, np.random.default_rng(seed))
    params = load.read(stored, dtype=np.float32)
    with jax.default_matmul_precision("highest"):
        ours = net.family.outputs(jax.jit(net.model.apply)({"params": params}, **inputs))
    ours = {name: np.asarray(value, np.float64) for name, value in ours.items()}
    theirs = _reference_outputs(net, params, inputs)
    if set(ours) != set(theirs):
        raise ValueError(f"{net.name}: outputs {sorted(ours)}, of the reference {sorted(theirs)}")
    found = {}
    for name, want in theirs.items():
        got, want = ours[name], np.asarray(want, np.float64)
        if got.shape != want.shape:
            raise UserError(f"{net.name}: output {name} has shape {got.shape}, of the reference {want.shape}")
        finite = np.isfinite(got).all() and np.isfinite(want).all()
        difference = float(np.abs(got - want).max()) if finite else float("inf")
        found[name] = (difference, difference / max(float(np.abs(want).max()), 1e-30) if finite else float("inf"))
    return found


def _has_reference(family: Family) -> bool:
    return None not in (family.reference, family.compare, family.outputs)


def _through(net: Network, layout: str | None) -> Network:
    """The network as an export in another layout, or in the first beside it that will do; UserError if none will."""
    if layout is not None:
        if not _has_reference(families.get(layout)):
            raise UserError(f"{net.source.path}: no package has a reference network for {layout}")
        return _exported(net, layout)
    module = net.name.partition(":")[0]
    beside = [
        f"{module}:{name}" for name, value in vars(importlib.import_module(module)).items() if isinstance(value, Family)
    ]
    beside = [name for name in beside if name != net.name and _has_reference(families.get(name))]
    for name in beside:
        other = _exported(net, name)
        try:
            exported_shapes(net.shapes, other.family.table(net.model))
            if other.family.config is not None:
                other.family.config(net.model)
        except (UserError, AttributeError):  # another network, or one that the layout cannot say
            continue
        return other
    others = f", and {', '.join(beside)} cannot hold it" if beside else ""
    raise UserError(f"{net.source.path}: no package has a reference network for {net.name}{others}")


def _exported(net: Network, layout: str) -> Network:
    return net._replace(
        source=net.source._replace(tensors={}, config={}), name=layout, family=families.get(layout)
    )  # fmt: skip


def _reference_outputs(net: Network, params: Any, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    import torch

    with torch.no_grad():
        if isinstance(net.family.reference, str):
            with _published(net, params) as folder:
                module = _pretrained(net.family.reference, folder, net)
        else:
            module = _bare(net, params)
        return net.family.compare(module.float().eval(), inputs)


@contextlib.contextmanager
def _published(net: Network, params: Any) -> Iterator[Path]:
    """A folder that `from_pretrained` reads: the checkpoint's own, or an export of it."""
    path = net.source.path
    if (
        net.source.tensors
        and (path / "config.json").is_file()
        and any(f.suffix in (".safetensors", ".bin") for f in path.iterdir())
    ):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        export(folder, net.model, params, net.name, config=net.source.config)
        yield Path(folder)


def _pretrained(reference: str, folder: Path, net: Network) -> Any:
    """The network of "package.module:Class" with a folder's weights; UserError unless all of its own are there."""
    module, _, name = reference.partition(":")
    kind = getattr(_import(module, net), name)
    model, info = kind.from_pretrained(str(folder), output_loading_info=True)
    if lacking := sorted(info.get("missing_keys") or []):
        raise UserError(f"{folder}: {reference} misses {', '.join(lacking[:5])} ({len(lacking)} names)")
    return model


def _bare(net: Network, params: Any) -> Any:
    """The network that the family's function makes, with the checkpoint's arrays by their stored names."""
    import torch

    family, table = net.family, net.family.table(net.model)
    try:
        module = family.reference(net.source.config if family.config is not None else net.model)
    except ModuleNotFoundError as error:
        raise UserError(f"verifying {net.source.path} needs {error.name}: pip install {error.name}") from None
    tensors = net.source.tensors
    if net.source.family or not tensors:
        tensors = {name: formats.held(array) for name, array in exported(trees.flatten(params), table)}
    state = {name: torch.from_numpy(_float32(stored.read())) for name, stored in tensors.items()}
    lacking, more = module.load_state_dict(state, strict=False)
    if wrong := [name for name in (*lacking, *more) if not any(re.fullmatch(p, name) for p in table.ignore)]:
        raise UserError(f"{net.source.path}: the reference of {net.name} differs in {', '.join(wrong[:5])}")
    return module


def _float32(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float32) if jax.numpy.issubdtype(array.dtype, jax.numpy.floating) else array


def _import(module: str, net: Network) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = (error.name or module).partition(".")[0]
        raise UserError(f"verifying {net.source.path} needs {package}: pip install {package}") from None
