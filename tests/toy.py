"""Tasks of a matrix or two and endless data, so that tests of the engine compile in about a second."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vgen import sharding
from vgen import state as states
from vgen.train import TrainConfig, fit
from vgen.types import Loss

FEATURES = 8


def features(batch, count=FEATURES):
    """float [b, count]: batch["x"], or the first pixels of batch["image"]."""
    if "x" in batch:
        return batch["x"]
    return batch["image"].reshape(len(batch["image"]), -1)[:, :count] / jnp.float32(255)


@dataclasses.dataclass(frozen=True)
class Linear:
    """Learn a frozen matrix by least squares; counts its steps in a buffer.

    noise: added to the targets, from the step's key.  poison: the examples x[:, 0] > 100 give a loss of NaN.
    unknown_update: returns an update that no buffer takes.  size, max_steps: of what `sample` makes.
    classes: number of the labels that it is told, which make its pictures brighter.
    """

    width: int = 4
    noise: float = 0.0
    poison: bool = False
    unknown_update: bool = False
    size: int = 16
    max_steps: int = 10
    classes: int = 0

    groups = {"main": r"dense/.*"}
    buffers = r"seen/.*"

    def init(self, key, batch):
        shape = (features(batch).shape[1], self.width)
        keys = jax.random.split(key)
        return {
            "dense": {"kernel": jax.random.normal(keys[0], shape) * 0.1, "bias": jnp.zeros(self.width)},
            "fixed": {"kernel": jax.random.normal(keys[1], shape)},
            "seen": {"batches": jnp.zeros(())},
        }

    def losses(self, params, ctx, batch, key):
        x = features(batch)
        error = x @ params["dense"]["kernel"] + params["dense"]["bias"] - x @ params["fixed"]["kernel"]
        value = jnp.square(error + self.noise * jax.random.normal(key, error.shape, error.dtype)).mean()
        if self.poison:
            value = jnp.where((x[:, 0] > 100).any(), jnp.nan, value)
        updates = {"seen/batches": params["seen"]["batches"] + 1}
        if self.unknown_update:
            updates["nowhere"] = value
        return {"main": Loss(value, {"noise": jax.random.normal(key)}, updates)}

    def sample(self, params, key, conds, *, steps=2, guidance_scale=1.0):
        """Pictures of one colour; with an image, that image."""
        rgb = jax.random.randint(key, (3,), 0, 200) + jnp.int32(guidance_scale + steps)
        labels = conds["label"] if self.classes else jnp.zeros(len(next(iter(conds.values()))), int)
        plain = jnp.broadcast_to(rgb + labels[:, None, None, None], (len(labels), self.size, self.size, 3))
        return {"image_out": conds.get("image", plain.astype(jnp.uint8))}

    def score(self, params, conds):
        """Brighter pictures are better; of labels above 4 nothing can be said."""
        return jnp.where(conds["label"] > 4, jnp.nan, conds["image_out"].astype(jnp.float32).mean((1, 2, 3)))

    def evaluate(self, params, batches, key):
        return {"seen": float(params["seen"]["batches"]), "batches": len(list(batches))}

    def show(self, params, batch, key):
        return {"input": np.asarray(batch["image"][0])}


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two groups, each constant in the other's parameters: a generator made to please a discriminator that is not."""

    stop: bool = True

    groups = {"gen": r"gen/.*", "disc": r"disc/.*"}
    buffers = ""

    def init(self, key, batch):
        keys = jax.random.split(key)
        return {
            "gen": {"kernel": jax.random.normal(keys[0], (FEATURES, 6))},
            "disc": {"kernel": jax.random.normal(keys[1], (6, 1))},
        }

    def losses(self, params, ctx, batch, key):
        fixed = jax.lax.stop_gradient if self.stop else lambda x: x
        fake = features(batch) @ params["gen"]["kernel"]
        fool = jnp.square(fake @ fixed(params["disc"]["kernel"]) - 1).mean()
        tell = jnp.square(fixed(fake) @ params["disc"]["kernel"]).mean()
        return {"gen": Loss(fool, {}), "disc": Loss(tell, {})}


class Stream:
    """Endless batches {"x": float32 [b, 8]}; batch k depends on k alone.  change: (k, x) -> x."""

    def __init__(self, batch_size: int = 8, sharding=None, change=lambda k, x: x):
        self.batch_size, self.sharding, self.change, self.k = batch_size, sharding, change, 0

    def __next__(self) -> dict[str, Any]:
        x = np.random.default_rng(self.k).normal(size=(self.batch_size, FEATURES)).astype(np.float32)
        x, self.k = self.change(self.k, x), self.k + 1
        return {"x": jax.device_put(x, self.sharding)}

    def get_state(self):
        return {"k": self.k}

    def set_state(self, state):
        self.k = state["k"]


def settings(steps: int = 4, **kwargs) -> TrainConfig:
    """A TrainConfig of the toys; `groups` of optimisers by default those of Linear."""
    kwargs = dict(batch_size=8, optim={"main": dict(lr=0.05, name="sgd", b1=0.0, kind="constant")}) | kwargs
    return TrainConfig(steps=steps, **kwargs)


def fixed(width: int = 4) -> dict[str, np.ndarray]:
    """The frozen matrix of Linear, given from elsewhere."""
    return {"fixed/kernel": np.random.default_rng(99).normal(size=(FEATURES, width)).astype(np.float32)}


def train(task, config: TrainConfig, *, batches=None, mesh=None, seed: int = 0, given=None, **kwargs):
    """`fit` on a stream, from a seed; Linear gets its frozen matrix."""
    mesh = mesh or sharding.make_mesh(devices=jax.devices()[:1])
    batches = batches or Stream(config.batch_size, sharding.batch_sharding(mesh))
    example = {"x": jax.ShapeDtypeStruct((config.batch_size, FEATURES), jnp.float32)}
    layout = states.Layout(task, example, config.groups)
    if given is None:
        given = fixed(task.width) if isinstance(task, Linear) else {}
    key = jax.random.key(seed)
    return fit(task, config, batches, layout=layout, mesh=mesh, key=key, given=given, **kwargs)
