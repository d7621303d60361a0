"""Parameter names of the reference tokenizers, translated to vgen's, for the golden tests.

Rules are (regular expression, replacement); the first that matches a name entirely wins, an unmatched name raises.
"""

import re

import flax.traverse_util
import numpy as np

TAMING = (  # CompVis/taming-transformers VQModel, and the open-muse port of MaskGIT's tokenizer
    (r"(encoder|decoder)\.(down|up)\.(\d+)\.(block|attn)\.(\d+)\.(\w+)\.(\w+)", r"\1/\2_\3/\4_\5/\6/\7"),
    (r"encoder\.down\.(\d+)\.downsample\.conv\.(\w+)", r"encoder/downsample_\1/conv/\2"),
    (r"decoder\.up\.(\d+)\.upsample[._]conv\.(\w+)", r"decoder/upsample_\1/conv/\2"),
    (r"(encoder|decoder)\.mid\.(block|attn)_1\.(\w+)\.(\w+)", r"\1/mid/\2_0/\3/\4"),
    (r"(encoder|decoder)\.mid\.block_2\.(\w+)\.(\w+)", r"\1/mid/block_1/\2/\3"),
    (r"(encoder|decoder)\.mid\.(\d+)\.(\w+)\.(\w+)", r"\1/mid/block_\2/\3/\4"),
    (r"(encoder|decoder)\.(\w+)\.(\w+)", r"\1/\2/\3"),
    (r"quantize\.embedding\.weight", r"quantizer/codebook"),
    (r"(quant_conv|post_quant_conv)\.(\w+)", r"\1/\2"),
)


def _apply(rules, name):
    for pattern, replacement in rules:
        if match := re.fullmatch(pattern, name):
            return match.expand(replacement)
    raise KeyError(f"no rule for parameter {name}")


def _nest(flat):
    return flax.traverse_util.unflatten_dict(flat, sep="/")


def taming(weights):
    """State dict of a taming VQGAN (or open-muse's tokenizer) -> parameters of `vgen.models.vqgan.VQGAN`."""
    flat = {}
    for name, value in weights.items():
        name = _apply(TAMING, name).replace("/nin_shortcut/", "/shortcut/").replace("/proj_out/", "/out/")
        if name.endswith("/weight"):
            name = name.removesuffix("weight") + ("scale" if value.ndim == 1 else "kernel")
        if value.ndim == 4:
            value = value.transpose(2, 3, 1, 0)  # [out, in, h, w] -> [h, w, in, out]
            value = value[0, 0] if "/attn_" in name else value  # 1x1 convolutions of attention are dense here
        flat[name] = value
    return _nest(flat)


def maskgit(weights, *, levels, blocks, conv_downsample=False):
    """Flax parameters of MaskGIT's VQVAE, named by order of creation -> parameters of VQGAN(layout="maskgit")."""
    down = [f"down_{i}/block_{j}" for i in range(levels) for j in range(blocks)]
    up = [f"up_{i}/block_{j}" for i in reversed(range(levels)) for j in range(blocks)]
    mid = [f"mid/block_{j}" for j in range(blocks)]
    strided = [f"downsample_{i}/conv" for i in range(levels - 1)] if conv_downsample else []
    upsample = [f"upsample_{i}/conv" for i in reversed(range(1, levels))]
    order = {
        ("encoder", "ResBlock"): down + mid,
        ("decoder", "ResBlock"): mid + up,
        ("encoder", "Conv"): ["conv_in", *strided, "conv_out"],
        ("decoder", "Conv"): ["conv_in", *upsample, "conv_out"],
        ("encoder", "GroupNorm"): ["norm_out"],
        ("decoder", "GroupNorm"): ["norm_out"],
    }
    inner = {"Conv_0": "conv1", "Conv_1": "conv2", "Conv_2": "shortcut", "GroupNorm_0": "norm1", "GroupNorm_1": "norm2"}
    flat = {}
    for name, value in weights.items():
        half, *path = name.removeprefix("params/").split("/")
        if half == "quantizer":
            flat["quantizer/codebook"] = value
            continue
        kind, index = path[0].split("_")
        path = [inner.get(p, p) for p in path[1:]]
        flat["/".join([half, order[half, kind][int(index)], *path])] = value
    return _nest(flat)


def discriminator(weights):
    """State dict of taming's NLayerDiscriminator (three layers) -> parameters of `NLayerDiscriminator`."""
    convs = {f"main.{m}": f"conv_{i}" for i, m in enumerate((0, 2, 5, 8, 11))}
    norms = {f"main.{m}": f"norm_{i}" for i, m in enumerate((3, 6, 9), 1)}
    leaves = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}
    flat = {}
    for name, value in weights.items():
        prefix, leaf = name.rsplit(".", 1)
        if prefix in norms:
            flat[f"{norms[prefix]}/{leaves[leaf]}"] = value
        elif leaf == "weight":
            flat[f"{convs[prefix]}/kernel"] = value.transpose(2, 3, 1, 0)
        else:
            flat[f"{convs[prefix]}/{leaf}"] = value
    return _nest(flat)


def float64(tree):
    """The same tree in float64."""
    return {k: float64(v) if isinstance(v, dict) else np.asarray(v, np.float64) for k, v in tree.items()}
