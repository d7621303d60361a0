"""The task of SAM: its losses against transformers' in float64, rounds written out, clicks that stop, bad input."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.convert.tables import quick  # noqa: F401  a fixture
from vgen.data import images
from vgen.data.scenes import Scenes
from vgen.metrics import segment_eval
from vgen.models import sam_prompt
from vgen.models.clip import CLIP, ImageTower, TextTower, clip_vit
from vgen.models.sam import SAM
from vgen.models.sam_decoder import Masks
from vgen.tasks.segment import Segment, Truth, dice_loss, focal_loss
from vgen.types import Context

pytestmark = pytest.mark.usefixtures("quick")

NET = SAM(
    depth=1, width=16, heads=2, global_layers=(0,), image_size=16, patch=4, channels=16, mask_channels=8,
    decoder_depth=1, decoder_heads=2, decoder_mlp_dim=16, iou_dim=16,
)  # fmt: skip
TASK = Segment(NET, masks=2, points=1, refinements=2)
SCENES = Scenes(16, world=dict(max_objects=3, textures=("solid",)), masks=True)
BATCH = {key: jnp.asarray(np.stack([SCENES[i][key] for i in range(4)])) for key in ("image", "masks")}
KEY = jax.random.key(1)


@pytest.fixture(scope="module")
def params():
    """Of the usual sizes; drawn by NumPy, for which nothing is compiled."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        if path[-1].key in ("bias", "rows", "columns", "scale"):
            return jnp.full(leaf.shape, float(path[-1].key == "scale"))
        x = rng.standard_normal(leaf.shape) / (np.prod(leaf.shape[:-1]) ** 0.5 if path[-1].key == "kernel" else 1)
        return jnp.asarray(x, jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(TASK.init, KEY, BATCH))


def loss_of(task, params, batch=BATCH, key=KEY):
    return task.losses(params, Context(jnp.int32(0)), batch, key)["main"]


@jax.jit
def stepped(params, batch, key):
    """((loss, metrics), gradients), compiled once."""
    return jax.value_and_grad(lambda p: loss_of(TASK, p, batch, key)[:2], has_aux=True)(params)


# -------------------------------------------------------------------------------------------------------- the losses


def test_losses_and_gradients_against_transformers(x64):
    torch = pytest.importorskip("torch")
    theirs = pytest.importorskip("transformers.models.maskformer.modeling_maskformer")
    rng = np.random.default_rng(0)
    logits, truth = 6 * rng.standard_normal((5, 8, 9)), np.float64(rng.random((5, 8, 9)) < 0.3)
    for ours, other in ((focal_loss, theirs.sigmoid_focal_loss), (dice_loss, theirs.dice_loss)):
        x = torch.tensor(logits.reshape(5, -1), requires_grad=True)
        want = other(x, torch.tensor(truth.reshape(5, -1)), 5)
        want.backward()
        got, grad = jax.value_and_grad(lambda x: ours(x, jnp.asarray(truth)).mean())(jnp.asarray(logits))
        assert float(got) == pytest.approx(want.item(), rel=1e-12)
        np.testing.assert_allclose(grad.reshape(5, -1), x.grad.numpy(), rtol=1e-9, atol=1e-16)
    far = jnp.array([[[-300.0, 300.0]]])
    assert np.isfinite(focal_loss(far, jnp.array([[[1.0, 0.0]]]))).all()


def test_a_round_learns_from_its_best_mask(x64):
    """20 focal + dice of the mask with the least of both, and of every mask what is said of its IoU."""
    rng = np.random.default_rng(0)
    truth = Truth(jnp.asarray(rng.random((2, 2, 8, 8)) < 0.4), None, jnp.array([[True, False], [True, True]]))
    out = Masks(jnp.asarray(rng.standard_normal((2, 2, 3, 8, 8))), jnp.asarray(rng.random((2, 2, 3))))
    logits = out.logits.at[0, 0, 1].set(jnp.where(truth.masks[0, 0], 3.0, -3.0))
    out = Masks(logits, out.iou.at[0, 0, 2].set(2.0))
    loss, liked, metrics = TASK.loss_of(out, truth)
    want, each = [], []
    for i, j in ((0, 0), (1, 0), (1, 1)):
        target = truth.masks[i, j].astype(float)
        masks = [20 * focal_loss(x, target) + dice_loss(x, target) for x in out.logits[i, j]]
        found = [(x > 0) & truth.masks[i, j] for x in out.logits[i, j]]
        iou = [f.sum() / ((x > 0) | truth.masks[i, j]).sum() for f, x in zip(found, out.logits[i, j])]
        want.append(min(map(float, masks)) + np.square(np.array(iou) - np.array(out.iou[i, j])).mean())
        each.append(float(iou[int(out.iou[i, j].argmax())]))
    assert float(loss) == pytest.approx(np.mean(want), rel=1e-6)
    assert float(metrics["iou"]) == pytest.approx(np.mean(each), rel=1e-6)
    np.testing.assert_array_equal(liked[0, 0], out.logits[0, 0, 2])
    grads = jax.grad(lambda out: TASK.loss_of(out, truth)[0])(out)
    moved = np.abs(grads.logits).max((-1, -2)) > 0
    assert moved.sum(-1).tolist() == [[1, 0], [1, 1]] and moved[0, 0, 1]
    assert (np.abs(grads.iou) > 0).all(-1).tolist() == [[True, False], [True, True]]


# ---------------------------------------------------------------------------------------------------------- the rounds


def test_rounds_written_out(params):
    """The loss is that of a first prompt, then of clicks and pauses, each with the logits of the round before."""
    from vgen.models import sam_prompt

    choose, begin, quiet, click = jax.random.split(KEY, 4)
    truth = TASK.truth(BATCH["masks"], choose)
    fresh, keys = TASK.fresh(quiet, truth.valid.shape), jax.random.split(click, 3)

    @jax.jit
    def unrolled(params):
        embedding, prompt = TASK.encode(params, BATCH["image"]), TASK.first_prompt(truth, begin)
        loss, logits, first = TASK.loss_of(TASK.decode(params, embedding, prompt), truth)
        losses, used = [loss], [(prompt.labels[..., 2:] >= 0).sum(-1)]
        for r in range(3):
            xy, inside, wrong = sam_prompt.correction(truth.masks, logits > 0, keys[r])
            prompt = sam_prompt.with_click(prompt, TASK.to_picture(xy), inside, fresh[r] & wrong)
            out = TASK.decode(params, embedding, prompt, logits, multimask=False)
            loss, logits, last = TASK.loss_of(out, truth)
            losses.append(loss)
            used.append((prompt.labels[..., 2:] >= 0).sum(-1))
        return jnp.stack(losses), jnp.stack(used), first, last

    losses, used, first, last = unrolled(params)
    (found, metrics), grads = stepped(params, BATCH, KEY)
    assert float(found) == pytest.approx(float(losses.mean()), rel=1e-5)
    assert float(metrics["iou_first"]) == pytest.approx(float(first["iou"]), abs=1e-6)
    assert float(metrics["iou_last"]) == pytest.approx(float(last["iou"]), abs=1e-6)
    np.testing.assert_array_equal(np.diff(used, axis=0)[..., np.asarray(truth.valid)].sum(0), 1)  # one new click each
    assert not np.any(grads["network"]["prompt_encoder"]["gaussian"])


def convolutions(jaxpr) -> list[tuple[int, ...]]:
    """Shapes of the kernels of all convolutions, those inside of scans too."""
    found = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "conv_general_dilated":
            found.append(eqn.invars[1].aval.shape)
        for value in eqn.params.values():
            for inner in value if isinstance(value, (list, tuple)) else [value]:
                if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                    found += convolutions(getattr(inner, "jaxpr", inner))
    return found


def test_a_picture_is_encoded_once(params):
    found = convolutions(jax.make_jaxpr(lambda p: loss_of(TASK, p).value)(params).jaxpr)
    assert found.count((4, 4, 3, 16)) == 1 and found.count((3, 3, 16, 16)) == 1
    assert found.count((2, 2, 1, 2)) == 1  # of the mask prompt: one round's program for all later rounds


def test_remat_is_of_the_rounds(params):
    for remat in (False, True):
        task = Segment(NET, masks=2, points=1, remat=remat)
        jaxpr = jax.make_jaxpr(jax.grad(lambda p: loss_of(task, p).value))(params)
        assert ("remat" in str(jaxpr) or "checkpoint" in str(jaxpr)) == remat


def test_pauses():
    """Of all later rounds two bring no click: the last one, and any other."""
    fresh = np.asarray(Segment(NET).fresh(KEY, (50, 40)))  # as in the paper: 8 clicks, 2 pauses
    assert fresh.shape == (10, 50, 40) and (fresh.sum(0) == 8).all() and not fresh[-1].any()
    assert np.abs((~fresh[:-1]).mean((1, 2)) - 1 / 9).max() < 0.04
    assert np.asarray(Segment(NET, refinements=0).fresh(KEY, (2,))).all()


def test_first_prompts():
    """Half are boxes with noise, half points inside of the object."""
    task = Segment(NET, masks=3)
    masks = np.zeros((200, 3, 16, 16), bool)
    masks[:, 0, 2:5, 3:12], masks[:, 1, 10:, 10:] = True, True
    truth = task.truth(jnp.asarray(masks), KEY)
    assert truth.valid.all(0).tolist() == [True, True, False]
    prompt = task.first_prompt(truth, KEY)
    labels = np.asarray(prompt.labels)
    boxed = labels[..., 0] == 2
    assert 0.4 < boxed.mean() < 0.6 and (labels[boxed][:, :3] == [2, 3, -2]).all()
    assert (labels[~boxed][:, :3] == [-1, -2, 1]).all() and (labels[..., 3:] == -2).all()
    x, y = np.asarray(prompt.points[:, 0, 2], int)[~boxed[:, 0]].T
    assert masks[0, 0][y, x].all() and len(set(zip(x, y))) > 15
    corners = np.asarray(prompt.points[:, 0, :2]).reshape(200, 4)[boxed[:, 0]]
    np.testing.assert_allclose(corners.mean(0), [3, 2, 11, 4], atol=0.4)
    assert 0.5 < corners[:, 0].std() < 1.3


def test_which_masks_are_learned():
    """Any of those that are there; none that cover the whole picture or vanish; smaller masks than the picture do."""
    masks = np.zeros((1, 6, 16, 16), bool)
    for i in range(4):
        masks[0, i, 4 * i : 4 * i + 4] = True
    masks[0, 4] = True
    seen = set()
    for seed in range(30):
        truth = TASK.truth(jnp.asarray(masks), jax.random.key(seed))
        assert truth.masks.shape == (1, 2, 16, 16) and truth.valid.all()
        seen |= {float(y) for y in truth.boxes[0, :, 1]}
    assert seen == {0.0, 4.0, 8.0, 12.0}
    coarse = Segment(NET.clone(image_size=32, patch=8), masks=6)  # masks of 16 for pictures of 32
    small, large = (coarse.truth(jnp.asarray(m), KEY) for m in (masks, masks.repeat(2, 2).repeat(2, 3)))
    for a, b in zip(small._replace(boxes=small.boxes[:, :5]), large._replace(boxes=large.boxes[:, :5])):
        np.testing.assert_array_equal(a, b)  # but for the box of none
    assert small.boxes[0, 1].tolist() == [0, 8, 31, 15]


# --------------------------------------------------------------------------------------------------- told by a CLIP

SEEN = CLIP(
    ImageTower(clip_vit(width=8, depth=1, heads=2, mlp_dim=8, patch_size=4, image_size=8), 6),
    TextTower(width=8, depth=1, heads=2, mlp_dim=8, vocab=11, length=5, features=6, eos=1),
)
TOLD = Segment(NET.clone(text_dim=6), masks=2, points=1, refinements=0, clip=SEEN, clip_size=8, told=0.5)


def test_what_clip_says_takes_the_place_of_the_first_prompt(monkeypatch):
    """Of half of the objects: no point and no box, the vector alone; later rounds add clicks to it.  CLIP is frozen."""
    params = jax.jit(TOLD.init)(KEY, BATCH)
    truth = TOLD.truth(BATCH["masks"], KEY)
    prompt, said = TOLD._say(params, BATCH["image"], truth, TOLD.first_prompt(truth, KEY), KEY)
    told, labels = np.asarray(said["told"]), np.asarray(prompt.labels)
    assert told.any() and not told.all()
    assert (labels[told] == [-1, -2, -2, -2]).all() and ((labels[~told] >= 0).sum(-1) > 0).all()
    np.testing.assert_allclose(np.linalg.norm(said["text"], axis=-1), 1, rtol=1e-5)
    tiny = dataclasses.replace(TOLD, least=1.0)
    assert not tiny._say(params, BATCH["image"], truth, prompt, KEY)[1]["told"].any()

    loss, grads = jax.jit(jax.value_and_grad(lambda p: loss_of(TOLD, p).value))(params)
    assert np.isfinite(loss) and not any(np.any(leaf) for leaf in jax.tree.leaves(grads["clip"]))
    assert np.abs(grads["network"]["text"]["kernel"]).max() > 0
    assert not any(re.fullmatch(pattern, "clip/logit_scale") for pattern in TOLD.groups.values())

    heard, decode = [], Segment.decode
    monkeypatch.setattr(Segment, "decode", lambda *args, **kw: heard.append("text" in kw) or decode(*args, **kw))
    jax.eval_shape(lambda p: loss_of(TOLD, p).value, params)
    assert len(heard) >= 2 and all(heard)  # in the rounds behind the first one too
    monkeypatch.undo()

    none, vector = sam_prompt.no_prompt((4, 1), 1), jnp.zeros((4, 1, 6)).at[:, 0, 2].set(1.0)
    _, kept = NET.clone(text_dim=6).apply(
        {"params": params["network"]}, TOLD.encode(params, BATCH["image"]), none.points, none.labels, method="decode",
        slots=True, text=vector, capture_intermediates=lambda module, _: module.name == "text", mutable="intermediates",
    )  # fmt: skip
    layer = params["network"]["text"]
    (said,) = kept["intermediates"]["text"]["__call__"]
    np.testing.assert_allclose(said[0, 0], 6**0.5 * layer["kernel"][2] + layer["bias"], rtol=1e-5)  # as loud as a click

    words = TOLD.words_of(params, jnp.array([[4, 5, 1, 0, 0], [6, 1, 0, 0, 0]]))
    apart = segment_eval.by_words(TOLD, params, BATCH["image"], BATCH["masks"][:, :2], words[None].repeat(4, 0))
    assert apart.shape == (4, 2, 2) and ((apart >= 0) & (apart <= 1)).all()
    with pytest.raises(ValueError, match="text_dim must be the CLIP's number of features .* text_dim=0, features=6"):
        Segment(NET, clip=SEEN)
    with pytest.raises(ValueError, match="text_dim must be .* text_dim=6, features=0"):
        Segment(NET.clone(text_dim=6))


# --------------------------------------------------------------------------------------------- bad input, and learning


def test_pictures_without_masks_teach_nothing(params):
    empty = BATCH | {"masks": jnp.zeros_like(BATCH["masks"])}
    (value, _), grads = stepped(params, empty, KEY)
    assert float(value) == 0 and all(not np.any(leaf) for leaf in jax.tree.leaves(grads))


def test_bad_input_is_named(params):
    with pytest.raises(ValueError, match="the batch needs masks, it has image"):
        loss_of(TASK, params, {"image": BATCH["image"]})
    with pytest.raises(ValueError, match="do not shrink to 16"):
        TASK.truth(jnp.zeros((1, 2, 24, 24), bool), KEY)
    for wrong in (dict(masks=0), dict(points=-1), dict(boxes=1.5)):
        with pytest.raises(ValueError, match="Segment: masks must be at least 1"):
            Segment(NET, **wrong)
    with pytest.raises(ValueError, match="no batches"):
        TASK.evaluate(params, [], KEY)
    with pytest.raises(ValueError, match="no picture has a mask"):
        TASK.evaluate(params, [BATCH | {"masks": jnp.zeros_like(BATCH["masks"])}], KEY)


def test_what_is_measured_and_shown(params):
    scores = TASK.evaluate(params, [BATCH], KEY)
    assert set(scores) == {"iou_one_click", "iou_three_clicks", "iou_box", "iou_best_of_three"}
    assert 1 >= scores["iou_best_of_three"] >= scores["iou_one_click"] >= 0
    shown = TASK.show(params, BATCH, KEY)["masks"]
    assert shown.dtype == np.uint8 and shown.shape[1] > 6 * 16
    empty = TASK.show(params, BATCH | {"masks": jnp.zeros_like(BATCH["masks"])}, KEY)["masks"]
    plain = images.grid(np.repeat(np.asarray(BATCH["image"]), 3, 0), columns=6)
    np.testing.assert_array_equal(empty, plain)  # where there is no object nothing is painted


@pytest.mark.slow
def test_it_learns(params):
    import optax

    tx = optax.adam(3e-3)

    @jax.jit
    def change(p, grads, state):
        updates, state = tx.update(grads, state, p)
        return optax.apply_updates(p, updates), state

    p, state, rows = params, tx.init(params), []
    for i in range(600):
        (_, metrics), grads = stepped(p, BATCH, jax.random.fold_in(KEY, i))
        p, state = change(p, grads, state)
        rows.append([float(metrics["iou_last"]), float(metrics["mask_loss"])])
    (before, loss), (after, less) = np.mean(rows[:10], 0), np.mean(rows[-100:], 0)
    assert after > 0.6 > 0.3 > before and less < 0.5 * loss
