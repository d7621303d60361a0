"""Blocks against other implementations, and `stack` against a plain loop."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.golden import golden
from vgen.layers.attention import Past
from vgen.layers.embed import Positions, Positions2D, RelativeBias2D, relative_buckets, sincos_2d
from vgen.layers.transformer import MLP, Block, activation, modulate, norm_layer, stack
from vgen.types import AttentionControl


class Tower(nn.Module):
    """A stack with everything a model passes through it."""

    depth: int = 3
    remat: str = "none"
    unroll: int = 1

    @nn.compact
    def __call__(self, x, context, **kwargs):
        block = Block(heads=2, mlp_dim=12, cross=True, name="layers")
        return stack(block, x, depth=self.depth, remat=self.remat, unroll=self.unroll, context=context, **kwargs)


@pytest.fixture(scope="module")
def tower():
    with jax.enable_x64(True):
        keys = jax.random.split(jax.random.key(0), 3)
        x, context = jax.random.normal(keys[0], (2, 5, 8)), jax.random.normal(keys[1], (2, 3, 8))
        return jax.jit(Tower().init)(keys[2], x, context), x, context


def test_stack_is_a_loop_over_sliced_parameters(x64, tower):
    params, x, context = tower
    assert params["params"]["layers"]["attn"]["q"]["kernel"].shape == (3, 8, 8)
    assert len(np.unique(np.asarray(params["params"]["layers"]["attn"]["q"]["kernel"])[:, 0, 0])) == 3
    want, states = x, []
    block = jax.jit(lambda p, x: Block(heads=2, mlp_dim=12, cross=True).apply(p, x, context=context))
    for i in range(3):
        want = block({"params": jax.tree.map(lambda a: a[i], params["params"]["layers"])}, want)
        states.append(want)
    got, collected = jax.jit(lambda p: Tower().apply(p, x, context, collect=True))(params)
    np.testing.assert_allclose(got, want, atol=1e-12)
    np.testing.assert_allclose(collected, np.stack(states), atol=1e-12)


def test_remat_and_unroll_change_nothing(x64, tower):
    params, x, context = tower

    def grads(module):
        def loss(params, context):
            return (module.apply(params, x, context, constrain=lambda x: x * 1) ** 2).sum()

        return jax.jit(jax.grad(loss, (0, 1)))(params, context)

    plain = grads(Tower())
    for remat, unroll in (("full", 1), ("dots", 3)):
        got = grads(Tower(remat=remat, unroll=unroll))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9), got, plain)


def test_constrain_is_called_between_layers(x64, tower):
    params, x, context = tower
    halved = jax.jit(lambda p: Tower().apply(p, x, context, constrain=lambda x: x * 0.0))(params)
    assert (halved == 0).all()


def test_control_can_choose_a_traced_layer(x64, tower):
    params, x, context = tower

    def cut(at):
        def probs(probs, site, step):
            return jnp.where((site.layer == at) & (site.kind == "cross"), 0.0, probs)

        return Tower().apply(params, x, context, control=AttentionControl(probs=probs))

    outs = jax.jit(jax.vmap(cut))(jnp.array([-1, 0, 1, 2]))
    np.testing.assert_allclose(outs[0], jax.jit(lambda: Tower().apply(params, x, context))(), atol=1e-12)
    assert all(np.abs(outs[i] - outs[j]).max() > 1e-3 for i in range(4) for j in range(i))


def test_dropped_context_is_self_attention(x64, tower):
    params, x, context = tower
    params = {"params": jax.tree.map(lambda a: a[0], params["params"]["layers"])}
    block = Block(heads=2, mlp_dim=12, cross=True)
    mask = jnp.asarray([[1, 1, 0], [1, 0, 0]], bool)
    run = jax.jit(lambda context, keep: block.apply(params, x, context=context, context_mask=mask, keep_context=keep))
    mixed = run(context, jnp.asarray([True, False]))
    plain = jax.jit(lambda: block.apply(params, x, context=context, context_mask=mask))()
    np.testing.assert_allclose(mixed[0], plain[0], atol=1e-12)
    assert np.abs(mixed[1] - plain[1]).max() > 1e-3
    np.testing.assert_array_equal(run(context + 7.0, jnp.asarray([False, False])), run(context, jnp.zeros(2, bool)))
    # by hand: self-attention, then the cross-attention's weights over the block's own normed tokens
    self_only = {"params": {k: v for k, v in params["params"].items() if not k.startswith("cross")}}
    twice = {
        "params": {
            "attn": params["params"]["cross"],
            "attn_norm": params["params"]["cross_norm"],
            "mlp": params["params"]["mlp"],
            "mlp_norm": params["params"]["mlp_norm"],
        }
    }
    silent = jax.tree.map(jnp.zeros_like, self_only["params"]["mlp"])
    h = Block(heads=2, mlp_dim=12).apply({"params": {**self_only["params"], "mlp": silent}}, x)
    want = Block(heads=2, mlp_dim=12).apply(twice, h)
    np.testing.assert_allclose(mixed[1], want[1], atol=1e-12)


def torch_layer(norm_first):
    import torch

    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(
        12, 3, 20, dropout=0.0, activation="gelu", layer_norm_eps=1e-3, batch_first=True, norm_first=norm_first
    )
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return layer.double().eval()


@pytest.mark.parametrize("order", ["pre", "post"])
def test_block_against_torch(x64, order):
    import torch

    layer = torch_layer(order == "pre")
    w = {k: v.detach().numpy() for k, v in layer.state_dict().items()}
    dense = lambda kernel, bias: {"kernel": kernel.T, "bias": bias}
    qkv = zip("qkv", np.split(w["self_attn.in_proj_weight"], 3), np.split(w["self_attn.in_proj_bias"], 3), strict=True)
    params = {
        "attn": {name: dense(kernel, bias) for name, kernel, bias in qkv}
        | {"out": dense(w["self_attn.out_proj.weight"], w["self_attn.out_proj.bias"])},
        "attn_norm": {"scale": w["norm1.weight"], "bias": w["norm1.bias"]},
        "mlp": {f"fc{i}": dense(w[f"linear{i}.weight"], w[f"linear{i}.bias"]) for i in (1, 2)},
        "mlp_norm": {"scale": w["norm2.weight"], "bias": w["norm2.bias"]},
    }
    x = np.random.default_rng(0).standard_normal((2, 5, 12))
    mask = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], bool)
    want = layer(torch.from_numpy(x), src_key_padding_mask=torch.from_numpy(~mask)).detach().numpy()
    block = Block(heads=3, mlp_dim=20, order=order, eps=1e-3, act="gelu")
    got = jax.jit(lambda x: block.apply({"params": params}, x, mask=jnp.asarray(mask)))(x)
    np.testing.assert_allclose(np.asarray(got)[mask], want[mask], rtol=1e-9, atol=1e-12)


def test_sandwich_block_against_open_muse(x64):
    """The whole network of open-muse (MaskGitTransformer) out of vgen's layers."""
    gold = golden.load("muse_openmuse_transformer")
    w = {k: np.asarray(v, np.float64) for k, v in gold["weights"].items()}
    kernel = lambda name: {"kernel": w[name + ".weight"].T}
    scale = lambda name: {"scale": w[name + ".weight"]}

    def layer(i):
        at = f"transformer_layers.{i}."
        attn = lambda name: {
            k: kernel(at + f"{name}.{long}")
            for k, long in (("q", "query"), ("k", "key"), ("v", "value"), ("out", "out"))
        }
        mlp = {k: kernel(at + f"ffn.{v}") for k, v in (("gate", "wi_0"), ("fc1", "wi_1"), ("fc2", "wo"))}
        return {
            "attn": attn("attention"),
            "cross": attn("crossattention"),
            "attn_norm": scale(at + "attn_layer_norm"),
            "attn_post": scale(at + "post_attn_layer_norm"),
            "cross_norm": scale(at + "crossattn_layer_norm"),
            "cross_post": scale(at + "post_crossattn_layer_norm"),
            "mlp": mlp | {"mid_norm": scale(at + "ffn.mid_mlp_layer_norm")},
            "mlp_norm": scale(at + "ffn.pre_mlp_layer_norm"),
        }

    class Network(nn.Module):
        @nn.compact
        def __call__(self, ids, text):
            norm = lambda name: norm_layer("layer_nobias", 1e-6, name)
            dense = lambda width, name: nn.Dense(width, use_bias=False, name=name)
            x = nn.Embed(50, 36, name="word")(ids) + self.param("position", nn.initializers.zeros, (17, 36))
            text = norm("text_norm")(dense(36, "text")(text))
            block = Block(
                heads=3,
                mlp_dim=60,
                cross=True,
                order="sandwich",
                norm="layer_nobias",
                act="gelu",
                gated=True,
                bias=False,
                name="layers",
            )
            x, states = stack(block, x, depth=2, context=text, collect=True)
            x = norm("head_norm")(activation("gelu")(dense(36, "head")(norm("norm")(x))))
            return dense(50, "logits")(x), states

    params = {
        "word": {"embedding": w["embed.word_embeddings.weight"]},
        "position": w["embed.position_embeddings.weight"],
        "text": kernel("encoder_proj"),
        "text_norm": scale("encoder_proj_layer_norm"),
        "norm": scale("encoder_layer_norm"),
        "head": kernel("mlm_layer.mlm_dense"),
        "head_norm": scale("mlm_layer.mlm_ln"),
        "logits": kernel("mlm_layer.to_logits"),
        "layers": jax.tree.map(lambda *a: np.stack(a), layer(0), layer(1)),
    }
    ids, text = gold["inputs"]["ids"], np.asarray(gold["inputs"]["enc"], np.float64)
    logits, states = jax.jit(Network().apply)({"params": params}, ids, text)
    golden.check(gold, "layer0", states[0], dtype="float64", tol=1e-9)
    golden.check(gold, "y", logits, dtype="float64", tol=1e-9)


@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "quick_gelu", "relu", "silu"])
def test_activations_against_torch(x64, name):
    import torch
    from torch.nn import functional as F

    x = np.linspace(-6, 6, 101)
    t = torch.from_numpy(x)
    want = {
        "gelu": F.gelu,
        "gelu_tanh": lambda t: F.gelu(t, approximate="tanh"),
        "relu": F.relu,
        "silu": F.silu,
        "quick_gelu": lambda t: t * torch.sigmoid(1.702 * t),
    }[name](t)
    np.testing.assert_allclose(activation(name)(jnp.asarray(x)), want.numpy(), atol=1e-13)


def test_dropout_needs_train():
    block = Block(heads=2, mlp_dim=8, dropout=0.5)
    x = jax.random.normal(jax.random.key(0), (1, 4, 8))
    params = jax.jit(block.init)(jax.random.key(1), x)
    run = jax.jit(lambda key: block.apply(params, x, train=True, rngs={"dropout": key}))
    assert not jnp.array_equal(run(jax.random.key(2)), run(jax.random.key(3)))
    assert jnp.array_equal(jax.jit(block.apply)(params, x), jax.jit(block.apply)(params, x))


def test_bad_arguments():
    x, key = jnp.ones((1, 4, 8)), jax.random.key(0)
    with pytest.raises(ValueError, match="'pre', 'post' or 'sandwich', got 'middle'"):
        Block(heads=2, mlp_dim=8, order="middle").init(key, x)
    with pytest.raises(ValueError, match="cross is True but context is missing"):
        Block(heads=2, mlp_dim=8, cross=True).init(key, x)
    with pytest.raises(ValueError, match="got 'batch'"):
        Block(heads=2, mlp_dim=8, norm="batch").init(key, x)
    with pytest.raises(ValueError, match="got 'swish'"):
        MLP(4, act="swish").init(key, x)
    with pytest.raises(ValueError, match="got 'half'"):
        Tower(remat="half").init(key, x, x)
    with pytest.raises(ValueError, match=r"grid \(2, 3\) has 6 places, got 4 tokens"):
        Positions2D((2, 3)).init(key, x)
    with pytest.raises(ValueError, match="4 tokens for a table of 3"):
        Positions(3).init(key, x)


def test_positions_2d_tell_rows_from_columns():
    module = Positions2D((2, 3))
    params = {"params": {"row": jnp.asarray([[0.0], [10.0]]), "column": jnp.asarray([[0.0], [1.0], [2.0]])}}
    np.testing.assert_array_equal(module.apply(params, jnp.zeros((1, 6, 1)))[0, :, 0], [0, 1, 2, 10, 11, 12])


def test_relative_bias_starts_as_a_convolution():
    rows, columns, heads = 3, 4, 5
    module = RelativeBias2D(heads, (rows, columns))
    params = module.init(jax.random.key(0))["params"]
    bias = np.asarray(module.apply({"params": params}))[0].reshape(heads, rows, columns, rows, columns)
    places = [np.unravel_index(bias[h, 1, 1].argmax(), (rows, columns)) for h in range(heads)]
    assert set(places[:4]) == {(0, 1), (2, 1), (1, 0), (1, 2)}
    assert abs(places[4][0] - 1) == abs(places[4][1] - 1) == 1 and (bias.max(), bias.min()) == (0, -9)
    # of offsets alone: one number for equal ones, a free one for each
    random = jax.random.normal(jax.random.key(1), params["table"].shape)
    bias = np.asarray(module.apply({"params": {"table": random}}))[0].reshape(heads, rows, columns, rows, columns)
    np.testing.assert_array_equal(bias[:, 0, 0, 1, 2], bias[:, 1, 1, 2, 3])
    assert len(np.unique(bias)) == random.size


def test_relative_bias_of_a_block_is_its_bias(x64):
    x = jax.random.normal(jax.random.key(0), (2, 6, 8), jnp.float64)
    block = Block(2, 16, relative=(2, 3), param_dtype=jnp.float64)
    params = dict(block.init(jax.random.key(1), x)["params"])
    table = {"table": jax.random.normal(jax.random.key(2), (2, 3, 5), jnp.float64)}
    plain = {name: value for name, value in params.items() if name != "attn_bias"}
    bias = RelativeBias2D(2, (2, 3)).apply({"params": table})
    want = Block(2, 16).apply({"params": plain}, x, bias=bias)
    np.testing.assert_allclose(block.apply({"params": plain | {"attn_bias": table}}, x), want, rtol=1e-12)
    both = block.apply({"params": plain | {"attn_bias": table}}, x, bias=bias)
    np.testing.assert_allclose(both, Block(2, 16).apply({"params": plain}, x, bias=2 * bias), rtol=1e-12)


@pytest.mark.parametrize("endpoint, last", [(False, 10_000 ** (-7 / 8)), (True, 1e-4)])
def test_sincos_against_its_formula(endpoint, last):
    table = sincos_2d(3, 5, 32, endpoint=endpoint)
    place = 2 * 5 + 4  # row 2, column 4
    np.testing.assert_allclose(table[place, [0, 8, 16, 24]], [np.sin(4), np.cos(4), np.sin(2), np.cos(2)])
    np.testing.assert_allclose(table[place, [7, 31]], [np.sin(4 * last), np.cos(2 * last)])


@pytest.mark.parametrize("bidirectional", [True, False])
def test_relative_buckets_against_transformers(bidirectional):
    import torch
    from transformers.models.t5.modeling_t5 import T5Attention

    distance = torch.arange(-700, 701)[None]
    for buckets, furthest in ((32, 128), (32, 20), (16, 64)):
        want = T5Attention._relative_position_bucket(distance, bidirectional, buckets, furthest).numpy()[0]
        ours = relative_buckets(701, 1401, buckets, furthest, bidirectional)
        np.testing.assert_array_equal(ours[700], want)


def test_modulate_scales_and_shifts():
    x, cond = jax.random.normal(jax.random.key(0), (2, 3, 4, 5)), jax.random.normal(jax.random.key(1), (2, 6))

    class Whole(nn.Module):
        @nn.compact
        def __call__(self, x, cond):
            return modulate(x, cond, name="mod")

    params = Whole().init(jax.random.key(2), x, cond)["params"]["mod"]
    params["bias"] = jnp.arange(10.0)
    scale, shift = np.split(np.asarray(nn.silu(cond)) @ np.asarray(params["kernel"]) + np.arange(10.0), 2, axis=1)
    want = np.asarray(x) * (1 + scale[:, None, None]) + shift[:, None, None]
    np.testing.assert_allclose(Whole().apply({"params": {"mod": params}}, x, cond), want, atol=1e-5)


def test_condition_of_a_block():
    """Every branch gets it; an MLP's norm of its own kind; and only where a norm stands ahead of its branch."""
    x, cond = jnp.ones((1, 3, 8)), jnp.ones((1, 4))
    block = Block(2, 16, cross=True, norm="rms", mlp_norm="layer")
    made = jax.eval_shape(lambda: block.init(jax.random.key(0), x, cond=cond, context=x))["params"]
    assert {name for name in made if name.endswith("_mod")} == {"attn_mod", "cross_mod", "mlp_mod"}
    assert set(made["mlp_norm"]) == {"scale", "bias"} and set(made["cross_norm"]) == {"scale"}
    with pytest.raises(ValueError, match="cond needs order 'pre', got 'post'"):
        Block(2, 16, order="post").init(jax.random.key(0), x, cond=cond)


@pytest.mark.parametrize("blocks, unroll, remat", [((1,) * 6, 1, "none"), ((3, 1, 2), 3, "full")])
def test_tokens_may_come_in_blocks(x64, blocks, unroll, remat):
    """With what was seen before in the cache, which is longer than need be, they are those of one causal pass."""
    kwargs = dict(heads=2, mlp_dim=12, qk_norm="rms")

    class Causal(nn.Module):
        @nn.compact
        def __call__(self, x, **more):
            return stack(Block(**kwargs, name="layers"), x, depth=3, unroll=unroll, remat=remat, causal=True, **more)

    x = jax.random.normal(jax.random.key(0), (2, 6, 8))
    params = jax.jit(Causal().init)(jax.random.key(1), x)
    assert set(params) == {"params"}
    want = jax.jit(Causal().apply)(params, x)
    run = jax.jit(lambda v, x, place: Causal().apply(v, x, past=Past(place, 9), mutable=["cache"]))
    cache, place, got = {}, 0, []
    for count in blocks:
        y, cache = run(params | cache, x[:, place : place + count], place)
        got, place = [*got, y], place + count
    assert jax.tree.map(jnp.shape, cache) == {
        "cache": {"layers": {"attn": dict.fromkeys(("keys", "values"), (3, 2, 9, 2, 4))}}
    }
    np.testing.assert_allclose(np.concatenate(got, 1), want, atol=1e-13)


def test_a_layer_may_have_its_own_mask(x64):
    """mask as a function of the traced layer, against the masks given to single blocks."""
    masks = jax.random.bernoulli(jax.random.key(2), 0.6, (3, 1, 1, 5, 5))

    class Masked(nn.Module):
        @nn.compact
        def __call__(self, x):
            return stack(Block(heads=2, mlp_dim=12, name="layers"), x, depth=3, mask=lambda layer: masks[layer])

    x = jax.random.normal(jax.random.key(0), (2, 5, 8))
    params = jax.jit(Masked().init)(jax.random.key(1), x)
    want, block = x, Block(heads=2, mlp_dim=12)
    for i in range(3):
        own = {"params": jax.tree.map(lambda a, i=i: a[i], params["params"]["layers"])}
        want = jax.jit(block.apply)(own, want, mask=masks[i])
    np.testing.assert_allclose(jax.jit(Masked().apply)(params, x), want, atol=1e-13)


@pytest.mark.parametrize(
    "fields, given, words",
    [
        (dict(relative=(2, 2)), {}, "relative positions"),
        (dict(only_cross=True, cross=True), dict(context=jnp.zeros((1, 3, 8))), "of self-attention"),
        (dict(axes=(2, 2, 1)), {}, "of self-attention"),
    ],
)
def test_what_has_no_past(fields, given, words):
    block, x = Block(heads=2, mlp_dim=12, **fields), jnp.zeros((1, 4, 8))
    with pytest.raises(ValueError, match=words):
        jax.eval_shape(lambda: block.init(jax.random.key(0), x, past=Past(0, 4), **given))
