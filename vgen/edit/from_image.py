"""What a system does with a picture that it is given, and a mask where there is one: an edit that configs can name.

Each is called as (image, known, strength, schedule) -> Edit with the picture in the space of the denoiser, `known` of
1 where it is kept and 0 where it is made anew (None without a mask), and the traced knob `strength` in [0, 1].
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from vgen.config import UserError
from vgen.diffusion.schedules import Schedule
from vgen.edit import ilvr, repaint, sdedit
from vgen.types import Edit

Image = Float[Array, "b height width c"]
Known = Float[Array, "b height width 1"] | None


def usual(image: Image, known: Known, strength: Any, schedule: Schedule) -> Edit:
    """SDEdit from `strength` of the way up without a mask, the plain replacement of what is known with one."""
    if known is None:
        return sdedit.sdedit(image, strength)
    return repaint.repaint(image, known, jump_length=1, repeats=1)


@dataclasses.dataclass(frozen=True)
class Repaint:
    """RePaint in the hole of a mask; strength is not read.  jump_length, repeats: of `edit.repaint.repaint`.

    Raises UserError without a mask.
    """

    jump_length: int = 10
    repeats: int = 10

    def __call__(self, image: Image, known: Known, strength: Any, schedule: Schedule) -> Edit:
        if known is None:
            raise UserError("RePaint needs a mask beside the picture: white where it is to be made anew")
        return repaint.repaint(image, known, self.jump_length, self.repeats)


@dataclasses.dataclass(frozen=True)
class Ilvr:
    """ILVR towards the picture in the first `strength` of the times, 1 for all of them.  factor: of `edit.ilvr.ilvr`.

    Raises UserError with a mask.
    """

    factor: int = 4

    def __call__(self, image: Image, known: Known, strength: Any, schedule: Schedule) -> Edit:
        if known is not None:
            raise UserError("ILVR keeps the coarse look of the whole picture and takes no mask")
        strength = jnp.asarray(strength, float)
        until = jnp.where(strength >= 1, -jnp.inf, (1 - strength) * schedule.t_max)
        return ilvr.ilvr(image, self.factor, until)
