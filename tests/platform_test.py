"""What is set before JAX starts."""

import json
import os
import subprocess
import sys

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
        "import json, os, sys; from vgen.platform import start_over_with_huge_pages as again; again(); "
        "print(json.dumps([os.environ['GLIBC_TUNABLES'], sys.argv[1:], sys.flags.utf8_mode]))"
    )
    environ = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    argv = [sys.executable, "-X", "utf8", "-c", code, "--a b", "c"]
    out = subprocess.run(argv, env=environ, capture_output=True, text=True, check=True).stdout
    assert json.loads(out) == [HUGE_PAGES, ["--a b", "c"], 1]
