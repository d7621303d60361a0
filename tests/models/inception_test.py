"""FID's Inception-v3: pytorch_fid's numbers at every tap, resizing, sizes, both layouts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.convert import tables
from tests.convert.tables import quick  # noqa: F401  a fixture
from tests.golden import golden
from vgen.convert.inception import PYTORCH_FID, WRAPPED, WRAPPER
from vgen.convert.rules import ConvertError
from vgen.models import inception
from vgen.models.inception import InceptionV3

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def gold():
    return golden.load("fid_inception")


def published(weights):
    """The wrapper's weights under the names of the published file, with a classifier."""
    rng = np.random.default_rng(0)
    fc = {"fc.weight": rng.standard_normal((1008, 2048)) / 50, "fc.bias": rng.standard_normal(1008)}
    state = {k: np.asarray(v, np.float32) for k, v in fc.items()}
    for name, value in weights.items():
        block, rest = ".".join(name.split(".")[:3]), name.split(".", 3)[3]
        state[f"{WRAPPED[block]}.{rest}"] = value
    return state


def test_golden(x64, gold):
    state = published(gold["weights"])
    module, params = tables.load(PYTORCH_FID, state)
    assert module == InceptionV3()
    x = 2 * gold["inputs"]["x"].astype(np.float64).transpose(0, 2, 3, 1) - 1  # the reference takes [0, 1]
    run = jax.jit(lambda params, x: module.apply({"params": params}, x))
    got = run(tables.float64(params), x)
    for i, value in enumerate((got.low, got.mid, got.high, got.pool[:, None, None])):
        golden.check(gold, f"block{i}", np.asarray(value).transpose(0, 3, 1, 2), 1e-9)
    want = np.asarray(got.pool) @ state["fc.weight"].T.astype(np.float64) + state["fc.bias"]
    assert tables.error(got.logits, want) < 1e-9 and got.logits.shape == (1, 1008)


def in_torch(weights, x):
    """The wrapper's blocks in torch's functions: x [b, 3, h, w] in [-1, 1], not resized -> the four maps' outputs."""
    import torch
    from torch.nn import functional as F

    w = {name: torch.from_numpy(np.asarray(value, np.float64)) for name, value in weights.items()}

    def unit(x, name, stride=1, padding=None):
        kernel = w[f"{name}.conv.weight"]
        sides = [n // 2 for n in kernel.shape[2:]] if padding is None else padding
        statistics = (w[f"{name}.bn.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
        return F.relu(F.batch_norm(F.conv2d(x, kernel, None, stride, sides), *statistics, eps=1e-3))

    def chain(x, at, names, last_stride=1):
        for name in names:
            stride = last_stride if name == names[-1] else 1
            x = unit(x, f"{at}.{name}", stride, 0 if stride == 2 else None)
        return x

    def mixed(x, at):
        names = sorted({name.split(".")[3] for name in w if name.startswith(at + ".")})
        stems = sorted({name.rsplit("_", 1)[0] for name in names if name != "branch_pool"})
        outs, grows = [], "branch_pool" not in names
        for stem in sorted(stems, key=lambda s: (s != "branch1x1", s.endswith("dbl"), s)):
            own = [name for name in names if name == stem or name.rpartition("_")[0] == stem]
            forked = [name for name in own if name[-1] in "ab"]
            y = chain(x, at, [name for name in own if name not in forked], 2 if grows else 1)
            outs += [unit(y, f"{at}.{name}") for name in forked] or [y]
        if grows:
            return torch.cat([*outs, F.max_pool2d(x, 3, 2)], 1)
        last = at == "blocks.3.2"
        pooled = F.max_pool2d(x, 3, 1, 1) if last else F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        return torch.cat([*outs, unit(pooled, f"{at}.branch_pool")], 1)

    x = unit(unit(unit(torch.from_numpy(x), "blocks.0.0", 2, 0), "blocks.0.1", 1, 0), "blocks.0.2")
    maps = [F.max_pool2d(x, 3, 2)]
    maps.append(F.max_pool2d(unit(unit(maps[0], "blocks.1.0"), "blocks.1.1", 1, 0), 3, 2))
    for block, count in ((2, 8), (3, 3)):
        x = maps[-1]
        for i in range(count):
            x = mixed(x, f"blocks.{block}.{i}")
        maps.append(x)
    maps[-1] = maps[-1].mean((2, 3), keepdim=True)
    return [m.numpy() for m in maps]


def test_other_sizes_without_resizing_against_torch(gold):
    """The wrapper's layout, on odd, small images as they are; the torch side is held to pytorch_fid's numbers too."""
    torch = pytest.importorskip("torch")
    weights = {k: v for k, v in gold["weights"].items() if "num_batches" not in k}
    small = torch.from_numpy(2 * gold["inputs"]["x"].astype(np.float64) - 1)
    whole = torch.nn.functional.interpolate(small, size=(299, 299), mode="bilinear", align_corners=False)
    for i, value in enumerate(in_torch(weights, whole.numpy())):
        golden.check(gold, f"block{i}", value, 1e-9)
    module, params = tables.load(WRAPPER, weights)
    module = module.clone(resize=False)
    x = np.random.default_rng(0).uniform(-1, 1, (2, 83, 107, 3))
    want = in_torch(weights, x.transpose(0, 3, 1, 2))
    for dtype, tol in ((np.float64, 1e-9), (np.float32, 2e-5)):
        with jax.enable_x64(dtype is np.float64):
            run = jax.jit(lambda params, x: module.apply({"params": params}, x))
            got = run(jax.tree.map(lambda a: np.asarray(a, dtype), params), x.astype(dtype))
        assert got.pool.dtype == dtype and got.logits is None
        for value, wanted in zip((got.low, got.mid, got.high, got.pool[:, None, None]), want, strict=True):
            assert tables.error(np.asarray(value).transpose(0, 3, 1, 2), wanted) < tol
    assert tables.error(got.pool[::-1], got.pool) > 1e-3


def test_round_trips(gold):
    weights = {k: v for k, v in gold["weights"].items() if "num_batches" not in k}
    state = published(weights)
    module, params = tables.check_round_trip(PYTORCH_FID, state)
    wrapped, same = tables.check_round_trip(WRAPPER, weights)
    assert wrapped == InceptionV3(classes=None)
    params.pop("fc")
    jax.tree.map(np.testing.assert_array_equal, same, params)
    assert tables.found(state) is PYTORCH_FID and tables.found(weights) is WRAPPER
    counters = {"Mixed_5b.branch1x1.bn.num_batches_tracked": np.zeros((), np.int64)}
    tables.check_round_trip(PYTORCH_FID, state | counters, lost=counters)
    with pytest.raises(ConvertError, match="1008 classes is not FID"):  # torchvision's file, another network
        tables.load(PYTORCH_FID, state | {"AuxLogits.fc.bias": np.zeros(1000, np.float32)})


def test_published_sizes():
    shapes = tables.shapes_of(PYTORCH_FID, InceptionV3())
    learned = {k: a.size for k, a in shapes.items() if not k.endswith(("/mean", "/var"))}
    fc = sum(n for k, n in learned.items() if k.startswith("fc/"))
    assert sum(learned.values()) == pytest.approx(23.85e6, abs=5e3)
    assert sum(learned.values()) - fc == pytest.approx(21.79e6, abs=7e3)


@pytest.mark.parametrize("size", [(7, 5), (300, 410), (299, 299)])
def test_resizing_as_torch(x64, size):
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(0).standard_normal((1, *size, 2))
    want = torch.nn.functional.interpolate(
        torch.from_numpy(x.transpose(0, 3, 1, 2)), size=(299, 299), mode="bilinear", align_corners=False
    )
    got = inception.resize(jnp.asarray(x))
    assert tables.error(got, want.numpy().transpose(0, 2, 3, 1)) < 1e-9


def test_small_images_want_resizing():
    small = jnp.zeros((1, 64, 80, 3))
    with pytest.raises(ValueError, match="smaller than 75"):
        jax.eval_shape(InceptionV3(resize=False).init, jax.random.key(0), small)
    shapes = jax.eval_shape(
        InceptionV3(resize=False, classes=None).init_with_output, jax.random.key(0), jnp.zeros((1, 75, 99, 3))
    )
    assert shapes[0].pool.shape == (1, 2048) and shapes[0].logits is None and shapes[0].low.shape == (1, 17, 23, 64)
