"""Masked tokens: the loss looks at masked places alone, text can be dropped, edits keep what they must."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.convert.tables import draw, quick  # noqa: F401  a fixture
from vgen.data import images as image_ops
from vgen.edit import inpaint_tokens
from vgen.models.maskgit import MaskGIT
from vgen.models.muse import BaseTransformer, SuperResTransformer
from vgen.models.text import TextTransformer
from vgen.models.vqgan import VQGAN
from vgen.sample import sample
from vgen.tasks.tokens import MaskedTokens
from vgen.tokens import parallel
from vgen.types import Context

pytestmark = pytest.mark.usefixtures("quick")

VQ = VQGAN(channels=8, multipliers=(1, 2), blocks=1, latent_channels=8, num_codes=16, groups=4)
TEXT = TextTransformer(vocab=20, length=5, depth=1, width=16, heads=2, mlp_dim=32)
BASE = MaskedTokens(
    transformer=BaseTransformer(16, (4, 4), 1, 16, 2, 32), tokenizer=VQ, text_encoder=TEXT, size=8, train_text=True,
    max_steps=8,
)  # fmt: skip
SUPER = MaskedTokens(
    transformer=SuperResTransformer(16, (8, 8), 16, (4, 4), 1, 1, 16, 2, 32), tokenizer=VQ, text_encoder=TEXT, size=16,
    low_size=8, max_steps=8,
)  # fmt: skip
RNG = np.random.default_rng(0)
BATCH = {
    "image": jnp.asarray(RNG.integers(0, 256, (4, 16, 16, 3)), jnp.uint8),
    "text": jnp.asarray(RNG.integers(0, 20, (4, 5)), jnp.int32),
    "text_mask": jnp.asarray([[1, 1, 1, 0, 0]] * 4, bool),
}
KEY = jax.random.key(1)


@pytest.fixture(scope="module")
def base_params():
    return jax.tree.map(jnp.asarray, draw(BASE, BATCH))


@pytest.fixture(scope="module")
def super_params():
    return jax.tree.map(jnp.asarray, draw(SUPER, BATCH))


@pytest.mark.parametrize("task", [BASE, SUPER], ids=["base", "superres"])
def test_loss_starts_near_uniform_and_training_text_matters(task):
    params = jax.jit(lambda key: task.init(key, BATCH))(jax.random.key(0))
    loss = jax.jit(lambda p, b: task.losses(p, Context(jnp.int32(0)), b, KEY)["main"].value)
    assert abs(loss(params, BATCH) - np.log(16)) < 1.0
    dropped = dataclasses.replace(task, text_drop=1.0)
    other = BATCH | {"text": (BATCH["text"] + 1) % 20}
    params = jax.tree.map(jnp.asarray, draw(task, BATCH))
    value = jax.jit(lambda t, b: t.losses(params, Context(jnp.int32(0)), b, KEY)["main"].value, static_argnums=0)
    assert value(dropped, BATCH) == value(dropped, other)
    kept = dataclasses.replace(task, text_drop=0.0)
    assert value(kept, BATCH) != value(kept, other)


def test_cross_entropy_counts_masked_tokens_alone():
    logits = jnp.log(jnp.array([[[0.7, 0.1, 0.1, 0.1], [0.25, 0.25, 0.25, 0.25]]]))
    tokens, mask = jnp.array([[0, 3]]), jnp.array([[True, False]])
    value, accuracy = BASE._cross_entropy(logits, tokens, mask, 0.0)
    np.testing.assert_allclose(value, -np.log(0.7), rtol=1e-6)
    assert accuracy == 1
    smoothed, _ = BASE._cross_entropy(logits, tokens, mask, 0.1)
    np.testing.assert_allclose(smoothed, -(0.925 * np.log(0.7) + 0.075 * np.log(0.1)), rtol=1e-6)


def test_frozen_parts_get_no_gradient(base_params):
    loss = lambda p: BASE.losses(p, Context(jnp.int32(0)), BATCH, KEY)["main"].value
    grads = jax.jit(jax.grad(loss))(base_params)
    size = lambda name: max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(grads[name]))
    assert size("tokenizer") == 0 < min(size("transformer"), size("text_encoder"))


def conds(**more):
    return {"text": BATCH["text"], "text_mask": BATCH["text_mask"]} | more


def test_revisions_find_tokens_again(base_params):
    """Of four steps: none to revise, two, and all but the first; the pictures are of the last tokens."""
    run = jax.jit(lambda share: BASE.sample(base_params, KEY, conds(), steps=4, revise=share))
    none, half, most = (run(share) for share in (0.0, 0.5, 0.75))
    assert all((out["tokens"] < BASE.mask_id).all() for out in (none, half, most))
    assert len({out["tokens"].tobytes() for out in jax.device_get((none, half, most))}) == 3
    np.testing.assert_array_equal(none["tokens"], BASE.sample(base_params, KEY, conds(), steps=4)["tokens"])
    decoded = BASE.decode(base_params, half["tokens"])
    np.testing.assert_array_equal(half["image_out"], image_ops.to_uint8(decoded))


def test_negative_prompt_takes_the_place_of_no_text(base_params):
    one = jax.jit(lambda c, scale: BASE.sample(base_params, KEY, c, guidance_scale=scale, steps=4)["tokens"])
    negative = conds(negative=(BATCH["text"] + 7) % 20, negative_mask=BATCH["text_mask"])
    assert not jnp.array_equal(one(conds(), 6.0), one(negative, 6.0))
    np.testing.assert_array_equal(one(conds(), 0.0), one(negative, 0.0))  # no guidance: neither is looked at
    same = conds(negative=BATCH["text"], negative_mask=BATCH["text_mask"])
    np.testing.assert_array_equal(one(same, 6.0), one(conds(), 0.0))  # guidance away from the prompt itself is none


def test_inpainting_keeps_tokens_and_pixels_outside_the_mask(base_params):
    mask = np.zeros((4, 16, 16), bool)
    mask[:, :, 12:] = True  # the last column of tokens of the 8-pixel picture
    image = BATCH["image"]
    out = BASE.sample(base_params, KEY, conds(image=image, mask=jnp.asarray(mask)), steps=4)
    low = image_ops.downsample(image_ops.to_float(image), 2)
    before = VQ.apply({"params": base_params["tokenizer"]}, low, method="tokenize").reshape(4, 4, 4)
    after = out["tokens"].reshape(4, 4, 4)
    np.testing.assert_array_equal(after[:, :, :3], before[:, :, :3])
    assert (after < 16).all()
    np.testing.assert_array_equal(out["image_out"][:, :, :6], image_ops.to_uint8(low)[:, :, :6])


def test_mask_free_editing_changes_little_at_a_time(base_params):
    image = BATCH["image"]
    low = image_ops.downsample(image_ops.to_float(image), 2)
    before = VQ.apply({"params": base_params["tokenizer"]}, low, method="tokenize").reshape(4, -1)
    few = dataclasses.replace(BASE, max_steps=2).sample(base_params, KEY, conds(image=image), steps=2)["tokens"]
    assert 1 <= (few != before).sum(1).max() <= 2  # two iterations of one token (8 % of 16)


def test_superres_follows_its_low_resolution_tokens(super_params):
    draw = lambda tokens: SUPER.sample(super_params, KEY, conds(tokens=tokens), steps=3)["image_out"]
    a, b = draw(jnp.zeros((4, 16), jnp.int32)), draw(jnp.full((4, 16), 5, jnp.int32))
    assert a.shape == (4, 16, 16, 3) and a.dtype == jnp.uint8
    assert not jnp.array_equal(a, b)


def test_low_noise_replaces_some_conditioning_tokens():
    noisy = dataclasses.replace(SUPER, low_noise=1.0)
    low = jnp.zeros((64, 16), jnp.int32)
    share = (noisy._corrupt(KEY, low) != 0).mean()
    assert 0.35 < share < 0.6  # uniform in [0, 1) of the tokens, of which 1 in 16 stays itself


def test_evaluation_is_a_function_of_the_parameters(base_params):
    metrics = BASE.evaluate(base_params, [BATCH], KEY)
    assert metrics == BASE.evaluate(base_params, [BATCH], KEY)
    assert set(metrics) == {"loss", "accuracy", "loss_no_text", "accuracy_no_text"}
    assert metrics["loss"] != metrics["loss_no_text"]


def test_contradictions_are_refused():
    with pytest.raises(ValueError, match="grid of"):
        dataclasses.replace(BASE, size=16)
    with pytest.raises(ValueError, match="16 codes"):
        dataclasses.replace(BASE, transformer=BaseTransformer(17, (4, 4), 1, 16, 2, 32))
    with pytest.raises(ValueError, match="needs low_size"):
        dataclasses.replace(SUPER, low_size=0)


@pytest.mark.parametrize("task", [BASE, SUPER], ids=["base", "superres"])
def test_transformers_by_codes_are_told_the_codebooks(task):
    """Another codebook, other predictions of the same tokens."""
    task = dataclasses.replace(task, transformer=task.transformer.clone(by_codes=True))
    params = jax.tree.map(jnp.asarray, draw(task, BATCH))
    loss = jax.jit(lambda p: task.losses(p, Context(jnp.int32(0)), BATCH, KEY)["main"].value)
    quantizer = params["tokenizer"]["quantizer"]
    assert np.isfinite(loss(params)) and quantizer["codebook"].shape[0] == 16
    rolled = quantizer | {"codebook": jnp.roll(quantizer["codebook"], 1, 0)}
    tokens, low = task._tokens(params, BATCH["image"])
    told = task._told(params, BATCH)
    said = [
        jax.jit(lambda p: task._predict(p, tokens, low, told, None))(p)
        for p in (params, params | {"tokenizer": params["tokenizer"] | {"quantizer": rolled}})
    ]
    assert np.abs(said[0] - said[1]).max() > 1e-3


# ------------------------------------------------------------------------------------------------------------ classes

CLASSES = MaskedTokens(
    transformer=MaskGIT(codebook=16, classes=3, length=17, depth=1, width=16, heads=2, mlp_dim=32), tokenizer=VQ,
    size=8, text_drop=0.0, max_steps=8,
)  # fmt: skip
LABELS = {"image": BATCH["image"], "label": jnp.asarray([0, 1, 2, 1])}


@pytest.fixture(scope="module")
def class_params():
    """Large ones, so that what a class says is heard above the noise of sampling."""
    params = jax.tree.map(jnp.asarray, draw(CLASSES, LABELS))
    return params | {"transformer": jax.tree.map(lambda x: 4 * x, params["transformer"])}


def test_classes_start_near_uniform_and_matter_unless_left_out(class_params):
    begun = jax.jit(lambda key: CLASSES.init(key, LABELS))(jax.random.key(0))
    value = jax.jit(lambda t, p, b: t.losses(p, Context(jnp.int32(0)), b, KEY)["main"].value, static_argnums=0)
    other = LABELS | {"label": (LABELS["label"] + 1) % 3}
    assert set(begun) == {"transformer", "tokenizer"} and (CLASSES.mask_id, CLASSES.classes, BASE.classes) == (19, 3, 0)
    assert abs(value(CLASSES, begun, LABELS) - np.log(16)) < 0.5
    assert value(CLASSES, class_params, LABELS) != value(CLASSES, class_params, other)
    never = dataclasses.replace(CLASSES, text_drop=1.0)
    assert value(never, class_params, LABELS) == value(never, class_params, other)
    for bad in (-1, 3):
        assert np.isnan(value(CLASSES, class_params, LABELS | {"label": jnp.asarray([0, 1, bad, 2])}))


def test_smoothed_cross_entropy_is_that_of_torch(x64):
    torch = pytest.importorskip("torch")
    logits, tokens = RNG.standard_normal((2, 5, 16)), RNG.integers(0, 16, (2, 5))
    mask = RNG.random((2, 5)) < 0.6
    theirs = torch.tensor(logits, requires_grad=True)
    want = torch.nn.functional.cross_entropy(theirs[mask], torch.tensor(tokens[mask]), label_smoothing=0.1)
    want.backward()
    loss = lambda x: CLASSES._cross_entropy(x, jnp.asarray(tokens), jnp.asarray(mask), 0.1)[0]
    got, gradient = jax.value_and_grad(loss)(jnp.asarray(logits))
    np.testing.assert_allclose(got, want.item(), rtol=1e-12)
    np.testing.assert_allclose(gradient, theirs.grad.numpy(), atol=1e-14)


def test_classes_are_guided_where_training_left_them_out(class_params):
    draw = jax.jit(
        lambda t, c, scale, n: t.sample(class_params, KEY, c, guidance_scale=scale, steps=n)["tokens"],
        static_argnums=0,
    )
    label = {"label": LABELS["label"]}
    plain = draw(CLASSES, label, 0.0, 4)
    assert plain.shape == (4, 16) and (plain < 16).all()
    np.testing.assert_array_equal(plain, draw(CLASSES, label, 6.0, 4))
    guided = dataclasses.replace(CLASSES, text_drop=0.1)
    np.testing.assert_array_equal(plain, draw(guided, label, 0.0, 4))
    assert not jnp.array_equal(plain, draw(guided, label, 6.0, 4))
    assert not jnp.array_equal(plain, draw(CLASSES, {"label": (label["label"] + 1) % 3}, 0.0, 4))
    assert draw._cache_size() == 2


def test_another_class_in_a_box_leaves_the_rest(class_params):
    """Also in fewer steps: those behind the ones that are left out."""
    masks = jnp.asarray(inpaint_tokens.box_mask(np.array([[8, 4, 16, 12]] * 4), 16, 16))
    late = dataclasses.replace(CLASSES, edit_from=0.5)
    draw = jax.jit(lambda t, c: t.sample(class_params, KEY, c, steps=4), static_argnums=0)
    given = {"label": LABELS["label"], "image": LABELS["image"], "mask": masks}
    one, other = draw(CLASSES, given), draw(CLASSES, given | {"label": (given["label"] + 1) % 3})
    low = image_ops.downsample(image_ops.to_float(LABELS["image"]), 2)
    before = VQ.apply({"params": class_params["tokenizer"]}, low, method="tokenize").reshape(4, -1)
    hole = inpaint_tokens.token_mask(masks[:, ::2, ::2], (4, 4))
    assert hole.sum(1).tolist() == [4] * 4
    for found in (one, other):
        np.testing.assert_array_equal(found["tokens"][~hole], before[~hole])
        np.testing.assert_array_equal(found["image_out"][:, :, :4], image_ops.to_uint8(low)[:, :, :4])
    assert not jnp.array_equal(one["tokens"], other["tokens"])
    times = jax.tree.map(lambda x: x[2:], parallel.grid(4))
    start = jnp.where(hole, CLASSES.mask_id, before)
    sampler = parallel.maskgit_sampler(CLASSES.mask_id)
    by_hand = sample(CLASSES._denoiser(class_params, given, None, None), sampler, times, KEY, start)
    np.testing.assert_array_equal(draw(late, given)["tokens"], by_hand)


def test_classes_and_texts_are_not_mixed():
    with pytest.raises(ValueError, match="MaskGIT is told a class .* got MaskGIT and TextTransformer"):
        dataclasses.replace(CLASSES, text_encoder=TEXT)
    with pytest.raises(ValueError, match="got BaseTransformer and NoneType"):
        dataclasses.replace(BASE, text_encoder=None)
    with pytest.raises(ValueError, match=r"edit_from must be in \[0, 1\), got 1"):
        dataclasses.replace(CLASSES, edit_from=1.0)
    metrics = CLASSES.evaluate(draw(CLASSES, LABELS), [LABELS], KEY)
    assert set(metrics) == {"loss", "accuracy"}
