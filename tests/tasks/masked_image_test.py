"""The task of MAE: its loss is the network's, what it shows, and that it learns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.convert.tables import quick  # noqa: F401  a fixture
from vgen.data import images
from vgen.models.mae import MAE
from vgen.tasks.masked_image import MaskedImage
from vgen.types import Context

pytestmark = pytest.mark.usefixtures("quick")

SIZES = dict(width=16, depth=1, heads=2, mlp_dim=32, decoder_width=16, decoder_depth=1, decoder_heads=2)
NET = MAE(patch_size=4, image_size=16, decoder_mlp_dim=32, **SIZES)
BATCH = {"image": jnp.asarray(np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3)), jnp.uint8)}
KEY = jax.random.key(1)


@pytest.fixture(scope="module")
def params():
    return MaskedImage(NET).init(KEY, BATCH)


def test_the_loss_is_the_networks_on_standardised_pictures(params):
    task = MaskedImage(NET)
    found = task.losses(params, Context(jnp.int32(0)), BATCH, KEY)["main"].value
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    pixels = jnp.asarray((np.asarray(BATCH["image"]) / 255 - mean) / std, jnp.float32)
    noise_key = jax.random.split(KEY)[0]
    want = NET.apply({"params": params["network"]}, pixels, rngs={"mask": noise_key}).loss
    assert float(found) == pytest.approx(float(want), rel=1e-5)
    other = task.losses(params, Context(jnp.int32(0)), BATCH, jax.random.key(9))["main"].value
    assert float(other) != pytest.approx(float(want), rel=1e-5)  # other patches are hidden


def test_evaluation_hides_the_same_patches_in_every_call(params):
    task = MaskedImage(NET)
    scores = [task.evaluate(params, [BATCH, BATCH], KEY)["loss"] for _ in range(2)]
    assert scores[0] == scores[1] > 0
    with pytest.raises(ValueError, match="no batches"):
        task.evaluate(params, [], KEY)


def test_what_is_shown(params):
    """Seen patches are as they are, hidden ones have the mean and the deviation of the true ones."""
    task = MaskedImage(NET)
    seen, made, whole = np.moveaxis(np.asarray(task.reconstructions(params, BATCH["image"], KEY)), 1, 0)
    assert np.abs(whole.astype(int) - np.asarray(BATCH["image"])).max() <= 1
    blocks = lambda x: x.reshape(4, 4, 4, 4, 4, 3).swapaxes(2, 3).reshape(4, 16, 48).astype(int)
    grey = (np.ptp(blocks(seen).reshape(4, 16, 16, 3), axis=2) == 0).all(-1)
    assert (grey.sum(1) == 12).all()  # three quarters of 16
    assert (blocks(made)[~grey] == blocks(whole)[~grey]).all()
    assert task.show(params, BATCH, KEY)["reconstructions"].dtype == np.uint8
    plain = MaskedImage(NET.clone(norm_pix=False))
    assert (np.asarray(plain.reconstructions(params, BATCH["image"], KEY))[:, 1] != made).any()


def test_the_right_answer_makes_the_picture_whole(params):
    """What the loss asks for (MAE: deviation by n - 1), written out here, gives the true pixels back."""

    class Perfect(MaskedImage):
        def _reconstruct(self, params, image, key, train=False):
            out = super()._reconstruct(params, image, key, train)
            x = np.asarray(self.pixels(image)).reshape(4, 4, 4, 4, 4, 3).swapaxes(2, 3).reshape(4, 16, 48)
            centred = x - x.mean(-1, keepdims=True)
            asked = centred / np.sqrt(np.square(centred).sum(-1, keepdims=True) / 47 + 1e-6)
            return out._replace(pred=jnp.asarray(asked))

    made = Perfect(NET).reconstructions(params, BATCH["image"], KEY)[:, 1]
    assert np.abs(np.asarray(made).astype(int) - np.asarray(BATCH["image"])).max() <= 1


def test_standardising_is_undone():
    x = images.standardise(BATCH["image"], (0.4, 0.5, 0.6), (0.2, 0.3, 0.1))
    assert np.abs(images.unstandardise(x, (0.4, 0.5, 0.6), (0.2, 0.3, 0.1)).astype(int) - BATCH["image"]).max() <= 1


def test_it_learns(params):
    import optax

    task, tx = MaskedImage(NET), optax.adam(3e-3)
    loss = lambda p, key: task.losses(p, Context(jnp.int32(0)), BATCH, key)["main"].value

    @jax.jit
    def step(p, state, key):
        value, grads = jax.value_and_grad(loss)(p, key)
        updates, state = tx.update(grads, state, p)
        return optax.apply_updates(p, updates), state, value

    p, state, values = params, tx.init(params), []
    for i in range(150):
        p, state, value = step(p, state, jax.random.fold_in(KEY, i))
        values.append(float(value))
    assert np.mean(values[-10:]) < 0.85 * np.mean(values[:10])
