"""vgen: visual generation in JAX and Flax, one training loop and one sampling loop.

`vgen.load(where)` brings in a published checkpoint: see `vgen.convert.load`.
"""

__version__ = "0.1.0"


def __getattr__(name: str):
    if name != "load":
        raise AttributeError(f"module 'vgen' has no attribute {name!r}")
    from vgen.convert.load import load  # only then: importing vgen stays light

    return load
