"""PatchGAN parity, its running statistics, and the adversarial losses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from tests.convert import tables
from tests.golden import golden
from vgen.convert import rules
from vgen.convert.vqgan import discriminator_table
from vgen.models import discriminator as d

TOL = 1e-9


def init(model, *args):
    """Parameters drawn by numpy in the shapes of init."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0), *args)
    return jax.tree.map(lambda a: jnp.asarray(rng.standard_normal(a.shape) * 0.1 + (a.ndim == 1), a.dtype), shapes)


def nchw(x):
    return np.asarray(x).transpose(0, 3, 1, 2)


def test_golden(x64):
    g = golden.load("vqgan_discriminator")
    model = d.NLayerDiscriminator(channels=10)
    x = np.asarray(g["inputs"]["x"], np.float64).transpose(0, 2, 3, 1)
    shapes = flatten_dict(jax.eval_shape(model.init, jax.random.key(0), x)["params"], sep="/")
    flat = rules.load(g["weights"].__getitem__, g["weights"], discriminator_table(), shapes)
    back = rules.export(flat, discriminator_table())
    assert set(back) == set(g["weights"]) and all(np.array_equal(back[k], v) for k, v in g["weights"].items())
    params = unflatten_dict(flat, sep="/")

    @jax.jit
    def run(params, x):
        out, mids = model.apply(
            params, x, train=False, mutable=["intermediates"], capture_intermediates=lambda m, _: m.name == "conv_0"
        )
        return out, mids["intermediates"]["conv_0"]["__call__"][0], model.apply(params, x, train=True)

    evaluated, first, trained = run({"params": tables.float64(params)}, x)
    golden.check(g, "first", nchw(first), TOL)
    golden.check(g, "eval", nchw(evaluated.logits), TOL)
    golden.check(g, "train", nchw(trained.logits), TOL)
    golden.check(g, "running_mean_after", trained.updates["norm_1/mean"], TOL)
    golden.check(g, "running_var_after", trained.updates["norm_1/var"], TOL)
    assert evaluated.updates == {}
    assert set(trained.updates) == {f"norm_{i}/{k}" for i in (1, 2, 3) for k in ("mean", "var")}


def test_published_size():
    model = d.NLayerDiscriminator()
    tree = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))["params"]
    statistics = sum(leaf.size for i in (1, 2, 3) for leaf in (tree[f"norm_{i}"]["mean"], tree[f"norm_{i}"]["var"]))
    assert sum(leaf.size for leaf in jax.tree.leaves(tree)) - statistics == pytest.approx(2.77e6, abs=5e3)


def test_receptive_field_is_70_pixels():
    model = d.NLayerDiscriminator(channels=2, norm="none")
    x = np.random.default_rng(1).standard_normal((1, 128, 128, 3), dtype=np.float32)
    params = init(model, x)
    grad = jax.jit(jax.grad(lambda x: model.apply(params, x).logits[0, 7, 7, 0]))(x)
    rows = np.flatnonzero(np.abs(grad).sum((0, 2, 3)))
    assert rows[-1] - rows[0] + 1 == 70


@pytest.mark.parametrize("norm", ["batch", "group", "none"])
def test_norms(norm):
    model = d.NLayerDiscriminator(channels=8, layers=2, norm=norm, dtype=jnp.bfloat16)
    x = jax.random.normal(jax.random.key(1), (4, 32, 32, 3))
    params = init(model, x)["params"]

    @jax.jit
    def run(params):
        def loss(params):
            out = model.apply({"params": params}, x)
            return d.hinge_d(out.logits[:2], out.logits[2:]), out

        return jax.grad(loss, has_aux=True)(params)

    grads, out = run(params)
    assert out.logits.shape == (4, 6, 6, 1) and out.logits.dtype == jnp.bfloat16
    assert ("norm_1" in params) == (norm != "none") and ("bias" in params["conv_1"]) == (norm == "none")
    assert (out.updates == {}) == (norm != "batch")
    if norm == "batch":
        assert out.updates["norm_1/mean"].dtype == jnp.float32
        for leaf in ("mean", "var"):  # buffers: no gradient
            assert not np.any(grads["norm_1"].pop(leaf)) and not np.any(grads["norm_2"].pop(leaf))
    assert all(np.any(g) for g in jax.tree.leaves(grads))


def test_unknown_norm():
    with pytest.raises(ValueError, match="'batch', 'group', 'none'"):
        d.NLayerDiscriminator(norm="layer").init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))


def test_losses_by_hand():
    real, fake = jnp.array([2.0, 0.0]), jnp.array([-3.0, 1.0])
    assert float(d.hinge_d(real, fake)) == pytest.approx(0.5 * (0.5 + 1.0))
    assert float(d.hinge_g(fake)) == 1.0
    log_d = np.log1p(np.exp(-np.float64(real))).mean() + np.log1p(np.exp(np.float64(fake))).mean()
    assert float(d.nonsaturating_d(real, fake)) == pytest.approx(log_d, rel=1e-6)
    assert float(d.vanilla_d(real, fake)) == pytest.approx(log_d / 2, rel=1e-6)
    assert float(d.nonsaturating_g(fake)) == pytest.approx(np.log1p(np.exp([3.0, -1.0])).mean(), rel=1e-6)
    assert np.isfinite(float(d.nonsaturating_g(jnp.array([-1e4]))))


def test_adaptive_weight():
    rec, gan = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([4.0])}, {"a": jnp.array([0.0, 2.0]), "b": jnp.array([0.0])}
    assert float(d.adaptive_weight(rec, gan, delta=0.5)) == pytest.approx(0.8 * 5 / 2.5)
    assert float(d.adaptive_weight(jnp.ones(2), jnp.zeros(2), delta=1e-6)) == pytest.approx(0.8 * 1e4)
    assert float(d.adaptive_weight(jnp.zeros(2), jnp.zeros(2))) == 0
    assert float(jax.grad(lambda s: d.adaptive_weight(s * jnp.ones(2), jnp.ones(2)))(1.0)) == 0


def test_r1_penalty_of_a_linear_score():
    """The gradient of sum(w x) is w, whatever the image: the penalty is |w|^2."""
    w = jax.random.normal(jax.random.key(0), (4, 4, 3))
    images = jax.random.normal(jax.random.key(1), (5, 4, 4, 3))
    got = d.r1_penalty(lambda x: (x * w).sum((1, 2, 3)), images)
    assert float(got) == pytest.approx(float(jnp.square(w).sum()), rel=1e-5)
    patches = d.r1_penalty(lambda x: (x * w).sum(-1), images)  # logits per patch are summed
    assert float(patches) == pytest.approx(float(got), rel=1e-5)
