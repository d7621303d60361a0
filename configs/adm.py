"""ADM: a class-conditional U-Net, and a classifier of noisy pictures whose gradient pulls every step to the class.

Paper
  Dhariwal, Nichol, 2021, Diffusion models beat GANs on image synthesis, arXiv:2105.05233. Code and weights:
  openai/guided-diffusion.

Parts
  classifier  NoisedClassifier (models/unet_classifier.py), the U-Net's half that goes down, trained first on pictures
              at every noise; objective tasks/classify.py
  unet        UNet (models/unet.py) told of time and class by its norms, residual blocks that resample, a learned
              variance; objective and sampling tasks/diffuse.py, the frozen classifier beside it

Commands
  python -m vgen.main --config=configs/adm.py --workdir=runs/adm
  python -m vgen.main --config=configs/adm.py --workdir=runs/adm --mode=sample --prompt=0 --prompt=5 --num_images=4
  (a prompt is the number of a class: place of the colour times 4, the number of shapes, plus place of the shape, both
  as in recipes.CLASSES; the strength of guidance is --config.generate.knobs.unet.classifier_scale=4.0)
  Class accuracy and diversity over scales of guidance:
  python -m vgen.main --config=configs/adm.py --workdir=runs/adm --mode=eval
  The same of a U-Net that is told no class, which the classifier alone guides to it:
  python -m vgen.main --config=configs/adm.py:guided --workdir=runs/guided
  By DDIM in 25 steps, with the classifier in its second form (algorithm 2):
  python -m vgen.main --config=configs/adm.py --workdir=runs/adm --mode=sample --prompt=0 --steps=25 \\
    --config.generate.task="{'unet': {'solver': 'ddim', 'solver_knobs': {}, 'grid_knobs': {}}}"
  ImageNet at 256 pixels as published, from TensorFlow Datasets:
  python -m vgen.main --config=configs/adm.py:paper --workdir=DIR
  The published weights for it, FOLDER holds 256x256_diffusion.pt and 256x256_classifier.pt:
  python -m vgen.main --config=configs/adm.py:imported --workdir=DIR --config.weights=FOLDER --mode=sample --prompt=207

Published numbers
  256 px: 553.8M parameters, the classifier 54.1M. 128 px: 421.5M and 42.6M, 64 px: 295.9M and 65.4M, 512 px: 559.0M
  and 54.4M.
  ImageNet 256, 250 DDPM steps, 1.98M training steps of 256: FID 10.94, guided (scale 1.0) 4.59, with an upsampler 3.94;
  25 DDIM steps, guided (2.5) 5.44. Guided at 128 (scale 0.5): 5.91 to 2.97, at 512 (4.0): 23.24 to 7.72; 64 px,
  unguided: 2.07. A U-Net without classes at 256, guided by 10.0: 26.21 to 12.00.

Measured numbers
  mini, 1300 steps of 16; 528 pictures (22 of a class: --config.eval.prompts=528), seed 0, 25 steps; classifier scale,
  share of pictures that are right (class and background), diversity:
    0  0.998  0.2513
    1  0.996  0.2515
    2  0.998  0.2506
    4  0.996  0.2495
    8  0.992  0.2447
  The U-Net knows the class, and guidance adds nothing but uniformity.  As long as it predicted eps, as published, 0.40
  were right: the others had backgrounds of a shade that no scene has.
  guided, the same steps; 264 pictures (11 of a class):
    0  0.015  0.2778
    1  0.311  0.2727
    2  0.576  0.2742
    4  0.712  0.2727
    8  0.807  0.2655
"""

from ml_collections import ConfigDict, FieldReference

from vgen import recipes
from vgen.data import scenes

SCALES = ("tiny", "mini", "guided", "small", "paper", "imported")

PUBLISHED = dict(unet=553_838_086, classifier=54_096_360, fid=10.94, fid_guided=4.59, fid_guided_25_steps=5.44)


def get_config(scale: str = "mini") -> ConfigDict:
    """The config of one scale: tiny (tests), mini and guided (two CPU cores, minutes), small (one accelerator),
    paper, imported.

    paper trains as published; imported is the published checkpoints.
    """
    makers = dict(tiny=_tiny, mini=_mini, guided=_guided, small=_small, paper=_paper, imported=_imported)
    return recipes.system("adm", scale, makers, PUBLISHED)


def _diffuse(schedule, **kwargs):
    """Settings of Diffuse: 250 steps that end at the last of the trained times, and no class left out of training."""
    return dict(
        schedule=recipes.schedule(schedule), variance="learned_range", drop=0.0, max_steps=250, threshold="clip",
        solver="ddpm", solver_knobs=dict(variance="learned_range"), grid_knobs=dict(spacing="linspace"), **kwargs,
    )  # fmt: skip


def _classify(schedule, classes, network):
    """Spec of the classifier's task, under the noise that its U-Net is trained with."""
    schedule = recipes.schedule(schedule)
    return dict(target="vgen.tasks.classify:Classify", network=network, classes=classes, schedule=schedule)


def _classifier(**fields):
    return dict(target="vgen.models.unet_classifier:NoisedClassifier", **fields)


def _unet(**fields):
    return dict(target="vgen.models.unet:UNet", **fields)


# ------------------------------------------------------------------------------------------------------ small worlds

STYLE = dict(in_channels=3, injection="scale_shift", resample="resblock")  # of the published networks


def _world(
    *, size, world, eval_count, net, unet, judge, classifier, knobs, eval_pictures, cached=0, scales=(), told=True,
    **diffuse,
):  # fmt: skip
    """A class-conditional system on scenes of one object: a class is a colour and a shape.

    net, judge: arguments of UNet and of NoisedClassifier.  unet, classifier: of `recipes.train`.  knobs: of sampling.
    scales: of the classifier, to be measured.  told: whether the U-Net knows the class.  diffuse: further arguments of
    Diffuse.
    """
    classes = len(scenes.classes(scenes.World(**world), "pair"))
    judge = dict(STYLE, **judge, image_size=size, outputs=classes)
    network = _unet(**STYLE, **net, out_channels=6, num_classes=classes if told else None)
    task = _diffuse(
        "cosine", network=network, size=size, classes=classes, classifier=_classifier(**judge), **diffuse
    )  # fmt: skip
    made = recipes.diffusion(
        "unet", task, world=world, eval_count=eval_count, settings=unet, labels="pair", cached=cached
    )["stages"]
    made["unet"]["init"] = dict(classifier=dict(stage="classifier", part="network"))
    made["classifier"] = dict(
        task=_classify("cosine", classes, _classifier(**judge)),
        data=recipes.scenes(size, world, "pair", cached=cached),
        evaluate=recipes.held_out(world, eval_count, labels="pair"),
        train=recipes.train(**classifier),
    )
    return dict(
        stages=made, order=("classifier", "unet"),
        generate=recipes.generate("unet", **knobs),
        eval=recipes.scene_eval(
            world, eval_pictures, labels="pair", knob="classifier_scale", off=0.0, scales=scales
        ),
        prompts=recipes.class_prompts(classes),
    )  # fmt: skip


def _tiny():
    return _world(
        size=16, world=recipes.CLASSES, eval_count=16,
        net=dict(widths=(8,), attention=(1,), blocks=1, head_dim=8, groups=4), unet=dict(steps=2, batch=8, lr=1e-3),
        judge=dict(widths=(8,), attention=(1,), blocks=1, head_dim=8, groups=4),
        classifier=dict(steps=2, batch=8, lr=1e-3),
        knobs=dict(batch_size=8, steps=3, classifier_scale=2.0, strength=0.6), eval_pictures=8,
    )  # fmt: skip


def _mini(**kwargs):
    """Of v where the paper has eps, by which backgrounds came out in shades that no scene has."""
    return _world(
        size=32, world=recipes.CLASSES, cached=40_000, eval_count=512, prediction="v",
        net=dict(widths=(32, 64, 96), attention=(0, 0, 1), blocks=1, head_dim=32, groups=8),
        unet=dict(steps=1300, batch=16, lr=2e-3, optim=dict(name="muon")),
        judge=dict(widths=(16, 32, 64), attention=(0, 0, 1), blocks=1, head_dim=32, groups=8),
        classifier=dict(steps=1000, batch=32, lr=2e-3),
        knobs=dict(batch_size=66, steps=25, classifier_scale=2.0, strength=0.6), eval_pictures=264,
        scales=(1.0, 4.0, 8.0), **kwargs,
    )  # fmt: skip


def _guided():
    """The paper's other study (table 4): a U-Net that is told no class, which the classifier alone brings in."""
    return _mini(told=False)


def _small():
    """One accelerator: the colours, shapes and textures of the whole world at 64 pixels."""
    return _world(
        size=64, world=dict(max_objects=1, heldout=()), cached=200_000, eval_count=2048,
        net=dict(widths=(128, 256, 384), attention=(0, 1, 1), blocks=2, head_dim=64, dropout=0.1, dtype="bfloat16"),
        unet=dict(steps=60_000, batch=256, lr=2e-4),
        judge=dict(widths=(64, 128, 192, 256), attention=(0, 0, 1, 1), blocks=2, head_dim=64, dtype="bfloat16"),
        classifier=dict(steps=20_000, batch=256, lr=3e-4),
        knobs=dict(batch_size=64, steps=250, classifier_scale=1.0, strength=0.6), eval_pictures=1008,
        scales=(2.0, 4.0, 8.0),
    )  # fmt: skip


# -------------------------------------------------------------------------------------------------------- as published


def _paper():
    """ImageNet at 256 pixels: the classifier's 300k steps of 256, then the U-Net's 1.98M, both from nothing.

    Classifier: AdamW at 3e-4, falling to 0 by a line, weight decay 0.05 on every parameter, random crops, no averages.
    U-Net: Adam at 1e-4, constant, central squares.  Sampled in 250 steps of 1000 under linear betas, scale 1.0.
    Others: the values of ADM_64, ADM_128, ADM_512 in models/unet.py and models/unet_classifier.py for the networks,
    size for tasks and data; 64 pixels has cosine betas and 2048 pictures a step.
    """
    from vgen.models import unet, unet_classifier

    data = dict(source="tfds:imagenet2012", size=256, flip=True, workers=16)
    judge = dict(unet_classifier.ADM_256, dtype="bfloat16")
    kept = dict(checkpoint_every=10_000, keep_every=100_000, log_every=100)
    annealed = dict(lr=3e-4, kind="linear", weight_decay=0.05, decay=".*")
    classifier = dict(
        task=_classify("linear", 1000, _classifier(**judge)),
        data=dict(data, crop="random_crop"),
        evaluate=dict(split="validation", crop="center_crop", flip=False, batches=16),
        train=dict(steps=300_000, batch_size=256, optim=dict(main=annealed), **kept),
    )
    task = _diffuse(
        "linear", target="vgen.tasks.diffuse:Diffuse", size=256, classes=1000,
        network=_unet(**unet.ADM_256, remat="full", dtype="bfloat16"), classifier=_classifier(**judge),
    )  # fmt: skip
    trained = dict(
        task=task, data=dict(data, crop="center_crop"), evaluate=dict(split="validation", flip=False, batches=16),
        train=dict(steps=1_980_000, batch_size=256, optim=dict(main=dict(lr=1e-4, kind="constant")), ema_decay=0.9999,
                   **kept),
        init=dict(classifier=dict(stage="classifier", part="network")),
    )  # fmt: skip
    return dict(
        stages=dict(classifier=classifier, unet=trained), order=("classifier", "unet"),
        mesh=dict(data=-1, fsdp=8), topology="v4:4x4x4",
        generate=recipes.generate("unet", batch_size=16, steps=250, classifier_scale=1.0, strength=0.6),
        prompts=("207", "360", "387", "974", "88", "979", "417", "279"),
    )  # fmt: skip


def _imported():
    """The published U-Net and classifier from the folder --config.weights, in float32; nothing is trained.

    Other sizes: as of `paper`.  Data are needed for their shapes alone.
    """
    from vgen.models import unet, unet_classifier

    config, weights = _paper(), FieldReference("SET_WEIGHTS")
    stage = config["stages"]["unet"]
    stage["task"] |= dict(network=_unet(**unet.ADM_256), classifier=_classifier(**unet_classifier.ADM_256))
    stage["train"] |= dict(steps=0)
    stage |= dict(
        init=recipes.imported(weights, network="256x256_diffusion.pt", classifier="256x256_classifier.pt"),
        data=recipes.scenes(256, recipes.CLASSES, labels="pair"), evaluate={},
    )  # fmt: skip
    mesh = dict(data=-1, fsdp=1, tensor=1)
    return config | dict(weights=weights, stages=dict(unet=stage), order=("unet",), mesh=mesh)
