"""FLIP: CLIP that sees half of every picture's patches, or a quarter, and so more pictures in the same time.

Paper
  Li, Fan, Hu, Feichtenhofer, He, 2022, Scaling language-image pre-training via masking, arXiv:2212.00794.
  Code and weights: facebookresearch/flip.

Parts
  flip       CLIP (models/clip.py) with fixed positions, the mean of all tokens and a text transformer that looks both
             ways; patches are left out at random, and batches are larger by what that saves; tasks/contrastive.py
  tuned      the same network, from those weights, on whole pictures for a little while

Commands
  python -m vgen.main --config=configs/flip.py --workdir=runs/flip
  Three quarters of the patches left out:
  python -m vgen.main --config=configs/flip.py:mini75 --workdir=runs/flip75
  Zero-shot classes and retrieval (metrics/encoder_eval.py), as of configs/clip.py:
  python -m vgen.main --config=configs/flip.py --workdir=runs/flip --mode=eval
  python -m vgen.main --config=configs/flip.py:paper --workdir=DIR (your data: see `_paper`)

Published numbers
  Parameters (vision, text): B/16 86M and 53M, L/16 303M and 109M, H/14 631M and 334M.
  L/16, 6.4 epochs of LAION-400M, 0, 50 and 75 % left out in batches of 16k, 32k and 64k: ImageNet zero-shot 68.6, 69.6
  and 68.2, after tuning 70.1 (50 %) and 69.5 (75 %); time 1, 0.50 and 0.33, FLOPs 1, 0.52 and 0.28.
  32 epochs, 50 %: B/16 68.0, L/16 74.3, L/14 74.6, H/14 75.5; CLIP trained alike 68.2 (B/16), 72.4 (L/16), 73.1 (L/14).

Measured numbers
  mini, 13 minutes of one CPU core beside other work, 1200 steps of 192 and 150 whole ones of 128.  256 scenes of pairs
  that training shows: recall at 1 of captions 0.66, of pictures 0.68 (at 5 0.98, 0.98), zero-shot classes 1.00; of
  pairs that it never shows 0.43, 0.46 and 0.63.  CLIP's own mini in as many steps of 128 whole pictures: 0.70, 0.64,
  1.00 and 0.45, 0.53, 0.48.
  mini75: not trained to its end.
"""

from ml_collections import ConfigDict

from vgen import recipes

SCALES = ("tiny", "mini", "mini75", "small", "paper")

PUBLISHED = dict(
    millions=dict(visual=303, text=109),
    imagenet_zero_shot=dict(masked_0=68.6, masked_50=69.6, masked_75=68.2, masked_50_tuned=70.1, masked_75_tuned=69.5),
    time=dict(masked_50=0.50, masked_75=0.33), flops=dict(masked_50=0.52, masked_75=0.28),
)  # fmt: skip

# What FLIP's towers have and CLIP's have not.
IMAGE = dict(
    patch_bias=True, pre_norm=False, final_norm="tokens", posemb="sincos", cls_position=False, pool="mean", eps=1e-6,
    act="gelu_tanh",
)  # fmt: skip
TEXT = dict(causal=False, pool="first", act="gelu_tanh", eps=1e-6)


def get_config(scale: str = "mini") -> ConfigDict:
    """The config of one scale: tiny (tests), mini (two CPU cores, minutes), mini75 (the same, three quarters of the
    patches left out), small (one accelerator), paper.
    """
    makers = dict(tiny=_tiny, mini=_mini, mini75=_mini75, small=_small, paper=_paper)
    return recipes.system("flip", scale, makers, PUBLISHED)


def _tuning(stage, **train):
    """The stage behind `stage`: whole pictures.  train: what is different of its `train`."""
    task = stage["task"] | dict(mask_ratio=0.0)
    data, evaluate = dict(stage["data"]), dict(stage["evaluate"])
    return dict(
        task=task, data=data, evaluate=evaluate, train=train, init=dict(network=dict(stage="flip", part="network"))
    )


# ------------------------------------------------------------------------------------------------------ small worlds


def _world(*, mask_ratio, tuning, image, words, **kwargs):
    """Scenes and their captions, masked and then whole.  tuning: of `recipes.train`.  kwargs: of `contrastive`."""
    config = recipes.contrastive(
        "flip", mask_ratio=mask_ratio, text_padding=True, low=0.0, image=IMAGE | image, words=TEXT | words, **kwargs
    )
    config["stages"]["tuned"] = _tuning(config["stages"]["flip"], **recipes.train(**tuning))
    return config | dict(order=("flip", "tuned"), eval=config["eval"] | dict(stage="tuned"))


def _tiny():
    tower = dict(width=16, depth=1, heads=2, mlp_dim=32)
    return _world(
        size=16, world=recipes.WORLD, eval_count=16, features=16, text=dict(length=24, vocab_size=320), mask_ratio=0.5,
        image=dict(tower, patch_size=4), words=tower, settings=dict(steps=2, batch=8, lr=1e-3),
        tuning=dict(steps=2, batch=8, lr=1e-4), pictures=16,
    )  # fmt: skip


def _small_network(mask_ratio, steps, batch):
    """The towers and data of configs/clip.py at mini, its time and its pictures a step, but for those left out."""
    return _world(
        size=32, world=recipes.FREE, cached=60_000, eval_count=512, features=128, text=dict(length=20, vocab_size=512),
        image=dict(width=128, depth=4, heads=4, mlp_dim=512, patch_size=4, unroll=4),
        words=dict(width=128, depth=2, heads=4, mlp_dim=512, unroll=2), mask_ratio=mask_ratio,
        settings=dict(steps=steps, batch=batch, lr=2e-3, optim=dict(name="muon")),
        tuning=dict(steps=150, batch=128, lr=2e-4, optim=dict(name="muon")), pictures=256,
    )  # fmt: skip


def _mini():
    """A step of 192 masked pictures and texts costs about what one of 128 whole ones does: the texts are whole."""
    return _small_network(0.5, 1200, 192)


def _mini75():
    return _small_network(0.75, 1200, 256)


def _small():
    """One accelerator: towers of ViT-S's size on the whole world of scenes at 64 pixels."""
    from vgen.models import vit

    return _world(
        size=64, world={}, cached=200_000, eval_count=2048, features=256, text=dict(length=64, vocab_size=512),
        image=dict(vit.SMALL, patch_size=8, dtype="bfloat16"), mask_ratio=0.5,
        words=dict(width=384, depth=6, heads=6, mlp_dim=1536, dtype="bfloat16"),
        settings=dict(steps=19_000, batch=1024, lr=7e-4), tuning=dict(steps=1000, batch=512, lr=5e-5), pictures=1024,
    )  # fmt: skip


# -------------------------------------------------------------------------------------------------------- as published


def _paper():
    """L/16, half of the patches, 12.8B pictures in batches of 65,536 at 4e-6 a batch of 256, then 128M whole ones.

    Three quarters: --config.stages.flip.task.mask_ratio=0.75.  Point it at your data with --config.stages.*.data.source
    =webdataset:GLOB (or arrayrecord:GLOB, tfds:NAME); --config.text.path is the folder of a BERT whose vocab.txt has
    30,522 words.  Texts are pooled at their first token.
    """
    tower = dict(depth=24, heads=16, width=1024, mlp_dim=4096, patch_size=16, image_size=224)
    words = dict(depth=12, heads=12, width=768, mlp_dim=3072, vocab=30_523, length=32, features=768)
    run = dict(dtype="bfloat16", remat="full")
    visual = dict(
        target="vgen.models.clip:ImageTower", features=768,
        vit=dict(target="vgen.models.vit:ViT", **IMAGE, **tower, **run),
    )  # fmt: skip
    text = dict(target="vgen.models.clip:TextTower", **TEXT, **words, **run)
    batch, common = 65_536, dict(b2=0.95, weight_decay=0.2)
    first = dict(
        task=dict(target="vgen.tasks.contrastive:Contrastive", size=224, mask_ratio=0.5, text_padding=True, low=0.0,
                  network=dict(target="vgen.models.clip:CLIP", visual=visual, text=text)),
        data=dict(source="webdataset:SET_ME/*.tar", size=224, crop="inception_crop", crop_scale=(0.5, 1.0), flip=True,
                  workers=16, prefetch=2),
        evaluate=dict(split="heldout", crop="center_crop", crop_scale=(), flip=False, batches=4),
        train=dict(steps=12_800_000_000 // batch, batch_size=batch, checkpoint_every=2000, keep_every=20_000,
                   log_every=100, optim=dict(main=dict(common, lr=4e-6 * batch / 256, warmup=51_200_000 // batch))),
    )  # fmt: skip
    tuned = _tuning(
        first, steps=128_000_000 // batch, batch_size=batch, checkpoint_every=1000, log_every=100,
        optim=dict(main=dict(common, lr=4e-8 * batch / 256, warmup=25_600_000 // batch)),
    )  # fmt: skip
    return dict(
        stages=dict(flip=first, tuned=tuned), order=("flip", "tuned"), mesh=dict(data=-1, fsdp=8), topology="v3:8x16",
        text=dict(kind="bert", length=32, path=""),
    )  # fmt: skip
