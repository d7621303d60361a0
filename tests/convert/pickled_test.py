"""PyTorch's files: the tensors are read, and nothing in the file is run."""

import argparse
import pickle
import sys
import types
from collections import OrderedDict

import ml_dtypes
import numpy as np
import pytest

from tests.convert.files import ARRAYS, Evil, mutated, refused, same
from vgen.config import UserError
from vgen.convert import pickled, sources


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


def tensors(torch):
    return {
        name: torch.from_numpy(a.view(np.int16)).view(torch.bfloat16) if a.dtype == ml_dtypes.bfloat16
        else torch.from_numpy(a.copy()) for name, a in ARRAYS.items()
    }  # fmt: skip


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt"])
@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
def test_torch_files(torch, suffix, wrapper, tmp_path):
    state = tensors(torch)
    tree = state if wrapper is None else {"epoch": 3, wrapper: state, "optimizer": {"state": {}, "lr": 0.1}}
    torch.save(tree, tmp_path / f"x{suffix}", _use_new_zipfile_serialization=suffix != ".pth")
    same(sources.read_weights(tmp_path / f"x{suffix}"))


def test_views_are_read_as_they_are(torch, tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    torch.save({"t": base.T, "row": base[1], "p": torch.nn.Parameter(base)}, tmp_path / "x.pt")
    got = sources.read_weights(tmp_path / "x.pt")
    np.testing.assert_array_equal(got["t"], base.numpy().T)
    np.testing.assert_array_equal(got["row"], base[1].numpy())


def fake(monkeypatch, name, attribute):
    """A class that pickles as if it came from a package that is not installed where the file is read."""
    module = types.ModuleType(name)
    kind = type(attribute, (), {"__module__": name})
    setattr(module, attribute, kind)
    parts = name.split(".")
    for i in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:i]), module if i == len(parts) else types.ModuleType(parts[0]))
    return kind


@pytest.mark.parametrize("zipped", [True, False])
def test_what_lightning_leaves_beside_the_weights(torch, zipped, monkeypatch, tmp_path):
    callback = fake(monkeypatch, "pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint")
    beside = dict(callbacks={callback: dict(best=np.float64(0.5))}, args=argparse.Namespace(lr=0.1), monitor=callback())
    torch.save(
        dict(beside, state_dict=OrderedDict(tensors(torch))),
        tmp_path / "last.ckpt",
        _use_new_zipfile_serialization=zipped,
    )
    monkeypatch.undo()
    same(sources.read_weights(tmp_path / "last.ckpt"))


def test_a_file_that_wants_code_to_run(torch, tmp_path):
    for zipped in (True, False):
        torch.save({"state_dict": tensors(torch), "x": Evil(tmp_path / "made")}, tmp_path / "evil.pt",
                   _use_new_zipfile_serialization=zipped)  # fmt: skip
        refused(tmp_path / "evil.pt", "open to be imported, which is not done", "safetensors")
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps(Evil(tmp_path / "made"), protocol=2))
    refused(tmp_path / "plain.pkl", "plain.pkl")
    assert not (tmp_path / "made").exists()


def test_inert_names_are_those_that_only_describe():
    for name in ("os.system", "builtins.eval", "builtins.getattr", "subprocess.Popen", "torch.load", "torch.hub.load",
                 "collections.abc.x", "numpyx.y", "xnumpy.y", "posix.system", "functools.partial"):  # fmt: skip
        assert not pickled.INERT.fullmatch(name), name


def module(torch):
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Sequential(torch.nn.BatchNorm1d(4)))
    net.register_buffer("step", torch.tensor(3))
    return net


def test_a_whole_module_and_a_torchscript_archive(torch, tmp_path):
    net = module(torch)
    want = {name: t.numpy() for name, t in net.state_dict().items()}
    torch.save(net, tmp_path / "net.pkl")
    same(sources.read_weights(tmp_path / "net.pkl"), want)
    torch.jit.trace(net.eval(), torch.zeros(2, 3)).save(tmp_path / "net.pt")
    same(sources.read_weights(tmp_path / "net.pt"), want)


def test_damaged_torch_files(torch, tmp_path):
    torch.save(tensors(torch), tmp_path / "x.pt")
    good = (tmp_path / "x.pt").read_bytes()
    rng = np.random.default_rng(4)
    for i in range(60):
        (tmp_path / "y.pt").write_bytes(mutated(good, rng) if i % 2 else good[: rng.integers(len(good))])
        try:
            sources.read_weights(tmp_path / "y.pt")
        except UserError as error:
            assert "\n" not in str(error)
    for tree, message in (({}, "no tensors"), ([torch.zeros(1)], "expected a state dict, got list"),
                          ({"ema": {"a": torch.zeros(1)}}, "it has ema"),
                          ({"a": torch.zeros(2, 2).to_sparse()}, "expected plain numbers")):  # fmt: skip
        torch.save(tree, tmp_path / "z.pt")
        refused(tmp_path / "z.pt", message)


def test_without_torch(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "x.pt").write_bytes(b"")
    refused(tmp_path / "x.pt", "needs PyTorch: pip install torch")
