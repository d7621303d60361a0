"""Convolutional tokenizers: taming's and open-muse's state dicts, diffusers' VQModel, MaskGIT's Flax tree.

The rules of encoder and decoder serve `vgen.convert.autoencoder` too, whose networks are the same.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vgen.convert.family import Family
from vgen.convert.pieces import Shapes, conv, count, norm
from vgen.convert.rules import CONV_1X1, COPY, LINEAR, ConvertError, Op, Rule, Table
from vgen.models.vqgan import MASKGIT, TAMING, VQGAN, Layout, resolve_layout

TRAINING_ONLY = (r"loss\..*", r"model_ema\..*")  # discriminator and LPIPS of a Lightning checkpoint, averages


# -------------------------------------------------------------------------------------------------------------- rules


def res_block(src: str, dst: str, shortcut: str, bias: bool = True) -> list[Rule]:
    """A residual block; `shortcut` is the name that the layout gives the 1x1 convolution."""
    rules = [r for i in (1, 2) for r in norm(f"{src}.norm{i}", f"{dst}/norm{i}")]
    for name, ours in (("conv1", "conv1"), ("conv2", "conv2"), (shortcut, "shortcut")):
        rules += conv(f"{src}.{name}", f"{dst}/{ours}", bias)
    return rules


def attention(src: str, dst: str, names: Mapping[str, str], op: Op) -> list[Rule]:
    """Spatial attention; names: {ours: the layout's} of norm, q, k, v, out; op: of the four projections."""
    rules = norm(f"{src}.{names['norm']}", f"{dst}/norm")
    for ours in ("q", "k", "v", "out"):
        rules += [
            Rule(f"{src}.{names[ours]}.weight", f"{dst}/{ours}/kernel", op),
            Rule(f"{src}.{names[ours]}.bias", f"{dst}/{ours}/bias"),
        ]
    return rules


TAMING_ATTENTION = dict(norm="norm", q="q", k="k", v="v", out="proj_out")
DIFFUSERS_ATTENTION = dict(norm="group_norm", q="to_q", k="to_k", v="to_v", out="to_out.0")
# QUIRK: attention of diffusers' autoencoders was called otherwise when SD 1's files were saved (facts of SD 1.x).
DIFFUSERS_OLD_NAMES = tuple(
    (rf"(\.attentions\.\d+)\.{old}\.", rf"\1.{new}.")
    for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0"))
)


def taming_halves(layout: Layout, prefix: str = "") -> list[Rule]:
    """Encoder and decoder in the names of CompVis's repositories, or of open-muse where there is no mid attention."""
    rules = []
    for half, level in (("encoder", "down"), ("decoder", "up")):
        src = f"{prefix}{half}"
        rules += conv(f"{src}.conv_in", f"{half}/conv_in") + conv(f"{src}.conv_out", f"{half}/conv_out")
        rules += norm(f"{src}.norm_out", f"{half}/norm_out")
        at, to = f"{src}.{level}.{{i}}", f"{half}/{level}_{{i}}"
        rules += res_block(f"{at}.block.{{j}}", f"{to}/block_{{j}}", "nin_shortcut", layout.bias)
        rules += attention(f"{at}.attn.{{j}}", f"{to}/attn_{{j}}", TAMING_ATTENTION, CONV_1X1)
        if layout.mid_blocks is None:
            rules += res_block(f"{src}.mid.{{j}}", f"{half}/mid/block_{{j}}", "nin_shortcut", layout.bias)
        else:
            for j in range(layout.mid_blocks):
                rules += res_block(f"{src}.mid.block_{j + 1}", f"{half}/mid/block_{j}", "nin_shortcut", layout.bias)
            rules += attention(f"{src}.mid.attn_1", f"{half}/mid/attn_0", TAMING_ATTENTION, CONV_1X1)
    rules += conv(f"{prefix}encoder.down.{{i}}.downsample.conv", "encoder/downsample_{i}/conv")
    upsample = "upsample_conv" if layout.mid_blocks is None else "upsample.conv"
    return rules + conv(f"{prefix}decoder.up.{{i}}.{upsample}", "decoder/upsample_{i}/conv")


def diffusers_halves(levels: int) -> list[Rule]:
    """Encoder and decoder in the names of diffusers, whose decoder counts its levels from the smallest."""
    rules = []
    for half, level in (("encoder", "down"), ("decoder", "up")):
        rules += conv(f"{half}.conv_in", f"{half}/conv_in") + conv(f"{half}.conv_out", f"{half}/conv_out")
        rules += norm(f"{half}.conv_norm_out", f"{half}/norm_out")
        rules += res_block(f"{half}.mid_block.resnets.{{j}}", f"{half}/mid/block_{{j}}", "conv_shortcut")
        at, to = f"{half}.mid_block.attentions.{{j}}", f"{half}/mid/attn_{{j}}"
        rules += attention(at, to, DIFFUSERS_ATTENTION, LINEAR)
        for i in range(levels):
            at, to = f"{half}.{level}_blocks.{i if level == 'down' else levels - 1 - i}", f"{half}/{level}_{i}"
            rules += res_block(f"{at}.resnets.{{j}}", f"{to}/block_{{j}}", "conv_shortcut")
            rules += attention(f"{at}.attentions.{{j}}", f"{to}/attn_{{j}}", DIFFUSERS_ATTENTION, LINEAR)
            rules += conv(f"{at}.{level}samplers.0.conv", f"{half}/{level}sample_{i}/conv")
    return rules


def quant_convs(prefix: str = "") -> list[Rule]:
    return conv(f"{prefix}quant_conv", "quant_conv") + conv(f"{prefix}post_quant_conv", "post_quant_conv")


# ----------------------------------------------------------------------------------------- sizes from names and shapes


def taming_sizes(shapes: Shapes, prefix: str = "") -> dict[str, Any]:
    """channels, multipliers, blocks and attention_levels of a network in CompVis's names."""
    shapes = {name.removeprefix(prefix): shape for name, shape in shapes.items()}
    levels = count(shapes, "encoder.down.{}.block.0.conv1.weight")
    if not levels:
        raise ConvertError(f"no {prefix}encoder.down.0.block.0.conv1.weight in the checkpoint: not in taming's layout")
    channels = shapes["encoder.conv_in.weight"][0]
    widths = [shapes[f"encoder.down.{i}.block.0.conv1.weight"][0] for i in range(levels)]
    return dict(
        channels=channels,
        multipliers=multipliers(widths, channels),
        blocks=count(shapes, "encoder.down.0.block.{}.conv1.weight"),
        attention_levels=tuple(i for i in range(levels) if f"encoder.down.{i}.attn.0.q.weight" in shapes),
        image_channels=shapes["encoder.conv_in.weight"][1],
    )


def multipliers(widths: Sequence[int], channels: int) -> tuple[int, ...]:
    """Widths as multiples of the first; ConvertError where they are none."""
    if any(width % channels for width in widths):
        raise ConvertError(f"widths {list(widths)} of the levels are not multiples of the stem's {channels}")
    return tuple(width // channels for width in widths)


def diffusers_sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that VQGAN and AutoencoderKL share, from a config.json of diffusers.

    Raises ConvertError for what the networks here lack: other activations, spatial norms, other kinds of blocks.
    """
    widths = config.get("block_out_channels", (64,))
    kinds = {
        "down": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        "up": ("UpDecoderBlock2D", "AttnUpDecoderBlock2D"),
    }
    levels = {}
    for way, (plain, attentive) in kinds.items():
        blocks = list(config.get(f"{way}_block_types", (plain,) * len(widths)))
        if len(blocks) != len(widths) or set(blocks) - {plain, attentive}:
            raise ConvertError(f"{way}_block_types {blocks}: expected {plain} or {attentive} for each of {widths}")
        levels[way] = tuple(i for i, kind in enumerate(blocks if way == "down" else blocks[::-1]) if kind == attentive)
    accepted = dict(act_fn="silu", norm_type="group")
    wrong = {k: config[k] for k, v in accepted.items() if config.get(k, v) != v}
    if levels["down"] != levels["up"] or config.get("in_channels", 3) != config.get("out_channels", 3):
        wrong["levels with attention, channels of the image"] = "not the same in encoder and decoder"
    if wrong:
        raise ConvertError(f"config has {wrong}; the network here has {accepted} and equal halves")
    return dict(
        channels=widths[0],
        multipliers=multipliers(widths, widths[0]),
        blocks=config.get("layers_per_block", 1),
        attention_levels=levels["down"],
        image_channels=config.get("in_channels", 3),
        groups=config.get("norm_num_groups", 32),
    )


def diffusers_config(module: Any) -> dict[str, Any]:
    """The keys of config.json that `diffusers_sizes` reads, and the same for every network here."""
    levels = range(len(module.multipliers))
    kind = {i: "Attn" if i in module.attention_levels else "" for i in levels}
    return dict(
        act_fn="silu",
        block_out_channels=[module.channels * m for m in module.multipliers],
        down_block_types=[f"{kind[i]}DownEncoderBlock2D" for i in levels],
        up_block_types=[f"{kind[i]}UpDecoderBlock2D" for i in reversed(levels)],
        in_channels=module.image_channels,
        out_channels=module.image_channels,
        latent_channels=module.latent_channels,
        layers_per_block=module.blocks,
        norm_num_groups=module.groups,
        sample_size=256,
    )


# ------------------------------------------------------------------------------------------------------------ families


def images(module: Any, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Two random images in [-1, 1] of four latents by six."""
    shape = (2, 4 * module.downsampling, 6 * module.downsampling, module.image_channels)
    return {"images": rng.uniform(-1, 1, shape).astype(np.float32)}


def outputs(result: Any) -> dict[str, Any]:
    reconstruction, quantized = result
    return {"reconstruction": reconstruction, "codes": quantized.z_q, "indices": quantized.indices}


def taming_table(module: VQGAN, prefix: str = "") -> Table:
    """VQModel of CompVis/taming-transformers and of latent diffusion, or open-muse's port of MaskGIT's tokenizer."""
    rules = taming_halves(resolve_layout(module.layout), prefix) + quant_convs(prefix)
    rules += [Rule(f"{prefix}quantize.embedding.weight", "quantizer/codebook")]
    return Table(tuple(rules), ignore=TRAINING_ONLY if not prefix else OUTSIDE_FIRST_STAGE)


# What a checkpoint of a whole latent diffusion model holds beside its autoencoder: the denoiser, the text encoder, and
# the tables of the noise schedule.
OUTSIDE_FIRST_STAGE = (
    r"first_stage_model\.loss\..*",
    r"(model|model_ema|cond_stage_model|conditioner|denoiser)\..*",
    r"betas|logvar|scale_factor|\w*alphas_cumprod\w*|posterior_\w+",
)
FIRST_STAGE = "first_stage_model."


def _build_taming(prefix: str):
    def build(config: Mapping[str, Any], shapes: Shapes) -> VQGAN:
        sizes = taming_sizes(shapes, prefix)
        codes, width = shapes[f"{prefix}quantize.embedding.weight"]
        z = shapes[f"{prefix}encoder.conv_out.weight"][0]
        return VQGAN(**sizes, latent_channels=z, num_codes=codes, code_dim=width, layout="taming", legacy=True)

    return build


TAMING_VQ = Family(_build_taming(""), taming_table, images, outputs=outputs)
LDM_VQ = Family(_build_taming(FIRST_STAGE), lambda m: taming_table(m, FIRST_STAGE), images, outputs=outputs)


def _build_openmuse(config: Mapping[str, Any], shapes: Shapes) -> VQGAN:
    sizes = taming_sizes(shapes)
    codes, width = shapes["quantize.embedding.weight"]
    return VQGAN(**sizes, latent_channels=width, num_codes=codes, layout="maskgit", image_range=(0.0, 1.0))


def _openmuse_config(module: VQGAN) -> dict[str, Any]:
    return dict(
        _class_name="MaskGitVQGAN",
        channel_mult=list(module.multipliers),
        hidden_channels=module.channels,
        num_channels=module.image_channels,
        num_embeddings=module.num_codes,
        num_res_blocks=module.blocks,
        attn_resolutions=[],
        quantized_embed_dim=module.latent_channels,
        z_channels=module.latent_channels,
        resolution=256,
    )


OPENMUSE_MASKGIT_VQ = Family(_build_openmuse, taming_table, images, _openmuse_config, outputs=outputs)


def _build_diffusers(config: Mapping[str, Any], shapes: Shapes) -> VQGAN:
    z = config.get("latent_channels", 3)
    mid_attention = config.get("mid_block_add_attention", True)
    # QUIRK: aMUSEd's VQModel works on images in [0, 1] (its pipelines set do_normalize=False) and its config says so
    # nowhere; `lookup_from_codebook` is set in it alone. Tested in tests/convert/vqgan_test.py.
    unit = config.get("lookup_from_codebook", False)
    return VQGAN(
        **diffusers_sizes(config),
        latent_channels=z,
        num_codes=config.get("num_vq_embeddings", 256),
        code_dim=config.get("vq_embed_dim") or z,
        layout=Layout(**{**vars(TAMING), "mid_attention": mid_attention}),
        image_range=(0.0, 1.0) if unit else (-1.0, 1.0),
        legacy=True,
    )


def diffusers_table(module: VQGAN) -> Table:
    rules = diffusers_halves(len(module.multipliers)) + quant_convs()
    return Table((*rules, Rule("quantize.embedding.weight", "quantizer/codebook")), rename=DIFFUSERS_OLD_NAMES)


def _diffusers_config(module: VQGAN) -> dict[str, Any]:
    return dict(
        _class_name="VQModel",
        **diffusers_config(module),
        num_vq_embeddings=module.num_codes,
        vq_embed_dim=module.code_dim,
        mid_block_add_attention=resolve_layout(module.layout).mid_attention,
        lookup_from_codebook=tuple(module.image_range) == (0.0, 1.0),
        norm_type="group",
    )


def nchw(x: Any) -> np.ndarray:
    return np.asarray(x).transpose(0, 3, 1, 2)


def nhwc(x: Any) -> np.ndarray:
    """A torch map as numpy in vgen's order."""
    return x.detach().cpu().numpy().transpose(0, 2, 3, 1)


def _compare_diffusers(model: Any, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    import torch

    unit = model.config.lookup_from_codebook
    x = torch.from_numpy(nchw(inputs["images"])).to(next(model.parameters()).dtype)
    with torch.no_grad():
        z_q, _, (_, _, indices) = model.quantize(model.encode((x + 1) / 2 if unit else x).latents)
        recon = model.decoder(model.post_quant_conv(z_q))
    codes = nhwc(z_q)
    recon = nhwc(2 * recon - 1 if unit else recon)
    return {"reconstruction": recon, "codes": codes, "indices": indices.numpy().reshape(codes.shape[:3])}


DIFFUSERS_VQ = Family(
    _build_diffusers, diffusers_table, images, _diffusers_config, "diffusers:VQModel", _compare_diffusers, outputs
)


# ------------------------------------------------------------------------------------------------------- MaskGIT, Flax


def maskgit_table(module: VQGAN) -> Table:
    """MaskGIT's Flax tree, whose modules are numbered in the order in which the network's code creates them."""
    layout, levels, blocks = resolve_layout(module.layout), range(len(module.multipliers)), range(module.blocks)
    mid = [f"mid/block_{j}" for j in blocks]
    strided = [f"downsample_{i}/conv" for i in levels[:-1]] if layout.downsample == "stride" else []
    order = {
        ("encoder", "ResBlock"): [f"down_{i}/block_{j}" for i in levels for j in blocks] + mid,
        ("decoder", "ResBlock"): mid + [f"up_{i}/block_{j}" for i in reversed(levels) for j in blocks],
        ("encoder", "Conv"): ["conv_in", *strided, "conv_out"],
        ("decoder", "Conv"): ["conv_in", *(f"upsample_{i}/conv" for i in reversed(levels[1:])), "conv_out"],
        ("encoder", "GroupNorm"): ["norm_out"],
        ("decoder", "GroupNorm"): ["norm_out"],
    }
    inner = {"Conv_0": "conv1", "Conv_1": "conv2", "Conv_2": "shortcut", "GroupNorm_0": "norm1", "GroupNorm_1": "norm2"}
    leaves = {"Conv": ("kernel", "bias"), "GroupNorm": ("scale", "bias")}
    rules = [Rule("params/quantizer/codebook", "quantizer/codebook")]
    for (half, kind), targets in order.items():
        for n, target in enumerate(targets):
            src, dst = f"params/{half}/{kind}_{n}", f"{half}/{target}"
            parts = inner.items() if kind == "ResBlock" else [("", "")]
            for part, ours in parts:
                at, to = (f"{src}/{part}", f"{dst}/{ours}") if part else (src, dst)
                rules += [Rule(f"{at}/{x}", f"{to}/{x}", COPY) for x in leaves[(part or kind).split("_")[0]]]
    return Table(tuple(rules), rename=FLAX_PARAMS)


FLAX_PARAMS = ((r"^(?!params/)", "params/"),)  # a tree that was saved without its collection


def flax_shapes(shapes: Shapes) -> Shapes:
    """The shapes of a Flax tree under the names that `FLAX_PARAMS` makes."""
    return {name if name.startswith("params/") else f"params/{name}": shape for name, shape in shapes.items()}


def _build_maskgit(config: Mapping[str, Any], shapes: Shapes) -> VQGAN:
    """Sizes from the shapes: how many blocks there are, and where their widths change."""
    shapes = flax_shapes(shapes)
    at = "params/{}/ResBlock_{}/Conv_1/kernel".format
    total = count(shapes, "params/encoder/ResBlock_{}/Conv_1/kernel")
    convs = count(shapes, "params/decoder/Conv_{}/kernel")  # conv_in, one per upsampling, conv_out
    levels = convs - 1
    if not total or total % (levels + 1):
        raise ConvertError(f"{total} residual blocks of the encoder do not fall into {levels} levels and a middle")
    blocks = total // (levels + 1)
    channels = shapes["params/encoder/Conv_0/kernel"][-1]
    widths = [shapes[at("encoder", i * blocks)][-1] for i in range(levels)]
    codes, width = shapes["params/quantizer/codebook"]
    strided = "params/encoder/Conv_2/kernel" in shapes
    return VQGAN(
        channels=channels,
        multipliers=multipliers(widths, channels),
        blocks=blocks,
        latent_channels=width,
        num_codes=codes,
        layout=Layout(**{**vars(MASKGIT), "downsample": "stride"}) if strided else MASKGIT,
        image_range=(0.0, 1.0),
        image_channels=shapes["params/encoder/Conv_0/kernel"][2],
        entropy_weight=0.1,
    )


MASKGIT_VQ = Family(_build_maskgit, maskgit_table, images, outputs=outputs)


# -------------------------------------------------------------------------------------------------------- discriminator


def discriminator_table(layers: int = 3, prefix: str = "") -> Table:
    """taming's NLayerDiscriminator with batch norm; behind "loss.discriminator." in its checkpoints.

    Its layers are numbered as in the sequence of convolution, (norm,) activation.
    """
    rules, at = conv(f"{prefix}main.0", "conv_0"), 2
    for i in range(1, layers + 1):
        rules += conv(f"{prefix}main.{at}", f"conv_{i}") + norm(f"{prefix}main.{at + 1}", f"norm_{i}")
        rules += [Rule(f"{prefix}main.{at + 1}.running_{x}", f"norm_{i}/{x}") for x in ("mean", "var")]
        at += 3
    rules += conv(f"{prefix}main.{at}", f"conv_{layers + 1}")
    return Table(tuple(rules), ignore=(r".*\.num_batches_tracked",))
