"""T5's encoder in the names of transformers: versions 1.0 and 1.1 (Flan too), alone or out of a whole T5."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from vgen.convert.family import Family
from vgen.convert.rules import LINEAR, ConvertError, Rule, Table
from vgen.models.t5 import T5Encoder

# feed_forward_proj of config.json -> (act, gated).
# QUIRK: "gated-gelu" means the tanh approximation (transformers' T5Config replaces it by gelu_new, tested)
PROJECTIONS = {
    "relu": ("relu", False),
    "gelu": ("gelu", False),
    "gated-gelu": ("gelu_tanh", True),
    "gated-silu": ("silu", True),
    "gated-relu": ("relu", True),
}
_LAYER = "encoder.block.{i}.layer."
_BIAS = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"


def build(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> T5Encoder:
    """The encoder that a config.json describes, or without one that the shapes tell, with the published constants."""
    if not config:
        return _by_shapes(shapes)
    name = config.get("feed_forward_proj", "relu")
    if name not in PROJECTIONS:
        raise ConvertError(f"T5: feed_forward_proj is {name!r}, expected one of {', '.join(PROJECTIONS)}")
    act, gated = PROJECTIONS[name]
    return T5Encoder(
        depth=config.get("num_layers", 6),
        width=config.get("d_model", 512),
        heads=config.get("num_heads", 8),
        head_dim=config.get("d_kv", 64),
        mlp_dim=config.get("d_ff", 2048),
        vocab=config.get("vocab_size", 32_128),
        act=act,
        gated=gated,
        buckets=config.get("relative_attention_num_buckets", 32),
        max_distance=config.get("relative_attention_max_distance", 128),
        eps=config.get("layer_norm_epsilon", 1e-6),
    )


def _by_shapes(shapes: Mapping[str, tuple[int, ...]]) -> T5Encoder:
    layer = _LAYER.format(i=0)
    gated = layer + "1.DenseReluDense.wi_0.weight" in shapes
    inner = layer + f"1.DenseReluDense.wi{'_1' if gated else ''}.weight"
    embed = "shared.weight" if "shared.weight" in shapes else "encoder.embed_tokens.weight"
    query = layer + "0.SelfAttention.q.weight"
    if missing := [name for name in (embed, _BIAS, query, inner) if len(shapes.get(name, ())) != 2]:
        raise ConvertError(f"T5: without a config.json the sizes are taken from {', '.join(missing)}, not there")
    depth = 1
    while _LAYER.format(i=depth) + "0.SelfAttention.q.weight" in shapes:
        depth += 1
    (vocab, width), (buckets, heads) = shapes[embed], shapes[_BIAS]
    act = "gelu_tanh" if gated else "relu"
    head_dim, mlp_dim = shapes[query][0] // heads, shapes[inner][0]
    return T5Encoder(depth, width, heads, head_dim, mlp_dim, vocab, act, gated, buckets)


def table(model: T5Encoder) -> Table:
    """Rules for the encoder; of a whole T5 the decoder is left aside."""
    attention, mlp = _LAYER + "0.SelfAttention.", _LAYER + "1.DenseReluDense."
    rules = [Rule("shared.weight", "embed/embedding"), Rule(_BIAS, "relative_bias/table")]
    rules += [Rule(f"{attention}{name}.weight", f"layers/attn/{name}/kernel", LINEAR) for name in "qkv"]
    rules += [
        Rule(f"{attention}o.weight", "layers/attn/out/kernel", LINEAR),
        Rule(_LAYER + "0.layer_norm.weight", "layers/attn_norm/scale"),
        Rule(f"{mlp}wi{'_1' if model.gated else ''}.weight", "layers/mlp/fc1/kernel", LINEAR),
        Rule(f"{mlp}wi_0.weight", "layers/mlp/gate/kernel", LINEAR),
        Rule(f"{mlp}wo.weight", "layers/mlp/fc2/kernel", LINEAR),
        Rule(_LAYER + "1.layer_norm.weight", "layers/mlp_norm/scale"),
        Rule("encoder.final_layer_norm.weight", "norm/scale"),
    ]
    ignore = (r"decoder\..*", r"lm_head\.weight")
    return Table(tuple(rules), ignore, tied=(("encoder.embed_tokens.weight", "shared.weight"),))


def inputs(model: T5Encoder, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Two texts, one shorter than the other."""
    tokens = rng.integers(0, model.vocab, (2, 24)).astype(np.int32)
    return dict(tokens=tokens, mask=np.arange(24) < np.array([[24], [15]]))


def config(model: T5Encoder) -> dict[str, Any]:
    """config.json of a T5EncoderModel; ConvertError for an MLP that transformers' T5 has not."""
    names = [name for name, kind in PROJECTIONS.items() if kind == (model.act, model.gated)]
    if not names:
        raise ConvertError(f"T5: no feed_forward_proj means act={model.act!r}, gated={model.gated}")
    return dict(
        architectures=["T5EncoderModel"],
        model_type="t5",
        is_encoder_decoder=False,
        d_model=model.width,
        d_kv=model.head_dim,
        d_ff=model.mlp_dim,
        num_layers=model.depth,
        num_heads=model.heads,
        vocab_size=model.vocab,
        feed_forward_proj=names[0],
        relative_attention_num_buckets=model.buckets,
        relative_attention_max_distance=model.max_distance,
        layer_norm_epsilon=model.eps,
    )


def compare(module: Any, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    import torch

    tokens, mask = (torch.from_numpy(inputs[name]).long() for name in ("tokens", "mask"))
    return dict(states=module(input_ids=tokens, attention_mask=mask).last_hidden_state.numpy())


T5 = Family(
    build=build,
    table=table,
    inputs=inputs,
    config=config,
    reference="transformers:T5EncoderModel",
    compare=compare,
    outputs=lambda states: dict(states=states),
)
