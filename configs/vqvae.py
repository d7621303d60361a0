"""VQ-VAE: a convolutional autoencoder to discrete codes, and a gated PixelCNN that learns which codes follow which.

Paper
  van den Oord, Vinyals, Kavukcuoglu, 2017, Neural discrete representation learning, arXiv:1711.00937. The prior:
  van den Oord, Kalchbrenner, Vinyals et al., 2016, Conditional image generation with PixelCNN decoders,
  arXiv:1606.05328. No weights were published; `vgen.load` reads those of ritheshkumar95/pytorch-vqvae.

Parts
  tokenizer  VQVAE (models/vqvae.py), objective tasks/autoencode.py; the codebook by gradient at `paper` and by moving
             averages (appendix A.1) elsewhere
  prior      PixelCNN (models/pixelcnn.py) told a class, objective and sampling tasks/autoregressive.py

Commands
  python -m vgen.main --config=configs/vqvae.py --workdir=runs/vqvae
  python -m vgen.main --config=configs/vqvae.py --workdir=runs/vqvae --mode=sample --prompt=0 --prompt=5 --num_images=4
  (a prompt is the number of a class: place of the colour times 4, the number of shapes, plus place of the shape, both
  as in recipes.CLASSES; the strength of guidance is --guidance_scale=2.0)
  python -m vgen.main --config=configs/vqvae.py --workdir=runs/vqvae --mode=eval
  scikit-learn's handwritten digits (pip install -e '.[photos]'; a prompt is the digit):
  python -m vgen.main --config=configs/vqvae.py:digits --workdir=runs/vqvae_digits
  ImageNet at 128 pixels, from TensorFlow Datasets:
  python -m vgen.main --config=configs/vqvae.py:paper --workdir=DIR

Published numbers
  ImageNet at 128 pixels in 32 x 32 codes of 512: 42.6 times fewer bits than the picture. CIFAR-10: 4.67 bits per
  dimension, where a continuous VAE has 4.51 and VIMCO 5.14.
  Parameters of DeepMind's example: encoder 372,416, decoder 290,307, codebook 32,768.

Measured numbers
  digits: 70 seconds of one CPU core, evaluation included. Held-out digits: PSNR 24.3 dB, all of the 64 codes used, the
  prior 3.39 bits per token. Of 500 drawn, 50 of each digit, seed 0, guidance 1.5, the 5 nearest real digits take 0.970
  for what was asked (held-out real ones: 0.989); diversity 0.233 (0.273).
  mini, 17 minutes of one CPU core beside other work. Held-out scenes: PSNR 30.8 dB, 0.98 of the 256 codes used,
  perplexity 75; the prior 0.090 bits per token. Of 264 pictures, 11 of a class, seed 0: 0.932 show the object asked
  for and nothing else (guidance 1.5), 0.920 without guidance, 0.167 at 3; diversity 0.271, 0.277, 0.184.
"""

from ml_collections import ConfigDict

from vgen import recipes
from vgen.data import scenes

SCALES = ("tiny", "mini", "digits", "small", "paper")

PUBLISHED = dict(
    fewer_bits=42.6, cifar10_bits_per_dim=4.67, example=dict(encoder=372_416, decoder=290_307, quantizer=32_768)
)


def get_config(scale: str = "mini") -> ConfigDict:
    """The config of one scale: tiny (tests), mini (two CPU cores, minutes), digits (the same, real pictures), small
    (one accelerator), paper.
    """
    makers = dict(tiny=_tiny, mini=_mini, digits=_digits, small=_small, paper=_paper)
    return recipes.system("vqvae", scale, makers, PUBLISHED)


def _vqvae(**fields):
    return dict(target="vgen.models.vqvae:VQVAE", **fields)


def _pixelcnn(**fields):
    return dict(target="vgen.models.pixelcnn:PixelCNN", **fields)


# ------------------------------------------------------------------------------------------------------ small worlds


def _world(
    *, size, world, eval_count, sizes, autoencoding, net, prior, knobs, eval_pictures, free=None, cached=0, scales=()
):
    """Both stages on scenes of one object: a class is a colour and a shape, left out of a tenth of the training.

    sizes: arguments of VQVAE.  autoencoding: settings of `recipes.autoencoder`.  net: arguments of PixelCNN.
    prior: of `recipes.train`.  free: the world of the tokenizer's pictures, `world` by default.  scales: of guidance,
    to be measured.
    """
    classes = len(scenes.classes(scenes.World(**world), "pair"))
    side = size // 2 ** sizes["levels"]
    stages = recipes.prior(
        _pixelcnn(vocab=sizes["num_codes"], grid=(side, side), classes=classes, **net), _vqvae(**sizes), size=size,
        world=world, free=free, eval_count=eval_count, settings=prior, labels="pair", cached=cached, drop=0.1,
        autoencoding=autoencoding, classes=classes,
    )  # fmt: skip
    return dict(
        **stages,
        generate=recipes.generate("prior", temperature=1.0, **knobs),
        eval=recipes.scene_eval(world, eval_pictures, labels="pair", off=1.0, scales=scales),
        prompts=recipes.class_prompts(classes),
    )


def _tiny():
    return _world(
        size=16, world=recipes.CLASSES, eval_count=16,
        sizes=dict(channels=8, hidden=4, blocks=1, levels=2, num_codes=16, ema=True),
        autoencoding=dict(steps=2, batch=8, lr=1e-3, l1=0.0, l2=1.0, perceptual=0.0, revive_below=0.05),
        net=dict(width=8, depth=2, first_kernel=3, hidden=16, unroll=1), prior=dict(steps=2, batch=8, lr=1e-3),
        knobs=dict(batch_size=8, guidance_scale=2.0), eval_pictures=8,
    )  # fmt: skip


def _mini():
    """Objects on a lattice of eighths, as Muse's at mini; the tokenizer sees them anywhere."""
    return _world(
        size=32, world=recipes.CLASSES | dict(lattice=8), free=recipes.CLASSES, cached=40_000, eval_count=512,
        sizes=dict(channels=64, hidden=32, levels=2, num_codes=256, code_dim=32, layout="sonnet", ema=True),
        autoencoding=dict(steps=2500, batch=16, lr=2e-3, l1=1.0, l2=1.0, perceptual=0.0, revive_below=0.05,
                          continuous_steps=600),
        net=dict(width=64, depth=8, hidden=256, unroll=7),
        prior=dict(steps=2000, batch=64, lr=2e-3, optim=dict(name="muon")),
        knobs=dict(batch_size=66, guidance_scale=1.5), eval_pictures=264, scales=(3.0,),
    )  # fmt: skip


def _digits():
    """1437 digits of 8 x 8 pixels, 360 held out, in 4 x 4 codes; some codes are exchanged, for there are few."""
    model = _vqvae(channels=64, hidden=32, levels=1, num_codes=64, code_dim=16, layout="sonnet", ema=True)
    data, held_out = dict(source="digits", size=8, text=False), dict(split="heldout", batches=6)
    task = dict(
        target="vgen.tasks.autoregressive:Autoregressive", size=8, classes=10, drop=0.1, noise=0.2, tokenizer=model,
        network=_pixelcnn(vocab=64, grid=(4, 4), width=32, depth=5, first_kernel=5, hidden=128, classes=10, unroll=4),
    )  # fmt: skip
    stages = dict(
        tokenizer=recipes.autoencoder(
            model, data=data, evaluate=held_out, steps=1500, batch=60, lr=2e-3, l1=0.0, l2=1.0, perceptual=0.0,
            revive_below=0.05, continuous_steps=400,
        ),
        prior=dict(
            task=task, data=dict(data), evaluate=dict(held_out),
            train=recipes.train(steps=600, batch=60, lr=2e-3, optim=dict(weight_decay=0.2)),
            init=dict(tokenizer=dict(stage="tokenizer")),
        ),
    )  # fmt: skip
    return dict(
        stages=stages, order=("tokenizer", "prior"),
        generate=recipes.generate("prior", batch_size=50, guidance_scale=1.5, temperature=1.0),
        eval=dict(target="vgen.metrics.digit_eval:DigitQuality"),
        prompts=tuple("0123456789"),
    )  # fmt: skip


def _small():
    """One accelerator: the colours, shapes and textures of the whole world at 64 pixels; DeepMind's example's sizes."""
    from vgen.models import vqvae

    return _world(
        size=64, world=dict(max_objects=1, heldout=()), cached=200_000, eval_count=2048,
        sizes=vqvae.SONNET | dict(levels=2, ema=True, dtype="bfloat16"),
        autoencoding=dict(steps=20_000, batch=128, lr=3e-4, l1=0.0, l2=4.0, perceptual=0.0, revive_below=0.05),
        net=dict(width=128, depth=15, hidden=512, dtype="bfloat16"),
        prior=dict(steps=30_000, batch=128, lr=3e-4), knobs=dict(batch_size=64, guidance_scale=1.5),
        eval_pictures=1008, scales=(3.0,),
    )  # fmt: skip


# -------------------------------------------------------------------------------------------------------- as published


def _paper():
    """ImageNet at 128 pixels: 250k steps of 128 for the autoencoder by Adam at 2e-4, then the prior over 32 x 32 codes.

    The squared error is divided by the variance of the pictures' values, about 0.29 in [-1, 1], as in DeepMind's
    example; the paper does not give the width of the decoder's Gaussian.  It does not give the prior's size either: 20
    layers of 384 with 5 x 5 filters and 200k steps of 128 are those of the PixelCNN paper's ImageNet model, the rate
    of 3e-4 and the 1024 units ahead of the logits are ours.  Classes are always told, without guidance.
    """
    kept = dict(checkpoint_every=10_000, keep_every=50_000, log_every=100)
    adam = lambda lr: dict(lr=lr, kind="constant")
    model = _vqvae(channels=256, num_codes=512, dtype="bfloat16")
    data = dict(source="tfds:imagenet2012", size=128, crop="random_crop", flip=True, workers=16, text=False)
    held_out = dict(split="validation", crop="center_crop", flip=False, batches=16)
    task = dict(
        target="vgen.tasks.autoregressive:Autoregressive", size=128, classes=1000, tokenizer=model,
        network=_pixelcnn(vocab=512, grid=(32, 32), width=384, depth=20, kernel=5, hidden=1024, classes=1000,
                          remat="full", dtype="bfloat16"),
    )  # fmt: skip
    stages = dict(
        tokenizer=dict(
            task=dict(target="vgen.tasks.autoencode:Autoencode", model=model, l1=0.0, l2=3.5, perceptual=0.0),
            data=dict(data), evaluate=dict(held_out),
            train=dict(steps=250_000, batch_size=128, optim=dict(gen=adam(2e-4)), **kept),
        ),
        prior=dict(
            task=task, data=dict(data), evaluate=dict(held_out),
            train=dict(steps=200_000, batch_size=128, optim=dict(main=adam(3e-4)), ema_decay=0.9999, **kept),
            init=dict(tokenizer=dict(stage="tokenizer")),
        ),
    )  # fmt: skip
    return dict(
        stages=stages, order=("tokenizer", "prior"), topology="v4:2x2x2",
        generate=recipes.generate("prior", batch_size=16, temperature=1.0),
        prompts=("278", "147", "294", "321", "973", "970", "651", "717"),
    )  # fmt: skip
