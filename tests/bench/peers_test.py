"""The table of speeds: it measures the same network on both sides, and says so when it does not."""

import numpy as np
import pytest

from vgen.bench import peers
from vgen.bench.__main__ import main
from vgen.bench.peers import Case, texts
from vgen.config import UserError

SIZES = dict(d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=2, vocab_size=40)
TINY = Case("tiny T5", 1.5, "vgen.convert.t5:T5", "transformers:T5EncoderModel", SIZES, texts(40, 2, 8))


def test_the_table(monkeypatch, capsys):
    pytest.importorskip("transformers")
    monkeypatch.setattr(peers, "CASES", (TINY,))
    assert main(["peers", "--runs=2"]) == 0
    head, row = capsys.readouterr().out.splitlines()
    assert head.split() == ["case", "vgen", "s", "torch", "s", "ratio", "goal", "error"]
    assert row.startswith("tiny T5 ") and row.split()[-2] == "1.5" and float(row.split()[-1]) < 1e-5


def _forward(module, inputs):
    import torch

    return module(torch.from_numpy(inputs["tokens"])).last_hidden_state


def test_a_step_of_training():
    """Loss and norm of the gradients agree, step after step: so the same weights are moved by the same optimiser."""
    pytest.importorskip("transformers")
    case = TINY._replace(forward=_forward)
    assert peers.measure(case, 1).error < 1e-5
    module, source = peers.reference(case)
    model, params = peers.load.load_source(source, family=case.family)
    ours, theirs = peers._steps(case, module, model, params, case.inputs(np.random.default_rng(0)))
    told = np.array([(ours(), theirs()) for _ in range(4)])
    np.testing.assert_allclose(told[:, 0], told[:, 1], rtol=1e-4)
    assert told[0, 0, 0] != told[3, 0, 0]
    with pytest.raises(UserError, match="differ by"):
        peers.measure(case._replace(forward=lambda module, inputs: 2 * _forward(module, inputs)), 1)


def test_what_is_not_the_same_network_is_not_measured(monkeypatch):
    pytest.importorskip("transformers")

    def theirs(module, inputs):
        import torch

        return module(torch.from_numpy(inputs["tokens"][:, ::-1].copy())).last_hidden_state.numpy()

    with pytest.raises(UserError, match="tiny T5: the outputs differ by"):
        peers.measure(TINY._replace(theirs=theirs), 1)


def test_mistakes(capsys):
    assert main(["peers", "--only=GPT9"]) == 2 and "T5-large" in capsys.readouterr().err
    assert main(["peers", "--runs=0"]) == 2 and "at least 1" in capsys.readouterr().err
    with pytest.raises(UserError, match="needs not_installed: pip install not_installed"):
        peers.reference(TINY._replace(reference="not_installed:T5"))
