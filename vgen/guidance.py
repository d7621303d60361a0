"""Guidance: one prediction out of several conditions, in one batched call of the network."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vgen.diffusion.predictions import kind_of, noise_of, spread
from vgen.types import Denoiser, Prediction, Step

Weights = Callable[[Step], jax.Array]


def mix(
    apply: Callable[[Any, Step, Any], Prediction],
    conds: Sequence[Any],
    weights: Weights,
    rescale: Any = None,
    kind: str = "eps",
) -> Denoiser:
    """A denoiser whose x0 is sum_i weights_i * x0 under condition i; the conditions run as one batch.

    apply: (x, step, cond) -> Prediction, with x and cond batched along the first axis of every leaf.
    conds: one tree per condition, all of one structure and shapes, each with x's batch size.
    weights: (step) -> [len(conds)], may depend on traced scales: see `cfg`, `rising` and `instruct_pix2pix`.
    aux is that of the first condition.  What is mixed is whatever x0 holds: logits, clean samples or noise.
    rescale: phi in [0, 1] of `rescaled`, applied to the prediction in the terms of `kind`, that of the network, because
    standard deviations are not those of x0; None leaves it out.  May be traced, as the weights.
    Raises ValueError where conds is empty or the structures differ.
    """
    if not conds:
        raise ValueError("mix: conds is empty; give one condition per weight")
    structures = [jax.tree.structure(cond) for cond in conds]
    if any(s != structures[0] for s in structures):
        raise ValueError(f"mix: the conditions must have one structure, got {structures}")
    joined = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *conds)

    def denoise(x, step: Step) -> Prediction:
        pred = apply(jax.tree.map(lambda a: jnp.concatenate([a] * len(conds)), x), step, joined)
        w = weights(step)
        if w.shape != (len(conds),):
            raise ValueError(f"mix: weights must have shape ({len(conds)},), one per condition, got {w.shape}")
        first = pred.x0[: pred.x0.shape[0] // len(conds)]
        aux = jax.tree.map(lambda a: a[: a.shape[0] // len(conds)], pred.aux)
        mixed = weighted(pred.x0, w)
        return Prediction(mixed if rescale is None else rescaled(mixed, first, x, step, rescale, kind), aux)

    return denoise


def weighted(x: Float[Array, "n ..."], w: Float[Array, "conds"]) -> Float[Array, "b ..."]:
    """sum_i w_i x_i of the predictions x [conds * b, ...] under every condition, in float32 or wider."""
    parts = x.reshape(w.shape[0], -1, *x.shape[1:])  # [conds, b, ...]
    dtype = jnp.promote_types(parts.dtype, jnp.float32)
    return jnp.tensordot(w.astype(dtype), parts.astype(dtype), axes=1)


def single(step: Step) -> Float[Array, "1"]:
    """The weight of the only condition: no guidance."""
    return jnp.ones(1)


def cfg(scale: Any) -> Weights:
    """scale * cond + (1 - scale) * other: classifier-free guidance (Ho & Salimans 2022).

    Scale 1 is the condition alone.  The order of conditions is [cond, other]; `other` is the empty condition, or a
    negative prompt.
    """
    return lambda step: jnp.stack([jnp.asarray(scale, float), 1 - jnp.asarray(scale, float)])


def rising(scale: Any) -> Weights:
    """(1 + t) * cond - t * other, t rising linearly to `scale` (Muse, Chang et al. 2023, section 2.7).

    t = scale * t_next of the step; scale 0 is the condition alone.  Where Muse's t begins and ends is not published.
    """
    return lambda step: cfg(1 + scale * step.t_next)(step)


def instruct_pix2pix(text_scale: Any, image_scale: Any) -> Weights:
    """none + image_scale (image - none) + text_scale (both - image): InstructPix2Pix (Brooks et al. 2023, eq. 3).

    The order of conditions is [both, image, none].
    """

    def weights(step):
        text, image = jnp.asarray(text_scale, float), jnp.asarray(image_scale, float)
        return jnp.stack([text, image - text, 1 - image])

    return weights


def interval(weights: Weights, low: Any = 0.0, high: Any = jnp.inf) -> Weights:
    """The weights where low < sigma / alpha <= high, and the first condition alone elsewhere.

    Kynkaanniemi et al. 2024; the bounds may be traced.
    """

    def limited(step):
        w, ratio = weights(step), step.sigma / step.alpha
        return jnp.where((ratio > low) & (ratio <= high), w, jnp.zeros_like(w).at[0].set(1))

    return limited


def rescaled(mixed, first, x, step: Step, phi: Any, kind: str = "eps"):
    """x0 of a guided prediction whose standard deviation is brought back by phi to that of the condition alone.

    mixed, first: x0 with guidance and of the first condition.  kind: the prediction whose standard deviation, over all
    but the first axis, is meant.  Lin et al. 2023, section 3.4; phi 0.7 there.
    """
    kind = kind_of(kind)
    raw, reference = (kind.target(x0, noise_of(x0, x, step), step) for x0 in (mixed, first))
    std = lambda a: jnp.std(a, axis=tuple(range(1, a.ndim)), keepdims=True, ddof=1)
    return kind.to_x0(raw * (phi * std(reference) / std(raw) + 1 - phi), x, step)


def classifier(log_prob: Callable[[Any, Step], jax.Array], scale: Any = 1.0) -> Callable[[Any, Step], Any]:
    """(x, step) -> scale * gradient of log p(y | x_t), for `samplers.ancestral(guide=...)` or `steer`.

    log_prob: (x [b, ...], step) -> [b], a classifier of noised images with its labels inside.
    """
    return lambda x, step: scale * jax.grad(lambda x: log_prob(x, step).sum())(x)


def steer(denoise: Denoiser, guide: Callable[[Any, Step], Any]) -> Denoiser:
    """eps - sigma * guide(x, step), as x0: classifier guidance in the form for DDIM and every deterministic sampler.

    Dhariwal & Nichol 2021, algorithm 2.  An ancestral sampler takes the shift of the mean instead
    (algorithm 1): `samplers.ancestral(guide=...)`.
    """

    def steered(x, step: Step) -> Prediction:
        pred = denoise(x, step)
        factor = spread(step.sigma**2 / step.alpha, x)
        return pred._replace(x0=pred.x0 + factor * guide(x, step))

    return steered


def clip(denoise: Denoiser, limit: Any = 1.0) -> Denoiser:
    """Static thresholding: x0 within -limit .. limit.  A limit below the range of latents harms latent models."""

    def clipped(x, step: Step) -> Prediction:
        pred = denoise(x, step)
        return pred._replace(x0=jnp.clip(pred.x0, -limit, limit))

    return clipped


def dynamic_threshold(denoise: Denoiser, quantile: Any = 0.995, maximum: Any = jnp.inf) -> Denoiser:
    """x0 clipped to -s .. s and divided by s, the quantile of |x0| in each example, at least 1 and at most `maximum`.

    Saharia et al. 2022 (Imagen), section 2.3, where s is not bounded; diffusers' maximum is 1 by default, which is
    `clip`, and DeepFloyd IF's 1.5.
    """

    def thresholded(x, step: Step) -> Prediction:
        pred = denoise(x, step)
        size = jnp.quantile(jnp.abs(pred.x0).reshape(pred.x0.shape[0], -1), quantile, axis=1)
        s = spread(jnp.clip(size, 1, maximum), pred.x0)
        return pred._replace(x0=jnp.clip(pred.x0, -s, s) / s)

    return thresholded
