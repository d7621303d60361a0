"""What is told of a step's speed: from a real run of the toy, with rates that make the sums easy to follow."""

from pathlib import Path

import jax
import pytest

from vgen import plan
from vgen.bench import train
from vgen.bench.__main__ import main

TOY = f"--config={Path(__file__).parents[1] / 'toy_config.py'}"


@pytest.fixture
def chip(monkeypatch):
    made = plan.Chip(flops=1e12, memory=1e9, bandwidth=1e10, network=1e9)
    monkeypatch.setattr(train, "here", lambda devices: plan.Target("toy", devices, "cpu", made))
    return made


def test_lines_of_every_stage(chip, capsys):
    assert main(["train", TOY, "--steps=3"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("toy:short on 1 x toy (data 1, fsdp 1") and "3 steps of each" in out[0]
    assert [line.split(":")[0] for line in out if not line.startswith(" ")][1:] == ["first", "second"]
    assert sum("of the time waited for" in line for line in out) == 2


def test_numbers_follow_from_each_other(chip, tmp_path):
    from tests.toy_config import get_config
    from vgen.stages import Run

    run = Run(get_config(), tmp_path)
    target = train.here(jax.devices()[:1])
    found = train.measured(run, "first", target, 2)
    assert found["seconds"] > 0 and 0 <= found["wait"] <= 1 and found["peak"] > 1e7
    planned = plan.plan_stage(Run(get_config(), tmp_path), "first", target)
    assert found["flops"] == planned["flops"] and found["bytes"] == planned["bytes"]
    assert found["roofline"] == plan.roofline(found, chip)
    line = next(
        line for line in train.told("first", found | dict(seconds=0.5, batch_size=8), target) if "a step" in line
    )
    assert "500.0 ms, 16.0 images/s" in line
    assert found["save"] >= 0 and found["checkpoint_every"] == 4
    told = list(train.told("first", found | dict(seconds=0.5, save=0.5, checkpoint_every=19), target))
    assert "  a save     0.50 s more: 5.0% of the time with one every 19 steps" in told


def test_features_are_drawn_where_a_stage_has_a_cache(chip, tmp_path):
    from tests.multiprocess_test import get_config
    from vgen.stages import Run

    run = Run(get_config(), tmp_path)
    found = train.measured(run, "second", train.here(jax.devices()[:1]), 1)
    assert found["wait"] is None and not (tmp_path / "cache").exists()


def test_a_processor_is_measured():
    target = train.here(jax.devices("cpu")[:1])
    assert 1e9 < target.chip.flops < 1e14 and 1e8 < target.chip.bandwidth < 1e12


@pytest.mark.parametrize(
    "args, sentence",
    [
        (["--config=nowhere.py"], "there is no config file nowhere.py"),
        ([TOY, "--steps=0"], "--steps=0: must be at least 1"),
        ([TOY, "--stage=third"], "there is no stage 'third'"),
        ([TOY, "--config.stages.first.train.step=3"], "step"),
        ([], "needs --config"),
    ],
)
def test_mistakes(args, sentence, capsys):
    assert main(["train", *args]) == 2
    err = capsys.readouterr().err
    assert sentence in err and len(err.splitlines()) == 1
