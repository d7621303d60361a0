"""How many tokens are masked: in training, drawn at random; in decoding, falling to none."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

SCHEDULES = {
    "cosine": lambda t: jnp.cos(t * (math.pi / 2)),
    "arccos": lambda t: jnp.arccos(t) * (2 / math.pi),
    "linear": lambda t: 1 - t,
    "sqrt": lambda t: 1 - jnp.sqrt(t),
    "square": lambda t: 1 - t**2,
    "cubic": lambda t: 1 - t**3,
}


def mask_fraction(t: Float[Array, "*shape"], schedule: str = "cosine") -> Float[Array, "*shape"]:
    """The masked fraction gamma(t) at decoding progress t, both in [0, 1]: 1 at the start, 0 at the end.

    schedule: "cosine", "arccos", "linear", "sqrt", "square" or "cubic" (MaskGIT, Chang et al. 2022, section 3.3).
    Muse's training rate, of density 2 / (pi sqrt(1 - r^2)), is "cosine" of a uniform t; it is often called arccos.
    Raises ValueError for another name.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"mask_fraction: schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}")
    return jnp.clip(SCHEDULES[schedule](jnp.clip(t, 0, 1)), 0, 1)


def sample_fraction(key: Key[Array, ""], shape: tuple[int, ...], schedule: str = "cosine") -> Float[Array, "..."]:
    """Masked fractions for training, gamma(u) with u uniform in [0, 1); under "cosine" their mean is 2 / pi = 0.64."""
    return mask_fraction(jax.random.uniform(key, shape), schedule)


def random_mask(key: Key[Array, ""], shape: tuple[int, int], count: Int[Array, "..."]) -> Bool[Array, "b n"]:
    """A mask of `shape` with exactly `count` places set in each row, every choice as likely; count: [b] or scalar."""
    order = jax.random.uniform(key, shape).argsort(axis=1).argsort(axis=1)  # a random permutation of each row
    return order < jnp.broadcast_to(count, shape[:1])[:, None]


def mask_tokens(
    key: Key[Array, ""], tokens: Int[Array, "b n"], fraction: Float[Array, "b"], mask_id: int
) -> tuple[Int[Array, "b n"], Bool[Array, "b n"]]:
    """Put `mask_id` in ceil(fraction * n) random places of each row, in one at least -> (masked tokens, mask)."""
    n = tokens.shape[1]
    mask = random_mask(key, tokens.shape, jnp.clip(jnp.ceil(fraction * n), 1, n).astype(jnp.int32))
    return jnp.where(mask, mask_id, tokens), mask
