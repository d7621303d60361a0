"""BLIP: a network that matches pictures with texts, tells which belong together, and says what is on a picture.

Paper
  Li, Li, Xiong, Hoi, 2022, BLIP: bootstrapping language-image pre-training, arXiv:2201.12086.
  Code and weights: salesforce/BLIP; Salesforce/blip-image-captioning-* on the Hugging Face hub (`vgen.load`).

Parts
  blip       Captioner (models/blip.py): a ViT and a BERT that looks at it, whose self-attention is causal for writing
             and another one, looking both ways, for matching; three losses (ITC, ITM, LM); tasks/caption.py
  caption    (paper, imported) the captioner alone, on larger pictures, by its next words
  captions   beam search (tokens/beam.py) or nucleus sampling (tokens/words.py)

Commands
  python -m vgen.main --config=configs/blip.py --workdir=runs/blip
  Caption a picture, or all of a folder (by nucleus sampling with the last line):
  python -m vgen.main --config=configs/blip.py --workdir=runs/blip --mode=sample --image=in.png \\
    --config.generate.task="{'blip': {'decode': 'nucleus'}}"
  Which captions of held-out scenes are true (metrics/caption_eval.py):
  python -m vgen.main --config=configs/blip.py --workdir=runs/blip --mode=eval
  The published captioner, of which FOLDER holds Salesforce/blip-image-captioning-base:
  python -m vgen.main --config=configs/blip.py:imported --workdir=DIR --config.weights=FOLDER \\
    --mode=sample --image=in.jpg
  python -m vgen.main --config=configs/blip.py:paper --workdir=DIR (your data: see `_paper`)

Published numbers
  Captioners: base 224.0M parameters (86.1M of the ViT, 137.9M of the decoder), large 446.3M (303.7M, 142.6M).
  COCO, CIDEr: base (CapFilt-L, 129M pictures) 133.3, large 136.7.

Measured numbers
  mini, 22 minutes of one CPU core beside other work.  Captions of 256 scenes by beam search, of pairs that training
  shows: all understood, colour, shape and count 1.00, relation 0.98, all of it true in 0.988; of pairs that it never
  shows 0.996, 1.00, 0.61, 0.95, 0.73 and 0.39.  With relations told at random and objects anywhere, and without weight
  decay: relation 0.46, all true 0.71; of pairs never shown shape 0.39, all true 0.12.
"""

from ml_collections import ConfigDict, FieldReference

from vgen import recipes

SCALES = ("tiny", "mini", "small", "paper", "imported")

PUBLISHED = dict(network=223_971_644, cider=dict(base=133.3, large=136.7))

# Ids of BERT's words in the published networks: [DEC], [ENC], [CLS], [SEP], and "a picture of".
BERT = dict(start=30_522, end=102, led=True, length=20, least=5)
ENCODER = dict(encoder_start=30_523, text_start=101)
A_PICTURE_OF = (1037, 3861, 1997)


def get_config(scale: str = "mini") -> ConfigDict:
    """The config of one scale: tiny (tests), mini (two CPU cores, minutes), small (one accelerator), paper, imported.

    paper trains as published; imported is the published captioner.
    """
    makers = dict(tiny=_tiny, mini=_mini, small=_small, paper=_paper, imported=_imported)
    return recipes.system("blip", scale, makers, PUBLISHED)


def _generate(stage, batch_size):
    """Of beam search; the factor on what was said is the authors' of nucleus sampling, 1.1, where that is chosen."""
    return recipes.generate(
        stage, batch_size=batch_size, temperature=1.0, top_p=0.9, repetition=1.0, length_penalty=1.0
    )


# ------------------------------------------------------------------------------------------------------ small worlds


def _world(*, size, world, eval_count, text, image, words, settings, pictures, cached=0, features=128):
    """Scenes and their captions.  image: arguments of ViT.  words: of Bert.  The BPE's ids are followed by three of our
    own, that texts begin with.
    """
    first = text["vocab_size"]
    vision = dict(target="vgen.models.vit:ViT", image_size=size, **image)
    decoder = dict(
        target="vgen.models.bert:Bert", vocab=first + 3, max_length=text["length"] + 1, cross=True, head=True, **words
    )
    task = dict(
        target="vgen.tasks.caption:Blip", size=size, start=first, encoder_start=first + 1, text_start=first + 2, end=1,
        length=text["length"] + 1, features=features, smoothing=0.1,
        network=dict(target="vgen.models.blip:Captioner", vision=vision, decoder=decoder),
    )  # fmt: skip
    stage = dict(
        task=task, data=recipes.scenes(size, world, cached=cached), evaluate=recipes.held_out(world, eval_count),
        train=recipes.train(**settings),
    )  # fmt: skip
    measure = dict(target="vgen.metrics.caption_eval:CaptionQuality", world=world, pictures=pictures)
    return dict(
        stages=dict(blip=stage), order=("blip",), text=recipes.bpe(**text), eval=measure, generate=_generate("blip", 32)
    )


def _tiny():
    tower = dict(width=16, depth=1, heads=2, mlp_dim=32)
    return _world(
        size=16, world=recipes.WORLD, eval_count=16, text=dict(length=24, vocab_size=320), features=16,
        image=dict(tower, patch_size=4), words=tower, settings=dict(steps=2, batch=8, lr=1e-3), pictures=8,
    )  # fmt: skip


def _mini():
    return _world(
        size=32, world=recipes.TOLD, cached=60_000, eval_count=512, text=dict(length=20, vocab_size=512),
        image=dict(width=128, depth=4, heads=4, mlp_dim=512, patch_size=4, unroll=4),
        words=dict(width=128, depth=2, heads=4, mlp_dim=512, unroll=2),
        settings=dict(steps=1800, batch=64, lr=2e-3, optim=dict(name="muon", weight_decay=0.5)), pictures=256,
    )  # fmt: skip


def _small():
    """One accelerator: towers of ViT-S's size on the whole world of scenes at 64 pixels."""
    from vgen.models import vit

    return _world(
        size=64, world={}, cached=200_000, eval_count=2048, text=dict(length=64, vocab_size=512), features=256,
        image=dict(vit.SMALL, patch_size=8, dtype="bfloat16"),
        words=dict(width=384, depth=6, heads=6, mlp_dim=1536, dtype="bfloat16"),
        settings=dict(steps=20_000, batch=256, lr=3e-4), pictures=1024,
    )  # fmt: skip


# -------------------------------------------------------------------------------------------------------- as published


def _captioner(image_size, **run):
    return dict(target="vgen.models.blip:captioner", size="base", image_size=image_size, **run)


def _paper():
    """14M pictures for 20 epochs at 224 pixels in batches of 2880, then COCO's captions for 5 at 384, with a prompt.

    Point both stages at your data: --config.stages.blip.data.source=webdataset:GLOB (or arrayrecord:GLOB, tfds:NAME),
    --config.stages.caption.data.source=...; --config.text.path is the folder of a BERT (bert-base-uncased).  The
    authors begin with an ImageNet ViT and that BERT, decay the rate by 0.9 an epoch, where this is linear, and change
    pictures by RandAugment without colours.
    """
    adam, run = dict(lr=3e-4, kind="linear", warmup=3000, weight_decay=0.05), dict(remat="full", dtype="bfloat16")
    operations = ("auto_contrast", "equalize", "brightness", "sharpness", "shear_x", "shear_y", "translate_x",
                  "translate_y", "rotate")  # fmt: skip
    augment = dict(target="vgen.data.augment:RandAugment", layers=2, magnitude=5.0, operations=operations)
    first = dict(
        task=dict(target="vgen.tasks.caption:Blip", network=_captioner(224, **run), size=224, smoothing=0.1, **BERT,
                  **ENCODER),
        data=dict(source="webdataset:SET_ME/*.tar", size=224, crop="inception_crop", crop_scale=(0.5, 1.0), flip=True,
                  augment=augment, workers=16),
        evaluate=dict(split="heldout", crop="center_crop", crop_scale=(), flip=False, augment={}, batches=4),
        train=dict(steps=20 * 14_000_000 // 2880, batch_size=2880, optim=dict(main=adam), checkpoint_every=2000,
                   keep_every=20_000, log_every=100),
    )  # fmt: skip
    tuned = dict(
        task=dict(target="vgen.tasks.caption:Caption", network=_captioner(384, **run), size=384, smoothing=0.1,
                  prompt=A_PICTURE_OF, **BERT),
        data=first["data"] | dict(size=384),
        evaluate=first["evaluate"] | dict(crop="resize"),
        train=dict(steps=5 * 567_000 // 256, batch_size=256, checkpoint_every=1000, log_every=100,
                   optim=dict(main=dict(lr=1e-5, weight_decay=0.05))),
        init=dict(network=dict(stage="blip", part="network", through="vgen.models.blip:for_384_pixels")),
    )  # fmt: skip
    return dict(
        stages=dict(blip=first, caption=tuned), order=("blip", "caption"),
        mesh=dict(data=-1, fsdp=8), topology="v4:2x4x4",
        text=dict(kind="bert", length=30, path=""), generate=_generate("caption", 16),
    )  # fmt: skip


def _imported():
    """Salesforce/blip-image-captioning-base from the folder --config.weights; data tell shapes alone."""
    weights = FieldReference("SET_WEIGHTS")
    stage = dict(
        task=dict(target="vgen.tasks.caption:Caption", network=_captioner(384), size=384, **BERT),
        data=dict(source="scenes", size=384), train=dict(steps=0, batch_size=4, optim=dict(main=dict(lr=1e-5))),
        init=recipes.imported(weights, network=""),
    )  # fmt: skip
    return dict(
        weights=weights, stages=dict(caption=stage), order=("caption",), generate=_generate("caption", 1),
        text=dict(kind="bert", length=20, path=weights + ""),
    )  # fmt: skip
