"""The contracts: what a task, a denoiser, a sampler, an intervention and an adapter are.

Everything in vgen is a function handed to one of two loops: `vgen.train.fit` and `vgen.sample.sample`.
The types here are the shapes of those functions; they import nothing from the rest of the package.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

from jax import Array

Params = Mapping[str, Any]
Batch = Mapping[str, Any]
Metrics = Mapping[str, Any]


# --------------------------------------------------------------------------------------------------------- training


class Context(NamedTuple):
    """What a loss may look at beside its parameters and batch.

    step: int32 scalar, the optimiser step (traced).
    ema: the averaged parameters (same tree as the trained ones), or None when the run keeps none.
    train: whether dropout, condition dropping and statistics updates are on.
    """

    step: Array
    ema: Params | None = None
    train: bool = True


class Loss(NamedTuple):
    """One optimiser group's loss.

    value: scalar, what the group minimises.
    metrics: scalars to log.
    updates: new values of buffers (parameters that no gradient trains: codebook averages, batch statistics) as a flat
      dict {path: array}; they are averaged over microbatches and written after the optimiser step.
    """

    value: Array
    metrics: Metrics
    updates: Mapping[str, Array] = {}


@runtime_checkable
class Task(Protocol):
    """Networks and an objective; a task knows nothing of optimisers, meshes, logging or checkpoints.

    groups: {optimiser group: regex}; a parameter belongs to the first group whose regex fully matches its path
      ("decoder/conv_in/kernel"). Parameters in no group and not in `buffers` are frozen.
    buffers: regex of parameters that change without a gradient, through `Loss.updates`.
    """

    groups: Mapping[str, str]
    buffers: str

    def init(self, key: Array, batch: Batch) -> Params: ...

    def losses(self, params: Params, ctx: Context, batch: Batch, key: Array) -> Mapping[str, Loss]: ...

    def sample(self, params: Params, key: Array, conds: Mapping[str, Any], **knobs) -> Mapping[str, Array]: ...

    def evaluate(self, params: Params, batches: Iterable[Batch], key: Array) -> Metrics: ...


# --------------------------------------------------------------------------------------------------------- sampling


class Step(NamedTuple):
    """One row of a sampling grid; every field is a scalar inside the loop and [steps] outside.

    i: int32 index of the step. t, t_next: time before and after (diffusion time, or decoding progress in [0, 1]).
    alpha, sigma: signal and noise scale at t (for tokens: kept and masked fraction); *_next: the same at t_next.
    """

    i: Array
    t: Array
    t_next: Array
    alpha: Array
    sigma: Array
    alpha_next: Array
    sigma_next: Array


class Prediction(NamedTuple):
    """What a denoiser says of the clean sample.

    x0: the estimate (pixels or latents; for tokens, logits [b, n, vocab]). aux: learned variance, attention maps, ...
    """

    x0: Array
    aux: Any = None


Denoiser = Callable[[Any, Step], Prediction]


class Sampler(NamedTuple):
    """A sampling rule as pure functions, the way optax writes optimisers.

    init: (x) -> state.
    step: (key, x, pred, step, state) -> (x_next, state).
    renoise: (key, x0, step) -> x at step's noise level.
    """

    init: Callable[..., Any]
    step: Callable[..., Any]
    renoise: Callable[..., Any] | None = None


class Intervention(NamedTuple):
    """A hook of the sampling loop; any part may be None.

    init: (x) -> state.
    before: (key, x, step, state) -> (x, state), ahead of the denoiser.
    after: (key, x_next, x, pred, step, state) -> (x_next, state), behind the sampler.
    """

    init: Callable[..., Any] | None = None
    before: Callable[..., Any] | None = None
    after: Callable[..., Any] | None = None


class AttentionControl(NamedTuple):
    """The seam of the one attention function: parts are (arrays, site, step) -> arrays, None keeps the fused kernel.

    keep: {name: (probs, site, step) -> array [b, ...] or None}, which looks at the final probs and changes nothing:
      what it gives leaves the network beside its output, see `vgen.layers.attention.kept`.
    """

    qkv: Callable[..., Any] | None = None
    logits: Callable[..., Any] | None = None
    probs: Callable[..., Any] | None = None
    keep: Mapping[str, Callable[..., Any]] | None = None


@dataclasses.dataclass(frozen=True)
class Edit:
    """An editing method: the places of the sampling loop that it may touch.

    start: the state the loop begins from. times: the sampling grid, if not the default one.
    guidance: wraps the denoiser. hook: an Intervention. control: an AttentionControl. sampler: replaces the sampler.
    """

    start: Any = None
    times: Any = None
    guidance: Callable[[Denoiser], Denoiser] | None = None
    hook: Intervention | None = None
    control: AttentionControl | None = None
    sampler: Sampler | None = None


class Adapter(NamedTuple):
    """A change of weights as data. init: (key, params) -> delta; merge: (params, delta) -> params."""

    init: Callable[..., Any]
    merge: Callable[..., Any]
