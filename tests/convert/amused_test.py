"""aMUSEd's transformer: parity with diffusers' UVit2DModel, round trips, refused configs."""

import jax
import numpy as np
import pytest

from tests.convert import tables
from vgen.convert import rules
from vgen.convert.amused import UVIT

SMALL = dict(
    hidden_size=32, cond_embed_dim=24, micro_cond_encode_dim=4, micro_cond_embed_dim=20, encoder_hidden_size=20,
    vocab_size=40, codebook_size=32, in_channels=12, block_out_channels=16, num_res_blocks=1, block_num_heads=4,
    num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, sample_size=8,
)  # fmt: skip
CONFIGS = {
    "as 512": SMALL | dict(downsample=True, upsample=True),
    # odd grid, biases, other heads, one width for text and blocks, another eps
    "odd": SMALL
    | dict(
        use_bias=True, num_attention_heads=2, block_num_heads=3, block_out_channels=24, hidden_size=24,
        num_res_blocks=2, num_hidden_layers=3, micro_cond_encode_dim=6, micro_cond_embed_dim=30, sample_size=5,
        layer_norm_eps=1e-3,
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=CONFIGS)
def reference(request):
    diffusers = pytest.importorskip("diffusers")
    return tables.randomize(diffusers.UVit2DModel(**CONFIGS[request.param]))


@pytest.fixture
def exact(monkeypatch):
    """diffusers computes norms and the sinusoids in float32 even in a float64 model: take those casts out."""
    import torch
    from diffusers.models import embeddings, normalization

    class Wide:
        float32 = torch.float64

        def __getattr__(self, name):
            return getattr(torch, name)

    for module in (embeddings, normalization):
        monkeypatch.setattr(module, "torch", Wide())
    monkeypatch.setattr(torch.Tensor, "float", lambda self: self)


def run(module, params, inputs, dtype):
    cast = lambda a: np.asarray(a, dtype) if np.issubdtype(a.dtype, np.floating) else a
    params, inputs = jax.tree.map(cast, params), {k: cast(v) for k, v in inputs.items()}
    return jax.jit(module.apply)({"params": params}, **inputs)


def test_against_diffusers(x64, reference, exact):
    state = {k: v.numpy() for k, v in reference.state_dict().items()}
    module, params = tables.load(UVIT, state, reference.config)
    inputs = UVIT.inputs(module, np.random.default_rng(1))
    want = UVIT.compare(reference, inputs)["logits"]
    error = tables.error(run(module, params, inputs, np.float64), want)
    assert error < 1e-9, error
    # every input matters: one token, one text state, one entry of the pooled text, each of the five numbers
    places = [("tokens", (0, 1, 2)), ("text", (0, 3, 1)), ("pooled", (0, 1)), *(("micro", (0, i)) for i in range(5))]
    for name, place in places:
        moved = {k: v.copy() for k, v in inputs.items()}
        moved[name][place] = moved[name][place] - 1 if moved[name][place] > 0 else 1
        got = UVIT.compare(reference, moved)["logits"]
        assert tables.error(got[:1], want[:1]) > 1e-4 and np.array_equal(got[1:], want[1:]), (name, place)


def test_against_diffusers_in_float32(reference):
    module, params = tables.load(UVIT, tables.state_of(reference), reference.config)
    inputs = UVIT.inputs(module, np.random.default_rng(1))
    want = UVIT.compare(reference, inputs)["logits"]
    error = tables.error(run(module, params, inputs, np.float32), want)
    assert error < 2e-5, error


def test_round_trip(reference, tmp_path):
    """The exported folder loads with no missing or unexpected key and gives the same outputs."""
    import json

    import diffusers
    from safetensors.numpy import save_file

    state = tables.state_of(reference)
    module, params = tables.check_round_trip(UVIT, state, reference.config)
    (tmp_path / "config.json").write_text(json.dumps(UVIT.config(module)))
    save_file(tables.export(UVIT, module, params), tmp_path / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    again, info = diffusers.UVit2DModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    known = {k: v for k, v in reference.config.items() if not k.startswith("_")}
    assert {k: v for k, v in again.config.items() if not k.startswith("_")} == known
    inputs = UVIT.inputs(module, np.random.default_rng(1))
    want = UVIT.compare(reference.float(), inputs)["logits"]
    np.testing.assert_array_equal(UVIT.compare(again.eval(), inputs)["logits"], want)
    reference.double()


def test_a_sparse_config_means_diffusers_defaults():
    diffusers = pytest.importorskip("diffusers")
    import inspect

    defaults = {
        k: p.default for k, p in inspect.signature(diffusers.UVit2DModel.__init__).parameters.items() if k != "self"
    }
    assert UVIT.build({}, {}) == UVIT.build(defaults, {})
    assert UVIT.config(UVIT.build(defaults, {})) == defaults | {"_class_name": "UVit2DModel"}


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(downsample=True), "downsample is True and upsample False"),
        (dict(ln_elementwise_affine=False), "only norms with a scale"),
        (dict(micro_cond_embed_dim=24), "micro_cond_embed_dim is 24, expected 5 x micro_cond_encode_dim = 20"),
    ],
)
def test_refused_configs(change, message):
    with pytest.raises(rules.ConvertError, match=message):
        UVIT.build(SMALL | change, {})


def test_unread_and_missing_tensors_are_named():
    diffusers = pytest.importorskip("diffusers")
    state = tables.state_of(diffusers.UVit2DModel(**SMALL))
    extra = state | {"down_block.attention_blocks.0.attn3.to_q.weight": np.zeros((2, 2), np.float32)}
    with pytest.raises(rules.ConvertError, match=r"unread down_block.attention_blocks.0.attn3.to_q.weight"):
        tables.load(UVIT, extra, SMALL)
    state.pop("transformer_layers.1.ff.net.2.weight")
    with pytest.raises(rules.ConvertError, match=r"layers/mlp/fc2/kernel: got \(1, 48, 32\), expected \(2, 48, 32\)"):
        tables.load(UVIT, state, SMALL)
