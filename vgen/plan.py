"""Plan a run without its hardware: every stage's real step is compiled for a slice ahead of time.

A TPU's compiler comes with libtpu and needs no TPU (extra `tpu`).  What is told of time is an estimate, no measurement:
the longest of computing, of memory and of the network, at their published rates, as if each hid the others.
"""

import copy
import dataclasses
import json
import math
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vgen import features, hlo, platform, sharding, trees
from vgen import state as states
from vgen.bench import flops
from vgen.config import ConfigError, UserError, brief, to_dict
from vgen.convert.show import size
from vgen.fields import GenerateConfig
from vgen.stages import Run
from vgen.train import frozen_dtype, program

GIB = 2**30
NO_MESH = jax.sharding.AbstractMesh((), ())
MOST_EMULATED = 512
TRIES = 8  # settings that are compiled at most, in search of one that fits


@dataclasses.dataclass(frozen=True)
class Chip:
    """A device as JAX counts them, of which a chip may have two.

    flops: dense bfloat16 operations a second.  memory: bytes.  bandwidth: of the memory, network: of the links between
    chips, one way, bytes a second.  chips: share of a chip that a device is.  watts: of a chip, mean at work (0: not
    published).
    """

    flops: float
    memory: float
    bandwidth: float
    network: float
    chips: float = 1.0
    watts: float = 0.0


# By `device_kind`; Google's pages of each (cloud.google.com/tpu/docs/v3, v4, v5e, v5p, v6e) and NVIDIA's data sheets.
# Network: half of what the two ways are together (of GPUs, of NVLink), of v3 and v4 a pod's rate of all-reduce by its
# chips.  libtpu counts the cores of these singly.
CHIPS = {
    "TPU v3": Chip(61.5e12, 16 * GIB, 450e9, 166e9, 0.5, 220),
    "TPU v4": Chip(137.5e12, 16 * GIB, 600e9, 134e9, 0.5, 170),
    "TPU v5 lite": Chip(197e12, 16e9, 819e9, 200e9),
    "TPU v5": Chip(459e12, 95 * GIB, 2765e9, 600e9),
    "TPU v6 lite": Chip(918e12, 32e9, 1638e9, 400e9),
    "NVIDIA A100-SXM4-80GB": Chip(312e12, 80e9, 2039e9, 300e9),
    "NVIDIA H100 80GB HBM3": Chip(989e12, 80e9, 3350e9, 450e9),
    "NVIDIA H200": Chip(989e12, 141e9, 4800e9, 450e9),
}


class Target(NamedTuple):
    """Where a run is to be: its devices, their platform, and what a device is, where that is known."""

    name: str
    devices: Sequence[Any]
    platform: str
    chip: Chip | None


def target(topology: str) -> Target:
    """The devices of "v4:4x4x16", of any slice that libtpu knows, or "cpu:8": emulated ones of this machine.

    Raises UserError for one that there is not, and where libtpu is missing.
    """
    kind, _, shape = topology.partition(":")
    if kind == "cpu":
        if not (re.fullmatch(r"[1-9][0-9]{0,2}", shape) and int(shape) <= MOST_EMULATED):
            raise UserError(f"--topology={topology}: expected cpu:N, 1 to {MOST_EMULATED} devices")
        if len(jax.devices("cpu")) < int(shape):
            raise UserError(f"--topology={topology}: JAX runs already, with {len(jax.devices('cpu'))} devices")
        return Target(topology, jax.devices("cpu")[: int(shape)], "cpu", None)
    if not re.fullmatch(r"v[0-9]+[a-z]*:[0-9]+(x[0-9]+)+", topology):
        raise UserError(f"--topology={topology}: expected such as v4:4x4x16, v5e:4x8 or cpu:8")
    from jax.experimental import topologies

    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # the chips are not touched; a run may have them
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except Exception as error:  # noqa: BLE001  jaxlib tells of a missing library and a bad name by the same kinds
        reason = brief(error, 160)
        raise UserError(
            f"--topology={topology}: libtpu does not know it, or is not installed (pip install 'vgen[tpu]'): {reason}"
        ) from None
    return Target(topology, devices, "tpu", CHIPS.get(devices[0].device_kind))


def aimed(target: Target):
    """A context in which programs are traced for the target."""
    return platform.target(target.platform, target.devices[0].device_kind)


# ----------------------------------------------------------------------------------------------------------- programs


def batch_shapes(run: Run, name: str, count: int | None = None, cached: bool = True) -> dict[str, jax.ShapeDtypeStruct]:
    """What a batch of a stage's data holds, from its settings alone; count: examples, as in training by default.

    All keys that the data may have are there; of a stage with a cache, its features, unless not `cached`.
    """
    data, stage, task = run.data_arguments(name, False), run.stage(name), run.task(name)
    b, side = count or run.train_config(name).batch_size, data["size"]
    found = {"image": ((b, side, side, 3), jnp.uint8), "label": ((b,), jnp.int32)}
    if run.config.text and stage.data.get("text", True):
        length = run.config.text["length"]
        found |= {"text": ((b, length), jnp.int32), "text_mask": ((b, length), jnp.bool_)}
    if masks := data.get("options", {}).get("masks"):
        count = data["options"].get("world", {}).get("max_objects", 4) if masks is True else masks
        found["masks"] = ((b, count, side, side), jnp.bool_)
    if data.get("buckets"):
        found |= {key: ((b, 2), jnp.float32) for key in ("original", "corner", "target")}
    places = sharding.batch_sharding(run.mesh)
    shapes = {key: jax.ShapeDtypeStruct(*each, sharding=places) for key, each in found.items()}
    if not (cached and stage.cache):
        return shapes
    kinds = tuple(features.check(run, name).features)
    whole = jax.eval_shape(task.init, _key(), shapes)
    made = jax.eval_shape(lambda params, batch: task.features(params, batch, kinds), whole, shapes)
    spared = {"latents": ("image",), "text": ("text", "text_mask")}
    left = {key: each for key, each in shapes.items() if not any(key in spared[kind] for kind in kinds)}
    return left | {key: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=places) for key, x in made.items()}


def _key():
    return jax.eval_shape(lambda: jax.random.key(0))


def _placed(shapes, places):
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, places)


def _held(run: Run, name: str, layout: states.Layout, paths) -> dict[str, jax.ShapeDtypeStruct]:
    """Parameters as they are held when they are not trained; of an imported stage all are frozen."""
    config = run.train_config(name)
    frozen = set(layout.frozen) if config.steps else set(layout.shapes)
    dtype = lambda path, x: frozen_dtype(x.dtype, config) if path in frozen else x.dtype
    shapes = {path: jax.ShapeDtypeStruct(x.shape, dtype(path, x)) for path, x in layout.shapes.items() if path in paths}
    return _placed(shapes, sharding.param_shardings(shapes, run.mesh, config.rules, config.min_shard_size))


def train_step(run: Run, name: str):
    """(jitted function, shapes of its arguments with their shardings): the step that `--mode=train` runs."""
    config, batch = run.train_config(name), batch_shapes(run, name)
    layout = states.Layout(run.task(name), batch, config.groups)
    make, shardings, step, _ = program(run.task(name), config, layout, run.mesh)
    state = _placed(jax.eval_shape(make, _key(), {}), shardings)
    return step, (state, _held(run, name, layout, set(layout.frozen)), batch)


def sample_steps(run: Run) -> Iterator[tuple[str, Any, tuple[Any, ...]]]:
    """(stage, jitted function, shapes of its arguments) of what a system's generating stages run, in their order."""
    generate = run.config.generate
    batch_size = generate.get("batch_size", GenerateConfig.batch_size)
    places = sharding.batch_sharding(run.mesh, batch_size)
    conds: dict[str, Any] = {}
    for name in generate["stages"]:
        layout = states.Layout(run.task(name), batch_shapes(run, name, cached=False), run.train_config(name).groups)
        params = trees.unflatten(_held(run, name, layout, layout.shapes))
        told = batch_shapes(run, name, batch_size, cached=False)
        if getattr(run.sampler(name), "writes", False):
            conds |= {"image": told["image"]}
        else:
            conds |= {key: told[key] for key in ("text", "text_mask", "label") if key in told}
        conds = {key: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=places) for key, x in conds.items()}
        knobs = {
            key: jax.ShapeDtypeStruct((), jnp.int32 if isinstance(value, int) else jnp.float32)
            for key, value in generate.get("knobs", {}).get(name, {}).items()
        }
        function = jax.jit(run.sampler(name).sample)
        call = jax.jit(lambda params, key, conds, knobs, function=function: function(params, key, conds, **knobs))
        arguments = (params, _key(), dict(conds), knobs)
        yield name, call, arguments
        conds |= jax.eval_shape(call, *arguments)


# -------------------------------------------------------------------------------------------------------- what it takes


def measured(function, arguments, target: Target, steps: int = 1) -> tuple[dict[str, Any], Any]:
    """(what a device does and holds in one call of a function, the function compiled for the target).

    To be called as the function was made, under `aimed`.  Where the compiler finds no room it gives no program, and
    alone "bytes", "flops" and "fits" are told.  Raises UserError for what it cannot compile at all.
    "flops" are a device's share of the whole function's: what all devices repeat, such as Muon's products of whole
    matrices, counts once.
    steps: how often a loop runs whose number is not in the program: an argument, or until a draw is accepted.
    """
    start = time.perf_counter()
    lowered, compiled = function.lower(*arguments), None
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise UserError(f"{target.name}: XLA cannot compile it: {brief(error, 300)}") from error
        said = str(error)
    seconds = time.perf_counter() - start
    whole = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arguments)
    with jax.sharding.use_abstract_mesh(NO_MESH):
        operations = flops.count(function.__wrapped__, *whole, steps=steps) / len(target.devices)
    found: dict[str, Any] = {"compile_seconds": round(seconds, 2), "flops": operations, "collectives": {}}
    if compiled is None:
        given, more = sum(_bytes(x) for x in jax.tree.leaves(arguments)), _temporaries(said)
        return found | {"bytes": {"arguments": given, "temporaries": more, "peak": given + more}, "fits": False}, None
    held = compiled.memory_analysis()
    traffic = hlo.traffic(compiled.as_text(), steps)
    peak = held.argument_size_in_bytes + held.output_size_in_bytes - held.alias_size_in_bytes + held.temp_size_in_bytes
    found |= {
        "memory_bytes_moved": traffic.memory,
        "collectives": {kind: {"count": n, "bytes": sent} for kind, (n, sent) in traffic.collectives.items()},
        "bytes": {
            "arguments": held.argument_size_in_bytes, "outputs": held.output_size_in_bytes,
            "shared": held.alias_size_in_bytes, "temporaries": held.temp_size_in_bytes, "peak": peak,
        },
    }  # fmt: skip
    if traffic.memory:
        found["intensity"] = operations / traffic.memory
    if target.chip:
        found["fits"] = peak <= target.chip.memory
    return found, compiled


def _bytes(x: jax.ShapeDtypeStruct) -> int:
    """What a device holds of an argument."""
    shape = x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)
    return math.prod(shape) * x.dtype.itemsize


def _temporaries(text: str) -> float:
    """Bytes that XLA says it would need beside what a program is given, when there is not that much."""
    said = re.search(r"(?:required for HLO temporaries \(|Used )([\d.]+)([KMGT])", text)
    return float(said[1]) * 1024 ** (1 + "KMGT".index(said[2])) if said else 0.0


def roofline(found: Mapping[str, Any], chip: Chip) -> dict[str, float]:
    """Seconds that computing, memory and network take at their published rates; "step": the longest of them."""
    sent = sum(each["bytes"] for each in found["collectives"].values())
    each = {
        "computing": found["flops"] / chip.flops, "memory": found["memory_bytes_moved"] / chip.bandwidth,
        "network": sent / chip.network,
    }  # fmt: skip
    return each | {"step": max(each.values())}


def plan_stage(run: Run, name: str, target: Target) -> dict[str, Any]:
    """Of a stage's training: parameters, `measured`, and with a known chip `roofline` and what all of it costs."""
    config = run.train_config(name)
    with jax.sharding.use_abstract_mesh(run.mesh.abstract_mesh), aimed(target):
        step, arguments = train_step(run, name)
        found, _ = measured(step, arguments, target)
    state, frozen, _ = arguments
    count = lambda leaves: sum(x.size for x in leaves)
    found["parameters"] = {"trained": count(state.params.values()), "frozen": count(frozen.values())}
    found |= {"steps": config.steps, "batch_size": config.batch_size, "accumulate": config.accumulate}
    if target.chip and "memory_bytes_moved" in found:
        seconds = found["roofline"] = roofline(found, target.chip)
        hours = seconds["step"] * config.steps * len(target.devices) * target.chip.chips / 3600
        found |= {"images_per_second": config.batch_size / seconds["step"], "chip_hours": hours}
        if target.chip.watts:
            found["kilowatt_hours"] = hours * target.chip.watts / 1000
    return found


def effort() -> str:
    """How hard XLA was told to try, "O0" to "O3" by JAX_OPTIMIZATION_LEVEL; "" where nobody said."""
    level = getattr(jax.config, "jax_optimization_level", "UNKNOWN")
    level = getattr(level, "name", level)
    return "" if level == "UNKNOWN" else level


def plan(config, workdir, target: Target, stages: Sequence[str] = (), sampled: Sequence[str] = ()) -> dict[str, Any]:
    """The report on a config: {"target", "mesh", "train": {stage: ...}, "sample": {stage: ...}, "fits"}.

    stages, sampled: only the training, and the sampling, of these; all where both are empty.
    """
    run = Run(config, workdir, devices=list(target.devices))
    report: dict[str, Any] = {
        "config": run.config.name, "scale": run.config.scale,
        "target": {"topology": target.name, "devices": len(target.devices)}, "mesh": dict(run.mesh.shape),
        "train": {}, "sample": {},
    }  # fmt: skip
    if target.chip:
        report["target"] |= dataclasses.asdict(target.chip)
    if level := effort():
        report["target"]["optimization_level"] = level
    if not (stages or sampled):
        stages, sampled = run.config.order, run.config.generate.get("stages", ())
    for name in stages:
        if run.train_config(name).steps:
            report["train"][name] = plan_stage(run, name, target)
    if sampled:
        with jax.sharding.use_abstract_mesh(run.mesh.abstract_mesh), aimed(target):
            for name, function, arguments in sample_steps(run):
                if name not in sampled:
                    continue
                knobs = run.config.generate.get("knobs", {}).get(name, {})
                report["sample"][name], _ = measured(function, arguments, target, knobs.get("steps", 1))
    programs = [*report["train"].values(), *report["sample"].values()]
    return report | {"fits": all(each.get("fits", True) for each in programs)}


# ------------------------------------------------------------------------------------------------------ one that fits


def changes(config: Mapping[str, Any], name: str, devices: int) -> Iterator[dict[str, Any]]:
    """Settings that take less memory in a stage, {flag: value}, the cheaper ones first: parameters split over more
    devices, layers computed again in the backward pass, microbatches.
    """
    mesh, train = config.get("mesh", {}), config["stages"][name]["train"]
    tensor, fsdp = mesh.get("tensor", 1), mesh.get("fsdp", 1)
    wider = [ways for ways in (fsdp * 2**i for i in range(1, 20)) if ways * tensor <= devices]
    split = [{"mesh.data": -1, "mesh.fsdp": ways} for ways in wider if devices % (ways * tensor) == 0]
    again = {f"stages.{name}.task.{path}": "full" for path in _plain(config["stages"][name]["task"])}
    smaller = [
        {f"stages.{name}.train.accumulate": parts}
        for parts in (train.get("accumulate", 1) * 2**i for i in range(1, 8))
        if train["batch_size"] % parts == 0 and train["batch_size"] // parts >= devices // tensor
    ]
    most = split[-1] if split else {}
    yield from split[-1:]
    if again:
        yield again
        yield most | again
    for each in smaller:
        yield most | again | each


def _plain(spec: Any, path: str = "") -> Iterator[str]:
    """Places in a task's spec where a stack of layers could be computed again, `remat`, and is not."""
    if isinstance(spec, Mapping):
        if spec.get("remat") == "none":
            yield f"{path}remat"
        for key, value in spec.items():
            yield from _plain(value, f"{path}{key}.")


def changed(config: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The config with {place: value} put in."""
    config = copy.deepcopy(to_dict(config))
    for path, value in settings.items():
        *parents, last = path.split(".")
        node = config
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return config


def fewer(config: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Settings that take less memory in sampling, {flag: value}: fewer pictures at once."""
    count = config["generate"].get("batch_size", GenerateConfig.batch_size)
    while count > 1:
        count //= 2
        yield {"generate.batch_size": count}


def fitting(config, workdir, name: str, target: Target, kind: str = "train") -> dict[str, Any] | None:
    """The first of `changes` (kind "sample": of `fewer`) under which a stage fits a device, or None if none of TRIES
    does.
    """
    config = to_dict(config)
    asked = dict(stages=[name]) if kind == "train" else dict(sampled=[name])
    settings = changes(config, name, len(target.devices)) if kind == "train" else fewer(config)
    for each, _ in zip(settings, range(TRIES)):
        try:
            report = plan(changed(config, each), workdir, target, **asked)
        except ConfigError:  # a rule that does not divide over this mesh
            continue
        if report["fits"]:
            return each
    return None


# ------------------------------------------------------------------------------------------------------------- report


def lines(report: Mapping[str, Any]) -> Iterator[str]:
    """The report for people."""
    mesh = ", ".join(f"{axis} {ways}" for axis, ways in report["mesh"].items())
    target = report["target"]
    yield f"{report['config']}:{report['scale']} on {target['topology']}, {target['devices']} devices ({mesh})"
    if level := target.get("optimization_level"):
        yield f"compiled at JAX_OPTIMIZATION_LEVEL={level}: by default the compiler tries more; its program"
        yield "takes somewhat more memory and time, or less"
    for kind in ("train", "sample"):
        for name, found in report[kind].items():
            yield from _told(kind, name, found, target.get("memory"))


def _told(kind: str, name: str, found: Mapping[str, Any], memory: float | None) -> Iterator[str]:
    held, parameters = found["bytes"], found.get("parameters")
    counts = (
        f": {parameters['trained'] / 1e6:,.1f}M trained, {parameters['frozen'] / 1e6:,.1f}M frozen"
        if parameters
        else ""
    )
    yield f"{kind} {name}{counts}; compiled in {found['compile_seconds']:.0f} s"
    over = "" if found.get("fits", True) else "  DOES NOT FIT"
    of = f" of {size(memory)}" if memory else ""
    parts = f"arguments {size(held['arguments'])}, temporaries {size(held['temporaries'])}"
    yield f"  memory     {size(held['peak'])}{of} a device: {parts}{over}"
    call = "step" if kind == "train" else "call"
    moved = f" and {size(found['memory_bytes_moved'])}" if "memory_bytes_moved" in found else ""
    yield f"  one {call}   {found['flops'] / 1e9:,.2f} GFLOP{moved} a device"
    for operation, each in found["collectives"].items():
        yield f"  {operation:<18} {each['count']:>6}, {size(each['bytes'])} in all"
    if "roofline" in found:
        each = found["roofline"]
        parts = ", ".join(f"{part} {each[part] * 1e3:.1f}" for part in ("computing", "memory", "network"))
        rate = found["images_per_second"]
        yield f"  roofline   {each['step'] * 1e3:.1f} ms a step ({parts}): {rate:,.0f} images/s"
        energy = f", {found['kilowatt_hours']:,.0f} kWh" if "kilowatt_hours" in found else ""
        steps, hours = f"{found['steps']:,} steps of {found['batch_size']}", f"{found['chip_hours']:,.0f} chip hours"
        yield f"  in all     {steps}: {hours}{energy}"


def write(report: Mapping[str, Any], path) -> None:
    """plan.json."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1))
