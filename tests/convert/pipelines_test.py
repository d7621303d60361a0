"""Whole pipelines: folders that diffusers wrote give its pictures, and folders written here load there."""

import dataclasses
import functools
import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import vgen
from tests.convert import tables
from tests.convert.tables import quick  # noqa: F401
from tests.diffusion.reference import nchw, replay
from vgen.config import UserError
from vgen.convert import pipelines, schedulers

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")

pytestmark = [pytest.mark.usefixtures("quick"), pytest.mark.filterwarnings("ignore::FutureWarning")]
SIDE, LENGTH, KEY = 8, 10, jax.random.key(3)  # of the latents, of texts
START = np.random.default_rng(0).standard_normal((2, SIDE, SIDE, 4)).astype(np.float32)
PROMPTS, NEGATIVE = ["a red cat", "Two DOGS on ice by night"], ["blurry", "bad"]  # the second one is too long
LETTERS = [chr(c) for c in range(97, 123)]
CUT = "ignore:a prompt is longer:UserWarning"
TABLE = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
SD_DDIM = dict(TABLE, clip_sample=False, set_alpha_to_one=False, steps_offset=1)


# ------------------------------------------------------------------------------------------------------ tiny pipelines


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    """A folder with the files of a CLIP tokenizer for single letters."""
    folder = tmp_path_factory.mktemp("tokenizer")
    names = ["!", *LETTERS, *(c + "</w>" for c in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({name: i for i, name in enumerate(names)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return folder


def tokenizer(vocabulary, **kwargs):
    return transformers.CLIPTokenizer.from_pretrained(vocabulary, model_max_length=LENGTH, **kwargs)


def tower(width=16, projection=None):
    kind = transformers.CLIPTextModel if projection is None else transformers.CLIPTextModelWithProjection
    ids = dict(vocab_size=55, bos_token_id=53, eos_token_id=54, pad_token_id=54, max_position_embeddings=LENGTH)
    sizes = dict(hidden_size=width, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    return kind(transformers.CLIPTextConfig(**ids, **sizes, projection_dim=projection or 8))


def vae(**kwargs):
    types = dict(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
    sizes = dict(block_out_channels=(4, 8), norm_num_groups=2, layers_per_block=1, latent_channels=4, sample_size=16)
    return diffusers.AutoencoderKL(**types, **sizes, **kwargs)


def unet(**kwargs):
    sizes = dict(
        sample_size=SIDE, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16),
        norm_num_groups=4, cross_attention_dim=16, attention_head_dim=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    return diffusers.UNet2DConditionModel(**sizes | kwargs)


ONE_LEVEL = dict(
    block_out_channels=(8,), down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",)
)  # fmt: skip


def finished(kind, **parts):
    """A pipeline whose every parameter is drawn anew."""
    for seed, part in enumerate(parts.values()):
        if isinstance(part, torch.nn.Module):
            tables.randomize(part, seed).float()
    made = kind(**parts)
    made.set_progress_bar_config(disable=True)
    return made


def stable_diffusion(vocabulary, scheduler, **kwargs):
    return finished(
        diffusers.StableDiffusionInpaintPipeline if kwargs else diffusers.StableDiffusionPipeline,
        unet=unet(**kwargs), vae=vae(), text_encoder=tower(), tokenizer=tokenizer(vocabulary), scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


APPLY = nn.Module.apply


@functools.cache
def compiled(module, method):
    return jax.jit(functools.partial(APPLY, module, method=method))


@pytest.fixture(autouse=True)
def shared(monkeypatch):
    """Each network is compiled by itself, once for all tasks it is part of; what is around it runs op by op."""

    def loop(low, high, body, carry):
        for i in range(low, int(high)):
            carry = body(i, carry)
        return carry

    def apply(self, *args, method=None, **kwargs):
        args, kwargs = jax.tree.map(np.asarray, (args, kwargs))  # of no weak types, for which it is compiled again
        return compiled(self, method)(*args, **kwargs)

    monkeypatch.setattr(jax.lax, "fori_loop", loop)
    monkeypatch.setattr(nn.Module, "apply", apply)


def ours(task, params, conds, scale=3.0, steps=5, start=START, **knobs):
    return task.sample(params, KEY, conds, guidance_scale=scale, steps=steps, start=start, **knobs)


def check(got, want):
    """got: of `Diffuse.sample`.  want: pictures in [0, 1]."""
    picture = np.asarray(got["image_out"], np.float64)
    want = np.round(np.asarray(want, np.float64) * 255)
    assert picture.shape == want.shape and picture.std() > 20 and ((picture > 0) & (picture < 255)).mean() > 0.3
    assert np.abs(picture - want).max() <= 1, np.abs(picture - want).max()


def theirs(pipe, *args, steps=5, scale=3.0, start=START, **kwargs):
    if start is not None:
        kwargs["latents"] = torch.from_numpy(nchw(start))
    return pipe(*args, num_inference_steps=steps, guidance_scale=scale, output_type="np", **kwargs).images


# ---------------------------------------------------------------------------------------------------- Stable Diffusion

E = "EulerDiscreteScheduler"
SCHEDULERS = {  # as Stable Diffusion 1 and 2 are sampled
    "pndm": ("PNDMScheduler", dict(TABLE, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1)),
    "ddim": ("DDIMScheduler", SD_DDIM),
    "sd2": ("DDIMScheduler", dict(SD_DDIM, prediction_type="v_prediction")),
    "zero snr": (
        "DDIMScheduler",
        dict(
            TABLE,
            clip_sample=False,
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            timestep_spacing="trailing",
        ),
    ),
    "euler": (E, dict(TABLE)),
    "euler leading": (E, dict(TABLE, timestep_spacing="leading", steps_offset=1)),
    "karras": (E, dict(TABLE, use_karras_sigmas=True, final_sigmas_type="sigma_min")),
    "heun": ("HeunDiscreteScheduler", dict(TABLE)),
    "dpm": ("DPMSolverMultistepScheduler", dict(TABLE, timestep_spacing="leading", steps_offset=1)),
    "dpm karras": ("DPMSolverMultistepScheduler", dict(TABLE, use_karras_sigmas=True, solver_type="heun")),
}


@pytest.fixture(scope="module")
def sd(vocabulary, tmp_path_factory):
    """(pipeline, its folder, task, params, prompts)"""
    pipe = stable_diffusion(vocabulary, diffusers.PNDMScheduler(**SCHEDULERS["pndm"][1]))
    folder = tmp_path_factory.mktemp("sd")
    pipe.save_pretrained(folder)
    return pipe, folder, *vgen.load(folder), pipelines.prompts(folder)


@pytest.mark.filterwarnings(CUT)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_stable_diffusion(sd, name):
    pipe, _, task, params, prompts = sd
    scheduler = getattr(diffusers, SCHEDULERS[name][0])(**SCHEDULERS[name][1])
    config = json.loads(scheduler.to_json_string())
    if name != "pndm":
        task = dataclasses.replace(task, **schedulers.settings(config))
    pipe.scheduler, seen = scheduler, []
    keep = lambda pipe, i, t, given: seen.append(given["latents"].numpy()) or {}
    want = theirs(pipe, PROMPTS, negative_prompt=NEGATIVE, steps=6, callback_on_step_end=keep)
    got = ours(task, params, prompts(PROMPTS, NEGATIVE), steps=6)
    check(got, want)
    last = float(scheduler.sigmas[-1]) if "Euler" in SCHEDULERS[name][0] else 0.0
    assert tables.error(nchw(got["latents"]) * (1 + last**2) ** 0.5, seen[-1]) <= 1e-5  # theirs keep alpha at 1


@pytest.mark.parametrize("name", ["ddim", "euler", "dpm"])
def test_a_picture_to_begin_from(sd, monkeypatch, name):
    pipe, _, task, params, prompts = sd
    scheduler = getattr(diffusers, SCHEDULERS[name][0])(**SCHEDULERS[name][1])
    pipe = diffusers.StableDiffusionImg2ImgPipeline(**pipe.components | dict(scheduler=scheduler))
    task = dataclasses.replace(task, **schedulers.settings(json.loads(scheduler.to_json_string())))
    image = np.random.default_rng(5).integers(0, 256, (2, 16, 16, 3)).astype(np.uint8)
    conds = prompts(["abc", "a dog"], NEGATIVE) | dict(image=image)
    got = ours(task, params, conds, steps=7, strength=0.6, start=None)
    place = jax.random.split(jax.random.split(KEY)[1])[0]  # of the draw of `sdedit`
    noise = torch.from_numpy(np.array(nchw(jax.random.normal(place, START.shape))))
    module = "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img.randn_tensor"
    monkeypatch.setattr(module, lambda *args, **kwargs: noise)
    latents = torch.from_numpy(nchw(task.encode(params, image)).copy())  # the mode, where theirs would draw
    want = theirs(
        pipe, ["abc", "a dog"], latents, negative_prompt=NEGATIVE, strength=0.6, steps=7, start=None
    )  # fmt: skip
    check(got, want)


def test_inpainting(vocabulary, tmp_path, monkeypatch):
    pipe = stable_diffusion(vocabulary, diffusers.DDIMScheduler(**SD_DDIM), in_channels=9, **ONE_LEVEL)
    pipe.save_pretrained(tmp_path)
    task, params = vgen.load(tmp_path)
    conds = pipelines.prompts(tmp_path)(["abc", "a dog"], NEGATIVE)
    rng = np.random.default_rng(5)
    image = rng.integers(0, 256, (2, 16, 16, 3)).astype(np.uint8)
    mask = rng.random((2, 16, 16)) < 0.5
    monkeypatch.setattr(
        "diffusers.models.autoencoders.vae.DiagonalGaussianDistribution.sample",
        lambda self, generator=None: self.mode(),
    )
    given = torch.from_numpy(nchw(image)).float() / 127.5 - 1, torch.from_numpy(mask[:, None]).float()
    want = theirs(pipe, ["abc", "a dog"], *given, height=16, width=16, negative_prompt=NEGATIVE)
    got = ours(task, params, conds | dict(beside=task.beside(params, image, mask)))
    check(got, want)
    other = ours(task, params, conds | dict(beside=task.beside(params, image, ~mask)))
    assert np.abs(np.asarray(other["latents"] - got["latents"])).max() > 0.1
    check_export(pipe, tmp_path, task, params)


# ------------------------------------------------------------------------------------------------------------- others


def check_export(pipe, folder, task, params, like=True):
    """What is written again loads in diffusers, with the same parameters and settings; returns the pipeline."""
    pipelines.export(folder / "back", task, params, like=folder if like else None)
    again = type(pipe).from_pretrained(folder / "back")
    again.set_progress_bar_config(disable=True)
    assert type(again.scheduler) is type(pipe.scheduler)
    old, new = (dict(p.scheduler.config) for p in (pipe, again))
    assert {k: v for k, v in new.items() if old.get(k) != v and k[0] != "_"} == {}
    for name, part in pipe.components.items():
        if isinstance(part, torch.nn.Module):
            ours, other = part.state_dict(), again.components[name].state_dict()
            assert set(ours) == set(other)
            assert all(torch.equal(value, other[key]) for key, value in ours.items())
            assert getattr(part.config, "sample_size", None) == getattr(
                again.components[name].config, "sample_size", None
            )
    return again


@pytest.fixture(scope="module")
def sdxl(vocabulary, tmp_path_factory):
    network = unet(
        cross_attention_dim=28, use_linear_projection=True, attention_head_dim=2, addition_embed_type="text_time",
        addition_time_embed_dim=4, projection_class_embeddings_input_dim=8 + 6 * 4, transformer_layers_per_block=2,
        **ONE_LEVEL,
    )  # fmt: skip
    pipe = finished(
        diffusers.StableDiffusionXLPipeline, unet=network, vae=vae(), text_encoder=tower(),
        text_encoder_2=tower(12, 8), tokenizer=tokenizer(vocabulary), tokenizer_2=tokenizer(vocabulary, pad_token="!"),
        scheduler=diffusers.EulerDiscreteScheduler(**TABLE, timestep_spacing="leading", steps_offset=1),
        add_watermarker=False,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("sdxl")
    pipe.save_pretrained(folder)
    return pipe, folder, *vgen.load(folder), pipelines.prompts(folder)


@pytest.mark.filterwarnings(CUT)
@pytest.mark.parametrize("negative", [NEGATIVE, None, ["", ""]])  # without one, zeros stand for no text
def test_sdxl(sdxl, negative):
    pipe, _, task, params, prompts = sdxl
    assert task.zero_empty and task.text_encoder.second_pad == 0 and task.pad_id == 54 and task.micro == "crop"
    sizes = dict(original=(40, 30), corner=(3, 5), target=(20, 16)) if negative else {}
    told = {k: np.full((2, 2), v, np.float32) for k, v in sizes.items()}
    names = dict(original="original_size", corner="crops_coords_top_left", target="target_size")
    want = theirs(pipe, PROMPTS, negative_prompt=negative, **{names[k]: v for k, v in sizes.items()})
    check(ours(task, params, prompts(PROMPTS, negative) | told), want)


def test_sdxl_back(sdxl):
    pipe, folder, task, params, _ = sdxl
    check_export(pipe, folder, task, params)


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    """(tokenizer, encoder)"""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((c, -3.0) for c in LETTERS)]
    config = transformers.T5Config(
        d_model=12, d_kv=4, d_ff=16, num_layers=2, num_heads=2, vocab_size=32, feed_forward_proj="gated-gelu"
    )
    return transformers.T5Tokenizer(vocab=pieces, extra_ids=0), transformers.T5EncoderModel(config)


@pytest.mark.filterwarnings(CUT)
@pytest.mark.parametrize("micro", [True, False])
def test_pixart(t5, tmp_path, micro):
    transformer = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=8, num_layers=2,
        cross_attention_dim=24, caption_channels=12, sample_size=128 if micro else SIDE,
    )  # fmt: skip
    scheduler = diffusers.DPMSolverMultistepScheduler()
    kind = diffusers.PixArtAlphaPipeline if micro else diffusers.PixArtSigmaPipeline
    parts = dict(tokenizer=t5[0], text_encoder=t5[1], vae=vae(), transformer=transformer, scheduler=scheduler)
    pipe = finished(kind, **parts)
    pipe.save_pretrained(tmp_path)
    task, params = vgen.load(tmp_path)
    prompts = pipelines.prompts(tmp_path)
    assert prompts.length == (120 if micro else 300) and task.micro == ("size" if micro else "none")
    prompts = prompts._replace(length=LENGTH)
    want = theirs(
        pipe,
        PROMPTS,
        height=16,
        width=16,
        use_resolution_binning=False,
        clean_caption=False,
        max_sequence_length=LENGTH,
    )
    check(ours(task, params, prompts(PROMPTS), shape=(16, 16)), want)
    check_export(pipe, tmp_path, task, params)


@pytest.mark.parametrize("name", ["DDIMScheduler", "DPMSolverMultistepScheduler"])
def test_dit(tmp_path, monkeypatch, name):
    from vgen.convert.dit import as_authors

    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=SIDE,
        num_embeds_ada_norm=1000,
    )  # fmt: skip
    scheduler = getattr(diffusers, name)(**dict(clip_sample=False) if name == "DDIMScheduler" else {})
    pipe = finished(diffusers.DiTPipeline, transformer=transformer, vae=vae(), scheduler=scheduler)
    shared = pipe.transformer.transformer_blocks[0].norm1.emb.state_dict()
    for block in pipe.transformer.transformer_blocks:
        block.norm1.emb.load_state_dict(shared)  # which the authors have once
    pipe.save_pretrained(tmp_path)
    as_authors(pipe.transformer)
    task, params = vgen.load(tmp_path)
    assert task.classes == 1000 and task.variance == "learned_range"
    noise = torch.from_numpy(nchw(START).copy())
    monkeypatch.setattr("diffusers.pipelines.dit.pipeline_dit.randn_tensor", lambda *args, **kwargs: noise)
    cases = [(4.0, 5), (1.0, 3)]
    wanted = [theirs(pipe, [3, 977], scale=scale, steps=steps, start=None) for scale, steps in cases]
    conds = dict(label=jnp.array([3, 977]))
    run = functools.partial(ours, task, params, conds)
    if name == "DDIMScheduler":  # in one compiled program, with the loop of the library: steps and guidance are traced
        monkeypatch.undo()
        run = jax.jit(
            lambda scale, steps: task.sample(params, KEY, conds, guidance_scale=scale, steps=steps, start=START)
        )
    for case, want in zip(cases, wanted):
        check(run(*case), want)
    assert name != "DDIMScheduler" or run._cache_size() == 1
    check_export(pipe, tmp_path, task, params, like=False)


@pytest.mark.parametrize("learned", [False, True])
def test_ddpm(tmp_path, monkeypatch, learned):
    network = diffusers.UNet2DModel(
        sample_size=16, in_channels=3, out_channels=6 if learned else 3, layers_per_block=1, block_out_channels=(8,),
        norm_num_groups=4, down_block_types=("AttnDownBlock2D",), freq_shift=1, flip_sin_to_cos=False,
        up_block_types=("AttnUpBlock2D",), attention_head_dim=8, downsample_padding=0,
    )  # fmt: skip
    scheduler = diffusers.DDPMScheduler(variance_type="learned_range" if learned else "fixed_small")
    pipe = finished(diffusers.DDPMPipeline, unet=network, scheduler=scheduler)
    pipe.save_pretrained(tmp_path)
    if learned:  # as folders of one network are
        for path in [*(tmp_path / "unet").iterdir(), tmp_path / "scheduler" / "scheduler_config.json"]:
            path.rename(tmp_path / path.name)
        (tmp_path / "unet").rmdir(), (tmp_path / "scheduler" / "config.json").unlink(missing_ok=True)
        (tmp_path / "scheduler").rmdir()
    task, params = vgen.load(tmp_path)
    rng = np.random.default_rng(1)
    start, noises = (rng.standard_normal(shape).astype(np.float32) for shape in ((2, 16, 16, 3), (6, 2, 16, 16, 3)))
    draws = iter(torch.from_numpy(nchw(noise)) for noise in noises)
    monkeypatch.setattr(
        "diffusers.pipelines.ddpm.pipeline_ddpm.randn_tensor", lambda *a, **k: torch.from_numpy(nchw(start))
    )
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *a, **k: next(draws))
    want = pipe(batch_size=2, num_inference_steps=6, output_type="np").images
    place = jax.random.split(jax.random.split(KEY)[1])[1]
    knobs = task.solver_knobs | dict(noise=replay(place, noises))
    check(ours(dataclasses.replace(task, solver_knobs=knobs), params, {}, steps=6, start=start, batch_size=2), want)
    check_export(pipe, tmp_path, task, params, like=learned)


# ------------------------------------------------------------------------------------------------ prompts and mistakes


def test_prompts(sd):
    _, folder, task, _, prompts = sd
    ids = tokenizer(folder / "tokenizer")(PROMPTS, padding="max_length", truncation=True)
    with pytest.warns(UserWarning, match=r"longer than 10 tokens, its end is cut off: 'n ice by night'"):
        conds = prompts(PROMPTS, "bad")
    np.testing.assert_array_equal(conds["text"], ids["input_ids"])
    assert conds["negative"].shape == (2, LENGTH) and conds["negative_mask"].sum() == 2 * 5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prompts("a" * (LENGTH - 2))  # as long as may be
    assert list(prompts("a")["text"][0, :3]) == [53, 27, 54] and task.empty == (53, 54)
    with pytest.raises(ValueError, match="3 negative prompts for 2"):
        prompts(["a", "b"], ["c"] * 3)


def test_pipelines_that_are_refused(sd, tmp_path):
    folder = sd[1]
    index = json.loads((folder / "model_index.json").read_text())
    for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"):
        (tmp_path / part).symlink_to(folder / part)

    def refused(message, **changes):
        (tmp_path / "model_index.json").write_text(json.dumps(index | changes))
        with pytest.raises(UserError, match=message) as caught:
            vgen.load(tmp_path)
        assert "\n" not in str(caught.value)

    refused("no KandinskyPipeline; it has StableDiffusionPipeline, .*parts=", _class_name="KandinskyPipeline")
    assert list(vgen.load(tmp_path, parts=["vae"])[0]) == ["vae"]
    refused("has no weights of text_encoder_2; there are .*unet", _class_name="StableDiffusionXLPipeline")
    refused("has no weights of transformer", _class_name="PixArtSigmaPipeline")
    (tmp_path / "scheduler").unlink()
    (tmp_path / "scheduler").mkdir()
    refused("there is no .*scheduler_config.json")
    (tmp_path / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "UniPCMultistepScheduler"}')
    refused("no scheduler 'UniPCMultistepScheduler'; it has DDIM")
    with pytest.raises(UserError, match="needs like=FOLDER"):
        pipelines.export(tmp_path / "back", sd[2], sd[3], kind="StableDiffusionPipeline")
    with pytest.raises(UserError, match="has no prompts; pipelines that have are StableDiffusionPipeline"):
        (tmp_path / "model_index.json").write_text(json.dumps(index | dict(_class_name="DDPMPipeline")))
        pipelines.prompts(tmp_path)


def test_back(sd):
    pipe, folder, task, params, _ = sd
    pipe.scheduler = diffusers.PNDMScheduler(**SCHEDULERS["pndm"][1])
    again = check_export(pipe, folder, task, params)
    np.testing.assert_array_equal(*(theirs(p, ["abc", "a dog"], steps=2) for p in (pipe, again)))
