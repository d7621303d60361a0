"""Prompt-to-Prompt: edit a picture by its prompt, with the attention maps of the unedited one (Hertz et al. 2022)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from vgen.edit import align
from vgen.edit.align import Alignment
from vgen.edit.compose import compose
from vgen.edit.maps import collect, copies
from vgen.types import AttentionControl, Edit, Intervention


class LocalBlend(NamedTuple):
    """Where an edit may change the picture: near the places that look at some words.

    words: bool or float [b, m], the tokens of those words in each prompt, the source's too; see `align.find`.
    factor: places of x per place of the maps, see `maps.collect`.  threshold: of the map, whose maximum is 1.
    start: share of the steps before which nothing is blended.  words, threshold and start may be traced.
    """

    words: Any
    factor: int = 4
    threshold: Any = 0.3
    start: Any = 0.2


def prompt_to_prompt(
    alignment: Alignment,
    num_steps: Any,
    *,
    cross_replace: Any = 0.8,
    self_replace: Any = 0.4,
    self_places: int = 16 * 16,
    equalizer: Any = 1.0,
    blend: LocalBlend | None = None,
) -> Edit:
    """An Edit of a batch of prompts, some of them sources and the others edits of these.

    alignment: of `align.replace` (swapped words), `align.refine` (added words; and for prompts that are only weighted
      anew).  num_steps: rows of the grid.
    cross_replace: share of the steps in which the edited maps of words are used, or a pair (from, to) of shares; each a
      number, or an array that broadcasts to [b, m], for a schedule of every word.
    self_replace: the same for the source's self-attention, numbers or [b]; at sites of at most self_places queries.
    equalizer: broadcasts to [b, m], factors of the edited maps (the paper's -2 .. 2), 1 in rows of sources.
    Everything but self_places and the blend's factor may be traced.
    All rows begin from the noise of their sources.  A sampler with noise must give it to a row and its source alike.
    Under guidance the condition's rows alone are edited; they are the first of the network's batch (`guidance.mix`).
    A word is weighted while its maps are edited, as in the authors' code; the paper has no end of it.
    """
    source = jnp.asarray(alignment.source)
    b, m = alignment.share.shape

    def probs(array, site, step):
        copies(array, b)
        own = array[:b]
        if site.kind == "cross" and array.shape[-1] == m:
            mapper, share, factors = (
                jnp.asarray(a, array.dtype) for a in (alignment.mapper, alignment.share, equalizer)
            )
            mapped = jnp.einsum("bhnw,bwm->bhnm", own[source], mapper, precision=jax.lax.Precision.HIGHEST)
            share, factors = (jnp.broadcast_to(a, (b, m))[:, None, None] for a in (share, factors))
            edited = (share * mapped + (1 - share) * own) * factors
            # QUIRK: cross-attention counts one step more than there are (google/prompt-to-prompt, ptp_utils)
            active = jnp.broadcast_to(_within(cross_replace, step, num_steps + 1), (b, m))[:, None, None]
        elif site.kind == "self" and array.shape[2] <= self_places:
            edited = own[source]
            active = _within(self_replace, step, num_steps).reshape(-1, 1, 1, 1)
        else:
            return array
        return array.at[:b].set(jnp.where(active, edited, own))

    def before(key, x, step, state):
        return jnp.where(step.i == 0, x[source], x), state

    edit = Edit(hook=Intervention(before=before), control=AttentionControl(probs=probs))
    return edit if blend is None else compose(edit, _blended(blend, source, num_steps))


def from_first(
    cross_replace: float = 0.8,
    self_replace: float = 0.4,
    self_places: int = 16 * 16,
    factor: int | None = None,
    threshold: float = 0.3,
    start: float = 0.2,
) -> Callable[[Any, Any], Edit]:
    """(conds, steps) -> Edit of a batch whose first prompt is the source of all others, by `align.replace`.

    conds: text, text_mask [b, m], may be traced.  factor, threshold, start: of a LocalBlend on the words that differ,
    of all edits together in the source; None for no blend.  The others: see `prompt_to_prompt`.
    """

    def aligned(tokens, mask):
        made = align.replace(tokens, mask)
        return made.mapper.astype(np.float32), made.share.astype(np.float32), align.swapped(tokens, mask)

    def edit(conds, steps):
        b, m = conds["text"].shape
        kinds = ((b, m, m), jnp.float32), ((b, m), jnp.float32), ((b, m), bool)
        out = [jax.ShapeDtypeStruct(*kind) for kind in kinds]
        mapper, share, words = jax.pure_callback(aligned, out, conds["text"], conds["text_mask"])
        blend = None if factor is None else LocalBlend(words, factor, threshold, start)
        return prompt_to_prompt(
            Alignment(mapper, share, jnp.zeros(b, jnp.int32)), steps, cross_replace=cross_replace,
            self_replace=self_replace, self_places=self_places, blend=blend,
        )  # fmt: skip

    return edit


def _within(bounds, step, count):
    """Whether the step lies in a share of `count`, or between two."""
    begin, end = bounds if isinstance(bounds, tuple) else (0.0, bounds)
    return (step.i >= _row(begin, count)) & (step.i < _row(end, count))


def _row(share, count):
    return jnp.floor(count * jnp.asarray(share, float) + 1e-4)


def _blended(blend: LocalBlend, source, num_steps) -> Edit:
    """After each step the source's x, but where its words or the edit's were looked at in all steps up to it."""
    name = "local_blend"

    def after(key, x_next, x, pred, step, total):
        total = total + pred.aux[name].astype(total.dtype)
        mask = blend_mask(total, source, blend.threshold, blend.factor)
        return jnp.where(mask | (step.i < _row(blend.start, num_steps)), x_next, x_next[source]), total

    def init(x):
        return jnp.zeros((*x.shape[:3], 1), jnp.promote_types(x.dtype, jnp.float32))

    maps = collect(jnp.asarray(blend.words)[:, None], blend.factor, name)
    return compose(maps, Edit(hook=Intervention(init, after=after)))


def blend_mask(maps: Float[Array, "b h w 1"], source: Any, threshold: Any, factor: int) -> Bool[Array, "b h w 1"]:
    """Where maps, enlarged by `factor`, are above threshold times their maximum, in a row or in its source's.

    Each place counts with its eight neighbours, as a 3 x 3 max-pool of the maps before they were enlarged.
    """
    reach = (1, 2 * factor + 1, 2 * factor + 1, 1)
    pooled = jax.lax.reduce_window(maps, -jnp.inf, jax.lax.max, reach, (1, 1, 1, 1), "SAME")
    mask = pooled > threshold * pooled.max((1, 2), keepdims=True)
    return mask | mask[source]
