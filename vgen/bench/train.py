"""How fast a config's stages train on the devices at hand, what bounds them, and what a save costs.

What is told to be the best possible is a roofline: the longest of computing, of memory and of the network at their full
rates.  Those of known chips are published; a processor's are what a matrix product and a sum of vectors reach here.
"""

import resource
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from vgen import plan, train
from vgen import state as states
from vgen.checkpoint import Checkpoints
from vgen.config import UserError
from vgen.convert.show import size
from vgen.main import parse
from vgen.stages import Run

WARM_UP = 2  # steps after the compiled one that do not count


def lines(argv: Sequence[str], steps: int, stage: str = "") -> Iterator[str]:
    """A few lines a stage.  argv: --config=..., and what else `vgen.main` takes; steps: how many are timed."""
    with tempfile.TemporaryDirectory() as folder:
        workdir = [] if any(arg.startswith(("--workdir", "-workdir")) for arg in argv) else [f"--workdir={folder}"]
        options = parse(["vgen.bench train", *argv, *workdir])
        if steps < 1:
            raise UserError(f"--steps={steps}: must be at least 1")
        run = Run(options.config, options.workdir)
        names = [stage] if stage else [name for name in run.config.order if run.train_config(name).steps]
        if not names:
            raise UserError(f"{run.config.name} trains nothing at this scale")
        target = here(run.mesh.devices.ravel())
        mesh = ", ".join(f"{axis} {ways}" for axis, ways in run.mesh.shape.items())
        yield f"{run.config.name}:{run.config.scale} on {run.mesh.size} x {target.name} ({mesh}), {steps} steps of each"
        for name in names:
            yield from told(name, measured(run, name, target, steps), target)


def here(devices: Sequence[Any]) -> plan.Target:
    """The devices at hand; of a processor with the rates that it is seen to reach."""
    kind = devices[0].device_kind
    chip = plan.CHIPS.get(kind)
    if chip is None and devices[0].platform == "cpu":
        flops, bandwidth = (rate / len(devices) for rate in _rates())  # emulated devices share it
        chip = plan.Chip(flops, float("inf"), bandwidth, bandwidth)
    return plan.Target(kind, devices, devices[0].platform, chip)


def _rates() -> tuple[float, float]:
    """Operations a second of a float32 product, bytes a second of a sum of two long vectors."""
    side, length = 2048, 2**25
    a, x = jnp.ones((side, side)), jnp.ones(length)
    cases = ((jax.jit(jnp.matmul), a, 2.0 * side**3), (jax.jit(jnp.add), x, 3.0 * 4 * length))
    return tuple(work / _fastest(function, array) for function, array, work in cases)


def _fastest(function, array, runs: int = 5) -> float:
    seconds = []
    for _ in range(runs + 1):  # the first compiles
        start = time.perf_counter()
        jax.block_until_ready(function(array, array))
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def measured(run: Run, name: str, target: plan.Target, steps: int) -> dict[str, Any]:
    """What `plan.measured` tells of a stage's step, and "seconds" of one, "wait" for data, "peak" of memory in bytes.

    Its weights are drawn, those of frozen parts too.  What is computed once for a stage (`cache`) is drawn as well, and
    there is no wait then: None.
    """
    config, task, cached = run.train_config(name), run.task(name), bool(run.stage(name).cache)
    batches = _Drawn(plan.batch_shapes(run, name)) if cached else run.batches(name)
    key = jax.random.key(0)
    with batches, jax.set_mesh(run.mesh), plan.aimed(target):
        batch = next(batches)
        layout = states.Layout(task, {k: x for k, x in batch.items() if isinstance(x, jax.Array)}, config.groups)
        make, shardings, step, _ = train.program(task, config, layout, run.mesh)
        frozen = jax.jit(lambda key: layout.pick(layout.frozen, key))(key) if layout.frozen else {}
        frozen = train.place_frozen(layout.frozen, frozen, run.mesh, config)
        state = states.create(make, shardings, key)
        found, compiled = plan.measured(step, (state, frozen, batch), target)
        for _ in range(1 + WARM_UP):
            state, _ = compiled(state, frozen, batch)
            batch = next(batches)
        jax.block_until_ready(state)
        start, waited = time.perf_counter(), batches.wait_seconds
        for _ in range(steps):
            state, _ = compiled(state, frozen, batch)
            batch = next(batches)
        jax.block_until_ready(state)
        seconds = time.perf_counter() - start
        wait = None if cached else (batches.wait_seconds - waited) / seconds
        save, state = _save(state, frozen, batch, compiled, steps, seconds / steps)
    count = sum(leaf.size for leaf in state.params.values())
    peak = (run.mesh.devices.flat[0].memory_stats() or {}).get("peak_bytes_in_use") or _resident()
    found |= {"seconds": seconds / steps, "wait": wait, "peak": peak, "parameters": count}
    return found | {
        "save": save,
        "checkpoint_every": config.checkpoint_every or config.steps,
        "batch_size": config.batch_size,
        "roofline": plan.roofline(found, target.chip) if target.chip else {},
    }


def _save(state, frozen, batch, step, steps: int, seconds: float) -> tuple[float, Any]:
    """(seconds that a save costs the steps beside it, the state after them), to a folder of this machine.

    steps: that are done at least; there are more as long as it is being written.  seconds: of a step without a save.
    """
    with tempfile.TemporaryDirectory() as folder:
        checkpoints, done = Checkpoints(folder), 0
        jax.block_until_ready(state)
        start = time.perf_counter()
        checkpoints.save(1, state)
        while done < steps or checkpoints.busy:
            state, done = step(state, frozen, batch)[0], done + 1
            jax.block_until_ready(state)
        taken = time.perf_counter() - start
        checkpoints.close()
    return max(taken - done * seconds, 0.0), state


class _Drawn:
    """The same batch again and again, of shapes alone."""

    wait_seconds = 0.0

    def __init__(self, shapes: Mapping[str, jax.ShapeDtypeStruct]):
        draw = lambda x: jnp.ones(x.shape, x.dtype)
        self.batch = {name: jax.device_put(draw(x), x.sharding) for name, x in shapes.items()}

    def __next__(self):
        return self.batch

    def __enter__(self):
        return self

    def __exit__(self, *_): ...


def _resident() -> int:
    """The most memory that this process has had, bytes; macOS counts in bytes, Linux in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def told(name: str, found: Mapping[str, Any], target: plan.Target) -> Iterator[str]:
    """The lines on a stage."""
    seconds, best = found["seconds"], found["roofline"]
    rate = found["batch_size"] / seconds
    yield f"{name}: {found['parameters'] / 1e6:,.1f}M trained, compiled in {found['compile_seconds']:.0f} s"
    yield f"  a step     {seconds * 1e3:,.1f} ms, {rate:,.1f} images/s, {found['flops'] / 1e9:,.2f} GFLOP a device"
    if best:
        bound, reached = max(("computing", "memory", "network"), key=best.get), found["flops"] / seconds
        yield f"  roofline   {best['step'] * 1e3:,.1f} ms, bound by {bound}: {best['step'] / seconds:.0%} of it reached"
        share = reached / target.chip.flops
        yield f"  computing  {reached / 1e9:,.0f} of {target.chip.flops / 1e9:,.0f} GFLOP/s: {share:.0%}"
    waited = "none: features were drawn" if found["wait"] is None else f"{found['wait']:.1%} of the time waited for"
    yield f"  input      {waited}"
    every = found["checkpoint_every"]
    share = found["save"] / (found["save"] + every * seconds)
    yield f"  a save     {found['save']:.2f} s more: {share:.1%} of the time with one every {every:,} steps"
    yield f"  memory     {size(found['peak'])} at most, the step's own {size(found['bytes']['peak'])}"
