"""DINOv2's layouts: golden outputs of the authors' code, parity with transformers, round trips."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.convert import tables
from tests.convert.tables import quick  # noqa: F401  a fixture
from tests.golden import golden
from vgen.convert.dinov2 import AUTHORS, HF_DINOV2, HF_DINOV2_CLASSIFIER, HF_REGISTERS, HF_REGISTERS_CLASSIFIER
from vgen.convert.rules import ConvertError
from vgen.models.dinov2 import intermediate

pytestmark = pytest.mark.usefixtures("quick")

SMALL = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=4, mlp_ratio=2, image_size=28, patch_size=7)
OTHER = dict(hidden_size=30, num_hidden_layers=3, num_attention_heads=3, mlp_ratio=3, image_size=20, patch_size=4)
CASES = {
    "plain": (HF_DINOV2, SMALL | dict(num_labels=2)),
    "gated, no qkv bias": (HF_DINOV2, OTHER | dict(use_swiglu_ffn=True, qkv_bias=False)),
    "classifier": (HF_DINOV2_CLASSIFIER, OTHER | dict(num_labels=5)),
    "registers, gated": (HF_REGISTERS, SMALL | dict(num_register_tokens=3, use_swiglu_ffn=True)),
    "registers, classifier": (HF_REGISTERS_CLASSIFIER, OTHER | dict(num_register_tokens=2, num_labels=3)),
}


def make(case):
    transformers = pytest.importorskip("transformers")
    family, sizes = CASES[case]
    kind = getattr(transformers, family.reference.split(":")[1])
    return family, kind(kind.config_class(**sizes))


def run(module, params, dtype, images, **kwargs):
    params = jax.tree.map(lambda a: np.asarray(a, dtype), params)
    images = images.astype(dtype)
    return jax.jit(lambda params, images: module.apply({"params": params}, images, **kwargs))(params, images)


@pytest.fixture
def exact(monkeypatch):
    """transformers resizes positions in float32 even in a float64 model: in float64 then."""
    import torch

    plain = torch.nn.functional.interpolate
    monkeypatch.setattr(torch.nn.functional, "interpolate", lambda x, **kwargs: plain(x.double(), **kwargs))


@pytest.mark.parametrize("case", CASES)
def test_against_transformers(x64, exact, case):
    """At the size of the positions, and at another one, where Dinov2Model resizes them without the authors' offset."""
    family, model = make(case)
    model = tables.randomize(model)
    module, params = tables.load(family, tables.state_of(model), model.config.to_dict())
    assert module.resize_offset == (0.0 if "registers" in case else 0.1)
    inputs = family.inputs(module, np.random.default_rng(1))
    want = family.compare(model, inputs)
    got = family.outputs(run(module, params, np.float64, **inputs))
    errors = {key: tables.error(got[key], value) for key, value in want.items()}
    assert set(got) == set(want) and max(errors.values()) < 1e-12, errors

    rows, columns = module.patch
    images = np.random.default_rng(2).standard_normal((2, 6 * rows, 3 * columns, 3)).astype(np.float32)
    other = family.compare(model, {"images": images})
    as_theirs = family.outputs(run(module.clone(resize_offset=0.0), params, np.float64, images))
    errors = {key: tables.error(as_theirs[key], value) for key, value in other.items()}
    assert max(errors.values()) < 1e-12, errors
    if "registers" not in case:
        ours = family.outputs(run(module, params, np.float64, images))
        assert all(tables.error(ours[key], value) > 1e-4 for key, value in other.items())


def test_against_transformers_in_float32():
    family, model = make("registers, gated")
    model = tables.randomize(model)
    module, params = tables.load(family, tables.state_of(model), model.config.to_dict())
    inputs = family.inputs(module, np.random.default_rng(1))
    got, want = family.outputs(run(module, params, np.float32, **inputs)), family.compare(model, inputs)
    assert max(tables.error(got[key], value) for key, value in want.items()) < 2e-5


@pytest.mark.parametrize("case", CASES)
def test_folders_round_trip(tmp_path, case):
    family, model = make(case)
    tables.check_folder(family, tables.randomize(model), tmp_path, "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    saved = load_file(tmp_path / "model.safetensors")
    assert not set(saved) <= set(model.state_dict())  # the published names are the old ones; the live ones are read too
    (module, params), (live_module, live) = (tables.load(family, s, config) for s in (saved, tables.state_of(model)))
    assert live_module == module
    jax.tree.map(np.testing.assert_array_equal, live, params)


def test_a_width_that_transformers_cannot_say():
    family, model = make("plain")
    module, _ = tables.load(family, tables.state_of(model), model.config.to_dict())
    with pytest.raises(ConvertError, match="mlp_ratio"):
        family.config(module.clone(mlp_dim=50))


# ------------------------------------------------------------------------------------------------ the authors' layout


def test_golden(x64):
    """Native size with a mask, two other sizes, the positions themselves, and intermediate layers."""
    g = golden.load("dinov2")
    module, params = tables.load(AUTHORS, g["weights"], {"num_heads": 3})
    assert (module.width, module.depth, module.mlp_dim, module.image_size) == (36, 3, 108, 28)
    image = {k: np.asarray(v, np.float64).transpose(0, 2, 3, 1) for k, v in g["inputs"].items() if v.ndim == 4}
    native = run(module, params, np.float64, image["native"], mask=jnp.asarray(g["inputs"]["masks"]), states=True)
    golden.check(g, "block0", native.states[0], 1e-10)
    for name, out in (
        ("native", native),
        ("other", run(module, params, np.float64, image["other"])),
        ("small", run(module, params, np.float64, image["small"])),
    ):
        golden.check(g, f"{name}_cls", out.pooled, 1e-10)
        golden.check(g, f"{name}_patch", out.tokens[:, 1:], 1e-10)
    found = intermediate(module, {"params": tables.float64(params)}, jnp.asarray(image["other"]), last=2)
    assert len(found) == 2 and found[0][1].shape == (1, 36)
    golden.check(g, "intermediate", np.asarray(found[0][0]).transpose(0, 3, 1, 2), 1e-10)


def test_the_mask_matters(x64):
    g = golden.load("dinov2")
    module, params = tables.load(AUTHORS, g["weights"], {"num_heads": 3})
    image = g["inputs"]["native"].transpose(0, 2, 3, 1)
    assert tables.error(run(module, params, np.float64, image).pooled, g["outputs"]["native_cls"]) > 1e-3
    with pytest.raises(ValueError, match="masked=True"):
        run(module.clone(masked=False), params, np.float64, image, mask=jnp.asarray(g["inputs"]["masks"]))


def test_authors_round_trip():
    g = golden.load("dinov2")
    tables.check_round_trip(AUTHORS, g["weights"], {"num_heads": 3})
    with pytest.raises(ConvertError, match="width 36 is not one of DINOv2's"):
        tables.load(AUTHORS, g["weights"])
    chunked = {k.replace("blocks.", "blocks.0.") if k.startswith("blocks") else k: v for k, v in g["weights"].items()}
    module, params = tables.load(AUTHORS, chunked, {"num_heads": 3})
    jax.tree.map(np.testing.assert_array_equal, params, tables.load(AUTHORS, g["weights"], {"num_heads": 3})[1])


def test_authors_registers_and_swiglu_against_transformers():
    """The authors' names of a network with registers and a joint gate hold what transformers' names hold."""
    family, model = make("registers, gated")
    module, params = tables.load(family, tables.state_of(tables.randomize(model)), model.config.to_dict())
    files = tables.export(AUTHORS, module, params)
    assert files["register_tokens"].shape == (1, 3, 24) and files["blocks.1.mlp.w12.weight"].shape == (64, 24)
    gate = model.encoder.layer[1].mlp.gate_proj.weight.detach().numpy()
    np.testing.assert_array_equal(files["blocks.1.mlp.w12.weight"][:32], gate)
    again, _ = tables.check_round_trip(AUTHORS, files, {"num_heads": 4})
    assert (again.num_registers, again.gated, again.act, again.resize) == (3, True, "silu", "bicubic_antialias")
    assert again.clone(layer_scale=1.0) == module
