"""BLIP's captioner in transformers' layout and in salesforce's .pth files; the image side of transformers' BLIP-2."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from vgen.convert.family import Family
from vgen.convert.pieces import ACTIVATIONS, FIRST, Shapes, conv, count, dense, norm, pixels
from vgen.convert.qformer import bert_attention, bert_embeddings, bert_head, bert_mlp, hf_rules, hf_sizes
from vgen.convert.rules import QKV, QKV_BIAS, ConvertError, Rule, Table
from vgen.convert.vit import images
from vgen.models.bert import Bert
from vgen.models.blip import Captioner
from vgen.models.qformer import Blip2, ImagePrompt, QFormer
from vgen.models.vit import ViT

# -------------------------------------------------------------------------------------------------------------- rules


def _layer(src: str, dst: str, names: Mapping[str, str]) -> list[Rule]:
    """A layer with fused q, k, v; names: {ours: the layout's}."""
    attention = f"{src}.{names['attn']}"
    return [
        Rule(f"{attention}.qkv.weight", tuple(f"{dst}/attn/{x}/kernel" for x in "qkv"), QKV),
        Rule(f"{attention}.qkv.bias", tuple(f"{dst}/attn/{x}/bias" for x in "qkv"), QKV_BIAS),
        *dense(f"{attention}.{names['out']}", f"{dst}/attn/out"),
        *norm(f"{src}.{names['attn_norm']}", f"{dst}/attn_norm"),
        *norm(f"{src}.{names['mlp_norm']}", f"{dst}/mlp_norm"),
        *dense(f"{src}.mlp.fc1", f"{dst}/mlp/fc1"),
        *dense(f"{src}.mlp.fc2", f"{dst}/mlp/fc2"),
    ]


def hf_vision(src: str, dst: str) -> list[Rule]:
    """The vision tower of transformers' BLIP and BLIP-2."""
    names = dict(attn="self_attn", out="projection", attn_norm="layer_norm1", mlp_norm="layer_norm2")
    return [
        Rule(f"{src}.embeddings.class_embedding", f"{dst}/cls", FIRST),
        Rule(f"{src}.embeddings.position_embedding", f"{dst}/positions/table", FIRST),
        *conv(f"{src}.embeddings.patch_embedding", f"{dst}/patch_embed"),
        *_layer(f"{src}.encoder.layers.{{i}}", f"{dst}/layers", names),
        *norm(f"{src}.post_layernorm", f"{dst}/norm"),
    ]


def _decoder() -> list[Rule]:
    bert, layer = "text_decoder.bert", "text_decoder.bert.encoder.layer.{i}"
    return [
        *bert_embeddings(f"{bert}.embeddings", "decoder/embed"),
        *norm(f"{bert}.embeddings.LayerNorm", "decoder/embed_norm"),
        *bert_attention(f"{layer}.attention", "decoder/layers/attn"),
        *bert_attention(f"{layer}.crossattention", "decoder/layers/cross"),
        *bert_mlp(layer, "decoder/layers/mlp"),
        *bert_head("text_decoder.cls", "decoder/head"),
    ]


_IGNORED = (
    r"text_decoder\.bert\.embeddings\.position_ids",
    r"text_decoder\.cls\.predictions\.decoder\.(weight|bias)",  # tied to the words and to `bias`
)


def hf_table(model: Captioner) -> Table:
    """The names of BlipForConditionalGeneration."""
    return Table((*hf_vision("vision_model", "vision"), *_decoder()), _IGNORED)


def authors_table(model: Captioner) -> Table:
    """The names of salesforce's `BLIP_Decoder`."""
    names = dict(attn="attn", out="proj", attn_norm="norm1", mlp_norm="norm2")
    vision = [
        Rule("visual_encoder.cls_token", "vision/cls", FIRST),
        Rule("visual_encoder.pos_embed", "vision/positions/table", FIRST),
        *conv("visual_encoder.patch_embed.proj", "vision/patch_embed"),
        *_layer("visual_encoder.blocks.{i}", "vision/layers", names),
        *norm("visual_encoder.norm", "vision/norm"),
    ]
    return Table((*vision, *_decoder()), _IGNORED)


# -------------------------------------------------------------------------------------------------------------- sizes


def hf_tower(config: Mapping[str, Any], **defaults: Any) -> ViT:
    """The ViT of a BlipVisionConfig or Blip2VisionConfig, whose defaults are given."""
    config = defaults | dict(config)
    act = config.get("hidden_act", "gelu")
    if act not in ACTIVATIONS:
        raise ConvertError(f"vision_config: hidden_act {act!r}, expected one of {', '.join(ACTIVATIONS)}")
    return ViT(
        width=config["hidden_size"],
        depth=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        mlp_dim=config["intermediate_size"],
        patch_size=config["patch_size"],
        image_size=config["image_size"],
        act=ACTIVATIONS[act],
        eps=config["layer_norm_eps"],
        qkv_bias=None if config.get("qkv_bias", True) else False,  # BLIP-2's alone has the entry
        resize="bicubic",
    )


def hf_tower_config(tower: ViT, model_type: str) -> dict[str, Any]:
    """The vision_config of a ViT, without what transformers has by default."""
    return dict(
        model_type=model_type,
        hidden_size=tower.width,
        num_hidden_layers=tower.depth,
        num_attention_heads=tower.heads,
        intermediate_size=tower.mlp_dim,
        patch_size=tower.patch_size,
        image_size=tower.image_size,
        hidden_act=_act_name(tower.act),
        layer_norm_eps=tower.eps,
    )


def _act_name(act: str) -> str:
    return next(name for name, ours in ACTIVATIONS.items() if ours == act)


_BLIP_VISION = dict(
    hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072, patch_size=16,
    image_size=384, layer_norm_eps=1e-5,
)  # fmt: skip


def build_hf(config: Mapping[str, Any], shapes: Shapes) -> Captioner:
    """The network of a BlipConfig; ConvertError for a head that is not tied, or an unknown activation."""
    text = config.get("text_config") or {}
    act = text.get("hidden_act", "gelu")
    if act not in ACTIVATIONS or not config.get("tie_word_embeddings", True):
        raise ConvertError(f"BlipConfig: hidden_act {act!r} and tie_word_embeddings; expected gelu or alike, and True")
    decoder = Bert(
        vocab=text.get("vocab_size", 30_524),
        width=text.get("hidden_size", 768),
        depth=text.get("num_hidden_layers", 12),
        heads=text.get("num_attention_heads", 8),
        mlp_dim=text.get("intermediate_size", 3072),
        max_length=text.get("max_position_embeddings", 512),
        act=ACTIVATIONS[act],
        eps=text.get("layer_norm_eps", 1e-12),
        cross=True,
        head=True,
    )
    return Captioner(hf_tower(config.get("vision_config") or {}, **_BLIP_VISION), decoder)


def hf_config(model: Captioner) -> dict[str, Any]:
    """config.json of BlipForConditionalGeneration; the words' special tokens are those of the published vocabulary."""
    text = model.decoder
    return dict(
        architectures=["BlipForConditionalGeneration"],
        model_type="blip",
        tie_word_embeddings=True,
        vision_config=hf_tower_config(model.vision, "blip_vision_model"),
        text_config=dict(
            model_type="blip_text_model",
            vocab_size=text.vocab,
            hidden_size=text.width,
            encoder_hidden_size=model.vision.width,
            num_hidden_layers=text.depth,
            num_attention_heads=text.heads,
            intermediate_size=text.mlp_dim,
            max_position_embeddings=text.max_length,
            hidden_act=_act_name(text.act),
            layer_norm_eps=text.eps,
            is_decoder=True,
        ),
    )


def build_authors(config: Mapping[str, Any], shapes: Shapes) -> Captioner:
    """The network whose sizes the arrays of a .pth file tell; heads, which none tells, are 64 wide.

    config: {"vision_heads": ..., "heads": ...} where they are not.
    """
    try:
        width, _, patch, _ = shapes["visual_encoder.patch_embed.proj.weight"]
        vocab, text_width = shapes["text_decoder.bert.embeddings.word_embeddings.weight"]
        tower = ViT(
            width=width,
            depth=count(shapes, "visual_encoder.blocks.{}.norm1.weight"),
            heads=config.get("vision_heads", width // 64),
            mlp_dim=shapes["visual_encoder.blocks.0.mlp.fc1.weight"][0],
            patch_size=patch,
            image_size=patch * round((shapes["visual_encoder.pos_embed"][1] - 1) ** 0.5),
            resize="bicubic",
        )
        decoder = Bert(
            vocab=vocab,
            width=text_width,
            depth=count(shapes, "text_decoder.bert.encoder.layer.{}.output.dense.weight"),
            heads=config.get("heads", text_width // 64),
            mlp_dim=shapes["text_decoder.bert.encoder.layer.0.intermediate.dense.weight"][0],
            max_length=shapes["text_decoder.bert.embeddings.position_embeddings.weight"][0],
            cross=True,
            head=True,
        )
    except KeyError as error:
        raise ConvertError(f"BLIP: the checkpoint has no array {error}, from which a size is taken") from error
    return Captioner(tower, decoder)


# --------------------------------------------------------------------------------------------------- inputs, outputs


def inputs(model: Captioner, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Two images with a text each, one of them padded."""
    tokens = rng.integers(0, model.decoder.vocab, (2, 7)).astype(np.int32)
    return images(model.vision, rng) | dict(tokens=tokens, mask=np.arange(7)[None] < np.array([[7], [4]]))


def compare(model, given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Logits of BlipForConditionalGeneration where there is text, in its own precision."""
    import torch

    tokens, mask = (torch.from_numpy(np.asarray(given[name])).long() for name in ("tokens", "mask"))
    with torch.no_grad():
        out = model(pixel_values=pixels(model, given["images"]), input_ids=tokens, attention_mask=mask)
    return dict(logits=out.logits.numpy())


def outputs(logits) -> dict[str, Any]:
    """The same name from the network's result."""
    return dict(logits=logits)


HF = Family(build_hf, hf_table, inputs, hf_config, "transformers:BlipForConditionalGeneration", compare, outputs)
AUTHORS = Family(build_authors, authors_table, inputs)

# ------------------------------------------------------------------------------------------------------------- BLIP-2


def blip2_table(model: Blip2) -> Table:
    """Vision tower, queries, Q-Former and projection in the names of Blip2Model; the language model is left."""
    rules = [
        *hf_vision("vision_model", "vision"),
        *hf_rules("qformer.", "qformer/"),
        Rule("query_tokens", "qformer/queries", FIRST),
        *dense("language_projection", "project"),
    ]
    return Table(tuple(rules), ignore=(r"language_model\..*",))


_BLIP2_VISION = dict(
    hidden_size=1408, num_hidden_layers=39, num_attention_heads=16, intermediate_size=6144, patch_size=14,
    image_size=224, layer_norm_eps=1e-6,
)  # fmt: skip


def build_blip2(config: Mapping[str, Any], shapes: Shapes) -> Blip2:
    """The network of a Blip2Config; the width of the projection is that of the checkpoint's, None without one."""
    tower = hf_tower(config.get("vision_config") or {}, **_BLIP2_VISION)
    sizes = hf_sizes(config.get("qformer_config") or {})
    projection = shapes.get("language_projection.weight", (None,))[0]
    return Blip2(tower, QFormer(**sizes, num_queries=config.get("num_query_tokens", 32)), projection)


def blip2_inputs(model: Blip2, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Two images."""
    return images(model.vision, rng)


def blip2_compare(model, given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The outputs of Blip2Model's parts, in its own precision."""
    import torch

    with torch.no_grad():
        features = model.vision_model(pixel_values=pixels(model, given["images"])).last_hidden_state
        queries = model.query_tokens.expand(len(features), -1, -1)
        states = model.qformer(query_embeds=queries, encoder_hidden_states=features).last_hidden_state
        prompt = model.language_projection(states)
    return dict(features=features.numpy(), queries=states.numpy(), prompt=prompt.numpy())


def blip2_outputs(result: ImagePrompt) -> dict[str, Any]:
    """The same names from the network's result."""
    return {name: value for name, value in result._asdict().items() if value is not None}


# No config and no reference: what is exported is a part of Blip2Model, which wants its language model too.
BLIP2 = Family(build_blip2, blip2_table, blip2_inputs, compare=blip2_compare, outputs=blip2_outputs)
