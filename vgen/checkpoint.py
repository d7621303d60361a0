"""Checkpoints of a training run: asynchronous, atomic, verified, and read back onto any mesh.

Layout of a stage's folder: `checkpoints/<step>/{weights,average,rest,meta}` written by orbax, and
`checkpoints/<step>.crc.json`, the sizes and checksums of its files, added once the step is complete.  In gs:// orbax
writes the same without the latter: such a bucket has checksums of its own.
"""

import contextlib
import functools
import json
import logging
import os
import shutil
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor
from concurrent.futures import wait as first_of
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath

from vgen.bucket import Bucket
from vgen.config import UserError, brief
from vgen.hosts import everyone, in_turn
from vgen.state import State

_ARGS = ocp.args


class _Manager(ocp.CheckpointManager):
    """Tells at once where this process could not write.

    Orbax's thread finds out, and before it raises it waits up to ten minutes for the other processes, which wait for
    this one's part.
    """

    def __init__(self, *args, **kwargs):
        self.failed: Future = Future()
        super().__init__(*args, **kwargs)

    def _wait_for_checkpointers(self):
        try:
            super()._wait_for_checkpointers()
        except Exception as error:
            self.failed.set_exception(error)
            raise


class Checkpoints:
    """The checkpoints of one run.

    folder: the run's folder; `checkpoints/` is made inside.  keep: how many of the newest stay.  keep_every: steps that
    are multiples of it stay for good (0 = none).  meta: JSON-able facts stored with every step, such as where frozen
    parameters come from (they are named, not saved).  warn: called with one sentence about a damaged checkpoint.
    read_only: nothing on disk is touched, so that weights can be read while the run goes on elsewhere.
    bucket: which the folder stands for a part of.  In gs:// orbax reads and writes by itself; to others, whole
      checkpoints are copied from the folder, and the newest ones to it.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        *,
        keep: int = 2,
        keep_every: int = 0,
        meta: Mapping[str, Any] | None = None,
        warn: Callable[[str], None] = logging.warning,
        read_only: bool = False,
        bucket: Bucket | None = None,
    ):
        folder = Path(folder).resolve()
        self._native = bucket is not None and bucket.native
        place = epath.Path(bucket.url) / folder.relative_to(bucket.folder) if self._native else folder
        self.folder = place / "checkpoints"
        self._bucket, self._copied, self._keep = None if self._native else bucket, set(), 2 if read_only else keep
        self.meta, self.warn, self.read_only = dict(meta or {}), warn, read_only
        self._threads, self._sealing = ThreadPoolExecutor(2, "seal"), None
        if self._bucket:
            with in_turn():
                self._fetch()
        if read_only:
            options = ocp.CheckpointManagerOptions(read_only=True, create=False, save_interval_steps=0)
        else:
            options = ocp.CheckpointManagerOptions(
                max_to_keep=keep, keep_period=keep_every or None, cleanup_tmp_directories=True, create=True
            )
        with quiet():  # orbax warns that read_only is read_only
            self.manager = _Manager(self.folder, options=options)

    def steps(self) -> list[int]:
        """The complete steps on disk, oldest first."""
        return sorted(self.manager.all_steps())

    def mark(self, step: int) -> Path | epath.Path:
        """A small file of a step that no other one has like it; it need not be there."""
        return self.folder / str(step) / "weights" / "manifest.ocdbt" if self._native else self._seal(step)

    def save(self, step: int, state: State, batches=None) -> None:
        """Start saving `state` as `step`; returns before it is on disk.  A thread seals it once it is."""
        if step in self.steps():
            return
        self.wait()
        position = batches.get_state() if hasattr(batches, "get_state") else None
        if jax.default_backend() == "cpu":
            state = jax.tree.map(jnp.copy, state)  # host memory is shared with the donated buffers of the next step
        items = _split(state)
        shapes = {path: (list(leaf.shape), leaf.dtype.name) for path, leaf in items["weights"].items()}
        self.manager.save(
            step,
            args=_ARGS.Composite(
                **{name: _ARGS.StandardSave(item) for name, item in items.items()},
                meta=_ARGS.JsonSave({**self.meta, "data": position, "average": bool(state.ema), "shapes": shapes}),
            ),
        )
        self._sealing = self._threads.submit(self._finish)

    @property
    def busy(self) -> bool:
        """Whether a save is being written."""
        return self._sealing is not None and not self._sealing.done()

    def wait(self) -> None:
        """Block until everything is on disk, and sealed with checksums; UserError where it could not be written."""
        self._sealing.result() if self._sealing else self._finish()

    def _finish(self) -> None:
        written = self._threads.submit(self.manager.wait_until_finished)
        ended = first_of((written, self.manager.failed), return_when=FIRST_COMPLETED).done
        for error in filter(None, (each.exception() for each in ended)):
            told = f"cannot write a checkpoint to {self.folder}: {brief(error, 600)}"
            raise UserError(f"{told}; once that is mended, the same command goes on from the last whole one") from error
        if jax.process_index() == 0 and not self.read_only:
            for step in () if self._native else self.steps():
                if not self._seal(step).exists():
                    _write_json(self._seal(step), _checksums(self.folder / str(step)))
            for seal in self.folder.glob("*.crc.json"):
                if not (self.folder / seal.name.split(".")[0]).exists():
                    seal.unlink(missing_ok=True)
            if self._bucket:
                self._copy()

    def _fetch(self) -> None:
        """Bring the newest that are whole in the bucket; of a run that writes, what the bucket has not goes."""
        bucket, sealed = self._bucket, ".crc.json"
        whole = sorted(int(name.removesuffix(sealed)) for name in bucket.names(self.folder) if name.endswith(sealed))
        if not self.read_only and self.folder.is_dir():
            for path in self.folder.iterdir():
                if path.name.split(".")[0] not in map(str, whole):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        self._copied = {step for step in whole if step in whole[-self._keep :] or self._seal(step).exists()}
        for step in sorted(self._copied):
            if not self._seal(step).exists():
                bucket.fetch(self.folder / str(step))
                bucket.fetch(self._seal(step))

    def _copy(self) -> None:
        """Bring to the bucket what it has not, and remove there what was removed here."""
        try:
            steps = set(self.steps())
            for step in sorted(steps - self._copied):
                self._bucket.send(self.folder / str(step))
                self._bucket.send(self._seal(step))  # last: without it nobody reads the rest
                self._copied.add(step)
            for step in sorted(self._copied - steps):
                self._bucket.remove(self._seal(step))
                self._bucket.remove(self.folder / str(step))
                self._copied.discard(step)
        except UserError as error:
            self.warn(f"{error}; the next save tries again")

    def restore(self, shapes: State, shardings: State) -> tuple[State, Any] | None:
        """The newest whole checkpoint as (state, data position), placed by `shardings`; None if there is none.

        A damaged one is named, set aside as `<step>.damaged`, and the one before is tried.  UserError when there were
        checkpoints and none can be read, or when a whole one does not fit the state.
        """
        abstract = jax.tree.map(_placed, shapes, shardings)
        items = _split(abstract)
        args = {name: _ARGS.StandardRestore(item) for name, item in items.items()}
        found = self._newest(_ARGS.Composite(**args, meta=_ARGS.JsonRestore()))
        if found is None:
            return None
        parts = {name: found[name] for name in items}
        return _join(parts, shapes), found["meta"]["data"]

    def weights(self, place: Callable[[str, Any], Any] | None = None) -> tuple[dict[str, jax.Array], int] | None:
        """({path: array}, step): the averaged parameters of the newest whole checkpoint, else the trained ones.

        place: (path, shape struct) -> sharding; default: the first device.
        """
        place = place or (lambda path, leaf: jax.sharding.SingleDeviceSharding(jax.local_devices()[0]))

        def args(step):
            meta = json.loads((self.folder / str(step) / "meta" / "metadata").read_text())
            item = "average" if meta["average"] else "weights"
            structs = {path: jax.ShapeDtypeStruct(shape, dtype) for path, (shape, dtype) in meta["shapes"].items()}
            structs = {path: _placed(leaf, place(path, leaf)) for path, leaf in structs.items()}
            return _ARGS.Composite(**{item: _ARGS.StandardRestore(structs)})

        found = self._newest(args)
        if found is None:
            return None
        return dict(found.get("average") or found.get("weights")), self._read_step

    def close(self) -> None:
        """Wait; UserError where the bucket has not got all checkpoints."""
        self.wait()
        self._threads.shutdown()
        missing = set(self.steps()) - self._copied if self._bucket and jax.process_index() == 0 else ()
        self.manager.close()
        if missing and not self.read_only:
            raise UserError(f"{self._bucket.url} has not got checkpoints {sorted(missing)}; they are in {self.folder}")

    def _newest(self, args):
        steps = self.steps()
        for step in reversed(steps):
            # Process 0 looks at the files; and what one process cannot read, none takes.
            whole, reason = everyone(self._verify(step) if jax.process_index() == 0 else None)[0]
            found = cause = None
            if not reason:
                try:
                    found = self.manager.restore(step, args=args(step) if callable(args) else args)
                except Exception as error:  # noqa: BLE001  orbax and tensorstore raise many kinds for a damaged file
                    cause, reason = error, brief(error)
                reason = next(filter(None, everyone(reason)), "")
            if not reason:
                self._read_step = step
                return found
            if whole:
                raise UserError(
                    f"checkpoint {self.folder / str(step)} is whole but does not fit the program ({reason}): "
                    "go back to the code and library versions that wrote it, or use another --workdir"
                ) from cause
            self.warn(f"checkpoint {self.folder / str(step)} is damaged ({reason}); trying the one before")
            self._set_aside(step)
        if steps:
            raise UserError(
                f"no checkpoint in {self.folder} can be read (tried steps {steps}; see the warnings above); "
                "put a good copy back, or train again from the start with the same command"
            )
        return None

    def _seal(self, step: int) -> Path:
        return self.folder / f"{step}.crc.json"

    def _verify(self, step: int) -> tuple[bool, str]:
        """(whether the step is known to be whole, what is known to be wrong with it)."""
        if self._native:
            return True, ""  # orbax's last file is there, and the bucket checks what it reads
        if not self._seal(step).exists():
            return False, ""  # complete (orbax renames last) but the process ended before it was sealed
        try:
            wanted, got = json.loads(self._seal(step).read_text()), _checksums(self.folder / str(step))
        except (OSError, ValueError) as error:
            return False, brief(error)
        wrong = sorted(name for name in set(wanted) | set(got) if wanted.get(name) != got.get(name))
        return not wrong, f"{len(wrong)} files changed since they were written, e.g. {wrong[0]}" if wrong else ""

    def _set_aside(self, step: int) -> None:
        if self.read_only:
            return
        if jax.process_index() == 0:
            target = self.folder.parent / f"{step}.damaged"
            shutil.rmtree(target, ignore_errors=True)
            (self.folder / str(step)).rename(target)
            self._seal(step).unlink(missing_ok=True)
            if self._bucket:
                self._bucket.remove(self._seal(step))
                self._copied.discard(step)
        everyone()
        self.manager.reload()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Orbax says errors alone."""
    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


@functools.cache
def spare_tracebacks() -> None:
    """For command lines: what fails in orbax's and tensorstore's threads is raised by `Checkpoints`, and told once."""
    logging.getLogger("absl").addFilter(lambda record: not record.exc_info)
    shown = sys.unraisablehook

    def hook(each):
        if not (each.exc_type is RuntimeError and str(each.exc_value) == "Event loop is closed"):  # of other arrays
            shown(each)

    sys.unraisablehook = hook


def _split(state: State) -> dict[str, Any]:
    """A state as the items of a checkpoint: inference reads `average` or `weights` and never touches `rest`."""
    rest = {name: getattr(state, name) for name in ("opt", "step", "key", "skipped", "bad_in_row")}
    items = {"weights": {**state.params, **state.buffers}, "rest": rest}
    return items | ({"average": dict(state.ema)} if state.ema else {})


def _join(items: Mapping[str, Any], like: State) -> State:
    pick = lambda paths: {path: items["weights"][path] for path in paths}
    average = items.get("average", {})
    return State(params=pick(like.params), buffers=pick(like.buffers), ema=average, **items["rest"])


def _placed(leaf, place) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)


def _checksums(folder: Path) -> dict[str, list[int]]:
    sums = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            crc = 0
            with path.open("rb") as file:
                while block := file.read(1 << 24):
                    crc = zlib.crc32(block, crc)
            sums[str(path.relative_to(folder))] = [path.stat().st_size, crc]
    return sums


def _write_json(path: Path, value) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value))
    temporary.replace(path)


if __name__ == "__main__":
    from vgen.checkpoint_show import main

    sys.exit(main())
