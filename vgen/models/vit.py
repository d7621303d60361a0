"""Vision transformer (Dosovitskiy et al. 2020, arXiv:2010.11929), the trunk of every patch transformer in vgen.

Sizes: Steiner et al. 2021 (AugReg, arXiv:2106.10270) for Ti to B, Zhai et al. 2021 (arXiv:2106.04560) for g and G.
"""

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from vgen.layers.attention import MultiHeadAttention
from vgen.layers.embed import GridPositions, PatchEmbed, resize_matrix, sincos_2d
from vgen.layers.linear import linear
from vgen.layers.transformer import MLP, Block, Stacked, drop_path_rates, norm_layer
from vgen.types import Params

TINY = dict(width=192, depth=12, heads=3, mlp_dim=768)
SMALL = dict(width=384, depth=12, heads=6, mlp_dim=1536)
BASE = dict(width=768, depth=12, heads=12, mlp_dim=3072)
LARGE = dict(width=1024, depth=24, heads=16, mlp_dim=4096)
HUGE = dict(width=1280, depth=32, heads=16, mlp_dim=5120)
G_SMALL = dict(width=1408, depth=40, heads=16, mlp_dim=6144)  # ViT-g
G_BIG = dict(width=1664, depth=48, heads=16, mlp_dim=8192)  # ViT-G


class Features(NamedTuple):
    """What a ViT gives.

    tokens: [b, n, width], class token, registers, patches (row-major), in this order; behind the final norm where
      `final_norm` is "tokens".  pooled: [b, d], or [b, patches, d] where `pool` is "none"; behind the representation
      layer.  logits: [b, classes] (or [b, patches, classes]), None without a head.
    states: [depth, b, n, width] of all layers, ahead of the final norm, where asked for, else None.
    """

    tokens: Any
    pooled: Any
    logits: Any = None
    states: Any = None


class Tower(Stacked):
    """The layers of a transformer over tokens, as fields and a method that its subclasses share.

    width, depth, heads, mlp_dim: sizes.  act, gated: of the MLP, see `MLP`.  bias: of all projections; qkv_bias: of
    queries, keys and values (None: as `bias`).  eps: of every norm.  layer_scale: see `Block`.
    dropout: on embeddings, in MLPs and behind every branch.  drop_path: rate of stochastic depth of the last layer,
      rising linearly from 0 in the first.  param_dtype: of the parameters.  Other fields: see `Stacked`.
    """

    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_dim: int = 3072
    act: str = "gelu"
    gated: bool = False
    bias: bool = True
    qkv_bias: bool | None = None
    eps: float = 1e-6
    layer_scale: float | None = None
    dropout: float = 0.0
    drop_path: float = 0.0
    param_dtype: Any = jnp.float32

    @property
    def dtypes(self) -> dict[str, Any]:
        return dict(dtype=self.dtype, param_dtype=self.param_dtype)

    def norm_of(self, name: str):
        """A LayerNorm as the layers have it."""
        return norm_layer("layer", self.eps, name, **self.dtypes)

    def run_layers(self, x, *, collect=False, train=False, **kwargs):
        """x [b, n, width] through `layers` [depth, ...] -> (x, states of all layers if `collect`, else None)."""
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        block = Block(
            self.heads,
            self.mlp_dim,
            eps=self.eps,
            act=self.act,
            gated=self.gated,
            bias=self.bias,
            qkv_bias=self.qkv_bias,
            layer_scale=self.layer_scale,
            dropout=self.dropout,
            drop_path=drop_path_rates(self.drop_path, self.depth) or 0.0,
            name="layers",
            **self.dtypes,
        )
        out = self.run_stack(block, x, depth=self.depth, collect=collect, train=train, **kwargs)
        return out if collect else (out, None)


class MapPool(nn.Module):
    """Attention pooling: one learned query looks at all tokens, then an MLP with a residual (Zhai et al. 2021).

    tokens [b, n, width] -> [b, width].  Parameters: probe [width], attn, mlp_norm, mlp.
    """

    heads: int
    mlp_dim: int
    act: str = "gelu"
    eps: float = 1e-6
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens: Float[Array, "b n width"]) -> Float[Array, "b width"]:
        kwargs = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        width = tokens.shape[-1]
        probe = self.param("probe", nn.initializers.normal(width**-0.5), (width,), self.param_dtype)
        probe = jnp.broadcast_to(probe.astype(tokens.dtype), (tokens.shape[0], 1, width))
        x = MultiHeadAttention(self.heads, name="attn", **kwargs)(probe, tokens)
        y = norm_layer("layer", self.eps, "mlp_norm", **kwargs)(x)
        return (x + MLP(self.mlp_dim, self.act, name="mlp", **kwargs)(y))[:, 0]


class ViT(Tower):
    """Images [b, h, w, c] -> Features; any range of values that the weights know (ViT's own: [-1, 1]).

    patch_size: side of a patch, or (rows, columns).  image_size: side or (height, width) in pixels that a learned table
      of positions belongs to; images of another size have it resized.
    patch_bias: whether the patch projection has a bias (CLIP: no).
    cls_token, num_registers: extra tokens ahead of the patches.  masked: there is a learned token for masked patches.
    posemb: "learned"; "sincos": fixed, rounded to float32 as checkpoints hold it (MAE); "sincos_endpoint": fixed,
      big_vision's frequencies (see `sincos_2d`); "none".  Fixed ones follow the size of the image.
    cls_position: whether the class token has a learned position too (big_vision: no); registers never have one.
    resize, resize_offset: how learned positions are resized, see `resize_matrix`.
    pre_norm: a norm ahead of the layers (CLIP's ln_pre).
    final_norm: "tokens": on all tokens, ahead of pooling; "pooled": on the pooled vector alone, tokens stay as the last
      layer left them (CLIP's ln_post, MAE's fc_norm); "none".
    pool: "cls"; "gap": mean of the patches; "mean": mean of all tokens (FLIP); "map": attention pooling; "cls_gap":
      class token and mean of the patches, concatenated (DINOv2's linear probes); "none": the patches as they are.
    representation: width of a dense layer with tanh on the pooled vector (pre_logits; HF's pooler), or None.
    num_classes: size of the linear head, or None; its kernel starts at zero and its bias at head_bias (-10 for a
      sigmoid loss over many classes).  token_std: initial standard deviation of class token, registers, mask token.
    The other fields: see `Tower`.
    Parameters: patch_embed, cls, registers, mask_token, positions {table}, norm_pre, layers [depth, ...], norm,
    map_pool, pre_logits, head.
    """

    patch_size: int | tuple[int, int] = 16
    image_size: int | tuple[int, int] = 224
    patch_bias: bool = True
    cls_token: bool = True
    num_registers: int = 0
    masked: bool = False
    posemb: str = "learned"
    cls_position: bool = True
    resize: str = "bilinear"
    resize_offset: float = 0.0
    pre_norm: bool = False
    final_norm: str = "tokens"
    pool: str = "cls"
    representation: int | None = None
    num_classes: int | None = None
    head_bias: float = 0.0
    token_std: float = 0.0

    @property
    def patch(self) -> tuple[int, int]:
        """(rows, columns) of a patch."""
        return (self.patch_size,) * 2 if isinstance(self.patch_size, int) else tuple(self.patch_size)

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of patches in an image of `image_size`."""
        size = (self.image_size,) * 2 if isinstance(self.image_size, int) else tuple(self.image_size)
        return size[0] // self.patch[0], size[1] // self.patch[1]

    @nn.compact
    def __call__(
        self,
        images: Float[Array, "b h w c"],
        *,
        keep: Int[Array, "b k"] | None = None,
        mask: Bool[Array, "b n"] | None = None,
        states: bool = False,
        control=None,
        step=None,
        train: bool = False,
    ) -> Features:
        """keep: indices of the patches that are looked at, in that order, all others are left out (MAE, FLIP).

        mask: True for patches that are replaced by the mask token, ahead of positions (DINOv2, iBOT).
        states: also return what every layer gave.  control, step: for AttentionControl.
        train: whether dropout and stochastic depth are on (rng "dropout").
        Raises ValueError for an unknown posemb, pool or final_norm, a mask without a mask token, and images that are no
        multiple of the patch.
        """
        if self.final_norm not in ("tokens", "pooled", "none"):
            raise ValueError(f"ViT: final_norm must be 'tokens', 'pooled' or 'none', got {self.final_norm!r}")
        x = self._embed(images, keep, mask)
        x = self.norm_of("norm_pre")(x) if self.pre_norm else x
        x, layers = self.run_layers(x, collect=states, control=control, step=step, train=train)
        tokens = self.norm_of("norm")(x) if self.final_norm == "tokens" else x
        pooled = self._pool(tokens)
        pooled = self.norm_of("norm")(pooled) if self.final_norm == "pooled" else pooled
        if self.representation is not None:
            pooled = jnp.tanh(linear(self.representation, name="pre_logits", **self.dtypes)(pooled))
        logits = None
        if self.num_classes is not None:
            init = dict(kernel_init=nn.initializers.zeros, bias_init=nn.initializers.constant(self.head_bias))
            logits = linear(self.num_classes, name="head", **init, **self.dtypes)(pooled)
        return Features(tokens, pooled, logits, layers)

    def _token(self, name, count, like):
        """A learned token [b, count, width]."""
        token = self.param(name, nn.initializers.normal(self.token_std), (count, self.width), self.param_dtype)
        return jnp.broadcast_to(token.astype(like.dtype), (like.shape[0], count, self.width))

    def _embed(self, images, keep, mask):
        """Class token, registers and patches with their positions: [b, n, width]."""
        (rows, columns), (_, h, w, _) = self.patch, images.shape
        x = PatchEmbed(self.patch, self.width, self.patch_bias, name="patch_embed", **self.dtypes)(images)
        if mask is not None and not self.masked:
            raise ValueError("ViT: a mask needs the mask token of masked=True")
        if self.masked:
            token = self._token("mask_token", 1, x)
            x = x if mask is None else jnp.where(mask[..., None], token, x)
        cls_position, positions = self._positions(h // rows, w // columns)
        x = x if positions is None else x + positions.astype(x.dtype)
        if keep is not None:
            x = jnp.take_along_axis(x, keep[..., None], axis=1)
        extra = []
        if self.cls_token:
            cls = self._token("cls", 1, x)
            extra.append(cls if cls_position is None else cls + cls_position.astype(x.dtype))
        if self.num_registers:
            extra.append(self._token("registers", self.num_registers, x))
        return jnp.concatenate([*extra, x], axis=1)

    def _positions(self, rows, columns):
        """(of the class token or None, of the patches or None)."""
        if self.posemb == "learned":
            table = GridPositions(
                self.grid,
                self.width,
                self.cls_token and self.cls_position,
                self.resize,
                self.resize_offset,
                param_dtype=self.param_dtype,
                name="positions",
            )
            return table(rows, columns)
        if self.posemb == "sincos":
            return None, sincos_2d(rows, columns, self.width).astype(np.float32)
        if self.posemb == "sincos_endpoint":
            return None, sincos_2d(rows, columns, self.width, endpoint=True)
        if self.posemb == "none":
            return None, None
        kinds = "'learned', 'sincos', 'sincos_endpoint' or 'none'"
        raise ValueError(f"ViT: posemb must be {kinds}, got {self.posemb!r}")

    def _pool(self, tokens):
        extra = self.cls_token + self.num_registers
        if self.pool == "cls":
            return tokens[:, 0]
        if self.pool == "gap":
            return tokens[:, extra:].mean(axis=1)
        if self.pool == "mean":
            return tokens.mean(axis=1)
        if self.pool == "cls_gap":
            return jnp.concatenate([tokens[:, 0], tokens[:, extra:].mean(axis=1)], axis=-1)
        if self.pool == "map":
            return MapPool(self.heads, self.mlp_dim, self.act, self.eps, name="map_pool", **self.dtypes)(tokens)
        if self.pool == "none":
            return tokens[:, extra:]
        raise ValueError(f"ViT: pool must be 'cls', 'gap', 'mean', 'cls_gap', 'map' or 'none', got {self.pool!r}")


def resized(params: Params, grid: tuple[int, int], new: tuple[int, int], how: str = "bilinear") -> dict[str, Any]:
    """Parameters of a ViT for images of `new` (rows, columns) of patches, from those for `grid`; the head is left out.

    Learned positions are interpolated, that of the class token stays (Dosovitskiy et al. 2020, section 3.2).
    how: see `resize_matrix`.  Raises ValueError where the table is not of `grid`.
    """
    params = {name: value for name, value in params.items() if name != "head"}
    if "positions" not in params:
        return params
    table = np.asarray(params["positions"]["table"])
    extra = len(table) - grid[0] * grid[1]
    if extra not in (0, 1):
        raise ValueError(f"resized: the table has {len(table)} positions, expected {grid[0] * grid[1]} or one more")
    down, across = (resize_matrix(*pair, how).astype(table.dtype) for pair in zip(grid, new, strict=True))
    made = np.einsum("ir,jc,rcw->ijw", down, across, table[extra:].reshape(*grid, -1))
    return params | {"positions": {"table": np.concatenate([table[:extra], made.reshape(-1, table.shape[1])])}}


def for_384_pixels(params: Params) -> dict[str, Any]:
    """`resized` for square images of 384 pixels, from parameters for 224, as ViTs are fine-tuned."""
    side = math.isqrt(len(params["positions"]["table"]))  # with or without the class token's
    return resized(params, (side, side), (side * 384 // 224,) * 2)
