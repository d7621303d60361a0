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
