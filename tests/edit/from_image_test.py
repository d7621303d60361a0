"""What a system does with a picture it is given: as `vgen.edit` does it, and the sampling of Diffuse follows it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import quick_compilation
from vgen.config import UserError
from vgen.diffusion import grids, schedules
from vgen.edit import from_image
from vgen.edit.ilvr import low_pass
from vgen.models.unet import UNet
from vgen.tasks.diffuse import Diffuse

TABLE = schedules.discrete(schedules.betas())
SIZE, STEPS = 8, 12
IMAGE = np.random.default_rng(0).integers(0, 256, (2, SIZE, SIZE, 3)).astype(np.uint8)
HOLE = np.zeros((2, SIZE, SIZE), bool)
HOLE[:, :, 5:] = True


@pytest.fixture(scope="module")
def sampled():
    """sampled(edit, conds, **knobs) -> pictures by an untrained network, each edit compiled once."""
    network = UNet(in_channels=3, out_channels=3, widths=(8,), attention=(0,), blocks=1, groups=4)
    solver = dict(solver="ddpm", solver_knobs={"variance": "fixed_small"}, threshold="clip", max_steps=20)
    usual = Diffuse(network, TABLE, SIZE, **solver)
    with quick_compilation():
        params = jax.jit(usual.init)(jax.random.key(0), {"image": IMAGE, "label": np.zeros(2, np.int32)})
    functions = {}

    def draw(edit, conds, steps=STEPS, strength=1.0):
        task = usual if edit is None else dataclasses.replace(usual, image_edit=edit)
        function = functions.setdefault((edit, *conds), jax.jit(task.sample))
        conds = {"label": np.zeros(2, np.int32)} | conds
        with quick_compilation():
            out = function(params, jax.random.key(1), conds, steps=jnp.int32(steps), strength=jnp.float32(strength))
        return np.asarray(out["image_out"]).astype(int)

    return draw


def test_sdedit_and_the_plain_replacement_are_the_usual(sampled):
    np.testing.assert_array_equal(sampled(None, {"image": IMAGE}, strength=0.0), IMAGE)
    assert (sampled(None, {"image": IMAGE}, strength=0.5) != IMAGE).any()
    got = sampled(None, {"image": IMAGE, "mask": HOLE})
    np.testing.assert_array_equal(got[~HOLE], IMAGE[~HOLE])
    np.testing.assert_array_equal(got, sampled(from_image.Repaint(1, 1), {"image": IMAGE, "mask": HOLE}))


def test_repaint_walks_again(sampled):
    once, often = (sampled(from_image.Repaint(2, n), {"image": IMAGE, "mask": HOLE}) for n in (1, 3))
    assert (once[HOLE] != often[HOLE]).any() and (once[~HOLE] == often[~HOLE]).all()
    with pytest.raises(UserError, match="RePaint needs a mask"):
        sampled(from_image.Repaint(), {"image": IMAGE})


def test_ilvr_holds_to_the_reference_for_a_share_of_the_times(sampled):
    low = lambda x: np.asarray(low_pass(jnp.asarray(x, jnp.float32), 4))
    made = {part: sampled(from_image.Ilvr(4), {"image": IMAGE}, strength=part) for part in (0.0, 0.5, 1.0)}
    free, held = (np.abs(low(made[part]) - low(IMAGE)).mean() for part in (0.0, 1.0))
    assert held < free / 3 and (made[0.5] != made[0.0]).any() and (made[0.5] != made[1.0]).any()
    np.testing.assert_array_equal(
        sampled(from_image.Ilvr(4), {"image": IMAGE}, strength=0.0),
        sampled(from_image.Ilvr(2), {"image": IMAGE}, strength=0.0),
    )
    with pytest.raises(UserError, match="takes no mask"):
        sampled(from_image.Ilvr(), {"image": IMAGE, "mask": HOLE})


def test_the_share_of_ilvr_is_counted_in_times():
    """On a grid whose times are multiples of 50: 0 .. 950."""
    x = jnp.zeros((1, SIZE, SIZE, 3))

    @jax.jit
    def held(strength):
        hook = from_image.Ilvr(4)(jnp.ones_like(x), None, strength, TABLE).hook
        moved = lambda step: (hook.after(jax.random.key(0), x, x, None, step, ())[0] != x).any()
        return jax.vmap(moved)(grids.grid(TABLE, 20)).sum()

    assert [held(strength) for strength in (0.0, 0.25, 0.5, 1.0)] == [0, 5, 10, 20]
