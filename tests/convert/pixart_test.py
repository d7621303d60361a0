"""PixArt's layouts: bits, sizes read off the names, compressed layers, configs, and what is refused."""

import numpy as np
import pytest

from tests.convert import tables
from tests.golden import golden
from tests.models.pixart_test import CONFIGS, oracle
from vgen.convert import pixart
from vgen.convert.rules import ConvertError
from vgen.models.dit import positions
from vgen.models.pixart import ALPHA_1024, SIGMA_2K, SIGMA_256, SIGMA_1024, PixArt


def weights(case="pixart_alpha"):
    return dict(golden.load(case)["weights"])


def compressed(layers=(1, 2), micro=False):
    """The alpha file with the arrays of compressed layers, and of micro-conditions, beside its own."""
    state, rng = weights(), np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    for i in layers:
        state[f"blocks.{i}.attn.sr.weight"] = draw(48, 1, 2, 2)
        state |= {f"blocks.{i}.attn.{name}": draw(48) for name in ("sr.bias", "norm.weight", "norm.bias")}
    for name in ("csize_embedder", "ar_embedder") if micro else ():
        state |= {f"{name}.mlp.0.weight": draw(16, 256), f"{name}.mlp.2.weight": draw(16, 16)}
        state |= {f"{name}.mlp.{i}.bias": draw(16) for i in (0, 2)}
    return state


@pytest.mark.parametrize("case", ["pixart_alpha", "pixart_sigma", "pixart_sigma_ms"])
def test_authors_round_trip(case):
    state = weights(case)
    assert tables.found(state) is pixart.AUTHORS
    net, params = tables.check_round_trip(pixart.AUTHORS, state, dict(num_heads=4), lost=("pos_embed",))
    np.testing.assert_array_equal(params["null_context"], state["y_embedder.y_embedding"])
    side = net.sample_size // 2  # what is lost is computed, to the last bit
    interpolation = 2.0 if case == "pixart_sigma" else 1.0
    table = positions((side, side), 48, side, interpolation)
    np.testing.assert_array_equal(table[None], state["pos_embed"])
    del state["pos_embed"]
    again, _ = tables.check_round_trip(pixart.AUTHORS, state, dict(num_heads=4, sample_size=net.sample_size))
    assert again == net


@pytest.mark.parametrize("layers, micro", [((1, 2), False), ((0, 1, 2), False), ((2,), True)])
def test_compressed_round_trip(layers, micro):
    state = compressed(layers, micro)
    net, params = tables.check_round_trip(pixart.AUTHORS, state, dict(num_heads=4), lost=("pos_embed",))
    assert (net.compress, net.compressed, net.micro) == (2, len(layers), micro)
    kernel = params["compressed_layers"]["compress"]["kernel"][-1]
    np.testing.assert_array_equal(kernel[1, 0], state["blocks.2.attn.sr.weight"][:, 0, 1, 0])
    with pytest.raises(ConvertError, match="neither compressed layers nor a null context"):
        pixart.config(net)


def published(tokens, side, micro=False, width=1152):
    """Shapes that tell the published networks apart."""
    shapes = {
        "x_embedder.proj.weight": (width, 4, 2, 2), "pos_embed": (1, side**2 // 4, width),
        "y_embedder.y_embedding": (tokens, 4096), "y_embedder.y_proj.fc1.weight": (width, 4096),
        "blocks.0.mlp.fc1.weight": (4 * width, width), "final_layer.linear.weight": (32, width),
        **{f"blocks.{i}.attn.qkv.weight": (3 * width, width) for i in range(28)},
    }  # fmt: skip
    return shapes | ({"csize_embedder.mlp.0.weight": (384, 256)} if micro else {})


@pytest.mark.parametrize("shapes, fields", [
    (published(120, 128, True), ALPHA_1024), (published(300, 32), SIGMA_256),
    (published(300, 128), SIGMA_1024), (published(300, 256), SIGMA_2K),
])  # fmt: skip
def test_published_files(shapes, fields):
    assert pixart.AUTHORS.build({}, shapes) == PixArt(mlp_dim=4608, **fields)


def test_authors_refused():
    with pytest.raises(ConvertError, match=r"the last layers may be compressed, here layers \[0, 2\] of 3 are"):
        tables.load(pixart.AUTHORS, compressed((0, 2)), dict(num_heads=4))
    state = weights()
    del state["pos_embed"]
    with pytest.raises(ConvertError, match="give sample_size"):
        tables.load(pixart.AUTHORS, state, dict(num_heads=4))


@pytest.mark.parametrize("name", CONFIGS)
def test_diffusers_folder(name, tmp_path):
    tables.check_folder(pixart.DIFFUSERS, oracle(name), tmp_path)


def test_configs():
    # QUIRK: published folders name another class, and leave what follows from the size to the code
    old = dict(
        _class_name="Transformer2DModel", activation_fn="gelu-approximate", attention_bias=True, attention_head_dim=72,
        attention_type="default", caption_channels=4096, cross_attention_dim=1152, dropout=0.0, in_channels=4,
        norm_elementwise_affine=False, norm_eps=1e-06, norm_type="ada_norm_single", num_attention_heads=16,
        num_embeds_ada_norm=1000, num_layers=28, out_channels=8, patch_size=2, sample_size=128,
    )  # fmt: skip
    family = tables.found({}, old)
    net = family.build(old, {})
    assert net == PixArt(mlp_dim=4608, **(ALPHA_1024 | dict(null_tokens=0)))
    assert family.build(old | dict(sample_size=32), {}) == PixArt(mlp_dim=4608)
    sigma = old | dict(use_additional_conditions=False, interpolation_scale=2)
    assert family.build(sigma, {}) == PixArt(mlp_dim=4608, **(SIGMA_1024 | dict(null_tokens=0)))
    assert family.config(net)["interpolation_scale"] == 2 and tables.found({}, family.config(net)) is pixart.DIFFUSERS
    sources = [[rule.src for rule in f.table(net).rules] for f in (family, pixart.DIFFUSERS)]
    assert sources[0] == sources[1]
    with pytest.raises(ConvertError, match="caption_channels and cross_attention_dim = 1152, got None and 1152"):
        family.build(old | dict(caption_channels=None), {})
    with pytest.raises(ConvertError, match="norm_eps must be 1e-06, got 1e-05"):
        family.build(old | dict(norm_eps=1e-5), {})
