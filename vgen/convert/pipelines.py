"""Whole pipelines of diffusers as a `vgen.tasks.diffuse.Diffuse` with its parameters, and back.

The converter knows networks and nothing they are for: the task, its schedule and the tokenizers are named by path.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vgen.config import UserError
from vgen.convert import export as exporting
from vgen.convert import formats, hub, schedulers
from vgen.convert import load as loading
from vgen.convert.rules import ConvertError
from vgen.convert.sources import Pipeline, local
from vgen.data.text import T5, Clip, Texts
from vgen.models.autoencoder import AutoencoderKL
from vgen.models.clip import TextTower
from vgen.models.dit import DiT
from vgen.models.pixart import PixArt
from vgen.models.prompt import ClipPairPrompt, ClipPrompt
from vgen.models.t5 import T5Encoder
from vgen.models.unet import UNet
from vgen.tasks.diffuse import Diffuse
from vgen.types import Params


class Kind(NamedTuple):
    """One class of pipelines.

    network: the part that denoises.  text: "clip", "clip_pair", "t5" or "" for none.  latent: whether there is a vae.
    length: of the texts in tokens, None for the tower's.  labels: whether it is told a class.
    """

    network: str
    text: str = ""
    latent: bool = True
    length: int | None = None
    labels: bool = False


_SD, _SDXL = Kind("unet", "clip"), Kind("unet", "clip_pair")
PIPELINES: Mapping[str, Kind] = {
    "StableDiffusionPipeline": _SD,
    "StableDiffusionImg2ImgPipeline": _SD,
    "StableDiffusionInpaintPipeline": _SD,
    "StableDiffusionXLPipeline": _SDXL,
    "StableDiffusionXLImg2ImgPipeline": _SDXL,
    "StableDiffusionXLInpaintPipeline": _SDXL,
    "PixArtAlphaPipeline": Kind("transformer", "t5", length=120),
    "PixArtSigmaPipeline": Kind("transformer", "t5", length=300),
    "DiTPipeline": Kind("transformer", labels=True),
    "DDPMPipeline": Kind("unet", latent=False),
    "DDIMPipeline": Kind("unet", latent=False),
}
BY_PARTS = ("AmusedPipeline",)  # of networks that another task than Diffuse is made of: its caller puts them together
_START, _END = 49_406, 49_407  # of CLIP's vocabulary


def by_parts(source: Pipeline) -> bool:
    """Whether a pipeline is read as its networks, one by one; UserError for a class that is not known at all."""
    name = source.index.get("_class_name")
    if name is None or name in BY_PARTS:
        return True
    if name not in PIPELINES:
        raise UserError(
            f"{source.path}: vgen has no {name}; it has {', '.join(PIPELINES)}; "
            f"vgen.load(..., parts=[...]) reads the networks of any pipeline, here {', '.join(source)}"
        )
    return False


def load(source: Pipeline, **place) -> tuple[Any, Params]:
    """(Diffuse, parameters) of a pipeline; place: as of `vgen.convert.load.load`, for each network by itself.

    Raises UserError, one sentence, for a pipeline, scheduler or network that Diffuse cannot be.
    """
    kind = PIPELINES[source.index["_class_name"]]
    parts = _part_names(kind)
    if missing := [part for part in parts.values() if part not in source]:
        raise UserError(f"{source.path}: has no weights of {', '.join(missing)}; there are {', '.join(source)}")
    try:
        fields = schedulers.settings(_file(source.path, "scheduler", "scheduler_config.json"))
        nets = {ours: loading.network(source[part]) for ours, part in parts.items()}
        task = _task(source, kind, nets, fields)
    except UserError as error:
        raise type(error)(f"{source.path}: {error}") from None
    except ValueError as error:  # Diffuse's own, of settings that contradict each other
        raise UserError(f"{source.path}: {error}") from None
    params = {ours: loading.read(net, **place) for ours, net in nets.items()}
    if kind.text == "clip_pair":
        params["text_encoder"] = {name: params.pop(name) for name in ("first", "second")}
    return task, params


def _part_names(kind: Kind) -> dict[str, str]:
    """{name here: part of the folder} of the networks."""
    parts = {"network": kind.network}
    if kind.latent:
        parts["vae"] = "vae"
    if kind.text == "clip_pair":
        return parts | {"first": "text_encoder", "second": "text_encoder_2"}
    return parts | ({"text_encoder": "text_encoder"} if kind.text else {})


def _task(source: Pipeline, kind: Kind, nets: Mapping[str, Any], fields: dict[str, Any]) -> Any:
    """The Diffuse of networks and of what the scheduler says."""
    models = {name: net.model for name, net in nets.items()}
    network, vae = models["network"], models.get("vae")
    channels = vae.latent_channels if vae is not None else 3
    if vae is None:
        wanted = 2 if fields.get("variance") else 1
    else:
        if "variance" in fields:
            raise ConvertError("the scheduler's variance_type must be fixed where a vae is: pipelines drop the learned")
        wanted = network.out_channels / channels
        fields |= dict(variance="learned_range") if wanted == 2 else {}
    if network.out_channels != wanted * channels or wanted not in (1, 2):
        raise ConvertError(f"the network gives {network.out_channels} channels for {channels} of the latents")
    if network.in_channels not in ((channels, 2 * channels + 1) if kind.text.startswith("clip") else (channels,)):
        known = f"{channels}, or {2 * channels + 1} for inpainting" if kind.text.startswith("clip") else str(channels)
        raise ConvertError(f"the network takes {network.in_channels} channels, known are {known}")
    side = nets["network"].source.config.get("sample_size") or getattr(network, "sample_size", None)
    if not isinstance(side, int):
        raise ConvertError(f"sample_size of the network must be one number, got {side!r}")
    fields |= dict(network=network, vae=vae, size=side * (vae.downsampling if vae is not None else 1))
    fields |= _condition(source, kind, models)
    return Diffuse(**fields)


def _condition(source: Pipeline, kind: Kind, models: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of Diffuse about text and classes."""
    network = models["network"]
    labels = getattr(network, "num_classes", None)
    if kind.labels:
        return dict(classes=labels)
    if labels is not None:
        raise ConvertError(f"{source.index['_class_name']} has no classes, the network has {labels}")
    if kind.text == "t5":
        return dict(text_encoder=models["text_encoder"], micro="size" if network.micro else "none")
    if not kind.text:
        return {}
    start, end, pad = _ids(source.path / "tokenizer")
    fields = dict(empty=(start, end), pad_id=pad)
    if kind.text == "clip":
        if network.added_dim is not None:
            raise ConvertError("the network takes micro-conditions, which pipelines of one text encoder have not")
        return fields | dict(text_encoder=ClipPrompt(models["text_encoder"]))
    first, second = models["first"], models["second"]
    added = (second.features or 0) + 6 * network.added_time_width
    if network.added_dim != added:
        raise ConvertError(f"the network takes {network.added_dim} numbers beside the text, expected {added}")
    encoder = ClipPairPrompt(first, second, _ids(source.path / "tokenizer_2")[2])
    zeros = source.index.get("force_zeros_for_empty_prompt", True)
    return fields | dict(text_encoder=encoder, micro="crop", zero_empty=zeros)


def _ids(folder: Path) -> tuple[int, int, int]:
    """(start, end, padding) of a CLIP tokenizer's folder; without one, those of CLIP."""
    if not folder.is_dir():
        return _START, _END, 0 if folder.name == "tokenizer_2" else _END
    tokenizer = Clip.load(folder)
    return tokenizer.start_id, tokenizer.end_id, tokenizer.pad_id


def _file(folder: Path, part: str, name: str) -> dict[str, Any]:
    """A JSON file of a part; in folders of one network it is beside the weights."""
    paths = [folder / part / name, folder / name]
    for path in paths:
        if path.is_file():
            return formats.read_json(path)
    raise UserError(f"there is no {paths[0]}")


# ------------------------------------------------------------------------------------------------------------ prompts


class Prompts(NamedTuple):
    """Prompts as the `conds` of `Diffuse.sample`, through the tokenizer of a pipeline's folder.

    length: tokens of a text; what is longer is cut, under a warning that shows what was cut.
    lower: whether texts are stripped and made lower-case first (PixArt).
    """

    tokenizer: Any
    length: int
    lower: bool = False

    def __call__(self, prompts: str | Sequence[str], negative: str | Sequence[str] | None = None) -> dict[str, Any]:
        """{text int32 [b, length], text_mask bool} and, where there are any, {negative, negative_mask}.

        negative: one for each prompt, or one for all.  Raises ValueError where their numbers differ.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        conds = dict(zip(("text", "text_mask"), self._encode(prompts)))
        if negative is None:
            return conds
        negative = [negative] * len(prompts) if isinstance(negative, str) else list(negative)
        if len(negative) != len(prompts):
            raise ValueError(f"prompts: {len(negative)} negative prompts for {len(prompts)} prompts")
        return conds | dict(zip(("negative", "negative_mask"), self._encode(negative)))

    def _encode(self, texts: Sequence[str]):
        # QUIRK: the pipelines of PixArt do this to every caption (diffusers, _text_preprocessing; tested)
        texts = [text.lower().strip() for text in texts] if self.lower else texts
        return Texts(self.tokenizer, self.length).prompts(texts)


def prompts(where: str | Path, length: int | None = None) -> Prompts:
    """The tokenizer of a pipeline's folder.

    where: as of `vgen.load`.  length: in tokens, by default the pipeline's: 77 of CLIP, 120 of PixArt-alpha, 300 of
    PixArt-Sigma.  Raises UserError for a pipeline without text, or of two tokenizers with different vocabularies.
    """
    folder = _folder(where)
    name = formats.read_json(folder / hub.PIPELINE).get("_class_name")
    kind = PIPELINES.get(name)
    if kind is None or not kind.text:
        known = ", ".join(name for name, kind in PIPELINES.items() if kind.text)
        raise UserError(f"{where}: a {name} has no prompts; pipelines that have are {known}")
    if kind.text == "t5":
        return Prompts(T5.load(folder / "tokenizer"), length or kind.length, True)
    tokenizer = Clip.load(folder / "tokenizer")
    if kind.text == "clip_pair" and (folder / "tokenizer_2").is_dir():
        second = Clip.load(folder / "tokenizer_2")
        probe = "A photo of 2 cats; the quick-brown fox"
        same = [t.encode([probe], 77)[0][t.encode([probe], 77)[1]].tolist() for t in (tokenizer, second)]
        if same[0] != same[1]:
            raise UserError(f"{where}: tokenizer and tokenizer_2 have different vocabularies; vgen gives both one text")
    return Prompts(tokenizer, length or _file(folder, "text_encoder", "config.json").get("max_position_embeddings", 77))


def _folder(where: str | Path) -> Path:
    """The local folder of a pipeline; UserError if it is none."""
    folder = local(where)
    if not (folder / hub.PIPELINE).is_file():
        raise UserError(f"{where}: there is no {hub.PIPELINE}: not the folder of a pipeline")
    return folder


# --------------------------------------------------------------------------------------------------------------- back

_LAYOUTS = (  # of modules, and their classes in model_index.json
    (AutoencoderKL, "vgen.convert.autoencoder:DIFFUSERS_KL", "diffusers"),
    (DiT, "vgen.convert.dit:DIFFUSERS", "diffusers"),
    (PixArt, "vgen.convert.pixart:DIFFUSERS", "diffusers"),
    (T5Encoder, "vgen.convert.t5:T5", "transformers"),
)


def _layout(model: Any) -> tuple[str, str]:
    """(family, library) in which diffusers reads a network."""
    if isinstance(model, UNet):
        return f"vgen.convert.unet_diffusers:{'PLAIN' if model.context_dim is None else 'TEXT'}", "diffusers"
    if isinstance(model, TextTower):
        return f"vgen.convert.clip:HF_TEXT{'' if model.features is None else '_PROJECTION'}", "transformers"
    for kind, family, library in _LAYOUTS:
        if isinstance(model, kind):
            return family, library
    raise ConvertError(f"no pipeline of diffusers has a {type(model).__name__}")


def export(where: str | Path, task: Any, params: Params, *, like: str | Path | None = None, kind: str = "") -> None:
    """Write a Diffuse as a folder that diffusers' `from_pretrained` reads.

    where: a new folder.  like: the pipeline it came from, whose class, scheduler, tokenizers and whatever else Diffuse
      has not are copied; without one the scheduler is written from the task's settings, which texts cannot do without.
    kind: the pipeline's class, by default that of `like`, or what the task's networks tell.
    Raises UserError where `where` holds something already, ConvertError for what diffusers cannot say.
    """
    folder = _folder(like) if like is not None else None
    index = formats.read_json(folder / hub.PIPELINE) if folder else {}
    kind = kind or index.get("_class_name") or _class_of(task)
    if kind not in PIPELINES:
        raise UserError(f"export: kind must be one of {', '.join(PIPELINES)}, got {kind!r}")
    if task.text_encoder is not None and folder is None:
        raise UserError("export: a pipeline with text needs like=FOLDER, whose tokenizers are copied")
    models = dict(network=task.network, vae=task.vae, text_encoder=task.text_encoder)
    weights = dict(params)
    if isinstance(task.text_encoder, ClipPairPrompt):
        models |= dict(first=task.text_encoder.first, second=task.text_encoder.second)
        weights |= weights.pop("text_encoder")
    elif isinstance(task.text_encoder, ClipPrompt):
        models |= dict(text_encoder=task.text_encoder.tower)
    if "latents" in weights:
        raise ConvertError("diffusers' latents have no scale of their own: put it into the vae's scaling_factor")
    path = exporting.new_folder(where)
    parts = _part_names(PIPELINES[kind])
    for ours, part in parts.items():
        family, library = _layout(models[ours])
        old = folder / part / "config.json" if folder else None
        config = formats.read_json(old) if old and old.is_file() else {}
        exporting.export(path / part, models[ours], weights[ours], family, config=config)
        settings = formats.read_json(path / part / "config.json")
        if "sample_size" in settings:  # of no account to the network, but from it a pipeline tells its pictures' size
            side = task.latent_shape()[0] if ours == "network" else config.get("sample_size", task.size)
            _write(path / part / "config.json", settings | {"sample_size": side})
        name = settings.get("_class_name") or settings["architectures"][0]
        index[part] = [library, name]
    if folder:
        for part in sorted(set(index) - set(parts.values())):
            if (folder / part).is_dir():
                shutil.copytree(folder / part, path / part)
        if not (folder / "scheduler").is_dir():  # a folder of one network
            (path / "scheduler").mkdir()
            shutil.copy(folder / "scheduler_config.json", path / "scheduler")
    else:
        config = schedulers.config_of(task)
        (path / "scheduler").mkdir()
        _write(path / "scheduler" / "scheduler_config.json", config)
        index["scheduler"] = ["diffusers", config["_class_name"]]
    _write(path / hub.PIPELINE, index | {"_class_name": kind})


def _class_of(task: Any) -> str:
    """The pipeline that a task without one is."""
    if task.vae is None:
        return "DDPMPipeline"
    if isinstance(task.network, DiT):
        return "DiTPipeline"
    raise UserError(f"export: name the kind of pipeline, one of {', '.join(PIPELINES)}")


def _write(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
