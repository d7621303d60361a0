"""ILVR: keep the low frequencies of a reference in every step (Choi et al. 2021, algorithm 1)."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vgen.diffusion.samplers import Noise
from vgen.types import Edit, Intervention


def low_pass(x: Float[Array, "b height width c"], factor: int) -> Float[Array, "b height width c"]:
    """x shrunk by `factor` and enlarged again, both with a cubic kernel and the first with antialiasing.

    Raises ValueError where the size is not a multiple of factor.
    """
    b, height, width, c = x.shape
    if factor < 1 or height % factor or width % factor:
        raise ValueError(f"low_pass: size {height} x {width} is not a multiple of factor {factor}")
    small = jax.image.resize(x, (b, height // factor, width // factor, c), "cubic", antialias=True)
    return jax.image.resize(small, x.shape, "cubic")


def ilvr(
    reference: Float[Array, "b height width c"], factor: int, until: Any = None, noise: Noise = jax.random.normal
) -> Edit:
    """An Edit whose samples share the low frequencies of `reference`: x + low(y_t) - low(x) after every step.

    y_t: the reference with the noise of the level.  factor: N of `low_pass`; the larger, the less is kept.
    until: the time after which x is left alone (the authors' range_t); all steps by default; may be traced.
    """

    def after(key, x_next, x, pred, step, state):
        noised = step.alpha_next * reference + step.sigma_next * noise(key, reference.shape, reference.dtype)
        drawn = x_next + low_pass(noised, factor) - low_pass(x_next, factor)
        keep = True if until is None else step.t > until
        return jnp.where(keep, drawn, x_next).astype(x_next.dtype), state

    return Edit(hook=Intervention(after=after))
