"""Training on 8 emulated devices gives the losses of one device, whatever the mesh and the task."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MESHES = {
    "toy": (
        (dict(data=8), ()),
        (dict(data=2, fsdp=4), ()),
        (dict(fsdp=2, tensor=4), ((".*kernel", ("fsdp", "tensor")),)),
    ),
    "muse": ((dict(data=2, fsdp=4), ()), (dict(fsdp=2, tensor=4), ())),
    "vit": tuple(
        (dict(zip(("data", "fsdp", "sequence", "tensor"), sizes)), ())
        for sizes in ((8, 1, 1, 1), (1, 8, 1, 1), (2, 2, 1, 2), (1, 1, 1, 8), (1, 2, 2, 2))
    ),
}


def toy(mesh, rules):
    """Losses and final parameters of 6 steps of the toy with a stage's usual optimiser."""
    from tests.toy import Linear, settings, train

    config = settings(
        6, optim={"main": dict(lr=0.01, weight_decay=0.1, clip=1.0)}, ema_decay=0.9, log_every=1, accumulate=2,
        batch_size=16, rules=rules, min_shard_size=0,
    )  # fmt: skip
    log = Losses()
    state = train(Linear(width=16), config, mesh=mesh, log=log)
    return log.values, state


def muse(mesh, rules):
    """Losses of 3 steps of the base model of Muse's smallest scale, on noise."""
    import jax
    import numpy as np

    from tests.toy import Stream, settings
    from vgen import sharding
    from vgen import state as states
    from vgen.config import build
    from vgen.train import fit

    spec = tiny().stages.base.task
    spec.transformer.unroll = 1
    task = build(spec)

    class Noise(Stream):
        def __next__(self):
            rng, self.k = np.random.default_rng(self.k), self.k + 1
            batch = {
                "image": rng.integers(0, 256, (8, task.size, task.size, 3)).astype(np.uint8),
                "text": rng.integers(1, 300, (8, 24)).astype(np.int32),
                "text_mask": np.arange(24) < rng.integers(1, 24, (8, 1)),
            }
            return jax.device_put(batch, self.sharding)

    stream = Noise(8, sharding.batch_sharding(mesh))
    layout = states.Layout(task, next(Noise()))
    given = jax.jit(lambda key: layout.pick(layout.frozen, key))(jax.random.key(5))
    config = settings(
        3, optim={"main": dict(lr=1e-3, weight_decay=0.02, clip=1.0)}, ema_decay=0.9, log_every=1, rules=rules,
        min_shard_size=0,
    )  # fmt: skip
    log = Losses()
    state = fit(task, config, stream, layout=layout, mesh=mesh, key=jax.random.key(0), given=given, log=log)
    return log.values, state


def vit(mesh, rules):
    """Losses of 4 steps of a ViT of 6 layers and 8 heads, on noise."""
    import jax
    import numpy as np

    from tests.toy import Stream, settings
    from vgen import sharding
    from vgen import state as states
    from vgen.config import build
    from vgen.train import program

    spec = tiny("vit").stages.vit.task
    spec.network.update(width=64, depth=6, heads=8, mlp_dim=128)
    task = build(spec)

    class Noise(Stream):
        def __next__(self):
            rng, self.k = np.random.default_rng(self.k), self.k + 1
            batch = {
                "image": rng.integers(0, 256, (8, 16, 16, 3)).astype(np.uint8),
                "label": rng.integers(0, task.classes, 8).astype(np.int32),
            }
            return jax.device_put(batch, self.sharding)

    stream = Noise(8, sharding.batch_sharding(mesh))
    layout = states.Layout(task, next(Noise()))
    config = settings(
        4, optim={"main": dict(lr=2e-2, weight_decay=0.02, clip=1.0)}, ema_decay=0.9, rules=rules, min_shard_size=0
    )
    with jax.set_mesh(mesh):
        make, shardings, step, _ = program(task, config, layout, mesh)
        state, losses = states.create(make, shardings, jax.random.key(0)), []
        compiled = step.lower(state, {}, next(stream)).compile()
        for _ in range(config.steps):
            state, metrics = compiled(state, {}, next(stream))
            losses.append(float(metrics["loss"]))
    return losses, state, compiled.as_text()


def whole_gathers(text, state) -> list[str]:
    """The stacks of layers' parameters that the program gathers all at once."""
    from vgen import hlo

    gathered = [each.type for body in hlo.parse(text)[0].values() for each in body if "all-gather" in each.operation]
    shapes = {path: f"[{','.join(map(str, leaf.shape))}]" for path, leaf in state.params.items() if "layers/" in path}
    assert shapes
    return [path for path, shape in shapes.items() if any(shape in each for each in gathered)]


# A config and a stage for every task but Muse's and those that are made of it; losses at their scale "tiny".
TASKS = (
    ("vit", "vit"), ("a_clip", "a_clip"), ("flip", "flip"), ("blip", "blip"), ("mae", "mae"), ("sam", "sam"),
    ("vqvae", "tokenizer"), ("vqvae", "prior"), ("dit", "dit"),
)  # fmt: skip
CUBE = dict(data=2, fsdp=2, tensor=2)
BACKWARD = "flip/flip"  # whose gradient, of InfoNCE over the batch of all devices, is compared too


def noise(config, stage, task):
    """A batch of 8 without meaning."""
    import numpy as np

    rng, size, length = np.random.default_rng(0), stage.data.size, config.get("text", {}).get("length", 0)
    batch = {"image": rng.integers(0, 256, (8, size, size, 3)).astype(np.uint8)}
    if length:
        batch["text"] = rng.integers(2, 300, (8, length)).astype(np.int32)
        batch["text"][:, -1] = 1
        batch["text_mask"] = np.arange(length) < rng.integers(2, length, (8, 1))
    if getattr(task, "classes", 0):
        batch["label"] = rng.integers(0, task.classes, 8).astype(np.int32)
    corner, place = rng.integers(0, size // 2, (8, 3, 2, 1)), np.arange(size)
    inside = (place >= corner) & (place < corner + size // 2)
    return batch | {"masks": inside[:, :, 0, :, None] & inside[:, :, 1, None]}


def every() -> dict:
    """{config/stage: (relative difference of the losses, of the gradients, how many parameters are split)}."""
    import jax
    import numpy as np
    import optax

    from tests.convert.tables import draw
    from vgen import sharding, trees
    from vgen import state as states
    from vgen.config import build
    from vgen.types import Context

    report = {}
    for name, stage in TASKS:
        config = tiny(name)
        task = build(config.stages[stage].task)
        batch = noise(config, config.stages[stage], task)
        layout = states.Layout(task, batch)
        flat = trees.flatten(draw(task, batch))

        def values(trained, rest, batch):
            """The sum of all groups' losses."""
            losses = task.losses(trees.unflatten(rest | trained), Context(np.int32(9)), batch, jax.random.key(0))
            return sum(loss.value for loss in losses.values())

        backward, found = f"{name}/{stage}" == BACKWARD, []
        run = jax.jit(jax.value_and_grad(values) if backward else lambda *given: (values(*given), {}))
        for mesh in (sharding.make_mesh(devices=jax.devices()[:1]), sharding.make_mesh(**CUBE)):
            with jax.set_mesh(mesh):
                placed = jax.device_put(flat, sharding.param_shardings(flat, mesh, (), 0))
                trained = {path: placed.pop(path) for path in layout.trained}
                split = sum(not leaf.sharding.is_fully_replicated for leaf in trained.values())
                seen = jax.device_put(batch, sharding.batch_sharding(mesh))
                found.append(jax.device_get(run(trained, placed, seen)))
        (want, grads), (got, split_grads) = found
        apart = jax.tree.map(lambda a, b: a - b, grads, split_grads)
        wrong = float(optax.global_norm(apart) / optax.global_norm(grads)) if backward else 0.0
        report[f"{name}/{stage}"] = (float(abs(got - want) / abs(want)), wrong, split)
        print(name, stage, report[f"{name}/{stage}"], file=sys.stderr, flush=True)
    return report


class Losses:
    """A log of losses alone."""

    def __init__(self):
        self.values = []

    def start(self, *_): ...

    def tick(self, step): ...

    def finish(self): ...

    def scalars(self, step, values):
        self.values.append(values["loss"])


def tiny(name="muse"):
    import runpy

    return runpy.run_path(str(ROOT / "configs" / f"{name}.py"))["get_config"]("tiny")


def main(name: str) -> dict:
    """Run one task on one device and on every mesh: the largest relative difference of a loss, and what was split."""
    import jax
    import numpy as np

    from vgen.sharding import make_mesh

    run = globals()[name]
    want = run(make_mesh(devices=jax.devices()[:1]), ())[0]
    report = {"losses": want, "devices": len(jax.devices())}
    for sizes, rules in MESHES[name]:
        got, state, *text = run(make_mesh(**sizes), rules)
        report[str(sizes)] = {
            "difference": float(max(abs(np.float64(got) - want) / np.abs(want))),
            "split": sum(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state.params)),
            "moments": sum(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state.opt)),
            "like": moments_lie_with_parameters(state),
            "whole": whole_gathers(*text, state) if text else [],
            "gathers": sum(each.count(" all-gather(") for each in text),
            "share": min(leaf.addressable_shards[0].data.size / leaf.size for leaf in state.params.values()),
        }
    return report


def gathered() -> dict[str, list[str]]:
    """Of convolutional networks, compiled with parameters split over fsdp: all that is gathered and holds more pictures
    than a device has.
    """
    import jax
    import jax.numpy as jnp

    from vgen import sharding, trees
    from vgen.metrics.lpips import LPIPS
    from vgen.models.discriminator import NLayerDiscriminator
    from vgen.models.vqgan import VQGAN

    mesh = sharding.make_mesh(data=2, fsdp=2, sequence=2)
    x = jax.ShapeDtypeStruct((8, 32, 32, 3), jnp.float32, sharding=sharding.batch_sharding(mesh))
    tokenizer = VQGAN(channels=64, multipliers=(1, 2), blocks=4, latent_channels=64, num_codes=16, groups=4)
    cases = {
        "LPIPS": (LPIPS(), (x, x), 4), "discriminator": (NLayerDiscriminator(channels=64, norm="group"), (x,), 2),
        "VQ-GAN": (tokenizer, (x,), 2),
    }  # fmt: skip
    found = {}
    for name, (net, pictures, here) in cases.items():
        flat = trees.flatten(jax.eval_shape(net.init, jax.random.key(0), *pictures)["params"])
        places = sharding.param_shardings(flat, mesh)
        split = {
            path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=places[path]) for path, leaf in flat.items()
        }
        with jax.set_mesh(mesh):
            call = jax.jit(lambda params, *x, net=net: net.apply({"params": params}, *x))
            text = call.lower(trees.unflatten(split), *pictures).compile().as_text()
        shapes = re.findall(r"= \w+\[([\d,]+)\]\S* all-gather\(", text)
        maps = [
            shape for shape in shapes if shape.count(",") == 3 and not re.match("[1-4],[1-4],", shape)
        ]  # no kernels
        found[name] = [len(shapes), [shape for shape in maps if int(shape.split(",")[0]) > here]]
    return found


def moments_lie_with_parameters(state) -> bool:
    """Whether all of the optimiser's arrays, and the average, are split as the parameters that they belong to."""
    import jax

    pairs = []
    for path, leaf in jax.tree_util.tree_leaves_with_path((state.opt, state.ema)):
        names = [part.key for part in path if getattr(part, "key", None) in state.params]
        pairs += [(leaf, state.params[name]) for name in names if leaf.shape == state.params[name].shape]
    assert len(pairs) == 3 * len(state.params)
    return all(leaf.sharding.is_equivalent_to(param.sharding, leaf.ndim) for leaf, param in pairs)


def on_8_devices(name):
    """What this file, run on 8 emulated devices, reports of it."""
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.devices_test", name],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_every_task_gives_the_losses_of_one_device():
    """On a mesh of data 2, fsdp 2 and tensor 2, the layers split inside."""
    report = on_8_devices("every")
    assert set(report) == {"/".join(each) for each in TASKS}
    print("\nrelative difference of a loss, of a gradient, parameters split:")
    for name, (loss, gradient, split) in report.items():
        print(f"  {name}: {loss:.1e}, {gradient:.1e}, {split}")
        assert loss <= 1e-5 and gradient <= 1e-5 and split > 0, name


def test_convolutions_gather_parameters_and_no_pictures():
    """Left alone, the compiler gathered the maps of all devices: Muse's decoder took 70 GB a device, and takes 2.8."""
    report = on_8_devices("gathered")
    assert set(report) == {"LPIPS", "discriminator", "VQ-GAN"}
    for name, (count, maps) in report.items():
        assert count and not maps, (name, maps)


@pytest.mark.parametrize("name", ["toy", "vit", pytest.param("muse", marks=pytest.mark.slow)])
def test_eight_devices_give_the_losses_of_one(name):
    """And as the programs are compiled: no stack of layers is ever gathered whole, and moments lie with parameters."""
    report = on_8_devices(name)
    assert report["devices"] == 8 and len(set(report["losses"])) > 1
    print(f"\n{name} on 8 devices, largest relative difference of a loss:")
    for sizes, _ in MESHES[name]:
        found, ways = report[str(sizes)], sizes.get("fsdp", 1) * sizes.get("tensor", 1)
        print(f"  {sizes}: {found['difference']:.1e}, {found['split']} parameters split, {found['gathers']} gathers")
        assert found["difference"] <= 1e-5
        assert (found["split"] > 0) == (ways > 1) and found["moments"] == 2 * found["split"] and found["like"]
        assert found["share"] == 1 / ways
        assert not found["whole"]
        if name == "vit" and sizes["fsdp"] > 1:
            assert found["gathers"] > 1, "layers are gathered one at a time"


if __name__ == "__main__":
    whole = {"every": every, "gathered": gathered}
    print(json.dumps(whole[sys.argv[1]]() if sys.argv[1] in whole else main(sys.argv[1])))
