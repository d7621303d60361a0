"""Perceptual distances: LPIPS with published weights, and a fixed filter-bank distance that needs none.

Sources: Zhang et al. 2018, "The Unreasonable Effectiveness of Deep Features" (package `lpips`, version 0.1, VGG16);
Laparra et al. 2016, "Perceptual image quality assessment using a normalized Laplacian pyramid".
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

from vgen import trees
from vgen.config import UserError
from vgen.convert.rules import ConvertError, load, renamed
from vgen.convert.sources import read_weights
from vgen.models.vgg import VGG16, WIDTHS
from vgen.types import Params

SHIFT = np.float32((-0.030, -0.088, -0.188))  # float32 buffers in the package, so that float64 runs agree
SCALE = np.float32((0.458, 0.448, 0.450))


# ---------------------------------------------------------------------------------------------------------- distances


def _unit(x, eps=1e-10):
    """x / (|x| + eps) over channels, with gradient 0 (not NaN) where all channels are 0."""
    square = jnp.square(x).sum(-1, keepdims=True)
    some = square > 0
    return jnp.where(some, x / (jnp.sqrt(jnp.where(some, square, 1)) + eps), 0)


class _Heads(nn.Module):
    """The weight of every channel of the five layers; parameters: lin0 ... lin4 [width]."""

    @nn.compact
    def __call__(self, differences: Sequence[Array]) -> Float[Array, "b 5"]:
        layers = []
        for i, difference in enumerate(differences):
            width = WIDTHS[i][-1]
            weight = self.param(f"lin{i}", nn.initializers.constant(1 / width), (width,))
            layers.append((difference @ weight).mean((1, 2)))
        return jnp.stack(layers, axis=-1)


class LPIPS(nn.Module):
    """LPIPS with VGG16, version 0.1; parameters: vgg (conv1_1 ... conv5_3), lin (lin0 ... lin4).

    dtype: of the convolutions; what follows them is float32 or wider.
    """

    dtype: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, "b h w 3"], y: Float[Array, "b h w 3"]) -> Float[Array, "b 5"]:
        """Images in [-1, 1], at least 16 x 16, to the layers' contributions to their distance, which is the sum.

        Raises ValueError on smaller images.
        """
        if min(x.shape[1:3]) < 16:
            raise ValueError(f"LPIPS: images {x.shape} must be at least 16 pixels on a side; resize them")
        # One pass of the network, the two of a pair side by side: a batch that is split over devices stays where it is.
        images = jnp.stack([x, y], axis=1).reshape(-1, *x.shape[1:])
        images = (images - jnp.asarray(SHIFT, images.dtype)) / jnp.asarray(SCALE, images.dtype)
        differences = []
        for m in VGG16(self.dtype, name="vgg")(images):
            pairs = _unit(m.astype(jnp.promote_types(m.dtype, jnp.float32))).reshape(-1, 2, *m.shape[1:])
            differences.append(jnp.square(pairs[:, 0] - pairs[:, 1]))
        return _Heads(name="lin")(differences)


def lpips_layers(
    params: Params, x: Float[Array, "b h w 3"], y: Float[Array, "b h w 3"], *, dtype: Any = None
) -> Float[Array, "b 5"]:
    """The five layers' contributions to LPIPS: `LPIPS` with params from `load_lpips`."""
    return LPIPS(dtype).apply({"params": params}, x, y)


def lpips(
    params: Params, x: Float[Array, "b h w 3"], y: Float[Array, "b h w 3"], *, dtype: Any = None
) -> Float[Array, "b"]:
    """LPIPS distance (VGG16, version 0.1) of each pair of images in [-1, 1]: the sum of `lpips_layers`."""
    return lpips_layers(params, x, y, dtype=dtype).sum(-1)


# ------------------------------------------------------------------------------------------------------------ weights


def init_lpips(key: Array) -> dict[str, Any]:
    """Random parameters of the right shapes: {"vgg": conv1_1 ... conv5_3, "lin": lin0 ... lin4 ([width])}."""
    image = jnp.zeros((1, 16, 16, 3))
    return LPIPS().init(key, image, image)["params"]


def load_lpips(paths: str | Path | Sequence[str | Path]) -> dict[str, Any]:
    """Parameters for `lpips`, float32, from published weight files.

    paths: one file or several that complement each other: torchvision's VGG16 (`features.N.weight`; its `classifier`
      is not needed) and the package's `weights/v0.1/vgg.pth` (`linI.model.1.weight`), or a state dict of the whole
      `lpips.LPIPS` (`net.sliceK.N.weight`). Formats: see `vgen.convert.sources.open_source`.
    Raises UserError naming parameters that are missing, misshapen or given twice with different values, and for files
    that are not there or damaged.
    """
    from vgen.convert.lpips import torchvision_table  # its families need the network above

    paths = [paths] if isinstance(paths, str | Path) else list(paths)
    table, found = torchvision_table(), {}
    for path in paths:
        weights = read_weights(path)
        for name, stored in renamed(weights, table).items():
            if name in found and not np.array_equal(found[name], weights[stored]):
                raise UserError(f"LPIPS weights: {stored} in {path} was already read with other values")
            found[name] = np.asarray(weights[stored], np.float32)
    shapes = trees.flatten(jax.eval_shape(init_lpips, jax.random.key(0)))
    try:
        flat = load(found.__getitem__, found, table, shapes)
    except ConvertError as error:
        raise ConvertError(
            f"LPIPS weights: {[str(p) for p in paths]}: {error}\n"
            "give torchvision's VGG16 and the package's weights/v0.1/vgg.pth together"
        ) from None
    return trees.unflatten({name: jnp.asarray(value) for name, value in flat.items()})


# ------------------------------------------------------------------------------------------------- without any weights


LOW_PASS = np.outer([1, 2, 1], [1, 2, 1]) / 16
FILTERS = np.array(  # differences along x, y and both diagonals, and a Laplacian, of similar gain
    [
        [[0, 0, 0], [-1, 0, 1], [0, 0, 0]],
        [[0, -1, 0], [0, 0, 0], [0, 1, 0]],
        np.array([[0, 0, -1], [0, 0, 0], [1, 0, 0]]) * 0.5**0.5,
        np.array([[-1, 0, 0], [0, 0, 0], [0, 0, 1]]) * 0.5**0.5,
        np.array([[0, 1, 0], [1, -4, 1], [0, 1, 0]]) * 0.5,
    ]
)


def _filter(x, kernel, stride=1):
    """3x3 convolution with a constant kernel [3, 3, in, out] and replicated edges."""
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    return jax.lax.conv_general_dilated(
        x, jnp.asarray(kernel, x.dtype), (stride, stride), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=jax.lax.Precision.HIGHEST,
    )  # fmt: skip


def _blur(x, stride=1):
    return _filter(x, np.einsum("hw,cd->hwcd", LOW_PASS, np.eye(x.shape[-1])), stride)


def _responses(x, contrast):
    """Every filter on every channel [b, h, w, 5 c], divided by the local root mean square of them all."""
    c = x.shape[-1]
    r = _filter(x, np.einsum("fhw,cd->hwcfd", FILTERS, np.eye(c)).reshape(3, 3, c, -1))
    energy = _blur(jnp.square(r).mean(-1, keepdims=True))
    return r * jax.lax.rsqrt(energy + contrast**2)


def feature_loss(
    x: Float[Array, "b h w c"], y: Float[Array, "b h w c"], *, scales: int = 3, contrast: float = 0.1
) -> Float[Array, ""]:
    """Distance of two batches of images in the responses of a fixed filter bank: a perceptual loss without weights.

    At each of `scales` resolutions, halved from one to the next, every colour channel is filtered by four oriented
    differences and a Laplacian, and the responses are divided by their local energy (of a 3 x 3 neighbourhood, over all
    filters and channels): divisive normalisation as in the normalised Laplacian pyramid (Laparra et al. 2016, which
    fits its constants to photographs and has no oriented filters). The loss is the mean squared
    difference, averaged over scales. An edge that is present but weak, or blurred, or a texture lost, costs much, a
    uniform change of colour nothing: it is meant beside a pixel loss.

    Why not VGG16 with random weights: at 32 pixels its last maps are 2 x 2, and a pair of images costs 1.3 GFLOP
    forward, against 5 MFLOP here with the gradient.

    x, y: images in [-1, 1]; computed in float32 or wider. contrast: responses far under it are not amplified.
    Scales whose smaller side would fall under 4 pixels are left out. Gradients are finite everywhere, and 0 at x = y.
    Returns a scalar >= 0, of order 1 for unrelated images. Raises ValueError if shapes differ or scales < 1.
    """
    if x.shape != y.shape or scales < 1:
        raise ValueError(
            f"feature_loss: got images {x.shape} and {y.shape}, scales {scales}; needs one shape, scales >= 1"
        )
    dtype = jnp.promote_types(jnp.promote_types(x.dtype, y.dtype), jnp.float32)
    both, losses = jnp.concatenate([x, y]).astype(dtype), []
    for i in range(scales):
        if i and min(both.shape[1:3]) < 8:
            break
        both = _blur(both, stride=2) if i else both
        a, b = jnp.split(_responses(both, contrast), 2)
        losses.append(jnp.square(a - b).mean())
    return sum(losses) / len(losses)
