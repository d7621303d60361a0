"""DiT's layouts: bits, positions that files hold, diffusers' copies, configs, and what is refused."""

import numpy as np
import pytest

from tests.convert import tables
from tests.golden import golden
from tests.models.dit_test import CONFIGS, oracle
from vgen.convert import dit, pixart
from vgen.convert.rules import ConvertError
from vgen.layers.embed import sincos_2d
from vgen.models.dit import DiT


def weights():
    return dict(golden.load("dit")["weights"])


def test_authors_round_trip():
    state = weights()
    assert tables.found(state) is dit.AUTHORS
    net, params = tables.check_round_trip(dit.AUTHORS, state, dict(num_heads=6))
    assert params["layers"]["mod"]["kernel"].shape == (3, 48, 288)
    assert dit.AUTHORS.outputs(state)["sample"] is state


def test_positions_are_the_authors_formula():
    """The omega of the authors' get_1d_sincos_pos_embed_from_grid, at the published size."""
    omega = 1.0 / 10000 ** (np.arange(288, dtype=np.float64) / 288.0)
    x, y = np.meshgrid(np.arange(16, dtype=np.float32), np.arange(16, dtype=np.float32))
    parts = [f(np.outer(place.reshape(-1), omega)) for place in (x, y) for f in (np.sin, np.cos)]
    table = np.concatenate(parts, 1).astype(np.float32)
    assert np.abs(dit.positions((16, 16), 1152, 16) - table).max() <= 6e-8
    np.testing.assert_array_equal(sincos_2d(3, 5, 8), sincos_2d(3, 5, 8, interpolation=1.0))


@pytest.mark.parametrize("size, heads", [(384, 6), (1152, 16)])
def test_heads_of_the_published_sizes(size, heads):
    assert dit.heads({}, size) == heads and dit.heads(dict(num_heads=3), size) == 3


def test_authors_refused():
    with pytest.raises(ConvertError, match="width 48 is not one of the published .*: give num_heads"):
        tables.load(dit.AUTHORS, weights())
    moved = weights()
    moved["pos_embed"] = moved["pos_embed"] + 0.1
    with pytest.raises(ConvertError, match="not the fixed sin-cos positions of a 6 x 6 grid"):
        tables.load(dit.AUTHORS, moved, dict(num_heads=6))


@pytest.mark.parametrize("name", CONFIGS)
def test_diffusers_folder(name, tmp_path):
    tables.check_folder(dit.DIFFUSERS, oracle(name), tmp_path)


def test_diffusers_copies_must_be_equal():
    state = tables.state_of(oracle("learned variance"))
    state["transformer_blocks.1.norm1.emb.timestep_embedder.linear_2.bias"] += 1
    with pytest.raises(ConvertError, match="the copies of what embeds time and class differ"):
        tables.load(dit.DIFFUSERS, state, dict(oracle("learned variance").config))


def test_one_network_of_both_layouts():
    """Into diffusers' layout and back, by way of the authors' names."""
    net, params = tables.load(dit.AUTHORS, weights(), dict(num_heads=6))
    state = tables.export(dit.DIFFUSERS, net, params)
    again, back = tables.load(dit.DIFFUSERS, state, dit.config(net))
    assert again == net
    out = tables.export(dit.AUTHORS, again, back)
    assert all(np.array_equal(out[name], array) for name, array in weights().items())


def test_configs():
    # QUIRK: the published folder names another class, and an epsilon that the authors did not use
    published = dict(
        _class_name="Transformer2DModel", activation_fn="gelu-approximate", attention_bias=True, attention_head_dim=72,
        cross_attention_dim=None, double_self_attention=False, dropout=0.0, in_channels=4,
        norm_elementwise_affine=False, norm_num_groups=32, norm_type="ada_norm_zero", num_attention_heads=16,
        num_embeds_ada_norm=1000, num_layers=28, num_vector_embeds=None, only_cross_attention=False, out_channels=8,
        patch_size=2, sample_size=32, upcast_attention=False, use_linear_projection=False,
    )  # fmt: skip
    family = tables.found({}, published)
    assert family is pixart.TRANSFORMER_2D
    net = family.build(published, {})
    assert net == DiT(mlp_dim=4608)
    assert family.build(published | dict(norm_eps=1e-5), {}) == net
    sources = [[rule.src for rule in f.table(net).rules] for f in (family, dit.DIFFUSERS)]
    assert sources[0] == sources[1] and family.config(net)["norm_eps"] == 1e-6
    assert tables.found({}, family.config(net)) is dit.DIFFUSERS
    assert set(family.inputs(net, np.random.default_rng(0))) == {"x", "t", "labels"}
    with pytest.raises(ConvertError, match=r"got {'activation_fn': 'geglu'}, expected {'activation_fn': 'gelu-app"):
        family.build(published | dict(activation_fn="geglu"), {})
    with pytest.raises(ConvertError, match="norm_type must be ada_norm_zero or ada_norm_single, got 'layer_norm'"):
        family.build(published | dict(norm_type="layer_norm"), {})
    with pytest.raises(ConvertError, match="4 x width = 4608 wide, mlp_dim is 100"):
        dit.config(net.clone(mlp_dim=100))


def test_reference_of_verify_computes_what_the_authors_do():
    net, _ = tables.load(dit.AUTHORS, weights(), dict(num_heads=6))
    model = dit.DIFFUSERS.reference(dit.config(net))
    assert {block.norm1.emb.time_proj.downscale_freq_shift for block in model.transformer_blocks} == {0}
    assert {block.norm3.eps for block in model.transformer_blocks} == {1e-6}
