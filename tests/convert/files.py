"""Weight files for the tests of their readers, whole and damaged."""

import ml_dtypes
import numpy as np
import pytest

from vgen.config import UserError
from vgen.convert import formats, sources

RNG = np.random.default_rng(0)
ARRAYS = {
    "a.weight": RNG.normal(size=(3, 4)).astype(np.float32),
    "a.half": RNG.normal(size=(5,)).astype(ml_dtypes.bfloat16),
    "b.count": np.array(7, np.int64),
    "b.empty": np.zeros((0, 3), np.float16),
    "b.mask": np.array([True, False]),
}


def same(got, want=ARRAYS):
    assert set(got) == set(want)
    for name, array in want.items():
        assert got[name].shape == array.shape and got[name].dtype == array.dtype, name
        assert got[name].tobytes() == array.tobytes(), name


def refused(path, *words):
    """What the sentence about a refused source says."""
    with pytest.raises(UserError) as caught:
        sources.read_weights(path)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 600 and all(word in text for word in words), text
    return text


def safetensors(path, arrays=ARRAYS):
    formats.write_safetensors(path, arrays)
    return path


def mutated(data, rng):
    """The bytes with a few changed, cut out, doubled, or swapped for digits and brackets."""
    data = bytearray(data)
    for _ in range(rng.integers(1, 4)):
        i = int(rng.integers(len(data)))
        kind = rng.integers(5)
        if kind == 0:
            data[i] = rng.integers(256)
        elif kind == 1:
            data[i] = ord(rng.choice(list('0123456789,:[]{}"-eE.')))
        elif kind == 2:
            del data[i : i + int(rng.integers(1, 9))]
        elif kind == 3:
            data[i:i] = data[max(0, i - int(rng.integers(1, 40))) : i]
        else:
            data[i] ^= 1 << int(rng.integers(8))
    return bytes(data)


class Evil:
    """Its pickle makes a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")
