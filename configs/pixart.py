"""PixArt-alpha: a DiT that has learned pictures by class learns to read text, at a tenth of the usual cost.

Paper
  Chen et al. 2023, PixArt-alpha: fast training of diffusion transformer for photorealistic text-to-image synthesis,
  arXiv:2310.00426. Code and weights: PixArt-alpha/PixArt-alpha, PixArt-alpha/PixArt-XL-2-1024-MS on the Hugging Face
  hub.

Parts
  vae        AutoencoderKL (models/autoencoder.py): Stable Diffusion's at `paper`, elsewhere trained first, but for
             `tiny`, whose patches are of pixels
  pixels     DiT (models/dit.py), told of classes: where objects and colours are learned; tasks/diffuse.py
  alignment  PixArt (models/pixart.py), begun with the DiT's weights (`from_dit`): where text is learned
  quality    the same on fewer, better pictures; at `paper`, where quality_512 and quality_1024 follow, on pictures of
             all shapes (data/buckets.py)
  cache      what vae and T5 say, computed once ahead of the stages of `paper` (features.py); at `small` the latents
  text       T5-XXL (models/t5.py), frozen, at `paper` and `imported`; elsewhere a small transformer, trained along

Commands
  python -m vgen.main --config=configs/pixart.py --workdir=runs/pixart
  python -m vgen.main --config=configs/pixart.py --workdir=runs/pixart --mode=sample --prompt="a red circle"
  (with --image=in.png: SDEdit, with --mask=mask.png too: replacement of what is known)
  python -m vgen.main --config=configs/pixart.py --workdir=runs/pixart --mode=eval
  The published model at 1024 pixels, of which FOLDER holds diffusers' files; nothing is trained first. Its texts were
  all in small letters:
  python -m vgen.main --config=configs/pixart.py:imported --workdir=DIR --config.weights=FOLDER \\
    --mode=sample --prompt="a lighthouse on a cliff"
  The published stages with your data (vae and T5 come from FOLDER): see `_paper`
  python -m vgen.main --config=configs/pixart.py:paper --workdir=DIR --config.weights=FOLDER

Published numbers
  611M parameters; a modulation in every block would make it 833M.
  COCO, zero-shot: FID 7.32 after 675 A100-days, 11 % of Stable Diffusion 1.5's. T2I-CompBench: colour 0.689, shape
  0.558, texture 0.704. Sampling: DPM-Solver++, 20 steps, guidance 4.5.

Measured numbers
  mini, 37 minutes of one CPU core beside other work: 1800 steps for the vae, 800 by class, 2200 by text, evaluation.
  256 held-out prompts, of pairs that neither stage has seen, seed 0, 20 steps, read by the scene oracle:
    guidance off  colour 0.84  shape 0.73  relation 0.71  scene_exact 0.55
    1.5           colour 0.88  shape 0.82  relation 0.76  scene_exact 0.70
    2 (default)   colour 0.90  shape 0.86  relation 0.81  scene_exact 0.76
    3             colour 0.91  shape 0.87  relation 0.82  scene_exact 0.78
    4.5           colour 0.91  shape 0.81  relation 0.81  scene_exact 0.68
  Beside a U-Net at equal compute, `python -m vgen.bench curves
  --workdir=DIR --budget 0.5` (3 TFLOP of gradients each, the same latents, flow and optimiser, told a text): held-out
  loss at 25, 50, 75, 100 %:
    U-Net   106 steps of 28.4 GFLOP  1.208  0.798  0.657  0.616
    PixArt  111 steps of 27.1 GFLOP  1.484  1.257  1.108  1.005
"""

from ml_collections import ConfigDict, FieldReference

from vgen import recipes
from vgen.data import scenes

SCALES = ("tiny", "mini", "small", "paper", "imported")

PUBLISHED = dict(network=611_349_152, text_encoder=4_762_310_656, vae=83_653_863, fid=7.32)  # at 1024 pixels


def get_config(scale: str = "mini") -> ConfigDict:
    """The config of one scale: tiny (tests), mini (two CPU cores, minutes), small (one accelerator), paper, imported.

    paper trains as published, up to 1024 pixels; imported is the published checkpoint of 1024 pixels.
    """
    makers = dict(tiny=_tiny, mini=_mini, small=_small, paper=_paper, imported=_imported)
    return recipes.system("pixart", scale, makers, PUBLISHED)


def _diffuse(max_steps=999, **kwargs):
    """Settings of Diffuse that all stages share."""
    return dict(
        schedule=recipes.schedule("linear"), variance="learned_range", solver="dpmpp_2m", max_steps=max_steps, **kwargs
    )


def _from_dit(stage):
    """A stage's `init` entry: what a DiT brings into a PixArt."""
    return dict(stage=stage, part="network", through="vgen.models.pixart:from_dit")


def _generate(stage, batch_size, guidance, steps=20):
    return recipes.generate(stage, batch_size=batch_size, steps=steps, guidance_scale=guidance, strength=0.6)


# ------------------------------------------------------------------------------------------------------ small worlds


def _world(
    *, size, world, eval_count, net, text, encoder, pixels, alignment, batch_size, guidance, eval_prompts, prompts,
    vae=None, autoencoder=None, cached=0, scales=(), vae_world=None, asked_world=None, **diffuse,
):  # fmt: skip
    """Scenes of `size` pixels: first by the class of one object, of pairs that training may see, then by text.

    net: arguments of DiT and of PixArt.  encoder: of TextTransformer.  pixels, alignment: of `recipes.train`.
    vae: of AutoencoderKL, None for patches of pixels.  autoencoder: settings of `recipes.autoencoder`.
    guidance, scales: of guidance, the scale to sample with and those to be measured.  vae_world, asked_world: see
    `recipes.text_unet`.  diffuse: further arguments of Diffuse.
    """
    one = dict(world, max_objects=1)
    classes = len(scenes.classes(scenes.World(**one), "pair"))
    channels = vae["latent_channels"] if vae else 3
    per_latent = vae.get("patch", 1) * 2 ** (len(vae["multipliers"]) - 1) if vae else 1
    shape = dict(in_channels=channels, out_channels=2 * channels, sample_size=size // per_latent, **net)
    dit = dict(target="vgen.models.dit:DiT", num_classes=classes, **shape)
    reader = dict(target="vgen.models.text:TextTransformer", length=text["length"], vocab=text["vocab_size"], **encoder)
    network = dict(
        target="vgen.models.pixart:PixArt", context_width=encoder["width"], null_tokens=text["length"], **shape
    )
    common = dict(eval_count=eval_count, vae=vae, autoencoding=autoencoder, cached=cached, vae_world=vae_world)
    first = recipes.diffusion(
        "pixels", _diffuse(network=dit, size=size, classes=classes, **diffuse), world=one, settings=pixels,
        labels="pair", **common,
    )  # fmt: skip
    first["stages"]["pixels"]["evaluate"] = {}  # its held-out classes are those that it has never been told
    second = recipes.diffusion(
        "alignment", _diffuse(network=network, size=size, text_encoder=reader, train_text=True, **diffuse), world=world,
        settings=alignment, **common,
    )  # fmt: skip
    stages = first["stages"] | second["stages"]
    stages["pixels"]["data"] |= dict(text=False)
    stages["alignment"].setdefault("init", {})["network"] = _from_dit("pixels")
    return dict(
        stages=stages,
        order=(*second["order"][:-1], "pixels", "alignment"),
        text=recipes.bpe(**text),
        generate=_generate("alignment", batch_size, guidance),
        eval=recipes.scene_eval(asked_world or world, eval_prompts, off=1.0, scales=scales),
        prompts=prompts,
    )


def _tiny():
    return _world(
        size=16, world=recipes.WORLD, eval_count=16, net=dict(depth=1, width=16, heads=2, patch_size=4),
        text=dict(length=24, vocab_size=320), encoder=dict(depth=1, width=16, heads=2, mlp_dim=16),
        pixels=dict(steps=2, batch=8, lr=1e-3), alignment=dict(steps=2, batch=8, lr=1e-3),
        batch_size=8, guidance=2.0, eval_prompts=8, prompts=recipes.PROMPTS[:2],
    )  # fmt: skip


def _mini():
    """Of v where the paper has eps, as in configs/adm.py."""
    return _world(
        size=32, world=recipes.TOLD, vae_world=recipes.FREE, asked_world=recipes.LATTICE, cached=60_000, eval_count=512,
        vae=recipes.KL["mini"], autoencoder=recipes.AUTOENCODING["mini"], prediction="v",
        net=dict(depth=6, width=192, heads=6, patch_size=1),
        text=dict(length=20, vocab_size=512), encoder=dict(depth=0, width=128, heads=4, mlp_dim=256),
        pixels=dict(steps=800, batch=32, lr=2e-3, optim=dict(name="muon")),
        alignment=dict(steps=2200, batch=32, lr=2e-3, optim=dict(name="muon")),
        batch_size=64, guidance=2.0, scales=(1.5, 3.0, 4.5), eval_prompts=256, prompts=recipes.PROMPTS,
    )  # fmt: skip


def _small():
    """One accelerator: a network of DiT-S's size on 16 x 16 latents of the whole world."""
    from vgen.models import dit

    config = _world(
        size=128, world={}, cached=200_000, eval_count=2048,
        vae=recipes.KL["small"], autoencoder=recipes.AUTOENCODING["small"],
        net=dict(dit.SMALL, patch_size=2, dtype="bfloat16"),
        text=dict(length=64, vocab_size=512), encoder=dict(depth=4, width=512, heads=8, mlp_dim=2048, dtype="bfloat16"),
        pixels=dict(steps=20_000, batch=256, lr=4e-4), alignment=dict(steps=60_000, batch=256, lr=4e-4),
        batch_size=64, guidance=3.0, scales=(1.5, 2.0, 4.5), eval_prompts=1024, prompts=recipes.PROMPTS,
    )  # fmt: skip
    for name in ("pixels", "alignment"):
        config["stages"][name]["cache"] = dict(features=("latents",))
    return config


# -------------------------------------------------------------------------------------------------------- as published


def _train(steps, batch_size):
    optim = dict(main=dict(lr=2e-5, kind="constant", weight_decay=0.03, clip=0.01, warmup=1000))
    return dict(
        steps=steps, batch_size=batch_size, optim=optim, ema_decay=0.9999, frozen_dtype="bfloat16",
        checkpoint_every=1000, keep_every=10_000, log_every=100,
    )  # fmt: skip


def _t5():
    from vgen.models import t5

    return dict(target="vgen.models.t5:T5Encoder", **t5.XXL, dtype="bfloat16")


def _paper():
    """ImageNet by class, pictures of SAM with long captions, and the best of them, at 256 pixels and then larger.

    ImageNet is TensorFlow Datasets'; for the others set --config.stages.alignment.data.source and that of the quality
    stages (webdataset:GLOB, arrayrecord:GLOB, folder:DIR).  Vae and T5 come from the folder --config.weights of a
    published PixArt; they run over all pictures and texts once, ahead of each stage, as the authors' do (T5's states
    are 1 MB a picture).  Above 256 pixels, pictures keep their shapes: 40 sizes of about as many pixels.
    """
    from vgen.models import autoencoder, dit, pixart

    weights = FieldReference("SET_WEIGHTS")  # what refers to it changes with --config.weights
    vae = dict(target="vgen.models.autoencoder:AutoencoderKL", dtype="bfloat16", **autoencoder.KL_F8)
    sizes = dict(dit.XLARGE, remat="full", dtype="bfloat16")
    by_class = _diffuse(
        target="vgen.tasks.diffuse:Diffuse", size=256, vae=vae, classes=1000,
        network=dict(target="vgen.models.dit:DiT", **sizes),
    )  # fmt: skip
    network = dict(target="vgen.models.pixart:PixArt", **sizes, **pixart.ALPHA_256)
    by_text = _diffuse(
        target="vgen.tasks.diffuse:Diffuse", size=256, vae=vae, network=network, text_encoder=_t5(),
    )  # fmt: skip
    cache = dict(features=("latents", "text"))
    texts = recipes.imported(weights, vae="vae", text_encoder="text_encoder")
    data = dict(source="webdataset:SET_ME/*.tar", size=256, crop="center_crop", workers=16)
    stages = dict(
        pixels=dict(
            task=by_class, train=_train(300_000, 1024), init=recipes.imported(weights, vae="vae"),
            data=dict(source="tfds:imagenet2012", size=256, crop="center_crop", flip=True, workers=16, text=False),
            evaluate=dict(split="validation", flip=False, batches=16),
        ),
        alignment=dict(
            task=by_text, train=_train(150_000, 11_392), init=texts | dict(network=_from_dit("pixels")), data=data,
            cache=dict(cache),
        ),
        quality=dict(
            task=by_text, train=_train(90_000, 11_392), data=dict(data), cache=dict(cache),
            init=texts | dict(network=dict(stage="alignment", part="network")),
        ),
    )  # fmt: skip
    before, above = "quality", [(512, pixart.ALPHA_512, 100_000, 2560), (1024, pixart.ALPHA_1024, 16_000, 384)]
    for side, published, steps, batch in above:
        larger = dict(size=side, network=dict(network, **published), micro="size" if "micro" in published else "none")
        # `dict` takes what is there: the embeddings of size and shape are new at 1024 pixels
        start = dict(stage=before, part="network", through="builtins:dict")
        stages[before := f"quality_{side}"] = dict(
            task=by_text | larger, train=_train(steps, batch), data=dict(data, size=side, buckets=side),
            cache=dict(cache), init=texts | dict(network=start),
        )  # fmt: skip
    return dict(
        weights=weights, stages=stages, order=tuple(stages), mesh=dict(data=-1, fsdp=8), topology="v4:4x4x4",
        text=dict(kind="t5", length=120, path=weights + "/tokenizer"), generate=_generate(before, 4, 4.5),
        prompts=("a lighthouse on a cliff at sunset", "a bowl of oranges, oil painting"),
    )  # fmt: skip


def _imported():
    """PixArt-XL-2-1024-MS from the folder --config.weights; nothing is trained, data tell shapes alone.

    All weights are held in bfloat16, or T5 alone would take 19 GB.
    """
    from vgen.models import autoencoder, pixart

    weights = FieldReference("SET_WEIGHTS")
    network = dict(pixart.ALPHA_1024, null_tokens=0)  # diffusers' files have none: the empty text stands for no text
    task = _diffuse(
        target="vgen.tasks.diffuse:Diffuse", size=1024, micro="size", text_encoder=_t5(),
        network=dict(target="vgen.models.pixart:PixArt", **network),
        vae=dict(target="vgen.models.autoencoder:AutoencoderKL", **autoencoder.KL_F8),
    )  # fmt: skip
    stage = dict(
        task=task, data=dict(source="scenes", size=512, buckets=1024), train=_train(0, 4),
        init=recipes.imported(weights, network="transformer", vae="vae", text_encoder="text_encoder"),
    )  # fmt: skip
    return dict(
        weights=weights, stages=dict(quality=stage), order=("quality",),
        text=dict(kind="t5", length=120, path=weights + "/tokenizer"), generate=_generate("quality", 1, 4.5),
        prompts=("a lighthouse on a cliff at sunset", "a bowl of oranges, oil painting"),
    )  # fmt: skip
