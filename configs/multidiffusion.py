"""MultiDiffusion: panoramas by a system of small pictures, whose overlapping windows agree in every step.

Paper
  Bar-Tal, Yariv, Lipman, Dekel, 2023, MultiDiffusion: fusing diffusion paths for controlled image generation,
  arXiv:2302.08113. Code: omerbt/MultiDiffusion.

Parts
  The system of configs/ldm.py; vgen/edit/multidiffusion.py around its denoiser.

Commands
  On what ldm has trained (without it the first command trains it), pictures four times as wide as ldm's:
  python -m vgen.main --config=configs/multidiffusion.py --workdir=runs/ldm --mode=sample --prompt="a red star"
  python -m vgen.main --config=configs/multidiffusion.py --workdir=runs/ldm --mode=eval
  Another width, in pixels: --config.generate.task.unet.picture="(32, 256)"

Published numbers
  None that could be held to: the paper's figures are of Stable Diffusion 2.0 (panoramas of 512 x 4608 pixels, windows
  of 64 x 64 latents every 8, 50 steps of DDIM, guidance 7.5).

Measured numbers
  mini on ldm's mini, 32 panoramas, seed 0; seam (1: none), crops that the oracle reads as scenes:
    side by side 3.06, 0.68;  7 windows 1.55, 0.43;  13 windows 1.13, 0.16
  The pictures have no seams, but windows that overlap want their objects in different places, and blends of them
  remain: a world of two large objects is not what the method is for.
  Rows of eval_multidiffusion.json: separate (pictures side by side) and windows_<n>, with seam and scene.
"""

from ml_collections import ConfigDict

from vgen import recipes

SCALES = ("tiny", "mini", "small", "paper")

PUBLISHED = dict(window=64, stride=8, steps=50, guidance_scale=7.5)

TIMES = 4  # as wide as high

EVAL = dict(
    tiny=dict(panoramas=2, overlaps=(1, 2)), mini=dict(panoramas=32, times=TIMES, overlaps=(1, 2, 4)),
    small=dict(panoramas=64, times=TIMES, overlaps=(1, 2, 4)),
)  # fmt: skip


def get_config(scale: str = "mini") -> ConfigDict:
    """configs/ldm.py at one scale, with pictures of several windows, half of each on its neighbour."""
    config = recipes.study(
        __file__,
        "ldm",
        scale,
        measure="vgen.metrics.text_edit_eval:MultiDiffusionStudy",
        settings=EVAL,
        published=PUBLISHED,
    )
    task = config.stages.unet.task
    window = task.size // recipes.pixels_per_token(task.vae)
    method = dict(
        target="vgen.edit.multidiffusion:multidiffusion", window=(window, window), stride=(window, window // 2)
    )
    config.generate.batch_size = max(1, config.generate.batch_size // TIMES)
    config.generate.task = ConfigDict(dict(unet=dict(method=method, picture=(task.size, TIMES * task.size))))
    return config
