"""Transformer blocks, and `stack`, which runs many of them as one scan over stacked parameters."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vgen import sharding
from vgen.layers.attention import MultiHeadAttention, Past
from vgen.layers.embed import RelativeBias2D
from vgen.layers.linear import linear


def activation(name: str) -> Callable[[jax.Array], jax.Array]:
    """An activation by name; "gelu" is the exact one, "gelu_tanh" its approximation, "quick_gelu" x sigmoid(1.702 x).

    Raises ValueError for a name not in the list.
    """
    known = {
        "gelu": lambda x: jax.nn.gelu(x, approximate=False),
        "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
        "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
        "relu": jax.nn.relu,
        "silu": jax.nn.silu,
    }
    if name not in known:
        raise ValueError(f"activation: must be one of {', '.join(known)}, got {name!r}")
    return known[name]


def norm_layer(kind: str, eps: float, name: str | None = None, **kwargs) -> nn.Module:
    """A norm over the last axis: "layer", "layer_nobias" (scale alone), "layer_plain" (no parameters) or "rms".

    Statistics are at least float32.

    Raises ValueError for another kind.
    """
    kwargs = dict(kwargs, epsilon=eps, name=name, use_fast_variance=False)  # E[x^2] - E[x]^2 cancels
    if kind == "rms":
        return nn.RMSNorm(**kwargs)
    if kind in ("layer", "layer_nobias", "layer_plain"):
        return nn.LayerNorm(use_bias=kind == "layer", use_scale=kind != "layer_plain", **kwargs)
    raise ValueError(f"norm_layer: kind must be 'layer', 'layer_nobias', 'layer_plain' or 'rms', got {kind!r}")


def modulate(x: jax.Array, cond: jax.Array, **kwargs) -> jax.Array:
    """x (1 + scale) + shift, scale and shift [b, width] being linear in silu(cond) (adaLN, Peebles & Xie 2023).

    x: [b, ..., width].  cond: [b, any].  kwargs: of the one linear layer that makes both, scale first.
    """
    scale, shift = jnp.split(linear(2 * x.shape[-1], **kwargs)(jax.nn.silu(cond)), 2, axis=-1)
    axes = tuple(range(1, x.ndim - 1))
    return x * (1 + jnp.expand_dims(scale, axes)) + jnp.expand_dims(shift, axes)


class MLP(nn.Module):
    """fc2(act(fc1 x)), or gated: fc2(act(gate x) * fc1 x) (GLU variants, Shazeer 2020; SwiGLU: act "silu").

    dim: hidden width.  mid_norm: kind of a norm ahead of fc2 (NormFormer, Shleifer et al. 2021), or None.
    out_dim: width of the result, that of x by default.
    """

    dim: int
    act: str = "gelu_tanh"
    gated: bool = False
    bias: bool = True
    mid_norm: str | None = None
    eps: float = 1e-6
    dropout: float = 0.0
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: Any = nn.initializers.xavier_uniform()
    out_dim: int | None = None

    @nn.compact
    def __call__(self, x, train: bool = False):
        kwargs = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        dense = dict(use_bias=self.bias, kernel_init=self.kernel_init, **kwargs)
        act, width = activation(self.act), self.out_dim or x.shape[-1]
        hidden = linear(self.dim, name="fc1", **dense)(x)  # [b, n, dim]
        hidden = act(linear(self.dim, name="gate", **dense)(x)) * hidden if self.gated else act(hidden)
        if self.mid_norm is not None:
            hidden = norm_layer(self.mid_norm, self.eps, "mid_norm", **kwargs)(hidden)
        hidden = nn.Dropout(self.dropout, deterministic=not train)(hidden)
        return linear(width, name="fc2", **dense)(hidden)


class Block(nn.Module):
    """Self-attention, cross-attention if `cross`, MLP, each with a norm and a residual.

    order: "pre": x + f(norm x); "post": norm(x + f x), as BERT; "sandwich": x + norm(f(norm x)), with a norm inside the
    MLP as well (NormFormer, Shleifer et al. 2021).
    norm, eps: see `norm_layer`.  bias: of the projections; qkv_bias: of queries, keys and values (None: as `bias`).
    axes: see `multi_axis`; self-attention only.
    layer_scale: initial value of a learned factor per channel on each branch (CaiT, Touvron et al. 2021), None: none.
    drop_path: probability that a training sample skips a branch (stochastic depth, Huang et al. 2016), the others are
    divided by what is left; a tuple holds one for every layer of a stack, see `drop_path_rates`.
    mlp_norm: kind of the MLP's norm, `norm` by default.
    only_cross: the self-attention looks at the context instead, as the cross-attention does.
    relative: (rows, columns) of a grid of tokens, whose offsets bias the self-attention (each layer has a
    `RelativeBias2D` of its own), or None.
    Parameters: attn, attn_norm, cross, cross_norm, mlp, mlp_norm; attn_post, cross_post, mlp.mid_norm where sandwiched;
    attn_scale, cross_scale, mlp_scale [width] with layer_scale; attn_mod, cross_mod, mlp_mod where a cond is given;
    attn_bias with relative.
    """

    heads: int
    mlp_dim: int
    head_dim: int | None = None
    cross: bool = False
    order: str = "pre"
    norm: str = "layer"
    eps: float = 1e-6
    act: str = "gelu_tanh"
    gated: bool = False
    bias: bool = True
    scale: float | None = None
    qk_norm: str | None = None
    axes: tuple[int, int, int] | None = None
    dropout: float = 0.0
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: Any = nn.initializers.xavier_uniform()
    qkv_bias: bool | None = None
    layer_scale: float | None = None
    drop_path: float | tuple[float, ...] = 0.0
    mlp_norm: str | None = None
    only_cross: bool = False
    relative: tuple[int, int] | None = None

    @nn.compact
    def __call__(
        self,
        x,
        *,
        cond=None,
        mask=None,
        bias=None,
        causal=False,
        context=None,
        context_mask=None,
        keep_context=None,
        contexts: Mapping[str, tuple] = {},
        past: Past | None = None,
        layer=0,
        control=None,
        step=None,
        train=False,
    ):
        """x: [b, n, width] -> the same shape.

        cond: [b, any], a condition that scales and shifts what every norm gives (`modulate`); order "pre" alone.
        mask, context_mask: bool [b, keys] or broadcastable to [b, heads, n, keys]; mask may be a function of the
        layer's index that gives one.  bias: added to the logits of self-attention.  context: [b, m, any].
        keep_context: bool [b]; a sample that does not keep its context attends to its own tokens there, through the
        same keys and values, so that kept and dropped samples share one call (Muse, Chang et al. 2023, section 2.7);
        context and x then have one width.
        contexts: named contexts of the cross-attention, past: what self-attention remembers, see `MultiHeadAttention`.
        layer, control, step: for AttentionControl.  train: whether dropout (rng "dropout") is on.
        Raises ValueError for an unknown order, a cond in another one than "pre", a context that `cross` does not
        announce, or a past together with `relative`.
        """
        self._check(cond, context, past)
        mask = mask(layer) if callable(mask) else mask
        kwargs = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        heads = dict(
            heads=self.heads,
            head_dim=self.head_dim,
            qkv_bias=self.bias if self.qkv_bias is None else self.qkv_bias,
            out_bias=self.bias,
            scale=self.scale,
            qk_norm=self.qk_norm,
            qk_norm_eps=self.eps,
            kernel_init=self.kernel_init,
            **kwargs,
        )
        probe = dict(layer=layer, control=control, step=step)
        residual = functools.partial(self._residual, cond=cond, layer=layer, train=train)
        if self.relative is not None:
            near = RelativeBias2D(self.heads, self.relative, self.param_dtype, name="attn_bias")()
            bias = near if bias is None else bias + near
        attn = MultiHeadAttention(axes=self.axes, name="attn", **heads)
        own = dict(context=context, mask=context_mask) if self.only_cross else dict(mask=mask)
        x = residual(x, lambda h: attn(h, **own, bias=bias, causal=causal, past=past, **probe), "attn")
        if self.cross:
            look, probe = MultiHeadAttention(name="cross", **heads), dict(probe, contexts=contexts)
            x = residual(x, lambda h: look(h, *_or_self(h, context, context_mask, keep_context), **probe), "cross")
        mlp = MLP(
            self.mlp_dim,
            self.act,
            self.gated,
            self.bias,
            self.norm if self.order == "sandwich" else None,
            self.eps,
            self.dropout,
            kernel_init=self.kernel_init,
            name="mlp",
            **kwargs,
        )
        return residual(x, lambda h: mlp(h, train), "mlp")

    def _check(self, cond, context, past):
        if self.order not in ("pre", "post", "sandwich"):
            raise ValueError(f"Block: order must be 'pre', 'post' or 'sandwich', got {self.order!r}")
        if cond is not None and self.order != "pre":
            raise ValueError(f"Block: cond needs order 'pre', got {self.order!r}")
        if past is not None and self.relative is not None:
            raise ValueError("Block: relative positions are of all tokens at once; got a past too")
        if self.cross != (context is not None):
            raise ValueError(f"Block: cross is {self.cross} but context is {'missing' if context is None else 'given'}")

    def _residual(self, x, f, name, *, cond, layer, train):
        """x and its branch `f`, with the norms that `order` puts around them."""
        kwargs = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        kind = self.mlp_norm or self.norm if name == "mlp" else self.norm
        norm = norm_layer(kind, self.eps, name + "_norm", **kwargs)
        y = x if self.order == "post" else norm(x)
        if cond is not None:
            y = modulate(y, cond, name=name + "_mod", use_bias=self.bias, **kwargs)
        y = f(y)
        if self.order == "sandwich" and name != "mlp":
            y = norm_layer(self.norm, self.eps, name + "_post", **kwargs)(y)
        y = self._branch(nn.Dropout(self.dropout, deterministic=not train)(y), name, layer, train)
        return norm(x + y) if self.order == "post" else x + y

    def _branch(self, y, name, layer, train):
        """LayerScale and stochastic depth of one branch."""
        if self.layer_scale is not None:
            init = nn.initializers.constant(self.layer_scale)
            y = y * self.param(name + "_scale", init, y.shape[-1:], self.param_dtype).astype(y.dtype)
        if not train or not np.any(self.drop_path):
            return y
        keep = 1 - jnp.asarray(self.drop_path, y.dtype)
        keep = keep if keep.ndim == 0 else keep[layer]
        kept = jax.random.bernoulli(self.make_rng("dropout"), keep, (y.shape[0],) + (1,) * (y.ndim - 1))
        return jnp.where(kept, y / keep, 0)


def drop_path_rates(last: float, depth: int) -> tuple[float, ...]:
    """Rates of stochastic depth that rise linearly from 0 in the first layer to `last` in the last one."""
    return tuple(last * i / max(depth - 1, 1) for i in range(depth)) if last else ()


def _or_self(h, context, mask, keep):
    """(context, mask) where each sample sees its context if `keep`, else its own tokens h."""
    if keep is None:
        return context, mask
    seen = jnp.ones(context.shape[:2], bool) if mask is None else mask
    own = jnp.broadcast_to(~keep[:, None], h.shape[:2])
    mask = jnp.concatenate([seen & keep[:, None], own], axis=1)  # [b, m + n]
    return jnp.concatenate([context.astype(h.dtype), h], axis=1), mask


_REMAT = {"full": None, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}


def rematted(body: Callable, remat: str, **kwargs) -> Callable:
    """flax's remat of body(module, ...) by a name: "none", "dots" (all but products of weights are recomputed), "full".

    kwargs: of `nn.remat`.  Raises ValueError for another name.
    """
    if remat == "none":
        return body
    if remat not in _REMAT:
        raise ValueError(f"remat must be 'none', {', '.join(map(repr, _REMAT))}, got {remat!r}")
    return nn.remat(body, policy=_REMAT[remat], **kwargs)


def stack(
    block: nn.Module, x, *, depth: int, remat: str = "none", unroll: int = 1, constrain=None, collect=False, **kwargs
):
    """Run `depth` copies of `block` one behind the other, their parameters stacked [depth, ...] under the block's name.

    Call it in the compact method of the module that owns the block: x = stack(Block(..., name="layers"), x, depth=24).
    remat: what the backward pass recomputes: "none", "dots" (all but matrix products of weights) or "full".
    unroll: layers per loop iteration; `depth` leaves no loop, which is faster where layers are small.
    constrain: x -> x between layers (None: `vgen.sharding.constrain`, the batch axis over the mesh).
    collect: return (x, every layer's output
    [depth, b, n, width]).  kwargs go to every layer, which also receives layer=its traced index.
    Raises ValueError for an unknown remat.
    """

    def body(block, x, layer):
        x = block(x, layer=layer, **kwargs)
        x = (constrain or sharding.constrain)(x)
        return x, (x if collect else None)

    scan = nn.scan(
        rematted(body, remat, prevent_cse=False),
        {"params": 0, "intermediates": 0, "cache": 0, "kept": 1},
        split_rngs={"params": True, "dropout": True},
        length=depth,
        unroll=unroll,
    )
    x, states = scan(block, x, jnp.arange(depth))
    return (x, states) if collect else x


class Stacked(nn.Module, kw_only=True):
    """What networks made of stacks of blocks share: how they run them.

    remat, unroll, constrain: see `stack`.  dtype: of the computation, None for that of inputs and parameters.
    """

    remat: str = "none"
    unroll: int = 1
    constrain: Any = None
    dtype: Any = None

    def run_stack(self, block: nn.Module, x, *, depth: int, **kwargs):
        """`stack` with the fields of this module; call it in its compact method."""
        run = dict(remat=self.remat, unroll=self.unroll, constrain=self.constrain)
        return stack(block, x, depth=depth, **run, **kwargs)
