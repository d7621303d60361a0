"""The KL autoencoder in diffusers' layout and in CompVis's, alone or inside a checkpoint of a whole model."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from vgen.convert import vqgan
from vgen.convert.family import Family
from vgen.convert.pieces import Shapes
from vgen.convert.rules import Table
from vgen.models.autoencoder import AutoencoderKL


def _build_diffusers(config: Mapping[str, Any], shapes: Shapes) -> AutoencoderKL:
    stats = {k: tuple(config[k]) if config.get(k) else None for k in ("latents_mean", "latents_std")}
    return AutoencoderKL(
        **vqgan.diffusers_sizes(config),
        latent_channels=config.get("latent_channels", 4),
        mid_attention=config.get("mid_block_add_attention", True),
        quant_conv=config.get("use_quant_conv", True),
        post_quant_conv=config.get("use_post_quant_conv", True),
        scaling_factor=config.get("scaling_factor", 0.18215),
        shift_factor=config.get("shift_factor") or 0.0,
        **stats,
    )


def _config(module: AutoencoderKL) -> dict[str, Any]:
    stats = {k: list(v) if (v := getattr(module, k)) else None for k in ("latents_mean", "latents_std")}
    return dict(
        _class_name="AutoencoderKL",
        **vqgan.diffusers_config(module),
        mid_block_add_attention=module.mid_attention,
        use_quant_conv=module.quant_conv,
        use_post_quant_conv=module.post_quant_conv,
        scaling_factor=module.scaling_factor,
        shift_factor=module.shift_factor or None,
        **stats,
    )


def diffusers_table(module: AutoencoderKL) -> Table:
    rules = vqgan.diffusers_halves(len(module.multipliers)) + vqgan.quant_convs()
    return Table(tuple(rules), rename=vqgan.DIFFUSERS_OLD_NAMES)


def _compare(model: Any, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    import torch

    x = torch.from_numpy(vqgan.nchw(inputs["images"])).to(next(model.parameters()).dtype)
    with torch.no_grad():
        posterior = model.encode(x).latent_dist
        recon = model.decode(posterior.mode()).sample
    return {
        "reconstruction": vqgan.nhwc(recon),
        "mean": vqgan.nhwc(posterior.mean),
        "logvar": vqgan.nhwc(posterior.logvar),
    }


def _outputs(result: Any) -> dict[str, Any]:
    reconstruction, posterior = result
    return {"reconstruction": reconstruction, "mean": posterior.mean, "logvar": posterior.logvar}


DIFFUSERS_KL = Family(
    _build_diffusers, diffusers_table, vqgan.images, _config, "diffusers:AutoencoderKL", _compare, _outputs
)


def ldm_table(module: AutoencoderKL, prefix: str = "") -> Table:
    """CompVis's names, behind `prefix`."""
    rules = vqgan.taming_halves(vqgan.TAMING, prefix) + vqgan.quant_convs(prefix)
    return Table(tuple(rules), ignore=vqgan.OUTSIDE_FIRST_STAGE if prefix else vqgan.TRAINING_ONLY)


def _build_ldm(prefix: str):
    def build(config: Mapping[str, Any], shapes: Shapes) -> AutoencoderKL:
        return AutoencoderKL(
            **vqgan.taming_sizes(shapes, prefix),
            latent_channels=shapes[f"{prefix}decoder.conv_in.weight"][1],
            mid_attention=f"{prefix}encoder.mid.attn_1.q.weight" in shapes,
            quant_conv=f"{prefix}quant_conv.weight" in shapes,
            post_quant_conv=f"{prefix}post_quant_conv.weight" in shapes,
            **{k: config[k] for k in ("scaling_factor", "shift_factor") if k in config},
        )

    return build


LDM_KL = Family(_build_ldm(""), ldm_table, vqgan.images, outputs=_outputs)
FIRST_STAGE_KL = Family(
    _build_ldm(vqgan.FIRST_STAGE), lambda m: ldm_table(m, vqgan.FIRST_STAGE), vqgan.images, outputs=_outputs
)
