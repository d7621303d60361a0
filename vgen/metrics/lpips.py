"""Perceptual distances: LPIPS with published weights, and a fixed filter-bank distance that needs none.

Sources: Zhang et al. 2018, "The Unreasonable Effectiveness of Deep Features" (package `lpips`, version 0.1, VGG16);
Laparra et al. 2016, "Perceptual image quality assessment using a normalized Laplacian pyramid".
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vgen.models.vgg import VGG16, WIDTHS
from vgen.types import Params
from vgen.weights import read_weights

SHIFT = np.float32((-0.030, -0.088, -0.188))  # float32 buffers in the package, so that float64 runs agree
SCALE = np.float32((0.458, 0.448, 0.450))

# Index of each convolution in torchvision's `features`, where ReLUs and pools count too.
TORCH_INDEX = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
CONV_NAMES = tuple(f"conv{b}_{i}" for b, widths in enumerate(WIDTHS, 1) for i in range(1, len(widths) + 1))


# ---------------------------------------------------------------------------------------------------------- distances


def _unit(x, eps=1e-10):
    """x / (|x| + eps) over channels, with gradient 0 (not NaN) where all channels are 0."""
    square = jnp.square(x).sum(-1, keepdims=True)
    some = square > 0
    return jnp.where(some, x / (jnp.sqrt(jnp.where(some, square, 1)) + eps), 0)


def lpips_layers(
    params: Params, x: Float[Array, "b h w 3"], y: Float[Array, "b h w 3"], *, dtype: Any = None
) -> Float[Array, "b 5"]:
    """The five layers' contributions to LPIPS.

    params: from `load_lpips`. x, y: images in [-1, 1], at least 16 x 16. dtype: of the convolutions; what follows
    them is float32 or wider. Raises ValueError on smaller images.
    """
    if min(x.shape[1:3]) < 16:
        raise ValueError(f"LPIPS: images {x.shape} must be at least 16 pixels on a side; resize them")
    images = jnp.concatenate([x, y])  # one pass of the network
    images = (images - jnp.asarray(SHIFT, images.dtype)) / jnp.asarray(SCALE, images.dtype)
    maps = VGG16(dtype).apply({"params": params["vgg"]}, images)
    layers = []
    for i, m in enumerate(maps):
        m = _unit(m.astype(jnp.promote_types(m.dtype, jnp.float32)))
        a, b = jnp.split(m, 2)
        layers.append((jnp.square(a - b) @ params["lin"][f"lin{i}"]).mean((1, 2)))
    return jnp.stack(layers, axis=-1)


def lpips(
    params: Params, x: Float[Array, "b h w 3"], y: Float[Array, "b h w 3"], *, dtype: Any = None
) -> Float[Array, "b"]:
    """LPIPS distance (VGG16, version 0.1) of each pair of images in [-1, 1]: the sum of `lpips_layers`."""
    return lpips_layers(params, x, y, dtype=dtype).sum(-1)


# ------------------------------------------------------------------------------------------------------------ weights


def init_lpips(key: Array) -> dict[str, Any]:
    """Random parameters of the right shapes: {"vgg": conv1_1 ... conv5_3, "lin": lin0 ... lin4 ([width])}."""
    vgg = VGG16().init(key, jnp.zeros((1, 16, 16, 3)))["params"]
    return {"vgg": vgg, "lin": {f"lin{i}": jnp.full(w[-1], 1 / w[-1]) for i, w in enumerate(WIDTHS)}}


def load_lpips(paths: str | Path | Sequence[str | Path]) -> dict[str, Any]:
    """Parameters for `lpips`, float32, from published weight files.

    paths: one file or several that complement each other: torchvision's VGG16 (`features.N.weight`; its `classifier`
      is not needed) and the package's `weights/v0.1/vgg.pth` (`linI.model.1.weight`), or a state dict of the whole
      `lpips.LPIPS` (`net.sliceK.N.weight`). Formats: .safetensors, .npz, .pth or .pt (by PyTorch, tensors only).
    Raises ValueError naming parameters that are missing, misshapen or given twice with different values,
    FileNotFoundError for a path that is not there.
    """
    paths = [paths] if isinstance(paths, str | Path) else list(paths)
    found: dict[str, np.ndarray] = {}
    for path in paths:
        for name, value in read_weights(path).items():
            if (ours := _rename(name)) is None:
                continue
            if ours in found and not np.array_equal(found[ours], value):
                raise ValueError(f"LPIPS weights: {ours} ({name} in {path}) was already read with other values")
            found[ours] = np.asarray(value, np.float32)
    target = jax.eval_shape(init_lpips, jax.random.key(0))
    missing = []

    def fill(key_path, shape):
        name = "/".join(k.key for k in key_path)
        if name not in found:
            missing.append(name)
            return shape
        value = found[name]
        if name.startswith("lin"):
            value = value.reshape(-1)  # [1, c, 1, 1] -> [c]
        elif value.ndim == 4:
            value = value.transpose(2, 3, 1, 0)  # [out, in, h, w] -> [h, w, in, out]
        if value.shape != shape.shape:
            raise ValueError(f"LPIPS weights: {name} has shape {value.shape} after conversion, expected {shape.shape}")
        return jnp.asarray(value)

    params = jax.tree_util.tree_map_with_path(fill, target)
    if missing:
        raise ValueError(
            f"LPIPS weights: {[str(p) for p in paths]} lack {', '.join(missing)}; give torchvision's VGG16 and the "
            "package's weights/v0.1/vgg.pth together"
        )
    return params


def _rename(name: str) -> str | None:
    """Path in our tree of a parameter of torchvision's VGG16 or of the lpips package, None if we have no use for it."""
    if match := re.fullmatch(r"(?:lin|lins\.)(\d)\.model\.1\.weight", name):
        return f"lin/lin{match[1]}"
    if match := re.fullmatch(r"(?:features|net\.slice\d)\.(\d+)\.(weight|bias)", name):
        conv = CONV_NAMES[TORCH_INDEX.index(int(match[1]))]
        return f"vgg/{conv}/{'kernel' if match[2] == 'weight' else 'bias'}"
    return None


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
