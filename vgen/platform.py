"""Which platform programs are made for, and what is asked of it, each with its reason."""

import contextlib
import contextvars
import os
import re
import sys
from collections.abc import Iterator, Mapping

# What the compiler is asked for where a step has several devices, by platform; a name it does not know is an error.
# TPU: the next layer's parameters are gathered inside of this layer's products (`fsdp`), and gradients are summed
# beside the backward pass (`data`).  Products that wait for a split sequence or split heads are cut in pieces by
# default, each sent while the one before is computed (collective matmul, Wang et al. 2023).
# GPU: collectives are begun early and waited for late.
COMPILER_OPTIONS = {
    "tpu": {
        "xla_enable_async_all_gather": True,
        "xla_tpu_enable_async_collective_fusion": True,
        "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
        "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
        "xla_tpu_overlap_compute_collective_tc": True,
        "xla_tpu_enable_data_parallel_all_reduce_opt": True,
        "xla_tpu_data_parallel_opt_different_sized_ops": True,
    },
    "gpu": {"xla_gpu_enable_latency_hiding_scheduler": True},
}

_TARGET: contextvars.ContextVar[tuple[str, str]] = contextvars.ContextVar("target", default=("", ""))
HUGE_PAGES = "glibc.malloc.hugetlb=1"


def backend() -> str:
    """The platform whose kernels a program may have: "cpu", "gpu" or "tpu"; inside of `target`, the one said there."""
    import jax

    return _TARGET.get()[0] or jax.default_backend()


def device_kind() -> str:
    """The kind of the devices that a program is for, as JAX names it, such as "TPU v4"."""
    import jax

    return _TARGET.get()[1] or jax.local_devices()[0].device_kind


def compiler_options(devices: int) -> dict[str, bool] | None:
    """Options of `jax.jit` for a step on so many devices of `backend`; None for nothing to ask for."""
    return COMPILER_OPTIONS.get(backend()) if devices > 1 else None


@contextlib.contextmanager
def target(platform: str, kind: str = "") -> Iterator[None]:
    """Programs traced inside are for another platform than the one that this process has, see `vgen.plan`.

    kind: of its devices, by default of those that are here.
    """
    token = _TARGET.set((platform, kind))
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


def start_over() -> None:
    """Replace this process by the same command with what has to be set before anything is imported, if there is such:
    huge pages, and VGEN_DEBUG where the command has --config.debug=true.  Call it before anything is begun.
    """
    environ = with_huge_pages(os.environ)
    if re.fullmatch("--?config.debug(=[Tt]rue|=1)?", next((a for a in sys.argv if "config.debug" in a), "")):
        environ = {**(environ or os.environ), "VGEN_DEBUG": "1"} if "VGEN_DEBUG" not in os.environ else environ
    if environ is not None:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environ)
