"""The task of classification: its loss by hand, the noise, what is measured, and that it learns."""

import functools
from collections import UserList

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from tests.convert.tables import draw, quick  # noqa: F401  a fixture
from vgen.data import images as image_ops
from vgen.diffusion import schedules
from vgen.models.vit import ViT
from vgen.tasks.classify import Classify, cross_entropy, hits
from vgen.types import Context

pytestmark = pytest.mark.usefixtures("quick")

BETAS = schedules.betas("cosine")
SCHEDULE = schedules.discrete(BETAS)
RNG = np.random.default_rng(0)
LOGITS = RNG.standard_normal((6, 7)) * 3
LABEL = np.array([0, 6, 3, int(LOGITS[3].argmin()), int(LOGITS[4].argmax()), 2])
BATCH = {"image": jnp.asarray(RNG.integers(0, 256, (8, 8, 8, 3)), jnp.uint8), "label": jnp.arange(8) % 2}
KEY = jax.random.key(2)


class Linear(nn.Module):
    """Logits of all values of a picture; told what the time is, it adds that to the first."""

    outputs: int

    @nn.compact
    def __call__(self, x, t=None, *, train=False):
        logits = nn.Dense(self.outputs)(x.reshape(x.shape[0], -1))
        return logits if t is None else logits + jnp.outer(t, jnp.eye(self.outputs)[0])


class Spy(nn.Module):
    """Keeps what it is called with."""

    seen: UserList  # a list would be copied

    def __call__(self, x, t, *, train=False):
        self.seen.append((np.asarray(x), np.asarray(t), train))
        return jnp.zeros((x.shape[0], 2))


class Bright(nn.Module):
    """Logits (-3, 3) of a picture brighter than grey and (3, -3) of a darker one, the other way round from time 500."""

    def __call__(self, x, t, *, train=False):
        logit = 3 * jnp.sign(x.mean((1, 2, 3))) * jnp.where(t < 500, 1, -1)
        return jnp.stack([-logit, logit], 1)


def by_hand(logits, label, smoothing):
    """The mean cross-entropy against targets that are (1 - s) on the label plus s / classes everywhere."""
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    target = smoothing / logits.shape[1] + (1 - smoothing) * np.eye(logits.shape[1])[label]
    return -(target * np.log(p)).sum(1)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.7])
def test_cross_entropy_by_hand_and_of_torch(x64, smoothing):
    got = cross_entropy(jnp.asarray(LOGITS), jnp.asarray(LABEL), smoothing)
    np.testing.assert_allclose(got, by_hand(LOGITS, LABEL, smoothing), rtol=1e-12)
    torch = pytest.importorskip("torch")
    want = torch.nn.functional.cross_entropy(
        torch.tensor(LOGITS), torch.tensor(LABEL), label_smoothing=smoothing, reduction="none"
    )
    np.testing.assert_allclose(got, want.numpy(), rtol=1e-12)


def test_the_sigmoid_kind_is_torchs_summed_over_classes(x64):
    torch = pytest.importorskip("torch")
    target = 0.1 / 7 + 0.9 * np.eye(7)[LABEL]
    want = torch.nn.functional.binary_cross_entropy_with_logits(
        torch.tensor(LOGITS), torch.tensor(target), reduction="none"
    ).sum(1)
    got = cross_entropy(jnp.asarray(LOGITS), jnp.asarray(LABEL), 0.1, "sigmoid")
    np.testing.assert_allclose(got, want.numpy(), rtol=1e-12)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_a_label_that_is_no_class_gives_no_number(kind):
    found = cross_entropy(jnp.asarray(LOGITS), jnp.asarray([-1, 7, 6, 0, 1, 2]), kind=kind)
    assert list(np.isnan(found)) == [True, True, False, False, False, False]


def test_mixup_mixes_a_picture_and_its_label_with_the_next_one(x64):
    """Recovered from what the network is called with: one share for the batch, at least a half of its own."""
    seen = UserList()

    class Look(nn.Module):
        def __call__(self, x, *, train=False):
            seen.append(np.asarray(x, float))
            return jnp.stack([x.mean((1, 2, 3)), jnp.zeros(len(x))], 1)

    shares = set()
    for seed in range(5):
        seen.clear()
        key = jax.random.key(seed)
        loss = Classify(Look(), 2, mixup=0.4).losses({"network": {}}, Context(jnp.int32(0)), BATCH, key)
        own = np.asarray(image_ops.to_float(BATCH["image"]), float)
        other = np.roll(own, -1, axis=0)
        share = ((seen[0] - other) * (own - other)).sum() / ((own - other) ** 2).sum()
        np.testing.assert_allclose(seen[0], share * own + (1 - share) * other, atol=1e-6)
        assert 0.5 <= share <= 1
        logits = np.stack([seen[0].mean((1, 2, 3)), np.zeros(8)], 1)
        label = np.asarray(BATCH["label"])
        want = share * by_hand(logits, label, 0) + (1 - share) * by_hand(logits, np.roll(label, -1), 0)
        np.testing.assert_allclose(loss["main"].value, want.mean(), rtol=1e-5)
        shares.add(round(share, 6))
    assert len(shares) == 5
    seen.clear()
    Classify(Look(), 2, mixup=0.4).losses({"network": {}}, Context(jnp.int32(0), train=False), BATCH, KEY)
    np.testing.assert_allclose(seen[0], own, atol=1e-6)


def test_bad_settings_are_refused():
    for fields, message in ((dict(loss="hinge"), "must be 'softmax' or 'sigmoid'"), (dict(mixup=-1.0), "at least 0")):
        with pytest.raises(ValueError, match=message):
            Classify(Linear(2), 2, **fields)


def test_hits_by_hand():
    found = hits(jnp.asarray(LOGITS), jnp.asarray(LABEL))
    places = (LOGITS > LOGITS[np.arange(6), LABEL][:, None]).sum(1)
    assert set(places < 1) == set(places < 5) == {True, False}, "the case shows nothing"
    np.testing.assert_array_equal(found["accuracy"], places < 1)
    np.testing.assert_array_equal(found["accuracy_5"], places < 5)
    same = hits(jnp.zeros((3, 4)), jnp.arange(3))
    assert set(same) == {"accuracy"} and list(same["accuracy"]) == [True, False, False]


@pytest.mark.parametrize("schedule", [None, SCHEDULE], ids=["clean", "noised"])
def test_loss_of_a_network(x64, schedule):
    task = Classify(Linear(2), 2, smoothing=0.2, schedule=schedule, time_scale=1.0 if schedule is None else 1e-3)
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, float), draw(task, BATCH))
    loss = task.losses(params, Context(jnp.int32(0)), BATCH, KEY)["main"]
    layer = {name: np.asarray(value, float) for name, value in params["network"]["Dense_0"].items()}
    x, first = np.asarray(image_ops.to_float(BATCH["image"]), float), np.zeros(8)
    if schedule is not None:
        seen = UserList()
        Classify(Spy(seen), 2, schedule=schedule).losses({"network": {}}, Context(jnp.int32(0)), BATCH, KEY)
        x, first = seen[0][0].astype(float), 1e-3 * seen[0][1]
    logits = x.reshape(8, -1) @ layer["kernel"] + layer["bias"]
    logits[:, 0] += first
    label = np.asarray(BATCH["label"])
    np.testing.assert_allclose(loss.value, by_hand(logits, label, 0.2).mean(), rtol=1e-9)
    np.testing.assert_allclose(loss.metrics["accuracy"], (logits.argmax(1) == label).mean())
    assert set(loss.metrics) == {"accuracy"} and loss.value.dtype == jnp.float64


@pytest.mark.parametrize("schedule", [None, SCHEDULE], ids=["clean", "noised"])
def test_pictures_are_judged_by_their_class(schedule):
    """By the log probability of their labels; a network of noised pictures is told that there is no noise."""
    task = Classify(Linear(2), 2, schedule=schedule)
    params = draw(task, BATCH)
    x = image_ops.to_float(BATCH["image"])
    logits = task.logits(params, x, None if schedule is None else jnp.zeros(8))
    want = jax.nn.log_softmax(logits)[jnp.arange(8), BATCH["label"]]
    found = task.score(params, {"image_out": BATCH["image"], "label": BATCH["label"]})
    np.testing.assert_allclose(found, want, atol=1e-6)


@pytest.mark.parametrize("how", ["uniform", "stratified"])
def test_pictures_are_noised_as_the_schedule_says(how):
    seen, n = UserList(), 2000
    task = Classify(Spy(seen), 2, schedule=SCHEDULE, time_scale=0.001, draw={"how": how})
    pictures = np.broadcast_to(np.asarray([0, 255] * (n // 2), np.uint8)[:, None, None, None], (n, 8, 8, 3))
    batch = {"image": jnp.asarray(pictures), "label": jnp.zeros(n, jnp.int32)}
    task.losses({"network": {}}, Context(jnp.int32(0)), batch, KEY)
    x, t, train = seen[0]
    told, t = t * 1000, np.round(t * 1000).astype(int)
    assert train and np.abs(told - t).max() < 1e-3 and t.min() >= 0 and t.max() <= 999
    counts = np.histogram(t, 4, (0, 1000))[0]
    assert counts.max() - counts.min() <= (2 if how == "stratified" else 200)
    bar = np.cumprod(1 - BETAS)[t][:, None, None, None]
    eps = (x - np.sqrt(bar) * np.where(pictures > 0, 1, -1)) / np.sqrt(1 - bar)
    assert abs(eps.mean()) < 0.01 and abs(eps.std() - 1) < 0.01
    assert abs(np.corrcoef(eps[::2].ravel(), eps[1::2].ravel())[0, 1]) < 0.02
    other = UserList()
    Classify(Spy(other), 2, schedule=SCHEDULE).losses({"network": {}}, Context(jnp.int32(0), train=False), BATCH, KEY)
    assert other[0][2] is False


def test_what_is_measured():
    """The network is right at the first half of the times alone; nothing is drawn that differs between two calls."""
    image = np.broadcast_to(np.asarray([0, 255] * 8, np.uint8)[:, None, None, None], (16, 8, 8, 3))
    batches = [{"image": jnp.asarray(image), "label": jnp.arange(16) % 2}] * 2
    task = Classify(Bright(), 2, smoothing=0.3, schedule=SCHEDULE)
    found = task.evaluate({"network": {}}, batches, KEY)
    loss = (np.log1p(np.exp(-6)) + np.log1p(np.exp(6))) / 2  # whatever the smoothing
    quarters = {f"accuracy_quarter_{i + 1}": right for i, right in enumerate((1.0, 1.0, 0.0, 0.0))}
    assert found == pytest.approx(dict(cross_entropy=loss, accuracy=0.5) | quarters)
    assert task.evaluate({"network": {}}, batches, KEY) == found
    short = task.evaluate({"network": {}}, [{name: value[:2] for name, value in batches[0].items()}], KEY)
    assert set(short) - {"cross_entropy", "accuracy"} == {"accuracy_quarter_2", "accuracy_quarter_4"}
    with pytest.raises(ValueError, match="no batches"):
        task.evaluate({"network": {}}, [], KEY)


def test_a_vit_tells_clean_pictures():
    vit = ViT(patch_size=4, image_size=8, depth=1, width=8, heads=2, mlp_dim=16, num_classes=6)
    task = Classify(vit, 6)
    params = jax.tree.map(jnp.asarray, draw(task, BATCH))
    assert {path.split("/")[0] for path in params} == {"network"}
    loss = jax.jit(lambda params: task.losses(params, Context(jnp.int32(0)), BATCH, KEY))(params)["main"]
    logits = jax.jit(task.logits)(params, image_ops.to_float(BATCH["image"]))
    np.testing.assert_allclose(loss.value, by_hand(np.asarray(logits, float), BATCH["label"], 0).mean(), rtol=1e-5)
    assert set(loss.metrics) == {"accuracy", "accuracy_5"}
    assert set(task.evaluate(params, [BATCH], KEY)) == {"cross_entropy", "accuracy", "accuracy_5"}
    for network, classes in ((vit, 5), (vit.clone(num_classes=None), 6)):
        with pytest.raises(ValueError, match="must give logits"):
            Classify(network, classes).losses(params, Context(jnp.int32(0)), BATCH, KEY)


def test_a_tiny_classifier_learns_to_separate_two_classes():
    """Pictures brighter above or below, at every noise: better with less of it, and chance at none of the quarters."""
    task = Classify(Linear(2), 2, schedule=SCHEDULE, time_scale=1e-3)

    def batch(key, n=32):
        label_key, noise_key = jax.random.split(key)
        label = jax.random.randint(label_key, (n,), 0, 2)
        above = jnp.where(label == 1, 70, -70)[:, None, None, None] * jnp.where(jnp.arange(8) < 4, 1, -1)[:, None, None]
        image = 128 + above + jax.random.randint(noise_key, (n, 8, 8, 3), -30, 30)
        return {"image": image.astype(jnp.uint8), "label": label}

    optimiser = optax.adam(1e-2)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, key):
        loss = lambda params: task.losses(params, Context(jnp.int32(0)), batch(key), key)["main"].value
        value, gradients = jax.value_and_grad(loss)(params)
        updates, state = optimiser.update(gradients, state)
        return optax.apply_updates(params, updates), state, value

    params = jax.tree.map(jnp.asarray, draw(task, BATCH))
    state, values = optimiser.init(params), []
    for i in range(80):
        params, state, value = step(params, state, jax.random.fold_in(KEY, i))
        values.append(float(value))
    found = task.evaluate(params, [batch(jax.random.fold_in(KEY, 1000 + i)) for i in range(4)], KEY)
    quarters = [found[f"accuracy_quarter_{i}"] for i in (1, 2, 3, 4)]
    assert np.mean(values[-10:]) < 0.6 * np.log(2) and found["cross_entropy"] < 0.6 * np.log(2)
    assert min(quarters[:2]) > 0.95 and quarters[0] > quarters[3] and found["accuracy"] > 0.8


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(classes=1), "at least 2"),
        (dict(smoothing=1.0), r"smoothing must be in \[0, 1\)"),
        (dict(smoothing=-0.1), r"smoothing must be in \[0, 1\)"),
        (dict(time_scale=2.0), "need a schedule"),
        (dict(draw={"how": "uniform"}), "need a schedule"),
    ],
)
def test_settings_that_contradict_each_other(settings, message):
    with pytest.raises(ValueError, match=message):
        Classify(**dict(network=Linear(2), classes=2) | settings)


def test_unknown_draws_are_refused():
    task = Classify(Linear(2), 2, schedule=SCHEDULE, draw={"how": "daily"})
    with pytest.raises(ValueError, match="how must be one of uniform"):
        task.losses(draw(task, BATCH), Context(jnp.int32(0)), BATCH, KEY)
