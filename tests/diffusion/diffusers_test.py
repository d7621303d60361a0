"""Whole trajectories against diffusers' schedulers, both in float64, with the same noise."""

import jax
import numpy as np
import pytest

from tests.conftest import quick_compilation
from tests.diffusion.reference import (
    SHAPE,
    eps,
    learned,
    nchw,
    network,
    network2,
    nhwc,
    replay,
    scheduler,
    states,
    trajectory,
    worst,
)
from vgen.diffusion import grids, multistep, samplers, schedules
from vgen.diffusion.predictions import denoiser
from vgen.guidance import clip

RNG = np.random.default_rng(0)
START, NOISES = RNG.standard_normal(SHAPE), RNG.standard_normal((60, *SHAPE))
KEY = jax.random.key(3)
TABLES = {
    "linear": ("linear", dict(beta_schedule="linear")),
    "scaled_linear": ("scaled_linear", dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)),
    "cosine": ("cosine", dict(beta_schedule="squaredcos_cap_v2")),
}
KINDS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
pytestmark = pytest.mark.usefixtures("x64")


@pytest.fixture(scope="module", autouse=True)
def quick():
    with quick_compilation():
        yield


def model(x, t):
    return eps(x, t, np)


def model2(x, t):
    return np.concatenate([eps(x, t, np), learned(x, t, np)], axis=1)


def table(name="scaled_linear", zero_snr=None):
    name, config = TABLES[name]
    betas = schedules.betas(name)
    if zero_snr is not None:
        betas, config = schedules.zero_terminal_snr(betas, zero_snr), dict(config, rescale_betas_zero_snr=True)
    return schedules.discrete(betas), config


def check(got, want):
    assert worst(got, want) < 1e-9


@pytest.mark.parametrize("final", ["clean", "first"])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_ddim(monkeypatch, eta, offset, final):
    schedule, config = table()
    theirs = scheduler(
        monkeypatch, "ddim", "DDIMScheduler", NOISES, steps_offset=offset, set_alpha_to_one=final == "clean",
        clip_sample=False, **config,
    )  # fmt: skip
    theirs.set_timesteps(8)
    grid = grids.grid(schedule, 8, offset=offset, final=final)
    sampler = samplers.ddim(eta, replay(KEY, NOISES))
    check(states(denoiser(network), sampler, grid, KEY, START), trajectory(theirs, model, START, eta=eta))


@pytest.mark.parametrize(
    "name, kind, spacing, steps, zero_snr",
    [
        ("scaled_linear", "v", "leading", 8, None),
        ("linear", "x0", "trailing", 8, None),
        ("scaled_linear", "v", "trailing", 10, 0.0),  # zero terminal SNR
        ("cosine", "v", "linspace", 7, None),  # where prev_t is no time of the grid
        ("linear", "eps", "trailing", 7, None),
    ],
)
def test_ddim_predictions_and_grids(monkeypatch, name, kind, spacing, steps, zero_snr):
    schedule, config = table(name, zero_snr)
    theirs = scheduler(
        monkeypatch, "ddim", "DDIMScheduler", NOISES, clip_sample=True, prediction_type=KINDS[kind],
        timestep_spacing=spacing, **config,
    )  # fmt: skip
    theirs.set_timesteps(steps)
    grid = grids.grid(schedule, steps, spacing=spacing, stride=True)
    got = states(clip(denoiser(network, kind)), samplers.ddim(0.3, replay(KEY, NOISES)), grid, KEY, START)
    check(got, trajectory(theirs, model, START, eta=0.3, use_clipped_model_output=True))


def test_ddim_inversion(monkeypatch):
    schedule, config = table()
    theirs = scheduler(
        monkeypatch, "ddim_inverse", "DDIMInverseScheduler", set_alpha_to_one=False, clip_sample=False, steps_offset=1,
        **config,
    )  # fmt: skip
    theirs.set_timesteps(10)
    grid = grids.inverted(grids.grid(schedule, 10, 16, offset=1, final="first"))
    check(states(denoiser(network), samplers.ddim(), grid, KEY, START), trajectory(theirs, model, START))


@pytest.mark.parametrize("kind", ["eps", "v"])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
def test_ddpm(monkeypatch, variance, kind):
    schedule, config = table("linear")
    theirs = scheduler(
        monkeypatch, "ddpm", "DDPMScheduler", NOISES, variance_type=variance, prediction_type=KINDS[kind], **config
    )
    theirs.set_timesteps(9)
    ranged = variance == "learned_range"
    denoise = denoiser(network2 if ranged else network, kind, variance=variance if ranged else None)
    sampler = samplers.ancestral(variance, noise=replay(KEY, NOISES))
    got = states(clip(denoise), sampler, grids.grid(schedule, 9, 12), KEY, START)
    check(got, trajectory(theirs, model2 if ranged else model, START))


EULER = [
    ("linear", "eps", dict(spacing="linspace", rounded=False), {}),
    ("scaled_linear", "v", dict(spacing="leading", offset=1), dict(timestep_spacing="leading", steps_offset=1)),
    ("scaled_linear", "eps", dict(spacing="karras"), dict(use_karras_sigmas=True)),
    ("scaled_linear", "eps", dict(spacing="exponential"), dict(use_exponential_sigmas=True)),
]


def scaled(theirs, steps):
    """Both starts: diffusers', and the same in the variance-preserving scale."""
    theirs.set_timesteps(steps)
    first = START * float(theirs.init_noise_sigma)
    return first, first / (1 + float(theirs.sigmas[0]) ** 2) ** 0.5


@pytest.mark.parametrize("name, kind, ours, config", EULER)
def test_euler(monkeypatch, name, kind, ours, config):
    schedule, base = table(name)
    theirs = scheduler(
        monkeypatch, "euler_discrete", "EulerDiscreteScheduler", prediction_type=KINDS[kind], **base, **config
    )
    theirs_start, start = scaled(theirs, 9)
    got = states(denoiser(network, kind), samplers.euler(), grids.grid(schedule, 9, 12, **ours), KEY, start)
    check(got, trajectory(theirs, model, theirs_start, scaled=True))


def test_euler_at_zero_terminal_snr(monkeypatch):
    schedule, base = table("scaled_linear", 2.0**-24)
    theirs = scheduler(
        monkeypatch, "euler_discrete", "EulerDiscreteScheduler", prediction_type="v_prediction",
        timestep_spacing="trailing", **base,
    )  # fmt: skip
    theirs_start, start = scaled(theirs, 8)
    got = states(denoiser(network, "v"), samplers.euler(), grids.grid(schedule, 8, spacing="trailing"), KEY, start)
    check(got, trajectory(theirs, model, theirs_start, scaled=True))


@pytest.mark.parametrize("name, kind, ours, config", EULER[:2])
def test_euler_ancestral(monkeypatch, name, kind, ours, config):
    schedule, base = table(name)
    theirs = scheduler(
        monkeypatch, "euler_ancestral_discrete", "EulerAncestralDiscreteScheduler", NOISES,
        prediction_type=KINDS[kind], **base, **config,
    )  # fmt: skip
    theirs_start, start = scaled(theirs, 9)
    sampler = samplers.euler_ancestral(noise=replay(KEY, NOISES))
    got = states(denoiser(network, kind), sampler, grids.grid(schedule, 9, **ours), KEY, start)
    check(got, trajectory(theirs, model, theirs_start, scaled=True))


@pytest.mark.parametrize("name, kind, ours, config", EULER)
def test_heun(monkeypatch, name, kind, ours, config):
    schedule, base = table(name)
    theirs = scheduler(
        monkeypatch, "heun_discrete", "HeunDiscreteScheduler", prediction_type=KINDS[kind],
        **{**dict(beta_start=1e-4, beta_end=0.02), **base, **config},
    )  # fmt: skip
    theirs_start, start = scaled(theirs, 6)
    grid = grids.heun(grids.grid(schedule, 6, 8, **ours))
    got = states(denoiser(network, kind), multistep.heun(), grid, KEY, start)
    # theirs is scaled by the level of the row to come, which is where x is
    check(got, trajectory(theirs, model, theirs_start, scaled=True))


@pytest.mark.parametrize("sde", [False, True])
@pytest.mark.parametrize("solver", ["midpoint", "heun"])
@pytest.mark.parametrize(
    "name, kind, steps, ours, config, zero_snr",
    [
        ("scaled_linear", "eps", 8, dict(spacing="linspace", spare=1), {}, None),
        ("linear", "v", 16, dict(spacing="leading", spare=1, offset=1),
         dict(timestep_spacing="leading", steps_offset=1), None),
        ("scaled_linear", "eps", 9, dict(spacing="karras", rounded=True), dict(use_karras_sigmas=True), None),
        ("linear", "eps", 9, dict(spacing="linspace", spare=1, final="first"),
         dict(final_sigmas_type="sigma_min"), None),
        ("scaled_linear", "v", 10, dict(spacing="trailing"), dict(timestep_spacing="trailing"), 2.0**-24),
    ],
)  # fmt: skip
def test_dpmpp_2m(monkeypatch, sde, solver, name, kind, steps, ours, config, zero_snr):
    schedule, base = table(name, zero_snr)
    theirs = scheduler(
        monkeypatch, "dpmsolver_multistep", "DPMSolverMultistepScheduler", NOISES, solver_type=solver,
        prediction_type=KINDS[kind], algorithm_type="sde-dpmsolver++" if sde else "dpmsolver++", **base, **config,
    )  # fmt: skip
    theirs.set_timesteps(steps)
    sampler = multistep.dpmpp_2m(
        sde=sde, solver=solver, first_order_from=steps - (steps < 15), noise=replay(KEY, NOISES)
    )
    got = states(denoiser(network, kind), sampler, grids.grid(schedule, steps, **ours), KEY, START)
    check(got, trajectory(theirs, model, START))


@pytest.mark.parametrize("skip_prk", [True, False])
@pytest.mark.parametrize("offset, final", [(1, "first"), (0, "clean")])
def test_pndm(monkeypatch, skip_prk, offset, final):
    schedule, config = table()
    theirs = scheduler(
        monkeypatch, "pndm", "PNDMScheduler", steps_offset=offset, skip_prk_steps=skip_prk,
        set_alpha_to_one=final == "clean", **config,
    )  # fmt: skip
    theirs.set_timesteps(11)
    grid = grids.grid(schedule, 11, 14, offset=offset, final=final)
    grid = grids.plms(grid) if skip_prk else grids.prk(schedule, grid)
    got = states(denoiser(network), multistep.pndm(skip_prk), grid, KEY, START)
    check(got, trajectory(theirs, model, START))


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_euler(monkeypatch, shift):
    import torch

    theirs = scheduler(monkeypatch, "flow_match_euler_discrete", "FlowMatchEulerDiscreteScheduler", shift=shift)
    theirs.set_timesteps(7)
    x, want = torch.from_numpy(START), []
    for t in theirs.timesteps:
        x = theirs.step(torch.from_numpy(model(x.numpy(), float(t))), t, x).prev_sample
        want.append(x.numpy())
    low = shift * 1e-3 / (1 + (shift - 1) * 1e-3)  # their smallest sigma is shifted twice
    grid = grids.grid(schedules.rectified_flow(low), 7, 9, "linspace", shift=shift)
    denoise = denoiser(network, "flow", time=lambda step: step.t * 1000)
    check(states(denoise, samplers.euler(), grid, KEY, START), np.stack(want))


@pytest.fixture
def wide_torch():
    import torch

    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_predictor_corrector(monkeypatch, wide_torch):
    """Score-SDE's variance-exploding process: reverse diffusion behind one Langevin step."""
    import torch

    from vgen.types import Prediction

    size = 6
    theirs = scheduler(
        monkeypatch, "sde_ve", "ScoreSdeVeScheduler", NOISES, num_train_timesteps=size, sigma_max=50.0, snr=0.16
    )
    theirs.set_timesteps(size)
    theirs.set_sigmas(size)
    x, want = torch.from_numpy(nchw(START * 50)), []
    sigmas = theirs.discrete_sigmas.numpy()[::-1].copy()
    for t in theirs.timesteps:
        level = torch.tensor(sigmas[len(want) // 2])
        score = lambda x: (torch.sin(x) - x) / level**2
        x = theirs.step_correct(score(x), x).prev_sample
        want.append(nhwc(x.numpy()))
        out = theirs.step_pred(score(x), t, x)
        last = len(want) == 2 * size - 1
        x = out.prev_sample_mean if last else out.prev_sample  # the authors end on the mean
        want.append(nhwc(x.numpy()))
    grid = grids.correctors(grids.free(schedules.edm(0.01, 50.0), sigmas))
    sampler = samplers.predictor_corrector(noise=replay(KEY, NOISES))
    got = states(lambda x, step: Prediction(jax.numpy.sin(x)), sampler, grid, KEY, START * 50)
    check(got, np.stack(want))


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_whole_times_for_every_number_of_steps(monkeypatch, spacing):
    schedule, config = table()
    theirs = scheduler(monkeypatch, "ddim", "DDIMScheduler", timestep_spacing=spacing, **config)
    ours = jax.jit(lambda n: grids.grid(schedule, n, 1000, spacing).t)
    for n in [*range(2, 60), 100, 144, 250, 333, 500, 999, 1000]:
        theirs.set_timesteps(n)
        want = theirs.timesteps.numpy()
        got = np.asarray(ours(n))[:n]
        if spacing == "leading":
            np.testing.assert_array_equal(got, want)
        else:  # theirs are multiples of a rounded step: a half may fall to either side, or one time too many come
            assert np.abs(got - want[:n]).max() <= 1 and (got != want[:n]).mean() < 0.1
            assert got[0] == 999
