"""scheduler_config.json: what is honoured, what is refused, and what is written again."""

import inspect

import jax
import numpy as np
import pytest

from vgen.config import UserError
from vgen.convert import schedulers
from vgen.diffusion import schedules
from vgen.models.unet import UNet
from vgen.tasks.diffuse import Diffuse

E = "EulerDiscreteScheduler"


def test_every_entry_of_a_scheduler_is_accounted_for():
    diffusers = pytest.importorskip("diffusers")
    for name, kind in schedulers.SCHEDULERS.items():
        parameters = list(inspect.signature(getattr(diffusers, name).__init__).parameters.values())[1:]
        assert dict(kind.defaults) == {p.name: p.default for p in parameters}, name


@pytest.mark.parametrize(
    "config, message",
    [
        (dict(_class_name="LMSDiscreteScheduler"), "no scheduler 'LMSDiscreteScheduler'; it has DDIMScheduler, DDPMS"),
        (dict(_class_name="DDIMScheduler"), "clip_sample is True, vgen has False"),
        (dict(_class_name="DDIMScheduler", clip_sample=False, beta_schedule="sigmoid"), "beta_schedule is 'sigmoid'"),
        (dict(_class_name="PNDMScheduler"), "skip_prk_steps is False, vgen has True"),
        (dict(_class_name=E, use_karras_sigmas=True, timestep_spacing="leading"), "timestep_spacing must be linspace"),
        (dict(_class_name="DDPMScheduler", clip_sample_range=2.0), "clip_sample_range must be 1"),
        (dict(_class_name="DPMSolverMultistepScheduler", solver_order=3), "solver_order is 3, vgen has 2"),
    ],
)
def test_schedulers_that_are_refused(config, message):
    with pytest.raises(UserError, match=message):
        schedulers.settings(config)


NAMED = [
    ("DDIMScheduler", dict(clip_sample=False, set_alpha_to_one=False, steps_offset=1, beta_schedule="scaled_linear")),
    ("DDIMScheduler", dict(clip_sample=False, timestep_spacing="trailing", rescale_betas_zero_snr=True)),
    ("DDPMScheduler", dict(beta_schedule="squaredcos_cap_v2", variance_type="learned_range", prediction_type="sample")),
    ("PNDMScheduler", dict(skip_prk_steps=True, num_train_timesteps=50)),
    (E, dict(use_karras_sigmas=True, final_sigmas_type="sigma_min", prediction_type="v_prediction", sigma_min=0.1)),
    (E, dict(timestep_spacing="leading", steps_offset=1)),
    ("EulerAncestralDiscreteScheduler", dict(trained_betas=[0.1, 0.2, 0.3], num_train_timesteps=3)),
    ("HeunDiscreteScheduler", dict(use_exponential_sigmas=True)),
    ("DPMSolverMultistepScheduler", dict(algorithm_type="sde-dpmsolver++", solver_type="heun", thresholding=True)),
    ("DPMSolverMultistepScheduler", dict(use_karras_sigmas=True)),
]


@pytest.mark.parametrize("name, entries", NAMED)
def test_back(name, entries):
    """What is written of a task is read as the same task."""
    fields = schedulers.settings(dict(_class_name=name, **entries))
    fields.pop("variance", None)
    config = schedulers.config_of(Diffuse(network=UNet(), size=8, **fields))
    written = {k: v for k, v in entries.items() if k not in ("rescale_betas_zero_snr", "trained_betas")}
    assert config["_class_name"] == name and {k: config[k] for k in written} == written
    again = schedulers.settings(config)
    with jax.enable_x64(True):
        levels = [f["schedule"].level(np.arange(f["schedule"].length)) for f in (fields, again)]
    np.testing.assert_allclose(*levels, rtol=1e-6, atol=1e-9)
    same = [{k: v for k, v in f.items() if k not in ("schedule", "variance")} for f in (fields, again)]
    assert same[0] == same[1]


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(solver="predictor_corrector"), "no scheduler of diffusers samples by 'predictor_corrector'"),
        (dict(schedule=schedules.rectified_flow(), solver="euler"), "on such a schedule"),
        (dict(solver_knobs=dict(eta=0.5), pure_start=False), "DDIMScheduler of diffusers cannot say eta"),
        (dict(threshold="clip"), "clip_sample is True, vgen has False"),
    ],
)
def test_what_diffusers_cannot_say(changes, message):
    fields = dict(network=UNet(), size=8, schedule=schedules.discrete(schedules.betas())) | changes
    with pytest.raises(UserError, match=message):
        schedulers.config_of(Diffuse(**fields))
