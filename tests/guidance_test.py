"""Guidance: the mixture of predictions, in one call, with traced scales."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vgen.diffusion import grids, predictions, samplers, schedules
from vgen.guidance import (
    cfg,
    classifier,
    clip,
    dynamic_threshold,
    instruct_pix2pix,
    interval,
    mix,
    rising,
    steer,
)
from vgen.sample import sample
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


TABLE = schedules.discrete(schedules.betas("scaled_linear"))
ROW = schedules.at(TABLE, 500.0)
IMAGE = jnp.asarray(np.random.default_rng(0).standard_normal((2, 4, 4, 3)), jnp.float32)


@pytest.mark.parametrize("kind", ["eps", "v"])
def test_rescale_is_that_of_diffusers(kind):
    import torch
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

    kind_ = predictions.kind_of(kind)
    raws = np.random.default_rng(1).standard_normal((2, *IMAGE.shape)).astype(np.float32)
    conds = [jnp.asarray(raw) for raw in raws]
    apply = lambda x, step, cond: Prediction(kind_.to_x0(cond, x, step))
    mixed = raws[1] + 7.5 * (raws[0] - raws[1])
    nchw = lambda a: torch.from_numpy(np.moveaxis(a, -1, 1).copy())
    for phi in (0.0, 0.7, 1.0):
        want = rescale_noise_cfg(nchw(mixed), nchw(raws[0]), phi).numpy()
        got = mix(apply, conds, cfg(7.5), jnp.float32(phi), kind)(IMAGE, ROW).x0
        want = kind_.to_x0(np.moveaxis(want, 1, -1), IMAGE, ROW)
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_interval():
    weights = interval(cfg(3.0), 0.5, 2.0)
    for ratio, want in {0.1: [1, 0], 0.5: [1, 0], 1.0: [3, -2], 2.0: [3, -2], 2.1: [1, 0]}.items():
        np.testing.assert_allclose(weights(ROW._replace(alpha=jnp.ones(()), sigma=jnp.float32(ratio))), want)


def test_classifier_guidance_draws_from_the_product():
    """A Gaussian prior times a Gaussian likelihood has a known mean; both forms of guidance reach it."""
    noised = lambda step: step.alpha**2 + step.sigma**2  # data N(0, 1)
    denoise = lambda x, step: Prediction(step.alpha * x / noised(step))
    towards, width = 2.0, 1.0

    def log_prob(x, step):  # of y = x0 + width n given the noised x
        mean, variance = step.alpha * x / noised(step), step.sigma**2 / noised(step) + width**2
        return (-((towards - mean) ** 2) / (2 * variance)).sum(axis=1)

    guide = classifier(log_prob, 1.0)
    x = jax.random.normal(jax.random.key(0), (4000, 1))
    grid = grids.grid(schedules.discrete(schedules.betas()), 250)
    shifted = sample(denoise, samplers.ancestral(guide=guide), grid, jax.random.key(1), x)
    steered = sample(steer(denoise, guide), samplers.ddim(), grid, jax.random.key(1), x)
    for got in (shifted, steered):
        assert abs(float(got.mean()) - 1.0) < 0.05 and abs(float(got.var()) - 0.5) < 0.05
    plain = sample(denoise, samplers.ddim(), grid, jax.random.key(1), x)
    assert abs(float(plain.mean())) < 0.05


@pytest.mark.parametrize("maximum", [1.0, 1.5, jnp.inf])
def test_dynamic_thresholding_is_that_of_diffusers(maximum):
    import torch
    from diffusers import DDIMScheduler

    given = lambda x, step: Prediction(2 * x, {"kept": x})
    theirs = DDIMScheduler(thresholding=True, sample_max_value=float(maximum), dynamic_thresholding_ratio=0.9)
    want = theirs._threshold_sample(torch.from_numpy(np.array(2 * IMAGE)).movedim(-1, 1)).movedim(1, -1)
    got = dynamic_threshold(given, 0.9, maximum)(IMAGE, ROW)
    np.testing.assert_allclose(got.x0, want.numpy(), rtol=1e-5)
    np.testing.assert_array_equal(got.aux["kept"], IMAGE)
    np.testing.assert_array_equal(clip(given)(IMAGE, ROW).x0, jnp.clip(2 * IMAGE, -1, 1))
