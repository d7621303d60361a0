"""SAM's prompt encoder and mask decoder (Kirillov et al. 2023, arXiv:2304.02643, appendix A)."""

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vgen.layers.attention import MultiHeadAttention
from vgen.layers.linear import linear
from vgen.layers.transformer import MLP, activation, norm_layer

ABSENT = -2  # label of a slot for a point that holds none


class Masks(NamedTuple):
    """logits: [b, p, m, 4 h, 4 w], inside where positive, of a map of h x w.  iou: [b, p, m], its prediction."""

    logits: jax.Array
    iou: jax.Array


class PromptEncoder(nn.Module):
    """Points, boxes and masks to tokens and a map; p prompts for each image, each asking for one object.

    width: of the embeddings.  image_size: pixels of the side of the padded frame in which points are given.
    grid: side of the image embedding.  mask_channels: of the mask's convolutions; a multiple of 4, at least 8 (with 4
    the first norm has a single channel and the mask is lost).
    Parameters: gaussian [2, width / 2], which is drawn once and never trained, point [4, width] (background,
    foreground, the two corners of a box), not_a_point, no_mask [width], mask_conv1 .. 3, mask_norm1, 2.
    """

    width: int = 256
    image_size: int = 1024
    grid: int = 64
    mask_channels: int = 16
    eps: float = 1e-6
    dtype: Any = None
    param_dtype: Any = jnp.float32

    def setup(self):
        kwargs = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        normal, wide = nn.initializers.normal(1.0), (self.width,)
        self.gaussian = self.param("gaussian", normal, (2, self.width // 2), self.param_dtype)
        self.point = self.param("point", normal, (4, self.width), self.param_dtype)
        self.not_a_point = self.param("not_a_point", normal, wide, self.param_dtype)
        self.no_mask = self.param("no_mask", normal, wide, self.param_dtype)
        strided = dict(kernel_size=(2, 2), strides=2, padding="VALID", **kwargs)
        self.mask_conv1 = nn.Conv(self.mask_channels // 4, **strided)
        self.mask_conv2 = nn.Conv(self.mask_channels, **strided)
        self.mask_conv3 = nn.Dense(self.width, **kwargs)
        self.mask_norm1 = norm_layer("layer", self.eps, **kwargs)
        self.mask_norm2 = norm_layer("layer", self.eps, **kwargs)

    def positions(self, xy: Float[Array, "*shape 2"]) -> Float[Array, "*shape width"]:
        """Random Fourier features of places in [0, 1] (x, y): sines, then cosines (Tancik et al. 2020)."""
        gaussian = jax.lax.stop_gradient(self.gaussian)
        angles = 2 * math.pi * ((2 * xy - 1).astype(gaussian.dtype) @ gaussian)
        return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)

    def grid_positions(self) -> Float[Array, "h w width"]:
        """The features of the centres of the image embedding's places."""
        centre = (jnp.arange(self.grid) + 0.5) / self.grid
        return self.positions(jnp.stack(jnp.meshgrid(centre, centre, indexing="xy"), -1))

    def __call__(
        self,
        points: Float[Array, "b p n 2"] | None = None,
        labels: Int[Array, "b p n"] | None = None,
        boxes: Float[Array, "b p 4"] | None = None,
        masks: Float[Array, "b q y x"] | None = None,
        pad: bool = True,
    ) -> tuple[Float[Array, "b p t width"] | None, Float[Array, "bb q h w width"]]:
        """Tokens [b, p, t, width] (None without points and boxes) and a map [b, p or 1, grid, grid, width].

        points: (x, y) in pixels of the padded frame.  labels: 1 inside the object, 0 outside, -1 no point, 2 and 3 the
        first and the second corner of a box (as in the authors' exported networks); -10 gives a token of zeros (padding
        of `transformers`' processor).  boxes: (x0, y0, x1, y1).  masks: logits of 4 grid pixels a side, one for each
        prompt, or one for all.  pad: whether points without boxes get the one "not a point" that they need.
        Raises ValueError for points without labels.
        """
        tokens = []
        if points is not None:
            if labels is None:
                raise ValueError("PromptEncoder: points need labels")
            tokens.append(self._embed_points(points, labels, pad=pad and boxes is None))
        if boxes is not None:
            corners = boxes.reshape(*boxes.shape[:2], 2, 2)
            tokens.append(self.positions((corners + 0.5) / self.image_size) + self.point[2:])
        sparse = jnp.concatenate(tokens, 2) if tokens else None
        if self.is_initializing() and masks is None:  # so that init makes all parameters, whatever it is traced with
            self._embed_masks(jnp.zeros((1, 1, 4 * self.grid, 4 * self.grid)))
        if masks is not None:
            return sparse, self._embed_masks(masks)
        return sparse, jnp.broadcast_to(self.no_mask, (1, 1, self.grid, self.grid, self.width))

    def _embed_points(self, points, labels, pad):
        # QUIRK: without a box there is one more token, "not a point" (segment_anything's prompt_encoder.py)
        if pad:
            points = jnp.pad(points, ((0, 0), (0, 0), (0, 1), (0, 0)))
            labels = jnp.pad(labels, ((0, 0), (0, 0), (0, 1)), constant_values=-1)
        place, label = self.positions((points + 0.5) / self.image_size), labels[..., None]
        place = jnp.where(label == -1, self.not_a_point, place)
        for kind in range(4):
            place = place + jnp.where(label == kind, self.point[kind], 0)
        return jnp.where(label == -10, 0, place)

    def _embed_masks(self, masks):
        gelu, (b, q) = activation("gelu"), masks.shape[:2]
        x = masks.reshape(b * q, *masks.shape[2:], 1)
        x = gelu(self.mask_norm1(self.mask_conv1(x)))
        x = self.mask_conv3(gelu(self.mask_norm2(self.mask_conv2(x))))
        return x.reshape(b, q, *x.shape[1:])


class TwoWayLayer(nn.Module):
    """Tokens look at each other, then at the image, pass an MLP, and the image looks back at them; post-norm.

    first: the self-attention of the first layer has neither positions nor a residual.
    Parameters: attn, to_image, mlp, to_tokens, each with its _norm.
    """

    heads: int
    mlp_dim: int
    first: bool = False
    eps: float = 1e-5
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens, image, token_positions, image_positions, mask=None):
        """tokens and their positions [n, t, width], image [n, m, width] and its own [m, width] -> tokens, image.

        mask: bool [n, t], False for tokens that are not there, or None.
        """
        kwargs = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        half = tokens.shape[-1] // 2 // self.heads  # cross-attention works at half of the width

        def norm(x, name):
            return norm_layer("layer", self.eps, name + "_norm", **kwargs)(x)

        attn = MultiHeadAttention(self.heads, name="attn", **kwargs)
        if self.first:
            tokens = attn(tokens, mask=mask)  # QUIRK: replaces the tokens (segment_anything's `skip_first_layer_pe`)
        else:
            tokens = tokens + attn(tokens + token_positions, mask=mask, values=tokens)
        tokens = norm(tokens, "attn")
        look = MultiHeadAttention(self.heads, half, name="to_image", **kwargs)
        y = look(tokens + token_positions, image + image_positions, values=image)
        tokens = norm(tokens + y, "to_image")
        tokens = norm(tokens + MLP(self.mlp_dim, "relu", name="mlp", **kwargs)(tokens), "mlp")
        look = MultiHeadAttention(self.heads, half, name="to_tokens", **kwargs)
        y = look(image + image_positions, tokens + token_positions, mask, values=tokens)
        return tokens, norm(image + y, "to_tokens")


class Perceptron(nn.Module):
    """`depth` dense layers with ReLU between them: [..., any] -> [..., out]; parameters fc0, fc1, ..."""

    dim: int
    out: int
    depth: int = 3
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        for i in range(self.depth):
            last = i == self.depth - 1
            dims = self.out if last else self.dim
            x = linear(dims, dtype=self.dtype, param_dtype=self.param_dtype, name=f"fc{i}")(x)
            x = x if last else nn.relu(x)
        return x


class Quarters(nn.Module):
    """2 x 2 pixels of each place, [..., c] -> [..., 2, 2, features]: a transposed convolution whose kernel and stride
    are 2, as the matrix product that it is (XLA's CPU backend takes many times as long for the convolution).

    Parameters: kernel [2, 2, c, features] and bias, as of flax's ConvTranspose.
    """

    features: int
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        c, many = x.shape[-1], 4 * self.features
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (2, 2, c, self.features), self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), self.param_dtype)
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        kernel = kernel[::-1, ::-1].transpose(2, 0, 1, 3).reshape(c, many)  # ConvTranspose counts from the far corner
        return (x.reshape(-1, c) @ kernel).reshape(*x.shape[:-1], 2, 2, self.features) + bias


class MaskDecoder(nn.Module):
    """Image embedding and prompts to masks: a two-way transformer, upscaling by 4, one hypernetwork for each mask.

    masks: for an ambiguous prompt; one more answers a clear prompt.
    Parameters: iou_token [width], mask_tokens [masks + 1, width], layers_i, final, final_norm, up1, up_norm, up2,
    hyper (of all masks, stacked), iou.
    """

    width: int = 256
    depth: int = 2
    heads: int = 8
    mlp_dim: int = 2048
    masks: int = 3
    iou_dim: int = 256
    iou_depth: int = 3
    # QUIRK: 1e-5 as the authors have it in the transformer; transformers' SamModel says 1e-6 (numbers differ by 8e-5)
    eps: float = 1e-5
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        image: Float[Array, "b h w width"],
        image_positions: Float[Array, "h w width"],
        sparse: Float[Array, "b p t width"] | None,
        dense: Float[Array, "bb q h w width"],
        present: Bool[Array, "b p t"] | None = None,
    ) -> Masks:
        """The masks + 1 answers to every prompt, that for clear prompts first; arguments as from PromptEncoder.

        present: which of its tokens are there at all, by default every one.
        """
        kwargs = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        normal, (b, h, w, width) = nn.initializers.normal(1.0), image.shape
        p = dense.shape[1] if sparse is None else sparse.shape[1]
        own = [
            self.param("iou_token", normal, (width,), self.param_dtype)[None],
            self.param("mask_tokens", normal, (self.masks + 1, width), self.param_dtype),
        ]
        tokens = jnp.broadcast_to(jnp.concatenate(own), (b, p, self.masks + 2, width))
        tokens = tokens if sparse is None else jnp.concatenate([tokens, sparse.astype(tokens.dtype)], 2)
        start = tokens = tokens.reshape(b * p, -1, width)
        if present is not None:
            present = jnp.pad(present, ((0, 0), (0, 0), (self.masks + 2, 0)), constant_values=True)
            present = present.reshape(b * p, -1)
        x = jnp.broadcast_to(image[:, None] + dense, (b, p, h, w, width)).reshape(b * p, h * w, width)
        places = image_positions.reshape(h * w, width)
        for i in range(self.depth):
            layer = TwoWayLayer(self.heads, self.mlp_dim, i == 0, self.eps, name=f"layers_{i}", **kwargs)
            tokens, x = layer(tokens, x, start, places, present)
        final = MultiHeadAttention(self.heads, width // 2 // self.heads, name="final", **kwargs)
        y = tokens + final(tokens + start, x + places, values=x)
        tokens = norm_layer("layer", 1e-5, "final_norm", **kwargs)(y)

        maps = self._upscale(x)
        hyper = nn.vmap(
            Perceptron, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=1, out_axes=1,
            axis_size=self.masks + 1,
        )(width, maps.shape[-1], name="hyper", **kwargs)  # fmt: skip
        weights = hyper(tokens[:, 1 : self.masks + 2])  # [b p, masks + 1, channels]
        logits = jnp.einsum("nmc,nkc->nmk", weights, maps.reshape(b * p, -1, maps.shape[-1]))
        logits = logits.reshape(b * p, self.masks + 1, h, w, 2, 2, 2, 2)  # a place, its quarters, and theirs
        logits = logits.transpose(0, 1, 2, 4, 6, 3, 5, 7).reshape(b * p, self.masks + 1, 4 * h, 4 * w)
        iou = Perceptron(self.iou_dim, self.masks + 1, self.iou_depth, name="iou", **kwargs)(tokens[:, 0])
        return Masks(logits.reshape(b, p, *logits.shape[1:]), iou.reshape(b, p, -1))

    def _upscale(self, x):
        """[n, places, width] -> [n, places, 2, 2, 2, 2, width / 8], the pixels of each place."""
        kwargs = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        x = Quarters(self.width // 4, name="up1", **kwargs)(x)
        x = activation("gelu")(norm_layer("layer", 1e-6, "up_norm", **kwargs)(x))
        return activation("gelu")(Quarters(self.width // 8, name="up2", **kwargs)(x))
