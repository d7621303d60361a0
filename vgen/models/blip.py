"""BLIP's captioner (Li et al. 2022, arXiv:2201.12086): a vision transformer and a text decoder that looks at it."""

from typing import Any

import flax.linen as nn
from jaxtyping import Array, Bool, Float, Int

from vgen.models import vit
from vgen.models.bert import Bert
from vgen.models.vit import ViT
from vgen.types import Params

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP, on pixels in [0, 1]: what the towers take is (x - MEAN) / STD
STD = (0.26862954, 0.26130258, 0.27577711)


class Captioner(nn.Module):
    """Images and the words so far to the logits of the next ones.

    vision: a ViT whose tokens are behind its final norm.  decoder: a Bert with cross and head.
    Parameters: vision, decoder.
    """

    vision: ViT
    decoder: Bert

    def encode(self, images: Float[Array, "b h w c"]) -> Float[Array, "b n d"]:
        """What the decoder looks at: class token and patches; images normalised by MEAN and STD."""
        return self.vision(images).tokens

    def decode(
        self, tokens: Int[Array, "b l"], features: Float[Array, "b n d"], mask: Bool[Array, "b l"] | None = None
    ) -> Float[Array, "b l vocab"]:
        """Logits at every place for the word behind it; mask: False for padding, which no token sees."""
        return self.decoder(tokens, mask, features, causal=True)

    def __call__(
        self, images: Float[Array, "b h w c"], tokens: Int[Array, "b l"], mask: Bool[Array, "b l"] | None = None
    ) -> Float[Array, "b l vocab"]:
        """`decode` with the features of `encode`."""
        return self.decode(tokens, self.encode(images), mask)


def captioner(size: str = "base", image_size: int = 384, **run: Any) -> Captioner:
    """The published captioners, "base" and "large"; norms of the vision tower as in the authors' code.

    run: remat, unroll and dtype of both networks, see `vgen.layers.transformer.Stacked`.
    Raises ValueError for another size.
    """
    towers = dict(base=vit.BASE, large=vit.LARGE)
    if size not in towers:
        raise ValueError(f"captioner: size must be one of {', '.join(towers)}, got {size!r}")
    tower = ViT(**towers[size], patch_size=16, image_size=image_size, resize="bicubic", **run)
    return Captioner(tower, Bert(vocab=30_524, cross=True, head=True, **run))


def for_384_pixels(params: Params) -> dict[str, Any]:
    """A captioner's parameters for pictures of 384 pixels, from those for 224: `vit.for_384_pixels` of its vision."""
    return dict(params) | {"vision": vit.for_384_pixels(params["vision"])}
