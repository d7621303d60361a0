"""aMUSEd's network: published sizes, gradients, compute dtype, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from vgen.layers.embed import sinusoids
from vgen.models import uvit

TINY = dict(
    ids=40, vocab=32, grid=(8, 8), depth=2, width=32, heads=4, mlp_dim=48, embed_dim=12, channels=16, res_blocks=1,
    block_heads=4, text_width=20, pooled_width=24, micro_width=4,
)  # fmt: skip


def inputs(net, side=6, batch=2):
    rng = np.random.default_rng(0)
    tokens = np.where(rng.random((batch, side, side)) < 0.5, net.mask_id, rng.integers(0, net.vocab, (side, side)))
    shapes = (batch, 5, net.text_width), (batch, net.pooled_width)
    text, pooled = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes)
    return jnp.asarray(tokens, jnp.int32), text, pooled, uvit.micro_conditions(batch, 96, 128)


def draw(net, args):
    """Parameters drawn by numpy in the shapes of init, so that nothing is zero."""
    rng = np.random.default_rng(0)
    one = lambda a: (rng.standard_normal(a.shape) * (0.1 if a.ndim < 2 else np.prod(a.shape[:-1]) ** -0.5)).astype("f")
    return jax.tree.map(one, jax.eval_shape(net.init, jax.random.key(0), *args))


@pytest.mark.parametrize("shape, count", [(uvit.AMUSED_256, 603_537_664), (uvit.AMUSED_512, 608_257_792)])
def test_published_sizes(shape, count):
    """603M and 608M, as the authors say; the exact counts are those of diffusers' class at the published config."""
    net = uvit.UVit(**shape)
    spec = lambda s, dtype=jnp.float32: jax.ShapeDtypeStruct(s, dtype)
    args = spec((1, *net.grid), jnp.int32), spec((1, 77, 768)), spec((1, 768)), spec((1, 5))
    params = jax.eval_shape(net.init, jax.random.key(0), *args)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == count
    assert net.mask_id == 8255
    assert jax.eval_shape(net.apply, params, *args).shape == (1, *net.grid, 8192)


def test_every_parameter_gets_a_gradient():
    net = uvit.UVit(**TINY, bias=True, resample=True)
    args = inputs(net)
    params = draw(net, args)
    grads = jax.jit(jax.grad(lambda p: jax.nn.log_softmax(net.apply(p, *args))[..., 3].sum()))(params)["params"]
    zero = [k for k, g in flatten_dict(grads, sep="/").items() if not np.abs(g).max() > 0]
    assert [k for k in zero if not k.endswith("k/bias")] == []  # a bias of all keys does not change a softmax


def test_bfloat16_compute():
    """Half-precision arithmetic on float32 parameters gives float32 logits that are close."""
    net, half = (uvit.UVit(**TINY, dtype=dtype) for dtype in (None, jnp.bfloat16))
    args = inputs(net)
    params = draw(net, args)
    want, got = (jax.jit(n.apply)(params, *args) for n in (net, half))
    assert got.dtype == jnp.float32
    error = np.abs(got - want).max() / np.abs(want).max()
    assert 1e-5 < error < 0.05, error


@pytest.mark.slow
def test_dropout_is_for_training_alone():
    net = uvit.UVit(**TINY, dropout=0.2, attn_dropout=0.2)
    args = inputs(net)
    params = draw(net, args)
    apply = jax.jit(net.apply, static_argnames="train")
    np.testing.assert_array_equal(apply(params, *args), jax.jit(uvit.UVit(**TINY).apply)(params, *args))
    one, two = (apply(params, *args, train=True, rngs={"dropout": jax.random.key(i)}) for i in (0, 1))
    assert not np.allclose(one, two, atol=1e-3)


def test_a_resampled_grid_is_even():
    net = uvit.UVit(**TINY, resample=True)
    with pytest.raises(ValueError, match="sides must be even, got 5 x 5"):
        jax.eval_shape(net.init, jax.random.key(0), *inputs(net, side=5))


def test_micro_conditions():
    np.testing.assert_array_equal(
        uvit.micro_conditions(2, 256, 384, crop=(3, 4), aesthetic=5.5), [[384, 256, 3, 4, 5.5]] * 2
    )


def test_sinusoids():
    x = np.array([[0.0, 1.5], [300.0, 7.0]])
    got = sinusoids(jnp.asarray(x, jnp.float32), 6)
    angles = x[..., None] * 10_000.0 ** (-np.arange(3) / 3)
    np.testing.assert_allclose(got, np.concatenate([np.cos(angles), np.sin(angles)], -1), atol=3e-5)
    first = sinusoids(jnp.asarray(x, jnp.float32), 6, sin_first=True)
    np.testing.assert_array_equal(first, np.roll(got, 3, axis=-1))
    with pytest.raises(ValueError, match="width must be even, got 5"):
        sinusoids(jnp.zeros(2), 5)
