"""Mask-free editing: mask a few tokens at random and predict them under a new text, many times (Muse)."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from vgen.tokens.parallel import grid, random_places, sample_tokens
from vgen.types import Edit, Intervention, Sampler

GUIDANCE_SCALE = 4.0  # of the paper, constant: weights `vgen.guidance.cfg(1 + GUIDANCE_SCALE)`


def maskfree(
    tokens: Int[Array, "b n"],
    mask_id: int,
    *,
    num_steps: Any = 100,
    max_steps: int | None = None,
    fraction: Any = 0.08,
    top_k: Any = 3,
    temperature: Any = 1.0,
    free: Bool[Array, "b n"] | None = None,
) -> Edit:
    """An Edit of the picture `tokens` towards the text that the denoiser is conditioned on.

    Every iteration masks round(fraction * free tokens) random ones, at least one, and samples them anew from the top_k
    of the prediction, which sees all others.  The paper: 100 iterations, 8 %, top 3, and guidance 4, which is the
    caller's to wrap around the denoiser (GUIDANCE_SCALE).
    free: True where a token may change (everywhere by default); the others are never masked.
    num_steps, fraction, top_k and temperature may be traced; see `vgen.tokens.parallel.grid` for max_steps.
    """
    free = jnp.ones(tokens.shape, bool) if free is None else free

    def before(key, x, step, state):
        count = jnp.maximum(jnp.round(fraction * free.sum(axis=1)), 1)
        return jnp.where(random_places(key, free, count), mask_id, x), state

    def fill(key, x, pred, step, state):
        return jnp.where(x == mask_id, sample_tokens(key, pred.x0, temperature, top_k), x), state

    hook = Intervention(before=before)
    return Edit(start=tokens, times=grid(num_steps, max_steps), hook=hook, sampler=Sampler(lambda x: (), fill))
