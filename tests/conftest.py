"""Shared set-up: compiled programs are kept for the session, x64 is opt-in per test, and one small trained run."""

import contextlib
import os
import runpy
import tempfile
from pathlib import Path

# Before JAX is imported, and for the processes that tests start: programs that were compiled once are read back.
CACHE = os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", tempfile.mkdtemp(prefix="vgen-xla-"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")

import jax  # noqa: E402
import pytest  # noqa: E402

ROOT = Path(__file__).parents[1]


@pytest.fixture
def x64():
    """float64 arithmetic for the length of one test."""
    with jax.enable_x64(True):
        yield


def pytest_collection_modifyitems(items):
    """With several processes (-n), each file stays in one, and so do all that look at the small trained run."""
    for item in items:
        shared = "tiny_run" in getattr(item, "fixturenames", ())
        item.add_marker(pytest.mark.xdist_group("tiny_run" if shared else item.nodeid.partition("::")[0]))


@contextlib.contextmanager
def quick_compilation():
    """Less optimised programs, for those that run twice: they are ready sooner."""
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """configs/muse.py:tiny, trained for two steps a stage, drawn and measured by the command line: a `stages.Run`."""
    from vgen.main import main
    from vgen.stages import Run

    workdir, config = tmp_path_factory.mktemp("tiny") / "run", ROOT / "configs" / "muse.py"
    with quick_compilation():
        argv = [f"--config={config}:tiny", f"--workdir={workdir}", f"--compilation_cache={CACHE}"]
        assert main(["vgen", *argv]) == 0
    return Run(runpy.run_path(str(config))["get_config"]("tiny"), workdir)
