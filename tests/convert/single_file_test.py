"""Whole models in one file, in CompVis's and Stability's names."""

import dataclasses

import jax
import numpy as np
import pytest

import vgen
from tests.convert import tables
from vgen.config import UserError
from vgen.convert import families, formats, single_file
from vgen.models.autoencoder import AutoencoderKL
from vgen.models.clip import TextTower
from vgen.models.unet import UNet

VAE = AutoencoderKL(channels=32, multipliers=(1, 1), blocks=1)
FAMILIES = {
    "sd1": ["single_file:SD1_TEXT"],
    "sd2": ["single_file:SD2_TEXT"],
    "sdxl": ["single_file:SDXL_FIRST", "single_file:SDXL_SECOND"],
}


def whole(kind):
    """({name: array} in CompVis's and Stability's names, (network, towers), parameters) of a model of 32 groups."""
    sizes = dict(depth=2, heads=1, mlp_dim=64, vocab=12, length=6, width=64)
    towers = [TextTower(**sizes, act="gelu" if kind == "sd2" else "quick_gelu", features=None)]
    towers += [TextTower(**sizes, act="gelu", features=8)] if kind == "sdxl" else []
    more = dict(heads=8) if kind == "sd1" else dict(head_dim=64, linear_projection=True)
    more |= dict(added_dim=8 + 6 * 256) if kind == "sdxl" else {}
    network = UNet(widths=(64,), blocks=1, attention=(1,), context_dim=64 * len(towers), **more)
    arrays = {"betas": np.zeros(3, np.float32), "model_ema.decay": np.zeros((), np.float32)}
    modules, params = [network, VAE, *towers], []
    names = ["unet_openai:LDM_DENOISER", "autoencoder:FIRST_STAGE_KL", *FAMILIES[kind]]
    for module, name in zip(modules, names, strict=True):
        family = families.get(f"vgen.convert.{name}")
        params.append(tables.draw(module, **family.inputs(module, np.random.default_rng(0))))
        arrays |= tables.export(family, module, params[-1])
    return arrays, (network, towers), params


@pytest.mark.parametrize("kind", FAMILIES)
def test_one_file(kind, tmp_path):
    """Networks and parameters as they were; the names are those of the repositories."""
    arrays, (network, towers), params = whole(kind)
    names = {"model.diffusion_model.out.2.weight", "first_stage_model.post_quant_conv.bias"}
    if kind == "sd1":
        names |= {"cond_stage_model.transformer.text_model.encoder.layers.1.self_attn.q_proj.weight"}
    elif kind == "sdxl":
        names |= {"conditioner.embedders.0.transformer.text_model.final_layer_norm.weight"}
        names |= {"conditioner.embedders.1.model.transformer.resblocks.1.attn.in_proj_bias"}
        names |= {"conditioner.embedders.1.model.text_projection", "model.diffusion_model.label_emb.0.0.weight"}
    else:  # with a layer more than is read
        at = "cond_stage_model.model.transformer.resblocks."
        names |= {f"{at}1.mlp.c_fc.weight", "cond_stage_model.model.ln_final.bias"}
        arrays |= {name.replace(at + "1", at + "2"): 2 * a for name, a in arrays.items() if name.startswith(at + "1")}
        arrays |= {"cond_stage_model.model.text_projection": np.zeros((64, 8), np.float32)}
    assert names <= set(arrays)
    formats.write_safetensors(tmp_path / "model.safetensors", arrays)
    prediction = "v_prediction" if kind == "sd2" else "epsilon"
    task, got = single_file.load(tmp_path / "model.safetensors", size=16, prediction=prediction)
    if kind == "sd2":
        with pytest.raises(UserError, match="made for 512 pixels .* or 768"):
            vgen.load(tmp_path / "model.safetensors")
    else:
        plain, same = vgen.load(tmp_path / "model.safetensors")
        assert plain == dataclasses.replace(task, size=512 if kind == "sd1" else 1024, schedule=plain.schedule)
        assert jax.tree.all(jax.tree.map(np.array_equal, same, got))
    text = got["text_encoder"]
    text = [text["first"], text["second"]] if kind == "sdxl" else [text]
    jax.tree.map(np.testing.assert_array_equal, params, [got["network"], got["vae"], *text])
    encoder = task.text_encoder
    assert task.network == network
    assert towers == ([encoder.first, encoder.second] if kind == "sdxl" else [encoder.tower])
    assert task.vae == dataclasses.replace(VAE, scaling_factor=0.13025 if kind == "sdxl" else 0.18215)
    assert (task.prediction, task.pad_id) == (("v", 0) if kind == "sd2" else ("eps", 11))
    assert (task.micro, task.zero_empty) == (("crop", True) if kind == "sdxl" else ("none", False))


def test_a_file_of_less(tmp_path):
    arrays = {name: array for name, array in whole("sd1")[0].items() if name.startswith("first_stage")}
    formats.write_safetensors(tmp_path / "vae.safetensors", arrays)
    with pytest.raises(UserError, match="is no whole model of Stable Diffusion 1, Stable Diffusion 2, Stable Diff"):
        single_file.load(tmp_path / "vae.safetensors", size=16)
