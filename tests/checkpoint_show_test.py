"""What is told of checkpoints without loading them."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.toy import FEATURES, Linear, settings
from vgen import checkpoint_show, sharding
from vgen import state as states
from vgen.checkpoint import Checkpoints
from vgen.config import UserError
from vgen.train import build_optimizers

ROOT = Path(__file__).parents[1]
TASK = Linear(width=16)
CONFIG = settings(12, optim={"main": dict(lr=0.05)}, ema_decay=0.9)


# orbax drops a coroutine when it meets a damaged file, and the collector finds it whenever it likes.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def save(folder: Path) -> None:
    """A workdir of two stages at steps 3 and 6; the second one's arrays are split over all devices."""
    layout = states.Layout(TASK, {"x": jax.ShapeDtypeStruct((8, FEATURES), np.float32)})
    optimizers, _ = build_optimizers(CONFIG, ["main"])
    fixed = {"fixed/kernel": np.zeros((FEATURES, 16), np.float32)}
    for name, devices in (("second", jax.devices()), ("first", jax.devices()[:1])):
        mesh = sharding.make_mesh(data=1, fsdp=len(devices), devices=devices)
        make, places = states.plan(layout, optimizers, mesh, ema=True, min_shard_size=0)
        state = jax.jit(make, out_shardings=places)(jax.random.key(0), fixed)
        checkpoints = Checkpoints(folder / name, meta={"frozen": {"fixed": {"stage": "first", "step": 6}}})
        for step in (3, 6):
            checkpoints.save(step, state)
        checkpoints.close()
    (folder / "config.json").write_text(json.dumps(dict(name="toy", seed=4, order=["first", "second"])))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """What `save` writes in a process that has four devices."""
    folder = tmp_path_factory.mktemp("run")
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    program = f"import pathlib; from tests.checkpoint_show_test import save; save(pathlib.Path({str(folder)!r}))"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=env, check=True)
    return folder


def told(folder, **kwargs):
    return list(checkpoint_show.lines(folder, **kwargs))


def test_stages_are_told_in_order(saved):
    found = told(saved)
    assert found[0].endswith("toy, seed 4, stages first, second")
    heads = [line for line in found if " on disk" in line]
    assert [head.split(":")[0] for head in heads] == ["first", "second"]
    assert all("step 6 (also 3)" in head and "with checksums" in head for head in heads)
    weights = [line.split(maxsplit=1)[1] for line in found if line.startswith("  weights")]
    # dense 8 x 16 + 16; fixed 8 x 16 is referenced, and so saved nowhere; batches seen
    assert weights == ["3 arrays, 580 B: 145 float32"] * 2
    assert "  frozen   fixed: stage first, step 6" in found


def test_how_arrays_were_split(saved):
    assert not any("split" in line for line in told(saved / "first"))
    lines = told(saved / "second")
    split = lines[next(i for i, line in enumerate(lines) if line.startswith("  weights")) + 1 :][:2]
    assert sorted(line.strip() for line in split) == [
        "split as (-, fsdp) over data 1, fsdp 4, sequence 1, tensor 1: 1 arrays, 512 B",
        "split as (fsdp) over data 1, fsdp 4, sequence 1, tensor 1: 1 arrays, 64 B",
    ]


def test_one_stage_one_step_all_arrays(saved):
    found = told(saved / "first" / "checkpoints", step=3, arrays=True)
    assert sum(" on disk" in line for line in found) == 1 and "first: step 3 (also 6)" in found[1]
    kernels = [line.split()[1:] for line in found if line.strip().startswith("kernel")]
    assert kernels == [["8x16", "float32", "512", "B"]] * 2  # of weights and of averages
    assert not any("adam" in line or "opt" in line.split() for line in found)


def test_nothing_is_loaded_or_changed(saved):
    files = lambda: {str(path): path.stat().st_mtime_ns for path in saved.rglob("*")}
    before, arrays = files(), len(jax.live_arrays())
    told(saved, arrays=True)
    assert files() == before and len(jax.live_arrays()) == arrays


def test_bad_folders_and_steps_end_in_one_sentence(saved, tmp_path, capsys):
    main = checkpoint_show.main
    assert main(["show", str(tmp_path)]) == 2
    assert "holds no checkpoints: give a workdir" in capsys.readouterr().err
    assert main(["show", str(saved), "--step=5"]) == 2
    assert "--step=5" in (error := capsys.readouterr().err) and "has 3, 6" in error
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    assert main(["show", str(tmp_path / "run")]) == 2
    assert "holds no complete checkpoint" in capsys.readouterr().err
    shutil.copytree(saved / "first", tmp_path / "cut")
    for path in (tmp_path / "cut" / "checkpoints" / "6" / "weights").rglob("*"):
        if path.is_file():
            path.write_bytes(b"{")
    with pytest.raises(UserError, match="its metadata cannot be read"):
        told(tmp_path / "cut")
    assert main(["show", str(saved)]) == 0 and "first: step 6" in capsys.readouterr().out
