"""All masks of a picture: every filter on hand-made cases and against transformers' formulas, and whole pictures."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import quick_compilation
from vgen import automatic_masks as am
from vgen.data.preprocess import Preprocess, preprocess
from vgen.models.sam import SAM, postprocess

SIZE = 32
HOW = Preprocess(SIZE, "long", "bilinear", pad=SIZE, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


def test_the_grid_and_the_crops():
    np.testing.assert_allclose(am.grid(2), [(0.25, 0.25), (0.75, 0.25), (0.25, 0.75), (0.75, 0.75)])
    boxes, layers = am.crop_boxes((60, 90), 2, 512 / 1500)
    assert layers == [0] + [1] * 4 + [2] * 16 and boxes[0] == (0, 0, 90, 60)
    assert boxes[1] == (0, 0, 55, 40) and boxes[4] == (35, 20, 90, 60)  # 20 pixels are shared
    covered = np.zeros((60, 90), int)
    for x0, y0, x1, y1 in boxes[5:]:
        covered[y0:y1, x0:x1] += 1
    assert covered.min() == 1 and covered.max() == 4


def test_crops_and_filters_against_transformers():
    torch = pytest.importorskip("torch")
    theirs = pytest.importorskip("transformers.models.sam.image_processing_pil_sam")
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (6, 20, 24)).astype(np.float32)
    logits[1] = -9
    want = theirs._compute_stability_score(torch.tensor(logits), 0.0, 1.0).numpy()
    got = am.stability(logits, 1.0)
    np.testing.assert_allclose(np.delete(got, 1), np.delete(want, 1), rtol=1e-6)
    assert got[1] == 0  # theirs is 0 / 0
    for size in ((60, 90), (33, 31), (1500, 2250)):
        crops, layers = am.crop_boxes(size, 2, 512 / 1500)
        assert ([list(crop) for crop in crops], layers) == theirs._generate_per_layer_crops(2, 512 / 1500, size)
    masks = logits > 2.5
    masks[2] = False
    boxes = am.boxes_of(masks)
    np.testing.assert_array_equal(boxes, theirs._batched_mask_to_box(torch.tensor(masks)).numpy())
    boxes = rng.integers(0, 300, (200, 4))
    for crop in ([0, 0, 150, 130], [100, 60, 300, 200], [0, 0, 300, 200]):
        near = theirs._is_box_near_crop_edge(torch.tensor(boxes), crop, [0, 0, 300, 200]).numpy()
        offset = np.tile(crop[:2], 2)  # theirs are in the frame of the crop
        np.testing.assert_array_equal(am.near_edge(boxes + offset, crop, (200, 300)), near)


def test_nms():
    boxes = np.array([(0, 0, 10, 10), (1, 0, 11, 10), (20, 20, 30, 30), (0, 0, 10, 10), (2, 0, 12, 10)])
    scores = [0.5, 0.9, 0.1, 0.9, 0.4]
    assert am.nms(boxes, scores, 0.7).tolist() == [1, 2]  # the first of two equal ones stays; IoU 0.82 each
    assert am.nms(boxes, scores, 0.95).tolist() == [1, 3, 4, 2]
    assert am.nms(boxes, scores, 0.82).tolist() == [1, 3, 4, 2]  # 9/11 is not above it
    assert am.nms(np.zeros((0, 4)), [], 0.7).tolist() == []
    assert am.nms(np.zeros((2, 4)), [1, 2], 0.7).tolist() == [1, 0]  # boxes without area


def test_small_regions():
    mask = np.zeros((12, 12), bool)
    mask[1:8, 1:8] = True
    mask[3, 3] = mask[6, 2:4] = False  # holes of one and of two pixels
    mask[10, 10] = True  # an island
    mask[8, 8] = True  # at a corner of the large region: part of it
    tidy = am.without_small_regions(mask, 2)
    want = mask.copy()
    want[3, 3], want[10, 10] = True, False
    np.testing.assert_array_equal(tidy, want)
    assert am.without_small_regions(mask, 1) is mask
    specks = np.zeros((6, 6), bool)
    specks[0, 0], specks[3, 2:4] = True, True
    assert am.without_small_regions(specks, 9).sum() == 2  # the largest stays


@pytest.mark.parametrize("shape", [(54, 70), (70, 54), (16, 16)])
def test_enlarging_is_the_networks_postprocessing(shape):
    inside = am.scaled(*shape, Preprocess(96, "long"))
    logits = np.random.default_rng(0).standard_normal((2, 24, 24)).astype(np.float32)
    rows, columns = (am.enlarging(24, 96, inside[i], shape[i]) for i in (0, 1))
    np.testing.assert_allclose(rows @ logits @ columns.T, postprocess(logits, inside, shape, 96), atol=5e-5)


# ----------------------------------------------------------------------------------------------------- whole pictures


class Colours:
    """A network that masks all pixels of the clicked one's colour, and two masks more that it thinks little of."""

    def __init__(self, said=0.95, near=0.02):
        self.calls, self.encoded, self.said, self.near = [], 0, said, near

    def encode(self, pixels):
        self.encoded += 1
        assert pixels.shape == (1, SIZE, SIZE, 3)
        return np.asarray(pixels[0])

    def decode(self, embedding, points):
        self.calls.append(points.shape)
        x, y = np.clip(np.asarray(points).T, 0, SIZE - 1).astype(int)
        same = np.abs(embedding[None] - embedding[y, x][:, None, None]).max(-1) < self.near
        logits = np.where(same, 9.0, -9.0)[:, None].repeat(3, 1)
        return logits, np.tile([self.said, 0.1, 0.2], (len(points), 1)) + 0.001 * x[:, None]

    def predictor(self):
        return am.Predictor(self.encode, self.decode, HOW)


def flat(size=SIZE):
    """Three rectangles on black: masks [3, size, size] and the picture."""
    masks = np.zeros((3, size, size), bool)
    for mask, (y0, y1, x0, x1) in zip(masks, ((2, 10, 3, 12), (14, 30, 4, 9), (12, 28, 16, 28))):
        mask[y0 * size // 32 : y1 * size // 32, x0 * size // 32 : x1 * size // 32] = True
    paint = np.array([(255, 0, 0), (0, 255, 0), (40, 40, 255)], np.uint8)
    return masks, (masks[..., None] * paint[:, None, None]).sum(0).astype(np.uint8)


def test_every_object_once():
    truth, image = flat()
    net = Colours()
    found = am.generate(net.predictor(), image, am.Automatic(points_per_side=6, points_per_batch=8))
    assert [shape for shape in net.calls] == [(8, 2)] * 5 and net.encoded == 1  # 36 points, the last batch filled up
    background = ~truth.any(0)
    assert len(found) == 4
    for mask in [*truth, background]:
        (hit,) = [each for each in found if (each.segmentation == mask).all()]
        y, x = np.nonzero(mask)
        assert hit.area == mask.sum() and hit.stability_score == 1.0
        assert hit.bbox == (x.min(), y.min(), x.max() - x.min(), y.max() - y.min())
        assert hit.crop_box == (0, 0, 32, 32)
        ((px, py),) = hit.point_coords
        assert mask[int(py), int(px)]
    said = [each.predicted_iou for each in found]
    assert said == sorted(said, reverse=True) and min(said) > 0.9
    small = am.generate(net.predictor(), image, am.Automatic(points_per_side=6, largest=0.4))
    assert len(small) == 3  # without the background


def test_filters_drop_what_they_say():
    _, image = flat()
    settings = am.Automatic(points_per_side=6)
    assert am.generate(Colours(0.5).predictor(), image, settings) == []
    assert am.Automatic() == am.Automatic(32, 64, 0.88, 0.95, 1.0, 0.7, 0, 0.7, 512 / 1500, 1, 0)  # the authors'
    soft = Colours()
    decode = soft.decode
    soft.decode = lambda *args: (decode(*args)[0] / 10, decode(*args)[1])  # logits of +-0.9: unstable
    assert am.generate(soft.predictor(), image, settings) == []
    strange = np.zeros((8, 8), np.uint8)
    with pytest.raises(ValueError, match=r"expected a picture uint8 \[h, w, 3\]"):
        am.generate(soft.predictor(), strange)
    for wrong in (dict(points_per_side=0), dict(box_nms=2.0), dict(crop_layers=-1)):
        with pytest.raises(ValueError, match="Automatic: "):
            am.Automatic(**wrong)
    with pytest.raises(ValueError, match="leaves no point in layer 3"):
        am.Automatic(points_per_side=4, crop_layers=3, crop_points_downscale=2)


def test_crops_prefer_the_smaller_one_and_drop_what_they_cut():
    truth, image = flat(64)
    settings = am.Automatic(points_per_side=8, crop_layers=1, edge=1.0, largest=0.3, stability=0.8)
    net = Colours(near=0.5)  # what is half covered, once it is resized
    found = am.generate(net.predictor(), image, settings)
    assert net.encoded == 5 and set(net.calls) == {(64, 2)}
    for mask in truth:
        hits = [each for each in found if (each.segmentation & mask).sum() > 0.75 * (each.segmentation | mask).sum()]
        assert len(hits) == 1
    assert any(each.crop_box[2] < 64 for each in found)  # in which some object is whole
    cut = [each for each in found if not any((each.segmentation == mask).all() for mask in truth)]
    assert all((each.segmentation & truth).any((1, 2)).sum() <= 1 for each in cut)


def test_small_regions_are_tidied_up():
    truth, image = flat()
    image[20, 20] = 0  # a hole in the third one
    settings = am.Automatic(points_per_side=6, largest=0.4)
    (holed,) = [each for each in am.generate(Colours().predictor(), image, settings) if each.area == 191]
    tidy = am.generate(Colours().predictor(), image, am.Automatic(points_per_side=6, largest=0.4, min_region_area=3))
    (filled,) = [each for each in tidy if each.bbox == holed.bbox]
    np.testing.assert_array_equal(filled.segmentation, truth[2])
    assert filled.area == 192


def test_a_network_is_compiled_once_for_pictures_of_any_size():
    net = SAM(
        depth=1, width=8, heads=2, global_layers=(0,), image_size=32, patch=8, channels=16, mask_channels=8,
        decoder_depth=1, decoder_heads=2, decoder_mlp_dim=8, iou_dim=8,
    )  # fmt: skip
    with quick_compilation():
        check_compiled_once(net, jax.jit(net.init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"])


def check_compiled_once(net, params):
    predictor = am.predictor(net, params)
    assert predictor.how.size == predictor.how.pad == 32
    settings = am.Automatic(points_per_side=3, points_per_batch=4, predicted_iou=-9.0, stability=0.0, box_nms=1.0)
    before = am._decode._cache_size(), am._encode._cache_size()
    rng = np.random.default_rng(0)
    for shape in ((32, 32), (20, 50), (65, 31)):
        image = rng.integers(0, 256, (*shape, 3), np.uint8)
        found = am.generate(predictor, image, settings)
        assert found and all(each.segmentation.shape == shape for each in found)
    assert (am._decode._cache_size() - before[0], am._encode._cache_size() - before[1]) == (1, 1)
    points = jnp.array([[4.0, 5], [20, 9]])
    embedding = predictor.encode(preprocess(image, predictor.how)[None])
    logits, iou = predictor.decode(embedding, points)
    run = jax.jit(lambda *args: net.apply({"params": params}, *args, method="decode"))
    plain = run(embedding, points[None, :, None], jnp.ones((1, 2, 1), int))
    np.testing.assert_allclose(logits, plain.logits[0], atol=1e-5)
    np.testing.assert_allclose(iou, plain.iou[0], atol=1e-5)
