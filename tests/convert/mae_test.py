"""MAE's layouts: parity and gradients against transformers, golden outputs of the authors' code, round trips."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.convert import tables
from tests.convert.tables import quick  # noqa: F401  a fixture
from tests.golden import golden
from vgen.convert.mae import AUTHORS, HF_MAE, HF_MAE_ENCODER
from vgen.convert.rules import ConvertError
from vgen.models.vit import ViT

pytestmark = pytest.mark.usefixtures("quick")

CONFIGS = {
    "normalised pixels": dict(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40, image_size=24, patch_size=6,
        decoder_hidden_size=16, decoder_num_hidden_layers=1, decoder_num_attention_heads=2,
        decoder_intermediate_size=36, norm_pix_loss=True,
    ),
    "plain pixels, no qkv bias": dict(
        hidden_size=36, num_hidden_layers=1, num_attention_heads=3, intermediate_size=50, image_size=25, patch_size=5,
        decoder_hidden_size=28, decoder_num_hidden_layers=3, decoder_num_attention_heads=7,
        decoder_intermediate_size=30, norm_pix_loss=False, qkv_bias=False, mask_ratio=0.6, layer_norm_eps=1e-6,
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=CONFIGS)
def reference(request):
    """All parameters are drawn anew; the two tables of positions are the fixed ones, which a new model lacks."""
    transformers = pytest.importorskip("transformers")
    import torch
    from transformers.models.vit_mae.modeling_vit_mae import build_2d_sinusoidal_position_embedding as build

    model = tables.randomize(transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(**CONFIGS[request.param])))
    side = model.config.image_size // model.config.patch_size
    for table in (model.vit.embeddings.position_embeddings, model.decoder.decoder_pos_embed):
        assert not table.requires_grad
        down, across = build(side, side, table.shape[-1], cls_token=True).chunk(2, dim=-1)
        table.data.copy_(torch.cat([across, down], dim=-1))
    return model


def load(model):
    return tables.load(HF_MAE, tables.state_of(model), model.config.to_dict())


def run(module, params, dtype, *args):
    params = {"params": jax.tree.map(lambda a: np.asarray(a, dtype), params)}
    return jax.jit(module.apply)(params, *(np.asarray(a, dtype) for a in args))


def test_against_transformers(x64, reference):
    module, params = load(reference)
    inputs = HF_MAE.inputs(module, np.random.default_rng(1))
    want = HF_MAE.compare(reference, inputs)
    got = HF_MAE.outputs(run(module, params, np.float64, *inputs.values()))
    errors = {key: tables.error(got[key], value) for key, value in want.items()}
    assert set(got) == set(want) and max(errors.values()) < 1e-10, errors
    for name in inputs:
        moved = HF_MAE.compare(reference, inputs | {name: np.flip(inputs[name], 1) + 0.1 * inputs[name]})
        keys = want.keys() - ({"mask"} if name == "images" else ())
        assert all(tables.error(moved[key], want[key]) > 1e-4 for key in keys), name


def test_against_transformers_in_float32(reference):
    module, params = load(reference)
    inputs = HF_MAE.inputs(module, np.random.default_rng(1))
    want = HF_MAE.compare(reference, inputs)
    got = HF_MAE.outputs(run(module, params, np.float32, *inputs.values()))
    assert max(tables.error(got[key], value) for key, value in want.items()) < 2e-5


def test_gradients_of_the_loss(x64, reference):
    import torch

    module, params = load(reference)
    inputs = {k: np.asarray(v, np.float64) for k, v in HF_MAE.inputs(module, np.random.default_rng(1)).items()}
    loss = lambda params, images, noise: module.apply({"params": params}, images, noise).loss
    grads = jax.jit(jax.grad(loss, (0, 1)))(tables.float64(params), *inputs.values())
    reference.zero_grad()
    x = torch.from_numpy(inputs["images"].transpose(0, 3, 1, 2)).requires_grad_()
    reference(x, noise=torch.from_numpy(inputs["noise"])).loss.backward()
    assert tables.error(grads[1], x.grad.permute(0, 2, 3, 1)) < 1e-8
    tables.check_gradient_tree(grads[0], HF_MAE, module, reference, 1e-8, ["attn/k/bias"])


def test_folders_round_trip(reference, tmp_path):
    """transformers writes names for the decoder's layers that no published file has; both kinds are read."""
    import torch
    import transformers

    model = transformers.ViTMAEForPreTraining(reference.config).eval()
    model.load_state_dict({k: v.float() for k, v in reference.state_dict().items()})
    model.save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved/model.safetensors")
    assert "decoder.decoder_encoder.layer.0.layernorm_after.bias" in saved
    published = {k.replace("decoder.decoder_encoder.layer", "decoder.decoder_layers"): v for k, v in saved.items()}
    config = json.loads((tmp_path / "saved/config.json").read_text())
    module, params = tables.check_round_trip(HF_MAE, published, config)
    for state in (saved, tables.state_of(model)):
        again, same = tables.load(HF_MAE, state, config)
        assert again == module
        jax.tree.map(np.testing.assert_array_equal, same, params)

    (tmp_path / "ours").mkdir()
    (tmp_path / "ours/config.json").write_text(json.dumps(HF_MAE.config(module)))
    exported = tables.export(HF_MAE, module, params)
    save_file(exported, tmp_path / "ours/model.safetensors", metadata={"format": "pt"})
    kind = transformers.ViTMAEForPreTraining
    again, info = kind.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    inputs = HF_MAE.inputs(module, np.random.default_rng(0))
    for a, b in zip(*(HF_MAE.compare(m.eval(), inputs).values() for m in (again, model)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert torch.equal(again.decoder.decoder_pos_embed, model.decoder.decoder_pos_embed)


def test_the_encoder_alone(x64, reference):
    """ViTMAEModel's names, and the whole image seen."""
    import torch

    state = {k.removeprefix("vit."): v for k, v in tables.state_of(reference.vit).items()}
    module, params = tables.load(HF_MAE_ENCODER, state, reference.config.to_dict())
    assert isinstance(module, ViT)
    images = HF_MAE_ENCODER.inputs(module, np.random.default_rng(1))["images"]
    vit = reference.vit
    ratio, vit.config.mask_ratio = vit.config.mask_ratio, 0.0
    try:
        order = torch.arange(module.grid[0] * module.grid[1]).repeat(2, 1)
        with torch.no_grad():
            x = torch.from_numpy(images.transpose(0, 3, 1, 2)).double()
            want = vit(x, noise=order).last_hidden_state
    finally:
        vit.config.mask_ratio = ratio
    assert tables.error(run(module, params, np.float64, images).tokens, want) < 1e-12
    published = tables.export(HF_MAE_ENCODER, module, params)
    assert "encoder.layer.0.attention.attention.query.weight" in published
    assert tables.check_round_trip(HF_MAE_ENCODER, published, HF_MAE_ENCODER.config(module))[0] == module
    whole, whole_params = load(reference)
    encode = lambda p, x: whole.apply({"params": p}, x, method="encode").tokens
    assert tables.error(jax.jit(encode)(tables.float64(whole_params), jnp.asarray(images, jnp.float64)), want) < 1e-12


# ------------------------------------------------------------------------------------------------ the authors' layout

GOLDEN = dict(num_heads=3, decoder_num_heads=4)


def test_golden(x64):
    g = golden.load("mae_authors")
    module, params = tables.load(AUTHORS, g["weights"], GOLDEN)
    assert (module.width, module.decoder_width, module.decoder_mlp_dim, module.image_size) == (36, 32, 96, 40)
    out = run(module, params, np.float64, g["inputs"]["imgs"].transpose(0, 2, 3, 1), g["inputs"]["noise"])
    golden.check(g, "loss", out.loss, 1e-10)
    golden.check(g, "pred", out.pred, 1e-10)
    golden.check(g, "mask", out.mask, 0)
    golden.check(g, "latent", out.tokens, 1e-10)


def test_authors_round_trip():
    weights = golden.load("mae_authors")["weights"]
    module, params = tables.check_round_trip(AUTHORS, weights, GOLDEN)
    encoder = {k: v for k, v in weights.items() if not k.startswith(("decoder", "mask_token"))}
    alone, alone_params = tables.check_round_trip(AUTHORS, encoder, GOLDEN)
    assert isinstance(alone, ViT)
    jax.tree.map(np.testing.assert_array_equal, alone_params, params["encoder"])


def test_trained_positions_and_unknown_widths_are_refused():
    weights = dict(golden.load("mae_authors")["weights"])
    with pytest.raises(ConvertError, match="width 36 is not one of MAE's"):
        tables.load(AUTHORS, weights)
    weights["decoder_pos_embed"] = weights["decoder_pos_embed"] + 0.1
    with pytest.raises(ConvertError, match="decoder_pos_embed: not the fixed sin-cos positions of a 5 x 5 grid"):
        tables.load(AUTHORS, weights, GOLDEN)
