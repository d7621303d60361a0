"""ILVR: pictures that look like a reference from afar, because its low frequencies are put in at every step.

Paper
  Choi, Kim, Jeong, Gwon, Yoon, 2021, ILVR: conditioning method for denoising diffusion probabilistic models,
  arXiv:2108.02938. Code: jychoi118/ilvr_adm.

Parts
  The system of configs/ddpm.py; vgen/edit/ilvr.py. The share of the times in which the reference is held to is the knob
  `strength`; N, the factor by which phi_N shrinks and enlarges, is a setting.

Commands
  On what ddpm has trained; with a new workdir the first command trains the same:
  python -m vgen.main --config=configs/ilvr.py --workdir=runs/ddpm --mode=eval
  python -m vgen.main --config=configs/ilvr.py --workdir=runs/ddpm --mode=sample --image=reference.png --prompt=any \\
    --num_images=8 --config.generate.task.unet.image_edit.factor=8 --config.generate.knobs.unet.strength=0.8
  (a prompt counts pictures and says nothing)
  From nothing: python -m vgen.main --config=configs/ilvr.py --workdir=runs/ilvr
  The published weights of a DDPM: configs/ilvr.py:imported --config.weights=FILE, see configs/ddpm.py

Published numbers
  None that could be held to. The authors' example: 256 px, N 32, 100 steps, the last 20 without the reference; `paper`
  is that on the CIFAR-10 network, with the N that leaves 8 x 8 pixels too.

Measured numbers
  mini on ddpm's mini, two outputs of each of 32 references, seed 0, 100 steps; low-pass error, scene, diversity:
    range      0 (none)            1                   0.8                 0.6
    factor 2   0.763  0.52  0.418  0.001  1.00  0.006  0.033  1.00  0.027  0.105  0.98  0.077
    factor 4   0.741  0.52  0.418  0.001  1.00  0.014  0.032  1.00  0.038  0.086  1.00  0.086
    factor 8   0.700  0.52  0.418  0.003  0.86  0.068  0.051  1.00  0.091  0.112  0.95  0.123
  Rows of eval_ilvr.json: factor_<N>_range_<strength>, with lowpass_error (pictures in [-1, 1]), scene and diversity;
  range 0 is sampling without a reference.
"""

from ml_collections import ConfigDict

from vgen import recipes

SCALES = ("tiny", "mini", "small", "paper", "imported")

PUBLISHED = dict(factor=32, size=256, steps=100, free_steps=20)

STEPS = dict(tiny=4, small=250)

EVAL = dict(
    tiny=dict(references=2, factors=(4,), ranges=(1.0,)),
    mini=dict(references=32),
    small=dict(references=128, outputs=4),
)


def get_config(scale: str = "mini") -> ConfigDict:
    """configs/ddpm.py at one scale, drawing what looks like a given picture; measured for several N and ranges."""
    config = recipes.study(
        __file__, "ddpm", scale, measure="vgen.metrics.edit_eval:IlvrStudy", settings=EVAL, published=PUBLISHED
    )
    edit = dict(target="vgen.edit.from_image:Ilvr", factor=config.stages.unet.task.size // 8)
    task = dict(solver="ddpm", solver_knobs=dict(variance="fixed_small"), image_edit=edit)
    config.generate.task = ConfigDict(dict(unet=task))
    config.generate.knobs.unet.update(steps=STEPS.get(scale, 100), strength=0.8)
    return config
