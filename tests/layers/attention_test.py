"""The attention function: formula, masks, precision, seam, multi-axis grouping, named contexts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from vgen import platform
from vgen.layers import attention_kernels as kernels
from vgen.layers.attention import MultiHeadAttention, Site, attention, multi_axis
from vgen.sharding import AXES
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


def masked_case(case, n, m, seed=1):
    """(keyword arguments of attention, visible, bias) of the cases that chunks and kernels are tested with."""
    rng, kwargs = np.random.default_rng(seed), {}
    visible, bias = np.ones((2, 4, n, m), bool), np.zeros((1, 1, 1, 1))
    if case in ("keys", "everything"):
        kwargs["mask"] = jnp.asarray(rng.random((2, 1, 1, m)) > 0.3)
    if case == "queries":
        kwargs["mask"] = jnp.asarray(rng.random((2, 4, n, m)) > 0.3).at[1, :, 2].set(False)
    if case == "nothing seen":
        kwargs["mask"] = jnp.ones((2, 1, 1, m), bool).at[1].set(False)
    if "mask" in kwargs:
        visible = visible & np.asarray(kwargs["mask"])
    if case in ("causal", "everything"):
        kwargs["causal"] = True
        visible = visible & np.tril(np.ones((n, m), bool))
    if case in ("bias", "everything"):
        shape = (1, 4, n, m) if case == "bias" else (2, 4, 1, m)
        bias = rng.standard_normal(shape)
        kwargs["bias"] = jnp.asarray(bias, jnp.float32)
    return kwargs, visible, bias


CASES = ["plain", "keys", "queries", "nothing seen", "causal", "bias", "everything"]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype, tol", [(np.float64, 1e-14), (np.float32, 2e-6), (jnp.bfloat16, 2e-2)])
def test_chunks_match_the_formula(x64, case, dtype, tol):
    q, k, v = qkv(n=5, m=7, dtype=dtype)
    kwargs, visible, bias = masked_case(case, 5, 7)
    bias = bias.astype(np.float32).astype(np.float64)
    for tile in (16, 1000):  # three chunks, the last one filled up; one chunk
        out = jax.jit(lambda *a: kernels.chunked(*a, scale=0.4, tile=tile, **kwargs))(q, k, v)
        assert out.dtype == dtype
        np.testing.assert_allclose(np.asarray(out, np.float64), formula(q, k, v, visible, bias, 0.4), atol=tol)


@pytest.mark.parametrize("case", CASES)
def test_gradients_of_chunks(x64, case):
    q, k, v = qkv(n=5, m=7)
    kwargs, _, _ = masked_case(case, 5, 7)
    causal = kwargs.pop("causal", False)
    weights = jnp.asarray(np.random.default_rng(2).standard_normal(q.shape))

    def total(how, *arrays):
        names = ("q", "k", "v", "bias")[: len(arrays)]
        given = dict(mask=None, **dict(zip(names, arrays))) | {k: v for k, v in kwargs.items() if k == "mask"}
        return (how(**given, scale=0.4, causal=causal) * weights).sum()

    arrays = (q, k, v) + ((kwargs["bias"].astype(float),) if "bias" in kwargs else ())
    chunks = lambda **kw: kernels.chunked(tile=16, **kw)
    got, want = (
        jax.jit(jax.grad(lambda *a: total(how, *a), range(len(arrays))))(*arrays) for how in (chunks, attention)
    )
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-14)
        assert np.abs(b).max() > 1e-3


@pytest.mark.parametrize("kwargs", [{}, dict(causal=True), dict(mask=True)])
def test_4096_tokens_never_have_a_full_matrix(kwargs):
    """Forward and backward, from what the compiler says of the program's memory."""
    n, heads = 4096, 4
    arrays = [jax.ShapeDtypeStruct((1, n, heads, 8), jnp.float32)] * 3
    if "mask" in kwargs:
        kwargs = dict(mask=jnp.arange(n)[None, None, None] < 4000)
    loss = lambda *a: (attention(*a, **kwargs) ** 2).sum()
    full = heads * n * n * 4
    for f in (loss, jax.grad(loss, (0, 1, 2))):
        assert jax.jit(f).lower(*arrays).compile().memory_analysis().temp_size_in_bytes < full / 4


def test_large_attention_is_chunked_only_without_a_control(monkeypatch):
    q, k, v = qkv(dtype=np.float32)
    plain = attention(q, k, v)
    monkeypatch.setattr(kernels, "LARGE", 35)
    seen = []
    monkeypatch.setattr(kernels, "chunked", lambda *a, **kw: (seen.append(a), plain)[1])
    attention(q, k, v)
    assert len(seen) == 1
    attention(q[:, :4], k, v)
    attention(q, k, v, control=AttentionControl(probs=lambda probs, site, step: probs))
    assert len(seen) == 1


def on_a_tpu(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    monkeypatch.setattr(kernels, "LARGE", 16)


@pytest.mark.parametrize("case", ["keys", "nothing seen", "causal"])
def test_flash_kernel_matches_the_formula(monkeypatch, case):
    """JAX's Pallas kernel for TPUs, interpreted; lengths that are no multiples of its blocks."""
    from jax.experimental.pallas import tpu

    n, m, d = 70, 90, 40
    q, k, v = qkv(n=n, m=m, d=d, dtype=np.float32)
    kwargs, visible, _ = masked_case(case, n, m)
    weights = jnp.asarray(np.random.default_rng(2).standard_normal(q.shape), jnp.float32)

    def both(q, k, v):  # (the slopes of a weighted sum, the result)
        total = lambda *a: (lambda out: ((out * weights).sum(), out))(attention(*a, **kwargs))
        return jax.grad(total, (0, 1, 2), has_aux=True)(q, k, v)

    want, _ = both(q, k, v)
    on_a_tpu(monkeypatch)
    with tpu.force_tpu_interpret_mode():
        assert kernels.has_flash(q, k, v, kwargs.get("mask"), None)
        slopes, out = both(q, k, v)
    np.testing.assert_allclose(out, formula(q, k, v, visible), atol=2e-6)
    for a, b in zip(slopes, want, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6 * np.abs(b).max())


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_flash_kernel_compiles_for_a_tpu(monkeypatch, dtype):
    """As far as a machine without one can tell: the program is lowered, kernel included, forward and backward."""
    on_a_tpu(monkeypatch)
    arrays = [jax.ShapeDtypeStruct((2, n, 4, 72), dtype) for n in (1024, 600, 600)]
    mask = jnp.ones((2, 1, 1, 600), bool)
    loss = lambda *a: attention(*a, mask=mask).astype(jnp.float32).sum()
    text = jax.jit(jax.grad(loss, (0, 1, 2))).trace(*arrays).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") >= 3  # forward, keys and values, queries
    for other in (dict(bias=jnp.zeros((1, 4, 1024, 600))), dict(mask=jnp.ones((2, 1, 1024, 600), bool))):
        lowered = jax.jit(lambda *a: attention(*a, **other)).trace(*arrays).lower(lowering_platforms=("tpu",))
        assert "tpu_custom_call" not in lowered.as_text()


def test_old_chips_have_no_kernel():
    """libtpu on Pallas's products of bfloat16 for a v3: not supported; a plan of `configs/dit.py:paper` found it."""
    q = jnp.zeros((1, 1024, 2, 64), jnp.bfloat16)
    for kind, able in (("TPU v3", False), ("TPU v4", True)):
        with platform.target("tpu", kind):
            assert kernels.has_flash(q, q, q, None, None) == able


def test_kernels_split_over_a_mesh(monkeypatch):
    """Each device runs the kernel on its own samples and heads; XLA cannot split it."""
    mesh = AbstractMesh((2, 1, 1, 2), AXES, axis_types=(AxisType.Auto,) * 4)
    arrays = [jax.ShapeDtypeStruct((4, 512, 4, 64), jnp.float32)] * 3
    mask = jnp.ones((4, 1, 1, 512), bool)
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    for backend in (None, on_a_tpu):
        if backend is not None:
            backend(monkeypatch)
            assert not kernels.has_flash(*(jnp.zeros(a.shape) for a in arrays), mask, None)
        with jax.sharding.use_abstract_mesh(mesh):
            jaxpr = str(jax.make_jaxpr(lambda *a: attention(*a, mask=mask))(*arrays))
        assert "shard_map" in jaxpr and "f32[2,512,2,64]" in jaxpr
        assert ("pallas_call" in jaxpr) == (backend is not None)


@pytest.mark.parametrize("causal", [False, True])
def test_kernels_split_queries_over_the_sequence(monkeypatch, causal):
    """Each device runs the kernel on its own queries and all keys; where the kernel counts queries it has them all."""
    mesh = AbstractMesh((2, 1, 2, 1), AXES, axis_types=(AxisType.Auto,) * 4)
    arrays = [jax.ShapeDtypeStruct((4, n, 4, 64), jnp.float32) for n in (512, 600, 600)]
    bias = jnp.zeros((1, 4, 512, 600))
    with jax.sharding.use_abstract_mesh(mesh):
        jaxpr = str(jax.make_jaxpr(lambda *a: attention(*a, bias=bias, causal=causal))(*arrays))
    queries = 512 if causal else 256
    assert "shard_map" in jaxpr and f"f32[2,{queries},4,64]" in jaxpr and "f32[2,600,4,64]" in jaxpr
    assert ("f32[2,512,4,64]" in jaxpr) == causal and f"f32[1,4,{queries},600]" in jaxpr
