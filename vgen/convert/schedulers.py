"""scheduler_config.json of diffusers as settings of `vgen.tasks.diffuse.Diffuse`, and back."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from vgen.convert.rules import ConvertError
from vgen.diffusion import schedules

# What every class has, and its usual defaults.
_COMMON = dict(
    num_train_timesteps=1000,
    beta_start=0.0001,
    beta_end=0.02,
    beta_schedule="linear",
    trained_betas=None,
    prediction_type="epsilon",
    timestep_spacing="leading",
    steps_offset=0,
)
_THRESHOLDING = dict(thresholding=False, dynamic_thresholding_ratio=0.995, sample_max_value=1.0)
_CLIPPING = dict(_THRESHOLDING, clip_sample=True, clip_sample_range=1.0)
_SIGMAS = dict(use_karras_sigmas=False, use_exponential_sigmas=False, use_beta_sigmas=False)
_DPM = dict(
    solver_order=2,
    algorithm_type="dpmsolver++",
    solver_type="midpoint",
    lower_order_final=True,
    euler_at_final=False,
    use_lu_lambdas=False,
    use_flow_sigmas=False,
    flow_shift=1.0,
    lambda_min_clipped=-float("inf"),
    variance_type=None,
    use_dynamic_shifting=False,
    time_shift_type="exponential",
)
_SPACINGS = ("leading", "trailing", "linspace")
_KINDS = dict(epsilon="eps", v_prediction="v", sample="x0")
_TABLES = dict(linear="linear", scaled_linear="scaled_linear", squaredcos_cap_v2="cosine")
_ANY = tuple(_KINDS)


class Scheduler(NamedTuple):
    """One class of diffusers.

    solver: of `vgen.diffusion.solvers`.  defaults: what its constructor takes, with its defaults; entries of a config
    that are not among them mean nothing to it.  only: {entry: values that Diffuse can be set to}; others are free.
    floor: of alpha^2 at zero terminal SNR.  k_diffusion: it works in sigma / alpha, and begins from sigma times the
    noise in all spacings but the leading one.  needs: (config) -> what else is wrong with it, "" for nothing.
    """

    solver: str
    defaults: Mapping[str, Any]
    only: Mapping[str, tuple] = {}
    floor: float = 0.0
    k_diffusion: bool = False
    needs: Callable[[Mapping[str, Any]], str] = lambda config: ""


def _clipping(config: Mapping[str, Any]) -> str:
    """Thresholds other than -1 .. 1."""
    if config.get("clip_sample") and config["clip_sample_range"] != 1:
        return f"clip_sample_range must be 1, got {config['clip_sample_range']}"
    if config["thresholding"] and config["sample_max_value"] != 1:
        return f"sample_max_value must be 1, got {config['sample_max_value']}"
    return ""


def _own_times(config: Mapping[str, Any]) -> str:
    """Levels that are spaced between those of the times."""
    spaced = [name for name in ("use_karras_sigmas", "use_exponential_sigmas") if config[name]]
    if spaced and config["timestep_spacing"] != "linspace":
        return f"timestep_spacing must be linspace with {spaced[0]}, got {config['timestep_spacing']!r}"
    return ""


def _dpm(config: Mapping[str, Any]) -> str:
    if config["use_karras_sigmas"] and config["beta_schedule"] == "squaredcos_cap_v2":
        return "use_karras_sigmas must be false with the beta_schedule squaredcos_cap_v2"
    return _clipping(config)


SCHEDULERS: Mapping[str, Scheduler] = {
    "DDIMScheduler": Scheduler(
        "ddim",
        _COMMON | _CLIPPING | dict(set_alpha_to_one=True, rescale_betas_zero_snr=False),
        # diffusers takes the noise from x0 as it was ahead of the clipping, and the sampler here behind it
        dict(clip_sample=(False,), thresholding=(False,)),
    ),
    "DDPMScheduler": Scheduler(
        "ddpm",
        _COMMON | _CLIPPING | dict(variance_type="fixed_small", rescale_betas_zero_snr=False),
        dict(
            variance_type=(
                "fixed_small",
                "fixed_small_log",
                "fixed_large",
                "fixed_large_log",
                "learned",
                "learned_range",
            ),
        ),
        needs=_clipping,
    ),
    "PNDMScheduler": Scheduler(
        "pndm",
        _COMMON | dict(skip_prk_steps=False, set_alpha_to_one=False),
        dict(skip_prk_steps=(True,), timestep_spacing=("leading",), prediction_type=("epsilon",)),
    ),
    "EulerDiscreteScheduler": Scheduler(
        "euler",
        _COMMON
        | _SIGMAS
        | dict(
            timestep_spacing="linspace",
            interpolation_type="linear",
            timestep_type="discrete",
            sigma_min=None,
            sigma_max=None,
            rescale_betas_zero_snr=False,
            final_sigmas_type="zero",
        ),
        dict(interpolation_type=("linear",), timestep_type=("discrete",), use_beta_sigmas=(False,)),
        2.0**-24,
        True,
        _own_times,
    ),
    "EulerAncestralDiscreteScheduler": Scheduler(
        "euler_ancestral",
        _COMMON | dict(timestep_spacing="linspace", rescale_betas_zero_snr=False),
        floor=2.0**-24,
        k_diffusion=True,
    ),
    "HeunDiscreteScheduler": Scheduler(
        "heun",
        _COMMON
        | _SIGMAS
        | dict(beta_start=0.00085, beta_end=0.012, timestep_spacing="linspace")
        | dict(clip_sample=False, clip_sample_range=1.0),
        dict(clip_sample=(False,), use_beta_sigmas=(False,)),
        k_diffusion=True,
        needs=_own_times,
    ),
    "DPMSolverMultistepScheduler": Scheduler(
        "dpmpp_2m",
        _COMMON
        | _SIGMAS
        | _THRESHOLDING
        | _DPM
        | dict(timestep_spacing="linspace", rescale_betas_zero_snr=False, final_sigmas_type="zero"),
        dict(
            solver_order=(2,),
            algorithm_type=("dpmsolver++", "sde-dpmsolver++"),
            solver_type=("midpoint", "heun"),
            lower_order_final=(True,),
            euler_at_final=(False,),
            use_lu_lambdas=(False,),
            use_flow_sigmas=(False,),
            use_exponential_sigmas=(False,),
            use_beta_sigmas=(False,),
            lambda_min_clipped=(-float("inf"),),
            variance_type=(None,),
        ),
        2.0**-24,
        needs=_dpm,
    ),
}
_FREE = dict(prediction_type=_ANY, timestep_spacing=_SPACINGS, beta_schedule=tuple(_TABLES))
_FREE |= dict(final_sigmas_type=("zero", "sigma_min"))


def settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of Diffuse for a scheduler_config.json: schedule, prediction, solver and what belongs to it; `variance`
    where the scheduler's is learned.

    Raises ConvertError, one sentence, for another class, or an entry whose value nothing here does.
    """
    name = config.get("_class_name")
    if name not in SCHEDULERS:
        raise ConvertError(f"vgen has no scheduler {name!r}; it has {', '.join(SCHEDULERS)}")
    kind = SCHEDULERS[name]
    full = dict(kind.defaults) | {key: value for key, value in config.items() if key in kind.defaults}
    for key, accepted in (_FREE | dict(kind.only)).items():
        if key in full and full[key] not in accepted:
            known = ", ".join(map(repr, accepted))
            raise ConvertError(f"{name}: {key} is {full[key]!r}, vgen has {known}")
    if wrong := kind.needs(full):
        raise ConvertError(f"{name}: {wrong}")
    return _settings(kind, full)


def _settings(kind: Scheduler, config: Mapping[str, Any]) -> dict[str, Any]:
    length, spacing = config["num_train_timesteps"], config["timestep_spacing"]
    knobs: dict[str, Any] = {}
    grid = dict(spacing=spacing, offset=config["steps_offset"] if spacing == "leading" else 0)
    if not config.get("set_alpha_to_one", True) or config.get("final_sigmas_type") == "sigma_min":
        grid |= dict(final="first")
    if kind.solver == "ddim" and spacing != "leading":
        grid |= dict(stride=True)
    for entry, spaced in (("use_karras_sigmas", "karras"), ("use_exponential_sigmas", "exponential")):
        if config.get(entry):
            grid |= {"spacing": spaced, "offset": 0}
            grid |= {key: config[key] for key in ("sigma_min", "sigma_max") if config.get(key) is not None}
            grid |= dict(rounded=True) if kind.solver == "dpmpp_2m" else {}
    solver, made = kind.solver, {}
    if solver == "dpmpp_2m":
        solver += "_sde" if config["algorithm_type"].startswith("sde") else ""
        knobs |= dict(solver=config["solver_type"])
    if solver == "ddpm":
        variance = config["variance_type"].removesuffix("_log")
        knobs |= dict(variance=variance)
        made |= dict(variance=variance) if variance.startswith("learned") else {}
    clipped = config.get("clip_sample") or config.get("thresholding")
    return made | dict(
        schedule=schedules.discrete(_betas(kind, config)),
        prediction=_KINDS[config["prediction_type"]],
        solver=solver,
        solver_knobs=knobs,
        grid_knobs=grid,
        max_steps=length - (solver.startswith("dpmpp") and grid["spacing"] in ("leading", "linspace")),
        threshold="clip" if clipped else "none",
        pure_start=kind.k_diffusion and spacing != "leading",
    )


def _betas(kind: Scheduler, config: Mapping[str, Any]) -> np.ndarray:
    if config["trained_betas"] is not None:
        betas = np.asarray(config["trained_betas"], np.float64)
    else:
        name = _TABLES[config["beta_schedule"]]
        ends = () if name == "cosine" else (config["beta_start"], config["beta_end"])
        betas = schedules.betas(name, config["num_train_timesteps"], *ends)
    if config.get("rescale_betas_zero_snr"):
        betas = schedules.zero_terminal_snr(betas, kind.floor)
    return betas


# --------------------------------------------------------------------------------------------------------------- back


def config_of(task: Any) -> dict[str, Any]:
    """scheduler_config.json of a Diffuse; its betas are written out where they are no table that diffusers knows.

    Raises ConvertError for a schedule without a table, or a solver that no class of diffusers is read as.
    """
    solver = task.solver.removesuffix("_sde")
    names = [name for name, kind in SCHEDULERS.items() if kind.solver == solver]
    if not names or task.schedule.length is None:
        known = ", ".join(kind.solver for kind in SCHEDULERS.values())
        raise ConvertError(f"no scheduler of diffusers samples by {task.solver!r} on such a schedule; known: {known}")
    kind, grid, knobs = SCHEDULERS[names[0]], dict(task.grid_knobs), dict(task.solver_knobs)
    leading = solver in ("ddim", "ddpm", "pndm")
    spacing = grid.get("spacing", "leading" if leading else "linspace")
    config = dict(kind.defaults) | {key: values[0] for key, values in kind.only.items()}
    config |= _named_betas(task.schedule)
    config |= dict(
        _class_name=names[0],
        num_train_timesteps=task.schedule.length,
        prediction_type={ours: theirs for theirs, ours in _KINDS.items()}[task.prediction],
        timestep_spacing=spacing if spacing in _SPACINGS else "linspace",
        steps_offset=grid.get("offset", 0),
    )
    first = grid.get("final") == "first"
    config |= {"set_alpha_to_one": not first} if "set_alpha_to_one" in config else {}
    config |= {"final_sigmas_type": "sigma_min" if first else "zero"} if "final_sigmas_type" in config else {}
    config |= {"clip_sample": task.threshold == "clip"} if "clip_sample" in config else {}
    config |= {"variance_type": knobs.get("variance", "fixed_small")} if solver == "ddpm" else {}
    if solver == "dpmpp_2m":
        del config["lambda_min_clipped"]  # infinite, which JSON cannot say
        config |= dict(solver_type=knobs.get("solver", "midpoint"))
        config |= dict(algorithm_type="sde-dpmsolver++" if task.solver.endswith("_sde") else "dpmsolver++")
        config |= dict(thresholding=task.threshold == "clip")
    for entry, spaced in (("use_karras_sigmas", "karras"), ("use_exponential_sigmas", "exponential")):
        config |= {entry: True} if spacing == spaced else {}
    config |= {key: grid[key] for key in ("sigma_min", "sigma_max") if key in grid}
    _check_same(task, config)
    return config


def _check_same(task: Any, config: Mapping[str, Any]) -> None:
    """ConvertError where the config, read again, is not the task's."""
    back = settings(config)
    read_as = {name: back[name] for name in ("solver", "prediction", "threshold", "pure_start")}
    wrong = {name: getattr(task, name) for name, value in read_as.items() if getattr(task, name) != value}
    unknown = set(task.solver_knobs) - {"variance", "solver"}
    unknown |= set(task.grid_knobs) - {"spacing", "offset", "final", "stride", "rounded", "sigma_min", "sigma_max"}
    if wrong or unknown:
        said = [*(f"{name} = {value!r}" for name, value in wrong.items()), *sorted(unknown)]
        raise ConvertError(f"{config['_class_name']} of diffusers cannot say {', '.join(said)}")


def _named_betas(schedule: Any) -> dict[str, Any]:
    """beta_schedule, beta_start and beta_end, or trained_betas."""
    with jax.enable_x64(True):
        alpha, sigma = (np.asarray(a, np.float64) for a in schedule.level(np.arange(schedule.length)))
    bar = np.where(alpha > 0, alpha**2, 0.0)
    betas = 1 - bar / np.concatenate([[1.0], bar[:-1]])
    start, end = (float(f"{value:.9g}") for value in (betas[0], betas[-1]))
    for theirs, ours in _TABLES.items():
        ends = () if ours == "cosine" else (start, end)
        table = schedules.betas(ours, schedule.length, *ends)
        if np.allclose(table, betas, rtol=1e-7, atol=0):
            return dict(beta_schedule=theirs) | (dict(beta_start=start, beta_end=end) if ends else {})
    return dict(trained_betas=betas.tolist())
