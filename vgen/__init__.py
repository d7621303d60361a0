"""vgen: visual generation in JAX and Flax, one training loop and one sampling loop.

`vgen.load(where)` brings in a published checkpoint: see `vgen.convert.load`.
"""

import os

__version__ = "0.1.0"

if os.environ.get("VGEN_DEBUG"):  # ahead of all other imports, see `vgen.debug`
    from jaxtyping import install_import_hook

    CHECKED = "layers models diffusion tokens tasks guidance sample"
    install_import_hook([f"vgen.{part}" for part in CHECKED.split()], "beartype.beartype")


def __getattr__(name: str):
    if name != "load":
        raise AttributeError(f"module 'vgen' has no attribute {name!r}")
    from vgen.convert.load import load  # only then: importing vgen stays light

    return load
