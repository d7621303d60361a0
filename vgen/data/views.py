"""Random views of pictures, made on the device: crops by fractions of a picture, and changes of colour and sharpness.

Source: Chen et al. 2020 (SimCLR, arXiv:2002.05709), appendix A, as Yang et al. 2022 (A-CLIP, arXiv:2212.08653) use it.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

LUMA = (0.299, 0.587, 0.114)
TRIES = 10
# Chroma of a colour, whose turn by an angle is a shift of hue that keeps luma; the rows of RGB to YIQ, and back.
TO_YIQ = (LUMA, (0.596, -0.274, -0.322), (0.211, -0.523, 0.312))


def random_boxes(
    key, count: int, area: tuple[float, float] = (0.5, 1.0), ratio: tuple[float, float] = (3 / 4, 4 / 3)
) -> Float[Array, "count 4"]:
    """(top, left, height, width) as shares of a square picture, of `area` of it (uniform) and `ratio` as wide as high
    (uniform in the logarithm); the first of ten that fit, or the whole picture (Szegedy et al. 2014, section 6).
    """
    share_key, ratio_key, place_key = jax.random.split(key, 3)
    share = jax.random.uniform(share_key, (TRIES, count), minval=area[0], maxval=area[1])
    logs = [math.log(x) for x in ratio]
    aspect = jnp.exp(jax.random.uniform(ratio_key, (TRIES, count), minval=logs[0], maxval=logs[1]))
    sizes = jnp.stack([jnp.sqrt(share / aspect), jnp.sqrt(share * aspect)], -1)  # [tries, count, 2]
    sizes = jnp.concatenate([sizes, jnp.ones_like(sizes[:1])])
    first = (sizes <= 1).all(-1).argmax(0)
    size = jnp.take_along_axis(sizes, first[None, :, None], 0)[0]
    return jnp.concatenate([jax.random.uniform(place_key, size.shape) * (1 - size), size], 1)


def around(key, first: Float[Array, "b 4"], second: Float[Array, "b 4"]) -> Float[Array, "b 4"]:
    """A random box of the picture that both boxes lie in."""
    shares = jax.random.uniform(key, (2, len(first), 2), first.dtype)
    corner = jnp.minimum(first[:, :2], second[:, :2]) * shares[0]
    end = jnp.maximum(first[:, :2] + first[:, 2:], second[:, :2] + second[:, 2:])
    end = end + (1 - end) * shares[1]
    return jnp.concatenate([corner, end - corner], 1)


def inside(box: Float[Array, "b 4"], frame: Float[Array, "b 4"]) -> Float[Array, "b 4"]:
    """The box as shares of the frame, both being shares of the picture."""
    size = frame[:, 2:]
    return jnp.concatenate([(box[:, :2] - frame[:, :2]) / size, box[:, 2:] / size], 1)


def crop(x: Float[Array, "b h w c"], box: Float[Array, "b 4"], size: int) -> Float[Array, "b size size c"]:
    """What is in the boxes, size x size; bilinear, over as many pixels as become one where it shrinks."""
    down = _resampling(box[:, 0], box[:, 2], x.shape[1], size, x.dtype)
    across = _resampling(box[:, 1], box[:, 3], x.shape[2], size, x.dtype)
    return jnp.einsum("biy,bjx,byxc->bijc", down, across, x)


def _resampling(start, length, pixels, size, dtype):
    """[b, size, pixels]: rows sum to one."""
    start, length = (jnp.asarray(each, dtype)[:, None, None] * pixels for each in (start, length))
    centre = start + (jnp.arange(size, dtype=dtype)[:, None] + 0.5) / size * length - 0.5
    centre = jnp.clip(centre, 0, pixels - 1)
    reach = jnp.maximum(length / size, 1)
    weight = jnp.maximum(1 - jnp.abs(jnp.arange(pixels, dtype=dtype) - centre) / reach, 0)
    return weight / weight.sum(-1, keepdims=True)


@dataclasses.dataclass(frozen=True)
class Distort:
    """Called with a key and pictures in [0, 1], [b, h, w, 3], gives them with changed colours, each in its own way.

    brightness, contrast, saturation: largest changes of those factors from 1; hue: of the angle, in turns.
    jitter: probability of these four; grey, blur, solarize: of the picture being made so (SimCLR's and BYOL's).
    Changes come in this order.  sigmas: of the blur, in pixels of pictures of 224.
    """

    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    jitter: float = 0.8
    grey: float = 0.2
    blur: float = 0.1
    solarize: float = 0.2
    sigmas: tuple[float, float] = (0.1, 2.0)

    def __call__(self, key, x: Float[Array, "b h w 3"]) -> Float[Array, "b h w 3"]:
        keys = jax.random.split(key, 9)
        draw = lambda i, low, high: jax.random.uniform(keys[i], (len(x), 1, 1, 1), x.dtype, low, high)
        maybe = lambda i, share, made, x: jnp.where(draw(i, 0, 1) < share, made, x)
        luma = lambda x: (x @ jnp.asarray(LUMA, x.dtype))[..., None]
        held = lambda x: jnp.clip(x, 0, 1)
        y = held(x * draw(0, 1 - self.brightness, 1 + self.brightness))
        mean = luma(y).mean((1, 2), keepdims=True)
        y = held(mean + (y - mean) * draw(1, 1 - self.contrast, 1 + self.contrast))
        y = held(luma(y) + (y - luma(y)) * draw(2, 1 - self.saturation, 1 + self.saturation))
        y = held(_turned(y, draw(3, -self.hue, self.hue)))
        x = maybe(4, self.jitter, y, x)
        x = maybe(5, self.grey, jnp.broadcast_to(luma(x), x.shape), x)
        x = maybe(6, self.blur, _blurred(x, draw(7, *self.sigmas)[:, 0, 0, 0] * x.shape[1] / 224), x)
        return maybe(8, self.solarize, jnp.where(x >= 0.5, 1 - x, x), x)


def _turned(x, turns):
    """Colours whose chroma is turned; turns: [b, 1, 1, 1]."""
    to = jnp.asarray(TO_YIQ, x.dtype)
    y, i, q = jnp.split(x @ to.T, 3, -1)
    cos, sin = jnp.cos(2 * math.pi * turns), jnp.sin(2 * math.pi * turns)
    return jnp.concatenate([y, cos * i - sin * q, sin * i + cos * q], -1) @ jnp.linalg.inv(to).T


def _blurred(x, sigma):
    """A Gaussian of `sigma` [b] pixels, over what there is of its surroundings."""

    def kernel(n):
        distance = jnp.arange(n, dtype=x.dtype)[:, None] - jnp.arange(n, dtype=x.dtype)
        weight = jnp.exp(-0.5 * jnp.square(distance / sigma[:, None, None]))
        return weight / weight.sum(-1, keepdims=True)

    return jnp.einsum("biy,bjx,byxc->bijc", kernel(x.shape[1]), kernel(x.shape[2]), x)
