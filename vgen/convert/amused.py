"""aMUSEd's transformer as diffusers publishes it: UVit2DModel."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from vgen.convert.family import Family
from vgen.convert.rules import (
    CONV,
    CONV_1X1,
    CONV_TRANSPOSE,
    COPY,
    LINEAR,
    ConvertError,
    Op,
    Rule,
    Table,
    chain,
    each,
    split,
)
from vgen.models.uvit import UVit

# name in config.json -> field of UVit
_SIZES = dict(
    vocab_size="ids",
    codebook_size="vocab",
    num_hidden_layers="depth",
    hidden_size="width",
    num_attention_heads="heads",
    intermediate_size="mlp_dim",
    in_channels="embed_dim",
    block_out_channels="channels",
    num_res_blocks="res_blocks",
    block_num_heads="block_heads",
    encoder_hidden_size="text_width",
    cond_embed_dim="pooled_width",
    micro_cond_encode_dim="micro_width",
    use_bias="bias",
    layer_norm_eps="eps",
    hidden_dropout="dropout",
    attention_dropout="attn_dropout",
)
_NUMBERS = 5  # of the micro-conditioning
_SIDE = 64  # diffusers' default of sample_size


def _build(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> UVit:
    """ConvertError for what no published model has: norms without a scale, one half of the resampling, other numbers
    of conditions."""
    down, up = (config.get(name, False) for name in ("downsample", "upsample"))
    if down != up:
        raise ConvertError(f"UVit2DModel: downsample is {down} and upsample {up}; only both or none is supported")
    if not config.get("ln_elementwise_affine", True):
        raise ConvertError("UVit2DModel: ln_elementwise_affine is false; only norms with a scale are supported")
    fields = {field: config[name] for name, field in _SIZES.items() if name in config}
    net = UVit(grid=(config.get("sample_size", _SIDE),) * 2, resample=down, **fields)
    if config.get("micro_cond_embed_dim", 1280) != _NUMBERS * net.micro_width:
        raise ConvertError(
            f"UVit2DModel: micro_cond_embed_dim is {config.get('micro_cond_embed_dim', 1280)}, expected "
            f"{_NUMBERS} x micro_cond_encode_dim = {_NUMBERS * net.micro_width}"
        )
    return net


def _config(net: UVit) -> dict[str, Any]:
    if net.grid[0] != net.grid[1]:
        raise ConvertError(f"UVit2DModel: sample_size is one number, the grid is {net.grid}")
    return {name: getattr(net, field) for name, field in _SIZES.items()} | {
        "_class_name": "UVit2DModel",
        "sample_size": net.grid[0],
        "downsample": net.resample,
        "upsample": net.resample,
        "micro_cond_embed_dim": _NUMBERS * net.micro_width,
        "ln_elementwise_affine": True,
    }


_GATED = chain(split(2), LINEAR)  # [2 dim, width]: the values, then what is put through the activation
_GATED_BIAS = split(2)
_CHANNELS = each(lambda a: a.reshape(-1), lambda a: a.reshape(1, 1, 1, -1))


def _linear(src: str, dst: str, op: Op = LINEAR) -> list[Rule]:
    return [Rule(f"{src}.weight", f"{dst}/kernel", op), Rule(f"{src}.bias", f"{dst}/bias")]


def _attention(src: str, dst: str) -> list[Rule]:
    pairs = (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "out"))
    return [rule for theirs, ours in pairs for rule in _linear(f"{src}.{theirs}", f"{dst}/{ours}")]


def _stage(src: str, dst: str, resample: str, op: Op) -> list[Rule]:
    res, look = f"{src}.res_blocks.{{i}}", f"{src}.attention_blocks.{{i}}"
    rules = [Rule(f"{src}.{resample}.norm.weight", f"{dst}/resample_norm/scale")]
    rules += _linear(f"{src}.{resample}.conv", f"{dst}/resample", op)
    rules += _linear(f"{res}.depthwise", f"{dst}/res_{{i}}/depthwise", CONV)
    rules += [Rule(f"{res}.norm.weight", f"{dst}/res_{{i}}/norm/scale")]
    rules += _linear(f"{res}.channelwise_linear_1", f"{dst}/res_{{i}}/fc1")
    rules += [Rule(f"{res}.channelwise_norm.gamma", f"{dst}/res_{{i}}/response/scale", _CHANNELS)]
    rules += [Rule(f"{res}.channelwise_norm.beta", f"{dst}/res_{{i}}/response/bias", _CHANNELS)]
    rules += _linear(f"{res}.channelwise_linear_2", f"{dst}/res_{{i}}/fc2")
    rules += _linear(f"{res}.cond_embeds_mapper", f"{dst}/res_{{i}}/mod")
    rules += _linear(f"{look}.kv_mapper", f"{dst}/look_{{i}}/context")
    for theirs, ours in ((1, 0), (2, 1)):
        rules += [Rule(f"{look}.norm{theirs}.weight", f"{dst}/look_{{i}}/attn_norm_{ours}/scale")]
        rules += _attention(f"{look}.attn{theirs}", f"{dst}/look_{{i}}/attn_{ours}")
    return rules


def _table(net: UVit) -> Table:
    layer = "transformer_layers.{i}"
    rules = [
        *_linear("encoder_proj", "text"),
        Rule("encoder_proj_layer_norm.weight", "text_norm/scale"),
        Rule("embed.embeddings.weight", "tokens/embed/embedding", COPY),
        Rule("embed.layer_norm.weight", "tokens/norm/scale"),
        *_linear("embed.conv", "tokens/project", CONV_1X1),
        *_linear("cond_embed.linear_1", "cond/fc1"),
        *_linear("cond_embed.linear_2", "cond/fc2"),
        *_stage("down_block", "down", "downsample", CONV),
        Rule("project_to_hidden_norm.weight", "in_norm/scale"),
        *_linear("project_to_hidden", "in"),
        *_attention(f"{layer}.attn1", "layers/attn"),
        *_attention(f"{layer}.attn2", "layers/cross"),
        Rule(f"{layer}.ff.net.0.proj.weight", ("layers/mlp/fc1/kernel", "layers/mlp/gate/kernel"), _GATED),
        Rule(f"{layer}.ff.net.0.proj.bias", ("layers/mlp/fc1/bias", "layers/mlp/gate/bias"), _GATED_BIAS),
        *_linear(f"{layer}.ff.net.2", "layers/mlp/fc2"),
        Rule(f"{layer}.norm3.norm.bias", "layers/mlp_norm/bias"),
        Rule("project_from_hidden_norm.weight", "out_norm/scale"),
        *_linear("project_from_hidden", "out"),
        *_stage("up_block", "up", "upsample", CONV_TRANSPOSE),
        *_linear("mlm_layer.conv1", "head/fc", CONV_1X1),
        Rule("mlm_layer.layer_norm.weight", "head/norm/scale"),
        *_linear("mlm_layer.conv2", "head/logits", CONV_1X1),
    ]
    for number, name in ((1, "attn"), (2, "cross"), (3, "mlp")):
        rules += [Rule(f"{layer}.norm{number}.norm.weight", f"layers/{name}_norm/scale")]
        rules += _linear(f"{layer}.norm{number}.linear", f"layers/{name}_mod")
    return Table(tuple(rules))


def _inputs(net: UVit, rng: np.random.Generator) -> dict[str, np.ndarray]:
    side = min(*net.grid, 16)
    return dict(
        tokens=rng.choice([*range(net.vocab), net.mask_id], (2, side, side + 2)).astype(np.int32),
        text=rng.standard_normal((2, 7, net.text_width)).astype(np.float32),
        pooled=rng.standard_normal((2, net.pooled_width)).astype(np.float32),
        micro=(rng.uniform(0, 1, (2, _NUMBERS)) * [512, 512, 64, 64, 7]).astype(np.float32),
    )


def _compare(model: Any, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    import torch

    names = dict(tokens="input_ids", text="encoder_hidden_states", pooled="pooled_text_emb", micro="micro_conds")
    dtype = next(model.parameters()).dtype
    given = {names[k]: torch.from_numpy(np.asarray(v)) for k, v in inputs.items()}
    given = {k: v.to(dtype) if v.is_floating_point() else v.long() for k, v in given.items()}
    with torch.no_grad():
        logits = model(**given)
    return {"logits": logits.permute(0, 2, 3, 1).numpy()}


UVIT = Family(
    build=_build,
    table=_table,
    inputs=_inputs,
    config=_config,
    reference="diffusers:UVit2DModel",
    compare=_compare,
    outputs=lambda logits: {"logits": logits},
)
