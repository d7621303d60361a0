"""Guidance: the mixture of predictions, in one call, with traced scales."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vgen.guidance import cfg, instruct_pix2pix, mix, rising
from vgen.tokens.parallel import grid
from vgen.types import Prediction

X = jnp.arange(6.0).reshape(2, 3)
CONDS = [{"text": jnp.full((2, 1), value), "keep": jnp.full((2,), value > 0)} for value in (3.0, 0.0, -1.0)]


def apply(x, step, cond):
    return Prediction(x * 10 + cond["text"] * jnp.where(cond["keep"], 1.0, 2.0)[:, None], {"seen": cond["text"][:, 0]})


def alone(i, x=X):
    return apply(x, None, CONDS[i]).x0


def at(i, steps=4):
    return jax.tree.map(lambda a: a[i], grid(steps))


def test_classifier_free_and_negative():
    got = mix(apply, CONDS[:2], cfg(7.5))(X, at(0))
    np.testing.assert_allclose(got.x0, alone(1) + 7.5 * (alone(0) - alone(1)), rtol=1e-6)
    np.testing.assert_array_equal(got.aux["seen"], [3.0, 3.0])
    np.testing.assert_allclose(mix(apply, CONDS[:2], cfg(1.0))(X, at(0)).x0, alone(0))
    negative = mix(apply, [CONDS[0], CONDS[2]], cfg(2.0))(X, at(0)).x0
    np.testing.assert_allclose(negative, 2 * alone(0) - alone(2), rtol=1e-6)


def test_rising_is_linear_and_zero_is_the_condition_alone():
    for i in range(4):
        t = 6.0 * (i + 1) / 4
        got = mix(apply, CONDS[:2], rising(6.0))(X, at(i)).x0
        np.testing.assert_allclose(got, (1 + t) * alone(0) - t * alone(1), rtol=1e-5)
        np.testing.assert_allclose(mix(apply, CONDS[:2], rising(0.0))(X, at(i)).x0, alone(0), rtol=1e-6)


def test_instruct_pix2pix():
    both, image, none = (alone(i) for i in range(3))
    got = mix(apply, CONDS, instruct_pix2pix(7.0, 1.5))(X, at(0)).x0
    np.testing.assert_allclose(got, none + 1.5 * (image - none) + 7.0 * (both - image), rtol=1e-5)


def test_one_network_call_and_one_program():
    calls, traces = [], []

    def counted(x, step, cond):
        calls.append(x.shape)
        return apply(x, step, cond)

    @jax.jit
    def run(scale):
        traces.append(1)
        return mix(counted, CONDS[:2], rising(scale))(X, at(3)).x0

    for scale in (0.0, 1.0, 9.0):
        np.testing.assert_allclose(run(scale), (1 + scale) * alone(0) - scale * alone(1), rtol=1e-5)
    assert calls == [(4, 3)] and len(traces) == 1


def test_half_precision_predictions_are_mixed_in_float32():
    half = lambda x, step, cond: Prediction(apply(x, step, cond).x0.astype(jnp.bfloat16))
    got = mix(half, CONDS[:2], cfg(1.3))(X, at(0)).x0
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, alone(1) + 1.3 * (alone(0) - alone(1)), rtol=1e-2)


def test_bad_arguments():
    with pytest.raises(ValueError, match="conds is empty"):
        mix(apply, [], cfg(1.0))
    with pytest.raises(ValueError, match="one structure"):
        mix(apply, [CONDS[0], {"text": CONDS[1]["text"]}], cfg(1.0))
    with pytest.raises(ValueError, match=r"shape \(3,\), one per condition, got \(2,\)"):
        mix(apply, CONDS, cfg(1.0))(X, at(0))
