"""Token masks from pixel masks, inpainting from a partly known start, and blending."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage

from vgen.edit.inpaint_tokens import blend, box_mask, inpaint, token_mask
from vgen.sample import sample
from vgen.tokens.parallel import grid, maskgit_sampler
from vgen.types import Prediction


def test_a_cell_is_masked_when_any_pixel_near_it_is():
    mask = jnp.zeros((2, 8, 12), bool).at[0, 3, 4].set(True).at[1, 7, 11].set(True)
    cells = token_mask(mask, (2, 3)).reshape(2, 2, 3)  # cells of 4 x 4
    np.testing.assert_array_equal(cells[0], [[0, 1, 0], [0, 0, 0]])
    np.testing.assert_array_equal(cells[1], [[0, 0, 0], [0, 0, 1]])
    np.testing.assert_array_equal(token_mask(mask, (2, 3), margin=1).reshape(2, 2, 3)[0], [[1, 1, 0], [1, 1, 0]])
    with pytest.raises(ValueError, match="8 x 12 does not divide into a grid of 3 x 3"):
        token_mask(mask, (3, 3))


def test_margin_is_a_dilation():
    mask = np.random.default_rng(0).random((1, 24, 24)) < 0.01
    for margin in (0, 2, 5):
        wide = scipy.ndimage.maximum_filter(mask[0], size=2 * margin + 1)
        want = wide.reshape(6, 4, 6, 4).any((1, 3)).reshape(1, -1)
        np.testing.assert_array_equal(token_mask(jnp.asarray(mask), (6, 6), margin), want)


def test_inpainting_keeps_known_tokens_and_finds_the_others():
    truth = jax.random.randint(jax.random.key(0), (1, 16), 0, 5)
    mask = jnp.zeros((1, 8, 8), bool).at[:, :, 4:].set(True)
    edit = inpaint((truth + 1) % 5, token_mask(mask, (4, 4)), 5)
    denoise = lambda x, step: Prediction(50.0 * jax.nn.one_hot(truth, 5))
    x = sample(denoise, maskgit_sampler(5), grid(4), jax.random.key(1), edit.start).reshape(4, 4)
    np.testing.assert_array_equal(x[:, 2:], truth.reshape(4, 4)[:, 2:])
    np.testing.assert_array_equal(x[:, :2], (truth.reshape(4, 4)[:, :2] + 1) % 5)


def test_blend_against_scipy():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 1, 20, 16, 3)).astype(np.float32)
    mask = np.zeros((1, 20, 16), bool)
    mask[0, 5:12, 3:9] = True
    soft = scipy.ndimage.gaussian_filter(mask[0].astype(float), 2.0, mode="nearest", truncate=3.0)[None, ..., None]
    np.testing.assert_allclose(blend(*map(jnp.asarray, (a, b, mask)), 2.0), soft * b + (1 - soft) * a, atol=1e-5)
    np.testing.assert_array_equal(blend(*map(jnp.asarray, (a, b, mask)), 0.0), np.where(mask[..., None], b, a))


def test_boxes_are_masks():
    mask = box_mask(np.array([[1, 0, 3, 2], [0, 2, 4, 3]]), 3, 4)
    assert mask.astype(int).tolist() == [
        [[0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]],
        [[0, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]],
    ]


@pytest.mark.parametrize("box", [[1, 1, 1, 2], [2, 0, 1, 2], [-1, 0, 2, 2], [0, 0, 5, 2], [0, 0, 2, 4]])
def test_boxes_outside_of_the_picture_are_refused(box):
    with pytest.raises(ValueError, match=r"lie in the picture, 4 x 3 pixels, got \["):
        box_mask(np.array([[0, 0, 1, 1], box]), 3, 4)
