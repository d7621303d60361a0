"""The study of parallel decoding by class, on systems whose pictures are known."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from vgen.config import UserError
from vgen.data.scenes import World, classes, scene
from vgen.metrics.token_eval import TokenStudy
from vgen.recipes import CLASSES
from vgen.sharding import make_mesh
from vgen.system import System

SIZE = 32
WORLD = CLASSES | dict(lattice=8)
KINDS = classes(World(**WORLD), "pair")


def of_each_class():
    """A true picture of every class."""
    found = {}
    for i in range(2000):
        example = scene(World(**WORLD), i, SIZE)
        first = example["objects"][0]
        found.setdefault(KINDS.index((first.colour, first.shape)), example["image"])
        if len(found) == len(KINDS):
            return np.stack([found[i] for i in range(len(KINDS))])
    raise AssertionError("a class is never drawn")


@dataclasses.dataclass(frozen=True)
class Paints:
    """Draws the picture of a class, of the next one under another schedule than its own or without guidance; of a
    picture to edit, that picture, or with `anew` the class's inside of the mask.
    """

    schedule: str = "cosine"
    classes: int = len(KINDS)
    anew: bool = False
    max_steps: int = 16
    conditional: Any = True

    def sample(self, params, key, conds, *, steps, guidance_scale):
        off = (self.schedule != "cosine") | (guidance_scale == 0) | (steps == 4)
        made = params[(conds["label"] + off) % self.classes]
        if "image" in conds:
            made = jnp.where(conds["mask"][..., None] & self.anew, made, conds["image"])
        return {"image_out": made}


def system(**settings):
    usual = {"steps": 12, "guidance_scale": 1.0}
    return SimpleNamespace(
        names=["net"], tasks={"net": Paints(**settings)}, params={"net": jnp.asarray(of_each_class())}, batch_size=16,
        size=SIZE, settings=SimpleNamespace(knobs={"net": usual}, task={}), run=SimpleNamespace(mesh=make_mesh(1)),
        knobs=lambda name, given: {k: jnp.asarray(given.get(k, value)) for k, value in usual.items()},
        batches=System.batches,
    )  # fmt: skip


def test_every_row_is_of_what_was_drawn():
    study = TokenStudy(WORLD, pictures=24, table=12, schedules=("cosine", "linear"), steps=(4, 8), edits=6)
    found = study(system())
    exact = {row: scores["scene_exact"] for row, scores in found["scores"].items()}
    assert exact == dict(
        net=1, net_guidance_off=0, cosine_steps_4=0, cosine_steps_8=1, linear_steps_4=0, linear_steps_8=0, outpaint=1,
        inpaint=1, replace=0,
    )  # fmt: skip
    assert all(found["scores"][row]["kept"] == 100 for row in ("outpaint", "inpaint", "replace"))
    assert "diversity" not in found["scores"]["net"] and found["protocol"]["pictures"] == 24
    assert found["protocol"]["knobs"] == {"net": {"steps": 12, "guidance_scale": 1.0}}


def test_another_class_in_the_box_is_asked_for():
    """A whole picture of the class where the box is the whole picture: the oracle reads what was asked for."""
    found = TokenStudy(WORLD, pictures=1, table=1, schedules=(), edits=6, margin=SIZE)(system(anew=True))
    assert found["scores"]["replace"]["scene_exact"] == found["scores"]["inpaint"]["scene_exact"] == 1
    assert found["scores"]["replace"]["kept"] == 100
    half = found["scores"]["outpaint"]  # halves of two pictures do not fit
    assert half["scene_exact"] < 1 and half["kept"] == 100


def test_systems_without_these_classes_are_refused():
    with pytest.raises(UserError, match=f"not told one of the {len(KINDS)} classes"):
        TokenStudy(WORLD)(system(classes=5))
