"""RePaint: fill the hole of a picture with a network that was never taught to, walking parts of the way again.

Paper
  Lugmayr, Danelljan, Romero, Yu, Timofte, Van Gool, 2022, RePaint: inpainting using denoising diffusion probabilistic
  models, arXiv:2201.09865. Code: andreas128/RePaint.

Parts
  The system of configs/ddpm.py; vgen/edit/repaint.py. The last step puts the known pixels in as they are, which the
  authors leave to the network.

Commands
  On what ddpm has trained; with a new workdir the first command trains the same:
  python -m vgen.main --config=configs/repaint.py --workdir=runs/ddpm --mode=eval
  python -m vgen.main --config=configs/repaint.py --workdir=runs/ddpm --mode=sample --image=in.png --mask=mask.png \\
    --prompt=any --num_images=4
  (white in the mask is made anew; a prompt counts pictures and says nothing)
  From nothing: python -m vgen.main --config=configs/repaint.py --workdir=runs/repaint
  Quicker: --config.generate.task.unet.image_edit.repeats=3
  The published weights of a DDPM: configs/repaint.py:imported --config.weights=FILE, see configs/ddpm.py

Published numbers
  LPIPS at 256 px, 250 steps, jumps of 10, 10 times (2410 calls of the network). CelebA-HQ: wide 0.059, narrow 0.028,
  super-resolution 0.029, alternating lines 0.009, half 0.165, expand 0.435. ImageNet: wide 0.134, super-resolution
  0.183, alternating lines 0.089. Four times on 250 steps 0.134, plain replacement in 1000 steps 0.161. `paper` is these
  settings on the CIFAR-10 network: the networks of those numbers are others.

Measured numbers
  mini on ddpm's mini, 64 scenes cut through an object, seed 0, 100 steps; scene, object, agreement, seam, evaluations:
    repeats 1   0.80  0.77  0.75  2.42  100
    repeats 3   0.91  0.92  0.89  1.54  280
    repeats 10  0.98  0.91  0.91  1.36  910
    slow        0.78  0.73  0.73  2.32  910
  The known region is kept exactly (known_error 0).  As published, it is resampling that makes the hole agree with what
  is around it, and not the number of steps.
  Rows of eval_repaint.json: repeats_<r>, 1 of which is the plain replacement, and slow, that one in as many steps as
  the most repeats take; with known_error, scene, object, agreement, seam (1 for the true pictures) and evaluations.
"""

from ml_collections import ConfigDict

from vgen import recipes

SCALES = ("tiny", "mini", "small", "paper", "imported")

PUBLISHED = dict(
    steps=250, jump_length=10, repeats=10, evaluations=2410,
    celeba=dict(wide=0.059, narrow=0.028, super_resolution=0.029, alternating=0.009, half=0.165, expand=0.435),
    imagenet=dict(wide=0.134, super_resolution=0.183, alternating=0.089),
)  # fmt: skip

STEPS = dict(tiny=4, mini=100)

EVAL = dict(tiny=dict(cases=4, repeats=(1, 2), jump_length=1), mini=dict(cases=64), small=dict(cases=256))


def get_config(scale: str = "mini") -> ConfigDict:
    """configs/ddpm.py at one scale, filling holes; measured on scenes cut through an object, for several repeats."""
    config = recipes.study(
        __file__, "ddpm", scale, measure="vgen.metrics.edit_eval:RepaintStudy", settings=EVAL, published=PUBLISHED
    )
    edit = dict(target="vgen.edit.from_image:Repaint", jump_length=10, repeats=10)
    task = dict(solver="ddpm", solver_knobs=dict(variance="fixed_small"), image_edit=edit)
    config.generate.task = ConfigDict(dict(unet=task))
    config.generate.knobs.unet.steps = STEPS.get(scale, 250)
    return config
