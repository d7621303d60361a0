"""DINOv2 (Oquab et al. 2023, arXiv:2304.07193), with and without registers (Darcet et al. 2023, arXiv:2309.16588)."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from vgen.layers.linear import linear
from vgen.layers.transformer import activation, norm_layer
from vgen.models.vit import ViT

SMALL = dict(width=384, depth=12, heads=6, mlp_dim=1536)
BASE = dict(width=768, depth=12, heads=12, mlp_dim=3072)
LARGE = dict(width=1024, depth=24, heads=16, mlp_dim=4096)
GIANT = dict(width=1536, depth=40, heads=24, mlp_dim=4096, act="silu", gated=True)  # SwiGLU

# QUIRK: how the released networks resize their positions depends on the registers (dinov2/hub/backbones.py)
PLAIN = dict(num_registers=0, resize="bicubic", resize_offset=0.1)
REGISTERS = dict(num_registers=4, resize="bicubic_antialias", resize_offset=0.0)


class DINOv2(ViT):
    """A ViT as DINOv2 has it: images [b, h, w, 3], normalised by ImageNet's mean and deviation -> `vit.Features`.

    `pooled` is the class token behind the norm.  The network without registers; with them, add REGISTERS' fields:
    DINOv2(**LARGE, **REGISTERS).  `resize_offset=0.0` gives the behaviour of transformers' Dinov2Model at other image
    sizes than 518, which is not the authors'.
    """

    patch_size: int | tuple[int, int] = 14
    image_size: int | tuple[int, int] = 518
    masked: bool = True
    layer_scale: float | None = 1e-5
    resize: str = "bicubic"
    resize_offset: float = 0.1


def intermediate(
    model: ViT, params, images: Float[Array, "b h w c"], last: int = 1, norm: bool = True
) -> list[tuple[Float[Array, "b rows columns width"], Float[Array, "b width"]]]:
    """(patch features, class token) of the last layers, in the order of the layers; `norm`: behind the final norm.

    params: {"params": ...}.  Raises ValueError where the network has fewer layers, or no class token.
    """
    if last > model.depth or not model.cls_token:
        raise ValueError(f"intermediate: got last={last}, cls_token={model.cls_token} for {model.depth} layers")
    states = model.apply(params, images, states=True).states[-last:]
    if norm:
        states = norm_layer("layer", model.eps, **model.dtypes).apply({"params": params["params"]["norm"]}, states)
    rows, columns = images.shape[1] // model.patch[0], images.shape[2] // model.patch[1]
    patches = states[:, :, 1 + model.num_registers :]
    return [(p.reshape(len(images), rows, columns, -1), s[:, 0]) for p, s in zip(patches, states, strict=True)]


class DINOHead(nn.Module):
    """The projection head of DINO's and iBOT's losses: features [..., d] -> scores [..., prototypes].

    A gelu MLP of `layers` dense layers (`hidden` wide) into a `bottleneck`, L2-normalised, against `prototypes` vectors
    whose length is a parameter of its own (weight normalisation; training keeps it at 1).
    Parameters: fc_0, fc_1, ..., direction [bottleneck, prototypes], length [prototypes].
    """

    prototypes: int = 131_072
    hidden: int = 2048
    bottleneck: int = 256
    layers: int = 3

    @nn.compact
    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b k"]:
        widths = [self.hidden] * (self.layers - 1) + [self.bottleneck]
        for i, width in enumerate(widths):
            x = activation("gelu")(x) if i else x
            x = linear(width, kernel_init=nn.initializers.truncated_normal(0.02), name=f"fc_{i}")(x)
        x = x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
        init = nn.initializers.truncated_normal(0.02)
        direction = self.param("direction", init, (self.bottleneck, self.prototypes))
        length = self.param("length", nn.initializers.ones, (self.prototypes,))
        return x @ (direction / jnp.linalg.norm(direction, axis=0)) * length
