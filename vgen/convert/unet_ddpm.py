"""DDPM's U-Net in the layout of ermongroup/ddim, the PyTorch port of the authors' code."""

from collections.abc import Mapping
from typing import Any

from vgen.convert import vqgan
from vgen.convert.family import Family
from vgen.convert.pieces import Shapes, conv, count, dense, norm
from vgen.convert.rules import CONV_1X1, ConvertError, Table
from vgen.convert.unet_diffusers import inputs, outputs
from vgen.models.unet import DDPM_CIFAR10, UNet


def _build(config: Mapping[str, Any], shapes: Shapes) -> UNet:
    levels = count(shapes, "down.{}.block.0.conv1.weight")
    if levels > 1 and "down.0.downsample.conv.weight" not in shapes:
        raise ConvertError("down.0.downsample.conv.weight is missing: only levels resampled by convolutions are read")
    fields = dict(
        in_channels=shapes["conv_in.weight"][1],
        out_channels=shapes["conv_out.weight"][0],
        widths=tuple(shapes[f"down.{i}.block.0.conv1.weight"][0] for i in range(levels)),
        blocks=count(shapes, "down.0.block.{}.conv1.weight"),
        attention=tuple(int(f"down.{i}.attn.0.q.weight" in shapes) for i in range(levels)),
        time_width=shapes["conv_in.weight"][0],
    )
    if fields["time_width"] != fields["widths"][0]:
        raise ConvertError(f"conv_in has {fields['time_width']} channels, the first level {fields['widths'][0]}")
    return UNet(**DDPM_CIFAR10 | fields | dict(time_width=None))


def _table(module: UNet) -> Table:
    rules = conv("conv_in", "conv_in") + conv("conv_out", "conv_out") + norm("norm_out", "norm_out")
    rules += dense("temb.dense.0", "time/fc1") + dense("temb.dense.1", "time/fc2")
    places = [(f"{way}.{{i}}.block.{{j}}", f"{way}_{{i}}/block_{{j}}") for way in ("down", "up")]
    for src, dst in [*places, ("mid.block_1", "mid/block_0"), ("mid.block_2", "mid/block_1")]:
        rules += vqgan.res_block(src, dst, "nin_shortcut") + dense(f"{src}.temb_proj", f"{dst}/time")
    places = [(f"{way}.{{i}}.attn.{{j}}", f"{way}_{{i}}/attn_{{j}}") for way in ("down", "up")]
    for src, dst in [*places, ("mid.attn_1", "mid/attn_0")]:
        rules += vqgan.attention(src, dst, vqgan.TAMING_ATTENTION, CONV_1X1)
    for way in ("down", "up"):
        rules += conv(f"{way}.{{i}}.{way}sample.conv", f"{way}_{{i}}/resample/conv")
    return Table(tuple(rules))


DDPM = Family(_build, _table, inputs, outputs=outputs)
