"""The studies of sampling and editing: their measures on answers known by hand, and each of them on a tiny system."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from tests.compile_test import compilations
from tests.conftest import quick_compilation
from vgen.config import UserError, build
from vgen.data.scene_oracle import read
from vgen.data.scenes import World, scene
from vgen.metrics import edit_eval as study
from vgen.recipes import WORLD
from vgen.sharding import make_mesh
from vgen.system import System

ROOT = Path(__file__).parents[2]
SIZE, OTHER = 32, World(**WORLD | {"seed": 1})
METRICS = {
    "ddim": {"scene", "pairs", "distance"},
    "sdedit": {"fidelity", "scene", "colour"},
    "ilvr": {"lowpass_error", "scene", "diversity"},
    "repaint": {"known_error", "scene", "object", "agreement", "seam", "evaluations"},
}


@dataclasses.dataclass(frozen=True)
class Paints:
    """A task whose pictures are paint(params, conds, knobs, settings)."""

    paint: Callable[..., Any]
    conditional: bool = False
    image_edit: Any = None
    solver: str = ""
    max_steps: int = 1000

    def sample(self, params, key, conds, **knobs):
        return {"image_out": jnp.asarray(self.paint(params, conds, knobs, self)).astype(jnp.uint8)}


def system(paint, params=None, batch_size=8, **settings):
    """What a study sees of a System."""
    usual = {"steps": 10, "strength": 0.5}

    def knobs(name, given):
        return {k: jnp.asarray(given.get(k, value)) for k, value in usual.items()}

    return SimpleNamespace(
        names=["net"], tasks={"net": Paints(paint, **settings)}, params={"net": params}, batch_size=batch_size,
        size=SIZE, settings=SimpleNamespace(knobs={"net": usual}, task={}), run=SimpleNamespace(mesh=make_mesh(1)),
        knobs=knobs, batches=System.batches,
    )  # fmt: skip


@pytest.fixture(scope="module")
def cases():
    return study.cuts(OTHER, SIZE, 24)


def stacked(cases):
    return np.stack([case.image for case in cases])


# ---------------------------------------------------------------------------------------------------------- measures


def test_cuts_hide_a_part_of_one_object(cases):
    """Told by the true masks, which are drawn again here."""
    scenes = {scene(OTHER, i, SIZE)["image"].tobytes(): scene(OTHER, i, SIZE, truth=True) for i in range(40)}
    sides = set()
    for case in cases:
        shares = [(mask & case.hole).sum() / mask.sum() for mask in scenes[case.image.tobytes()]["masks"]]
        assert 0.35 <= shares.pop(case.cut) <= 0.65 and not any(shares)
        corners = case.hole[0, 0], case.hole[0, -1], case.hole[-1, 0]
        sides.add(corners)
        straight = case.hole if corners[0] == corners[1] else case.hole.T  # whole rows or columns, from one edge
        assert (straight == straight[:, :1]).all() and np.abs(np.diff(straight[:, 0].astype(int))).sum() == 1
    assert len(sides) == 4 and any(len(case.objects) == 2 for case in cases)
    again = study.cuts(OTHER, SIZE, 24)
    assert all((a.hole == b.hole).all() and (a.image == b.image).all() for a, b in zip(cases, again))
    with pytest.raises(ValueError, match="fewer than 2 of 200 scenes of 32 pixels could be used"):
        study.cuts(OTHER, SIZE, 2, hidden=(0.5, 0.4))


def test_true_pictures_are_complete(cases):
    truth = dict(known_error=0.0, scene=1.0, object=1.0, agreement=1.0, seam=1.0)
    assert study.repainted(stacked(cases), cases, OTHER) == truth


def test_broken_pictures_are_told(cases):
    holes = np.stack([case.hole for case in cases])[..., None]
    half = np.where(holes, stacked(cases)[:, :1, :1], stacked(cases))  # a colour for the hole: half an object is none
    found = study.repainted(half, cases, OTHER)
    assert found["known_error"] == 0 and found["object"] < 0.1 and found["agreement"] < 0.1 and found["seam"] > 5
    moved = stacked(cases).astype(int)
    moved[3][~cases[3].hole] += np.where(moved[3][~cases[3].hole] > 128, -7, 7)
    found = study.repainted(moved.astype(np.uint8), cases, OTHER)
    assert found["known_error"] == 7 and found["object"] == found["agreement"] == 1


def test_agreement_needs_every_object_and_nothing_else(cases):
    """Of pictures of which another object is gone, the cut one is still there."""
    pairs = [case for case in cases if len(case.objects) == 2]
    gone = []
    for case in pairs:
        other = case.objects[1 - case.cut]
        y, x = np.mgrid[:SIZE, :SIZE] + 0.5
        near = np.hypot(x / SIZE - other.x, y / SIZE - other.y) < other.radius + 0.04
        corner = np.median(case.image.reshape(-1, 3), 0).astype(np.uint8)
        gone.append(np.where(near[..., None], corner, case.image))
    found = study.repainted(np.stack(gone), pairs, OTHER)
    assert found["scene"] > 0.8 and found["object"] > 0.8 and found["agreement"] == 0


def test_objects_are_found_by_their_place_and_words():
    example = next(study.scenes(OTHER, SIZE, 1))
    reading, o = read(example["image"], OTHER), example["objects"][0]
    assert study.found(o, reading)
    assert not study.found(dataclasses.replace(o, x=o.x + 0.2), reading)
    colour = next(c for c in WORLD["colours"] if c not in [each.colour for each in example["objects"]])
    wrong = dataclasses.replace(o, colour=colour)
    assert not study.found(wrong, reading) and study.found(wrong, reading, ("shape",))


def test_numbers_by_hand():
    black, white = np.zeros((2, 8, 8, 3), np.uint8), np.full((2, 8, 8, 3), 255, np.uint8)
    assert study.rms(black, white) == 2 and study.rms(black, black) == 0
    assert study.psnr(black, black) == pytest.approx(100) and study.psnr(black, white) == pytest.approx(0, abs=1e-6)
    half = black.copy()
    half[:, :, 4:] = 200
    hole = np.zeros((2, 8, 8), bool)
    hole[:, :, 4:] = True
    assert study.border_gradient(half, hole) == 200 and study.border_gradient(half, hole.swapaxes(1, 2)) == 0
    rough = study.crude(half, 8)
    assert (rough == 100).all() and (study.crude(half, 4) == half).all()
    with pytest.raises(ValueError, match="pictures of 8 pixels are no multiple of blocks of 3"):
        study.crude(half, 3)
    assert study.evaluations(250, 10, 10) == 2410 and study.evaluations(100, 10, 1) == 100  # the authors' count


# --------------------------------------------------------------------------------------------------- what they draw


def test_pictures_are_drawn_in_batches_by_one_program():
    draw = study.sampler(system(lambda params, conds, knobs, task: conds["image"] + knobs["steps"]))
    image = np.arange(11 * 12, dtype=np.uint8).reshape(11, 2, 2, 3)
    np.testing.assert_array_equal(draw({"image": image}, 0, steps=3), image + 3)
    with compilations() as found:
        np.testing.assert_array_equal(draw({"image": image}, 1, steps=5), image + 5)
    assert not found
    with pytest.raises(UserError, match="sets 'eta', which is not among config.generate.knobs.net"):
        draw({"image": image}, 0, eta=1.0)
    with pytest.raises(UserError, match="net takes classes or texts"):
        study.sampler(system(None, conditional=True))


def test_repaint_study_hands_over_what_is_known_and_no_more(cases):
    """A system that paints nothing leaves the holes grey; one that knows the truth is right."""
    measure = study.RepaintStudy(WORLD, repeats=(1, 2), jump_length=2, cases=24)
    blank = measure(system(lambda params, conds, knobs, task: conds["image"]))["scores"]
    assert set(blank) == {"repeats_1", "repeats_2", "slow"}
    assert blank["repeats_1"]["known_error"] == 0 and blank["repeats_1"]["object"] < 0.1
    assert [blank[row]["evaluations"] for row in ("repeats_1", "repeats_2", "slow")] == [10, 18, 18]
    right = measure(system(lambda params, conds, knobs, task: params, stacked(cases), batch_size=24))
    assert all(row["agreement"] == 1 and row["seam"] == 1 for row in right["scores"].values())
    assert right["protocol"]["cases"] == 24 and right["protocol"]["knobs"]["net"]["steps"] == 10


def test_sdedit_study():
    true = np.stack([x["image"] for x, _ in zip(study.scenes(OTHER, SIZE, 8), range(8))])
    paint = lambda params, conds, knobs, task: jnp.where(knobs["strength"] > 0.5, params, conds["image"])
    scores = study.SdeditStudy(WORLD, strengths=(0.3, 0.9), pictures=8)(system(paint, true))["scores"]
    assert scores["strength_0.3"] == {"fidelity": pytest.approx(100), **scores["input"]}
    assert scores["input"]["scene"] < 0.5
    rough = study.crude(true, 4)
    assert scores["strength_0.9"] == {"fidelity": study.psnr(true, rough), "scene": 1.0, "colour": 1.0}


def test_ilvr_study():
    noise = np.random.default_rng(0).integers(0, 256, (8, SIZE, SIZE, 3))
    paint = lambda params, conds, knobs, task: jnp.where(knobs["strength"] > 0, conds["image"], noise)
    scores = study.IlvrStudy(WORLD, factors=(2, 8), ranges=(0.5,), references=4)(system(paint))["scores"]
    for factor in (2, 8):
        free = scores[f"factor_{factor}_range_0"]
        assert scores[f"factor_{factor}_range_0.5"] == {"lowpass_error": 0.0, "scene": 1.0, "diversity": 0.0}
        assert free["lowpass_error"] > 0.2 and free["scene"] == 0 and free["diversity"] > 0.25
    assert scores["factor_2_range_0"]["lowpass_error"] > scores["factor_8_range_0"]["lowpass_error"]


def test_solver_study():
    """Its distance is to the most steps of the same solver: here the pictures differ by 51 of 255 in all pixels."""
    level = lambda params, conds, knobs, task: (
        jnp.full((8, SIZE, SIZE, 3), 51) * (knobs["steps"] > 5) + 51 * len(task.solver)
    )
    tasks = {"a": {"solver": "x"}, "b": {"solver": "xyz"}}
    scores = study.SolverStudy(WORLD, tasks, steps=(2, 10), pictures=8)(system(level))["scores"]
    assert {row: values["distance"] for row, values in scores.items()} == {
        "a_steps_2": pytest.approx(0.4), "a_steps_10": 0, "b_steps_2": pytest.approx(0.4), "b_steps_10": 0,
    }  # fmt: skip


@pytest.mark.parametrize("name", METRICS)
def test_a_tiny_system_is_measured(name, tiny_runs):
    run = tiny_runs(ROOT / "configs" / f"{name}.py")
    with quick_compilation():
        report = build(run.config.eval)(System(run))
    scores = json.loads(json.dumps(report))["scores"]
    assert len(scores) >= 2 and report["protocol"]["knobs"]["unet"]["steps"] >= 3
    for row, values in scores.items():
        assert set(values) == METRICS[name] - ({"fidelity"} if row == "input" else set())
        assert np.isfinite(list(values.values())).all()
    if name == "repaint":
        assert all(values["known_error"] == 0 for values in scores.values())
    if name == "ilvr":  # the last step puts the low frequencies in
        assert scores["factor_4_range_1"]["lowpass_error"] < scores["factor_4_range_0"]["lowpass_error"] / 4
    if name == "ddim":
        assert scores["eta_0_steps_3"]["distance"] == 0 < scores["eta_0_steps_2"]["distance"]
