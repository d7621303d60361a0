"""Inpainting and outpainting with a token generator: the tokens to be found are masked, the others kept (Muse)."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from vgen.types import Edit


def box_mask(boxes: Int[np.ndarray, "b 4"], height: int, width: int) -> Bool[np.ndarray, "b height width"]:
    """Masks that are True inside of a box each, (left, top, right, bottom) in pixels, the last two not included.

    What is in the box is made anew, with another class or text replaced; with ~ all around it is (outpainting).
    Raises ValueError for a box that is empty or not inside of the picture.
    """
    boxes = np.asarray(boxes)
    left, top, right, bottom = boxes.T[..., None, None]
    good = (0 <= left) & (left < right) & (right <= width) & (0 <= top) & (top < bottom) & (bottom <= height)
    if not good.all():
        worst = boxes[~good.ravel()][0].tolist()
        raise ValueError(
            "box_mask: a box (left, top, right, bottom) must have an inside and lie in the picture, "
            f"{width} x {height} pixels, got {worst}"
        )
    rows, columns = np.arange(height)[:, None], np.arange(width)
    return (left <= columns) & (columns < right) & (top <= rows) & (rows < bottom)


def token_mask(mask: Bool[Array, "b height width"], grid: tuple[int, int], margin: int = 0) -> Bool[Array, "b n"]:
    """Which tokens of a (rows, columns) grid to find again: those with a masked pixel in their cell.

    mask: bool, True where the picture is to be painted.  margin: pixels by which a cell is enlarged on every side: a
    token of a convolutional encoder has seen as much beyond its cell, and so carries some of what is to go.
    Outpainting is the same with a mask that is True outside of the picture.
    Raises ValueError where height or width is not a multiple of rows or columns.
    """
    (rows, columns), (b, height, width) = grid, mask.shape
    if height % rows or width % columns:
        raise ValueError(f"token_mask: mask {height} x {width} does not divide into a grid of {rows} x {columns} cells")
    cell = (height // rows, width // columns)
    any_masked = jax.lax.reduce_window(
        mask,
        False,
        jax.lax.bitwise_or,
        (1, cell[0] + 2 * margin, cell[1] + 2 * margin),
        (1, *cell),
        ((0, 0), (margin, margin), (margin, margin)),
    )
    return any_masked.reshape(b, rows * columns)


def inpaint(tokens: Int[Array, "b n"], regenerate: Bool[Array, "b n"], mask_id: int) -> Edit:
    """An Edit that finds the tokens marked in `regenerate` (see `token_mask`) and keeps the others as they are."""
    return Edit(start=jnp.where(regenerate, mask_id, tokens))


def blend(
    original: Float[Array, "b height width c"],
    painted: Float[Array, "b height width c"],
    mask: Bool[Array, "b height width"],
    radius: float,
) -> Float[Array, "b height width c"]:
    """The painted picture inside of the mask, the original outside, joined along a Gaussian blur of `radius` pixels.

    The decoder changes kept pixels slightly; this puts the originals back (MaskGIT's editing, radius size / 16 - 1).
    radius: standard deviation of the blur, 0 for a hard edge.
    """
    soft = mask.astype(original.dtype)[..., None]  # [b, height, width, 1]
    if radius > 0:
        reach = int(3 * radius + 0.5)
        kernel = jnp.exp(-0.5 * (jnp.arange(-reach, reach + 1) / radius) ** 2).astype(original.dtype)
        kernel = kernel / kernel.sum()
        for axis in (1, 2):
            pad = [(0, 0)] * 4
            pad[axis] = (reach, reach)
            shape = [1, 1, 1, 1]
            shape[axis - 1] = 2 * reach + 1  # [height, width, in, out]
            soft = jax.lax.conv_general_dilated(
                jnp.pad(soft, pad, mode="edge"),
                kernel.reshape(shape),
                (1, 1),
                "VALID",
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )
    return soft * painted + (1 - soft) * original
