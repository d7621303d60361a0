"""SAM: the authors' .pth files (sam_vit_b_01ec64 and its like) and transformers' SamModel."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from vgen.convert.family import Family
from vgen.convert.pieces import FIRST, conv, dense, norm
from vgen.convert.rules import (
    CONV,
    CONV_1X1,
    CONV_TRANSPOSE,
    COPY,
    LINEAR,
    QKV,
    QKV_BIAS,
    ConvertError,
    Op,
    Rule,
    Table,
)
from vgen.models.sam import SAM, segments

_TO_HF = (  # the authors' names -> those of transformers
    (r"^image_encoder\.patch_embed\.proj\.", "vision_encoder.patch_embed.projection."),
    (r"^image_encoder\.neck\.0\.", "vision_encoder.neck.conv1."),
    (r"^image_encoder\.neck\.1\.", "vision_encoder.neck.layer_norm1."),
    (r"^image_encoder\.neck\.2\.", "vision_encoder.neck.conv2."),
    (r"^image_encoder\.neck\.3\.", "vision_encoder.neck.layer_norm2."),
    (r"^image_encoder\.blocks\.", "vision_encoder.layers."),
    (r"^image_encoder\.", "vision_encoder."),
    (r"^prompt_encoder\.pe_layer\.positional_encoding_gaussian_matrix$", "shared_image_embedding.positional_embedding"),
    (r"\.point_embeddings\.", ".point_embed."),
    (r"\.mask_downscaling\.0\.", ".mask_embed.conv1."),
    (r"\.mask_downscaling\.1\.", ".mask_embed.layer_norm1."),
    (r"\.mask_downscaling\.3\.", ".mask_embed.conv2."),
    (r"\.mask_downscaling\.4\.", ".mask_embed.layer_norm2."),
    (r"\.mask_downscaling\.6\.", ".mask_embed.conv3."),
    (r"\.norm(\d)\.", r".layer_norm\1."),
    (r"\.norm_final_attn\.", ".layer_norm_final_attn."),
    (r"\.output_upscaling\.0\.", ".upscale_conv1."),
    (r"\.output_upscaling\.1\.", ".upscale_layer_norm."),
    (r"\.output_upscaling\.3\.", ".upscale_conv2."),
)


def stacked(op: Op) -> Op:
    """An Op that makes one stack [n, ...] of n source arrays, each changed by `op` (or several, where it splits)."""

    def forward(arrays):
        rows = [op.forward([a]) for a in arrays]
        return [np.stack(column) for column in zip(*rows)]

    def backward(arrays):
        return [op.backward([a[i] for a in arrays])[0] for i in range(len(arrays[0]))]

    return Op(forward, backward)


_LAYER = (  # of the image encoder: name behind blocks.{i}, paths, op
    ("norm1.weight", "attn_norm/scale", COPY),
    ("norm1.bias", "attn_norm/bias", COPY),
    ("attn.rel_pos_h", "rows", COPY),
    ("attn.rel_pos_w", "columns", COPY),
    ("attn.qkv.weight", tuple(f"attn/{x}/kernel" for x in "qkv"), QKV),
    ("attn.qkv.bias", tuple(f"attn/{x}/bias" for x in "qkv"), QKV_BIAS),
    ("attn.proj.weight", "attn/out/kernel", LINEAR),
    ("attn.proj.bias", "attn/out/bias", COPY),
    ("norm2.weight", "mlp_norm/scale", COPY),
    ("norm2.bias", "mlp_norm/bias", COPY),
    ("mlp.lin1.weight", "mlp/fc1/kernel", LINEAR),
    ("mlp.lin1.bias", "mlp/fc1/bias", COPY),
    ("mlp.lin2.weight", "mlp/fc2/kernel", LINEAR),
    ("mlp.lin2.bias", "mlp/fc2/bias", COPY),
)


def _image_encoder(model: SAM) -> list[Rule]:
    rules = [
        *conv("image_encoder.patch_embed.proj", "image_encoder/patch"),
        Rule("image_encoder.pos_embed", "image_encoder/positions", FIRST),
        Rule("image_encoder.neck.0.weight", "image_encoder/neck_conv1/kernel", CONV),
        *norm("image_encoder.neck.1", "image_encoder/neck_norm1"),
        Rule("image_encoder.neck.2.weight", "image_encoder/neck_conv2/kernel", CONV),
        *norm("image_encoder.neck.3", "image_encoder/neck_norm2"),
    ]
    for part, layers in segments(model.depth, model.global_layers):
        for name, paths, op in _LAYER:
            if name == "attn.qkv.bias" and not model.qkv_bias:
                continue
            src = tuple(f"image_encoder.blocks.{i}.{name}" for i in layers)
            paths = (paths,) if isinstance(paths, str) else paths
            dst = tuple(f"image_encoder/{part}/{path}" for path in paths)
            rules.append(Rule(src, dst, op if part.startswith("global") else stacked(op)))
    return rules


_PROMPT = (
    Rule("prompt_encoder.pe_layer.positional_encoding_gaussian_matrix", "prompt_encoder/gaussian"),
    Rule("prompt_encoder.point_embeddings.{k}.weight", "prompt_encoder/point", FIRST),
    Rule("prompt_encoder.not_a_point_embed.weight", "prompt_encoder/not_a_point", FIRST),
    Rule("prompt_encoder.no_mask_embed.weight", "prompt_encoder/no_mask", FIRST),
    *conv("prompt_encoder.mask_downscaling.0", "prompt_encoder/mask_conv1"),
    *norm("prompt_encoder.mask_downscaling.1", "prompt_encoder/mask_norm1"),
    *conv("prompt_encoder.mask_downscaling.3", "prompt_encoder/mask_conv2"),
    *norm("prompt_encoder.mask_downscaling.4", "prompt_encoder/mask_norm2"),
    Rule("prompt_encoder.mask_downscaling.6.weight", "prompt_encoder/mask_conv3/kernel", CONV_1X1),
    Rule("prompt_encoder.mask_downscaling.6.bias", "prompt_encoder/mask_conv3/bias"),
)


def _attention(src, dst) -> list[Rule]:
    return [rule for x in ("q", "k", "v", "out") for rule in dense(f"{src}.{x}_proj", f"{dst}/{x}")]


def _mask_decoder() -> list[Rule]:
    way, layer = "mask_decoder.transformer", "mask_decoder/layers_{i}"
    rules = [
        Rule("mask_decoder.iou_token.weight", "mask_decoder/iou_token", FIRST),
        Rule("mask_decoder.mask_tokens.weight", "mask_decoder/mask_tokens"),
        *_attention(way + ".layers.{i}.self_attn", layer + "/attn"),
        *_attention(way + ".layers.{i}.cross_attn_token_to_image", layer + "/to_image"),
        *_attention(way + ".layers.{i}.cross_attn_image_to_token", layer + "/to_tokens"),
        *dense(way + ".layers.{i}.mlp.lin1", layer + "/mlp/fc1"),
        *dense(way + ".layers.{i}.mlp.lin2", layer + "/mlp/fc2"),
        *_attention(way + ".final_attn_token_to_image", "mask_decoder/final"),
        *norm(way + ".norm_final_attn", "mask_decoder/final_norm"),
        Rule("mask_decoder.output_upscaling.0.weight", "mask_decoder/up1/kernel", CONV_TRANSPOSE),
        Rule("mask_decoder.output_upscaling.0.bias", "mask_decoder/up1/bias"),
        *norm("mask_decoder.output_upscaling.1", "mask_decoder/up_norm"),
        Rule("mask_decoder.output_upscaling.3.weight", "mask_decoder/up2/kernel", CONV_TRANSPOSE),
        Rule("mask_decoder.output_upscaling.3.bias", "mask_decoder/up2/bias"),
    ]
    for number, name in enumerate(("attn", "to_image", "mlp", "to_tokens"), 1):
        rules += norm(way + f".layers.{{i}}.norm{number}", f"{layer}/{name}_norm")
    return rules


def _perceptrons(model: SAM, hf: bool) -> list[Rule]:
    """The hypernetworks, which are stacked here, and the head that predicts the quality."""
    rules = []
    for src, dst, depth in (
        ("mask_decoder.output_hypernetworks_mlps.{k}", "mask_decoder/hyper", 3),
        ("mask_decoder.iou_prediction_head", "mask_decoder/iou", model.iou_depth),
    ):
        for j in range(depth):
            inner = "proj_in" if j == 0 else "proj_out" if j == depth - 1 else f"layers.{j - 1}"
            rules += dense(f"{src}.{inner if hf else f'layers.{j}'}", f"{dst}/fc{j}")
    return rules


def _hf_name(name: str) -> str:
    for pattern, replacement in _TO_HF:
        name = re.sub(pattern, replacement, name)
    return name


def _shared(model: SAM) -> list[Rule]:
    return [*_image_encoder(model), *_PROMPT, *_mask_decoder()]


def authors_table(model: SAM) -> Table:
    """The names of segment_anything's state dict."""
    return Table((*_shared(model), *_perceptrons(model, hf=False)), ignore=(r"pixel_mean|pixel_std",))


def hf_table(model: SAM) -> Table:
    """The names of SamModel's files."""
    rules = [rule._replace(src=_renamed(rule.src)) for rule in _shared(model)]
    # the same matrix again, in files of older versions
    ignore = (r"prompt_encoder\.shared_embedding\.positional_embedding",)
    return Table((*rules, *_perceptrons(model, hf=True)), ignore)


def _renamed(src):
    return _hf_name(src) if isinstance(src, str) else tuple(_hf_name(s) for s in src)


def build_authors(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> SAM:
    """The network whose sizes the arrays of a .pth file tell; decoder_heads, which none tells, is 8 by default."""

    def count(pattern):
        return len({m[1] for name in shapes if (m := re.match(pattern, name))})

    encoder, decoder = "image_encoder.", "mask_decoder."
    try:
        depth = count(r"image_encoder\.blocks\.(\d+)\.")
        width, _, patch, _ = shapes[encoder + "patch_embed.proj.weight"]
        grid = shapes[encoder + "pos_embed"][1]
        sides = [(shapes[f"{encoder}blocks.{i}.attn.rel_pos_h"][0] + 1) // 2 for i in range(depth)]
        return SAM(
            depth=depth,
            width=width,
            heads=width // shapes[encoder + "blocks.0.attn.rel_pos_h"][1],
            global_layers=tuple(i for i, side in enumerate(sides) if side == grid),
            mlp_dim=shapes[encoder + "blocks.0.mlp.lin1.weight"][0],
            image_size=grid * patch,
            patch=patch,
            window=min(sides),
            channels=shapes[encoder + "neck.0.weight"][0],
            qkv_bias=encoder + "blocks.0.attn.qkv.bias" in shapes,
            mask_channels=shapes["prompt_encoder.mask_downscaling.3.weight"][0],
            decoder_depth=count(r"mask_decoder\.transformer\.layers\.(\d+)\."),
            decoder_heads=config.get("decoder_heads", 8),
            decoder_mlp_dim=shapes[decoder + "transformer.layers.0.mlp.lin1.weight"][0],
            masks=shapes[decoder + "mask_tokens.weight"][0] - 1,
            iou_dim=shapes[decoder + "iou_prediction_head.layers.0.weight"][0],
            iou_depth=count(r"mask_decoder\.iou_prediction_head\.layers\.(\d+)\."),
        )
    except KeyError as error:
        raise ConvertError(f"SAM: the checkpoint has no array {error}, from which a size is taken") from error


def build_hf(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> SAM:
    """The network of a SamConfig; ConvertError for one without positions, or another kind of attention in the decoder.

    Its `mask_decoder_config.layer_norm_eps` is not read: see `vgen.models.sam_decoder.MaskDecoder`.
    """
    vision, prompt, decoder = (
        dict(config.get(f"{x}_config") or {}) for x in ("vision", "prompt_encoder", "mask_decoder")
    )
    fixed = dict(use_abs_pos=True, use_rel_pos=True, hidden_act="gelu", num_channels=3)
    wrong = [f"vision_config.{k} = {vision[k]!r}, expected {v!r}" for k, v in fixed.items() if vision.get(k, v) != v]
    if decoder.get("attention_downsample_rate", 2) != 2:
        wrong.append(f"attention_downsample_rate = {decoder['attention_downsample_rate']}, expected 2")
    if wrong:
        raise ConvertError("SamModel: " + "; ".join(wrong))
    width = vision.get("hidden_size", 768)
    return SAM(
        depth=vision.get("num_hidden_layers", 12),
        width=width,
        heads=vision.get("num_attention_heads", 12),
        global_layers=tuple(vision.get("global_attn_indexes", (2, 5, 8, 11))),
        mlp_dim=vision.get("mlp_dim") or int(width * vision.get("mlp_ratio", 4.0)),
        image_size=vision.get("image_size", 1024),
        patch=vision.get("patch_size", 16),
        window=vision.get("window_size", 14),
        channels=vision.get("output_channels", 256),
        qkv_bias=vision.get("qkv_bias", True),
        mask_channels=prompt.get("mask_input_channels", 16),
        decoder_depth=decoder.get("num_hidden_layers", 2),
        decoder_heads=decoder.get("num_attention_heads", 8),
        decoder_mlp_dim=decoder.get("mlp_dim", 2048),
        masks=decoder.get("num_multimask_outputs", 3),
        iou_dim=decoder.get("iou_head_hidden_dim", 256),
        iou_depth=decoder.get("iou_head_depth", 3),
        eps=vision.get("layer_norm_eps", 1e-6),
    )


def hf_config(model: SAM) -> dict[str, Any]:
    """config.json of SamModel, with the authors' eps in the decoder, so that transformers gives their numbers."""
    return dict(
        architectures=["SamModel"],
        model_type="sam",
        vision_config=dict(
            model_type="sam_vision_model",
            hidden_size=model.width,
            output_channels=model.channels,
            num_hidden_layers=model.depth,
            num_attention_heads=model.heads,
            image_size=model.image_size,
            patch_size=model.patch,
            mlp_dim=model.mlp_dim or 4 * model.width,
            mlp_ratio=(model.mlp_dim or 4 * model.width) / model.width,
            qkv_bias=model.qkv_bias,
            window_size=model.window,
            global_attn_indexes=list(model.global_layers),
            num_pos_feats=model.channels // 2,
            layer_norm_eps=model.eps,
        ),
        prompt_encoder_config=dict(
            model_type="sam_prompt_encoder",
            hidden_size=model.channels,
            image_size=model.image_size,
            patch_size=model.patch,
            image_embedding_size=model.image_size // model.patch,
            mask_input_channels=model.mask_channels,
        ),
        mask_decoder_config=dict(
            model_type="sam_mask_decoder",
            hidden_size=model.channels,
            num_hidden_layers=model.decoder_depth,
            num_attention_heads=model.decoder_heads,
            mlp_dim=model.decoder_mlp_dim,
            num_multimask_outputs=model.masks,
            iou_head_hidden_dim=model.iou_dim,
            iou_head_depth=model.iou_depth,
            layer_norm_eps=1e-5,
        ),
    )


def inputs(model: SAM, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Two images, each with three prompts of two points, a box and a mask."""
    size, grid = model.image_size, model.image_size // model.patch
    corners = np.sort(rng.uniform(0, size, (2, 3, 2, 2)), axis=2)
    return dict(
        pixels=rng.standard_normal((2, size, size, 3)).astype(np.float32),
        points=rng.uniform(0, size, (2, 3, 2, 2)).astype(np.float32),
        labels=rng.integers(0, 2, (2, 3, 2)).astype(np.int32),
        boxes=corners.reshape(2, 3, 4).astype(np.float32),
        masks=rng.standard_normal((2, 1, 4 * grid, 4 * grid)).astype(np.float32),
    )


def compare(torch_model, arrays: Mapping[str, np.ndarray], multimask: bool = True) -> dict[str, np.ndarray]:
    """logits and iou of SamModel, in its own precision."""
    import torch

    names = dict(points="input_points", labels="input_labels", boxes="input_boxes", masks="input_masks")
    dtype = next(torch_model.parameters()).dtype
    given = {names[k]: torch.from_numpy(np.asarray(v)) for k, v in arrays.items() if k in names and v is not None}
    given = {k: v.to(dtype) if v.is_floating_point() else v for k, v in given.items()}
    pixels = torch.from_numpy(np.asarray(arrays["pixels"])).permute(0, 3, 1, 2).to(dtype)
    with torch.no_grad():
        out = torch_model(pixel_values=pixels, multimask_output=multimask, **given)
    return dict(logits=out.pred_masks.numpy(), iou=out.iou_scores.numpy())


def outputs(masks) -> dict[str, Any]:
    """The same names from the network's result."""
    return masks._asdict()


AUTHORS = Family(build_authors, authors_table, inputs)
HF = Family(build_hf, hf_table, inputs, hf_config, "transformers:SamModel", compare, outputs)
