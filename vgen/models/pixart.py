"""PixArt-alpha (Chen et al. 2023, arXiv:2310.00426) and PixArt-Sigma (Chen et al. 2024, arXiv:2403.04692).

DiT with cross-attention to a text encoder's states (T5-XXL), and one modulation for all layers, which each shifts by a
table of its own (adaLN-single), where DiT has a large linear layer in each.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from vgen.layers.embed import sinusoids
from vgen.layers.linear import linear
from vgen.layers.transformer import MLP, Stacked, norm_layer
from vgen.models.dit import NORMAL, DiTBlock, embed_numbers, embed_patches, shift_scale, unpatchify
from vgen.types import AttentionControl, Params, Step

ALPHA_256 = dict(sample_size=32, null_tokens=120)
ALPHA_512 = dict(sample_size=64, null_tokens=120)
ALPHA_1024 = dict(sample_size=128, null_tokens=120, interpolation=2.0, micro=True)
SIGMA_256 = dict(sample_size=32, null_tokens=300, interpolation=0.5)
SIGMA_512 = dict(sample_size=64, null_tokens=300)
SIGMA_1024 = dict(sample_size=128, null_tokens=300, interpolation=2.0)
SIGMA_2K = dict(sample_size=256, null_tokens=300, interpolation=4.0)
COMPRESSED = dict(compress=2, compressed=14)  # the released keys and values of layers 14 .. 27


class PixArt(Stacked):
    """Noisy latents, time and text -> what the network is trained to predict.

    depth, width, heads, mlp_dim, patch_size, in_channels, out_channels: as of `vgen.models.dit.DiT`.
    context_width: width of the text states.  null_tokens: rows of the fixed random context that takes the place of a
      dropped one (`keep_context`), as many as contexts have tokens; 0: there is none.
    sample_size, interpolation: a grid of any size has the positions of sample_size / patch_size, divided by the latter.
    micro: whether the picture's size and aspect ratio are conditions (PixArt-alpha at 1024 pixels).
    compress, compressed: keys and values of the last `compressed` layers are compressed by the ratio `compress` along
      both sides (PixArt-Sigma, section 3.2).
    Other fields: see `vgen.layers.transformer.Stacked`.
    Parameters: patches, time {fc1, fc2}, size and aspect {fc1, fc2} if micro, mod (time -> 6 width), caption
      {fc1, fc2}, null_context [null_tokens, context_width], layers and compressed_layers (`DiTBlock`, stacked),
      out_table [2, width], out.
    """

    depth: int = 28
    width: int = 1152
    heads: int = 16
    mlp_dim: int | None = None
    patch_size: int = 2
    in_channels: int = 4
    out_channels: int = 8
    context_width: int = 4096
    null_tokens: int = 0
    sample_size: int = 32
    interpolation: float = 1.0
    micro: bool = False
    compress: int = 1
    compressed: int = 0
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"] | Float[np.ndarray, "b h w c"],
        t: Array | np.ndarray,
        *,
        context: Float[Array, "b m d"] | Float[np.ndarray, "b m d"],
        context_mask: Array | np.ndarray | None = None,
        keep_context: Bool[Array, "b"] | None = None,
        size: Array | np.ndarray | None = None,
        aspect: Array | np.ndarray | None = None,
        contexts: Mapping[str, tuple] = {},
        train: bool = False,
        control: AttentionControl | None = None,
        step: Step | None = None,
    ) -> Float[Array, "b h w c_out"]:
        """x: latents.  t: [b], 0 .. 1000, integers or not.  context: the text encoder's states.

        context_mask: [b, m], true for tokens that count.  keep_context: samples that do not keep theirs see the null
        context under the same mask.  size: [b, 2], height and width in pixels, and aspect: [b], height / width, both
        where micro.  contexts: further named contexts {name: (context, mask, strength)}.  train: changes nothing here.
        control, step: see `vgen.layers.attention.attention`.
        Raises ValueError where x is no multiple of the patches or has another number of channels, the context another
        width, size and aspect are not given just where micro, or keep_context finds no null context of that length.
        """
        dtype = self.dtype or jnp.promote_types(x.dtype, self.param_dtype)
        kwargs = dict(dtype=dtype, param_dtype=self.param_dtype)
        normal, zeros = (dict(kwargs, kernel_init=init) for init in (NORMAL, nn.initializers.zeros))
        x, grid = embed_patches(self, jnp.asarray(x), self.sample_size, self.interpolation)
        time = embed_numbers(t, self.width, name="time", **kwargs)
        time = self._micro(time, size, aspect, kwargs)
        mod = linear(6 * self.width, name="mod", **normal)(jax.nn.silu(time)).reshape(x.shape[0], 6, self.width)
        context = self._drop(jnp.asarray(context, dtype), keep_context)
        context = MLP(self.width, out_dim=self.width, name="caption", **normal)(context)
        if context_mask is not None:
            context_mask = jnp.asarray(context_mask) != 0
        block = dict(heads=self.heads, mlp_dim=self.mlp_dim or 4 * self.width, shared=True, cross=True, **kwargs)
        run = dict(cond=mod, grid=grid, context=context, context_mask=context_mask, contexts=contexts)
        run |= dict(control=control, step=step)
        plain = self.depth - self.compressed
        if plain:
            x = self.run_stack(DiTBlock(name="layers", **block), x, depth=plain, **run)
        if self.compressed:
            block |= dict(compress=self.compress, first=plain, name="compressed_layers")
            x = self.run_stack(DiTBlock(**block), x, depth=self.compressed, **run)
        table = self.param("out_table", nn.initializers.normal(self.width**-0.5), (2, self.width), self.param_dtype)
        shift, scale = jnp.moveaxis(time[:, None] + table.astype(dtype), 1, 0)  # the time itself, not its modulation
        x = shift_scale(norm_layer("layer_plain", 1e-6, **kwargs)(x), shift, scale)
        x = linear(self.patch_size**2 * self.out_channels, name="out", **zeros)(x)
        return unpatchify(x, grid, self.patch_size)

    def _micro(self, time, size, aspect, kwargs):
        """The time embedding [b, width] with those of height, width and aspect ratio, a third of the width each."""
        if (size is not None) != self.micro or (aspect is not None) != self.micro:
            raise ValueError(f"PixArt: size and aspect must be given just where micro, which is {self.micro}")
        if not self.micro:
            return time
        sizes = embed_numbers(size, self.width // 3, name="size", **kwargs).reshape(time.shape[0], -1)
        ratio = embed_numbers(jnp.reshape(aspect, -1), self.width // 3, name="aspect", **kwargs)
        return time + jnp.concatenate([sizes, ratio], axis=-1)

    def _drop(self, context, keep):
        """The contexts, or the null context where not kept."""
        if context.shape[-1] != self.context_width:
            raise ValueError(f"PixArt: context_width is {self.context_width}, got a context {context.shape}")
        null = None
        if self.null_tokens:  # fixed: no gradient trains it
            init = nn.initializers.normal(self.context_width**-0.5)
            null = self.param("null_context", init, (self.null_tokens, self.context_width), self.param_dtype)
            null = jax.lax.stop_gradient(null).astype(context.dtype)
        if keep is None:
            return context
        if context.shape[1] != self.null_tokens:
            raise ValueError(f"PixArt: null_tokens = {self.null_tokens} tokens, got {context.shape} with keep_context")
        return jnp.where(keep[:, None, None], context, null)


def from_dit(params: Params, t: float = 500.0) -> dict[str, Any]:
    """The parameters of a PixArt that a trained DiT of the same sizes brings (re-parameterisation; section 2.3).

    params: DiT's; t: the time at which each layer's modulation stays what it was without a class.  The shared one is
    the mean of all layers'; tables hold the rest.  Without a class and at time t, with the cross-attention that is zero
    at first, the two give the same.  Missing in the result: caption, null_context, the layers' cross.
    """
    time, layers, width = dict(params["time"]), dict(params["layers"]), params["classes"]["embedding"].shape[-1]
    nothing = jnp.asarray(params["classes"]["embedding"])[-1]  # the class that stands for none
    time["fc2"] = dict(time["fc2"], bias=time["fc2"]["bias"] + nothing)
    embedded = MLP(width, "silu", out_dim=width).apply({"params": time}, sinusoids(jnp.full((1,), t), 256))[0]
    told = jax.nn.silu(embedded)
    each = layers.pop("mod")  # kernel [depth, width, 6 width], bias [depth, 6 width]
    mod = {name: jnp.mean(jnp.asarray(value), axis=0) for name, value in each.items()}
    rest = {name: value - mod[name] for name, value in each.items()}
    layers["table"] = (jnp.einsum("w,dwk->dk", told, rest["kernel"]) + rest["bias"]).reshape(-1, 6, width)
    out = params["out_mod"]
    table = (told @ out["kernel"] + out["bias"]).reshape(2, width) - embedded
    return {
        "patches": params["patches"], "time": time, "mod": mod, "layers": layers, "out_table": table,
        "out": params["out"],
    }  # fmt: skip
