"""DiT: a plain transformer on patches of latents denoises them, told of time and class by its norms.

Paper
  Peebles, Xie, 2022, Scalable diffusion models with transformers, arXiv:2212.09748. Code: facebookresearch/DiT,
  weights: facebook/DiT-XL-2-256 and -512 on the Hugging Face hub.

Parts
  vae        AutoencoderKL (models/autoencoder.py): Stable Diffusion's at `paper`, elsewhere trained first, but for
             `tiny`, whose patches are of pixels
  dit        DiT (models/dit.py) with a learned variance; objective and sampling tasks/diffuse.py

Commands
  python -m vgen.main --config=configs/dit.py --workdir=runs/dit
  python -m vgen.main --config=configs/dit.py --workdir=runs/dit --mode=sample --prompt=0 --prompt=5
  (a prompt is the number of a class: place of the colour times 4, the number of shapes, plus place of the shape, both
  as in recipes.CLASSES; with --image=in.png: SDEdit, with --mask=mask.png too: replacement of what is known)
  python -m vgen.main --config=configs/dit.py --workdir=runs/dit --mode=eval
  By DDIM in 50 steps: --steps=50 --config.generate.task="{'dit': {'solver': 'ddim', 'solver_knobs': {}}}"
  The published DiT-XL/2, of which FOLDER holds the repository's files; nothing is trained first:
  python -m vgen.main --config=configs/dit.py:imported --workdir=DIR --config.weights=FOLDER \\
    --mode=sample --prompt=207 --guidance_scale=4
  Train it as published (the vae comes from FOLDER, ImageNet from TensorFlow Datasets):
  python -m vgen.main --config=configs/dit.py:paper --workdir=DIR --config.weights=FOLDER

Published numbers
  DiT-XL/2: 675M parameters, 118.6 GFLOPs; S/2 33M, B/2 130M, L/2 458M.
  ImageNet 256, 250 DDPM steps, 7M training steps of 256: FID 9.62, with guidance 1.5 2.27. At 512: 3.04.
  After 400k steps: S/2 68.4, B/2 43.5, L/2 23.3, XL/2 19.5.

Measured numbers
  mini, 34 minutes of one CPU core beside other work, 2600 steps of 32 and evaluation included.  Of 240 pictures, 10 of
  a class, seed 0, 50 steps, 0.413 show the object asked for and nothing else (colour 0.74; guidance
  2.0), 0.358 without guidance, 0.371 at 1.5, 0.417 at 4; diversity 0.257, 0.261, 0.258, 0.254.  With eps, as published,
  and Adam in 3000 steps it was 0.208.  What is wrong is outlines.
  Beside a U-Net at equal compute, `python -m vgen.bench curves --workdir=DIR --budget 0.5` (3 TFLOP of gradients each,
  the same latents, flow and optimiser, told a class): held-out loss at 25, 50, 75, 100 %:
    U-Net  146 steps of 20.6 GFLOP  1.038  0.652  0.559  0.524
    DiT    136 steps of 22.1 GFLOP  1.380  1.112  0.912  0.817
  So early in training, and on latents as local as these, the U-Net is far ahead.
"""

from ml_collections import ConfigDict, FieldReference

from vgen import recipes
from vgen.data import scenes

SCALES = ("tiny", "mini", "small", "paper", "imported")

PUBLISHED = dict(dit=674_834_720, vae=83_653_863, fid=9.62, fid_guided=2.27)  # trainable: positions are not counted


def get_config(scale: str = "mini") -> ConfigDict:
    """The config of one scale: tiny (tests), mini (two CPU cores, minutes), small (one accelerator), paper, imported.

    paper trains as published; imported is the published checkpoint.
    """
    makers = dict(tiny=_tiny, mini=_mini, small=_small, paper=_paper, imported=_imported)
    return recipes.system("dit", scale, makers, PUBLISHED)


def _diffuse(**kwargs):
    """Settings of Diffuse that all scales share: the authors' 250 steps end at the last of the trained times."""
    return dict(
        schedule=recipes.schedule("linear"), variance="learned_range", max_steps=250, solver="ddpm",
        solver_knobs=dict(variance="learned_range"), grid_knobs=dict(spacing="linspace"), **kwargs,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------ small worlds


def _world(
    *, size, world, eval_count, net, dit, knobs, eval_pictures, vae=None, autoencoder=None, cached=0, scales=(),
    **diffuse,
):  # fmt: skip
    """A class-conditional system on scenes of one object: a class is a colour and a shape.

    net: arguments of DiT.  dit: of `recipes.train`.  vae: of AutoencoderKL, None for patches of pixels.  autoencoder:
    settings of `recipes.autoencoder`.  knobs: of sampling.  scales: of guidance, to be measured.  diffuse: further
    arguments of Diffuse.
    """
    classes = len(scenes.classes(scenes.World(**world), "pair"))
    channels = vae["latent_channels"] if vae else 3
    per_latent = vae.get("patch", 1) * 2 ** (len(vae["multipliers"]) - 1) if vae else 1
    network = dict(
        target="vgen.models.dit:DiT", in_channels=channels, out_channels=2 * channels, num_classes=classes,
        sample_size=size // per_latent, **net,
    )  # fmt: skip
    stages = recipes.diffusion(
        "dit", _diffuse(network=network, size=size, classes=classes, **diffuse), world=world, eval_count=eval_count,
        settings=dit, vae=vae, autoencoding=autoencoder, labels="pair", cached=cached,
    )  # fmt: skip
    return dict(
        **stages,
        generate=recipes.generate("dit", **knobs),
        eval=recipes.scene_eval(world, eval_pictures, labels="pair", off=1.0, scales=scales),
        prompts=recipes.class_prompts(classes),
    )


def _tiny():
    return _world(
        size=16, world=recipes.CLASSES, eval_count=16, net=dict(depth=1, width=16, heads=2, patch_size=4),
        dit=dict(steps=2, batch=8, lr=1e-3),
        knobs=dict(batch_size=8, steps=3, guidance_scale=1.5, strength=0.6), eval_pictures=8,
    )  # fmt: skip


def _mini():
    """Of v where the paper has eps, as in configs/adm.py."""
    return _world(
        size=32, world=recipes.CLASSES, cached=40_000, eval_count=512, prediction="v",
        vae=recipes.KL["mini"], autoencoder=recipes.AUTOENCODING["mini"],
        net=dict(depth=6, width=192, heads=6, patch_size=1),
        dit=dict(steps=2600, batch=32, lr=2e-3, optim=dict(name="muon")),
        knobs=dict(batch_size=64, steps=50, guidance_scale=2.0, strength=0.6), eval_pictures=240, scales=(1.5, 4.0),
    )  # fmt: skip


def _small():
    """One accelerator: DiT-S/2 on 16 x 16 latents of the whole world's colours, shapes and textures."""
    from vgen.models import dit

    return _world(
        size=128, world=dict(max_objects=1, heldout=()), cached=200_000, eval_count=2048,
        vae=recipes.KL["small"], autoencoder=recipes.AUTOENCODING["small"],
        net=dict(dit.SMALL, patch_size=2, dtype="bfloat16"),
        dit=dict(steps=60_000, batch=256, lr=4e-4),
        knobs=dict(batch_size=64, steps=100, guidance_scale=2.0, strength=0.6), eval_pictures=1008, scales=(1.5, 4.0),
    )  # fmt: skip


# -------------------------------------------------------------------------------------------------------- as published


def _paper():
    """DiT-XL/2 at 256 pixels as it was trained, in the latents of a vae from --config.weights=FOLDER.

    Adam at 1e-4 without warm-up or decay, 7M steps of 256, mirrored pictures, ten in a hundred classes dropped.
    The data are TensorFlow Datasets' ImageNet; others by --config.stages.dit.data.source, with a label each.
    S/2, B/2, L/2: the values of SMALL, BASE, LARGE in models/dit.py for --config.stages.dit.task.network.
    """
    from vgen.models import autoencoder, dit

    weights = FieldReference("SET_WEIGHTS")  # what refers to it changes with --config.weights
    task = _diffuse(
        target="vgen.tasks.diffuse:Diffuse", size=256, classes=1000,
        network=dict(target="vgen.models.dit:DiT", **dit.XLARGE, remat="full", dtype="bfloat16"),
        vae=dict(target="vgen.models.autoencoder:AutoencoderKL", dtype="bfloat16", **autoencoder.KL_F8),
    )  # fmt: skip
    data = dict(source="tfds:imagenet2012", size=256, crop="center_crop", flip=True, workers=16)
    trained = dict(
        task=task, data=data, evaluate=dict(split="validation", flip=False, batches=16),
        train=dict(steps=7_000_000, batch_size=256, optim=dict(main=dict(lr=1e-4, kind="constant")), ema_decay=0.9999,
                   checkpoint_every=10_000, keep_every=100_000, log_every=100),
        init=recipes.imported(weights, vae="vae"),
    )  # fmt: skip
    return dict(
        weights=weights, stages=dict(dit=trained), order=("dit",), mesh=dict(data=-1, fsdp=8), topology="v3:8x16",
        generate=recipes.generate("dit", batch_size=16, steps=250, guidance_scale=1.5, strength=0.6),
        prompts=("207", "360", "387", "974", "88", "979", "417", "279"),
    )  # fmt: skip


def _imported():
    """The published DiT-XL/2, all of it from the folder --config.weights, in float32; nothing is trained.

    At 512 pixels: size=512 for the task and sample_size=64 for its network.  Data are needed for their shapes alone;
    --config.stages.dit.train.steps=N with data of yours goes on training from the published weights.
    """
    from vgen.models import autoencoder, dit

    config = _paper()
    stage, weights = config["stages"]["dit"], config["weights"]
    stage["task"] |= dict(
        network=dict(target="vgen.models.dit:DiT", **dit.XLARGE),
        vae=dict(target="vgen.models.autoencoder:AutoencoderKL", **autoencoder.KL_F8),
    )  # fmt: skip
    stage["train"] |= dict(steps=0)
    stage |= dict(
        init=recipes.imported(weights, vae="vae", network="transformer"),
        data=recipes.scenes(256, recipes.CLASSES, labels="pair"), evaluate={},
    )  # fmt: skip
    return config | dict(mesh=dict(data=-1, fsdp=1, tensor=1))
