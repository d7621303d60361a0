"""Noise schedules: x_t = alpha(t) x0 + sigma(t) eps, as discrete tables or as functions of a continuous time.

A level of noise is known by its ratio sigma / alpha, which no rescaling of x changes; log-SNR is -2 log(ratio).
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vgen.types import Step


class Schedule(NamedTuple):
    """A forward process.

    level: t -> (alpha, sigma), any shape.  time: ratio -> t, the inverse.  scale: ratio -> (alpha, sigma).
    t_min, t_max: the times a network is trained at.  clean: the time that stands for clean data, alpha 1 and sigma 0.
    length: T of a discrete table, whose times are 0 .. T - 1; None for a continuous time.
    """

    level: Callable[..., Any]
    time: Callable[..., Any]
    scale: Callable[..., Any]
    t_min: float
    t_max: float
    clean: float
    length: int | None = None


# ------------------------------------------------------------------------------------------------------------ tables


def betas(name: str = "linear", length: int = 1000, start: float | None = None, end: float | None = None) -> np.ndarray:
    """The variances beta_t of a discrete schedule, float64 [length].

    "linear": equally spaced from `start` to `end`, by default DDPM's 1e-4 and 0.02, multiplied by 1000 / length as in
    ADM (Ho et al. 2020; Dhariwal & Nichol 2021).  "scaled_linear": their roots are, by default Stable Diffusion's
    0.00085 and 0.012; CompVis configs call this one "linear".  "cosine": Nichol & Dhariwal 2021, eq. 17, beta <= 0.999.
    Raises ValueError for another name, for a length below 1, or for a start or end of "cosine".
    """
    if length < 1:
        raise ValueError(f"betas: length must be at least 1, got {length}")
    if name == "linear":
        scale = 1000 / length
        start, end = (scale * 1e-4 if start is None else start), (scale * 0.02 if end is None else end)
        return np.linspace(start, end, length, dtype=np.float64)
    if name == "scaled_linear":
        start, end = (0.00085 if start is None else start), (0.012 if end is None else end)
        return np.linspace(start**0.5, end**0.5, length, dtype=np.float64) ** 2
    if name == "cosine":
        if start is not None or end is not None:
            raise ValueError("betas: cosine has no start and end")
        bar = np.cos((np.arange(length + 1) / length + 0.008) / 1.008 * math.pi / 2) ** 2
        return np.minimum(1 - bar[1:] / bar[:-1], 0.999)
    raise ValueError(f"betas: name must be linear, scaled_linear or cosine, got {name!r}")


def zero_terminal_snr(betas: np.ndarray, floor: float = 0.0) -> np.ndarray:
    """The betas shifted and scaled so that alpha is `floor` ** 0.5 at the last time, and unchanged at the first.

    Lin et al. 2023, algorithm 1.  Only predictions that stay finite at alpha 0 (x0, v) can use floor 0; diffusers'
    Euler and DPM-Solver put 2 ** -24 there.
    """
    root = np.sqrt(np.cumprod(1 - np.asarray(betas, np.float64)))
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    bar = root**2
    bar[-1] = floor
    return 1 - bar / np.concatenate([[1.0], bar[:-1]])


def discrete(betas: np.ndarray, interpolation: str = "ratio") -> Schedule:
    """The variance-preserving schedule of a table of betas [T]: alpha^2 = prod(1 - beta), times 0 .. T - 1, clean -1.

    interpolation: how alpha and sigma run between whole times: "ratio", linear in sigma / alpha and its inverse linear
    in the logarithm (k-diffusion), or "log_alpha", linear in log alpha (DPM-Solver, Lu et al. 2022).
    Raises ValueError for another interpolation or betas outside of (0, 1].
    """
    table = np.asarray(betas, np.float64)
    if table.ndim != 1 or not ((table > 0) & (table <= 1)).all():
        raise ValueError(f"discrete: betas must be a vector in (0, 1], got shape {table.shape}")
    if interpolation not in ("ratio", "log_alpha"):
        raise ValueError(f"discrete: interpolation must be ratio or log_alpha, got {interpolation!r}")
    length, bar = len(table), np.cumprod(1 - table)
    alphas, sigmas = np.sqrt(bar), np.sqrt(1 - bar)
    with np.errstate(divide="ignore"):
        ratios = np.minimum(sigmas / alphas, 1e12)  # alpha 0 would make nan of every interpolation
    log_alphas = -0.5 * np.log1p(ratios**2)

    def level(t):
        t = jnp.asarray(t, float)
        low = jnp.clip(jnp.floor(t), 0, length - 1).astype(jnp.int32)
        high = jnp.minimum(low + 1, length - 1)
        part = jnp.clip(t - low, 0, 1)
        between = lambda values: jnp.asarray(values, float)[low] * (1 - part) + jnp.asarray(values, float)[high] * part
        if interpolation == "ratio":
            alpha, sigma = preserving(between(ratios))
        else:
            log_alpha = between(log_alphas)
            alpha, sigma = jnp.exp(log_alpha), jnp.sqrt(-jnp.expm1(2 * log_alpha))
        whole = part == 0
        alpha = jnp.where(whole, jnp.asarray(alphas, float)[low], alpha)
        sigma = jnp.where(whole, jnp.asarray(sigmas, float)[low], sigma)
        return jnp.where(t < 0, 1.0, alpha), jnp.where(t < 0, 0.0, sigma)

    def time(ratio):
        ratio = jnp.asarray(ratio, float)
        times = jnp.arange(length, dtype=ratio.dtype)
        if interpolation == "ratio":
            return jnp.interp(jnp.log(jnp.maximum(ratio, 1e-10)), jnp.asarray(np.log(ratios), float), times)
        return jnp.interp(0.5 * jnp.log1p(ratio**2), jnp.asarray(-log_alphas, float), times)

    return Schedule(level, time, preserving, 0.0, length - 1.0, -1.0, length)


# --------------------------------------------------------------------------------------------------- continuous time


def preserving(ratio):
    """(alpha, sigma) with sigma / alpha = ratio and alpha^2 + sigma^2 = 1; ratio may be inf."""
    return 1 / jnp.sqrt(1 + ratio**2), 1 / jnp.sqrt(1 + ratio**-2.0)


def exploding(ratio):
    """(1, ratio): data are not scaled."""
    return jnp.ones_like(ratio), ratio


def vp(start: float = 0.1, end: float = 20.0, t_min: float = 1e-3) -> Schedule:
    """The variance-preserving SDE, beta(t) = start + t (end - start), t in [t_min, 1] (Song et al. 2021, eq. 32)."""
    log_alpha = lambda t: -(t**2) * (end - start) / 4 - t * start / 2

    def level(t):
        t = jnp.asarray(t, float)
        return jnp.exp(log_alpha(t)), jnp.sqrt(-jnp.expm1(2 * log_alpha(t)))

    def time(ratio):
        return _vp_time(0.5 * jnp.log1p(jnp.asarray(ratio, float) ** 2), start, end)

    return Schedule(level, time, preserving, t_min, 1.0, 0.0)


def _vp_time(depth, start, end):
    """t with depth = -log alpha."""
    return 4 * depth / (start + jnp.sqrt(start**2 + 4 * (end - start) * depth))


def sub_vp(start: float = 0.1, end: float = 20.0, t_min: float = 1e-3) -> Schedule:
    """The sub-VP SDE: alpha as in `vp`, sigma = 1 - alpha^2 (Song et al. 2021, eq. 33)."""
    inner = vp(start, end)

    def level(t):
        alpha, sigma = inner.level(t)
        return alpha, sigma**2

    def scale(ratio):
        alpha = 2 / (ratio + jnp.sqrt(ratio**2 + 4))  # alpha^2 + ratio alpha = 1
        return alpha, 1 - alpha**2

    def time(ratio):
        return _vp_time(-jnp.log(scale(jnp.asarray(ratio, float))[0]), start, end)

    return Schedule(level, time, scale, t_min, 1.0, 0.0)


def ve(sigma_min: float = 0.01, sigma_max: float = 50.0, t_min: float = 1e-5) -> Schedule:
    """The variance-exploding SDE: sigma = sigma_min (sigma_max / sigma_min)^t (Song et al. 2021, eq. 31).

    Its networks are given sigma and not t: `predictions.denoiser(..., time=lambda step: step.sigma)`.
    """
    span = math.log(sigma_max / sigma_min)
    level = lambda t: exploding(sigma_min * jnp.exp(span * jnp.asarray(t, float)))
    time = lambda ratio: jnp.log(jnp.maximum(jnp.asarray(ratio, float), 1e-10) / sigma_min) / span
    return Schedule(level, time, exploding, t_min, 1.0, 0.0)


def edm(sigma_min: float = 0.002, sigma_max: float = 80.0) -> Schedule:
    """Time is the noise: t = sigma, alpha = 1 (Karras et al. 2022); its grid is `grids.grid(..., spacing="karras")`."""
    return Schedule(
        lambda t: exploding(jnp.asarray(t, float)),
        lambda r: jnp.asarray(r, float),
        exploding,
        sigma_min,
        sigma_max,
        0.0,
    )


def rectified_flow(t_min: float = 1e-3) -> Schedule:
    """Straight lines from data to noise: alpha = 1 - t, sigma = t, t in [t_min, 1] (Liu et al. 2023)."""
    level = lambda t: (1 - jnp.asarray(t, float), jnp.asarray(t, float))
    scale = lambda ratio: (1 / (1 + ratio), 1 / (1 + 1 / ratio))
    return Schedule(level, lambda r: scale(jnp.asarray(r, float))[1], scale, t_min, 1.0, 0.0)


def from_log_snr(log_snr: Callable[..., Any], inverse: Callable[..., Any], t_min=0.0, t_max=1.0) -> Schedule:
    """The variance-preserving schedule alpha^2 = sigmoid(log_snr(t)) (Kingma et al. 2021).

    log_snr: t -> log(alpha^2 / sigma^2), falling.  inverse: log-SNR -> t.
    """

    def level(t):
        value = log_snr(jnp.asarray(t, float))
        return jnp.sqrt(jax.nn.sigmoid(value)), jnp.sqrt(jax.nn.sigmoid(-value))

    return Schedule(level, lambda r: inverse(-2 * jnp.log(jnp.asarray(r, float))), preserving, t_min, t_max, 0.0)


def cosine(low: float = -20.0, high: float = 20.0) -> Schedule:
    """The continuous cosine schedule, log-SNR = -2 log tan(a t + b) from `high` to `low` (Ho & Salimans 2022)."""
    b = math.atan(math.exp(-high / 2))
    a = math.atan(math.exp(-low / 2)) - b
    return from_log_snr(lambda t: -2 * jnp.log(jnp.tan(a * t + b)), lambda v: (jnp.arctan(jnp.exp(-v / 2)) - b) / a)


def log_snr(schedule: Schedule, t):
    """log(alpha^2 / sigma^2) at t."""
    alpha, sigma = schedule.level(t)
    return 2 * (jnp.log(alpha) - jnp.log(sigma))


# ------------------------------------------------------------------------------------------------------------- steps


def at(schedule: Schedule, t) -> Step:
    """The Step of time t, any shape, whose next time is t - 1 in a table and clean data elsewhere."""
    t = jnp.asarray(t, float)
    alpha, sigma = schedule.level(t)
    if schedule.length is None:
        t_next, alpha_next, sigma_next = jnp.full_like(t, schedule.clean), jnp.ones_like(t), jnp.zeros_like(t)
    else:
        t_next = t - 1
        alpha_next, sigma_next = schedule.level(t_next)
    return Step(t.astype(jnp.int32), t, t_next, alpha, sigma, alpha_next, sigma_next)


class Posterior(NamedTuple):
    """q(x_next | x, x0) = N(x0_factor x0 + x_factor x, small); large: the variance of q(x | x_next)."""

    x0_factor: Any
    x_factor: Any
    small: Any
    large: Any


def posterior(step: Step) -> Posterior:
    """The Gaussian of the level after `step` given x and x0, for any alpha and sigma (Kingma et al. 2021, eq. 25).

    In a variance-preserving schedule small is DDPM's beta-tilde and large its beta, of the strided chain where steps
    are left out.
    """
    keep = step.alpha * step.sigma_next / (step.alpha_next * step.sigma)  # ratio of the ratios, exp(-h) of DPM-Solver
    lost = (1 - keep) * (1 + keep)
    x_factor = keep * step.sigma_next / step.sigma
    return Posterior(step.alpha_next * lost, x_factor, step.sigma_next**2 * lost, step.sigma**2 * lost)
