"""A-CLIP: CLIP that sees two views of a picture, and of each the half that a slow copy of itself attends to.

Paper
  Yang et al., 2022, Attentive mask CLIP, arXiv:2212.08653. Code: microsoft/A-CLIP.

Parts
  a_clip     CLIP (models/clip.py); the teacher, whose class token's attention says which patches stay, is an average of
             its image tower; heads of SimCLR and BYOL (models/projector.py); objective tasks/a_clip.py
  views      crops of one picture, changed in colour and sharpness on the device (data/views.py)

Commands
  python -m vgen.main --config=configs/a_clip.py --workdir=runs/a_clip
  Zero-shot classes and retrieval (metrics/encoder_eval.py), as of configs/clip.py:
  python -m vgen.main --config=configs/a_clip.py --workdir=runs/a_clip --mode=eval
  python -m vgen.main --config=configs/a_clip.py:paper --workdir=DIR (your data: see `_paper`)

Published numbers
  ViT-B/16, YFCC15M, 25 epochs, ImageNet zero-shot, time beside CLIP's and memory: CLIP 37.6, 1.00, 14G; SLIP 42.8,
  2.67, 30G; A-CLIP 43.9, 1.16, 14G; A-CLIP-eff 42.9, 0.86, 13G.
  Masks alone: one view at random 35.0, two 38.0; one by attention 39.5, two 41.3.

Measured numbers
  mini, 14 minutes of one CPU core beside other work, 900 steps of 128.  256 scenes of pairs that training shows: recall
  at 1 of captions 0.59, of pictures 0.65 (at 5 0.93, 0.98), zero-shot classes 0.81; of pairs that it never shows 0.32,
  0.48 and 0.21.  CLIP's own mini, in 1200 steps: 0.70, 0.64, 1.00 and 0.45, 0.53, 0.48.
"""

from ml_collections import ConfigDict

from vgen import recipes

SCALES = ("tiny", "mini", "small", "paper")

PUBLISHED = dict(
    imagenet_zero_shot=dict(clip=37.6, slip=42.8, a_clip=43.9), time=dict(clip=1.0, slip=2.67, a_clip=1.16),
    masks=dict(random_one=35.0, random_two=38.0, attentive_one=39.5, attentive_two=41.3),
)  # fmt: skip


def get_config(scale: str = "mini") -> ConfigDict:
    """The config of one scale: tiny (tests), mini (two CPU cores, minutes), small (one accelerator), paper."""
    makers = dict(tiny=_tiny, mini=_mini, small=_small, paper=_paper)
    return recipes.system("a_clip", scale, makers, PUBLISHED)


# ------------------------------------------------------------------------------------------------------ small worlds


def _world(*, settings, **kwargs):
    """Scenes and their captions; views keep the colours, for these are told.  kwargs: of `recipes.contrastive`."""
    task = dict(
        target="vgen.tasks.a_clip:AttentiveContrastive", low=0.0, momentum=0.99, momentum_steps=settings["steps"],
    )  # fmt: skip
    return recipes.contrastive("a_clip", settings=settings, **task | kwargs)


def _tiny():
    tower = dict(width=16, depth=1, heads=2, mlp_dim=32)
    return _world(
        size=16, world=recipes.WORLD, eval_count=16, features=16, text=dict(length=24, vocab_size=320),
        image=dict(tower, patch_size=4), words=tower, hidden=16, projected=8,
        distort=dict(target="vgen.data.views:Distort", hue=0.0), settings=dict(steps=2, batch=8, lr=1e-3), pictures=16,
    )  # fmt: skip


def _mini():
    """Two views of 36 patches, and the teacher's of 64: as long a step as 1.4 of configs/clip.py's."""
    return _world(
        size=32, world=recipes.FREE, cached=60_000, eval_count=512, features=128, text=dict(length=20, vocab_size=512),
        image=dict(width=128, depth=4, heads=4, mlp_dim=512, patch_size=4, unroll=4),
        words=dict(width=128, depth=2, heads=4, mlp_dim=512, unroll=2), hidden=512, projected=128, area=(0.7, 1.0),
        settings=dict(steps=900, batch=128, lr=2e-3, optim=dict(name="muon")), pictures=256,
    )  # fmt: skip


def _small():
    """One accelerator: towers of ViT-S's size on the whole world of scenes at 64 pixels."""
    from vgen.models import vit

    return _world(
        size=64, world={}, cached=200_000, eval_count=2048, features=256, text=dict(length=64, vocab_size=512),
        image=dict(vit.SMALL, patch_size=8, dtype="bfloat16"), momentum=0.996, hidden=2048, area=(0.7, 1.0),
        words=dict(width=384, depth=6, heads=6, mlp_dim=1536, dtype="bfloat16"),
        settings=dict(steps=20_000, batch=512, lr=5e-4), pictures=1024,
    )  # fmt: skip


# -------------------------------------------------------------------------------------------------------- as published


def _paper():
    """ViT-B/16 on YFCC15M: 25 epochs in batches of 4096, two views of half of the patches.

    Point it at your data: --config.stages.a_clip.data.source=webdataset:GLOB (or arrayrecord:GLOB, tfds:NAME), and at
    CLIP's tokenizer: --config.text.path=FOLDER.  Views are cut from central squares of 320 pixels; the authors cut
    them from whole files.
    """
    from vgen.models import vit

    batch, epoch = 4096, 14_800_000
    run = dict(dtype="bfloat16", remat="full")
    network = dict(
        target="vgen.models.clip:CLIP",
        visual=dict(target="vgen.models.clip:ImageTower", features=512,
                    vit=dict(target="vgen.models.vit:ViT", **vit.BASE, patch_size=16, **run)),
        text=dict(target="vgen.models.clip:TextTower", **run, depth=12),
    )  # fmt: skip
    steps = 25 * epoch // batch
    adam = dict(lr=5e-4, b2=0.98, warmup=epoch // batch, end=0.02, weight_decay=0.5)
    task = dict(
        target="vgen.tasks.a_clip:AttentiveContrastive", network=network, size=224, low=0.0, momentum_steps=steps,
        distort=dict(target="vgen.data.views:Distort"), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225),
    )  # fmt: skip
    stage = dict(
        task=task, data=dict(source="webdataset:SET_ME/*.tar", size=320, crop="center_crop", workers=16, prefetch=2),
        evaluate=dict(split="heldout", size=224, batches=4),
        train=dict(steps=steps, batch_size=batch, optim=dict(main=adam), checkpoint_every=2000, keep_every=20_000,
                   log_every=100),
    )  # fmt: skip
    return dict(
        stages=dict(a_clip=stage), order=("a_clip",), mesh=dict(data=-1, fsdp=8), topology="v4:4x4x4",
        text=dict(kind="clip", length=77, path=""),
    )  # fmt: skip
