"""Texts token by token, until their end token: what may come next, and drawing it (nucleus sampling)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vgen.tokens.parallel import sample_tokens
from vgen.tokens.raster import narrowed

# (ids [rows, length], place) -> logits [rows, vocab] of the token at that place, those before it being known.
Following = Callable[[Int[Array, "rows length"], Any], Float[Array, "rows vocab"]]
# (logits or log-probabilities [rows, vocab], ids, place) -> the same, changed.
Adjust = Callable[[Float[Array, "rows vocab"], Int[Array, "rows length"], Any], Float[Array, "rows vocab"]]


def adjusting(end: int, *, least: Any = 0, repetition: Any = 1.0) -> Adjust:
    """An Adjust: tokens of the row so far are made less likely, and no text ends before it has `least` tokens.

    least: counts what the text begins with.  repetition: logits of tokens that are there are divided by it where
    positive, else multiplied (Keskar et al. 2019, arXiv:1909.05858, section 4.1); 1 changes nothing.  Both may be
    traced.
    """

    def adjust(scores, ids, place):
        there = jnp.arange(ids.shape[1]) < place
        rows = jnp.arange(len(ids))[:, None]
        seen = jnp.zeros(scores.shape, jnp.int32).at[rows, ids].max(jnp.broadcast_to(there, ids.shape).astype(int)) > 0
        rarer = jnp.where(scores < 0, scores * repetition, scores / repetition)
        scores = jnp.where(seen, rarer, scores)
        ends = jnp.arange(scores.shape[1]) == end
        return jnp.where(ends & (place < least), -jnp.inf, scores)

    return adjust


def draw_words(
    key,
    following: Following,
    start: Int[Array, "b prompt"],
    length: int,
    *,
    end: int,
    pad: int = 0,
    temperature: Any = 1.0,
    top_k: Any = None,
    top_p: Any = None,
    adjust: Adjust | None = None,
) -> Int[Array, "b length"]:
    """int32 ids: `start`, then tokens drawn one by one (see `raster.narrowed`) up to the end token, then `pad`.

    length: tokens in all, where a text without an end is cut off.  temperature 0 takes the likeliest token.
    Raises ValueError where the length leaves nothing to be drawn.
    """
    ids = started(start, length, pad)

    def step(carry):
        place, ids, ended = carry
        logits = following(ids, place)
        logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        logits = logits if adjust is None else adjust(logits, ids, place)
        logits = narrowed(logits, temperature, top_k, top_p)
        token = sample_tokens(jax.random.fold_in(key, place), logits[:, None], temperature)[:, 0]
        token = jnp.where(ended, pad, token)
        return place + 1, ids.at[:, place].set(token), ended | (token == end)

    going = lambda carry: (carry[0] < length) & ~carry[2].all()
    return jax.lax.while_loop(going, step, (start.shape[1], ids, jnp.zeros(len(ids), bool)))[1]


def started(start: Int[Array, "b prompt"], length: int, pad: int) -> Int[Array, "b length"]:
    """`start` filled up with `pad`; ValueError where there is no place left."""
    if not 0 < start.shape[1] < length:
        raise ValueError(f"a text of {length} tokens cannot begin with {start.shape[1]}; there must be one, and room")
    return jnp.pad(start.astype(jnp.int32), ((0, 0), (0, length - start.shape[1])), constant_values=pad)
