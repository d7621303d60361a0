"""Floating-point operations of programs, as XLA counts them before it optimises, with nothing compiled or allocated."""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from vgen import platform, trees
from vgen.types import Context


def gradients(task: Any, batch: Mapping[str, Any], step: int = 0) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """(function, shapes of its arguments): loss and gradients of what a task's first group trains.

    task: a `vgen.types.Task`.  batch: {name: array or its shape struct}.  The function takes flat parameters that are
    trained, those that are not, a batch and a key.
    """
    key = jax.eval_shape(lambda: jax.random.key(0))
    flat = trees.flatten(jax.eval_shape(task.init, key, batch))
    group, pattern = next(iter(task.groups.items()))
    trained = {path: leaf for path, leaf in flat.items() if re.fullmatch(pattern, path)}
    frozen = {path: leaf for path, leaf in flat.items() if path not in trained}

    def loss(trained, frozen, batch, key):
        return task.losses(trees.unflatten(trained | frozen), Context(jnp.int32(step)), batch, key)[group].value

    return jax.value_and_grad(loss), (trained, frozen, dict(batch), key)


def count(function: Callable[..., Any], *arguments: Any, steps: int | None = None) -> float:
    """Operations of one call; arguments: arrays, or their shape structs.

    XLA counts the body of a loop once: what a scan repeats is counted as often as it runs.  A kernel written for an
    accelerator says nothing: what is counted is the formula, as the processor computes it.
    steps: how often a loop runs whose length is not in the program.  Raises ValueError for one without it.
    """
    with platform.target("cpu"):
        # Under a new name: JAX keeps what it traced for another platform.
        program = jax.make_jaxpr(lambda *arguments: function(*arguments))(*arguments)
    return _count(program, steps)


def _count(program: core.ClosedJaxpr, steps: int | None) -> float:
    total = _xla(program)
    for equation in _loops(program.jaxpr):
        if equation.primitive.name == "while":
            if steps is None:
                raise ValueError("count: a loop whose length is not in the program; give it a number of steps")
            body = equation.params["body_jaxpr"]
            total += steps * _count(body, steps) - _xla(body)
            continue
        body, length, unroll = (equation.params[name] for name in ("jaxpr", "length", "unroll"))
        there = length if unroll >= length else unroll + length % unroll  # copies of the body in the program
        total += length * _count(body, steps) - there * _xla(body)
    return total


def _xla(program: core.ClosedJaxpr) -> float:
    shapes = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in program.in_avals]
    return jax.jit(core.jaxpr_as_fun(program)).lower(*shapes).cost_analysis().get("flops", 0.0)


def _loops(jaxpr: Any) -> Iterator[Any]:
    """Outermost loops, also those of functions that are called."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("scan", "while"):
            yield equation
            continue
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from _loops(inner)
