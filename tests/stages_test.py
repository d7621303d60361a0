"""Stages without training: every parameter comes from `init`, and a fresh workdir samples right away."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from tests import toy
from tests.toy_config import get_config
from vgen.config import ConfigError, UserError
from vgen.main import main
from vgen.stages import Run
from vgen.system import System

TOY = f"--config={Path(__file__).parent}/toy_config.py"
PARTS = ("dense", "fixed", "seen")


@pytest.fixture
def weights(tmp_path):
    """(a file with all parameters of the toy, the same as {path: array})."""
    rng = np.random.default_rng(0)
    shapes = {"dense/kernel": (8, 4), "dense/bias": (4,), "fixed/kernel": (8, 4), "seen/batches": ()}
    arrays = {path: rng.standard_normal(shape).astype(np.float32) for path, shape in shapes.items()}
    np.savez(tmp_path / "weights.npz", **arrays)
    return tmp_path / "weights.npz", arrays


def init(file, parts=PARTS):
    return {part: dict(file=str(file), part=part) for part in parts}


def imported(file, order=("second",), parts=PARTS, **train):
    """The toy with its first stage in `order` imported."""
    config = get_config()
    config.order = order
    stage = config.stages[order[0]]
    stage.train = dict(steps=0, batch_size=4, optim={}, **train)
    stage.init = init(file, parts)
    return config


def flags(file, workdir):
    return [
        "vgen", TOY, f"--workdir={workdir}", "--config.order=('second',)", "--config.stages.second.train.steps=0",
        f"--config.stages.second.init={init(file)}", "--compilation_cache=",
    ]  # fmt: skip


def test_a_fresh_workdir_samples_trains_and_measures(weights, tmp_path, capsys):
    file, _ = weights
    run = tmp_path / "run"
    assert main([*flags(file, run), "--mode=sample", "--prompt=x"]) == 0
    assert (run / "config.json").is_file() and (run / "samples" / "second_0000.png").is_file()
    assert main([*flags(file, run), "--mode=eval"]) == 0
    assert main([*flags(file, run), "--config.seed=3", "--mode=sample", "--prompt=x"]) == 2
    assert "was made by another config" in capsys.readouterr().err
    assert main(flags(file, tmp_path / "other")) == 0  # trains nothing, draws the config's prompt, measures
    made = {path.name for path in (tmp_path / "other").iterdir()}
    assert {"samples", "eval.json"} < made and "second" not in made


def test_weights_are_those_of_init(weights, tmp_path):
    file, arrays = weights
    run = Run(imported(file), tmp_path / "run")
    run.check()
    assert run.train_stage("second") is None
    found, step = run.weights("second")
    assert step == 0 and set(found) == set(arrays)
    for path, value in arrays.items():
        np.testing.assert_array_equal(found[path], value)
        assert found[path].dtype == jnp.float32
    half = Run(imported(file, frozen_dtype="bfloat16"), tmp_path / "half")
    assert {value.dtype for value in half.weights("second")[0].values()} == {jnp.dtype(jnp.bfloat16)}
    assert System(run)(["x"])["second"].shape == (1, 16, 16, 3)


def untold(file, run, classes, **generate):
    """A System without text, of so many classes, that draws the same colour for everyone but for the label."""
    config = imported(file)
    config.generate.update(generate)
    config.text, config.prompts, config.stages.second.data.text = {}, ("1",), False
    config.stages.second.task.classes = classes
    made = Run(config, run)
    made.check()
    return System(made)


def test_prompts_are_numbers_of_classes(weights, tmp_path):
    system = untold(weights[0], tmp_path / "run", classes=3)
    pictures = system(["0", " 2", "1"])["second"].astype(int)  # two calls of two
    assert (pictures[1] - pictures[0] == 2).all() and pictures.shape == (3, 16, 16, 3)
    for prompt in ("3", "-1", "1.0", "red", ""):
        with pytest.raises(UserError, match=rf"prompt '{prompt}': toy takes the number of a class, 0 to 2"):
            system(["0", prompt])
    with pytest.raises(UserError, match="negative prompt '1': toy has no text"):
        system(["0"], negative="1")


def test_the_best_of_several_is_kept(weights, tmp_path, monkeypatch):
    """Of each prompt's own pictures, whichever batches they fall into."""
    system = untold(weights[0], tmp_path / "run", classes=6, choose=dict(stage="second", of=3))
    prompts = ["0", "3", "1", "5"]
    drawn = system([prompt for prompt in prompts for _ in range(3)], of=1)["second"].reshape(4, 3, 16, 16, 3)
    best = drawn.astype(float).mean((2, 3, 4)).argmax(1)
    assert len(set(best[:3])) > 1
    chosen = system(prompts)["second"]
    assert chosen.dtype == np.uint8 and (chosen[:3] == drawn[np.arange(3), best[:3]]).all()
    assert (chosen[3] == drawn[3, 0]).all()  # where the judge says nothing, the first
    plain = untold(weights[0], tmp_path / "run", classes=6)
    assert (plain(prompts)["second"] == system(prompts, of=1)["second"]).all()
    with pytest.raises(UserError, match="of=2: no stage judges the pictures of toy"):
        plain(prompts, of=2)
    with pytest.raises(UserError, match="of=0: expected at least 1"):
        system(prompts, of=0)
    with pytest.raises(ConfigError, match="config.generate.choose: .*of must be at least 1, got 0"):
        untold(weights[0], tmp_path / "run", classes=6, choose=dict(stage="second", of=0))
    with pytest.raises(UserError, match="there is no stage 'clip'"):
        untold(weights[0], tmp_path / "run", classes=6, choose=dict(stage="clip"))
    monkeypatch.delattr(toy.Linear, "score")
    with pytest.raises(ConfigError, match="config.generate.choose.stage: 'second' cannot judge pictures"):
        untold(weights[0], tmp_path / "run", classes=6, choose=dict(stage="second"))


def test_without_text_and_classes_any_prompt_is_a_picture(weights, tmp_path):
    pictures = untold(weights[0], tmp_path / "run", classes=0)(["", "a red circle", "7"])["second"]
    assert pictures.shape == (3, 16, 16, 3) and (pictures[0] == pictures[1]).all()


def test_settings_of_a_task_for_sampling_alone(weights, tmp_path):
    config = imported(weights[0])
    plain = Run(config, tmp_path / "run")
    plain.check()
    config.generate.task = dict(second=dict(size=8))
    run = Run(config, tmp_path / "run")
    run.check()  # the workdir is still that of the config
    assert System(run)(["x"])["second"].shape == (1, 8, 8, 3) and run.task("second").size == 16
    config.generate.task.second.stze = 3
    with pytest.raises(ConfigError, match="generate.task.second.stze: .* does not take it"):
        Run(config, tmp_path / "run")


def test_a_later_stage_takes_its_frozen_parts_from_an_imported_one(weights, tmp_path):
    file, arrays = weights
    run = Run(imported(file, order=("first", "second")), tmp_path / "run")
    with pytest.raises(UserError, match="holds no run: train first"):  # the second stage is to be trained
        run.check()
    run.claim()
    run.train_stage("first")
    run.train_stage("second")
    found, step = run.weights("second")
    assert step == 4
    np.testing.assert_array_equal(found["fixed/kernel"], arrays["fixed/kernel"])
    assert np.abs(found["dense/kernel"] - arrays["dense/kernel"]).max() > 0


@pytest.mark.parametrize(
    "parts, named",
    [(("dense",), r"fixed, seen \(2 parameters, e.g. fixed/kernel\)"), ((), r"dense, fixed, seen \(4 parameters")],
)
def test_parts_without_a_source_are_named_before_anything_is_read(tmp_path, parts, named):
    run = Run(imported("/nowhere.npz", parts=parts), tmp_path / "run")
    run.claim()
    for use in (run.check_sources, run.train_stage, run.weights):
        with pytest.raises(ConfigError, match=rf"stages.second: train.steps is 0.*without a source: {named}"):
            use("second")


def test_they_are_named_before_other_stages_are_trained(weights, tmp_path, capsys):
    run = tmp_path / "run"
    argv = ["vgen", TOY, f"--workdir={run}", "--config.stages.second.train.steps=0", "--compilation_cache="]
    assert main(argv) == 2
    assert "without a source: dense, seen (3 parameters" in capsys.readouterr().err
    assert not (run / "first").exists()


def test_weights_that_do_not_fit(weights, tmp_path):
    file, _ = weights
    config = imported(file)
    config.stages.second.task.width = 5
    run = Run(config, tmp_path / "run")
    with pytest.raises(ConfigError, match=r"init of 'dense'.*kernel: got \(8, 4\), expected \(8, 5\)"):
        run.train_stage("second")
