"""The training state: what a step changes, what a checkpoint holds."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array
from jax.sharding import Mesh

from vgen import sharding, trees
from vgen.types import Task


@struct.dataclass
class State:
    """Everything a step reads and writes; flat dicts {path: array}.

    params: trained by gradients.  buffers: changed without gradients.  opt: {group: optimiser state}.
    ema: average of params and buffers ({} when off).  key: key data (uint32) of the run.
    skipped, bad_in_row: steps whose gradients were not finite, in all and since the last good one.
    """

    step: Array
    params: dict[str, Array]
    buffers: dict[str, Array]
    opt: dict[str, Any]
    ema: dict[str, Array]
    key: Array
    skipped: Array
    bad_in_row: Array

    def averaged(self) -> dict[str, Array]:
        """The parameters to use for inference: the average where one is kept."""
        return dict(self.ema) or {**self.params, **self.buffers}


class Layout:
    """Which parameters a task trains, in which group; worked out from shapes alone, nothing is allocated."""

    def __init__(self, task: Task, batch: Mapping[str, Any], groups: Mapping[str, str] | None = None):
        self.task = task
        self.batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), dict(batch))
        self.shapes = trees.flatten(jax.eval_shape(self._init, jax.random.key(0)))
        buffers = getattr(task, "buffers", "")
        self.buffers = [path for path in self.shapes if buffers and re.fullmatch(buffers, path)]
        rest = [path for path in self.shapes if path not in set(self.buffers)]
        self.groups = trees.group_paths(rest, groups or task.groups)
        self.trained = sorted(path for paths in self.groups.values() for path in paths)
        changed = set(self.trained) | set(self.buffers)
        self.frozen = [path for path in self.shapes if path not in changed]

    def _init(self, key):
        return self.task.init(key, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), self.batch))

    def pick(self, paths, key: Array) -> dict[str, Array]:
        """Freshly initialised values of `paths` (to be jitted: the compiler drops the rest)."""
        flat = trees.flatten(self._init(key))
        return {path: flat[path] for path in paths}


def create(make, shardings: State, key: Array, given: Mapping[str, Array] | None = None) -> State:
    """A sharded fresh state from what `plan` returned.

    given: values that replace the initial ones (a warm start); entries for frozen parameters are ignored here.
    """
    places = {**shardings.params, **shardings.buffers}
    warm = {path: value for path, value in (given or {}).items() if path in places}
    warm = jax.device_put(warm, {path: places[path] for path in warm})
    # Runs once: on a CPU, unoptimised code is ready several times sooner.
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    return jax.jit(make, out_shardings=shardings, compiler_options=options)(key, warm)


def plan(layout: Layout, optimizers, mesh: Mesh, *, ema: bool, rules=(), min_shard_size: int = 2**14):
    """(make, shardings): the function (key, warm start) -> State, and where each array of the state lives.

    Optimiser moments follow their parameter: an array of the optimiser state whose path ends in a parameter's path and
    has its shape gets its sharding; everything else is replicated.
    """

    def make(key, warm):
        fresh = layout.pick([path for path in layout.trained + layout.buffers if path not in warm], key) | dict(warm)
        params = {path: fresh[path] for path in layout.trained}
        buffers = {path: fresh[path] for path in layout.buffers}
        opt = {name: tx.init({p: params[p] for p in layout.groups[name]}) for name, tx in optimizers.items()}
        zero = jnp.zeros((), jnp.int32)
        average = jax.tree.map(jnp.copy, {**params, **buffers}) if ema else {}
        return State(zero, params, buffers, opt, average, jax.random.key_data(key), zero, zero)

    shapes = jax.eval_shape(make, jax.random.key(0), {})
    by_path = sharding.param_shardings({**shapes.params, **shapes.buffers}, mesh, rules, min_shard_size)

    def place(path, leaf):
        names = [str(getattr(part, "key", "")) for part in path]
        for name in reversed(names):
            if name in by_path:
                wanted = {**shapes.params, **shapes.buffers}[name].shape
                return by_path[name] if leaf.shape == wanted else sharding.replicated(mesh)
        return sharding.replicated(mesh)

    return make, jax.tree_util.tree_map_with_path(place, shapes)


Step = Callable[[State, Mapping[str, Array], Mapping[str, Array]], tuple[State, dict[str, Array]]]
