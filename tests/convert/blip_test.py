"""BLIP's layouts: parity with transformers, round trips, the two layouts as one network."""

import jax
import numpy as np
import pytest

from tests.conftest import quick_compilation
from tests.convert import tables
from vgen.convert.blip import AUTHORS, BLIP2, HF
from vgen.convert.rules import ConvertError

CONFIGS = {
    "two layers": dict(
        text=dict(vocab_size=60, hidden_size=32, encoder_hidden_size=24, intermediate_size=40, num_hidden_layers=2,
                  num_attention_heads=4, max_position_embeddings=16),
        vision=dict(hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=32,
                    patch_size=8),
    ),
    "odd sizes, other heads and eps": dict(
        text=dict(vocab_size=37, hidden_size=21, encoder_hidden_size=30, intermediate_size=25, num_hidden_layers=1,
                  num_attention_heads=3, max_position_embeddings=7, layer_norm_eps=1e-6),
        vision=dict(hidden_size=30, intermediate_size=33, num_hidden_layers=3, num_attention_heads=5, image_size=35,
                    patch_size=5, layer_norm_eps=1e-6),
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=CONFIGS)
def reference(request):
    transformers = pytest.importorskip("transformers")
    parts = CONFIGS[request.param]
    tokens = dict(bos_token_id=1, eos_token_id=2, sep_token_id=2, pad_token_id=0)
    config = transformers.BlipConfig(text_config=parts["text"] | tokens, vision_config=parts["vision"])
    return tables.randomize(transformers.BlipForConditionalGeneration(config))


def check(module, params, model, tol, dtype):
    given = HF.inputs(module, np.random.default_rng(1))
    want = HF.compare(model, given)["logits"]
    params = jax.tree.map(lambda a: np.asarray(a, dtype), params)
    given["images"] = given["images"].astype(dtype)
    run = jax.jit(lambda given: module.apply({"params": params}, **given))
    with quick_compilation():
        got = run(given)
        assert tables.error(got, want) < tol, tables.error(got, want)
        for name, moved in (
            ("images", given["images"][::-1]),
            ("tokens", (given["tokens"] + 1) % module.decoder.vocab),
            ("mask", given["mask"][:, ::-1]),
        ):
            assert tables.error(run(given | {name: moved}), want) > 1e-3, name
        later = given["tokens"].copy()
        later[:, 4:] = 0  # words ahead change nothing
        np.testing.assert_array_equal(run(given | {"tokens": later})[:, :4], got[:, :4])


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


def as_authors(state):
    """The same arrays under the names of salesforce's files, as its own code and transformers' correspond."""
    names = (
        ("vision_model.embeddings.class_embedding", "visual_encoder.cls_token"),
        ("vision_model.embeddings.position_embedding", "visual_encoder.pos_embed"),
        ("vision_model.embeddings.patch_embedding", "visual_encoder.patch_embed.proj"),
        ("vision_model.post_layernorm", "visual_encoder.norm"),
        ("vision_model.encoder.layers", "visual_encoder.blocks"),
        ("self_attn.projection", "attn.proj"),
        ("self_attn", "attn"),
        (".layer_norm", ".norm"),
    )
    renamed = {}
    for name, array in state.items():
        for theirs, ours in names:
            name = name.replace(theirs, ours)
        renamed[name] = array
    return renamed


def test_the_two_layouts_are_one_network(reference):
    state, sizes = tables.state_of(reference), reference.config
    heads = dict(vision_heads=sizes.vision_config.num_attention_heads, heads=sizes.text_config.num_attention_heads)
    theirs = as_authors(state) | {"text_decoder.bert.embeddings.position_ids": np.arange(16)[None]}
    tied = {f"text_decoder.cls.predictions.decoder.{x}" for x in ("weight", "bias")}
    assert tied < set(theirs)
    lost = tied | {"text_decoder.bert.embeddings.position_ids"}
    module, params = tables.check_round_trip(AUTHORS, theirs, heads, lost=lost)
    want, same = tables.load(HF, state, sizes.to_dict())
    jax.tree.map(np.testing.assert_array_equal, params, same)
    assert module.vision == want.vision.clone(eps=1e-6)  # QUIRK: 1e-6 in the authors' code, config.json may differ
    assert module.decoder == want.decoder.clone(eps=1e-12)


def test_wrong_checkpoints_are_refused():
    with pytest.raises(ConvertError, match="tie_word_embeddings"):
        HF.build(dict(tie_word_embeddings=False), {})
    with pytest.raises(ConvertError, match="hidden_act 'mish'"):
        HF.build(dict(vision_config=dict(hidden_act="mish")), {})
    with pytest.raises(ConvertError, match="no array 'visual_encoder.patch_embed.proj.weight'"):
        AUTHORS.build({}, {})


BLIP2_CONFIGS = {
    "cross-attention every second layer": dict(
        vision=dict(hidden_size=20, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=28,
                    patch_size=7),
        qformer=dict(hidden_size=24, num_hidden_layers=3, num_attention_heads=4, intermediate_size=40),
        num_query_tokens=6,
    ),
    "odd sizes, in every layer, no bias in the tower, other eps": dict(
        vision=dict(hidden_size=33, intermediate_size=21, num_hidden_layers=1, num_attention_heads=3, image_size=25,
                    patch_size=5, qkv_bias=False, layer_norm_eps=1e-4, hidden_act="quick_gelu"),
        qformer=dict(hidden_size=35, num_hidden_layers=2, num_attention_heads=5, intermediate_size=17,
                     cross_attention_frequency=1, layer_norm_eps=1e-5, hidden_act="relu"),
        num_query_tokens=1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BLIP2_CONFIGS)
def test_blip2_against_transformers(x64, name):
    """Vision tower, Q-Former and projection; the rest of the file, a language model, is left where it is."""
    transformers = pytest.importorskip("transformers")
    sizes = BLIP2_CONFIGS[name]
    text = dict(hidden_size=16, num_hidden_layers=1, ffn_dim=8, num_attention_heads=2, vocab_size=60)
    config = transformers.Blip2Config(
        vision_config=sizes["vision"],
        qformer_config=sizes["qformer"] | dict(encoder_hidden_size=sizes["vision"]["hidden_size"]),
        text_config=transformers.OPTConfig(**text, word_embed_proj_dim=16, max_position_embeddings=8).to_dict(),
        num_query_tokens=sizes["num_query_tokens"], image_token_index=59,
    )  # fmt: skip
    model = tables.randomize(transformers.Blip2Model(config))
    state = tables.state_of(model)
    lost = {name for name in state if name.startswith("language_model.")}
    module, params = tables.check_round_trip(BLIP2, state, config.to_dict(), lost=lost)
    given = BLIP2.inputs(module, np.random.default_rng(1))
    want = BLIP2.compare(model, given)
    run = jax.jit(lambda p, x: BLIP2.outputs(module.apply({"params": p}, x)))
    with quick_compilation():
        got = run(tables.float64(params), given["images"].astype(np.float64))
        moved = run(tables.float64(params), given["images"][::-1].astype(np.float64))
    errors = {name: tables.error(got[name], value) for name, value in want.items()}
    assert set(errors) == set(got) and max(errors.values()) < 1e-9, errors
    assert all(tables.error(moved[name], value) > 1e-3 for name, value in want.items())
