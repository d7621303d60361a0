"""A-CLIP's task: its losses against PyTorch, the patches it looks at, and a teacher that no gradient reaches."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tests.convert.tables import draw, float64, quick  # noqa: F401  a fixture
from tests.tasks.contrastive_test import BATCH, KEY, NET, TEXT
from vgen import trees
from vgen.data.views import Distort
from vgen.models.clip import CLIP, ImageTower, unit
from vgen.models.clip_resnet import ResNet
from vgen.state import Layout
from vgen.tasks.a_clip import AttentiveContrastive, byol_loss, class_attention, most_attended, simclr_loss
from vgen.tasks.contrastive import Contrastive, info_nce
from vgen.types import Context

pytestmark = pytest.mark.usefixtures("quick")

TASK = AttentiveContrastive(NET, 16, hidden=12, projected=5, momentum=0.9, momentum_steps=10, distort=Distort())
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def params():
    """Nothing at its first value, the teacher another than the student."""
    return draw(TASK, BATCH)


def theirs(a, b, tau):
    """SimCLR's loss as microsoft/A-CLIP has it, of two views."""
    a, b = F.normalize(a, dim=-1), F.normalize(b, dim=-1)
    labels, own = torch.arange(len(a)), torch.eye(len(a)) * 1e9
    rows = lambda x, y: torch.cat([x @ y.T / tau, x @ x.T / tau - own], 1)
    return (F.cross_entropy(rows(a, b), labels) + F.cross_entropy(rows(b, a), labels)) / 2


@pytest.mark.parametrize("name", ["simclr", "byol"])
def test_losses_against_pytorch(name, x64):
    ours, want = {
        "simclr": (lambda a, b: simclr_loss(a, b, 0.1), lambda a, b: theirs(a, b, 0.1)),
        "byol": (byol_loss, lambda a, b: (2 - 2 * (F.normalize(a) * F.normalize(b)).sum(-1)).mean()),
    }[name]
    given = [RNG.standard_normal((7, 5)) for _ in range(2)]
    value, grads = jax.value_and_grad(ours, (0, 1))(*map(jnp.asarray, given))
    tensors = [torch.tensor(x, requires_grad=True) for x in given]
    loss = want(*tensors)
    loss.backward()
    assert float(value) == pytest.approx(loss.item(), rel=1e-12)
    for got, tensor in zip(grads, tensors):
        np.testing.assert_allclose(got, tensor.grad.numpy(), atol=1e-13)


def test_the_most_attended_cells_stay(x64):
    """Those of the authors: cells of 2 x 2, 25 of 49 of a picture of 224 pixels."""
    attention = RNG.random((3, 196))
    cells = F.interpolate(torch.tensor(attention).reshape(3, 1, 14, 14), (7, 7), mode="bilinear").reshape(3, 49)
    best = torch.argsort(cells, descending=True)[:, :25].numpy()
    vit = dataclasses.replace(NET.visual.vit, patch_size=16, image_size=224)
    task = AttentiveContrastive(CLIP(ImageTower(vit, 8), TEXT), 224)
    keep = np.asarray(most_attended(jnp.asarray(attention), (14, 14), task._kept() // 4))
    assert task._kept() == keep.shape[1] == 100
    for row, want in zip(keep, best):
        pairs = {(2 * (cell // 7) + i, 2 * (cell % 7) + j) for cell in want for i in (0, 1) for j in (0, 1)}
        assert {divmod(int(patch), 14) for patch in row} == pairs and len(set(row.tolist())) == 100


def test_a_view_looks_where_the_teacher_looked():
    """Attention at the picture's lower right quarter; a view of that quarter has it everywhere, its left half not."""
    hot = jnp.zeros((2, 4, 4)).at[:, 2:, 2:].set(1.0).reshape(2, 16) + jnp.linspace(0, 0.01, 16)
    whole, left = jnp.asarray([[0.0, 0.0, 1.0, 1.0]] * 2), jnp.asarray([[0.5, 0.0, 0.5, 1.0]] * 2)
    task = dataclasses.replace(TASK, mask_ratio=0.99)
    assert task._kept() == 4
    assert set(np.asarray(task.keep(hot, whole))[0].tolist()) == {10, 11, 14, 15}
    assert {patch % 4 // 2 for patch in np.asarray(task.keep(hot, left))[0].tolist()} == {1}
    assert TASK.keep(hot, whole).shape == (2, 12)  # 3 of 4 cells: half of them and one


def test_views_are_of_one_picture_and_the_teacher_sees_both():
    task = dataclasses.replace(TASK, distort=None, area=(1.0, 1.0))
    first, second, wide, *boxes = jax.jit(task.cut)(KEY, BATCH["image"])
    assert first.shape == wide.shape == (6, 16, 16, 3)
    whole = task.pixels(BATCH["image"])
    inexact = [np.abs(np.asarray(x - whole)).mean() for x in (first, second, wide)]  # crops of 3 : 4 have no such area
    assert max(inexact) < 1e-5 and all(np.allclose(box, [[0, 0, 1, 1]], atol=1e-6) for box in boxes)
    large = jnp.asarray(RNG.integers(0, 256, (6, 32, 32, 3)), jnp.uint8)
    first, second, wide, *_ = jax.jit(TASK.cut)(KEY, large)
    assert first.shape == second.shape == wide.shape == (6, 16, 16, 3)
    assert len({float(x.mean()) for x in (first, second, wide)}) == 3


def test_the_loss_is_the_sum_of_its_terms_and_no_gradient_reaches_the_teacher(params, x64):
    """Value and gradient against the terms put together anew, on a teacher that is constant there."""
    params, ctx, task = float64(params), Context(jnp.int32(4)), dataclasses.replace(TASK)
    cut = jax.jit(TASK.cut)(KEY, BATCH["image"])
    object.__setattr__(task, "cut", lambda key, image: cut)
    first, second, wide, *boxes = cut
    heads = TASK._heads

    def taught():
        teacher = TASK.teacher(params, ctx.step)
        pooled, attention = class_attention(NET.visual.vit, teacher["vit"], wide)
        target = heads["projection"].apply({"params": teacher["projection"]}, pooled)
        return target, jnp.concatenate([TASK.keep(attention, box) for box in boxes])

    target, keep = jax.jit(taught)()

    def expected(p):
        visual, head = {"params": p["network"]}, lambda name, x: heads[name].apply({"params": p["heads"][name]}, x)
        seen = NET.apply(visual, jnp.concatenate([first, second]), method="encode_image", keep=keep)
        text = unit(NET.apply(visual, BATCH["text"], method="encode_text").features)
        scale = jnp.exp(p["network"]["logit_scale"])
        clip = [info_nce(scale * unit(x) @ text.T) for x in (seen.features[:6], seen.features[6:])]
        z, q = head("simclr", seen.pooled), head("predictor", head("projection", seen.pooled))
        byol = byol_loss(q[:6], target) / 2 + byol_loss(q[6:], target) / 2
        return sum(clip) / 2 + simclr_loss(z[:6], z[6:], 0.1) + 2 * byol

    def run(p):
        loss = task.losses(p, ctx, BATCH, KEY)["main"]
        return loss.value, loss

    (value, found), grads = jax.jit(jax.value_and_grad(run, has_aux=True))(params)
    want, want_grads = jax.jit(jax.value_and_grad(expected))(params)
    assert float(value) == pytest.approx(float(want), rel=1e-12)
    grads, want_grads = trees.flatten(grads), trees.flatten(want_grads)
    for path, grad in grads.items():
        np.testing.assert_allclose(grad, want_grads[path], atol=1e-11, err_msg=path)
    assert not any(np.abs(grads[path]).max() for path in grads if path.startswith("teacher/"))
    assert all(np.abs(grads[path]).max() for path in grads if path.startswith("heads/predictor/"))
    terms = {name: float(found.metrics[name]) for name in ("clip", "simclr", "byol")}
    assert float(value) == pytest.approx(terms["clip"] + terms["simclr"] + 2 * terms["byol"])

    m = float(found.metrics["momentum"])
    assert m == pytest.approx(1 - 0.1 * (1 + np.cos(0.4 * np.pi)) / 2)
    student = {f"teacher/vit/{path}": x for path, x in trees.flatten(params["network"]["visual"]["vit"]).items()}
    flat = trees.flatten(params)
    for path, x in student.items():
        np.testing.assert_allclose(found.updates[path], m * flat[path] + (1 - m) * x, atol=1e-12)


def test_momentum_rises_to_one_and_stays():
    rise = [float(TASK.momentum_at(jnp.int32(step))) for step in (0, 5, 10, 20)]
    np.testing.assert_allclose(rise, [0.9, 0.95, 1, 1], rtol=1e-6)


def test_what_is_trained_and_what_moves():
    """The teacher begins as the student; it and the projection of patches are buffers, the teacher alone is updated."""
    layout = Layout(TASK, BATCH)
    held = {path for path in layout.buffers if not path.startswith("teacher/")}
    assert held == {"network/visual/vit/patch_embed/kernel"} and not layout.frozen
    updates = jax.eval_shape(lambda p: TASK.losses(p, Context(jnp.int32(0)), BATCH, KEY)["main"].updates,
                             trees.unflatten(layout.shapes))  # fmt: skip
    assert set(updates) == set(layout.buffers) - held
    kernel = lambda vit: vit["layers"]["mlp"]["fc1"]["kernel"]
    begun = lambda p: (kernel(p["teacher"]["vit"]), kernel(p["network"]["visual"]["vit"]))
    np.testing.assert_array_equal(*jax.jit(lambda key: begun(TASK.init(key, BATCH)))(KEY))
    assert "patch_embed" not in dataclasses.replace(TASK, freeze_patches=False).buffers


def test_out_of_training_it_is_clip(params):
    ctx = Context(jnp.int32(0), train=False)
    run = lambda task: jax.jit(lambda params: task.losses(params, ctx, BATCH, KEY)["main"])(params)
    ours, clips = run(TASK), run(Contrastive(NET, 16))
    assert float(ours.value) == float(clips.value) and not ours.updates


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="must be a ViT pooled at its class token"):
        AttentiveContrastive(CLIP(ResNet((1, 1, 1, 1), 8, 8, image=32), TEXT), 32, mask_ratio=0.0)
    vit = dataclasses.replace(NET.visual.vit, pool="gap")
    with pytest.raises(ValueError, match="must be a ViT pooled at its class token"):
        AttentiveContrastive(CLIP(ImageTower(vit, 8), TEXT), 16)
    with pytest.raises(ValueError, match=r"the grid of patches must be even, got \(5, 5\)"):
        AttentiveContrastive(NET, 20)
