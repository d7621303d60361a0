"""Latent diffusion: a KL autoencoder, then a U-Net in its latents, told of the text by cross-attention.

Paper
  Rombach, Blattmann, Lorenz, Esser, Ommer, 2022, High-resolution image synthesis with latent diffusion models,
  arXiv:2112.10752. Code and weights: CompVis/latent-diffusion.

Parts
  vae        AutoencoderKL (models/autoencoder.py), objective tasks/autoencode.py
  unet       UNet (models/unet.py) and the text transformer that is trained along; tasks/diffuse.py

Commands
  python -m vgen.main --config=configs/ldm.py --workdir=runs/ldm
  python -m vgen.main --config=configs/ldm.py --workdir=runs/ldm --mode=sample --prompt="a red circle"
  (with --image=in.png: SDEdit, --image=in.png --mask=mask.png: replacement of what is known in every step)
  python -m vgen.main --config=configs/ldm.py --workdir=runs/ldm --mode=eval
  python -m vgen.main --config=configs/ldm.py:paper --workdir=DIR (your data: see `_paper`)

Published numbers
  Text to image, 1.45B parameters, LAION-400M, 390k steps of 680: COCO FID 23.31, with guidance 1.5 12.63 (250 steps).
  ImageNet 256: FID 10.56, with guidance 1.5 3.60. KL autoencoder f8: rFID 0.90, 83,653,863 parameters.

Measured numbers
  mini, from nothing on two CPU cores: 14 min 38 s (goal 20), compilation, sampling and evaluation included.
  256 held-out prompts, seed 0, 25 DDIM steps, read by the scene oracle:
    guidance off  colour 0.92  shape 0.75  relation 0.82  scene_exact 0.56
    1.5           colour 0.95  shape 0.82  relation 0.88  scene_exact 0.69
    2 (default)   colour 0.95  shape 0.83  relation 0.90  scene_exact 0.70
    3             colour 0.93  shape 0.83  relation 0.91  scene_exact 0.70
    5             colour 0.88  shape 0.80  relation 0.83  scene_exact 0.66
  Goals: colour 0.90, shape 0.70, relation 0.85; met at 1.5, 2 and 3.  An earlier run of the same settings, on one core,
  gave 0.915, 0.835, 0.83 and 0.70 at 2; the studies of guidance and editing are of its weights.
  Captions are told mostly from the left and from above in training and at
  random when asked (World.canonical): told at random in training, and with an autoencoder trained on the lattice alone,
  217,600 samples gave colour 0.98, shape 0.34 and relation 0.45.
"""

from ml_collections import ConfigDict

from vgen import recipes

SCALES = ("tiny", "mini", "small", "paper")

PUBLISHED = dict(vae=83_653_863, coco=dict(fid=23.31, fid_guided=12.63), imagenet=dict(fid=10.56, fid_guided=3.60))


def get_config(scale: str = "mini") -> ConfigDict:
    """The config of one scale: tiny (tests), mini (two CPU cores, minutes), small (one accelerator), paper."""
    makers = dict(tiny=_tiny, mini=_mini, small=_small, paper=_paper)
    return recipes.system("ldm", scale, makers, PUBLISHED)


# ------------------------------------------------------------------------------------------------------ small worlds


def _world(*, text, encoder, diffuse, **kwargs):
    """Both stages on scenes, by `recipes.text_unet`.  encoder: arguments of TextTransformer.  diffuse: of Diffuse."""
    states = dict(target="vgen.models.text:TextTransformer", length=text["length"], vocab=text["vocab_size"], **encoder)
    return recipes.text_unet(states, width=encoder["width"], text=text, **diffuse, **kwargs)


def _tiny():
    return _world(
        size=16, world=recipes.WORLD, eval_count=16,
        vae=recipes.KL["tiny"], autoencoder=recipes.AUTOENCODING["tiny"],
        net=dict(widths=(16, 16), attention=(0, 1), blocks=1, heads=2, groups=4),
        diffuse=dict(schedule=recipes.schedule("scaled_linear"), max_steps=10),
        text=dict(length=24, vocab_size=320), encoder=dict(depth=1, width=16, heads=2, mlp_dim=16),
        unet=dict(steps=2, batch=8, lr=1e-3),
        knobs=dict(batch_size=8, steps=3, guidance_scale=2.0, strength=0.6), eval_prompts=8,
        prompts=recipes.PROMPTS[:2],
    )  # fmt: skip


def _mini():
    """A flow instead of the published noise, at times where most of a small picture is still undecided.

    The latents of large plain objects say the same many times over, so text and layout are decided where there is
    little signal, and few samples are at uniform times of a cosine schedule.
    """
    flow = dict(schedule=dict(target="vgen.diffusion.schedules:rectified_flow"), prediction="flow", time_scale=1000.0)
    late = dict(draw=dict(how="logit_normal", mean=1.4, std=1.2), grid_knobs=dict(shift=4.0), max_steps=100)
    return _world(
        size=32, world=recipes.TOLD, vae_world=recipes.FREE, asked_world=recipes.LATTICE, cached=60_000, eval_count=512,
        vae=recipes.KL["mini"], autoencoder=recipes.AUTOENCODING["mini"],
        net=dict(widths=(64, 128), attention=(0, 1), blocks=1, heads=4, groups=8), diffuse=flow | late,
        text=dict(length=20, vocab_size=512), encoder=dict(depth=0, width=128, heads=4, mlp_dim=256),
        unet=dict(steps=1800, batch=64, lr=3e-3, optim=dict(name="muon")),
        knobs=dict(batch_size=64, steps=25, guidance_scale=2.0, strength=0.6), scales=(1.5, 3.0, 5.0),
        eval_prompts=256, prompts=recipes.PROMPTS,
    )  # fmt: skip


def _small():
    """One accelerator, minutes: the whole world of scenes at 128 pixels, 16 x 16 latents."""
    return _world(
        size=128, world={}, cached=200_000, eval_count=2048,
        vae=recipes.KL["small"], autoencoder=recipes.AUTOENCODING["small"],
        net=dict(widths=(192, 384, 384), attention=(1, 1, 1), blocks=2, heads=8, dtype="bfloat16"),
        diffuse=dict(schedule=recipes.schedule("scaled_linear"), prediction="v", max_steps=250),
        text=dict(length=64, vocab_size=512), encoder=dict(depth=4, width=512, heads=8, mlp_dim=2048, dtype="bfloat16"),
        unet=dict(steps=60_000, batch=256, lr=2e-4),
        knobs=dict(batch_size=64, steps=50, guidance_scale=3.0, strength=0.6), scales=(1.5, 2.0, 5.0),
        eval_prompts=1024, prompts=recipes.PROMPTS,
    )  # fmt: skip


# -------------------------------------------------------------------------------------------------------- as published


def _paper():
    """The published text-to-image model: KL-f8 at 256 px, a text transformer of 32 layers, a U-Net of 320 channels.

    Point it at your data and weights:
      --config.stages.STAGE.data.source=arrayrecord:GLOB (or webdataset:GLOB, tfds:NAME) for both stages,
      --config.text.path=FOLDER (BERT's tokenizer there is a byte-level BPE here, trained on your captions),
      --config.stages.vae.init.lpips.file=... (LPIPS' weights).
    """
    from vgen.models import autoencoder

    model = dict(target="vgen.models.autoencoder:AutoencoderKL", dtype="bfloat16", remat=True, **autoencoder.KL_F8)
    model |= dict(scaling_factor=1.0)
    gan = recipes.discriminator(dtype="bfloat16", norm="group", groups=32)
    data = dict(source="webdataset:SET_ME/*.tar", size=256, crop="center_crop", workers=16, prefetch=2)
    adam = dict(lr=4.5e-6 * 96, b1=0.5, b2=0.9, warmup=0, kind="constant")  # 4.5e-6 a picture of the batch
    vae = dict(
        task=dict(target="vgen.tasks.autoencode:Autoencode", model=model, discriminator=gan, l1=1.0, perceptual=1.0,
                  perceptual_kind="lpips", gan=0.5, gan_start=50_001, kl=1e-6),
        data=dict(data, text=False), init=dict(lpips=dict(file="", reader="vgen.metrics.lpips:load_lpips")),
        train=dict(steps=500_000, batch_size=96, optim=dict(gen=adam, disc=dict(adam)), checkpoint_every=5000,
                   keep_every=50_000, log_every=100),
        evaluate=dict(split="heldout", batches=32),
    )  # fmt: skip
    text = dict(target="vgen.models.text:TextTransformer", length=77, vocab=30_522, depth=32, width=1280, heads=8,
                mlp_dim=5120, remat="full", dtype="bfloat16")  # fmt: skip
    network = dict(target="vgen.models.unet:UNet", widths=(320, 640, 1280, 1280), attention=(1, 1, 1, 0), heads=8,
                   context_dim=1280, remat="full", dtype="bfloat16")  # fmt: skip
    unet = dict(
        task=dict(target="vgen.tasks.diffuse:Diffuse", network=network, size=256, vae=model, scale_by_std=True,
                  text_encoder=text, train_text=True, schedule=recipes.schedule("scaled_linear"), max_steps=250),
        data=dict(data), init=dict(vae=dict(stage="vae", without="discriminator|lpips")),
        train=dict(steps=390_000, batch_size=680, optim=dict(main=dict(lr=1e-4, weight_decay=0.01, warmup=10_000)),
                   ema_decay=0.9999, frozen_dtype="bfloat16", checkpoint_every=5000, keep_every=50_000, log_every=100),
        evaluate=dict(split="heldout", batches=16),
    )  # fmt: skip
    return dict(
        stages=dict(vae=vae, unet=unet), order=("vae", "unet"),
        mesh=dict(data=-1, fsdp=8, sequence=4), topology="v4:2x4x2",  # 680 divides by 8 and no further: rows by 4
        text=recipes.bpe(length=77, vocab_size=30_522),
        generate=recipes.generate("unet", batch_size=16, steps=250, guidance_scale=1.5, strength=0.6),
        prompts=recipes.PROMPTS,
    )  # fmt: skip
