"""RePaint: put the known region in at every level, and walk parts of the way again (Lugmayr et al. 2022)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vgen.diffusion import grids
from vgen.diffusion.samplers import Noise, climb, renoise
from vgen.edit.compose import chain
from vgen.types import Edit, Intervention


def repaint(
    image: Float[Array, "b *shape"],
    known: Float[Array, "..."],
    jump_length: int = 10,
    repeats: int = 10,
    exact: bool = True,
    noise: Noise = jax.random.normal,
) -> Edit:
    """An Edit that paints where `known` is 0 and keeps `image` where it is 1.

    known: broadcasts against image.  jump_length, repeats: see `grids.resampled` (the authors' 10, 10 on 250 steps).
    Before every step but the first the known region becomes image with the noise of the level; the authors leave what
    the last step makes of it, and exact=True puts the image itself there.
    The sampler must be of one step (ancestral, DDIM): one with a memory does not survive the way up.
    """

    def before(key, x, step, state):
        kept = known * renoise(key, image, step, noise) + (1 - known) * x
        return jnp.where(step.i > 0, kept, x).astype(x.dtype), state

    def after(key, x_next, x, pred, step, state):
        done = known * image + (1 - known) * x_next
        return jnp.where(step.sigma_next == 0, done, x_next).astype(x_next.dtype), state

    hook = chain([climb(noise=noise), Intervention(before=before, after=after if exact else None)])
    return Edit(times=lambda grid: grids.resampled(grid, jump_length, repeats), hook=hook)
