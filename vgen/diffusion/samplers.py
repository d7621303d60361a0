"""One-step samplers: ancestral, DDIM and its family, Langevin correction; and the climb back to more noise.

They hold for every schedule.  DDIM with eta 0 is Euler's method in sigma / alpha, on a preserving, an exploding or a
flow grid alike; with eta 1 it is the ancestral sampler of DDPM, and Euler ancestral.  Noise comes from `noise`, called
(key, shape, dtype) like `jax.random.normal`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from vgen.diffusion.predictions import noise_of, spread
from vgen.diffusion.schedules import posterior
from vgen.types import Intervention, Prediction, Sampler, Step

Noise = Callable[..., Any]
VARIANCES = ("fixed_small", "fixed_large", "learned", "learned_range")


def renoise(key, x0, step: Step, noise: Noise = jax.random.normal):
    """alpha x0 + sigma eps: x0 at the level on which the step begins (scalars, or [b])."""
    eps = noise(key, x0.shape, x0.dtype)
    return (spread(step.alpha, x0) * x0 + spread(step.sigma, x0) * eps).astype(x0.dtype)


def at_noise(noise: Noise):
    """`renoise` with its noise, the `renoise` of a Sampler."""
    return lambda key, x0, step: renoise(key, x0, step, noise)


def log_variance(variance: str, small, large, learned=None):
    """The logarithm of the variance of a reverse step.

    variance: "fixed_small" (beta-tilde), "fixed_large" (beta), "learned" (the output itself) or "learned_range" (the
    output, -1 .. 1, between the two logarithms).  Raises ValueError for another name, or without the output it needs.
    """
    if variance not in VARIANCES:
        raise ValueError(f"variance must be one of {', '.join(VARIANCES)}, got {variance!r}")
    low, high = (jnp.log(jnp.maximum(value, 1e-20)) for value in (small, large))
    if variance in ("fixed_small", "fixed_large"):
        return low if variance == "fixed_small" else high
    if learned is None:
        raise ValueError(f"variance {variance!r} needs a denoiser with variance={variance!r}; its aux holds none")
    return learned if variance == "learned" else (learned + 1) / 2 * high + (1 - learned) / 2 * low


def ancestral(variance: str = "fixed_small", guide=None, noise: Noise = jax.random.normal) -> Sampler:
    """DDPM's sampler: a draw from q(x_next | x, x0), the last one without noise (Ho et al. 2020, algorithm 2).

    variance: see `log_variance`; the learned ones read pred.aux["variance"].  beta-tilde is 0 in the step to clean:
    there the one before it stands in, as in ADM.
    guide: (x, step) -> gradient of log p(y | x); the mean moves by variance * gradient (Dhariwal & Nichol 2021,
    algorithm 1): see `vgen.guidance.classifier`.  Raises ValueError for another variance.
    """
    if variance not in VARIANCES:
        raise ValueError(f"ancestral: variance must be one of {', '.join(VARIANCES)}, got {variance!r}")

    def init(x):
        return jnp.zeros((), float)

    def step(key, x, pred: Prediction, step: Step, before):
        q = posterior(step)
        small = jnp.where(q.small > 0, q.small, before)
        learned = (pred.aux or {}).get("variance") if variance.startswith("learned") else None
        log = log_variance(variance, small, q.large, learned)
        mean = q.x0_factor * pred.x0 + q.x_factor * x
        mean = mean if guide is None else mean + jnp.exp(log) * guide(x, step)
        std = jnp.where(step.sigma_next > 0, jnp.exp(log / 2), 0.0)
        return (mean + std * noise(key, x.shape, x.dtype)).astype(x.dtype), q.small

    return Sampler(init, step, at_noise(noise))


def ddim(eta: Any = 0.0, noise: Noise = jax.random.normal) -> Sampler:
    """x_next = alpha_next x0 + sqrt(sigma_next^2 - s^2) eps + s z, s^2 = eta^2 beta-tilde (Song et al. 2020, eq. 12).

    eta: 0 is deterministic (and along `grids.inverted` DDIM inversion), 1 is DDPM; may be traced.
    eps follows from x and the x0 of the prediction, also where that was clipped: ADM's form, and diffusers' with
    use_clipped_model_output.
    """
    still = isinstance(eta, int | float) and eta == 0

    def step(key, x, pred: Prediction, step: Step, state):
        eps = noise_of(pred.x0, x, step)
        if still:
            return (step.alpha_next * pred.x0 + step.sigma_next * eps).astype(x.dtype), state
        variance = eta**2 * posterior(step).small
        rest = jnp.sqrt(jnp.maximum(step.sigma_next**2 - variance, 0))
        x_next = step.alpha_next * pred.x0 + rest * eps + jnp.sqrt(variance) * noise(key, x.shape, x.dtype)
        return x_next.astype(x.dtype), state

    return Sampler(lambda x: (), step, at_noise(noise))


def euler() -> Sampler:
    """Euler's method on the probability flow in sigma / alpha (Karras et al. 2022): the update of `ddim(0)`.

    It is also the Euler step of a rectified flow.  Churn is a matter of the grid: `grids.churned` and `climb`.
    """
    return ddim(0.0)


def euler_ancestral(eta: Any = 1.0, noise: Noise = jax.random.normal) -> Sampler:
    """k-diffusion's Euler ancestral: the update of `ddim(eta)` with eta 1."""
    return ddim(eta, noise)


def climb(factor: Any = 1.0, noise: Noise = jax.random.normal) -> Intervention:
    """A hook that brings x up where a row begins above the level at which the one before it ended.

    x <- a x + factor sqrt(sigma^2 - (a sigma_before)^2) z with a = alpha / alpha_before: the forward process of the
    two levels, in one draw.  It serves grids that go up again (RePaint) and EDM's churn, whose S_noise is the factor.
    """

    def init(x):
        return jnp.zeros((), float), -jnp.ones((), float)  # the first row is where x already is

    def before(key, x, step: Step, state):
        alpha, sigma = state
        a = step.alpha / jnp.where(sigma < 0, 1, alpha)
        variance = step.sigma**2 - (a * sigma) ** 2
        up = (sigma >= 0) & (variance > 1e-7 * step.sigma**2) & (step.sigma * alpha > sigma * step.alpha)
        raised = a * x + factor * jnp.sqrt(jnp.where(up, variance, 1.0)) * noise(key, x.shape, x.dtype)
        return jnp.where(up, raised, x).astype(x.dtype), (step.alpha_next, step.sigma_next)

    return Intervention(init=init, before=before)


def langevin(key, x, pred: Prediction, step: Step, snr: Any, noise: Noise = jax.random.normal):
    """One step of Langevin dynamics on the level of x, of size 2 (snr |z| / |score|)^2 (Song et al. 2021, algorithm 5).

    For VP the authors multiply it by 1 - beta of the trained step; here it is that of VE throughout.  The norms are
    means over the batch.
    """
    score = -noise_of(pred.x0, x, step) / step.sigma
    z = noise(key, x.shape, x.dtype)
    norm = lambda a: jnp.sqrt((a.reshape(a.shape[0], -1) ** 2).sum(axis=1)).mean()
    size = 2 * (snr * norm(z) / norm(score)) ** 2
    return (x + size * score + jnp.sqrt(2 * size) * z).astype(x.dtype)


def predictor_corrector(predictor: Sampler | None = None, snr: Any = 0.16, noise: Noise = jax.random.normal) -> Sampler:
    """Langevin steps on rows that stay on a level, `predictor` on the others; for a grid of `grids.correctors`.

    predictor: by default `ancestral("fixed_large")`, which in a variance-exploding process is the reverse-diffusion
    predictor of Song et al. 2021.  snr: the authors' 0.16 for CIFAR-10; may be traced.
    """
    predictor = ancestral("fixed_large", noise=noise) if predictor is None else predictor

    def step(key, x, pred: Prediction, step: Step, state):
        moved, moved_state = predictor.step(key, x, pred, step, state)
        stays = step.t == step.t_next
        corrected = langevin(key, x, pred, step, snr, noise)
        keep = lambda a, b: jnp.where(stays, a, b)
        return keep(corrected, moved), jax.tree.map(keep, state, moved_state)

    return Sampler(predictor.init, step, predictor.renoise)
