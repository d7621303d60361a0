"""CLIP's layouts: parity with transformers' five classes and their gradients, round trips, OpenAI's names."""

import json

import jax
import numpy as np
import pytest

import vgen
from tests.convert import tables
from tests.convert.tables import quick  # noqa: F401  a fixture
from vgen.config import UserError
from vgen.convert import formats
from vgen.convert.clip import HF_CLIP, HF_TEXT, HF_TEXT_PROJECTION, HF_VISION, HF_VISION_PROJECTION, OPEN_CLIP, OPENAI
from vgen.convert.rules import ConvertError
from vgen.models import clip
from vgen.models.clip_resnet import ResNet

pytestmark = pytest.mark.usefixtures("quick")
CONFIGS = {
    "quick gelu, end token by its id": dict(
        text=dict(vocab_size=99, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                  max_position_embeddings=16, bos_token_id=97, eos_token_id=90, hidden_act="quick_gelu"),
        vision=dict(hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, image_size=32,
                    patch_size=8, hidden_act="quick_gelu"),
        features=24,
    ),
    "gelu, end token as the largest id, odd sizes": dict(
        text=dict(vocab_size=41, hidden_size=30, intermediate_size=44, num_hidden_layers=3, num_attention_heads=5,
                  max_position_embeddings=11, bos_token_id=0, eos_token_id=2, hidden_act="gelu", layer_norm_eps=1e-3),
        vision=dict(hidden_size=21, intermediate_size=50, num_hidden_layers=2, num_attention_heads=3, image_size=35,
                    patch_size=7, hidden_act="gelu", layer_norm_eps=1e-4),
        features=17,
    ),
}  # fmt: skip
TOWERS = {
    "CLIPTextModel": HF_TEXT,
    "CLIPTextModelWithProjection": HF_TEXT_PROJECTION,
    "CLIPVisionModel": HF_VISION,
    "CLIPVisionModelWithProjection": HF_VISION_PROJECTION,
}


@pytest.fixture(scope="module", params=CONFIGS)
def sizes(request):
    return CONFIGS[request.param]


@pytest.fixture(scope="module")
def reference(sizes):
    transformers = pytest.importorskip("transformers")
    parts = dict(text_config=sizes["text"], vision_config=sizes["vision"], projection_dim=sizes["features"])
    model = tables.randomize(transformers.CLIPModel(transformers.CLIPConfig(**parts)))
    model.logit_scale.data.fill_(1.5)
    return model


def tower(kind, sizes):
    import transformers

    part = "text" if "Text" in kind else "vision"
    config = getattr(transformers, f"CLIP{part.title()}Config")(**sizes[part], projection_dim=sizes["features"])
    return tables.randomize(getattr(transformers, kind)(config))


def apply(module, params, inputs, dtype=np.float64, **kwargs):
    params = jax.tree.map(lambda a: np.asarray(a, dtype), params)
    inputs = {k: v.astype(dtype) if v.dtype.kind == "f" else v for k, v in inputs.items()}
    return jax.jit(lambda p, x: module.apply({"params": p}, **x, **kwargs))(params, inputs)


def errors(family, module, params, model, inputs, dtype=np.float64):
    want = family.compare(model, inputs)
    got = family.outputs(apply(module, params, inputs, dtype))
    assert set(got) == set(want)
    return {name: tables.error(got[name], value) for name, value in want.items()}


def test_whole_model(x64, reference):
    module, params = tables.load(HF_CLIP, tables.state_of(reference), reference.config.to_dict())
    inputs = HF_CLIP.inputs(module, np.random.default_rng(1))
    worst = errors(HF_CLIP, module, params, reference, inputs)
    assert max(worst.values()) < 1e-12, worst
    assert max(errors(HF_CLIP, module, params, reference, inputs, np.float32).values()) < 2e-5
    first = apply(module, params, inputs)
    for name in inputs:  # both inputs matter, each to its own embedding
        moved = inputs[name].copy()
        moved[:, 1] = moved[:, 2] if name == "tokens" else moved[:, 1] + 1
        other = apply(module, params, inputs | {name: moved})
        assert tables.error(other.image, first.image) > 1e-3 or name == "tokens"
        assert tables.error(other.text, first.text) > 1e-3 or name == "images"


@pytest.mark.parametrize("kind", TOWERS)
def test_towers_and_their_layers(x64, sizes, kind):
    pytest.importorskip("transformers")
    import torch

    model, family = tower(kind, sizes), TOWERS[kind]
    module, params = tables.load(family, tables.state_of(model), model.config.to_dict())
    inputs = family.inputs(module, np.random.default_rng(2))
    got = apply(module, params, inputs, states=True)
    with torch.no_grad():
        if "tokens" in inputs:
            want = model(torch.from_numpy(inputs["tokens"]).long(), output_hidden_states=True)
        else:
            images = torch.from_numpy(inputs["images"].transpose(0, 3, 1, 2)).double()
            want = model(images, output_hidden_states=True)
    found = family.outputs(got)
    worst = {name: tables.error(found[name], v) for name, v in family.compare(model, inputs).items()}
    assert len(want.hidden_states) == len(got.layers) + 1
    worst |= {i: tables.error(got.layers[i], h) for i, h in enumerate(want.hidden_states[1:])}
    assert max(worst.values()) < 1e-12, worst


def test_text_mask_and_other_image_sizes(x64, reference):
    import torch

    module, params = tables.load(HF_CLIP, tables.state_of(reference), reference.config.to_dict())
    inputs = HF_CLIP.inputs(module, np.random.default_rng(3))
    patch = module.visual.vit.patch_size
    inputs["images"] = np.random.default_rng(4).standard_normal((2, 3 * patch, 6 * patch, 3))
    mask = np.arange(module.text.length)[None] < np.array([[module.text.length // 2 + 1], [module.text.length]])
    got = apply(module, params, inputs | dict(mask=mask))
    with torch.no_grad():
        want = reference(
            input_ids=torch.from_numpy(inputs["tokens"]).long(),
            pixel_values=torch.from_numpy(inputs["images"].transpose(0, 3, 1, 2)),
            attention_mask=torch.from_numpy(mask).long(),
            interpolate_pos_encoding=True,
        )
    assert tables.error(got.text, want.text_embeds) < 1e-12
    assert tables.error(got.image, want.image_embeds) < 1e-12


def contrastive(logits, log_softmax):
    """CLIP's loss on a square of logits."""
    return -(log_softmax(logits, 1).diagonal().mean() + log_softmax(logits, 0).diagonal().mean()) / 2


@pytest.mark.parametrize("sizes", list(CONFIGS)[1:], indirect=True)
def test_gradients_of_the_contrastive_loss(x64, reference):
    import torch

    module, params = tables.load(HF_CLIP, tables.state_of(reference), reference.config.to_dict())
    inputs = HF_CLIP.inputs(module, np.random.default_rng(5))

    def loss(params, inputs):
        return contrastive(module.apply({"params": params}, **inputs).logits, jax.nn.log_softmax)

    exact = dict(tokens=inputs["tokens"], images=inputs["images"].astype(np.float64))
    value, grads = jax.jit(jax.value_and_grad(loss))(tables.float64(params), exact)
    reference.zero_grad()
    out = reference(
        input_ids=torch.from_numpy(inputs["tokens"]).long(),
        pixel_values=torch.from_numpy(exact["images"].transpose(0, 3, 1, 2)),
    )
    want = contrastive(out.logits_per_image, torch.log_softmax)
    want.backward()
    assert abs(float(value) - want.item()) < 1e-12
    got = tables.export(HF_CLIP, module, grads)
    torch_grads = {name: p.grad.numpy() for name, p in reference.named_parameters()}
    assert set(got) == set(torch_grads)
    scale = max(np.abs(g).max() for g in torch_grads.values())
    for name, grad in torch_grads.items():
        # biases of keys have none, softmax does not see them: what is there is rounding
        size = scale if name.endswith("k_proj.bias") else np.abs(grad).max()
        assert size > 0 and np.abs(got[name] - grad).max() / size < 1e-10, name


@pytest.mark.parametrize("kind", ["CLIPModel", *TOWERS])
def test_round_trip_and_folder(sizes, reference, kind, tmp_path):
    import safetensors.numpy
    import torch
    import transformers

    model = reference if kind == "CLIPModel" else tower(kind, sizes)
    family = HF_CLIP if kind == "CLIPModel" else TOWERS[kind]
    config = json.loads(model.config.to_json_string())
    old = {"text_model." * (kind == "CLIPTextModel") + "vision_model." * (kind == "CLIPVisionModel") + k: v
           for k, v in tables.state_of(model).items()}  # fmt: skip
    module, params = tables.check_round_trip(family, old, config)
    new = tables.load(family, tables.state_of(model), config)  # transformers 5's spelling
    assert new[0] == module and jax.tree.all(jax.tree.map(np.array_equal, params, new[1]))

    buffer = ("vision_model." if "Vision" in kind else "text_model.") + "embeddings.position_ids"
    tables.load(family, old | {buffer: np.arange(5)[None]}, config)  # as older files have it

    written = family.config(module)
    assert family.build(written, {}) == module
    (tmp_path / "config.json").write_text(json.dumps(written))
    safetensors.numpy.save_file(old, tmp_path / "model.safetensors", {"format": "pt"})
    back, info = getattr(transformers, kind).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    state = back.state_dict()
    assert all(torch.equal(v.float(), state[k]) for k, v in model.state_dict().items())
    assert back.config.hidden_act == config["hidden_act"] if "hidden_act" in config else True
    inputs = family.inputs(module, np.random.default_rng(6))
    want, got = (family.compare(m, inputs) for m in (model, back.double().eval()))
    assert all(tables.error(got[k], v) < 1e-6 for k, v in want.items())  # logit_scale and eps went through float32


def test_published_configs():
    """The sparse configs of the hub's files: defaults fill them, *_dict wins, 2 stands for the largest id."""
    large = dict(
        projection_dim=768,
        text_config=dict(hidden_size=512, eos_token_id=2),
        text_config_dict=dict(hidden_size=768, intermediate_size=3072, num_attention_heads=12),
        vision_config={},
        vision_config_dict=dict(
            hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, patch_size=14
        ),
    )
    assert HF_CLIP.build(large, {}) == clip.published("ViT-L/14")
    assert HF_CLIP.build(HF_CLIP.config(clip.published("ViT-H/14")), {}) == clip.published("ViT-H/14")
    with pytest.raises(ConvertError, match="hidden_act: got 'gelu_fast'"):
        HF_CLIP.build(dict(text_config=dict(hidden_act="gelu_fast")), {})
    with pytest.raises(ConvertError, match="eos_token_id"):
        HF_TEXT.build(dict(eos_token_id=[1, 2]), {})
    with pytest.raises(ConvertError, match="ResNet"):
        HF_CLIP.config(clip.published("RN50"))
    with pytest.raises(ConvertError, match="causal"):
        HF_TEXT.config(clip.TextTower(causal=False))


# ------------------------------------------------------------------------------------------------------ OpenAI's names


def openai_state(state):
    """transformers' CLIPModel state dict in OpenAI's names, written down from the two repositories' modules."""
    out = {}
    for ours, theirs, last in (("", "text_model", "final_layer_norm"), ("visual.", "vision_model", "post_layernorm")):
        end = "ln_final" if not ours else "visual.ln_post"
        for leaf in ("weight", "bias"):
            out[f"{end}.{leaf}"] = state[f"{theirs}.{last}.{leaf}"]
        i = 0
        while f"{theirs}.encoder.layers.{i}.mlp.fc1.weight" in state:
            src, dst = f"{theirs}.encoder.layers.{i}", f"{ours}transformer.resblocks.{i}"
            for leaf in ("weight", "bias"):
                qkv = [state[f"{src}.self_attn.{part}_proj.{leaf}"] for part in "qkv"]
                out[f"{dst}.attn.in_proj_{leaf}"] = np.concatenate(qkv)
                names = {"attn.out_proj": "self_attn.out_proj", "ln_1": "layer_norm1", "ln_2": "layer_norm2"}
                for new, old in (names | {"mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}).items():
                    out[f"{dst}.{new}.{leaf}"] = state[f"{src}.{old}.{leaf}"]
            i += 1
    for leaf in ("weight", "bias"):
        out[f"visual.ln_pre.{leaf}"] = state[f"vision_model.pre_layrnorm.{leaf}"]
    embeddings = "vision_model.embeddings"
    return out | {
        "token_embedding.weight": state["text_model.embeddings.token_embedding.weight"],
        "positional_embedding": state["text_model.embeddings.position_embedding.weight"],
        "text_projection": state["text_projection.weight"].T,
        "logit_scale": state["logit_scale"],
        "visual.class_embedding": state[f"{embeddings}.class_embedding"],
        "visual.conv1.weight": state[f"{embeddings}.patch_embedding.weight"],
        "visual.positional_embedding": state[f"{embeddings}.position_embedding.weight"],
        "visual.proj": state["visual_projection.weight"].T,
    }


def test_openai_names_give_the_same_network(sizes, reference):
    """Sizes from the arrays; heads and activation from open_clip's config, whose form the hub's folders have."""
    state, text, vision = openai_state(tables.state_of(reference)), sizes["text"], sizes["vision"]
    config = dict(
        embed_dim=sizes["features"], quick_gelu=text["hidden_act"] == "quick_gelu",
        vision_cfg=dict(image_size=vision["image_size"], layers=vision["num_hidden_layers"], patch_size=7,
                        width=vision["hidden_size"], head_width=vision["hidden_size"] // vision["num_attention_heads"]),
        text_cfg=dict(context_length=11, vocab_size=41, width=text["hidden_size"], heads=text["num_attention_heads"]),
    )  # fmt: skip
    module, params = tables.check_round_trip(OPEN_CLIP, state, dict(model_cfg=config, preprocess_cfg={}))
    same, want = tables.load(HF_CLIP, tables.state_of(reference), reference.config.to_dict())
    vit = module.visual.vit
    assert (vit.heads, vit.depth, vit.act) == (same.visual.vit.heads, same.visual.vit.depth, same.text.act)
    assert jax.tree.all(jax.tree.map(np.array_equal, params, want))
    extra = {"input_resolution": np.int64(32), "context_length": np.int64(9), "vocab_size": np.int64(9)}
    wrapped = {f"module.{k}": v for k, v in (state | {"attn_mask": np.zeros((11, 11))}).items()} | extra
    again = tables.load(OPEN_CLIP, wrapped, dict(model_cfg=config))
    assert again[0] == module and jax.tree.all(jax.tree.map(np.array_equal, params, again[1]))
    own_tower = {f"text.{k}" if not k.startswith(("visual", "logit")) else k: v for k, v in state.items()}
    assert tables.load(OPEN_CLIP, own_tower, dict(model_cfg=config))[0] == module
    for part, option in (("vision_cfg", "attentional_pool"), ("text_cfg", "no_causal_mask")):
        with pytest.raises(ConvertError, match=f"{part}.{option} = True"):
            OPEN_CLIP.build(dict(model_cfg=config | {part: config[part] | {option: True}}), {})
    with pytest.raises(ConvertError, match="no visual.conv1.weight in the checkpoint"):
        OPENAI.build({}, {k: v.shape for k, v in state.items() if k != "visual.conv1.weight"})


@pytest.mark.parametrize("name", ["ViT-B/16", "ViT-L/14@336px", "ViT-H/14", "ViT-bigG/14", "RN50x4"])
def test_published_sizes_from_the_arrays(name):
    """A published network, cut to fewer layers, is recognised by the shapes that it exports."""
    whole = clip.published(name)
    resnet = isinstance(whole.visual, ResNet)
    family = OPENAI if whole.text.act == "quick_gelu" else OPEN_CLIP
    visual = whole.visual.clone(blocks=(1, 2, 1, 1), heads=whole.visual.width // 2) if resnet else None
    visual = visual or whole.visual.clone(vit=whole.visual.vit.clone(depth=1))
    module = clip.CLIP(visual, whole.text.clone(depth=1, vocab=64))
    params = jax.tree.map(lambda s: np.broadcast_to(np.float32(0), s.shape), tables.shapes_of(family, module))
    shapes = {k: v.shape for k, v in tables.rules.export(params, family.table(module)).items()}
    assert family.build({}, shapes) == module


def test_a_file_alone_does_not_tell_its_activation(tmp_path):
    """OpenAI's is the default for its own sizes; OpenCLIP's files and widths want a word by hand, and take it."""
    vit = clip.clip_vit(width=64, depth=1, heads=1, mlp_dim=8, patch_size=8, image_size=16)
    module = clip.CLIP(clip.ImageTower(vit, 8), clip.TextTower(width=64, depth=1, heads=1, mlp_dim=8, vocab=9, length=5,
                                                               features=8))  # fmt: skip
    flat = {k: np.zeros(s.shape, np.float32) for k, s in tables.shapes_of(OPENAI, module).items()}
    state = tables.rules.export(flat, OPENAI.table(module))
    plain, theirs = tmp_path / "ViT-tiny.safetensors", tmp_path / "open_clip_model.safetensors"
    for path in (plain, theirs):
        formats.write_safetensors(path, state)
    activations = lambda found: {found[0].text.act, found[0].visual.vit.act}
    assert activations(vgen.load(plain)) == {"quick_gelu"}
    with pytest.raises(UserError, match="open_clip_config.json, and the arrays do not tell its activation: choose"):
        vgen.load(theirs)
    for family, act in (("OPEN_CLIP", "gelu"), ("OPENAI", "quick_gelu")):
        assert activations(vgen.load(theirs, family=f"vgen.convert.clip:{family}")) == {act}
    theirs.with_name("open_clip_config.json").write_text('{"model_cfg": {"quick_gelu": true}}')
    assert activations(vgen.load(theirs)) == {"quick_gelu"}
    wide = state | {"visual.conv1.weight": np.zeros((1280, 3, 14, 14), np.float32)}
    with pytest.raises(UserError, match="an image tower 1280 wide, which is none of OpenAI's"):
        tables.found(wide)
