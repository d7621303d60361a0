"""Debugging names what went wrong, profiling writes what a step did, and neither changes what is learned."""

import dataclasses
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.toy import Linear, fixed, settings, train
from vgen import debug
from vgen.config import UserError
from vgen.layers.transformer import Block, stack
from vgen.main import main
from vgen.train import Hook
from vgen.types import Loss

ROOT = Path(__file__).parents[1]
TOY = f"--config={ROOT}/tests/toy_config.py"


class Net(nn.Module):
    """Two stacked blocks between two layers; `wrong` is done where the name says."""

    wrong: str

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(8, name="first")(x)
        x = stack(Block(heads=2, mlp_dim=8, name="layers"), x[:, None], depth=2)[:, 0]
        if self.wrong == "root":
            x = jnp.sqrt(x - jax.lax.stop_gradient(x))  # zero, of which the square root has no gradient
        return nn.Dense(4, name="last")(x / 0 if self.wrong == "output" else x)


@dataclasses.dataclass(frozen=True)
class Broken:
    """Least squares with that network; the loss itself is broken with wrong = "loss"."""

    wrong: str = ""
    groups = {"main": ".*"}
    buffers = ""

    def init(self, key, batch):
        return {"net": Net(self.wrong).init(key, batch["x"])["params"]}

    def losses(self, params, ctx, batch, key):
        out = Net(self.wrong).apply({"params": params["net"]}, batch["x"])
        value = jnp.square(out).mean()
        return {"main": Loss(value / 0 if self.wrong == "loss" else value, {})}


@pytest.mark.parametrize(
    "wrong, sentence",
    [
        ("output", "step 1: the output of layer last is not finite"),
        ("root", "step 1: the gradient of net/layers/"),
        ("loss", "step 1: the loss of main is not finite"),
        ("", None),
    ],
)
def test_the_place_is_named(wrong, sentence):
    """Of several, the first: not the layers behind it, nor the gradients that follow."""
    watch = debug.Watch()
    run = lambda: train(watch(Broken(wrong)), settings(2), hooks=[Hook(1, watch.check)], around=debug.guarded)
    if sentence is None:
        assert int(run().skipped) == 0
        return
    with pytest.raises(debug.NotFinite, match=sentence):
        run()


def test_watching_changes_no_number():
    watch = debug.Watch()
    plain = train(Linear(), settings(4), given=fixed())
    watched = train(watch(Linear()), settings(4), given=fixed(), hooks=[Hook(1, watch.check)])
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), plain.params, watched.params)


def test_an_error_in_a_layer_names_it():
    class Wrong(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3, name="inner")(x) @ x

    class Task(Broken):
        def losses(self, params, ctx, batch, key):
            Wrong(name="outer").init(key, batch["x"])

    with pytest.raises(TypeError) as error:
        debug.Watch()(Task()).losses({}, None, {"x": jnp.ones((2, 5))}, jax.random.key(0))
    assert "in layer Wrong, Wrong.__call__" in error.value.__notes__


def test_nothing_moves_inside_of_a_step():
    step = debug.guarded(jax.jit(lambda x: x + 1))
    assert step(jnp.ones(3))[0] == 2
    with pytest.raises(Exception, match="[Dd]isallowed"):
        step(np.ones(3))


def test_a_trace_of_some_steps(tmp_path):
    trace = debug.Trace(tmp_path, 3, 4)
    train(Linear(), settings(6), hooks=[Hook(1, trace)])
    assert not trace.running and trace.count == 6
    (written,) = tmp_path.glob("plugins/profile/*/*.xplane.pb")
    data = jax.profiler.ProfileData.from_file(str(written))
    steps = [event for plane in data.planes for line in plane.lines for event in line.events if event.name == "train"]
    assert sorted(dict(event.stats)["step_num"] for event in steps) == [2, 3]  # from 0, as XProf counts


def test_a_trace_that_is_cut_short_is_written(tmp_path):
    trace = debug.Trace(tmp_path, 2, 9)
    train(Linear(), settings(3), hooks=[Hook(1, trace)])
    trace.close()
    assert list(tmp_path.glob("plugins/profile/*/*.xplane.pb"))
    for first, last in ((1, 2), (4, 3)):
        with pytest.raises(UserError, match="2 <= first <= last"):
            debug.Trace(tmp_path, first, last)


def test_from_the_command_line(tmp_path, capsys):
    """Both at once, with the losses of a plain run."""
    args = ["--config.stages.first.train.steps=4", "--config.stages.first.train.log_every=1", "--stage=first"]
    on = ["--config.debug=true", "--config.profile=true", "--config.profile_steps=(2, 3)"]
    losses = []
    for name, more in (("plain", []), ("debug", on)):
        assert main(["vgen", TOY, f"--workdir={tmp_path / name}", *args, *more]) == 0
        lines = (tmp_path / name / "first" / "metrics.jsonl").read_text().splitlines()
        losses.append([found["loss"] for found in map(json.loads, lines) if "loss" in found])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
    assert (
        list((tmp_path / "debug/first/profile").rglob("*.xplane.pb"))
        and not (tmp_path / "plain/first/profile").exists()
    )
    assert main(["vgen", TOY, f"--workdir={tmp_path / 'bad'}", "--config.profile_steps=(1, 3)"]) == 2
    assert "config.profile_steps must be" in capsys.readouterr().err


def test_types_are_checked_once_asked_for():
    """In a process of its own, as what is imported already is not checked."""
    code = (
        "import jax.numpy as jnp; from vgen.layers.attention import attention\n"
        "q = jnp.ones((2, 3, 4, 8)); print(attention(q, q, q).shape)\n"
        "try: attention(q, q[:, :, :2], q)\n"
        "except Exception as error: print(type(error).__name__, 'vgen.layers.attention.attention' in str(error))"
    )
    environ = os.environ | {"JAX_PLATFORMS": "cpu"}
    run = lambda **more: subprocess.run(
        [sys.executable, "-c", code], env=environ | more, cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert run(VGEN_DEBUG="1") == ["(2, 3, 4, 8)", "TypeCheckError True"]
    assert run()[1].endswith("False")
