"""Real processes, stopped and killed: the same command goes on, and ends with the very parameters of a calm run."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vgen.checkpoint import Checkpoints

ROOT = Path(__file__).parents[1]
STEPS = 60


def start(workdir: Path, cache: Path) -> subprocess.Popen:
    """`python -m vgen.main` with the toy of 60 steps, a checkpoint of about 25 MB every third."""
    command = [
        sys.executable, "-m", "vgen.main", f"--config={ROOT}/tests/toy_config.py:long", f"--workdir={workdir}",
        f"--compilation_cache={cache}",
    ]  # fmt: skip
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(command, cwd=workdir.parent, env=env, stderr=subprocess.PIPE, text=True)


def until(process: subprocess.Popen, condition, seconds: float = 120) -> None:
    """Wait for something that a running process does."""
    end = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None:
            pytest.fail(f"the run ended with code {process.returncode} first: {process.stderr.read()[-2000:]}")
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.0005)


def steps(workdir: Path) -> list[int]:
    """The complete checkpoints on disk."""
    folder = workdir / "first" / "checkpoints"
    return sorted(int(path.name) for path in folder.glob("*") if path.name.isdigit())


def saving(workdir: Path) -> list[str]:
    """Names of saves in progress."""
    return [path.name for path in (workdir / "first" / "checkpoints").glob("*tmp*") if path.is_dir()]


def beyond(workdir: Path, step: int):
    return lambda: any(found >= step for found in steps(workdir))


def test_stopped_and_killed_runs_end_where_a_calm_one_does(tmp_path):
    calm, stormy, cache = tmp_path / "calm", tmp_path / "stormy", tmp_path / "cache"
    first = start(calm, cache)
    assert first.wait(300) == 0, first.stderr.read()[-2000:]

    run = start(stormy, cache)  # SIGTERM: finish the step, save, exit cleanly
    until(run, beyond(stormy, 6))
    run.send_signal(signal.SIGTERM)
    assert run.wait(60) == 0
    sentence = run.stderr.read()
    stopped = int(sentence.split("stopped at step ")[1].split()[0])
    assert "the same command goes on from there" in sentence and "Traceback" not in sentence
    assert 6 <= stopped < STEPS and steps(stormy)[-1] == stopped

    run = start(stormy, cache)  # SIGKILL at a moment of chance
    until(run, beyond(stormy, stopped + 3))
    time.sleep(random.random() * 0.1)
    run.kill()
    assert run.wait() == -signal.SIGKILL
    killed = steps(stormy)[-1]
    assert stopped < killed < STEPS
    by_chance = killed

    cut = []
    for _ in range(5):  # SIGKILL in the middle of a save; once more where the save was quicker than the signal
        run = start(stormy, cache)
        until(run, lambda: beyond(stormy, killed + 1)() and saving(stormy))
        run.kill()
        run.wait()
        killed = steps(stormy)[-1]
        if cut := saving(stormy):
            break
    assert cut and killed < STEPS

    last = start(stormy, cache)
    assert last.wait(300) == 0, last.stderr.read()[-2000:]
    assert not saving(stormy) and steps(stormy) == steps(calm)
    want, got = (Checkpoints(folder / "first", read_only=True).weights() for folder in (calm, stormy))
    assert want[1] == got[1] == STEPS and set(want[0]) == set(got[0])
    for path, value in want[0].items():
        assert (value == got[0][path]).all(), path
    lines = [(folder / "first" / "metrics.jsonl").read_text().splitlines() for folder in (calm, stormy)]
    losses = [{row["step"]: row["loss"] for row in map(json.loads, rows)} for rows in lines]
    assert losses[0] == losses[1] and list(losses[0]) == list(range(1, STEPS + 1))
    print(f"\nSIGTERM at step {stopped}; SIGKILL after checkpoint {by_chance}; SIGKILL in the middle of {cut[0]}")
