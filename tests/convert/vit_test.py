"""ViT's layouts: parity and gradients against transformers, golden outputs of the authors' code, round trips."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.convert import tables
from tests.convert.tables import quick  # noqa: F401  a fixture
from tests.golden import golden
from vgen.convert import rules
from vgen.convert.rules import ConvertError
from vgen.convert.vit import AUGREG, BIG_VISION, HF_VIT, HF_VIT_CLASSIFIER

pytestmark = pytest.mark.usefixtures("quick")

CONFIGS = {
    "plain": dict(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40, image_size=24, patch_size=8,
        num_labels=5,
    ),
    "no qkv bias, quick gelu, 3 heads": dict(
        hidden_size=36, num_hidden_layers=3, num_attention_heads=3, intermediate_size=50, image_size=30, patch_size=5,
        num_labels=3, qkv_bias=False, hidden_act="quick_gelu", layer_norm_eps=1e-5,
    ),
}  # fmt: skip
FAMILIES = {"ViTModel": HF_VIT, "ViTForImageClassification": HF_VIT_CLASSIFIER}
CASES = [(kind, name) for kind in FAMILIES for name in CONFIGS]


@pytest.fixture(scope="module")
def references():
    transformers = pytest.importorskip("transformers")

    def make(kind, name):
        model = getattr(transformers, kind)(transformers.ViTConfig(**CONFIGS[name]))
        return tables.randomize(model)

    return {case: make(*case) for case in CASES}


def run(module, params, dtype, images, **kwargs):
    params = jax.tree.map(lambda a: np.asarray(a, dtype), params)
    return jax.jit(lambda params, images: module.apply({"params": params}, images, **kwargs))(params, images)


@pytest.mark.parametrize("kind, name", CASES)
def test_against_transformers(x64, references, kind, name):
    family, model = FAMILIES[kind], references[kind, name]
    module, params = tables.load(family, tables.state_of(model), model.config.to_dict())
    inputs = family.inputs(module, np.random.default_rng(1))
    want = family.compare(model, inputs)
    got = family.outputs(run(module, params, np.float64, images=inputs["images"].astype(np.float64)))
    errors = {key: tables.error(got[key], value) for key, value in want.items()}
    assert set(got) == set(want) and max(errors.values()) < 1e-12, errors
    moved = family.compare(model, {"images": inputs["images"] + 0.1})
    assert all(tables.error(moved[key], value) > 1e-3 for key, value in want.items())


def test_against_transformers_in_float32(references):
    model = references["ViTModel", "plain"]
    module, params = tables.load(HF_VIT, tables.state_of(model), model.config.to_dict())
    inputs = HF_VIT.inputs(module, np.random.default_rng(1))
    want = HF_VIT.compare(model, inputs)
    got = HF_VIT.outputs(run(module, params, np.float32, **inputs))
    assert max(tables.error(got[key], value) for key, value in want.items()) < 2e-5


def test_another_image_size_against_transformers(x64, references):
    import torch

    model = references["ViTModel", "plain"]
    module, params = tables.load(HF_VIT, tables.state_of(model), model.config.to_dict())
    images = np.random.default_rng(1).standard_normal((2, 40, 16, 3))
    with torch.no_grad():
        want = model(torch.from_numpy(images.transpose(0, 3, 1, 2)), interpolate_pos_encoding=True).last_hidden_state
    assert tables.error(run(module, params, np.float64, images=images).tokens, want) < 1e-12


@pytest.mark.parametrize("kind, name", [CASES[0], CASES[3]])
def test_gradients_against_transformers(x64, references, kind, name):
    """Of a weighted sum of the outputs, for every parameter and the images."""
    import torch

    family, model = FAMILIES[kind], references[kind, name]
    module, params = tables.load(family, tables.state_of(model), model.config.to_dict())
    images = family.inputs(module, np.random.default_rng(1))["images"].astype(np.float64)
    output = "pooled" if module.num_classes is None else "logits"

    def loss(params, images):
        out = getattr(module.apply({"params": params}, images), output)
        return jnp.sum(jnp.sin(out * jnp.arange(1.0, 1 + out.shape[-1])))

    value, grads = jax.jit(jax.value_and_grad(loss, (0, 1)))(tables.float64(params), images)
    x = torch.from_numpy(images.transpose(0, 3, 1, 2)).requires_grad_()
    out = getattr(model(x), "logits" if output == "logits" else "pooler_output")
    model.zero_grad()
    want = torch.sin(out * torch.arange(1.0, 1 + out.shape[-1])).sum()
    want.backward()
    assert abs(float(value) - want.item()) < 1e-10 * abs(want.item())
    assert tables.error(grads[1], x.grad.permute(0, 2, 3, 1)) < 1e-10
    tables.check_gradient_tree(grads[0], family, module, model, 1e-8, ["attn/k/bias"])


@pytest.mark.parametrize("kind, name", CASES)
def test_folders_round_trip(references, tmp_path, kind, name):
    """save_pretrained -> here -> from_pretrained: the same names, bits and outputs; live names are read too."""
    family, model = FAMILIES[kind], references[kind, name]
    tables.check_folder(family, model, tmp_path, "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    saved = load_file(tmp_path / "model.safetensors")
    assert not set(saved) <= set(model.state_dict())  # the published names are the old ones
    (module, params), (live_module, live) = (tables.load(family, s, config) for s in (saved, tables.state_of(model)))
    assert live_module == module
    jax.tree.map(np.testing.assert_array_equal, live, params)


# ------------------------------------------------------------------------------------------- the authors' Flax layouts

FLAX = {"vit_flax": AUGREG, "bigvision_vit_gap_sincos": BIG_VISION, "bigvision_vit_tok": BIG_VISION}


@pytest.mark.parametrize("case", FLAX)
def test_golden(x64, case):
    g, family = golden.load(case), FLAX[case]
    images = np.asarray(g["inputs"]["image"], np.float64)
    module, params = tables.load(family, g["weights"], {"image_size": images.shape[1:3]})
    out = run(module, params, np.float64, images=images, states=True)
    golden.check(g, "logits", out.logits, 1e-10)
    golden.check(g, "block0", out.states[0], 1e-10)
    if case == "vit_flax":
        golden.check(g, "encoded", out.tokens, 1e-10)
    else:
        dense = module.clone(pool="none", image_size=images.shape[1:3])
        out = run(dense, params, np.float64, images=images)
        golden.check(g, "logits_2d", out.logits.reshape(len(images), *module.grid, -1), 1e-10)


@pytest.mark.parametrize("case", FLAX)
def test_flax_round_trips(case):
    """Under the names of the files: AugReg's parts of a layer are numbered together, big_vision's one by one."""
    g, family = golden.load(case), FLAX[case]
    config = {"image_size": g["inputs"]["image"].shape[1:3]}
    module, params = tables.load(family, g["weights"], config)
    files = tables.export(family, module, params)
    attention = "MultiHeadDotProductAttention_" + "01"[case == "vit_flax"]
    assert f"Transformer/encoderblock_0/{attention}/query/kernel" in files
    assert ("Transformer/encoderblock_0/MlpBlock_3/Dense_0/kernel" in files) == (case == "vit_flax")
    again, _ = tables.check_round_trip(family, files, config)
    assert again == module
    stored = {name.removeprefix("params/"): a for name, a in g["weights"].items()}
    for name, array in files.items():
        old = name.replace("Attention_1", "Attention_0").replace("LayerNorm_2", "LayerNorm_1")
        old = old.replace("MlpBlock_3", "MlpBlock_0")
        np.testing.assert_array_equal(array, stored[old])


def test_files_say_what_the_network_is():
    weights = golden.load("bigvision_vit_tok")["weights"]
    module, _ = tables.load(BIG_VISION, weights)
    assert (module.width, module.depth, module.heads, module.mlp_dim) == (32, 2, 2, 50)
    assert (module.image_size, module.representation, module.num_classes) == (24, 12, 9)
    headless = {k: v for k, v in weights.items() if "head" not in k and "pre_logits" not in k}
    module, _ = tables.load(BIG_VISION, headless)
    assert module.num_classes is None and module.representation is None
    with pytest.raises(ConvertError, match="no square grid"):
        tables.load(AUGREG, golden.load("vit_flax")["weights"])
    with pytest.raises(ConvertError, match="not in this layout"):
        tables.load(AUGREG, {"head/kernel": np.zeros((2, 2), np.float32)})


def test_positions_of_an_augreg_file_are_zoomed(x64):
    """As scipy.ndimage.zoom of order 1, which the authors' fine-tuning calls."""
    from scipy import ndimage

    g = golden.load("vit_flax")
    weights = dict(g["weights"])
    table = np.random.default_rng(0).standard_normal((1, 17, 48)).astype(np.float32)
    weights["params/Transformer/posembed_input/pos_embedding"] = table
    module, params = tables.load(AUGREG, weights)
    grid = table[0, 1:].reshape(4, 4, 48).astype(np.float64)
    zoomed = ndimage.zoom(grid, (3 / 4, 7 / 4, 1), order=1).reshape(21, 48)
    images = np.random.default_rng(1).standard_normal((2, 24, 56, 3))
    got = run(module, params, np.float64, images=images).logits
    weights["params/Transformer/posembed_input/pos_embedding"] = np.concatenate([table[:, :1], zoomed[None]], 1)
    module, params = tables.load(AUGREG, weights, {"image_size": (24, 56)})
    assert tables.error(got, run(module, params, np.float64, images=images).logits) < 1e-12


def test_map_pooling_round_trip():
    module = BIG_VISION.build({}, {k: v.shape for k, v in golden.load("bigvision_vit_tok")["weights"].items()})
    module = module.clone(pool="map", cls_token=False)
    shapes = tables.shapes_of(BIG_VISION, module)
    rng = np.random.default_rng(0)
    flat = {k: rng.standard_normal(v.shape).astype(np.float32) for k, v in shapes.items()}
    files = rules.export(flat, BIG_VISION.table(module))
    assert files["MAPHead_0/MultiHeadDotProductAttention_0/query/kernel"].shape == (32, 2, 16)
    assert files["MAPHead_0/probe"].shape == (1, 1, 32)
    again, _ = tables.check_round_trip(BIG_VISION, files)
    assert again == module
