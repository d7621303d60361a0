"""Transformer blocks, and `stack`, which runs many of them as one scan over stacked parameters."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vgen import sharding
from vgen.layers.attention import MultiHeadAttention
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
    """A norm over the last axis: "layer", "layer_nobias" (scale alone) or "rms"; statistics are at least float32.

    Raises ValueError for another kind.
    """
    kwargs = dict(kwargs, epsilon=eps, name=name, use_fast_variance=False)  # E[x^2] - E[x]^2 cancels
    if kind == "rms":
        return nn.RMSNorm(**kwargs)
    if kind in ("layer", "layer_nobias"):
        return nn.LayerNorm(use_bias=kind == "layer", **kwargs)
    raise ValueError(f"norm_layer: kind must be 'layer', 'layer_nobias' or 'rms', got {kind!r}")


class MLP(nn.Module):
    """fc2(act(fc1 x)), or gated: fc2(act(gate x) * fc1 x) (GLU variants, Shazeer 2020).

    dim: hidden width.  mid_norm: kind of a norm ahead of fc2 (NormFormer, Shleifer et al. 2021), or None.
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

    @nn.compact
    def __call__(self, x, train: bool = False):
        kwargs = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        dense = dict(use_bias=self.bias, kernel_init=self.kernel_init, **kwargs)
        act, width = activation(self.act), x.shape[-1]
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
    norm, eps: see `norm_layer`.  bias: of the projections.  axes: see `multi_axis`; self-attention only.
    Parameters: attn, attn_norm, cross, cross_norm, mlp, mlp_norm; attn_post, cross_post, mlp.mid_norm where sandwiched.
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

    @nn.compact
    def __call__(
        self,
        x,
        *,
        mask=None,
        bias=None,
        causal=False,
        context=None,
        context_mask=None,
        keep_context=None,
        layer=0,
        control=None,
        step=None,
        train=False,
    ):
        """x: [b, n, width] -> the same shape.

        mask, context_mask: bool [b, keys] or broadcastable to [b, heads, n, keys].  bias: added to the logits of
        self-attention.  context: [b, m, any].  keep_context: bool [b]; a sample that does not keep its context attends
        to its own tokens there, through the same keys and values, so that kept and dropped samples share one call
        (Muse, Chang et al. 2023, section 2.7); context and x then have one width.
        layer, control, step: for AttentionControl.  train: whether dropout (rng "dropout") is on.
        Raises ValueError for an unknown order, or a context that `cross` does not announce.
        """
        if self.order not in ("pre", "post", "sandwich"):
            raise ValueError(f"Block: order must be 'pre', 'post' or 'sandwich', got {self.order!r}")
        if self.cross != (context is not None):
            raise ValueError(f"Block: cross is {self.cross} but context is {'missing' if context is None else 'given'}")
        kwargs = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        heads = dict(
            heads=self.heads,
            head_dim=self.head_dim,
            qkv_bias=self.bias,
            out_bias=self.bias,
            scale=self.scale,
            qk_norm=self.qk_norm,
            qk_norm_eps=self.eps,
            kernel_init=self.kernel_init,
            **kwargs,
        )
        probe = dict(layer=layer, control=control, step=step)

        def residual(x, f, name):
            norm = norm_layer(self.norm, self.eps, name + "_norm", **kwargs)
            drop = nn.Dropout(self.dropout, deterministic=not train)
            if self.order == "post":
                return norm(x + drop(f(x)))
            y = f(norm(x))
            if self.order == "sandwich" and name != "mlp":
                y = norm_layer(self.norm, self.eps, name + "_post", **kwargs)(y)
            return x + drop(y)

        attn = MultiHeadAttention(axes=self.axes, name="attn", **heads)
        x = residual(x, lambda h: attn(h, mask=mask, bias=bias, causal=causal, **probe), "attn")
        if self.cross:
            look = MultiHeadAttention(name="cross", **heads)
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


def _or_self(h, context, mask, keep):
    """(context, mask) where each sample sees its context if `keep`, else its own tokens h."""
    if keep is None:
        return context, mask
    seen = jnp.ones(context.shape[:2], bool) if mask is None else mask
    own = jnp.broadcast_to(~keep[:, None], h.shape[:2])
    mask = jnp.concatenate([seen & keep[:, None], own], axis=1)  # [b, m + n]
    return jnp.concatenate([context.astype(h.dtype), h], axis=1), mask


_REMAT = {"full": None, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}


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
    if remat != "none" and remat not in _REMAT:
        raise ValueError(f"stack: remat must be 'none', {', '.join(map(repr, _REMAT))}, got {remat!r}")

    def body(block, x, layer):
        x = block(x, layer=layer, **kwargs)
        x = (constrain or sharding.constrain)(x)
        return x, (x if collect else None)

    if remat != "none":
        body = nn.remat(body, policy=_REMAT[remat], prevent_cse=False)
    scan = nn.scan(
        body,
        {"params": 0, "intermediates": 0},
        split_rngs={"params": True, "dropout": True},
        length=depth,
        unroll=unroll,
    )
    x, states = scan(block, x, jnp.arange(depth))
    return (x, states) if collect else x
