"""MultiDiffusion: one large picture from a denoiser of small ones (Bar-Tal et al. 2023)."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vgen.types import Denoiser, Edit, Prediction, Step


def windows(size: int, window: int, stride: int) -> list[int]:
    """Where windows begin along an axis: every `stride`, and one that ends where the axis does.

    Raises ValueError where the window is larger than the axis, or the stride leaves gaps.
    """
    if window > size or not 1 <= stride <= window:
        raise ValueError(f"windows: need window <= size and 1 <= stride <= window, got {window}, {size} and {stride}")
    return [*range(0, size - window, stride), size - window]


def multidiffusion(window: tuple[int, int], stride: tuple[int, int], batch_size: int = 1) -> Edit:
    """An Edit under which x [b, height, width, c] may be larger than the `window` (height, width) of the denoiser.

    Every step denoises all windows and averages x0 where they overlap.  A sampler's step is affine in x0, so this is
    the paper's average of the windows' steps (eq. 5 with equal weights), for samplers without a memory exactly.
    stride: (rows, columns) between windows, half of the window and less for invisible seams.  batch_size: windows
    denoised at once.  Arrays of aux in the shape of x0 are averaged too; others are dropped.
    """

    def guidance(denoise: Denoiser) -> Denoiser:
        def tiled(x, step: Step) -> Prediction:
            b, height, width, _ = x.shape
            corners = [
                (i, j) for i in windows(height, window[0], stride[0]) for j in windows(width, window[1], stride[1])
            ]
            counts = np.zeros((height, width, 1))
            for i, j in corners:
                counts[i : i + window[0], j : j + window[1]] += 1

            def one(corner):
                part = jax.lax.dynamic_slice(x, (0, *corner, 0), (b, *window, x.shape[-1]))
                pred = denoise(part, step)
                return pred._replace(aux=jax.tree.map(lambda a: _like(a, pred.x0), pred.aux))

            preds = jax.lax.map(one, jnp.asarray(corners, jnp.int32), batch_size=batch_size)
            return jax.tree.map(lambda parts: _average(parts, corners, counts), preds)

        return tiled

    return Edit(guidance=guidance)


def _like(a: Any, x0: Any) -> Any:
    return a if jnp.shape(a)[:3] == x0.shape[:3] else None


def _average(parts, corners, counts):
    """[windows, b, h, w, c] at their corners -> [b, height, width, c]."""
    _, b, h, w, c = parts.shape
    total = jnp.zeros((b, *counts.shape[:2], c), parts.dtype)
    for part, (i, j) in zip(parts, corners):
        total = total.at[:, i : i + h, j : j + w].add(part)
    return total / jnp.asarray(counts, parts.dtype)
