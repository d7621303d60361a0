"""Cross-attention maps of words, out of a network and averaged over a sampling run."""

from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vgen.types import AttentionControl, Denoiser, Edit, Intervention, Prediction, Step


def collect(words: Any, factor: int, name: str) -> Edit:
    """An Edit after which pred.aux[name] [b, height, width, k] holds the maps of k words, in the shape of x.

    words: [b, k, m], weights of the m tokens in each word's map: those of a word 1, all others 0; may be traced.
    factor: places of x per place of the map along each axis: the sites of that resolution are averaged, over heads
      too.  4 for Stable Diffusion: the 16 x 16 maps of 64 x 64 latents.
    The rows of the condition come first in the batch of the network, as `vgen.guidance.mix` lays them.
    In a chain of edits it stands ahead of MultiDiffusion, which averages the maps of its windows.
    Raises ValueError where no map comes, or a batch of another size.
    """
    words = jnp.asarray(words)
    b, k, m = words.shape

    def keep(probs, site, step):
        if site.kind != "cross" or probs.shape[-1] != m:
            return None
        weights = jnp.tile(words, (copies(probs, b), 1, 1)).astype(probs.dtype)
        return jnp.einsum("bhnm,bkm->bnk", probs, weights, precision=jax.lax.Precision.HIGHEST) / probs.shape[1]

    def guidance(denoise: Denoiser) -> Denoiser:
        def with_maps(x, step: Step) -> Prediction:
            pred = denoise(x, step)
            rows, columns = x.shape[1] // factor, x.shape[2] // factor
            found = jax.tree.leaves((pred.aux or {}).get("kept", {}).get(name, {}))
            found = [a[:b].reshape(b, -1, rows, columns, k) for a in found if a.shape[-2] == rows * columns]
            if not found or x.shape[1] % factor or x.shape[2] % factor:
                raise ValueError(
                    f"collect: no maps of {m} tokens came at 1 / {factor} of x {x.shape}; has the network a "
                    "cross-attention there, is edit.control given to it, and does this edit come first in the chain?"
                )
            maps = jnp.concatenate(found, axis=1).mean(1).repeat(factor, axis=1).repeat(factor, axis=2)
            return pred._replace(aux={**pred.aux, name: maps})

        return with_maps

    return Edit(guidance=guidance, control=AttentionControl(keep={name: keep}))


class Total(NamedTuple):
    """The sum of maps, [b, height, width, k], and of how many steps."""

    maps: Any
    steps: Any


def maps(words: Any, factor: int, name: str = "maps") -> Edit:
    """An Edit that changes nothing and sums the maps of words over the steps; see `collect` for its arguments.

    The sums are in the states of the run: `average(task.sample(..., edit=maps(words, 4), states=True)["states"])`.
    """
    k = jnp.shape(words)[1]

    def init(x):
        return Total(jnp.zeros((*x.shape[:3], k), jnp.promote_types(x.dtype, jnp.float32)), jnp.int32(0))

    def after(key, x_next, x, pred, step, total):
        return x_next, Total(total.maps + pred.aux[name].astype(total.maps.dtype), total.steps + 1)

    return replace(collect(words, factor, name), hook=Intervention(init, after=after))


def average(states: Any):
    """The maps [b, height, width, k] of the words, averaged over the steps, in the states that a run ended with.

    Each number is the share of a place's attention that the word gets, of 1 for all tokens together.
    Raises ValueError unless there is one `maps` among the run's edits.
    """
    totals = [state for state in jax.tree.leaves(states, is_leaf=_is_total) if _is_total(state)]
    if len(totals) != 1:
        raise ValueError(f"average: expected the states of a run with one `maps` among its edits, found {len(totals)}")
    return totals[0].maps / totals[0].steps


def _is_total(state) -> bool:
    return isinstance(state, Total)


def copies(probs, b: int) -> int:
    """How often the batch of b prompts is in an attention's, once for each condition of guidance."""
    if probs.shape[0] % b:
        raise ValueError(f"attention of {probs.shape[0]} rows: expected a multiple of the {b} prompts of the edit")
    return probs.shape[0] // b
