"""LPIPS's weight files: the package's state dict in and out, torchvision's names, the package itself."""

import jax
import numpy as np
import pytest

from tests.convert import tables
from tests.golden import golden
from vgen.convert.lpips import PACKAGE, TORCHVISION
from vgen.metrics.lpips import LPIPS


@pytest.fixture(scope="module")
def weights():
    return golden.load("lpips_vgg")["weights"]


def test_package_round_trip(weights):
    buffers = {"scaling_layer.shift", "scaling_layer.scale"}
    twice = {f"lins.{i}.model.1.weight": weights[f"lin{i}.model.1.weight"] for i in range(5)}
    module, params = tables.check_round_trip(PACKAGE, weights | twice, lost=buffers | set(twice))
    assert module == LPIPS() and tables.found(weights) is PACKAGE and params["lin"]["lin2"].shape == (256,)


def test_torchvision_round_trip(weights):
    state = {f"features.{k.split('.', 2)[2]}" if k.startswith("net.") else k: v for k, v in weights.items()}
    state = {k: v for k, v in state.items() if not k.startswith("scaling_layer.")}
    classifier = {"classifier.6.bias": np.zeros(1000, np.float32)}
    _, params = tables.check_round_trip(TORCHVISION, state | classifier, lost=classifier)
    for family in (PACKAGE, TORCHVISION):  # the second reads the package's names too
        jax.tree.map(np.testing.assert_array_equal, tables.load(family, weights)[1], params)


def test_against_the_package(x64, weights):
    """In float64, with every parameter random."""
    pytest.importorskip("torchvision")
    lpips, torch = pytest.importorskip("lpips"), pytest.importorskip("torch")
    reference = tables.randomize(lpips.LPIPS(net="vgg", pretrained=False, pnet_rand=True, verbose=False))
    module, params = tables.load(PACKAGE, tables.state_of(reference))
    inputs = PACKAGE.inputs(module, np.random.default_rng(0))
    x, y = (torch.from_numpy(inputs[k].transpose(0, 3, 1, 2).astype(np.float64)) for k in "xy")
    with torch.no_grad():
        want = torch.cat([layer[..., 0, 0] for layer in reference(x, y, retPerLayer=True)[1]], 1).numpy()
    got = jax.jit(module.apply)({"params": tables.float64(params)}, **tables.float64(inputs))
    assert tables.error(got, want) < 1e-9
