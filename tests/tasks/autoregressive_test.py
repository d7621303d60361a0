"""Priors over tokens: losses, what is left out, and sampling that is the same with a cache and by whole passes."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.convert.tables import draw, quick  # noqa: F401  a fixture
from vgen.data import images as image_ops
from vgen.models.gpt import GPT
from vgen.models.vqgan import VQGAN
from vgen.tasks.autoregressive import Autoregressive
from vgen.types import Context

pytestmark = pytest.mark.usefixtures("quick")

VQ = VQGAN(channels=8, multipliers=(1, 2), blocks=1, latent_channels=8, num_codes=16, groups=4)
SIZES = dict(vocab=16, grid=(4, 4), depth=2, width=16, heads=2)
PLAIN = Autoregressive(network=GPT(**SIZES), tokenizer=VQ, size=8)
CLASSES = dataclasses.replace(PLAIN, network=GPT(**SIZES, classes=5), classes=5, drop=0.25)
TEXT = dataclasses.replace(
    PLAIN, network=GPT(**SIZES, text_vocab=20, text_length=5, text_head=True), text=True, drop=0.1, text_weight=0.125
)
TASKS = {"nothing": PLAIN, "classes": CLASSES, "text": TEXT}
RNG = np.random.default_rng(0)
BATCH = {
    "image": jnp.asarray(RNG.integers(0, 256, (4, 16, 16, 3)), jnp.uint8),
    "label": jnp.asarray([0, 4, 2, 2]),
    "text": jnp.asarray(RNG.integers(0, 20, (4, 5)), jnp.int32),
    "text_mask": jnp.asarray([[1, 1, 1, 0, 0]] * 4, bool),
}
KEY = jax.random.key(1)


class Whole(nn.Module):
    """A GPT without its cache."""

    net: GPT

    @property
    def vocab(self):
        return self.net.vocab

    @nn.compact
    def __call__(self, ids, **kwargs):
        return self.net(ids, **kwargs)


def drawn(task, scale=2):
    """Parameters that make a difference."""
    params = draw(task, BATCH)
    return jax.tree.map(jnp.asarray, params | {"network": jax.tree.map(lambda a: scale * a, params["network"])})


def conds(task, **changed):
    return {name: BATCH[name] for name in task.conditions or ("label",)} | changed


@pytest.mark.parametrize("name", TASKS)
def test_the_loss_starts_near_uniform_and_reaches_the_network_alone(name):
    task = TASKS[name]
    params = jax.jit(lambda key: task.init(key, BATCH))(jax.random.key(0))
    run = jax.jit(jax.value_and_grad(lambda p: task.losses(p, Context(jnp.int32(0)), BATCH, KEY)["main"].value))
    value, grads = run(params)
    want = np.log(16) if name != "text" else 7 / 8 * np.log(16) + np.log(20) / 8
    assert abs(value - want) < 0.3
    size = lambda part: max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(grads[part]))
    assert size("tokenizer") == 0 < size("network")


def test_the_loss_is_the_likelihood_of_the_tokens(x64):
    """Of the class: -log of the product of the probabilities of every token given those before it, per token."""
    task = dataclasses.replace(CLASSES, drop=0.0)
    params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), drawn(task))
    got = jax.jit(lambda p: task.losses(p, Context(jnp.int32(0)), BATCH, KEY)["main"].value)(params)
    ids = task._tokens(params, BATCH["image"])
    logits = jax.jit(lambda ids: task.network.apply({"params": params["network"]}, ids, label=BATCH["label"]))
    total = 0.0
    for i in range(16):
        seen = ids.at[:, i:].set(0)  # the network does not need to know what comes
        total -= jnp.take_along_axis(jax.nn.log_softmax(logits(seen)[:, i]), ids[:, i : i + 1], 1).sum()
    assert abs(got - total / 64) < 1e-12


def test_text_and_image_are_weighed(x64):
    """Ramesh et al. 2021, section 2.2: an eighth of the text's cross-entropy, over its own tokens alone."""
    params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), drawn(TEXT))
    ids = TEXT._tokens(params, BATCH["image"])
    run = jax.jit(lambda p, told: TEXT._measured(p, ids, ids, told))
    value, scores = run(params, conds(TEXT))
    image, words = TEXT.network.apply({"params": params["network"]}, ids, **conds(TEXT), method="joint")
    each = -jnp.take_along_axis(jax.nn.log_softmax(words), BATCH["text"][..., None], -1)[..., 0]
    image_loss = -jnp.take_along_axis(jax.nn.log_softmax(image), ids[..., None], -1).mean()
    np.testing.assert_allclose(scores["text_loss"], each[:, :3].mean(), rtol=1e-12)
    np.testing.assert_allclose(value, each[:, :3].mean() / 8 + 7 / 8 * image_loss, rtol=1e-12)
    none = run(params, conds(TEXT, text_mask=jnp.zeros((4, 5), bool)))
    assert none[1]["text_loss"] == 0 and np.isfinite(none[0])  # a batch of empty captions


@pytest.mark.parametrize("name", ["classes", "text"])
def test_conditions_can_be_left_out(name):
    task = TASKS[name]
    params = drawn(task)
    other = BATCH | {"label": (BATCH["label"] + 1) % 5, "text": (BATCH["text"] + 1) % 20}
    run = jax.jit(lambda t, b: t.losses(params, Context(jnp.int32(0)), b, KEY)["main"].value, static_argnums=0)
    gone = dataclasses.replace(task, drop=0.999_999, text_weight=0.0)
    kept = dataclasses.replace(task, drop=0.0, text_weight=0.0)
    assert run(gone, BATCH) == run(gone, other)
    assert run(kept, BATCH) != run(kept, other)


def test_noise_is_looked_at_and_not_predicted():
    params = drawn(PLAIN)
    ids = PLAIN._tokens(params, BATCH["image"])
    noisy = dataclasses.replace(PLAIN, noise=0.5)
    seen = noisy._noised(KEY, jnp.zeros((64, 16), jnp.int32))
    assert 0.4 < (seen != 0).mean() < 0.55 and (seen < 16).all()
    measured = jax.jit(lambda ids: PLAIN._measured(params, noisy._noised(jax.random.split(KEY, 3)[1], ids), ids, {})[0])
    got = jax.jit(lambda: noisy.losses(params, Context(jnp.int32(0)), BATCH, KEY)["main"].value)()
    want = measured(ids)
    np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize("name", TASKS)
def test_sampling_with_a_cache_is_sampling_by_whole_passes(name):
    """The same tokens for the same seed, guided where training left conditions out."""
    task = TASKS[name]
    params = drawn(task)
    plain = dataclasses.replace(task, network=Whole(task.network), text_weight=0.0)
    run = lambda task, params: jax.jit(
        lambda key, scale: task.sample(params, key, conds(task), guidance_scale=scale, top_k=12, top_p=0.95)
    )(KEY, 1.7)
    got, want = run(task, params), run(plain, params | {"network": {"net": params["network"]}})
    np.testing.assert_array_equal(got["tokens"], want["tokens"])
    assert got["tokens"].shape == (4, 16) and len(np.unique(np.asarray(got["tokens"]))) > 4
    assert got["image_out"].shape == (4, 8, 8, 3) and got["image_out"].dtype == jnp.uint8


def test_guidance_and_negative_texts():
    params = drawn(TEXT)
    run = jax.jit(lambda scale, c: TEXT.sample(params, KEY, c, guidance_scale=scale, temperature=0.0)["tokens"])
    other = dict(negative=(BATCH["text"] + 3) % 20, negative_mask=BATCH["text_mask"])
    assert (run(6.0, conds(TEXT)) != run(1.0, conds(TEXT))).any()
    assert (run(6.0, conds(TEXT)) != run(6.0, conds(TEXT, **other))).any()
    np.testing.assert_array_equal(run(1.0, conds(TEXT)), run(1.0, conds(TEXT, **other)))
    none = conds(TEXT, text_mask=jnp.zeros((4, 5), bool))
    np.testing.assert_array_equal(run(0.0, conds(TEXT)), run(1.0, none))


def test_knobs_are_traced_and_the_condition_matters():
    params, traces = drawn(CLASSES), []

    @jax.jit
    def run(label, **knobs):
        traces.append(1)
        return CLASSES.sample(params, KEY, {"label": label}, **knobs)["tokens"]

    knobs = dict(guidance_scale=1.0, temperature=1.0, top_k=0, top_p=1.0)
    a = run(BATCH["label"], **knobs)
    greedy = run(BATCH["label"], **knobs | dict(temperature=0.0))
    np.testing.assert_array_equal(greedy, run(BATCH["label"], **knobs | dict(top_k=1)))
    assert (a != greedy).any() and (greedy != run((BATCH["label"] + 1) % 5, **knobs | dict(top_k=1))).any()
    assert len(traces) == 1


def test_a_part_of_a_picture_is_made_anew():
    params = drawn(CLASSES)
    image = jnp.asarray(image_ops.to_uint8(image_ops.downsample(image_ops.to_float(BATCH["image"]), 2)))
    mask = jnp.zeros((4, 8, 8), bool).at[:, 5:].set(True)  # the last two rows of tokens
    run = jax.jit(lambda c: CLASSES.sample(params, KEY, c)["tokens"])
    before = CLASSES._tokens(params, image).reshape(4, 4, 4)
    after = run(conds(CLASSES, image=image, mask=mask)).reshape(4, 4, 4)
    np.testing.assert_array_equal(after[:, :2], before[:, :2])
    assert (after[:, 2:] != before[:, 2:]).any() and (after >= 0).all()


def test_larger_pictures_by_a_window():
    """Of twice the width; on a canvas of the training size it is plain sampling."""
    task = dataclasses.replace(CLASSES, drop=0.0)
    params = drawn(task)
    run = lambda task: jax.jit(lambda: task.sample(params, KEY, conds(task)))()
    wide = run(dataclasses.replace(task, canvas=(8, 16)))
    assert wide["tokens"].shape == (4, 32) and wide["image_out"].shape == (4, 8, 16, 3)
    same = run(dataclasses.replace(task, canvas=(8, 8)))
    np.testing.assert_array_equal(same["tokens"], run(task)["tokens"])


def test_evaluation_is_a_function_of_the_parameters():
    params = drawn(CLASSES)
    metrics = CLASSES.evaluate(params, [BATCH, BATCH], KEY)
    ends = {"loss", "accuracy", "bits_per_token", "perplexity", "loss_no_class", "accuracy_no_class"}
    assert set(metrics) == ends and metrics["loss"] != metrics["loss_no_class"]
    np.testing.assert_allclose(metrics["perplexity"], 2 ** metrics["bits_per_token"])
    np.testing.assert_allclose(metrics["perplexity"], np.exp(metrics["loss"]))
    with pytest.raises(ValueError, match="no batches"):
        CLASSES.evaluate(params, [], KEY)
    assert PLAIN.show(drawn(PLAIN), BATCH, KEY)["samples"].ndim == 3


def test_a_label_that_is_no_class_ends_the_training():
    params = drawn(CLASSES)
    run = jax.jit(lambda label: CLASSES.losses(params, Context(jnp.int32(0)), BATCH | {"label": label}, KEY)["main"])
    assert np.isfinite(run(BATCH["label"]).value)
    for wrong in (5, -1):
        assert np.isnan(run(BATCH["label"].at[1].set(wrong)).value)


@pytest.mark.parametrize(
    "changed, words",
    [
        (dict(size=16), r"grid of \(8, 8\)"),
        (dict(size=9), "multiples of the tokenizer's 2"),
        (dict(canvas=(8, 6)), "no smaller than size"),
        (dict(network=GPT(**SIZES | dict(vocab=17))), "16 codes"),
        (dict(drop=0.1), "drop must be"),
        (dict(text_weight=0.1), "text_weight must be"),
        (dict(classes=3, text=True), "either classes or text"),
    ],
)
def test_contradictions_are_refused(changed, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(PLAIN, **changed)


def test_an_image_needs_a_mask():
    with pytest.raises(ValueError, match="needs a mask"):
        PLAIN.sample(drawn(PLAIN), KEY, {"image": BATCH["image"][:, :8, :8]})
