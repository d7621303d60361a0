"""The attention function: formula, masks, precision, seam, multi-axis grouping, named contexts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vgen.layers.attention import MultiHeadAttention, Site, attention, multi_axis
from vgen.types import AttentionControl, Step


def qkv(b=2, n=5, m=7, h=4, d=8, dtype=np.float64, seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal((b, length, h, d)), dtype) for length in (n, m, m)]


def formula(q, k, v, visible=None, bias=0.0, scale=None):
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    logits = np.einsum("bnhd,bmhd->bhnm", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale) + bias
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights = weights * (1 if visible is None else np.broadcast_to(visible, weights.shape))
    total = weights.sum(-1, keepdims=True)
    return np.einsum("bhnm,bmhd->bnhd", weights / np.where(total == 0, 1, total), v)


@pytest.mark.parametrize("case", ["plain", "mask", "causal", "bias", "everything"])
@pytest.mark.parametrize("dtype, tol", [(np.float64, 1e-14), (np.float32, 2e-6), (jnp.bfloat16, 2e-2)])
def test_matches_the_formula(x64, case, dtype, tol):
    q, k, v = qkv(dtype=dtype)
    rng = np.random.default_rng(1)
    visible, bias, kwargs = np.ones((2, 4, 5, 7), bool), 0.0, {}
    if case in ("mask", "everything"):
        kwargs["mask"] = jnp.asarray(rng.random((2, 1, 1, 7)) > 0.3)
        visible = visible & np.asarray(kwargs["mask"])
    if case in ("causal", "everything"):
        kwargs["causal"] = True
        visible = visible & np.tril(np.ones((5, 7), bool))
    if case in ("bias", "everything"):
        kwargs["bias"], kwargs["scale"] = jnp.asarray(rng.standard_normal((1, 4, 5, 7)), jnp.float32), 0.7
        bias = np.asarray(kwargs["bias"], np.float64)
    out = attention(q, k, v, **kwargs)
    assert out.dtype == dtype
    np.testing.assert_allclose(
        np.asarray(out, np.float64), formula(q, k, v, visible, bias, kwargs.get("scale")), atol=tol
    )


@pytest.mark.parametrize("control", [None, AttentionControl(logits=lambda logits, site, step: logits)])
def test_row_without_keys_is_zero_with_finite_gradient(control):
    q, k, v = qkv(dtype=np.float32)
    mask = jnp.ones((2, 1, 5, 7), bool).at[1, :, 2].set(False)

    def total(q, k, v):
        return (attention(q, k, v, mask=mask, control=control) ** 2).sum()

    out = attention(q, k, v, mask=mask, control=control)
    assert (out[1, 2] == 0).all() and (out[1, 1] != 0).all()
    for g in jax.jit(jax.grad(total, (0, 1, 2)))(q, k, v):
        assert jnp.isfinite(g).all()


def test_half_logits_are_not_rounded_to_half():
    """Logits 600 and 601.2 are one number in bfloat16, whose spacing is 4 there."""
    q = jnp.full((1, 1, 1, 2), 120.0, jnp.bfloat16)
    k = jnp.asarray([[[[250.0, 250.0]], [[250.0, 251.0]]]], jnp.bfloat16)
    v = jnp.asarray([[[[0.0, 0.0]], [[1.0, 1.0]]]], jnp.bfloat16)
    out = attention(q, k, v, scale=0.01)
    np.testing.assert_allclose(np.asarray(out, np.float32), jax.nn.sigmoid(1.2), atol=5e-3)


def test_control_sees_and_replaces_each_part():
    q, k, v = qkv(dtype=np.float32)
    site, step, seen = Site("self", "block", 3), Step(*jnp.zeros(7)), []

    def note(name, change):
        def part(arrays, site, step):
            seen.append((name, site, step))
            return change(arrays)

        return part

    out = attention(
        q,
        k,
        v,
        site=site,
        step=step,
        control=AttentionControl(
            qkv=note("qkv", lambda a: (a[0], a[1], 2 * a[2])),
            logits=note("logits", lambda a: 0 * a),
            probs=note("probs", lambda a: jnp.roll(a, 1, axis=-1)),
        ),
    )
    assert [name for name, *_ in seen] == ["qkv", "logits", "probs"]
    assert all(s is site and t is step for _, s, t in seen)
    np.testing.assert_allclose(out, jnp.broadcast_to(2 * v.mean(1, keepdims=True), out.shape), atol=1e-6)


def test_control_cannot_unmask():
    q, k, v = qkv(dtype=np.float32)
    mask = jnp.arange(7)[None, None, None] < 3
    loud = AttentionControl(logits=lambda logits, site, step: logits.at[..., 3:].set(1e4))
    np.testing.assert_allclose(attention(q, k, v, mask=mask, control=loud), formula(q, k, v, mask), atol=2e-6)


def test_mask_must_have_four_dimensions():
    q, k, v = qkv(dtype=np.float32)
    with pytest.raises(ValueError, match=r"mask .*\(2, 7\)"):
        attention(q, k, v, mask=jnp.ones((2, 7), bool))


def test_multi_axis_is_masked_attention(x64):
    """Heads 0-1 equal full attention masked to the same block, heads 2-3 masked to the same place in every block."""
    rows, columns, block = 4, 6, 2
    q, k, v = qkv(n=24, m=24)
    y, x = np.divmod(np.arange(24), columns)
    near = (y // block * 10 + x // block)[:, None] == (y // block * 10 + x // block)
    far = (y % block * 10 + x % block)[:, None] == (y % block * 10 + x % block)
    visible = np.stack([near, near, far, far])[None]
    out = multi_axis(q, k, v, (rows, columns), block)
    np.testing.assert_allclose(out, formula(q, k, v, visible), atol=1e-13)
    with pytest.raises(ValueError, match="divisible"):
        multi_axis(q, k, v, (rows, columns), 4)


def test_module_key_mask_and_named_context(x64):
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (2, 5, 12))
    text, image = jax.random.normal(keys[1], (2, 6, 10)), jax.random.normal(keys[2], (2, 3, 9))
    mask = jnp.asarray([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]], bool)
    layer = MultiHeadAttention(heads=3, qk_norm="rms")
    params = jax.jit(layer.init)(keys[3], x, text, mask, contexts={"image": (image, None, 1.0)})
    assert set(params["params"]) == {"q", "k", "v", "out", "q_norm", "k_norm", "k_image", "v_image", "k_image_norm"}
    run = jax.jit(
        lambda text, strength: layer.apply(params, x, text, mask, contexts={"image": (image, None, strength)})
    )
    plain = jax.jit(layer.apply)(params, x, text, mask)
    np.testing.assert_allclose(run(text, 0.0), plain, atol=1e-12)
    noisy = jnp.where(mask[..., None], text, 100.0)
    np.testing.assert_allclose(run(noisy, 1.0), run(text, 1.0), atol=1e-12)
    # the named context acts linearly in its strength, ahead of the output projection
    np.testing.assert_allclose(run(text, 2.0) - plain, 2 * (run(text, 1.0) - plain), atol=1e-12)
    assert jnp.abs(run(text, 1.0) - plain).max() > 1e-3


def test_module_tells_the_control_where_it_is():
    sites = []
    control = AttentionControl(probs=lambda probs, site, step: (sites.append(site), probs)[1])
    x = jnp.ones((1, 4, 8))
    layer = MultiHeadAttention(heads=2, name="mixer")
    contexts = {"image": (x[:, :2], None, 1.0)}
    params = jax.jit(layer.init)(jax.random.key(0), x, x[:, :3], contexts=contexts)
    layer.apply(params, x, x[:, :3], contexts=contexts, layer=5, control=control)
    assert [(s.kind, s.layer) for s in sites] == [("cross", 5), ("cross", 5)]
    assert sites[1].name.endswith("/image")


def test_bad_arguments():
    with pytest.raises(ValueError, match="width 10 is not divisible by heads 3"):
        MultiHeadAttention(heads=3).init(jax.random.key(0), jnp.ones((1, 2, 10)))
    with pytest.raises(ValueError, match="'layer' or 'rms', got 'batch'"):
        MultiHeadAttention(heads=2, qk_norm="batch").init(jax.random.key(0), jnp.ones((1, 2, 10)))


def test_values_and_core_of_the_layer(x64):
    """Values of their own, as keys without positions; and another function in the place of `attention`."""
    layer, rng = MultiHeadAttention(2), np.random.default_rng(0)
    x, context, values = (jnp.asarray(rng.standard_normal((1, n, 8))) for n in (3, 5, 5))
    params = jax.tree.map(lambda a: a.astype(np.float64), layer.init(jax.random.key(0), x, context))
    seen = []

    def core(q, k, v, **kwargs):
        seen.append((q, k, v))
        return attention(q, k, v, **kwargs)

    plain = layer.apply(params, x, context)
    np.testing.assert_array_equal(plain, layer.apply(params, x, context, values=context, core=core))
    mixed = layer.apply(params, x, context, values=values, core=core)
    (_, k, _), (_, k2, v2) = seen
    np.testing.assert_array_equal(k, k2)
    dense = params["params"]["v"]
    np.testing.assert_allclose(v2.reshape(1, 5, 8), values @ dense["kernel"] + dense["bias"], atol=1e-15)
    assert np.abs(mixed - plain).max() > 1e-3
