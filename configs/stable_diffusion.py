"""Stable Diffusion 1.5, 2.1 and XL: latent diffusion by a U-Net that reads what CLIP's text tower says.

Paper
  Rombach, Blattmann, Lorenz, Esser, Ommer, 2022, High-resolution image synthesis with latent diffusion models,
  arXiv:2112.10752; Podell et al. 2023, SDXL, arXiv:2307.01952. Weights: the repositories of Stability AI and
  stable-diffusion-v1-5 on the Hugging Face hub.

Parts
  vae        AutoencoderKL (models/autoencoder.py), objective tasks/autoencode.py
  unet       UNet (models/unet.py); objective and sampling tasks/diffuse.py
  text       CLIP's tower, of XL two (models/prompt.py, models/clip.py): frozen at `paper`, `sd21` and `sdxl`; elsewhere
             a small one, trained with the U-Net

Commands
  python -m vgen.main --config=configs/stable_diffusion.py --workdir=runs/sd
  python -m vgen.main --config=configs/stable_diffusion.py --workdir=runs/sd --mode=sample --prompt="a red circle"
  (with --image=in.png: image to image, with --mask=mask.png too: inpainting by the network that was not made for it)
  python -m vgen.main --config=configs/stable_diffusion.py --workdir=runs/sd --mode=eval
  The published 1.5, of which FOLDER holds diffusers' files; nothing is trained first (2.1 with :sd21, XL with :sdxl):
  python -m vgen.main --config=configs/stable_diffusion.py:paper --workdir=DIR --config.weights=FOLDER \\
    --mode=sample --prompt="a lighthouse on a cliff" --negative_prompt="blurry"
  Fine-tune its U-Net on your pictures:
  python -m vgen.main --config=configs/stable_diffusion.py:paper --workdir=DIR2 --config.weights=FOLDER \\
    --config.stages.unet.train.steps=1000 --config.stages.unet.data.source=folder:PICTURES
  With :sdxl, pictures keep their shapes (data/buckets.py), and vae and text towers run over them once, not in every
  step (features.py); for the others add --config.stages.unet.data.buckets=512 and
  --config.stages.unet.cache="{'features': ('latents', 'text')}".

Published numbers
  1.5: U-Net 859,520,964 parameters, text tower 123,060,480, autoencoder 83,653,863; 595k steps of 2048 after 1.2.
  2.1: U-Net 865,910,724, text tower 340,387,840.  XL: U-Net 2,567,463,684, text towers 817M together.
  Sampling: 1.5 PNDM, 50 steps, guidance 7.5; 2.1 DDIM, 50 steps, 7.5; XL Euler, 50 steps, 5.

Measured numbers
  mini, 21 minutes of one CPU core beside other work, evaluation included.  256 held-out prompts, seed 0, 25 steps of
  PNDM, read by the scene oracle:
    guidance off  colour 0.82  shape 0.58  relation 0.63  scene_exact 0.30
    1.5           colour 0.83  shape 0.67  relation 0.68  scene_exact 0.43
    2 (default)   colour 0.82  shape 0.72  relation 0.68  scene_exact 0.50
    3             colour 0.82  shape 0.70  relation 0.71  scene_exact 0.48
    5             colour 0.41  shape 0.42  relation 0.18  scene_exact 0.10
  What is wrong is mostly the number of objects (count 0.68; backgrounds 1.00); configs/ldm.py, of a flow in latents of
  the same kind, draws 0.70 right.  By DDIM on trailing times 0.47
  at 2 and 0.51 at 3.
"""

from ml_collections import ConfigDict, FieldReference

from vgen import recipes

SCALES = ("tiny", "mini", "small", "paper", "sd21", "sdxl")

# Parameters of each part.
PUBLISHED = dict(
    paper=dict(network=859_520_964, text_encoder=123_060_480, vae=83_653_863),
    sd21=dict(network=865_910_724, text_encoder=340_387_840, vae=83_653_863),
    sdxl=dict(network=2_567_463_684, text_encoder=123_060_480 + 694_659_840, vae=83_653_863),
)


def get_config(scale: str = "mini") -> ConfigDict:
    """The config of one scale: tiny (tests), mini (two CPU cores, minutes), small (one accelerator), paper (1.5), sd21,
    sdxl."""
    makers = dict(tiny=_tiny, mini=_mini, small=_small, paper=_paper, sd21=_sd21, sdxl=_sdxl)
    return recipes.system("stable_diffusion", scale, makers, PUBLISHED.get(scale, {}))


# ------------------------------------------------------------------------------------------------------ small worlds


def _world(*, text, tower, **kwargs):
    """The same parts on scenes, by `recipes.text_unet`; in latents where a vae is given.  tower: of TextTower."""
    # Branches that start small: the words, of scale 0.02, would drown in those of full size.
    clip = dict(
        target="vgen.models.clip:TextTower", vocab=text["vocab_size"], length=text["length"], features=None, eos=1,
        layer_scale=0.05, **tower,
    )  # fmt: skip
    encoder = dict(target="vgen.models.prompt:ClipPrompt", tower=clip)
    return recipes.text_unet(encoder, width=tower["width"], text=text, **_V1, **kwargs)


# What the scheduler of the published 1.5 says: PNDM on leading times from 1 on, which ends at the first one.
_V1 = dict(schedule=recipes.schedule("scaled_linear"), solver="pndm", grid_knobs=dict(offset=1, final="first"))


def _tiny():
    return _world(
        size=16, world=recipes.WORLD, eval_count=16, net=dict(widths=(8,), attention=(1,), blocks=1, groups=4),
        tower=dict(depth=1, width=16, heads=2, mlp_dim=16), text=dict(length=24, vocab_size=320), max_steps=10,
        unet=dict(steps=2, batch=8, lr=1e-3),
        knobs=dict(batch_size=8, steps=3, guidance_scale=2.0, strength=0.6), eval_prompts=8,
        prompts=recipes.PROMPTS[:2],
    )  # fmt: skip


def _mini():
    """Of v, as 2.1 is, and trained at late times more often, as configs/ldm.py is."""
    return _world(
        size=32, world=recipes.TOLD, vae_world=recipes.FREE, asked_world=recipes.LATTICE, cached=60_000, eval_count=512,
        vae=recipes.KL["mini"], autoencoder=recipes.AUTOENCODING["mini"],
        net=dict(widths=(64, 128), attention=(0, 1), blocks=1, heads=4, groups=8),
        tower=dict(depth=2, width=128, heads=4, mlp_dim=256), text=dict(length=20, vocab_size=512), max_steps=100,
        prediction="v", draw=dict(how="logit_normal", mean=1.2, std=1.2),
        unet=dict(steps=1800, batch=64, lr=3e-3, optim=dict(name="muon")),
        knobs=dict(batch_size=64, steps=25, guidance_scale=2.0, strength=0.6), scales=(1.5, 3.0, 5.0),
        eval_prompts=256, prompts=recipes.PROMPTS,
    )  # fmt: skip


def _small():
    """One accelerator: the whole world of scenes at 128 pixels, 16 x 16 latents, three levels of the U-Net."""
    return _world(
        size=128, world={}, cached=200_000, eval_count=2048,
        vae=recipes.KL["small"], autoencoder=recipes.AUTOENCODING["small"],
        net=dict(widths=(192, 384, 384), attention=(1, 1, 0), blocks=2, heads=8, dtype="bfloat16"),
        tower=dict(depth=6, width=512, heads=8, mlp_dim=2048, dtype="bfloat16"),
        text=dict(length=64, vocab_size=512), max_steps=250,
        unet=dict(steps=60_000, batch=256, lr=2e-4),
        knobs=dict(batch_size=64, steps=50, guidance_scale=3.0, strength=0.6), scales=(1.5, 2.0, 5.0),
        eval_prompts=1024, prompts=recipes.PROMPTS,
    )  # fmt: skip


# -------------------------------------------------------------------------------------------------------- as published


def _published(task, *, guidance, weights, data=(), cache=(), **folders):
    """A pipeline imported from the folder --config.weights.

    task: settings of Diffuse.  data, cache: further ones of the stage.  folders: {part of the task: folder there}.
    `train` holds the settings of diffusers' example of fine-tuning (examples/text_to_image), which
    --config.stages.unet.train.steps=N turns on; until there are pictures to train on, at stages.unet.data, any will do.
    """
    optim = dict(main=dict(lr=1e-5, kind="constant", weight_decay=0.01, clip=1.0))
    stage = dict(
        task=dict(target="vgen.tasks.diffuse:Diffuse", max_steps=1000, **task),
        data=dict(source="scenes", size=min(task["size"], 512), **dict(data)), cache=dict(cache),
        train=dict(steps=0, batch_size=4, optim=optim, ema_decay=0.9999, frozen_dtype="float32", checkpoint_every=500),
        init=recipes.imported(weights, network="unet", vae="vae", **folders),
    )  # fmt: skip
    knobs = dict(steps=50, guidance_scale=guidance, strength=0.8)
    return dict(
        weights=weights, stages=dict(unet=stage), order=("unet",),
        text=dict(kind="clip", length=77, path=weights + "/tokenizer"),
        generate=recipes.generate("unet", batch_size=1, **knobs),
        prompts=("a lighthouse on a cliff at sunset", "a bowl of oranges, oil painting"),
        topology="v5e:2x2",
    )  # fmt: skip


_START, _END = 49_406, 49_407  # of CLIP's vocabulary
_CLIP_L = dict(target="vgen.models.clip:TextTower", width=768, depth=12, heads=12, mlp_dim=3072, features=None)


def _net(published):
    return dict(target="vgen.models.unet:UNet", **published)


def _vae(published):
    return dict(target="vgen.models.autoencoder:AutoencoderKL", **published)


def _paper():
    """Stable Diffusion 1.5 at 512 pixels."""
    from vgen.models import autoencoder, unet

    task = dict(
        network=_net(unet.SD1), vae=_vae(autoencoder.KL_F8), size=512, empty=(_START, _END), pad_id=_END,
        text_encoder=dict(target="vgen.models.prompt:ClipPrompt", tower=_CLIP_L), **_V1,
    )  # fmt: skip
    return _published(task, guidance=7.5, weights=FieldReference("SET_WEIGHTS"), text_encoder="text_encoder")


def _sd21():
    """Stable Diffusion 2.1 at 768 pixels: OpenCLIP's ViT-H without its last layer, v in the place of eps."""
    from vgen.models import autoencoder, unet

    tower = dict(_CLIP_L, width=1024, depth=23, heads=16, mlp_dim=4096, act="gelu")
    task = dict(
        network=_net(unet.SD2), vae=_vae(autoencoder.KL_F8), size=768, prediction="v", empty=(_START, _END), pad_id=0,
        text_encoder=dict(target="vgen.models.prompt:ClipPrompt", tower=tower), **_V1 | dict(solver="ddim"),
    )  # fmt: skip
    return _published(task, guidance=7.5, weights=FieldReference("SET_WEIGHTS"), text_encoder="text_encoder")


def _sdxl():
    """SDXL's base model at 1024 pixels: two text towers, and the sizes of pictures and crops."""
    from vgen.models import autoencoder, unet

    second = dict(_CLIP_L, width=1280, depth=32, heads=20, mlp_dim=5120, act="gelu", features=1280)
    task = dict(
        network=_net(unet.SDXL), vae=_vae(autoencoder.SDXL), size=1024, empty=(_START, _END), pad_id=_END,
        text_encoder=dict(target="vgen.models.prompt:ClipPairPrompt", first=_CLIP_L, second=second),
        micro="crop", zero_empty=True, schedule=recipes.schedule("scaled_linear"), solver="euler",
        grid_knobs=dict(spacing="leading", offset=1),
    )  # fmt: skip
    folders = {"text_encoder/first": "text_encoder", "text_encoder/second": "text_encoder_2"}
    return _published(
        task, guidance=5.0, weights=FieldReference("SET_WEIGHTS"), data=dict(buckets=1024),
        cache=dict(features=("latents", "text")), **folders,
    )  # fmt: skip
