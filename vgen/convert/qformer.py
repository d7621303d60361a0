"""BLIP-2's Q-Former: transformers' Blip2QFormerModel, and LAVIS's .pth files."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from vgen.convert.family import Family
from vgen.convert.pieces import ACTIVATIONS, FIRST, Shapes, dense, norm
from vgen.convert.rules import ConvertError, Rule, Table
from vgen.models.qformer import QFormer, QFormerOutput

# -------------------------------------------------------------------------------------------------------------- rules


def bert_attention(src: str, dst: str, inner: str = "self") -> list[Rule]:
    """Attention of a BERT layer and the norm behind it; `inner` is the name that holds query, key and value."""
    rules = dense(f"{src}.output.dense", f"{dst}/out") + norm(f"{src}.output.LayerNorm", f"{dst}_norm")
    for ours, name in (("q", "query"), ("k", "key"), ("v", "value")):
        rules += dense(f"{src}.{inner}.{name}", f"{dst}/{ours}")
    return rules


def bert_mlp(src: str, dst: str, suffix: str = "") -> list[Rule]:
    """The MLP of a BERT layer and the norm behind it; suffix: of both its names in the checkpoint."""
    rules = dense(f"{src}.intermediate{suffix}.dense", f"{dst}/fc1") + dense(
        f"{src}.output{suffix}.dense", f"{dst}/fc2"
    )
    return rules + norm(f"{src}.output{suffix}.LayerNorm", f"{dst}_norm")


def bert_embeddings(src: str, dst: str) -> list[Rule]:
    """Words and positions."""
    return [
        Rule(f"{src}.word_embeddings.weight", f"{dst}/words/embedding"),
        Rule(f"{src}.position_embeddings.weight", f"{dst}/positions/table"),
    ]


def bert_head(src: str, dst: str) -> list[Rule]:
    """The head that predicts words; its matrix is that of the words."""
    rules = dense(f"{src}.predictions.transform.dense", f"{dst}/dense")
    rules += norm(f"{src}.predictions.transform.LayerNorm", f"{dst}/norm")
    return [*rules, Rule(f"{src}.predictions.bias", f"{dst}/bias")]


def _layers(src: str, dst: str, inner: str) -> list[Rule]:
    src, dst = f"{src}encoder.layer.{{i}}", f"{dst}layers_{{i}}"
    rules = bert_attention(f"{src}.attention", f"{dst}/attn", inner)
    rules += bert_attention(f"{src}.crossattention", f"{dst}/cross", inner)
    return rules + bert_mlp(src, f"{dst}/mlp", "_query") + bert_mlp(src, f"{dst}/text_mlp")


def hf_rules(src: str = "", dst: str = "") -> list[Rule]:
    """transformers' names behind the prefix `src`, without queries and words."""
    return _layers(src, dst, "attention") + norm(f"{src}layernorm", f"{dst}embed_norm")


def hf_table(model: QFormer) -> Table:
    """The names of Blip2QFormerModel."""
    return Table(tuple(hf_rules()))


def lavis_table(model: QFormer) -> Table:
    """The names of LAVIS's stage-1 files, whose other parts (image encoder, projections) are left."""
    bert = "Qformer.bert."
    rules = [
        Rule("query_tokens", "queries", FIRST),
        *bert_embeddings(f"{bert}embeddings", "embed"),
        *norm(f"{bert}embeddings.LayerNorm", "embed_norm"),
        *_layers(bert, "", "self"),
        *bert_head("Qformer.cls", "head"),
    ]
    ignore = (
        r"Qformer\.bert\.embeddings\.position_ids",
        r"Qformer\.cls\.predictions\.decoder\.(weight|bias)",  # tied to the words and to `bias`
        r"(visual_encoder|ln_vision|vision_proj|text_proj|itm_head)\..*|temp",
    )
    return Table(tuple(rules), ignore, rename=LAVIS_NAMES)


LAVIS_NAMES = ((r"^(?=bert\.|cls\.)", "Qformer."),)  # of the Q-Former's own state dict

# -------------------------------------------------------------------------------------------------------------- sizes


def build_hf(config: Mapping[str, Any], shapes: Shapes) -> QFormer:
    """The network of a Blip2QFormerConfig; queries are given to it."""
    return QFormer(**hf_sizes(config), num_queries=0)


def hf_sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a QFormer from a Blip2QFormerConfig; ConvertError for an unknown activation."""
    act = config.get("hidden_act", "gelu")
    if act not in ACTIVATIONS:
        raise ConvertError(f"Blip2QFormerConfig: hidden_act {act!r}, expected one of {', '.join(ACTIVATIONS)}")
    return dict(
        depth=config.get("num_hidden_layers", 12),
        width=config.get("hidden_size", 768),
        heads=config.get("num_attention_heads", 12),
        mlp_dim=config.get("intermediate_size", 3072),
        cross_every=config.get("cross_attention_frequency", 2),
        text=config.get("use_qformer_text_input", False),
        max_length=config.get("max_position_embeddings", 512),
        act=ACTIVATIONS[act],
        eps=config.get("layer_norm_eps", 1e-12),
        context_width=config.get("encoder_hidden_size", 1408),
    )


def hf_config(model: QFormer) -> dict[str, Any]:
    """config.json of Blip2QFormerModel."""
    return dict(
        architectures=["Blip2QFormerModel"],
        model_type="blip_2_qformer",
        num_hidden_layers=model.depth,
        hidden_size=model.width,
        num_attention_heads=model.heads,
        intermediate_size=model.mlp_dim,
        cross_attention_frequency=model.cross_every,
        encoder_hidden_size=model.context_width,
        use_qformer_text_input=model.text,
        max_position_embeddings=model.max_length,
        hidden_act=next(name for name, ours in ACTIVATIONS.items() if ours == model.act),
        layer_norm_eps=model.eps,
    )


def build_lavis(config: Mapping[str, Any], shapes: Shapes) -> QFormer:
    """The network whose sizes the arrays tell; heads, which none tells, are 64 wide but for config["heads"]."""
    known = {re.sub(*LAVIS_NAMES[0], name): shape for name, shape in shapes.items()}
    layer = "Qformer.bert.encoder.layer."
    numbers = {int(m[1]) for name in known if (m := re.match(r"Qformer\.bert\.encoder\.layer\.(\d+)\.", name))}
    crossed = sorted(i for i in numbers if f"{layer}{i}.crossattention.self.key.weight" in known)
    try:
        vocab, width = known["Qformer.bert.embeddings.word_embeddings.weight"]
        return QFormer(
            depth=len(numbers),
            width=width,
            heads=config.get("heads", width // 64),
            mlp_dim=known[f"{layer}0.intermediate_query.dense.weight"][0],
            num_queries=known["query_tokens"][1] if "query_tokens" in known else 0,
            cross_every=crossed[1] if len(crossed) > 1 else len(numbers),
            text=True,
            vocab=vocab,
            max_length=known["Qformer.bert.embeddings.position_embeddings.weight"][0],
            head="Qformer.cls.predictions.bias" in known,
            context_width=known[f"{layer}0.crossattention.self.key.weight"][1],
        )
    except KeyError as error:
        raise ConvertError(f"Q-Former: the checkpoint has no array {error}, from which a size is taken") from error


# --------------------------------------------------------------------------------------------------- inputs, outputs


def inputs(model: QFormer, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Features of two images, one with padding; queries where there are none, two texts where they are read."""
    given = dict(
        context=rng.standard_normal((2, 7, model.context_width)).astype(np.float32),
        context_mask=np.arange(7)[None] < np.array([[7], [4]]),
    )
    if not model.num_queries:
        given["queries"] = rng.standard_normal((2, 5, model.width)).astype(np.float32)
    if model.vocab is not None:
        given["tokens"] = rng.integers(0, model.vocab, (2, 6)).astype(np.int32)
        given["mask"] = np.arange(6)[None] < np.array([[3], [6]])
    return given


def compare(model, given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """States of the queries of Blip2QFormerModel, in its own precision."""
    import torch

    dtype = next(model.parameters()).dtype
    queries, context = (torch.from_numpy(np.asarray(given[name])).to(dtype) for name in ("queries", "context"))
    mask = torch.from_numpy(np.asarray(given["context_mask"])).long()
    with torch.no_grad():
        out = model(query_embeds=queries, encoder_hidden_states=context, encoder_attention_mask=mask)
    return dict(queries=out.last_hidden_state.numpy())


def outputs(result: QFormerOutput) -> dict[str, Any]:
    """The same name from the network's result."""
    return dict(queries=result.queries)


HF = Family(build_hf, hf_table, inputs, hf_config, "transformers:Blip2QFormerModel", compare, outputs)
LAVIS = Family(build_lavis, lavis_table, inputs)
