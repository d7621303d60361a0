"""Learning rates in closed form and single optimiser steps by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vgen.config import UserError, call
from vgen.optim import optimizer, schedule

RATE = 0.1


@pytest.mark.parametrize(
    "kind, want",
    [
        ("constant", lambda s: 1.0),
        ("cosine", lambda s: 0.1 + 0.9 * (1 + np.cos(np.pi * s / 80)) / 2),
        ("linear", lambda s: 1 - 0.9 * s / 80),
        ("rsqrt", lambda s: np.sqrt(20 / (20 + s))),
    ],
)
def test_schedules(kind, want):
    rate = schedule(RATE, 100, kind, warmup=20, end=0.1)
    for step in (0, 7, 19):
        np.testing.assert_allclose(rate(step), RATE * step / 20, rtol=1e-5)
    for step in (20, 33, 99, 100):
        np.testing.assert_allclose(rate(step), RATE * want(step - 20), rtol=1e-5)
    assert schedule(RATE, 100, kind)(0) == pytest.approx(RATE)


def test_unknown_names_list_what_there_is():
    with pytest.raises(ValueError, match="'step': expected constant, cosine, linear or rsqrt"):
        schedule(RATE, 10, "step")
    with pytest.raises(UserError, match="main: optimizer name 'adam': expected adamw, muon, adafactor or sgd"):
        call(optimizer, dict(lr=RATE, steps=10, name="adam"), "main")


def updates(grads, params=None, steps=1, **kwargs):
    """The update of the last of `steps` steps with the same gradients."""
    params = params or {name: jnp.zeros_like(g) for name, g in grads.items()}
    tx, _ = optimizer(RATE, 100, kind="constant", **kwargs)
    state = tx.init(params)
    for _ in range(steps):
        delta, state = tx.update(grads, state, params)
    return {name: np.asarray(value, np.float64) for name, value in delta.items()}


def test_adamw_twice_by_hand(x64):
    g, b1, b2, eps = np.array([0.3, -2.0]), 0.8, 0.9, 1e-3
    got = updates({"kernel": jnp.asarray(g)}, steps=2, b1=b1, b2=b2, eps=eps, moment_dtype="float64")["kernel"]
    m, v = (1 - b1) * g * (1 + b1), (1 - b2) * g**2 * (1 + b2)
    m, v = m / (1 - b1**2), v / (1 - b2**2)
    np.testing.assert_allclose(got, -RATE * m / (np.sqrt(v) + eps), rtol=1e-12)


def test_sgd_has_momentum():
    g = jnp.array([0.5, -1.0])
    np.testing.assert_allclose(updates({"w": g}, steps=2, name="sgd", b1=0.9)["w"], -RATE * g * 1.9, rtol=1e-6)


def test_adafactor_once_by_hand():
    g = np.random.default_rng(0).normal(size=(128, 256)).astype(np.float32)
    got = updates({"kernel": jnp.asarray(g)}, name="adafactor", b1=0.9)["kernel"]
    square = np.float64(g) ** 2 + 1e-30
    rows, columns = square.mean(1, keepdims=True), square.mean(0, keepdims=True)
    update = g / np.sqrt(rows * columns / rows.mean())  # the decay rate of the first step is 0
    update /= max(1, np.sqrt((update**2).mean()))
    np.testing.assert_allclose(got, -RATE * 0.1 * update, rtol=1e-4, atol=1e-7)


def test_adafactor_keeps_rows_and_columns_only():
    tx, _ = optimizer(RATE, 10, name="adafactor", moment_dtype="bfloat16")
    params = {"kernel": jnp.zeros((128, 256))}
    shapes = {leaf.shape: leaf.dtype.name for leaf in jax.tree.leaves(tx.init(params)) if leaf.ndim}
    assert shapes[(128,)] == shapes[(256,)] == "float32" and shapes[(128, 256)] == "bfloat16"


def test_muon_orthogonalises_matrices_and_no_others():
    rng = np.random.default_rng(0)
    shapes = {"a/kernel": (6, 4), "layers/kernel": (3, 4, 6), "conv/kernel": (3, 3, 2, 4), "logits/kernel": (6, 4)}
    shapes["b"] = (4,)
    grads = {path: jnp.asarray(rng.normal(size=shape), jnp.float32) for path, shape in shapes.items()}
    got = updates(grads, name="muon")
    for path, count, inputs, outputs in (("a/kernel", 1, 6, 4), ("layers/kernel", 3, 4, 6), ("conv/kernel", 1, 18, 4)):
        for update, grad in zip(got[path].reshape(count, inputs, outputs), grads[path].reshape(count, inputs, outputs)):
            values = np.linalg.svd(update, compute_uv=False) / (RATE * 0.2 * max(inputs, outputs) ** 0.5)
            assert (values > 0.6).all() and (values < 1.3).all(), path  # five Newton-Schulz steps come so near to one
            u, _, v = np.linalg.svd(grad, full_matrices=False)
            assert np.sum(update * (u @ v)) < -0.9 * np.linalg.norm(update) * np.linalg.norm(u @ v)
    for path in ("logits/kernel", "b"):  # Adam's first step, with Nesterov momentum, goes by signs
        np.testing.assert_array_equal(np.sign(got[path]), -np.sign(grads[path]))
        assert np.ptp(np.abs(got[path])) < 1e-5


def test_weight_decay_reaches_kernels_alone():
    params = {"a/kernel": jnp.full(2, 3.0), "a/bias": jnp.full(2, 3.0)}
    zero = {name: jnp.zeros(2) for name in params}
    got = updates(zero, params, weight_decay=0.5)
    np.testing.assert_allclose(got["a/kernel"], -RATE * 0.5 * 3.0)
    np.testing.assert_allclose(got["a/bias"], 0)
    np.testing.assert_allclose(updates(zero, params, weight_decay=0.5, decay=".*bias")["a/kernel"], 0)


def test_start_holds_updates_back():
    g = {"w": jnp.ones(2)}
    for steps, want in ((1, 0.0), (2, 0.0), (3, -RATE)):
        np.testing.assert_allclose(updates(g, steps=steps, name="sgd", b1=0.0, start=2)["w"], want)


def test_lr_scale_first_full_match():
    g = {"a/kernel": jnp.ones(2), "b/kernel": jnp.ones(2), "c": jnp.ones(2)}
    got = updates(g, name="sgd", b1=0.0, lr_scale=[("a/.*", 0.5), (".*kernel", 0.1)])
    np.testing.assert_allclose([got["a/kernel"][0], got["b/kernel"][0], got["c"][0]], [-0.05, -0.01, -0.1], rtol=1e-6)


def test_clipping_is_by_the_global_norm():
    g = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
    got = updates(g, name="sgd", b1=0.0, clip=1.0)
    np.testing.assert_allclose([got["a"][0], got["b"][0]], [-0.06, -0.08], rtol=1e-6)
    assert updates(g, name="sgd", b1=0.0, clip=100.0)["a"][0] == pytest.approx(-0.3)


def test_the_schedule_is_what_the_optimiser_uses():
    tx, rate = optimizer(RATE, 10, name="sgd", b1=0.0, warmup=4)
    params, state = {"w": jnp.zeros(1)}, tx.init({"w": jnp.zeros(1)})
    for step in range(10):
        delta, state = tx.update({"w": jnp.ones(1)}, state, params)
        params = optax.apply_updates(params, delta)
        np.testing.assert_allclose(delta["w"], -rate(step), rtol=1e-6)
