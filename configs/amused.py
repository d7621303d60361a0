"""aMUSEd: an open MUSE reproduction.

Paper
  Patil, Berman, Rombach, von Platen, 2024, arXiv:2401.01808. Weights: amused/amused-256 on the Hugging Face hub;
  training code: huggingface/amused and diffusers.

Parts
  tokenizer  VQGAN (models/vqgan.py), objective tasks/autoencode.py
  generator  UVit (models/uvit.py): tokens from a text, in two forms, and from the picture's size, in one resolution;
             objective and sampling tasks/amused.py
  text       CLIP-L/14 (models/clip.py), frozen, at `paper`; elsewhere a small tower, trained with the generator

Commands
  python -m vgen.main --config=configs/amused.py --workdir=runs/amused
  python -m vgen.main --config=configs/amused.py --workdir=runs/amused --mode=sample --prompt="a red circle"
  (with --image=in.png --mask=mask.png: inpainting and outpainting; with --image alone: mask-free editing)
  python -m vgen.main --config=configs/amused.py --workdir=runs/amused --mode=eval
  The published amused-256, of which FOLDER holds the repository's files; nothing is trained first:
  python -m vgen.main --config=configs/amused.py:paper --workdir=DIR --config.weights=FOLDER \\
    --mode=sample --prompt="a lighthouse on a cliff"
  Fine-tune it on your pictures, with the published settings:
  python -m vgen.main --config=configs/amused.py:paper --workdir=DIR2 --config.weights=FOLDER \\
    --config.stages.generator.train.steps=1000 --config.stages.generator.data.source=folder:PICTURES

Published numbers
  Parameters: UVit 603M (608M at 512 px), tokenizer 146M; a tenth of Muse's.
  Sampling: 12 steps, guidance 10. Fine-tuning at 256 px: batch 8, learning rate 1e-4, "decent" after 750 to 1000 steps.

Measured numbers
  None yet: no scale has been trained to its end.
"""

from ml_collections import ConfigDict, FieldReference

from vgen import recipes

SCALES = ("tiny", "mini", "small", "paper")

PUBLISHED = dict(transformer=603_537_664, tokenizer=146_244_675, text_encoder=123_650_304)  # counted in their classes


def get_config(scale: str = "mini") -> ConfigDict:
    """The config of one scale: tiny (tests), mini (two CPU cores, minutes), small (one accelerator), paper."""
    makers = dict(tiny=_tiny, mini=_mini, small=_small, paper=_paper)
    return recipes.system("amused", scale, makers, PUBLISHED)


# ------------------------------------------------------------------------------------------------------ small worlds


def _world(
    *, size, world, eval_count, sizes, autoencoder, generator, text, net, knobs, prompts, eval_prompts,
    cached=0, discriminator=None, dtype=None, free=None, asked=None, scales=(),
):  # fmt: skip
    """Both stages on scenes of `size` pixels.

    sizes: arguments of VQGAN.  autoencoder: of `recipes.autoencoder`.  generator: of `recipes.train`.  free, asked:
    worlds of the tokenizer's pictures and of the evaluation, `world` both by default.
    text: length and vocab_size of the texts.
    scales: of guidance, to be measured.
    net: arguments of UVit; the text tower has the width and the heads of its transformer, and two layers.
    """
    tokenizer, loose = recipes.vqgan(**sizes), free or world
    grid = (size // recipes.pixels_per_token(sizes),) * 2
    width, codes = net["width"], sizes["num_codes"]
    transformer = dict(
        target="vgen.models.uvit:UVit", vocab=codes, ids=codes + 1, grid=grid, embed_dim=net["channels"],
        text_width=width, pooled_width=width, micro_width=16, dtype=dtype, **net,
    )  # fmt: skip
    # Branches that start small: the words, of scale 0.02, would drown in those of full size.
    tower = dict(
        target="vgen.models.clip:TextTower", vocab=text["vocab_size"], length=text["length"], depth=2, width=width,
        heads=net["heads"], mlp_dim=2 * width, features=width, eos=1, layer_scale=0.05, dtype=dtype,
    )  # fmt: skip
    task = dict(
        target="vgen.tasks.amused:Amused", transformer=transformer, tokenizer=tokenizer, text_encoder=tower, size=size,
        train_text=True, label_smoothing=0.0, empty=(1,), pad_id=0,
    )  # fmt: skip
    stages = dict(
        tokenizer=recipes.autoencoder(
            tokenizer, data=recipes.scenes(size, loose), evaluate=recipes.held_out(loose, eval_count, batches=8),
            discriminator=discriminator, **autoencoder,
        ),
        generator=dict(
            task=task, data=recipes.scenes(size, world, cached=cached), evaluate=recipes.held_out(world, eval_count),
            train=recipes.train(**generator),
            init=dict(tokenizer=dict(stage="tokenizer", without="discriminator|lpips")),
        ),
    )  # fmt: skip
    return dict(
        stages=stages,
        order=("tokenizer", "generator"),
        text=recipes.bpe(**text),
        generate=_generate(**knobs),
        eval=recipes.scene_eval(asked or world, eval_prompts, scales=scales),
        prompts=prompts,
    )


def _generate(*, batch_size, steps=12, guidance=10.0):
    knobs = dict(steps=steps, guidance_scale=guidance, temperature=1.0, choice_temperature=2.0)
    return recipes.generate("generator", batch_size=batch_size, **knobs)


def _tiny():
    return _world(
        size=16, world=recipes.WORLD, eval_count=16,
        sizes=recipes.TOKENIZERS["tiny"] | dict(multipliers=(1,), patch=4),
        autoencoder=dict(steps=2, batch=8, lr=1e-3, **recipes.TOKENIZER_LOSSES["tiny"]),
        generator=dict(steps=2, batch=8, lr=1e-3),
        text=dict(length=24, vocab_size=320),
        net=dict(depth=1, width=32, heads=2, mlp_dim=32, channels=16, res_blocks=1, block_heads=2),
        knobs=dict(batch_size=8, steps=3), eval_prompts=8, prompts=recipes.PROMPTS[:2],
    )  # fmt: skip


def _mini():
    return _world(
        size=32, world=recipes.TOLD, free=recipes.FREE, asked=recipes.LATTICE, cached=60_000, eval_count=512,
        sizes=recipes.TOKENIZERS["mini"],
        autoencoder=dict(steps=2000, batch=16, lr=3e-3, **recipes.TOKENIZER_LOSSES["mini"]),
        generator=dict(steps=2500, batch=32, lr=2e-3, optim=dict(name="muon", weight_decay=0.5)),
        text=dict(length=20, vocab_size=512),
        net=dict(depth=3, width=128, heads=4, mlp_dim=256, channels=64, res_blocks=3, block_heads=2, unroll=3),
        knobs=dict(batch_size=64, guidance=2.0), scales=(1.5, 3.0), eval_prompts=256, prompts=recipes.PROMPTS,
    )  # fmt: skip


def _small():
    """One accelerator, minutes: the whole world of scenes at 128 pixels, a grid of tokens as large as the published."""
    return _world(
        size=128, world={}, cached=200_000, eval_count=2048, sizes=recipes.TOKENIZERS["small"], dtype="bfloat16",
        autoencoder=dict(steps=20_000, batch=128, lr=5e-4, **recipes.TOKENIZER_LOSSES["small"]),
        generator=dict(steps=30_000, batch=256, lr=5e-4),
        text=dict(length=64, vocab_size=512),
        net=dict(depth=12, width=512, heads=8, mlp_dim=1408, channels=384, res_blocks=3, block_heads=6),
        discriminator=recipes.discriminator(channels=64, layers=2, norm="group"),
        knobs=dict(batch_size=64, guidance=3.0), eval_prompts=1024, prompts=recipes.PROMPTS,
    )  # fmt: skip


# -------------------------------------------------------------------------------------------------------- as published


def _paper():
    """The published amused-256, all of it imported from the folder --config.weights.

    `train` and the task's text_drop hold the published settings of fine-tuning (diffusers, examples/amused), which
    --config.stages.generator.train.steps=1000 turns on; point stages.generator.data at your pictures for it.  The 512
    pixel model: the values of models/uvit.py:AMUSED_512 for the transformer, and size=512 for task and data.
    """
    weights = FieldReference("SET_WEIGHTS")  # what refers to it changes with --config.weights
    layout = dict(target="vgen.models.vqgan:Layout", mid_attention=False)
    tokenizer = recipes.vqgan(
        channels=128, multipliers=(1, 2, 2, 4, 6), blocks=2, latent_channels=64, num_codes=8192, code_dim=64,
        layout=layout, image_range=(0.0, 1.0), legacy=True,
    )  # fmt: skip
    tower = dict(
        target="vgen.models.clip:TextTower", width=768, depth=12, heads=12, mlp_dim=3072, features=768, vocab=49_408,
        length=77,
    )  # fmt: skip
    task = dict(
        target="vgen.tasks.amused:Amused", transformer=dict(target="vgen.models.uvit:UVit", grid=(16, 16)),
        tokenizer=tokenizer, text_encoder=tower, size=256, label_smoothing=0.0, text_drop=0.0,
    )  # fmt: skip
    optim = dict(main=dict(lr=1e-4, kind="constant", weight_decay=0.01))
    generator = dict(
        task=task,
        data=dict(source="scenes", size=256),  # until there are pictures to train on, any will do
        train=dict(steps=0, batch_size=8, optim=optim, checkpoint_every=500),
        init=recipes.imported(weights, transformer="transformer", tokenizer="vqvae", text_encoder="text_encoder"),
    )
    return dict(
        weights=weights,
        stages=dict(generator=generator),
        order=("generator",),
        text=dict(kind="clip", length=77, path=weights + "/tokenizer"),
        generate=_generate(batch_size=4),
        prompts=("a lighthouse on a cliff at sunset", "a bowl of oranges, oil painting"),
        topology="v4:2x2x1",
    )
