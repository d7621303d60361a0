"""Beam search: the likeliest of many texts that are continued side by side.

The rules, and their order, are those of transformers' `generate`: log-probabilities are divided by length to the power
of a penalty, twice as many continuations are kept as there are beams, and a search ends where none can get better.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vgen.tokens.words import Adjust, Following, started

FAR = -1e9  # the score of what is no candidate


class Beams(NamedTuple):
    """Finished texts, the best first.

    ids: int32 [b, beams, length], padded behind the end token.  scores: sum of the log-probabilities of the tokens
    that were found, divided by their number to the power of the length penalty; FAR where there are not so many texts.
    """

    ids: Int[Array, "b beams length"]
    scores: Float[Array, "b beams"]


class _Search(NamedTuple):
    """place: of the next token.  ids, scores: of the running texts.  found: finished ones, and which of them there are.
    open: which rows may still find better ones.  cut: nothing can be continued."""

    place: Any
    ids: Int[Array, "b beams length"]
    scores: Float[Array, "b beams"]
    found: Beams
    finished: Bool[Array, "b beams"]
    open: Bool[Array, "b"]
    cut: Bool[Array, ""]


def beam_search(
    following: Following,
    start: Int[Array, "b prompt"],
    length: int,
    *,
    beams: int,
    end: int,
    pad: int = 0,
    length_penalty: Any = 1.0,
    early_stopping: bool | str = False,
    adjust: Adjust | None = None,
) -> Beams:
    """The best texts that begin with `start`, of `length` tokens at most.

    following: gets b * beams rows, those of one text one behind the other.  adjust: of the log-probabilities.
    length_penalty: may be traced; above 0 it favours long texts, below short ones.
    early_stopping: True: a row is done with as many finished texts as beams; False: when the best running text, were it
      to end now, is worse than all finished ones; "never": were it to become as long as it can.
    Raises ValueError for no beams, another early_stopping, and a length that leaves nothing to be found.
    """
    if beams < 1:
        raise ValueError(f"beam_search: beams must be at least 1, got {beams}")
    if early_stopping not in (True, False, "never"):
        raise ValueError(f"beam_search: early_stopping must be True, False or 'never', got {early_stopping!r}")
    prompt, ids = start.shape[1], started(start, length, pad)
    b, ids = len(ids), jnp.repeat(ids[:, None], beams, axis=1)
    shape = jax.eval_shape(following, ids.reshape(b * beams, length), prompt)
    dtype = jnp.promote_types(shape.dtype, jnp.float32)

    def step(search: _Search) -> _Search:
        place = search.place
        scores = _log_probs(following, search.ids, place, adjust, dtype) + search.scores[..., None]
        best, index = jax.lax.top_k(scores.reshape(b, -1), 2 * beams)
        token = (index % scores.shape[2]).astype(jnp.int32)
        ids = _rows(search.ids, index // scores.shape[2]).at[:, :, place].set(token)
        stop = (token == end) | (place + 1 == length)

        running, chosen = jax.lax.top_k(best + jnp.where(stop, FAR, 0), beams)
        finishing = stop & (jnp.arange(2 * beams) < beams)
        full = search.finished.all(1) & (early_stopping is True)
        final = best / jnp.asarray(place + 1 - prompt, dtype) ** length_penalty
        final = final + FAR * ((full | ~search.open)[:, None].astype(dtype) + ~finishing)
        merged, kept = jax.lax.top_k(jnp.concatenate([search.found.scores, final], 1), beams)
        found = Beams(_rows(jnp.concatenate([search.found.ids, ids], 1), kept), merged)
        finished = _rows(jnp.concatenate([search.finished, finishing], 1), kept)

        hoped = length - prompt if early_stopping == "never" else place + 1 - prompt
        if early_stopping == "never":  # a penalty below 0 favours what ends now
            hoped = jnp.where(jnp.asarray(length_penalty) > 0, hoped, place + 1 - prompt)
        possible = running[:, 0] / jnp.asarray(hoped, dtype) ** length_penalty
        worst = jnp.where(finished, merged.min(1, keepdims=True), FAR)
        opened = search.open & (possible[:, None] > worst).any(1)
        return _Search(place + 1, _rows(ids, chosen), running, found, finished, opened, stop.all())

    def going(search: _Search):
        return search.open.any() & ~search.cut & ~(search.finished.all() & (early_stopping is True))

    first = jnp.full((b, beams), FAR, dtype).at[:, 0].set(0)  # all beams are the same text yet
    none = Beams(ids, jnp.full((b, beams), FAR, dtype))
    begun = _Search(
        jnp.int32(prompt), ids, first, none, jnp.zeros((b, beams), bool), jnp.ones(b, bool), jnp.bool_(False)
    )
    return jax.lax.while_loop(going, step, begun).found


def _log_probs(following, ids, place, adjust, dtype):
    """[b, beams, vocab] of the token at `place`."""
    rows = ids.reshape(-1, ids.shape[2])
    scores = jax.nn.log_softmax(following(rows, place).astype(dtype))
    scores = scores if adjust is None else adjust(scores, rows, place)
    return scores.reshape(*ids.shape[:2], -1)


def _rows(x, index):
    """x [b, n, ...] at index [b, k]."""
    return jnp.take_along_axis(x, index.reshape(*index.shape, *(1,) * (x.ndim - 2)), axis=1)
