"""The Q-Former's layouts: parity with transformers' Blip2QFormerModel, round trips."""

import jax
import numpy as np
import pytest

from tests.conftest import quick_compilation
from tests.convert import tables
from tests.golden import golden
from vgen.convert.qformer import HF, LAVIS
from vgen.convert.rules import ConvertError

CONFIGS = {
    "cross-attention every second layer": dict(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=40, encoder_hidden_size=24,
        vocab_size=50,
    ),
    "odd sizes, in every third layer, an MLP for text": dict(
        hidden_size=21, num_hidden_layers=4, num_attention_heads=3, intermediate_size=25, encoder_hidden_size=18,
        vocab_size=50, cross_attention_frequency=3, layer_norm_eps=1e-6, use_qformer_text_input=True,
        hidden_act="gelu_new",
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=CONFIGS)
def reference(request):
    transformers = pytest.importorskip("transformers")
    return tables.randomize(transformers.Blip2QFormerModel(transformers.Blip2QFormerConfig(**CONFIGS[request.param])))


def check(module, params, model, tol, dtype):
    given = HF.inputs(module, np.random.default_rng(1))
    want = HF.compare(model, given)["queries"]
    params = jax.tree.map(lambda a: np.asarray(a, dtype), params)
    given = {k: v.astype(dtype) if v.dtype.kind == "f" else v for k, v in given.items()}
    run = jax.jit(lambda given: HF.outputs(module.apply({"params": params}, **given))["queries"])
    with quick_compilation():
        assert tables.error(run(given), want) < tol
        for name in ("queries", "context", "context_mask"):
            moved = given | {name: given[name][::-1]}
            assert tables.error(run(moved), want) > 1e-3, name


def test_against_transformers(x64, reference):
    module, params = tables.load(HF, tables.state_of(reference), reference.config.to_dict())
    check(module, params, reference, 1e-9, np.float64)


def test_against_transformers_in_float32(reference):
    module, params = tables.load(HF, tables.state_of(reference), reference.config.to_dict())
    check(module, params, reference, 2e-5, np.float32)


def test_round_trip_through_a_folder(reference, tmp_path):
    again = tables.check_folder(HF, reference.eval(), tmp_path, "model.safetensors")
    module, _ = tables.load(HF, tables.state_of(again), again.config.to_dict())
    assert HF.build(HF.config(module), {}) == module


def test_lavis_round_trips():
    """The Q-Former's own state dict, and a file of stage 1, which has more in it."""
    weights = golden.load("blip2_qformer_lavis")["weights"]
    ids = "bert.embeddings.position_ids"
    module, params = tables.load(LAVIS, weights, dict(heads=3))
    assert (module.depth, module.cross_every, module.num_queries, module.vocab, module.head) == (3, 2, 0, 50, True)
    out = tables.export(LAVIS, module, params)
    assert {name.removeprefix("Qformer.") for name in out} == set(weights) - {ids}

    whole = {f"Qformer.{k}": v for k, v in weights.items()}
    whole["query_tokens"] = np.random.default_rng(0).standard_normal((1, 6, 36)).astype(np.float32)
    rest = {name: np.zeros(1, np.float32) for name in
            ("visual_encoder.blocks.0.norm1.weight", "ln_vision.weight", "itm_head.bias", "temp", "vision_proj.weight",
             "Qformer.cls.predictions.decoder.weight", "Qformer.cls.predictions.decoder.bias")}  # fmt: skip
    module, params = tables.check_round_trip(
        LAVIS, whole | rest, dict(heads=3), lost={*rest, "Qformer." + ids}
    )  # fmt: skip
    np.testing.assert_array_equal(params["queries"], whole["query_tokens"][0])
    with pytest.raises(ConvertError, match="unread t5_proj.weight"):
        tables.load(LAVIS, whole | {"t5_proj.weight": np.zeros(1)}, dict(heads=3))


def test_unknown_configurations_are_refused():
    with pytest.raises(ConvertError, match="hidden_act 'mish'"):
        HF.build(dict(hidden_act="mish"), {})
    with pytest.raises(ConvertError, match="no array 'Qformer.bert.embeddings.word_embeddings.weight'"):
        LAVIS.build({}, {})
