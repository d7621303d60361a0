"""Muse: text-to-image generation via masked generative transformers.

Paper
  Chang, Zhang, Barber, Maschinot, Lezama, Jiang, Yang, Murphy, Freeman, Rubinstein, Li, Krishnan, 2023,
  arXiv:2301.00704. No code or weights were published; what the paper leaves open is marked in vgen/models/muse.py.

Parts
  tokenizer  VQGAN (models/vqgan.py), objective tasks/autoencode.py
  decoder    a larger decoder for the same tokens, fine-tuned with encoder and codebook frozen (section 2.6)
  base       BaseTransformer (models/muse.py), objective and sampling tasks/tokens.py
  superres   SuperResTransformer: tokens of the small picture and text to tokens of a picture of twice the size
  text       T5-XXL, frozen, at `paper`; a small transformer trained with the base model elsewhere

Commands
  python -m vgen.main --config=configs/muse.py --workdir=runs/muse
  python -m vgen.main --config=configs/muse.py --workdir=runs/muse --mode=sample --prompt="a red circle"
  (with --image=in.png --mask=mask.png: inpainting and outpainting; with --image alone: mask-free editing)
  python -m vgen.main --config=configs/muse.py --workdir=runs/muse --mode=eval
  python -m vgen.main --config=configs/muse.py:photos --workdir=runs/photos
  python -m vgen.main --config=configs/muse.py:paper --workdir=DIR (your data and T5 weights: see `_paper`)

Published numbers
  CC3M: FID 6.8, CLIP 0.25 (base, 632M); 6.06, 0.26 with super-resolution. COCO zero-shot, 3B: FID 7.88, CLIP 0.32.
  TPUv4: 0.5 s for 256 px, 1.3 s for 512 px.

Measured numbers
  Two CPU cores, from nothing: 14 minutes (13 min 57 s), compilation, sampling and evaluation included.
  Tokenizer on held-out scenes: PSNR 30.9 dB at 64 px, 28.7 dB at 32 px, 75 % of 512 codes used.
  256 held-out prompts, seed 0, 24 + 8 steps, guidance 1 (in brackets: off), read by the scene oracle:
    base, 32 px      colour 0.915 (0.83)  shape 0.72 (0.65)  relation 0.84 (0.69)  scene_exact 0.53 (0.39)
    superres, 64 px  colour 0.85 (0.80)   shape 0.69 (0.61)  relation 0.71 (0.64)  scene_exact 0.48 (0.32)
  Half of the steps decode and half revise (`generate.knobs.base.revise`, tokens/parallel.second_thoughts); all of them
  decoding, as published: base 0.885, 0.685, 0.765, 0.465, superres 0.84, 0.65, 0.72, 0.41.
  photos: held-out crops of 32 px, PSNR 30.9 dB, 96 % of 1024 codes used, 2000 steps.
  The goal of mini is 0.95, 0.85, 0.90 and 0.70 on prompts whose pairs training never shows; it is reached on 256
  captions of training pairs (base: 0.95, 0.91, 0.92, 0.87).  What limits it is generalisation to those pairs, for a
  token says colour and outline at once: the pictures have the right layout and outline and a token or two of another
  colour.  More steps do not help, weight decay does; base, held-out loss and scene_exact (128 prompts up to 1500), all
  steps decoding:
    weight decay 0.02   3600 steps 1.09 0.40
    weight decay 0.5    1500 steps 1.01 0.41    2900 steps 0.91 0.465
    weight decay 1.5    1500 steps 1.33 0.20    4.0: nothing is learned
  Logits by a mixture of Gaussians over the codes, weight decay 0.02: 1500 steps 1.19 0.27, 3100 steps 1.21 0.285.
  Guidance 2 and 3: 0.40 and 0.18 at the end; other temperatures and 64 steps: no better.
"""

from ml_collections import ConfigDict

from vgen import recipes
from vgen.recipes import EASY, PROMPTS, WORLD

SCALES = ("tiny", "mini", "small", "paper", "photos")

PUBLISHED = dict(
    transformer_layers=dict(base_3b=3.22e9, base_632m=629e6, superres=738e6),  # computed from the published shapes
    tokenizer=dict(num_codes=8192, channels=128, blocks=2, decoder_channels=256, decoder_blocks=4),
    t5_xxl=4_762_310_656,
    cc3m=dict(base=dict(fid=6.8, clip=0.25), superres=dict(fid=6.06, clip=0.26)),
    coco=dict(fid=7.88, clip=0.32),
)


def get_config(scale: str = "mini") -> ConfigDict:
    """The config of one scale: tiny (tests), mini (two CPU cores, minutes), small (one accelerator), paper, photos."""
    makers = dict(tiny=_tiny, mini=_mini, small=_small, paper=_paper, photos=_photos)
    return recipes.system("muse", scale, makers, PUBLISHED)


# ------------------------------------------------------------------------------------------------------ small worlds


def _world(
    *, size, world, cached, eval_count, tokenizer, decoder, discriminator, autoencode, base, superres, text, steps,
    batch, lr, adversarial_start, generate, max_steps, eval_prompts, prompts, optim=None, free=None, asked=None,
):  # fmt: skip
    """All four stages on scenes, with one tokenizer for both resolutions; `size` is that of super-resolution.

    optim: of both transformers.  free, asked: worlds of the tokenizer's pictures and of the evaluation, `world` both by
    default.
    """
    low = size // 2
    vqgan = recipes.vqgan(**tokenizer)
    large = vqgan | decoder
    gan = recipes.discriminator(**discriminator)
    factor = recipes.pixels_per_token(tokenizer)
    grids = dict(low=(low // factor,) * 2, high=(size // factor,) * 2)
    data, pictures = recipes.scenes(size, world), recipes.scenes(size, free or world)
    small_data = dict(data, size=low, cached=cached)  # the base model alone is fast enough to wait for the drawing
    held_out = recipes.held_out(world, eval_count)
    codes = tokenizer["num_codes"]
    encoder = dict(
        target="vgen.models.text:TextTransformer", length=text["length"], vocab=text["vocab_size"], **text["net"]
    )
    settings = lambda stage: dict(steps=steps[stage], batch=batch[stage], lr=lr[stage])

    def tokens(transformer, **kwargs):
        return dict(target="vgen.tasks.tokens:MaskedTokens", label_smoothing=0.0, tokenizer=large, text_encoder=encoder,
                    transformer=transformer, max_steps=max_steps, **kwargs)  # fmt: skip

    auto = dict(data=pictures, evaluate=dict(held_out, batches=8), crop_size=low, **autoencode)
    finer = dict(train="decoder", gan_start=0, perceptual=0.2, continuous_steps=0)
    tuned = ("encoder", "quantizer") if decoder else ("encoder", "quantizer", "decoder")  # of equal size: a warm start
    superres = dict(target="vgen.models.muse:SuperResTransformer", vocab=codes, grid=grids["high"], low_vocab=codes,
                    low_grid=grids["low"], **superres)  # fmt: skip
    whole = dict(stage="decoder", without="discriminator|lpips")
    stages = dict(
        tokenizer=recipes.autoencoder(
            vqgan, discriminator=gan if adversarial_start else None, **settings("tokenizer"), **auto
        ),
        decoder=recipes.autoencoder(
            large, discriminator=gan, **settings("decoder"), **(auto | finer),
            init={part: dict(stage="tokenizer", part=part) for part in tuned},
        ),
        base=dict(
            task=tokens(dict(target="vgen.models.muse:BaseTransformer", vocab=codes, grid=grids["low"], **base),
                        size=low, train_text=True),
            data=small_data, evaluate=held_out, train=recipes.train(**settings("base"), optim=optim),
            init=dict(tokenizer=whole),
        ),
        superres=dict(
            task=tokens(superres, size=size, low_size=low),
            data=data, evaluate=held_out, train=recipes.train(**settings("superres"), optim=optim),
            init=dict(tokenizer=whole, text_encoder=dict(stage="base", part="text_encoder")),
        ),
    )  # fmt: skip
    return dict(
        stages=stages,
        order=("tokenizer", "decoder", "base", "superres"),
        text=recipes.bpe(text["length"], text["vocab_size"]),
        generate=generate,
        eval=recipes.scene_eval(asked or world, eval_prompts),
        prompts=prompts,
    )


def _tiny():
    return _world(
        size=32, world=WORLD, cached=0, eval_count=16,
        tokenizer=recipes.TOKENIZERS["tiny"],
        decoder=dict(decoder_channels=8, decoder_blocks=2), discriminator=dict(channels=8, layers=1, norm="group"),
        autoencode=recipes.TOKENIZER_LOSSES["tiny"], adversarial_start=True,
        base=dict(depth=2, width=32, heads=2, mlp_dim=64, unroll=2),
        superres=dict(depth=1, low_depth=1, width=32, heads=2, mlp_dim=64),
        text=dict(length=24, vocab_size=320, net=dict(depth=1, width=32, heads=2, mlp_dim=64)),
        steps=dict.fromkeys(("tokenizer", "decoder", "base", "superres"), 2),
        batch=dict.fromkeys(("tokenizer", "decoder", "base", "superres"), 8),
        lr=dict.fromkeys(("tokenizer", "decoder", "base", "superres"), 1e-3),
        generate=_generate(batch_size=8, steps=(4, 2)), max_steps=12, eval_prompts=8, prompts=PROMPTS[:2],
    )  # fmt: skip


def _generate(*, batch_size, steps=(24, 8), guidance=(4.0, 4.0), choice=(4.5, 4.5), revise=(0.0, 0.0)):
    knobs = {
        stage: dict(steps=steps[i], guidance_scale=guidance[i], temperature=1.0, choice_temperature=choice[i],
                    revise=revise[i])
        for i, stage in enumerate(("base", "superres"))
    }  # fmt: skip
    return dict(stages=("base", "superres"), batch_size=batch_size, knobs=knobs)


def _mini():
    return _world(
        size=64, world=recipes.TOLD, free=recipes.FREE, asked=recipes.LATTICE, cached=60_000, eval_count=512,
        tokenizer=recipes.TOKENIZERS["mini"], decoder={}, discriminator=dict(channels=16, layers=2, norm="group"),
        autoencode=recipes.TOKENIZER_LOSSES["mini"], adversarial_start=False,
        base=dict(depth=4, width=128, heads=4, mlp_dim=512, unroll=4, relative=True, by_codes=True),
        superres=dict(depth=3, low_depth=1, width=128, heads=4, mlp_dim=512, unroll=3, relative=True, by_codes=True,
                      aligned=True),
        text=dict(length=20, vocab_size=512, net=dict(depth=0, width=128, heads=4, mlp_dim=256)),
        steps=dict(tokenizer=2500, decoder=150, base=2900, superres=500),
        batch=dict(tokenizer=16, decoder=16, base=32, superres=8),
        lr=dict(tokenizer=3e-3, decoder=5e-4, base=2e-3, superres=2e-3),
        optim=dict(name="muon", weight_decay=0.5),  # without it pairs never seen get no better after half of the steps
        generate=_generate(batch_size=64, guidance=(1.0, 1.0), revise=(0.5, 0.5)), max_steps=128, eval_prompts=256,
        prompts=PROMPTS,
    )  # fmt: skip


def _small():
    """One accelerator, minutes: the whole world of scenes at 64 and 128 pixels, the published recipe's proportions."""
    return _world(
        size=128, world={}, cached=200_000, eval_count=2048,
        tokenizer=recipes.TOKENIZERS["small"],
        decoder=dict(decoder_channels=96, decoder_blocks=4), discriminator=dict(channels=64, layers=2, norm="group"),
        autoencode=recipes.TOKENIZER_LOSSES["small"], adversarial_start=True,
        base=dict(depth=12, width=512, heads=8, mlp_dim=2048, dtype="bfloat16"),
        superres=dict(depth=8, low_depth=4, width=512, heads=8, mlp_dim=2048, dtype="bfloat16"),
        text=dict(length=64, vocab_size=512, net=dict(depth=4, width=512, heads=8, mlp_dim=2048, dtype="bfloat16")),
        steps=dict(tokenizer=20_000, decoder=5_000, base=30_000, superres=15_000),
        batch=dict(tokenizer=128, decoder=128, base=256, superres=128),
        lr=dict(tokenizer=5e-4, decoder=5e-4, base=5e-4, superres=5e-4),
        generate=_generate(batch_size=64), max_steps=128, eval_prompts=1024, prompts=PROMPTS,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------- real photographs


def _photos():
    """The tokenizer alone, on crops of the photographs inside scikit-image and scikit-learn; no text, no download."""
    task = dict(
        target="vgen.tasks.autoencode:Autoencode", l1=1.0, l2=2.0, perceptual=0.0, revive_below=0.05,
        continuous_steps=400,
        model=dict(target="vgen.models.vqgan:VQGAN", channels=16, multipliers=(1, 2, 4), blocks=1, latent_channels=64,
                   num_codes=1024, groups=8, ema=True, layout=EASY),
    )  # fmt: skip
    optim = dict(gen=dict(lr=1e-3, warmup=50, clip=1.0, end=0.02, b2=0.99))
    data = dict(source="photos", size=32, text=False, options=dict(count=100_000))
    return dict(
        stages=dict(tokenizer=dict(
            task=task, data=data, train=dict(steps=2000, batch_size=32, optim=optim, ema_decay=0.998,
                                            checkpoint_every=500),
            evaluate=dict(split="heldout", options=dict(count=512), batches=16),
        )),
        order=("tokenizer",),
    )  # fmt: skip


# -------------------------------------------------------------------------------------------------- as published


def _paper():
    """The published Muse: f16 and f8 tokenizers, T5-XXL, the 3B base model at 256 px and super-resolution to 512 px.

    Point it at your data and weights:
      --config.stages.STAGE.data.source=arrayrecord:GLOB (or webdataset:GLOB, tfds:NAME) for each stage,
      --config.text.path=FOLDER (T5's tokenizer), --config.stages.base.init.text_encoder.file=WEIGHTS (and superres's),
      --config.stages.tokenizer_high.init.lpips.file=... (and of the other tokenizers).
    The 632M base model: --config.stages.base.task.transformer with the values of models/muse.py:BASE_632M.
    """
    from vgen.models import muse, t5

    vqgan = dict(target="vgen.models.vqgan:VQGAN", channels=128, blocks=2, latent_channels=256, num_codes=8192,
                 layout="maskgit", remat=True, dtype="bfloat16")  # fmt: skip
    low = dict(vqgan, multipliers=(1, 1, 2, 2, 4))  # f16
    high = dict(vqgan, multipliers=(1, 1, 2, 4))  # f8
    large = dict(decoder_channels=256, decoder_blocks=4)
    gan = dict(target="vgen.models.discriminator:NLayerDiscriminator", dtype="bfloat16", norm="group", groups=32)
    auto = dict(target="vgen.tasks.autoencode:Autoencode", discriminator=gan, l1=0.0, l2=1.0, perceptual_kind="lpips",
                gan=0.1, adaptive=False, gan_loss="nonsaturating", r1=5.0)  # fmt: skip
    text = dict(target="vgen.models.t5:T5Encoder", dtype="bfloat16", **t5.XXL)
    lpips = dict(lpips=dict(file="", reader="vgen.metrics.lpips:load_lpips"))
    t5_weights = dict(text_encoder=dict(file="", reader="vgen.convert.load:params"))

    def data(size, **kwargs):
        return dict(source="webdataset:SET_ME/*.tar", size=size, crop="center_crop", workers=16, prefetch=2, **kwargs)

    def tokenizer(model, size, **kwargs):
        optim = dict(lr=1e-4, b1=0.9, b2=0.99, weight_decay=1e-4, warmup=10_000, kind="constant")
        train = dict(steps=1_000_000, batch_size=256, optim=dict(gen=optim, disc=optim), ema_decay=0.999,
                     checkpoint_every=5000, keep_every=50_000, log_every=100)  # fmt: skip
        return dict(task=dict(auto, model=model, **kwargs), data=data(size, text=False), train=train,
                    evaluate=dict(split="heldout", batches=32))  # fmt: skip

    def finetuned(model, size, source):
        frozen = {part: dict(stage=source, part=part) for part in ("encoder", "quantizer")}
        stage = tokenizer(model | large, size, train="decoder", perceptual=0.005)
        return stage | dict(init=frozen | lpips)

    def tokens(transformer, size, tokenizer, **kwargs):
        return dict(
            target="vgen.tasks.tokens:MaskedTokens", size=size, tokenizer=tokenizer | large, text_encoder=text,
            transformer=dict(transformer, remat="dots", dtype="bfloat16"), label_smoothing=0.0, **kwargs,
        )  # fmt: skip

    def generator(task, size, steps, init):
        optim = dict(name="adafactor", lr=1e-4, b1=0.9, b2=0.96, weight_decay=0.045, warmup=5000)
        train = dict(steps=steps, batch_size=512, optim=dict(main=optim), ema_decay=0.9999, frozen_dtype="bfloat16",
                     checkpoint_every=5000, keep_every=50_000, log_every=100)  # fmt: skip
        return dict(task=task, data=data(size), train=train, init=init, evaluate=dict(split="heldout", batches=16))

    low_weights, high_weights = (
        dict(stage=stage, without="discriminator|lpips") for stage in ("decoder_low", "decoder_high")
    )
    base = dict(target="vgen.models.muse:BaseTransformer", **muse.BASE_3B)
    superres = dict(target="vgen.models.muse:SuperResTransformer", **muse.SUPER_RES)
    stages = dict(
        tokenizer_low=tokenizer(low, 256, perceptual=0.05) | dict(init=lpips),
        decoder_low=finetuned(low, 256, "tokenizer_low"),
        tokenizer_high=tokenizer(high, 512, perceptual=0.05) | dict(init=lpips),
        decoder_high=finetuned(high, 512, "tokenizer_high"),
        base=generator(tokens(base, 256, low), 256, 1_500_000, dict(tokenizer=low_weights) | t5_weights),
        superres=generator(
            tokens(superres, 512, high, low_size=256, low_tokenizer=low | large), 512, 1_000_000,
            dict(tokenizer=high_weights, low_tokenizer=low_weights) | t5_weights,
        ),
    )  # fmt: skip
    return dict(
        stages=stages,
        order=tuple(stages),
        mesh=dict(data=-1, fsdp=8, sequence=2),
        topology="v4:4x8x8",
        text=dict(kind="t5", length=128, path=""),
        generate=_generate(batch_size=16),
        prompts=PROMPTS,
    )
