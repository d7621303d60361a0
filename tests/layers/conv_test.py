"""Convolutional blocks against independent formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vgen.layers import conv

RNG = np.random.default_rng(0)


def drawn(module, x):
    """Parameters drawn by numpy in the shapes of init."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)
    return jax.tree.map(lambda a: jnp.asarray(RNG.standard_normal(a.shape), a.dtype), shapes)


def reference_norm(x, scale, bias, groups, eps):
    b, h, w, c = x.shape
    g = x.reshape(b, h * w, groups, c // groups)
    g = (g - g.mean((1, 3), keepdims=True)) / np.sqrt(g.var((1, 3), keepdims=True) + eps)
    return g.reshape(x.shape) * scale + bias


def test_group_norm(x64):
    x = RNG.standard_normal((2, 3, 5, 12)) * RNG.uniform(0.1, 4, 12) + RNG.standard_normal(12)
    scale, bias = RNG.standard_normal((2, 12))
    got = conv.group_norm(*map(jnp.asarray, (x, scale, bias)), groups=4, eps=1e-6)
    np.testing.assert_allclose(got, reference_norm(x, scale, bias, 4, 1e-6), rtol=1e-12, atol=1e-12)


def test_group_norm_survives_a_large_mean():
    """E[x^2] - E[x]^2 in float32 would lose this variance altogether."""
    x = np.float32(RNG.standard_normal((1, 16, 16, 8)) * 0.01 + 100)
    got = conv.group_norm(jnp.asarray(x), jnp.ones(8), jnp.zeros(8), groups=2, eps=1e-6)
    want = reference_norm(np.float64(x), 1, 0, 2, 1e-6)
    np.testing.assert_allclose(got, want, atol=0.02)


def test_group_norm_in_bfloat16_reduces_in_float32():
    module = conv.GroupNorm(2, dtype=jnp.bfloat16)
    x = jnp.asarray(RNG.standard_normal((1, 32, 32, 4)) + 3, jnp.bfloat16)
    params = {"params": {"scale": jnp.ones(4), "bias": jnp.zeros(4)}}
    got = module.apply(params, x)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(got), reference_norm(np.float64(x), 1, 0, 2, 1e-6), atol=0.02)


def test_group_norm_rejects_uneven_groups():
    with pytest.raises(ValueError, match="6 channels do not divide into 4 groups"):
        conv.GroupNorm(4).init(jax.random.key(0), jnp.zeros((1, 2, 2, 6)))


def apply_conv(x, kernel, pad, stride=1):
    """Cross-correlation written out."""
    x = np.pad(x, ((0, 0), pad, pad, (0, 0)))
    kh, kw = kernel.shape[:2]
    rows, cols = range(0, x.shape[1] - kh + 1, stride), range(0, x.shape[2] - kw + 1, stride)
    out = [[np.einsum("bhwi,hwio->bo", x[:, r : r + kh, c : c + kw], kernel) for c in cols] for r in rows]
    return np.moveaxis(np.array(out), 2, 0)


@pytest.mark.parametrize("shortcut", ["input", "branch"])
@pytest.mark.parametrize("bias", [True, False])
def test_res_block(x64, shortcut, bias):
    block = conv.ResBlock(6, bias=bias, shortcut=shortcut, groups=2)
    x = RNG.standard_normal((2, 4, 5, 4))
    params = drawn(block, x)["params"]
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    assert ("bias" in p["conv1"]) == bias

    def layer(name, x, pad):
        return apply_conv(x, p[name]["kernel"], pad) + p[name].get("bias", 0)

    def act(name, x):
        y = reference_norm(x, p[name]["scale"], p[name]["bias"], 2, 1e-6)
        return y / (1 + np.exp(-y))

    h = layer("conv1", act("norm1", x), (1, 1))
    h = layer("conv2", act("norm2", h), (1, 1))
    want = layer("shortcut", x if shortcut == "input" else h, (0, 0)) + h
    np.testing.assert_allclose(block.apply({"params": params}, jnp.asarray(x)), want, rtol=1e-10, atol=1e-10)


def test_res_block_of_equal_width_is_an_identity_plus_branch():
    block = conv.ResBlock(4, groups=2)
    x = jnp.asarray(RNG.standard_normal((1, 3, 3, 4)), jnp.float32)
    params = drawn(block, x)
    assert "shortcut" not in params["params"]
    zero = jax.tree.map(jnp.zeros_like, params)
    np.testing.assert_array_equal(block.apply(zero, x), x)


def test_downsample_pads_bottom_and_right(x64):
    x = RNG.standard_normal((1, 4, 6, 3))
    for kind, pad in (("pad", (0, 1)), ("stride", (1, 1))):
        module = conv.Downsample(kind)
        params = drawn(module, x)
        p = jax.tree.map(np.float64, params["params"]["conv"])
        want = apply_conv(x, p["kernel"], pad, stride=2) + p["bias"]
        np.testing.assert_allclose(module.apply(params, jnp.asarray(x)), want, rtol=1e-10, atol=1e-10)


def test_downsample_average():
    x = jnp.arange(16.0).reshape(1, 4, 4, 1)
    got = conv.Downsample("average").apply({}, x)
    np.testing.assert_array_equal(got[0, :, :, 0], [[2.5, 4.5], [10.5, 12.5]])


def test_upsample_is_nearest_then_convolution(x64):
    x = RNG.standard_normal((2, 2, 3, 4))
    big = x.repeat(2, 1).repeat(2, 2)
    np.testing.assert_array_equal(conv.nearest_upsample(jnp.asarray(x)), big)
    module = conv.Upsample()
    params = drawn(module, x)
    p = jax.tree.map(np.float64, params["params"]["conv"])
    want = apply_conv(big, p["kernel"], (1, 1)) + p["bias"]
    np.testing.assert_allclose(module.apply(params, jnp.asarray(x)), want, rtol=1e-10, atol=1e-10)


def test_spatial_attention(x64):
    module = conv.SpatialAttention(groups=2)
    x = RNG.standard_normal((2, 3, 2, 4))
    params = drawn(module, x)
    p = jax.tree.map(np.float64, params["params"])
    h = reference_norm(x, p["norm"]["scale"], p["norm"]["bias"], 2, 1e-6).reshape(2, 6, 4)
    q, k, v = (h @ p[n]["kernel"] + p[n]["bias"] for n in "qkv")
    logits = q @ k.transpose(0, 2, 1) / 2
    probs = np.exp(logits - logits.max(-1, keepdims=True))
    probs /= probs.sum(-1, keepdims=True)
    want = x + (probs @ v @ p["out"]["kernel"] + p["out"]["bias"]).reshape(x.shape)
    np.testing.assert_allclose(module.apply(params, jnp.asarray(x)), want, rtol=1e-9, atol=1e-9)
    assert conv.SpatialAttention(heads=2, groups=2).apply(params, jnp.asarray(x)).shape == x.shape


def test_switches_list_what_they_accept():
    x = jnp.zeros((1, 4, 4, 2))
    with pytest.raises(ValueError, match="'input', 'branch'"):
        conv.ResBlock(4, shortcut="conv", groups=1).init(jax.random.key(0), x)
    with pytest.raises(ValueError, match="'pad', 'average', 'stride'"):
        conv.Downsample("max").init(jax.random.key(0), x)
    with pytest.raises(ValueError, match="2 channels do not divide into 3 heads"):
        conv.SpatialAttention(heads=3, groups=1).init(jax.random.key(0), x)


def test_space_to_depth_and_back():
    x = jnp.arange(2 * 4 * 6 * 3.0).reshape(2, 4, 6, 3)
    y = conv.space_to_depth(x, 2)
    assert y.shape == (2, 2, 3, 12)
    np.testing.assert_array_equal(y[1, 1, 2], x[1, 2:4, 4:6].reshape(-1))
    np.testing.assert_array_equal(conv.depth_to_space(y, 2), x)
