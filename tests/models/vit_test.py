"""The patch transformer: published sizes, FLIP's tower, pooling, resized positions, stochastic depth, training."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import unflatten_dict

from tests.convert import tables
from tests.convert.tables import quick  # noqa: F401  a fixture
from tests.golden import golden
from vgen.convert import rules
from vgen.convert.vit import BIG_VISION
from vgen.layers.embed import GridPositions, PatchEmbed, resize_matrix
from vgen.layers.transformer import Block, drop_path_rates, norm_layer
from vgen.models import vit
from vgen.types import AttentionControl

pytestmark = pytest.mark.usefixtures("quick")

TINY = dict(width=16, depth=3, heads=2, mlp_dim=24, patch_size=4, image_size=12)
IMAGES = np.random.default_rng(0).standard_normal((2, 12, 12, 3))


def make(**fields):
    model = vit.ViT(**(TINY | fields))
    return model, {"params": tables.draw(model, jnp.zeros((1, 12, 12, 3)))}


@pytest.mark.parametrize(
    "sizes, patch, count",
    [
        (vit.TINY, 16, 5_717_416), (vit.SMALL, 16, 22_050_664), (vit.BASE, 16, 86_567_656), (vit.BASE, 32, 88_224_232),
        (vit.LARGE, 16, 304_326_632), (vit.HUGE, 14, 632_045_800),
    ],
)  # fmt: skip
def test_published_sizes(sizes, patch, count):
    """Ti/16, S/16, B/16, B/32, L/16 and H/14 with 1000 classes at 224 pixels."""
    assert parameters(vit.ViT(**sizes, patch_size=patch, num_classes=1000)) == count


def test_published_sizes_of_the_giants():
    """g/14 and G/14, 1011M and 1843M without a head."""
    assert parameters(vit.ViT(**vit.G_SMALL, patch_size=14)) == 1_011_202_432
    assert parameters(vit.ViT(**vit.G_BIG, patch_size=14)) == 1_842_775_680


def parameters(model):
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)))["params"]
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def test_flip_golden(x64):
    """FLIP's image tower: all patches in the order of the noise, class token without a position, mean of all tokens."""
    g = golden.load("flip")
    sizes = dict(width=48, depth=3, heads=6, mlp_dim=80, patch_size=8, image_size=40)
    model = vit.ViT(**sizes, act="gelu_tanh", cls_position=False, pool="mean")
    prefix = "params/img_encoder/"
    files = {k.removeprefix(prefix).replace("block_0", "block_"): v for k, v in g["weights"].items() if prefix in k}
    files["pos_embedding"] = files.pop("posembed_encoder/pos_embedding")[:, 1:]  # sin-cos, in the authors' float32
    for name in files:
        if any(f"/{part}/" in name for part in ("query", "key", "value")):
            files[name] = files[name].reshape(*files[name].shape[:-1], 6, 8)
        elif name.endswith("/out/kernel"):
            files[name] = files[name].reshape(6, 8, 48)
    shapes = tables.shapes_of(BIG_VISION, model)
    params = unflatten_dict(rules.load(files.__getitem__, files, BIG_VISION.table(model), shapes), sep="/")
    order = jnp.argsort(jnp.asarray(g["inputs"]["noise"]), axis=1)
    run = jax.jit(lambda params, images: model.apply({"params": params}, images, keep=order, states=True))
    out = run(tables.float64(params), jnp.asarray(g["inputs"]["image"], jnp.float64))
    golden.check(g, "img_block0", out.states[0], 1e-10)
    golden.check(g, "img_tokens", out.tokens, 1e-10)
    z = out.pooled @ np.asarray(g["weights"]["params/img_mlp1/kernel"], np.float64)
    golden.check(g, "z_img", z / np.linalg.norm(z, axis=-1, keepdims=True), 1e-8)  # the authors add 1e-8 to the norm


def test_map_pooling_against_siglip(x64):
    import torch

    siglip = pytest.importorskip("transformers.models.siglip.modeling_siglip")
    config = siglip.SiglipVisionConfig(
        hidden_size=16, intermediate_size=24, num_attention_heads=2, hidden_act="gelu_pytorch_tanh"
    )
    head = tables.randomize(siglip.SiglipMultiheadAttentionPoolingHead(config))
    w = {k: v.numpy() for k, v in head.state_dict().items()}
    qkv = dict(zip("qkv", w["attention.in_proj_weight"].reshape(3, 16, 16), strict=True))
    bias = dict(zip("qkv", w["attention.in_proj_bias"].reshape(3, 16), strict=True))
    attn = {k: dict(kernel=qkv[k].T, bias=bias[k]) for k in "qkv"}
    attn["out"] = dict(kernel=w["attention.out_proj.weight"].T, bias=w["attention.out_proj.bias"])
    mlp = {f: dict(kernel=w[f"mlp.{f}.weight"].T, bias=w[f"mlp.{f}.bias"]) for f in ("fc1", "fc2")}
    norm = dict(scale=w["layernorm.weight"], bias=w["layernorm.bias"])
    params = dict(probe=w["probe"][0, 0], attn=attn, mlp=mlp, mlp_norm=norm)
    x = np.random.default_rng(1).standard_normal((3, 7, 16))
    got = jax.jit(vit.MapPool(2, 24, "gelu_tanh").apply)({"params": params}, x)
    with torch.no_grad():
        want = head(torch.from_numpy(x)).numpy()
    assert tables.error(got, want) < 1e-12


def test_pooling_and_heads(x64):
    """What `pooled` is, from `tokens`, for every kind; norm places; representation and head."""
    model, params = make(num_registers=2)
    kinds = [dict(pool=pool) for pool in ("cls", "gap", "mean", "none", "cls_gap")]
    kinds += [dict(pool="gap", final_norm="none"), dict(pool="gap", final_norm="pooled")]
    run = jax.jit(lambda params, images: [model.clone(**kind).apply(params, images) for kind in kinds])
    (cls, *others), (bare, late) = (lambda outs: (outs[:5], outs[5:]))(run(params, IMAGES))
    tokens = cls.tokens
    assert tokens.shape == (2, 1 + 2 + 9, 16)
    patches = tokens[:, 3:]
    want = [tokens[:, 0], patches.mean(1), tokens.mean(1), patches, np.hstack([tokens[:, 0], patches.mean(1)])]
    for out, value in zip([cls, *others], want, strict=True):
        np.testing.assert_allclose(out.pooled, value, atol=1e-12)
    norm = norm_layer("layer", model.eps).bind({"params": params["params"]["norm"]})
    np.testing.assert_allclose(norm(bare.tokens), tokens, atol=1e-12)
    np.testing.assert_allclose(late.tokens, bare.tokens, atol=1e-12)
    np.testing.assert_allclose(late.pooled, norm(bare.pooled), atol=1e-12)
    headed, params = make(representation=5, num_classes=7, head_bias=-10.0)
    out = jax.jit(headed.apply)(params, IMAGES)
    p = params["params"]
    hidden = np.tanh(out.tokens[:, 0] @ p["pre_logits"]["kernel"] + p["pre_logits"]["bias"])
    np.testing.assert_allclose(out.pooled, hidden, atol=1e-12)
    np.testing.assert_allclose(out.logits, hidden @ p["head"]["kernel"] + p["head"]["bias"], atol=1e-12)
    fresh = jax.jit(headed.init)(jax.random.key(0), IMAGES)["params"]["head"]
    assert (fresh["kernel"] == 0).all() and (fresh["bias"] == -10).all()


def test_keeping_patches_is_permuting_and_leaving_out(x64):
    model, params = make()
    every = jnp.asarray([[4, 0, 8, 1, 2, 3, 5, 6, 7], [8, 7, 6, 5, 4, 3, 2, 1, 0]])
    run = jax.jit(lambda images, keep: model.apply(params, images, keep=keep))
    whole = jax.jit(model.apply)(params, IMAGES).tokens
    permuted = run(IMAGES, every).tokens
    for i in range(2):
        np.testing.assert_allclose(permuted[i, 1:], whole[i, 1:][every[i]], atol=1e-12)
    some = every[:, :4]
    kept = run(IMAGES, some).tokens
    assert kept.shape == (2, 5, 16)
    hidden = np.ones((2, 9), bool)
    np.put_along_axis(hidden, np.asarray(some), False, axis=1)
    noise = np.repeat(np.repeat(hidden.reshape(2, 3, 3), 4, 1), 4, 2)[..., None]
    np.testing.assert_allclose(run(IMAGES + noise, some).tokens, kept, atol=1e-12)
    assert not np.allclose(run(IMAGES + ~noise, some).tokens, kept)


def test_states_and_control(x64):
    model, params = make(posemb="sincos_endpoint")
    out = jax.jit(lambda params, images: model.apply(params, images, states=True))(params, IMAGES)
    assert out.states.shape == (3, 2, 10, 16)
    norm = norm_layer("layer", model.eps).bind({"params": params["params"]["norm"]})
    np.testing.assert_allclose(norm(out.states[-1]), out.tokens, atol=1e-12)
    seen = AttentionControl(probs=lambda probs, site, step: jnp.ones_like(probs) / probs.shape[-1])
    flat = jax.jit(lambda params, images: model.apply(params, images, control=seen))(params, IMAGES)
    assert not np.allclose(flat.tokens, out.tokens)


def test_patches_are_a_strided_convolution(x64):
    import flax.linen as nn

    embed = PatchEmbed((2, 4), 5)
    params = {"params": tables.draw(embed, jnp.zeros((1, 4, 8, 3)))}
    x = np.random.default_rng(1).standard_normal((2, 6, 8, 3))
    want = nn.Conv(5, (2, 4), (2, 4), padding="VALID").apply(params, x)
    np.testing.assert_allclose(embed.apply(params, jnp.asarray(x)), want.reshape(2, 6, 5), atol=1e-12)
    with pytest.raises(ValueError, match="no multiple of patches"):
        embed.apply(params, jnp.zeros((1, 5, 8, 3)))


@pytest.mark.parametrize("old, new", [(4, 4), (7, 3), (5, 16), (16, 37), (37, 16), (3, 1), (1, 4)])
def test_resize_matrix(old, new):
    """Against scipy's zoom, and torch's bicubic interpolation with and without antialiasing and offset."""
    import torch
    from scipy import ndimage

    table = np.random.default_rng(0).standard_normal((old, 6))
    if old > 1:
        zoomed = ndimage.zoom(table, (new / old, 1), order=1)
        np.testing.assert_allclose(resize_matrix(old, new, "bilinear") @ table, zoomed, atol=1e-12)
    x = torch.from_numpy(table.T[None, None])  # [1, 1, 6, old]
    for method, offset in (("bicubic", 0.0), ("bicubic", 0.1), ("bicubic_antialias", 0.0)):
        size = dict(scale_factor=(1.0, (new + offset) / old)) if offset else dict(size=(6, new))
        kwargs = dict(mode="bicubic", antialias=method.endswith("antialias"))
        want = torch.nn.functional.interpolate(x, **size, **kwargs)[0, 0].T.numpy()
        np.testing.assert_allclose(resize_matrix(old, new, method, offset) @ table, want, atol=1e-12)
    np.testing.assert_allclose(resize_matrix(old, new, "bilinear").sum(1), 1)


def test_positions_are_resized_to_the_image(x64):
    positions = GridPositions((3, 2), 4, cls=True, resize="bicubic")
    table = np.random.default_rng(0).standard_normal((7, 4))
    run = lambda *grid: positions.apply({"params": {"table": table}}, *grid)
    cls, native = run(3, 2)
    np.testing.assert_array_equal(np.concatenate([cls[None], native]), table)
    cls, rows = run(2, 5)
    assert rows.shape == (10, 4)
    np.testing.assert_array_equal(cls, table[0])
    down, across = resize_matrix(3, 2, "bicubic"), resize_matrix(2, 5, "bicubic")
    want = np.einsum("ir,jc,rcw->ijw", down, across, table[1:].reshape(3, 2, 4)).reshape(10, 4)
    np.testing.assert_allclose(rows, want, atol=1e-12)


def test_parameters_for_larger_pictures_are_the_network_resized_on_the_fly(x64):
    """The same features as of the network that resizes its positions in every call; the head is left out."""
    small = vit.ViT(patch_size=2, image_size=6, width=8, depth=1, heads=2, mlp_dim=12, num_classes=3)
    images = jnp.asarray(np.random.default_rng(0).standard_normal((2, 10, 8, 3)))
    params = tables.float64(small.init(jax.random.key(0), images[:, :6, :6])["params"])
    made = vit.resized(params, (3, 3), (5, 4))
    assert "head" not in made and made["positions"]["table"].shape == (21, 8)
    large = small.clone(image_size=(10, 8), num_classes=None)
    want = small.apply({"params": params}, images).tokens
    np.testing.assert_allclose(large.apply({"params": made}, images).tokens, want, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="the table has 10 positions, expected 16"):
        vit.resized(params, (4, 4), (5, 5))
    base = {"positions": {"table": np.zeros((1 + 14 * 14, 4), np.float32)}}
    assert vit.for_384_pixels(base)["positions"]["table"].shape == (1 + 24 * 24, 4)


@pytest.mark.parametrize("drop_path", [0.25, (0.0, 0.25, 0.5)])
def test_stochastic_depth(drop_path):
    """Each branch of a sample is there or not, as often as it should; what is left is scaled so that the mean stays."""
    block = Block(2, 8, layer_scale=0.5, drop_path=drop_path)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 3, 4)), jnp.float32).repeat(4000, 0)
    params = {"params": tables.draw(block, x)}
    rates = (drop_path,) * 3 if isinstance(drop_path, float) else drop_path
    full = jax.jit(block.apply)(params, x[:1])
    run = jax.jit(lambda layer, key: block.apply(params, x, layer=layer, train=True, rngs={"dropout": key}))
    for layer, rate in enumerate(rates):
        y = run(layer, jax.random.key(layer))
        unchanged = np.isclose(y, x).all((1, 2)).mean()
        assert abs(unchanged - rate**2) < 4 * np.sqrt(rate**2 * (1 - rate**2) / 4000) + 1e-6
        outcomes = np.unique(np.round(np.asarray(y[:, 0, 0]), 4))
        assert len(outcomes) == (4 if rate else 1)
        if not rate:
            np.testing.assert_allclose(y[:1], full, atol=1e-6)
    alone = {"params": params["params"] | dict(mlp_scale=np.zeros(4, np.float32))}  # attention's branch alone
    full = jax.jit(block.apply)(alone, x[:1])
    y = jax.jit(lambda key: block.apply(alone, x, layer=1, train=True, rngs={"dropout": key}))(jax.random.key(9))
    changed = ~np.isclose(y, x).all((1, 2))
    np.testing.assert_allclose(y[changed] - x[:1], ((full - x[:1]) / 0.75).repeat(changed.sum(), 0), atol=1e-6)
    assert drop_path_rates(0.3, 4) == pytest.approx((0, 0.1, 0.2, 0.3)) and drop_path_rates(0.0, 4) == ()


def test_layer_scale_multiplies_each_branch(x64):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 4)))
    scaled = Block(2, 8, layer_scale=1e-5)
    params = tables.draw(scaled, x)
    plain = {k: v for k, v in params.items() if not k.endswith("_scale")}
    ones = plain | dict(attn_scale=np.ones(4), mlp_scale=np.ones(4))
    want = jax.jit(Block(2, 8).apply)({"params": plain}, x)
    run = jax.jit(lambda params: scaled.apply({"params": params}, x))
    np.testing.assert_allclose(run(ones), want, atol=1e-12)
    attn_only = ones | dict(mlp_scale=np.zeros(4))
    without = run(attn_only)
    half = run(attn_only | dict(attn_scale=np.full(4, 0.5)))
    np.testing.assert_allclose(half - x, (without - x) / 2, atol=1e-12)
    assert np.allclose(jax.jit(scaled.init)(jax.random.key(0), x)["params"]["mlp_scale"], 1e-5)


def test_it_trains_with_everything_on():
    """Dropout, stochastic depth, remat and bfloat16: the same batch is learnt, and evaluation is not random."""
    fields = dict(num_classes=4, dropout=0.1, drop_path=0.1, remat="full", dtype=jnp.bfloat16, layer_scale=0.1)
    model = vit.ViT(**(TINY | fields | dict(pool="gap", cls_token=False, num_registers=1, token_std=0.02)))
    images = jnp.asarray(np.random.default_rng(0).standard_normal((8, 12, 12, 3)), jnp.float32)
    labels = np.arange(8) % 4
    params = jax.jit(model.init)(jax.random.key(0), images)
    optimizer = optax.adam(3e-3)

    def loss(params, key):
        logits = model.apply(params, images, train=True, rngs={"dropout": key}).logits.astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @jax.jit
    def step(carry, key):
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params, key)
        updates, state = optimizer.update(grads, state)
        return (optax.apply_updates(params, updates), state), value

    carry = (params, optimizer.init(params))
    values = []
    for i in range(60):
        carry, value = step(carry, jax.random.key(i))
        values.append(float(value))
    assert values[0] == pytest.approx(np.log(4), abs=1e-3) and np.mean(values[-5:]) < 0.3
    assert all(a.dtype == jnp.float32 for a in jax.tree.leaves(carry[0]))
    out = jax.jit(model.apply)(carry[0], images).logits
    assert out.dtype == jnp.bfloat16 and (out.argmax(-1) == labels).all()


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(pool="max"), "pool must be"),
        (dict(posemb="rotary"), "posemb must be"),
        (dict(final_norm="first"), "final_norm must be"),
        (dict(resize="nearest", image_size=16), "method must be"),
        (dict(patch_size=5), "no multiple of patches"),
    ],
)
def test_errors_name_what_is_accepted(fields, message):
    with pytest.raises(ValueError, match=message):
        model = vit.ViT(**(TINY | fields))
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 12, 12, 3)))
