"""Prompt-to-Prompt: a picture is edited by its prompt, and the maps of attention keep everything else in its place.

Paper
  Hertz, Mokady, Tenenbaum, Aberman, Pritch, Cohen-Or, 2022, Prompt-to-Prompt image editing with cross attention
  control, arXiv:2208.01626. Code: google/prompt-to-prompt.

Parts
  The system of configs/ldm.py; vgen/edit/prompt_to_prompt.py with LocalBlend, vgen/edit/align.py.

Commands
  On what ldm has trained (without it the first command trains it):
  python -m vgen.main --config=configs/prompt_to_prompt.py --workdir=runs/ldm --mode=eval
  The first prompt is the source, all others of the same batch are edits of its picture:
  python -m vgen.main --config=configs/prompt_to_prompt.py --workdir=runs/ldm --mode=sample \\
    --prompt="a red circle left of a blue star" --prompt="a green circle left of a blue star"
  Less is kept with --config.generate.task.unet.method.cross_replace=0.4, with less of self_replace, a lower threshold.

Published numbers
  None: the paper shows pictures. Its settings for latent diffusion: cross_replace 0.8, self_replace 0.2 (0.4 for Stable
  Diffusion), LocalBlend's threshold 0.3 from a fifth of the steps on.

Measured numbers
  mini on ldm's mini, 64 captions of training pairs (65 tried, one was not drawn rightly), one word changed, seed 0, 25
  steps, guidance 2; changed, kept, PSNR outside of the object:
    resample                     0.84 (colours 0.68, shapes 0.95)  0.81  38.0 dB
    cross 0.8, self 0.4          1.00                              1.00  42.3 dB, with a blend of 0.6 43.0 dB
    cross 0.4, self 0.2, blend   0.88                              0.89  40.4 dB
    nothing replaced, blend      0.84                              0.84  39.3 dB
  Rows of eval_prompt_to_prompt.json: resample (the new caption from the same noise, nothing replaced), and
  cross_<share>_self_<share>[_blend_<threshold>], with changed, changed_colour, changed_shape, kept, exact, psnr_outside
  and success; the protocol has cases and tried.
"""

from ml_collections import ConfigDict

from vgen import recipes

SCALES = ("tiny", "mini", "small", "paper")

PUBLISHED = dict(cross_replace=0.8, self_replace=0.2, threshold=0.3, blend_start=0.2)

EVAL = dict(tiny=dict(cases=4, tries=8), mini=dict(cases=64, tries=512), small=dict(cases=256, tries=2048))

PROMPTS = (
    "a red circle left of a blue star",
    "a green circle left of a blue star",
    "a red circle left of a purple star",
    "a red square left of a blue star",
)


def get_config(scale: str = "mini") -> ConfigDict:
    """configs/ldm.py at one scale, whose prompts behind the first of a batch edit the picture of the first."""
    method = dict(
        target="vgen.edit.prompt_to_prompt:from_first", cross_replace=0.8, self_replace=0.4, factor=2, threshold=0.6
    )
    config = recipes.study(
        __file__,
        "ldm",
        scale,
        measure="vgen.metrics.text_edit_eval:PromptToPromptStudy",
        settings=EVAL,
        prompts=PROMPTS,
        published=PUBLISHED,
    )
    config.generate.task = ConfigDict(dict(unet=dict(method=method)))
    return config
