"""DDIM: the network of a DDPM, sampled in a tenth of its steps or fewer, with no noise but the first.

Paper
  Song, Meng, Ermon, 2020, Denoising diffusion implicit models, arXiv:2010.02502.

Parts
  The system of configs/ddpm.py; samplers.ddim and grids of vgen/diffusion. eta 0 adds no noise; eta 1 is DDPM with the
  posterior's variance, and the row `ddpm` DDPM with the forward variance (the paper's sigma hat).

Commands
  On what ddpm has trained; with a new workdir the first command trains the same:
  python -m vgen.main --config=configs/ddim.py --workdir=runs/ddpm --mode=eval
  python -m vgen.main --config=configs/ddim.py --workdir=runs/ddpm --mode=sample --steps=20 --prompt=any --num_images=16
  (a prompt counts pictures and says nothing)
  From nothing: python -m vgen.main --config=configs/ddim.py --workdir=runs/ddim
  Another solver of vgen/diffusion/solvers.py beside them: --config.eval.tasks.dpmpp="{'solver': 'dpmpp_2m'}"
  The published weights: configs/ddim.py:imported --config.weights=FILE, see configs/ddpm.py

Published numbers
  FID after 10, 20, 50, 100, 1000 steps. CIFAR-10 (squared spacing, as at `paper`): eta 0 13.36, 6.84, 4.67, 4.16, 4.04;
  eta 1 41.07, 18.36, 8.01, 5.78, 4.73; sigma hat 367, 133, 32.7, 9.99, 3.17. CelebA 64 px: eta 0 17.33, 13.73, 9.17,
  6.53, 3.51.

Measured numbers
  mini on ddpm's mini, 128 pictures, seed 0; share read as scenes, and in brackets the distance to 100 steps:
    steps       10            20            50            100
    eta 0       0.24 (0.168)  0.34 (0.084)  0.37 (0.033)  0.36
    eta 1       0.24 (0.657)  0.40 (0.599)  0.47 (0.419)  0.52
    ddpm        0.01 (0.709)  0.30 (0.619)  0.48 (0.423)  0.51
  As published, sigma hat is of no use in 10 steps, and with enough of them noise is better than none.
  Rows of eval_ddim.json: <eta_0, eta_1 or ddpm>_steps_<n>, with scene, pairs and distance (to the most steps, from the
  same noise; pictures in [-1, 1]).
"""

from ml_collections import ConfigDict

from vgen import recipes

SCALES = ("tiny", "mini", "small", "paper", "imported")

STEPS = (10, 20, 50, 100, 1000)
PUBLISHED = dict(
    fid=dict(
        steps=STEPS, eta_0=(13.36, 6.84, 4.67, 4.16, 4.04), eta_1=(41.07, 18.36, 8.01, 5.78, 4.73),
        ddpm=(367.0, 133.0, 32.7, 9.99, 3.17),
    ),
)  # fmt: skip

TASKS = dict(
    eta_0=dict(solver="ddim", solver_knobs=dict(eta=0.0)),
    eta_1=dict(solver="ddim", solver_knobs=dict(eta=1.0)),
    ddpm=dict(solver="ddpm", solver_knobs=dict(variance="fixed_large")),
)

EVAL = dict(
    tiny=dict(pictures=4, steps=(2, 3), tasks={name: TASKS[name] for name in ("eta_0", "ddpm")}),
    mini=dict(pictures=128, steps=STEPS[:4], tasks=TASKS),
    small=dict(pictures=1024, steps=STEPS, tasks=TASKS),
)


def get_config(scale: str = "mini") -> ConfigDict:
    """configs/ddpm.py at one scale, sampled by DDIM in 50 steps; measured with its noise and without in 10 to 100."""
    config = recipes.study(
        __file__, "ddpm", scale, measure="vgen.metrics.edit_eval:SolverStudy", settings=EVAL, published=PUBLISHED
    )
    task = dict(TASKS["eta_0"]) | (dict(grid_knobs=dict(spacing="quadratic")) if scale in ("paper", "imported") else {})
    config.generate.task = ConfigDict(dict(unet=task))
    config.generate.knobs.unet.steps = 3 if scale == "tiny" else 50
    return config
