"""Configs of published pipelines, at the sizes of tiny ones: their stages hold what `vgen.load` reads of the folder."""

import runpy
from pathlib import Path

import jax
import numpy as np
import pytest

import vgen
from tests.conftest import quick_compilation
from vgen import trees
from vgen.config import UserError
from vgen.convert import maskgit, unet_openai
from vgen.convert.vqgan import MASKGIT_VQ
from vgen.stages import Run
from vgen.system import System

diffusers = pytest.importorskip("diffusers")

from tests.convert import pipelines_test as tiny  # noqa: E402
from tests.convert.pipelines_test import t5, vocabulary  # noqa: E402, F401  fixtures
from tests.convert.tables import draw, export, write_msgpack  # noqa: E402

ROOT = Path(__file__).parents[1]
TOWER = dict(width=16, depth=2, heads=2, mlp_dim=24, vocab=55, length=tiny.LENGTH)
VAE = dict(channels=4, multipliers=(1, 2), blocks=1, groups=2)
NET = dict(widths=(8, 16), attention=(0, 1), blocks=1, heads=2, head_dim=None, groups=4, context_dim=16)


def stable_diffusion(vocabulary, scale):  # noqa: F811
    """A tiny pipeline of diffusers."""
    if scale != "sdxl":
        kind = diffusers.PNDMScheduler if scale == "paper" else diffusers.DDIMScheduler
        said = tiny.SCHEDULERS["pndm" if scale == "paper" else "sd2"][1]
        return tiny.stable_diffusion(vocabulary, kind(**said))
    network = tiny.unet(
        cross_attention_dim=28, addition_embed_type="text_time", addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=8 + 6 * 4,
    )  # fmt: skip
    tokens = [tiny.tokenizer(vocabulary, **kwargs) for kwargs in ({}, dict(pad_token="!"))]
    return tiny.finished(
        diffusers.StableDiffusionXLPipeline, unet=network, vae=tiny.vae(), text_encoder=tiny.tower(),
        text_encoder_2=tiny.tower(12, 8), tokenizer=tokens[0], tokenizer_2=tokens[1],
        scheduler=diffusers.EulerDiscreteScheduler(**tiny.SCHEDULERS["euler leading"][1]),
    )  # fmt: skip


def config_of(scale, folder):
    """configs/stable_diffusion.py with the sizes of the tiny one."""
    config = runpy.run_path(str(ROOT / "configs" / "stable_diffusion.py"))["get_config"](scale)
    config.weights, config.text.length, config.mesh = str(folder), tiny.LENGTH, {}
    stage = config.stages.unet
    task = stage.task
    task.size, task.empty, task.pad_id, stage.data.size = 16, (53, 54), 54, 16
    task.vae.update(VAE)
    task.network.update(NET)
    if scale == "sdxl":
        task.network.update(dict(context_dim=28, added_dim=32, added_time_width=4, mid_attention=1))
        task.text_encoder.first.update(TOWER)
        task.text_encoder.second.update(TOWER | dict(width=12, features=8, act="quick_gelu", mlp_dim=24))
    else:
        task.text_encoder.tower.update(TOWER | dict(act="quick_gelu"))
    return config


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("scale", ["paper", "sd21", "sdxl"])
def test_stable_diffusion_is_what_load_reads(vocabulary, tmp_path, scale):  # noqa: F811
    stable_diffusion(vocabulary, scale).save_pretrained(tmp_path / "weights")
    run = Run(config_of(scale, tmp_path / "weights"), tmp_path / "run")
    run.check()
    found, step = run.weights("unet")
    _, want = vgen.load(tmp_path / "weights")
    want = trees.flatten(want)
    assert step == 0 and {path: leaf.shape for path, leaf in found.items()} == {p: a.shape for p, a in want.items()}
    for path, value in want.items():
        np.testing.assert_array_equal(found[path], value)
    if scale != "paper":
        return
    with quick_compilation():
        pictures = System(run)(["a red cat", "two dogs"], steps=2)["unet"]
    assert pictures.shape == (2, 16, 16, 3) and (pictures[0] != pictures[1]).any()
    task, params = vgen.load(tmp_path / "weights")
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), 0), 0)
    conds = vgen.convert.pipelines.prompts(tmp_path / "weights")(["a red cat"])
    with quick_compilation():
        again = jax.jit(task.sample)(params, key, conds, guidance_scale=7.5, steps=2)["image_out"]
    assert np.abs(pictures[:1].astype(int) - np.asarray(again, int)).max() <= 1


def same(run, stage, folder):
    """The stage's weights are those of the folder."""
    want = trees.flatten(vgen.load(folder)[1])
    found, _ = run.weights(stage)
    assert {path: leaf.shape for path, leaf in found.items()} == {path: leaf.shape for path, leaf in want.items()}
    for path, value in want.items():
        np.testing.assert_array_equal(found[path], np.asarray(value).astype(found[path].dtype))


def loaded(name):
    """configs/<name>.py at scale imported."""
    config = runpy.run_path(str(ROOT / "configs" / f"{name}.py"))["get_config"]("imported")
    config.mesh = {}
    return config


def test_ddpm_is_what_load_reads(tmp_path):
    sizes = dict(
        sample_size=16, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, norm_eps=1e-6,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=None, flip_sin_to_cos=False, freq_shift=1, downsample_padding=0,
    )  # fmt: skip
    pipe = tiny.finished(
        diffusers.DDPMPipeline, unet=diffusers.UNet2DModel(**sizes), scheduler=diffusers.DDPMScheduler()
    )
    pipe.save_pretrained(tmp_path / "weights")
    config = loaded("ddpm")
    config.weights = str(tmp_path / "weights" / "unet" / "diffusion_pytorch_model.safetensors")
    config.stages.unet.task.size = 16
    config.stages.unet.task.network.update(dict(widths=(8, 16), attention=(0, 1), blocks=1, groups=4))
    run = Run(config, tmp_path / "run")
    run.check()
    same(run, "unet", tmp_path / "weights")
    assert run.task("unet").network.clone(dropout=0.0) == vgen.load(tmp_path / "weights")[0].network


def test_dit_is_what_load_reads(tmp_path):
    net = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        num_embeds_ada_norm=5,
    )  # fmt: skip
    pipe = tiny.finished(
        diffusers.DiTPipeline, transformer=net, vae=tiny.vae(), scheduler=diffusers.DDIMScheduler(clip_sample=False)
    )
    for block in pipe.transformer.transformer_blocks:  # what the authors have once
        block.norm1.emb.load_state_dict(pipe.transformer.transformer_blocks[0].norm1.emb.state_dict())
    pipe.save_pretrained(tmp_path / "weights")
    config = loaded("dit")
    config.weights = str(tmp_path / "weights")
    task = config.stages.dit.task
    task.size, task.classes = 16, 5
    task.vae.update(VAE)
    task.network.update(dict(depth=2, width=16, heads=2, sample_size=8, num_classes=5))
    run = Run(config, tmp_path / "run")
    run.check()
    same(run, "dit", tmp_path / "weights")
    assert run.task("dit").network.clone(mlp_dim=64) == vgen.load(tmp_path / "weights")[0].network


def test_pixart_is_what_load_reads(t5, tmp_path):  # noqa: F811
    net = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=8, num_layers=2,
        cross_attention_dim=24, caption_channels=12, sample_size=128,
    )  # fmt: skip
    pipe = tiny.finished(
        diffusers.PixArtAlphaPipeline, tokenizer=t5[0], text_encoder=t5[1], vae=tiny.vae(), transformer=net,
        scheduler=diffusers.DPMSolverMultistepScheduler(),
    )  # fmt: skip
    pipe.save_pretrained(tmp_path / "weights")
    config = loaded("pixart")
    config.weights = str(tmp_path / "weights")
    stage = config.stages.quality
    stage.task.size, stage.data.size = 256, 16
    stage.task.vae.update(VAE)
    stage.task.network.update(dict(depth=2, width=24, heads=2, context_width=12))
    stage.task.text_encoder.update(dict(depth=2, width=12, heads=2, head_dim=4, mlp_dim=16, vocab=32))
    run = Run(config, tmp_path / "run")
    run.check()
    same(run, "quality", tmp_path / "weights")
    # the interpolation is the class's default in a tiny config, and 2 in the published one
    assert run.task("quality").network.clone(mlp_dim=96) == vgen.load(tmp_path / "weights")[0].network.clone(
        interpolation=2.0
    )


def test_adm_is_what_load_reads(tmp_path):
    """Two files of state dicts, which hold no settings; the heads are those of the published networks."""
    torch = pytest.importorskip("torch")
    config, sizes = loaded("adm"), dict(widths=(64, 128), attention=(0, 1), blocks=1)
    config.weights = str(tmp_path)
    stage = config.stages.unet
    task = stage.task
    task.size, task.classes, stage.data.size = 16, 5, 16
    task.network.update(sizes | dict(num_classes=5))
    task.classifier.update(sizes | dict(image_size=16, outputs=5))
    run = Run(config, tmp_path / "run")
    task = run.task("unet")
    published = {
        "256x256_diffusion": (task.network, unet_openai.ADM),
        "256x256_classifier": (task.classifier, unet_openai.ADM_CLASSIFIER),
    }
    for name, (module, family) in published.items():
        params = draw(module, **family.inputs(module, np.random.default_rng(0)))
        state = {key: torch.from_numpy(np.ascontiguousarray(a)) for key, a in export(family, module, params).items()}
        torch.save(state, tmp_path / f"{name}.pt")
    run.check()
    found, step = run.weights("unet")
    parts = {"network": "256x256_diffusion", "classifier": "256x256_classifier"}
    assert step == 0 and {path.split("/")[0] for path in found} == set(parts)
    for part, name in parts.items():
        module, params = vgen.load(tmp_path / f"{name}.pt")
        assert getattr(task, part) == module
        want = trees.flatten(params)
        assert set(trees.subtree(found, part)) == set(want)
        for path, value in want.items():
            np.testing.assert_array_equal(found[f"{part}/{path}"], value)


def test_maskgit_is_what_load_reads(tmp_path):
    """Two Flax trees without settings; the codebook is of the published size."""
    config = loaded("maskgit")
    config.weights = str(tmp_path)
    stage = config.stages.generator
    task = stage.task
    task.size, stage.data.size = 16, 16
    task.tokenizer.update(dict(channels=32, multipliers=(1, 2), blocks=1, latent_channels=8))
    task.transformer.update(dict(classes=5, length=65, depth=1, width=16, heads=2, mlp_dim=24))
    run = Run(config, tmp_path / "run")
    task = run.task("generator")
    published = {"maskgit": (task.transformer, maskgit.MASKGIT), "tokenizer": (task.tokenizer, MASKGIT_VQ)}
    for name, (module, family) in published.items():
        params = draw(module, **family.inputs(module, np.random.default_rng(0)))
        write_msgpack(tmp_path / f"{name}_imagenet256_checkpoint.msgpack", export(family, module, params))
    run.check()
    found, step = run.weights("generator")
    parts = {"transformer": "maskgit", "tokenizer": "tokenizer"}
    assert step == 0 and {path.split("/")[0] for path in found} == set(parts)
    for part, name in parts.items():
        module, params = vgen.load(tmp_path / f"{name}_imagenet256_checkpoint.msgpack")
        mine = getattr(task, part)
        assert module == mine if part == "transformer" else module.clone(layout="maskgit") == mine
        want = trees.flatten(params)
        assert set(trees.subtree(found, part)) == set(want)
        for path, value in want.items():
            np.testing.assert_array_equal(found[f"{part}/{path}"], value)


def test_a_folder_that_is_not_named(tmp_path):
    run = Run(config_of("paper", "SET_WEIGHTS"), tmp_path / "run")
    run.check()
    with pytest.raises(UserError, match="SET_WEIGHTS/tokenizer"):
        System(run)
