"""Samplers of higher order: Heun, DPM-Solver++ (2M, and as an SDE) and PNDM, as state machines over rows of a grid."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vgen.diffusion.predictions import noise_of
from vgen.diffusion.samplers import Noise, at_noise, ddim
from vgen.types import Prediction, Sampler, Step


def _stays(step: Step):
    return (step.alpha == step.alpha_next) & (step.sigma == step.sigma_next)


def _choose(condition, a, b):
    return jax.tree.map(lambda p, q: jnp.where(condition, p, q), a, b)


def _moved(eps, x, step: Step, alpha, sigma):
    """DDIM's update with a given eps, from x on level (alpha, sigma) to the end of the row."""
    return step.alpha_next * ((x - sigma * eps) / alpha) + step.sigma_next * eps


class Level(NamedTuple):
    """A state x and its level."""

    x: Any
    alpha: Any
    sigma: Any


class Heun(NamedTuple):
    """The start of the step under way, and the slope found there."""

    start: Level
    slope: Any


def heun() -> Sampler:
    """Heun's second-order method in sigma / alpha on a grid of `grids.heun` (Karras et al. 2022, algorithm 1).

    Churn (algorithm 2) is `grids.heun(grids.churned(...))` with the hook `samplers.climb(S_noise)`.
    Levels with alpha 0 (zero terminal SNR) are beyond it.
    """

    def init(x):
        zero, one = jnp.zeros((), float), jnp.ones((), float)
        return Heun(Level(x, one, zero), jnp.zeros_like(x))

    def step(key, x, pred: Prediction, step: Step, state: Heun):
        stays = _stays(step)
        slope = noise_of(pred.x0, x, step)  # d(x / alpha) / d(sigma / alpha)
        start = Level(*(jnp.where(stays, a, b) for a, b in zip(state.start, (x, step.alpha, step.sigma))))
        used = jnp.where(stays, (slope + state.slope) / 2, slope)
        x_next = _moved(used, start.x, step, start.alpha, start.sigma).astype(x.dtype)
        return x_next, Heun(start._replace(x=start.x.astype(x.dtype)), slope.astype(x.dtype))

    return Sampler(init, step, at_noise(jax.random.normal))


class Multistep(NamedTuple):
    """The x0 of the last row, its log(alpha / sigma), and whether there was one."""

    x0: Any
    log_ratio: Any
    known: Any


def dpmpp_2m(
    *,
    sde: bool = False,
    solver: str = "midpoint",
    first_order_from: Any = None,
    noise: Noise = jax.random.normal,
) -> Sampler:
    """DPM-Solver++(2M), or with `sde` its stochastic form (Lu et al. 2022, 2211.01095, algorithm 2, section 6).

    solver: "midpoint", or "heun" (the Taylor form).  The first row, and one that ends in clean data, have order 1.
    first_order_from: rows from this number on are of first order; for fewer than 15 steps num_steps - 1 is the
    `lower_order_final` of the authors.  May be traced.  A denoiser that thresholds makes it fit for guided pixels.
    Raises ValueError for another solver.
    """
    if solver not in ("midpoint", "heun"):
        raise ValueError(f"dpmpp_2m: solver must be midpoint or heun, got {solver!r}")

    def init(x):
        return Multistep(jnp.zeros_like(x), jnp.zeros((), float), jnp.zeros((), bool))

    def step(key, x, pred: Prediction, step: Step, state: Multistep):
        keep = step.alpha * step.sigma_next / (step.alpha_next * step.sigma)  # exp(-h)
        now = jnp.log(step.alpha) - jnp.log(step.sigma)
        second = state.known & (step.sigma_next > 0)
        if first_order_from is not None:
            second &= step.i < first_order_from
        h = -jnp.log(jnp.where(step.sigma_next > 0, keep, 0.5))
        change = (pred.x0 - state.x0) * (h / jnp.where(second, now - state.log_ratio, 1.0))  # D1, of [0, h]
        lost = (1 - keep) * (1 + keep) if sde else 1 - keep
        if solver == "midpoint":
            bend = 0.5 * lost
        else:
            bend = 1 - lost / (2 * h if sde else h)
        bend = jnp.where(second, bend, 0.0)
        change = jnp.where(second, change, 0.0)
        x_factor = step.sigma_next / step.sigma * (keep if sde else 1.0)
        x_next = x_factor * x + step.alpha_next * (lost * pred.x0 + bend * change)
        if sde:
            x_next += step.sigma_next * jnp.sqrt(lost) * noise(key, x.shape, x.dtype)
        return x_next.astype(x.dtype), Multistep(pred.x0.astype(x.dtype), now, jnp.ones((), bool))

    return Sampler(init, step, at_noise(noise))


class Pndm(NamedTuple):
    """The start of the step under way, the last four eps (newest first), their number, and a Runge-Kutta sum."""

    start: Level
    eps: tuple[Any, Any, Any, Any]
    count: Any
    total: Any


def pndm(skip_prk: bool = True) -> Sampler:
    """Pseudo numerical methods of fourth order (Liu et al. 2022) on eps, on a grid of `grids.plms` or `grids.prk`.

    skip_prk: True for the grid of `plms`, whose first steps are of lower order, as Stable Diffusion samples; False for
    that of `prk`, which begins with three Runge-Kutta steps.
    """

    def init(x):
        zero, one = jnp.zeros((), float), jnp.ones((), float)
        return Pndm(Level(x, one, zero), (jnp.zeros_like(x),) * 4, jnp.zeros((), jnp.int32), jnp.zeros_like(x))

    def linear(eps, e, count):
        """The Adams-Bashforth combination of the eps known."""
        a, b, c, d = eps
        forms = [e, (3 * a - b) / 2, (23 * a - 16 * b + 5 * c) / 12, (55 * a - 59 * b + 37 * c - 9 * d) / 24]
        return jax.lax.select_n(jnp.clip(count - 1, 0, 3), *forms)

    def step(key, x, pred: Prediction, step: Step, state: Pndm):
        e = noise_of(pred.x0, x, step).astype(x.dtype)
        here = Level(x, step.alpha, step.sigma)
        phase = jnp.where(step.i < 12, step.i % 4, 4)
        begins = (step.i != 1) if skip_prk else (phase == 0) | (phase == 4)  # rows whose eps is kept
        eps = _choose(begins, (e, *state.eps[:3]), state.eps)
        count = state.count + begins
        start = _choose(begins, here, Level(state.start.x, *(jnp.asarray(v, float) for v in state.start[1:])))
        if skip_prk:
            used, total = jnp.where(step.i == 1, (e + state.eps[0]) / 2, linear(eps, e, count)), state.total
        else:
            total = jnp.where(phase == 0, 0.0, state.total) + e / jnp.where((phase == 0) | (phase == 3), 6, 3)
            used = jnp.where(phase == 4, linear(eps, e, count), jnp.where(phase == 3, total, e))
        x_next = _moved(used, start.x, step, start.alpha, start.sigma).astype(x.dtype)
        return x_next, Pndm(start, eps, count, total.astype(x.dtype))

    return Sampler(init, step, ddim().renoise)
