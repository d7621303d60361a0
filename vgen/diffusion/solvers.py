"""Samplers by name, with the grid each of them walks."""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp

from vgen.diffusion import grids, multistep, samplers
from vgen.diffusion.schedules import Schedule
from vgen.types import Sampler, Step

SOLVERS = (
    "ddpm", "ddim", "euler", "euler_ancestral", "heun", "dpmpp_2m", "dpmpp_2m_sde", "pndm", "flow_euler",
    "predictor_corrector",
)  # fmt: skip


def solver(
    name: str,
    schedule: Schedule,
    num_steps: Any,
    max_steps: int | None = None,
    knobs: Mapping[str, Any] | None = None,
    times: Callable[[Step], Step] | None = None,
    **grid_knobs,
) -> tuple[Sampler, Step]:
    """(sampler, grid) for `vgen.sample.sample(denoise, sampler, grid, key, x, num_steps=grids.rows(grid))`.

    name: "ddpm", "ddim", "euler", "euler_ancestral", "heun", "dpmpp_2m", "dpmpp_2m_sde", "pndm" (as Stable Diffusion
    uses it), "flow_euler" or "predictor_corrector".  knobs: of the sampler: eta, variance, noise, ...
    times: an edit's change of the grid, ahead of what the sampler itself makes of it (Heun's second rows).
    num_steps, max_steps and grid_knobs: see `grids.grid`; the spacing is by default "leading" for ddpm, ddim and pndm,
    "trailing" for flow_euler, "karras" where time is the noise, and "linspace" elsewhere.
    For fewer than 15 steps DPM-Solver++ ends with a step of first order, as diffusers' does.
    Raises ValueError for another name; steps outside of 1 .. T raise in `grids.grid`.
    """
    if name not in SOLVERS:
        raise ValueError(f"solver: name must be one of {', '.join(SOLVERS)}, got {name!r}")
    knobs = dict(knobs or {})
    table = schedule.length is not None
    spacing = "leading" if name in ("ddpm", "ddim", "pndm") else "linspace"
    if not table:
        spacing = "trailing" if name == "flow_euler" else "karras" if schedule.t_max > 1 else "linspace"
    spacing = grid_knobs.pop("spacing", spacing)
    if name.startswith("dpmpp") and table and spacing in ("leading", "linspace", "quadratic"):
        grid_knobs.setdefault("spare", 1)
    if name in ("euler", "euler_ancestral", "heun") and table and spacing == "linspace":
        grid_knobs.setdefault("rounded", False)
    grid = grids.grid(schedule, num_steps, max_steps, spacing, **grid_knobs)
    grid = grid if times is None else times(grid)
    if name == "ddpm":
        return samplers.ancestral(**knobs), grid
    if name in ("ddim", "flow_euler"):
        return samplers.ddim(**knobs), grid
    if name == "euler":
        return samplers.euler(**knobs), grid
    if name == "euler_ancestral":
        return samplers.euler_ancestral(**knobs), grid
    if name == "heun":
        return multistep.heun(**knobs), grids.heun(grid)
    if name == "pndm":
        return multistep.pndm(**knobs), grids.plms(grid)
    if name == "predictor_corrector":
        return samplers.predictor_corrector(**knobs), grids.correctors(grid)
    n = grids.rows(grid)
    knobs.setdefault("first_order_from", jnp.where(n < 15, n - 1, n))
    return multistep.dpmpp_2m(sde=name == "dpmpp_2m_sde", **knobs), grid
