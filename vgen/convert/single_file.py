"""Whole Stable Diffusion models in one file of CompVis's or Stability's names, as a `vgen.tasks.diffuse.Diffuse`."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vgen.config import UserError
from vgen.convert import clip, schedulers, vqgan
from vgen.convert import load as loading
from vgen.convert.family import Family
from vgen.convert.pieces import Shapes, count
from vgen.convert.rules import Table
from vgen.convert.sources import Source, open_source
from vgen.models.clip import TextTower
from vgen.models.prompt import ClipPairPrompt, ClipPrompt
from vgen.tasks.diffuse import Diffuse
from vgen.types import Params

_OTHERS = (
    r"(model|model_ema|first_stage_model|denoiser|depth_model)\..*",
    vqgan.OUTSIDE_FIRST_STAGE[-1],
    r".*\.(position_ids|attn_mask|logit_scale)",
)
_SCHEDULE = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)


def _transformers(prefix: str, others: str = "") -> Family:
    """CLIP's text tower under transformers' names behind `prefix`.  others: names of a second tower."""

    def build(config: Mapping[str, Any], shapes: Shapes) -> TextTower:
        at = f"{prefix}text_model.encoder.layers."
        vocab, width = shapes[f"{prefix}text_model.embeddings.token_embedding.weight"]
        return TextTower(
            width=width,
            depth=count(shapes, f"{at}{{}}.mlp.fc1.weight"),
            heads=config.get("text_heads") or max(width // 64, 1),
            mlp_dim=shapes[f"{at}0.mlp.fc1.weight"][0],
            vocab=vocab,
            length=shapes[f"{prefix}text_model.embeddings.position_embedding.weight"][0],
            features=None,
        )

    def table(module: TextTower) -> Table:
        rules = [rule._replace(src=prefix + rule.src) for rule in clip.hf_text_table(module).rules]
        return Table(tuple(rules), ignore=(*_OTHERS, *([others] if others else [])))

    return _family(build, table)


def _open_clip(prefix: str, projection: bool, others: str = "") -> Family:
    """OpenCLIP's text tower behind `prefix`; without the projection, the last layer is not read either (SD 2)."""

    def build(config: Mapping[str, Any], shapes: Shapes) -> TextTower:
        vocab, width = shapes[f"{prefix}token_embedding.weight"]
        return TextTower(
            width=width,
            depth=count(shapes, f"{prefix}transformer.resblocks.{{}}.ln_1.weight") - (not projection),
            heads=config.get("text_heads") or max(width // 64, 1),
            mlp_dim=shapes[f"{prefix}transformer.resblocks.0.mlp.c_fc.weight"][0],
            act="gelu",
            vocab=vocab,
            length=shapes[f"{prefix}positional_embedding"][0],
            features=shapes[f"{prefix}text_projection"][1] if projection else None,
        )

    def table(module: TextTower) -> Table:
        ours = [rule for rule in clip.openai_text_rules(prefix) if projection or "projection" not in rule.dst]
        # QUIRK: Stable Diffusion 2 reads the states ahead of the last layer, which its files hold all the same
        unused = () if projection else (rf"{prefix}(transformer\.resblocks\.{module.depth}\..*|text_projection)",)
        return Table(tuple(ours), ignore=(*_OTHERS, *unused, *([others] if others else [])))

    return _family(build, table)


def _family(build: Callable, table: Callable) -> Family:
    return Family(build, table, clip.HF_TEXT.inputs, outputs=clip.HF_TEXT.outputs)


SD1_TEXT = _transformers("cond_stage_model.transformer.")
SD2_TEXT = _open_clip("cond_stage_model.model.", False)
SDXL_FIRST = _transformers("conditioner.embedders.0.transformer.", r"conditioner\.embedders\.1\..*")
SDXL_SECOND = _open_clip("conditioner.embedders.1.model.", True, r"conditioner\.embedders\.0\..*")

_HERE, _LATENT = "vgen.convert.single_file", dict(
    network="vgen.convert.unet_openai:LDM_DENOISER", vae="vgen.convert.autoencoder:FIRST_STAGE_KL"
)  # fmt: skip
_LAYOUTS: Mapping[str, tuple[str, dict[str, str]]] = {  # name -> (an array that only this layout has, families)
    "Stable Diffusion 1": (
        "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight",
        {"text_encoder": f"{_HERE}:SD1_TEXT"},
    ),
    "Stable Diffusion 2": ("cond_stage_model.model.token_embedding.weight", {"text_encoder": f"{_HERE}:SD2_TEXT"}),
    "Stable Diffusion XL": (
        "conditioner.embedders.1.model.token_embedding.weight",
        {"first": f"{_HERE}:SDXL_FIRST", "second": f"{_HERE}:SDXL_SECOND"},
    ),
}


def kind_of(source: Source) -> str:
    """Which whole model a file holds, "Stable Diffusion 1", "2" or "XL"; "" for anything else."""
    return next((name for name, (mark, _) in _LAYOUTS.items() if mark in source.tensors), "")


def load_plain(where: str | Path, kind: str, **place) -> tuple[Any, Params]:
    """`load` with the published size of a kind.  Raises UserError for Stable Diffusion 2, which has two."""
    if kind == "Stable Diffusion 2":
        raise UserError(
            f"{where} is {kind}, and does not tell if it was made for 512 pixels (predicts the noise) or 768 (v): call "
            'vgen.convert.single_file.load(FILE, size=768, prediction="v_prediction"), or size=512'
        )
    return load(where, size=1024 if kind == "Stable Diffusion XL" else 512, **place)


def load(
    where: str | Path, *, size: int, prediction: str = "epsilon", config: Mapping[str, Any] | None = None, **place
) -> tuple[Any, Params]:
    """(Diffuse, parameters) of one file: Stable Diffusion 1, 2 or XL, with its autoencoder and text encoders.

    size: pixels of its pictures; prediction: "epsilon", or "v_prediction" of Stable Diffusion 2 at 768 pixels: a file
      tells neither.  config: what shapes do not tell either, for models of unpublished sizes: num_heads or
      num_head_channels of the network, text_heads, scaling_factor.  place: as of `vgen.load`, for each network.
    It is sampled as the published ones are: DDIM, and XL by Euler's method.
    Raises UserError for another file, ConvertError as `vgen.load`.
    """
    source = open_source(where)
    kind = "" if isinstance(source, dict) else kind_of(source)
    if not kind:
        raise UserError(f"{where}: is no whole model of {', '.join(_LAYOUTS)}: the text encoder of none is in it")
    large = kind == "Stable Diffusion XL"
    settings = dict(scaling_factor=0.13025 if large else 0.18215) | dict(config or {})
    source = source._replace(config=settings)
    nets = {name: loading.network(source, family) for name, family in (_LATENT | _LAYOUTS[kind][1]).items()}
    models = {name: net.model for name, net in nets.items()}
    scheduler = dict(_SCHEDULE, _class_name="DDIMScheduler", clip_sample=False, set_alpha_to_one=False)
    if large:
        scheduler = dict(_SCHEDULE, _class_name="EulerDiscreteScheduler", timestep_spacing="leading")
    fields = schedulers.settings(scheduler | dict(prediction_type=prediction))
    tower = models["first" if large else "text_encoder"]
    end = tower.vocab - 1
    fields |= dict(empty=(end - 1, end), pad_id=0 if kind == "Stable Diffusion 2" else end)
    if large:
        fields |= dict(text_encoder=ClipPairPrompt(tower, models["second"]), micro="crop", zero_empty=True)
    else:
        fields |= dict(text_encoder=ClipPrompt(tower))
    task = Diffuse(network=models["network"], vae=models["vae"], size=size, **fields)
    params = {name: loading.read(net, **place) for name, net in nets.items()}
    if large:
        params["text_encoder"] = {name: params.pop(name) for name in ("first", "second")}
    return task, params
