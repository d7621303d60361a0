"""The U-Nets in diffusers' layouts: UNet2DModel (DDPM, ADM) and UNet2DConditionModel (Stable Diffusion)."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from vgen.convert import vqgan
from vgen.convert.family import Family
from vgen.convert.pieces import Shapes, conv, dense, norm
from vgen.convert.rules import CONV_1X1, LINEAR, ConvertError, Rule, Table, chain, split
from vgen.models.unet import UNet

# -------------------------------------------------------------------------------------------------------------- rules

_GATED = (chain(split(2), LINEAR), split(2))  # [2 dim, width]: the values, then what is put through the activation


def time_block(src: str, dst: str) -> list[Rule]:
    """A residual block with a projection of the embedding."""
    return vqgan.res_block(src, dst, "conv_shortcut") + dense(f"{src}.time_emb_proj", f"{dst}/time")


def projection(src: str, dst: str, linear: bool) -> list[Rule]:
    """A projection kept as a matrix or as a 1x1 convolution."""
    op = LINEAR if linear else CONV_1X1
    return [Rule(f"{src}.weight", f"{dst}/kernel", op), Rule(f"{src}.bias", f"{dst}/bias")]


def transformer(src: str, dst: str, depth: int, linear: bool) -> list[Rule]:
    """A `Transformer`, whose names are the same in diffusers and in CompVis's and Stability's code.

    src, dst may hold placeholders; blocks are stacked where there are several.
    """
    rules = norm(f"{src}.norm", f"{dst}/norm")
    for name in ("proj_in", "proj_out"):
        rules += projection(f"{src}.{name}", f"{dst}/{name}", linear)
    at = f"{src}.transformer_blocks.{'{l}' if depth > 1 else 0}"
    to = f"{dst}/{'layers' if depth > 1 else 'layer'}"
    for number, name in ((1, "attn"), (2, "cross")):
        for theirs, ours in (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "out")):
            rules += [Rule(f"{at}.attn{number}.{theirs}.weight", f"{to}/{name}/{ours}/kernel", LINEAR)]
        rules += [Rule(f"{at}.attn{number}.to_out.0.bias", f"{to}/{name}/out/bias")]
    for number, name in ((1, "attn"), (2, "cross"), (3, "mlp")):
        rules += norm(f"{at}.norm{number}", f"{to}/{name}_norm")
    for kind, op in zip(("weight", "bias"), _GATED):
        ours = "kernel" if kind == "weight" else "bias"
        rules += [Rule(f"{at}.ff.net.0.proj.{kind}", (f"{to}/mlp/fc1/{ours}", f"{to}/mlp/gate/{ours}"), op)]
    return rules + dense(f"{at}.ff.net.2", f"{to}/mlp/fc2")


def _table(module: UNet) -> Table:
    levels = len(module.widths)
    rules = conv("conv_in", "conv_in") + conv("conv_out", "conv_out") + norm("conv_norm_out", "norm_out")
    for theirs, ours in (("time_embedding", "time"), ("add_embedding", "added")):
        rules += dense(f"{theirs}.linear_1", f"{ours}/fc1") + dense(f"{theirs}.linear_2", f"{ours}/fc2")
    rules += [Rule("class_embedding.weight", "labels/embedding")]
    parts = [("mid_block", "mid", module.mid_attention, "")]
    for i in range(levels):
        parts += [(f"down_blocks.{i}", f"down_{i}", module.attention[i], "downsamplers")]
        parts += [(f"up_blocks.{levels - 1 - i}", f"up_{i}", module.attention[i], "upsamplers")]
    for src, dst, depth, sampler in parts:
        rules += time_block(f"{src}.resnets.{{j}}", f"{dst}/block_{{j}}")
        if module.context_dim is not None:
            rules += transformer(f"{src}.attentions.{{j}}", f"{dst}/attn_{{j}}", depth, module.linear_projection)
        else:
            rules += vqgan.attention(f"{src}.attentions.{{j}}", f"{dst}/attn_{{j}}", vqgan.DIFFUSERS_ATTENTION, LINEAR)
        if sampler and module.resample == "resblock":
            rules += time_block(f"{src}.{sampler}.0", f"{dst}/resample")
        elif sampler:
            rules += conv(f"{src}.{sampler}.0.conv", f"{dst}/resample/conv")
    plain = module.context_dim is None  # as in vqgan.py: files of the first years name the projections otherwise
    return Table(tuple(rules), rename=vqgan.DIFFUSERS_OLD_NAMES if plain else ())


# -------------------------------------------------------------------------------------------------------------- config


def _accept(config: Mapping[str, Any], **accepted: Any) -> None:
    """ConvertError naming the keys that have other values than the network here can have."""
    optional = set(accepted) - {"mid_block_type"}  # for these null means what the network here does
    given = {k: config[k] for k in accepted if k in config and not (k in optional and config[k] is None)}
    wrong = {k: v for k, v in given.items() if v != accepted[k]}
    if wrong:
        raise ConvertError(f"{config.get('_class_name', 'U-Net')}: config has {wrong}; expected {accepted}")


def _per_level(value: Any, levels: int) -> tuple:
    return tuple(value) if isinstance(value, (list, tuple)) else (value,) * levels


def _common(config: Mapping[str, Any], widths: tuple[int, ...], default_input: int) -> dict[str, Any]:
    """Fields that both classes share. Raises ConvertError for what the network here lacks."""
    _accept(
        config,
        act_fn="silu",
        center_input_sample=False,
        time_embedding_type="positional",
        mid_block_scale_factor=1,
        class_embed_type=None,
        time_embedding_dim=4 * widths[0],
    )
    shift, padding = config.get("freq_shift", 0), config.get("downsample_padding", 1)
    injection = config.get("resnet_time_scale_shift", "default")
    known = dict(default="add", scale_shift="scale_shift")
    if shift not in (0, 1) or padding not in (0, 1) or injection not in known:
        raise ConvertError(
            f"config has freq_shift {shift}, downsample_padding {padding}, resnet_time_scale_shift {injection!r}; "
            f"accepted: 0 or 1, 0 or 1, {' or '.join(known)}"
        )
    return dict(
        in_channels=config.get("in_channels", default_input),
        out_channels=config.get("out_channels", default_input),
        widths=widths,
        blocks=config.get("layers_per_block", 2),
        injection=known[injection],
        resample="same" if padding else "pad",
        groups=config.get("norm_num_groups", 32),
        eps=config.get("norm_eps", 1e-5),
        dropout=config.get("dropout", 0.0),
        sin_first=not config.get("flip_sin_to_cos", True),
        endpoint=bool(shift),
        num_classes=config.get("num_class_embeds"),
    )


def _attentive(config: Mapping[str, Any], down: Mapping[str, bool], up: Mapping[str, bool], levels: int) -> list[bool]:
    """Which levels have attention, from block types; both ways must agree."""
    found = []
    for way, known in (("down", down), ("up", up)):
        kinds = config.get(f"{way}_block_types")
        if kinds is None or len(kinds) != levels or set(kinds) - set(known):
            raise ConvertError(f"{way}_block_types: got {kinds}, expected one of {', '.join(known)} for each level")
        found.append([known[kind] for kind in (kinds if way == "down" else kinds[::-1])])
    if found[0] != found[1]:
        raise ConvertError(f"levels with attention on the way down {found[0]} and up {found[1]} are not the same")
    return found[0]


def _build_plain(config: Mapping[str, Any], shapes: Shapes) -> UNet:
    widths = tuple(config.get("block_out_channels", (224, 448, 672, 896)))
    types = dict(
        down_block_types=("DownBlock2D",) + ("AttnDownBlock2D",) * 3,
        up_block_types=("AttnUpBlock2D",) * 3 + ("UpBlock2D",),
    )
    config = types | dict(config)
    fields = _common(config, widths, 3)
    attentive = _attentive(
        config,
        {"DownBlock2D": False, "AttnDownBlock2D": True, "ResnetDownsampleBlock2D": False},
        {"UpBlock2D": False, "AttnUpBlock2D": True, "ResnetUpsampleBlock2D": False},
        len(widths),
    )
    kinds = [config["down_block_types"], config["up_block_types"][::-1]]
    samplers = set()  # how each level but the last is resampled
    for names, plain, key in zip(kinds, ("DownBlock2D", "UpBlock2D"), ("downsample_type", "upsample_type")):
        for i, name in enumerate(names):
            if i + 1 < len(names) if key == "downsample_type" else i:
                asked = config.get(key, "conv") if "Attn" in name else "conv" if name == plain else "resnet"
                samplers.add(asked)
    if len(samplers) > 1 or samplers - {"conv", "resnet"}:
        raise ConvertError(
            f"UNet2DModel: levels are resampled by {sorted(samplers)}; expected all by conv or by resnet"
        )
    if samplers == {"resnet"}:
        fields |= dict(resample="resblock")
    groups = config.get("attn_norm_num_groups") or (None if fields["injection"] == "scale_shift" else fields["groups"])
    middle = config.get("add_attention", True)
    if middle and groups != fields["groups"]:
        raise ConvertError(
            f"UNet2DModel: attn_norm_num_groups {groups} of the middle's attention must be {fields['groups']}"
        )
    _accept(config, mid_block_type="UNetMidBlock2D")
    head_dim = config.get("attention_head_dim", 8)
    return UNet(**fields, attention=tuple(map(int, attentive)), mid_attention=int(middle), head_dim=head_dim)


def _config_common(module: UNet) -> dict[str, Any]:
    if module.time_width not in (None, module.widths[0]):
        raise ConvertError(f"diffusers: time_width {module.time_width} must be that of the first level")
    return dict(
        act_fn="silu",
        block_out_channels=list(module.widths),
        in_channels=module.in_channels,
        out_channels=module.out_channels,
        layers_per_block=module.blocks,
        downsample_padding=0 if module.resample == "pad" else 1,
        dropout=module.dropout,
        flip_sin_to_cos=not module.sin_first,
        freq_shift=int(module.endpoint),
        norm_eps=module.eps,
        norm_num_groups=module.groups,
        num_class_embeds=module.num_classes,
        resnet_time_scale_shift="scale_shift" if module.injection == "scale_shift" else "default",
    )


def _config_plain(module: UNet) -> dict[str, Any]:
    if module.head_dim is None and module.heads != 1:
        raise ConvertError(
            f"UNet2DModel: attention_head_dim is one width for all levels, there are {module.heads} heads"
        )
    kind = "resnet" if module.resample == "resblock" else "conv"
    plain = {"resnet": ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D"), "conv": ("DownBlock2D", "UpBlock2D")}[kind]
    return _config_common(module) | dict(
        _class_name="UNet2DModel",
        sample_size=4 * module.downsampling,
        add_attention=bool(module.mid_attention),
        attention_head_dim=module.head_dim,
        attn_norm_num_groups=module.groups,
        down_block_types=["AttnDownBlock2D" if a else plain[0] for a in module.attention],
        up_block_types=["AttnUpBlock2D" if a else plain[1] for a in reversed(module.attention)],
        downsample_type=kind,
        upsample_type=kind,
        mid_block_type="UNetMidBlock2D",
    )


def _build_text(config: Mapping[str, Any], shapes: Shapes) -> UNet:
    widths = tuple(config.get("block_out_channels", (320, 640, 1280, 1280)))
    types = dict(
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    )
    config, levels = types | dict(config), len(widths)
    fields = _common(config, widths, 4)
    attentive = _attentive(
        config,
        {"DownBlock2D": False, "CrossAttnDownBlock2D": True},
        {"UpBlock2D": False, "CrossAttnUpBlock2D": True},
        levels,
    )
    _accept(
        config,
        mid_block_type="UNetMidBlock2DCrossAttn",
        reverse_transformer_layers_per_block=None,
        encoder_hid_dim_type=None,
        dual_cross_attention=False,
        resnet_skip_time_act=False,
        resnet_out_scale_factor=1.0,
        time_embedding_act_fn=None,
        timestep_post_act=None,
        time_cond_proj_dim=None,
        conv_in_kernel=3,
        conv_out_kernel=3,
        attention_type="default",
        class_embeddings_concat=False,
        mid_block_only_cross_attention=False,
        cross_attention_norm=None,
        num_attention_heads=None,
    )
    added = config.get("addition_embed_type")
    context, blocks = (config.get(k, d) for k, d in (("cross_attention_dim", 1280), ("layers_per_block", 2)))
    if added not in (None, "text_time") or len({*_per_level(context, 1)}) > 1 or len({*_per_level(blocks, 1)}) > 1:
        raise ConvertError(
            f"UNet2DConditionModel: addition_embed_type {added}, cross_attention_dim {context}, layers_per_block "
            f"{blocks}; expected None or text_time, and one number for all levels"
        )
    only_cross = config.get("only_cross_attention", False)
    if only_cross is True:
        raise ConvertError("UNet2DConditionModel: only_cross_attention true for the middle too; expected one per level")
    depths = _per_level(config.get("transformer_layers_per_block", 1), levels)
    # QUIRK: this key holds the number of heads, not their width (G8 of the facts; tested)
    heads = _per_level(config.get("attention_head_dim", 8), levels)
    return UNet(
        **fields | dict(blocks=_per_level(blocks, 1)[0]),
        attention=tuple(d if a else 0 for d, a in zip(depths, attentive)),
        mid_attention=depths[-1],
        heads=heads[0] if len(set(heads)) == 1 else heads,
        context_dim=_per_level(context, 1)[0],
        only_cross=tuple(only_cross) if only_cross else (),
        linear_projection=config.get("use_linear_projection", False),
        added_dim=config["projection_class_embeddings_input_dim"] if added else None,
        added_time_width=(config.get("addition_time_embed_dim") or 256) if added else 256,
    )


def _config_text(module: UNet) -> dict[str, Any]:
    levels = len(module.widths)
    depths = [depth or (module.mid_attention if i + 1 == levels else 1) for i, depth in enumerate(module.attention)]
    if module.mid_attention != depths[-1]:
        raise ConvertError(f"UNet2DConditionModel: the middle must be as deep as the last level, got {depths}")
    heads = [module.heads_at(i) for i in range(levels)]
    return _config_common(module) | dict(
        _class_name="UNet2DConditionModel",
        sample_size=64,
        attention_head_dim=heads[0] if len(set(heads)) == 1 else heads,
        cross_attention_dim=module.context_dim,
        down_block_types=["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in module.attention],
        up_block_types=["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(module.attention)],
        mid_block_type="UNetMidBlock2DCrossAttn",
        only_cross_attention=list(module.only_cross) or False,
        transformer_layers_per_block=depths[0] if len(set(depths)) == 1 else depths,
        use_linear_projection=module.linear_projection,
        addition_embed_type="text_time" if module.added_dim else None,
        addition_time_embed_dim=module.added_time_width if module.added_dim else None,
        projection_class_embeddings_input_dim=module.added_dim,
    )


# ------------------------------------------------------------------------------------------------------------ families


def inputs(module: UNet, rng: np.random.Generator) -> dict[str, Any]:
    """A noisy batch of two, of four places by two at the lowest level, and the conditions that the network takes."""
    shape = (2, 4 * module.downsampling, 2 * module.downsampling, module.in_channels)
    made: dict[str, Any] = dict(x=rng.standard_normal(shape).astype(np.float32), t=np.asarray([3, 500], np.int32))
    if module.context_dim is not None:
        made["context"] = rng.standard_normal((2, 7, module.context_dim)).astype(np.float32)
    if module.num_classes is not None:
        made["labels"] = rng.integers(0, module.num_classes, 2).astype(np.int32)
    if module.added_dim is not None:
        numbers = min(6, (module.added_dim - 1) // module.added_time_width)
        pooled = rng.standard_normal((2, module.added_dim - numbers * module.added_time_width)).astype(np.float32)
        made["added"] = (pooled, rng.integers(0, 1024, (2, numbers)).astype(np.float32))
    return made


def _compare(model: Any, inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
    import torch

    dtype = next(model.parameters()).dtype
    take = lambda a: torch.from_numpy(np.asarray(a)).to(dtype)
    given = dict(sample=take(vqgan.nchw(inputs["x"])), timestep=torch.from_numpy(np.asarray(inputs["t"])))
    if "context" in inputs:
        given["encoder_hidden_states"] = take(inputs["context"])
    if "context_mask" in inputs:
        given["encoder_attention_mask"] = torch.from_numpy(np.asarray(inputs["context_mask"]))
    if "labels" in inputs:
        given["class_labels"] = torch.from_numpy(np.asarray(inputs["labels"])).long()
    if "added" in inputs:
        pooled, numbers = inputs["added"]
        given["added_cond_kwargs"] = dict(text_embeds=take(pooled), time_ids=take(numbers))
    if "residuals" in inputs:
        *skips, mid = (take(vqgan.nchw(r)) for r in inputs["residuals"])
        given |= dict(down_block_additional_residuals=tuple(skips), mid_block_additional_residual=mid)
    with torch.no_grad():
        return {"y": vqgan.nhwc(model(**given).sample)}


def outputs(y: Any) -> dict[str, Any]:
    return {"y": y}


PLAIN = Family(_build_plain, _table, inputs, _config_plain, "diffusers:UNet2DModel", _compare, outputs)
TEXT = Family(_build_text, _table, inputs, _config_text, "diffusers:UNet2DConditionModel", _compare, outputs)
