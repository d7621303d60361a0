"""Training losses: the noised batch, the squared error and its weights, the variational bound of learned variance."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vgen.diffusion.predictions import Kind, kind_of, split_variance, spread
from vgen.diffusion.samplers import Noise, log_variance
from vgen.diffusion.schedules import Schedule, at, posterior
from vgen.types import Step

Weight = Callable[[Step, Kind], Any]


class Noised(NamedTuple):
    """A batch at its levels: x = alpha x0 + sigma eps, all [b, ...]; step: its fields are [b]."""

    x: Any
    x0: Any
    eps: Any
    step: Step


def diffuse(key, x0, schedule: Schedule, t, noise: Noise = jax.random.normal, offset: Any = 0.0) -> Noised:
    """x0 [b, ...] at times t [b].

    offset: strength of a further noise that is constant over each channel ("offset noise", 0.1 is usual).
    """
    key, offset_key = jax.random.split(key)
    eps = noise(key, x0.shape, x0.dtype)
    if not isinstance(offset, int | float) or offset:
        flat = (x0.shape[0],) + (1,) * (x0.ndim - 2) + x0.shape[-1:]
        eps = eps + offset * noise(offset_key, flat, x0.dtype)
    step = at(schedule, t)
    x = spread(step.alpha, x0) * x0 + spread(step.sigma, x0) * eps
    return Noised(x.astype(x0.dtype), x0, eps, step)


def mean_flat(a):
    """The mean over all axes but the first: [b, ...] -> [b]."""
    return a.reshape(a.shape[0], -1).mean(axis=1)


# ----------------------------------------------------------------------------------------------------------- weights


def _ratio2(step: Step):
    """sigma^2 / alpha^2, the inverse SNR; inf at zero SNR."""
    return (step.sigma / step.alpha) ** 2


def simple() -> Weight:
    """1 on the target of the network, whatever that is (Ho et al. 2020, eq. 14)."""
    return lambda step, kind: jnp.ones_like(jnp.asarray(step.alpha))


def snr() -> Weight:
    """The SNR on x0, which is 1 on eps, for every kind of prediction (Salimans & Ho 2022)."""
    return lambda step, kind: kind.slope(step)


def min_snr(gamma: Any = 5.0) -> Weight:
    """min(SNR, gamma) on x0 (Hang et al. 2023)."""
    return lambda step, kind: jnp.minimum(1, gamma * _ratio2(step)) * kind.slope(step)


def p2(gamma: Any = 1.0, k: Any = 1.0) -> Weight:
    """1 / (k + SNR)^gamma on eps (Choi et al. 2022)."""
    return lambda step, kind: (k + 1 / _ratio2(step)) ** -gamma * kind.slope(step)


def edm_weight(sigma_data: float = 0.5) -> Weight:
    """(s^2 + sigma_data^2) / (s sigma_data)^2 on x0, s = sigma / alpha (Karras et al. 2022): 1 on EDM's own target."""
    return lambda step, kind: (_ratio2(step) + sigma_data**2) / sigma_data**2 * kind.slope(step)


WEIGHTS = {"simple": simple, "snr": snr, "min_snr": min_snr, "p2": p2, "edm": edm_weight}


def weight_of(name: str, **knobs) -> Weight:
    """The weight of a name: "simple", "snr", "min_snr", "p2" or "edm".  Raises ValueError for another."""
    if name not in WEIGHTS:
        raise ValueError(f"weight: name must be one of {', '.join(WEIGHTS)}, got {name!r}")
    return WEIGHTS[name](**knobs)


# ------------------------------------------------------------------------------------------------------------ losses


def loss(raw, noised: Noised, kind: str | Kind = "eps", weight: Weight | None = None):
    """The weighted squared error of a network's output against its target, mean over each example: [b].

    raw: network(*kind_of(kind).inputs(noised.x, noised.step)), of x's shape.  weight: `simple` by default.
    """
    kind = kind_of(kind)
    error = mean_flat((raw - kind.target(noised.x0, noised.eps, noised.step)) ** 2)
    return error if weight is None else weight(noised.step, kind) * error


def gaussian_kl(mean, log, mean_other, log_other):
    """KL(N(mean, exp(log)) || N(mean_other, exp(log_other))) elementwise, in nats."""
    return 0.5 * (log_other - log - 1 + jnp.exp(log - log_other) + (mean - mean_other) ** 2 * jnp.exp(-log_other))


def _cdf(x):
    """The normal distribution function, in the tanh approximation of ADM (Page 1977)."""
    return 0.5 * (1 + jnp.tanh((2 / jnp.pi) ** 0.5 * (x + 0.044715 * x**3)))


def discretised_nll(x0, mean, log):
    """-log of the mass that N(mean, exp(log)) puts on each 8-bit value of x0 in [-1, 1], in nats (Ho et al. 2020).

    The outer values take all that lies beyond.
    """
    centred, scale = x0 - mean, jnp.exp(-log / 2)
    upper, lower = _cdf(scale * (centred + 1 / 255)), _cdf(scale * (centred - 1 / 255))
    tiny = lambda p: jnp.log(jnp.maximum(p, 1e-12))
    return -jnp.where(x0 < -0.999, tiny(upper), jnp.where(x0 > 0.999, tiny(1 - lower), tiny(upper - lower)))


def bound(raw, learned, noised: Noised, schedule: Schedule, kind: str | Kind = "eps", variance: str = "learned_range"):
    """The term of the variational bound at each example's time, in bits per dimension: [b].

    KL of the true reverse step against the model's, at time 0 the NLL of 8-bit data (Nichol & Dhariwal 2021, eq. 4-6).
    raw, learned: the two halves of the output.  variance: see `samplers.log_variance`.
    Raises ValueError for a continuous schedule.
    """
    if schedule.length is None:
        raise ValueError("bound: the variational bound is a sum over the times of a table; this schedule is continuous")
    step, x = noised.step, noised.x
    q = posterior(step)
    small = jnp.where(q.small > 0, q.small, posterior(at(schedule, 1.0)).small)
    small, large, first, last = (spread(a, x) for a in (small, q.large, q.x0_factor, q.x_factor))
    log = jnp.broadcast_to(log_variance(variance, small, large, learned), x.shape)
    true, mean = (first * x0 + last * x for x0 in (noised.x0, kind_of(kind).to_x0(raw, x, step)))
    clean = spread(step.sigma_next, x) == 0
    terms = jnp.where(clean, discretised_nll(noised.x0, mean, log), gaussian_kl(true, jnp.log(small), mean, log))
    return mean_flat(terms) / jnp.log(2.0)


def hybrid_loss(
    raw,
    noised: Noised,
    schedule: Schedule,
    kind: str | Kind = "eps",
    *,
    variance: str = "learned_range",
    factor: Any = 1e-3,
    weight: Weight | None = None,
):
    """L_simple + factor T L_vlb of a network that learns its variance -> ([b], {"mse": [b], "vb": [b]}).

    raw: with twice the channels of x; the bound trains the variance only (its mean is not differentiated).
    factor: 0.001 of Nichol & Dhariwal 2021; times T it is ADM's RESCALED_MSE (T / 1000), and 1 / T its plain MSE.
    L_vlb alone, ADM's RESCALED_KL, is T `bound`.
    """
    raw, learned = split_variance(raw, variance)
    vb = bound(jax.lax.stop_gradient(raw), learned, noised, schedule, kind, variance) * factor * schedule.length
    mse = loss(raw, noised, kind, weight)
    return mse + vb, {"mse": mse, "vb": vb}


def prior_bits(x0, schedule: Schedule):
    """KL of q(x_T | x0) against a standard normal, in bits per dimension: [b]; the part of the bound not trained."""
    alpha, sigma = schedule.level(schedule.t_max)
    return mean_flat(gaussian_kl(alpha * x0, 2 * jnp.log(sigma), 0.0, 0.0)) / jnp.log(2.0)
