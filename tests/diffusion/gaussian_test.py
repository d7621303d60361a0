"""Samplers on Gaussian data, whose denoiser is exact: the covariance drawn is that of the data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.compile_test import compilations
from tests.conftest import quick_compilation
from vgen.diffusion import grids, multistep, samplers, schedules, solvers
from vgen.edit.compose import run
from vgen.edit.sdedit import sdedit
from vgen.guidance import cfg, mix
from vgen.sample import sample
from vgen.types import Prediction

ROTATE = np.array([[0.8, -0.6], [0.6, 0.8]])
SCALES = np.array([1.0, 0.3])
COVARIANCE, MEAN = ROTATE @ np.diag(SCALES**2) @ ROTATE.T, np.array([0.5, -1.0])
TABLE = schedules.discrete(schedules.betas("cosine"))
SIZE = 20000


@pytest.fixture(scope="module", autouse=True)
def quick():
    with quick_compilation():
        yield


def exact(x, step):
    """E[x0 | x] of N(MEAN, COVARIANCE)."""
    noise = step.alpha**2 * SCALES**2 + step.sigma**2
    gain = ROTATE @ jnp.diag(step.alpha * SCALES**2 / noise) @ ROTATE.T
    return Prediction(MEAN + (x - step.alpha * MEAN) @ gain.T)


def draw(name, schedule, steps, size=SIZE, **more):
    sampler, grid = solvers.solver(name, schedule, steps, **more)
    start = jax.random.normal(jax.random.key(0), (size, 2)) * jnp.sqrt(grid.sigma[0] ** 2 + grid.alpha[0] ** 2)
    run = jax.jit(lambda key, x: sample(exact, sampler, grid, key, x, num_steps=grids.rows(grid)))
    return np.asarray(run(jax.random.key(1), start), np.float64)


CASES = [
    ("ddpm", TABLE, 250, 0.02, {}),
    ("ddpm", TABLE, 1000, 0.01, dict(knobs=dict(variance="fixed_large"))),
    ("ddim", TABLE, 100, 0.02, dict(spacing="trailing")),
    ("ddim", TABLE, 250, 0.02, dict(knobs=dict(eta=0.7), spacing="trailing")),
    ("ddim", schedules.discrete(schedules.betas()), 250, 0.04, dict(spacing="quadratic")),
    ("euler", schedules.vp(), 200, 0.02, {}),
    ("euler", schedules.sub_vp(), 200, 0.02, {}),
    ("euler", schedules.cosine(-9.0, 9.0), 200, 0.02, dict(spacing="exponential")),
    ("euler_ancestral", TABLE, 250, 0.02, dict(spacing="karras", sigma_max=80.0)),
    ("heun", schedules.edm(), 24, 0.01, {}),
    ("heun", TABLE, 24, 0.01, dict(spacing="karras", sigma_max=80.0)),
    ("dpmpp_2m", TABLE, 30, 0.01, dict(spacing="karras", sigma_max=80.0)),
    ("dpmpp_2m_sde", TABLE, 60, 0.02, dict(spacing="karras", sigma_max=80.0)),
    ("pndm", schedules.discrete(schedules.betas("scaled_linear")), 100, 0.02, {}),
    ("flow_euler", schedules.rectified_flow(), 100, 0.02, {}),
    ("predictor_corrector", schedules.ve(), 300, 0.05, dict(knobs=dict(snr=0.05))),
]


@pytest.mark.parametrize("name, schedule, steps, bias, more", CASES, ids=[f"{c[0]}-{i}" for i, c in enumerate(CASES)])
def test_covariance(name, schedule, steps, bias, more):
    """Within sampling error (4 standard deviations of each entry) and `bias`, that of a finite number of steps."""
    got = draw(name, schedule, steps, **more)
    error = np.abs(np.cov(got.T) - COVARIANCE)
    variance = np.diag(COVARIANCE)
    deviation = np.sqrt((np.outer(variance, variance) + COVARIANCE**2) / SIZE)
    assert (error < 4 * deviation + bias).all(), (error, deviation)
    assert (np.abs(got.mean(axis=0) - MEAN) < 4 * np.sqrt(variance / SIZE) + bias).all()


def test_the_test_can_fail():
    error = np.abs(np.cov(draw("ddim", TABLE, 4, spacing="trailing").T) - COVARIANCE).max()
    assert error > 0.05


def test_churn_keeps_the_covariance():
    grid = grids.heun(grids.churned(grids.grid(schedules.edm(), 40, spacing="karras"), 20.0, 0.05, 50.0))
    start = 80 * jax.random.normal(jax.random.key(0), (SIZE, 2))
    got = {}
    for name, hook in {"with": samplers.climb(), "without": None}.items():
        got[name] = np.cov(np.asarray(sample(exact, multistep.heun(), grid, jax.random.key(1), start, hook)).T)
    assert np.abs(got["with"] - COVARIANCE).max() < 0.04 < np.abs(got["without"] - COVARIANCE).max()


def test_inversion_returns():
    grid = grids.grid(TABLE, 250, final="first", spacing="linspace", rounded=False, spare=1)
    data = jnp.asarray(np.random.default_rng(0).multivariate_normal(MEAN, COVARIANCE, 500), float)
    up = sample(exact, samplers.ddim(), grids.inverted(grid, "own"), jax.random.key(0), data)
    assert np.abs(np.cov(np.asarray(up).T) - np.eye(2)).max() < 0.25  # 500 points
    rows = grids.take(grid, jnp.arange(249), 249)
    back = sample(exact, samplers.ddim(), rows, jax.random.key(0), up)
    np.testing.assert_allclose(back, data, atol=0.05)


def test_steps_scale_seed_and_strength_do_not_compile_again():
    conds = [jnp.zeros((8, 1)), jnp.ones((8, 1))]
    apply = lambda x, step, cond: Prediction(exact(x, step).x0 + 0.1 * cond)
    for name in solvers.SOLVERS:
        schedule = schedules.rectified_flow() if name == "flow_euler" else TABLE
        rows = {"heun": grids.heun, "pndm": grids.plms, "predictor_corrector": grids.correctors}.get(name)

        @jax.jit
        def draw(key, steps, scale, strength, x, name=name, schedule=schedule, rows=rows):
            more = dict(spacing="linspace") if name in ("euler", "heun") else {}
            sampler, grid = solvers.solver(name, schedule, steps, 20, **more)
            if rows is not None:
                grid = grids.grid(schedule, steps, 20)
            return run(sdedit(x, strength), mix(apply, conds, cfg(scale)), sampler, grid, key, rows=rows)

        x = jnp.ones((8, 2))
        first = draw(jax.random.key(0), 5, 1.0, 1.0, x)
        with compilations() as found:
            for args in [(1, 5, 1.0, 1.0), (0, 20, 1.0, 1.0), (0, 5, 7.5, 1.0), (0, 5, 1.0, 0.5)]:
                other = np.asarray(draw(jax.random.key(args[0]), *args[1:], x))
                assert np.isfinite(other).all()
                assert args[0] == 1 or (other != np.asarray(first)).any()  # a seed tells nothing in a still sampler
        assert draw._cache_size() == 1 and not found, found
