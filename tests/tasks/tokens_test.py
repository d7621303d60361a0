"""Masked tokens: the loss looks at masked places alone, text can be dropped, edits keep what they must."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.convert.tables import draw, quick  # noqa: F401  a fixture
from vgen.data import images as image_ops
from vgen.models.muse import BaseTransformer, SuperResTransformer
from vgen.models.text import TextTransformer
from vgen.models.vqgan import VQGAN
from vgen.tasks.tokens import MaskedTokens
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
    states, mask = task._read(params, BATCH["text"], BATCH["text_mask"])
    said = [
        jax.jit(lambda p: task._predict(p, tokens, low, states, mask, None))(p)
        for p in (params, params | {"tokenizer": params["tokenizer"] | {"quantizer": rolled}})
    ]
    assert np.abs(said[0] - said[1]).max() > 1e-3
