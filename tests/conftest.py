"""Shared set-up: compiled programs are kept for the session, x64 is opt-in per test, and one small trained run."""

import contextlib
import hashlib
import os
import runpy
import tempfile
from importlib.metadata import version
from pathlib import Path

# Before JAX is imported, and for the processes that tests start: programs that were compiled once are read back.
CACHE = os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", tempfile.mkdtemp(prefix="vgen-xla-"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
# XLA's older code generator makes the same programs in three quarters of the time; newer versions have it no more.
if int(version("jaxlib").split(".")[1]) < 11 and "fusion_emitters" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_use_fusion_emitters=false".strip()
SHARED = os.environ.setdefault("VGEN_TESTS_SHARED", tempfile.mkdtemp(prefix="vgen-runs-"))  # by all test processes

import jax  # noqa: E402
import pytest  # noqa: E402
from filelock import FileLock  # noqa: E402

ROOT = Path(__file__).parents[1]


@pytest.fixture
def x64():
    """float64 arithmetic for the length of one test."""
    with jax.enable_x64(True):
        yield


@contextlib.contextmanager
def quick_compilation():
    """Less optimised programs, for those that run twice: they are ready sooner."""
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="session")
def tiny_runs():
    """Give it a config's path for a `stages.Run` of scale tiny, trained for two steps a stage when first asked for.

    Muse goes through the command line, is drawn and measured; of the others the stages are trained and that is all.
    Configs with the same stages (the studies of one system) share what was trained first.
    """
    from vgen.config import to_json
    from vgen.main import main
    from vgen.stages import RECORDED, Run

    made = {}

    def train(path: Path) -> Run:
        """In a folder of all test processes: the first one trains, the others wait for it."""
        config = runpy.run_path(str(path))["get_config"]("tiny")
        stages = to_json({name: config.get(name) for name in RECORDED})
        workdir = Path(SHARED) / hashlib.sha256(stages.encode()).hexdigest()[:16]
        done = workdir.with_suffix(".done")
        with FileLock(workdir.with_suffix(".lock")):
            run = Run(config, workdir) if done.exists() else trained(path, config, workdir)
            done.touch()
        return run

    def trained(path: Path, config, workdir: Path) -> Run:
        with quick_compilation():
            if path.stem == "muse":
                argv = [f"--config={path}:tiny", f"--workdir={workdir}", f"--compilation_cache={CACHE}"]
                assert main(["vgen", *argv]) == 0
                return Run(config, workdir)
            for stage in config.stages.values():
                stage.evaluate = {}
            run = Run(config, workdir)
            run.claim()
            for name in run.stages:
                run.train_stage(name)
        return run

    def get(path: Path) -> Run:
        if path not in made:
            made[path] = train(path)
        return made[path]

    return get


@pytest.fixture(scope="session")
def tiny_run(tiny_runs):
    """configs/muse.py:tiny, trained for two steps a stage, drawn and measured by the command line: a `stages.Run`."""
    return tiny_runs(ROOT / "configs" / "muse.py")
