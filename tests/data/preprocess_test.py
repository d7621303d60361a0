"""Preprocessing against transformers' processors on Pillow, and against the authors' steps."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from vgen.data import images
from vgen.data.images import DataError
from vgen.data.preprocess import CLIP, DINOV2, SAM, VIT, Preprocess, from_config, normalize, preprocess, reshape, scaled

SIZES = [(64, 64), (37, 91), (91, 37), (333, 517), (225, 224), (224, 231), (5, 7), (600, 301)]


def picture(height, width, seed=0):
    """Noise on a slope: every error of a pixel shows."""
    rng = np.random.default_rng(seed)
    slope = np.linspace(0, 120, width)[None, :, None] + np.linspace(0, 60, height)[:, None, None]
    return np.clip(slope + rng.integers(0, 90, (height, width, 3)), 0, 255).astype(np.uint8)


def theirs(family, image, **kwargs):
    """transformers' processor without torchvision."""
    module = importlib.import_module(f"transformers.models.{family}.image_processing_pil_{family}")
    name = {"clip": "CLIP", "vit": "ViT", "bit": "Bit", "sam": "Sam"}[family]
    processor = getattr(module, f"{name}ImageProcessorPil")(**kwargs)
    return processor(Image.fromarray(image), return_tensors="np")


DINO = dict(size={"shortest_edge": 256}, image_mean=DINOV2.mean, image_std=DINOV2.std)  # facebook/dinov2-base
CASES = {
    "clip": (CLIP, "clip", {}),
    "clip, 336 px": (CLIP._replace(size=99, crop=98), "clip", dict(size={"shortest_edge": 99}, crop_size=98)),
    "vit": (VIT, "vit", {}),
    "vit, not square": (VIT._replace(size=(48, 80)), "vit", dict(size={"height": 48, "width": 80})),
    "dinov2": (DINOV2, "bit", DINO),
    "sam": (SAM._replace(size=100, pad=101), "sam",
            dict(size={"longest_edge": 100}, pad_size={"height": 101, "width": 101})),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_equals_transformers(case):
    pytest.importorskip("transformers")
    how, family, kwargs = CASES[case]
    for height, width in SIZES:
        image = picture(height, width)
        want = theirs(family, image, **kwargs)
        got = preprocess(image, how)
        pixel = (1 / 255) / max(how.std)  # an 8-bit level, normalised
        np.testing.assert_allclose(got.transpose(2, 0, 1), want["pixel_values"][0], atol=1e-5 * pixel, rtol=1e-5)
        assert got.dtype == np.float32
        if family == "sam":
            assert list(scaled(height, width, how)) == np.asarray(want["reshaped_input_sizes"][0]).tolist()


def test_presets_are_the_published_sizes():
    pytest.importorskip("transformers")
    image = picture(61, 47)
    for how, family, kwargs in (CASES[name] for name in ("clip", "vit", "dinov2")):
        assert preprocess(image, how).shape == theirs(family, image, **kwargs)["pixel_values"][0].shape[1:] + (3,)
    got, want = preprocess(image, SAM), theirs("sam", image)["pixel_values"][0]
    np.testing.assert_allclose(got.transpose(2, 0, 1), want, atol=1e-5)
    assert got.shape == (1024, 1024, 3) and not got[:, 789:].any() and scaled(61, 47, SAM) == (1024, 789)


def test_authors_crop_and_sam_statistics():
    """torchvision's CenterCrop rounds half a pixel to even; SAM's statistics are given on 0 ... 255."""
    image = picture(227, 224)  # three rows too many
    down, even = (reshape(image, CLIP._replace(crop_rounding=way)) for way in ("down", "even"))
    np.testing.assert_array_equal(down, image[1:225])
    np.testing.assert_array_equal(even, image[2:226])
    for rows in (225, 226, 229):
        top = int(round((rows - 224) / 2.0))
        got = reshape(picture(rows, 224), CLIP._replace(crop_rounding="even"))
        np.testing.assert_array_equal(got, picture(rows, 224)[top : top + 224])
    pixel_mean, pixel_std = np.array([123.675, 116.28, 103.53]), np.array([58.395, 57.12, 57.375])
    square = picture(96, 96)
    want = (square - pixel_mean) / pixel_std
    np.testing.assert_allclose(preprocess(square, SAM._replace(size=96, pad=96)), want, atol=1e-5)


def test_interpolation_matters():
    """Filters, antialiasing and the 8 bits in between: each, done otherwise, is off by more than a level."""
    image = picture(333, 517)
    right = reshape(image, CLIP).astype(int)
    for name in ("bilinear", "lanczos", "nearest"):
        assert np.abs(reshape(image, CLIP._replace(filter=name)) - right).max() > 1
    smooth = jax.image.resize(jnp.asarray(image, jnp.float32), (*scaled(333, 517, CLIP), 3), "cubic", antialias=False)
    left = (smooth.shape[1] - 224) // 2
    assert np.abs(np.asarray(smooth)[:, left : left + 224] - right).max() > 1


def test_normalize_is_the_last_step():
    image = picture(224, 224)
    got = jax.jit(normalize, static_argnums=1)(images.to_float(image)[None], CLIP)[0]
    np.testing.assert_allclose(got, preprocess(image, CLIP), atol=2e-6)


def test_from_config():
    clip = dict(
        do_resize=True, size={"shortest_edge": 224}, resample=3, do_center_crop=True,
        crop_size={"height": 224, "width": 224}, do_normalize=True,
        image_mean=list(CLIP.mean), image_std=list(CLIP.std),
    )  # fmt: skip
    assert from_config(clip) == CLIP
    assert from_config(clip | dict(size=224, crop_size=224, feature_extractor_type="CLIPFeatureExtractor")) == CLIP
    half = dict(size=224, resample=2, image_mean=[0.5] * 3, image_std=[0.5] * 3, feature_extractor_type="ViT")
    assert from_config(half) == VIT
    assert from_config(half | dict(size={"height": 224, "width": 224})) == VIT._replace(size=(224, 224))
    sam = dict(
        size={"longest_edge": 1024}, resample=2, do_pad=True, pad_size={"height": 1024, "width": 1024},
        image_mean=list(SAM.mean), image_std=list(SAM.std),
    )  # fmt: skip
    assert from_config(sam) == SAM
    plain = from_config(half | dict(do_resize=False, do_normalize=False))
    np.testing.assert_array_equal(preprocess(picture(9, 8), plain), picture(9, 8) / np.float32(255))
    for wrong in (
        dict(size={"max_height": 3}),
        dict(resample=4),
        dict(rescale_factor=1 / 127.5),
        dict(do_rescale=False),
    ):
        with pytest.raises(DataError, match=next(iter(wrong)).replace("do_rescale", "rescale")):
            from_config(half | wrong)
    with pytest.raises(DataError, match="crop_size"):
        from_config(clip | dict(crop_size={"height": 3, "width": 4}))


def test_wrong_settings_are_named():
    image = picture(20, 30)
    for wrong, words in (
        (dict(side="width"), "'short', 'long', 'both' or 'none', got 'width'"),
        (dict(filter="box"), "got 'box'"),
        (dict(crop=4, crop_rounding="up"), "'down' or 'even', got 'up'"),
    ):
        with pytest.raises(ValueError, match=words):
            preprocess(image, Preprocess(8)._replace(**wrong))
    with pytest.raises(DataError, match="crop of 9 pixels from 8x12"):
        preprocess(image, Preprocess(8, "short", crop=9))
    with pytest.raises(DataError, match="20x30 pixels"):
        preprocess(image, Preprocess(side="none", pad=25))
