"""Parallel decoding: sample all masked tokens, mask the least certain again, repeat (MaskGIT, Chang et al. 2022)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num

from vgen.tokens.schedules import mask_fraction, mask_tokens
from vgen.types import Intervention, Prediction, Sampler, Step


class Decoding(NamedTuple):
    """State of `maskgit_sampler`: unknown, int32 [b], the number of tokens that were masked at the start."""

    unknown: Int[Array, "b"]


def grid(num_steps: Any, max_steps: int | None = None, schedule: str = "cosine") -> Step:
    """The decoding grid: t = i / num_steps, alpha the kept and sigma the masked fraction.

    num_steps: int or traced int32.  max_steps: number of rows, num_steps by default; a grid padded to one length and
    given to `vgen.sample.sample(..., num_steps=num_steps)` serves every number of steps with one compilation.
    Raises ValueError where num_steps is traced and max_steps missing, or num_steps is not in 1..max_steps.
    """
    if isinstance(num_steps, jax.core.Tracer):
        if max_steps is None:
            raise ValueError("grid: a traced num_steps needs max_steps, the number of rows")
    else:
        max_steps = int(num_steps) if max_steps is None else max_steps
        if not 1 <= num_steps <= max_steps:
            raise ValueError(f"grid: num_steps must be in 1..max_steps = {max_steps}, got {num_steps}")
    i = jnp.arange(max_steps, dtype=jnp.int32)
    num_steps = jnp.asarray(num_steps, jnp.float32)
    t, t_next = (jnp.where(k < num_steps, k / num_steps, 1.0) for k in (i, i + 1))  # exactly 1 at the end
    sigma, sigma_next = mask_fraction(t, schedule), mask_fraction(t_next, schedule)
    return Step(i, t, t_next, 1 - sigma, sigma, 1 - sigma_next, sigma_next)


def keep_top_k(logits: Float[Array, "*b vocab"], k: Any) -> Float[Array, "*b vocab"]:
    """Logits with all but the k largest at -inf (ties with the k-th stay); k: int, or traced int32 (a slower sort)."""
    vocab = logits.shape[-1]
    if isinstance(k, int):
        kth = jax.lax.top_k(logits, min(k, vocab))[0][..., -1:]
    else:
        kth = jnp.take(jnp.sort(logits, axis=-1), vocab - jnp.clip(jnp.asarray(k)[None], 1, vocab), axis=-1)
    return jnp.where(logits < kth, -jnp.inf, logits)


def sample_tokens(
    key, logits: Float[Array, "b n vocab"], temperature: Any = 1.0, top_k: Any = None
) -> Int[Array, "b n"]:
    """Draw from softmax(logits / temperature); temperature 0 takes the largest, and all may be traced."""
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    logits = logits if top_k is None else keep_top_k(logits, top_k)
    noise = jax.random.gumbel(key, logits.shape, logits.dtype)
    return jnp.argmax(logits + temperature * noise, axis=-1).astype(jnp.int32)


def annealed(start: Any, end: Any, num_steps: Any) -> Callable[[Step], Array]:
    """A choice temperature that goes linearly from `start` in the first of `num_steps` steps to `end` in the last.

    aMUSEd's is (2, 0).  Numbers, or traced.
    """
    return lambda step: start + (end - start) * step.i / jnp.maximum(num_steps - 1, 1)


def maskgit_sampler(
    mask_id: int, *, choice_temperature: Any = 4.5, temperature: Any = 1.0, top_k: Any = None, slack: float = 1e-6
) -> Sampler:
    """Parallel decoding of tokens [b, n] int32, in which `mask_id` stands for those to be found.

    A step samples every masked token from the predicted logits, takes log p + choice_temperature (1 - t_next) Gumbel
    noise as its confidence, and masks the least certain again, so that floor(sigma_next * masked at the start) remain:
    at least one, and at least one fewer than before.  The last step (t_next = 1) leaves none.  Tokens that are not
    masked never change, so inpainting is decoding from a partly known start.
    choice_temperature, temperature, top_k: numbers, or traced; temperature 0 takes the likeliest token.  p is that of
    the logits themselves, whatever temperature and top_k.  choice_temperature may also be a function of the Step, which
    gives the factor of the noise itself: see `annealed`; so may temperature.  slack: see `masks_left`.
    MaskGIT's released code is the same up to ties, of which it masks none.
    """

    def init(x):
        return Decoding((x == mask_id).sum(axis=1, dtype=jnp.int32))

    def step(key, x, pred: Prediction, step: Step, state: Decoding):
        token_key, noise_key = jax.random.split(key)
        masked = x == mask_id
        logits = pred.x0.astype(jnp.promote_types(pred.x0.dtype, jnp.float32))
        heat = temperature(step) if callable(temperature) else temperature
        tokens = jnp.where(masked, sample_tokens(token_key, logits, heat, top_k), x)
        chosen = jnp.where(masked, tokens, 0)[..., None]
        log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), chosen, axis=-1)[..., 0]  # [b, n]
        noise = jax.random.gumbel(noise_key, x.shape, log_p.dtype)
        factor = choice_temperature(step) if callable(choice_temperature) else choice_temperature * (1 - step.t_next)
        confidence = jnp.where(masked, log_p + factor * noise, jnp.inf)
        rank = confidence.argsort(axis=1).argsort(axis=1)
        count = masks_left(state.unknown, masked.sum(axis=1), step.sigma_next, slack)
        again = masked & (rank < count[:, None]) & (step.t_next < 1)
        return jnp.where(again, mask_id, tokens), state

    def renoise(key, x0, step: Step):
        return mask_tokens(key, x0, jnp.broadcast_to(step.sigma, x0.shape[:1]), mask_id)[0]

    return Sampler(init, step, renoise)


def second_thoughts(mask_id: int, share: float = 0.5) -> Intervention:
    """A hook for rows of a grid that lie behind its decoding (t = 1): each finds a random `share` of the tokens again.

    Parallel decoding never takes a token back; such a row draws half of them anew, given all the others, as a corrector
    behind a predictor does (Campbell et al. 2022, arXiv:2205.14987, section 4.4).  Only what was masked at the start is
    ever masked again.  Give the loop a grid of n rows to decode and more than n for its num_steps.
    """

    def before(key, x, step: Step, free):
        again = free & (step.t >= 1)
        return jnp.where(random_places(key, again, jnp.round(share * again.sum(axis=1))), mask_id, x), free

    return Intervention(init=lambda x: x == mask_id, before=before)


def random_places(key, free: Bool[Array, "b n"], count: Num[Array, "b"]) -> Bool[Array, "b n"]:
    """True at `count` random places of each row, all of them free."""
    order = jnp.where(free, jax.random.uniform(key, free.shape), 2.0).argsort(axis=1).argsort(axis=1)
    return free & (order < count[:, None])


def masks_left(
    unknown: Int[Array, "b"], masked: Int[Array, "b"], fraction: Float[Array, ""], slack: float = 1e-6
) -> Int[Array, "b"]:
    """floor((fraction + slack) * unknown), at most masked - 1 and at least 1.

    In float32 cos(pi / 3) falls short of 1/2, and with it the floor by a token; slack corrects that.  0 is the count of
    the published code, which at two thirds of the way leaves 127 of 256 tokens masked and not 128.
    """
    return jnp.maximum(jnp.minimum(jnp.floor(unknown * (fraction + slack)).astype(jnp.int32), masked - 1), 1)
