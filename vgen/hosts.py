"""What the processes of one run tell each other; one that runs alone has nobody to wait for."""

import contextlib
import itertools
import json
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax._src import distributed
from jax.experimental import multihost_utils

PATIENCE = 7 * 24 * 3600 * 1000  # milliseconds: process 0 may write for days; one that is gone ends the others anyway

_turns = itertools.count()


def everyone(value: Any = None) -> list[Any]:
    """What every process calls this with, JSON, in the order of the processes; none goes on before all have called.

    It goes through the coordination service: the devices have no part in it.
    """
    if jax.process_count() == 1:
        return [value]
    client, folder = distributed.global_state.client, f"vgen/told/{next(_turns)}"
    client.key_value_set(f"{folder}/{jax.process_index()}", json.dumps(value))
    client.wait_at_barrier(folder, PATIENCE)
    told = {int(key.rsplit("/", 1)[1]): json.loads(text) for key, text in client.key_value_dir_get(folder)}
    return [told[process] for process in range(jax.process_count())]


def whole(x: Any) -> np.ndarray:
    """All of an array in the memory of every process; all have to call this, for its parts may be with others."""
    if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
        x = multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)


@contextlib.contextmanager
def in_turn() -> Iterator[None]:
    """Process 0 goes through first, the others when it is done: what it has written they find."""
    if jax.process_index():
        everyone()
    yield
    if not jax.process_index():
        everyone()
