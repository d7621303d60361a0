"""Muse's two networks: sizes, text drop, padding, and what each output depends on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vgen.models import muse
from vgen.models.text import TextTransformer

B, L, D, K = 2, 5, 6, 11


def count(module, *shapes):
    args = [jax.ShapeDtypeStruct(shape, jnp.float32 if len(shape) == 3 else jnp.int32) for shape in shapes]
    params = jax.eval_shape(module.init, jax.random.key(0), *args)["params"]
    return sum(leaf.size for leaf in jax.tree.leaves(params)), muse.layer_parameters(params)


@pytest.mark.parametrize(
    "shape, total, layers", [(muse.BASE_3B, 3_268_038_656, 3.22e9), (muse.BASE_632M, 657_239_552, 629e6)]
)
def test_base_sizes(shape, total, layers):
    got = count(muse.BaseTransformer(**shape), (1, 256), (1, 8, 4096))
    assert got[0] == total and abs(got[1] / layers - 1) < 2e-3


def test_super_resolution_size():
    total, layers = count(muse.SuperResTransformer(**muse.SUPER_RES), (1, 4096), (1, 256), (1, 8, 4096))
    assert total == 769_051_648 and abs(layers / 738e6 - 1) < 2e-3


def draw(module, *args, dtype=np.float64):
    """Random parameters that do not care for initialisers: scales near 1, all else of spread 0.3."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(module.init, jax.random.key(0), *args)
    return jax.tree.map_with_path(
        lambda path, a: ((path[-1].key == "scale") + 0.3 * rng.standard_normal(a.shape)).astype(dtype), shapes
    )


@pytest.fixture(scope="module")
def inputs():
    keys = jax.random.split(jax.random.key(0), 3)
    return dict(
        tokens=jax.random.randint(keys[0], (B, 16), 0, K + 1),
        low=jax.random.randint(keys[1], (B, 4), 0, K),
        text=jax.random.normal(keys[2], (B, L, D)),
        mask=jnp.asarray([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]], bool),
    )


@pytest.fixture(scope="module", params=["base", "super", "multi-axis"])
def network(request, inputs):
    """(name, run): run(keep, **changed inputs) -> logits; compiled once."""
    tower = dict(vocab=K, grid=(4, 4), depth=2, width=8, heads=2, mlp_dim=12, bias=True)
    if request.param == "base":
        net, names = muse.BaseTransformer(**tower), ("tokens", "text", "mask")
    else:
        net = muse.SuperResTransformer(
            **tower, low_vocab=K, low_grid=(2, 2), low_depth=1, block=2 if request.param == "multi-axis" else None
        )
        names = ("tokens", "low", "text", "mask")
    params = draw(net, *(inputs[name] for name in names))
    apply = jax.jit(net.apply)

    def run(keep=(True, True), **changed):
        with jax.enable_x64(True):
            return np.asarray(apply(params, *({**inputs, **changed}[name] for name in names), jnp.asarray(keep)))

    run.plain = lambda: jax.jit(net.apply)(params, *(inputs[name] for name in names))
    return request.param, run


def test_logits(network):
    out = network[1]()
    assert out.shape == (B, 16, K) and out.dtype == np.float64 and np.isfinite(out).all()


def test_padding_never_matters_and_text_does(network, inputs):
    _, run = network
    noise = jnp.where(inputs["mask"][..., None], inputs["text"], 50.0)
    np.testing.assert_allclose(run(text=noise), run(), atol=1e-12)
    assert np.abs(run(text=inputs["text"].at[:, 0].add(1.0)) - run()).max() > 1e-3


def test_dropped_text_is_ignored_per_sample(network, inputs):
    _, run = network
    other = inputs["text"] * -3.0 + 1.0
    np.testing.assert_array_equal(run((True, False), text=other)[1], run((True, False))[1])
    np.testing.assert_array_equal(run((False, False), mask=~inputs["mask"]), run((False, False)))
    np.testing.assert_allclose(run((True, False))[0], run((True, True))[0], atol=1e-12)  # samples do not mix
    assert np.abs(run((True, False))[1] - run((True, True))[1]).max() > 1e-3


def test_keeping_everything_is_the_same_as_no_flag(network):
    _, run = network
    with jax.enable_x64(True):
        np.testing.assert_allclose(run(), run.plain(), atol=1e-12)


def test_low_resolution_matters_with_and_without_text(network, inputs):
    name, run = network
    if name == "base":
        pytest.skip("the base network has no low resolution")
    other = inputs["low"].at[:, 0].set((inputs["low"][:, 0] + 1) % K)
    for keep in (True, False):
        assert np.abs(run((keep, keep), low=other) - run((keep, keep))).max() > 1e-3


def test_every_token_reaches_every_other(network, inputs):
    """Two multi-axis layers mix the whole grid, as full attention does."""
    _, run = network
    changed = run(tokens=inputs["tokens"].at[:, 0].set((inputs["tokens"][:, 0] + 1) % K))
    assert (np.abs(changed - run()).max(axis=(0, 2)) > 1e-9).all()


def test_text_transformer_ignores_padding():
    net = TextTransformer(vocab=20, length=6, depth=2, width=8, heads=2, mlp_dim=8)
    tokens, mask = jnp.arange(6)[None] + 1, jnp.asarray([[1, 1, 1, 1, 0, 0]], bool)
    params = draw(net, tokens, mask, dtype=np.float32)
    run = jax.jit(lambda tokens: net.apply(params, tokens, mask)[0])
    np.testing.assert_allclose(run(tokens)[:, :4], run(tokens.at[0, 5].set(0))[:, :4], atol=1e-5)
    assert jnp.abs(run(tokens)[:, 0] - run(tokens.at[0, 3].set(0))[:, 0]).max() > 1e-4
    assert (jax.eval_shape(net.apply, params, tokens)[1]).shape == (1, 6)
