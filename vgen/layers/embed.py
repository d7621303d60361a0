"""Positions: learned and fixed tables, and T5's relative bias."""

from typing import Any

import flax.linen as nn
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
    rows: int, columns: int, width: int, *, temperature: float = 10_000.0, endpoint: bool = False
) -> np.ndarray:
    """Fixed positions [rows * columns, width], float64, row-major: sin x, cos x, sin y, cos y, a quarter each.

    Frequencies are temperature^(-i / q), i < q = width / 4 (MAE, He et al. 2022; DiT); with `endpoint`
    temperature^(-i / (q - 1)), which ends on 1 / temperature itself (big_vision's ViT).
    Raises ValueError where width is not a multiple of 4.
    """
    if width % 4:
        raise ValueError(f"sincos_2d: width must be a multiple of 4, got {width}")
    quarter = width // 4
    omega = float(temperature) ** -(np.arange(quarter) / (quarter - endpoint))
    y, x = np.divmod(np.arange(rows * columns), columns)
    angles = [np.outer(place, omega) for place in (x, y)]
    return np.concatenate([f(a) for a in angles for f in (np.sin, np.cos)], axis=1)


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
