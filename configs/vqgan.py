"""VQ-GAN: a tokenizer with a sense for detail, and a GPT that writes pictures with its tokens, row by row.

Paper
  Esser, Rombach, Ommer, 2020, Taming transformers for high-resolution image synthesis, arXiv:2012.09841.  Code and
  weights: CompVis/taming-transformers.

Parts
  tokenizer  VQGAN (models/vqgan.py) against a PatchGAN whose weight adapts itself; objective tasks/autoencode.py
  prior      GPT (models/gpt.py) told a class, or at `text` a caption; objective and sampling tasks/autoregressive.py,
             with a cache of keys and values, or beyond the grid of training by a window that slides (tokens/raster.py)

Commands
  python -m vgen.main --config=configs/vqgan.py --workdir=runs/vqgan
  python -m vgen.main --config=configs/vqgan.py --workdir=runs/vqgan --mode=sample --prompt=0 --prompt=5
  (a prompt is the number of a class: place of the colour times 4, the number of shapes, plus place of the shape, both
  as in recipes.CLASSES; what may be drawn is --config.generate.knobs.prior.top_k=50, top_p, temperature, and
  guidance_scale, 1 for none; with --image=in.png --mask=mask.png what is white is written anew, from above)
  Class accuracy, guided and not:
  python -m vgen.main --config=configs/vqgan.py --workdir=runs/vqgan --mode=eval
  Larger pictures, by a sliding window: --config.generate.task="{'prior': {'canvas': (32, 64)}}"
  Captions in the place of classes:
  python -m vgen.main --config=configs/vqgan.py:text --workdir=runs/vqgan_text
  ImageNet at 256 pixels as published, from TensorFlow Datasets:
  python -m vgen.main --config=configs/vqgan.py:paper --workdir=DIR --config.stages.tokenizer.init.lpips.file=FILE

Published numbers
  Tokenizer f16: encoder 29.3M, decoder 42.5M, codebook 4.2M (16384 codes).  rFID on ImageNet's validation 4.98 with
  16384 codes, 7.94 with 1024.
  Class-conditional ImageNet 256, 1.4B, FID: 15.98 (k = 600, p = 0.92) and 15.78 (all tokens); with a classifier that
  rejects pictures 6.59 (half of them), 5.88, 5.20 (95 of 100).
  FFHQ 9.6, CelebA-HQ 10.2.

Measured numbers
  mini, 18 minutes of one CPU core beside other work, 1600 and 2600 steps and evaluation.  Tokenizer on held-out scenes:
  PSNR 28.9 dB, 78 % of 512 codes used; next tokens: perplexity 1.06 told the class (1.12 untold).  Of 264 pictures, 11
  of a class, seed 0, k = 100, p = 0.92, the share that shows what was asked for and nothing else, and diversity:
    guidance 1.5 (default) 0.989 0.267, off 0.985 0.270, 3 0.962 0.177
  Edges are a little rough.  Windows that slide draw parts of objects: in training all of one was in view.
  text: not trained to its end.
"""

from ml_collections import ConfigDict

from vgen import recipes
from vgen.data import scenes

SCALES = ("tiny", "mini", "text", "small", "paper")

PUBLISHED = dict(
    tokenizer=dict(encoder=29_298_176, decoder=42_449_795, quantizer=4_194_304),
    prior=1.4e9,
    fid=15.98,
    rfid=4.98,
)


def get_config(scale: str = "mini") -> ConfigDict:
    """The config of one scale: tiny (tests), mini (two CPU cores, minutes), small (one accelerator), paper, and text:
    mini with captions in the place of classes.
    """
    makers = dict(tiny=_tiny, mini=_mini, text=_text, small=_small, paper=_paper)
    return recipes.system("vqgan", scale, makers, PUBLISHED)


def _gpt(**fields):
    return dict(target="vgen.models.gpt:GPT", **fields)


# ------------------------------------------------------------------------------------------------------ small worlds


def _world(
    *, size, world, eval_count, sizes, gan, autoencoding, net, prior, knobs, eval_pictures, prompts=None, text=None,
    free=None, asked=None, cached=0, scales=(),
):  # fmt: skip
    """Both stages on scenes: of one object, told a colour and a shape, or with `text` of any, told their caption.

    sizes: arguments of VQGAN.  gan: of the discriminator.  autoencoding: settings of `recipes.autoencoder`.
    net: arguments of GPT.  prior: of `recipes.train`.  text: of `recipes.bpe`.  free, asked: worlds of the tokenizer's
    pictures and of the evaluation, `world` both by default.  scales: of guidance, to be measured.
    """
    classes = 0 if text else len(scenes.classes(scenes.World(**world), "pair"))
    side, labels = size // recipes.pixels_per_token(sizes), "" if text else "pair"
    told = dict(text_vocab=text["vocab_size"], text_length=text["length"]) if text else dict(classes=classes)
    stages = recipes.prior(
        _gpt(vocab=sizes["num_codes"], grid=(side, side), **told, **net), recipes.vqgan(**sizes), size=size,
        world=world, free=free, eval_count=eval_count, settings=prior, labels=labels, cached=cached, drop=0.1,
        autoencoding=dict(autoencoding, discriminator=recipes.discriminator(**gan)), classes=classes, text=bool(text),
    )  # fmt: skip
    return dict(
        **stages,
        **(dict(text=recipes.bpe(**text)) if text else {}),
        generate=recipes.generate("prior", temperature=1.0, **knobs),
        eval=recipes.scene_eval(asked or world, eval_pictures, labels=labels, off=1.0, scales=scales),
        prompts=prompts or recipes.class_prompts(classes),
    )


def _tiny():
    return _world(
        size=16, world=recipes.CLASSES, eval_count=16,
        sizes=recipes.TOKENIZERS["tiny"] | dict(multipliers=(1,), patch=4, layout=recipes.LOCAL),
        gan=dict(channels=8, layers=1, norm="group"),
        autoencoding=dict(steps=2, batch=8, lr=1e-3, perceptual=0.0, revive_below=0.05),
        net=dict(depth=1, width=16, heads=2), prior=dict(steps=2, batch=8, lr=1e-3),
        knobs=dict(batch_size=8, guidance_scale=2.0, top_k=20, top_p=0.95), eval_pictures=8,
    )  # fmt: skip


# Of mini and text: a tokenizer of 4 x 4 pixels, 64 tokens a picture.
MINI = dict(
    size=32, cached=40_000, eval_count=512, sizes=recipes.TOKENIZERS["mini"],
    gan=dict(channels=16, layers=2, norm="group"),
    autoencoding=dict(steps=1600, batch=16, lr=3e-3, **recipes.TOKENIZER_LOSSES["mini"]),
)  # fmt: skip


def _mini():
    """Objects on a lattice of eighths, as Muse's at mini; the tokenizer sees them anywhere."""
    return _world(
        **MINI, world=recipes.CLASSES | dict(lattice=8), free=recipes.CLASSES,
        net=dict(depth=4, width=128, heads=4, unroll=4),
        prior=dict(steps=2600, batch=64, lr=2e-3, optim=dict(name="muon")),
        knobs=dict(batch_size=66, guidance_scale=1.5, top_k=100, top_p=0.92), eval_pictures=264, scales=(3.0,),
    )  # fmt: skip


def _text():
    """As Muse's base model at mini, of one or two objects."""
    return _world(
        **MINI, world=recipes.TOLD, free=recipes.FREE, asked=recipes.LATTICE, text=dict(length=20, vocab_size=512),
        net=dict(depth=4, width=128, heads=4, unroll=4),
        prior=dict(steps=3400, batch=32, lr=2e-3, optim=dict(name="muon", weight_decay=0.5)),
        knobs=dict(batch_size=64, guidance_scale=2.0, top_k=100, top_p=0.92), eval_pictures=256, scales=(3.0,),
        prompts=recipes.PROMPTS,
    )  # fmt: skip


def _small():
    """One accelerator: the colours, shapes and textures of the whole world at 128 pixels, 256 tokens as published."""
    return _world(
        size=128, world=dict(max_objects=1, heldout=()), cached=200_000, eval_count=2048,
        sizes=recipes.TOKENIZERS["small"], gan=dict(channels=64, layers=2, norm="group"),
        autoencoding=dict(steps=20_000, batch=128, lr=5e-4, **recipes.TOKENIZER_LOSSES["small"]),
        net=dict(depth=12, width=512, heads=8, dtype="bfloat16"),
        prior=dict(steps=30_000, batch=256, lr=5e-4, optim=dict(b2=0.95, warmup=2000)),
        knobs=dict(batch_size=64, guidance_scale=1.5, top_k=600, top_p=0.92), eval_pictures=1008, scales=(3.0,),
    )  # fmt: skip


# -------------------------------------------------------------------------------------------------------- as published


def _paper():
    """Class-conditional ImageNet at 256 pixels: 16384 codes at 16 pixels per token, the transformer of 1.4B.

    Learning rates are the authors' 4.5e-6 for every picture of a batch; batches and steps, which are not published for
    this model, are the largest that the paper speaks of.  Tokens are drawn by k = 600 and p = 0.92, without guidance.
    1024 codes, 307M: num_codes of the tokenizer, vocab and IMAGENET in models/gpt.py for the network.
    """
    from vgen.models import gpt

    codes = 16_384
    sizes = recipes.vqgan(
        channels=128, multipliers=(1, 1, 2, 2, 4), blocks=2, attention_levels=(4,), latent_channels=256, code_dim=256,
        num_codes=codes, layout="taming", legacy=True, remat=True, dtype="bfloat16",
    )  # fmt: skip
    data = dict(source="tfds:imagenet2012", size=256, crop="random_crop", workers=16)
    held_out = dict(split="validation", crop="center_crop", batches=16)
    kept = dict(checkpoint_every=10_000, keep_every=100_000, log_every=100)
    rate = lambda batch: dict(lr=4.5e-6 * batch, kind="constant")
    adam = rate(96) | dict(b1=0.5, b2=0.9)
    tokenizer = dict(
        task=dict(target="vgen.tasks.autoencode:Autoencode", model=sizes,
                  discriminator=recipes.discriminator(dtype="bfloat16"), l1=1.0, perceptual_kind="lpips",
                  perceptual=1.0, gan=0.8, gan_start=250_001),
        data=dict(data, text=False), evaluate=dict(held_out),
        train=dict(steps=1_000_000, batch_size=96, optim=dict(gen=dict(adam), disc=dict(adam)), **kept),
        init=dict(lpips=dict(file="", reader="vgen.metrics.lpips:load_lpips")),
    )  # fmt: skip
    net = _gpt(vocab=codes, grid=(16, 16), classes=1000, own_start=False, remat="dots", dtype="bfloat16",
               **gpt.IMAGENET_BIG)  # fmt: skip
    prior = dict(
        task=dict(target="vgen.tasks.autoregressive:Autoregressive", network=net, tokenizer=sizes, size=256,
                  classes=1000),
        data=dict(data, text=False), evaluate=dict(held_out),
        train=dict(steps=1_000_000, batch_size=64, optim=dict(main=rate(64) | dict(b2=0.95, weight_decay=0.01)),
                   frozen_dtype="bfloat16", **kept),
        init=dict(tokenizer=dict(stage="tokenizer", without="discriminator|lpips")),
    )  # fmt: skip
    return dict(
        stages=dict(tokenizer=tokenizer, prior=prior), order=("tokenizer", "prior"),
        mesh=dict(data=-1, fsdp=8), topology="v4:2x2x4",
        generate=recipes.generate("prior", batch_size=16, temperature=1.0, top_k=600, top_p=0.92),
        prompts=("207", "360", "387", "974", "88", "979", "417", "279"),
    )  # fmt: skip
