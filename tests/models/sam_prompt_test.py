"""Prompts in slots against prompts of their own length, and the places of simulated clicks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from tests.conftest import quick_compilation
from vgen.models import sam, sam_prompt

SIZES = dict(depth=1, width=8, heads=2, global_layers=(0,), image_size=32, patch=8, channels=16, mask_channels=8)
NET = sam.SAM(**SIZES, decoder_heads=2, decoder_mlp_dim=8, iou_dim=8, text_dim=6)


@pytest.fixture(scope="module")
def network():
    """(parameters in float64, none of them zero; a function of keywords of `decode`, compiled)."""
    shapes = jax.eval_shape(NET.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda a: rng.standard_normal(a.shape) * 0.5, shapes)
    return params, rng.standard_normal((2, 4, 4, 16))  # NumPy's, so that either precision takes them


def prompts(rng):
    points = np.float64(rng.uniform(0, 31, (2, 3, 2, 2)))
    labels = np.array([[[1, 0], [1, 1], [0, 1]]] * 2)
    corner = rng.uniform(0, 15, (2, 3, 2))
    return points, labels, np.concatenate([corner, corner + 10], -1)


def test_slots_give_the_answers_of_prompts_of_any_length(x64, network):
    """One of points, one of points and a box, and one of a box: in slots as without, with however many slots."""
    params, embedding = jax.tree.map(jnp.asarray, network)
    points, labels, boxes = map(jnp.asarray, prompts(np.random.default_rng(1)))
    text = jnp.asarray(np.random.default_rng(2).standard_normal((2, 3, 6)))
    cast = lambda slots: slots._replace(points=jnp.asarray(slots.points, jnp.float64))

    def fill(clicks, box, points):
        out = sam_prompt.no_prompt((2, 3), clicks)
        out = cast(out if box is None else sam_prompt.with_boxes(out, box))
        for i in range(0 if points is None else points.shape[2]):
            out = sam_prompt.with_click(out, points[:, :, i], labels[:, :, i] == 1)
        exact = out.points if box is None else out.points.at[..., :2, :].set(box.reshape(2, 3, 2, 2))
        return out._replace(points=exact)

    @jax.jit
    def run(params):
        decode = lambda *args, **kw: NET.apply({"params": params}, embedding, *args, **kw, method="decode")
        pairs = []
        for clicks, box, pts in ((3, None, points), (2, boxes, points), (1, boxes, None)):
            plain = decode(pts, None if pts is None else labels, box)
            pairs.append((decode(*fill(clicks, box, pts), slots=True), plain))
        unheard = decode(*fill(2, None, points), slots=True, text=text, told=jnp.zeros((2, 3), bool))
        heard = decode(*fill(2, None, points), slots=True, text=text)
        return pairs, unheard, heard

    with quick_compilation():
        pairs, unheard, heard = run(params)
    for got, want in pairs + [(unheard, pairs[0][1])]:
        for a, b in zip(got, want):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6 * np.abs(b).max())
    assert np.abs(heard.logits - unheard.logits).max() > 1e-3
    answers = [np.asarray(want.logits) for _, want in pairs]
    assert min(np.abs(a - b).max() for a, b in zip(answers, answers[1:])) > 1e-3  # the prompts say different things


def test_text_needs_slots(network):
    params, embedding = jax.tree.map(jnp.asarray, network)
    with pytest.raises(ValueError, match="text needs slots"):
        NET.apply({"params": params}, embedding, text=jnp.zeros((2, 3, 6)), method="decode")


def test_clicks_fill_slots_in_turn():
    prompt = sam_prompt.no_prompt((2,), 2)
    assert prompt.labels.tolist() == [[-1, -2, -2, -2]] * 2
    prompt = sam_prompt.with_boxes(prompt, jnp.array([[1.0, 2, 3, 4]] * 2), jnp.array([True, False]))
    assert prompt.labels.tolist() == [[2, 3, -2, -2], [-1, -2, -2, -2]]
    assert prompt.points[0, :2].tolist() == [[1, 2], [3, 4]] and not prompt.points[1].any()
    for k in range(3):  # one too many
        xy = jnp.full((2, 2), 10.0 * (k + 1))
        prompt = sam_prompt.with_click(prompt, xy, jnp.array([True, False]), jnp.array([True, k > 0]))
    assert prompt.labels.tolist() == [[2, 3, 1, 1], [-1, -2, 0, 0]]
    assert prompt.points[:, 2:, 0].tolist() == [[10, 20], [20, 30]]


MASKS = np.random.default_rng(0).random((40, 13, 17)) < np.linspace(0.02, 1.0, 40)[:, None, None]


def test_depth_is_the_exact_distance_transform():
    want = [ndimage.distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1] for mask in MASKS]
    got = jax.jit(sam_prompt.depth_inside)(jnp.asarray(MASKS))
    np.testing.assert_allclose(got, np.float32(want), rtol=1e-6)
    xy, depth = sam_prompt.deepest_place(jnp.asarray(MASKS))
    for (x, y), d, distances in zip(np.asarray(xy, int), np.asarray(depth), want):
        assert d == pytest.approx(distances.max()) and distances[y, x] == pytest.approx(d)


def test_boxes():
    boxes = np.asarray(sam_prompt.boxes_of(jnp.asarray(np.concatenate([MASKS, np.zeros((1, 13, 17), bool)]))))
    for mask, box in zip(MASKS, boxes):
        y, x = np.nonzero(mask)
        assert box.tolist() == [x.min(), y.min(), x.max(), y.max()]
    assert not boxes[-1].any()


def test_drawn_places_are_uniform_over_the_region():
    region = np.zeros((6, 7), bool)
    region[1, 2:5], region[4, 6], region[5, 0] = True, True, True
    draws = sam_prompt.drawn_place(jax.random.key(0), jnp.broadcast_to(region, (4000, 6, 7)))
    x, y = np.asarray(draws, int).T
    counts = np.zeros((6, 7))
    np.add.at(counts, (y, x), 1)
    assert not counts[~region].any()
    assert np.abs(counts[region] - 800).max() < 5 * np.sqrt(800 * 0.8)
    assert not np.asarray(sam_prompt.drawn_place(jax.random.key(0), jnp.zeros((2, 6, 7), bool))).any()


def test_corrections():
    """Without a key the middle of the larger wrong region, with one any wrong pixel; nothing where nothing is wrong."""
    truth, guess = np.zeros((3, 9, 9), bool), np.zeros((3, 9, 9), bool)
    truth[:, 0:5, 0:5] = True
    guess[0, 0:5, 0:2] = True  # three columns are missing
    guess[1, 0:9, 0:9] = True  # too much, most of it below
    guess[2] = truth[2]
    xy, inside, wrong = sam_prompt.correction(jnp.asarray(truth), jnp.asarray(guess))
    assert wrong.tolist() == [True, True, False] and inside.tolist()[:2] == [True, False]
    assert xy[0].tolist() == [3, 1]  # two from every border of the region; the first of three such pixels
    x, y = np.asarray(xy[1], int)
    assert not truth[1, y, x]
    for seed in range(20):
        xy, inside, wrong = sam_prompt.correction(jnp.asarray(truth), jnp.asarray(guess), jax.random.key(seed))
        assert wrong.tolist() == [True, True, False]
        for i, (x, y) in enumerate(np.asarray(xy, int)[:2]):
            assert truth[i, y, x] != guess[i, y, x] and bool(inside[i]) == truth[i, y, x]


def test_noise_of_boxes():
    boxes = jnp.broadcast_to(jnp.array([20.0, 30, 39, 69]), (4000, 4))
    noisy = np.asarray(sam_prompt.jittered(jax.random.key(0), boxes, 128)) - np.asarray(boxes)
    np.testing.assert_allclose(noisy.std(0), [2, 4, 2, 4], rtol=0.05)
    wide = sam_prompt.jittered(jax.random.key(0), jnp.tile(jnp.array([100.0, 100, 899, 899]), (4000, 1)), 1000)
    assert np.abs(np.asarray(wide) - [100, 100, 899, 899]).max() == pytest.approx(20, abs=1e-3)
    edge = np.asarray(sam_prompt.jittered(jax.random.key(0), jnp.tile(jnp.array([0.0, 0, 63, 63]), (100, 1)), 64))
    assert edge.min() == 0 and edge.max() == 63


def test_overlap_and_shrinking():
    a, b = np.zeros((2, 4, 4), bool)
    a[:2], b[1:3] = True, True
    assert float(sam_prompt.iou(jnp.asarray(a), jnp.asarray(b))) == pytest.approx(1 / 3)
    assert float(sam_prompt.iou(jnp.zeros((4, 4), bool), jnp.zeros((4, 4), bool))) == 1
    mask = np.zeros((4, 4), bool)
    mask[0, :2] = mask[2, 0] = True
    assert sam_prompt.shrunk(jnp.asarray(mask), 2).tolist() == [[True, False], [False, False]]
    with pytest.raises(ValueError, match="do not shrink to 3"):
        sam_prompt.shrunk(jnp.asarray(mask), 3)


# ------------------------------------------------------------------------------------------------- pictures of objects


def test_crops_are_squares_about_boxes():
    """As wide as the longer side times a factor, 0 outside of the picture and, alone, outside of the mask."""
    image = np.random.default_rng(0).standard_normal((1, 16, 16, 3))
    masks = np.zeros((1, 3, 8, 8), bool)  # half of the picture's size
    masks[0, 0, 1:3, 2:4], masks[0, 1, 6:, 6:] = True, True
    boxes = sam_prompt.boxes_of(jnp.asarray(masks.repeat(2, 2).repeat(2, 3)))
    cut = lambda wider, alone, size: np.asarray(
        sam_prompt.crops(
            jnp.asarray(image, jnp.float32), jnp.asarray(masks), boxes, jnp.full((1, 3), wider),
            jnp.full((1, 3), alone), size,
        )
    )  # fmt: skip
    same = cut(1.0, False, 4)
    np.testing.assert_allclose(same[0, 0], image[0, 2:6, 4:8], atol=1e-6)
    np.testing.assert_allclose(same[0, 1], image[0, 12:, 12:], atol=1e-6)
    wide = cut(2.0, False, 8)
    np.testing.assert_allclose(wide[0, 0], image[0, 0:8, 2:10], atol=1e-6)
    np.testing.assert_allclose(wide[0, 1, :6, :6], image[0, 10:, 10:], atol=1e-6)
    assert not wide[0, 1, 6:].any() and not wide[0, 1, :, 6:].any()
    alone = cut(2.0, True, 8)[0, 0]
    assert not alone[[0, -1]].any() and not alone[:, [0, -1]].any()
    np.testing.assert_allclose(alone[3:5, 3:5], image[0, 3:5, 5:7], atol=1e-6)
    assert np.isfinite(cut(1.5, True, 8)).all()  # of no object too
