"""Every family of networks computes in bfloat16, with errors of its size, and returns the dtype it promises."""

import jax.numpy as jnp
import pytest

from tests.convert.tables import quick  # noqa: F401  a fixture
from vgen.bench import bf16
from vgen.bench.__main__ import main
from vgen.models.vit import ViT

WIDE = {
    ("MAE", "loss"),
    ("KL autoencoder", "mean"),
    ("KL autoencoder", "logvar"),
    ("UVit", "logits"),
}  # float32 on purpose


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("case", bf16.CASES, ids=lambda case: case.name)
def test_bfloat16(case):
    rows = bf16.measure(case)
    assert rows
    for row in rows:
        # bfloat16 has 8 bits: no value is more exact than 2e-3, or it was not computed in it; a mean may be
        assert (1e-6 if row.output == "loss" else 2e-3) < row.error < 0.06, row
        assert row.dtype == ("float32" if (row.name, row.output) in WIDE else "bfloat16"), row


def test_what_is_measured():
    same = bf16.in_dtype(ViT(width=8, depth=1, heads=1, mlp_dim=8), jnp.bfloat16)
    assert same.dtype == jnp.bfloat16 and same.param_dtype == jnp.float32
    assert bf16.relative([1.0, 2.0], [1.0, 1.0]) == pytest.approx(0.5**0.5)


def test_the_table(capsys, monkeypatch):
    monkeypatch.setattr(bf16, "measure", lambda case: [bf16.Row(case.name, "tokens", 0.01, "bfloat16")])
    assert main(["bf16", "--only=^ViT$"]) == 0
    head, row = capsys.readouterr().out.splitlines()
    assert head.split() == ["network", "output", "error", "dtype"] and row.split() == [
        "ViT",
        "tokens",
        "1.0e-02",
        "bfloat16",
    ]
    assert main(["bf16", "--only=GPT9"]) == 2 and "there are ViT, CLIP" in capsys.readouterr().err
