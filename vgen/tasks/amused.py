"""aMUSEd: masked tokens as in Muse, with the text in two forms and the picture's size among the conditions."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from vgen import guidance
from vgen.models.clip import TextTower
from vgen.models.uvit import UVit, micro_conditions
from vgen.tasks.tokens import MaskedTokens
from vgen.tokens import parallel
from vgen.types import Params, Sampler


@dataclasses.dataclass(frozen=True)
class Amused(MaskedTokens):
    """Predict masked tokens of an image from the others and a text (Patil et al. 2024, arXiv:2401.01808).

    What differs from MaskedTokens: the transformer sees the text encoder's states ahead of its last layer and the
    projected end state; without a text it sees those of the empty one; guidance has one scale in all steps.
    transformer: UVit.  text_encoder: CLIP's text tower, of two layers at least, with a projection.
    empty, pad_id: ids of the empty text, and what fills up the row behind them; CLIP's by default.
    aesthetic: what training and sampling say of the pictures' score; their size is `size`, uncropped.

    Parameters: transformer, text_encoder, tokenizer.
    """

    transformer: UVit
    text_encoder: TextTower
    empty: tuple[int, ...] = (49_406, 49_407)
    pad_id: int = 49_407
    aesthetic: float = 6.0

    def __post_init__(self):
        super().__post_init__()
        if self.text_encoder.features is None or self.text_encoder.depth < 2:
            raise ValueError(
                "Amused: the text encoder needs two layers and a projection, got depth "
                f"{self.text_encoder.depth} and features {self.text_encoder.features}"
            )

    def _read(self, params, text, mask, train=False, key=None):
        """({states, pooled; no_states, no_pooled of the empty text}, mask), all [b, ...]."""
        kwargs = dict(train=True, rngs={"dropout": key}) if train and self.train_text else {}
        b, length = text.shape
        empty = jnp.asarray((*self.empty, *[self.pad_id] * length)[:length], text.dtype)
        both = jnp.concatenate([text, empty[None]])
        out = self.text_encoder.apply({"params": params["text_encoder"]}, both, states=True, **kwargs)
        states = {"states": out.layers[-2], "pooled": out.features}
        nothing = {"no_" + name: jnp.broadcast_to(x[b:], (b, *x.shape[1:])) for name, x in states.items()}
        return {name: x[:b] for name, x in states.items()} | nothing, mask

    def _arguments(self, tokens, low, told, keep) -> tuple:
        b, states = tokens.shape[0], told["states"]

        def chosen(name):
            some = states[name]
            if keep is None:
                return some
            return jnp.where(keep.reshape(b, *[1] * (some.ndim - 1)), some, states["no_" + name])

        grid = tokens.reshape(b, *self.transformer.grid)
        micro = micro_conditions(b, self.size, self.size, aesthetic=self.aesthetic)
        return grid, chosen("states"), chosen("pooled"), micro

    def _predict(self, params, tokens, low, told, keep, **kwargs):
        logits = super()._predict(params, tokens, low, told, keep, **kwargs)
        return logits.reshape(*tokens.shape, logits.shape[-1])

    def sample(
        self, params: Params, key, conds: Mapping[str, Any], *, guidance_scale=10.0, steps=12, temperature=1.0,
        choice_temperature=2.0,
    ) -> dict[str, Any]:  # fmt: skip
        """As `MaskedTokens.sample`, but for these knobs.

        guidance_scale: s of unconditional + s (conditional - unconditional) in every step; 1 and less is no guidance.
        choice_temperature: of the first step, falling linearly to 0 in the last.
        """
        return super().sample(
            params, key, conds, guidance_scale=guidance_scale, steps=steps, temperature=temperature,
            choice_temperature=choice_temperature,
        )  # fmt: skip

    def _weights(self, scale) -> guidance.Weights:
        return guidance.cfg(jnp.maximum(scale, 1))

    def _sampler(self, steps, temperature, choice_temperature) -> Sampler:
        # QUIRK: as published, no slack in the count of tokens that stay masked: at two thirds of the way 127 of 256 and
        # not 128 (diffusers, AmusedScheduler in float32; tests/tasks/amused_test.py)
        choice = parallel.annealed(choice_temperature, 0.0, steps)
        return parallel.maskgit_sampler(self.mask_id, choice_temperature=choice, temperature=temperature, slack=0.0)
