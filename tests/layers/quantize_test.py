"""Vector quantisation: nearest codes, gradients, moving averages, revival, statistics."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.golden import golden
from vgen.layers import quantize as vq

RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


def test_nearest_code_is_brute_force_whatever_the_chunk():
    z, codes = normal(50, 6), normal(37, 6)
    want = np.square(np.asarray(z)[:, None] - np.asarray(codes)[None]).sum(-1)
    np.testing.assert_allclose(vq.squared_distances(z, codes), want, rtol=1e-4, atol=1e-5)
    for chunk in (64, 37, 16, 5):
        got = vq.nearest_code(z, codes, chunk=chunk)
        np.testing.assert_array_equal(got, want.argmin(1))
        assert got.dtype == jnp.int32


def test_ties_go_to_the_lowest_index():
    codes = jnp.array([[1.0, 0.0], [0.0, 1.0]] * 6)  # the same two codes, over and over
    for chunk in (12, 4, 5):
        np.testing.assert_array_equal(vq.nearest_code(jnp.array([[0.9, 0.0], [0.0, 2.0]]), codes, chunk=chunk), [0, 1])


def test_chunks_bound_the_memory():
    """No [n, K] array is ever made."""
    jaxpr = jax.make_jaxpr(lambda z, e: vq.nearest_code(z, e, chunk=256))(jnp.zeros((128, 4)), jnp.zeros((2048, 4)))
    shapes = {tuple(s) for s in re.findall(r"\[(\d+),(\d+)\]", str(jaxpr))}
    assert ("128", "256") in shapes and ("128", "2048") not in shapes


@pytest.fixture
def gradient_mode():
    model = vq.VectorQuantizer(8, 3, init_scale=1.0)
    z = normal(2, 4, 3)
    return model, {"params": {"codebook": normal(8, 3)}}, z


def test_straight_through_and_exact_codes(gradient_mode):
    model, params, z = gradient_mode
    out = model.apply(params, z)
    codebook = params["params"]["codebook"]
    np.testing.assert_array_equal(out.z_q, codebook[out.indices])
    w = normal(*z.shape)
    grad_z, grad_params = jax.grad(lambda z, p: (model.apply(p, z).z_q * w).sum(), argnums=(0, 1))(z, params)
    np.testing.assert_array_equal(grad_z, w)
    np.testing.assert_array_equal(grad_params["params"]["codebook"], 0)
    np.testing.assert_array_equal(model.apply(params, out.indices, method="lookup"), codebook[out.indices])


@pytest.mark.parametrize("legacy", [False, True])
def test_losses_and_where_their_gradients_go(gradient_mode, legacy):
    _, params, z = gradient_mode
    model = vq.VectorQuantizer(8, 3, legacy=legacy)
    out = model.apply(params, z)
    square = float(jnp.square(out.z_q - z).mean())
    codebook, commitment = (0.25, 1.0) if legacy else (1.0, 0.25)  # QUIRK of the published taming models
    assert float(out.losses["codebook"]) == pytest.approx(codebook * square, rel=1e-5)
    assert float(out.losses["commitment"]) == pytest.approx(commitment * square, rel=1e-5)

    def grads(name):
        return jax.grad(lambda z, p: model.apply(p, z).losses[name], argnums=(0, 1))(z, params)

    to_z, to_params = grads("codebook")
    assert not np.any(to_z) and np.any(to_params["params"]["codebook"])
    to_z, to_params = grads("commitment")
    assert np.any(to_z) and not np.any(to_params["params"]["codebook"])


def test_entropy_loss_limits():
    """Sharp and even assignments reach -log K; sharp ones on a single code give 0."""
    far = 1e3 * (1 - jnp.eye(4))
    assert float(vq.entropy_loss(far)) == pytest.approx(-np.log(4), abs=1e-3)
    assert float(vq.entropy_loss(far[:1].repeat(4, 0))) == pytest.approx(0, abs=1e-3)
    assert float(vq.entropy_loss(far, kind="argmax")) == pytest.approx(-np.log(4), abs=1e-3)
    with pytest.raises(ValueError, match="'softmax', 'argmax'"):
        vq.entropy_loss(far, kind="hard")


# ----------------------------------------------------------------------------------------------------- moving averages


def test_ema_golden(x64):
    g = golden.load("vqvae2_ema_step")
    x, embed, size, total = (g["inputs"][k].astype(float) for k in ("x", "embed", "cluster_size", "embed_avg"))
    state = jax.tree.map(jnp.asarray, {"codebook": embed.T, "ema_count": size, "ema_sum": total.T})
    model = vq.VectorQuantizer(7, 5, ema=True, commitment_weight=1.0)
    out = model.apply({"params": state}, jnp.asarray(x))
    golden.check(g, "quantize", out.z_q, 1e-9)
    golden.check(g, "ind", out.indices)
    golden.check(g, "diff", sum(out.losses.values()), 1e-9)
    decay, eps = (g["meta"]["kwargs"][k] for k in ("decay", "eps"))
    new = vq.ema_update(
        state, jnp.asarray(x.reshape(-1, 5)), out.indices.reshape(-1), jax.random.key(0), decay=decay, eps=eps
    )
    golden.check(g, "embed", new["codebook"].T, 1e-9)
    golden.check(g, "cluster_size", new["ema_count"], 1e-9)
    golden.check(g, "embed_avg", new["ema_sum"].T, 1e-9)


def ema_model(k=16, **kwargs):
    model = vq.VectorQuantizer(k, 2, ema=True, init_scale=0.01, **kwargs)
    return model, jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 2)))["params"]


def test_ema_mode_takes_no_gradient():
    model, params = ema_model()
    z = normal(20, 2)
    out = model.apply({"params": params}, z)
    assert set(out.losses) == {"commitment"}
    np.testing.assert_array_equal(params["ema_sum"], params["codebook"])
    grads = jax.grad(lambda p: sum(model.apply({"params": p}, z).losses.values()))(params)
    assert not any(np.any(g) for g in jax.tree.leaves(grads))


def test_ema_finds_cluster_means_and_revives_dead_codes():
    """Sixteen tight clusters, 32 codes that start in one place: revival spreads them over the clusters."""
    rng = np.random.default_rng(1)
    centres = jnp.asarray(rng.standard_normal((16, 2)) * 3, jnp.float32)
    update = jax.jit(vq.ema_update, static_argnames=("decay", "revive_below", "normalize"))

    def fit(revive_below):
        model, state = ema_model(32)
        key = jax.random.key(1)
        for i in range(60):
            z = centres[np.arange(256) % 16] + 0.02 * rng.standard_normal((256, 2), dtype=np.float32)
            indices = vq.nearest_code(z, state["codebook"])
            state = update(state, z, indices, jax.random.fold_in(key, i), decay=0.8, revive_below=revive_below)
        out = model.apply({"params": state}, centres)
        return len(set(np.asarray(out.indices).tolist())), float(jnp.square(out.z_q - centres).mean())

    (found, error), (found_without, error_without) = fit(0.1), fit(0.0)
    assert found >= 14 > 8 >= found_without, (found, found_without)
    assert error < 0.1 * error_without, (error, error_without)


def test_revival_draws_distinct_latents_and_is_deterministic():
    state = {"codebook": jnp.zeros((6, 2)), "ema_count": jnp.array([9.0, 0, 0, 0, 9, 9]), "ema_sum": jnp.zeros((6, 2))}
    z, indices = normal(4, 2), jnp.zeros(4, jnp.int32)
    a, b, *others = (vq.ema_update(state, z, indices, jax.random.key(i), revive_below=0.1) for i in (0, 0, 1, 2, 3))
    revived = np.asarray(a["codebook"][1:4])
    assert len({tuple(r) for r in revived}) == 3
    assert all(any(np.array_equal(r, row) for row in np.asarray(z)) for r in revived)
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert not all(np.array_equal(a["codebook"], other["codebook"]) for other in others)
    mean = 0.99 * 27 / 6 + 0.01 * 4 / 6
    np.testing.assert_allclose(a["ema_count"][1:4], mean, rtol=1e-5)  # starts as an average code
    np.testing.assert_allclose(a["ema_sum"][1:4], revived * mean, rtol=1e-5)
    assert {k: (v.shape, v.dtype) for k, v in a.items()} == {k: (v.shape, v.dtype) for k, v in state.items()}
    few = vq.ema_update(state, z[:2], indices[:2], jax.random.key(0), revive_below=0.1)  # fewer latents than dead codes
    assert np.isfinite(few["codebook"]).all()


def test_revival_prefers_latents_that_no_code_describes():
    """Of 1000 latents 990 lie on a code and ten elsewhere: dead codes go to the ten, where they help."""
    state = {"codebook": jnp.zeros((6, 2)), "ema_count": jnp.array([9.0, 0, 0, 0, 9, 9]), "ema_sum": jnp.zeros((6, 2))}
    z = jnp.concatenate([jnp.full((990, 2), 1e-3), 5 + normal(10, 2)])
    new = vq.ema_update(state, z, jnp.zeros(1000, jnp.int32), jax.random.key(0), revive_below=0.1)
    assert (jnp.linalg.norm(new["codebook"][1:4], axis=-1) > 1).all()


def test_normalised_codes_live_on_the_sphere():
    model, params = ema_model(normalize=True)
    z = normal(3, 5, 2) * 10
    out = model.apply({"params": params}, z)
    np.testing.assert_allclose(jnp.linalg.norm(out.z_q, axis=-1), 1, rtol=1e-5)
    cosine = vq.l2_normalize(z) @ vq.l2_normalize(params["codebook"]).T
    np.testing.assert_array_equal(out.indices, cosine.argmax(-1))
    flat, indices = z.reshape(-1, 2), out.indices.reshape(-1)
    near, far = (vq.ema_update(params, s * flat, indices, jax.random.key(0), normalize=True) for s in (1, 7))
    np.testing.assert_allclose(near["ema_sum"], far["ema_sum"], rtol=1e-5)
    assert np.isfinite(jax.grad(lambda z: vq.l2_normalize(z).sum())(jnp.zeros((2, 3)))).all()


# ---------------------------------------------------------------------------------------------------------- statistics


def test_statistics_by_hand():
    counts = vq.code_counts(jnp.array([[0, 0], [1, 3]]), 8)
    np.testing.assert_array_equal(counts, [2, 1, 0, 1, 0, 0, 0, 0])
    stats = vq.usage_from_counts(counts)
    assert float(stats["usage"]) == 3 / 8
    assert float(stats["perplexity"]) == pytest.approx(2**1.5)
    assert float(vq.usage_from_counts(jnp.ones(8))["perplexity"]) == pytest.approx(8)
    assert float(vq.usage_from_counts(jnp.zeros(8))["usage"]) == 0


def test_bfloat16_latents_are_compared_in_float32():
    model = vq.VectorQuantizer(4, 2)
    codes = jnp.array([[1.0, 0], [1.001, 0], [0, 1], [0, 1.001]])
    out = model.apply({"params": {"codebook": codes}}, jnp.array([[1.0, 0.0], [0.0, 1.0]], jnp.bfloat16))
    np.testing.assert_array_equal(out.indices, [0, 2])
    assert out.z_q.dtype == jnp.float32


def test_wrong_width():
    with pytest.raises(ValueError, match="code width 3"):
        vq.VectorQuantizer(8, 3).init(jax.random.key(0), jnp.zeros((2, 4)))
