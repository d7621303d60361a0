"""What is set before JAX starts, and what its compiler is asked for."""

import json
import os
import subprocess
import sys

import jax
import pytest

from vgen import platform
from vgen.platform import HUGE_PAGES, with_huge_pages


def test_huge_pages_are_asked_for_once():
    asked = with_huge_pages({"A": "b"}, "linux")
    assert asked == {"A": "b", "GLIBC_TUNABLES": HUGE_PAGES} and HUGE_PAGES == "glibc.malloc.hugetlb=1"
    assert with_huge_pages(asked, "linux") is None
    beside = with_huge_pages({"GLIBC_TUNABLES": "glibc.malloc.arena_max=1"}, "linux")
    assert beside == {"GLIBC_TUNABLES": f"glibc.malloc.arena_max=1:{HUGE_PAGES}"}


def test_what_the_user_says_stays():
    assert with_huge_pages({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}, "linux") is None
    assert with_huge_pages({}, "darwin") is None


def test_the_command_starts_over_with_the_same_words():
    code = (
        "import json, os, sys; from vgen.platform import start_over as again; again(); "
        "print(json.dumps([os.environ['GLIBC_TUNABLES'], sys.argv[1:], sys.flags.utf8_mode]))"
    )
    environ = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    argv = [sys.executable, "-X", "utf8", "-c", code, "--a b", "c"]
    out = subprocess.run(argv, env=environ, capture_output=True, text=True, check=True).stdout
    assert json.loads(out) == [HUGE_PAGES, ["--a b", "c"], 1]


def test_what_the_compiler_is_asked_for():
    """Of steps on several devices; here nothing, whatever the number."""
    assert platform.compiler_options(8) is None and jax.default_backend() == "cpu"
    with platform.target("tpu"):
        assert platform.compiler_options(1) is None
        assert platform.compiler_options(2)["xla_tpu_enable_async_collective_fusion_fuse_all_gather"] is True


def test_the_compiler_knows_the_names():
    """Those of GPUs belong to the XLA that is here, too; libtpu knows the others (`--mode=plan`)."""
    double = jax.jit(lambda x: x * 2).lower(1.0)
    assert double.compile(compiler_options=platform.COMPILER_OPTIONS["gpu"])(3.0) == 6.0
    with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option"):
        double.compile(compiler_options={"xla_gpu_no_such_option": True})
