"""ViT: a transformer on patches tells the class of a picture.

Paper
  Dosovitskiy et al., 2020, An image is worth 16x16 words, arXiv:2010.11929. Steiner et al., 2021, How to train your
  ViT? (AugReg), arXiv:2106.10270. Weights: gs://vit_models, google/vit-* on the Hugging Face hub (`vgen.load`).

Parts
  vit        ViT (models/vit.py); objective tasks/classify.py, with Mixup and label smoothing; RandAugment and crops in
             the input pipeline (data/augment.py)
  finetune   (paper, small) the same network on larger pictures, its positions interpolated, a new head

Commands
  python -m vgen.main --config=configs/vit.py --workdir=runs/vit
  python -m vgen.main --config=configs/vit.py --workdir=runs/vit --mode=eval
  scikit-learn's handwritten digits (pip install -e '.[photos]'):
  python -m vgen.main --config=configs/vit.py:digits --workdir=runs/digits
  ImageNet-21k and then ImageNet as published, from TensorFlow Datasets:
  python -m vgen.main --config=configs/vit.py:paper --workdir=DIR

Published numbers
  Parameters at 224 px with 1000 classes: Ti/16 5.7M, S/16 22.1M, B/16 86.6M, B/32 88.2M, L/16 304.3M, H/14 632.1M.
  ImageNet top-1 after ImageNet-21k (AugReg, 384 px): Ti/16 78.22, S/16 83.73, B/32 83.59, B/16 85.49, L/16 85.59.
  JFT: H/14 88.55, L/16 87.76.

Measured numbers
  mini, 1500 steps of 64 by Muon: top-1 1.000 on 1024 held-out scenes of 24 (colour, shape) classes (goal 0.95), 15
  minutes on one core with other work beside it.  By Adam at 1e-3, pictures turned and sheared up to 30 degrees and 0.3:
  0.571 after as many steps.
  digits: top-1 0.983 on the 300 held-out digits that are looked at (goal 0.97), 4 minutes on one core.
"""

from ml_collections import ConfigDict

from vgen import recipes
from vgen.data import augment, scenes

SCALES = ("tiny", "mini", "digits", "small", "paper")

PUBLISHED = dict(
    parameters=dict(ti16=5_717_416, s16=22_050_664, b16=86_567_656, b32=88_224_232, l16=304_326_632, h14=632_045_800),
    imagenet_384=dict(ti16=78.22, s16=83.73, b32=83.59, b16=85.49, l16=85.59),
)


def get_config(scale: str = "mini") -> ConfigDict:
    """The config of one scale: tiny (tests), mini (two CPU cores, minutes), digits (the same, real pictures), small
    (one accelerator), paper.
    """
    makers = dict(tiny=_tiny, mini=_mini, digits=_digits, small=_small, paper=_paper)
    return recipes.system("vit", scale, makers, PUBLISHED)


def _task(*, size, classes, net, **kwargs):
    """Spec of Classify.  net: arguments of ViT, but for image_size.  kwargs: of Classify."""
    network = dict(target="vgen.models.vit:ViT", image_size=size, num_classes=classes, **net)
    return dict(target="vgen.tasks.classify:Classify", network=network, classes=classes, **kwargs)


def _augmented(preset, operations=()):
    """Changes of training pictures by a name of AugReg's.  operations: only these of RandAugment."""
    (layers, magnitude), _ = augment.AUGREG[preset]
    if not layers:
        return {}
    return dict(
        augment=dict(target="vgen.data.augment:RandAugment", layers=layers, magnitude=magnitude, operations=operations)
    )


# ------------------------------------------------------------------------------------------------------ small worlds


def _world(*, size, world, eval_count, net, train, cached=0, data=None, **task):
    """Scenes of one object: a class is a colour and a shape.  train: of `recipes.train`.  data: changes of training
    pictures.  task: settings of Classify.
    """
    classes = len(scenes.classes(scenes.World(**world), "pair"))
    seen = recipes.scenes(size, world, "pair", cached=cached) | dict(text=False)
    stage = dict(
        task=_task(size=size, classes=classes, net=net, **task), data=seen | (data or {}), train=recipes.train(**train),
        evaluate=recipes.held_out(world, eval_count, batches=eval_count // train["batch"], labels="pair")
        | dict(augment={}),
    )  # fmt: skip
    return dict(stages=dict(vit=stage), order=("vit",))


# Of small pictures, which are moved and turned a little.
MOVED = dict(
    augment=dict(target="vgen.data.augment:RandAugment", layers=2, magnitude=3.0, operations=augment.GEOMETRIC)
)


def _tiny():
    return _world(
        size=16, world=recipes.CLASSES, eval_count=16, net=dict(width=16, depth=2, heads=2, mlp_dim=32, patch_size=4),
        train=dict(steps=2, batch=8, lr=1e-3), mixup=0.2, data=_augmented("light2", augment.GEOMETRIC),
    )  # fmt: skip


def _mini():
    """Colours are half of a class, so that of RandAugment only what moves pictures is used."""
    return _world(
        size=32, world=recipes.CLASSES, cached=40_000, eval_count=1024,
        net=dict(width=128, depth=4, heads=4, mlp_dim=512, patch_size=4, drop_path=0.1, unroll=4),
        train=dict(steps=1500, batch=64, lr=2e-3, optim=dict(name="muon")), mixup=0.2, smoothing=0.1, data=MOVED,
    )  # fmt: skip


def _digits():
    """1437 digits of 8 x 8 pixels, 359 held out; moved and turned a little, for there are few."""
    data = dict(source="digits", size=8, text=False)
    stage = dict(
        task=_task(size=8, classes=10, mixup=0.2, smoothing=0.1,
                   net=dict(width=128, depth=4, heads=4, mlp_dim=512, patch_size=2, drop_path=0.1, unroll=4)),
        data=data | MOVED,
        evaluate=dict(split="heldout", augment={}, batches=6),
        train=recipes.train(steps=2000, batch=60, lr=1e-3),
    )  # fmt: skip
    return dict(stages=dict(vit=stage), order=("vit",))


def _small():
    """One accelerator: ViT-S/8 on the colours, shapes and textures of the whole world at 64 pixels."""
    from vgen.models import vit

    return _world(
        size=64, world=dict(max_objects=1, heldout=()), cached=200_000, eval_count=2048,
        net=dict(vit.SMALL, patch_size=8, dtype="bfloat16", drop_path=0.1), mixup=0.2, smoothing=0.1,
        train=dict(steps=20_000, batch=256, lr=1e-3), data=_augmented("light2", augment.GEOMETRIC),
    )  # fmt: skip


# -------------------------------------------------------------------------------------------------------- as published


def _paper():
    """AugReg's B/16: 300 epochs of ImageNet-21k at 224 pixels under "medium1", then ImageNet at 384 pixels.

    Other sizes: the values of TINY ... HUGE in models/vit.py for both networks; AugReg's stronger settings are names in
    data/augment.py: RandAugment's go to `augment` of the data, the alpha of Mixup to the task.  Ti and S take "light1"
    or "none", L "medium2".  The first moment is bfloat16, decay 1e-4 a step as theirs (0.1 times the rate of 1e-3).
    """
    from vgen.models import vit

    net = dict(vit.BASE, patch_size=16, remat="full", dtype="bfloat16")
    crop = dict(crop="inception_crop", flip=True)
    plain = dict(crop="center_crop", flip=False, augment={})
    first = dict(
        task=_task(size=224, classes=21_843, loss="sigmoid", mixup=0.2, net=net | dict(head_bias=-10.0)),
        data=dict(source="tfds:imagenet21k", size=224, text=False, workers=16, **crop, **_augmented("medium1")),
        evaluate=dict(split="validation", batches=16, **plain),
        train=dict(steps=930_000, batch_size=4096, checkpoint_every=10_000, keep_every=100_000, log_every=100,
                   optim=dict(main=dict(lr=1e-3, warmup=10_000, weight_decay=0.1, clip=1.0, moment_dtype="bfloat16"))),
    )  # fmt: skip
    tuned = dict(
        task=_task(size=384, classes=1000, net=net),
        data=dict(source="tfds:imagenet2012", size=384, text=False, workers=16, **crop),
        evaluate=dict(split="validation", batches=64, **plain),
        train=dict(steps=20_000, batch_size=512, checkpoint_every=2000, log_every=100,
                   optim=dict(main=dict(name="sgd", lr=0.03, warmup=500, clip=1.0, moment_dtype="bfloat16"))),
        init=dict(network=dict(stage="vit", part="network", through="vgen.models.vit:for_384_pixels")),
    )  # fmt: skip
    return dict(
        stages=dict(vit=first, finetune=tuned), order=("vit", "finetune"), mesh=dict(data=-1, fsdp=8), topology="v3:8x8"
    )
