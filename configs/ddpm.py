"""DDPM: a U-Net learns to take noise out of pictures, and makes pictures of noise in a thousand small steps.

Paper
  Ho, Jain, Abbeel, 2020, Denoising diffusion probabilistic models, arXiv:2006.11239; weights: google/ddpm-cifar10-32 on
  the Hugging Face hub. Song, Meng, Ermon, 2020, Denoising diffusion implicit models (DDIM), arXiv:2010.02502.

Parts
  unet       UNet (models/unet.py) on pixels, told of nothing but the time; objective and sampling tasks/diffuse.py

Commands
  python -m vgen.main --config=configs/ddpm.py --workdir=runs/ddpm
  python -m vgen.main --config=configs/ddpm.py --workdir=runs/ddpm --mode=sample --prompt=any --num_images=16
  (a prompt counts pictures and says nothing; with --image=in.png: SDEdit, with --mask=mask.png too: RePaint's
  replacement of what is known)
  The DDIM study on the same weights; eta 1 is DDPM's noise, other solvers are those of diffusion/solvers.py:
  python -m vgen.main --config=configs/ddpm.py --workdir=runs/ddpm --mode=eval \\
    --config.generate.task.unet="{'solver': 'ddim', 'solver_knobs': {'eta': 0.0}}" --config.eval.steps="(10,20,50,100)"
  CIFAR-10 as published, from TensorFlow Datasets:
  python -m vgen.main --config=configs/ddpm.py:paper --workdir=DIR
  The published weights for it, FILE is the repository's diffusion_pytorch_model beside its config.json:
  python -m vgen.main --config=configs/ddpm.py:imported --workdir=DIR --config.weights=FILE --mode=sample --prompt=any

Published numbers
  CIFAR-10: 35.7M parameters, FID 3.17 (training set; 5.24 test set), Inception score 9.46; 800k steps of 128.
  256 px: 114M parameters, LSUN church 7.89, bedroom 6.36 (256M parameters: 4.90).
  DDIM on CIFAR-10 (grid_knobs {'spacing': 'quadratic'}), FID after 10, 20, 50, 100, 1000 steps: eta 0 13.36, 6.84,
  4.67, 4.16, 4.04; eta 1 41.07, 18.36, 8.01, 5.78, 4.73.

Measured numbers
  mini, from nothing on two CPU cores: 16 minutes with other work beside it, 14 of them training (2000 steps of 16).
  Held-out eps loss 0.0049.  128 pictures, seed 0, 100 steps: 0.40 of them are read as a scene of the world, and 0.83 of
  its (colour, shape) pairs occur.  The others mostly have a background of a colour that no scene has: at the highest
  noise, where eps says least about it, 32,000 samples are few.
"""

from ml_collections import ConfigDict, FieldReference

from vgen import recipes

SCALES = ("tiny", "mini", "small", "paper", "imported")

PUBLISHED = dict(unet=35_746_307, fid=3.17, fid_ddim={10: 13.36, 20: 6.84, 50: 4.67, 100: 4.16, 1000: 4.04})


def get_config(scale: str = "mini") -> ConfigDict:
    """The config of one scale: tiny (tests), mini (two CPU cores, minutes), small (one accelerator), paper, imported.

    paper trains as published; imported is the published checkpoint.
    """
    makers = dict(tiny=_tiny, mini=_mini, small=_small, paper=_paper, imported=_imported)
    published = PUBLISHED | dict(fid_ddim={str(steps): fid for steps, fid in PUBLISHED["fid_ddim"].items()})
    return recipes.system("ddpm", scale, makers, published)


def _task(size, **net):
    """Settings of Diffuse: eps under linear betas."""
    network = dict(target="vgen.models.unet:UNet", **dict(in_channels=3, out_channels=3) | net)
    return dict(network=network, size=size, schedule=recipes.schedule("linear"), max_steps=1000, threshold="clip")


def _generate(batch_size, steps=1000, variance="fixed_large"):
    """The ancestral sampler with beta as its variance; a solver is no matter of training, so it stands here.

    In a tenth of the steps and less, "fixed_small" is the better variance (Song et al. 2020, table 1).
    """
    task = dict(unet=dict(solver="ddpm", solver_knobs=dict(variance=variance)))
    return recipes.generate("unet", batch_size=batch_size, steps=steps, strength=0.5) | dict(task=task)


# ------------------------------------------------------------------------------------------------------ small worlds

STYLE = dict(resample="pad", eps=1e-6, sin_first=True, endpoint=True)  # of the published U-Nets


def _world(*, size, world, eval_count, net, unet, batch_size, steps, eval_pictures, cached=0):
    """Scenes of `size` pixels.  net: arguments of UNet.  unet: of `recipes.train`."""
    stages = recipes.diffusion(
        "unet", _task(size, **STYLE, **net), world=world, eval_count=eval_count, settings=unet, cached=cached
    )
    quality = dict(target="vgen.metrics.scene_eval:SceneQuality", world=world, pictures=eval_pictures, steps=())
    made = _generate(batch_size, steps, "fixed_small" if steps <= 100 else "fixed_large")
    return dict(**stages, generate=made, eval=quality, prompts=("",) * 8)


def _tiny():
    return _world(
        size=16, world=recipes.WORLD, eval_count=16, net=dict(widths=(8,), attention=(1,), blocks=1, groups=4),
        unet=dict(steps=2, batch=8, lr=1e-3), batch_size=8, steps=3, eval_pictures=8,
    )  # fmt: skip


def _mini():
    return _world(
        size=32, world=recipes.WORLD, cached=40_000, eval_count=512,
        net=dict(widths=(32, 64, 128), attention=(0, 0, 1), blocks=1, groups=8),
        unet=dict(steps=2000, batch=16, lr=2e-3, optim=dict(name="muon")), batch_size=64, steps=100, eval_pictures=128,
    )  # fmt: skip


def _small():
    """One accelerator: the whole world of scenes at 64 pixels."""
    return _world(
        size=64, world={}, cached=200_000, eval_count=2048,
        net=dict(widths=(128, 256, 256, 256), attention=(0, 0, 1, 0), dropout=0.1, dtype="bfloat16"),
        unet=dict(steps=60_000, batch=256, lr=2e-4), batch_size=64, steps=1000, eval_pictures=1024,
    )  # fmt: skip


# -------------------------------------------------------------------------------------------------------- as published


def _paper():
    """CIFAR-10 as published: Adam at 2e-4 after 5000 steps of warm-up, gradients cut at norm 1, 800k steps of 128.

    256 pixels: the values of DDPM_256 in models/unet.py for the network, size=256 for task and data, 64 pictures a
    step at 2e-5, no dropout.
    """
    from vgen.models import unet

    optim = dict(main=dict(lr=2e-4, kind="constant", warmup=5000, clip=1.0))
    stage = dict(
        task=dict(target="vgen.tasks.diffuse:Diffuse", **_task(32, **unet.DDPM_CIFAR10)),
        data=dict(source="tfds:cifar10", size=32, flip=True),
        evaluate=dict(split="test", flip=False, batches=32),
        train=dict(steps=800_000, batch_size=128, optim=optim, ema_decay=0.9999, checkpoint_every=5000,
                   keep_every=100_000, log_every=100),
    )  # fmt: skip
    return dict(
        stages=dict(unet=stage), order=("unet",), generate=_generate(64), prompts=("",) * 64, topology="v3:2x2"
    )  # fmt: skip


def _imported():
    """The published CIFAR-10 network from the file --config.weights; nothing is trained, data tell shapes alone."""
    config, weights = _paper(), FieldReference("SET_WEIGHTS")
    stage = config["stages"]["unet"]
    stage["train"] |= dict(steps=0)
    stage |= dict(
        init=dict(network=dict(file=weights, reader="vgen.convert.load:params")),
        data=recipes.scenes(32, recipes.WORLD), evaluate={},
    )  # fmt: skip
    return config | dict(weights=weights)
