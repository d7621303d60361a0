"""MAE: published sizes, masking, the loss, other image sizes; see tests/convert/mae_test.py for parity."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.convert import tables
from tests.convert.tables import quick  # noqa: F401  a fixture
from vgen.models import mae

pytestmark = pytest.mark.usefixtures("quick")

TINY = dict(
    width=16, depth=2, heads=2, mlp_dim=24, patch_size=4, image_size=16, decoder_width=12, decoder_depth=1,
    decoder_heads=3, decoder_mlp_dim=20,
)  # fmt: skip
RNGS = {"params": jax.random.key(0), "mask": jax.random.key(1)}


@pytest.mark.parametrize(
    "sizes, encoder, decoder, total",
    [
        (mae.BASE, 85_798_656, 26_109_184, 111_655_680),
        (mae.LARGE, 303_301_632, 26_240_256, 329_239_296),
        (mae.HUGE, 630_764_800, 26_309_708, 656_613_964),
    ],
)
def test_published_sizes(sizes, encoder, decoder, total):
    """The halves with their tables of positions, which are no parameters here, and what is trained."""
    params = jax.eval_shape(mae.MAE(**sizes).init, RNGS, jnp.zeros((1, 224, 224, 3)))["params"]
    count = {half: sum(leaf.size for leaf in jax.tree.leaves(params[half])) for half in params}
    places = 1 + (224 // sizes["patch_size"]) ** 2
    assert (count["encoder"] + places * sizes["width"], count["decoder"] + places * 512) == (encoder, decoder)
    assert sum(count.values()) == total


def test_masking_keeps_the_least_noise():
    noise = jnp.asarray(np.random.default_rng(0).random((5, 196)))
    keep, restore, mask = mae.random_masking(noise, 0.75)
    assert keep.shape == (5, 49) and (mask.sum(1) == 147).all()
    for i in range(5):
        assert set(np.asarray(keep[i])) == set(np.argsort(noise[i])[:49]) == set(np.flatnonzero(mask[i] == 0))
        np.testing.assert_array_equal(restore[i][keep[i]], np.arange(49))


def test_loss_of_masked_patches_alone(x64):
    rng = np.random.default_rng(0)
    images, mask = rng.standard_normal((2, 8, 8, 3)), jnp.asarray([[1.0, 0, 0, 1], [0, 1, 0, 0]])
    patches = images.reshape(2, 2, 4, 2, 4, 3).swapaxes(2, 3).reshape(2, 4, 48)
    pred = rng.standard_normal((2, 4, 48))
    got = mae.reconstruction_loss(jnp.asarray(pred), jnp.asarray(images), mask, 4, norm_pix=False)
    assert float(got) == pytest.approx(np.square(pred - patches)[np.asarray(mask) == 1].mean())
    deviation = np.sqrt(patches.var(-1, ddof=1, keepdims=True) + 1e-6)
    normed = (patches - patches.mean(-1, keepdims=True)) / deviation
    args = (jnp.asarray(images), mask, 4)
    assert float(mae.reconstruction_loss(jnp.asarray(normed), *args)) < 1e-20
    pred[np.asarray(mask) == 0] += 1
    assert float(mae.reconstruction_loss(jnp.asarray(pred), *args, norm_pix=False)) == pytest.approx(float(got))


def test_another_image_size_and_randomness():
    model = mae.MAE(**TINY)
    images = jnp.asarray(np.random.default_rng(0).standard_normal((2, 8, 24, 3)), jnp.float32)
    params = {"params": tables.draw(model, images[:, :, :8], jnp.zeros((2, 4)))}
    run = jax.jit(lambda key: model.apply(params, images, rngs={"mask": key}))
    a, b, again = (run(jax.random.key(i)) for i in (0, 1, 0))
    assert a.pred.shape == (2, 12, 48) and a.tokens.shape == (2, 4, 16) and a.mask.shape == (2, 12)
    assert a.loss == again.loss and a.loss != b.loss and (a.mask != b.mask).any()


def test_dropout_is_for_training():
    model = mae.MAE(**TINY, dropout=0.3, drop_path=0.3, remat="dots")
    images, noise = jnp.ones((2, 16, 16, 3)), jnp.arange(32.0).reshape(2, 16)
    params = {"params": tables.draw(model, images, noise)}
    run = lambda train: jax.jit(lambda key: model.apply(params, images, noise, train=train, rngs={"dropout": key}).pred)
    keys = jax.random.key(0), jax.random.key(1)
    assert (run(False)(keys[0]) == run(False)(keys[1])).all()
    assert (run(True)(keys[0]) != run(True)(keys[1])).any()
