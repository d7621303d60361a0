"""DiT: the authors' numbers, parity with diffusers once it computes them, published sizes, init, seams, errors."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from tests.convert import tables
from tests.convert.tables import quick  # noqa: F401  a fixture
from tests.golden import golden
from vgen.convert.dit import AUTHORS, DIFFUSERS, as_authors
from vgen.models.dit import BASE, LARGE, SMALL, XLARGE, Compress, DiT
from vgen.types import AttentionControl

TOL = 1e-9
TINY = dict(depth=2, width=24, heads=2, num_classes=5, sample_size=8)
CONFIGS = {
    "learned variance": dict(num_attention_heads=2, attention_head_dim=8, num_layers=3, out_channels=8, sample_size=8),
    "patches of 4": dict(
        num_attention_heads=3, attention_head_dim=4, num_layers=2, in_channels=3, sample_size=16, patch_size=4
    ),
}


def nchw(x):
    return np.asarray(x).transpose(0, 3, 1, 2)


@pytest.fixture
def exact_time(monkeypatch):
    """diffusers' sinusoids in float64, where its code rounds frequencies and times to float32."""
    import torch
    from diffusers.models import embeddings

    def exact(timesteps, embedding_dim, flip_sin_to_cos=False, downscale_freq_shift=1, scale=1, max_period=10000):
        half = embedding_dim // 2
        powers = torch.arange(half, dtype=torch.float64) / (half - downscale_freq_shift)
        angles = scale * timesteps[:, None].double() * torch.exp(-math.log(max_period) * powers)
        halves = [torch.sin(angles), torch.cos(angles)]
        return torch.cat(halves[::-1] if flip_sin_to_cos else halves, -1)

    monkeypatch.setattr(embeddings, "get_timestep_embedding", exact)


def oracle(name):
    """diffusers' network, its copies of the embedders equal as in the published files."""
    from diffusers import DiTTransformer2DModel

    model = tables.randomize(DiTTransformer2DModel(num_embeds_ada_norm=10, norm_eps=1e-6, **CONFIGS[name]))
    first, *others = [block.norm1.emb for block in model.transformer_blocks]
    for other in others:
        other.load_state_dict(first.state_dict())
    return model


def loaded(model):
    """(module, params) of diffusers' network."""
    return tables.load(DIFFUSERS, tables.state_of(model), dict(model.config))


def test_golden(x64, quick):  # noqa: F811
    g = golden.load("dit")
    net, params = tables.load(AUTHORS, g["weights"], dict(num_heads=6))
    assert net == DiT(depth=3, width=48, heads=6, mlp_dim=192, num_classes=11, sample_size=12)
    given = g["inputs"]
    x, t, labels = given["x"].transpose(0, 2, 3, 1).astype(np.float64), given["t"], given["y"]
    x, t, labels = np.concatenate([x, x]), np.concatenate([t, t]), np.concatenate([labels, np.full(2, 11)])

    @jax.jit
    def run(params):
        names = ("patches", "time", "layers")
        catch = dict(mutable=["intermediates"], capture_intermediates=lambda m, _: m.name in names)
        y, mid = net.apply({"params": params}, x, t, labels, **catch)
        return y, {name: mid["intermediates"][name]["__call__"][0] for name in names}

    y, mid = run(tables.float64(params))
    golden.check(g, "patch_embed", mid["patches"][:2], TOL)
    golden.check(g, "t_emb", mid["time"][:2], TOL)
    golden.check(g, "block0", mid["layers"][0][:2], TOL)
    golden.check(g, "before_head", mid["layers"][-1][:2], TOL)
    golden.check(g, "y", nchw(y[:2]), TOL)
    y = np.asarray(y)  # the authors guide the first three channels
    eps = y[2:, ..., :3] + 2.5 * (y[:2, ..., :3] - y[2:, ..., :3])
    golden.check(g, "cfg", nchw(np.concatenate([np.concatenate([eps] * 2), y[..., 3:]], -1)), TOL)


@pytest.mark.parametrize("name", CONFIGS)
def test_matches_diffusers(x64, quick, exact_time, name):  # noqa: F811
    model = as_authors(oracle(name))
    net, params = loaded(model)
    inputs = DIFFUSERS.inputs(net, np.random.default_rng(3))
    inputs["x"] = inputs["x"].astype(np.float64)
    run = jax.jit(lambda params, **inputs: net.apply({"params": params}, **inputs))
    y = run(tables.float64(params), **inputs)
    assert tables.error(y, DIFFUSERS.compare(model, inputs)["sample"]) <= TOL
    for key in inputs:  # none is without effect
        moved = dict(inputs, **{key: inputs[key][::-1].copy()})
        assert np.abs(np.asarray(run(tables.float64(params), **moved)) - y).max() > 1e-3, key
    larger = dict(inputs, x=np.random.default_rng(4).standard_normal((2, 24, 24, net.in_channels)))
    want = DIFFUSERS.compare(model, larger)["sample"]  # positions of another grid
    assert tables.error(run(tables.float64(params), **larger), want) <= TOL


def test_float32_and_what_diffusers_has_otherwise():
    # QUIRK: frequencies and an epsilon of diffusers are not the authors'
    model = oracle("learned variance")
    net, params = loaded(model)
    inputs = DIFFUSERS.inputs(net, np.random.default_rng(3))
    y = jax.jit(net.apply)({"params": params}, **inputs)
    assert y.dtype == np.float32
    theirs = DIFFUSERS.compare(model, inputs)["sample"]
    assert tables.error(y, theirs) > 1e-4
    # the reference is in float64 but for its sinusoids
    assert tables.error(y, DIFFUSERS.compare(as_authors(model), inputs)["sample"]) <= 2e-5


@pytest.mark.parametrize(
    "size, patch_size, published",
    [  # the authors count the fixed positions too, 256 x width of them
        (SMALL, 2, 32_963_360 - 256 * 384),
        (BASE, 2, 130_512_416 - 256 * 768),
        (LARGE, 2, 458_102_816 - 256 * 1024),
        (XLARGE, 2, 675_129_632 - 256 * 1152),
        (SMALL, 8, None),
    ],
)
def test_published_sizes(size, patch_size, published):
    net = DiT(patch_size=patch_size, **size)
    shapes = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 32, 32, 4)), jnp.zeros(1), jnp.zeros(1, int))
    total = sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))
    # a patch of p has 4 p p inputs and 8 p p outputs
    small = 32_963_360 - 256 * 384 + (64 - 4) * (4 * 384 + 8 * 384 + 8)
    assert total == (published or small)


def test_begins_as_the_identity_and_each_parameter_is_trained(quick):  # noqa: F811
    net, rng = DiT(**TINY), np.random.default_rng(0)
    x, t, labels = jnp.asarray(rng.standard_normal((2, 8, 8, 4)), jnp.float32), jnp.array([3, 700]), jnp.array([0, 5])
    params = jax.jit(net.init)(jax.random.key(0), x, t, labels)["params"]
    y, mid = jax.jit(lambda p: net.apply({"params": p}, x, t, labels, capture_intermediates=True))(params)
    assert y.shape == (2, 8, 8, 8) and not y.any()
    outs = mid["intermediates"]["layers"]["__call__"][0]
    np.testing.assert_array_equal(outs[0], outs[1])
    params = tables.draw(net, x, t, labels)

    def loss(params, **fields):
        return (DiT(**TINY, **fields).apply({"params": params}, x, t, labels, train=True) ** 2).mean()

    grads = jax.jit(jax.grad(loss))(params)
    biases = {"layers/attn/k/bias"}  # the same for all keys, it leaves the softmax as it is
    for path, g in flatten_dict(grads, sep="/").items():
        assert path in biases or np.abs(g).max() > 1e-6, path
    again = jax.jit(lambda p: jax.grad(loss)(p, remat="full", unroll=2))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), grads, again)
    run = jax.jit(
        lambda params, dtype: net.clone(dtype=dtype).apply({"params": params}, x, t, labels), static_argnums=1
    )
    half = run(params, jnp.bfloat16)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half, run(params, None), atol=0.1)


def test_compression_begins_as_the_mean():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 15, 6)), jnp.float32)
    layer = Compress(2)
    params = layer.init(jax.random.key(0), x, (5, 3))
    got = layer.apply(params, x, (5, 3))
    mean = np.asarray(x).reshape(2, 5, 3, 6)[:, :4, :2].reshape(2, 2, 2, 1, 2, 6).mean((2, 4)).reshape(2, 2, 6)
    want = (mean - mean.mean(-1, keepdims=True)) / np.sqrt(mean.var(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_control_sees_every_layer(quick):  # noqa: F811
    net, x = DiT(**TINY), jnp.ones((1, 8, 8, 4))
    given = x, jnp.ones(1), jnp.zeros(1, int)
    params, sites = tables.draw(net, *given), []

    def probs(probs, site, step):
        sites.append(site)
        return jnp.where(site.layer == 1, jnp.eye(probs.shape[-1]), probs)

    run = jax.jit(lambda params, control: net.apply({"params": params}, *given, control=control), static_argnums=1)
    y = run(params, AttentionControl(probs=probs))
    assert {(site.kind, site.name) for site in sites} == {("self", "layers/attn")}
    assert np.abs(y - run(params, None)).max() > 1e-4


def test_bad_input():
    net, t, labels = DiT(**TINY), jnp.ones(1), jnp.zeros(1, int)
    with pytest.raises(ValueError, match=r"in_channels is 4, got latents \(1, 8, 8, 3\)"):
        net.init(jax.random.key(0), jnp.ones((1, 8, 8, 3)), t, labels)
    with pytest.raises(ValueError, match=r"no multiple of patches \(2, 2\)"):
        net.init(jax.random.key(0), jnp.ones((1, 7, 8, 4)), t, labels)
