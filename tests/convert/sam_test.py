"""SAM's layouts: parity with transformers' SamModel, round trips, the two layouts against each other."""

import jax
import numpy as np
import pytest

from tests.conftest import quick_compilation
from tests.convert import tables
from tests.golden import golden
from vgen.convert.rules import ConvertError
from vgen.convert.sam import AUTHORS, HF

CONFIGS = {
    "windows that do not divide the map": dict(
        vision=dict(hidden_size=36, output_channels=16, num_hidden_layers=4, num_attention_heads=3, image_size=64,
                    patch_size=8, window_size=3, global_attn_indexes=[1, 3], mlp_dim=40, num_pos_feats=8),
        prompt=dict(hidden_size=16, image_size=64, patch_size=8, mask_input_channels=16),
        decoder=dict(hidden_size=16, num_attention_heads=4, mlp_dim=32, iou_head_hidden_dim=12),
    ),
    "no bias, local layers last, other numbers of layers and masks": dict(
        vision=dict(hidden_size=24, output_channels=24, num_hidden_layers=5, num_attention_heads=2, image_size=48,
                    patch_size=4, window_size=4, global_attn_indexes=[0, 3], mlp_dim=30, num_pos_feats=12,
                    qkv_bias=False, layer_norm_eps=1e-5),
        prompt=dict(hidden_size=24, image_size=48, patch_size=4, mask_input_channels=8),
        decoder=dict(hidden_size=24, num_hidden_layers=3, num_attention_heads=3, mlp_dim=20, iou_head_hidden_dim=20,
                     iou_head_depth=4, num_multimask_outputs=2),
    ),
}  # fmt: skip
PROMPTS = ("points", "labels", "boxes", "masks")


@pytest.fixture(scope="module", params=CONFIGS)
def reference(request):
    transformers = pytest.importorskip("transformers")
    parts = CONFIGS[request.param]
    config = transformers.SamConfig(
        vision_config=parts["vision"], prompt_encoder_config=parts["prompt"],
        mask_decoder_config=parts["decoder"] | dict(layer_norm_eps=1e-5),  # the authors'
    )  # fmt: skip
    return tables.randomize(transformers.SamModel(config))


def errors(module, params, model, cases, dtype):
    """Relative errors of all outputs for each (inputs, multimask) of `cases`, which share an image."""
    wants = [HF.compare(model, given, multimask) for given, multimask in cases]
    params = jax.tree.map(lambda a: np.asarray(a, dtype), params)
    cast = [{k: v.astype(dtype) if v.dtype.kind == "f" else v for k, v in given.items()} for given, _ in cases]

    @jax.jit
    def run(params, cast):
        embedding = module.apply({"params": params}, cast[0]["pixels"], method="encode")
        results = []
        for given, (_, multimask) in zip(cast, cases, strict=True):
            prompts = {k: v for k, v in given.items() if k != "pixels"}
            out = module.apply({"params": params}, embedding, **prompts, multimask=multimask, method="decode")
            results.append(HF.outputs(out))
        return results

    with quick_compilation():
        results = run(params, cast)
    return [tables.error(got[k], v) for want, got in zip(wants, results, strict=True) for k, v in want.items()]


def some(inputs, *names):
    return {k: v for k, v in inputs.items() if k == "pixels" or k in names}


def test_against_transformers(x64, reference):
    module, params = tables.load(HF, tables.state_of(reference), reference.config.to_dict())
    inputs = HF.inputs(module, np.random.default_rng(1))
    inputs["labels"][0, 0] = (-1, -10)
    cases = [(inputs, True), (some(inputs, "points", "labels"), False)]
    found = errors(module, params, reference, cases, np.float64)
    assert max(found) < 1e-9, found


def test_against_transformers_in_float32(reference):
    module, params = tables.load(HF, tables.state_of(reference), reference.config.to_dict())
    inputs = HF.inputs(module, np.random.default_rng(1))
    found = errors(module, params, reference, [(inputs, True)], np.float32)
    assert max(found) < 2e-5, found


def test_every_input_matters(reference):
    module, params = tables.load(HF, tables.state_of(reference), reference.config.to_dict())
    inputs = HF.inputs(module, np.random.default_rng(1))
    run = jax.jit(lambda x: module.apply({"params": params}, **x))
    with quick_compilation():
        plain = run(inputs)
        for name in ("pixels", *PROMPTS):
            moved = run(inputs | {name: 1 - inputs[name]})
            assert all(tables.error(a, b) > 1e-4 for a, b in zip(moved, plain)), name


def test_the_decoder_norms_have_the_authors_eps(x64):
    """A config that says 1e-6, as those of the hub do, is read with the authors' 1e-5, and 1e-5 is written."""
    transformers = pytest.importorskip("transformers")
    parts = next(iter(CONFIGS.values()))
    config = transformers.SamConfig(
        vision_config=parts["vision"], prompt_encoder_config=parts["prompt"], mask_decoder_config=parts["decoder"]
    )
    assert config.mask_decoder_config.layer_norm_eps == 1e-6
    model = tables.randomize(transformers.SamModel(config))
    module, params = tables.load(HF, tables.state_of(model), config.to_dict())
    assert HF.config(module)["mask_decoder_config"]["layer_norm_eps"] == 1e-5
    cases = [(HF.inputs(module, np.random.default_rng(1)), True)]
    assert min(errors(module, params, model, cases, np.float64)) > 1e-7
    for name, part in model.mask_decoder.transformer.layers.named_modules():
        if "layer_norm" in name:
            part.eps = 1e-5
    assert max(errors(module, params, model, cases, np.float64)) < 1e-9


def test_round_trip_through_a_folder(reference, tmp_path):
    again = tables.check_folder(HF, reference.eval(), tmp_path, "model.safetensors")
    module, _ = tables.load(HF, tables.state_of(again), again.config.to_dict())
    assert HF.build(HF.config(module), {}) == module


def test_older_files_hold_the_gaussian_twice(reference):
    state = tables.state_of(reference)
    twin = "prompt_encoder.shared_embedding.positional_embedding"
    assert twin in state  # a state dict has it, a file of today has not
    tables.check_round_trip(HF, state, reference.config.to_dict(), lost={twin})


def test_authors_round_trip():
    weights = golden.load("sam")["weights"]
    lost = {"pixel_mean", "pixel_std"}
    module, _ = tables.check_round_trip(AUTHORS, weights, dict(decoder_heads=4), lost=lost)
    assert (module.depth, module.heads, module.global_layers, module.window) == (3, 3, (1,), 3)
    assert (module.image_size, module.patch, module.masks, module.iou_depth) == (96, 12, 3, 3)
    with pytest.raises(ConvertError, match="unread image_encoder.extra"):
        tables.load(AUTHORS, weights | {"image_encoder.extra": np.zeros(1)}, dict(decoder_heads=4))
    with pytest.raises(ConvertError, match="no array 'image_encoder.pos_embed'"):
        AUTHORS.build({}, {k: v.shape for k, v in weights.items() if "pos_embed" not in k})


def test_unknown_configurations_are_refused():
    for wrong, message in (
        (dict(vision_config=dict(use_rel_pos=False)), "use_rel_pos"),
        (dict(mask_decoder_config=dict(attention_downsample_rate=1)), "attention_downsample_rate"),
    ):
        with pytest.raises(ConvertError, match=message):
            HF.build(wrong, {})
