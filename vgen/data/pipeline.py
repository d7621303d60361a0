"""The input pipeline: a source to batches, on grain; checkpointable, the same on any number of hosts and workers.

Batch k is a pure function of (source, seed, k): slot j of it is example `order[k * batch_size + j]`, and its crop and
flip are drawn from (seed, k * batch_size + j).  A position is therefore the number k, whatever the hosts and workers
are.  grain runs that function ahead of time in threads or worker processes.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from absl import flags, logging

from vgen.data import images
from vgen.data.buckets import MICRO, Buckets, Plan
from vgen.data.images import DataError, ImageError
from vgen.data.sources import Source
from vgen.data.text import Tokenizer

TRIES = 100  # neighbours looked at before giving up on replacing a bad image
CHECK_FROM = 100  # images seen before chance alone no longer explains a high share of bad ones
ENDLESS = 2**40  # batches
TOKEN_CACHE = 2**15  # captions whose ids are remembered


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """Batches of a source; iterating starts a pass (`repeat=True`: an endless one, shuffled anew each epoch).

    source: see vgen.data.sources.  batch_size: of all hosts together.  size: pixels, None keeps them (all must agree).
    crop, crop_scale: `how` and `scale` of vgen.data.images.resize.  flip: mirror at random.  augment: what is done
    behind that, a function of (picture uint8 [h, w, 3], generator) such as `vgen.data.augment.RandAugment`.
    tokenizer, text_length: for the key "text".
    buckets: a batch holds pictures of one of their sizes, in the place of `size`; crop: "center_crop" or "random_crop".
    captions: a missing one is an error ("require"), "" ("empty"), or the next example takes its place ("skip").
    remainder: what to do with the end of a pass when repeat is False: "drop" it, or "pad" the last batch with other
      examples, told apart by the key "valid".
    workers: processes; 0 works in `threads` threads of this process, best for examples that are cheap to make.
    process_index, process_count: this process reads one of as many equal slices of each batch.
    rows: the rows that it reads instead, ascending, where a mesh deals them out in another way.
    max_bad_fraction: a larger share of undecodable images ends the run with a DataError.
    keys: what a batch holds; by default image, text if there is a tokenizer, label and masks if the first example has
    them.  Masks go with pictures as they are: neither is flipped, augmented or cut at random then.

    A batch is a dict of NumPy arrays for this host's b rows (batch_size / process_count): image uint8 [b, h, w, 3],
    text int32 [b, text_length], text_mask bool [b, text_length], label int32 [b], masks bool [b, n, h, w], caption str
    [b], index int32 [b] (the position in the source, always there), valid bool [b] (with remainder="pad"); any other
    key is stacked as it is.
    With buckets: image [b, height, width, 3], and float32 [b, 2] of (height, width): original, the file's, target, the
    bucket's, and corner, (top, left) of the crop in the resized picture.
    """

    source: Source
    batch_size: int
    seed: int = 0
    shuffle: bool = True
    repeat: bool = True
    size: int | None = None
    buckets: Buckets | None = None
    crop: str = "center_crop"
    crop_scale: tuple[float, float] | None = None
    flip: bool = False
    augment: Callable[[np.ndarray, np.random.Generator], np.ndarray] | None = None
    tokenizer: Tokenizer | None = None
    text_length: int = 77
    captions: str = "require"
    keys: tuple[str, ...] | None = None
    remainder: str = "drop"
    workers: int = 0
    threads: int = 2
    process_index: int = 0
    process_count: int = 1
    rows: tuple[int, ...] | None = None
    max_bad_fraction: float = 0.01

    def __post_init__(self):
        for name, accepted in (
            ("crop", images.WAYS),
            ("captions", ("require", "empty", "skip")),
            ("remainder", ("drop", "pad")),
        ):
            if getattr(self, name) not in accepted:
                raise ValueError(f"Pipeline: {name} must be one of {', '.join(accepted)}, got {getattr(self, name)!r}")
        if self.batch_size < 1 or self.batch_size % self.process_count:
            raise ValueError(
                f"Pipeline: batch_size must be a positive multiple of the {self.process_count} processes, "
                f"got {self.batch_size}"
            )
        if not 0 <= self.process_index < self.process_count:
            raise ValueError(f"Pipeline: process_index must be in [0, {self.process_count}), got {self.process_index}")
        if self.rows is None:
            b = self.batch_size // self.process_count
            object.__setattr__(self, "rows", tuple(range(self.process_index * b, self.process_index * b + b)))
        if not self.rows or list(self.rows) != sorted({row for row in self.rows if 0 <= row < self.batch_size}):
            raise ValueError(f"Pipeline: rows must ascend below batch_size {self.batch_size}, got {self.rows}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"Pipeline: seed must be in [0, 2**32), got {self.seed}")
        if not len(self.source):
            raise DataError("Pipeline", "an empty source", "at least one example", "check the data set")
        plan = None
        if self.buckets is not None:
            if self.crop not in ("center_crop", "random_crop"):
                raise ValueError(f"Pipeline: with buckets, crop must be center_crop or random_crop, got {self.crop!r}")
            if self.augment is not None or self.crop_scale is not None:
                raise ValueError("Pipeline: buckets take neither augment nor crop_scale")
            plan = Plan(
                self.buckets, self.batch_size, self.seed, self.shuffle, self.repeat, pad=self.remainder == "pad"
            )
        object.__setattr__(self, "_plan", plan)
        if not len(self):
            raise DataError(
                "Pipeline",
                f"{len(self.source)} examples",
                f"at least one batch of {self.batch_size}",
                "use a smaller batch_size, repeat=True or remainder='pad'",
            )
        if self.keys is None:
            object.__setattr__(self, "keys", self._default_keys())
        if "text" in self.keys and self.tokenizer is None:
            raise ValueError("Pipeline: the key 'text' needs a tokenizer")
        if "masks" in self.keys and (self._random_picture or self.buckets is not None):
            raise ValueError("Pipeline: masks take no flip, augment, random crop or buckets: they would not move along")
        object.__setattr__(self, "_text", _TextRows(self.tokenizer, self.text_length))

    def _default_keys(self) -> tuple[str, ...]:
        tried = (_read(self.source, [i])[0] for i in range(min(TRIES, len(self.source))))
        first = next((example for example in tried if not isinstance(example, Exception)), {})
        keys = ("image",) + ("text",) * (self.tokenizer is not None)
        keys += tuple(key for key in ("label", "masks") if key in first)
        return keys if self.buckets is None else (*keys, *MICRO)

    def __len__(self) -> int:
        """Batches in one pass; of an endless pipeline, batches per epoch (rounded up)."""
        if self._plan is not None:
            return len(self._plan)
        n = len(self.source)
        return n // self.batch_size if self.remainder == "drop" and not self.repeat else -(-n // self.batch_size)

    def __iter__(self) -> "Batches":
        return Batches(self)

    # ------------------------------------------------------------------------------------------ one batch, in a worker

    def load(self, k: int) -> dict[str, Any]:
        """Batch number `k` of this host, with one extra entry "_bad": JSON, [name, reason] per replaced image."""
        first = k * self.batch_size
        if self._plan is None:
            indices, valid = [self._order(first + row) for row in self.rows], len(self.source) - first
        else:
            _, indices, valid = self._plan[k]
            indices = indices[list(self.rows)].tolist()
        batch, bad = {}, []
        rows = [
            self._row(i, example, first + row, bad)
            for row, i, example in zip(self.rows, indices, _read(self.source, indices))
        ]
        for key in self.keys:
            if key == "text":
                batch["text"], batch["text_mask"] = self._text([row["caption"] for row in rows])
            else:
                batch[key] = _stack(key, [row[key] for row in rows])
        batch["index"] = np.array([row["_index"] for row in rows], np.int32)
        if self.remainder == "pad" and not self.repeat:
            batch["valid"] = np.asarray(self.rows) < valid
        return batch | {"_bad": json.dumps(bad)}

    def _order(self, position: int) -> int:
        epoch, i = divmod(position, len(self.source))
        if not self.shuffle:
            return i
        return int(_permutation(len(self.source), self.seed, epoch if self.repeat else 0)[i])

    def _row(self, i: int, example: Mapping | Exception, position: int, bad: list) -> dict[str, Any]:
        """The finished example, or the finished next one that can be used."""
        rng, failed = None, None
        if self._random_picture or "text" in self.keys or "caption" in self.keys:
            rng = _LazyRng(self.seed, position)
        for _ in range(min(TRIES, len(self.source))):
            try:
                if isinstance(example, Exception):
                    raise example
                row = self._caption(example, i, rng)
                if row is not None:
                    if "image" in self.keys:
                        row |= self._image(_get(example, "image", i), i, rng)
                    break
            except (ImageError, OSError) as error:
                name = example.get("name", f"example {i}") if isinstance(example, Mapping) else f"example {i}"
                failed = failed or bad.append([str(name), _reason(error)]) or True
            i = (i + 1) % len(self.source) if self._plan is None else self._plan.following(i)
            example = _read(self.source, [i])[0]
        else:
            reason = ": ".join(bad[-1]) if failed else "no captions"
            raise DataError(
                "Pipeline",
                f"no usable example among {min(TRIES, len(self.source))} in a row ({reason})",
                "images that decode, with captions if the batch needs them",
                "check the data set",
            )
        row["_index"] = i
        for key in self.keys:
            if key not in ("text", *row):
                row[key] = _get(example, key, i)
        if "masks" in row and "image" in row:
            (h, w), shape = row["image"].shape[:2], row["masks"].shape
            if len(shape) != 3 or h % shape[1] or h * shape[2] != w * shape[1]:
                raise DataError(
                    f"masks of {example.get('name', f'example {i}')}",
                    f"{shape} for a picture of {h} x {w}",
                    "masks [n, height, width] of the finished picture, or a whole number of times smaller",
                    "set `size` to that of the masks",
                )
        return row

    def _caption(self, example: Mapping, i: int, rng) -> dict | None:
        """{"caption": str}, or None if the example has none and is to be skipped."""
        if rng is None or not ("text" in self.keys or "caption" in self.keys):
            return {}
        caption = example.get("caption")
        if isinstance(caption, list):
            caption = caption[int(rng.get().integers(len(caption)))] if caption else None
        if caption is None and self.captions == "require":
            raise DataError(
                f"caption of {example.get('name', f'example {i}')}",
                "none",
                "a text beside every image",
                "add it (NAME.txt beside NAME.jpg), or set captions='empty' or 'skip'",
            )
        if caption is None and self.captions == "skip":
            return None
        return {"caption": caption or ""}

    def _image(self, data, i: int, rng) -> dict[str, np.ndarray]:
        """{"image"} finished, and with buckets what there is to say of it."""
        if self._plan is not None:
            return self._plan.picture(data, i, rng and rng.get, self.crop == "random_crop", self.flip)
        image = images.decode(data, self.size)
        if self.size is not None:
            drawn = rng.get() if self.crop in images.RANDOM_WAYS else None
            image = images.resize(image, self.size, self.crop, drawn, self.crop_scale)
        image = images.random_flip(image, rng.get()) if self.flip else image
        return {"image": self.augment(np.ascontiguousarray(image), rng.get()) if self.augment else image}

    @property
    def _random_picture(self) -> bool:
        return self.crop in images.RANDOM_WAYS or self.flip or self.augment is not None


class _LazyRng:
    """A generator that costs nothing until it is asked for."""

    def __init__(self, seed: int, position: int):
        self._key, self._rng = (seed, position), None

    def get(self) -> np.random.Generator:
        if self._rng is None:
            self._rng = np.random.Generator(np.random.Philox(key=np.array(self._key, np.uint64)))
        return self._rng


@functools.lru_cache(maxsize=2)
def _permutation(n: int, seed: int, epoch: int):
    """The order of one epoch, as something to index: an array, or for millions of examples grain's index shuffle."""
    if n <= 2**20:  # grain's shuffle of a small range walks long cycles: 3 ms per index at n = 10
        return np.random.Generator(np.random.Philox(key=np.array([seed, epoch], np.uint64))).permutation(n)
    import grain

    return grain.MapDataset.range(n).shuffle(seed=(seed + 0x9E3779B1 * epoch) % 2**32)


class _TextRows:
    """Captions to int32 [b, length] and bool [b, length]; recent captions are not tokenised again."""

    def __init__(self, tokenizer: Tokenizer | None, length: int):
        self._given = tokenizer, length
        self._row = functools.lru_cache(TOKEN_CACHE)(lambda caption: tokenizer.encode([caption], length))

    def __reduce__(self):
        return _TextRows, self._given  # the cache stays behind when a pipeline travels to a worker

    def __call__(self, captions: list[str]) -> tuple[np.ndarray, np.ndarray]:
        tokens, masks = zip(*map(self._row, captions))
        return np.concatenate(tokens), np.concatenate(masks)


def _read(source: Source, indices: list[int]) -> list[Mapping | Exception]:
    """The examples, with the error in the place of each one that could not be read."""
    many = getattr(source, "__getitems__", None)
    if many is not None:
        try:
            return list(many(indices))
        except (ImageError, OSError):
            pass  # one of them: find out which
    examples = []
    for i in indices:
        try:
            examples.append(source[i])
        except (ImageError, OSError) as error:
            examples.append(error)
    return examples


def _reason(error: Exception) -> str:
    return error.args[1] if isinstance(error, DataError) else f"{type(error).__name__}: {error}"


def _get(example: Mapping, key: str, i: int):
    if key not in example:
        raise DataError(
            f"{key} of {example.get('name', f'example {i}')}",
            f"an example with {', '.join(example)}",
            f"the key {key!r}",
            "leave it out of the pipeline's keys, or give every example one",
        )
    return example[key]


def _stack(key: str, values: list) -> np.ndarray:
    if key == "label":
        return np.array(values, np.int32)
    shapes = {np.shape(value) for value in values}
    if len(shapes) != 1:
        raise DataError(
            f"Pipeline, key {key!r}",
            f"shapes {', '.join(map(str, sorted(shapes)[:3]))} in one batch",
            "one shape",
            "set size" if key == "image" else "leave it out of keys",
        )
    return np.stack(values)


# ------------------------------------------------------------------------------------------- iterating and positions


class Batches(Iterator):
    """Iterator over a pipeline's batches.  bad, seen: undecodable images and filled slots so far (this host)."""

    def __init__(self, pipeline: Pipeline):
        self._pipeline, self._inner = pipeline, None
        self._next, self.seen, self.bad, self._named = 0, 0, 0, {}
        self._hosts = pipeline.batch_size // len(pipeline.rows)

    def __len__(self) -> int:
        return len(self._pipeline)

    def __next__(self) -> dict[str, np.ndarray]:
        stop = ENDLESS if self._pipeline.repeat else len(self._pipeline)
        if self._next >= stop:
            self.close()
            raise StopIteration
        if self._inner is None:
            self._inner = _run_ahead(self._pipeline, self._next, stop)
        batch = next(self._inner)
        self._next += 1
        self._account(json.loads(batch.pop("_bad")), len(batch["index"]))
        return {key: np.array(value) if type(value) is not np.ndarray else value for key, value in batch.items()}

    def _account(self, bad: list, slots: int) -> None:
        """Count and name bad images; raise if they are too many.

        Too many for certain: more than the passes begun may hold in all.  Too many by all odds: the share is three
        standard errors above the limit, which stops early where a pass is long.
        """
        self.seen, self.bad = self.seen + slots, self.bad + len(bad)
        for name, reason in bad:
            if name not in self._named:
                self._named[name] = reason
                logging.warning("skipped %s: %s", name, reason)
        limit, n = self._pipeline.max_bad_fraction, len(self._pipeline.source)
        passes = -(-self.seen * self._hosts // n)
        likely = self.seen >= CHECK_FROM and self.bad - 3 * self.bad**0.5 > limit * self.seen
        if likely or self.bad > limit * n * passes:
            self.close()
            names = "; ".join(f"{name}: {reason}" for name, reason in list(self._named.items())[:5])
            raise DataError(
                "images that cannot be decoded",
                f"{self.bad} of {self.seen} ({self.bad / self.seen:.2%}): {names}",
                f"at most {limit:.2%}",
                "repair or remove them, or raise max_bad_fraction",
            )

    def get_state(self) -> dict[str, Any]:
        """The position as JSON: valid for any number of hosts and workers."""
        p = self._pipeline
        return {
            "batches": self._next,
            "seen": self.seen * self._hosts,
            "bad": self.bad * self._hosts,
            "examples": len(p.source),
            **{key: getattr(p, key) for key in ("batch_size", "seed", "shuffle", "repeat")},
            **({} if p.buckets is None else {"buckets": p._plan.mark}),
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continue with the batch that followed `get_state`.  Raises DataError for other data or another batch size."""
        here = self.get_state()
        wrong = [key for key in here if key not in ("batches", "seen", "bad") and state.get(key) != here[key]]
        if wrong:
            raise DataError(
                "position in the data",
                ", ".join(f"{key}={state.get(key)}" for key in wrong),
                ", ".join(f"{key}={here[key]}" for key in wrong),
                "resume with the data and settings of that run",
            )
        self.close()
        self._next, self.seen, self.bad = state["batches"], state["seen"] // self._hosts, state["bad"] // self._hosts

    def close(self) -> None:
        """Stop threads and workers; iterating again goes on from the same position."""
        if self._inner is not None:
            self._inner.close()
            self._inner = None

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def _run_ahead(pipeline: Pipeline, start: int, stop: int):
    """grain's iterator over batches start to stop, made ahead of time and in order."""
    import grain

    batches = grain.MapDataset.range(start, stop).map(pipeline.load)
    if not pipeline.workers:
        threads = max(1, pipeline.threads)
        return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)))
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # outside absl.app: grain's workers read a flag, whose default is right
    ahead = batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=1))
    return iter(ahead.mp_prefetch(grain.MultiprocessingOptions(num_workers=pipeline.workers, per_worker_buffer_size=2)))
