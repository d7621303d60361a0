"""T5's files: every form of them, there and back, and what is wrong with one that does not fit."""

import jax
import numpy as np
import pytest

import vgen
from vgen.config import UserError
from vgen.convert import export, formats, load, sources, verify
from vgen.convert.t5 import T5, build
from vgen.models.t5 import T5Encoder

FAMILY = "vgen.convert.t5:T5"
KINDS = {
    "1.1": dict(feed_forward_proj="gated-gelu", num_layers=3, d_kv=6, num_heads=5, relative_attention_num_buckets=32),
    "1.0": dict(feed_forward_proj="relu", num_layers=2, d_kv=8, num_heads=3, relative_attention_num_buckets=12),
}


def reference(version, cls="T5EncoderModel", seed=3):
    """A small T5 of random weights, norms included."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config = transformers.T5Config(vocab_size=50, d_model=24, d_ff=40, dropout_rate=0.0, **KINDS[version])
    model = getattr(transformers, cls)(config).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        spread = 0.3 * torch.randn(p.shape, generator=generator)
        p.data = 1 + spread if "norm" in name else spread
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{version: folder that save_pretrained wrote}."""
    root = tmp_path_factory.mktemp("t5")
    for version in KINDS:
        reference(version).save_pretrained(root / version)
    return {version: root / version for version in KINDS}


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("version", KINDS)
def test_there_and_back_is_the_same_bits(version, folders, tmp_path):
    import torch
    import transformers

    model, params = vgen.load(folders[version])
    export.export(tmp_path / "out", model, params, FAMILY, config=sources.open_source(folders[version]).config)
    want, got = sources.read_weights(folders[version]), sources.read_weights(tmp_path / "out")
    assert set(got) == set(want)
    for name, array in want.items():
        assert got[name].dtype == array.dtype and got[name].tobytes() == array.tobytes(), name
    again, info = transformers.T5EncoderModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    tokens = torch.arange(20).reshape(2, 10)
    with torch.no_grad():
        assert torch.equal(again.eval()(tokens).last_hidden_state, reference(version)(tokens).last_hidden_state)


@pytest.mark.parametrize("version", KINDS)
def test_verify_agrees(version, folders):
    assert verify.errors(sources.open_source(folders[version]))["states"][1] < 2e-5


def test_verify_notices_what_is_not_a_number(folders, monkeypatch):
    for side in (dict(compare=lambda module, inputs: dict(states=np.full((2, 24, 24), np.nan))),
                 dict(outputs=lambda states: dict(states=states * np.nan))):  # fmt: skip
        monkeypatch.setattr("vgen.convert.families.get", lambda name: T5._replace(**side))
        assert verify.errors(sources.open_source(folders["1.1"]))["states"] == (np.inf, np.inf)


def test_verify_notices_two_matrices_exchanged(folders, monkeypatch):
    def table(model):
        swap = {"layers/mlp/fc1/kernel": "layers/mlp/gate/kernel", "layers/mlp/gate/kernel": "layers/mlp/fc1/kernel"}
        right = T5.table(model)
        return right._replace(rules=tuple(rule._replace(dst=swap.get(rule.dst, rule.dst)) for rule in right.rules))

    monkeypatch.setattr("vgen.convert.families.get", lambda name: T5._replace(table=table))
    assert verify.errors(sources.open_source(folders["1.1"]))["states"][1] > 1e-2


@pytest.mark.parametrize("version", KINDS)
def test_a_whole_t5_gives_its_encoder(version, tmp_path):
    whole = reference(version, "T5ForConditionalGeneration")
    whole.save_pretrained(tmp_path / "whole")
    model, params = vgen.load(tmp_path / "whole")
    state = {k: v.numpy() for k, v in whole.encoder.state_dict().items()}
    np.testing.assert_array_equal(params["embed"]["embedding"], whole.shared.weight.detach().numpy())
    np.testing.assert_array_equal(params["norm"]["scale"], state["final_layer_norm.weight"])
    assert verify.errors(sources.open_source(tmp_path / "whole"))["states"][1] < 2e-5


@pytest.mark.parametrize("version", KINDS)
def test_without_a_config_the_shapes_tell(version, folders, tmp_path):
    (tmp_path / "t5.safetensors").write_bytes((folders[version] / "model.safetensors").read_bytes())
    model, params = vgen.load(tmp_path / "t5.safetensors")
    want, same = vgen.load(folders[version])
    assert model == want
    equal(params, same)


def test_the_embedding_under_either_name(folders, tmp_path):
    arrays = sources.read_weights(folders["1.1"])
    arrays["encoder.embed_tokens.weight"] = arrays["shared.weight"]
    formats.write_safetensors(tmp_path / "both.safetensors", arrays)
    del arrays["shared.weight"]
    formats.write_safetensors(tmp_path / "other.safetensors", arrays)
    want = vgen.load(folders["1.1"])[1]
    equal(vgen.load(tmp_path / "both.safetensors")[1], want)
    equal(vgen.load(tmp_path / "other.safetensors")[1], want)


def test_parameters_alone_for_a_config(folders):
    equal(load.params(str(folders["1.0"])), vgen.load(folders["1.0"])[1])


def test_everything_that_is_wrong_is_named_at_once(folders, tmp_path):
    arrays = sources.read_weights(folders["1.1"])
    layer = "encoder.block.1.layer."
    arrays["encoder.pooler.weight"] = np.zeros(3, np.float32)
    arrays["encoder.final_layer_norm.weight"] = np.zeros(25, np.float32)
    arrays[layer + "0.layer_norm.weight"] = np.zeros(1, np.float32)  # numpy would broadcast it
    arrays["shared.weight"] = np.zeros((50, 24), np.int32)
    del arrays[layer + "1.DenseReluDense.wo.weight"]
    formats.write_safetensors(tmp_path / "model.safetensors", arrays)
    (tmp_path / "config.json").write_text((folders["1.1"] / "config.json").read_text())
    with pytest.raises(UserError) as caught:
        vgen.load(tmp_path)
    for line in (
        "unread encoder.pooler.weight",
        "norm/scale: got (25,), expected (24,)",
        layer + "0.layer_norm.weight (1,): not of the shape that encoder.block.0.layer.0.layer_norm.weight has",
        "embed/embedding: got int32, expected float32",
        "numbers [1] are missing below 2",
        "unfilled layers/mlp/fc2/kernel",
    ):
        assert line in str(caught.value), line
    assert len(str(caught.value).splitlines()) == 1 + 8  # the two layers of wo that are left are unread


def test_configs_that_are_not_ours():
    with pytest.raises(UserError, match="feed_forward_proj is 'swish', expected one of relu, "):
        build(dict(feed_forward_proj="swish"), {})
    with pytest.raises(UserError, match="sizes are taken from .*relative_attention_bias.weight"):
        build({}, {"shared.weight": (5, 4)})
    with pytest.raises(UserError, match="no feed_forward_proj means act='quick_gelu', gated=False"):
        T5.config(T5Encoder(2, 8, 2, 4, 16, act="quick_gelu", gated=False))
