"""Examples on disk as ArrayRecord: written once by `cache_source`, read at random by `ArrayRecords`.

One record is one example (a dict with str keys), without pickle:

    4 bytes   little-endian uint32, length of the header
    header    UTF-8 JSON {key: value}; arrays and byte strings are left out of it and described under "$"
    payload   their bytes, one after another

"$" is a list of [key, dtype, shape, length in bytes], in the order of the payload; dtype "bytes" is an encoded file,
"png" an array that was compressed losslessly as PNG, anything else a NumPy dtype with raw C-order data.
"""

import glob
import hashlib
import io
import json
import os
import shutil
import struct
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image

from vgen.data.images import DataError, ImageError

SUFFIX = ".arrayrecord"
FORMAT = 1  # part of every fingerprint: raise it when the record format changes
WRITER = "group_size:1,uncompressed"  # one record per read; pictures hardly compress, and reading them raw is faster


def pack(example: Mapping, encoding: str = "raw") -> bytes:
    """One example to bytes.  encoding: "raw", or "png" to compress uint8 [h, w, 3] arrays losslessly.

    Raises TypeError for a value that is neither JSON, an array of numbers nor bytes.
    """
    if encoding not in ("raw", "png"):
        raise ValueError(f"pack: encoding must be raw or png, got {encoding!r}")
    plain, parts, blobs = {}, [], []
    for key, value in example.items():
        if isinstance(value, np.ndarray) and value.ndim:
            if value.dtype.hasobject:
                raise TypeError(f"pack: {key!r} is an array of Python objects; use numbers, strings or lists")
            if encoding == "png" and value.dtype == np.uint8 and value.ndim == 3 and value.shape[2] == 3:
                dtype, blob = "png", _png(value)
            else:
                dtype, blob = value.dtype.str, np.ascontiguousarray(value).tobytes()
            parts.append([key, dtype, list(value.shape), len(blob)])
            blobs.append(blob)
        elif isinstance(value, bytes):
            parts.append([key, "bytes", None, len(value)])
            blobs.append(value)
        else:
            plain[key] = value.item() if isinstance(value, (np.generic, np.ndarray)) else value
    header = json.dumps({**plain, "$": parts}).encode()
    return b"".join((struct.pack("<I", len(header)), header, *blobs))


def unpack(record: bytes) -> dict:
    """Bytes to the example that `pack` was given (arrays are read-only views; PNG arrays stay encoded bytes).

    Raises DataError for a record of another format.
    """
    try:
        start = 4 + struct.unpack_from("<I", record)[0]
        example = json.loads(record[4:start])
        for key, dtype, shape, length in example.pop("$"):
            if dtype in ("bytes", "png"):
                example[key] = record[start : start + length]
            else:
                example[key] = np.frombuffer(record, dtype, length // np.dtype(dtype).itemsize, start).reshape(shape)
            start += length
        return example
    except (struct.error, ValueError, KeyError, TypeError) as error:
        raise DataError(
            "array record",
            f"{len(record)} bytes of another format ({error})",
            "records written by vgen.data.cache",
            "rebuild the cache; TFDS files open with tfds:NAME",
        ) from error


def _png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG", compress_level=1)
    return file.getvalue()


class ArrayRecords:
    """Random access to the examples in array-record files.

    pattern: a glob, or a folder of *.arrayrecord.  Raises DataError if nothing matches or a file is damaged.
    """

    def __init__(self, pattern: str | os.PathLike):
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        self.pattern = os.fspath(pattern)
        where = os.path.join(glob.escape(self.pattern), f"*{SUFFIX}") if os.path.isdir(self.pattern) else self.pattern
        paths = sorted(glob.glob(where))
        if not paths:
            raise DataError(
                f"arrayrecord:{self.pattern}",
                "no files",
                f"files matching {where}",
                "check the path, or write them with vgen.data.cache.cache_source",
            )
        try:
            self._records = ArrayRecordDataSource(paths)
        except (ValueError, RuntimeError, IndexError) as error:
            raise DataError(
                f"arrayrecord:{self.pattern}",
                f"a file that does not open ({error})",
                "complete ArrayRecord files",
                "delete the folder and build it again",
            ) from error

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, i: int) -> dict:
        return self.__getitems__([i])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict]:
        examples = [unpack(record) for record in self._records.__getitems__([int(i) for i in indices])]
        for i, example in zip(indices, examples):
            example.setdefault("name", f"{self.pattern}#{i}")
        return examples


# ------------------------------------------------------------------------------------------------------------ writing


def cache_source(
    source,
    path: str | os.PathLike,
    count: int | None = None,
    *,
    config=None,
    encoding: str = "raw",
    workers: int = 0,
    shard_size: int = 16384,
) -> ArrayRecords:
    """Write the first `count` examples of `source` to the folder `path` once, and open them.

    config: anything JSON can hold that says what the examples are (spec, size, split, ...).
    workers: processes that write shards in parallel (0: this one); the source must then be picklable.
    A cache with the same fingerprint (config, count, encoding, record format, and 16 sampled examples) is reused; any
    other cache is replaced.  The folder appears under its name only when complete.
    Raises DataError if `path` holds anything that is not such a cache, or an example cannot be read.
    """
    path = Path(path)
    count = len(source) if count is None else min(count, len(source))
    if count < 1:
        raise DataError(f"cache {path}", f"{count} examples", "at least one", "check the source")
    mark = _fingerprint(source, count, config, encoding)
    if _mark(path) == mark:
        return ArrayRecords(path)
    if path.exists() and not (path / "cache.json").is_file() and (path.is_file() or any(path.iterdir())):
        raise DataError(
            f"cache {path}",
            "something that is not a cache",
            "a new or empty folder, or an older cache",
            "choose another path",
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    try:
        _write_shards(source, part, count, encoding, workers, shard_size)
        (part / "cache.json").write_text(
            json.dumps({"fingerprint": mark, "count": count, "config": config}, indent=1, default=str)
        )
        _swap(part, path, mark)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return ArrayRecords(path)


def _fingerprint(source, count: int, config, encoding: str) -> str:
    digest = hashlib.sha256(json.dumps([FORMAT, count, config, encoding], sort_keys=True, default=str).encode())
    for i in sorted({round(x) for x in np.linspace(0, count - 1, 16)}):
        digest.update(_packed(source, i))  # the examples themselves: a renderer that changed shows here
    return digest.hexdigest()


def _mark(path: Path) -> str | None:
    try:
        return json.loads((path / "cache.json").read_text())["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _swap(part: Path, path: Path, mark: str) -> None:
    """Rename the finished folder into place; if another process was faster with the same cache, keep that one."""
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    if path.exists():
        if _mark(path) == mark:
            return
        path.rename(old)
    try:
        part.rename(path)
    except OSError:
        if _mark(path) != mark:
            raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _write_shards(source, folder: Path, count: int, encoding: str, workers: int, shard_size: int) -> None:
    from tqdm import tqdm

    if workers:
        shard_size = max(1, min(shard_size, -(-count // workers)))
    starts = range(0, count, shard_size)
    jobs = [
        (source, folder / f"data-{k:05d}-of-{len(starts):05d}{SUFFIX}", start, min(start + shard_size, count), encoding)
        for k, start in enumerate(starts)
    ]
    with tqdm(total=count, desc="caching examples", unit="ex", disable=None) as bar:
        if workers:
            with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
                for written in pool.map(_write_shard, *zip(*jobs)):
                    bar.update(written)
        else:
            for job in jobs:
                _write_shard(*job, progress=bar.update)


def _write_shard(source, path: Path, start: int, stop: int, encoding: str, progress=None) -> int:
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(os.fspath(path), WRITER)
    try:
        for i in range(start, stop):
            writer.write(_packed(source, i, encoding))
            if progress is not None:
                progress(1)
    finally:
        writer.close()
    return stop - start


def _packed(source, i: int, encoding: str = "raw") -> bytes:
    try:
        return pack(source[i], encoding)
    except (OSError, ImageError) as error:
        raise DataError(
            f"example {i} of the source to cache", repr(error), "a readable example", "repair or remove it"
        ) from error
