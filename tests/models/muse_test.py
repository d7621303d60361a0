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


@pytest.mark.parametrize("kind", ["base", "super"])
def test_by_codes_a_token_is_its_code(kind, inputs):
    """Tokens that trade codes trade places, in what goes in and in the logits; no gradient reaches the codes."""
    tower = dict(vocab=K, grid=(4, 4), depth=1, width=8, heads=2, mlp_dim=12, by_codes=True)
    codes = np.random.default_rng(1).standard_normal((K, 3))
    given, named = [inputs[name] for name in ("tokens", "text", "mask")], dict(codes=codes)
    net = muse.BaseTransformer(**tower)
    if kind == "super":
        net = muse.SuperResTransformer(**tower, low_vocab=K, low_grid=(2, 2), low_depth=1)
        given, named = [given[0], inputs["low"], *given[1:]], named | dict(low_codes=codes)
    with jax.enable_x64(True):
        named = {name: jnp.asarray(value) for name, value in named.items()}
        shapes = jax.eval_shape(lambda: net.init(jax.random.key(0), *given, **named))
        rng = np.random.default_rng(0)
        params = jax.tree.map(lambda a: rng.standard_normal(a.shape), shapes)
        run = jax.jit(lambda given, named: net.apply(params, *given, **named))
        logits = run(given, named)
        trade = np.arange(K + 1)
        trade[[2, 5]] = 5, 2
        given[: 2 if kind == "super" else 1] = [
            jnp.asarray(trade[np.asarray(a)], jnp.int32) for a in given[: 2 if kind == "super" else 1]
        ]
        traded = run(given, {name: jnp.asarray(codes[trade[:K]]) for name in named})
        np.testing.assert_allclose(np.asarray(traded)[..., trade[:K]], logits, rtol=1e-10)
        assert np.abs(run(given, named) - traded).max() > 1e-3
        gradient = jax.jit(jax.grad(lambda named: run(given, named)[..., 0].sum()))(named)
    assert all((np.asarray(g) == 0).all() for g in gradient.values())
    with pytest.raises(ValueError, match="by_codes=True, so codes must be given"):
        net.apply(params, *given)
    with pytest.raises(ValueError, match="by_codes=False, so codes must not be given"):
        net.clone(by_codes=False).apply(params, *given, **named)


def test_aligned_low_resolution_tokens_are_added_to_those_they_cover(inputs):
    tower = dict(vocab=K, grid=(4, 4), depth=1, width=8, heads=2, mlp_dim=12, low_vocab=K, low_grid=(2, 2), low_depth=1)
    net = muse.SuperResTransformer(**tower, aligned=True)
    low = jnp.arange(4.0).reshape(1, 4, 1)
    above = net._above(low).reshape(4, 4)
    np.testing.assert_array_equal(above, [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]])
    given = [inputs["tokens"], inputs["low"], inputs["text"], inputs["mask"]]
    params = draw(net, *given, dtype=np.float32)  # the same as of a network that is not aligned
    plain = net.clone(aligned=False).apply(params, *given)
    assert np.abs(net.apply(params, *given) - plain).max() > 1e-3
    with pytest.raises(ValueError, match="aligned needs a grid"):
        net.clone(grid=(4, 5))._above(low)


def test_text_without_layers_is_its_words():
    """Every token's state depends on the token and its place alone."""
    net = TextTransformer(vocab=20, length=6, depth=0, width=8, heads=2, mlp_dim=8)
    tokens, mask = jnp.arange(6)[None] + 1, jnp.ones((1, 6), bool)
    params = draw(net, tokens, mask, dtype=np.float32)
    assert set(params["params"]) == {"embed", "positions", "embed_norm", "norm"}
    states, other = (net.apply(params, t, mask)[0][0] for t in (tokens, tokens.at[0, 2].set(0)))
    assert (np.abs(states - other).max(-1) > 1e-4).tolist() == [False, False, True, False, False, False]
    assert (
        np.abs(net.apply(params, tokens * 0, mask)[0][0, 0] - net.apply(params, tokens * 0, mask)[0][0, 1]).max() > 1e-4
    )
