"""The feature cache of a stage: its frozen encoders run over its data once, before it is trained on what they say.

A stage's `cache` holds arguments of CacheConfig.  Training and its measurements then read features; the encoders are
not in memory.  Everything else, such as sampling, goes on with pictures, texts and whole weights.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vgen import sharding, trees
from vgen.config import ConfigError, UserError, call, to_dict, to_json
from vgen.data.features import DTYPES, Features
from vgen.data.images import RANDOM_WAYS
from vgen.data.open import rows_of
from vgen.hosts import everyone, in_turn
from vgen.train import Stopped, place_frozen

# Of a stage's data: what features depend on.
DATA = ("source", "size", "split", "cached", "options", "buckets", "crop", "captions")
PIECE = 2**16  # bytes of a weight file that are looked at, at its beginning, middle and end


@dataclasses.dataclass(frozen=True)
class CacheConfig:
    """What is computed once.

    features: "latents", "text" or both (see `vgen.tasks.cached`).  path: the folder (default: below the workdir's
      cache); it may be another workdir's, as long as weights and data are the same.
    dtype: of the numbers on disk: float16, bfloat16 or float32.  count: examples of the source, 0 = all.
    shard_size: examples per file, which is what a killed process loses.  batch_size: 0 = that of training.
    """

    features: tuple[str, ...]
    path: str = ""
    dtype: str = "float16"
    count: int = 0
    shard_size: int = 4096
    batch_size: int = 0

    def __post_init__(self):
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.shard_size < 1 or self.count < 0 or self.batch_size < 0:
            raise ValueError("shard_size must be at least 1, count and batch_size 0 or more")


def check(run, name: str) -> CacheConfig | None:
    """The cache settings of a stage of a `vgen.stages.Run`, None where it has no cache.

    Raises ConfigError where features cannot stand for its data.
    """
    stage, where = run.stage(name), f"config.stages.{name}.cache"
    if not stage.cache:
        return None
    config, task = call(CacheConfig, stage.cache, where), run.task(name)
    if run.bucket and run.machines > 1 and not config.path:
        raise ConfigError(f"{where}.path: the workdir is in a bucket, so name a folder that all machines see")
    if not hasattr(task, "features"):
        raise ConfigError(f"{where}: {type(task).__name__} trains on pictures alone, it has no features to compute")
    try:
        task.feature_parts(config.features)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from None
    if "text" in config.features and not run.config.text:
        raise ConfigError(f"{where}: features 'text' need texts, config.text is empty")
    for held_out in (False, True):
        data = run.data_arguments(name, held_out)
        for key in ("flip", "crop", "augment") if "latents" in config.features else ():
            if data.get(key) in RANDOM_WAYS if key == "crop" else data.get(key):
                raise ConfigError(
                    f"{where}: latents are computed once, but config.stages.{name}.data.{key} = {data[key]!r} changes "
                    "pictures at random: turn it off, or cache the text alone"
                )
    return config


def kept(run, name: str, held_out: bool = False) -> Features:
    """The features of a stage's data, or of its held-out data, as far as they are there; looked at once by each run."""
    if (name, held_out) not in run.kept:
        run.kept[name, held_out] = _open(run, name, held_out)
    return run.kept[name, held_out]


def _open(run, name: str, held_out: bool) -> Features:
    config = check(run, name)
    folder = Path(config.path) if config.path else run.workdir / "cache" / f"features-{name}"
    made_from = _made_from(run, name, config, held_out)
    where = f"config.stages.{name}.cache.path"
    return Features(folder / ("heldout" if held_out else "train"), made_from, config.dtype, where)


def _made_from(run, name: str, config: CacheConfig, held_out: bool) -> dict[str, Any]:
    data, task = run.data_arguments(name, held_out), to_dict(run.stage(name).task)
    parts = run.task(name).feature_parts(config.features)
    init = {prefix: source for prefix, source in run.stage(name).init.items() if not prefix or _top(prefix) in parts}
    encoders = {
        "networks": {part: task.get(part) for part in parts}, "dtype": run.train_config(name).frozen_dtype,
        "weights": {prefix: _origin(run, source) for prefix, source in init.items()},
    }  # fmt: skip
    made = {
        "features": sorted(config.features), "count": _count(run, name, config, held_out), "encoders": encoders,
        "data": {key: data[key] for key in DATA if key in data}, "pixels": task.get("size"),
    }  # fmt: skip
    if "text" in config.features:
        made["text"] = {key: value for key, value in run.config.text.items() if key != "path"}
        made["text"] |= {"empty": task.get("empty"), "pad_id": task.get("pad_id"), "vocabulary": _vocabulary(run)}
    return json.loads(to_json(made))


def _count(run, name: str, config: CacheConfig, held_out: bool) -> int:
    """How many examples at most, 0 for all: of the held-out ones, those that are measured on."""
    return run.stage(name).evaluate.get("batches", 8) * run.train_config(name).batch_size if held_out else config.count


def _top(path: str) -> str:
    return path.split("/")[0]


def _vocabulary(run) -> str:
    """A hash of what the tokenizer makes of a few texts."""
    tokens, mask = run.text_tokenizer()(["", "a red circle left of a blue star", "Ein Bild, 100 %: \N{SNOWMAN}!"])
    return hashlib.sha256(np.asarray(tokens, np.int32).tobytes() + np.asarray(mask, bool).tobytes()).hexdigest()[:16]


def _origin(run, source: Mapping[str, Any]) -> dict[str, Any]:
    """What tells weights from others without reading them: step and checksums, or the size and pieces of files."""
    how = {key: source[key] for key in ("part", "without", "through", "reader") if source.get(key)}
    if not source.get("stage"):
        return how | {"file": _fingerprint(str(source["file"]))}
    stage, reader = source["stage"], run.checkpoints(source["stage"])
    inherited = {prefix: _origin(run, other) for prefix, other in run.stage(stage).init.items()}
    step = max(reader.steps(), default=0)
    how |= {"stage": stage, "step": step, "init": inherited}
    if step:
        mark = reader.mark(step)
        local = _fingerprint if isinstance(mark, Path) else lambda _: hashlib.sha256(mark.read_bytes()).hexdigest()[:16]
        how["crc"] = local(str(mark)) if mark.is_file() else ""
    reader.close()
    return how


def _fingerprint(path: str) -> str:
    """A hash of the files at or below a path, of their sizes and some of their bytes; what is no path names itself."""
    root = Path(path)
    if not root.exists():
        return path
    digest = hashlib.sha256()
    for file in [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.is_file()):
        size = file.stat().st_size
        digest.update(f"{file.relative_to(root.parent if root.is_file() else root)} {size} ".encode())
        with file.open("rb") as opened:
            for start in sorted({0, max(0, size // 2 - PIECE // 2), max(0, size - PIECE)}):
                opened.seek(start)
                digest.update(opened.read(PIECE))
    return digest.hexdigest()[:16]


# ---------------------------------------------------------------------------------------------------------- computing


def build(run, name: str, should_stop: Callable[[], bool] = lambda: False) -> dict[str, np.ndarray]:
    """Compute what is not there yet of a stage's features, held-out ones too; give the parameters `empty`, by path.

    Raises Stopped when should_stop() became true (files that are whole stay), UserError for stale features.
    """
    if not run.stage(name).cache:
        return {}
    for held_out in (False, True) if run.stage(name).evaluate else (False,):
        features = kept(run, name, held_out)
        if not features.complete:
            _Encoder(run, name, held_out).run(features, should_stop)
    return trees.add_prefix(kept(run, name).empty(), "empty")


class _Encoder:
    """The encoders of a stage, on the mesh, and the batches they are run over."""

    def __init__(self, run, name: str, held_out: bool):
        self.config, task, train = check(run, name), run.task(name), run.train_config(name)
        self.mesh, self.most = run.mesh, _count(run, name, self.config, held_out)
        self.batch_size = self.config.batch_size or train.batch_size
        kinds, parts = tuple(self.config.features), task.feature_parts(self.config.features)
        layout = run.layout(name)
        paths = [path for path in layout.shapes if _top(path) in parts]
        if changed := sorted(set(paths) & {*layout.trained, *layout.buffers}):
            raise UserError(f"stage {name} trains {changed[0]}: features that depend on it cannot be computed once")
        frozen = place_frozen(paths, run.given(name, parts)[0], run.mesh, train)
        self.params = trees.unflatten(frozen)
        self.open = lambda: run.batches(name, held_out=held_out, train=False, encode=kinds, batch_size=self.batch_size)
        self.rows = sharding.batch_sharding(run.mesh)
        self.encode = jax.jit(lambda params, batch: task.features(params, batch, kinds), out_shardings=self.rows)
        self.empty = {}
        if "text" in kinds:
            length = run.text_tokenizer().length
            everywhere = sharding.replicated(run.mesh)
            said = jax.jit(lambda p: task.empty_features(p, length), out_shardings=everywhere)(self.params)
            self.empty = jax.tree.map(np.asarray, said)

    def run(self, features: Features, should_stop: Callable[[], bool]) -> None:
        """Every missing file of the features, one after the other; each process writes those of its rows."""
        from tqdm import tqdm

        writers, mine = self._shares()
        with self.open() as batches, jax.set_mesh(self.mesh):
            wanted = -(-self.most // self.batch_size) if self.most else len(batches)
            length, per_shard = min(wanted, len(batches)), -(-self.config.shard_size // self.batch_size)
            shards = -(-length // per_shard)
            with in_turn():
                if jax.process_index() == 0:
                    features.begin(shards, [length, per_shard, self.batch_size])
            missing = everyone(features.missing(shards))[0]  # nobody writes before all have looked
            done = length - sum(min(per_shard, length - k * per_shard) for k in missing)
            quiet = True if jax.process_index() else None
            bar = tqdm(total=length, initial=done, desc=f"features in {features.folder}", unit="batch", disable=quiet)

            def examples(first, count):
                batches.set_state({**batches.get_state(), "batches": first})
                for k in range(count):
                    if should_stop():
                        raise Stopped(f"stopped after {done + k} of {length} batches of features")
                    yield from self._examples(next(batches), first + k, mine)
                    bar.update()

            for k in missing:
                count = min(per_shard, length - k * per_shard)
                found = examples(k * per_shard, count)
                if jax.process_index() in writers:
                    features.write(k, shards, found, writers.index(jax.process_index()), len(writers))
                else:
                    list(found)
                done += count
            bar.close()
        everyone()
        features.finish("latents" in self.config.features, self.empty, jax.process_index())
        everyone()

    def _shares(self) -> tuple[list[int], dict[int, int]]:
        """The processes that write, and {place among this one's rows: row of the batch} of what it writes.

        Of several that hold a row, it is the first.
        """
        holder: dict[int, int] = {}
        for device, (rows,) in self.rows.devices_indices_map((self.batch_size,)).items():
            for row in range(self.batch_size)[rows]:
                holder[row] = min(holder.get(row, device.process_index), device.process_index)
        held = enumerate(rows_of(self.rows, self.batch_size))
        return sorted(set(holder.values())), {i: row for i, row in held if holder[row] == jax.process_index()}

    def _examples(self, batch: Mapping[str, Any], number: int, mine: Mapping[int, int]) -> list[dict[str, Any]]:
        """What is kept of each example of this process."""
        arrays = {key: value for key, value in batch.items() if not isinstance(value, np.ndarray)}
        used = ("image", "text", "text_mask", "index", "valid")
        more = {key: value for key, value in batch.items() if key not in used}
        values = {key: _local(value) for key, value in {**more, **self.encode(self.params, arrays)}.items()}
        valid, index = _local(batch["valid"]), _local(batch["index"])
        return [
            {"source_index": int(index[i]), "slot": number * self.batch_size + row}
            | {key: _plain(value[i]) for key, value in values.items()}
            for i, row in mine.items()
            if valid[i]
        ]


def _plain(value: Any) -> Any:
    return value if isinstance(value, np.ndarray) else value.item()


def _local(x: jax.Array | np.ndarray) -> np.ndarray:
    """This host's rows of a batch."""
    if isinstance(x, np.ndarray) or x.is_fully_addressable:
        return np.asarray(x)
    pieces = {shard.index[0].start or 0: np.asarray(shard.data) for shard in x.addressable_shards}
    return np.concatenate([pieces[start] for start in sorted(pieces)])
