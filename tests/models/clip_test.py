"""CLIP's networks against golden numbers of OpenAI's ResNet, FLIP and A-CLIP; torch's ResNet; published sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

from tests.convert import tables
from tests.convert.tables import quick  # noqa: F401  a fixture
from tests.golden import golden
from vgen.convert import rules
from vgen.convert.clip import OPENAI, ROW, openai_table
from vgen.convert.dinov2 import authors_layer, authors_mlp
from vgen.convert.pieces import FIRST, conv, norm
from vgen.convert.rules import COPY, Rule, Table
from vgen.layers.embed import sincos_2d
from vgen.models import clip
from vgen.models.clip import CLIP, ImageTower, TextTower, end_of_text
from vgen.models.clip_resnet import ResNet
from vgen.models.vit import ViT
from vgen.tasks.a_clip import class_attention

TOL = 1e-9
pytestmark = pytest.mark.usefixtures("quick")


def nchw(x):
    return np.asarray(x).transpose(0, 3, 1, 2)


def load(table, weights, module, *inputs):
    """The network's parameters, float64, from a golden file's weights by a table of rules."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    flat = {"/".join(p.key for p in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)}
    return tables.float64(unflatten_dict(rules.load(weights.__getitem__, weights, table, flat), sep="/"))


# ------------------------------------------------------------------------------------------------------------- ResNets


def tiny_resnet():
    text = TextTower(vocab=82, length=13, depth=2, width=48, heads=3, mlp_dim=192, features=20)
    return CLIP(ResNet((1, 2, 1, 1), 8, 20, image=96), text)


def test_resnet_golden(x64):
    g = golden.load("clip_rn")
    module, tokens = tiny_resnet(), g["inputs"]["text"]
    images = np.asarray(g["inputs"]["image"], np.float64).transpose(0, 2, 3, 1)
    params = load(openai_table(module), g["weights"], module, images, tokens)

    @jax.jit
    def run(params, images, tokens):
        def of(method, *args, **kwargs):
            return module.apply({"params": params}, *args, method=method, **kwargs)

        seen = dict(mutable=["intermediates"], capture_intermediates=lambda m, _: m.name in MAPS)
        image, maps = of("encode_image", images, **seen)
        maps = {name: maps["intermediates"]["visual"][name]["__call__"][0] for name in MAPS}
        return image.features, of("encode_text", tokens).features, of("__call__", images, tokens).logits, maps

    image, text, logits, maps = run(params, images, tokens)
    golden.check(g, "image_features", image, TOL)
    golden.check(g, "text_features", text, TOL)
    golden.check(g, "logits_per_image", logits, TOL)
    golden.check(g, "logits_per_text", logits.T, TOL)
    for ours, theirs in MAPS.items():
        golden.check(g, theirs, nchw(maps[ours]), TOL)


MAPS = {"stem": "stem", "layer1_0": "layer1", "layer4_0": "layer4"}


def torch_resnet(state, images, blocks, heads):
    """The tower by torch's functions, from a state dict in OpenAI's names; images NCHW."""
    import torch
    from torch.nn import functional as F

    def conv_norm(x, conv, norm, **kwargs):
        x = F.conv2d(x, state[conv + ".weight"], **kwargs)
        parts = (state[f"{norm}.{leaf}"] for leaf in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, *parts)

    x = images
    for i in (1, 2, 3):
        x = conv_norm(x, f"visual.conv{i}", f"visual.bn{i}", padding=1, stride=2 if i == 1 else 1).relu()
    x = F.avg_pool2d(x, 2)
    for stage, many in enumerate(blocks, 1):
        for j in range(many):
            at, stride = f"visual.layer{stage}.{j}", 2 if stage > 1 and j == 0 else 1
            y = conv_norm(x, f"{at}.conv1", f"{at}.bn1").relu()
            y = F.avg_pool2d(conv_norm(y, f"{at}.conv2", f"{at}.bn2", padding=1).relu(), stride)
            y = conv_norm(y, f"{at}.conv3", f"{at}.bn3")
            if j == 0:
                x = conv_norm(F.avg_pool2d(x, stride), f"{at}.downsample.0", f"{at}.downsample.1")
            x = (x + y).relu()
    x = x.flatten(2).permute(2, 0, 1)  # [places, b, c]
    x = torch.cat([x.mean(0, keepdim=True), x]) + state["visual.attnpool.positional_embedding"][:, None]
    p = {k.removeprefix("visual.attnpool."): v for k, v in state.items()}
    return F.multi_head_attention_forward(
        x[:1], x, x, x.shape[-1], heads, None, torch.cat([p[f"{k}_proj.bias"] for k in "qkv"]), None, None, False, 0.0,
        p["c_proj.weight"], p["c_proj.bias"], training=False, need_weights=False, use_separate_proj_weight=True,
        q_proj_weight=p["q_proj.weight"], k_proj_weight=p["k_proj.weight"], v_proj_weight=p["v_proj.weight"],
    )[0][0]  # fmt: skip


def test_resnet_and_its_gradients_against_torch(x64):
    torch = pytest.importorskip("torch")
    text = TextTower(vocab=9, length=5, depth=1, width=64, heads=1, mlp_dim=8, features=6)
    module = CLIP(ResNet((2, 1, 1, 2), 4, 6, 2, image=64), text)
    images = jnp.asarray(np.random.default_rng(0).standard_normal((2, 64, 64, 3)))
    params = tables.float64(tables.draw(module, images, jnp.zeros((1, 5), jnp.int32)))
    state = {k: torch.from_numpy(v.copy()) for k, v in tables.export(OPENAI, module, params).items()}
    buffers = ("running_mean", "running_var")
    for name, value in state.items():
        value.requires_grad_(name.startswith("visual") and not name.endswith(buffers))
    want = torch_resnet(state, torch.from_numpy(nchw(images).copy()), (2, 1, 1, 2), 2)
    weight = np.random.default_rng(1).standard_normal(want.shape)
    (want * torch.from_numpy(weight)).sum().backward()

    def loss(params):
        features = module.apply({"params": params}, images, method="encode_image").features
        return (features * weight).sum(), features

    grads, got = jax.jit(jax.grad(loss, has_aux=True))(params)
    assert tables.error(got, want.detach()) < 1e-12
    grads = tables.export(OPENAI, module, grads)
    scale = max(v.grad.abs().max() for v in state.values() if v.grad is not None)
    for name, value in state.items():
        if value.grad is None:
            assert not grads[name].any(), name  # statistics are buffers; the text tower is not in this loss
            continue
        size = scale if name.endswith("k_proj.bias") else value.grad.abs().max()  # softmax does not see those
        assert size > 0 and np.abs(grads[name] - value.grad.numpy()).max() / float(size) < 1e-10, name


def test_resnet_float32_and_image_size():
    g = golden.load("clip_rn")
    module = tiny_resnet()
    images, tokens = jnp.asarray(g["inputs"]["image"]).transpose(0, 2, 3, 1), jnp.asarray(g["inputs"]["text"])
    params = load(openai_table(module), g["weights"], module, images, tokens)
    params = jax.tree.map(lambda a: np.asarray(a, np.float32), params)
    got = jax.jit(lambda p, x: module.apply({"params": p}, x, method="encode_image").features)(params, images)
    golden.check(g, "image_features", got, 2e-5)
    with pytest.raises(ValueError, match="96 pixels"):
        jax.eval_shape(module.init, jax.random.key(0), images[:, :64, :64], tokens)


# -------------------------------------------------------------------------------------------------- where a text ends


def test_end_of_text():
    rows = jnp.array([[7, 3, 9, 9, 0], [9, 1, 2, 3, 9], [1, 2, 3, 4, 5]])
    assert end_of_text(rows).tolist() == [2, 0, 4]
    assert end_of_text(rows, 3).tolist() == [1, 3, 2]
    assert end_of_text(rows, 8).tolist() == [0, 0, 0]


def test_text_tower_pools_what_it_says():
    """A longer row of padding behind the end changes nothing; a causal text does not see what follows."""
    tower = TextTower(vocab=50, length=9, depth=2, width=16, heads=2, mlp_dim=8, features=None, eos=40)
    tokens = jnp.array([[48, 3, 40, 0, 0, 0, 0, 0, 0], [48, 3, 40, 49, 40, 1, 1, 1, 1]])
    params = tables.draw(tower, tokens)
    out = tower.apply({"params": params}, tokens)
    assert out.features is None and out.layers is None
    np.testing.assert_array_equal(out.pooled[0], out.pooled[1])
    np.testing.assert_array_equal(out.pooled, out.states[:, 2])
    largest = tower.clone(eos=None).apply({"params": params}, tokens).pooled
    np.testing.assert_array_equal(largest, out.states[np.arange(2), [0, 3]])
    with pytest.raises(ValueError, match="'end' or 'first'"):
        tower.clone(pool="last").apply({"params": params}, tokens)
    with pytest.raises(ValueError, match="10 tokens for a table of 9"):
        tower.apply({"params": params}, jnp.zeros((1, 10), int))


# --------------------------------------------------------------------------------------------------------------- FLIP


def flip_table():
    """facebookresearch/flip's Flax parameters; the stored sines are taken as they are, computed in float32 once."""
    found = []
    for tower, to in (("img_encoder", "visual/vit"), ("txt_encoder", "text")):
        src = f"params/{tower}/Transformer"
        norms = {f"{src}/encoder_norm": f"{to}/norm"}
        block = f"{src}/encoderblock_0{{i}}"
        norms |= {f"{block}/LayerNorm_0": f"{to}/layers/attn_norm", f"{block}/LayerNorm_1": f"{to}/layers/mlp_norm"}
        layers = {f"{block}/MlpBlock_0/Dense_{i}": f"{to}/layers/mlp/fc{i + 1}" for i in (0, 1)}
        attn = f"{block}/MultiHeadDotProductAttention_0"
        names = dict(query="q", key="k", value="v", out="out")
        layers |= {f"{attn}/{theirs}": f"{to}/layers/attn/{ours}" for theirs, ours in names.items()}
        found += [(f"{a}/{leaf}", f"{b}/{leaf}") for a, b in norms.items() for leaf in ("scale", "bias")]
        found += [(f"{a}/{leaf}", f"{b}/{leaf}") for a, b in layers.items() for leaf in ("kernel", "bias")]
    image, text = "params/img_encoder", "params/txt_encoder"
    found += [(f"{image}/embedding/{leaf}", f"visual/vit/patch_embed/{leaf}") for leaf in ("kernel", "bias")]
    found += [
        ("params/img_mlp1/kernel", "visual/projection/kernel"),
        ("params/txt_mlp1/kernel", "text/projection/kernel"),
    ]
    found += [(f"{text}/token_embedding/embedding", "text/embed/embedding")]
    firsts = {f"{image}/cls": "visual/vit/cls", f"{text}/posembed_encoder/pos_embedding": "text/positions/table"}
    firsts |= {f"{image}/posembed_encoder/pos_embedding": "visual/vit/positions/table"}
    firsts |= {"params/logit_scale": "logit_scale"}
    table = [Rule(a, b, COPY) for a, b in found] + [Rule(a, b, FIRST) for a, b in firsts.items()]
    return Table(tuple(table))


def test_flip_golden(x64):
    """The same towers with fixed positions, mean pooling, a text that is not causal, and patches left out."""
    g = golden.load("flip")
    common = dict(act="gelu_tanh", eps=1e-6)
    vit = ViT(width=48, depth=3, heads=6, mlp_dim=80, patch_size=8, image_size=40, pool="mean", **common)
    text = TextTower(
        width=36, depth=2, heads=4, mlp_dim=60, vocab=90, length=12, features=20, causal=False, pool="first", **common
    )
    module = CLIP(ImageTower(vit, 20), text)
    images, tokens = np.asarray(g["inputs"]["image"], np.float64), g["inputs"]["txt"]
    params = load(flip_table(), g["weights"], module, images, tokens)
    fixed = np.concatenate([np.zeros((1, 48)), sincos_2d(5, 5, 48)])
    np.testing.assert_allclose(params["visual"]["vit"]["positions"]["table"], fixed, atol=1e-7)
    order = np.argsort(g["inputs"]["noise"], axis=1)  # the authors sort their tokens so, the 12 first are kept

    def loss(image, words, params):
        logits = np.exp(np.clip(params["logit_scale"], 0, np.log(100))) * clip.unit(image) @ clip.unit(words).T
        return -(jax.nn.log_softmax(logits, 1) + jax.nn.log_softmax(logits, 0)).diagonal().mean() / 2

    @jax.jit
    def run(params, images, tokens, order):
        def of(method, *args, **kwargs):
            return module.apply({"params": params}, *args, method=method, **kwargs)

        full, kept = (of("encode_image", images, keep=order[:, :many], states=True) for many in (25, 12))
        return full, kept, of("encode_text", tokens)

    full, kept, words = run(params, images, tokens, order)
    golden.check(g, "img_tokens", full.states, TOL)
    golden.check(g, "img_block0", full.layers[0], TOL)
    golden.check(g, "txt_tokens", words.states, TOL)
    # the authors divide by the length plus 1e-8
    golden.check(g, "z_img", clip.unit(full.features), 1e-7)
    golden.check(g, "z_txt", clip.unit(words.features), 1e-7)
    golden.check(g, "loss_eval", loss(full.features, words.features, params), 1e-7)
    golden.check(g, "loss_train", loss(kept.features, words.features, params), 1e-7)


# -------------------------------------------------------------------------------------------------------------- A-CLIP


def aclip():
    """(the golden file, its image tower, parameters, images)."""
    g = golden.load("aclip_vision")
    vit = ViT(width=36, depth=3, heads=3, mlp_dim=144, patch_size=8, image_size=40)
    block = "blocks.{i}"
    table = Table((
        Rule("cls_token", "cls", FIRST), Rule("pos_embed", "positions/table", FIRST), *norm("norm", "norm"),
        *conv("patch_embed.proj", "patch_embed"), *authors_layer(block, "layers"),
        *authors_mlp(f"{block}.mlp", "layers/mlp"),
    ))  # fmt: skip
    images = np.asarray(g["inputs"]["x"], np.float64).transpose(0, 2, 3, 1)
    return g, vit, load(table, g["weights"], vit, images), images


def test_aclip_golden(x64):
    """The image tower of A-CLIP: patches left out, and the attention of the class token that chooses them."""
    g, vit, params, images = aclip()
    keep = np.argsort(g["inputs"]["mask"], axis=1, kind="stable")[:, :12]

    @jax.jit
    def run(params, images, keep):
        masked = vit.apply({"params": params}, images, keep=keep, states=True)
        full = vit.apply({"params": params}, images).tokens
        return masked.tokens, masked.states, full, class_attention(vit, params, images)

    masked, states, full, (pooled, attention) = run(params, images, keep)
    # the authors' sort is not stable: their tokens are the same ones in another order
    block0, want = np.asarray(states[0]), g["mid"]["block0"]
    order = np.abs(want[:, :, None] - block0[:, None]).sum(-1).argmin(-1)[..., None]
    golden.check(g, "block0", np.take_along_axis(block0, order, 1), TOL)
    golden.check(g, "masked", np.take_along_axis(np.asarray(masked), order, 1), TOL)
    golden.check(g, "full", full, TOL)
    golden.check(g, "cls_attention", attention, TOL)
    np.testing.assert_allclose(pooled, full[:, 0], rtol=1e-12)


# ----------------------------------------------------------------------------------------------------- published sizes

SIZES = {  # all, image tower, text tower
    "ViT-B/32": (151_277_313, 87_849_216, 63_428_096),
    "ViT-B/16": (149_620_737, 86_192_640, 63_428_096),
    "ViT-L/14": (427_616_513, 303_966_208, 123_650_304),
    "ViT-L/14@336px": (427_944_193, 304_293_888, 123_650_304),
    "ViT-H/14": (986_109_441, 632_076_800, 354_032_640),
    "ViT-bigG/14": (2_539_567_105, 1_844_907_264, 694_659_840),
    "RN50": (102_007_137, 38_316_896, 63_690_240),
    "RN101": (119_688_033, 56_259_936, 63_428_096),
    "RN50x4": (178_300_601, 87_137_080, 91_163_520),
}


@pytest.mark.parametrize("name", SIZES)
def test_published_sizes(name):
    module = clip.published(name)
    size = module.visual.image if isinstance(module.visual, ResNet) else module.visual.vit.image_size
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    params = jax.eval_shape(module.init, jax.random.key(0), images, jax.ShapeDtypeStruct((1, 77), jnp.int32))["params"]

    def count(tree):  # running statistics are buffers, not parameters
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return sum(leaf.size for path, leaf in leaves if not path or path[-1].key not in ("mean", "var"))

    assert (count(params), count(params["visual"]), count(params["text"])) == SIZES[name]


def test_unknown_name():
    with pytest.raises(ValueError, match="ViT-B/32, .*RN50x64, got 'ViT-S/8'"):
        clip.published("ViT-S/8")
    assert ROW.forward([np.zeros(3)])[0].shape == (1, 3)
