"""The task of CLIP and FLIP: its loss against PyTorch, its clip, the patches that are left out, and that it learns."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tests.convert.tables import draw, quick  # noqa: F401  a fixture
from vgen.data import images
from vgen.models.clip import CLIP, ImageTower, TextTower, clip_vit
from vgen.models.clip_resnet import ResNet
from vgen.tasks.contrastive import Contrastive, clipped, info_nce
from vgen.types import Context

pytestmark = pytest.mark.usefixtures("quick")

VIT = clip_vit(width=16, depth=1, heads=2, mlp_dim=32, patch_size=4, image_size=16)
TEXT = TextTower(width=16, depth=1, heads=2, mlp_dim=32, vocab=30, length=6, features=8)
NET = CLIP(ImageTower(VIT, 8), TEXT)
RNG = np.random.default_rng(0)
BATCH = {
    "image": jnp.asarray(RNG.integers(0, 256, (6, 16, 16, 3)), jnp.uint8),
    "text": jnp.asarray(RNG.integers(1, 29, (6, 6)), jnp.int32).at[:, -1].set(29),
    "text_mask": jnp.ones((6, 6), bool),
}
KEY = jax.random.key(3)
CTX = Context(jnp.int32(0))


@pytest.fixture(scope="module")
def params():
    return Contrastive(NET, 16).init(KEY, BATCH)


def test_info_nce_against_pytorch(x64):
    logits = np.random.default_rng(1).standard_normal((7, 7)) * 4
    value, grad = jax.value_and_grad(info_nce)(jnp.asarray(logits))
    theirs = torch.tensor(logits, requires_grad=True)
    cross = torch.nn.functional.cross_entropy
    want = (cross(theirs, torch.arange(7)) + cross(theirs.T, torch.arange(7))) / 2
    want.backward()
    assert float(value) == pytest.approx(want.item(), rel=1e-12)
    np.testing.assert_allclose(grad, theirs.grad.numpy(), atol=1e-14)


def test_pictures_of_any_size_are_judged_by_their_text(params):
    task = Contrastive(NET, 16)
    conds = {"image_out": BATCH["image"], "text": BATCH["text"], "text_mask": BATCH["text_mask"]}
    image, text = task.encode_image(params, BATCH["image"]), task.encode_text(params, BATCH["text"])
    np.testing.assert_allclose(task.score(params, conds), np.diagonal(image @ text.T), atol=1e-6)
    large = conds | {"image_out": BATCH["image"].repeat(2, 1).repeat(2, 2)}
    small = np.stack([images.resize(np.asarray(each), 16) for each in large["image_out"]])
    assert np.abs(small.astype(int) - np.asarray(images.resized(large["image_out"], 16))).max() <= 1
    want = task.score(params, conds | {"image_out": jnp.asarray(small)})
    np.testing.assert_allclose(task.score(params, large), want, atol=0.02)


def test_the_clip_lets_gradients_lead_back_inside_alone():
    slope = jax.grad(lambda x, sign: sign * clipped(x, 0.0, 2.0))
    assert [float(clipped(x, 0.0, 2.0)) for x in (-1.0, 1.0, 3.0)] == [0.0, 1.0, 2.0]
    assert [float(slope(x, 1.0)) for x in (-1.0, 1.0, 3.0)] == [0.0, 1.0, 1.0]
    assert [float(slope(x, -1.0)) for x in (-1.0, 1.0, 3.0)] == [-1.0, -1.0, 0.0]


def test_the_factor_on_cosines_is_at_most_100(params):
    task = Contrastive(NET, 16, low=0.0)
    at = lambda value: float(task.scale({"network": {"logit_scale": jnp.float32(value)}}))
    assert at(math.log(30)) == pytest.approx(30, rel=1e-5) and at(9.0) == pytest.approx(100, rel=1e-5) and at(-2.0) == 1
    assert float(task.scale(params)) == pytest.approx(1 / 0.07, rel=1e-5)


def test_the_loss_is_that_of_the_networks_logits(params):
    task = Contrastive(NET, 16)
    found = task.losses(params, CTX, BATCH, KEY)["main"]
    logits = NET.apply({"params": params["network"]}, task.pixels(BATCH["image"]), BATCH["text"]).logits
    assert float(found.value) == pytest.approx(float(info_nce(logits)), rel=1e-4)
    truth = np.arange(6)
    assert float(found.metrics["caption_accuracy"]) == pytest.approx((np.asarray(logits).argmax(1) == truth).mean())
    assert float(found.metrics["image_accuracy"]) == pytest.approx((np.asarray(logits).argmax(0) == truth).mean())


def test_padding_is_told_where_that_is_asked_for(params):
    batch = BATCH | {"text_mask": BATCH["text_mask"].at[:, 2:4].set(False)}
    plain, told = (
        np.asarray(Contrastive(NET, 16, text_padding=told).encode_text(params, batch["text"], batch["text_mask"]))
        for told in (False, True)
    )
    assert np.abs(plain - told).max() > 1e-4
    np.testing.assert_allclose(np.linalg.norm(plain, axis=1), 1, rtol=1e-5)


def test_half_of_the_patches_are_left_out_in_training_alone(params):
    task = Contrastive(NET, 16, mask_ratio=0.5)
    seen = []
    spy = lambda params, image, keep=None, **kwargs: seen.append(keep) or jnp.ones((len(image), 8))
    watched = dataclasses.replace(task)
    object.__setattr__(watched, "encode_image", spy)
    watched.losses(params, CTX, BATCH, KEY)
    watched.losses(params, CTX._replace(train=False), BATCH, KEY)
    kept = np.asarray(seen[0])
    assert kept.shape == (6, 8) and seen[1] is None
    assert all(len(set(row)) == 8 for row in kept) and len({tuple(sorted(row)) for row in kept}) > 1
    assert float(task.losses(params, CTX, BATCH, KEY)["main"].value) != pytest.approx(
        float(Contrastive(NET, 16).losses(params, CTX, BATCH, KEY)["main"].value), rel=1e-6
    )


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="leave a patch, got 0.99 of 16 patches"):
        Contrastive(NET, 16, mask_ratio=0.99)
    with pytest.raises(ValueError, match="a ResNet has no patches"):
        Contrastive(CLIP(ResNet((1, 1, 1, 1), 8, 8, image=32), TEXT), 32, mask_ratio=0.5)


def test_evaluation_takes_all_batches_together_and_equal_captions_as_one(params):
    task = Contrastive(NET, 16)
    same = {name: jnp.concatenate([value[:3], value[:3]]) for name, value in BATCH.items()}
    scores = task.evaluate(params, [BATCH, same], KEY)
    assert set(scores) == {f"{side}_recall_{k}" for side in ("caption", "image") for k in (1, 5, 10)}
    assert scores["image_recall_10"] >= scores["image_recall_5"] >= scores["image_recall_1"] >= 0
    with pytest.raises(ValueError, match="no batches"):
        task.evaluate(params, [], KEY)


@pytest.mark.parametrize("ratio", [0.0, 0.5])
def test_it_learns_to_find_pairs(params, ratio):
    import optax

    task, tx = Contrastive(NET, 16, mask_ratio=ratio), optax.adam(3e-3)
    loss = lambda p, key: task.losses(p, CTX, BATCH, key)["main"].value

    @jax.jit
    def step(p, state, key):
        value, grads = jax.value_and_grad(loss)(p, key)
        updates, state = tx.update(grads, state, p)
        return optax.apply_updates(p, updates), state, value

    p, state = params, tx.init(params)
    for i in range(60):
        p, state, value = step(p, state, jax.random.fold_in(KEY, i))
    assert task.evaluate(p, [BATCH], KEY)["caption_recall_1"] == 1.0
