"""Studies of methods on a system that is told a text: their measures on answers known by hand, and a run of each."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.conftest import quick_compilation
from vgen.config import build, to_dict
from vgen.data.scene_draw import render
from vgen.data.scene_text import parse
from vgen.data.scenes import World, compose
from vgen.metrics import text_edit_eval as studies
from vgen.metrics.scenes import METRICS
from vgen.recipes import WORLD
from vgen.stages import Run
from vgen.system import System

ROOT = Path(__file__).parents[2]
SMALL, SIZE = World(**WORLD), 32


# ------------------------------------------------------------------------------------------------------------- swaps


@pytest.mark.parametrize("world", [SMALL, World(max_objects=3, heldout=None)], ids=["small", "full"])
def test_swaps_change_one_word(world):
    found = studies.swaps(world, 60, seed=1)
    assert len(found) > 50
    for swap in found:
        assert parse(swap.caption, world.templates) == swap.claims
        assert parse(swap.edited, world.templates) == swap.wanted
        words = zip(swap.caption.split(), swap.edited.split(), strict=True)
        changed = [pair for pair in words if pair[0] != pair[1] and pair not in (("a", "an"), ("an", "a"))]
        assert len(changed) == 1 and swap.word in changed[0][1]
        new = swap.wanted.objects[swap.thing]
        old = {(thing.colour, thing.shape) for thing in swap.claims.objects}
        assert (new.colour, new.shape) in world.training and (new.colour, new.shape) not in old
    shares = np.mean([swap.attribute == "colour" for swap in found])
    assert 0.3 < shares < 0.7
    assert found == studies.swaps(world, 60, seed=1) != studies.swaps(world, 60, seed=2)


def test_no_swap_where_there_is_no_other_pair():
    world = World(**WORLD | dict(colours=("red",), shapes=("circle", "star"), heldout=(), min_objects=2))
    assert not studies.swaps(world, 4)


# ------------------------------------------------------------------------------------------------------------- edits


def case(attribute):
    """(a swap in a scene of two objects, its objects in the order of the claims, its background)."""
    for i in range(500):
        objects, background, claims, caption = compose(SMALL, i)
        if len(objects) == 2 and claims.relations:
            swap = studies._swap(caption, SMALL, np.random.default_rng(i))
            if swap.attribute == attribute:
                found = {(o.colour, o.shape): o for o in objects}
                return swap, [found[thing.colour, thing.shape] for thing in claims.objects], background
    raise AssertionError(f"no scene to change the {attribute} in")


def drawn(objects, background="white"):
    return render(objects, background, SIZE)[0]


def with_(objects, i, **changed):
    return [dataclasses.replace(o, **changed) if j == i else o for j, o in enumerate(objects)]


@pytest.mark.parametrize("attribute", ["colour", "shape"])
def test_true_edit_is_right_in_everything(attribute):
    swap, objects, background = case(attribute)
    source = drawn(objects, background)
    edited = drawn(with_(objects, swap.thing, **{attribute: swap.word}), background)
    assert studies.judge_edit(source, edited, swap, SMALL) == dict(
        changed=True, kept=True, exact=True, psnr_outside=studies.MOST_PSNR
    )
    unedited = studies.judge_edit(source, source, swap, SMALL)
    assert unedited == dict(changed=False, kept=True, exact=False, psnr_outside=studies.MOST_PSNR)


def test_every_wrong_edit_is_told():
    swap, objects, background = case("colour")
    i, other = swap.thing, 1 - swap.thing
    source, right = drawn(objects, background), with_(objects, swap.thing, colour=swap.word)
    judged = lambda objects, background=background: studies.judge_edit(source, drawn(objects, background), swap, SMALL)
    # the place of the object alone is looked at, not who else has the colour
    word = next(c for c in SMALL.colours if c not in (swap.word, *(o.colour for o in objects)))
    wrong = judged(with_(objects, i, colour=word))
    assert not wrong["changed"] and wrong["kept"] and wrong["psnr_outside"] == studies.MOST_PSNR
    swapped = with_(with_(objects, i, x=objects[other].x, y=objects[other].y, colour=swap.word), other,
                    x=objects[i].x, y=objects[i].y)  # fmt: skip
    wrong = judged(swapped)
    assert not wrong["changed"] and not wrong["kept"] and wrong["psnr_outside"] < 20
    wrong = judged(with_(right, other, colour=word))
    assert wrong["changed"] and not wrong["kept"] and not wrong["exact"] and wrong["psnr_outside"] < 25
    wrong = judged([right[i]])
    assert wrong["changed"] and not wrong["kept"] and not wrong["exact"]
    wrong = judged([right[other]])
    assert not wrong["changed"] and not wrong["kept"]
    wrong = judged(right, "grey" if background == "white" else "white")
    assert wrong["changed"] and not wrong["kept"] and wrong["psnr_outside"] < 12
    noise = np.random.default_rng(0).integers(0, 256, source.shape).astype(np.uint8)
    wrong = studies.judge_edit(source, noise, swap, SMALL)
    assert not any(wrong[name] for name in ("changed", "kept", "exact")) and wrong["psnr_outside"] < 15


def test_psnr_is_that_of_the_pixels_outside():
    swap, objects, background = case("colour")
    source = drawn(objects, background)
    i = swap.thing
    outside = ~studies.object_mask(objects[i], SIZE, 4)
    edited = drawn(with_(objects, i, colour=swap.word), background)
    edited[outside] = np.where(edited[outside] > 127, edited[outside] - 4, edited[outside] + 4)
    found = studies.judge_edit(source, edited, swap, SMALL, margin=4)
    assert found["psnr_outside"] == pytest.approx(10 * np.log10(255**2 / 16), abs=0.2)  # a mask of what was read


@pytest.mark.parametrize("shape", SMALL.shapes)
def test_masks_cover_what_is_drawn_and_grow(shape):
    o = dataclasses.replace(compose(SMALL, 0)[0][0], shape=shape, x=0.47, y=0.52)
    touched = (render([o], "white", SIZE)[0] != render([], "white", SIZE)[0]).any(-1)
    masks = [studies.object_mask(o, SIZE, margin) for margin in (0, 1, 2)]
    assert (touched & ~masks[0]).sum() <= 4 and masks[0].sum() <= 1.25 * touched.sum()  # rims of 1 % opacity
    assert not (touched & ~masks[1]).any()
    for smaller, larger in zip(masks, masks[1:]):
        grown = np.stack([np.roll(smaller, (dy, dx), (0, 1)) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]).any(0)
        assert (larger == grown).mean() > 0.98 and larger.sum() > smaller.sum()
    unknown = studies.object_mask(dataclasses.replace(o, shape="unknown"), SIZE)
    assert not (masks[0] & ~unknown).any()


# ------------------------------------------------------------------------------------------------------------- seams


def test_seams():
    rng = np.random.default_rng(0)
    even = rng.integers(100, 120, (8, 16, 64, 3)).astype(np.uint8)
    borders = [16, 32, 48]
    assert studies.seam(even, borders) == pytest.approx(1, abs=0.1)
    hard = even.copy()
    hard[:, :, 16:32] += 60
    assert studies.seam(hard, borders) > 5
    assert studies.seam(hard, [8, 24]) < 1  # the border lies elsewhere
    soft = even.copy()
    soft[:, :, borders] = soft[:, :, np.array(borders) - 1]
    assert studies.seam(soft, borders) == 0
    blocks = rng.integers(0, 256, (8, 4, 16, 3)).astype(np.uint8).repeat(4, 1).repeat(4, 2)  # of a local decoder
    assert studies.seam(blocks, borders, places=4) == pytest.approx(1, abs=0.15)
    assert studies.seam(blocks, borders, places=1) > 3


# -------------------------------------------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def measured(tiny_runs):
    """Give it a study's name for (its system on tiny's shared weights, its evaluation)."""
    trained = tiny_runs(ROOT / "configs" / "ldm.py")

    def get(name):
        import runpy

        config = runpy.run_path(str(ROOT / f"configs/{name}.py"))["get_config"]("tiny")
        system = System(Run(config, trained.workdir))
        return system, build(to_dict(config.eval), "config.eval")

    with quick_compilation():
        yield get


def test_guidance(measured):
    system, study = measured("cfg")
    report = dataclasses.replace(study, rescale=(0.0, 0.7))(system)
    assert list(report["scores"]) == ["scale_1", "scale_3", "scale_1_rescale_0.7", "scale_3_rescale_0.7"]
    assert all(set(row) == {*METRICS, "diversity"} and row["diversity"] > 0 for row in report["scores"].values())
    scale = report["scores"]
    assert scale["scale_1"]["diversity"] == pytest.approx(scale["scale_1_rescale_0.7"]["diversity"], rel=0.02)
    assert scale["scale_3"]["diversity"] != scale["scale_3_rescale_0.7"]["diversity"]
    assert report["protocol"]["captions"] == 4 and report["protocol"]["knobs"]["unet"]["steps"] == 3


def test_prompt_to_prompt_has_no_case_in_an_untrained_system(measured):
    system, study = measured("prompt_to_prompt")
    report = dataclasses.replace(study, settings=())(system)
    assert (report["protocol"]["cases"], report["protocol"]["tried"]) == (0, 8)
    assert all(np.isnan(value) for value in report["scores"]["resample"].values())


def test_prompt_to_prompt_draws_pairs_from_one_noise_by_one_program(measured, monkeypatch):
    """Where every source counts: the first ones are taken, and nothing replaced is sampling anew."""
    system, study = measured("prompt_to_prompt")
    rng = np.random.default_rng(0)
    drawn = lambda a: a + 0.3 * rng.standard_normal(a.shape).astype(np.float32)  # two steps from where maps matter not
    system.params["unet"] |= {
        part: jax.tree.map(drawn, system.params["unet"][part]) for part in ("network", "text_encoder")
    }
    seen, made = {}, []

    def judged(source, edited, swap, world, margin):
        seen.setdefault(swap.caption, []).append((source, edited))
        return dict(changed=swap.attribute == "colour", kept=True, exact=False, psnr_outside=30.0)

    drawer = studies._Drawer
    monkeypatch.setattr(studies, "_Drawer", lambda *args: made.append(drawer(*args)) or made[-1])
    monkeypatch.setattr(studies, "_exact", lambda *args: True)
    monkeypatch.setattr(studies, "judge_edit", judged)
    study = dataclasses.replace(study, cases=5, settings=((0.0, 0.0, None), (0.8, 0.4, 0.6), (0.0, 0.0, 1.0)))
    report = study(system)
    rows = ["resample", "cross_0_self_0", "cross_0.8_self_0.4_blend_0.6", "cross_0_self_0_blend_1"]
    assert list(report["scores"]) == rows
    assert (report["protocol"]["cases"], report["protocol"]["tried"]) == (5, 5) and len(seen) == 5
    colours = np.mean([swap.attribute == "colour" for swap in studies.swaps(SMALL, 8)[:5]])
    wanted = dict(changed=colours, kept=1, exact=0, psnr_outside=30, success=colours)
    assert all(row.items() >= wanted.items() for row in report["scores"].values())
    assert made[0]._draw._cache_size() == 1
    for (source, anew), (_, zero), (_, kept), _ in seen.values():
        np.testing.assert_array_equal(anew, zero)
        assert (anew != kept).any() and (source != anew).any()
    first = studies.swaps(SMALL, 8)[0]
    told = dict(zip(("text", "text_mask"), system.text([first.caption, first.edited])))
    noise = jax.random.normal(jax.random.fold_in(made[0].key, 0), made[0].shape)
    draw = jax.jit(dataclasses.replace(system.tasks["unet"], method=None).sample)
    plain = draw(system.params["unet"], made[0].key, told, start=np.stack([noise] * 2), **made[0].knobs)["image_out"]
    assert np.abs(plain.astype(int) - np.stack(seen[first.caption][0])).max() <= 1


@pytest.mark.slow
def test_panoramas(measured):
    system, study = measured("multidiffusion")
    report = study(system)
    assert list(report["scores"]) == ["separate", "windows_7"]
    assert all(row["seam"] > 0 and 0 <= row["scene"] <= 1 for row in report["scores"].values())
    wide = system(["a red star"] * 3, seed=3)["unet"]
    assert wide.shape == (3, 16, 64, 3) and wide.std() > 0
