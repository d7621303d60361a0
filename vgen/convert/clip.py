"""CLIP: transformers' five classes, and the one layout that OpenAI's and OpenCLIP's state dicts share."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from vgen.convert.family import Family
from vgen.convert.pieces import ACTIVATIONS, FIRST, Shapes, batch_norm, conv, count, dense, known, norm, pixels
from vgen.convert.rules import CONV, LINEAR, QKV, QKV_BIAS, ConvertError, Rule, Table
from vgen.convert.vit import hf_size, square
from vgen.models.clip import CLIP, Encoded, ImageTower, Scores, TextTower, clip_vit
from vgen.models.clip_resnet import ResNet

LEGACY_EOS = 2  # in a config.json: read the text off at its largest id


def _image_size(visual: Any) -> tuple[int, int]:
    size = visual.image if isinstance(visual, ResNet) else visual.vit.image_size
    return (size, size) if isinstance(size, int) else tuple(size)


def _images(visual: Any, rng: np.random.Generator) -> dict[str, np.ndarray]:
    return dict(images=rng.standard_normal((2, *_image_size(visual), 3)).astype(np.float32))


def _tokens(text: TextTower, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Two random texts that end at different places."""
    end = text.vocab - 1 if text.eos is None else text.eos
    tokens = rng.integers(0, text.vocab - 1, (2, text.length)).astype(np.int32)
    tokens[tokens == end] = 0
    for row, at in zip(tokens, (text.length // 2, text.length - 1), strict=True):
        row[at:] = end
    return dict(tokens=tokens)


def _both(module: CLIP, rng: np.random.Generator) -> dict[str, np.ndarray]:
    return _images(module.visual, rng) | _tokens(module.text, rng)


def _encoded(result: Encoded) -> dict[str, Any]:
    parts = dict(states=result.states, pooled=result.pooled, features=result.features)
    return {name: value for name, value in parts.items() if value is not None}


# ----------------------------------------------------------------------------------------------- transformers' layout


def _hf_layer(src: str, dst: str) -> list[Rule]:
    rules = norm(f"{src}.layer_norm1", f"{dst}/attn_norm") + norm(f"{src}.layer_norm2", f"{dst}/mlp_norm")
    for ours in ("q", "k", "v", "out"):
        rules += dense(f"{src}.self_attn.{ours}_proj", f"{dst}/attn/{ours}")
    return rules + dense(f"{src}.mlp.fc1", f"{dst}/mlp/fc1") + dense(f"{src}.mlp.fc2", f"{dst}/mlp/fc2")


def _hf_text(dst: str) -> list[Rule]:
    src = "text_model"
    return [
        Rule(f"{src}.embeddings.token_embedding.weight", f"{dst}embed/embedding"),
        Rule(f"{src}.embeddings.position_embedding.weight", f"{dst}positions/table"),
        *_hf_layer(f"{src}.encoder.layers.{{i}}", f"{dst}layers"),
        *norm(f"{src}.final_layer_norm", f"{dst}norm"),
        Rule("text_projection.weight", f"{dst}projection/kernel", LINEAR),
    ]


def _hf_vision(dst: str) -> list[Rule]:
    src, vit = "vision_model", f"{dst}vit"
    return [
        Rule(f"{src}.embeddings.class_embedding", f"{vit}/cls", ROW),
        Rule(f"{src}.embeddings.patch_embedding.weight", f"{vit}/patch_embed/kernel", CONV),
        Rule(f"{src}.embeddings.position_embedding.weight", f"{vit}/positions/table"),
        *norm(f"{src}.pre_layrnorm", f"{vit}/norm_pre"),  # so spelled
        *_hf_layer(f"{src}.encoder.layers.{{i}}", f"{vit}/layers"),
        *norm(f"{src}.post_layernorm", f"{vit}/norm"),
        Rule("visual_projection.weight", f"{dst}projection/kernel", LINEAR),
    ]


ROW = FIRST._replace(forward=FIRST.backward, backward=FIRST.forward)  # [width] <-> [1, width]
_IGNORED = (r".*\.position_ids",)
# transformers 5 writes a tower that is alone without the name in front
_TEXT_NAMES = ((r"^(embeddings|encoder|final_layer_norm)\.", r"text_model.\1."),)
_VISION_NAMES = ((r"^(embeddings|encoder|pre_layrnorm|post_layernorm)\.", r"vision_model.\1."),)


def hf_table(module: CLIP) -> Table:
    """transformers' CLIPModel."""
    rules = [*_hf_text("text/"), *_hf_vision("visual/"), Rule("logit_scale", "logit_scale")]
    return Table(tuple(rules), _IGNORED)


def hf_text_table(module: TextTower) -> Table:
    """transformers' CLIPTextModel and CLIPTextModelWithProjection."""
    return Table(tuple(_hf_text("")), _IGNORED, _TEXT_NAMES)


def hf_vision_table(module: ImageTower) -> Table:
    """transformers' CLIPVisionModel and CLIPVisionModelWithProjection."""
    return Table(tuple(_hf_vision("")), _IGNORED, _VISION_NAMES)


def _hf_sizes(config: Mapping[str, Any], width: int, heads: int) -> dict[str, Any]:
    """Fields that the configs of both towers spell alike; width and heads: of the class where the config says nothing.

    Raises ConvertError for an activation that vgen has not.
    """
    if (act := config.get("hidden_act", "quick_gelu")) not in ACTIVATIONS:
        raise ConvertError(f"hidden_act: got {act!r}, known: {', '.join(ACTIVATIONS)}")
    return dict(
        width=config.get("hidden_size", width),
        depth=config.get("num_hidden_layers", 12),
        heads=config.get("num_attention_heads", heads),
        mlp_dim=config.get("intermediate_size", 4 * width),
        act=ACTIVATIONS[act],
        eps=config.get("layer_norm_eps", 1e-5),
    )


def _text(config: Mapping[str, Any], features: int | None) -> TextTower:
    eos = config.get("eos_token_id", 49_407)
    if not isinstance(eos, int):
        raise ConvertError(f"eos_token_id: got {eos!r}, expected one number")
    return TextTower(
        **_hf_sizes(config, 512, 8),
        vocab=config.get("vocab_size", 49_408),
        length=config.get("max_position_embeddings", 77),
        # QUIRK: 2, which is no end token of CLIP's vocabulary, stands in the configs of OpenAI's models and of Stable
        # Diffusion's and means the largest id (transformers, CLIPTextModel; its pull request 24773)
        eos=None if eos == LEGACY_EOS else eos,
        features=features,
    )


def _vision(config: Mapping[str, Any], features: int | None) -> ImageTower:
    size = {name: hf_size(config.get(name, default)) for name, default in (("patch_size", 32), ("image_size", 224))}
    return ImageTower(clip_vit(**_hf_sizes(config, 768, 12), **size), features)


def _part(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The config of one tower; files of 2022 repeat it under <name>_dict, which wins."""
    return (config.get(name) or {}) | (config.get(f"{name}_dict") or {})


def _build_hf(config: Mapping[str, Any], shapes: Shapes) -> CLIP:
    features = config.get("projection_dim", 512)
    return CLIP(_vision(_part(config, "vision_config"), features), _text(_part(config, "text_config"), features))


def _hf_sizes_config(tower: Any) -> dict[str, Any]:
    return dict(
        hidden_size=tower.width,
        num_hidden_layers=tower.depth,
        num_attention_heads=tower.heads,
        intermediate_size=tower.mlp_dim,
        hidden_act={ours: name for name, ours in reversed(ACTIVATIONS.items())}[tower.act],
        layer_norm_eps=tower.eps,
    )


def _text_config(text: TextTower) -> dict[str, Any]:
    """Raises ConvertError for what transformers' class cannot be."""
    if not text.causal or text.pool != "end":
        raise ConvertError(f"CLIPTextModel is causal and pooled at its end, got {text.causal=}, {text.pool=}")
    config = dict(
        model_type="clip_text_model",
        vocab_size=text.vocab,
        max_position_embeddings=text.length,
        eos_token_id=LEGACY_EOS if text.eos is None else text.eos,
        bos_token_id=0 if text.eos is None else max(text.eos - 1, 0),
        **_hf_sizes_config(text),
    )
    return config if text.features is None else config | dict(projection_dim=text.features)


def _vision_config(visual: ImageTower) -> dict[str, Any]:
    """Raises ConvertError for a ResNet, which transformers has not."""
    if not isinstance(visual, ImageTower):
        raise ConvertError("transformers has no CLIP with a ResNet: export it in OpenAI's layout")
    vit = visual.vit
    as_json = lambda size: size if isinstance(size, int) else list(size)
    config = dict(
        model_type="clip_vision_model",
        patch_size=as_json(vit.patch_size),
        image_size=as_json(vit.image_size),
        num_channels=3,
        **_hf_sizes_config(vit),
    )
    return config if visual.features is None else config | dict(projection_dim=visual.features)


def _hf_config(module: CLIP) -> dict[str, Any]:
    return dict(
        architectures=["CLIPModel"],
        model_type="clip",
        projection_dim=module.text.features,
        text_config=_text_config(module.text),
        vision_config=_vision_config(module.visual),
    )


def _compare(model: Any, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    import torch

    with torch.no_grad():
        tokens = torch.from_numpy(inputs["tokens"]).long()
        out = model(pixel_values=pixels(model, inputs["images"]), input_ids=tokens)
    return dict(image=out.image_embeds.numpy(), text=out.text_embeds.numpy(), logits=out.logits_per_image.numpy())


def _compare_tower(model: Any, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """States, the pooled token of a tower without a projection, the features of one with."""
    import torch

    with torch.no_grad():
        if "tokens" in inputs:
            out = model(torch.from_numpy(inputs["tokens"]).long())
        else:
            out = model(pixels(model, inputs["images"]))
    found = dict(states=out.last_hidden_state, pooled=out.get("pooler_output"))
    found |= dict(features=out.get("text_embeds", out.get("image_embeds")))
    return {name: value.numpy() for name, value in found.items() if value is not None}


def _tower_family(kind: str, build: Callable, table: Callable, inputs: Callable, config: Callable) -> Family:
    projected = kind.endswith("WithProjection")

    def made(given: Mapping[str, Any], shapes: Shapes):
        return build(given, given.get("projection_dim", 512) if projected else None)

    def outputs(result: Encoded) -> dict[str, Any]:
        return {name: v for name, v in _encoded(result).items() if name != "pooled" or not projected}

    def written(module: Any) -> dict[str, Any]:
        return dict(architectures=[kind]) | config(module)

    return Family(made, table, inputs, written, f"transformers:{kind}", _compare_tower, outputs)


HF_CLIP = Family(_build_hf, hf_table, _both, _hf_config, "transformers:CLIPModel", _compare, Scores._asdict)
HF_TEXT, HF_TEXT_PROJECTION = (
    _tower_family(kind, _text, hf_text_table, _tokens, _text_config)
    for kind in ("CLIPTextModel", "CLIPTextModelWithProjection")
)
HF_VISION, HF_VISION_PROJECTION = (
    _tower_family(kind, _vision, hf_vision_table, _images, _vision_config)
    for kind in ("CLIPVisionModel", "CLIPVisionModelWithProjection")
)


# --------------------------------------------------------------------------------------- OpenAI's and OpenCLIP's layout

# Wrappers of training, of models whose text tower is a module of its own, and of torch.compile
_OPENAI_NAMES = ((r"^module\.", ""), (r"^_orig_mod\.", ""), (r"^text\.", ""))
_OPENAI_IGNORED = (r"input_resolution|context_length|vocab_size", r"attn_mask", r".*\.num_batches_tracked")


def _layer(src: str, dst: str) -> list[Rule]:
    qkv = {leaf: tuple(f"{dst}/attn/{part}/{leaf}" for part in "qkv") for leaf in ("kernel", "bias")}
    rules = [
        Rule(f"{src}.attn.in_proj_weight", qkv["kernel"], QKV),
        Rule(f"{src}.attn.in_proj_bias", qkv["bias"], QKV_BIAS),
        *dense(f"{src}.attn.out_proj", f"{dst}/attn/out"),
    ]
    rules += norm(f"{src}.ln_1", f"{dst}/attn_norm") + norm(f"{src}.ln_2", f"{dst}/mlp_norm")
    return rules + dense(f"{src}.mlp.c_fc", f"{dst}/mlp/fc1") + dense(f"{src}.mlp.c_proj", f"{dst}/mlp/fc2")


def _resnet(src: str, dst: str) -> list[Rule]:
    """The ResNet tower: bottlenecks are numbered by stage {i}, from 1, and place {j}."""
    rules = [Rule(f"{src}.attnpool.positional_embedding", f"{dst}/pool/positions/table")]
    block, to = f"{src}.layer{{i}}.{{j}}", f"{dst}/layer{{i}}_{{j}}"
    for i in (1, 2, 3):
        for at, here in ((src, f"{dst}/stem"), (block, to)):
            rules += conv(f"{at}.conv{i}", f"{here}/conv{i}", bias=False) + batch_norm(f"{at}.bn{i}", f"{here}/norm{i}")
    rules += conv(f"{block}.downsample.0", f"{to}/shortcut", bias=False)
    rules += batch_norm(f"{block}.downsample.1", f"{to}/shortcut_norm")
    for name, ours in (("q_proj", "q"), ("k_proj", "k"), ("v_proj", "v"), ("c_proj", "out")):
        rules += dense(f"{src}.attnpool.{name}", f"{dst}/pool/attn/{ours}")
    return rules


def openai_text_rules(src: str = "", dst: str = "") -> list[Rule]:
    """The text tower, behind the prefixes `src` and `dst`."""
    return [
        Rule(f"{src}token_embedding.weight", f"{dst}embed/embedding"),
        Rule(f"{src}positional_embedding", f"{dst}positions/table"),
        *_layer(f"{src}transformer.resblocks.{{i}}", f"{dst}layers"),
        *norm(f"{src}ln_final", f"{dst}norm"),
        Rule(f"{src}text_projection", f"{dst}projection/kernel"),
    ]


def openai_table(module: CLIP) -> Table:
    """The state dicts of openai/CLIP and of open_clip."""
    rules = [*openai_text_rules("", "text/"), Rule("logit_scale", "logit_scale")]
    if isinstance(module.visual, ResNet):
        rules += _resnet("visual", "visual")
    else:
        rules += [
            Rule("visual.class_embedding", "visual/vit/cls", ROW),
            Rule("visual.conv1.weight", "visual/vit/patch_embed/kernel", CONV),
            Rule("visual.positional_embedding", "visual/vit/positions/table"),
            *norm("visual.ln_pre", "visual/vit/norm_pre"),
            *_layer("visual.transformer.resblocks.{i}", "visual/vit/layers"),
            *norm("visual.ln_post", "visual/vit/norm"),
            Rule("visual.proj", "visual/projection/kernel"),
        ]
    return Table(tuple(rules), _OPENAI_IGNORED, _OPENAI_NAMES)


_HEADS = {1280: 16, 1408: 16, 1664: 16}  # image widths of ViT-H, g and bigG, whose heads are wider than 64
_SUPPORTED = {  # parts of open_clip's model_cfg that say what the arrays' shapes do not; others must be None or False
    "vision_cfg": ("image_size", "layers", "width", "patch_size", "head_width", "mlp_ratio", "patch_dropout"),
    "text_cfg": ("context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio", "pad_id", "eos_id")
    + ("hf_tokenizer_name", "tokenizer_kwargs", "tokenizer_mode", "output_tokens"),
}
_PLAIN = dict(pool_type=("tok", "argmax"), pos_embed_type=("learnable",), proj_type=("linear",))


def _check(part: str, config: Mapping[str, Any]) -> None:
    """Raises ConvertError for options of open_clip that make another network."""
    wrong = [
        f"{part}.{name} = {value!r}"
        for name, value in config.items()
        if name not in _SUPPORTED[part] and value not in (None, False) and value not in _PLAIN.get(name, ())
    ]
    if wrong:
        raise ConvertError(f"OpenCLIP: vgen has no {', '.join(wrong)}")


def _build_openai(config: Mapping[str, Any], shapes: Shapes, act: str) -> CLIP:
    """Sizes from the arrays, numbers of heads and the activation from open_clip's model_cfg where the config has it.

    Raises ConvertError where the arrays are of another layout.
    """
    shapes = known(shapes, _OPENAI_NAMES)
    config = config.get("model_cfg", {})
    if config:
        act = "quick_gelu" if config.get("quick_gelu") else "gelu"
    vision, text = (dict(config.get(part, {})) for part in _SUPPORTED)
    _check("vision_cfg", vision)
    _check("text_cfg", text)
    needed = ("text_projection", "token_embedding.weight", "positional_embedding", "visual.conv1.weight")
    if missing := [name for name in needed if name not in shapes]:
        raise ConvertError(f"no {', '.join(missing)} in the checkpoint: not in OpenAI's layout")
    width, features = shapes["text_projection"]
    tower = TextTower(
        width=width,
        depth=count(shapes, "transformer.resblocks.{}.ln_1.weight"),
        heads=text.get("heads", max(width // 64, 1)),
        mlp_dim=shapes["transformer.resblocks.0.mlp.c_fc.weight"][0],
        act=act,
        vocab=shapes["token_embedding.weight"][0],
        length=shapes["positional_embedding"][0],
        features=features,
    )
    visual = _openai_resnet if "visual.attnpool.positional_embedding" in shapes else _openai_vit
    return CLIP(visual(shapes, vision, act), tower)


def _openai_vit(shapes: Shapes, config: Mapping[str, Any], act: str) -> ImageTower:
    width, _, *patch = shapes["visual.conv1.weight"]
    size = config.get("image_size", square(shapes["visual.positional_embedding"][0] - 1, patch))
    heads = width // config["head_width"] if "head_width" in config else _HEADS.get(width, max(width // 64, 1))
    vit = clip_vit(
        width=width,
        depth=count(shapes, "visual.transformer.resblocks.{}.ln_1.weight"),
        heads=heads,
        mlp_dim=shapes["visual.transformer.resblocks.0.mlp.c_fc.weight"][0],
        act=act,
        patch_size=patch[0] if patch[0] == patch[1] else tuple(patch),
        image_size=hf_size(size),
    )
    return ImageTower(vit, shapes["visual.proj"][1])


def _openai_resnet(shapes: Shapes, config: Mapping[str, Any], act: str) -> ResNet:
    width = shapes["visual.layer1.0.conv1.weight"][0]
    blocks = tuple(count(shapes, f"visual.layer{i}.{{}}.conv1.weight") for i in (1, 2, 3, 4))
    size = square(shapes["visual.attnpool.positional_embedding"][0] - 1, (32, 32))
    heads = width * 32 // config.get("head_width", 64)
    return ResNet(blocks, width, shapes["visual.attnpool.c_proj.weight"][0], heads, size)


def _family(act: str) -> Family:
    def build(config: Mapping[str, Any], shapes: Shapes) -> CLIP:
        return _build_openai(config, shapes, act)

    return Family(build, openai_table, _both, outputs=Scores._asdict)


def untold(file: str, shapes: Shapes) -> str:
    """Why a file without a config may not be read as OpenAI's, with its quick GELU; "" if it may.

    file: its name.  QUIRK: arrays do not tell the activation (open_clip keeps it in open_clip_config.json): OpenAI's
    weights and OpenCLIP's "-quickgelu" ones want the quick GELU, others of OpenCLIP (LAION, DataComp) the exact one.
    """
    width = known(shapes, _OPENAI_NAMES).get("visual.conv1.weight", (0,))[0]
    if file.startswith("open_clip_"):
        return "is a file of OpenCLIP without its open_clip_config.json"
    return f"has an image tower {width} wide, which is none of OpenAI's" if width in _HEADS else ""


# Named by hand, each is what it says: quick GELU and exact GELU; open_clip_config.json, where there is one, wins.
OPENAI, OPEN_CLIP = _family("quick_gelu"), _family("gelu")
