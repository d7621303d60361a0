"""How large the programs of the published networks are, and how long they take to trace and to compile.

Nothing is allocated but the program: parameters are shapes alone.
"""

import re
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vgen.config import UserError, resolve


class Case(NamedTuple):
    """One row: a network of `target` with the constant `sizes` of its file and `fields`, called with arrays of shapes.

    inputs: {argument: (shape, dtype)}, or a tuple of such for an argument that is a tuple.  method: of the module.
    """

    name: str
    target: str
    sizes: str
    fields: Mapping[str, Any]
    inputs: Mapping[str, Any]
    method: str = "__call__"


def _text(batch: int, length: int, width: int) -> dict[str, Any]:
    return dict(context=((batch, length, width), float))


def _image(*shape: int) -> dict[str, Any]:
    return dict(x=(shape, float), t=((shape[0],), float))


_UNET = "vgen.models.unet:UNet"
_LABELS = dict(labels=((2,), np.int32))
CASES = (
    Case("DDPM, CIFAR-10", _UNET, "DDPM_CIFAR10", {}, _image(2, 32, 32, 3)),
    Case("ADM, 256 px", _UNET, "ADM_256", {}, _image(2, 256, 256, 3) | _LABELS),
    Case("Stable Diffusion 1.5 U-Net", _UNET, "SD1", {}, _image(2, 64, 64, 4) | _text(2, 77, 768)),
    Case("Stable Diffusion 2.1 U-Net", _UNET, "SD2", {}, _image(2, 96, 96, 4) | _text(2, 77, 1024)),
    Case("Stable Diffusion XL U-Net", _UNET, "SDXL", {},
         _image(2, 128, 128, 4) | _text(2, 77, 2048) | dict(added=(((2, 1280), float), ((2, 6), float)))),
    Case("DiT-XL/2, 256 px", "vgen.models.dit:DiT", "XLARGE", {}, _image(2, 32, 32, 4) | _LABELS),
    Case("PixArt-alpha, 512 px", "vgen.models.pixart:PixArt", "", dict(sample_size=64),
         _image(2, 64, 64, 4) | _text(2, 120, 4096)),
    Case("KL decoder, 512 px", "vgen.models.autoencoder:AutoencoderKL", "KL_F8", {}, dict(z=((1, 64, 64, 4), float)),
         "decode"),
    Case("ViT-L/16", "vgen.models.vit:ViT", "LARGE", {}, dict(images=((8, 224, 224, 3), float))),
    Case("T5-XXL encoder", "vgen.models.t5:T5Encoder", "XXL", {},
         dict(tokens=((2, 128), np.int32), mask=((2, 128), bool))),
    Case("Muse, 3B base", "vgen.models.muse:BaseTransformer", "BASE_3B", {},
         dict(tokens=((2, 256), np.int32), text=((2, 128, 4096), float), text_mask=((2, 128), bool))),
    Case("aMUSEd, 256 px", "vgen.models.uvit:UVit", "AMUSED_256", {},
         dict(tokens=((2, 16, 16), np.int32), text=((2, 77, 768), float), pooled=((2, 768), float),
              micro=((2, 5), float))),
)  # fmt: skip


class Row(NamedTuple):
    """parameters: their number.  equations: of the jaxpr, inner programs included.  lines: of the StableHLO text.

    seconds: (tracing and lowering, compiling).
    """

    name: str
    parameters: int
    equations: int
    lines: int
    seconds: tuple[float, float]


def equations(jaxpr: Any) -> int:
    """The number of equations of a jaxpr, those of inner programs included."""
    total = len(jaxpr.eqns)
    for equation in jaxpr.eqns:
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                total += equations(inner) if hasattr(inner, "eqns") else 0
    return total


def program(case: Case) -> tuple[Any, Callable[..., Any], Any, Any]:
    """(module, function of parameters and inputs, shapes of its parameters, shapes of its inputs)."""
    sizes = resolve(f"{case.target.partition(':')[0]}:{case.sizes}") if case.sizes else {}
    module = resolve(case.target)(**sizes, **case.fields)
    inputs = {name: _struct(given) for name, given in case.inputs.items()}
    init = lambda key, inputs: module.init(key, **inputs, method=case.method)["params"]
    run = lambda params, inputs: module.apply({"params": params}, **inputs, method=case.method)
    return module, run, jax.eval_shape(init, jax.random.key(0), inputs), inputs


def measure(case: Case) -> Row:
    """Trace, lower and compile the forward pass of one network, in float32, from shapes alone."""
    _, run, params, inputs = program(case)
    start = time.perf_counter()
    traced = jax.jit(run).trace(params, inputs)
    lowered = traced.lower()
    middle = time.perf_counter()
    lowered.compile()
    end = time.perf_counter()
    count = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))
    lines = lowered.as_text().count("\n")
    return Row(case.name, count, equations(traced.jaxpr.jaxpr), lines, (middle - start, end - middle))


def _struct(given: Any) -> Any:
    if isinstance(given[1], tuple):
        return tuple(_struct(each) for each in given)
    shape, dtype = given
    return jax.ShapeDtypeStruct(shape, jnp.float32 if dtype is float else dtype)


def table(only: str = "") -> Iterator[str]:
    """The lines of the table, each as soon as it is measured; UserError if no case's name has `only` in it.

    The persistent cache of compiled programs is off: what is in it would cost nothing.
    """
    cases = [case for case in CASES if re.search(only, case.name)]
    if not cases:
        raise UserError(f"no case matches {only!r}; there are {', '.join(case.name for case in CASES)}")
    yield f"{'network':<28} {'parameters':>14} {'equations':>10} {'HLO lines':>10} {'trace s':>8} {'compile s':>10}"
    for case in cases:
        cached = jax.config.jax_enable_compilation_cache
        jax.config.update("jax_enable_compilation_cache", False)
        try:
            row = measure(case)
        finally:
            jax.config.update("jax_enable_compilation_cache", cached)
        numbers = f"{row.parameters:>14,} {row.equations:>10,} {row.lines:>10,}"
        yield f"{row.name:<28} {numbers} {row.seconds[0]:8.1f} {row.seconds[1]:10.1f}"
