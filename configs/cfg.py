"""Classifier-free guidance: pictures pushed away from what the system would draw without being told anything.

Paper
  Ho, Salimans, 2022, Classifier-free diffusion guidance, arXiv:2207.12598. The rescaling of guided predictions: Lin,
  Liu, Li, Yang, 2023, Common diffusion noise schedules and sample steps are flawed, arXiv:2305.08891, section 3.4.

Parts
  The system of configs/ldm.py, whose captions are dropped in a tenth of its training; vgen/guidance.py.
  A scale s here is s cond + (1 - s) uncond, which is the paper's w = s - 1; 1 is no guidance.

Commands
  On what ldm has trained (without it the first command trains it):
  python -m vgen.main --config=configs/cfg.py --workdir=runs/ldm --mode=eval
  python -m vgen.main --config=configs/cfg.py --workdir=runs/ldm --mode=sample --guidance_scale=5 --prompt="a red star"
  Rescaled: --config.generate.task.unet.rescale=0.7

Published numbers
  ImageNet, FID and Inception score at s. 64 px: s = 1 1.80, s = 1.1 1.55, s = 5 IS 260. 128 px, 256 steps: s = 1 7.27,
  s = 1.3 2.43 (IS 158), s = 5 IS 421.

Measured numbers
  mini on ldm's mini, 128 pictures of 64 held-out captions, seed 0, 25 steps; colour, shape, relation, scene_exact,
  diversity (in brackets exactness and diversity rescaled by 0.7):
    1    0.92  0.78  0.86  0.67  0.245
    1.5  0.93  0.82  0.91  0.73  0.232  (0.72, 0.234)
    2    0.91  0.83  0.91  0.73  0.225  (0.71, 0.227)
    3    0.87  0.79  0.87  0.66  0.224  (0.67, 0.215)
    5    0.78  0.58  0.73  0.41  0.225  (0.37, 0.213)
    8    0.67  0.43  0.59  0.20  0.231  (0.22, 0.212)
  Diversity is of values in [0, 1].  Rows of eval_cfg.json: scale_<s> and scale_<s>_rescale_0.7, with colour, shape,
  relation, scene_exact and diversity.
"""

from ml_collections import ConfigDict

from vgen import recipes

SCALES = ("tiny", "mini", "small", "paper")

PUBLISHED = dict(
    imagenet_64=dict(scales=(1.0, 1.1), fid=(1.80, 1.55)), imagenet_128=dict(scales=(1.0, 1.3), fid=(7.27, 2.43))
)

EVAL = dict(
    tiny=dict(captions=4, scales=(1.0, 3.0)),
    mini=dict(captions=64, each=2, scales=(1.0, 1.5, 2.0, 3.0, 5.0, 8.0)),
    small=dict(captions=256, each=4, scales=(1.0, 1.5, 2.0, 3.0, 5.0, 8.0)),
)


def get_config(scale: str = "mini") -> ConfigDict:
    """configs/ldm.py at one scale, measured at several scales of guidance, with rescaling and without."""
    config = recipes.study(
        __file__, "ldm", scale, measure="vgen.metrics.text_edit_eval:CfgStudy", settings=EVAL, published=PUBLISHED
    )
    config.generate.task = ConfigDict(dict(unet=dict(rescale=0.0)))
    return config
