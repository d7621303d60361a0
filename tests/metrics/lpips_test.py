"""LPIPS parity, its weight files, and the behaviour of the weightless feature loss."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.golden import golden
from vgen.config import UserError
from vgen.metrics import lpips as m

LAYERS = [f"layer{i}" for i in range(5)]


@pytest.fixture(scope="module")
def gold():
    return golden.load("lpips_vgg")


@pytest.fixture(scope="module")
def weights_file(gold, tmp_path_factory):
    path = tmp_path_factory.mktemp("lpips") / "lpips.npz"
    np.savez(path, **gold["weights"])
    return path


def test_golden(x64, gold, weights_file):
    params = jax.tree.map(lambda a: a.astype(jnp.float64), m.load_lpips(weights_file))
    x, y = (np.asarray(gold["inputs"][k], np.float64).transpose(0, 2, 3, 1) for k in "ab")
    layers = jax.jit(m.lpips_layers)(params, x, y)
    for i, name in enumerate(LAYERS):
        golden.check(gold, name, layers[:, i, None, None, None], 1e-9)
    golden.check(gold, "distance", layers.sum(-1)[:, None, None, None], 1e-9)


def safetensors(path, arrays):
    header, blobs, offset = {"__metadata__": {"format": "pt"}}, [], 0
    for name, a in arrays.items():
        blobs.append(np.ascontiguousarray(a).tobytes())
        dtype = {"float32": "F32", "float16": "F16"}[str(a.dtype)]
        header[name] = {
            "dtype": dtype, "shape": a.shape, "data_offsets": [offset, offset + len(blobs[-1])]
        }  # fmt: skip
        offset += len(blobs[-1])
    head = json.dumps(header).encode()
    path.write_bytes(len(head).to_bytes(8, "little") + head + b"".join(blobs))


def test_torchvision_and_lin_files_together(gold, weights_file, tmp_path):
    """Two published files, in two formats, are the same parameters as one state dict of the whole."""
    trunk = {"classifier.0.weight": np.zeros((2, 2), np.float32)}
    for name, value in gold["weights"].items():
        if name.startswith("net."):
            trunk["features." + name.split(".", 2)[2]] = value
    safetensors(tmp_path / "vgg16.safetensors", trunk)
    np.savez(tmp_path / "lin.npz", **{k: v for k, v in gold["weights"].items() if k.startswith("lin")})
    got = m.load_lpips([tmp_path / "vgg16.safetensors", tmp_path / "lin.npz"])
    want = m.load_lpips(weights_file)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert got["lin"]["lin4"].shape == (512,) and got["vgg"]["conv1_1"]["kernel"].shape == (3, 3, 3, 64)
    with pytest.raises(UserError, match="(?s)vgg16.*unfilled lin/lin0.*v0.1/vgg.pth"):
        m.load_lpips(tmp_path / "vgg16.safetensors")


def test_pth_files_are_read_without_running_code(gold, weights_file, tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({k: torch.from_numpy(v) for k, v in gold["weights"].items()}, tmp_path / "lpips.pth")
    jax.tree.map(np.testing.assert_array_equal, m.load_lpips(tmp_path / "lpips.pth"), m.load_lpips(weights_file))


def test_load_errors(gold, tmp_path):
    with pytest.raises(UserError, match="nothing.npz"):
        m.load_lpips(tmp_path / "nothing.npz")
    (tmp_path / "w.onnx").write_bytes(b"")
    with pytest.raises(UserError, match="expected .safetensors"):
        m.load_lpips(tmp_path / "w.onnx")
    bad = dict(gold["weights"])
    bad["lin0.model.1.weight"] = np.zeros((1, 65, 1, 1), np.float32)
    np.savez(tmp_path / "bad.npz", **bad)
    with pytest.raises(UserError, match=r"lin/lin0: got \(65,\), expected \(64,\)"):
        m.load_lpips(tmp_path / "bad.npz")
    with pytest.raises(UserError, match="lin0.model.1.weight in .*already read with other values"):
        np.savez(tmp_path / "lpips.npz", **gold["weights"])
        m.load_lpips([tmp_path / "lpips.npz", tmp_path / "bad.npz"])
    np.savez(tmp_path / "alex.npz", **gold["weights"], **{"features.31.weight": np.zeros(1)})
    with pytest.raises(UserError, match="unread features.31.weight"):
        m.load_lpips(tmp_path / "alex.npz")


def test_trunk_size():
    tree = jax.eval_shape(m.init_lpips, jax.random.key(0))
    assert sum(a.size for a in jax.tree.leaves(tree["vgg"])) == 14_714_688
    assert sum(a.size for a in jax.tree.leaves(tree["lin"])) == 1_472


def test_gradient_is_finite_where_all_features_vanish():
    """A channel vector of zeros has no direction; LPIPS's own gradient is NaN there."""
    grad = jax.jit(jax.grad(lambda x: jnp.square(m._unit(x) - 1).sum()))(jnp.zeros((1, 2, 2, 3)))
    np.testing.assert_array_equal(grad, 0)


def test_lpips_rejects_small_images():
    with pytest.raises(ValueError, match="at least 16"):
        m.lpips({}, jnp.zeros((1, 8, 32, 3)), jnp.zeros((1, 8, 32, 3)))


# ------------------------------------------------------------------------------------------------------- feature loss

feature_loss = jax.jit(m.feature_loss)


def disc(size=32, centre=(16, 16), radius=9):
    yy, xx = np.mgrid[:size, :size]
    inside = np.clip(radius + 0.5 - np.hypot(yy - centre[0], xx - centre[1]), 0, 1)[..., None]
    stripes = 0.15 * np.sign(np.sin(xx * 1.6))[..., None]
    image = inside * (np.array([0.6, -0.4, -0.5]) + stripes) + (1 - inside) * np.array([-0.3, 0.1, 0.4])
    return jnp.asarray(image[None], jnp.float32)


def same_mse(x, y, mse=0.01):
    """y moved along the line from x so that the pixel loss is `mse`."""
    return x + (y - x) * jnp.sqrt(mse / jnp.square(y - x).mean())


def test_zero_at_equality_with_finite_gradients_everywhere():
    value_and_grad = jax.jit(jax.value_and_grad(m.feature_loss))
    flat = jnp.zeros((1, 32, 32, 3))
    for image in (disc(), flat):
        value, grad = value_and_grad(image, image)
        assert float(value) < 1e-12
        np.testing.assert_allclose(grad, 0, atol=1e-7)
    _, grad = value_and_grad(flat, flat.at[:, 16:].set(1.0))
    assert np.isfinite(grad).all() and np.any(grad)


def test_blur_and_lost_texture_cost_more_than_colour_at_the_same_pixel_loss():
    x = disc()
    colour = same_mse(x, x + 0.1)
    blurred = same_mse(x, m._blur(m._blur(x)))
    assert float(feature_loss(x, colour)) < 1e-6
    assert float(feature_loss(x, blurred)) > 0.05
    assert float(feature_loss(x, disc(centre=(16, 17)))) > float(feature_loss(x, disc(centre=(16, 16.3))))


def test_weak_edges_count_nearly_as_much_as_strong_ones():
    """Dropping a five times weaker edge costs 25 times less in pixels, but not in features."""
    flat = jnp.zeros((1, 32, 32, 3))
    strong, weak = (flat.at[:, :, 16:].set(a) for a in (1.0, 0.2))
    ratio = float(feature_loss(strong, flat) / feature_loss(weak, flat))
    assert 1 < ratio < 3


def test_symmetric_scale_and_errors():
    x, y = jnp.tanh(np.random.default_rng(0).standard_normal((2, 2, 16, 24, 3), dtype=np.float32))
    assert float(feature_loss(x, y)) == pytest.approx(float(feature_loss(y, x)), rel=1e-5)
    assert 0.3 < float(feature_loss(x, y)) < 3
    assert m.feature_loss(jnp.zeros((1, 4, 4, 3)), jnp.zeros((1, 4, 4, 3))) == 0  # one scale is left
    with pytest.raises(ValueError, match="needs one shape"):
        m.feature_loss(x, y, scales=0)


def test_cost_is_below_one_convolution():
    """Against a single 3x3 convolution from 32 to 32 channels at the same resolution."""
    image = jnp.zeros((4, 32, 32, 3))
    flops = jax.jit(m.feature_loss).lower(image, image).compile().cost_analysis()["flops"]
    assert 0 < flops < 2 * 4 * 32 * 32 * 9 * 32 * 32
