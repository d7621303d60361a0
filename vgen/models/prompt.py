"""Text encoders as Stable Diffusion and SDXL put them in front of their networks: thin modules around CLIP's towers.

PixArt's is `vgen.models.t5.T5Encoder` itself.
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vgen.models.clip import TextTower


class ClipPrompt(nn.Module):
    """tokens [b, n] -> {"context": the tower's last states behind its final norm} (Stable Diffusion 1 and 2).

    Stable Diffusion 2 reads the layer ahead of OpenCLIP's last one: its published tower has a layer less.
    Parameters: those of the tower.
    """

    tower: TextTower

    def setup(self):
        nn.share_scope(self, self.tower)

    def __call__(
        self, tokens: Int[Array, "b n"], mask: Bool[Array, "b n"] | None = None, *, train: bool = False
    ) -> dict[str, Float[Array, "..."]]:
        """mask: not looked at, because the network was trained on the states of the padding too."""
        return {"context": self.tower(tokens, train=train).states}


class ClipPairPrompt(nn.Module):
    """tokens [b, n] -> {"context" [b, n, widths of both], "pooled" [b, features]} (SDXL, Podell et al. 2023, 2.1).

    context: states ahead of each tower's last layer, without its final norm, one behind the other.  pooled: the second
    tower's projected end state.  second_pad: id that fills up the second tower's texts, behind the end token.
    Parameters: first, second.  Raises ValueError for towers of one layer, or a second one without a projection.
    """

    first: TextTower
    second: TextTower
    second_pad: int = 0

    def __call__(
        self, tokens: Int[Array, "b n"], mask: Bool[Array, "b n"] | None = None, *, train: bool = False
    ) -> dict[str, Float[Array, "..."]]:
        """mask: True up to the end token; by default everywhere, and the padding is that of the first tower."""
        if min(self.first.depth, self.second.depth) < 2 or self.second.features is None:
            raise ValueError(
                f"ClipPairPrompt: the towers need two layers, they have {self.first.depth} and {self.second.depth}, "
                f"and the second a projection, its features are {self.second.features}"
            )
        first = self.first(tokens, states=True, train=train)
        # QUIRK: both towers share one vocabulary, but texts of the second are filled up with id 0, "!", and not with
        # the end token (OpenCLIP's training; pad_token of SDXL's tokenizer_2; tests/convert/pipelines_test.py)
        tokens = tokens if mask is None else jnp.where(mask, tokens, self.second_pad)
        second = self.second(tokens, states=True, train=train)
        context = jnp.concatenate([first.layers[-2], second.layers[-2]], axis=-1)
        return {"context": context, "pooled": second.features}
