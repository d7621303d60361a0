"""What the tests of diffusion share: a network without weights, its noise played back, diffusers in float64."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np

from vgen.diffusion import grids
from vgen.sample import sample

SHAPE = (2, 4, 5, 3)


def eps(x, t, xp=jnp):
    """The network of the golden files; t is a scalar or broadcasts."""
    wave = xp.cos(np.pi * t / 2200) ** 2
    return xp.sin(np.pi * t / 2200) * x + 0.3 * wave * xp.sin(1.3 * x + 0.005 * t)


def learned(x, t, xp=jnp):
    return xp.cos(0.7 * x - 0.003 * t)


def network(x, t):
    return eps(x, t[:, None, None, None])


def network2(x, t):
    t = t[:, None, None, None]
    return jnp.concatenate([eps(x, t), learned(x, t)], axis=-1)


def nhwc(a):
    return np.moveaxis(np.asarray(a, np.float64), -3, -1)


def nchw(a):
    return np.moveaxis(np.asarray(a), -1, -3)


def replay(key, noises, place=1, steps=None):
    """A `noise` with noises[i] in step i of a loop under `key`, nan elsewhere; place: 0 before, 1 sampler, 2 after."""
    steps = np.arange(len(noises)) if steps is None else np.asarray(steps)
    find = lambda i: jax.random.key_data(jax.random.split(jax.random.fold_in(key, i), 3)[place])
    known, noises = jax.vmap(find)(steps), jnp.asarray(noises)

    def noise(key, shape, dtype):
        hit = (known == jax.random.key_data(key)).all(axis=-1)
        return jnp.where(hit.any(), noises[jnp.argmax(hit)], jnp.nan).astype(dtype)

    return noise


def states(denoise, sampler, grid, key, x, hook=None):
    """x after each row, [rows, ...]."""
    grid = jax.tree.map(jnp.asarray, grid)
    count = int(grids.rows(grid))
    run = jax.jit(lambda n: sample(denoise, sampler, grid, key, x, hook, num_steps=n))
    return np.stack([run(n) for n in range(1, count + 1)])


def worst(got, want):
    """The largest relative error of a step, each on its own scale."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape and np.isfinite(got).all(), (got.shape, want.shape)
    return max(np.abs(g - w).max() / max(np.abs(w).max(), 1e-30) for g, w in zip(got, want))


class _Wide:
    """A module whose float32 is float64."""

    def __init__(self, module):
        self._module, self.float32 = module, module.float64

    def __getattr__(self, name):
        return getattr(self._module, name)


def scheduler(monkeypatch, file, cls, noises=(), **config):
    """A scheduler of diffusers that computes in float64 throughout and draws `noises` (NHWC) in their order."""
    import torch

    module = importlib.import_module(f"diffusers.schedulers.scheduling_{file}")
    monkeypatch.setattr(module, "torch", _Wide(torch))
    monkeypatch.setattr(module, "np", _Wide(np), raising=False)
    draws = iter(torch.from_numpy(nchw(a)) for a in noises)
    if hasattr(module, "randn_tensor"):
        monkeypatch.setattr(module, "randn_tensor", lambda *args, **kwargs: next(draws))
    return getattr(module, cls)(**config)


def trajectory(scheduler, model, x, scaled=False, **step):
    """The states of diffusers' loop, NHWC; with `scaled` (those of k-diffusion) in the variance-preserving scale."""
    import torch

    x, out = torch.from_numpy(nchw(x)), []
    for t in scheduler.timesteps:
        given = scheduler.scale_model_input(x, t)
        x = scheduler.step(torch.from_numpy(model(given.numpy(), float(t))), t, x, **step).prev_sample
        assert x.dtype == torch.float64
        sigma = float(scheduler.sigmas[scheduler.step_index]) if scaled else 0.0
        out.append(nhwc(x.numpy()) / (1 + sigma**2) ** 0.5)
    return np.stack(out)
