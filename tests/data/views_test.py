"""Random views: crops against PyTorch, boxes in their places, and what the changes of colour keep."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from vgen.data import views
from vgen.data.views import Distort

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
OFF = dict(jitter=0.0, grey=0.0, blur=0.0, solarize=0.0)


def test_crops_against_pytorch(x64):
    x = RNG.random((2, 12, 10, 3))
    box = np.array([[0.1, 0.3, 0.6, 0.5], [0.4, 0.0, 0.55, 0.7]])
    top, left, height, width = box.T
    # grid_sample's coordinates are -1 and 1 at the borders of the picture
    theta = np.zeros((2, 2, 3))
    theta[:, 0, 0], theta[:, 1, 1] = width, height
    theta[:, 0, 2], theta[:, 1, 2] = 2 * left + width - 1, 2 * top + height - 1
    grid = torch.nn.functional.affine_grid(torch.tensor(theta), (2, 3, 16, 16), align_corners=False)
    nchw = torch.tensor(x).permute(0, 3, 1, 2)
    want = torch.nn.functional.grid_sample(nchw, grid, padding_mode="border", align_corners=False)
    got = views.crop(jnp.asarray(x), jnp.asarray(box), 16)
    np.testing.assert_allclose(got, want.permute(0, 2, 3, 1), atol=1e-12)

    whole = jnp.asarray([[0.0, 0.0, 1.0, 1.0]] * 2)
    want = torch.nn.functional.interpolate(nchw, (5, 5), mode="bilinear", antialias=True)
    np.testing.assert_allclose(views.crop(jnp.asarray(x), whole, 5), want.permute(0, 2, 3, 1), atol=1e-12)


def test_boxes_lie_in_the_picture_and_in_their_frame():
    @jax.jit
    def draw():
        a, b = (views.random_boxes(jax.random.fold_in(KEY, i), 500, (0.5, 1.0)) for i in (0, 1))
        frame = views.around(KEY, a, b)
        return a, b, frame, views.inside(a, frame), views.inside(b, frame)

    a, b, frame, *seen = (np.asarray(box) for box in draw())
    for box in (a, b, frame):
        assert (box[:, :2] >= 0).all() and (box[:, :2] + box[:, 2:] <= 1 + 1e-6).all()
    area, shape = a[:, 2] * a[:, 3], a[:, 3] / a[:, 2]
    assert area.min() >= 0.5 - 1e-6 and area.max() > 0.9 and area.std() > 0.1
    assert shape.min() >= 0.75 - 1e-6 and shape.max() <= 4 / 3 + 1e-6 and shape.std() > 0.1
    for box, part in zip((a, b), seen):
        assert (part[:, :2] >= -1e-6).all() and (part[:, :2] + part[:, 2:] <= 1 + 1e-5).all()
        np.testing.assert_allclose(frame[:, :2] + part[:, :2] * frame[:, 2:], box[:, :2], atol=1e-6)
    assert (frame[:, 2] * frame[:, 3] < 0.999).any()


def test_changes_of_colour():
    x = jnp.asarray(RNG.random((6, 8, 8, 3)), jnp.float32)
    only = lambda **kwargs: Distort(0.0, 0.0, 0.0, 0.0, **OFF | kwargs)(KEY, x)

    @jax.jit
    def change():
        once = jnp.broadcast_to(x[:1], x.shape)
        blurred = [views._blurred(x, jnp.full(6, sigma)) for sigma in (2.0, 0.05)]
        turned = views._turned(x, jnp.full((6, 1, 1, 1), 0.2))
        one = Distort(**OFF | dict(jitter=1.0))(KEY, once)
        return only(), Distort()(KEY, x), one, only(grey=1.0), only(solarize=1.0), turned, *blurred

    same, changed, made, grey, solarized, turned, blurred, sharp = (np.asarray(each) for each in change())
    np.testing.assert_array_equal(same, x)
    assert changed.min() >= 0 and changed.max() <= 1 and np.abs(changed - x).mean() > 0.02
    assert len({float(picture.sum()) for picture in made}) == 6  # each in its own way
    np.testing.assert_allclose(grey, np.repeat((np.asarray(x) @ np.array(views.LUMA))[..., None], 3, -1), atol=1e-6)
    np.testing.assert_allclose(solarized, np.where(x >= 0.5, 1 - np.asarray(x), x))
    np.testing.assert_allclose(turned @ np.array(views.LUMA), np.asarray(x) @ np.array(views.LUMA), atol=1e-5)
    assert np.abs(turned - x).mean() > 0.05
    assert blurred.std() < 0.5 * float(x.std()) and blurred.mean() == pytest.approx(float(x.mean()), abs=0.02)
    np.testing.assert_allclose(sharp, x, atol=1e-6)
