"""The authors' numbers: guided-diffusion, DPM-Solver, EDM and RePaint, from the golden files."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import quick_compilation
from tests.diffusion.reference import nchw, network, network2, nhwc, replay, states
from tests.golden import golden
from vgen.diffusion import grids, losses, multistep, predictions, samplers, schedules
from vgen.diffusion.predictions import denoiser
from vgen.edit.repaint import repaint
from vgen.guidance import clip, dynamic_threshold, steer
from vgen.types import Intervention, Prediction

KEY = jax.random.key(5)
pytestmark = pytest.mark.usefixtures("x64")


@pytest.fixture(scope="module", autouse=True)
def quick():
    with quick_compilation():
        yield


def check(gold, key, got, tol=1e-9):
    return golden.check(gold, key, np.asarray(got), tol=tol)["rel"]


def table(name="linear", length=1000, **knobs):
    return schedules.discrete(schedules.betas(name, length), **knobs)


def strided(count, length=1000):
    """The times of ADM's "ddimN": the smallest stride that gives N."""
    stride = next(i for i in range(1, length) if len(range(0, length, i)) == count)
    return list(range(0, length, stride))[::-1]


def gradient(x, t):
    return 0.5 * jnp.cos(x + 0.004 * t)


def check_states(gold, case, denoise, grid, sampler, hook=None):
    """Both recorded trajectories of a loop: x behind each row and the x0 it was made of."""
    start = jnp.asarray(nhwc(gold["inputs"]["x_T"]))
    got = states(denoise, sampler, grid, KEY, start, hook)
    check(gold, f"{case}.x", nchw(got))
    before, x0 = [start, *got[:-1]], jax.jit(lambda x, step: denoise(x, step).x0)
    preds = [x0(x, jax.tree.map(lambda a: a[i], grid)) for i, x in enumerate(before)]
    if f"{case}.pred_xstart" in gold["outputs"]:
        check(gold, f"{case}.pred_xstart", nchw(np.stack(preds)))


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_schedules_and_respacing(name):
    gold = golden.load("gd_schedules")
    schedule, idx = table(name), gold["inputs"]["idx"]
    for label, times in {
        "1000": list(range(1000))[::-1],
        "ddim20": strided(20),
        "10-5-3": grids.sections(1000, (10, 5, 3)),
    }.items():
        key = f"{name}_{label}"
        check(gold, f"{key}_use", np.int32(times[::-1]))
        grid = grids.free(schedule, times)
        q = jax.tree.map(lambda a: np.asarray(a)[::-1], schedules.posterior(grid))
        beta = 1 - (np.asarray(grid.alpha / grid.alpha_next)[::-1]) ** 2
        small = np.where(q.small > 0, q.small, q.small[1])
        pick = idx if label == "1000" else slice(None)
        for quantity, value in {
            "betas": beta, "alphas_cumprod": np.asarray(grid.alpha)[::-1] ** 2, "posterior_variance": q.small,
            "posterior_log_variance_clipped": np.log(small), "posterior_mean_coef1": q.x0_factor,
            "posterior_mean_coef2": q.x_factor,
        }.items():  # fmt: skip
            check(gold, f"{key}_{quantity}", value[pick])
        np.testing.assert_allclose(q.large, beta, rtol=1e-9)


def test_ddpm_loops():
    gold = golden.load("gd_ddpm_loop")
    noise = replay(KEY, nhwc(gold["inputs"]["noises"]))
    eight, linear = grids.sections(1000, (8,)), table()
    guide = lambda x, step: gradient(x, step.t)
    ranged = denoiser(network2, variance="learned_range")
    cosine = table("cosine")
    short = table(length=400)
    cases = {
        "learned_range": (clip(ranged), grids.free(linear, eight), samplers.ancestral("learned_range", noise=noise)),
        "learned_range_noclip": (ranged, grids.free(linear, eight), samplers.ancestral("learned_range", noise=noise)),
        "fixed_small": (clip(denoiser(network)), grids.free(cosine, eight), samplers.ancestral(noise=noise)),
        "fixed_large": (
            clip(denoiser(network)),
            grids.free(linear, grids.sections(1000, (3, 5))),
            samplers.ancestral("fixed_large", noise=noise),
        ),
        "start_x": (
            clip(denoiser(lambda x, t: jnp.tanh(0.9 * x + 0.002 * t[:, None, None, None]), "x0")),
            grids.free(cosine, eight),
            samplers.ancestral(noise=noise),
        ),
        "rescaled_t": (
            clip(denoiser(network, time=lambda step: step.t * 1000 / 400)),
            grids.free(short, grids.sections(400, (8,))),
            samplers.ancestral(noise=noise),
        ),
        "guided": (
            clip(ranged),
            grids.free(linear, eight),
            samplers.ancestral("learned_range", guide=guide, noise=noise),
        ),
    }
    for case, (denoise, grid, sampler) in cases.items():
        check_states(gold, case, denoise, grid, sampler)


def test_ddim_loops():
    gold = golden.load("gd_ddim_loop")
    noise, linear = replay(KEY, nhwc(gold["inputs"]["noises"])), table()
    grid = grids.free(linear, strided(8))
    denoise = denoiser(network)
    check_states(gold, "eta0", clip(denoise), grid, samplers.ddim())
    check_states(gold, "eta05", clip(denoise), grid, samplers.ddim(0.5, noise))
    eight = grids.free(linear, grids.sections(1000, (8,)))
    check_states(gold, "eta1_noclip", denoise, eight, samplers.ddim(1.0, noise))
    steered = steer(clip(denoise), lambda x, step: gradient(x, step.t))
    check_states(gold, "eta0_guided", steered, grid, samplers.ddim())
    x_0 = jnp.asarray(nhwc(gold["inputs"]["x_0"]))
    got = states(denoise, samplers.ddim(), grids.inverted(grid, "own"), KEY, x_0)
    check(gold, "reverse.x", nchw(got))


def test_training_losses():
    gold = golden.load("gd_training_losses")
    x0, noise = (jnp.asarray(nhwc(gold["inputs"][name])) for name in ("x_start", "noise"))
    t = jnp.asarray(gold["inputs"]["t"], float)
    linear, cosine = table(), table("cosine")
    given = lambda key, shape, dtype: noise
    noised, noised_cosine = (losses.diffuse(KEY, x0, schedule, t, given) for schedule in (linear, cosine))
    check(gold, "x_t", nchw(noised.x))
    check(gold, "prior_bpd", losses.prior_bits(x0, linear), 1e-8)
    raw = network2(noised.x, t)
    total, parts = losses.hybrid_loss(raw, noised, linear)
    check(gold, "learned_range_rescaled_mse.loss", total)
    check(gold, "learned_range_rescaled_mse.mse", parts["mse"])
    check(gold, "learned_range_rescaled_mse.vb", parts["vb"])
    total, parts = losses.hybrid_loss(network2(noised_cosine.x, t), noised_cosine, cosine, factor=1 / 1000)
    check(gold, "learned_range_mse_cosine.loss", total)
    check(gold, "learned_range_mse_cosine.vb", parts["vb"])
    both = predictions.split_variance(raw, "learned_range")
    check(gold, "learned_range_kl.loss", 1000 * losses.bound(*both, noised, linear))
    check(gold, "fixed_mse.loss", losses.loss(network(noised.x, t), noised))
    start = jnp.tanh(0.9 * noised_cosine.x + 0.002 * t[:, None, None, None])
    check(gold, "start_x_mse.loss", losses.loss(start, noised_cosine, "x0"))


def test_the_bound_trains_the_variance_only():
    gold = golden.load("gd_training_losses")
    x0 = jnp.asarray(nhwc(gold["inputs"]["x_start"]))
    t, schedule = jnp.asarray(gold["inputs"]["t"], float), table()
    noised = losses.diffuse(KEY, x0, schedule, t)
    raw = network2(noised.x, t)
    slope = jax.grad(lambda raw: losses.hybrid_loss(raw, noised, schedule)[1]["vb"].sum())(raw)
    mean, variance = jnp.split(slope, 2, axis=-1)
    assert (mean == 0).all() and (variance != 0).any()


def test_dpm_solver():
    gold = golden.load("dpm_solver")
    start = jnp.asarray(nhwc(gold["inputs"]["x_T"]))
    tables = {"discrete": table(interpolation="log_alpha"), "linear": schedules.vp()}

    def run(case, steps, schedule="discrete", spacing="linspace", last=True, wrap=lambda d: d, **knobs):
        time = None if schedule == "discrete" else lambda step: 1000 * step.t
        spare = {} if spacing == "exponential" else dict(spare=1, rounded=False)
        count = steps + 1 if spacing == "exponential" else steps  # the points of a grid that ends on the first time
        grid = grids.grid(tables[schedule], count, spacing=spacing, final="first", **spare)
        if spacing == "exponential":
            grid = grids.take(grid, jnp.arange(steps), steps)
        sampler = multistep.dpmpp_2m(first_order_from=steps - 1 if last else None, **knobs)
        got = states(wrap(denoiser(network, time=time)), sampler, grid, KEY, start)
        check(gold, f"{schedule}.{case}.x", nchw(np.concatenate([start[None], got])))

    run("pp2m_uniform", 8)
    run("pp2m_taylor", 8, solver="heun")
    run("pp2m_nolower", 8, last=False)
    run("pp2m_logsnr", 6, spacing="exponential")
    run("pp2m_threshold", 8, wrap=lambda d: dynamic_threshold(d, 0.995))  # their "max" is the least s
    run("pp2m_uniform", 8, "linear")
    t = np.array([0.001, 0.05, 0.3, 0.77, 1.0])
    for name, schedule in tables.items():
        own = t * 1000 - 1 if name == "discrete" else t
        check(gold, f"{name}.log_alpha", jnp.log(schedule.level(own)[0]))
        check(gold, f"{name}.lambda", schedules.log_snr(schedule, own) / 2)
        back = schedule.time(jnp.exp(-schedules.log_snr(schedule, own) / 2))
        check(gold, f"{name}.inverse_lambda", (back + 1) / 1000 if name == "discrete" else back)
    for name, spacing in {"time_uniform": "linspace", "logSNR": "exponential", "time_quadratic": "quadratic"}.items():
        schedule = "discrete" if name == "logSNR" else "linear"
        got = grids.grid(tables[schedule], 9, spacing=spacing).t
        check(gold, f"grid.{name}", (got + 1) / 1000 if schedule == "discrete" else got)


def edm_denoise(x, step):
    s = step.sigma
    root = jnp.sqrt(1 + s**2)
    return Prediction(x / root**2 + 0.5 * s / root * jnp.sin(1.3 * x / root + 0.25 * jnp.log(s)))


@pytest.mark.parametrize("case", ["heun", "churn"])
def test_edm_sampler(case):
    gold = golden.load("edm_sampler")
    base = grids.grid(schedules.edm(), 7, 9, "karras")
    check(gold, "t_steps", base.t[:7])
    grid, hook = base, None
    if case == "churn":
        grid = grids.churned(base, 6.0, 0.05, 50.0)
        noises = nhwc(gold["inputs"]["noises"])[: 2 * 7 - 1]
        spread = np.repeat(noises[:7], 2, axis=0)[:13]  # the k-th draw is that of step k, row 2 k
        hook = climb_from(base, samplers.climb(1.003, replay(KEY, spread, place=0)))
    grid = grids.heun(grid)
    start = jnp.asarray(nhwc(gold["inputs"]["latents"])) * 80.0
    got = states(edm_denoise, multistep.heun(), grid, KEY, start, hook)
    check(gold, f"{case}.x", nchw(got[-1]))
    assert (np.asarray(grid.i)[:14] == [*range(13), -1]).all()
    if case == "heun":
        before = [start, *got[:-1]]
        seen = np.stack([edm_denoise(x, jax.tree.map(lambda a: a[i], grid)).x0 for i, x in enumerate(before)])
        check(gold, "heun.denoised", nchw(seen))


def climb_from(base, hook):
    """A climb whose start is on the first level of `base`, so that the first row may begin above it."""
    return Intervention(lambda x: (base.alpha[0], base.sigma[0]), hook.before)


def repaint_times(n, length, repeats):
    """The levels visited, as the authors list them, from the rows of a grid of n."""
    base = grids.free(table(), list(range(n))[::-1])
    grid = grids.resampled(base, length, repeats)
    t, t_next = (np.asarray(a)[: int(grids.rows(grid))].astype(int) for a in (grid.t, grid.t_next))
    times = [t[0]]
    for k in range(len(t)):
        times += range(times[-1] + 1, t[k] + 1)  # the way up, one level at a time
        times.append(t_next[k])
    return np.int32(times)


@pytest.mark.parametrize(
    "case, args",
    [
        ("paper_250_10_10", (250, 10, 10)),
        ("j5_n3", (20, 5, 3)),
        ("j1_n2", (12, 1, 2)),
        ("j4_n2", (21, 4, 2)),
        ("loop", (10, 3, 2)),
    ],
)
def test_repaint_times(case, args):
    check(golden.load("repaint"), f"times.{case}", repaint_times(*args))


def test_repaint_loop():
    """The authors climb level by level with a draw for each: one draw of ours is their sum, with the same variance."""
    gold = golden.load("repaint")
    image, known, start = (jnp.asarray(nhwc(gold["inputs"][name])) for name in ("gt", "mask", "x_T"))
    draws = iter(nhwc(gold["inputs"]["noises"]))
    schedule, times = table(), gold["outputs"]["times.loop"]
    base = grids.free(schedule, grids.sections(1000, (10,)))
    grid = grids.resampled(base, 3, 2)
    level = {9 - k: float(a) for k, a in enumerate(base.alpha)}  # of the respaced time
    up, steps, merges, pending = {}, [], [], None
    for a, b in zip(times[:-1], times[1:]):
        if b > a:  # an upward step: x <- sqrt(1 - beta) x + sqrt(beta) z
            keep = level[b] / level[a]
            total, size = pending if pending else (0.0, 1.0)
            pending = (keep * total + (1 - keep**2) ** 0.5 * next(draws), keep * size)
            continue
        if pending:
            up[len(steps)] = pending[0] / (1 - pending[1] ** 2) ** 0.5
            pending = None
        steps.append(next(draws))
        merges.append(next(draws) if len(steps) > 1 else np.zeros_like(steps[0]))
    raised = replay_in_chain(up, len(steps), 0, place=0)
    merged = replay_in_chain(dict(enumerate(merges)), len(steps), 1, place=0)
    edit = repaint(image, known, 3, 2, exact=False, noise=lambda *a: jnp.where(
        jnp.isnan(raised(*a)), merged(*a), raised(*a)))  # fmt: skip
    denoise = clip(denoiser(network2, variance="learned_range"))
    sampler = samplers.ancestral("learned_range", noise=replay(KEY, np.stack(steps)))
    got = states(denoise, sampler, grid, KEY, start, edit.hook)
    assert len(got) == 19
    check(gold, "x", nchw(got))


def replay_in_chain(values, steps, place_in_chain, place):
    """`replay` for the hook number `place_in_chain` of a chain; nan for every other key."""
    filled = np.stack([values.get(i, np.zeros((2, 4, 5, 3))) for i in range(steps)])
    find = lambda i: jax.random.key_data(
        jax.random.fold_in(jax.random.split(jax.random.fold_in(KEY, i), 3)[place], place_in_chain)
    )
    known, filled = jax.vmap(find)(np.arange(steps)), jnp.asarray(filled)

    def noise(key, shape, dtype):
        hit = (known == jax.random.key_data(key)).all(axis=-1)
        return jnp.where(hit.any(), filled[jnp.argmax(hit)], jnp.nan).astype(dtype)

    return noise
