"""Schedules, grids, predictions, losses and times: their identities, and their errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import quick_compilation
from vgen.diffusion import grids, losses, multistep, predictions, samplers, schedules, solvers, times
from vgen.types import Prediction

KEY = jax.random.key(0)
TABLE = schedules.discrete(schedules.betas())
ALL = {
    "table": TABLE,
    "log_alpha": schedules.discrete(schedules.betas("scaled_linear"), "log_alpha"),
    "vp": schedules.vp(),
    "sub_vp": schedules.sub_vp(),
    "ve": schedules.ve(),
    "edm": schedules.edm(),
    "flow": schedules.rectified_flow(),
    "cosine": schedules.cosine(),
}


@pytest.fixture(scope="module", autouse=True)
def quick():
    with quick_compilation():
        yield


@pytest.mark.parametrize("name", ALL)
def test_schedules_invert(name, x64):
    schedule = ALL[name]
    t = jnp.linspace(schedule.t_min, schedule.t_max * 0.999, 41)
    t = jnp.floor(t) if schedule.length else t
    alpha, sigma = schedule.level(t)
    ratio = sigma / alpha
    assert (jnp.diff(ratio) > 0).all()
    np.testing.assert_allclose(schedule.time(ratio), t, rtol=1e-7, atol=1e-7)
    for got, want in zip(schedule.scale(ratio), (alpha, sigma)):
        np.testing.assert_allclose(got, want, rtol=1e-7, atol=1e-12)
    np.testing.assert_allclose(schedules.log_snr(schedule, t), 2 * jnp.log(alpha / sigma), atol=1e-9)


def test_formulas_of_continuous_schedules(x64):
    t, alpha = 0.3, np.exp(-0.25 * 0.09 * 19.9 - 0.5 * 0.3 * 0.1)
    np.testing.assert_allclose(ALL["vp"].level(t), (alpha, np.sqrt(1 - alpha**2)), rtol=1e-12)
    np.testing.assert_allclose(ALL["sub_vp"].level(t), (alpha, 1 - alpha**2), rtol=1e-12)
    np.testing.assert_allclose(ALL["ve"].level(t), (1, 0.01 * 5000**0.3), rtol=1e-12)
    np.testing.assert_allclose(schedules.log_snr(ALL["cosine"], jnp.array([0.0, 1.0])), [20, -20], rtol=1e-9)


def test_zero_terminal_snr(x64):
    betas = schedules.betas("scaled_linear")
    fixed = schedules.discrete(schedules.zero_terminal_snr(betas))
    assert fixed.level(999.0)[0] == 0 and fixed.level(999.0)[1] == 1
    np.testing.assert_allclose(fixed.level(0.0), schedules.discrete(betas).level(0.0), rtol=1e-9)
    grid = grids.grid(fixed, 5, spacing="trailing")
    denoise = predictions.denoiser(lambda x, t: 0.3 * x, "v")
    for sampler in (samplers.ddim(), samplers.ancestral(), multistep.dpmpp_2m(), multistep.dpmpp_2m(sde=True)):
        x, state = jnp.ones((1, 2, 2, 1)), sampler.init(jnp.ones((1, 2, 2, 1)))
        for i in range(5):
            row = jax.tree.map(lambda a: a[i], grid)
            x, state = sampler.step(jax.random.key(i), x, denoise(x, row), row, state)
        assert np.isfinite(x).all()


def test_tables_are_exact_in_float32():
    alpha, sigma = TABLE.level(0.0)
    np.testing.assert_allclose(sigma, 0.01, rtol=1e-6)  # sqrt(1 - bar) of float32 tables is off by 3e-4
    assert TABLE.level(-1.0) == (1.0, 0.0)


@pytest.mark.parametrize("spacing", grids.SPACINGS)
def test_a_padded_grid_is_the_short_one(spacing):
    make = jax.jit(lambda n: grids.grid(TABLE, n, 30, spacing, final="first"))
    for n in (1, 7, 30):
        padded, short = make(n), jax.jit(lambda: grids.grid(TABLE, n, spacing=spacing, final="first"))()
        assert int(grids.rows(padded)) == n and (np.asarray(padded.i)[n:] == -1).all()
        for a, b in zip(padded, short):
            np.testing.assert_allclose(a[:n], b, rtol=1e-5, atol=1e-6)
        assert (np.diff(short.sigma / short.alpha) < 0).all() or n == 1
        np.testing.assert_array_equal(short.t[1:], short.t_next[:-1])
        assert short.t_next[-1] == 0


def test_grids_of_the_papers():
    assert np.asarray(grids.grid(TABLE, 50, offset=1).t).astype(int).tolist() == list(range(981, 0, -20))
    quadratic = [int(s) for s in np.linspace(0, np.sqrt(800), 10) ** 2][::-1]  # DDIM's
    np.testing.assert_array_equal(grids.grid(TABLE, 10, spacing="quadratic").t, quadratic)
    flow = grids.grid(schedules.rectified_flow(), 4, spacing="trailing")
    np.testing.assert_allclose(flow.t, [1, 0.75, 0.5, 0.25])
    shifted = grids.grid(schedules.rectified_flow(), 4, spacing="trailing", shift=3.0)
    np.testing.assert_allclose(shifted.t, [1, 0.9, 0.75, 0.5], rtol=1e-6)


def test_a_free_grid_goes_up_again():
    grid = grids.free(TABLE, [900, 600, 300, 700, 200])
    np.testing.assert_array_equal(grid.t, [900, 600, 700, 200])
    np.testing.assert_array_equal(grid.t_next, [600, 300, 200, -1])


def test_climbing_is_the_forward_process():
    grid = grids.free(TABLE, [300, 100, 400])
    hook, x = samplers.climb(), jnp.full((50000,), 2.0)
    state, seen = hook.init(x), []
    for i in range(2):
        row = jax.tree.map(lambda a: a[i], grid)
        x, state = hook.before(jax.random.key(i), x, row, state)
        seen.append(x)
    np.testing.assert_array_equal(seen[0], 2.0)
    (a, s), (b, r) = TABLE.level(100.0), TABLE.level(400.0)
    np.testing.assert_allclose(seen[1].mean(), 2 * b / a, atol=0.02)
    np.testing.assert_allclose(seen[1].std(), np.sqrt(r**2 - (b / a * s) ** 2), rtol=0.02)


@pytest.mark.parametrize("name", [*predictions.KINDS, "edm"])
@pytest.mark.parametrize("schedule", ["table", "ve", "flow"])
def test_the_target_gives_x0_back(name, schedule, x64):
    kind = predictions.edm(0.4) if name == "edm" else predictions.kind_of(name)
    x0 = jnp.asarray(np.random.default_rng(0).standard_normal((3, 2, 2, 1)))
    t = jnp.asarray([0.1, 0.4, 0.9]) * ALL[schedule].t_max
    noised = losses.diffuse(KEY, x0, ALL[schedule], t)
    target = kind.target(x0, noised.eps, noised.step)
    np.testing.assert_allclose(kind.to_x0(target, noised.x, noised.step), x0, rtol=1e-9, atol=1e-9)
    # slope: an error of the target as one of eps
    off = kind.to_x0(target + 1e-3, noised.x, noised.step)
    error = predictions.noise_of(off, noised.x, noised.step) - noised.eps
    np.testing.assert_allclose((error**2).mean(axis=(1, 2, 3)), kind.slope(noised.step) * 1e-6, rtol=1e-5)


def test_every_kind_samples_the_same(x64):
    true = lambda x, step: 0.7 * jnp.tanh(x)

    def network(kind):
        def call(x, t):
            t = t[0]
            step = schedules.at(TABLE, t)
            return kind.target(true(x, step), predictions.noise_of(true(x, step), x, step), step)

        return call

    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 3, 1)))
    row = schedules.at(TABLE, 400.0)
    for name in predictions.KINDS:
        got = predictions.denoiser(network(predictions.kind_of(name)), name)(x, row).x0
        np.testing.assert_allclose(got, true(x, row), rtol=1e-9)


def test_edm_preconditioning(x64):
    row = schedules.at(schedules.edm(), 3.0)
    x, kind = jnp.full((1, 1, 1, 1), 2.0), predictions.edm(0.5)
    given, noise = kind.inputs(x, row)
    np.testing.assert_allclose(given, 2 / np.sqrt(9.25), rtol=1e-12)
    np.testing.assert_allclose(noise, np.log(3) / 4)
    np.testing.assert_allclose(kind.to_x0(jnp.ones_like(x), x, row), 0.25 / 9.25 * 2 + 1.5 / np.sqrt(9.25), rtol=1e-12)
    np.testing.assert_allclose(losses.edm_weight(0.5)(row, kind), 1.0, rtol=1e-12)


def test_a_variance_preserving_network_on_an_exploding_grid(x64):
    network = lambda x, t: jnp.sin(x) * (1 + t[:, None, None, None])
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 2, 2, 1)))
    kept = schedules.at(TABLE, 500.0)
    ratio = kept.sigma / kept.alpha
    exploded = kept._replace(alpha=jnp.ones(()), sigma=ratio)
    for kind in ("eps", "v"):
        want = predictions.denoiser(network, kind)(x, kept).x0
        got = predictions.denoiser(network, predictions.rescaled(kind))(x / kept.alpha, exploded).x0
        np.testing.assert_allclose(got, want, rtol=1e-9)


@pytest.mark.parametrize("t", [10.0, 500.0, 900.0])
def test_weights(t, x64):
    step = schedules.at(TABLE, jnp.asarray([t]))
    snr = (step.alpha / step.sigma) ** 2
    eps, x0, v = (predictions.kind_of(name) for name in ("eps", "x0", "v"))
    for kind in (eps, x0, v):
        np.testing.assert_allclose(losses.simple()(step, kind), 1)
    np.testing.assert_allclose(losses.snr()(step, x0), snr, rtol=1e-9)
    np.testing.assert_allclose(losses.snr()(step, eps), 1)
    np.testing.assert_allclose(losses.min_snr(5)(step, x0), np.minimum(snr, 5), rtol=1e-9)
    np.testing.assert_allclose(losses.min_snr(5)(step, eps), np.minimum(snr, 5) / snr, rtol=1e-9)
    np.testing.assert_allclose(losses.min_snr(5)(step, v), np.minimum(snr, 5) / (snr + 1), rtol=1e-9)
    np.testing.assert_allclose(losses.p2(0.5, 1)(step, eps), (1 + snr) ** -0.5, rtol=1e-9)
    ratio = step.sigma / step.alpha
    np.testing.assert_allclose(losses.edm_weight()(step, x0), (ratio**2 + 0.25) / (ratio * 0.5) ** 2, rtol=1e-9)
    assert {name: losses.weight_of(name)(step, eps).shape for name in losses.WEIGHTS} == dict.fromkeys(
        losses.WEIGHTS, (1,)
    )


def test_one_loss_in_every_kind(x64):
    """With the weight of the SNR the same x0 costs the same, whatever the network predicts."""
    x0 = jnp.asarray(np.random.default_rng(0).standard_normal((4, 2, 2, 3)))
    noised = losses.diffuse(KEY, x0, TABLE, jnp.asarray([3.0, 200.0, 600.0, 999.0]))
    guess = 0.9 * x0
    eps = predictions.noise_of(guess, noised.x, noised.step)
    for weight in (losses.snr(), losses.min_snr(), losses.p2(), losses.edm_weight()):
        costs = [losses.loss(kind.target(guess, eps, noised.step), noised, kind, weight)
                 for kind in predictions.KINDS.values()]  # fmt: skip
        for cost in costs[1:]:
            np.testing.assert_allclose(cost, costs[0], rtol=1e-7)


def test_offset_noise():
    x0 = jnp.zeros((64, 8, 8, 3))
    plain, offset = (losses.diffuse(KEY, x0, TABLE, jnp.full(64, 500.0), offset=o).eps for o in (0.0, 0.5))
    shift = np.asarray(offset - plain)
    np.testing.assert_allclose(shift, shift[:, :1, :1] * np.ones((1, 8, 8, 1)), atol=1e-5)
    np.testing.assert_allclose(shift.std(), 0.5, rtol=0.15)


def test_draws():
    for how in times.DRAWS:
        u = np.asarray(times.draw(KEY, 4096, how))
        assert u.shape == (4096,) and u.min() >= 0 and u.max() < 1 and abs(u.mean() - 0.5) < 0.03
    pairs = np.asarray(times.draw(KEY, 10, "antithetic"))
    np.testing.assert_allclose(pairs[:5] + pairs[5:], 1, rtol=1e-6)
    parts = np.floor(np.sort(np.asarray(times.draw(KEY, 16, "stratified"))) * 16)
    np.testing.assert_array_equal(parts, np.arange(16))
    logits = np.asarray(times.draw(KEY, 20000, "logit_normal", mean=0.5, std=0.8))
    logits = np.log(logits / (1 - logits))
    assert abs(logits.mean() - 0.5) < 0.03 and abs(logits.std() - 0.8) < 0.03
    t = np.asarray(times.sample_times(KEY, 5000, TABLE))
    assert t.min() >= 0 and t.max() <= 999 and (t == np.floor(t)).all() and len(np.unique(t)) > 900
    sigma = np.log(times.log_normal_times(KEY, 20000, schedules.edm()))
    assert abs(sigma.mean() + 1.2) < 0.04 and abs(sigma.std() - 1.2) < 0.04


def test_importance():
    state = times.importance(4, history=3)
    np.testing.assert_allclose(times.importance_weights(state), 0.25)
    update = jax.jit(times.importance_update)
    for k in range(3):
        state = update(state, jnp.arange(4.0), jnp.array([1.0, 1.0, 1.0, 3.0]))
        assert (np.asarray(state.count) == k + 1).all()
    np.testing.assert_allclose(times.importance_weights(state, 0.0), [1 / 6, 1 / 6, 1 / 6, 1 / 2], rtol=1e-6)
    state = update(state, jnp.array([2.0, 2.0]), jnp.array([5.0, 7.0]))  # the oldest two give way
    np.testing.assert_allclose(state.losses[2], [1, 5, 7])
    t, w = times.importance_times(KEY, 20000, state)
    losses_of = np.array([1.0, 2.0, 3.0, 4.0])
    np.testing.assert_allclose((w * losses_of[np.asarray(t, int)]).mean(), losses_of.mean(), rtol=0.03)


def test_half_precision_networks():
    network = lambda x, t: x.astype(jnp.bfloat16)
    assert predictions.denoiser(network)(jnp.ones((1, 2, 2, 1)), schedules.at(TABLE, 10.0)).x0.dtype == jnp.float32


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: schedules.betas("sigmoid"), "linear, scaled_linear or cosine, got 'sigmoid'"),
        (lambda: schedules.betas(length=0), "length must be at least 1"),
        (lambda: schedules.discrete(np.array([0.1, 1.5])), r"in \(0, 1\]"),
        (lambda: schedules.discrete(schedules.betas(), "cubic"), "ratio or log_alpha, got 'cubic'"),
        (lambda: grids.grid(TABLE, 0), "num_steps must be in 1..max_steps = 0, got 0"),
        (lambda: grids.grid(TABLE, 11, 10), "num_steps must be in 1..max_steps = 10, got 11"),
        (lambda: grids.grid(TABLE, 1001), "steps must be in 1..1000, those of the schedule, got 1001"),
        (lambda: grids.grid(TABLE, 1000, offset=1), "offset 1 with 1000 steps"),
        (lambda: grids.grid(TABLE, 10, spacing="cubic"), "spacing must be one of leading, .*, got 'cubic'"),
        (lambda: grids.grid(TABLE, 10, final="last"), "final must be clean or first, got 'last'"),
        (lambda: grids.grid(schedules.vp(), 10), "need a table of times"),
        (lambda: jax.jit(lambda n: grids.grid(TABLE, n))(3), "a traced num_steps needs max_steps"),
        (lambda: grids.free(TABLE, [10, 2000]), "times must be a list within"),
        (lambda: grids.inverted(grids.grid(TABLE, 3), "other"), "next or own, got 'other'"),
        (lambda: grids.sections(10, (6, 2)), "1..5"),
        (lambda: grids.resampled(grids.grid(TABLE, 3), 0), "at least 1"),
        (lambda: grids.prk(TABLE, grids.grid(TABLE, 3)), "at least 4 rows, got 3"),
        (lambda: predictions.kind_of("epsilon"), "kind must be one of eps, x0, v, flow, score, .*got 'epsilon'"),
        (lambda: predictions.denoiser(lambda x, t: x, variance="small"), "None, learned or learned_range, got 'small'"),
        (lambda: samplers.ancestral("small"), "fixed_small, fixed_large, learned, learned_range, got 'small'"),
        (lambda: samplers.log_variance("learned", 1.0, 1.0), "its aux holds none"),
        (lambda: multistep.dpmpp_2m(solver="taylor"), "midpoint or heun, got 'taylor'"),
        (lambda: losses.weight_of("mse"), "simple, snr, min_snr, p2, edm, got 'mse'"),
        (lambda: times.draw(KEY, 2, "normal"), "uniform, antithetic, stratified, logit_normal, got 'normal'"),
        (lambda: solvers.solver("unipc", TABLE, 5), "name must be one of ddpm, .*got 'unipc'"),
    ],
)
def test_errors(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_learned_variance_needs_its_output():
    row = schedules.at(TABLE, 10.0)
    sampler = samplers.ancestral("learned_range")
    with pytest.raises(ValueError, match="needs a denoiser with variance='learned_range'"):
        sampler.step(KEY, jnp.ones(3), Prediction(jnp.ones(3)), row, sampler.init(jnp.ones(3)))
