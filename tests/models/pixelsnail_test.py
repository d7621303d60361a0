"""PixelSNAIL: the published port's numbers, what each token can see, and what the task makes of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.convert import tables
from tests.convert.tables import quick  # noqa: F401  a fixture
from tests.golden import golden
from vgen.convert.pixelsnail import ROSINALITY
from vgen.models.pixelsnail import PixelSNAIL

pytestmark = pytest.mark.usefixtures("quick")


def nchw(x):
    return np.asarray(x).transpose(0, 3, 1, 2)


@pytest.mark.parametrize("dtype, tol", [(np.float64, 1e-9), (np.float32, 2e-5)])
def test_golden(x64, dtype, tol):
    g = golden.load("pixelsnail")
    module, params = tables.check_round_trip(ROSINALITY, g["weights"], lost=["background"])
    sizes = dict(vocab=14, grid=(6, 8), width=16, kernel=5, depth=2, res_blocks=2, res_width=12, out_blocks=1)
    assert module == PixelSNAIL(**sizes) and tables.found(g["weights"]) is ROSINALITY
    tokens = jnp.asarray(g["inputs"]["x"].reshape(2, -1))
    seen = dict(
        mutable=["intermediates"], capture_intermediates=lambda m, _: m.name in ("above", "left", "block_0")
    )  # fmt: skip
    run = jax.jit(lambda params: module.apply({"params": params}, tokens, **seen))
    y, mids = run(jax.tree.map(lambda a: jnp.asarray(a, dtype), params))
    assert y.dtype == dtype
    golden.check(g, "y", nchw(y.reshape(2, 6, 8, -1)), tol)
    mids = {name: nchw(mids["intermediates"][name]["__call__"][0]) for name in ("above", "left", "block_0")}
    golden.check(g, "horizontal", mids["above"], tol)
    golden.check(g, "vertical", mids["left"], tol)
    golden.check(g, "block0", mids["block_0"], tol)


@pytest.mark.parametrize("attention", [True, False])
def test_what_every_token_sees(attention):
    """By gradients: each place has a token of its own, so that columns of the first kernels are places; the parts of
    the table are found back in a file without attention, too."""
    rows, columns = 4, 5
    n = rows * columns
    module = PixelSNAIL(
        vocab=n, grid=(rows, columns), width=16, kernel=3, depth=2, res_blocks=2, res_width=4,
        attention=attention, out_blocks=1,
    )  # fmt: skip
    tokens = jnp.arange(n, dtype=jnp.int32)[None]
    params = tables.draw(module, tokens)
    state = tables.export(ROSINALITY, module, params) | {"background": np.zeros((1, 2, rows, columns), np.float32)}
    assert tables.check_round_trip(ROSINALITY, state, lost=["background"])[0].attention is attention
    each = np.random.default_rng(0).standard_normal((n, n)).astype(np.float32)
    plain = jax.nn.one_hot(tokens, n)

    def outputs(hot):
        """A token as a vector: the first layers are linear in it."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(jax.nn, "one_hot", lambda *args, **kwargs: hot)
            logits = module.apply({"params": params}, tokens)[0]
        return (logits * each).sum(-1)  # [n], of each token

    influence = np.abs(jax.jit(jax.jacrev(outputs))(plain)).max(-1)[:, 0]  # [output, input]
    before = np.tril(np.ones((n, n), bool), -1)
    assert (influence[~before] == 0).all()
    if attention:  # convolutions alone do not reach everywhere
        blind = np.zeros_like(before)
        for row in range(1, rows):
            blind[row * columns + np.arange(columns - 2), row * columns - 1] = True
        np.testing.assert_array_equal(influence > 0, before & ~blind)


def test_dropout_and_wrong_input():
    module = PixelSNAIL(vocab=5, grid=(3, 3), width=8, kernel=3, depth=1, res_blocks=1, res_width=4, heads=2)
    key, tokens = jax.random.key(0), jnp.zeros((1, 9), jnp.int32)
    params = {"params": jax.tree.map(jnp.asarray, tables.draw(module, tokens))}
    run = jax.jit(lambda key: module.apply(params, tokens, train=True, rngs={"dropout": key}))
    a, b = run(key), run(jax.random.key(1))
    assert np.abs(a - b).max() > 1e-4
    with pytest.raises(ValueError, match="are not 9, those of a grid"):
        jax.eval_shape(module.init, key, tokens[:, :8])
    with pytest.raises(ValueError, match="kernel must be odd"):
        jax.eval_shape(module.clone(kernel=4).init, key, tokens)
    with pytest.raises(ValueError, match="3 heads"):
        jax.eval_shape(module.clone(heads=3).init, key, tokens)
