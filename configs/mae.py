"""MAE: three quarters of a picture's patches are hidden, and an encoder of the others learns by telling them.

Paper
  He, Chen, Xie, Li, Dollar, Girshick, 2021, Masked autoencoders are scalable vision learners, arXiv:2111.06377.
  Code and weights: facebookresearch/mae; facebook/vit-mae-* on the Hugging Face hub (`vgen.load`).

Parts
  mae        MAE (models/mae.py): a ViT on visible patches, a light decoder of all; objective tasks/masked_image.py

Commands
  python -m vgen.main --config=configs/mae.py --workdir=runs/mae
  (what is hidden and what is made of it: runs/mae/mae/pictures)
  A linear probe and nearest neighbours, beside those of the encoder as it begins (metrics/encoder_eval.py):
  python -m vgen.main --config=configs/mae.py --workdir=runs/mae --mode=eval
  ImageNet as published, from TensorFlow Datasets:
  python -m vgen.main --config=configs/mae.py:paper --workdir=DIR

Published numbers
  Trainable parameters: B 111.7M, L 329.2M, H 656.6M (encoders 85.8M, 303.3M, 630.8M).
  ImageNet: fine-tuned B 83.6, L 85.9, H 86.9; linear probe B 68.0, L 75.8, H 76.6 (1600 epochs).
  Without mask tokens in the encoder: 3.3 times fewer FLOPs, 2.8 to 4.1 times less time.

Measured numbers
  mini, 12 minutes of one CPU core beside other work: a linear probe on 2048 labelled scenes tells 0.667 of 1024 others'
  72 (colour, shape) classes, and on the encoder as it begins 0.383: 28.4 points (goal 20).  20 nearest neighbours:
  0.13, and 0.27 as it begins: the features say more of places than of classes.
  Trained and probed on 24 classes of large objects alone: 0.980 and 0.852, 12.9 points, for there is little left to
  learn; that encoder, probed on the 72: 0.742.
"""

from ml_collections import ConfigDict

from vgen import recipes

SCALES = ("tiny", "mini", "small", "paper")

PUBLISHED = dict(
    parameters=dict(base=111_655_680, large=329_239_296, huge=656_613_456),
    imagenet=dict(fine_tuned=dict(base=83.6, large=85.9, huge=86.9), linear=dict(base=68.0, large=75.8, huge=76.6)),
)


def get_config(scale: str = "mini") -> ConfigDict:
    """The config of one scale: tiny (tests), mini (two CPU cores, minutes), small (one accelerator), paper."""
    makers = dict(tiny=_tiny, mini=_mini, small=_small, paper=_paper)
    return recipes.system("mae", scale, makers, PUBLISHED)


def _network(size, **net):
    return dict(target="vgen.models.mae:MAE", image_size=size, **net)


# ------------------------------------------------------------------------------------------------------ small worlds


def _world(*, size, world, eval_count, net, train, cached=0, probe=None):
    """Scenes of one object.  net: arguments of MAE.  train: of `recipes.train`.  probe: settings of EncoderProbe."""
    stage = dict(
        task=dict(target="vgen.tasks.masked_image:MaskedImage", network=_network(size, **net)),
        data=recipes.scenes(size, world, cached=cached) | dict(text=False),
        evaluate=recipes.held_out(world, eval_count), train=recipes.train(**train),
    )  # fmt: skip
    measure = dict(target="vgen.metrics.encoder_eval:EncoderProbe", world=world, **(probe or {}))
    return dict(stages=dict(mae=stage), order=("mae",), eval=measure)


def _tiny():
    return _world(
        size=16, world=recipes.CLASSES, eval_count=32,
        net=dict(width=16, depth=1, heads=2, mlp_dim=32, patch_size=4, decoder_width=16, decoder_depth=1,
                 decoder_heads=2, decoder_mlp_dim=32),
        train=dict(steps=2, batch=8, lr=1e-3), probe=dict(train=96, test=48),
    )  # fmt: skip


def _mini():
    """All colours and shapes in two sizes, 72 classes: of few and plain ones an encoder as it begins says most already.

    Without normalised patches: most are of one colour, and normalised nothing but the rounding of 8 bits is left.
    """
    return _world(
        size=32, cached=40_000, eval_count=512,
        world=dict(textures=("solid",), sizes=("medium", "large"), backgrounds=("white", "grey"), max_objects=1,
                   heldout=()),
        net=dict(width=128, depth=4, heads=4, mlp_dim=512, patch_size=4, unroll=4, decoder_width=64, decoder_depth=2,
                 decoder_heads=4, decoder_mlp_dim=256, norm_pix=False),
        train=dict(steps=3000, batch=64, lr=2e-3, optim=dict(name="muon")),
    )  # fmt: skip


def _small():
    """One accelerator: ViT-S/8 on the whole world of scenes at 64 pixels."""
    from vgen.models import vit

    return _world(
        size=64, world=dict(max_objects=1, heldout=()), cached=200_000, eval_count=2048,
        net=dict(vit.SMALL, patch_size=8, dtype="bfloat16", decoder_width=192, decoder_depth=4, decoder_heads=6,
                 decoder_mlp_dim=768, norm_pix=False),
        train=dict(steps=30_000, batch=512, lr=6e-4), probe=dict(train=16_384, test=4096),
    )  # fmt: skip


# -------------------------------------------------------------------------------------------------------- as published


def _paper():
    """ViT-L/16 on ImageNet for 1600 epochs of batches of 4096: 1.5e-4 a batch of 256, 40 epochs of warm-up, a cosine.

    B and H: the values of BASE and HUGE in models/mae.py for the network.
    """
    from vgen.models import mae

    adam = dict(lr=1.5e-4 * 4096 / 256, b2=0.95, warmup=12_500, weight_decay=0.05)
    stage = dict(
        task=dict(target="vgen.tasks.masked_image:MaskedImage",
                  network=_network(224, **mae.LARGE, remat="dots", dtype="bfloat16")),
        data=dict(source="tfds:imagenet2012", size=224, text=False, crop="inception_crop", crop_scale=(0.2, 1.0),
                  flip=True, workers=16),
        evaluate=dict(split="validation", crop="center_crop", crop_scale=(), flip=False, batches=8),
        train=dict(steps=500_000, batch_size=4096, optim=dict(main=adam), checkpoint_every=5000, keep_every=50_000,
                   log_every=100),
    )  # fmt: skip
    return dict(stages=dict(mae=stage), order=("mae",), mesh=dict(data=-1, fsdp=8), topology="v3:8x8")
