"""Every config file: its page, its scales, two real steps of its smallest one, and the published sizes."""

import json
import re
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core

from tests.conftest import quick_compilation
from vgen import recipes, trees
from vgen import state as states
from vgen.config import to_dict
from vgen.convert import schedulers
from vgen.convert.amused import UVIT
from vgen.convert.clip import HF_TEXT_PROJECTION
from vgen.convert.vqgan import DIFFUSERS_VQ
from vgen.fields import RECORDED
from vgen.stages import Run
from vgen.system import System
from vgen.types import Context

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(ROOT.glob("configs/*.py"))
SECTIONS = ("Paper", "Parts", "Commands", "Published numbers", "Measured numbers")
STUDIES = dict.fromkeys(("ddim", "sdedit", "ilvr", "repaint"), "ddpm")  # of a method on a system
STUDIES |= dict.fromkeys(("cfg", "prompt_to_prompt", "multidiffusion"), "ldm")
every_config = pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)


def run_of(path: Path, scale: str, workdir="unused") -> Run:
    """A scale of a config on one device, with nothing opened."""
    config = runpy.run_path(str(path))["get_config"](scale)
    config.mesh = dict()
    return Run(config, workdir)


@every_config
def test_docstring_has_its_sections(path):
    doc = runpy.run_path(str(path))["__doc__"]
    found = [line for line in doc.splitlines() if line in SECTIONS]
    assert found == list(SECTIONS), "each section once, in this order, its name alone on a line"
    for name, text in zip(SECTIONS, re.split("|".join(f"\n{name}\n" for name in SECTIONS), doc)[1:]):
        assert text.strip(), f"section {name} is empty"
    assert f"--config=configs/{path.name}" in doc


@every_config
def test_readme_has_a_row(path):
    rows = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("|")]
    assert any(f"configs/{path.name}" in row for row in rows)


@every_config
def test_every_scale_builds(path):
    module = runpy.run_path(str(path))
    assert {"tiny", "mini", "paper"} <= set(module["SCALES"])
    for scale in module["SCALES"]:
        run = run_of(path, scale)
        assert (run.config.scale, run.config.name) == (scale, path.stem)
        assert all(run.task(name).groups for name in run.stages)
    with pytest.raises(ValueError, match="scale must be one of tiny"):
        module["get_config"]("huge")
    assert module["get_config"]() == module["get_config"]("mini")


# Of systems whose stages are those of another one, but for a setting that the tests of their task look at.
ALIKE = ("a_clip", "flip", "blip", "pixart")


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=pytest.mark.slow if path.stem in ALIKE else (), id=path.stem) for path in CONFIGS],
)
def test_two_steps_of_every_stage(path, tiny_runs):
    run = tiny_runs(path)
    for name in run.stages:
        assert run.train_config(name).steps == 2
        weights, step = run.weights(name)
        assert step == 2 and all(np.isfinite(value).all() for value in weights.values())
        rows = [json.loads(line) for line in (run.folder(name) / "metrics.jsonl").read_text().splitlines()]
        losses = [value for row in rows for key, value in row.items() if key.startswith("loss")]
        assert losses and all(value is not None for value in losses) and rows[-1].get("skipped", 0) == 0


@pytest.mark.parametrize("study", STUDIES)
def test_a_study_measures_the_weights_of_its_system(study):
    """Its workdir may be that of the system: all that a workdir belongs to is the same, at every scale."""
    ours, theirs = (runpy.run_path(str(ROOT / "configs" / f"{name}.py")) for name in (study, STUDIES[study]))
    for scale in ours["SCALES"]:
        a, b = (to_dict(module["get_config"](scale)) for module in (ours, theirs))
        assert {name: a.get(name) for name in RECORDED} == {name: b.get(name) for name in RECORDED}
        assert a["name"] == study and a["generate"] and (a.get("eval") or scale in ("paper", "imported"))


@pytest.mark.parametrize(
    "path", [ROOT / f"configs/{name}.py" for name in ("ddpm", "dit", "adm")], ids=lambda path: path.stem
)
def test_draws_what_it_is_asked_for(path, tiny_runs):
    """Without a text; Muse is drawn by the command line, pictures of a text in the tests of their tasks."""
    run = tiny_runs(path)
    with quick_compilation():
        pictures = System(run)(run.config.prompts[:1])
    for name, x in pictures.items():
        assert x.shape == (1, *(run.task(name).size,) * 2, 3) and x.dtype == np.uint8 and x.std() > 0


def test_a_whole_run(tiny_run):
    for name in tiny_run.stages:
        assert list((tiny_run.folder(name) / "pictures").glob("*_0000002.png"))
        assert json.loads((tiny_run.folder(name) / "eval.json").read_text())["step"] == 2
    report = json.loads((tiny_run.workdir / "eval.json").read_text())
    assert set(report["stages"]) == set(tiny_run.stages)
    generating = list(tiny_run.config.generate["stages"])
    assert set(report["scores"]) == {name + end for name in generating for end in ("", "_guidance_off")}
    count = len(tiny_run.config.prompts)
    for name in generating:
        assert len(list((tiny_run.workdir / "samples").glob(f"{name}_0*.png"))) == count


def test_training_changed_the_trained_parameters_alone(tiny_run):
    tokenizer, decoder = (tiny_run.weights(name)[0] for name in ("tokenizer", "decoder"))
    base, superres = (tiny_run.weights(name)[0] for name in ("base", "superres"))
    for path in trees.subtree(tokenizer, "encoder"):
        np.testing.assert_array_equal(decoder[f"encoder/{path}"], tokenizer[f"encoder/{path}"])
    for path, value in trees.subtree(base, "tokenizer").items():
        np.testing.assert_array_equal(value, decoder[path])
        np.testing.assert_array_equal(value, superres[f"tokenizer/{path}"])
    for path, value in trees.subtree(superres, "text_encoder").items():
        np.testing.assert_array_equal(value, base[f"text_encoder/{path}"])


def test_adm_is_guided_by_the_classifier_that_it_trained(tiny_runs):
    run = tiny_runs(ROOT / "configs" / "adm.py")
    (judge, _), (found, _) = run.weights("classifier"), run.weights("unet")
    guides = trees.subtree(found, "classifier")
    assert set(guides) == set(trees.subtree(judge, "network"))
    for path, value in guides.items():
        np.testing.assert_array_equal(value, judge[f"network/{path}"])
    assert run.task("unet").classifier == run.task("classifier").network
    for t in (0, 500, 999):
        ours, theirs = (run.task(stage).schedule.level(t) for stage in ("unet", "classifier"))
        np.testing.assert_array_equal(ours, theirs)


def depends(jaxpr) -> list[bool]:
    """Whether each output depends on any input, taking every equation to mix all that enters it."""
    reached = set(jaxpr.invars)
    for eqn in jaxpr.eqns:
        if any(not isinstance(x, core.Literal) and x in reached for x in eqn.invars):
            reached |= set(eqn.outvars)
    return [not isinstance(x, core.Literal) and x in reached for x in jaxpr.outvars]


@every_config
def test_no_group_has_a_gradient_in_another(path, tiny_runs):
    """What lets one backward pass serve all groups. Traced only: a gradient that is zero depends on nothing."""
    plain = run_of(path, "tiny")
    if all(len(plain.task(name).groups) == 1 for name in plain.stages):
        pytest.skip("one group a stage")
    run, checked = tiny_runs(path), 0
    for name in run.stages:
        layout, task = run.layout(name), run.task(name)
        for group in layout.groups if len(layout.groups) > 1 else ():

            def gradients(flat, batch, key):
                loss = lambda p: task.losses(trees.unflatten(p), Context(jnp.int32(10**6)), batch, key)[group].value
                return jax.grad(loss)(flat)

            jaxpr = jax.make_jaxpr(gradients)(layout.shapes, layout.batch, jax.random.key(0)).jaxpr
            found = dict(zip(sorted(layout.shapes), depends(jaxpr)))
            for other, paths in layout.groups.items():
                reached = [path for path in paths if found[path]]
                if other == group:
                    assert len(reached) > len(paths) / 2, f"{name}: {group} does not train itself"
                else:
                    assert not reached, f"{name}: the loss of {group} has gradients in {other}: {reached[:3]}"
                    checked += 1
    assert checked or path.stem != "muse"


# ------------------------------------------------------------------------------------------------ published sizes


def sizes(run: Run, name: str) -> dict[str, int]:
    """{part: number of parameters} of a stage, from shapes alone; Muse's transformers are split into their parts."""
    size, length = run.stage(name).data["size"], run.config.text.get("length", 1)
    batch = {
        "image": jax.ShapeDtypeStruct((1, size, size, 3), jnp.uint8),
        "text": jax.ShapeDtypeStruct((1, length), jnp.int32),
        "text_mask": jax.ShapeDtypeStruct((1, length), bool),
        "label": jax.ShapeDtypeStruct((1,), jnp.int32),
    }
    counts = {}
    parts = r"transformer/[^/]*|[^/]*" if run.config.name == "muse" else r"[^/]*"
    for path, leaf in states.Layout(run.task(name), batch).shapes.items():
        part = re.match(parts, path).group()
        counts[part] = counts.get(part, 0) + leaf.size
    return counts


def test_the_classes_drawn_at_the_end_are_of_all_shapes_and_most_colours():
    """Of 6 colours times 4 shapes, and of few classes all or nearly."""
    drawn = [divmod(int(prompt), 4) for prompt in recipes.class_prompts(24)]
    assert len(drawn) == 8 and {shape for _, shape in drawn} == {0, 1, 2, 3}
    assert len({colour for colour, _ in drawn}) >= 5
    assert recipes.class_prompts(2) == ("0", "1") and len(recipes.class_prompts(10)) >= 7


def test_muse_has_its_published_sizes():
    run = run_of(ROOT / "configs" / "muse.py", "paper")
    published = run.config.published
    base, superres = sizes(run, "base"), sizes(run, "superres")
    layers = published["transformer_layers"]
    assert base["transformer/layers"] == pytest.approx(layers["base_3b"], rel=0.01)
    both = superres["transformer/layers"] + superres["transformer/low_layers"]
    assert both == pytest.approx(layers["superres"], rel=0.01)
    assert base["text_encoder"] == superres["text_encoder"] == published["t5_xxl"] == 4_762_310_656

    from vgen.models.muse import BASE_632M

    spec = run.stage("base").task
    spec["transformer"] = {k: v for k, v in spec["transformer"].items() if k not in BASE_632M} | BASE_632M
    small = run_of(ROOT / "configs" / "muse.py", "paper")
    small.stages["base"].task.update(spec)
    small._tasks.clear()
    assert sizes(small, "base")["transformer/layers"] == pytest.approx(layers["base_632m"], rel=0.01)


@pytest.mark.parametrize(
    "resolution, encoder, decoder, large",
    [("low", 23_775_104, 30_478_339, 218_632_195), ("high", 21_413_760, 27_526_915, 197_389_827)],
)
def test_muse_has_its_published_tokenizers(resolution, encoder, decoder, large):
    """The counts follow from the published shapes: 128 channels, 2 blocks a level; 256 and 4 in the larger decoder."""
    run = run_of(ROOT / "configs" / "muse.py", "paper")
    published = run.config.published["tokenizer"]
    plain, fine = sizes(run, f"tokenizer_{resolution}"), sizes(run, f"decoder_{resolution}")
    assert (plain["encoder"], plain["decoder"]) == (encoder, decoder)
    assert (fine["encoder"], fine["decoder"]) == (encoder, large)
    assert plain["quantizer"] == fine["quantizer"] == published["num_codes"] * 256
    models = [run.task(f"{stage}_{resolution}").model for stage in ("tokenizer", "decoder")]
    for key in ("num_codes", "channels", "blocks"):
        assert all(getattr(model, key) == published[key] for model in models)
    for key in ("decoder_channels", "decoder_blocks"):
        assert getattr(models[1], key) == published[key]
    assert models[0].downsampling == {"low": 16, "high": 8}[resolution]


def test_amused_is_the_published_one():
    """Sizes by count, and all settings of the networks as `vgen.load` reads them from the published config.json."""
    run = run_of(ROOT / "configs" / "amused.py", "paper")
    assert sizes(run, "generator") == run.config.published
    task = run.task("generator")
    assert task.transformer == UVIT.build({"sample_size": 16}, {})
    tower = dict(
        hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072, projection_dim=768,
        hidden_act="quick_gelu", eos_token_id=2,
    )  # fmt: skip
    assert task.text_encoder == HF_TEXT_PROJECTION.build(tower, {})
    tokenizer = dict(
        block_out_channels=[128, 256, 256, 512, 768], layers_per_block=2, latent_channels=64, num_vq_embeddings=8192,
        vq_embed_dim=64, mid_block_add_attention=False, lookup_from_codebook=True, norm_num_groups=32,
    )  # fmt: skip
    assert task.tokenizer == DIFFUSERS_VQ.build(tokenizer, {})
    assert (task.empty, task.pad_id, task.mask_id) == ((49_406, 49_407), 49_407, 8255)
    knobs = run.config.generate["knobs"]["generator"]
    assert knobs == dict(steps=12, guidance_scale=10.0, temperature=1.0, choice_temperature=2.0)


@pytest.mark.parametrize("scale", ["paper", "imported"])
def test_maskgit_is_the_published_one(scale):
    run = run_of(ROOT / "configs" / "maskgit.py", scale)
    published, task = run.config.published, run.task("generator")
    assert sizes(run, "generator") == {part: published[part] for part in ("transformer", "tokenizer")}
    assert (task.mask_id, task.schedule, task.label_smoothing, task.text_drop) == (2024, "cosine", 0.1, 0.0)
    assert run.config.generate["knobs"]["generator"] == dict(steps=8, temperature=1.0, choice_temperature=4.5)


def test_flip_and_blip_have_their_published_sizes():
    run = run_of(ROOT / "configs" / "flip.py", "paper")
    shapes = states.Layout(run.task("flip"), encoders_batch(224)).shapes
    for part, millions in run.config.published["millions"].items():
        mine = trees.subtree(shapes, f"network/{part}")
        without = {path: leaf for path, leaf in mine.items() if not path.startswith("projection")}
        assert round(trees.count(without) / 1e6) == millions, part
    run = run_of(ROOT / "configs" / "blip.py", "imported")
    shapes = states.Layout(run.task("caption"), encoders_batch(384)).shapes
    assert trees.count(trees.subtree(shapes, "network")) == run.config.published["network"]


def encoders_batch(size):
    shape = jax.ShapeDtypeStruct
    return {
        "image": shape((1, size, size, 3), jnp.uint8), "text": shape((1, 32), jnp.int32),
        "text_mask": shape((1, 32), bool),
    }  # fmt: skip


def test_token_priors_have_their_published_sizes():
    run = run_of(ROOT / "configs" / "vqgan.py", "paper")
    published, counts = run.config.published, sizes(run, "tokenizer")
    assert {part: counts[part] for part in published["tokenizer"]} == published["tokenizer"]
    assert sizes(run, "prior")["network"] == pytest.approx(published["prior"], rel=0.01)
    run = run_of(ROOT / "configs" / "dalle.py", "paper")
    published, counts = run.config.published, sizes(run, "tokenizer")
    assert {part: counts[part] for part in published["tokenizer"]} == published["tokenizer"]
    assert sizes(run, "prior")["network"] == pytest.approx(published["transformer"], rel=0.03)


def test_one_setting_moves_every_path_to_the_weights():
    config = runpy.run_path(str(ROOT / "configs" / "amused.py"))["get_config"]("paper")
    config.weights = "/data/amused-256"
    init = config.stages.generator.init.to_dict()
    assert {part: source["file"] for part, source in init.items()} == {
        "transformer": "/data/amused-256/transformer",
        "tokenizer": "/data/amused-256/vqvae",
        "text_encoder": "/data/amused-256/text_encoder",
    }
    assert config.text.path == "/data/amused-256/tokenizer"


# ------------------------------------------------------------------------------------------------------- diffusion

STABLE = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1, clip_sample=False)
# scheduler_config.json of the published pipelines, without what is the default of its class
SCHEDULERS = {
    "imported": dict(_class_name="DPMSolverMultistepScheduler"),
    "paper": dict(STABLE, _class_name="PNDMScheduler", skip_prk_steps=True, set_alpha_to_one=False),
    "sd21": dict(STABLE, _class_name="DDIMScheduler", set_alpha_to_one=False, prediction_type="v_prediction"),
    "sdxl": dict(STABLE, _class_name="EulerDiscreteScheduler", timestep_spacing="leading"),
}


@pytest.mark.parametrize(
    "config, scale, stage",
    [("ddpm", "paper", "unet"), ("dit", "paper", "dit"), ("dit", "imported", "dit")]
    + [("adm", "paper", "classifier"), ("adm", "paper", "unet"), ("adm", "imported", "unet")]
    + [("stable_diffusion", scale, "unet") for scale in ("paper", "sd21", "sdxl")]
    + [("pixart", "imported", "quality")],
)
def test_diffusion_systems_have_their_published_sizes(config, scale, stage):
    run = run_of(ROOT / "configs" / f"{config}.py", scale)
    counts, published = sizes(run, stage), run.config.published
    if config in ("stable_diffusion", "pixart"):
        assert counts == {part: published[part] for part in ("network", "text_encoder", "vae")}
    else:
        assert counts["network"] == published[stage]
        assert counts.get("vae") == published.get("vae")
        assert counts.get("classifier", published.get("classifier")) == published.get("classifier")


@pytest.mark.parametrize("scale", SCHEDULERS)
def test_imported_diffusion_samples_as_published(scale):
    config, stage = ("pixart", "quality") if scale == "imported" else ("stable_diffusion", "unet")
    task = run_of(ROOT / "configs" / f"{config}.py", scale).task(stage)
    said = schedulers.settings(SCHEDULERS[scale])
    for ours, theirs in zip(task.schedule.level(np.arange(1000)), said.pop("schedule").level(np.arange(1000))):
        np.testing.assert_array_equal(ours, theirs)
    usual = dict(spacing="linspace" if scale == "imported" else "leading", offset=0)
    assert usual | dict(task.grid_knobs) == said.pop("grid_knobs")
    if scale == "imported":
        assert said.pop("solver_knobs") == dict(solver="midpoint")
    assert {name: getattr(task, name) for name in said} == said


def test_all_parts_of_imported_diffusion_come_from_one_folder():
    systems = [("dit", "imported", "dit"), ("pixart", "imported", "quality")]
    systems += [("stable_diffusion", scale, "unet") for scale in ("paper", "sd21", "sdxl")]
    for config, scale, stage in systems:
        made = runpy.run_path(str(ROOT / "configs" / f"{config}.py"))["get_config"](scale)
        made.weights = "/data/x"
        parts = made.stages[stage].init.to_dict()
        assert {"network", "vae"} <= set(parts) and made.stages[stage].train.steps == 0
        assert all(source["file"].startswith("/data/x/") for source in parts.values())
