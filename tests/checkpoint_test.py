"""Checkpoints: what is in them, how many stay, what happens to damaged ones, and that going on changes nothing."""

import json
import logging
import shutil
import sys
import types

import jax
import numpy as np
import pytest

from tests.toy import FEATURES, Linear, Stream, settings, train
from vgen import sharding
from vgen import state as states
from vgen.checkpoint import Checkpoints, spare_tracebacks
from vgen.config import UserError
from vgen.train import Stopped, build_optimizers

# orbax drops a coroutine when a restore fails, and the collector finds it whenever it likes.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
TASK = Linear(noise=0.3, width=16)
CONFIG = settings(12, optim={"main": dict(lr=0.05)}, ema_decay=0.9, checkpoint_every=3)


def run(folder, config=CONFIG, *, task=TASK, stop_at=None, batches=None, **kwargs):
    """Train with checkpoints in `folder`; (state or None if stopped, warnings)."""
    warnings, count = [], iter(range(1, 1000))
    checkpoints = Checkpoints(folder, warn=warnings.append, **kwargs)
    batches = batches or Stream(config.batch_size)
    try:
        stop = lambda: next(count) == stop_at
        return train(task, config, batches=batches, checkpoints=checkpoints, should_stop=stop), warnings
    except Stopped:
        return None, warnings
    finally:
        checkpoints.close()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished run of 12 steps: (its folder, its final state)."""
    folder = tmp_path_factory.mktemp("whole")
    state, warnings = run(folder, keep=3)
    assert not warnings
    return folder, jax.device_get(state)


@pytest.fixture
def copy(whole, tmp_path):
    shutil.copytree(whole[0], tmp_path / "run")
    return tmp_path / "run"


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


def test_contents(whole):
    folder = whole[0] / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        [f"{step}{end}" for step in (6, 9, 12) for end in ("", ".crc.json")]
    )
    meta = json.loads((folder / "12" / "meta" / "metadata").read_text())
    assert meta["data"] == {"k": 12} and meta["average"] is True
    assert set(meta["shapes"]) == {"dense/kernel", "dense/bias", "seen/batches"}  # fixed/kernel is not saved
    assert not any("fixed" in str(path) for path in folder.rglob("*"))


def test_weights_are_the_average(whole):
    weights, step = Checkpoints(whole[0], read_only=True).weights()
    assert step == 12
    same(weights, whole[1].ema)


def test_keep_and_keep_every(tmp_path):
    run(tmp_path, settings(8, checkpoint_every=1), keep=2, keep_every=3)
    assert Checkpoints(tmp_path, read_only=True).steps() == [3, 6, 7, 8]
    assert not (tmp_path / "checkpoints" / "5.crc.json").exists()


@pytest.mark.parametrize("stop_at", [2, 5, 7])
def test_going_on_is_bit_identical(whole, tmp_path, stop_at):
    stream = Stream(CONFIG.batch_size)
    assert run(tmp_path, stop_at=stop_at, batches=stream)[0] is None
    again = Stream(CONFIG.batch_size)
    state, _ = run(tmp_path, batches=again)
    same(state, whole[1])
    assert stream.k == stop_at and again.k == 12
    finished, _ = run(tmp_path, batches=Stream(change=lambda k, x: 1 / 0))  # nothing is left to do
    same(finished, whole[1])


def test_restoring_onto_another_mesh(whole):
    mesh = sharding.make_mesh(fsdp=len(jax.devices()), data=1)
    layout = states.Layout(TASK, {"x": jax.ShapeDtypeStruct((8, FEATURES), np.float32)})
    optimizers, _ = build_optimizers(CONFIG, ["main"])
    make, places = states.plan(layout, optimizers, mesh, ema=True, min_shard_size=0)
    checkpoints = Checkpoints(whole[0], read_only=True)
    state, position = checkpoints.restore(jax.eval_shape(make, jax.random.key(0), {}), places)
    same(state, whole[1])
    assert position == {"k": 12} and state.params["dense/kernel"].sharding == places.params["dense/kernel"]


def largest(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-7])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage", [truncate, flip, lambda path: path.unlink()], ids=["truncated", "flipped", "deleted"]
)
def test_a_damaged_newest_is_named_and_the_one_before_is_used(whole, copy, damage):
    damage(largest(copy / "checkpoints" / "12"))
    stream = Stream(CONFIG.batch_size)
    state, warnings = run(copy, batches=stream, keep=3)
    same(state, whole[1])  # steps 10 to 12 were taken again
    assert stream.k == 12 and len(warnings) == 1
    assert f"checkpoint {copy}/checkpoints/12 is damaged (1 files changed" in warnings[0]
    assert (copy / "12.damaged").is_dir() and Checkpoints(copy, read_only=True).steps() == [6, 9, 12]


def test_damage_before_the_checksums_were_written(whole, copy):
    (copy / "checkpoints" / "12.crc.json").unlink()
    shutil.rmtree(copy / "checkpoints" / "12" / "rest" / "d", ignore_errors=True)
    shutil.rmtree(copy / "checkpoints" / "12" / "rest" / "ocdbt.process_0", ignore_errors=True)
    state, warnings = run(copy, keep=3)
    same(state, whole[1])
    assert len(warnings) == 1 and "12 is damaged" in warnings[0]


def test_reading_weights_leaves_a_damaged_one_where_it_is(whole, copy):
    truncate(largest(copy / "checkpoints" / "12"))
    before = sorted(copy.rglob("*"))
    warnings = []
    _, step = Checkpoints(copy, warn=warnings.append, read_only=True).weights()
    assert step == 9 and len(warnings) == 1 and sorted(copy.rglob("*")) == before


def test_all_damaged(copy):
    for step in (6, 9, 12):
        flip(largest(copy / "checkpoints" / str(step)))
    with pytest.raises(UserError, match=r"no checkpoint in .* can be read \(tried steps \[6, 9, 12\]"):
        run(copy)


def test_a_whole_one_of_another_program_is_not_called_damaged(copy):
    with pytest.raises(UserError, match=r"checkpoints/12 is whole but does not fit the program"):
        run(copy, task=Linear(width=5))
    assert Checkpoints(copy, read_only=True).steps() == [6, 9, 12]


def test_a_save_that_was_cut_off_is_not_seen(whole, copy):
    cut = copy / "checkpoints" / "15.orbax-checkpoint-tmp"
    shutil.copytree(copy / "checkpoints" / "12", cut)
    assert Checkpoints(copy, read_only=True).steps() == [6, 9, 12] and cut.exists()
    state, warnings = run(copy)
    same(state, whole[1])
    assert not warnings and not cut.exists()


def test_nothing_to_restore(tmp_path):
    assert Checkpoints(tmp_path).weights() is None


def test_command_lines_print_no_tracebacks_of_threads(monkeypatch, caplog):
    """Of what is raised to them anyway; whatever else goes wrong beside is shown as ever."""
    shown = []
    monkeypatch.setattr(sys, "unraisablehook", shown.append)
    monkeypatch.setattr(logging.getLogger("absl"), "filters", [])
    spare_tracebacks.__wrapped__()
    closed, other = RuntimeError("Event loop is closed"), RuntimeError("another one")
    for error in (closed, other, ValueError("Event loop is closed")):
        sys.unraisablehook(types.SimpleNamespace(exc_type=type(error), exc_value=error))
    assert [str(each.exc_value) for each in shown] == ["another one", "Event loop is closed"]
    log = logging.getLogger("absl")
    log.error("told")
    log.error("raised in a thread", exc_info=other)
    assert [record.getMessage() for record in caplog.records] == ["told"]
