"""What a network predicts, and how x0 follows from it: samplers see x0 only."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp

from vgen.types import Prediction, Step


class Kind(NamedTuple):
    """One parameterisation.  Steps hold scalars, or [b] in training.

    to_x0: (raw, x, step) -> x0.  target: (x0, eps, step) -> what the network regresses.
    slope: (step) -> (d eps / d target)^2, by which a squared error of the target is one of eps.
    inputs: (x, step) -> (x, t), what the network is given.
    """

    to_x0: Callable[..., Any]
    target: Callable[..., Any]
    slope: Callable[..., Any]
    inputs: Callable[..., Any] = lambda x, step: (x, step.t)


def spread(a, x):
    """A scalar, or a vector [b], shaped to broadcast against x [b, ...]."""
    a = jnp.asarray(a)
    return a.reshape(a.shape + (1,) * (jnp.ndim(x) - a.ndim)) if a.ndim else a


def _at(step: Step, x):
    return spread(step.alpha, x), spread(step.sigma, x)


def noise_of(x0, x, step: Step):
    """The eps of x = alpha x0 + sigma eps."""
    alpha, sigma = _at(step, x)
    return (x - alpha * x0) / sigma


def _eps_to_x0(raw, x, step):
    alpha, sigma = _at(step, x)
    return (x - sigma * raw) / alpha


def _v_to_x0(raw, x, step):
    alpha, sigma = _at(step, x)
    return (alpha * x - sigma * jnp.sqrt(alpha**2 + sigma**2) * raw) / (alpha**2 + sigma**2)


def _v(x0, eps, step):
    alpha, sigma = _at(step, x0)
    return (alpha * eps - sigma * x0) / jnp.sqrt(alpha**2 + sigma**2)


def _flow_to_x0(raw, x, step):
    alpha, sigma = _at(step, x)
    return (x - sigma * raw) / (alpha + sigma)


def _score_to_x0(raw, x, step):
    alpha, sigma = _at(step, x)
    return (x + sigma**2 * raw) / alpha


KINDS = {
    "eps": Kind(_eps_to_x0, lambda x0, eps, step: eps, lambda s: jnp.ones_like(jnp.asarray(s.alpha))),
    "x0": Kind(lambda raw, x, step: raw, lambda x0, eps, step: x0, lambda s: (s.alpha / s.sigma) ** 2),
    "v": Kind(_v_to_x0, _v, lambda s: s.alpha**2 / (s.alpha**2 + s.sigma**2)),
    "flow": Kind(_flow_to_x0, lambda x0, eps, step: eps - x0, lambda s: (s.alpha / (s.alpha + s.sigma)) ** 2),
    "score": Kind(_score_to_x0, lambda x0, eps, step: -eps / spread(step.sigma, eps), lambda s: s.sigma**2),
}


def kind_of(kind: str | Kind) -> Kind:
    """The parameterisation of a name.

    "eps", the noise; "x0"; "v" = alpha eps - sigma x0 (Salimans & Ho 2022); "flow" = eps - x0, the velocity of a
    rectified flow; "score" = -eps / sigma.  A Kind is returned as is: see `edm`.  Raises ValueError for another name.
    """
    if isinstance(kind, Kind):
        return kind
    if kind not in KINDS:
        raise ValueError(f"prediction: kind must be one of {', '.join(KINDS)}, or edm(...), got {kind!r}")
    return KINDS[kind]


def edm(sigma_data: float = 0.5) -> Kind:
    """EDM's preconditioning: D = c_skip x + c_out F(c_in x, log(sigma) / 4), of x / alpha and sigma / alpha.

    Karras et al. 2022, table 1; sigma_data: the standard deviation of the data.
    """

    def parts(step, x):
        alpha, sigma = _at(step, x)
        ratio = sigma / alpha
        total = ratio**2 + sigma_data**2
        return alpha, ratio, total, sigma_data**2 / total, ratio * sigma_data / jnp.sqrt(total)

    def to_x0(raw, x, step):
        alpha, _, _, skip, out = parts(step, x)
        return skip * x / alpha + out * raw

    def target(x0, eps, step):
        _, ratio, _, skip, out = parts(step, x0)
        return (x0 - skip * (x0 + ratio * eps)) / out

    def slope(step):
        ratio = step.sigma / step.alpha
        return sigma_data**2 / (ratio**2 + sigma_data**2)  # SNR c_out^2

    def inputs(x, step):
        alpha, _, total, _, _ = parts(step, x)
        return x / (alpha * jnp.sqrt(total)), jnp.log(step.sigma / step.alpha) / 4

    return Kind(to_x0, target, slope, inputs)


def rescaled(kind: str | Kind) -> Kind:
    """The same for a variance-preserving network on a grid with alpha 1: it is given x / sqrt(alpha^2 + sigma^2)."""

    def inputs(x, step):
        alpha, sigma = _at(step, x)
        return kind_of(kind).inputs(x, step)[0] / jnp.sqrt(alpha**2 + sigma**2), step.t

    return kind_of(kind)._replace(inputs=inputs)


VARIANCES = (None, "learned", "learned_range")


def split_variance(raw, variance: str | None):
    """(prediction, variance output or None): halves of the channels where the network learns its variance.

    Raises ValueError for another name or an odd number of channels.
    """
    if variance not in VARIANCES:
        raise ValueError(f"prediction: variance must be None, learned or learned_range, got {variance!r}")
    if variance is None:
        return raw, None
    if raw.shape[-1] % 2:
        raise ValueError(f"prediction: {variance} needs twice the channels of x, got {raw.shape[-1]}")
    return tuple(jnp.split(raw, 2, axis=-1))


def denoiser(
    network: Callable[..., Any],
    kind: str | Kind = "eps",
    *,
    variance: str | None = None,
    time: Callable[[Step], Any] | None = None,
) -> Callable[..., Prediction]:
    """A Denoiser from a network: (x, step, *cond) -> Prediction.

    network: (x [b, ...], t [b], *cond) -> raw, of x's shape, or with twice its channels where `variance` is "learned"
    (the log-variance itself) or "learned_range" (its place between the fixed ones, -1 .. 1; Nichol & Dhariwal 2021);
    that half is handed on as aux {"variance": ...}.  It may return (raw, aux), aux a dict that is handed on too.
    The result is also what `vgen.guidance.mix` takes.
    kind: see `kind_of`.  time: (step) -> what the network is told instead of t: `lambda step: step.t * 1000 / T`.
    Arithmetic is in float32 at least, whatever the network computes in.
    """
    kind = kind_of(kind)
    if variance not in VARIANCES:
        raise ValueError(f"prediction: variance must be None, learned or learned_range, got {variance!r}")

    def denoise(x, step: Step, *cond) -> Prediction:
        given, t = kind.inputs(x, step)
        t = t if time is None else time(step)
        raw = network(given.astype(x.dtype), jnp.broadcast_to(jnp.asarray(t), x.shape[:1]), *cond)
        raw, aux = raw if isinstance(raw, tuple) else (raw, {})
        raw, learned = split_variance(raw.astype(jnp.promote_types(raw.dtype, jnp.float32)), variance)
        aux = aux if learned is None else aux | {"variance": learned}
        return Prediction(kind.to_x0(raw, x, step), aux or None)

    return denoise
