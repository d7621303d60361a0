"""Which platform programs are made for; and what is set about it before JAX starts, each with its reason."""

import contextlib
import contextvars
import os
import sys
from collections.abc import Iterator, Mapping

_TARGET: contextvars.ContextVar[str] = contextvars.ContextVar("target", default="")
HUGE_PAGES = "glibc.malloc.hugetlb=1"


def backend() -> str:
    """The platform whose kernels a program may have: "cpu", "gpu" or "tpu"; inside of `target`, the one said there."""
    import jax

    return _TARGET.get() or jax.default_backend()


@contextlib.contextmanager
def target(platform: str) -> Iterator[None]:
    """Programs traced inside are for another platform than the one that this process has, see `vgen.plan`."""
    token = _TARGET.set(platform)
    try:
        yield
    finally:
        _TARGET.reset(token)


def with_huge_pages(environ: Mapping[str, str], platform: str = sys.platform) -> dict[str, str] | None:
    """`environ` with glibc asked for huge pages, or None where it says something of them already or is of no use.

    On the processor XLA takes the memory of a step from malloc and gives it back, so that every step touches new pages
    and the kernel clears them one by one. In pages of 2 MB a training step of mini's Muse took 0.6 of the time on two
    cores, one of the U-Nets 0.8. malloc reads this when a process starts; musl, macOS and Windows ignore it.

    platform: as of `sys.platform`.
    """
    tunables = environ.get("GLIBC_TUNABLES", "")
    if not platform.startswith("linux") or "glibc.malloc.hugetlb" in tunables:
        return None
    return {**environ, "GLIBC_TUNABLES": f"{tunables}:{HUGE_PAGES}".lstrip(":")}


def start_over_with_huge_pages() -> None:
    """Replace this process by the same command with huge pages, if it has none; call it before anything is begun."""
    environ = with_huge_pages(os.environ)
    if environ is not None:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environ)
