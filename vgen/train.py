"""The only training loop.

`make_step` turns a task and its optimisers into one pure step; `fit` runs it with data, checkpoints, logs and hooks.
A loss, a network or a data set never appears here.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from vgen import optim, platform, sharding, trees
from vgen import state as states
from vgen.config import UserError, call
from vgen.types import Context, Task


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Settings of one training run.

    steps: 0 = nothing is trained (see `vgen.fields.StageConfig`).  batch_size: global examples per step.
    optim: {group: arguments of `optim.optimizer` without `steps`}.
    groups: replaces the task's own {group: regex} ({} keeps it).  ema_decay: 0 = off.
    accumulate: microbatches per step.  max_bad_steps: consecutive non-finite steps before the run is aborted.
    log_every, checkpoint_every, sample_every, eval_every: steps, 0 = never (a checkpoint is always saved at the end).
    keep, keep_every: the newest `keep` checkpoints stay, and every one whose step is a multiple of keep_every.
    rules, min_shard_size: see `sharding.spec_for`.  frozen_dtype: dtype in which frozen parameters are held.
    """

    steps: int
    batch_size: int
    optim: dict[str, dict[str, Any]]
    groups: dict[str, str] = dataclasses.field(default_factory=dict)
    ema_decay: float = 0.0
    accumulate: int = 1
    max_bad_steps: int = 20
    log_every: int = 50
    checkpoint_every: int = 0
    sample_every: int = 0
    eval_every: int = 0
    keep: int = 2
    keep_every: int = 0
    rules: Sequence[tuple[str, Sequence]] = ()
    min_shard_size: int = 2**14
    frozen_dtype: str = "float32"

    def __post_init__(self):
        for name in ("steps", "batch_size", "accumulate", "max_bad_steps", "keep"):
            least = int(name != "steps")
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.batch_size % self.accumulate:
            raise ValueError(f"batch_size {self.batch_size} does not divide into {self.accumulate} microbatches")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1), got {self.ema_decay}")
        if self.frozen_dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"frozen_dtype must be float32, bfloat16 or float16, got {self.frozen_dtype!r}")


class Diverged(UserError):
    """The loss or its gradients were not finite too many steps in a row."""


class Stopped(Exception):
    """The run was asked to stop (SIGTERM, SIGINT) and has saved its state."""


def build_optimizers(config: TrainConfig, groups: Sequence[str], where: str = "train.optim"):
    """{group: optax transformation}, {group: schedule}; ConfigError or ValueError when the groups do not match."""
    if set(config.optim) != set(groups):
        raise UserError(f"{where} must have one entry per optimiser group {sorted(groups)}, got {sorted(config.optim)}")
    built = {
        name: call(optim.optimizer, {"steps": config.steps, **config.optim[name]}, f"{where}.{name}") for name in groups
    }
    return {name: tx for name, (tx, _) in built.items()}, {name: rate for name, (_, rate) in built.items()}


def make_step(
    task: Task,
    groups: Mapping[str, Sequence[str]],
    optimizers: Mapping[str, optax.GradientTransformation],
    *,
    ema_decay: float = 0.0,
    accumulate: int = 1,
) -> states.Step:
    """The train step (state, frozen, batch) -> (state, metrics), pure and ready for jit.

    One forward and one backward pass serve every optimiser group: the losses are summed, and by the contract of
    `Task.losses` the loss of one group is constant in the parameters of the others (they are stop_gradient there).
    A step whose loss or gradients are not finite changes nothing but the counters.
    """

    def loss_fn(params, buffers, frozen, ema, step, batch, key):
        tree = trees.unflatten({**frozen, **buffers, **params})
        losses = task.losses(tree, Context(step, ema), batch, key)
        if set(losses) != set(groups):
            raise ValueError(f"task.losses returned groups {sorted(losses)}, its groups are {sorted(groups)}")
        metrics, updates = {}, {}
        for name, loss in losses.items():
            metrics["loss" if len(losses) == 1 else f"loss/{name}"] = loss.value
            metrics |= loss.metrics
            updates |= loss.updates
        unknown = sorted(set(updates) - set(buffers))
        if unknown:
            raise ValueError(f"Loss.updates has {unknown}, which the task's `buffers` regex does not cover")
        return sum(loss.value for loss in losses.values()), (metrics, updates)

    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)

    def gradients(state, frozen, batch, key):
        args = (state.params, state.buffers, frozen, trees.unflatten(state.ema) or None, state.step)
        if accumulate == 1:
            return grad_fn(*args, batch, key)
        # Row r of microbatch m is row r * accumulate + m: every microbatch stays spread over all devices.
        split = lambda x: x.reshape(x.shape[0] // accumulate, accumulate, *x.shape[1:]).swapaxes(0, 1)
        micro = jax.tree.map(split, batch)
        one = lambda i: grad_fn(*args, jax.tree.map(lambda x: x[i], micro), jax.random.fold_in(key, i))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(one, 0))
        total = jax.lax.fori_loop(0, accumulate, lambda i, acc: jax.tree.map(jnp.add, acc, one(i)), zeros)
        return jax.tree.map(lambda x: x / accumulate, total)

    def step(state: states.State, frozen, batch):
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        (value, (metrics, updates)), grads = gradients(state, frozen, batch, key)
        good = jnp.isfinite(value) & jnp.isfinite(optax.global_norm(grads))
        params, opt = dict(state.params), {}
        for name, paths in groups.items():
            mine = {path: state.params[path] for path in paths}
            delta, opt[name] = optimizers[name].update({p: grads[p] for p in paths}, state.opt[name], mine)
            params |= optax.apply_updates(mine, delta)
            suffix = "" if len(groups) == 1 else f"/{name}"
            metrics["grad_norm" + suffix] = optax.global_norm({p: grads[p] for p in paths})
        buffers = state.buffers | {path: value.astype(state.buffers[path].dtype) for path, value in updates.items()}
        ema = _averaged(state.ema, {**params, **buffers}, ema_decay, state.step)
        keep = lambda new, old: jax.tree.map(lambda a, b: jnp.where(good, a, b), new, old)
        bad = 1 - good.astype(jnp.int32)
        new = state.replace(
            step=state.step + 1,
            params=keep(params, state.params),
            buffers=keep(buffers, state.buffers),
            opt=keep(opt, state.opt),
            ema=keep(ema, state.ema),
            skipped=state.skipped + bad,
            bad_in_row=(state.bad_in_row + 1) * bad,
        )
        return new, metrics | {"skipped": new.skipped, "bad_in_row": new.bad_in_row}

    return step


def _averaged(ema, values, decay, step):
    """Exponential average with the usual warm-up: decay = min(decay, (1 + step) / (10 + step))."""
    if not ema:
        return {}
    rate = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    blend = lambda old, new: (old + (1 - rate) * (new - old)).astype(old.dtype)
    return {
        path: blend(old, values[path]) if jnp.issubdtype(old.dtype, jnp.floating) else values[path]
        for path, old in ema.items()
    }


@dataclasses.dataclass(frozen=True)
class Hook:
    """Work done every so many steps: run(step, state) at multiples of `every` (0 = only when `last`) and at the end."""

    every: int
    run: Callable[[int, states.State], None]
    last: bool = False

    def due(self, step: int, steps: int) -> bool:
        return bool(self.every and step % self.every == 0) or (self.last and step == steps)


def program(task: Task, config: TrainConfig, layout: states.Layout, mesh: Mesh):
    """(make, shardings, step, rates): see `state.plan`; the jitted train step, which gives its state's memory away; and
    {group: learning rate by step}.  To be called, and the step too, under `jax.set_mesh(mesh)`.
    """
    optimizers, rates = build_optimizers(config, list(layout.groups))
    make, shardings = states.plan(
        layout, optimizers, mesh, ema=config.ema_decay > 0, rules=config.rules, min_shard_size=config.min_shard_size
    )
    pure = make_step(task, layout.groups, optimizers, ema_decay=config.ema_decay, accumulate=config.accumulate)
    places = (shardings, sharding.replicated(mesh))
    options = platform.compiler_options(mesh.size)
    step = jax.jit(pure, donate_argnums=0, in_shardings=None, out_shardings=places, compiler_options=options)
    return make, shardings, step, rates


def fit(
    task: Task,
    config: TrainConfig,
    batches: Iterator[Mapping[str, jax.Array]],
    *,
    layout: states.Layout,
    mesh: Mesh,
    key: jax.Array,
    given: Mapping[str, jax.Array] | None = None,
    checkpoints=None,
    log=None,
    hooks: Sequence[Hook] = (),
    should_stop: Callable[[], bool] = lambda: False,
    around: Callable[[Callable], Callable] = lambda step: step,
) -> states.State:
    """Train `task` to `config.steps`, from the newest checkpoint if there is one, and return the final state.

    batches: global device arrays; if it has `get_state`/`set_state`, its position is saved and restored.
    given: parameters from elsewhere, by path: every frozen parameter must be there, trained ones start from it.
    checkpoints: a `checkpoint.Checkpoints` (None: nothing is saved).  log: a `log.Log` (None: silent).
    around: changes how the compiled step is called, such as `debug.guarded`.
    Raises Diverged after config.max_bad_steps non-finite steps in a row, Stopped when should_stop() became true
    (the state is saved first), UserError when a frozen parameter has no source.
    """
    frozen = place_frozen(layout.frozen, given or {}, mesh, config)
    with jax.set_mesh(mesh):
        make, shardings, train_step, rates = program(task, config, layout, mesh)
        restored = checkpoints.restore(jax.eval_shape(make, key, {}), shardings) if checkpoints else None
        if restored is None:
            state = states.create(make, shardings, key, given)
        else:
            state, position = restored
            if position is not None and hasattr(batches, "set_state"):
                batches.set_state(position)
        return _loop(config, around(train_step), state, frozen, batches, rates, checkpoints, log, hooks, should_stop)


def _loop(config, train_step, state, frozen, batches, rates, checkpoints, log, hooks, should_stop):
    """Steps, and between them: log the previous step's metrics, run the hooks, save, stop."""
    step, pending, last_log = int(state.step), None, int(state.step)
    if log:
        log.start(step, config.steps, config.batch_size)
    save = lambda: checkpoints and checkpoints.save(step, state, batches)
    clock, waited = time.perf_counter(), getattr(batches, "wait_seconds", 0.0)
    while step < config.steps:
        batch = next(batches)
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            state, metrics = train_step(state, frozen, batch)
        step += 1
        # The metrics fetched are those of the step before, so that the device never waits for the host.
        if pending is not None:
            _report(config, log, *pending)
            pending = None
        if step % (config.log_every or config.max_bad_steps) == 0 or step == config.steps:
            now, total_wait = time.perf_counter(), getattr(batches, "wait_seconds", 0.0)
            timing = {
                "step_seconds": (now - clock) / (step - last_log),
                "images_per_second": config.batch_size * (step - last_log) / (now - clock),
                "data_wait": (total_wait - waited) / (now - clock),
            }
            lr = {"lr" if len(rates) == 1 else f"lr/{name}": float(rate(step - 1)) for name, rate in rates.items()}
            pending = (step, metrics, timing | lr)
            clock, waited, last_log = now, total_wait, step
        elif log:
            log.tick(step)
        stopping = should_stop() and step < config.steps
        if pending is not None and (stopping or step == config.steps):
            _report(config, log, *pending)
            pending = None
        for hook in hooks:
            if hook.due(step, config.steps):
                hook.run(step, state)
        every = config.checkpoint_every
        if stopping or step == config.steps or (every and step % every == 0):
            save()
        if stopping:
            if checkpoints:
                checkpoints.wait()
            raise Stopped(f"stopped at step {step} of {config.steps}")
    if log:
        log.finish()
    if checkpoints:
        checkpoints.wait()
    return state


def _report(config, log, step, metrics, extra):
    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    if values.pop("bad_in_row") >= config.max_bad_steps:
        raise Diverged(
            f"the loss or its gradients were not finite for {config.max_bad_steps} steps in a row (now step {step}); "
            "lower the learning rate, set gradient clipping, or start from an earlier checkpoint"
        )
    if log and config.log_every:
        log.scalars(step, values | extra)


def frozen_dtype(dtype, config: TrainConfig):
    """The dtype in which a frozen parameter is held: config.frozen_dtype, or its own where that is of whole numbers."""
    return jnp.dtype(config.frozen_dtype) if jnp.issubdtype(dtype, jnp.floating) else dtype


def place_frozen(paths: Sequence[str], given: Mapping[str, Any], mesh: Mesh, config: TrainConfig) -> dict[str, Any]:
    """The frozen parameters on the mesh, in config.frozen_dtype; UserError naming those that nobody provides."""
    missing = [path for path in paths if path not in given]
    if missing:
        raise UserError(
            f"{len(missing)} frozen parameters have no source (e.g. {', '.join(missing[:3])}): "
            "name the stage or file they come from under the stage's `init`"
        )
    frozen = {path: given[path].astype(frozen_dtype(given[path].dtype, config)) for path in paths}
    shardings = sharding.param_shardings(frozen, mesh, config.rules, config.min_shard_size)
    return jax.device_put(frozen, shardings)
