"""DALL-E: one transformer writes a caption's words and then its picture's tokens, which a relaxed autoencoder learned.

Paper
  Ramesh, Pavlov, Goh, Gray, Voss, Radford, Chen, Sutskever, 2021, Zero-shot text-to-image generation, arXiv:2102.12092.
  Code and weights of the autoencoder alone: openai/DALL-E (`vgen.load` reads encoder.pkl and decoder.pkl); the
  transformer was not released, what the paper leaves open of it is marked in models/gpt.py.

Parts
  tokenizer  DVAE (models/dvae.py), trained on draws from a Gumbel-softmax that becomes sharper, by the likelihood of
             the pixels and a KL against uniform tokens; objective tasks/autoencode.py
  prior      GPT (models/gpt.py) over the text's tokens and then the picture's: positions by row and column, padding
             learned for every place of the text, layers that look at rows, columns and at last at neighbours; objective
             (an eighth of it the text's) and sampling tasks/autoregressive.py
  clip       (mini, small) CLIP (models/clip.py, tasks/contrastive.py), of whose choice the best of eight pictures is

Commands
  python -m vgen.main --config=configs/dalle.py --workdir=runs/dalle
  python -m vgen.main --config=configs/dalle.py --workdir=runs/dalle --mode=sample --prompt="a red circle"
  (with --image=in.png --mask=mask.png what is white is written anew, from above; --negative="..." in the place of no
  text; what may be drawn is --config.generate.knobs.prior.top_k=50, top_p, temperature and guidance_scale; the best of
  more pictures with --config.generate.choose.of=32, what comes with 1)
  Pictures of held-out captions, guided and not, chosen and not:
  python -m vgen.main --config=configs/dalle.py --workdir=runs/dalle --mode=eval
  python -m vgen.main --config=configs/dalle.py:paper --workdir=DIR (your data: see `_paper`)

Published numbers
  Autoencoder: 53.8M and 43.8M parameters, 8192 tokens, 256 pixels to 32 x 32.  Transformer: 12B, 64 layers.
  COCO zero-shot, the best of 512 by CLIP: FID 17.89 as listed by Muse.  Preferred to DF-GAN for realism 90.0 % and for
  its match to the caption 93.3 % of the time.

Measured numbers
  mini, 21 minutes of two CPU cores beside other work.  What it draws has the layout and mostly the colours that were
  asked for, and outlines that the oracle does not read: of 256 held-out captions, seed 0, guidance 2, best of eight, no
  picture is all right (colour 0.25, shape 0.13).  The tokenizer is at fault: PSNR 20.9 dB on held-out scenes where
  VQ-GAN's of as many tokens has 28.9, with 71 % of 256 codes used.  With the KL at 1 and warmed up, and no least scale,
  it was 18.2 dB and 11 %, in two colours.  CLIP's choice is not to be measured on such pictures.
"""

from ml_collections import ConfigDict

from vgen import recipes
from vgen.models.gpt import dall_e_patterns

SCALES = ("tiny", "mini", "small", "paper")

PUBLISHED = dict(tokenizer=dict(encoder=53_786_240, decoder=43_829_766), transformer=12e9, fid=17.89)


def get_config(scale: str = "mini") -> ConfigDict:
    """The config of one scale: tiny (tests), mini (two CPU cores, minutes), small (one accelerator), paper."""
    makers = dict(tiny=_tiny, mini=_mini, small=_small, paper=_paper)
    return recipes.system("dalle", scale, makers, PUBLISHED)


def _gpt(tokenizer, side, text, depth, **fields):
    """Spec of the transformer over a text and side x side tokens of a picture."""
    return dict(
        target="vgen.models.gpt:GPT", vocab=tokenizer["num_codes"], grid=(side, side), depth=depth,
        text_vocab=text["vocab_size"], text_length=text["length"], text_head=True, positions="axes",
        patterns=dall_e_patterns(depth), **fields,
    )  # fmt: skip


def _dvae(**fields):
    return dict(target="vgen.models.dvae:DVAE", **fields)


BOUND = dict(l1=0.0, l2=0.0, perceptual=0.0)  # the likelihood of the pixels and the KL are all that the paper weighs


# ------------------------------------------------------------------------------------------------------ small worlds


def _world(
    *, size, world, eval_count, sizes, autoencoding, net, prior, text, knobs, eval_pictures, prompts, free=None,
    asked=None, cached=0, scales=(), clip=None,
):  # fmt: skip
    """Both stages on scenes and their captions, a tenth of which is left out.

    sizes: arguments of DVAE.  autoencoding: settings of `recipes.autoencoder`.  net: arguments of GPT.  prior: of
    `recipes.train`.  text: of `recipes.bpe`.  free, asked: worlds of the tokenizer's pictures and of the evaluation,
    `world` both by default.  scales: of guidance, to be measured.  clip: arguments of `recipes.contrastive`, for a
    stage that chooses the best of eight pictures.
    """
    tokenizer, side = _dvae(**sizes), size // 2 ** (sizes["levels"] - 1)
    stages = recipes.prior(
        _gpt(sizes, side, text, **net), tokenizer, size=size, world=world, free=free, eval_count=eval_count,
        autoencoding=BOUND | autoencoding, settings=prior, cached=cached, text=True, drop=0.1, text_weight=1 / 8,
    )  # fmt: skip
    generate = recipes.generate("prior", temperature=1.0, **knobs)
    if clip:
        judge = recipes.contrastive(
            "clip", size=size, world=free or world, eval_count=eval_count, text=text, pictures=eval_pictures,
            cached=cached, **clip,
        )  # fmt: skip
        stages = dict(stages=stages["stages"] | judge["stages"], order=(*stages["order"], "clip"))
        generate["choose"] = dict(stage="clip", of=8)
    return dict(
        **stages,
        text=recipes.bpe(**text),
        generate=generate,
        eval=recipes.scene_eval(asked or world, eval_pictures, off=1.0, scales=scales),
        prompts=prompts,
    )


def _tiny():
    return _world(
        size=16, world=recipes.WORLD, eval_count=16,
        sizes=dict(channels=8, blocks=1, num_codes=16, decoder_stem=8, levels=2),
        autoencoding=dict(steps=2, batch=8, lr=1e-3, kl=1.0, temperature=(1.0, 1 / 16, 2)),
        net=dict(depth=2, width=16, heads=2, kernel=3), prior=dict(steps=2, batch=8, lr=1e-3),
        text=dict(length=24, vocab_size=320),
        knobs=dict(batch_size=8, guidance_scale=2.0, top_k=0, top_p=0.95), eval_pictures=8,
        prompts=recipes.PROMPTS[:2],
    )  # fmt: skip


def _mini():
    """32 pixels, 64 tokens of 4 x 4 each; the scenes are those of Muse's base model at mini.

    The KL has its weight from the first step on: at 1, warmed up or not, all tokens were the same after 100 steps.
    Without a least scale the likelihood rose by what plain backgrounds add to it while pictures became worse.
    What 700 steps gave, PSNR in dB and codes used: as here 17.1, 48 %; 64 channels 18.3, 42 %; two blocks 16.9, 47 %;
    a KL of 3.3 18.3, 36 %, of 1.65 18.8, 16 %; a rate of 5e-3 18.3, 26 %, and with it a KL that falls from 6.6 to 0.3
    18.7, 12 %; twice as slow a temperature 17.2, 66 %, four times as fast 17.1, 13 %; Muon 17.5, 15 %.  Codes are lost
    where pictures gain.
    """
    return _world(
        size=32, world=recipes.TOLD, free=recipes.FREE, asked=recipes.LATTICE, cached=60_000, eval_count=512,
        sizes=dict(channels=32, blocks=1, num_codes=256, decoder_stem=64, levels=3),
        autoencoding=dict(steps=3000, batch=16, lr=2e-3, kl=6.6, least_scale=0.3, temperature=(1.0, 1 / 16, 2400)),
        net=dict(depth=4, width=128, heads=4, kernel=5, unroll=4),
        prior=dict(steps=3400, batch=32, lr=2e-3, optim=dict(name="muon", weight_decay=0.5)),
        text=dict(length=20, vocab_size=512),
        knobs=dict(batch_size=64, guidance_scale=2.0, top_k=0, top_p=0.95), eval_pictures=256, scales=(3.0,),
        prompts=recipes.PROMPTS,
        clip=dict(
            features=128, image=dict(width=128, depth=4, heads=4, mlp_dim=512, patch_size=4, unroll=4),
            words=dict(width=128, depth=2, heads=4, mlp_dim=512, unroll=2),
            settings=dict(steps=700, batch=128, lr=2e-3, optim=dict(name="muon", weight_decay=0.5)),
        ),
    )  # fmt: skip


def _small():
    """One accelerator: the whole world of scenes at 128 pixels, 256 tokens."""
    from vgen.models import vit

    return _world(
        size=128, world={}, cached=200_000, eval_count=2048,
        sizes=dict(channels=64, blocks=2, num_codes=1024, decoder_stem=128, levels=4),
        autoencoding=dict(steps=30_000, batch=128, lr=5e-4, kl=6.6, kl_steps=2000, temperature=(1.0, 1 / 16, 15_000)),
        net=dict(depth=16, width=512, heads=8, dtype="bfloat16"),
        prior=dict(steps=40_000, batch=256, lr=4.5e-4, optim=dict(b2=0.96, weight_decay=0.045)),
        text=dict(length=64, vocab_size=512),
        knobs=dict(batch_size=64, guidance_scale=2.0, top_k=0, top_p=0.95), eval_pictures=1024, scales=(3.0,),
        prompts=recipes.PROMPTS,
        clip=dict(
            features=256, image=dict(vit.SMALL, patch_size=8, dtype="bfloat16"),
            words=dict(width=384, depth=6, heads=6, mlp_dim=1536, dtype="bfloat16"),
            settings=dict(steps=20_000, batch=512, lr=5e-4),
        ),
    )  # fmt: skip


# -------------------------------------------------------------------------------------------------------- as published


def _paper():
    """256 pixels, 256 words and 1024 tokens, 12B parameters, 250M pairs of pictures and captions.

    Point it at your data: --config.stages.STAGE.data.source=webdataset:GLOB (or arrayrecord:GLOB, tfds:NAME) of both.
    The released autoencoder in the place of one trained here: --config.stages.prior.init="{'tokenizer/encoder':
    {'file': 'encoder.pkl', 'reader': 'vgen.convert.load:params'}, 'tokenizer/decoder': ...}", and order=('prior',).
    What differs: the autoencoder's learning rate falls over all steps, not the first 1.2M, the transformer's is not
    halved by hand; no dropout of words' parts in the tokenizer of texts; pictures are as they come: to choose among 512
    by CLIP, train a stage of Contrastive on the same texts' tokens, as `mini` does, and name it in generate.choose.
    """
    from vgen.models import dvae, gpt

    tokenizer = _dvae(**dvae.DALL_E, dtype="bfloat16")
    text = dict(length=256, vocab_size=16_384)
    data = dict(source="webdataset:SET_ME/*.tar", size=256, crop="random_crop", workers=16, prefetch=2)
    held_out = dict(split="heldout", crop="center_crop", batches=16)
    kept = dict(checkpoint_every=5000, keep_every=50_000, log_every=100)
    first = dict(
        task=dict(target="vgen.tasks.autoencode:Autoencode", model=tokenizer, kl=6.6, kl_steps=5000,
                  temperature=(1.0, 1 / 16, 150_000), **BOUND),
        data=dict(data, text=False), evaluate=dict(held_out),
        train=dict(steps=3_000_000, batch_size=512, ema_decay=0.999,
                   optim=dict(gen=dict(lr=1e-4, end=0.0125, weight_decay=1e-4)), **kept),
    )  # fmt: skip
    net = _gpt(tokenizer, 32, text, **gpt.DALL_E, remat="full", dtype="bfloat16")
    optim = dict(lr=4.5e-4, b2=0.96, weight_decay=0.045, warmup=5000, clip=4.0, kind="constant")
    second = dict(
        task=dict(target="vgen.tasks.autoregressive:Autoregressive", network=net, tokenizer=tokenizer, size=256,
                  text=True, text_weight=1 / 8),
        data=dict(data), evaluate=dict(held_out),
        train=dict(steps=430_000, batch_size=1024, ema_decay=0.9996, optim=dict(main=optim), frozen_dtype="bfloat16",
                   **kept),
        init=dict(tokenizer=dict(stage="tokenizer")),
    )  # fmt: skip
    return dict(
        stages=dict(tokenizer=first, prior=second), order=("tokenizer", "prior"),
        mesh=dict(data=-1, fsdp=64), topology="v4:4x8x8",
        text=recipes.bpe(**text),
        generate=recipes.generate("prior", batch_size=16, temperature=1.0, top_k=0, top_p=1.0),
        prompts=recipes.PROMPTS,
    )  # fmt: skip
