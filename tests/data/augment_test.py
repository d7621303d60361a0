"""RandAugment: every operation by what it must do, and that what is drawn depends on the generator alone."""

import numpy as np
import pytest
from PIL import Image

from vgen.data import images
from vgen.data.augment import GEOMETRIC, GREY, OPERATIONS, RandAugment
from vgen.data.pipeline import Pipeline

RNG = np.random.default_rng(0)
NOISE = RNG.integers(0, 256, (32, 32, 3)).astype(np.uint8)
HALVES = np.zeros((32, 32, 3), np.uint8)
HALVES[:, 16:] = (200, 40, 90)


def run(name, image, level, seed=0):
    return np.array(OPERATIONS[name](Image.fromarray(image), level, np.random.default_rng(seed)))


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_keeps_the_shape_and_changes_something(name):
    image = np.clip(NOISE, 30, 200)
    level = 0.5 if name == "solarize" else 1.0  # whose threshold is beyond white at the range's end, as the authors' is
    out = run(name, image, level)
    assert out.shape == image.shape and out.dtype == np.uint8 and (out != image).any()
    assert (out == run(name, image, level)).all()
    for level in (0.0, 3.0):  # the ends of what a magnitude may be
        assert run(name, image, level).shape == image.shape


def test_operations_by_hand():
    assert (run("invert", NOISE, 1.0) == 255 - NOISE).all()
    assert (run("solarize", NOISE, 0.5) == np.where(NOISE < 128, NOISE, 255 - NOISE)).all()
    assert (run("solarize_add", NOISE, 1.0) == np.where(NOISE < 128, NOISE + np.minimum(110, 255 - NOISE), NOISE)).all()
    assert (run("posterize", NOISE, 1.0) == NOISE & 0xF0).all()
    moved = {tuple(run("translate_x", HALVES, 1.0, seed)[0, 0]) for seed in range(8)}
    assert moved == {(0, 0, 0), GREY}  # to the left the dark half stays in sight, to the right grey comes in
    turned = run("rotate", HALVES, 1.0)
    assert (turned[0, 0] == GREY).all() and (turned[16, 4] == 0).all() and (turned[16, 28] == HALVES[0, 31]).all()


@pytest.mark.parametrize("level", [0.5, 1.0])
def test_shears_move_a_line_by_three_tenths_of_the_distance(level):
    line = np.zeros((64, 64, 3), np.uint8)
    line[:, 32] = 255
    for name, image in (("shear_x", line), ("shear_y", line.swapaxes(0, 1))):
        out = run(name, image, level)
        out = out if name == "shear_x" else out.swapaxes(0, 1)
        there = (out == 255).all(-1)
        distances, places = np.nonzero(there)
        slope = np.polyfit(distances, places, 1)[0]
        assert abs(abs(slope) - 0.3 * level) < 0.02 and len(distances) > 50


@pytest.mark.parametrize("name", GEOMETRIC)
def test_what_moves_leaves_colours_as_they_are(name):
    colours = {tuple(c) for c in run(name, HALVES, 1.0).reshape(-1, 3)}
    assert colours <= {(0, 0, 0), (200, 40, 90), GREY} and len(colours) >= 2


def test_cutout_is_a_grey_square():
    out = run("cutout", np.zeros((224, 224, 3), np.uint8), 0.5, seed=3)
    rows, columns = np.nonzero((out == GREY).all(-1))
    assert set(map(tuple, out.reshape(-1, 3))) == {(0, 0, 0), GREY}
    assert len(rows) == (np.ptp(rows) + 1) * (np.ptp(columns) + 1) and abs(np.ptp(rows) + 1 - 40) <= 1


def test_layers_are_drawn_from_the_generator():
    twice = RandAugment(layers=2, magnitude=10.0)
    out = [twice(NOISE, np.random.default_rng(seed)) for seed in (0, 0, 1, 2)]
    assert (out[0] == out[1]).all() and any((out[0] != other).any() for other in out[2:])
    assert (RandAugment(layers=0)(NOISE, np.random.default_rng(0)) == NOISE).all()
    once = RandAugment(layers=3, operations=("invert",))
    assert (once(NOISE, np.random.default_rng(0)) == 255 - NOISE).all()


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match=r"magnitude in \[0, 30\]"):
        RandAugment(magnitude=31.0)
    with pytest.raises(ValueError, match="unknown operations .'blur'.; there are auto_contrast"):
        RandAugment(operations=("blur",))


def test_the_inception_crop_covers_what_it_says():
    wide = np.zeros((60, 90, 3), np.uint8)
    wide[..., 0], wide[..., 1] = np.arange(60)[:, None] * 4, np.arange(90)[None] * 2
    for seed in range(20):
        box = images._inception_box(60, 90, (0.2, 0.5), np.random.default_rng(seed))
        top, left, rows, columns = box
        assert 0 <= top <= 60 - rows and 0 <= left <= 90 - columns
        assert 0.17 <= rows * columns / 5400 <= 0.53 and 0.7 <= columns / rows <= 1.4
    assert images._inception_box(4, 400, (0.9, 1.0), np.random.default_rng(0)) == (0, 198, 4, 4)  # none fits
    out = images.resize(wide, 16, "inception_crop", np.random.default_rng(0), (0.2, 0.5))
    assert out.shape == (16, 16, 3)
    with pytest.raises(ValueError, match="'inception_crop' needs rng"):
        images.resize(wide, 16, "inception_crop")


def test_a_pipeline_augments_what_it_has_resized():
    source = [{"image": NOISE, "label": i} for i in range(4)]
    invert = RandAugment(layers=1, operations=("invert",))
    batch = Pipeline(source, 4, size=32, augment=invert).load(0)
    assert (batch["image"] == 255 - NOISE).all()
    cropped = Pipeline(source, 4, size=16, crop="inception_crop", crop_scale=(0.1, 0.3)).load(0)["image"]
    assert cropped.shape == (4, 16, 16, 3) and (cropped[0] != cropped[1]).any()
