"""Workdirs in buckets: gs://, s3:// and whatever else fsspec opens.

What a run writes in small pieces (its config, logs, pictures, reports) lies in a folder of this machine and is copied
from there; the bucket is what counts, and a run begins with what it holds.  Checkpoints in gs:// are written by orbax,
by each process its own part; those elsewhere, which orbax does not know, by one machine that copies them when they are
whole (`vgen.checkpoint`).  Caches and data that a stage makes stay on the machine.  Weights and tokenizers that a run
begins with are copied from buckets by each machine (`local`).
"""

import contextlib
import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from vgen.config import UserError, brief

READ = ("config.json", "tokenizer.json", "*/eval.json", "*/made.json")  # what a run begins with
LOGS = ("*/metrics.jsonl",)  # and what it goes on with
STAYS = ("cache", "made", "checkpoints")  # folders that are not copied with the rest
EXTRAS = {"gs": "gcs", "gcs": "gcs", "s3": "s3"}
SMALL = 2**26  # bytes
EVERY = 30  # seconds between copies of what grows


def is_url(path: str | os.PathLike) -> bool:
    return "://" in os.fspath(path)


def _scratch() -> Path:
    return Path(os.environ.get("VGEN_SCRATCH") or "~/.cache/vgen/buckets").expanduser()


def local(where: str | os.PathLike, pick: Callable[[list[str]], Iterable[str]] = list) -> Path:
    """A file or folder of this machine; of a bucket, its copy, made anew of files that have changed there.

    pick: of the names below a folder of a bucket those to copy.  With a file come the JSON files beside it.
    Raises UserError where there is nothing, or the bucket cannot be read.
    """
    if not is_url(where):
        return Path(where).expanduser()
    url, scratch = os.fspath(where).rstrip("/"), _scratch() / "read"
    bucket, name = Bucket(url, scratch), ""
    with bucket._told("read"):
        if bucket.files.isfile(bucket.root):
            url, _, name = url.rpartition("/")
            bucket = Bucket(url, scratch)
            names = [name, *(each for each in bucket.names(bucket.folder) if each.endswith(".json"))]
        else:
            names = list(pick([each.removeprefix(bucket.root).strip("/") for each in bucket.files.find(bucket.root)]))
        if not names:
            raise UserError(f"there is no file at {where}")
        seen = bucket.folder.with_name(f"{bucket.folder.name}.json")  # what it was when it was copied
        had = json.loads(seen.read_text()) if seen.is_file() else {}
        has = {each: str(bucket.files.ukey(f"{bucket.root}/{each}")) for each in dict.fromkeys(names)}
        for each, key in has.items():
            if had.get(each) != key or not (bucket.folder / each).is_file():
                bucket.fetch(bucket.folder / each)
        part = seen.with_name(f"{seen.name}.{os.getpid()}.tmp")
        part.write_text(json.dumps(had | has))
        part.replace(seen)
    return bucket.folder / name


class Bucket:
    """A folder in a bucket, and the folder of this machine that stands for it.

    url: such as gs://bucket/run.  scratch: where that folder is made (default: VGEN_SCRATCH, or ~/.cache/vgen/buckets).
    warn: called with one sentence where a copy fails while the run goes on.
    Raises UserError where fsspec has no such file system, or the package for it is missing.
    """

    def __init__(self, url: str, scratch: str | os.PathLike | None = None, warn: Callable[[str], None] = print):
        import fsspec.config

        self.url, self.scheme, self.warn = url.rstrip("/"), url.partition("://")[0], warn
        if not url.partition("://")[2].strip("/"):
            raise UserError(f"{url} names no bucket: it looks like {self.scheme}://BUCKET/FOLDER")
        # For orbax, too, which opens it by itself: what other processes write has to be seen.
        fsspec.config.conf.setdefault(self.scheme, {})["use_listings_cache"] = False
        try:
            self.files, self.root = fsspec.url_to_fs(self.url)
        except ImportError as error:
            extra = EXTRAS.get(self.scheme)
            told = f"pip install 'vgen[{extra}]'" if extra else str(error)
            raise UserError(f"{url} needs a package that is not installed: {told}") from None
        except Exception as error:  # noqa: BLE001  what a file system does without credentials is its own
            raise UserError(f"cannot open {url}: {brief(error)}") from None
        scratch = Path(scratch) if scratch else _scratch()
        name = "".join(c if c.isalnum() else "-" for c in self.url.partition("://")[2])
        self.folder = scratch.resolve() / f"{name}-{hashlib.sha256(self.url.encode()).hexdigest()[:8]}"
        self._sent: dict[Path, tuple[int, int]] = {}
        self._thread, self._last, self._lock = ThreadPoolExecutor(1, "bucket"), 0.0, threading.Lock()
        self._copying: Future | None = None

    @property
    def native(self) -> bool:
        """Whether orbax writes there by itself."""
        return self.scheme == "gs"

    def shown(self, path: Path) -> str:
        """Where in the bucket a file of the folder is."""
        if not path.is_relative_to(self.folder):
            return str(path)
        return "/".join((self.url, *path.relative_to(self.folder).parts))

    def begin(self) -> None:
        """Make the folder what the bucket is, before a run goes on there; UserError where the bucket cannot be read.

        What the bucket does not have goes: all but the cache where it has no run, since that run was deleted.
        """
        with self._told("read"):
            whole = self.files.exists(f"{self.root}/config.json")
            for path in [*self.folder.glob("*")] if not whole else self._has(READ + LOGS):
                if path.name != "cache":
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        self.pull(READ + LOGS)

    def pull(self, patterns: tuple[str, ...] = READ) -> None:
        """Copy what the bucket has of these to the folder; UserError where the bucket cannot be read."""
        with self._told("read"):
            self.folder.mkdir(parents=True, exist_ok=True)
            for pattern in patterns:
                for name in self.files.glob(f"{self.root}/{pattern}"):
                    self.fetch(self.folder / name.removeprefix(self.root).strip("/"))

    def _has(self, patterns: tuple[str, ...]) -> list[Path]:
        return [path for pattern in patterns for path in self.folder.glob(pattern)]

    def push(self) -> None:
        """Copy what is new in the folder; UserError where the bucket cannot be written."""
        with self._told("write to"), self._lock:
            for path in self._new():
                self.send(path)

    def push_soon(self) -> None:
        """`push` in a thread, if the last one is EVERY seconds ago; where it fails, the next one tries again."""
        if time.monotonic() - self._last < EVERY or (self._copying and not self._copying.done()):
            return
        self._last, self._copying = time.monotonic(), self._thread.submit(self._try)

    def _try(self) -> None:
        try:
            self.push()
        except UserError as error:
            self.warn(str(error))

    def _new(self) -> Iterator[Path]:
        for path in sorted(self.folder.rglob("*")):
            inside = path.relative_to(self.folder).parts
            if path.is_file() and not path.name.endswith(".tmp") and not set(STAYS) & set(inside[:2]):
                stat = path.stat()
                mark = (stat.st_size, stat.st_mtime_ns)
                if self._sent.get(path) != mark:
                    yield path
                    self._sent[path] = mark  # as it was before the copy: what was added meanwhile goes with the next

    def send(self, path: Path) -> None:
        """Copy a file of the folder to the bucket, or all that is below one."""
        with self._told("write to"):
            for file in sorted(each for each in path.rglob("*") if each.is_file()) if path.is_dir() else [path]:
                if file.stat().st_size < SMALL:  # in one piece: a log may grow meanwhile
                    self.files.pipe_file(self._there(file), file.read_bytes())
                else:
                    self.files.put_file(str(file), self._there(file))

    def fetch(self, path: Path) -> None:
        """Copy a file of the bucket to the folder, or all that is below one."""
        with self._told("read"):
            for name in self.files.find(self._there(path)):
                path = self.folder / name.removeprefix(self.root).strip("/")
                if ".." in path.parts:
                    raise UserError(f"{self.url} has a file {name!r}, which would lie outside of the copy")
                path.parent.mkdir(parents=True, exist_ok=True)
                part = path.with_name(f"{path.name}.{os.getpid()}.tmp")
                self.files.get_file(name, str(part))
                part.replace(path)

    def names(self, folder: Path) -> list[str]:
        """What the bucket has in a folder."""
        with self._told("read"):
            there = self._there(folder)
            found = self.files.ls(there, detail=False) if self.files.exists(there) else []
            return sorted(name.rstrip("/").rpartition("/")[2] for name in found)

    def remove(self, path: Path) -> None:
        """Remove from the bucket a file, or all that is below one."""
        with self._told("write to"):
            if self.files.exists(self._there(path)):
                self.files.rm(self._there(path), recursive=True)

    def _there(self, path: Path) -> str:
        return f"{self.root}/{path.relative_to(self.folder)}"

    @contextlib.contextmanager
    def _told(self, what: str) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # noqa: BLE001  each file system has errors of its own
            kept = "" if what == "read" else f"; what was not copied is in {self.folder}"
            raise UserError(f"cannot {what} {self.url}: {brief(error)}{kept}") from None
