"""MAE in the authors' layout and in transformers', with its decoder or without."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from vgen.convert.dinov2 import authors_layer, authors_mlp
from vgen.convert.family import Family
from vgen.convert.pieces import Shapes, conv, count, dense, known, norm, pixels
from vgen.convert.rules import ConvertError, Op, Rule, Table
from vgen.convert.vit import HF_ATTENTION_NAMES, HF_MLP_NAMES, hf_config, hf_layer, hf_size, hf_sizes, images, square
from vgen.layers.embed import sincos_2d
from vgen.models.mae import MAE, Reconstruction
from vgen.models.vit import Features, ViT


def fixed_positions(
    token: str, table: str, dst: str, inside: tuple[int, ...], grid: tuple[int, int], width: int
) -> Rule:
    """A token [1, 1, width], and the table of positions that the files carry beside it and the network computes.

    inside: shape of the token here.  The table has a first row of zeros for the class token; on import it must be the
    fixed one, or ConvertError is raised: a network whose positions were trained is another one.
    """
    rows = np.concatenate([np.zeros((1, width)), sincos_2d(*grid, width)])[None].astype(np.float32)

    def forward(arrays):
        held, stored = arrays
        if stored.shape != rows.shape or np.abs(np.asarray(stored, np.float32) - rows).max() > 1e-2:
            raise ConvertError(f"{table}: not the fixed sin-cos positions of a {grid[0]} x {grid[1]} grid")
        return [held.reshape(inside)]

    return Rule((token, table), dst, Op(forward, lambda a: [a[0].reshape(1, 1, width), rows.astype(a[0].dtype)]))


def _grid(module: MAE | ViT) -> tuple[int, int]:
    size = module.image_size
    height, width = (size, size) if isinstance(size, int) else size
    return height // module.patch_size, width // module.patch_size


def _table(
    module: MAE | ViT, names: Mapping[str, str], layer: Callable[[str, str], list[Rule]], rename: tuple = ()
) -> Table:
    """names: of the parts in the layout.  layer: its rules for one layer."""
    ours, grid = ("encoder/" if isinstance(module, MAE) else ""), _grid(module)
    rules = [
        fixed_positions(names["cls"], names["positions"], f"{ours}cls", (1, -1), grid, module.width),
        *conv(names["patches"], f"{ours}patch_embed"),
        *layer(names["layer"], f"{ours}layers"),
        *norm(names["norm"], f"{ours}norm"),
    ]
    if isinstance(module, MAE):
        token = (names["mask"], names["decoder_positions"], "decoder/mask_token")
        rules += [
            fixed_positions(*token, (-1,), grid, module.decoder_width),
            *dense(f"{names['decoder']}_embed", "decoder/embed"),
            *layer(names["decoder_layer"], "decoder/layers"),
            *norm(f"{names['decoder']}_norm", "decoder/norm"),
            *dense(f"{names['decoder']}_pred", "decoder/pred"),
        ]
    return Table(tuple(rules), rename=rename)


def _inputs(module: MAE | ViT, rng: np.random.Generator) -> dict[str, np.ndarray]:
    inputs = images(module, rng)
    if isinstance(module, MAE):
        inputs["noise"] = rng.random((2, math.prod(_grid(module)))).astype(np.float32)
    return inputs


def _outputs(result: Reconstruction | Features) -> dict[str, Any]:
    if isinstance(result, Features):
        return dict(tokens=result.tokens)
    return dict(loss=result.loss, pred=result.pred, mask=result.mask)


# ------------------------------------------------------------------------------------------------ the authors' layout

_AUTHORS = dict(
    cls="cls_token",
    positions="pos_embed",
    patches="patch_embed.proj",
    layer="blocks.{i}",
    norm="norm",
    mask="mask_token",
    decoder_positions="decoder_pos_embed",
    decoder="decoder",
    decoder_layer="decoder_blocks.{i}",
)


def _build_authors(config: Mapping[str, Any], shapes: Shapes) -> MAE | ViT:
    """config, which these files have not, may say num_heads, decoder_num_heads, norm_pix_loss and mask_ratio."""
    width, _, rows, columns = shapes["patch_embed.proj.weight"]
    heads = config.get("num_heads", {768: 12, 1024: 16, 1280: 16}.get(width))  # the published sizes
    if heads is None:
        raise ConvertError(f"width {width} is not one of MAE's (768, 1024, 1280): give num_heads")
    image_size = square(shapes["pos_embed"][1] - 1, (rows, columns))
    fields = dict(
        width=width,
        depth=count(shapes, "blocks.{}.norm1.weight"),
        heads=heads,
        mlp_dim=shapes["blocks.0.mlp.fc1.weight"][0],
        patch_size=rows,
        image_size=hf_size(config.get("image_size", image_size)),
    )
    if "decoder_embed.weight" not in shapes:  # mae_pretrain_vit_*.pth
        return ViT(**fields, posemb="sincos", token_std=0.02)
    return MAE(
        **fields,
        decoder_width=shapes["decoder_embed.weight"][0],
        decoder_depth=count(shapes, "decoder_blocks.{}.norm1.weight"),
        decoder_heads=config.get("decoder_num_heads", 16),
        decoder_mlp_dim=shapes["decoder_blocks.0.mlp.fc1.weight"][0],
        norm_pix=config.get("norm_pix_loss", True),
        mask_ratio=config.get("mask_ratio", 0.75),
    )


def authors_table(module: MAE | ViT) -> Table:
    """facebookresearch/mae's state dicts; a `ViT` is the encoder alone."""
    return _table(module, _AUTHORS, lambda src, dst: authors_layer(src, dst) + authors_mlp(f"{src}.mlp", f"{dst}/mlp"))


AUTHORS = Family(_build_authors, authors_table, _inputs, outputs=_outputs)


# ----------------------------------------------------------------------------------------------- transformers' layout

_HF_NAMES = (
    *HF_ATTENTION_NAMES,
    *HF_MLP_NAMES,
    (r"^(vit\.)?layers\.", r"\1encoder.layer."),
    # QUIRK: save_pretrained of transformers 5 writes this name, which no published file has (tested)
    (r"^decoder\.decoder_encoder\.layer\.", "decoder.decoder_layers."),
)


def _hf_parts(prefix: str) -> dict[str, str]:
    return dict(
        cls=f"{prefix}embeddings.cls_token",
        positions=f"{prefix}embeddings.position_embeddings",
        patches=f"{prefix}embeddings.patch_embeddings.projection",
        layer=f"{prefix}encoder.layer.{{i}}",
        norm=f"{prefix}layernorm",
        mask="decoder.mask_token",
        decoder_positions="decoder.decoder_pos_embed",
        decoder="decoder.decoder",
        decoder_layer="decoder.decoder_layers.{i}",
    )


def _build_hf(config: Mapping[str, Any], shapes: Shapes) -> MAE | ViT:
    shapes = known(shapes, _HF_NAMES)
    eps = config.get("layer_norm_eps", 1e-12)
    fields = hf_sizes(config) | dict(mlp_dim=config.get("intermediate_size", 3072), eps=eps)
    if "decoder.decoder_embed.weight" not in shapes:
        return ViT(**fields, posemb="sincos", token_std=0.02)
    return MAE(
        **fields,
        decoder_width=config.get("decoder_hidden_size", 512),
        decoder_depth=config.get("decoder_num_hidden_layers", 8),
        decoder_heads=config.get("decoder_num_attention_heads", 16),
        decoder_mlp_dim=config.get("decoder_intermediate_size", 2048),
        norm_pix=config.get("norm_pix_loss", False),
        mask_ratio=config.get("mask_ratio", 0.75),
    )


def hf_table(module: MAE | ViT) -> Table:
    """transformers' ViTMAEForPreTraining, or ViTMAEModel for a `ViT`."""
    return _table(module, _hf_parts("vit." if isinstance(module, MAE) else ""), hf_layer, _HF_NAMES)


def _config(module: MAE | ViT) -> dict[str, Any]:
    decoder = isinstance(module, MAE)
    config = hf_config(module, "ViTMAEForPreTraining" if decoder else "ViTMAEModel", "vit_mae")
    config["intermediate_size"] = module.mlp_dim
    if decoder:
        config |= dict(
            decoder_hidden_size=module.decoder_width,
            decoder_num_hidden_layers=module.decoder_depth,
            decoder_num_attention_heads=module.decoder_heads,
            decoder_intermediate_size=module.decoder_mlp_dim,
            norm_pix_loss=module.norm_pix,
            mask_ratio=module.mask_ratio,
        )
    return config


def _compare(model: Any, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    import torch

    with torch.no_grad():
        out = model(pixels(model, inputs["images"]), noise=torch.from_numpy(np.asarray(inputs["noise"])))
    return dict(loss=out.loss.numpy(), pred=out.logits.numpy(), mask=out.mask.numpy())


HF_MAE = Family(_build_hf, hf_table, _inputs, _config, "transformers:ViTMAEForPreTraining", _compare, _outputs)
HF_MAE_ENCODER = Family(_build_hf, hf_table, _inputs, _config, outputs=_outputs)
