"""Patches and positions: learned and fixed tables, their resizing, and T5's relative bias."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


class Positions(nn.Module):
    """A learned table [length, width], initialised N(0, std^2); its first n rows are added to x [b, n, width].

    Raises ValueError where x is longer than the table.
    """

    length: int
    std: float = 0.02
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b n width"]) -> Float[Array, "b n width"]:
        n, width = x.shape[1:]
        if n > self.length:
            raise ValueError(f"Positions: got {n} tokens for a table of {self.length}")
        table = self.param("table", nn.initializers.normal(self.std), (self.length, width), self.param_dtype)
        x, table = nn.dtypes.promote_dtype(x, table, dtype=self.dtype)
        return x + table[:n]


class Positions2D(nn.Module):
    """Learned positions of a grid, one table for rows and one for columns, added to x [b, rows * columns, width].

    grid: (rows, columns); x is row-major.  Raises ValueError where x has another number of tokens.
    """

    grid: tuple[int, int]
    std: float = 0.02
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b n width"]) -> Float[Array, "b n width"]:
        (rows, columns), (_, n, width) = self.grid, x.shape
        if n != rows * columns:
            raise ValueError(f"Positions2D: grid {self.grid} has {rows * columns} places, got {n} tokens")
        init = nn.initializers.normal(self.std)
        row = self.param("row", init, (rows, width), self.param_dtype)
        column = self.param("column", init, (columns, width), self.param_dtype)
        x, row, column = nn.dtypes.promote_dtype(x, row, column, dtype=self.dtype)
        return x + (row[:, None] + column[None]).reshape(n, width)


def sincos_2d(
    rows: int,
    columns: int,
    width: int,
    *,
    temperature: float = 10_000.0,
    endpoint: bool = False,
    base: int | None = None,
    interpolation: float = 1.0,
) -> np.ndarray:
    """Fixed positions [rows * columns, width], float64, row-major: sin x, cos x, sin y, cos y, a quarter each.

    Frequencies are temperature^(-i / q), i < q = width / 4 (MAE, He et al. 2022; DiT); with `endpoint`
    temperature^(-i / (q - 1)), which ends on 1 / temperature itself (big_vision's ViT).
    base: a grid of any size has positions 0 .. base along both sides (None: 0, 1, 2, ...), which are then divided by
    `interpolation` (PixArt, Chen et al. 2023); that is done in float32.
    Raises ValueError where width is not a multiple of 4.
    """
    if width % 4:
        raise ValueError(f"sincos_2d: width must be a multiple of 4, got {width}")
    quarter = width // 4
    omega = float(temperature) ** -(np.arange(quarter) / (quarter - endpoint))
    y, x = (np.arange(side, dtype=np.float32) / (side / (base or side)) / interpolation for side in (rows, columns))
    angles = [np.outer(place, omega) for place in (np.tile(x, rows), np.repeat(y, columns))]
    return np.concatenate([f(a) for a in angles for f in (np.sin, np.cos)], axis=1)


def resize_matrix(old: int, new: int, method: str, offset: float = 0.0) -> np.ndarray:
    """Weights [new, old], float64, that resize one axis: interpolation of a table is separable, rows then columns.

    method: "bilinear" with the corners kept in place (scipy.ndimage.zoom, order 1: AugReg's fine-tuning); "bicubic" as
    torch's interpolate, which takes every fourth point at most when it shrinks; "bicubic_antialias", whose kernel
    widens then.  offset: only for "bicubic": `new` in the scale is (new + offset) / old (DINOv2's code has 0.1).
    Raises ValueError for another method.
    """
    weights = np.zeros((new, old))
    if method == "bilinear":
        at = np.arange(new) * ((old - 1) / max(new - 1, 1))
        low = np.minimum(at.astype(int), old - 1)
        np.add.at(weights, (np.arange(new), low), 1 - (at - low))
        np.add.at(weights, (np.arange(new), np.minimum(low + 1, old - 1)), at - low)
        return weights
    if method == "bicubic":
        at = (np.arange(new) + 0.5) * (old / (new + offset)) - 0.5
        for tap in range(-1, 3):
            place = np.floor(at) + tap
            np.add.at(weights, (np.arange(new), np.clip(place, 0, old - 1).astype(int)), _cubic(at - place, -0.75))
        return weights
    if method == "bicubic_antialias":
        scale = old / new
        wide = max(scale, 1.0)
        for i in range(new):
            center = scale * (i + 0.5)
            low, high = max(int(center - 2 * wide + 0.5), 0), min(int(center + 2 * wide + 0.5), old)
            taps = _cubic((np.arange(low, high) + 0.5 - center) / wide, -0.5)
            weights[i, low:high] = taps / taps.sum()
        return weights
    raise ValueError(f"resize_matrix: method must be 'bilinear', 'bicubic' or 'bicubic_antialias', got {method!r}")


def _cubic(x: np.ndarray, a: float) -> np.ndarray:
    """The cubic convolution kernel (Keys 1981)."""
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


class PatchEmbed(nn.Module):
    """Images [b, h, w, c] -> a token for every patch [b, n, width], row-major.

    It is a convolution with the stride of its kernel, computed as a dense layer.
    size: (rows, columns) of a patch.  Parameters: kernel [rows, columns, c, width], bias [width].
    Raises ValueError where the image is no multiple of the patch.
    """

    size: tuple[int, int]
    width: int
    bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: Any = nn.initializers.xavier_uniform()

    @nn.compact
    def __call__(self, images: Float[Array, "b h w c"]) -> Float[Array, "b n width"]:
        b, h, w, c = images.shape
        rows, columns = self.size
        if h % rows or w % columns:
            raise ValueError(f"PatchEmbed: images {images.shape} are no multiple of patches {self.size}; resize them")
        x = images.reshape(b, h // rows, rows, w // columns, columns, c).swapaxes(2, 3)
        flat = rows * columns * c

        def init(key, shape, dtype):  # fans of the dense layer that it is
            return self.kernel_init(key, (flat, self.width), dtype).reshape(shape)

        kernel = self.param("kernel", init, (rows, columns, c, self.width), self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.width,), self.param_dtype) if self.bias else None
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        x = x.reshape(-1, flat) @ kernel.reshape(flat, self.width)
        x = x if bias is None else x + bias
        return x.reshape(b, -1, self.width)


class GridPositions(nn.Module):
    """A learned table for a grid of patches, resized to the grid at hand.

    grid: (rows, columns) that the table belongs to.  cls: a first row of the table belongs to the class token.
    resize, offset: see `resize_matrix`.  std: of the initial values.
    Parameters: table [cls + rows * columns, width].
    """

    grid: tuple[int, int]
    width: int
    cls: bool = False
    resize: str = "bilinear"
    offset: float = 0.0
    std: float = 0.02
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, rows: int, columns: int) -> tuple[Float[Array, "width"] | None, Float[Array, "n width"]]:
        """(the class token's position or None, those of rows * columns patches)."""
        length = self.cls + self.grid[0] * self.grid[1]
        table = self.param("table", nn.initializers.normal(self.std), (length, self.width), self.param_dtype)
        cls, table = (jnp.asarray(table[0]), jnp.asarray(table[1:])) if self.cls else (None, jnp.asarray(table))
        if (rows, columns) == self.grid:
            return cls, table
        sizes = zip(self.grid, (rows, columns), strict=True)
        down, across = (jnp.asarray(resize_matrix(*pair, self.resize, self.offset), table.dtype) for pair in sizes)
        high = dict(precision=jax.lax.Precision.HIGHEST)
        table = jnp.einsum("ir,jc,rcw->ijw", down, across, table.reshape(*self.grid, -1), **high)
        return cls, table.reshape(rows * columns, -1)


def sinusoids(
    values: Float[Array, "*b"],
    width: int,
    *,
    temperature: float = 10_000.0,
    sin_first: bool = False,
    endpoint: bool = False,
) -> Float[Array, "*b width"]:
    """Embeddings [..., width] of numbers: cos and sin of x temperature^(-i / h), i < h = width / 2, a half each.

    The result has the values' precision, float32 at least.  sin_first: the order of the halves (Vaswani et al. 2017;
    the other one is that of OpenAI's diffusion code).  endpoint: i / (h - 1) in the exponent, which ends on
    1 / temperature itself (DDPM, Ho et al. 2020).  Raises ValueError where width is odd.
    """
    if width % 2:
        raise ValueError(f"sinusoids: width must be even, got {width}")
    dtype = jnp.promote_types(values.dtype, jnp.float32)
    omega = float(temperature) ** -(np.arange(width // 2) / (width // 2 - endpoint))
    angles = values.astype(dtype)[..., None] * jnp.asarray(omega, dtype)
    halves = (jnp.sin(angles), jnp.cos(angles)) if sin_first else (jnp.cos(angles), jnp.sin(angles))
    return jnp.concatenate(halves, axis=-1)


def relative_buckets(
    n: int, m: int, buckets: int = 32, max_distance: int = 128, bidirectional: bool = True
) -> np.ndarray:
    """T5's bucket [n, m] int32 of every query and key: exact when near, logarithmic when far (Raffel et al. 2020).

    bidirectional: half of the buckets is for keys behind the query, half for those ahead; if not, all keys ahead have
    bucket 0.
    """
    distance = np.arange(m)[None] - np.arange(n)[:, None]
    offset = 0
    if bidirectional:
        buckets //= 2
        offset = np.where(distance > 0, buckets, 0)
        distance = np.abs(distance)
    else:
        distance = np.maximum(-distance, 0)
    exact = buckets // 2
    # float32 as in the published code: in float64 a distance at the edge of a bucket would fall into another
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / exact) / np.float32(np.log(max_distance / exact))
    far = np.minimum(exact + (ratio * (buckets - exact)).astype(np.int32), buckets - 1)
    return (offset + np.where(distance < exact, distance, far)).astype(np.int32)


class RelativeBias2D(nn.Module):
    """A learned bias [1, heads, n, n] for the logits of attention on a grid, one number per head and offset.

    grid: (rows, columns), n = rows * columns, row-major.  It starts as a convolution: head i looks at the i-th nearest
    neighbour, its bias falling with the squared distance from there, at most by 9 (the initialisation of ConViT,
    d'Ascoli et al. 2021, sections 3.1 and 4; a table by offset as in Swin, Liu et al. 2021).
    Parameters: table [heads, 2 rows - 1, 2 columns - 1].
    """

    heads: int
    grid: tuple[int, int]
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self) -> Float[Array, "1 heads n n"]:
        rows, columns = self.grid
        shape = (self.heads, 2 * rows - 1, 2 * columns - 1)
        table = self.param("table", lambda key, shape, dtype: self._convolution(shape, dtype), shape, self.param_dtype)
        y, x = np.divmod(np.arange(rows * columns), columns)
        return table[:, y[None] - y[:, None] + rows - 1, x[None] - x[:, None] + columns - 1][None]

    def _convolution(self, shape, dtype):
        heads, height, width = shape
        y, x = np.indices((height, width))
        y, x = y - height // 2, x - width // 2  # of the key, seen from the query
        order = np.lexsort((x.ravel(), y.ravel(), (y**2 + x**2).ravel()))[1:]  # by distance, the place itself left out
        near = order[np.arange(heads) % max(order.size, 1)] if order.size else np.zeros(heads, int)
        distance = (y - y.ravel()[near, None, None]) ** 2 + (x - x.ravel()[near, None, None]) ** 2
        return jnp.asarray(-np.minimum(distance, 9), dtype)


class RelativeBias(nn.Module):
    """T5's relative position bias: (n, m) -> [1, heads, n, m], from a table [buckets, heads] (`relative_buckets`)."""

    heads: int
    buckets: int = 32
    max_distance: int = 128
    bidirectional: bool = True
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, n: int, m: int) -> Float[Array, "1 heads n m"]:
        table = self.param("table", nn.initializers.normal(0.02), (self.buckets, self.heads), self.param_dtype)
        index = relative_buckets(n, m, self.buckets, self.max_distance, self.bidirectional)
        return table[index].transpose(2, 0, 1)[None]
