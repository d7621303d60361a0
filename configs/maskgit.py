"""MaskGIT: a picture's tokens found many at a time, the surest first, in 8 to 12 steps instead of one by one.

Paper
  Chang, Zhang, Jiang, Liu, Freeman, 2022, MaskGIT: masked generative image transformer, arXiv:2202.04200.  Code and
  weights: google-research/maskgit, without the training loop.

Parts
  tokenizer  VQGAN (models/vqgan.py), objective tasks/autoencode.py
  generator  MaskGIT (models/maskgit.py), a BERT told the class by its first token; objective and sampling
             tasks/tokens.py; schedules tokens/schedules.py, decoding tokens/parallel.py

Commands
  python -m vgen.main --config=configs/maskgit.py --workdir=runs/maskgit
  python -m vgen.main --config=configs/maskgit.py --workdir=runs/maskgit --mode=sample --prompt=0 --prompt=5 --steps=8
  (a prompt is the number of a class: place of the colour times 4, the number of shapes, plus place of the shape, both
  as in recipes.CLASSES; with --image=in.png --mask=mask.png: inpainting, outpainting with the white outside, or with
  another class the replacement of what is inside of the mask; with --image alone: mask-free editing)
  Class accuracy, a table of schedules and steps, and edits (metrics/token_eval.py):
  python -m vgen.main --config=configs/maskgit.py --workdir=runs/maskgit --mode=eval
  Another schedule of decoding: --config.generate.task="{'generator': {'schedule': 'square'}}"
  ImageNet at 256 pixels as published, from TensorFlow Datasets:
  python -m vgen.main --config=configs/maskgit.py:paper --workdir=DIR --config.stages.tokenizer.init.lpips.file=FILE
  The published weights, FOLDER holds tokenizer_imagenet256_checkpoint and maskgit_imagenet256_checkpoint, both renamed
  to end in .msgpack, which is what they are:
  python -m vgen.main --config=configs/maskgit.py:imported --workdir=DIR --config.weights=FOLDER --mode=sample \\
    --prompt=207

Published numbers
  227M parameters: 172.5M and the tokenizer's 54.5M.
  ImageNet 256: FID 6.18, IS 182.1, precision 0.80, recall 0.51 in 8 steps; a VQGAN of the same setting 18.65 and 80.4
  in 256.  ImageNet 512: 7.32 in 12.  The repository's own: 6.06 and 7.32.  Tokenizers: rFID 2.28 and 1.97.

Measured numbers
  mini, 22 minutes of one CPU core beside other work.  Held-out scenes: PSNR 28.7 dB, 0.71 of the codes used.  Class
  accuracy (`scene_exact`: the object asked for and nothing else) of 264 pictures, 11 of a class, seed 0, 16 steps at
  temperature 0.8 of which half find tokens again: 0.909, with guidance off 0.917.  Such second thoughts are not in the
  paper; in its 12 steps at temperature 1 it is 0.72.  Edits of 64: outpaint 1.00, inpaint 0.94, replace 0.88, the rest
  of the picture kept to 51, 59, 59 dB.
  120 pictures by schedule, without second thoughts, in 4, 8, 12 steps: cosine 0.24, 0.63, 0.73; linear 0.08, 0.32,
  0.43; square 0.26, 0.68, 0.73; cubic 0.48, 0.73, 0.78; arccos 0.13, 0.46, 0.53.
"""

from ml_collections import ConfigDict, FieldReference

from vgen import recipes
from vgen.data import scenes

SCALES = ("tiny", "mini", "small", "paper", "imported")

NAMES = dict(transformer="maskgit", tokenizer="tokenizer")  # in those of the published files
PUBLISHED = dict(transformer=172_457_193, tokenizer=54_515_587, fid=6.18, inception_score=182.1, steps=8)


def get_config(scale: str = "mini") -> ConfigDict:
    """The config of one scale: tiny (tests), mini (two CPU cores, minutes), small (one accelerator), paper, imported.

    paper trains as published; imported is the published checkpoints.
    """
    makers = dict(tiny=_tiny, mini=_mini, small=_small, paper=_paper, imported=_imported)
    return recipes.system("maskgit", scale, makers, PUBLISHED)


def _transformer(**fields):
    return dict(target="vgen.models.maskgit:MaskGIT", **fields)


def _task(**fields):
    """Settings of MaskedTokens: what the paper says of the objective, and of decoding no more than 16 steps."""
    return dict(target="vgen.tasks.tokens:MaskedTokens", label_smoothing=0.1, max_steps=16, **fields)


def _knobs(batch_size, **knobs):
    published = dict(steps=12, temperature=1.0, choice_temperature=4.5)
    return recipes.generate("generator", batch_size=batch_size, **published | knobs)


# ------------------------------------------------------------------------------------------------------ small worlds


def _world(*, size, world, free, eval_count, sizes, autoencoder, generator, net, knobs, measure, cached=0, gan=None):
    """Both stages on scenes of one object: a class is a colour and a shape, left out of a tenth of the training.

    free: world of the tokenizer's pictures.  sizes: arguments of VQGAN.  autoencoder: of `recipes.autoencoder`.
    net: arguments of MaskGIT.  generator: of `recipes.train`.  knobs: of `_knobs`.  measure: arguments of TokenStudy.
    """
    classes = len(scenes.classes(scenes.World(**world), "pair"))
    tokenizer, codes = recipes.vqgan(**sizes), sizes["num_codes"]
    length = 1 + (size // recipes.pixels_per_token(sizes)) ** 2
    task = _task(
        transformer=_transformer(codebook=codes, classes=classes, length=length, **net), tokenizer=tokenizer, size=size,
        text_drop=0.1,
    )  # fmt: skip
    stages = dict(
        tokenizer=recipes.autoencoder(
            tokenizer, data=recipes.scenes(size, free), evaluate=recipes.held_out(free, eval_count, batches=8),
            discriminator=gan, **autoencoder,
        ),
        generator=dict(
            task=task, data=recipes.scenes(size, world, "pair", cached=cached),
            evaluate=recipes.held_out(world, eval_count, labels="pair"), train=recipes.train(**generator),
            init=dict(tokenizer=dict(stage="tokenizer", without="discriminator|lpips")),
        ),
    )  # fmt: skip
    return dict(
        stages=stages, order=("tokenizer", "generator"),
        generate=_knobs(guidance_scale=1.0, **knobs),
        eval=dict(target="vgen.metrics.token_eval:TokenStudy", world=world, **measure),
        prompts=recipes.class_prompts(classes),
    )  # fmt: skip


def _tiny():
    return _world(
        size=16, world=recipes.CLASSES, free=recipes.CLASSES, eval_count=16,
        sizes=recipes.TOKENIZERS["tiny"] | dict(multipliers=(1,), patch=4, layout=recipes.LOCAL),
        autoencoder=dict(steps=2, batch=8, lr=1e-3, perceptual=0.0, revive_below=0.05),
        net=dict(depth=1, width=16, heads=2, mlp_dim=32), generator=dict(steps=2, batch=8, lr=1e-3),
        knobs=dict(batch_size=8, steps=3),
        measure=dict(pictures=8, table=8, schedules=("linear",), steps=(2,), edits=0),
    )  # fmt: skip


def _mini():
    """Objects on a lattice of eighths, as Muse's at mini; the tokenizer sees them anywhere."""
    return _world(
        size=32, world=recipes.CLASSES | dict(lattice=8), free=recipes.CLASSES, cached=40_000, eval_count=512,
        sizes=recipes.TOKENIZERS["mini"],
        autoencoder=dict(steps=1500, batch=16, lr=3e-3, **recipes.TOKENIZER_LOSSES["mini"]),
        net=dict(depth=4, width=128, heads=4, mlp_dim=512, unroll=4),
        generator=dict(steps=2600, batch=64, lr=2e-3, optim=dict(name="muon")),
        knobs=dict(batch_size=64, steps=16, temperature=0.8, revise=0.5), measure=dict(pictures=264, table=120),
    )  # fmt: skip


def _small():
    """One accelerator: the colours, shapes and textures of the whole world at 128 pixels, 256 tokens as published."""
    world = dict(max_objects=1, heldout=())
    return _world(
        size=128, world=world, free=world, cached=200_000, eval_count=2048, sizes=recipes.TOKENIZERS["small"],
        autoencoder=dict(steps=20_000, batch=128, lr=5e-4, **recipes.TOKENIZER_LOSSES["small"]),
        gan=recipes.discriminator(channels=64, layers=2, norm="group"),
        net=dict(depth=12, width=512, heads=8, mlp_dim=2048, dropout=0.1, dtype="bfloat16"),
        generator=dict(steps=30_000, batch=256, lr=2e-4, optim=dict(warmup=2000)),
        knobs=dict(batch_size=64), measure=dict(pictures=1008, table=504, edits=256),
    )  # fmt: skip


# -------------------------------------------------------------------------------------------------------- as published


def _paper():
    """ImageNet at 256 pixels, as far as it is published: 1M steps of 256 for the tokenizer, 300 epochs for the rest.

    The release has no training loop: its discriminator (of StyleGAN2's kind, with a blur) is a PatchGAN here, and the
    reconstruction loss, of which neither form nor weight is in it, the squared error.  512 pixels: the values of
    IMAGENET_512 in models/maskgit.py for the transformer, and size=512 for tasks and data.
    """
    from vgen.models import maskgit

    net = _transformer(**maskgit.IMAGENET_256, dropout=0.1, remat="dots", dtype="bfloat16")
    sizes = dict(_tokenizer(), remat=True, dtype="bfloat16")
    gan = recipes.discriminator(dtype="bfloat16", norm="group", groups=32)
    data = dict(source="tfds:imagenet2012", size=256, crop="random_crop", flip=True, workers=16)
    held_out = dict(split="validation", crop="center_crop", flip=False, batches=16)
    kept = dict(ema_decay=0.999, checkpoint_every=10_000, keep_every=100_000, log_every=100)
    adam = dict(lr=1e-4, b1=0.0, b2=0.99, kind="constant")
    tokenizer = dict(
        task=dict(target="vgen.tasks.autoencode:Autoencode", model=sizes, discriminator=gan, l1=0.0, l2=1.0,
                  perceptual_kind="lpips", perceptual=0.1, gan=0.1, adaptive=False, gan_loss="nonsaturating", r1=5.0),
        data=dict(data, text=False), evaluate=dict(held_out),
        train=dict(steps=1_000_000, batch_size=256, optim=dict(gen=dict(adam), disc=dict(adam)), **kept),
        init=dict(lpips=dict(file="", reader="vgen.metrics.lpips:load_lpips")),
    )  # fmt: skip
    optim = dict(lr=1e-4, b1=0.9, b2=0.96, weight_decay=0.045, warmup=5000, kind="constant")
    generator = dict(
        task=_task(transformer=net, tokenizer=sizes, size=256, text_drop=0.0, edit_from=2 / 12),
        data=dict(data), evaluate=dict(held_out),
        train=dict(steps=1_500_000, batch_size=256, optim=dict(main=optim), **kept),
        init=dict(tokenizer=dict(stage="tokenizer", without="discriminator|lpips")),
    )  # fmt: skip
    return dict(
        stages=dict(tokenizer=tokenizer, generator=generator), order=("tokenizer", "generator"),
        mesh=dict(data=-1, fsdp=8), topology="v3:4x4",
        generate=_knobs(batch_size=16, steps=8),
        prompts=("207", "360", "387", "974", "88", "979", "417", "279"),
    )  # fmt: skip


def _tokenizer():
    """Spec of the published tokenizer at 16 pixels per token."""
    return recipes.vqgan(
        channels=128, multipliers=(1, 1, 2, 2, 4), blocks=2, latent_channels=256, num_codes=1024, layout="maskgit",
        image_range=(0.0, 1.0), entropy_weight=0.1,
    )  # fmt: skip


def _imported():
    """The published tokenizer and transformer from the folder --config.weights, in float32; nothing is trained.

    512 pixels: as of `paper`, and the names of the files in stages.generator.init.  Data are needed for their shapes
    alone.
    """
    from vgen.models import maskgit

    config, weights = _paper(), FieldReference("SET_WEIGHTS")
    stage = config["stages"]["generator"]
    stage["task"] |= dict(transformer=_transformer(**maskgit.IMAGENET_256), tokenizer=_tokenizer())
    stage["train"] |= dict(steps=0)
    files = {part: f"{name}_imagenet256_checkpoint.msgpack" for part, name in NAMES.items()}
    stage |= dict(
        init=recipes.imported(weights, **files), data=recipes.scenes(256, recipes.CLASSES, labels="pair"), evaluate={},
    )  # fmt: skip
    mesh = dict(data=-1, fsdp=1, tensor=1)
    return config | dict(weights=weights, stages=dict(generator=stage), order=("generator",), mesh=mesh)
