"""Optimisers and learning-rate schedules from config; optax underneath."""

import re
from collections.abc import Sequence

import jax.numpy as jnp
import optax
import optax.contrib


def schedule(lr: float, steps: int, kind: str = "cosine", warmup: int = 0, end: float = 0.0) -> optax.Schedule:
    """Learning rate by step: linear warmup to `lr`, then `kind` down to `end` * lr at `steps`.

    kind: "constant", "cosine", "linear", "rsqrt" (lr * sqrt(warmup / step)).
    """
    decay_steps = max(steps - warmup, 1)
    if kind == "constant":
        after = optax.constant_schedule(lr)
    elif kind == "cosine":
        after = optax.cosine_decay_schedule(lr, decay_steps, alpha=end)
    elif kind == "linear":
        after = optax.linear_schedule(lr, end * lr, decay_steps)
    elif kind == "rsqrt":
        offset = max(warmup, 1)
        after = lambda step: lr * jnp.sqrt(offset / jnp.maximum(step + offset, 1))  # during warmup: any number
    else:
        raise ValueError(f"schedule kind {kind!r}: expected constant, cosine, linear or rsqrt")
    if not warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, lr, warmup), after], [warmup])


def optimizer(
    lr: float,
    steps: int,
    name: str = "adamw",
    kind: str = "cosine",
    warmup: int = 0,
    end: float = 0.0,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decay: str = r".*kernel",
    clip: float = 0.0,
    start: int = 0,
    moment_dtype: str = "float32",
    lr_scale: Sequence[tuple[str, float]] = (),
    matrices: str = r"(?!.*(logits|embed)).*kernel",
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """An optax transformation over flat parameter dicts, and its schedule (for the log).

    name: "adamw" (decoupled decay; plain Adam when weight_decay is 0), "muon" (of `matrices`, Adam with Nesterov
      momentum of the rest), "adafactor", "sgd" (momentum b1).
    matrices: regex of the parameters that "muon" orthogonalises: dense kernels [in, out], those of stacked layers
      [depth, in, out] one by one, convolutions as [h w in, out].
    decay: regex of the parameters that decay.  clip: global-norm clipping, 0 = off.
    start: updates are zero before this step (a discriminator that joins late).  moment_dtype: of the first moment.
    lr_scale: (regex, factor) pairs; the first full match scales a parameter's learning rate.
    """
    rate = schedule(lr, steps, kind, warmup, end)
    mask = lambda params: {path: bool(re.fullmatch(decay, path)) for path in params}
    parts = [optax.clip_by_global_norm(clip)] if clip else []
    if name == "adamw":
        parts.append(optax.scale_by_adam(b1, b2, eps, mu_dtype=jnp.dtype(moment_dtype)))
    elif name == "adafactor":
        # Shazeer & Stern 2018 with a given learning rate and, as Muse and Parti use it, a first moment.
        parts.append(optax.scale_by_factored_rms(decay_rate=0.8, min_dim_size_to_factor=128))
        parts.append(optax.clip_by_block_rms(1.0))
        parts.append(optax.ema(b1, debias=False, accumulator_dtype=jnp.dtype(moment_dtype)))
    elif name == "muon":
        parts.append(_muon(b1, b2, eps, matrices, moment_dtype))
    elif name == "sgd":
        parts.append(optax.trace(b1, accumulator_dtype=jnp.dtype(moment_dtype)))
    else:
        raise ValueError(f"optimizer name {name!r}: expected adamw, muon, adafactor or sgd")
    if weight_decay:
        parts.append(optax.add_decayed_weights(weight_decay, mask))
    parts.append(optax.scale_by_learning_rate(rate))
    if lr_scale:
        parts.append(_scale_by_path(lr_scale))
    if start:
        parts.append(optax.scale_by_schedule(lambda step: jnp.where(step < start, 0.0, 1.0)))
    return optax.chain(*parts), rate


def _scale_by_path(lr_scale) -> optax.GradientTransformation:
    def factor(path):
        return next((scale for pattern, scale in lr_scale if re.fullmatch(pattern, path)), 1.0)

    return optax.stateless(lambda updates, _: {path: factor(path) * update for path, update in updates.items()})


def _muon(b1, b2, eps, matrices, moment_dtype) -> optax.GradientTransformation:
    """Orthogonalised momentum (Jordan et al. 2024), scaled to the size of Adam's updates (Liu et al. 2025, eq. 4)."""

    def dimensions(params):
        found = {}
        for path, leaf in params.items():  # partition() also calls this with the other optimiser's leaves masked
            plain = isinstance(leaf, optax.MaskedNode) or leaf.ndim < 2 or not re.fullmatch(matrices, path)
            inputs = None if plain else leaf.ndim - 2 if leaf.ndim < 4 else tuple(range(leaf.ndim - 1))
            found[path] = None if plain else optax.contrib.MuonDimensionNumbers(inputs, leaf.ndim - 1)
        return found

    muon = optax.contrib.muon(
        1.0, adam_b1=b1, adam_b2=b2, eps=eps, mu_dtype=jnp.dtype(moment_dtype), consistent_rms=0.2,
        muon_weight_dimension_numbers=dimensions,
    )  # fmt: skip
    return optax.chain(muon, optax.scale(-1.0))  # a direction, as the other optimisers give it; the rate follows
