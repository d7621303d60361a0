"""ArcFace's network and margins against the authors' numbers; sizes, training mode, gradients of the margins."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.convert import tables
from tests.convert.tables import quick  # noqa: F401  a fixture
from tests.golden import golden
from vgen.convert.iresnet import ARCFACE
from vgen.models.iresnet import LAYERS, IResNet, margin_logits

pytestmark = pytest.mark.usefixtures("quick")


def nchw(x):
    return np.asarray(x).transpose(0, 3, 1, 2)


@pytest.mark.parametrize("dtype, tol", [(np.float64, 1e-9), (np.float32, 2e-5)])
def test_golden(x64, dtype, tol):
    g = golden.load("arcface_iresnet")
    module, params = tables.check_round_trip(ARCFACE, g["weights"])
    assert module == IResNet(layers=(1, 2, 1, 1), features=24) and tables.found(g["weights"]) is ARCFACE
    x = g["inputs"]["x"].transpose(0, 2, 3, 1).astype(dtype)
    names = ("prelu", "layer1_0", "layer4_0", "fc")
    seen = dict(mutable=["intermediates"], capture_intermediates=lambda m, _: m.name in names and len(m.path) == 1)
    run = jax.jit(lambda params, x: module.apply({"params": params}, x, **seen))
    y, mids = run(jax.tree.map(lambda a: np.asarray(a, dtype), params), x)
    mids = {k: v["__call__"][0] for k, v in mids["intermediates"].items() if k in names}
    assert y.dtype == dtype
    golden.check(g, "y", y, tol)
    golden.check(g, "stem", nchw(mids["prelu"]), tol)
    golden.check(g, "layer1", nchw(mids["layer1_0"][0]), tol)
    golden.check(g, "layer4", nchw(mids["layer4_0"][0]), tol)
    golden.check(g, "before_head", mids["fc"], tol)


def in_torch(weights, x):
    """The network of a state dict in torch's functions, from the paper's description: x [b, 3, h, w] -> features."""
    import torch
    from torch.nn import functional as F

    w = {name: torch.from_numpy(np.asarray(value, np.float64)) for name, value in weights.items()}

    def norm(x, name):
        parts = (w[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, *parts, eps=1e-5)

    def block(x, at, stride):
        h = F.prelu(norm(F.conv2d(norm(x, f"{at}.bn1"), w[f"{at}.conv1.weight"], padding=1), f"{at}.bn2"),
                    w[f"{at}.prelu.weight"])  # fmt: skip
        h = norm(F.conv2d(h, w[f"{at}.conv2.weight"], stride=stride, padding=1), f"{at}.bn3")
        if stride == 2:
            x = norm(F.conv2d(x, w[f"{at}.downsample.0.weight"], stride=2), f"{at}.downsample.1")
        return x + h

    x = F.prelu(norm(F.conv2d(torch.from_numpy(x), w["conv1.weight"], padding=1), "bn1"), w["prelu.weight"])
    for stage in (1, 2, 3, 4):
        i = 0
        while f"layer{stage}.{i}.conv1.weight" in w:
            x, i = block(x, f"layer{stage}.{i}", 1 if i else 2), i + 1
    x = F.linear(norm(x, "bn2").flatten(1), w["fc.weight"], w["fc.bias"])
    return norm(x, "features").numpy()


def test_another_size_against_torch(x64):
    """Other numbers of layers, features and pixels; the torch side is held to the authors' numbers as well."""
    pytest.importorskip("torch")
    g = golden.load("arcface_iresnet")
    golden.check(g, "y", in_torch(g["weights"], g["inputs"]["x"].astype(np.float64)), 1e-9)
    module = IResNet((2, 1, 3, 2), 7, 48)
    x = np.random.default_rng(0).uniform(-1, 1, (2, 48, 48, 3))
    params = tables.draw(module, jnp.asarray(x))
    want = in_torch(tables.export(ARCFACE, module, params), nchw(x))
    run = jax.jit(lambda params, x: module.apply({"params": params}, x))
    got = run(tables.float64(params), x)
    assert got.shape == (2, 7) and tables.error(got, want) < 1e-9
    assert tables.error(run(tables.float64(params), x[::-1]), want) > 1e-2


@pytest.mark.parametrize("depth, count", [(50, 43.59e6), (100, 65.16e6)])
def test_published_sizes(depth, count):
    tree = jax.eval_shape(IResNet(LAYERS[depth]).init, jax.random.key(0), jnp.zeros((1, 112, 112, 3)))["params"]
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    learned = sum(leaf.size for path, leaf in leaves if path[-1].key not in ("mean", "var"))
    assert learned == pytest.approx(count, abs=5e3)
    assert {int(k[5]): sum(n.startswith(k[:6]) for n in tree) for k in tree if k.startswith("layer")} == dict(
        enumerate(LAYERS[depth], 1)
    )


def test_training_uses_the_batch_and_returns_new_statistics():
    module = IResNet(layers=(1, 1, 1, 1), features=6, image_size=16)
    x = jax.random.normal(jax.random.key(0), (4, 16, 16, 3))
    params = tables.draw(module, x)
    run = jax.jit(lambda params, x: module.apply({"params": params}, x, True, method="embed"))
    y, updates = run(params, x)
    np.testing.assert_allclose(y.mean(0), params["features"]["bias"], atol=1e-4)  # the last norm saw this batch
    paths = {"/".join(k.key for k in path) for path, _ in jax.tree_util.tree_leaves_with_path(params)}
    assert set(updates) == {path for path in paths if path.endswith(("/mean", "/var"))}
    stem = jax.lax.conv(nchw(x), nchw(params["conv1"]["kernel"].transpose(3, 0, 1, 2)), (1, 1), "SAME")
    want = 0.9 * params["bn1"]["mean"] + 0.1 * stem.mean((0, 2, 3))
    np.testing.assert_allclose(updates["bn1/mean"], want, atol=1e-5)


def test_another_size_and_errors():
    state = tables.export(ARCFACE, small := IResNet((1, 1, 1, 2), 5, 48), tables.draw(small, jnp.zeros((1, 48, 48, 3))))
    assert tables.check_round_trip(ARCFACE, state)[0] == small
    with pytest.raises(ValueError, match="112 pixels"):
        jax.eval_shape(IResNet().init, jax.random.key(0), jnp.zeros((1, 96, 112, 3)))


MARGINS = {
    "arcface": dict(scale=64.0, angle=0.5),
    "combined_arc": dict(scale=64.0, angle=0.5),
    "combined_filter": dict(scale=32.0, additive=0.4, interclass_filter=0.35),
    "cosface": dict(scale=64.0, additive=0.4),
}


@pytest.mark.parametrize("name", MARGINS)
def test_margins_golden(x64, name):
    g = golden.load("arcface_margins")
    cosine, labels = jnp.asarray(g["inputs"]["cosine"], jnp.float64), jnp.asarray(g["inputs"]["labels"])
    assert (labels == -1).any()
    run = jax.jit(lambda c: margin_logits(c, labels, **MARGINS[name]))
    golden.check(g, name, run(cosine), 1e-9)
    moved = run(cosine * 0.9)
    assert tables.error(moved, run(cosine)) > 1e-2


def test_gradient_of_the_angle_passes_straight():
    cosine, labels = jnp.asarray([[0.3, -0.2, 1.0], [-1.0, 0.9, 0.1]]), jnp.asarray([2, 0])
    grad = jax.grad(lambda c: margin_logits(c, labels, scale=64.0, angle=0.5).sum())(cosine)
    np.testing.assert_allclose(grad, 64)  # finite where the cosine is 1, too
    filtered = jax.grad(lambda c: margin_logits(c, labels, scale=2.0, interclass_filter=0.25).sum())(cosine)
    np.testing.assert_allclose(filtered, [[0, 2, 2], [2, 0, 2]])
    with pytest.raises(ValueError, match="angle or additive"):
        margin_logits(cosine, labels, angle=0.5, additive=0.4)
