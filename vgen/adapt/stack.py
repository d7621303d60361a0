"""Several adapters at once."""

from collections.abc import Mapping

import jax

from vgen.types import Adapter


def stack(adapters: Mapping[str, Adapter]) -> Adapter:
    """One adapter of several: its delta is {name: delta}, merged in the order of `adapters`.

    A delta may hold some of the names only: the others change nothing.  Additive adapters (LoRA) may be given in any
    order.  merge raises ValueError for a name that is no adapter's.
    """

    def init(key, params):
        keys = jax.random.split(key, len(adapters))
        return {name: adapter.init(k, params) for k, (name, adapter) in zip(keys, adapters.items(), strict=True)}

    def merge(params, delta):
        if unknown := sorted(set(delta) - set(adapters)):
            raise ValueError(f"stack: got a delta of {', '.join(unknown)}, expected {', '.join(adapters)}")
        for name, adapter in adapters.items():
            params = adapter.merge(params, delta[name]) if name in delta else params
        return params

    return Adapter(init, merge)
