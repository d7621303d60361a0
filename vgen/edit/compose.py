"""Edits together: several become one, and one becomes a call of the sampling loop.

In the edits of diffusion `start` may be a function (key, grid) -> x and `times` a function grid -> grid, so that they
follow each other: SDEdit's start has the noise of the first row of whatever grid came out.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from vgen.diffusion import grids
from vgen.sample import sample
from vgen.types import AttentionControl, Denoiser, Edit, Intervention, Sampler, Step


def chain(hooks: Sequence[Intervention]) -> Intervention:
    """One hook of several, each with a state and a key of its own, called in their order at every place."""

    def init(x):
        return tuple(hook.init(x) if hook.init is not None else () for hook in hooks)

    def walk(key, x, states, call, place):
        after = list(states)
        for j, hook in enumerate(hooks):
            if getattr(hook, place) is not None:
                each = key if len(hooks) == 1 else jax.random.fold_in(key, j)
                x, after[j] = call(getattr(hook, place), each, x, states[j])
        return x, tuple(after)

    def before(key, x, step, states):
        return walk(key, x, states, lambda f, k, x, state: f(k, x, step, state), "before")

    def after(key, x_next, x, pred, step, states):
        return walk(key, x_next, states, lambda f, k, x_next, state: f(k, x_next, x, pred, step, state), "after")

    return Intervention(init, before, after)


def _controls(controls: Sequence[AttentionControl]) -> AttentionControl:
    names = [name for control in controls for name in control.keep or ()]
    for name in names:
        _only(f"control.keep[{name!r}]", [n for n in names if n == name])
    keep = {name: part for control in controls for name, part in (control.keep or {}).items()}

    def joined(parts):
        def call(arrays, site, step):
            for part in parts:
                arrays = part(arrays, site, step)
            return arrays

        return call if parts else None

    parts = zip(*((c.qkv, c.logits, c.probs) for c in controls))
    return AttentionControl(*(joined([p for p in each if p is not None]) for each in parts), keep or None)


def _only(name: str, values: list[Any]) -> Any:
    if len(values) > 1:
        raise ValueError(f"compose: {len(values)} edits set {name}, and one may: leave it to one of them")
    return values[0] if values else None


def compose(*edits: Edit) -> Edit:
    """One Edit that does what all do, in their order.

    Hooks, attention controls, guidance (the first next to the network) and functions of the grid follow each other.
    Raises ValueError where two set a start or a sampler, or a grid is followed by one that is not a function of it.
    """
    picked = {
        name: [getattr(edit, name) for edit in edits if getattr(edit, name) is not None]
        for name in ("start", "times", "guidance", "hook", "control", "sampler")
    }
    if any(not callable(times) for times in picked["times"][1:]):
        raise ValueError("compose: a fixed grid would undo the one before it; give the edit with the fixed grid first")

    def times(grid):
        for change in picked["times"]:
            grid = change(grid) if callable(change) else change
        return grid

    def guidance(denoise: Denoiser) -> Denoiser:
        for wrap in picked["guidance"]:
            denoise = wrap(denoise)
        return denoise

    return Edit(
        start=_only("start", picked["start"]),
        times=times if picked["times"] else None,
        guidance=guidance if picked["guidance"] else None,
        hook=chain(picked["hook"]) if picked["hook"] else None,
        control=_controls(picked["control"]) if picked["control"] else None,
        sampler=_only("sampler", picked["sampler"]),
    )


def run(
    edit: Edit,
    denoise: Denoiser,
    sampler: Sampler,
    grid: Step,
    key,
    x=None,
    rows: Callable[[Step], Step] | None = None,
    **knobs,
):
    """`vgen.sample.sample` under an Edit, along a grid of `vgen.diffusion.grids`.

    sampler, grid, x: what the edit does not set itself.  grid: one row per step, as of `grids.grid`; rows: what the
    sampler makes of it behind the edit, `grids.heun` for one.  knobs: of `sample`.  The attention control is the
    caller's to give to the network.  Raises ValueError where neither edit nor caller gives a start.
    """
    grid = grid if edit.times is None else edit.times(grid) if callable(edit.times) else edit.times
    start_key, key = jax.random.split(key)
    if edit.start is not None:
        x = edit.start(start_key, grid) if callable(edit.start) else edit.start
    if x is None:
        raise ValueError("run: the edit sets no start; give x, the noise to begin from")
    denoise = denoise if edit.guidance is None else edit.guidance(denoise)
    grid = jax.tree.map(jnp.asarray, grid if rows is None else rows(grid))
    knobs.setdefault("num_steps", grids.rows(grid))
    return sample(denoise, edit.sampler or sampler, grid, key, x, edit.hook, **knobs)
