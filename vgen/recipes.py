"""What configs have in common: the embedded world's data, optimiser settings, and stages that train autoencoders.

Plain functions that return the dicts a config is made of (see `vgen.fields.RunConfig`), for scales that learn on the
embedded world.  Nothing here is read by the program itself: it sees what a config makes of it.
"""

import importlib.util
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

# Of tiny: one or two large objects, four shapes, six colours, plain, on two backgrounds.
WORLD = dict(
    shapes=("circle", "square", "triangle", "star"), textures=("solid",), sizes=("large",),
    colours=("red", "yellow", "green", "blue", "purple", "cyan"), backgrounds=("white", "grey"), max_objects=2,
)  # fmt: skip
# Of systems of text at mini: all eight colours, so that every shape is seen in many before it is asked for in another.
# Autoencoders see objects anywhere, and so outlines of every kind in every colour; generators see them on a lattice of
# eighths, told mostly from the left and from above, and are asked for them told at random.
FREE = WORLD | dict(colours=("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink"))
LATTICE = FREE | dict(lattice=8)
TOLD = LATTICE | dict(canonical=0.7)
# For systems that take a class: one object, every pair of colour and shape in training.
CLASSES = WORLD | dict(max_objects=1, heldout=())

PROMPTS = (
    "a red circle left of a blue star",
    "a green square above a yellow triangle",
    "a purple star on a white background",
    "a yellow triangle right of a cyan circle on a grey background",
    "a purple square below a green circle",
    "a blue triangle on a grey background",
    "a yellow star right of a purple square",
    "a cyan square above a red triangle on a white background",
)

# MaskGIT's layout with biases and with shortcuts that start at the block's input, as taming's: after 300 steps without
# quantising, the released layout had more than twice the squared error (0.052 at its best rate, against 0.023).
EASY = dict(target="vgen.models.vqgan:Layout", bias=True, stem_bias=True, shortcut="input", downsample="average",
            out_kernel=1, mid_blocks=1, mid_attention=False, decoder_extra=0)  # fmt: skip

# Every latent is made from its own 4 x 4 pixels alone: as fast as a linear layer, and the same in unseen pictures.
LOCAL = dict(target="vgen.models.vqgan:Layout", local=True, mid_blocks=1, mid_attention=False, decoder_extra=0,
             out_kernel=1)  # fmt: skip

# Arguments of VQGAN by scale: 4, 4 and 8 pixels per token.
TOKENIZERS = dict(
    tiny=dict(channels=8, multipliers=(1, 2, 2), blocks=1, latent_channels=8, num_codes=32, groups=4, ema=True),
    mini=dict(channels=64, multipliers=(1,), patch=4, blocks=1, latent_channels=64, num_codes=512, groups=4, ema=True,
              layout=LOCAL),
    small=dict(channels=64, multipliers=(1, 2, 2, 4), blocks=2, latent_channels=64, num_codes=2048, groups=32,
               ema=True),
)  # fmt: skip

# What `autoencoder` trains them with: settings of Autoencode.
TOKENIZER_LOSSES = dict(
    tiny=dict(revive_below=0.05),
    mini=dict(l1=1.0, l2=1.0, perceptual=0.0, gan=0.05, revive_below=0.05, continuous_steps=800, downsampled=0.75),
    small=dict(l1=1.0, l2=1.0, perceptual=0.2, gan=0.1, revive_below=0.05),
)

# Arguments of AutoencoderKL by scale: 4, 4 and 8 pixels per latent.
KL = dict(
    tiny=dict(channels=8, multipliers=(1,), patch=4, blocks=1, latent_channels=4, groups=4, mid_attention=False,
              layout=LOCAL),
    mini=dict(channels=96, multipliers=(1,), patch=4, blocks=2, latent_channels=8, groups=8, mid_attention=False,
              layout=LOCAL),
    small=dict(channels=64, multipliers=(1, 2, 2, 4), blocks=2, latent_channels=4, mid_attention=True),
)  # fmt: skip

# What `autoencoder` trains those with.
AUTOENCODING = dict(
    tiny=dict(steps=2, batch=8, lr=1e-3, perceptual=0.0),
    mini=dict(steps=1800, batch=16, lr=3e-3, l1=1.0, l2=1.0, perceptual=0.0, kl=3e-3),
    small=dict(steps=20_000, batch=128, lr=5e-4, l1=1.0, l2=0.0, perceptual=0.2, gan=0.1,
               discriminator=dict(target="vgen.models.discriminator:NLayerDiscriminator", channels=64, layers=2,
                                  norm="group")),
)  # fmt: skip


def system(name: str, scale: str, makers: Mapping[str, Callable[[], Mapping[str, Any]]], published: Any) -> ConfigDict:
    """The config `name` at one scale, as its `get_config` returns it.

    makers: {scale: function that makes the fields of `vgen.fields.RunConfig`, in the place of those here}.
    published: the field of that name.  Raises ValueError for another scale.
    """
    if scale not in makers:
        raise ValueError(f"configs/{name}.py: scale must be one of {', '.join(makers)}, got {scale!r}")
    common = dict(name=name, scale=scale, seed=0, published=published, mesh=dict(data=-1, fsdp=1, tensor=1))
    return ConfigDict(common | makers[scale]())


def study(
    path: str, base: str, scale: str, /, measure: str, settings: Mapping[str, Mapping[str, Any]], **changed
) -> ConfigDict:
    """The config `base` beside the config file `path`, at that scale, for the method that is tried there on what it
    trains, which gives its name.

    measure: target of its evaluation, which has the world of the base's.  settings: {scale: its other arguments}; at
      other scales the evaluation stays.
    changed: other fields of `vgen.fields.RunConfig`; where `stages`, `order`, `text` and `seed` stay, a workdir of that
      system can be measured as it is.
    """
    spec = importlib.util.spec_from_file_location(f"_vgen_config_{base}", Path(path).with_name(f"{base}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config(scale)
    changed["name"] = Path(path).stem
    if scale in settings:
        changed["eval"] = dict(target=measure, world=config.eval.world) | settings[scale]
    with config.ignore_type():
        for field, value in changed.items():
            config[field] = ConfigDict(value) if isinstance(value, Mapping) else value
    return config


def vqgan(**sizes) -> dict[str, Any]:
    """Spec of an image tokenizer; sizes: arguments of VQGAN, such as those of TOKENIZERS."""
    return dict(target="vgen.models.vqgan:VQGAN", **sizes)


def pixels_per_token(sizes: Mapping[str, Any]) -> int:
    """The downsampling factor of the VQGAN with these arguments."""
    return sizes.get("patch", 1) * 2 ** (len(sizes["multipliers"]) - 1)


def schedule(name: str, **kwargs) -> dict[str, Any]:
    """Spec of a discrete noise schedule; name, kwargs: arguments of `schedules.betas`."""
    betas = dict(target="vgen.diffusion.schedules:betas", name=name, **kwargs)
    return dict(target="vgen.diffusion.schedules:discrete", betas=betas)


def discriminator(**sizes) -> dict[str, Any]:
    """Spec of a PatchGAN; sizes: arguments of NLayerDiscriminator."""
    return dict(target="vgen.models.discriminator:NLayerDiscriminator", **sizes)


def scenes(size: int, world: Mapping[str, Any], labels: str = "", **kwargs) -> dict[str, Any]:
    """A stage's `data`: pictures of the embedded world, `size` pixels a side.

    world: arguments of World.  labels: of Scenes.
    """
    return dict(source="scenes", size=size, options=_options(world, labels), **kwargs)


def held_out(world: Mapping[str, Any], count: int, batches: int = 4, labels: str = "") -> dict[str, Any]:
    """A stage's `evaluate`: the first `count` scenes of pairs that training never shows, and how many batches of them
    to use.

    Where the world holds no pair out: scenes of another seed.
    """
    split = "heldout"
    if world.get("heldout") == ():
        split, world = "train", dict(world, seed=1)
    return dict(split=split, cached=0, options=_options(world, labels) | dict(count=count), batches=batches)


def _options(world: Mapping[str, Any], labels: str) -> dict[str, Any]:
    return dict(world=world) | (dict(labels=labels) if labels else {})


def train(
    steps: int,
    batch: int,
    lr: float,
    groups: Iterable[str] = ("main",),
    optim: Mapping[str, Any] | None = None,
    **kwargs,
) -> dict[str, Any]:
    """A stage's `train`: Adam with a cosine to 2 % of `lr` in every optimiser group, averaged parameters, four
    checkpoints.

    optim: other settings of the optimiser.  kwargs: other settings of TrainConfig.
    """
    usual = dict(lr=lr, warmup=min(100, steps // 10), clip=1.0, end=0.02, b2=0.99, weight_decay=0.02)
    one = usual | dict(optim or {})
    return dict(
        steps=steps, batch_size=batch, optim={group: dict(one) for group in groups}, ema_decay=0.998,
        checkpoint_every=steps // 4, **kwargs,
    )  # fmt: skip


def autoencoder(
    model: Mapping[str, Any],
    *,
    data: Mapping[str, Any],
    evaluate: Mapping[str, Any],
    steps: int,
    batch: int,
    lr: float,
    discriminator: Mapping[str, Any] | None = None,
    init: Mapping[str, Any] | None = None,
    **losses,
) -> dict[str, Any]:
    """A stage that trains an autoencoder, to tokens or to a Gaussian, or with train="decoder" a decoder alone.

    model: spec of VQGAN or AutoencoderKL.  data, evaluate: as of `scenes` and `held_out`; captions are left out.
    discriminator: its spec, or None for no adversarial loss; it begins at half of the steps unless gan_start says
    otherwise.  init: the stage's, for parts that are not trained.  losses: other settings of Autoencode.
    """
    task = dict(target="vgen.tasks.autoencode:Autoencode", model=model, discriminator=discriminator)
    stage = dict(
        task=task | dict(gan_start=steps // 2) | losses,
        data=dict(data, text=False),
        evaluate=dict(evaluate),  # a dict in two places of a config is one: an override would reach both
        train=train(steps, batch, lr, ("gen",) if discriminator is None else ("gen", "disc")),
    )
    return stage | (dict(init=init) if init else {})


def prior(
    network: Mapping[str, Any],
    tokenizer: Mapping[str, Any],
    *,
    size: int,
    world: Mapping[str, Any],
    eval_count: int,
    autoencoding: Mapping[str, Any],
    settings: Mapping[str, Any],
    free: Mapping[str, Any] | None = None,
    labels: str = "",
    cached: int = 0,
    **task,
) -> dict[str, Any]:
    """`stages` and `order` of a config that trains a tokenizer on scenes and then Autoregressive over its tokens.

    network, tokenizer: their specs.  autoencoding: settings of `autoencoder`: steps, batch, lr, ...  settings: of
    `train`, of the network.  free: the world of the tokenizer's pictures, `world` by default.  labels, cached: of the
    network's data.  task: other settings of Autoregressive.
    """
    loose = world if free is None else free
    first = autoencoder(
        tokenizer, data=scenes(size, loose), evaluate=held_out(loose, eval_count, batches=8), **autoencoding
    )
    task = dict(network=network, tokenizer=tokenizer, size=size) | task
    second = dict(
        task=dict(target="vgen.tasks.autoregressive:Autoregressive", **task),
        data=scenes(size, world, labels, cached=cached), evaluate=held_out(world, eval_count, labels=labels),
        train=train(**settings), init=dict(tokenizer=dict(stage="tokenizer", without="discriminator|lpips")),
    )  # fmt: skip
    return dict(stages={"tokenizer": first, "prior": second}, order=("tokenizer", "prior"))


def diffusion(
    name: str,
    task: Mapping[str, Any],
    *,
    world: Mapping[str, Any],
    eval_count: int,
    settings: Mapping[str, Any],
    vae: Mapping[str, Any] | None = None,
    autoencoding: Mapping[str, Any] | None = None,
    labels: str = "",
    cached: int = 0,
    vae_world: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """`stages` and `order` of a config that trains Diffuse on scenes: a stage of that name and, for latents, one ahead
    of it, "vae".

    task: settings of Diffuse: network, size, ...  settings: of `train`.  world, labels, cached: of the data.
    vae: arguments of AutoencoderKL, such as those of KL, or None for diffusion of pixels; its latents are scaled to
      variance 1.  autoencoding: settings of `autoencoder`: steps, batch, lr, ...
    vae_world: of the autoencoder's pictures, `world` by default.
    """
    task = dict(target="vgen.tasks.diffuse:Diffuse", **task)
    stage = dict(
        task=task, data=scenes(task["size"], world, labels, cached=cached),
        evaluate=held_out(world, eval_count, labels=labels), train=train(**settings),
    )  # fmt: skip
    if vae is None:
        return dict(stages={name: stage}, order=(name,))
    model = dict(target="vgen.models.autoencoder:AutoencoderKL", scaling_factor=1.0, **vae)
    task |= dict(vae=model, scale_by_std=True)
    stage["init"] = dict(vae=dict(stage="vae", without="discriminator|lpips"))
    held = held_out(world, eval_count, batches=8)
    pictures = scenes(task["size"], vae_world or world)
    first = autoencoder(model, data=pictures, evaluate=held, **autoencoding)
    return dict(stages={"vae": first, name: stage}, order=("vae", name))


def text_unet(
    encoder: Mapping[str, Any],
    net: Mapping[str, Any],
    *,
    size: int,
    width: int,
    world: Mapping[str, Any],
    eval_count: int,
    text: Mapping[str, int],
    unet: Mapping[str, Any],
    knobs: Mapping[str, Any],
    eval_prompts: int,
    prompts: tuple[str, ...],
    vae: Mapping[str, Any] | None = None,
    autoencoder: Mapping[str, Any] | None = None,
    cached: int = 0,
    scales: tuple[float, ...] = (),
    vae_world: Mapping[str, Any] | None = None,
    asked_world: Mapping[str, Any] | None = None,
    **diffuse,
) -> dict[str, Any]:
    """A config of a U-Net told of a text by cross-attention, trained on scenes of `size` pixels with its encoder.

    encoder: spec of the text encoder, whose states are `width` wide.  net: arguments of UNet.  text: of `bpe`.
    world, eval_count, vae, autoencoder, cached, vae_world: see `diffusion`.  asked_world: of the evaluation, `world` by
    default.  unet: of `train`.  knobs: of `generate`.
    eval_prompts, scales: of `scene_eval`.  diffuse: other settings of Diffuse.
    """
    channels = vae["latent_channels"] if vae else 3
    network = dict(
        target="vgen.models.unet:UNet", in_channels=channels, out_channels=channels, context_dim=width, **net
    )
    task = dict(network=network, size=size, text_encoder=encoder, train_text=True, **diffuse)
    stages = diffusion(
        "unet", task, world=world, eval_count=eval_count, settings=unet, vae=vae, autoencoding=autoencoder,
        cached=cached, vae_world=vae_world,
    )  # fmt: skip
    return dict(
        **stages,
        text=bpe(**text),
        generate=generate("unet", **knobs),
        eval=scene_eval(asked_world or world, eval_prompts, off=1.0, scales=scales),
        prompts=prompts,
    )


def contrastive(
    name: str,
    *,
    size: int,
    world: Mapping[str, Any],
    eval_count: int,
    features: int,
    text: Mapping[str, int],
    image: Mapping[str, Any],
    words: Mapping[str, Any],
    settings: Mapping[str, Any],
    pictures: int,
    cached: int = 0,
    **task,
) -> dict[str, Any]:
    """A config of one stage `name` that trains Contrastive on scenes of `size` pixels and their captions.

    features: width of the shared space.  text: of `bpe`.  image: arguments of `clip_vit`.  words: of TextTower.
    settings: of `train`.  pictures: how many ClipQuality looks at.  task: other settings of Contrastive, or another
      target and its settings.
    """
    end = 1  # of the texts that `bpe` makes
    visual = dict(
        target="vgen.models.clip:ImageTower", vit=dict(target="vgen.models.clip:clip_vit", image_size=size, **image),
        features=features,
    )  # fmt: skip
    tower = dict(
        target="vgen.models.clip:TextTower", vocab=text["vocab_size"], length=text["length"], eos=end,
        features=features, **words,
    )  # fmt: skip
    network = dict(target="vgen.models.clip:CLIP", visual=visual, text=tower)
    stage = dict(
        task=dict(target="vgen.tasks.contrastive:Contrastive", network=network, size=size) | task,
        data=scenes(size, world, cached=cached), evaluate=held_out(world, eval_count),
        train=train(**settings),
    )  # fmt: skip
    measure = dict(target="vgen.metrics.encoder_eval:ClipQuality", world=world, pictures=pictures, stage=name)
    return dict(stages={name: stage}, order=(name,), text=bpe(**text), eval=measure)


def generate(stage: str, *, batch_size: int, **knobs) -> dict[str, Any]:
    """A config's `generate` where one stage makes the pictures; knobs: the defaults of its `sample`."""
    return dict(stages=(stage,), batch_size=batch_size, knobs={stage: knobs})


def class_prompts(classes: int) -> tuple[str, ...]:
    """A config's `prompts` where these are numbers of classes: eight of them, or fewer, from all over.

    Steps of the golden ratio: a fixed number between them may meet one shape, say, again and again.
    """
    golden = (5**0.5 - 1) / 2
    return tuple(map(str, sorted({int(i * golden % 1 * classes) for i in range(8)})))


def imported(weights: Any, **folders: str) -> dict[str, Any]:
    """A stage's `init`: {part of the task: folder below `weights`}, networks of a published pipeline.

    weights: the pipeline's folder, such as a FieldReference that --config.weights sets.
    """
    return {
        part: dict(file=weights + f"/{folder}", reader="vgen.convert.load:params") for part, folder in folders.items()
    }


def bpe(length: int, vocab_size: int) -> dict[str, Any]:
    """A config's `text`: a byte-level BPE trained on the captions; rows of `length` tokens."""
    return dict(kind="bpe", length=length, vocab_size=vocab_size, path="")


def scene_eval(world: Mapping[str, Any], prompts: int, **kwargs) -> dict[str, Any]:
    """A config's `eval`: pictures of so many held-out captions, read by the scene oracle, with guidance and without.

    kwargs: other arguments of SceneEval.
    """
    return dict(
        target="vgen.metrics.scene_eval:SceneEval", world=world, prompts=prompts, split="heldout", guidance_off=True,
        **kwargs,
    )  # fmt: skip
