"""aMUSEd from a published folder: the same tokens and pictures as diffusers' pipeline when the noise is the same."""

import dataclasses
import json
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vgen
from tests.conftest import quick_compilation
from tests.convert import tables
from vgen import trees
from vgen.data import text
from vgen.models.clip import TextTower
from vgen.models.uvit import UVit, micro_conditions
from vgen.models.vqgan import VQGAN
from vgen.stages import Run
from vgen.system import System
from vgen.tasks.amused import Amused
from vgen.types import Context

ROOT = Path(__file__).parents[2]
SIDE, CODES = 16, 32
KEY = jax.random.key(3)


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    """A tiny AmusedPipeline with random weights."""
    diffusers, transformers = (pytest.importorskip(name) for name in ("diffusers", "transformers"))
    folder = tmp_path_factory.mktemp("tokenizer")
    letters = [chr(c) for c in range(97, 123)]
    vocab = letters + [c + "</w>" for c in letters] + ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocab)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    config = transformers.CLIPTextConfig(
        vocab_size=len(vocab), hidden_size=24, intermediate_size=32, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=12, projection_dim=20, bos_token_id=52, eos_token_id=53, pad_token_id=53,
    )  # fmt: skip
    parts = dict(
        vqvae=diffusers.VQModel(
            block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2, layers_per_block=1,
            up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, vq_embed_dim=4, num_vq_embeddings=CODES,
            norm_num_groups=4, lookup_from_codebook=True, mid_block_add_attention=False, sample_size=2 * SIDE,
        ),
        text_encoder=transformers.CLIPTextModelWithProjection(config),
        transformer=diffusers.UVit2DModel(
            hidden_size=32, cond_embed_dim=20, micro_cond_encode_dim=4, micro_cond_embed_dim=20, encoder_hidden_size=24,
            vocab_size=40, codebook_size=CODES, in_channels=12, block_out_channels=16, num_res_blocks=1,
            block_num_heads=4, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, sample_size=SIDE,
            downsample=True, upsample=True,
        ),
    )  # fmt: skip
    parts = {name: tables.randomize(part).float() for name, part in parts.items()}
    made = diffusers.AmusedPipeline(
        tokenizer=transformers.CLIPTokenizer.from_pretrained(folder, model_max_length=12),
        scheduler=diffusers.AmusedScheduler(mask_token_id=39),
        **parts,
    )
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def folder(pipe, tmp_path_factory):
    """The pipeline as `save_pretrained` writes it."""
    path = tmp_path_factory.mktemp("pipeline")
    pipe.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def loaded(folder):
    """(task, params, text tokenizer) of the pipeline's folder."""
    models, params = vgen.load(folder)
    models["tokenizer"], params["tokenizer"] = models.pop("vqvae"), params.pop("vqvae")
    task = Amused(**models, size=2 * SIDE, empty=(52, 53), pad_id=53, max_steps=12)
    return task, params, text.Clip.load(folder / "tokenizer")


def noise_of(step, shape):
    """The two draws of the sampler in a step of `vgen.sample.sample`, seeded by KEY."""
    key = jax.random.split(jax.random.fold_in(KEY, step), 3)[1]
    token_key, choice_key = jax.random.split(key)
    return jax.random.gumbel(token_key, shape), jax.random.gumbel(choice_key, shape[:2])


@pytest.mark.parametrize(
    "prompts, negative, steps, knobs",
    [
        (["a cat", "two red dogs on ice"], None, 12, {}),  # the pipeline's defaults
        (["zebra"], ["a plain horse"], 5, dict(guidance_scale=3.0, choice_temperature=7.0)),
        (["zebra", ""], None, 1, dict(guidance_scale=1.0)),  # without guidance
    ],
)
def test_the_same_tokens_and_pictures_as_the_pipeline(pipe, loaded, monkeypatch, prompts, negative, steps, knobs):
    import torch
    from diffusers.schedulers import scheduling_amused

    b, n, seen = len(prompts), SIDE * SIDE, []
    noises = [[np.array(x) for x in noise_of(i, (b, n, CODES))] for i in range(steps)]

    def multinomial(probs, count, generator=None):
        noise = torch.from_numpy(noises[len(seen)][0]).reshape(-1, CODES)
        return (probs.log() + noise).argmax(-1, keepdim=True)

    monkeypatch.setattr(torch, "multinomial", multinomial)
    gumbel = lambda t, generator: torch.from_numpy(noises[len(seen)][1])
    monkeypatch.setattr(scheduling_amused, "gumbel_noise", gumbel)
    theirs = {k: v for k, v in knobs.items() if k == "guidance_scale"}
    want = pipe(
        prompts, negative_prompt=negative, num_inference_steps=steps, output_type="np",
        temperature=(knobs.get("choice_temperature", 2), 0), callback=lambda i, t, x: seen.append(x.numpy()), **theirs,
    ).images  # fmt: skip

    task, params, tokenizer = loaded
    conds = dict(zip(("text", "text_mask"), map(jnp.asarray, tokenizer.encode(prompts, 12))))
    if negative is not None:
        conds |= dict(zip(("negative", "negative_mask"), map(jnp.asarray, tokenizer.encode(negative, 12))))

    @jax.jit
    def run(params, conds):
        out = task.sample(params, KEY, conds, steps=steps, **knobs)
        return out, task.decode(params, out["tokens"])

    got, pixels = run(params, conds)
    np.testing.assert_array_equal(got["tokens"].reshape(b, SIDE, SIDE), seen[-1])
    np.testing.assert_allclose((pixels + 1) / 2, want, atol=2e-5)
    assert np.abs(got["image_out"] / 255.0 - want).max() < 1 / 255
    assert len(np.unique(seen[-1])) > 8 and want.std() > 0.05
    if steps == 12:  # the count that float32 makes of half of 256
        assert (seen[7] == task.mask_id).sum() == b * 127


def test_micro_conditions_are_the_pipelines(pipe):
    seen = []
    hook = lambda module, args, kwargs: seen.append(kwargs["micro_conds"].numpy())
    handle = pipe.transformer.register_forward_pre_hook(hook, with_kwargs=True)
    wide = dict(height=24, width=40, micro_conditioning_crop_coord=(3, 5), micro_conditioning_aesthetic_score=7)
    pipe("a", num_inference_steps=1, **wide)
    pipe("a", num_inference_steps=1)
    handle.remove()
    np.testing.assert_array_equal(micro_conditions(2, 24, 40, crop=(3, 5), aesthetic=7.0), seen[0])
    np.testing.assert_array_equal(micro_conditions(2, 2 * SIDE, 2 * SIDE), seen[1])


def test_text_drop_is_the_empty_prompt(loaded):
    """In training a dropped text is the empty one, and micro-conditions and both forms of the text matter."""
    task, params, tokenizer = loaded
    image = jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, 2 * SIDE, 2 * SIDE, 3)), jnp.uint8)

    def loss(**changes):
        other = dataclasses.replace(task, **changes)

        @jax.jit
        def run(text, text_mask):
            batch = dict(image=image, text=text, text_mask=text_mask)
            return other.losses(params, Context(jnp.int32(0)), batch, KEY)["main"].value

        return lambda prompts: run(*map(jnp.asarray, tokenizer.encode(prompts, 12)))

    with quick_compilation():
        with_text, without = loss(text_drop=0.0), loss(text_drop=1.0)
        kept, dropped = with_text(["a", "b"]), without(["a", "b"])
        assert abs(kept - dropped) > 1e-4
        np.testing.assert_allclose(dropped, with_text(["", ""]), rtol=1e-6)
        assert abs(kept - loss(text_drop=0.0, aesthetic=1.0)(["a", "b"])) > 1e-4


def test_init_makes_what_the_parts_take(loaded):
    task, params, _ = loaded
    batch = dict(text=jnp.zeros((1, 12), jnp.int32), text_mask=jnp.ones((1, 12), bool))
    made = jax.eval_shape(lambda: task.init(KEY, batch))
    shapes = lambda tree: jax.tree.map(lambda a: a.shape, tree)
    assert shapes(made) == shapes(params)


def test_the_config_samples_from_the_folder(folder, loaded, tmp_path):
    """configs/amused.py:paper at the sizes of the tiny pipeline: drawn in a fresh workdir, nothing trained."""
    task, params, _ = loaded
    config = runpy.run_path(str(ROOT / "configs" / "amused.py"))["get_config"]("paper")
    config.weights, config.text.length, config.mesh = str(folder), 12, {}
    stage = config.stages.generator
    spec = stage.task.to_dict() | dict(size=task.size, empty=task.empty, pad_id=task.pad_id, max_steps=task.max_steps)
    for part in ("transformer", "tokenizer", "text_encoder"):
        net = getattr(task, part)
        names = {field.name for field in dataclasses.fields(net)} - {"parent", "name", "layout"}
        spec[part] |= {name: getattr(net, name) for name in names}
    stage.task, stage.data.size = spec, task.size
    run = Run(config, tmp_path / "run")
    run.check()
    for part in ("transformer", "tokenizer", "text_encoder"):
        assert getattr(run.task("generator"), part) == getattr(task, part)
    found, want = run.weights("generator")[0], trees.flatten(params)
    assert set(found) == set(want)
    for path, value in want.items():
        np.testing.assert_array_equal(found[path], value)
    with quick_compilation():
        assert System(run)(["a cat"], steps=2)["generator"].std() > 5


def test_refuses_a_text_encoder_without_what_it_reads():
    parts = dict(transformer=UVit(grid=(2, 2), vocab=16), tokenizer=VQGAN(multipliers=(1, 2), num_codes=16), size=4)
    with pytest.raises(ValueError, match="two layers and a projection, got depth 1 and features 512"):
        Amused(text_encoder=TextTower(depth=1), **parts)
