"""CLIP: a text tower, an image tower and the temperature of their cosines (Radford et al. 2021, arXiv:2103.00020).

The text tower alone conditions Stable Diffusion (last state), SDXL (state ahead of the last layer, projected end state)
and aMUSEd; the image tower alone IP-Adapter and BLIP-Diffusion. OpenCLIP's models and FLIP (Li et al. 2022,
arXiv:2212.00794) are the same networks with other sizes, activations and pooling.
"""

import math
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vgen.layers.embed import Positions
from vgen.layers.linear import linear
from vgen.models.clip_resnet import ResNet
from vgen.models.vit import Tower, ViT


class Encoded(NamedTuple):
    """What a tower says of its input.

    states: [b, n, width], the last layer's tokens: of a text behind the final norm; of an image, class token first, as
      the last layer left them (only the pooled token is normalised), or a ResNet's last map [b, h, w, width].
    pooled: [b, width], the normalised end or class token; None of a ResNet, whose pool projects as well.
    features: [b, features], the pooled token projected, of any length; None without a projection.
    layers: [depth, b, n, width], what every layer gave, not normalised, if asked for: layers[-2] is the state that SDXL
      reads.
    """

    states: Array
    pooled: Array | None
    features: Array | None = None
    layers: Array | None = None


class Scores(NamedTuple):
    """image: [b, features] and text: [t, features], both of length one; logits: [b, t], their cosines times
    exp(logit_scale)."""

    image: Array
    text: Array
    logits: Array


def end_of_text(tokens: Int[Array, "b n"], eos: int | None = None) -> Int[Array, "b"]:
    """Where each text ends: at its first `eos`, or without one given at its largest id, the end token in CLIP's
    vocabulary; 0 in a row that has no `eos`."""
    return jnp.argmax(tokens if eos is None else tokens == eos, axis=1)


def _project(features: int | None, pooled: Array, **kwargs) -> Array | None:
    """The bias-free projection of a tower's pooled state, or None."""
    if features is None:
        return None
    init = nn.initializers.normal(pooled.shape[-1] ** -0.5)
    return linear(features, use_bias=False, kernel_init=init, name="projection", **kwargs)(pooled)


class TextTower(Tower):
    """tokens [b, n <= length] -> Encoded.

    features: width of the projection, None for none.  causal: each token sees the ones before it alone.
    pool: where the text is read off: "end", at its end token, or "first", at its first (FLIP).
    eos: id of the end token, or None for the largest id in the text (see `end_of_text`).
    act: "quick_gelu" for OpenAI's weights and what was trained in their image, "gelu" for most of OpenCLIP's.
    The other fields: see `vgen.models.vit.Tower`.
    Parameters: embed, positions {table}, layers [depth, ...], norm, projection {kernel}.
    """

    width: int = 512
    heads: int = 8
    mlp_dim: int = 2048
    act: str = "quick_gelu"
    eps: float = 1e-5
    vocab: int = 49_408
    length: int = 77
    features: int | None = 512
    eos: int | None = None
    causal: bool = True
    pool: str = "end"

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "b n"],
        mask: Bool[Array, "b n"] | None = None,
        *,
        states: bool = False,
        control=None,
        step=None,
        train: bool = False,
    ) -> Encoded:
        """mask: True where a token may be looked at, everywhere by default: CLIP was trained without a padding mask.

        states: also return what every layer gave.  control, step: for AttentionControl.  train: whether dropout is on.
        Raises ValueError where tokens are longer than `length`, or for an unknown pool.
        """
        if self.pool not in ("end", "first"):
            raise ValueError(f"TextTower: pool must be 'end' or 'first', got {self.pool!r}")
        init = nn.initializers.normal(0.02)
        x = nn.Embed(self.vocab, self.width, embedding_init=init, name="embed", **self.dtypes)(tokens)
        x = Positions(self.length, 0.01, name="positions", **self.dtypes)(x)
        probe = dict(control=control, step=step)
        x, layers = self.run_layers(x, collect=states, train=train, mask=mask, causal=self.causal, **probe)
        x = self.norm_of("norm")(x)
        end = end_of_text(tokens, self.eos) if self.pool == "end" else jnp.zeros(len(tokens), jnp.int32)
        pooled = jnp.take_along_axis(x, end[:, None, None], axis=1)[:, 0]  # [b, width]
        return Encoded(x, pooled, _project(self.features, pooled, **self.dtypes), layers)


class ImageTower(nn.Module):
    """Images, normalised as the weights know them (`vgen.data.preprocess.CLIP`), [b, h, w, 3] -> Encoded.

    vit: the trunk, `clip_vit(...)` for CLIP's.  features: width of the projection, None for none.
    Parameters: vit, projection {kernel}.
    """

    vit: ViT
    features: int | None = 512

    @nn.compact
    def __call__(self, images: Float[Array, "b h w c"], **kwargs) -> Encoded:
        """kwargs: those of `ViT`: keep, states, control, step, train."""
        out = self.vit(images, **kwargs)
        return Encoded(out.tokens, out.pooled, _project(self.features, out.pooled, **self.vit.dtypes), out.states)


def clip_vit(**kwargs) -> ViT:
    """A ViT as CLIP has it: no bias on patches, a norm ahead of the layers, the last one on the class token alone."""
    published = dict(patch_bias=False, pre_norm=True, final_norm="pooled", eps=1e-5, act="quick_gelu", resize="bicubic")
    return ViT(**(published | kwargs))


class CLIP(nn.Module):
    """(images [b, h, w, 3], tokens [t, n]) -> Scores.

    visual: an ImageTower, or a ResNet.  text: a TextTower with as many features.
    Parameters: visual, text, logit_scale [], the log of the factor on the cosines; training keeps it below log 100.
    """

    visual: ImageTower | ResNet
    text: TextTower

    def setup(self):
        self.logit_scale = self.param("logit_scale", nn.initializers.constant(math.log(1 / 0.07)), (), jnp.float32)

    def encode_image(self, images: Float[Array, "b h w c"], **kwargs) -> Encoded:
        """What the image tower says; kwargs as it takes them."""
        if isinstance(self.visual, ResNet):
            states, features = self.visual(images, **kwargs)
            return Encoded(states, None, features)
        return self.visual(images, **kwargs)

    def encode_text(self, tokens: Int[Array, "t n"], mask: Bool[Array, "t n"] | None = None, **kwargs) -> Encoded:
        """What the text tower says; kwargs as it takes them."""
        return self.text(tokens, mask, **kwargs)

    def __call__(
        self, images: Float[Array, "b h w c"], tokens: Int[Array, "t n"], mask: Bool[Array, "t n"] | None = None
    ) -> Scores:
        image, text = (unit(x.features) for x in (self.encode_image(images), self.encode_text(tokens, mask)))
        return Scores(image, text, jnp.exp(self.logit_scale).astype(image.dtype) * image @ text.T)


def unit(x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
    """Vectors divided by their Euclidean length."""
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


_PUBLISHED = {  # features; image: width, depth, heads, mlp, patch, size; text: width, depth, heads; activation
    "ViT-B/32": (512, (768, 12, 12, 3072, 32, 224), (512, 12, 8), "quick_gelu"),
    "ViT-B/16": (512, (768, 12, 12, 3072, 16, 224), (512, 12, 8), "quick_gelu"),
    "ViT-L/14": (768, (1024, 24, 16, 4096, 14, 224), (768, 12, 12), "quick_gelu"),
    "ViT-L/14@336px": (768, (1024, 24, 16, 4096, 14, 336), (768, 12, 12), "quick_gelu"),
    "ViT-H/14": (1024, (1280, 32, 16, 5120, 14, 224), (1024, 24, 16), "gelu"),
    "ViT-g/14": (1024, (1408, 40, 16, 6144, 14, 224), (1024, 24, 16), "gelu"),
    "ViT-bigG/14": (1280, (1664, 48, 16, 8192, 14, 224), (1280, 32, 20), "gelu"),
    "RN50": (1024, ((3, 4, 6, 3), 64, 224), (512, 12, 8), "quick_gelu"),
    "RN101": (512, ((3, 4, 23, 3), 64, 224), (512, 12, 8), "quick_gelu"),
    "RN50x4": (640, ((4, 6, 10, 6), 80, 288), (640, 12, 10), "quick_gelu"),
    "RN50x16": (768, ((6, 8, 18, 8), 96, 384), (768, 12, 12), "quick_gelu"),
    "RN50x64": (1024, ((3, 15, 36, 10), 128, 448), (1024, 12, 16), "quick_gelu"),
}


def published(name: str, **kwargs) -> CLIP:
    """A CLIP of OpenAI's, "ViT-B/32" ... "RN50x64", or of OpenCLIP's, "ViT-H/14", "ViT-g/14" and "ViT-bigG/14".

    kwargs: for every tower, such as dtype.  Raises ValueError for another name.
    """
    if name not in _PUBLISHED:
        raise ValueError(f"published: name must be one of {', '.join(_PUBLISHED)}, got {name!r}")
    features, image, (width, depth, heads), act = _PUBLISHED[name]
    text = TextTower(width=width, depth=depth, heads=heads, mlp_dim=4 * width, act=act, features=features, **kwargs)
    if len(image) == 3:
        blocks, channels, size = image
        return CLIP(ResNet(blocks, channels, features, image=size, **kwargs), text)
    *sizes, patch, size = image
    shape = dict(zip(("width", "depth", "heads", "mlp_dim"), sizes, strict=True))
    vit = clip_vit(**shape, act=act, patch_size=patch, image_size=size, **kwargs)
    return CLIP(ImageTower(vit, features), text)
