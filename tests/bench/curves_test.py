"""Loss by compute: the four networks train, and their steps are what the same FLOPs buy."""

import json

import pytest

from tests.conftest import quick_compilation
from vgen.bench import curves
from vgen.bench.__main__ import main
from vgen.stages import Run


@pytest.mark.slow
def test_a_budget_buys_every_network_the_same_flops(tmp_path):
    run = Run(curves.config("mini", dict.fromkeys(curves.FOLDERS, 1)), tmp_path)
    each = {name: curves.flops(run, folder) for name, folder in curves.FOLDERS.items()}
    # PixArt's block beside DiT's: cross-attention, whose queries and outputs alone are 2 of 14 units of width squared
    assert 1.1 < each["text: PixArt"] / each["class: DiT"] < 1.6
    layers = 4 * 12 * 128**2  # of a token: products of the blocks, three times (forward and twice backward)
    assert each["class: DiT"] == pytest.approx(6 * layers * 64 * 64, rel=0.3)
    assert not any((tmp_path / folder).exists() for folder in curves.FOLDERS.values())


@pytest.mark.slow
def test_the_table(tmp_path, capsys):
    with quick_compilation():
        assert main(["curves", f"--workdir={tmp_path}", "--scale=tiny"]) == 0
    head, *rows = capsys.readouterr().out.splitlines()[-5:]
    assert head.split()[:2] == ["network", "GFLOP/step"]
    found = json.loads((tmp_path / "curves.json").read_text())
    assert [row[:14].strip() for row in rows] == list(found) == list(curves.FOLDERS)
    for name, row in found.items():
        assert row["steps"] == 2 and [spent for spent, _ in row["curve"]] == [2 * row["flops"]], name
        assert all(0 < loss < 100 for _, loss in row["curve"])
