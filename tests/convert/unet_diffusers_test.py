"""U-Nets in diffusers' layouts: parity with UNet2DModel and UNet2DConditionModel, round trips, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.convert import tables
from tests.convert.tables import quick  # noqa: F401  a fixture
from vgen.convert.rules import ConvertError
from vgen.convert.unet_diffusers import PLAIN, TEXT
from vgen.types import AttentionControl

pytestmark = pytest.mark.usefixtures("quick")

SD = dict(
    in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(16, 32), norm_num_groups=8, sample_size=8,
    cross_attention_dim=20, attention_head_dim=4,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
)  # fmt: skip
LAST = dict(
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D")
)
DDPM = dict(
    layers_per_block=2, block_out_channels=(16, 32, 32), norm_num_groups=8, attention_head_dim=None, sample_size=8,
    flip_sin_to_cos=False, freq_shift=1, downsample_padding=0, norm_eps=1e-6, num_train_timesteps=1000,
    down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
)  # fmt: skip
ADM = dict(
    out_channels=6, layers_per_block=1, block_out_channels=(16, 48), norm_num_groups=8, attention_head_dim=8,
    attn_norm_num_groups=8, num_class_embeds=10, resnet_time_scale_shift="scale_shift", sample_size=8,
    down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"), downsample_type="resnet",
    up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D"), upsample_type="resnet",
)  # fmt: skip
CONFIGS = {
    "sd1": (TEXT, SD),
    "sd2, three levels, nine channels": (
        TEXT,
        SD | dict(
            in_channels=9, use_linear_projection=True, attention_head_dim=(2, 4, 6), upcast_attention=True,
            block_out_channels=(16, 32, 48),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        ),
    ),
    "sdxl": (
        TEXT,
        SD | LAST | dict(
            use_linear_projection=True, attention_head_dim=(2, 4), transformer_layers_per_block=(1, 3),
            addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=24 + 48,
        ),
    ),
    "x4 upscaler": (
        TEXT,
        SD | LAST | dict(
            in_channels=7, use_linear_projection=True, num_class_embeds=11, only_cross_attention=(False, True),
            block_out_channels=(16, 24),
        ),
    ),
    "ddpm": (PLAIN, DDPM),
    "ddpm, attention first, heads, symmetric": (
        PLAIN,
        dict(
            in_channels=5, out_channels=2, layers_per_block=1, block_out_channels=(16, 24), norm_num_groups=4,
            attention_head_dim=8, sample_size=8, add_attention=False,
            down_block_types=("AttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "AttnUpBlock2D"),
        ),
    ),
    "adm": (PLAIN, ADM),
    "adm, attention above, no labels": (
        PLAIN,
        ADM | dict(
            num_class_embeds=None, block_out_channels=(16, 16, 32), attention_head_dim=4,
            down_block_types=("AttnDownBlock2D", "ResnetDownsampleBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D", "AttnUpBlock2D"),
        ),
    ),
}  # fmt: skip


def torch_unet(name):
    diffusers = pytest.importorskip("diffusers")
    family, config = CONFIGS[name]
    kind = diffusers.UNet2DModel if family is PLAIN else diffusers.UNet2DConditionModel
    return family, tables.randomize(kind(**config))


@pytest.fixture(scope="module", params=CONFIGS)
def reference(request):
    return torch_unet(request.param)


@pytest.fixture
def exact(monkeypatch):
    """diffusers' table of frequencies is float32 even in a float64 model."""
    import torch
    from diffusers.models import embeddings

    class Wide:
        float32 = torch.float64

        def __getattr__(self, name):
            return getattr(torch, name)

    monkeypatch.setattr(embeddings, "torch", Wide())


def cast(inputs, dtype):
    one = lambda a: np.asarray(a, dtype) if np.issubdtype(a.dtype, np.floating) else np.asarray(a)
    return jax.tree.map(one, inputs)


def arrays(inputs):
    """(path, change) for every number or label that the network takes."""
    for path, leaf in jax.tree_util.tree_flatten_with_path(inputs)[0]:
        small = {"labels": 1, "t": 7}.get(path[0].key, 0.3)
        moved = (leaf + small) if path[0].key != "labels" else (leaf + 1) % 5
        yield path, np.asarray(moved, leaf.dtype)


def test_against_diffusers(x64, exact, reference):
    family, model = reference
    module, params = tables.load(family, tables.state_of(model), model.config)
    inputs = family.inputs(module, np.random.default_rng(1))
    if module.context_dim is not None and not module.only_cross:  # whose first attention diffusers leaves unmasked
        inputs["context_mask"] = np.arange(7)[None] < np.array([[7], [4]])
    apply, params = jax.jit(module.apply), {"params": tables.float64(params)}
    run = lambda given: np.asarray(apply(params, **cast(given, np.float64)))
    want, got = family.compare(model, inputs)["y"], run(inputs)
    assert got.dtype == np.float64 and tables.error(got, want) < 1e-9, tables.error(got, want)
    inputs.pop("context_mask", None)
    want = family.compare(model, inputs)["y"]
    flat, tree = jax.tree_util.tree_flatten_with_path(inputs)
    for path, moved in arrays(inputs):  # every input matters, and in the same way
        changed = jax.tree_util.tree_unflatten(tree, [moved if p == path else leaf for p, leaf in flat])
        reference_moved = family.compare(model, changed)["y"]
        assert tables.error(reference_moved, want) > 1e-4, path


@pytest.mark.parametrize("name", ["sdxl", "adm"])
def test_against_diffusers_in_float32(name):
    family, model = torch_unet(name)
    module, params = tables.load(family, tables.state_of(model), model.config)
    inputs = family.inputs(module, np.random.default_rng(1))
    want = family.compare(model, inputs)["y"]
    got = jax.jit(module.apply)({"params": params}, **inputs)
    assert got.dtype == jnp.float32 and tables.error(got, want) < 2e-5, tables.error(got, want)


def test_round_trip_through_a_folder(reference, tmp_path):
    family, model = reference
    again = tables.check_folder(family, model, tmp_path)
    config = family.config(family.build(model.config, {}))
    heads = "attention_head_dim"
    assert all(again.config[k] == v for k, v in config.items() if not k.startswith("_") and k != heads)


def test_residuals_of_a_controlnet(x64, exact):
    family, model = torch_unet("sd1")
    module, params = tables.load(family, tables.state_of(model), model.config)
    inputs, rng = family.inputs(module, np.random.default_rng(1)), np.random.default_rng(2)
    _, h, w, _ = inputs["x"].shape
    shapes = [(h, w, 16), (h, w, 16), (h // 2, w // 2, 16), (h // 2, w // 2, 32), (h // 2, w // 2, 32)]
    inputs["residuals"] = [rng.standard_normal((2, *shape)) for shape in shapes]
    run = jax.jit(module.apply)
    params = {"params": tables.float64(params)}
    got, want = run(params, **cast(inputs, np.float64)), family.compare(model, inputs)["y"]
    assert tables.error(got, want) < 1e-9
    for i in range(5):
        less = [r * (j != i) for j, r in enumerate(inputs["residuals"])]
        assert tables.error(family.compare(model, inputs | dict(residuals=less))["y"], want) > 1e-3
    with pytest.raises(ValueError, match="expected 4 residuals and that of the middle, got 4"):
        run(params, **cast(inputs | dict(residuals=inputs["residuals"][1:]), np.float64))


def test_attention_sites_have_names():
    """A control meets every attention, by the paths of the parameters; layers of a stack have their numbers."""
    family, model = torch_unet("sdxl")
    module, params = tables.load(family, tables.state_of(model), model.config)
    seen = []

    def probs(p, site, step):
        seen.append((site.kind, site.name))
        return p

    inputs = family.inputs(module, np.random.default_rng(1))
    control = AttentionControl(None, None, probs)
    jax.eval_shape(lambda params, inputs: module.apply({"params": params}, **inputs, control=control), params, inputs)
    places = ["down_1/attn_0", "mid/attn_0", "up_1/attn_0", "up_1/attn_1"]
    want = {(kind, f"{at}/layers/{name}") for at in places for kind, name in (("self", "attn"), ("cross", "cross"))}
    assert set(seen) == want


@pytest.mark.parametrize("family, config, wrong, message", [
    (TEXT, SD, dict(act_fn="gelu"), "act_fn"),
    (TEXT, SD, dict(mid_block_type=None), "mid_block_type"),
    (TEXT, SD, dict(down_block_types=("DownBlock2D", "KDownBlock2D")), "down_block_types"),
    (TEXT, SD, dict(up_block_types=("CrossAttnUpBlock2D", "UpBlock2D")), "not the same"),
    (TEXT, SD, dict(addition_embed_type="text"), "addition_embed_type"),
    (TEXT, SD, dict(only_cross_attention=True), "only_cross_attention"),
    (TEXT, SD, dict(time_cond_proj_dim=8), "time_cond_proj_dim"),
    (TEXT, SD, dict(class_embed_type="timestep"), "class_embed_type"),
    (PLAIN, ADM, dict(attn_norm_num_groups=None), "attn_norm_num_groups"),
    (PLAIN, ADM, dict(upsample_type="conv"), "resampled"),
    (PLAIN, DDPM, dict(freq_shift=0.5), "freq_shift"),
    (PLAIN, DDPM, dict(time_embedding_type="fourier"), "time_embedding_type"),
])  # fmt: skip
def test_unknown_configurations_are_refused(family, config, wrong, message):
    with pytest.raises(ConvertError, match=message):
        family.build(config | wrong, {})


def test_old_attention_names():
    """The first files of diffusers call the projections query, key, value and proj_attn."""
    family, model = torch_unet("ddpm")
    state, names = tables.state_of(model), ["query", "key", "value", "proj_attn"]
    old = dict(state)
    for new, before in zip(("to_q", "to_k", "to_v", "to_out.0"), names, strict=True):
        old = {k.replace(f".{new}.", f".{before}."): v for k, v in old.items()}
    assert len(set(old) - set(state)) == 48
    got, want = (tables.load(family, x, model.config)[1] for x in (old, state))
    jax.tree.map(np.testing.assert_array_equal, got, want)
