"""Attention: the only place of vgen where queries meet keys."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from jaxtyping import Array, Bool, Float

from vgen import platform
from vgen.layers import attention_kernels as kernels
from vgen.layers.linear import linear
from vgen.types import AttentionControl, Step


class Site(NamedTuple):
    """Where an attention is, for an AttentionControl to choose by.

    kind: "self" or "cross".  name: path of the module, "/"-joined, with "/<context>" behind it for a named context.
    layer: int, or traced int32 where layers run in a scan: choose by it with jnp.where, not with `if`.
    """

    kind: str
    name: str = ""
    layer: Any = 0


class Past(NamedTuple):
    """What self-attention remembers of the tokens before those it is given: keys and values in the collection "cache".

    place: of the first of the tokens that are given; int, or traced.  length: of the cache, [b, length, heads, d].
    With the cache of earlier calls in the variables, and the collection mutable, tokens may come in one by one or in
    blocks; a call without one makes it.  place + tokens must not exceed length.
    """

    place: Any
    length: int


def attention(
    q: Float[Array, "b n h d"],
    k: Float[Array, "b m h d"],
    v: Float[Array, "b m h d"],
    *,
    mask: Bool[Array, "..."] | None = None,
    bias: Float[Array, "..."] | None = None,
    scale: float | None = None,
    causal: bool = False,
    control: AttentionControl | None = None,
    site: Site | None = None,
    step: Step | None = None,
) -> Float[Array, "b n h d"]:
    """softmax(scale q k^T + bias) v, masked; a query that may look at nothing gives zeros (Vaswani et al. 2017).

    mask: True where a query may look; of four dimensions, broadcastable to [b, h, n, m].  bias: of such a shape too,
    added to the logits.  scale: 1 / sqrt(d) by default.  causal: query i looks at keys 0..i.
    control: with any of its parts set the plain formula runs, and each part sees, and may replace, its arrays:
      qkv ((q, k, v)), logits ([b, h, n, m], scaled and biased, ahead of the mask), probs ([b, h, n, m], rows sum to one
      or to zero).  `site` and `step` are handed to it.  Its `keep` is for the modules, see `keeping`.
    Logits and softmax are float32, or float64 for float64 inputs; the result has the dtype of v.
    A half-precision call without bias runs cuDNN's fused kernel on NVIDIA GPUs that have one; a large one runs in
    chunks on a CPU, and by a Pallas kernel on a TPU if neither bias nor mask differs between queries.
    Raises ValueError where mask or bias is not of four dimensions.
    """
    for name, array in (("mask", mask), ("bias", bias)):
        if array is not None and array.ndim != 4:
            raise ValueError(f"attention: {name} must broadcast to [b, h, n, m] with 4 dimensions, got {array.shape}")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    control = control if control is not None and any(control) else None
    if control is None and kernels.wants_chunks(q, k):
        return kernels.chunked(q, k, v, mask, bias, scale=scale, causal=causal)
    if control is None and kernels.has_flash(q, k, v, mask, bias):
        out = kernels.flash(q, k, v, mask, scale=scale, causal=causal)
        return out if mask is None else jnp.where(_seen(mask, causal, q.shape[1], k.shape[1]), out, 0)
    if control is None and q.dtype != jnp.float64:  # jax.nn rounds float64 logits to float32: plain formula there
        kernel = "cudnn" if _has_fused_kernel(q, k, v, mask, bias) else "xla"
        if kernel == "cudnn" and mask is not None:
            mask = jnp.broadcast_to(mask, mask.shape[:2] + (q.shape[1], k.shape[1]))
        out = jax.nn.dot_product_attention(q, k, v, bias, mask, scale=scale, is_causal=causal, implementation=kernel)
        if mask is None:
            return out
        return jnp.where(_seen(mask, causal, q.shape[1], k.shape[1]), out, 0)
    return _plain(q, k, v, mask, bias, scale, causal, control or AttentionControl(), site, step)


def _plain(q, k, v, mask, bias, scale, causal, control, site, step):
    """The formula, with the seam of AttentionControl."""
    if control.qkv is not None:
        q, k, v = control.qkv((q, k, v), site, step)
    logits = jnp.einsum("bnhd,bmhd->bhnm", q, k, preferred_element_type=jnp.promote_types(q.dtype, jnp.float32))
    logits = logits * scale if bias is None else logits * scale + bias
    if control.logits is not None:
        logits = control.logits(logits, site, step)
    visible = _visible(mask, causal, q.shape[1], k.shape[1])
    if visible is not None:
        logits = jnp.where(visible, logits, jnp.finfo(logits.dtype).min)
    probs = jax.nn.softmax(logits, axis=-1)
    if visible is not None:
        probs = jnp.where(visible, probs, 0)
    if control.probs is not None:
        probs = control.probs(probs, site, step)
    return jnp.einsum("bhnm,bmhd->bnhd", probs.astype(v.dtype), v)


def _visible(mask, causal, n, m):
    """The mask with the causal triangle in it, or None where everything is visible."""
    if not causal:
        return mask
    triangle = jnp.tril(jnp.ones((1, 1, n, m), bool))
    return triangle if mask is None else mask & triangle


def _known(past, n, causal):
    """Which of the cache's keys the n tokens from past.place on may look at, [1, 1, n, length]."""
    last = past.place + (jnp.arange(n)[:, None] if causal else n - 1)
    return jnp.broadcast_to(jnp.arange(past.length) <= last, (1, 1, n, past.length))


def _seen(mask, causal, n, m):
    """Which queries may look at any key, [b, n, h, 1]."""
    return jnp.swapaxes(_visible(mask, causal, n, m).any(-1), 1, 2)[..., None]


def _has_fused_kernel(q, k, v, mask, bias):
    """Whether cuDNN's flash attention takes these arrays (its rules for head size and padded lengths)."""
    half = q.dtype in (jnp.bfloat16, jnp.float16) and q.dtype == k.dtype == v.dtype
    if platform.backend() != "gpu" or not half or bias is not None:  # it gives some bias shapes no gradient
        return False
    device = jax.local_devices()[0]
    if "NVIDIA" not in device.device_kind or float(getattr(device, "compute_capability", 0)) < 8:
        return False
    even = mask is None or (q.shape[1] % 2 == 0 and k.shape[1] % 2 == 0)
    return even and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128


def keeping(module: nn.Module, control: AttentionControl | None) -> AttentionControl | None:
    """The control of one module, in which `keep` is a part of `probs`: what it gives is sown in the collection "kept".

    module: the one that calls `attention`; a collection that is not mutable takes nothing.
    """
    if control is None or not control.keep:
        return control

    def probs(array, site, step):
        array = array if control.probs is None else control.probs(array, site, step)
        for name, part in control.keep.items():
            value = part(array, site, step)
            if value is not None:
                module.sow("kept", name, value)
        return array

    return control._replace(probs=probs, keep=None)


def kept(collections: Mapping[str, Any]) -> dict[str, dict[str, tuple]]:
    """{name: {path of the module: its arrays}} of the collections of `apply(..., mutable=["kept"])`.

    Each array is what `AttentionControl.keep` gave, [b, ...], and [b, depth, ...] of layers in a scan.
    """
    found: dict[str, dict[str, tuple]] = {}
    for (*path, name), arrays in flatten_dict(collections.get("kept", {})).items():
        found.setdefault(name, {})["/".join(path)] = arrays
    return found


def multi_axis(q, k, v, grid: tuple[int, int], block: int, **kwargs) -> Float[Array, "b n h d"]:
    """Attention at O(n) cost on a grid of tokens: half of the heads look inside blocks, half across them.

    q, k, v: [b, rows * columns, h, d] in row-major order; grid: (rows, columns), multiples of `block`; h is even.
    The first half of the heads attends within each block of `block` x `block` tokens, the second half among the tokens
    that have the same place in every block (a dilated grid), so one layer mixes near and far: the multi-axis attention
    of HiT (Zhao et al. 2021), whose heads are split as here; MaxViT (Tu et al. 2022) alternates instead.
    Raises ValueError where heads or grid do not divide.
    """
    (rows, columns), heads = grid, q.shape[2]
    if rows % block or columns % block or heads % 2:
        raise ValueError(f"multi_axis: grid {grid} must be divisible by block {block}, and heads {heads} by 2")
    shape = (rows // block, block, columns // block, block)

    def split(x, order):  # [b, n, h, d] -> [b * groups, group size, h, d]
        x = x.reshape(x.shape[0], *shape, *x.shape[2:]).transpose(0, *order, 5, 6)
        return x.reshape(-1, x.shape[3] * x.shape[4], *x.shape[5:])

    def join(x, order):
        sizes = [shape[axis - 1] for axis in order]
        x = x.reshape(q.shape[0], *sizes, *x.shape[2:])
        back = [0] + [order.index(axis) + 1 for axis in (1, 2, 3, 4)] + [5, 6]
        return x.transpose(back).reshape(q.shape[0], rows * columns, *x.shape[5:])

    half, outs = heads // 2, []
    for part, order in ((slice(0, half), (1, 3, 2, 4)), (slice(half, heads), (2, 4, 1, 3))):
        outs.append(join(attention(*(split(a[:, :, part], order) for a in (q, k, v)), **kwargs), order))
    return jnp.concatenate(outs, axis=2)


class MultiHeadAttention(nn.Module):
    """Project, attend, project back; self-attention, or cross-attention where a context is given.

    heads, head_dim: number of heads and the size of each (width / heads by default).  out_dim: width of the result
      (that of x by default).  out_init: initialiser of that projection (kernel_init by default).
    qkv_bias, out_bias: whether the projections carry biases.  scale: of the logits; 1 / sqrt(head_dim) by default.
    qk_norm: None, "layer" or "rms": norm of each head's queries and keys (ViT-22B, Dehghani et al. 2023).
    axes: (rows, columns, block) for `multi_axis` self-attention.
    Parameters: q, k, v, out; q_norm, k_norm; and k_<name>, v_<name> for every named context.
    """

    heads: int
    head_dim: int | None = None
    qkv_bias: bool = True
    out_bias: bool = True
    scale: float | None = None
    qk_norm: str | None = None
    qk_norm_eps: float = 1e-6
    axes: tuple[int, int, int] | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: Any = nn.initializers.xavier_uniform()
    out_dim: int | None = None
    out_init: Any = None

    @nn.compact
    def __call__(
        self,
        x,
        context=None,
        mask=None,
        *,
        bias=None,
        causal=False,
        contexts: Mapping[str, tuple] = {},
        values=None,
        core: Callable[..., Array] | None = None,
        past: Past | None = None,
        layer: Any = 0,
        control: AttentionControl | None = None,
        step: Step | None = None,
    ):
        """x: [b, n, width] -> [b, n, out_dim or width].

        context: [b, m, any width], or None for self-attention.  mask: bool [b, m] of the keys, or broadcastable to
        [b, heads, n, m].  contexts: {name: (context, mask or None, strength)}: further contexts with keys and values of
        their own, whose results are added with their strengths ahead of the output projection (IP-Adapter, Ye et al.
        2023).  values: what v is projected from, where keys and values differ; the context's tokens with and without
        positions, say.  core: takes the place of `attention` and is called as it.
        past: x are the tokens from past.place on, and those before are remembered; mask and bias then have past.length
        keys.  Of self-attention alone.
        layer: index of the layer, for `control`.
        Raises ValueError where the width does not divide into heads, qk_norm is unknown, or there is a past and a
        context or axes.
        """
        width = x.shape[-1]
        if self.head_dim is None and width % self.heads:
            raise ValueError(f"MultiHeadAttention: width {width} is not divisible by heads {self.heads}; set head_dim")
        head_dim, control = self.head_dim or width // self.heads, keeping(self, control)
        dense = dict(dtype=self.dtype, param_dtype=self.param_dtype, kernel_init=self.kernel_init)

        def project(inputs, name):
            y = linear(self.heads * head_dim, use_bias=self.qkv_bias, name=name, **dense)(inputs)
            y = y.reshape(*y.shape[:-1], self.heads, head_dim)  # [b, n, h, d]
            if self.qk_norm and name != "v" and not name.startswith("v_"):
                y = self._head_norm(name + "_norm")(y)
            return y

        if past is not None and (context is not None or self.axes is not None):
            raise ValueError("MultiHeadAttention: a past is of self-attention to all tokens; got a context or axes too")

        def attend(q, source, mask, suffix, values=None, past=None, **kwargs):
            k, v = project(source, "k" + suffix), project(source if values is None else values, "v" + suffix)
            mask = mask[:, None, None, :] if mask is not None and mask.ndim == 2 else mask
            if past is not None:
                k, v = (self._remember(name, x, past) for name, x in (("keys", k), ("values", v)))
                seen = _known(past, q.shape[1], kwargs.pop("causal"))
                mask = seen if mask is None else mask & seen
            site = Site("self" if source is x else "cross", "/".join(self.path) + suffix.replace("_", "/", 1), layer)
            kwargs = dict(kwargs, mask=mask, scale=self.scale, control=control, site=site, step=step)
            if self.axes is None:
                return (core or attention)(q, k, v, **kwargs)
            return multi_axis(q, k, v, self.axes[:2], self.axes[2], **kwargs)

        q = project(x, "q")
        out = attend(q, x if context is None else context, mask, "", values, past, bias=bias, causal=causal)
        for name, (source, source_mask, strength) in contexts.items():
            out = out + jnp.asarray(strength, out.dtype) * attend(q, source, source_mask, "_" + name)
        out = out.reshape(*out.shape[:2], self.heads * head_dim)
        dense["kernel_init"] = self.out_init or self.kernel_init
        return linear(self.out_dim or width, use_bias=self.out_bias, name="out", **dense)(out)

    def _remember(self, name, x, past):
        """The cache [b, past.length, h, d] of that name, with x [b, n, h, d] in it."""
        cache = self.variable("cache", name, jnp.zeros, (x.shape[0], past.length, *x.shape[2:]), x.dtype)
        cache.value = jax.lax.dynamic_update_slice_in_dim(cache.value, x.astype(cache.value.dtype), past.place, 1)
        return cache.value

    def _head_norm(self, name):
        kwargs = dict(epsilon=self.qk_norm_eps, dtype=self.dtype, param_dtype=self.param_dtype, name=name)
        if self.qk_norm == "layer":
            return nn.LayerNorm(use_fast_variance=False, **kwargs)
        if self.qk_norm == "rms":
            return nn.RMSNorm(use_fast_variance=False, **kwargs)
        raise ValueError(f"MultiHeadAttention: qk_norm must be None, 'layer' or 'rms', got {self.qk_norm!r}")
