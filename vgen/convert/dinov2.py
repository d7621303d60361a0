"""DINOv2, with and without registers, in the authors' layout and in transformers'."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from vgen.convert.family import Family
from vgen.convert.pieces import FIRST, Shapes, conv, count, dense, known, norm, pixels
from vgen.convert.rules import LINEAR, QKV, QKV_BIAS, ConvertError, Rule, Table, chain, split
from vgen.convert.vit import HF_ATTENTION_NAMES, hf_attention, hf_config, hf_size, hf_sizes, images, square
from vgen.models.dinov2 import PLAIN, REGISTERS, DINOv2
from vgen.models.vit import Features


def swiglu(joint: str, out: str, dst: str) -> list[Rule]:
    """An MLP whose gate and value are one linear layer `joint`, the gate first."""
    paths = [tuple(f"{dst}/{part}/{leaf}" for part in ("gate", "fc1")) for leaf in ("kernel", "bias")]
    rules = [Rule(f"{joint}.weight", paths[0], chain(split(2), LINEAR)), Rule(f"{joint}.bias", paths[1], split(2))]
    return rules + dense(out, f"{dst}/fc2")


def _embeddings(prefix: str, cls: str, positions: str, registers: str, mask: str) -> list[Rule]:
    names = dict(cls=cls, registers=registers)
    rules = [Rule(prefix + name, ours, FIRST) for ours, name in names.items()]
    return [*rules, Rule(prefix + positions, "positions/table", FIRST), Rule(prefix + mask, "mask_token")]


# ------------------------------------------------------------------------------------------------ the authors' layout

_CHUNKS = ((r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),)  # training groups the layers; the inner number counts them all


def authors_layer(src: str, dst: str) -> list[Rule]:
    """A layer of timm's vision transformers, as DINOv2 and MAE have it, without LayerScale and MLP."""
    qkv = {leaf: tuple(f"{dst}/attn/{part}/{leaf}" for part in "qkv") for leaf in ("kernel", "bias")}
    rules = [
        Rule(f"{src}.attn.qkv.weight", qkv["kernel"], QKV),
        Rule(f"{src}.attn.qkv.bias", qkv["bias"], QKV_BIAS),
        *dense(f"{src}.attn.proj", f"{dst}/attn/out"),
    ]
    return rules + norm(f"{src}.norm1", f"{dst}/attn_norm") + norm(f"{src}.norm2", f"{dst}/mlp_norm")


def authors_mlp(src: str, dst: str) -> list[Rule]:
    return dense(f"{src}.fc1", f"{dst}/fc1") + dense(f"{src}.fc2", f"{dst}/fc2")


def _build_authors(config: Mapping[str, Any], shapes: Shapes) -> DINOv2:
    """config, which these files have not, may say num_heads (default: heads of 64) and image_size."""
    shapes = known(shapes, _CHUNKS)
    width, _, *patch = shapes["patch_embed.proj.weight"]
    if width % 64 and "num_heads" not in config:
        raise ConvertError(f"width {width} is not one of DINOv2's, whose heads are 64 wide: give num_heads")
    gated = "blocks.0.mlp.w12.weight" in shapes
    registers = shapes.get("register_tokens", (1, 0))[1]
    kind = REGISTERS | dict(num_registers=registers) if registers else PLAIN
    return DINOv2(
        width=width,
        depth=count(shapes, "blocks.{}.norm1.weight"),
        heads=config.get("num_heads", width // 64),
        mlp_dim=shapes["blocks.0.mlp.w3.weight" if gated else "blocks.0.mlp.fc2.weight"][1],
        act="silu" if gated else "gelu",
        gated=gated,
        qkv_bias="blocks.0.attn.qkv.bias" in shapes,
        patch_size=patch[0] if patch[0] == patch[1] else tuple(patch),
        image_size=hf_size(config.get("image_size", square(shapes["pos_embed"][1] - 1, patch))),
        masked="mask_token" in shapes,
        **kind,
    )


def authors_table(module: DINOv2) -> Table:
    """facebookresearch/dinov2's state dicts."""
    block = "blocks.{i}"
    rules = [
        *_embeddings("", "cls_token", "pos_embed", "register_tokens", "mask_token"),
        *conv("patch_embed.proj", "patch_embed"),
        *authors_layer(block, "layers"),
        Rule(f"{block}.ls1.gamma", "layers/attn_scale"),
        Rule(f"{block}.ls2.gamma", "layers/mlp_scale"),
        *(swiglu(f"{block}.mlp.w12", f"{block}.mlp.w3", "layers/mlp") if module.gated else ()),
        *(() if module.gated else authors_mlp(f"{block}.mlp", "layers/mlp")),
        *norm("norm", "norm"),
    ]
    return Table(tuple(rules), rename=_CHUNKS)


def _features(result: Features) -> dict[str, Any]:
    return dict(tokens=result.tokens, pooled=result.pooled)


AUTHORS = Family(_build_authors, authors_table, images, outputs=_features)


# ----------------------------------------------------------------------------------------------- transformers' layout

_MLP_OUT = ((r"\.mlp\.down_proj\.", ".mlp.weights_out."),)
_HF_NAMES = HF_ATTENTION_NAMES + _MLP_OUT


def _hidden(width: int, ratio: int, gated: bool) -> int:
    """MLP width of a config; gated ones keep two thirds, rounded up to a multiple of 8."""
    hidden = width * ratio
    return (int(hidden * 2 / 3) + 7) // 8 * 8 if gated else hidden


def _build_hf(config: Mapping[str, Any], shapes: Shapes) -> DINOv2:
    sizes = dict(patch_size=14, image_size=224) | config  # the classes' own defaults differ from ViT's
    gated = config.get("use_swiglu_ffn", False)
    registers = config.get("num_register_tokens", 4) if "registers" in config.get("model_type", "") else 0
    fields = hf_sizes(sizes)
    if gated:
        fields["act"] = "silu"
    head = shapes.get("classifier.weight")
    return DINOv2(
        **fields,
        **(REGISTERS | dict(num_registers=registers) if registers else PLAIN),
        mlp_dim=_hidden(fields["width"], config.get("mlp_ratio", 4), gated),
        gated=gated,
        eps=config.get("layer_norm_eps", 1e-6),
        layer_scale=float(config.get("layerscale_value", 1.0)),
        drop_path=float(config.get("drop_path_rate", 0.0)),
        masked=bool(registers) or config.get("use_mask_token", True),
        pool="cls_gap" if head else "cls",
        num_classes=head[0] if head else None,
    )


def hf_table(module: DINOv2) -> Table:
    """transformers' Dinov2Model and Dinov2WithRegistersModel, and both classifiers where the network has classes."""
    base = "dinov2_with_registers." if module.num_registers else "dinov2."
    prefix = "" if module.num_classes is None else base
    layer = f"{prefix}encoder.layer.{{i}}"
    rules = [
        *_embeddings(f"{prefix}embeddings.", "cls_token", "position_embeddings", "register_tokens", "mask_token"),
        *conv(f"{prefix}embeddings.patch_embeddings.projection", "patch_embed"),
        *hf_attention(f"{layer}.attention", "layers/attn"),
        *norm(f"{layer}.norm1", "layers/attn_norm"),
        *norm(f"{layer}.norm2", "layers/mlp_norm"),
        Rule(f"{layer}.layer_scale1.lambda1", "layers/attn_scale"),
        Rule(f"{layer}.layer_scale2.lambda1", "layers/mlp_scale"),
        *(_hf_swiglu(f"{layer}.mlp") if module.gated else authors_mlp(f"{layer}.mlp", "layers/mlp")),
        *norm(f"{prefix}layernorm", "norm"),
        *dense("classifier", "head"),
    ]
    return Table(tuple(rules), rename=_HF_NAMES)


def _hf_swiglu(src: str) -> list[Rule]:
    """The published names, whose gate is joined with the value, then transformers 5's, whose gate is apart."""
    rules = swiglu(f"{src}.weights_in", f"{src}.weights_out", "layers/mlp")
    return rules + dense(f"{src}.gate_proj", "layers/mlp/gate") + dense(f"{src}.up_proj", "layers/mlp/fc1")


def _ratio(module: DINOv2) -> int:
    """The whole mlp_ratio that gives the network's MLP width; ConvertError where there is none."""
    for ratio in range(1, 65):
        if _hidden(module.width, ratio, module.gated) == module.mlp_dim:
            return ratio
    raise ConvertError(
        f"transformers' Dinov2Config has no mlp_ratio for width {module.width}, mlp_dim {module.mlp_dim}"
    )


def _hf_family(kind: str, registers: bool) -> Family:
    classes = kind.endswith("ForImageClassification")

    def config(module: DINOv2) -> dict[str, Any]:
        model_type = "dinov2_with_registers" if registers else "dinov2"
        own = dict(num_register_tokens=module.num_registers) if registers else dict(use_mask_token=module.masked)
        own |= dict(mlp_ratio=_ratio(module), use_swiglu_ffn=module.gated, layerscale_value=module.layer_scale)
        own |= dict(drop_path_rate=module.drop_path)
        own |= dict(hidden_act="gelu") if module.gated else {}
        return hf_config(module, kind, model_type, module.num_classes) | own

    def compare(model: Any, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        import torch

        with torch.no_grad():
            out = model(pixels(model, inputs["images"]))
        if classes:
            return dict(logits=out.logits.numpy())
        return dict(tokens=out.last_hidden_state.numpy(), pooled=out.pooler_output.numpy())

    def outputs(result: Features) -> dict[str, Any]:
        return dict(logits=result.logits) if classes else _features(result)

    return Family(_build_hf, hf_table, images, config, f"transformers:{kind}", compare, outputs)


# QUIRK: at other image sizes than the config's these give the authors' numbers, not those of transformers' classes,
# whose Dinov2Model resizes positions without the authors' offset; set resize_offset=0.0 for them (see PLAIN)
HF_DINOV2 = _hf_family("Dinov2Model", registers=False)
HF_DINOV2_CLASSIFIER = _hf_family("Dinov2ForImageClassification", registers=False)
HF_REGISTERS = _hf_family("Dinov2WithRegistersModel", registers=True)
HF_REGISTERS_CLASSIFIER = _hf_family("Dinov2WithRegistersForImageClassification", registers=True)
