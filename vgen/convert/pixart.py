"""PixArt-alpha and -Sigma in the authors' layout and in diffusers'."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from vgen.convert import dit
from vgen.convert.dinov2 import authors_mlp
from vgen.convert.family import Family
from vgen.convert.pieces import Shapes, conv, count, dense, norm, pixels
from vgen.convert.rules import LINEAR, ConvertError, Rule, Table, chain, each, split
from vgen.convert.sam import stacked
from vgen.models.dit import DiT
from vgen.models.pixart import PixArt

_KV = chain(split(2), LINEAR)  # torch Linear [2 width, in] in the order k, v <-> two kernels [in, width]
_DEPTHWISE = each(lambda a: a[:, 0].transpose(1, 2, 0), lambda a: a.transpose(2, 0, 1)[:, None])  # [c, 1, r, r]


# ------------------------------------------------------------------------------------------------ the authors' layout


def _authors_layer(src: str, dst: str, compressed: bool) -> list[Rule]:
    kv = {leaf: tuple(f"{dst}/cross/{part}/{leaf}" for part in "kv") for leaf in ("kernel", "bias")}
    rules = [
        Rule(f"{src}.scale_shift_table", f"{dst}/table"),
        *dit.authors_attention(f"{src}.attn", f"{dst}/attn"),
        *dense(f"{src}.cross_attn.q_linear", f"{dst}/cross/q"),
        Rule(f"{src}.cross_attn.kv_linear.weight", kv["kernel"], _KV),
        Rule(f"{src}.cross_attn.kv_linear.bias", kv["bias"], split(2)),
        *dense(f"{src}.cross_attn.proj", f"{dst}/cross/out"),
        *authors_mlp(f"{src}.mlp", f"{dst}/mlp"),
    ]
    if compressed:
        rules += [Rule(f"{src}.attn.sr.weight", f"{dst}/compress/kernel", _DEPTHWISE)]
        rules += [Rule(f"{src}.attn.sr.bias", f"{dst}/compress/bias")]
        rules += norm(f"{src}.attn.norm", f"{dst}/compress/norm")
    return rules


def _authors_layers(module: PixArt) -> list[Rule]:
    """The rules of all layers; where the last are compressed, each half by the names of its layers."""
    if not module.compressed:
        return _authors_layer("blocks.{i}", "layers", False)
    rules, plain = [], module.depth - module.compressed
    for dst, numbers in (("layers", range(plain)), ("compressed_layers", range(plain, module.depth))):
        for rule in _authors_layer("blocks.{i}", dst, dst != "layers") if numbers else []:
            rules.append(Rule(tuple(rule.src.format(i=i) for i in numbers), rule.dst, stacked(rule.op)))
    return rules


def authors_table(module: PixArt) -> Table:
    """State dicts of PixArt-alpha's and PixArt-sigma's repositories.

    Their scripts drop the table of positions that the files hold before they load them, so it is neither read nor
    written.
    """
    rules = [
        *conv("x_embedder.proj", "patches"),
        *dense("t_embedder.mlp.0", "time/fc1"),
        *dense("t_embedder.mlp.2", "time/fc2"),
        *dense("t_block.1", "mod"),
        *authors_mlp("y_embedder.y_proj", "caption"),
        Rule("y_embedder.y_embedding", "null_context"),
        *_authors_layers(module),
        Rule("final_layer.scale_shift_table", "out_table"),
        *dense("final_layer.linear", "out"),
    ]
    if module.micro:
        for theirs, ours in (("csize_embedder", "size"), ("ar_embedder", "aspect")):
            rules += dense(f"{theirs}.mlp.0", f"{ours}/fc1") + dense(f"{theirs}.mlp.2", f"{ours}/fc2")
    return Table(tuple(rules), ignore=("pos_embed",))


def _build_authors(config: Mapping[str, Any], shapes: Shapes) -> PixArt:
    """config, which these files have not, may say num_heads, sample_size and interpolation.

    Without it the size is that of the stored table of positions, and the interpolation what the authors' configs have
    for it: size / 64, but no less than 1, and for PixArt-Sigma (300 tokens of text) no less than 1/2.
    """
    width, in_channels, patch, _ = shapes["x_embedder.proj.weight"]
    depth = count(shapes, "blocks.{}.attn.qkv.weight")
    squeezed = [i for i in range(depth) if f"blocks.{i}.attn.sr.weight" in shapes]
    if squeezed != list(range(depth - len(squeezed), depth)):
        raise ConvertError(f"PixArt: the last layers may be compressed, here layers {squeezed} of {depth} are")
    null_tokens = shapes.get("y_embedder.y_embedding", (0,))[0]
    if "sample_size" not in config and "pos_embed" not in shapes:
        raise ConvertError("PixArt: the file has no pos_embed that tells the size of the latents: give sample_size")
    size = config.get("sample_size") or round(shapes["pos_embed"][1] ** 0.5) * patch
    return PixArt(
        depth=depth,
        width=width,
        heads=dit.heads(config, width),
        mlp_dim=shapes["blocks.0.mlp.fc1.weight"][0],
        patch_size=patch,
        in_channels=in_channels,
        out_channels=shapes["final_layer.linear.weight"][0] // patch**2,
        context_width=shapes["y_embedder.y_proj.fc1.weight"][1],
        null_tokens=null_tokens,
        sample_size=size,
        interpolation=config.get("interpolation") or max(size / 64, 0.5 if null_tokens == 300 else 1.0),
        micro="csize_embedder.mlp.0.weight" in shapes,
        compress=shapes[f"blocks.{depth - 1}.attn.sr.weight"][2] if squeezed else 1,
        compressed=len(squeezed),
    )


def _inputs(module: PixArt, rng: np.random.Generator) -> dict[str, np.ndarray]:
    inputs = dict(
        dit.latents(module, rng),
        context=rng.standard_normal((2, 7, module.context_width)).astype(np.float32),
        context_mask=np.array([[1] * 7, [1] * 4 + [0] * 3], bool),
    )
    if module.micro:
        inputs |= dict(size=np.array([[512, 768], [1024, 640]], np.float32), aspect=np.array([0.67, 1.6], np.float32))
    return inputs


def _outputs(result: Any) -> dict[str, Any]:
    return {"sample": result}


AUTHORS = Family(_build_authors, authors_table, _inputs, outputs=_outputs)


# --------------------------------------------------------------------------------------------------- diffusers' layout


def diffusers_table(module: PixArt) -> Table:
    """PixArtTransformer2DModel; it has no null context, and no compressed layers."""
    layer, cond = "transformer_blocks.{i}", "adaln_single.emb"
    rules = [
        *conv("pos_embed.proj", "patches"),
        *dit.diffusers_embedder(f"{cond}.timestep_embedder", "time"),
        *dense("adaln_single.linear", "mod"),
        *dit.diffusers_embedder("caption_projection", "caption"),
        Rule(f"{layer}.scale_shift_table", "layers/table"),
        *dit.diffusers_attention(f"{layer}.attn1", "layers/attn"),
        *dit.diffusers_attention(f"{layer}.attn2", "layers/cross"),
        *dit.diffusers_mlp(f"{layer}.ff", "layers/mlp"),
        Rule("scale_shift_table", "out_table"),
        *dense("proj_out", "out"),
    ]
    if module.micro:
        rules += dit.diffusers_embedder(f"{cond}.resolution_embedder", "size")
        rules += dit.diffusers_embedder(f"{cond}.aspect_ratio_embedder", "aspect")
    return Table(tuple(rules), ignore=(r"pos_embed\.pos_embed",))


def build_diffusers(config: Mapping[str, Any], shapes: Shapes) -> PixArt:
    fields = dit.diffusers_fields(config, "ada_norm_single", sample_size=128, out_channels=8)
    width, size, micro = fields["width"], fields["sample_size"], config.get("use_additional_conditions")
    if config.get("caption_channels") is None or config.get("cross_attention_dim", 1152) != width:
        raise ConvertError(
            f"PixArtTransformer2DModel: needs caption_channels and cross_attention_dim = {width}, got "
            f"{config.get('caption_channels')} and {config.get('cross_attention_dim', 1152)}"
        )
    if config.get("norm_eps", 1e-6) != 1e-6:
        raise ConvertError(f"PixArtTransformer2DModel: norm_eps must be 1e-06, got {config['norm_eps']}")
    return PixArt(
        **fields,
        context_width=config["caption_channels"],
        interpolation=float(config.get("interpolation_scale") or max(size // 64, 1)),
        micro=size == 128 if micro is None else micro,
    )


def config(module: PixArt) -> dict[str, Any]:
    common = dit.diffusers_config(module, "PixArtTransformer2DModel", "ada_norm_single")
    if module.compressed or module.null_tokens:
        raise ConvertError("PixArtTransformer2DModel has neither compressed layers nor a null context: drop them first")
    scale = module.interpolation
    return dict(
        common,
        cross_attention_dim=module.width,
        caption_channels=module.context_width,
        interpolation_scale=int(scale) if scale == int(scale) else scale,
        use_additional_conditions=module.micro,
    )


def compare(model: Any, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    import torch

    given = {k: torch.from_numpy(v) for k, v in inputs.items() if k != "x"}
    dtype = next(model.parameters()).dtype
    added = dict(resolution=given.get("size"), aspect_ratio=given.get("aspect"))
    with torch.no_grad():
        sample = model(
            pixels(model, inputs["x"]),
            encoder_hidden_states=given["context"].to(dtype),
            timestep=given["t"],
            added_cond_kwargs=added,
            encoder_attention_mask=given["context_mask"].to(dtype),
        ).sample
    return {"sample": dit.nhwc(sample)}


DIFFUSERS = Family(
    build_diffusers, diffusers_table, _inputs, config, "diffusers:PixArtTransformer2DModel", compare, _outputs
)
# Published folders of both networks name the class that diffusers had before each got its own.
TRANSFORMER_2D = dit.by_norm(
    dict(ada_norm_zero=dit.DIFFUSERS, ada_norm_single=DIFFUSERS),
    lambda module: "ada_norm_zero" if isinstance(module, DiT) else "ada_norm_single",
)
