"""What computing in bfloat16 costs in accuracy: networks of every family, small, with random weights, against float32.

Parameters stay float32, as in training; activations are bfloat16, but for what the layers keep wider (statistics of
norms, softmax).  The errors grow with depth: these networks are 4 layers deep.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vgen import trees
from vgen.config import UserError
from vgen.convert import families


class Case(NamedTuple):
    """One network.  family: "vgen.convert.module:NAME", whose inputs and outputs are used.

    config: as of its config.json; or fields of `module`, "package.module:Class", where the layout has no config.
    method: of the linen module.  inputs: numpy Generator -> its arguments, where the method is not `__call__`.
    queries: factor on the kernels of queries: T5's attention has no 1 / sqrt(head size), its kernels have.
    """

    name: str
    family: str
    config: Mapping[str, Any]
    module: str = ""
    method: str = "__call__"
    inputs: Callable[[np.random.Generator], dict[str, np.ndarray]] | None = None
    queries: float = 1.0


def _normal(name: str, *shape: int) -> Callable[[np.random.Generator], dict[str, np.ndarray]]:
    return lambda rng: {name: rng.standard_normal(shape, np.float32)}


LAYERS = dict(hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=128)
IMAGES = dict(image_size=32, patch_size=8)
TEXT = LAYERS | dict(vocab_size=99, max_position_embeddings=16)
CONV = dict(block_out_channels=[32, 64], latent_channels=4, layers_per_block=2, norm_num_groups=8,
            down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2)  # fmt: skip
SAM = dict(
    vision_config=LAYERS | IMAGES | dict(mlp_dim=128, window_size=2, global_attn_indexes=[1, 3], output_channels=32,
                                         num_pos_feats=16),
    prompt_encoder_config=IMAGES | dict(hidden_size=32, mask_input_channels=16),
    mask_decoder_config=dict(hidden_size=32, num_attention_heads=4, mlp_dim=64, iou_head_hidden_dim=32),
)  # fmt: skip
UVIT = dict(
    hidden_size=64, in_channels=32, block_out_channels=32, block_num_heads=4, num_attention_heads=4,
    num_hidden_layers=4, intermediate_size=128, num_res_blocks=1, encoder_hidden_size=64, cond_embed_dim=64,
    vocab_size=33, codebook_size=32, micro_cond_encode_dim=8, micro_cond_embed_dim=40, sample_size=8,
)  # fmt: skip
T5 = dict(d_model=64, d_kv=16, d_ff=128, num_layers=4, num_heads=4, vocab_size=99, feed_forward_proj="gated-gelu")
MAE = IMAGES | dict(width=64, depth=4, heads=4, mlp_dim=128, decoder_width=32, decoder_depth=2, decoder_heads=4,
                    decoder_mlp_dim=64)  # fmt: skip
CASES = (
    Case("ViT", "vgen.convert.vit:HF_VIT", LAYERS | IMAGES),
    Case("CLIP", "vgen.convert.clip:HF_CLIP",
         dict(projection_dim=32, text_config=TEXT | dict(eos_token_id=98), vision_config=LAYERS | IMAGES)),
    Case("T5", "vgen.convert.t5:T5", T5, queries=0.25),
    Case("MAE", "vgen.convert.mae:AUTHORS", MAE, "vgen.models.mae:MAE"),
    Case("SAM", "vgen.convert.sam:HF", SAM),
    Case("DINOv2", "vgen.convert.dinov2:HF_DINOV2", LAYERS | IMAGES),
    Case("Q-Former", "vgen.convert.qformer:HF", LAYERS | dict(encoder_hidden_size=48)),
    Case("BLIP", "vgen.convert.blip:HF",
         dict(vision_config=LAYERS | IMAGES, text_config=TEXT | dict(encoder_hidden_size=64))),
    Case("VQ-GAN encoder", "vgen.convert.vqgan:DIFFUSERS_VQ", CONV, method="encode",
         inputs=_normal("images", 2, 16, 16, 3)),
    Case("VQ-GAN decoder", "vgen.convert.vqgan:DIFFUSERS_VQ", CONV, method="decode", inputs=_normal("z_q", 2, 8, 8, 4)),
    Case("KL autoencoder", "vgen.convert.autoencoder:DIFFUSERS_KL", CONV),
    Case("dVAE", "vgen.convert.dvae:DVAE_BOTH", dict(channels=32, num_codes=64, blocks=1), "vgen.models.dvae:DVAE"),
    Case("UVit", "vgen.convert.amused:UVIT", UVIT),
)  # fmt: skip


class Row(NamedTuple):
    """One output of one network: root mean square of the error over that of the values, and the dtype it came in."""

    name: str
    output: str
    error: float
    dtype: str


def table(only: str = "") -> Iterator[str]:
    """The lines of the table, each as soon as it is measured; UserError if no case's name matches `only`."""
    cases = [case for case in CASES if re.search(only, case.name)]
    if not cases:
        raise UserError(f"no case matches {only!r}; there are {', '.join(case.name for case in CASES)}")
    yield f"{'network':<16} {'output':<16} {'error':>9}  dtype"
    for case in cases:
        for row in measure(case):
            yield f"{row.name:<16} {row.output:<16} {row.error:9.1e}  {row.dtype}"


def measure(case: Case, seed: int = 0) -> list[Row]:
    """The errors of every floating-point output of a network computed in bfloat16, against itself in float32."""
    family, rng = families.get(case.family), np.random.default_rng(seed)
    model = families.resolve(case.module)(**case.config) if case.module else family.build(case.config, {})
    inputs = family.inputs(model, rng)
    shapes = jax.eval_shape(model.init, jax.random.key(0), **inputs)["params"]
    flat = {path: _drawn(path, leaf, rng) for path, leaf in trees.flatten(shapes).items()}
    params = trees.unflatten({path: x * np.float32(case.queries) if path.endswith("/q/kernel") else x
                              for path, x in flat.items()})  # fmt: skip
    given = inputs if case.inputs is None else case.inputs(rng)
    found = []
    for dtype in (jnp.float32, jnp.bfloat16):
        module = in_dtype(model, dtype)
        apply = jax.jit(lambda p, x, m=module: m.apply({"params": p}, **x, method=case.method))
        with jax.default_matmul_precision("highest"):
            result = apply(params, given)
        found.append({case.method: result} if case.inputs else dict(family.outputs(result)))
    wide, narrow = found
    return [
        Row(case.name, name, relative(narrow[name], value), str(narrow[name].dtype))
        for name, value in wide.items()
        if jnp.issubdtype(value.dtype, jnp.floating) and name != "mask"  # of MAE: numbers, but no computed ones
    ]


def in_dtype(module: nn.Module, dtype: Any) -> nn.Module:
    """A network, and the networks among its fields, with another dtype of computation."""
    fields = {
        name: in_dtype(value, dtype)
        for name in type(module).__dataclass_fields__
        if isinstance(value := getattr(module, name, None), nn.Module) and name != "parent"
    }
    if "dtype" in type(module).__dataclass_fields__:
        fields["dtype"] = dtype
    return module.clone(**fields)


def relative(got: Any, want: Any) -> float:
    got, want = (np.asarray(x, np.float64) for x in (got, want))
    return float(np.sqrt(np.square(got - want).mean() / np.square(want).mean()))


def _drawn(path: str, leaf: Any, rng: np.random.Generator) -> np.ndarray:
    """Random values that keep activations of size one: nothing is zero, as trained networks have it."""
    x = rng.standard_normal(leaf.shape).astype(np.float32)
    if len(leaf.shape) < 2 or path.endswith(("scale", "bias")):
        return x / 10 + path.endswith("scale")
    return x / np.float32(np.sqrt(np.prod(leaf.shape[leaf.ndim % 2 : -1]))) if path.endswith("kernel") else x / 4
