"""Weight files that hold arrays and nothing else: safetensors, .npz, Flax msgpack.

Each reader checks the whole header against the file's size before it hands out a single array, and reads an array only
when asked to, from its place in the file: opening a checkpoint takes the memory of its list of names.
"""

import functools
import json
import struct
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from vgen.config import UserError, brief

MAX_HEADER = 100_000_000  # bytes, as the safetensors library
DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "C64": np.complex64,
    "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "BOOL": np.bool_,
    "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8,
}  # fmt: skip
CODES = {np.dtype(dtype): code for code, dtype in DTYPES.items()}


class Stored(NamedTuple):
    """One array of a checkpoint: its shape and dtype, and `read()`, which fetches it."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=object)) * self.dtype.itemsize


def held(array: np.ndarray) -> Stored:
    """An array that is in memory already."""
    return Stored(array.shape, array.dtype, lambda: array)


# ------------------------------------------------------------------------------------------------------------- JSON


def parse_json(text: bytes | str, where: str | Path) -> dict[str, Any]:
    """A JSON object without repeated keys; UserError naming `where` for anything else."""

    def unique(pairs):
        if len(found := dict(pairs)) != len(pairs):
            keys = [key for key, _ in pairs]
            raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} stands there twice")
        return found

    try:
        value = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not the JSON it should be: {brief(error)}") from None
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected a JSON object, got {type(value).__name__}")
    return value


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; UserError if it cannot be read or is none."""
    try:
        if path.stat().st_size > MAX_HEADER:
            raise UserError(f"{path}: {path.stat().st_size} bytes are too many for a JSON file of a checkpoint")
        return parse_json(path.read_bytes(), path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None


# ------------------------------------------------------------------------------------------------------ safetensors


def open_safetensors(path: Path) -> dict[str, Stored]:
    """The arrays of a .safetensors file, in the order of the file.

    Raises UserError where the header is damaged or disagrees with the file: arrays that overlap, leave holes, reach
    beyond its end, or whose sizes are not their shape times their dtype.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
        if length < 2 or length > min(size - 8, MAX_HEADER):
            raise UserError(f"{path}: not a safetensors file, or cut off: {size} bytes, header of {length}")
        header = file.read(length)
    if not header.startswith(b"{"):
        raise UserError(f"{path}: damaged safetensors header: it does not begin with '{{'")
    entries = parse_json(header, f"{path}: damaged safetensors header")
    metadata = entries.pop("__metadata__", None)
    if metadata is not None and not (
        isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    ):
        raise UserError(f"{path}: damaged safetensors header: __metadata__ must map names to strings")
    places = {name: _place(entry, f"{path}: array {name!r}") for name, entry in entries.items()}
    end = 0
    for name, (_, _, begin, stop) in sorted(places.items(), key=lambda item: item[1][2:]):
        if begin != end:
            raise UserError(f"{path}: array {name!r} begins at byte {begin}, the one before it ends at {end}")
        end = stop
    if end != size - 8 - length:
        raise UserError(f"{path}: the header speaks of {end} bytes of arrays, the file has {size - 8 - length}")
    return {
        name: Stored(shape, dtype, functools.partial(_read, path, 8 + length + begin, stop - begin, dtype, shape))
        for name, (dtype, shape, begin, stop) in places.items()
    }


def metadata(path: Path) -> dict[str, str]:
    """What a .safetensors file says beside its arrays, {} where it says nothing; UserError where it is damaged."""
    open_safetensors(path)
    with path.open("rb") as file:
        header = file.read(struct.unpack("<Q", file.read(8))[0])
    return parse_json(header, path).get("__metadata__") or {}


def _place(entry: Any, where: str) -> tuple[np.dtype, tuple[int, ...], int, int]:
    """(dtype, shape, begin, end) of one entry of the header."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise UserError(f"{where}: its entry must hold dtype, shape and data_offsets, got {str(entry)[:100]}")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in DTYPES:
        raise UserError(f"{where}: unknown dtype {str(code)[:40]!r}; known are {', '.join(DTYPES)}")
    if not naturals(shape) or len(shape) > 32:
        raise UserError(f"{where}: its shape must be at most 32 natural numbers, got {str(shape)[:100]}")
    if not naturals(offsets) or len(offsets) != 2:
        raise UserError(f"{where}: its data_offsets must be two natural numbers, got {str(offsets)[:100]}")
    dtype, (begin, end) = np.dtype(DTYPES[code]), offsets
    if end - begin != (want := int(np.prod(shape, dtype=object)) * dtype.itemsize):
        raise UserError(f"{where}: {code} {shape} takes {want} bytes, its data_offsets {offsets} say {end - begin}")
    return dtype, tuple(shape), begin, end


def naturals(value: Any) -> bool:
    """Whether a JSON value is a list of natural numbers."""
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)


def _read(path: Path, offset: int, nbytes: int, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    data = np.fromfile(path, np.uint8, nbytes, offset=offset)  # not mapped: pages of the file would count as ours
    if data.size != nbytes:
        raise UserError(f"{path}: ends in the middle of an array")
    return data.view(dtype).reshape(shape)


def write_safetensors(path: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> None:
    """Write arrays one after the other, widest dtype first, so that all are aligned; nothing is held twice.

    metadata: {"format": "pt"} by default, without which transformers refuses the file.
    Raises UserError for a dtype that the format lacks.
    """
    order = sorted(arrays, key=lambda name: (-arrays[name].dtype.itemsize, name))
    header, end = {"__metadata__": dict(metadata or {"format": "pt"})}, 0
    for name in order:
        array = arrays[name]
        if array.dtype not in CODES:
            raise UserError(f"{path}: safetensors has no dtype {array.dtype} (of {name}); cast it first")
        begin, end = end, end + array.nbytes
        header[name] = dict(dtype=CODES[array.dtype], shape=list(array.shape), data_offsets=[begin, end])
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            file.write(np.ascontiguousarray(arrays[name]).reshape(-1).view(np.uint8))


# ------------------------------------------------------------------------------------------------------------- .npz


def open_npz(path: Path) -> dict[str, Stored]:
    """The arrays of a .npz file; pickled ones are refused.  Raises UserError for a damaged file."""
    found: dict[str, Stored] = {}
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            name = info.filename.removesuffix(".npy")
            if name in found:
                raise UserError(f"{path}: array {name!r} stands there twice")
            with archive.open(info) as file:
                version = np.lib.format.read_magic(file)
                if version not in ((1, 0), (2, 0)):
                    raise UserError(f"{path}: array {name!r} has .npy version {version}; known are 1.0 and 2.0")
                head = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, _, dtype = head(file)
                begin = file.tell()
            if dtype.hasobject:
                raise UserError(f"{path}: array {name!r} holds pickled objects, which are not read")
            if any(n < 0 for n in shape) or begin + np.prod(shape, dtype=object) * dtype.itemsize != info.file_size:
                raise UserError(f"{path}: array {name!r} says {dtype} {shape} but has {info.file_size - begin} bytes")
            # QUIRK: big_vision's and AugReg's files keep bfloat16 as two bytes without a type ("|V2")
            dtype = np.dtype(ml_dtypes.bfloat16) if dtype == np.dtype("V2") else dtype
            if dtype.newbyteorder("=") not in CODES:
                raise UserError(f"{path}: array {name!r} has dtype {dtype}, expected numbers")
            dtype = dtype.newbyteorder("=")
            found[name] = Stored(tuple(shape), dtype, functools.partial(_read_npz, path, info.filename, dtype))
    return found


def _read_npz(path: Path, name: str, dtype: np.dtype) -> np.ndarray:
    with zipfile.ZipFile(path) as archive, archive.open(name) as file:
        array = np.lib.format.read_array(file, allow_pickle=False)
    return array.view(dtype) if array.dtype.kind == "V" else array.astype(dtype, copy=False)


# --------------------------------------------------------------------------------------------------------- msgpack


def open_msgpack(path: Path) -> dict[str, Stored]:
    """The arrays of a tree that flax.serialization wrote (`to_bytes`), named by their paths: "params/encoder/kernel".

    msgpack knows no references and no code, so reading it builds numbers and arrays alone.
    Raises UserError where the file holds something else.
    """
    from flax.serialization import msgpack_restore

    tree = msgpack_restore(path.read_bytes())
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected a tree of named arrays, got {type(tree).__name__}")
    return {name: held(array) for name, array in _leaves(tree, "", path)}


def _leaves(node: Any, name: str, path: Path) -> Iterable[tuple[str, np.ndarray]]:
    if isinstance(node, dict):
        for key, value in node.items():
            key = key.decode() if isinstance(key, bytes) else str(key)
            yield from _leaves(value, f"{name}/{key}" if name else key, path)
    elif isinstance(node, (np.ndarray, np.generic, int, float)):
        array = np.asarray(node)
        if array.dtype not in CODES:
            raise UserError(f"{path}: array {name!r} has dtype {array.dtype}, expected numbers")
        yield name, array
    elif node is not None:
        raise UserError(f"{path}: {name!r} is a {type(node).__name__}, expected arrays")
