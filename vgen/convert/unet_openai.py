"""U-Nets in the layout of OpenAI's guided-diffusion: its own (ADM), CompVis's (SD 1, 2) and Stability's (SDXL).

All three number input_blocks, middle_block and output_blocks in the order in which they run. Checkpoints carry no
config; sizes are read off the shapes. What shapes do not tell may be given in a config.json beside the file, under the
names of guided-diffusion's flags: num_heads or num_head_channels.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from vgen.convert import vqgan
from vgen.convert.family import Family
from vgen.convert.pieces import Shapes, conv, count, dense, norm
from vgen.convert.rules import LINEAR, ConvertError, Op, Rule, Table, chain, each, split, transpose
from vgen.convert.unet_diffusers import inputs, outputs, transformer
from vgen.models.unet import ADM_64, ADM_64_TO_256, ADM_128, Encoder, UNet
from vgen.models.unet_classifier import NoisedClassifier

# -------------------------------------------------------------------------------------------------------------- rules

_FLAT = each(lambda a: a[:, :, 0], lambda a: a[:, :, None])  # torch Conv1d weight of width 1


def _by_head(heads: int) -> Op:
    """One array of every head's q, k, v one behind the other along axis 0 -> q, k, v, each of all heads."""

    def forward(arrays):
        a = arrays[0].reshape(heads, 3, -1, *arrays[0].shape[1:])
        return [a[:, i].reshape(-1, *a.shape[3:]) for i in range(3)]

    def backward(arrays):
        a = np.stack([a.reshape(heads, -1, *a.shape[1:]) for a in arrays], axis=1)
        return [a.reshape(-1, *a.shape[3:])]

    return Op(forward, backward)


def _qkv(src: str, dst: str, op: Op) -> list[Rule]:
    paths = lambda kind: tuple(f"{dst}/{name}/{kind}" for name in "qkv")
    return [
        Rule(f"{src}.weight", paths("kernel"), chain(_FLAT, op, LINEAR)),
        Rule(f"{src}.bias", paths("bias"), op),
    ]


def _linear_1d(src: str, dst: str) -> list[Rule]:
    return [Rule(f"{src}.weight", f"{dst}/kernel", chain(_FLAT, LINEAR)), Rule(f"{src}.bias", f"{dst}/bias")]


def _block(src: str, dst: str) -> list[Rule]:
    rules = norm(f"{src}.in_layers.0", f"{dst}/norm1") + conv(f"{src}.in_layers.2", f"{dst}/conv1")
    rules += dense(f"{src}.emb_layers.1", f"{dst}/time")
    rules += norm(f"{src}.out_layers.0", f"{dst}/norm2") + conv(f"{src}.out_layers.3", f"{dst}/conv2")
    return rules + conv(f"{src}.skip_connection", f"{dst}/shortcut")


def _attention(module: Encoder, src: str, dst: str, level: int, depth: int, new_order: bool) -> list[Rule]:
    if not depth:
        return []
    if module.context_dim is not None:
        return transformer(src, dst, depth, module.linear_projection)
    # QUIRK: two orders of the fused projection, told apart by a flag that checkpoints do not hold: that of every head
    # one behind the other, or all q, all k, all v (guided-diffusion, use_new_attention_order; both goldens).
    order = split(3) if new_order else _by_head(module.heads_at(level))
    return (
        norm(f"{src}.norm", f"{dst}/norm")
        + _qkv(f"{src}.qkv", dst, order)
        + _linear_1d(f"{src}.proj_out", f"{dst}/out")
    )


def _rules(module: Encoder, new_order: bool) -> list[Rule]:
    """Everything but the last layers."""
    levels, blocks = len(module.widths), module.blocks
    rules = conv("input_blocks.0.0", "conv_in") + dense("time_embed.0", "time/fc1") + dense("time_embed.2", "time/fc2")
    rules += [Rule("label_emb.weight", "labels/embedding")]
    rules += dense("label_emb.0.0", "added/fc1") + dense("label_emb.0.2", "added/fc2")
    for j in (0, 1):
        rules += _block(f"middle_block.{j * (2 if module.mid_attention else 1)}", f"mid/block_{j}")
    rules += _attention(module, "middle_block.1", "mid/attn_0", -1, module.mid_attention, new_order)
    for i, depth in enumerate(module.attention):
        down = [f"input_blocks.{1 + i * (blocks + 1) + j}" for j in range(blocks)]
        up = [f"output_blocks.{(levels - 1 - i) * (blocks + 1) + j}" for j in range(blocks + 1)]
        for way, places in (("down", down), ("up", up)):
            for j, src in enumerate(places):
                rules += _block(f"{src}.0", f"{way}_{i}/block_{j}")
                rules += _attention(module, f"{src}.1", f"{way}_{i}/attn_{j}", i, depth, new_order)
        below, above = f"input_blocks.{(i + 1) * (blocks + 1)}.0", f"{up[-1]}.{2 if depth else 1}"
        if module.resample == "resblock":
            rules += _block(below, f"down_{i}/resample") + (_block(above, f"up_{i}/resample") if i else [])
        else:
            rules += conv(f"{below}.op", f"down_{i}/resample/conv")
            rules += conv(f"{above}.conv", f"up_{i}/resample/conv") if i else []
    return rules


def table(module: UNet, prefix: str = "", new_order: bool = False) -> Table:
    """new_order: of the fused projections of plain attention.  prefix: of all names."""
    rules = _rules(module, new_order) + norm("out.0", "norm_out") + conv("out.2", "conv_out")
    prefixed = tuple(rule._replace(src=prefix + rule.src) for rule in rules)
    return Table(prefixed, ignore=OUTSIDE if prefix else ())


# What a checkpoint of a whole latent diffusion model holds beside its denoiser.
OUTSIDE = (
    r"(first_stage_model|model_ema|cond_stage_model|conditioner|denoiser|depth_model|low_scale_model)\..*",
    vqgan.OUTSIDE_FIRST_STAGE[-1],
)
DENOISER = "model.diffusion_model."


# ----------------------------------------------------------------------------------------- sizes from names and shapes


def _period(shapes: Shapes, n: int) -> int:
    """Input blocks per level, the resampling one included: the smallest number that the names do not contradict."""

    def agrees(period: int) -> bool:
        attentive = [any(f"input_blocks.{i}.1.{x}.weight" in shapes for x in ("qkv", "proj_in")) for i in range(n)]
        convs = any(f"input_blocks.{i}.0.op.weight" in shapes for i in range(n))
        for i in range(1, n):
            place = i % period
            if convs and (f"input_blocks.{i}.0.op.weight" in shapes) != (place == 0):
                return False
            if place != 1 and f"input_blocks.{i}.0.skip_connection.weight" in shapes:
                return False
            if attentive[i] != (place > 0 and attentive[i - place + 1]):
                return False
        return True

    for period in range(2, n + 1):
        if n % period == 0 and agrees(period):
            return period
    raise ConvertError(f"{n} input_blocks do not fall into levels of equal length: not in guided-diffusion's layout")


def sizes(shapes: Shapes) -> dict[str, Any]:
    """The fields of `vgen.models.unet.Encoder` that shapes tell."""
    n = 1
    while f"input_blocks.{n}.0.in_layers.2.weight" in shapes or f"input_blocks.{n}.0.op.weight" in shapes:
        n += 1
    if "input_blocks.0.0.weight" not in shapes or n == 1:
        raise ConvertError("no input_blocks.0.0.weight and input_blocks.1 in the checkpoint: not in OpenAI's layout")
    period = _period(shapes, n)
    firsts = [f"input_blocks.{i}" for i in range(1, n, period)]
    widths = tuple(shapes[f"{at}.0.in_layers.2.weight"][0] for at in firsts)

    def depth(at: str) -> int:
        return count(shapes, f"{at}.1.transformer_blocks.{{}}.norm1.weight") or int(f"{at}.1.qkv.weight" in shapes)

    context = shapes.get("middle_block.1.transformer_blocks.0.attn2.to_k.weight", (0, None))[1]
    own = [shapes.get(f"{at}.1.transformer_blocks.0.attn1.to_k.weight", (w, w))[1] for at, w in zip(firsts, widths)]
    only_cross = tuple(width != seen for width, seen in zip(widths, own))
    labels = shapes.get("label_emb.weight", (None,))[0]
    added = shapes.get("label_emb.0.0.weight", (0, None))[1]
    scaled = shapes["input_blocks.1.0.emb_layers.1.weight"][0] == 2 * widths[0]
    return dict(
        in_channels=shapes["input_blocks.0.0.weight"][1],
        widths=widths,
        blocks=period - 1,
        attention=tuple(depth(at) for at in firsts),
        mid_attention=depth("middle_block"),
        context_dim=context,
        only_cross=only_cross if any(only_cross) else (),
        linear_projection=len(shapes.get("middle_block.1.proj_in.weight", ())) == 2,
        injection="scale_shift" if scaled else "add",
        resample="same" if f"input_blocks.{period}.0.op.weight" in shapes or n == period else "resblock",
        time_width=None if shapes["time_embed.0.weight"][1] == widths[0] else shapes["time_embed.0.weight"][1],
        num_classes=labels,
        added_dim=added,
    )


def _heads(config: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """heads and head_dim, which no shape tells: of the config, else of the published models."""
    if "num_head_channels" in config and config["num_head_channels"] != -1:
        return dict(head_dim=config["num_head_channels"])
    if "num_heads" in config:
        return dict(heads=config["num_heads"])
    if fields["context_dim"] is not None:
        # QUIRK: heads of 64 came with matrices as projections (SD 2, SDXL); SD 1 has 8 everywhere, and so has the x4
        # upscaler, which takes seven channels (facts of SD 1, 2, XL; tested).
        eight = not fields["linear_projection"] or fields["in_channels"] == 7
        return dict(heads=8) if eight else dict(head_dim=64)
    # QUIRK: heads of 64 but for two of OpenAI's models, which have four (guided-diffusion's README; tested).
    four = [(sizes["widths"], sizes["attention"]) for sizes in (ADM_128, ADM_64_TO_256)]
    return dict(heads=4) if (fields["widths"], fields["attention"]) in four else dict(head_dim=64)


def _build(prefix: str = "") -> Callable[[Mapping[str, Any], Shapes], UNet]:
    def build(config: Mapping[str, Any], shapes: Shapes) -> UNet:
        shapes = {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}
        fields = sizes(shapes)
        return UNet(**fields, **_heads(config, fields), out_channels=shapes["out.2.weight"][0])

    return build


def _adm_table(module: UNet) -> Table:
    # QUIRK: of OpenAI's released models the 64 x 64 one alone has the new order (facts, G11; tested).
    return table(module, new_order=module.widths == ADM_64["widths"])


ADM = Family(_build(), _adm_table, inputs, outputs=outputs)
ADM_LEGACY = Family(_build(), table, inputs, outputs=outputs)
ADM_NEW_ORDER = Family(_build(), lambda module: table(module, new_order=True), inputs, outputs=outputs)
LDM = Family(_build(), table, inputs, outputs=outputs)
LDM_DENOISER = Family(_build(DENOISER), lambda module: table(module, DENOISER), inputs, outputs=outputs)


# ---------------------------------------------------------------------------------------------------------- classifier


def _build_classifier(config: Mapping[str, Any], shapes: Shapes) -> NoisedClassifier:
    fields = sizes(shapes)
    places = shapes["out.2.positional_embedding"][1] - 1
    return NoisedClassifier(
        **fields,
        head_dim=config.get("num_head_channels", 64),
        image_size=int(places**0.5) * 2 ** (len(fields["widths"]) - 1),
        outputs=shapes["out.2.c_proj.weight"][0],
    )


def _classifier_table(module: NoisedClassifier) -> Table:
    rules = [rule for rule in _rules(module, False) if not rule.src.startswith("output_blocks")]
    rules += norm("out.0", "norm_out") + _qkv("out.2.qkv_proj", "pool/attn", split(3))
    rules += _linear_1d("out.2.c_proj", "pool/attn/out")
    return Table((*rules, Rule("out.2.positional_embedding", "pool/positions/table", transpose(1, 0))))


def _classifier_inputs(module: NoisedClassifier, rng: np.random.Generator) -> dict[str, np.ndarray]:
    shape = (2, module.image_size, module.image_size, module.in_channels)
    return dict(x=rng.standard_normal(shape).astype(np.float32), t=np.asarray([3, 500], np.int32))


ADM_CLASSIFIER = Family(
    _build_classifier, _classifier_table, _classifier_inputs, outputs=lambda logits: {"logits": logits}
)
