"""Batches on their way to the devices: prepared ahead of time, with a position that counts only what was handed out."""

import queue
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np


def prefetch_to_device(iterator, sharding, size: int = 2) -> "DeviceBatches":
    """Put batches on the devices of `sharding` ahead of time, from a background thread.

    iterator: of dicts of arrays, with get_state and set_state (vgen.data.pipeline.Batches).
    sharding: a jax.sharding.Sharding of the leading axis, applied to every array; each host gives its slice.
    size: batches on the device beside the one in use.  Strings stay NumPy arrays.
    """
    return DeviceBatches(iterator, sharding, size)


class DeviceBatches(Iterator):
    """What `prefetch_to_device` returns.  wait_seconds: time the consumer has spent waiting for data.

    The state is that of the batches handed out, not of those prepared; an error in the iterator is raised here.
    """

    def __init__(self, iterator, sharding, size: int = 2):
        if size < 1:
            raise ValueError(f"prefetch_to_device: size must be at least 1, got {size}")
        self._iterator, self._sharding, self._size = iterator, sharding, size
        self._thread, self._stop, self._ended, self.wait_seconds = None, None, None, 0.0
        self._state = iterator.get_state()

    def __len__(self) -> int:
        return len(self._iterator)

    def __next__(self) -> dict[str, jax.Array]:
        if self._ended is not None:
            raise self._ended
        if self._thread is None:
            self._ready, self._stop = queue.Queue(self._size), threading.Event()
            self._thread = threading.Thread(target=self._work, args=(self._ready, self._stop), daemon=True)
            self._thread.start()
        start = time.perf_counter()
        batch, state = self._ready.get()
        self.wait_seconds += time.perf_counter() - start
        if isinstance(batch, BaseException):
            self._ended = batch
            raise batch
        self._state = state
        return batch

    def _work(self, ready: queue.Queue, stop: threading.Event) -> None:
        while not stop.is_set():
            try:
                batch = next(self._iterator)
                item = {key: self._put(value) for key, value in batch.items()}, self._iterator.get_state()
            except BaseException as error:  # StopIteration and everything else belong to the consumer
                item = error, None
            while not stop.is_set():
                try:
                    ready.put(item, timeout=0.1)
                    break
                except queue.Full:
                    pass
            if item[1] is None:
                return

    def _put(self, value: np.ndarray):
        if value.dtype.kind in "US":
            return value
        return jax.make_array_from_process_local_data(self._sharding, value)

    def get_state(self) -> dict[str, Any]:
        """The position behind the last batch handed out."""
        return self._state

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continue from a position; what was prepared is dropped."""
        self._halt()
        self._iterator.set_state(state)
        self._state, self._ended = self._iterator.get_state(), None

    def _halt(self) -> None:
        if self._thread is not None:
            self._stop.set()
            self._thread.join()
            self._thread = None

    def close(self) -> None:
        """Stop the thread and the iterator under it; iterating again goes on behind the last batch handed out."""
        self._halt()
        self._iterator.set_state(self._state)

    def __enter__(self) -> "DeviceBatches":
        return self

    def __exit__(self, *_) -> None:
        self.close()
