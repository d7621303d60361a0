"""Guidance: one prediction out of several conditions, in one batched call of the network."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from vgen.types import Denoiser, Prediction, Step

Weights = Callable[[Step], jax.Array]


def mix(apply: Callable[[Any, Step, Any], Prediction], conds: Sequence[Any], weights: Weights) -> Denoiser:
    """A denoiser whose x0 is sum_i weights_i * x0 under condition i; the conditions run as one batch.

    apply: (x, step, cond) -> Prediction, with x and cond batched along the first axis of every leaf.
    conds: one tree per condition, all of one structure and shapes, each with x's batch size.
    weights: (step) -> [len(conds)], may depend on traced scales: see `cfg`, `rising` and `instruct_pix2pix`.
    aux is that of the first condition.  What is mixed is whatever x0 holds: logits, clean samples or noise.
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
        parts = pred.x0.reshape(len(conds), -1, *pred.x0.shape[1:])  # [conds, b, ...]
        aux = jax.tree.map(lambda a: a[: a.shape[0] // len(conds)], pred.aux)
        dtype = jnp.promote_types(parts.dtype, jnp.float32)
        return Prediction(jnp.tensordot(w.astype(dtype), parts.astype(dtype), axes=1), aux)

    return denoise


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
