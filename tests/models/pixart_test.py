"""PixArt: the authors' numbers, parity with diffusers, text masks, compressed layers, published sizes, errors."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from tests.convert import tables
from tests.convert.tables import quick  # noqa: F401  a fixture
from tests.golden import golden
from tests.models.dit_test import exact_time, nchw  # noqa: F401  a fixture
from vgen.convert.pixart import AUTHORS, DIFFUSERS
from vgen.models import pixart
from vgen.models.dit import DiT, DiTBlock
from vgen.models.pixart import PixArt, from_dit
from vgen.types import AttentionControl

TOL = 1e-9
TINY = dict(depth=3, width=24, heads=2, context_width=10, sample_size=8, null_tokens=7)
CONFIGS = {
    "sizes as conditions": dict(sample_size=16, use_additional_conditions=True, interpolation_scale=2),
    "patches of 4": dict(sample_size=8, patch_size=4, in_channels=3, out_channels=3, num_layers=3),
}


def oracle(name):
    from diffusers import PixArtTransformer2DModel

    fields = dict(num_attention_heads=2, attention_head_dim=12, num_layers=2, cross_attention_dim=24)
    return tables.randomize(PixArtTransformer2DModel(caption_channels=20, **(fields | CONFIGS[name])))


def draw_inputs(net, rng=None):
    rng = rng or np.random.default_rng(3)
    return {k: v.astype(np.float64) if v.dtype == np.float32 else v for k, v in DIFFUSERS.inputs(net, rng).items()}


@pytest.mark.parametrize("case, fields", [
    ("pixart_alpha", dict(depth=3, sample_size=12)),
    ("pixart_sigma", dict(depth=2, sample_size=12, interpolation=2.0)),
    ("pixart_sigma_ms", dict(depth=2, sample_size=8)),
])  # fmt: skip
def test_golden(x64, quick, case, fields):  # noqa: F811
    g = golden.load(case)
    config = dict(num_heads=4) | {k: v for k, v in fields.items() if k == "interpolation"}
    net, params = tables.load(AUTHORS, g["weights"], config)
    assert net == PixArt(width=48, heads=4, mlp_dim=192, context_width=20, null_tokens=7, **fields)
    given = g["inputs"]
    x, context = given["x"].transpose(0, 2, 3, 1).astype(np.float64), given["y"][:, 0].astype(np.float64)

    @jax.jit
    def run(params):
        names = ("patches", "time", "mod", "caption", "layers")
        catch = dict(mutable=["intermediates"], capture_intermediates=lambda m, _: m.name in names)
        cond = dict(context=context, context_mask=given["mask"])
        y, mid = net.apply({"params": params}, x, given["t"], **cond, **catch)
        return y, {name: mid["intermediates"][name]["__call__"][0] for name in names}

    y, mid = run(tables.float64(params))
    # positions of a multi-scale network are not rounded to float32 in the reference
    tol = 1e-7 if case.endswith("_ms") else TOL
    golden.check(g, "patch_embed", mid["patches"], TOL)
    golden.check(g, "t_emb", mid["time"], TOL)
    golden.check(g, "t_block", mid["mod"], TOL)
    golden.check(g, "caption", mid["caption"][:, None], TOL)
    golden.check(g, "block0", mid["layers"][0], tol)
    golden.check(g, "y", nchw(y), tol)


@pytest.mark.parametrize("name", CONFIGS)
def test_matches_diffusers(x64, quick, exact_time, name):  # noqa: F811
    model = oracle(name)
    net, params = tables.load(DIFFUSERS, tables.state_of(model), dict(model.config))
    params, inputs = tables.float64(params), draw_inputs(net)
    run = jax.jit(lambda params, **inputs: net.apply({"params": params}, **inputs))
    y = run(params, **inputs)
    assert tables.error(y, DIFFUSERS.compare(model, inputs)["sample"]) <= TOL
    for key in inputs:  # none is without effect
        moved = dict(inputs, **{key: inputs[key][::-1].copy()})
        assert np.abs(np.asarray(run(params, **moved)) - y).max() > 1e-3, key
    x = np.random.default_rng(4).standard_normal((2, 24, 16, net.in_channels))  # positions of another grid
    larger = dict(inputs, x=x)
    assert tables.error(run(params, **larger), DIFFUSERS.compare(model, larger)["sample"]) <= TOL


def test_float32_and_masked_text(quick):  # noqa: F811
    model = oracle("sizes as conditions")
    net, params = tables.load(DIFFUSERS, tables.state_of(model), dict(model.config))
    inputs = DIFFUSERS.inputs(net, np.random.default_rng(3))
    run = jax.jit(lambda params, **inputs: net.apply({"params": params}, **inputs))
    y = run(params, **inputs)
    assert y.dtype == np.float32
    assert tables.error(y, DIFFUSERS.compare(model.float(), inputs)["sample"]) <= 2e-5
    noisy = np.where(inputs["context_mask"][..., None], inputs["context"], 100).astype(np.float32)
    np.testing.assert_array_equal(run(params, **dict(inputs, context=noisy)), y)
    assert np.abs(run(params, **dict(inputs, context=noisy, context_mask=np.ones((2, 7), int))) - y).max() > 1e-3


def drawn(net, **inputs):
    return tables.draw(types.SimpleNamespace(init=functools.partial(net.init, **inputs)))


def test_block_with_compressed_keys_is_the_authors_formula(x64, quick):  # noqa: F811
    """As PixArt_blocks.py of PixArt-sigma has it, written with torch: one strided convolution and norm for k and v."""
    import torch
    import torch.nn.functional as F

    rng, width, heads, grid = np.random.default_rng(0), 12, 3, (5, 4)
    block = DiTBlock(heads, 20, shared=True, compress=2)
    inputs = {k: jnp.asarray(rng.standard_normal((2, n, width))) for k, n in (("x", 20), ("cond", 6))}
    block_at = lambda params, x, cond: block.apply({"params": params}, x, cond=cond, grid=grid)
    shapes = jax.eval_shape(lambda k: block.init(k, inputs["x"], cond=inputs["cond"], grid=grid), jax.random.key(0))
    params = jax.tree.map(lambda a: rng.standard_normal(a.shape) / 2, shapes["params"])
    p = {k: torch.from_numpy(np.asarray(v)) for k, v in flatten_dict(params, sep="/").items()}
    x, cond = (torch.from_numpy(np.array(a)) for a in inputs.values())
    shift, scale, gate, shift2, scale2, gate2 = (p["table"] + cond).chunk(6, dim=1)
    dense = lambda name, a: a @ p[f"{name}/kernel"] + p[f"{name}/bias"]
    y = F.layer_norm(x, (width,), eps=1e-6) * (1 + scale) + shift

    def squeeze(a):
        image = a.transpose(1, 2).reshape(2, width, *grid)
        kernel = p["compress/kernel"].permute(2, 0, 1)[:, None]
        image = F.conv2d(image, kernel, p["compress/bias"], stride=2, groups=width)
        norm = p["compress/norm/scale"], p["compress/norm/bias"]
        return F.layer_norm(image.flatten(2).transpose(1, 2), (width,), *norm, eps=1e-5)

    parts = dense("attn/q", y), squeeze(dense("attn/k", y)), squeeze(dense("attn/v", y))
    q, k, v = (a.reshape(2, -1, heads, width // heads).transpose(1, 2) for a in parts)
    assert k.shape[2] == 4
    x = x + gate * dense("attn/out", F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 20, width))
    y = F.layer_norm(x, (width,), eps=1e-6) * (1 + scale2) + shift2
    want = x + gate2 * dense("mlp/fc2", F.gelu(dense("mlp/fc1", y), approximate="tanh"))
    run = jax.jit(block_at)
    got = run(params, **inputs)
    assert tables.error(got, want) <= TOL
    for name in ("kernel", "bias"):
        moved = dict(params, compress=dict(params["compress"], **{name: params["compress"][name] * np.arange(12.0)}))
        assert np.abs(np.asarray(run(moved, **inputs)) - got).max() > 1e-3


@pytest.mark.parametrize("compressed", [2, 3])
def test_layers_count_through_both_stacks(quick, compressed):  # noqa: F811
    net, seen = PixArt(**TINY, compress=2, compressed=compressed), []
    inputs = DIFFUSERS.inputs(net, np.random.default_rng(3))
    params = drawn(net, **inputs)
    assert {k for k in params if "layers" in k} == ({"compressed_layers"} | ({"layers"} if compressed < 3 else set()))

    def note(qkv, site, step):
        """Pure, as flax 0.12.12 takes no effects in a stack whose layers share what is not split."""
        short = qkv[1].shape[1]
        write = lambda i: seen.append((site.kind, int(i), short)) or np.float32(0)
        zero = jax.pure_callback(write, jax.ShapeDtypeStruct((), jnp.float32), site.layer)
        return qkv[0] + zero.astype(qkv[0].dtype), *qkv[1:]

    jax.block_until_ready(net.apply({"params": params}, **inputs, control=AttentionControl(qkv=note)))
    jax.effects_barrier()
    short = [16] * (3 - compressed) + [4] * compressed
    assert sorted(seen) == sorted([("self", i, short[i]) for i in range(3)] + [("cross", i, 7) for i in range(3)])


def test_dropped_and_named_contexts(quick):  # noqa: F811
    net = PixArt(**TINY)
    inputs = DIFFUSERS.inputs(net, np.random.default_rng(3))
    image = np.random.default_rng(5).standard_normal((2, 4, 9)).astype(np.float32)
    contexts = {"image": (image, None, 1.0)}
    params = drawn(net, **inputs, contexts=contexts)
    assert params["layers"]["cross"]["k_image"]["kernel"].shape == (3, 9, 24)
    run = jax.jit(lambda keep, strength, null=0.0: net.apply(
        {"params": dict(params, null_context=params["null_context"] + null)}, **inputs,
        keep_context=keep, contexts={"image": (image, None, strength)},
    ))  # fmt: skip
    plain = run(None, 0.0)
    kept = run(jnp.array([True, False]), 0.0)
    np.testing.assert_allclose(kept[0], plain[0], atol=1e-5)
    assert np.abs(kept[1] - plain[1]).max() > 1e-3 and np.abs(run(None, 1.0) - plain).max() > 1e-3
    nulled = dict(inputs, context=np.broadcast_to(params["null_context"], (2, 7, 10)).copy())
    wanted = net.apply({"params": params}, **nulled, contexts={"image": (image, None, 0.0)})
    np.testing.assert_allclose(run(jnp.zeros(2, bool), 0.0), wanted, atol=1e-5)
    slope = jax.grad(lambda null: (run(jnp.zeros(2, bool), 0.0, null) ** 2).sum())(0.0)
    assert slope == 0  # it is fixed


@pytest.mark.parametrize("fields, published", [
    (pixart.ALPHA_256, 610_856_096),
    (pixart.ALPHA_1024, 611_349_152),
    (pixart.SIGMA_1024, 610_856_096),
    (pixart.SIGMA_1024 | pixart.COMPRESSED, 610_856_096 + 14 * (1152 * 4 + 3 * 1152)),  # + .018 %
])  # fmt: skip
def test_published_sizes(fields, published):
    """The authors' null context is a buffer, which is not counted."""
    net = PixArt(**fields)
    micro = dict(size=jnp.zeros((1, 2)), aspect=jnp.zeros(1)) if net.micro else {}
    given = dict(x=jnp.zeros((1, 32, 32, 4)), t=jnp.zeros(1), context=jnp.zeros((1, net.null_tokens, 4096)), **micro)
    shapes = jax.eval_shape(lambda: net.init(jax.random.key(0), **given))["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == published + net.null_tokens * 4096


def test_begins_without_text_and_each_parameter_is_trained(quick):  # noqa: F811
    net = PixArt(**TINY, micro=True, compress=2, compressed=1)
    inputs = DIFFUSERS.inputs(net, np.random.default_rng(3))
    x, cond = jnp.ones((1, 4, 6)), jnp.ones((1, 6, 6))
    block = DiTBlock(2, 8, shared=True, cross=True, compress=2)
    started = block.init(jax.random.key(0), x, cond=cond, grid=(2, 2), context=x)["params"]
    assert not started["cross"]["out"]["kernel"].any() and started["attn"]["out"]["kernel"].any()
    np.testing.assert_array_equal(started["compress"]["kernel"], 0.25)
    params = drawn(net, **inputs)
    grads = jax.jit(jax.grad(lambda p: (net.apply({"params": p}, **inputs, train=True) ** 2).mean()))(params)
    for path, g in flatten_dict(grads, sep="/").items():
        flat = path.endswith(("/k/bias", "null_context"))  # the softmax leaves out the one, nothing was dropped
        assert flat or np.abs(g).max() > 1e-7, path


def test_bad_input():
    net = PixArt(**TINY)
    inputs = DIFFUSERS.inputs(net, np.random.default_rng(3))
    init = lambda net, **more: jax.eval_shape(lambda: net.init(jax.random.key(0), **(inputs | more)))
    with pytest.raises(ValueError, match=r"context_width is 10, got a context \(2, 7, 9\)"):
        init(net, context=inputs["context"][..., :9])
    with pytest.raises(ValueError, match="just where micro, which is True"):
        init(net.clone(micro=True))
    with pytest.raises(ValueError, match="just where micro, which is False"):
        init(net, aspect=jnp.ones(2))
    with pytest.raises(ValueError, match=r"null_tokens = 5 tokens, got \(2, 7, 10\)"):
        init(net.clone(null_tokens=5), keep_context=jnp.ones(2, bool))


@pytest.mark.parametrize("t, same", [pytest.param(500.0, True, marks=pytest.mark.slow), (100.0, False)])
def test_a_dit_becomes_a_pixart(x64, t, same):
    """Equal without a class at the time of the re-parameterisation, and nowhere else."""
    rng = np.random.default_rng(0)
    sizes = dict(depth=3, width=24, heads=2, sample_size=4)
    dit, net = DiT(num_classes=5, **sizes), PixArt(context_width=10, null_tokens=7, **sizes)
    x, context = rng.standard_normal((2, 4, 4, 4)), rng.standard_normal((2, 7, 10))
    times, labels = np.full(2, t), np.full(2, 5)
    fresh = lambda net, **given: net.init(jax.random.key(0), x, times, **given)["params"]
    random = lambda a: rng.standard_normal(a.shape) * 0.3
    trained = jax.tree.map(random, fresh(dit, labels=labels))
    old, new = (flatten_dict(p, sep="/") for p in (fresh(net, context=context), from_dit(trained)))
    assert {path: a.shape for path, a in new.items()} == {path: old[path].shape for path in new}
    left = {path.split("/")[1 if path.startswith("layers") else 0] for path in set(old) - set(new)}
    assert left == {"caption", "null_context", "cross"}
    params = unflatten_dict(old | new, sep="/")
    want = dit.apply({"params": trained}, x, times, labels)
    error = np.abs(net.apply({"params": params}, x, times, context=context) - want).max() / np.abs(want).max()
    assert error < 1e-12 if same else error > 1e-3
