"""ViT in transformers' layout, in the .npz files of vision_transformer (AugReg) and in those of big_vision."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vgen.convert.family import Family
from vgen.convert.pieces import ACTIVATIONS, FIRST, Shapes, conv, count, dense, known, norm, pixels
from vgen.convert.rules import ConvertError, Rule, Table, each, reshape
from vgen.models.vit import Features, ViT


def images(module: Any, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Two random images of the size that the network was made for."""
    size = module.image_size
    height, width = (size, size) if isinstance(size, int) else size
    return dict(images=rng.standard_normal((2, height, width, 3)).astype(np.float32))


# ----------------------------------------------------------------------------------------------- transformers' layout

HF_ATTENTION_NAMES = tuple(
    (rf"\.attention\.{new}\.", f".attention.{old}.")
    for new, old in (
        ("q_proj", "attention.query"),
        ("k_proj", "attention.key"),
        ("v_proj", "attention.value"),
        ("o_proj", "output.dense"),
    )
)
HF_MLP_NAMES = ((r"\.mlp\.fc1\.", ".intermediate.dense."), (r"\.mlp\.fc2\.", ".output.dense."))
_HF_NAMES = HF_ATTENTION_NAMES + HF_MLP_NAMES + ((r"^(vit\.)?layers\.", r"\1encoder.layer."),)


def hf_attention(src: str, dst: str) -> list[Rule]:
    """Self-attention of transformers' vision models, in the names of the published files."""
    names = dict(q="attention.query", k="attention.key", v="attention.value", out="output.dense")
    return [rule for ours, name in names.items() for rule in dense(f"{src}.{name}", f"{dst}/{ours}")]


def hf_layer(src: str, dst: str) -> list[Rule]:
    """A layer of ViT and of both halves of MAE."""
    rules = hf_attention(f"{src}.attention", f"{dst}/attn")
    rules += norm(f"{src}.layernorm_before", f"{dst}/attn_norm") + norm(f"{src}.layernorm_after", f"{dst}/mlp_norm")
    return rules + dense(f"{src}.intermediate.dense", f"{dst}/mlp/fc1") + dense(f"{src}.output.dense", f"{dst}/mlp/fc2")


def hf_size(value: Any) -> int | tuple[int, int]:
    """A size of a config.json: a number, or a pair."""
    return value if isinstance(value, int) else tuple(value)


def hf_sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a `Tower` that ViT, DINOv2 and MAE configs spell alike, and patch and image sizes.

    Raises ConvertError for an activation that vgen has not.
    """
    act = config.get("hidden_act", "gelu")
    if act not in ACTIVATIONS:
        raise ConvertError(f"hidden_act: got {act!r}, known: {', '.join(ACTIVATIONS)}")
    return dict(
        width=config.get("hidden_size", 768),
        depth=config.get("num_hidden_layers", 12),
        heads=config.get("num_attention_heads", 12),
        act=ACTIVATIONS[act],
        qkv_bias=config.get("qkv_bias", True),
        dropout=float(config.get("hidden_dropout_prob", 0.0)),
        patch_size=hf_size(config.get("patch_size", 16)),
        image_size=hf_size(config.get("image_size", 224)),
    )


def hf_config(module: Any, kind: str, model_type: str, labels: int | None = None) -> dict[str, Any]:
    """The part of config.json that `hf_sizes` reads, with the class `kind` and names for its labels."""
    as_json = lambda size: size if isinstance(size, int) else list(size)
    config = dict(
        architectures=[kind],
        model_type=model_type,
        hidden_size=module.width,
        num_hidden_layers=module.depth,
        num_attention_heads=module.heads,
        hidden_act={ours: name for name, ours in reversed(ACTIVATIONS.items())}[module.act],
        layer_norm_eps=module.eps,
        qkv_bias=module.qkv_bias is not False,
        hidden_dropout_prob=module.dropout,
        patch_size=as_json(module.patch_size),
        image_size=as_json(module.image_size),
        num_channels=3,
    )
    if labels is not None:
        config |= dict(id2label={str(i): f"LABEL_{i}" for i in range(labels)})
        config |= dict(label2id={f"LABEL_{i}": i for i in range(labels)})
    return config


def _build_hf(config: Mapping[str, Any], shapes: Shapes) -> ViT:
    if (act := config.get("pooler_act", "tanh")) != "tanh":
        raise ConvertError(f"pooler_act: got {act!r}, known: tanh")
    shapes = known(shapes, _HF_NAMES)
    pooler, head = (shapes.get(f"{name}.weight", (None,))[0] for name in ("pooler.dense", "classifier"))
    return ViT(
        **hf_sizes(config),
        mlp_dim=config.get("intermediate_size", 3072),
        eps=config.get("layer_norm_eps", 1e-12),
        # QUIRK: transformers resizes by bicubic interpolation, the code that trained AugReg's weights bilinearly
        # (ViTEmbeddings.interpolate_pos_encoding; vit_jax/checkpoint.py)
        resize="bicubic",
        representation=pooler,
        num_classes=head,
    )


def hf_table(module: ViT) -> Table:
    """transformers' ViTModel, or ViTForImageClassification where the network has classes."""
    prefix = "vit." if module.num_classes is not None else ""
    embeddings = f"{prefix}embeddings"
    rules = [
        Rule(f"{embeddings}.cls_token", "cls", FIRST),
        Rule(f"{embeddings}.position_embeddings", "positions/table", FIRST),
        *conv(f"{embeddings}.patch_embeddings.projection", "patch_embed"),
        *hf_layer(f"{prefix}encoder.layer.{{i}}", "layers"),
        *norm(f"{prefix}layernorm", "norm"),
        *dense("pooler.dense", "pre_logits"),
        *dense("classifier", "head"),
    ]
    return Table(tuple(rules), rename=_HF_NAMES)


def _hf_family(kind: str) -> Family:
    classes = kind == "ViTForImageClassification"

    def config(module: ViT) -> dict[str, Any]:
        sizes = dict(intermediate_size=module.mlp_dim, pooler_output_size=module.representation or module.width)
        return hf_config(module, kind, "vit", module.num_classes) | sizes

    def compare(model: Any, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        import torch

        with torch.no_grad():
            out = model(pixels(model, inputs["images"]))
        if classes:
            return dict(logits=out.logits.numpy())
        return dict(tokens=out.last_hidden_state.numpy(), pooled=out.pooler_output.numpy())

    def outputs(result: Features) -> dict[str, Any]:
        return dict(logits=result.logits) if classes else dict(tokens=result.tokens, pooled=result.pooled)

    return Family(_build_hf, hf_table, images, config, f"transformers:{kind}", compare, outputs)


HF_VIT = _hf_family("ViTModel")
HF_VIT_CLASSIFIER = _hf_family("ViTForImageClassification")


# ------------------------------------------------------------------------------------------------------- Flax layouts

_CONTAINERS = ((r"^(opt/target|params)/", ""),)
_BIG_VISION_NAMES = dict(norm="LayerNorm_0", attn="MultiHeadDotProductAttention_0", mlp_norm="LayerNorm_1")
_BIG_VISION_NAMES |= dict(mlp="MlpBlock_0", table="pos_embedding")
# The parts of a layer were numbered together when the files were made (flax.deprecated.nn).
_AUGREG_NAMES = dict(norm="LayerNorm_0", attn="MultiHeadDotProductAttention_1", mlp_norm="LayerNorm_2")
_AUGREG_NAMES |= dict(mlp="MlpBlock_3", table="Transformer/posembed_input/pos_embedding")
_TO_AUGREG = _CONTAINERS + tuple(
    (rf"/{_BIG_VISION_NAMES[part]}/", f"/{_AUGREG_NAMES[part]}/") for part in ("attn", "mlp_norm", "mlp")
)


def _copies(src: str, dst: str, leaves: Sequence[str]) -> list[Rule]:
    return [Rule(f"{src}/{leaf}", f"{dst}/{leaf}") for leaf in leaves]


def _flax_attention(src: str, dst: str, heads: int, width: int) -> list[Rule]:
    """Attention whose kernels are [width, heads, head size] and [heads, head size, width]."""
    fold = reshape((width, -1), (width, heads, -1))
    rules = [Rule(f"{src}/out/kernel", f"{dst}/out/kernel", reshape((-1, width), (heads, -1, width)))]
    rules += [Rule(f"{src}/out/bias", f"{dst}/out/bias")]
    for ours, name in (("q", "query"), ("k", "key"), ("v", "value")):
        rules += [Rule(f"{src}/{name}/kernel", f"{dst}/{ours}/kernel", fold)]
        rules += [Rule(f"{src}/{name}/bias", f"{dst}/{ours}/bias", reshape((-1,), (heads, -1)))]
    return rules


def _flax_mlp(src: str, dst: str) -> list[Rule]:
    leaves = ("kernel", "bias")
    return _copies(f"{src}/Dense_0", f"{dst}/fc1", leaves) + _copies(f"{src}/Dense_1", f"{dst}/fc2", leaves)


def _flax_table(module: ViT, names: Mapping[str, str], rename: Sequence[tuple[str, str]]) -> Table:
    block, pool, scale = "Transformer/encoderblock_{i}", "MAPHead_0", ("scale", "bias")
    sizes = (module.heads, module.width)
    rules = [
        *_copies("embedding", "patch_embed", ("kernel", "bias")),
        Rule("cls", "cls", FIRST),
        Rule(names["table"], "positions/table", FIRST),
        *_copies(f"{block}/{names['norm']}", "layers/attn_norm", scale),
        *_flax_attention(f"{block}/{names['attn']}", "layers/attn", *sizes),
        *_copies(f"{block}/{names['mlp_norm']}", "layers/mlp_norm", scale),
        *_flax_mlp(f"{block}/{names['mlp']}", "layers/mlp"),
        *_copies("Transformer/encoder_norm", "norm", scale),
        Rule(f"{pool}/probe", "map_pool/probe", each(lambda a: a[0, 0], lambda a: a[None, None])),
        *_flax_attention(f"{pool}/MultiHeadDotProductAttention_0", "map_pool/attn", *sizes),
        *_copies(f"{pool}/LayerNorm_0", "map_pool/mlp_norm", scale),
        *_flax_mlp(f"{pool}/MlpBlock_0", "map_pool/mlp"),
        *_copies("pre_logits", "pre_logits", ("kernel", "bias")),
        *_copies("head", "head", ("kernel", "bias")),
    ]
    return Table(tuple(rules), rename=tuple(rename))


def _build_flax(config: Mapping[str, Any], shapes: Shapes, names: Mapping[str, str], **fields) -> ViT:
    block = "Transformer/encoderblock_{}"
    query = f"{block}/{names['attn']}/query/kernel"
    depth = count(shapes, query)
    if not depth or "embedding/kernel" not in shapes:
        raise ConvertError(f"no embedding/kernel or {query.format(0)} in the checkpoint: not in this layout")
    width, heads, _ = shapes[query.format(0)]
    *patch, _, _ = shapes["embedding/kernel"]
    cls, table = "cls" in shapes, shapes.get(names["table"])
    size = config.get("image_size")
    if size is None and table is not None:
        size = square(table[1] - (cls and fields.get("cls_position", True)), patch)
    return ViT(
        width=width,
        depth=depth,
        heads=heads,
        mlp_dim=shapes[f"{block}/{names['mlp']}/Dense_0/kernel".format(0)][1],
        act="gelu_tanh",
        patch_size=tuple(patch) if patch[0] != patch[1] else patch[0],
        image_size=224 if size is None else hf_size(size),
        cls_token=cls,
        posemb="sincos_endpoint" if table is None else "learned",
        pool="cls" if cls else "map" if "MAPHead_0/probe" in shapes else "gap",
        representation=shapes.get("pre_logits/kernel", (0, None))[1],
        num_classes=shapes.get("head/kernel", (0, None))[1],
        **fields,
    )


def square(patches: int, patch: Sequence[int]) -> int | tuple[int, int]:
    """Size in pixels of an image with so many patches in a square grid; ConvertError where there is none."""
    side = math.isqrt(patches)
    if side * side != patches:
        raise ConvertError(f"{patches} positions are no square grid: give the image_size (height, width)")
    return side * patch[0] if patch[0] == patch[-1] else (side * patch[0], side * patch[1])


def _build_augreg(config: Mapping[str, Any], shapes: Shapes) -> ViT:
    return _build_flax(config, known(shapes, _TO_AUGREG), _AUGREG_NAMES)


def _build_big_vision(config: Mapping[str, Any], shapes: Shapes) -> ViT:
    # QUIRK: positions are added before the class token, which has none (big_vision/models/vit.py)
    return _build_flax(config, known(shapes, _CONTAINERS), _BIG_VISION_NAMES, cls_position=False)


# Files without config.json may be given {"image_size": [height, width]} where their grid is not square.
AUGREG = Family(_build_augreg, lambda m: _flax_table(m, _AUGREG_NAMES, _TO_AUGREG), images)
BIG_VISION = Family(_build_big_vision, lambda m: _flax_table(m, _BIG_VISION_NAMES, _CONTAINERS), images)
