"""DiT in the authors' layout (DiT-XL-2-256x256.pt) and in diffusers'."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from vgen.convert.dinov2 import authors_mlp
from vgen.convert.family import Family
from vgen.convert.pieces import Shapes, conv, count, dense, pixels
from vgen.convert.rules import LINEAR, QKV, QKV_BIAS, ConvertError, Op, Rule, Table, chain
from vgen.models.dit import DiT, positions

HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}  # the published sizes: files without a config do not tell


def copies(number: int) -> Op:
    """An Op that reads `number` equal arrays as one, and writes it as often; ConvertError where they differ."""

    def forward(arrays):
        if not all(np.array_equal(arrays[0], other) for other in arrays[1:]):
            raise ConvertError("the copies of what embeds time and class differ; the network has one for all layers")
        return arrays[:1]

    return Op(forward, lambda arrays: arrays * number)


def heads(config: Mapping[str, Any], width: int) -> int:
    """num_heads of a config, or those of a published width; ConvertError for another width."""
    if "num_heads" not in config and width not in HEADS:
        raise ConvertError(f"width {width} is not one of the published ({', '.join(map(str, HEADS))}): give num_heads")
    return config.get("num_heads") or HEADS[width]


def authors_attention(src: str, dst: str) -> list[Rule]:
    """Self-attention of timm's vision transformers."""
    qkv = {leaf: tuple(f"{dst}/{part}/{leaf}" for part in "qkv") for leaf in ("kernel", "bias")}
    rules = [Rule(f"{src}.qkv.weight", qkv["kernel"], QKV), Rule(f"{src}.qkv.bias", qkv["bias"], QKV_BIAS)]
    return rules + dense(f"{src}.proj", f"{dst}/out")


def latents(module: Any, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Random latents and times for a DiT or a PixArt."""
    side = min(module.sample_size, 32)
    x = rng.standard_normal((2, side, side, module.in_channels)).astype(np.float32)
    return dict(x=x, t=np.array([rng.integers(1000), rng.integers(1000)], np.int32))


# ------------------------------------------------------------------------------------------------ the authors' layout


def _fixed_positions(module: DiT) -> Rule:
    """The bias of the patches, and the table of positions that the files hold and the network computes."""
    side = module.sample_size // module.patch_size
    table = positions((side, side), module.width, side)[None]

    def forward(arrays):
        bias, stored = arrays
        if stored.shape != table.shape or np.abs(np.asarray(stored, np.float32) - table).max() > 1e-2:
            raise ConvertError(f"pos_embed: not the fixed sin-cos positions of a {side} x {side} grid")
        return [bias]

    op = Op(forward, lambda a: [a[0], table.astype(a[0].dtype)])
    return Rule(("x_embedder.proj.bias", "pos_embed"), "patches/bias", op)


def authors_table(module: DiT) -> Table:
    """facebookresearch/DiT's state dicts."""
    layer = "blocks.{i}"
    rules = [
        conv("x_embedder.proj", "patches")[0],
        _fixed_positions(module),
        *dense("t_embedder.mlp.0", "time/fc1"),
        *dense("t_embedder.mlp.2", "time/fc2"),
        Rule("y_embedder.embedding_table.weight", "classes/embedding"),
        *authors_attention(f"{layer}.attn", "layers/attn"),
        *authors_mlp(f"{layer}.mlp", "layers/mlp"),
        *dense(f"{layer}.adaLN_modulation.1", "layers/mod"),
        *dense("final_layer.adaLN_modulation.1", "out_mod"),
        *dense("final_layer.linear", "out"),
    ]
    return Table(tuple(rules))


def _build_authors(config: Mapping[str, Any], shapes: Shapes) -> DiT:
    """config, which these files have not, may say num_heads."""
    width, in_channels, patch, _ = shapes["x_embedder.proj.weight"]
    return DiT(
        depth=count(shapes, "blocks.{}.attn.qkv.weight"),
        width=width,
        heads=heads(config, width),
        mlp_dim=shapes["blocks.0.mlp.fc1.weight"][0],
        patch_size=patch,
        in_channels=in_channels,
        out_channels=shapes["final_layer.linear.weight"][0] // patch**2,
        num_classes=shapes["y_embedder.embedding_table.weight"][0] - 1,
        sample_size=round(shapes["pos_embed"][1] ** 0.5) * patch,
    )


def _inputs(module: DiT, rng: np.random.Generator) -> dict[str, np.ndarray]:
    return dict(latents(module, rng), labels=np.array([rng.integers(module.num_classes), module.num_classes], np.int32))


def _outputs(result: Any) -> dict[str, Any]:
    return {"sample": result}


AUTHORS = Family(_build_authors, authors_table, _inputs, outputs=_outputs)


# --------------------------------------------------------------------------------------------------- diffusers' layout

_SIZES = dict(  # names in config.json -> fields, and diffusers' defaults
    num_layers=("depth", 28),
    num_attention_heads=("heads", 16),
    patch_size=("patch_size", 2),
    in_channels=("in_channels", 4),
    sample_size=("sample_size", 32),
)
_FIXED = dict(
    activation_fn="gelu-approximate",
    attention_bias=True,
    norm_elementwise_affine=False,
    attention_type="default",
    dropout=0.0,
)


def diffusers_fields(config: Mapping[str, Any], norm_type: str, **defaults: Any) -> dict[str, Any]:
    """The fields that DiT and PixArt share; ConvertError for what neither has.

    defaults: of names in config.json, where they are not DiT's.
    """
    expected = _FIXED | dict(norm_type=norm_type)
    wrong = {k: config[k] for k, v in expected.items() if config.get(k, v) != v}
    if wrong:
        expected = {k: expected[k] for k in wrong}
        raise ConvertError(f"{config.get('_class_name', 'transformer')}: got {wrong}, expected {expected}")
    fields = {field: config.get(name, defaults.get(name, usual)) for name, (field, usual) in _SIZES.items()}
    width = fields["heads"] * config.get("attention_head_dim", 72)
    out = config.get("out_channels", defaults.get("out_channels"))
    return dict(fields, width=width, mlp_dim=4 * width, out_channels=out or fields["in_channels"])


def diffusers_config(module: Any, name: str, norm_type: str) -> dict[str, Any]:
    """What the two networks' config.json have in common; ConvertError where diffusers cannot say it."""
    if module.mlp_dim not in (None, 4 * module.width):
        raise ConvertError(f"{name}: its MLPs are 4 x width = {4 * module.width} wide, mlp_dim is {module.mlp_dim}")
    sizes = {theirs: getattr(module, ours) for theirs, (ours, _) in _SIZES.items()}
    return dict(
        _class_name=name,
        **sizes,
        attention_head_dim=module.width // module.heads,
        out_channels=module.out_channels,
        norm_type=norm_type,
        norm_eps=1e-6,
        **_FIXED,
    )


def diffusers_attention(src: str, dst: str) -> list[Rule]:
    pairs = (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "out"))
    return [rule for theirs, ours in pairs for rule in dense(f"{src}.{theirs}", f"{dst}/{ours}")]


def diffusers_mlp(src: str, dst: str) -> list[Rule]:
    return dense(f"{src}.net.0.proj", f"{dst}/fc1") + dense(f"{src}.net.2", f"{dst}/fc2")


def diffusers_embedder(src: str, dst: str) -> list[Rule]:
    return dense(f"{src}.linear_1", f"{dst}/fc1") + dense(f"{src}.linear_2", f"{dst}/fc2")


def diffusers_table(module: DiT) -> Table:
    """DiTTransformer2DModel, which holds what embeds time and class once for every block."""
    layer, op = "transformer_blocks.{i}", copies(module.depth)

    def shared(name: str, dst: str, linear: bool = True) -> Rule:
        names = tuple(f"transformer_blocks.{i}.norm1.emb.{name}" for i in range(module.depth))
        return Rule(names, dst, chain(op, LINEAR) if linear else op)

    rules = [
        *conv("pos_embed.proj", "patches"),
        shared("class_embedder.embedding_table.weight", "classes/embedding", False),
        *diffusers_attention(f"{layer}.attn1", "layers/attn"),
        *diffusers_mlp(f"{layer}.ff", "layers/mlp"),
        *dense(f"{layer}.norm1.linear", "layers/mod"),
        *dense("proj_out_1", "out_mod"),
        *dense("proj_out_2", "out"),
    ]
    for i in (1, 2):
        rules.append(shared(f"timestep_embedder.linear_{i}.weight", f"time/fc{i}/kernel"))
        rules.append(shared(f"timestep_embedder.linear_{i}.bias", f"time/fc{i}/bias", False))
    return Table(tuple(rules), ignore=(r"pos_embed\.pos_embed",))


def build_diffusers(config: Mapping[str, Any], shapes: Shapes) -> DiT:
    # QUIRK: config.json says norm_eps 1e-5, which diffusers uses ahead of the MLPs; the authors trained with 1e-6
    # (facebookresearch/DiT, models.py), so it is not read (tested)
    return DiT(**diffusers_fields(config, "ada_norm_zero"), num_classes=config.get("num_embeds_ada_norm", 1000))


def config(module: DiT) -> dict[str, Any]:
    common = diffusers_config(module, "DiTTransformer2DModel", "ada_norm_zero")
    return dict(common, num_embeds_ada_norm=module.num_classes)


def as_authors(model: Any) -> Any:
    """A DiTTransformer2DModel that computes what the authors' network does.

    # QUIRK: diffusers' time embedding ends on 1/10000 itself, and its norms ahead of the MLPs have the config's epsilon
    """
    for block in model.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
        block.norm3.eps = 1e-6
    return model


def _reference(config: Mapping[str, Any]) -> Any:
    from diffusers import DiTTransformer2DModel

    return as_authors(DiTTransformer2DModel.from_config({k: v for k, v in config.items() if k != "_class_name"}))


def nhwc(sample: Any) -> np.ndarray:
    return sample.permute(0, 2, 3, 1).numpy()


def compare(model: Any, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    import torch

    x, t, labels = pixels(model, inputs["x"]), torch.from_numpy(inputs["t"]), torch.from_numpy(inputs["labels"]).long()
    with torch.no_grad():
        return {"sample": nhwc(model(x, timestep=t, class_labels=labels).sample)}


DIFFUSERS = Family(build_diffusers, diffusers_table, _inputs, config, _reference, compare, _outputs)


def by_norm(families: Mapping[str, Family], norm_type: Callable[[Any], str]) -> Family:
    """One Family of several, told apart by the norm_type of config.json, or of a module by `norm_type`."""

    def build(config: Mapping[str, Any], shapes: Shapes) -> Any:
        kind = config.get("norm_type")
        if kind not in families:
            raise ConvertError(f"Transformer2DModel: norm_type must be {' or '.join(families)}, got {kind!r}")
        return families[kind].build(config, shapes)

    def of(part: str) -> Callable[..., Any]:
        return lambda module, *args: getattr(families[norm_type(module)], part)(module, *args)

    return Family(build, of("table"), of("inputs"), of("config"), outputs=_outputs)
