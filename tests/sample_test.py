"""The sampling loop: its differentiable form is the same loop, and its gradients are true."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vgen.diffusion import grids, samplers, schedules, solvers
from vgen.sample import sample
from vgen.types import Intervention, Prediction

TABLE = schedules.discrete(schedules.betas())
X = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3)))


def denoise(w):
    return lambda x, step: Prediction(w * jnp.tanh(x))


def counting():
    return Intervention(lambda x: 0, lambda key, x, step, n: (x + 0.01 * n, n + 1))


@pytest.mark.parametrize("name", ["ddpm", "heun", "dpmpp_2m"])
def test_both_forms_agree(name):
    sampler, grid = solvers.solver(name, TABLE, 6, 9)
    run = jax.jit(
        lambda n, differentiable: sample(
            denoise(0.8), sampler, grid, jax.random.key(0), X, counting(), n, differentiable
        ),
        static_argnums=1,
    )
    for n in (1, 4, 6):
        np.testing.assert_array_equal(run(n, True), run(n, False))


def test_gradients_with_a_traced_number_of_steps(x64):
    x = jnp.asarray(X, float)

    traced = []

    def run(w, n):
        traced.append(n)
        sampler, grid = samplers.ddim(0.5), grids.grid(TABLE, n, 10)
        key = jax.random.key(0)
        return sample(denoise(w), sampler, grid, key, x, num_steps=grids.rows(grid), differentiable=True).sum()

    slope, run = jax.jit(jax.grad(run)), jax.jit(run)
    for n in (3, 10):
        want = (run(0.8 + 1e-6, n) - run(0.8 - 1e-6, n)) / 2e-6
        np.testing.assert_allclose(slope(0.8, n), want, rtol=1e-6)
    assert len(traced) == 2  # the function and its gradient, once each


def test_fields_of_one_length():
    grid = grids.grid(TABLE, 4)
    with pytest.raises(ValueError, match=r"must have one length, got \[3, 4\]"):
        sample(denoise(1.0), samplers.ddim(), grid._replace(t=grid.t[:3]), jax.random.key(0), X)
