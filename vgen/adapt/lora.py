"""Low-rank changes of kernels (LoRA, Hu et al. 2021, arXiv:2106.09685): W + scale * down @ up, scale = alpha / rank.

A delta is a tree like the parameters', of the adapted kernels alone, with three arrays in place of each:

    kernel [in, out]:          down [in, rank],          up [rank, out],          scale []
    kernel [h, w, in, out]:    down [h, w, in, rank],    up [1, 1, rank, out],    scale []

and all of them with `depth` in front where the kernel is a stack of layers [depth, ...], as `nn.scan` keeps them.
Train `down` and `up` (groups={"main": ".*/(down|up)"}); `scale` is data as well, so that a strength never recompiles.
"""

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from vgen import trees
from vgen.config import ConfigError
from vgen.types import Adapter, Params

PARTS = ("down", "up", "scale")


def lora(pattern: str, rank: int, alpha: float | None = None, *, init: str = "uniform") -> Adapter:
    """LoRA on every kernel whose path `pattern` matches entirely (r"layers/attn/(q|v)/kernel").

    alpha: the change is alpha / rank times the product; rank by default.
    init: of `down`, whose partner begins as zeros: "uniform" within 1 / sqrt(fan in), as PEFT and the authors' code
      draw it, or "normal" with deviation 1 / rank (PEFT's "gaussian", of diffusers' training scripts).
    `init(key, params)` raises ConfigError where nothing matches or what matches is no kernel; params may be shapes.
    Raises ValueError for a rank below 1 or an unknown init.
    """
    if rank < 1:
        raise ValueError(f"lora: rank must be at least 1, got {rank}")
    if init not in ("uniform", "normal"):
        raise ValueError(f"lora: init must be 'uniform' or 'normal', got {init!r}")

    def start(key: Key[Array, ""], params: Params) -> Params:
        flat = trees.flatten(params)
        if not (paths := [path for path in flat if re.fullmatch(pattern, path)]):
            raise ConfigError(f"lora: {pattern!r} matches no parameter; there are e.g. {list(flat)[:5]}")
        wrong = [path for path in paths if not path.endswith("kernel") or not 2 <= len(flat[path].shape) <= 5]
        if wrong:
            raise ConfigError(f"lora: {pattern!r} matches {', '.join(wrong[:5])}, expected kernels of linear layers")
        keys = jax.random.split(key, len(paths))
        return trees.unflatten({path: _start(k, flat[path].shape) for k, path in zip(keys, paths, strict=True)})

    def _start(key, shape) -> dict[str, Array]:
        stack = depth_of(shape)
        *taps, fan_in, fan_out = shape[len(stack) :]
        down = (*stack, *taps, fan_in, rank)
        if init == "uniform":
            bound = (math.prod(taps) * fan_in) ** -0.5
            drawn = jax.random.uniform(key, down, minval=-bound, maxval=bound)
        else:
            drawn = jax.random.normal(key, down) / rank
        up = jnp.zeros((*stack, *(1 for _ in taps), rank, fan_out))
        return dict(down=drawn, up=up, scale=jnp.full(stack, (rank if alpha is None else alpha) / rank, float))

    return Adapter(start, merge)


def depth_of(shape: tuple[int, ...]) -> tuple[int, ...]:
    """() of a kernel [in, out] or [h, w, in, out], (depth,) of a stack of them."""
    return tuple(shape[: len(shape) % 2])


def factors(delta: Params) -> dict[str, dict[str, Any]]:
    """{path of a kernel: {"down", "up", "scale"}} of a delta; ValueError where it is none of LoRA."""
    found: dict[str, dict[str, Any]] = {}
    for path, leaf in trees.flatten(delta).items():
        kernel, _, part = path.rpartition("/")
        found.setdefault(kernel, {})[part] = leaf
    if wrong := [path for path, parts in found.items() if set(parts) != set(PARTS)]:
        raise ValueError(f"LoRA: {wrong[0] or 'the tree'} holds {sorted(found[wrong[0]])}, expected {', '.join(PARTS)}")
    return found


def merge(params: Params, delta: Params) -> Params:
    """The parameters with the delta's kernels changed, in float32 at least and rounded to each kernel's dtype.

    Raises ValueError for a delta of kernels that the parameters lack, or that are of another shape.
    """
    flat = trees.flatten(params)
    for path, parts in factors(delta).items():
        if path not in flat:
            raise ValueError(f"LoRA: the parameters have no {path}; there are e.g. {', '.join(list(flat)[:3])}")
        change = product(**parts, dtype=flat[path].dtype)
        if change.shape != flat[path].shape:
            raise ValueError(f"LoRA: {path} is {flat[path].shape}, the delta makes {change.shape}")
        flat[path] = (flat[path] + change).astype(flat[path].dtype)
    return trees.unflatten(flat)


def product(
    down: Float[Array, "*a r"], up: Float[Array, "*b o"], scale: Float[Array, "*d"], dtype: Any = jnp.float32
) -> Float[Array, "*a o"]:
    """What is added to a kernel: scale * down @ up, in the widest of float32, `dtype` and the factors' dtypes."""
    wide = jnp.result_type(down, up, dtype, jnp.float32)
    down, up, scale = (jnp.asarray(x, wide) for x in (down, up, scale))
    scale = scale.reshape(scale.shape + (1,) * (down.ndim - scale.ndim))
    return jnp.matmul(down, up, precision=jax.lax.Precision.HIGHEST) * scale


def scaled(delta: Params, strength: Float[Array, ""] | float) -> Params:
    """The delta at `strength` (traced) times its size: 0 changes nothing, a negative one undoes."""
    found = {path: parts | dict(scale=parts["scale"] * strength) for path, parts in factors(delta).items()}
    return trees.unflatten(found)


def count(delta: Params) -> int:
    """How many numbers of a delta are trained: all but its scales."""
    return sum(trees.count([parts["down"], parts["up"]]) for parts in factors(delta).values())
