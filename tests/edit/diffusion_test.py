"""SDEdit, ILVR, RePaint and MultiDiffusion on a toy denoiser: what each promises, and any two together."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.compile_test import compilations
from tests.conftest import quick_compilation
from vgen.diffusion import grids, multistep, samplers, schedules
from vgen.edit.compose import chain, compose, run
from vgen.edit.ilvr import ilvr, low_pass
from vgen.edit.multidiffusion import multidiffusion, windows
from vgen.edit.repaint import repaint
from vgen.edit.sdedit import sdedit
from vgen.sample import sample
from vgen.types import AttentionControl, Edit, Intervention, Prediction

TABLE = schedules.discrete(schedules.betas())
GRID = grids.grid(TABLE, 20)
IMAGE = jnp.asarray(np.random.default_rng(0).standard_normal((2, 8, 8, 3)), jnp.float32)
KNOWN = jnp.zeros((1, 8, 8, 1)).at[:, :, :5].set(1.0)
NOISE = jax.random.normal(jax.random.key(9), IMAGE.shape)
KEY = jax.random.key(0)


def denoise(x, step):
    """Smooth pictures: neighbours agree, in a field of view of three pixels."""
    near = sum(jnp.roll(x, shift, axis) for axis in (1, 2) for shift in (-1, 1))
    return Prediction((x + near) / 5 / jnp.sqrt(step.alpha**2 + step.sigma**2), {"variance": x, "other": step.t})


@pytest.fixture(scope="module", autouse=True)
def quick():
    with quick_compilation():
        yield


def plain(sampler=None, grid=GRID, key=KEY):
    return sample(denoise, sampler or samplers.ancestral(), grid, jax.random.split(key)[1], NOISE)


def edited(edit, sampler=None, grid=GRID, x=NOISE, **knobs):
    return run(edit, denoise, sampler or samplers.ancestral(), grid, KEY, x, **knobs)


def test_no_edit_is_the_plain_loop():
    np.testing.assert_allclose(edited(Edit()), plain(), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="the edit sets no start"):
        edited(Edit(), x=None)


def test_sdedit():
    np.testing.assert_array_equal(edited(sdedit(IMAGE, 0.0)), IMAGE)
    far = [float(jnp.abs(edited(sdedit(IMAGE, s)) - IMAGE).mean()) for s in (0.1, 0.4, 0.8)]
    assert far == sorted(far) and far[0] < far[-1] / 1.15
    rows = grids.tail(GRID, 0.4)  # diffusers: init_timestep = int(20 * 0.4), the last 8 times
    assert int(grids.rows(rows)) == 8
    np.testing.assert_array_equal(rows.t[:8], GRID.t[12:])
    start = sdedit(IMAGE, 0.4, lambda *a: NOISE).start(KEY, rows)
    np.testing.assert_allclose(start, GRID.alpha[12] * IMAGE + GRID.sigma[12] * NOISE, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("factor", [2, 4])
def test_ilvr_keeps_the_low_frequencies(factor):
    error = lambda x: float(jnp.abs(low_pass(x, factor) - low_pass(IMAGE, factor)).mean())
    close, free = error(edited(ilvr(IMAGE, factor))), error(plain())
    assert close < 0.25 * free
    late = error(edited(ilvr(IMAGE, factor, until=500.0)))
    assert close < late
    everywhere = edited(ilvr(IMAGE, factor, until=2000.0))  # never
    np.testing.assert_allclose(everywhere, plain(), rtol=1e-4, atol=1e-5)


def test_low_pass():
    flat = jnp.full((1, 8, 8, 1), 0.7)
    np.testing.assert_allclose(low_pass(flat, 4), flat, rtol=1e-5)
    np.testing.assert_array_equal(low_pass(IMAGE, 1), IMAGE)
    with pytest.raises(ValueError, match="size 8 x 8 is not a multiple of factor 3"):
        low_pass(IMAGE, 3)


def test_repaint_keeps_the_known_region_exactly():
    kept = np.broadcast_to(np.asarray(KNOWN) == 1, IMAGE.shape)
    got = np.asarray(edited(repaint(IMAGE, KNOWN, 4, 3)))
    np.testing.assert_array_equal(got[kept], np.asarray(IMAGE)[kept])
    loose = np.asarray(edited(repaint(IMAGE, KNOWN, 4, 3, exact=False)))
    assert 0 < np.abs(loose[kept] - np.asarray(IMAGE)[kept]).max()
    np.testing.assert_array_equal(loose[~kept], got[~kept])


def test_repaint_walks_again():
    grid = grids.resampled(GRID, 5, 3)
    t, n = np.asarray(grid.t), int(grids.rows(grid))
    counts = {level: (t[:n] == level).sum() for level in np.unique(t[:n])}
    assert n == 50 and counts[0] == 1 and counts[950] == 1 and counts[50] == 3 and counts[700] == 3
    once = grids.resampled(GRID, 5, 1)
    for a, b in zip(once, GRID):
        np.testing.assert_array_equal(np.asarray(a)[:20], b)
    padded = jax.jit(lambda n: grids.resampled(grids.grid(TABLE, n, 23), 5, 3))(20)
    assert int(grids.rows(padded)) == 50
    np.testing.assert_array_equal(padded.t[:50], t[:50])


def test_the_hole_agrees_with_its_surroundings_more_with_more_resampling():
    smooth = low_pass(IMAGE, 4)

    edited_ = [
        np.mean([float(jnp.abs(x[:, :, 5] - x[:, :, 4]).mean()) for x in many])
        for many in (
            [run(repaint(smooth, KNOWN, 5, r), denoise, samplers.ancestral(), GRID, jax.random.key(s), NOISE)
             for s in range(4)] for r in (1, 8)
        )
    ]  # fmt: skip
    assert edited_[1] < edited_[0]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_multidiffusion_is_the_explicit_loop(batch_size):
    """Every window takes DDIM's step on its own, and the steps are averaged."""
    big = jax.random.normal(jax.random.key(4), (2, 8, 18, 3))
    sampler, window, stride = samplers.ddim(), (8, 8), (8, 3)
    got = run(multidiffusion(window, stride, batch_size), denoise, sampler, GRID, KEY, big)
    x = np.asarray(big, np.float64)
    for i in range(20):
        row = jax.tree.map(lambda a: a[i], GRID)
        total, count = np.zeros(x.shape), np.zeros(x.shape)
        for j in (0, 3, 6, 9, 10):
            part = jnp.asarray(x[:, :, j : j + 8], jnp.float32)
            total[:, :, j : j + 8] += sampler.step(KEY, part, denoise(part, row), row, ())[0]
            count[:, :, j : j + 8] += 1
        x = total / count
    np.testing.assert_allclose(got, x, atol=2e-5)


def test_multidiffusion_merges_aux_and_one_window_is_the_denoiser():
    row = jax.tree.map(lambda a: a[3], GRID)
    wrapped = multidiffusion((8, 8), (4, 4)).guidance(denoise)(IMAGE, row)
    want = denoise(IMAGE, row)
    np.testing.assert_allclose(wrapped.x0, want.x0, rtol=1e-6)
    np.testing.assert_allclose(wrapped.aux["variance"], want.aux["variance"])
    assert wrapped.aux["other"] is None
    assert windows(18, 8, 3) == [0, 3, 6, 9, 10] and windows(8, 8, 8) == [0]
    for bad in ((8, 9, 1), (8, 4, 5), (8, 4, 0)):
        with pytest.raises(ValueError, match="need window <= size"):
            windows(*bad)


EDITS = {
    "sdedit": lambda: sdedit(IMAGE, 0.6),
    "ilvr": lambda: ilvr(IMAGE, 4),
    "repaint": lambda: repaint(IMAGE, KNOWN, 4, 2),
    "multidiffusion": lambda: multidiffusion((8, 4), (8, 2)),
}


@pytest.mark.parametrize("pair", itertools.permutations(EDITS, 2), ids="+".join)
def test_any_two_compose(pair):
    got = np.asarray(edited(compose(*(EDITS[name]() for name in pair)), samplers.ddim(0.5)))
    assert np.isfinite(got).all()
    alone = [np.asarray(edited(EDITS[name](), samplers.ddim(0.5))) for name in pair]
    assert all((got != other).any() for other in alone)
    if pair[-1] == "repaint" or "ilvr" not in pair and "repaint" in pair:  # the last word on x is RePaint's
        kept = np.broadcast_to(np.asarray(KNOWN) == 1, IMAGE.shape)
        np.testing.assert_array_equal(got[kept], np.asarray(IMAGE)[kept])
    if pair == ("sdedit", "repaint"):  # 12 rows of the tail, then walked twice
        times = compose(*(EDITS[name]() for name in pair)).times
        assert int(grids.rows(times(GRID))) == int(grids.rows(grids.resampled(grids.grid(TABLE, 12), 4, 2)))


def test_composing_the_other_places():
    order = []
    control = lambda name: AttentionControl(probs=lambda a, site, step: order.append(name) or a + 1)
    both = compose(Edit(control=control("a")), Edit(control=control("b")), Edit(control=AttentionControl()))
    assert both.control.probs(1, None, None) == 3 and order == ["a", "b"] and both.control.logits is None
    assert compose(Edit(), Edit()) == Edit()
    with pytest.raises(ValueError, match="2 edits set start"):
        compose(sdedit(IMAGE, 0.5), Edit(start=IMAGE))
    with pytest.raises(ValueError, match="2 edits set sampler"):
        compose(Edit(sampler=samplers.ddim()), Edit(sampler=samplers.ddim()))
    with pytest.raises(ValueError, match="fixed grid first"):
        compose(sdedit(IMAGE, 0.5), Edit(times=GRID))
    assert int(grids.rows(compose(Edit(times=GRID), sdedit(IMAGE, 0.5)).times(None))) == 10


def test_hooks_of_a_chain_have_their_own_state_and_key():
    def add(scale):
        def before(key, x, step, n):
            return x + scale * jax.random.normal(key, x.shape) * (n + 1), n + 1

        return Intervention(lambda x: 0, before)

    x, row = jnp.zeros(1000), jax.tree.map(lambda a: a[0], GRID)
    hook = chain([add(1.0), Intervention(), add(-1.0)])
    states = hook.init(x)
    y, states = hook.before(KEY, x, row, states)
    assert states == (1, (), 1) and float(jnp.abs(y).mean()) > 0.5  # equal keys would have cancelled
    assert hook.after(KEY, y, x, None, row, states)[0] is y


def test_a_second_order_sampler_under_an_edit():
    want = edited(sdedit(IMAGE, 0.5), multistep.heun(), rows=grids.heun)
    fine = edited(sdedit(IMAGE, 0.5), samplers.ddim(), grids.grid(TABLE, 500))
    assert np.isfinite(want).all() and float(jnp.abs(want - fine).mean()) < 1.0


def test_strengths_are_traced():
    @jax.jit
    def draw(seed, steps, strength, until):
        edit = compose(sdedit(IMAGE, strength), repaint(IMAGE, KNOWN, 3, 2), ilvr(IMAGE, 4, until))
        return run(edit, denoise, samplers.ancestral(), grids.grid(TABLE, steps, 12), jax.random.key(seed))

    draw(0, 12, 0.5, 100.0)
    with compilations() as found:
        results = [
            draw(*args) for args in [(1, 12, 0.5, 100.0), (0, 7, 0.5, 100.0), (0, 12, 0.9, 100.0), (0, 12, 0.5, 0.0)]
        ]
    assert not found and all(np.isfinite(x).all() for x in results)
