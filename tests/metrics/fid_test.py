"""The Frechet distance: Gaussians known by hand, scipy's root, streaming, protocols that differ, the command line."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.golden import golden
from tests.models.inception_test import published
from vgen.config import UserError
from vgen.data import images as image_ops
from vgen.data.scenes import World, scene
from vgen.metrics import fid
from vgen.models.inception import Features, InceptionV3

RNG = np.random.default_rng(0)


def rotation(d):
    return np.linalg.qr(RNG.standard_normal((d, d)))[0]


def spread(values, turn=None):
    turn = rotation(len(values)) if turn is None else turn
    return (turn * np.asarray(values)) @ turn.T


# ---------------------------------------------------------------------------------------------------- the distance


def test_gaussians_known_by_hand():
    """Of common axes the roots of the variances differ; of one dimension, of equal ones, of singular ones, too."""
    one = fid.frechet(np.ones(1), np.full((1, 1), 4.0), np.full(1, 3.0), np.full((1, 1), 9.0))
    assert one == pytest.approx(4 + (2 - 3) ** 2, rel=1e-12)
    turn, a, b = rotation(6), np.array([4, 1, 9, 0, 2, 0.0]), np.array([1, 1, 0, 0, 8, 3.0])
    m = RNG.standard_normal(6)
    want = np.square(np.sqrt(a) - np.sqrt(b)).sum()
    assert fid.frechet(m, spread(a, turn), m, spread(b, turn)) == pytest.approx(want, rel=1e-6)
    assert fid.frechet(m, spread(a, turn), m, spread(a, turn)) == pytest.approx(0, abs=1e-12)
    assert fid.frechet(m, np.zeros((6, 6)), 0 * m, np.zeros((6, 6))) == pytest.approx(m @ m, rel=1e-12)


def test_two_dimensions_that_do_not_commute():
    """There the trace of the root of a product is the root of trace + 2 root of determinant."""
    a, b = spread([3.0, 0.5]), spread([0.2, 7.0])
    root = np.sqrt(np.trace(a @ b) + 2 * np.sqrt(np.linalg.det(a @ b)))
    assert abs(a @ b - b @ a).max() > 0.1
    got = fid.frechet(np.zeros(2), a, np.zeros(2), b)
    assert got == pytest.approx(np.trace(a) + np.trace(b) - 2 * root, rel=1e-12)


@pytest.mark.parametrize("count", [500, 40], ids=["full", "singular"])
def test_as_pytorch_fid_by_scipy(count):
    """Its formula: numpy's cov and scipy's sqrtm of the product; where that is singular, 1e-6 on the diagonals."""
    linalg = pytest.importorskip("scipy.linalg")
    d = 48
    x, y = (RNG.standard_normal((count, d)) @ spread(RNG.uniform(0.1, 2, d)) + RNG.standard_normal(d) for _ in "ab")
    (m1, c1), (m2, c2) = ((rows.mean(0), np.cov(rows, rowvar=False)) for rows in (x, y))
    more = 0 if count > d else 1e-6 * np.eye(d)
    root = linalg.sqrtm((c1 + more) @ (c2 + more)).real
    want = (m1 - m2) @ (m1 - m2) + np.trace(c1) + np.trace(c2) - 2 * np.trace(root)
    assert fid.frechet(m1, c1, m2, c2) == pytest.approx(want, rel=1e-6 if count > d else 1e-3)


def test_bad_gaussians():
    with pytest.raises(ValueError, match="expected mean .* with one d, got"):
        fid.frechet(np.zeros(3), np.eye(3), np.zeros(2), np.eye(2))
    with pytest.raises(ValueError, match="must be finite"):
        fid.frechet(np.zeros(2), np.eye(2), np.array([0, np.nan]), np.eye(2))


def test_moments_do_not_depend_on_how_rows_come():
    """Also far from zero, where sums of squares lose everything."""
    rows = RNG.standard_normal((101, 7)) + 1e7
    found = fid.no_moments(7)
    for part in np.split(rows, [1, 1, 40, 97]):
        found = found.add(part)
    assert found.count == 101
    np.testing.assert_allclose(found.mean, rows.mean(0), rtol=1e-15)
    np.testing.assert_allclose(found.scatter / 100, np.cov(rows, rowvar=False), atol=2e-9)


# ------------------------------------------------------------------------------------------------- sets of pictures


def pictures(count, start=0, size=16, noise=0):
    drawn = [scene(World(), start + i, size)["image"] for i in range(count)]
    spoilt = [x + RNG.integers(-noise, noise + 1, x.shape) for x in drawn]
    return [x.clip(0, 255).astype(np.uint8) for x in spoilt]


@pytest.fixture(scope="module")
def extractor():
    return fid.stand_in(width=4)


def test_statistics_are_those_of_the_features(extractor, tmp_path):
    given = pictures(10)
    found = fid.statistics(extractor, iter(given), batch=4)
    x = np.asarray(extractor.features(np.stack(given)), np.float64)
    np.testing.assert_allclose(found.mean, x.mean(0), rtol=1e-6)
    np.testing.assert_allclose(found.covariance, np.cov(x, rowvar=False), rtol=1e-4, atol=1e-9)
    assert found.protocol == dict(
        metric="scene_frechet: stand-in", extractor="3 random convolutions of 4, seed 0", weights=extractor.weights,
        resize="none", size="16 x 16", count=10,
    )  # fmt: skip
    turned = fid.statistics(extractor, given[::-1], batch=3)
    assert turned.pictures == found.pictures != fid.statistics(extractor, given[:9] + given[:1], batch=4).pictures
    fid.save(tmp_path / "a.npz", found)
    again = fid.load_statistics(tmp_path / "a.npz")
    assert again.protocol == found.protocol and again.pictures == found.pictures
    assert fid.distance(found, again) == {"scene_frechet: stand-in": pytest.approx(0, abs=1e-9)}


def test_worse_pictures_are_farther_away(extractor):
    truth = fid.statistics(extractor, pictures(48))
    noisy = [fid.statistics(extractor, pictures(48, noise=noise)) for noise in (20, 60, 180)]
    values = [fid.distance(truth, each)[fid.STAND_IN] for each in noisy]
    assert 0 < 2 * values[0] < values[1] < values[2] / 2


def test_protocols_that_differ_are_refused(extractor):
    small = fid.statistics(extractor, pictures(4))
    others = {
        "weights is": fid.statistics(extractor._replace(weights="0"), pictures(4)),
        "size is 16 x 16 in the reference and 32 x 32": fid.statistics(extractor, pictures(4, size=32)),
        "resize is none": fid.statistics(extractor._replace(resize="bilinear"), pictures(4)),
        "metric is scene_frechet": fid.statistics(extractor._replace(metric="FID"), pictures(4)),
        "count is 4 in the reference and 5": fid.statistics(extractor, pictures(5)),
    }
    for said, other in others.items():
        with pytest.raises(UserError, match=f"protocols differ: {said}"):
            fid.distance(small, other)
    assert fid.distance(small, others.popitem()[1], different_counts=True)


def test_sets_that_cannot_be_used(extractor):
    with pytest.raises(UserError, match="two pictures or more, got 1"):
        fid.statistics(extractor, pictures(1))
    with pytest.raises(UserError, match="differ in size: 16 x 16 and 32 x 32"):
        fid.statistics(extractor, pictures(1) + pictures(1, size=32))


def test_inception_is_told_pictures_as_it_knows_them(tmp_path, monkeypatch):
    """Weights by the file's names, pixels in [-1, 1]; the network itself is in tests/models/inception_test.py."""
    state = published(golden.load("fid_inception")["weights"])
    np.savez(tmp_path / "weights.npz", **state)

    def apply(self, variables, x):
        assert self == InceptionV3(classes=None) and "fc" not in variables["params"]
        kernel = variables["params"]["Conv2d_1a_3x3"]["conv"]["kernel"]
        return Features(*[None] * 3, jnp.concatenate([x.mean((1, 2)), jnp.full((len(x), 1), kernel.sum())], 1), None)

    monkeypatch.setattr(InceptionV3, "apply", apply)
    extractor = fid.inception(tmp_path / "weights.npz")
    x = np.stack([np.zeros((80, 90, 3), np.uint8), np.full((80, 90, 3), 255, np.uint8)])
    total = state["Conv2d_1a_3x3.conv.weight"].sum(dtype=np.float64)
    want = [[-1, -1, -1, total], [1, 1, 1, total]]
    np.testing.assert_allclose(extractor.features(x), want, rtol=1e-4)
    assert extractor.metric == "FID" and extractor.width == 2048
    params = {"b": {"kernel": np.ones((2, 2), np.float32)}, "a": {"bias": np.zeros(2, np.float32)}}
    changed = params | {"a": {"bias": np.full(2, 1e-6, np.float32)}}
    assert fid._digest(params) == fid._digest(dict(reversed(params.items()))) != fid._digest(changed)


# ----------------------------------------------------------------------------------------------------- command line


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("sets")
    for name, count, start, size in (("a", 5, 0, 16), ("b", 5, 100, 16), ("few", 1, 0, 16), ("large", 5, 0, 32)):
        for i, picture in enumerate(pictures(count, start, size)):
            image_ops.save_png(root / name / f"{i}.png", picture)
    (root / "empty").mkdir()
    np.savez(root / "plain.npz", mu=np.zeros(3), sigma=np.eye(3))
    (root / "broken.npz").write_bytes(b"PK nothing")
    return root


def run(capsys, folders, *argv):
    code = fid.main([arg.replace("@", f"{folders}/") for arg in argv])
    out = capsys.readouterr()
    return code, out.out, out.err


def test_command(capsys, folders):
    argv = ("--reference=@a", "--samples=@b", "--stand_in", "--write=@a.npz")
    code, out, err = run(capsys, folders, *argv)
    assert (code, err) == (0, "") and out.startswith("scene_frechet: stand-in ") and "note: 5 pictures" in out
    assert "FID" not in out
    again = run(capsys, folders, "--reference=@a.npz", "--samples=@b", "--stand_in")
    assert again[0] == 0 and again[1] == out
    assert run(capsys, folders, "--reference=@a.npz", "--samples=@a.npz")[0] == 0  # no pictures, no extractor


@pytest.mark.parametrize(
    "argv, said",
    [
        (("--reference=@a",), "needs --samples"),
        (("--reference=@none", "--samples=@a"), "there is no folder or file"),
        (("--reference=@a", "--samples=@b"), "--stand_in, which is not FID"),
        (("--reference=@a", "--samples=@b", "--stand_in", "--weights=@x"), "two extractors"),
        (("--reference=@a", "--samples=@b", "--weights=@x.pth"), "there is no weight file"),
        (("--reference=@empty", "--samples=@b", "--stand_in"), "no images"),
        (("--reference=@few", "--samples=@b", "--stand_in"), "two pictures or more, got 1"),
        (("--reference=@a", "--samples=@large", "--stand_in"), "protocols differ: size is 16 x 16"),
        (("--reference=@plain.npz", "--samples=@b", "--stand_in"), "has no mean, covariance, protocol, pictures"),
        (("--reference=@broken.npz", "--samples=@b", "--stand_in"), "cannot read statistics"),
        (("--reference=@a", "--samples=@b", "--stand_in", "--batch=0"), "--batch=0"),
        (("--reference=@a", "--stand_in", "--write=@a.txt"), "ends in .npz"),
        (("--reference=@a", "--stand_in", "--write=@none/a.npz"), "cannot write"),
    ],
)
def test_mistakes_end_in_one_sentence(capsys, folders, argv, said):
    code, out, err = run(capsys, folders, *argv)
    assert code == 2 and said in err and err.count("\n") == 1 and "Traceback" not in err and out == ""
