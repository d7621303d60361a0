"""LoRA of PEFT, diffusers and kohya: the same outputs on both sides, in and out; names from the families' tables."""

import json
import warnings

import jax
import numpy as np
import pytest

from tests.convert import sam_test, tables
from tests.convert.tables import quick  # noqa: F401  a fixture
from tests.models.t5_test import exact  # noqa: F401  a fixture
from vgen import trees
from vgen.adapt import lora as adapt
from vgen.adapt.lora import factors, lora, scaled
from vgen.config import UserError
from vgen.convert import families, formats
from vgen.convert.lora import Low, Part, delta_of, lows, sites
from vgen.convert.lora_files import peft_settings, read_diffusers, read_peft, write_diffusers, write_peft
from vgen.convert.rules import ConvertError

pytestmark = pytest.mark.usefixtures("quick")
merge = jax.jit(adapt.merge)
SAM = "vgen.convert.sam:HF"
TEXT = dict(hidden_size=24, num_hidden_layers=3, num_attention_heads=3, intermediate_size=40, vocab_size=50,
            max_position_embeddings=9, eos_token_id=49, bos_token_id=48)  # fmt: skip
NETS = {  # class, config class, family, its config, PEFT's settings
    "vit": ("ViTModel", "ViTConfig", "vgen.convert.vit:HF_VIT",
            dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40, image_size=18,
                 patch_size=6),
            dict(r=3, lora_alpha=5, target_modules=["q_proj", "o_proj", "fc1", "projection"])),
    "clip": ("CLIPTextModel", "CLIPTextConfig", "vgen.convert.clip:HF_TEXT", TEXT,
             dict(r=4, lora_alpha=4, target_modules=["q_proj", "v_proj", "fc2"], layers_to_transform=[0, 2],
                  layers_pattern="layers", rank_pattern={"layers.2.self_attn.q_proj": 2},
                  alpha_pattern={"fc2": 7, "v_proj": 0.3})),
    "t5": ("T5EncoderModel", "T5Config", "vgen.convert.t5:T5",
           dict(d_model=24, d_kv=6, d_ff=40, num_layers=2, num_heads=5, vocab_size=50, feed_forward_proj="gated-gelu",
                dropout_rate=0.0, attn_implementation="eager"),
           dict(r=8, lora_alpha=2, use_rslora=True, target_modules="all-linear")),
}  # fmt: skip


def network(name):
    """(torch model, vgen's part, params) of a tiny network, float64."""
    transformers = pytest.importorskip("transformers")
    kind, config, family, sizes, _ = NETS[name]
    model = tables.randomize(getattr(transformers, kind)(getattr(transformers, config)(**sizes)))
    module, params = tables.load(families.get(family), tables.state_of(model), model.config.to_dict())
    return model, Part(module, family), tables.float64(params)


def adapted(model, **settings):
    """The model with PEFT's LoRA in it, every factor drawn anew."""
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        changed = peft.get_peft_model(model, peft.LoraConfig(**settings)).double().eval()
    rng = np.random.default_rng(7)
    for name, p in changed.named_parameters():
        if ".lora_" in name:
            p.data.copy_(p.new_tensor(np.float32(rng.standard_normal(tuple(p.shape)) / p[0].numel() ** 0.5)))
    return changed


def run(part, params, seed=1):
    """vgen's outputs in float64."""
    family = families.get(part.family)
    given = family.inputs(part.model, np.random.default_rng(seed))
    given = {k: np.asarray(v, np.float64) if np.asarray(v).dtype.kind == "f" else v for k, v in given.items()}
    return family.outputs(tables.applied(part.model, params, given))


def theirs(part, model, seed=1):
    family = families.get(part.family)
    import torch

    with torch.no_grad():
        return family.compare(model, family.inputs(part.model, np.random.default_rng(seed)))


def worst(got, want):
    assert set(got) == set(want)
    return max(tables.error(got[name], value) for name, value in want.items())


def check_loads(model, folder):
    """PEFT's model of an exported folder; a missing or an unexpected name is a warning of its."""
    import peft

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
        warnings.filterwarnings("error", message=".*(missing|unexpected|not found).*")
        again = peft.PeftModel.from_pretrained(model, folder).double().eval()
    held = {name for name in again.state_dict() if ".lora_" in name}
    stored = formats.open_safetensors(folder / "adapter_model.safetensors")
    assert {name.replace(".default.weight", ".weight") for name in held} == set(stored)
    return again


@pytest.mark.parametrize("name", NETS)
def test_peft_in_and_out(name, x64, exact, tmp_path):  # noqa: F811
    model, part, params = network(name)
    peft_model = adapted(model, **NETS[name][-1])
    peft_model.save_pretrained(tmp_path / "in")
    want = theirs(part, peft_model.get_base_model())
    delta = read_peft(tmp_path / "in", part)
    changed = merge(params, delta)
    assert worst(run(part, changed), want) < 1e-9
    assert worst(run(part, params), want) > 1e-2  # it matters

    write_peft(tmp_path / "out", part, delta, base_model="someone/tiny")
    state = peft_model.get_base_model().state_dict()
    stored, again = (formats.open_safetensors(tmp_path / x / "adapter_model.safetensors") for x in ("in", "out"))
    assert set(stored) == set(again)
    for key, tensor in stored.items():
        np.testing.assert_array_equal(again[key].read(), tensor.read(), err_msg=key)
    fresh, _, _ = network(name)
    exported = check_loads(fresh, tmp_path / "out")
    assert worst(theirs(part, exported.get_base_model()), want) < 1e-9

    merged = {k.replace(".base_layer", ""): v for k, v in exported.merge_and_unload().state_dict().items()}
    assert len(merged) < len(state)
    ours = tables.export(families.get(part.family), part.model, changed)
    table = families.get(part.family).table(part.model)
    from vgen.convert.rules import renamed

    names = {key: stored for key, stored in renamed(merged, table).items() if key in ours}
    assert set(names) == set(ours)
    for key, stored in names.items():
        assert tables.error(ours[key], merged[stored].numpy()) < 1e-12, key


def test_what_a_delta_holds(tmp_path):
    """Layers without LoRA are zeros, lower ranks are filled up, alphas are those of the patterns."""
    model, part, _ = network("clip")
    adapted(model, **NETS["clip"][-1]).save_pretrained(tmp_path)
    found = factors(read_peft(tmp_path, part))
    assert set(found) == {f"layers/{x}/kernel" for x in ("attn/q", "attn/v", "mlp/fc2")}
    q, v, fc2 = (found[f"layers/{x}/kernel"] for x in ("attn/q", "attn/v", "mlp/fc2"))
    np.testing.assert_allclose(q["scale"], [1, 0, 2], rtol=1e-6)
    np.testing.assert_allclose(v["scale"], np.float32([0.075, 0, 0.075]))
    np.testing.assert_allclose(fc2["scale"], [1.75, 0, 1.75])
    assert q["down"].shape == (3, 24, 4) and not q["down"][2, :, 2:].any() and not q["down"][1].any()
    changes, _ = lows(part, read_peft(tmp_path, part))
    assert {m: low.down.shape[0] for m, low in changes.items() if "q_proj" in m} == {
        "text_model.encoder.layers.0.self_attn.q_proj": 4,
        "text_model.encoder.layers.2.self_attn.q_proj": 2,
    }
    settings = peft_settings(changes)
    assert settings["r"] == 4 and settings["lora_alpha"] in (4, 7, 0.3) and len(settings["target_modules"]) == 6
    assert set(settings["alpha_pattern"].values()) | {settings["lora_alpha"]} == {4, 7, 0.3}


def test_both_spellings_of_transformers(x64, tmp_path):
    """QUIRK: version 5 has other names than the files; PEFT wants those of the version that runs."""
    _, part, _ = network("vit")
    delta = lora("layers/attn/q/kernel", 2).init(
        jax.random.key(0), {"layers": {"attn": {"q": {"kernel": np.zeros((2, 24, 24))}}}}
    )
    write_peft(tmp_path / "live", part, delta)
    write_peft(tmp_path / "published", part, delta, names=())
    name = "base_model.model.{}.lora_B.weight".format
    live, published = (
        set(formats.open_safetensors(tmp_path / x / "adapter_model.safetensors")) for x in ("live", "published")
    )
    assert name("layers.1.attention.q_proj") in live
    assert name("encoder.layer.1.attention.attention.query") in published
    for folder in ("live", "published"):
        jax.tree.map(np.testing.assert_array_equal, read_peft(tmp_path / folder, part), delta)


@pytest.fixture(scope="module")
def sam():
    """(torch model, vgen's part) of a tiny SAM, whose qkv is one module there and three kernels here."""
    transformers = pytest.importorskip("transformers")
    parts = next(iter(sam_test.CONFIGS.values()))
    config = transformers.SamConfig(
        vision_config=parts["vision"], prompt_encoder_config=parts["prompt"], mask_decoder_config=parts["decoder"]
    )
    part = Part(families.get(SAM).build(config.to_dict(), {}), SAM)
    return tables.randomize(transformers.SamModel(config)), part


QKV = "vision_encoder.layers.0.attn.qkv"


def qkv_change(part, delta):
    """What a delta adds to the weight of the first fused module, in torch's order."""
    family, (found, _, shapes) = families.get(part.family), sites(part)
    zeros = {path: np.zeros(shape.shape) for path, shape in shapes.items()}
    changed = trees.flatten(merge(trees.unflatten({p: zeros[p] for p in found[QKV].paths}), delta))
    return tables.export(family, part.model, trees.unflatten(zeros | changed))[f"{QKV}.weight"]


def test_fused_modules(x64, sam, tmp_path):
    """One `down` for the three kernels comes in and goes out as it was."""
    model, part = sam
    adapted(model, r=2, lora_alpha=3, target_modules=["layers.0.attn.qkv"]).save_pretrained(tmp_path / "in")
    stored = formats.open_safetensors(tmp_path / "in" / "adapter_model.safetensors")
    a, b = (stored[f"base_model.model.{QKV}.lora_{x}.weight"].read() for x in "AB")
    delta = read_peft(tmp_path / "in", part)
    assert len(factors(delta)) == 3 and tables.error(qkv_change(part, delta), 1.5 * b @ a) < 1e-12
    write_peft(tmp_path / "out", part, delta)
    for key, tensor in formats.open_safetensors(tmp_path / "out" / "adapter_model.safetensors").items():
        np.testing.assert_array_equal(tensor.read(), stored[key].read())


def test_kernels_that_are_fused_there(x64, sam, tmp_path):
    """Two of three kernels with factors of their own become one module's, of the sum of their ranks."""
    _, part = sam
    q, _, v = sites(part)[0][QKV].paths
    rng = np.random.default_rng(0)
    change = {
        path: dict(
            down=rng.standard_normal((1, 36, rank)), up=rng.standard_normal((1, rank, 36)), scale=np.full(1, 0.7)
        )
        for path, rank in ((q, 2), (v, 3))
    }  # fmt: skip
    delta = trees.unflatten(change)
    low = lows(part, delta)[0][QKV]
    assert low.down.shape == (5, 36) and low.up.shape == (108, 5) and low.scale == 1
    assert not low.up[36:72].any()
    assert tables.error(low.up @ low.down, qkv_change(part, delta)) < 1e-12
    write_peft(tmp_path / "out", part, delta)
    again = read_peft(tmp_path / "out", part)
    assert tables.error(qkv_change(part, again), low.up @ low.down) < 1e-12
    with pytest.raises(ConvertError, match=r"scale \(\) for a kernel \(1, 36, 36\)"):
        lows(part, trees.unflatten({q: change[q] | dict(scale=np.ones(()))}))


def test_weights_that_are_no_matrix_are_refused(sam):
    """A transposed convolution's weight is no product of two factors of its module."""
    _, part = sam
    found, _, shapes = sites(part)
    (path,) = found["mask_decoder.upscale_conv1"].paths
    delta = lora(path, 1).init(jax.random.key(0), trees.unflatten(shapes))
    with pytest.raises(ConvertError, match="mask_decoder.upscale_conv1: its weight is no matrix of the kernels"):
        lows(part, delta)


class Pipeline:
    """What diffusers' loader asks of a pipeline that has one text encoder."""

    def __init__(self, text_encoder):
        from diffusers.loaders import StableDiffusionLoraLoaderMixin

        self.load = StableDiffusionLoraLoaderMixin
        self.text_encoder = text_encoder

    def read(self, folder):
        state, alphas, metadata = self.load.lora_state_dict(folder, return_lora_metadata=True)
        self.load.load_lora_into_text_encoder(
            state, alphas, self.text_encoder, prefix="text_encoder", metadata=metadata
        )
        return state


def test_diffusers_text_encoder(x64, tmp_path):
    pytest.importorskip("diffusers")
    model, part, params = network("clip")
    adapter = lora(r"layers/(attn/(q|k|v|out)|mlp/fc.)/kernel", 3, alpha=5)
    delta = jax.tree.map(
        lambda x: np.random.default_rng(x.size).standard_normal(x.shape) if x.ndim > 1 else np.asarray(x),
        adapter.init(jax.random.key(0), params),
    )
    write_diffusers(tmp_path / "out", {"text_encoder": (part, delta)})
    want = run(part, merge(params, delta))
    pipeline = Pipeline(model)
    state = pipeline.read(tmp_path / "out")
    assert len(state) == 2 * 6 * 3 and all(name.startswith("text_encoder.text_model.encoder.layers.") for name in state)
    assert worst(theirs(part, model.double().eval()), want) < 1e-9
    again = read_diffusers(tmp_path / "out", {"unet": part, "text_encoder": part})
    assert set(again) == {"text_encoder"}
    assert worst(run(part, merge(params, again["text_encoder"])), want) < 1e-12


def test_diffusers_metadata_and_kohya(x64, tmp_path):
    """Files with an alpha: in diffusers' metadata, as kohya's arrays, in both of diffusers' older spellings."""
    model, part, params = network("clip")
    settings = NETS["clip"][-1]
    peft_model = adapted(model, **settings)
    peft_model.save_pretrained(tmp_path / "peft")
    want = read_peft(tmp_path / "peft", part)
    stored = formats.open_safetensors(tmp_path / "peft" / "adapter_model.safetensors")
    arrays = {name.removeprefix("base_model.model."): x.read() for name, x in stored.items()}
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    files = {
        "metadata": {f"text_encoder.{name}": x for name, x in arrays.items()},
        "old": {
            f"text_encoder.text_model.{k}".replace("lora_A", "lora.down").replace("lora_B", "lora.up"): x
            for k, x in arrays.items()
        },
        "kohya": {},
    }
    for name, x in arrays.items():
        module, _, end = name.rpartition(".lora_")
        at = "lora_te_text_model_" + module.replace(".", "_")
        files["kohya"] |= {f"{at}.lora_{'down' if end[0] == 'A' else 'up'}.weight": x}
        if end[0] == "A":
            alpha = 4 if "q_proj" in name else 7 if "fc2" in name else 0.3
            files["kohya"][f"{at}.alpha"] = np.asarray(alpha, np.float64)
    metadata = {"lora_adapter_metadata": json.dumps({f"text_encoder.{k}": v for k, v in config.items()})}
    for kind, held in files.items():
        path = tmp_path / f"{kind}.safetensors"
        formats.write_safetensors(path, held, {"format": "pt"} | (metadata if kind == "metadata" else {}))
        prefix = "lora_te" if kind == "kohya" else "text_encoder"
        (delta,) = read_diffusers(path, {"lora_unet": part, prefix: part}).values()
        if kind == "old":  # no alpha anywhere: the rank
            assert {float(x) for f in factors(delta).values() for x in f["scale"]} == {0, 1}
            continue
        jax.tree.map(np.testing.assert_array_equal, delta, want)
    with pytest.raises(ConvertError, match="belongs to none of unet(.|\n)*unread text_encoder"):
        read_diffusers(tmp_path / "old.safetensors", {"unet": part})


def test_old_names_of_attention():
    _, part, _ = network("clip")
    from vgen.convert.lora_files import _modules

    held = {f"mid.attn1.processor.to_{x}_lora.{y}.weight": formats.held(np.zeros((1, 1)))
            for x in ("q", "out") for y in ("down", "up")}  # fmt: skip
    assert set(_modules(held)) == {"mid.attn1.to_q", "mid.attn1.to_out.0"}


def test_strength_survives_export(tmp_path):
    _, part, params = network("clip")
    delta = lora("layers/attn/q/kernel", 3, alpha=5).init(jax.random.key(0), params)
    write_peft(tmp_path / "a", part, delta)
    write_peft(tmp_path / "b", part, scaled(delta, 0.5))
    alphas = [formats.read_json(tmp_path / x / "adapter_config.json")["lora_alpha"] for x in "ab"]
    assert alphas == [5, 2.5]  # and not 5.00000005


def test_mistakes_are_listed(tmp_path):
    _, part, params = network("clip")
    good = Low(np.zeros((2, 24), np.float32), np.zeros((24, 2), np.float32), 1.0)
    with pytest.raises(ConvertError) as caught:
        delta_of(part, {
            "encoder.layers.9.self_attn.q_proj": good, "encoder.layers.0.self_attn.k_proj": good._replace(up=good.down)
        })  # fmt: skip
    for line in (
        "unread encoder.layers.9.self_attn.q_proj",
        "k_proj: got (2, 24) and (2, 24), expected (2, 24) and (24, 2)",
    ):
        assert line in str(caught.value)
    delta = lora("layers/attn/q/kernel", 2).init(jax.random.key(0), params)
    with pytest.raises(ConvertError, match="it changes nothing"):
        lows(part, scaled(delta, 0.0))
    with pytest.raises(ConvertError, match="no module of vgen.convert.clip:HF_TEXT for layers/attn/z/kernel"):
        lows(part, {"layers": {"attn": {"z": delta["layers"]["attn"]["q"]}}})
    write_peft(tmp_path / "x", part, delta)
    with pytest.raises(UserError, match="not empty"):
        write_peft(tmp_path / "x", part, delta)
    config, weights = (tmp_path / "x" / f"adapter_{x}" for x in ("config.json", "model.safetensors"))
    settings, arrays = (
        json.loads(config.read_text()),
        {k: v.read() for k, v in formats.open_safetensors(weights).items()},
    )
    for change, message in (
        (dict(use_dora=True), "use_dora=True is not the LoRA"),
        (dict(peft_type="LOHA"), "peft_type is 'LOHA', expected 'LORA'"),
        (dict(alpha_pattern={"(": 1}), "alphas are not the numbers"),
        (dict(lora_alpha="much"), "alphas are not the numbers"),
    ):
        config.write_text(json.dumps(settings | change))
        with pytest.raises(UserError, match=message):
            read_peft(tmp_path / "x", part)
    config.write_text(json.dumps(settings))
    first = next(iter(arrays))
    for change, message in (
        (
            {"base_model.model.encoder.layers.0.self_attn.q_proj.lora_magnitude_vector": np.zeros(3, np.float32)},
            "unread",
        ),
        ({first: arrays[first][:1]}, "are of no one rank"),
    ):
        formats.write_safetensors(weights, arrays | change)
        with pytest.raises(ConvertError, match=message):
            read_peft(tmp_path / "x", part)
    formats.write_safetensors(weights, {k: v for k, v in arrays.items() if k != first})
    with pytest.raises(ConvertError, match="alone"):
        read_peft(tmp_path / "x", part)
