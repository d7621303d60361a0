"""Segment Anything (Kirillov et al. 2023, arXiv:2304.02643): a promptable network for masks of any class.

The image encoder is a plain vision transformer whose attention is local in windows but for four global layers (ViTDet,
Li et al. 2022); prompt encoder and mask decoder, which are light, are in `vgen.models.sam_decoder`.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from vgen.layers.attention import MultiHeadAttention, attention
from vgen.layers.transformer import MLP, norm_layer, stack
from vgen.models.sam_decoder import ABSENT, MaskDecoder, Masks, PromptEncoder

BASE = dict(depth=12, width=768, heads=12, global_layers=(2, 5, 8, 11))
LARGE = dict(depth=24, width=1024, heads=16, global_layers=(5, 11, 17, 23))
HUGE = dict(depth=32, width=1280, heads=16, global_layers=(7, 15, 23, 31))


def postprocess(
    logits: Float[Array, "*batch h w"] | Float[np.ndarray, "*batch h w"],
    inside: tuple[int, int],
    original: tuple[int, int],
    size: int = 1024,
) -> Float[Array, "*batch y x"]:
    """Mask logits in the frame of the original image: bilinear, without the padding.

    inside: (height, width) of the resized image in the padded frame of side `size`, see `vgen.data.preprocess.scaled`.
    original: (height, width) of the image itself.
    """
    resize = functools.partial(jax.image.resize, method="linear", antialias=False)
    whole = resize(logits, (*logits.shape[:-2], size, size))[..., : inside[0], : inside[1]]
    return resize(whole, (*logits.shape[:-2], *original))


def split_windows(x: Float[Array, "b h w c"], size: int) -> Float[Array, "n size size c"]:
    """Windows of size x size, row-major within each image; the map is filled up with zeros below and right."""
    b, h, w, c = x.shape
    x = jnp.pad(x, ((0, 0), (0, -h % size), (0, -w % size), (0, 0)))
    x = x.reshape(b, x.shape[1] // size, size, x.shape[2] // size, size, c).swapaxes(2, 3)
    return x.reshape(-1, size, size, c)


def join_windows(x: Float[Array, "n size size c"], grid: tuple[int, int]) -> Float[Array, "b h w c"]:
    """The maps of (h, w) = grid that `split_windows` has cut; what was filled up is dropped."""
    (h, w), size, c = grid, x.shape[1], x.shape[-1]
    rows, columns = -(-h // size), -(-w // size)
    x = x.reshape(-1, rows, columns, size, size, c).swapaxes(2, 3)
    return x.reshape(-1, rows * size, columns * size, c)[:, :h, :w]


def relative_attention(q, k, v, rows, columns, *, bias=None, chunk: int = 512, **kwargs) -> Float[Array, "b n h d"]:
    """Attention over a grid whose logits gain q . rows[y - y'] + q . columns[x - x'] (MViTv2, Li et al. 2022, eq. 4).

    q, k, v: [b, height * width, heads, d], row-major.  rows: [2 height - 1, d], columns: [2 width - 1, d]; q goes in
    without the scale of the logits.  bias: must be None.  chunk: queries that are looked at together where there are
    many more, which bounds the memory of the logits.  kwargs: those of `attention`.
    """
    h, w = ((len(table) + 1) // 2 for table in (rows, columns))
    b, n, heads, d = q.shape
    if n != h * w or bias is not None:
        raise ValueError(f"relative_attention: {n} tokens for a grid of {h} x {w}; bias must be None")
    rows, columns = (t.astype(q.dtype)[np.subtract.outer(np.arange(s), np.arange(s)) + s - 1] for t, s in
                     ((rows, h), (columns, w)))  # fmt: skip  # [h, h, d], [w, w, d]
    maps = q.reshape(b, h, w, heads, d)
    vertical = jnp.einsum("byxhd,ykd->byhxk", maps, rows)  # [b, h, heads, w, h]
    horizontal = jnp.einsum("byxhd,xkd->byhxk", maps, columns)  # [b, h, heads, w, w]

    def look(some):  # q: [b, r, w, heads, d] and their shares of the bias, r rows at a time
        q, vertical, horizontal = some
        bias = vertical[..., :, None] + horizontal[..., None, :]  # [b, r, heads, w, h, w]
        bias = bias.swapaxes(1, 2).reshape(b, heads, -1, n)
        return attention(q.reshape(b, -1, heads, d), k, v, bias=bias, **kwargs)

    together = max(r for r in range(1, h + 1) if h % r == 0 and (r * w <= chunk or r == 1))
    if n <= 2 * chunk or together == h or kwargs.get("control") is not None:
        return look((maps, vertical, horizontal))
    cut = [a.reshape(b, h // together, together, *a.shape[2:]).swapaxes(0, 1) for a in (maps, vertical, horizontal)]
    out = jax.lax.map(jax.checkpoint(look), cut)  # [groups, b, together * w, heads, d]
    return out.swapaxes(0, 1).reshape(b, n, heads, d)


class Layer(nn.Module):
    """Pre-norm transformer layer on a map [b, h, w, width], with decomposed relative positions.

    window: side of the windows that attention stays in; 0 for all of the map.
    Parameters: attn_norm, attn, rows, columns (relative positions [2 side - 1, head_dim]), mlp_norm, mlp.
    """

    heads: int
    mlp_dim: int
    window: int = 0
    qkv_bias: bool = True
    eps: float = 1e-6
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], layer: Any = 0, control=None, step=None) -> Float[Array, "b h w c"]:
        kwargs = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        grid, width = x.shape[1:3], x.shape[-1]
        y = norm_layer("layer", self.eps, "attn_norm", **kwargs)(x)
        # QUIRK: windows at the edge hold zeros, which are keys like others (segment_anything's image_encoder.py)
        y = split_windows(y, self.window) if self.window else y
        sides = y.shape[1:3]
        tables = [
            self.param(name, nn.initializers.zeros, (2 * side - 1, width // self.heads), self.param_dtype)
            for name, side in zip(("rows", "columns"), sides)
        ]
        core = functools.partial(relative_attention, rows=tables[0], columns=tables[1])
        attn = MultiHeadAttention(self.heads, qkv_bias=self.qkv_bias, name="attn", **kwargs)
        tokens = y.reshape(y.shape[0], -1, width)
        y = attn(tokens, core=core, layer=layer, control=control, step=step).reshape(y.shape)
        x = x + (join_windows(y, grid) if self.window else y)
        y = norm_layer("layer", self.eps, "mlp_norm", **kwargs)(x)
        return x + MLP(self.mlp_dim, "gelu", name="mlp", **kwargs)(y)


def segments(depth: int, global_layers: tuple[int, ...]) -> list[tuple[str, tuple[int, ...]]]:
    """(name, layers) of the encoder's parts in order: "windows_i", a run of local layers, and "global_i", one layer."""
    parts, run = [], []
    for i in range(depth):
        if i not in global_layers:
            run.append(i)
        if run and (i in global_layers or i == depth - 1):
            parts.append((f"windows_{sum(name.startswith('windows') for name, _ in parts)}", tuple(run)))
            run = []
        if i in global_layers:
            parts.append((f"global_{sum(name.startswith('global') for name, _ in parts)}", (i,)))
    return parts


class ImageEncoder(nn.Module):
    """Pixels [b, size, size, 3] to embeddings [b, size / patch, size / patch, channels].

    global_layers: which of the `depth` layers look at the whole map; the others look at windows.
    remat, unroll: see `vgen.layers.transformer.stack`.
    Parameters: patch, positions [h, w, width], windows_i (stacked [layers, ...]), global_i, neck_conv1, neck_norm1,
    neck_conv2, neck_norm2.
    """

    depth: int
    width: int
    heads: int
    global_layers: tuple[int, ...]
    mlp_dim: int
    image_size: int = 1024
    patch: int = 16
    window: int = 14
    channels: int = 256
    qkv_bias: bool = True
    eps: float = 1e-6
    remat: str = "none"
    unroll: int = 1
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, pixels: Float[Array, "b y x 3"]) -> Float[Array, "b h w c"]:
        if pixels.shape[1:3] != (self.image_size,) * 2:
            raise ValueError(f"ImageEncoder: got pixels {pixels.shape}, expected a side of {self.image_size}")
        kwargs = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        patch = (self.patch, self.patch)
        x = nn.Conv(self.width, patch, patch, padding="VALID", name="patch", **kwargs)(pixels)
        positions = self.param("positions", nn.initializers.zeros, x.shape[1:], self.param_dtype)
        x = x + positions.astype(x.dtype)
        for name, layers in segments(self.depth, self.global_layers):
            window = self.window if name.startswith("windows") else 0
            layer = Layer(self.heads, self.mlp_dim, window, self.qkv_bias, self.eps, name=name, **kwargs)
            if window:
                x = stack(layer, x, depth=len(layers), remat=self.remat, unroll=self.unroll)
            else:
                x = layer(x)
        x = nn.Conv(self.channels, (1, 1), use_bias=False, name="neck_conv1", **kwargs)(x)
        x = norm_layer("layer", 1e-6, "neck_norm1", **kwargs)(x)
        x = nn.Conv(self.channels, (3, 3), padding=1, use_bias=False, name="neck_conv2", **kwargs)(x)
        return norm_layer("layer", 1e-6, "neck_norm2", **kwargs)(x)


class SAM(nn.Module):
    """Pixels and prompts to masks; sizes as for BASE, LARGE, HUGE.

    mlp_dim: 4 width by default.  channels: of the image embedding and the decoder.  See the parts for the rest.
    text_dim: of the texts that it can be told, 0 for none (the published weights know none).
    Parameters: image_encoder, prompt_encoder, mask_decoder; text where there is text_dim.
    """

    depth: int
    width: int
    heads: int
    global_layers: tuple[int, ...]
    mlp_dim: int | None = None
    image_size: int = 1024
    patch: int = 16
    window: int = 14
    channels: int = 256
    qkv_bias: bool = True
    mask_channels: int = 16
    decoder_depth: int = 2
    decoder_heads: int = 8
    decoder_mlp_dim: int = 2048
    masks: int = 3
    iou_dim: int = 256
    iou_depth: int = 3
    eps: float = 1e-6
    remat: str = "none"
    unroll: int = 1
    dtype: Any = None
    param_dtype: Any = jnp.float32
    text_dim: int = 0

    def setup(self):
        kwargs = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        self.image_encoder = ImageEncoder(
            self.depth, self.width, self.heads, self.global_layers, self.mlp_dim or 4 * self.width, self.image_size,
            self.patch, self.window, self.channels, self.qkv_bias, self.eps, self.remat, self.unroll, **kwargs,
        )  # fmt: skip
        grid = self.image_size // self.patch
        self.prompt_encoder = PromptEncoder(self.channels, self.image_size, grid, self.mask_channels, **kwargs)
        self.mask_decoder = MaskDecoder(
            self.channels, self.decoder_depth, self.decoder_heads, self.decoder_mlp_dim, self.masks, self.iou_dim,
            self.iou_depth, **kwargs,
        )  # fmt: skip
        self.text = nn.Dense(self.channels, **kwargs) if self.text_dim else None

    def encode(self, pixels: Float[Array, "b y x 3"]) -> Float[Array, "b h w c"]:
        """The embedding of an image, good for any number of prompts; pixels: see `vgen.data.preprocess`."""
        return self.image_encoder(pixels)

    def decode(
        self,
        embedding: Float[Array, "b h w c"],
        points: Float[Array, "b p n 2"] | None = None,
        labels: Int[Array, "b p n"] | None = None,
        boxes: Float[Array, "b p 4"] | None = None,
        masks: Float[Array, "b q y x"] | None = None,
        *,
        multimask: bool = True,
        slots: bool = False,
        text: Float[Array, "b p d"] | None = None,
        told: Bool[Array, "b p"] | None = None,
    ) -> Masks:
        """Masks of p prompts for each image (prompts: see PromptEncoder).

        multimask: the `masks` answers to an ambiguous prompt (one point, say), or the single one to a clear prompt.
        slots: points stand in slots of which those labelled ABSENT hold nothing and have no effect, and nothing is
        added to them (`vgen.models.sam_prompt`): one shape for prompts of any length.
        text: unit vectors of a text or of a picture of the object, by the same CLIP.  told: which prompts have one, all
        by default.  Raises ValueError for text without slots, or a network without text_dim.
        """
        sparse, dense = self.prompt_encoder(points, labels, boxes, masks, pad=not slots)
        present = labels != ABSENT if slots else None
        if self.is_initializing() and self.text is not None and text is None:
            self.text(jnp.zeros((1, 1, self.text_dim)))
        if text is not None:
            if self.text is None or not slots:
                raise ValueError(f"SAM: text needs slots and a network with text_dim, got slots={slots}")
            told = jnp.ones(text.shape[:2], bool) if told is None else told
            loud = text.shape[-1] ** 0.5  # of a unit vector: as large as a point's sines and cosines
            sparse = jnp.concatenate([sparse, self.text(loud * text)[:, :, None].astype(sparse.dtype)], 2)
            present = jnp.concatenate([present, told[:, :, None]], 2)
        out = self.mask_decoder(embedding, self.prompt_encoder.grid_positions(), sparse, dense, present)
        kept = slice(1, None) if multimask else slice(0, 1)
        return Masks(out.logits[:, :, kept], out.iou[:, :, kept])

    def __call__(
        self, pixels: Float[Array, "b y x 3"], points=None, labels=None, boxes=None, masks=None, **kwargs
    ) -> Masks:
        """`decode` of `encode`."""
        return self.decode(self.encode(pixels), points, labels, boxes, masks, **kwargs)
