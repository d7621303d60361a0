"""What `--config.debug=true` and `--config.profile=true` turn on.

Debugging names the layer whose output is not finite, or the parameter whose gradient is not; it checks shapes and types
where functions of `vgen` tell them (jaxtyping and beartype), and lets nothing move between host and device inside of a
step.  All of that costs time.  Profiling writes what a few steps did.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vgen import trees
from vgen.config import UserError


def guarded(step: Callable[..., Any]) -> Callable[..., Any]:
    """The step, inside of which an array that has to be moved between host and device is an error."""

    def run(*args):
        with jax.transfer_guard("disallow"):
            return step(*args)

    return run


class Trace:
    """A hook that writes a trace of some steps, as TensorBoard's plugin XProf and ui.perfetto.dev open it.

    folder: what is written is below plugins/profile there.  first, last: steps, from 1, counted from the beginning of
    this process's run; the first of all compiles.
    """

    def __init__(self, folder: str | Path, first: int, last: int):
        if not 2 <= first <= last:
            raise UserError(f"config.profile_steps must be (first, last) with 2 <= first <= last, got {(first, last)}")
        self.folder, self.first, self.last = Path(folder), first, last
        self.count, self.running = 0, False

    def __call__(self, step: int, state: Any) -> None:
        self.count += 1
        if self.count == self.first - 1:
            jax.block_until_ready(state)
            jax.profiler.start_trace(str(self.folder))
            self.running = True
        elif self.count == self.last:
            jax.block_until_ready(state)
            self.close()

    def close(self) -> None:
        """End a trace that is running, of a run that ended before its last step."""
        if self.running:
            jax.profiler.stop_trace()
            self.running = False


class NotFinite(UserError):
    """A layer's output, a loss or a gradient is not finite."""


class Watch:
    """Looks at what the layers of tasks give while they are trained.

    After `watched = watch(task)` in the place of the task, `check(step)` behind every step raises NotFinite.
    """

    def __init__(self):
        self._names: list[str] = []  # by the order in which the program has them
        self._found: set[int] = set()

    def __call__(self, task: Any) -> Any:
        return _Watched(task, self)

    def check(self, step: int, state: Any = None) -> None:
        """Wait for the step; raises NotFinite with the first place where something was not finite."""
        jax.block_until_ready(state)
        if self._found:
            name, self._found = self._names[min(self._found)], set()
            raise NotFinite(f"step {step}: {name} is not finite (config.debug)")

    def look(self, name: str, tree: Any) -> Any:
        """The same arrays; the program notes whether one of them is not finite."""
        leaves, structure = jax.tree.flatten(tree)
        places = [i for i, x in enumerate(leaves) if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jnp.inexact)]
        if not places:
            return tree
        good = functools.reduce(jnp.logical_and, [jnp.isfinite(jax.lax.stop_gradient(leaves[i])).all() for i in places])
        number = len(self._names)
        self._names.append(name)
        leaves[places[0]] = _seen(functools.partial(self._note, number), leaves[places[0]], good)
        return jax.tree.unflatten(structure, leaves)

    def _note(self, number: int, good: Any) -> np.ndarray:
        if not np.all(good):
            self._found.add(number)
        return np.zeros(np.shape(good), np.float32)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _seen(note, x, good):
    """x + note(good), which gives zero: a pure callback, since flax's scan (0.12.12) takes none with an effect, on
    whose result x depends, since XLA leaves out what nothing depends on.
    """
    zero = jax.pure_callback(note, jax.ShapeDtypeStruct(good.shape, jnp.float32), good, vmap_method="expand_dims")
    return x + zero.astype(x.dtype)


@_seen.defjvp
def _seen_jvp(note, primals, tangents):
    return _seen(note, *primals), tangents[0]


class _Watched:
    """A task whose losses look at every layer; all else is the task's."""

    def __init__(self, task, watch: Watch):
        self._task, self._watch = task, watch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task, name)

    def losses(self, params, ctx, batch, key):
        watch = self._watch

        def layer(function, args, kwargs, context):
            path = "/".join(context.module.path) or type(context.module).__name__
            try:
                out = function(*args, **kwargs)
            except Exception as error:
                error.add_note(f"in layer {path}, {type(context.module).__name__}.{context.method_name}")
                raise
            return watch.look(f"the output of layer {path}", out) if context.method_name == "__call__" else out

        with nn.intercept_methods(layer):
            losses = self._task.losses(_gradients_watched(params, watch), ctx, batch, key)
        return {
            name: loss._replace(value=watch.look(f"the loss of {name}", loss.value)) for name, loss in losses.items()
        }


def _gradients_watched(params, watch: Watch):
    """The parameters; their gradients are looked at in the backward pass, layers nearer to the loss first."""

    @functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
    def same(path, x):
        return x

    def backward(path, _, gradient):
        return (watch.look(f"the gradient of {path}", gradient),)

    same.defvjp(lambda path, x: (x, None), backward)
    real = lambda x: jnp.issubdtype(x.dtype, jnp.inexact)
    return trees.unflatten({path: same(path, x) if real(x) else x for path, x in trees.flatten(params).items()})
