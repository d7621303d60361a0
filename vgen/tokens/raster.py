"""Autoregressive decoding: tokens in raster order, each drawn given those before it (VQ-GAN, Esser et al. 2021)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vgen import guidance
from vgen.tokens.parallel import keep_top_k, sample_tokens
from vgen.types import Denoiser, Prediction, Sampler, Step

UNKNOWN = -1  # in the place of a token that is to be drawn


class Drawn(NamedTuple):
    """What the sampling loop carries.

    ids: int32 [b, n], UNKNOWN where a token is to be drawn; any other is kept.  cache: of a network that has one.
    """

    ids: Int[Array, "b n"]
    cache: Any = ()


def grid(count: int) -> Step:
    """A step for each of `count` tokens, i being its place: t = alpha = i / count, sigma the share not yet drawn."""
    i = jnp.arange(count, dtype=jnp.int32)
    t, t_next = i / count, (i + 1) / count
    return Step(i, t, t_next, t, 1 - t, t_next, 1 - t_next)


def keep_top_p(logits: Float[Array, "*b vocab"], p: Any) -> Float[Array, "*b vocab"]:
    """Logits with all but the nucleus at -inf: the likeliest tokens, as many as it takes to make up a probability of p.

    p: in [0, 1], may be traced; 1 keeps all, 0 the likeliest alone (Holtzman et al. 2020, arXiv:1904.09751).
    """
    order = jnp.argsort(logits, axis=-1, descending=True)
    probs = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1)
    before = jnp.cumsum(probs, axis=-1) - probs  # of the likelier ones
    kept = (before < p).at[..., 0].set(True) | (jnp.asarray(p) >= 1)
    rank = jnp.argsort(order, axis=-1)
    return jnp.where(jnp.take_along_axis(kept, rank, axis=-1), logits, -jnp.inf)


def narrowed(
    logits: Float[Array, "*b vocab"], temperature: Any = 1.0, top_k: Any = None, top_p: Any = None
) -> Float[Array, "*b vocab"]:
    """Logits with -inf at the tokens that top_k and then top_p rule out; all numbers may be traced.

    top_k: None or 0 for all.  top_p: of softmax(logits / temperature) among the top k, None for all.
    """
    if top_k is not None:
        vocab = logits.shape[-1]
        top_k = jnp.asarray(top_k)
        logits = keep_top_k(logits, jnp.where(top_k > 0, top_k, vocab))
    if top_p is not None:
        logits = jnp.where(jnp.isneginf(keep_top_p(logits / jnp.maximum(temperature, 1e-6), top_p)), -jnp.inf, logits)
    return logits


def raster_sampler(*, temperature: Any = 1.0, top_k: Any = None, top_p: Any = None) -> Sampler:
    """Draws the token at the step's place from softmax(logits / temperature) within `narrowed`, in a `Drawn`.

    The prediction's x0 are the logits [b, vocab] at that place, its aux the cache from there on.  temperature 0 takes
    the likeliest token.
    """

    def step(key, x: Drawn, pred: Prediction, step: Step, state):
        logits = pred.x0.astype(jnp.promote_types(pred.x0.dtype, jnp.float32))
        token = sample_tokens(key, narrowed(logits, temperature, top_k, top_p)[:, None], temperature)[:, 0]
        given = jax.lax.dynamic_index_in_dim(x.ids, step.i, axis=1, keepdims=False)
        token = jnp.where(given == UNKNOWN, token, given)
        return Drawn(x.ids.at[:, step.i].set(token), pred.aux), state

    return Sampler(lambda x: (), step)


# ---------------------------------------------------------------------------------------------------------- networks


def whole(
    forward: Callable[[Int[Array, "b n"]], Float[Array, "b n vocab"]], weights: guidance.Weights, conds: int = 1
) -> Denoiser:
    """Logits by all of the network for every token.

    forward: ids [conds * b, n] -> logits [conds * b, n, vocab], the i-th of which depend on the ids before i alone.
    weights, conds: the mix of logits under so many conditions, as of `guidance.mix`.
    """

    def denoise(x: Drawn, step: Step) -> Prediction:
        logits = forward(_repeated(jnp.maximum(x.ids, 0), conds))
        return Prediction(guidance.weighted(_at(logits, step.i), weights(step)), x.cache)

    return denoise


def cached(
    advance: Callable[[Int[Array, "b"], Any, Any], tuple[Float[Array, "b vocab"], Any]],
    weights: guidance.Weights,
    conds: int = 1,
) -> Denoiser:
    """Logits by a network that keeps what it has seen: one token's work for every token.

    advance: (the token before [conds * b], place i, cache) -> (logits [conds * b, vocab] of place i, cache); what it is
    given as the token before the first is not looked at.
    """

    def denoise(x: Drawn, step: Step) -> Prediction:
        previous = _at(x.ids, jnp.maximum(step.i - 1, 0))
        logits, cache = advance(_repeated(jnp.maximum(previous, 0), conds), step.i, x.cache)
        return Prediction(guidance.weighted(logits, weights(step)), cache)

    return denoise


def window_start(place: Any, length: int, window: int) -> Any:
    """First of the `window` rows (or columns) of `length` that a token in row `place` is drawn from.

    The token is in the middle, or as near to it as the border lets it (section 3.3; the sampling notebook of
    CompVis/taming-transformers).
    """
    return jnp.clip(place - window // 2, 0, length - window)


def sliding(
    forward: Callable[[Int[Array, "b n"]], Float[Array, "b n vocab"]],
    canvas: tuple[int, int],
    window: tuple[int, int],
    weights: guidance.Weights,
    conds: int = 1,
) -> Denoiser:
    """As `whole` on a grid larger than the network's: each token is drawn within a window of the network's size.

    canvas: (rows, columns) of x.  window: of what `forward` takes; all tokens of it that come before are seen, those
    outside are not.  A canvas of the window's size is `whole`.
    Raises ValueError where the canvas is smaller than the window.
    """
    (rows, columns), (high, wide) = canvas, window
    if rows < high or columns < wide:
        raise ValueError(f"sliding: the canvas {canvas} must hold the window {window}")

    def denoise(x: Drawn, step: Step) -> Prediction:
        row, column = step.i // columns, step.i % columns
        top, left = window_start(row, rows, high), window_start(column, columns, wide)
        ids = jnp.maximum(x.ids, 0).reshape(-1, rows, columns)
        seen = jax.lax.dynamic_slice(ids, (jnp.zeros_like(top), top, left), (ids.shape[0], high, wide))
        logits = forward(_repeated(seen.reshape(-1, high * wide), conds))
        place = (row - top) * wide + column - left
        return Prediction(guidance.weighted(_at(logits, place), weights(step)), x.cache)

    return denoise


def _at(x, place):
    return jax.lax.dynamic_index_in_dim(x, place, axis=1, keepdims=False)


def _repeated(x, count: int):
    return jnp.concatenate([x] * count)
