"""SDEdit: noise a picture part of the way and denoise it (Meng et al. 2022, algorithm 1)."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vgen.diffusion import grids
from vgen.diffusion.samplers import Noise, renoise
from vgen.types import Edit


def sdedit(image: Float[Array, "b *shape"], strength: Any, noise: Noise = jax.random.normal) -> Edit:
    """An Edit that begins from the noised `image` at the last floor(strength * steps) rows of the grid.

    image: in the space of the denoiser, pixels or latents.  strength: in [0, 1], may be traced: 0 gives the image back,
    1 keeps no more of it than the first row of the grid does.
    """

    def start(key, grid):
        first = jax.tree.map(lambda field: field[0], grid)
        return jnp.where(grids.rows(grid) > 0, renoise(key, image, first, noise), image)

    return Edit(start=start, times=lambda grid: grids.tail(grid, strength))
