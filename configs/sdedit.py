"""SDEdit: a crude picture takes on noise, as much as hides what is wrong with it, and is denoised into a real one.

Paper
  Meng, He, Song, Song, Wu, Zhu, Ermon, 2022, SDEdit: guided image synthesis and editing with stochastic differential
  equations, arXiv:2108.01073. Code: ermongroup/SDEdit.

Parts
  The system of configs/ddpm.py; vgen/edit/sdedit.py, here with the noise of DDPM's posterior, as in the authors' code
  for DDPMs. t0, the share of the way up to noise, is the knob `strength`.

Commands
  On what ddpm has trained; with a new workdir the first command trains the same:
  python -m vgen.main --config=configs/sdedit.py --workdir=runs/ddpm --mode=eval
  python -m vgen.main --config=configs/sdedit.py --workdir=runs/ddpm --mode=sample --image=crude.png --prompt=any \\
    --config.generate.knobs.unet.strength=0.5
  (a prompt counts pictures and says nothing)
  From nothing: python -m vgen.main --config=configs/sdedit.py --workdir=runs/sdedit
  The published weights of a DDPM: configs/sdedit.py:imported --config.weights=FILE, see configs/ddpm.py

Published numbers
  LSUN at 256 px from strokes, t0 0.5: bedroom L2 to the strokes 32.55, KID 0.0030 (e4e 0.0464); church KID 0.0156.
  Composites: L2 21.70, LPIPS 0.03. Of people 98.09 % found it the more realistic one. The authors advise t0 in 0.3 to
  0.6. `paper` is their number of steps on the CIFAR-10 network: the networks of those numbers are others.

Measured numbers
  mini on ddpm's mini, 64 pictures, seed 0, 100 steps; fidelity, scene, colour:
    input  -     0.08  0.54
    0.2    23.0  0.97  1.00
    0.3    22.0  1.00  0.98
    0.4    20.2  0.95  0.85
    0.5    17.7  0.97  0.59
    0.6    14.8  0.86  0.22
    0.7    13.1  0.63  0.04
    0.9    10.4  0.48  0.02
  Realism for fidelity, as published; beyond 0.6 pictures are as good as those made of noise alone (0.51).
  Rows of eval_sdedit.json: input (scenes averaged over blocks of 4 x 4 pixels) and strength_<t0>, with fidelity (PSNR
  to the input, dB), scene and colour.
"""

from ml_collections import ConfigDict

from vgen import recipes

SCALES = ("tiny", "mini", "small", "paper", "imported")

PUBLISHED = dict(bedroom=dict(l2=32.55, kid=0.0030), church=dict(kid=0.0156), composite=dict(l2=21.70, lpips=0.03))

STEPS = dict(tiny=4, mini=100, small=250)

EVAL = dict(
    tiny=dict(pictures=4, strengths=(0.5, 1.0)), mini=dict(pictures=64), small=dict(pictures=256, block=8),
)  # fmt: skip


def get_config(scale: str = "mini") -> ConfigDict:
    """configs/ddpm.py at one scale, for making crude pictures real; measured from 0.2 to 0.9 of the way to noise."""
    config = recipes.study(
        __file__, "ddpm", scale, measure="vgen.metrics.edit_eval:SdeditStudy", settings=EVAL, published=PUBLISHED
    )
    task = dict(solver="ddpm", solver_knobs=dict(variance="fixed_small"))
    config.generate.task = ConfigDict(dict(unet=task))
    config.generate.knobs.unet.update(steps=STEPS.get(scale, 500), strength=0.5)
    return config
