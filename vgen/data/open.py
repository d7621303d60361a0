"""From a stage's `data` settings to batches on the devices."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vgen.config import build
from vgen.data.buckets import MICRO, Buckets, scan, table_of
from vgen.data.cache import cache_source
from vgen.data.features import Features, OneCaption
from vgen.data.pipeline import Pipeline
from vgen.data.prefetch import prefetch_to_device
from vgen.data.sources import Source, open_source
from vgen.data.text import Texts
from vgen.hosts import in_turn

CORPUS = 20_000  # captions a text tokenizer is trained on


def source_of(
    source: str, *, size: int | None = None, split: str = "train", cached: int = 0, cache_dir: str | Path | None = None,
    options: Mapping[str, Any] | None = None,
) -> Source:  # fmt: skip
    """Open `source` (see vgen.data.sources) with `options` for its kind; the first `cached` examples through a cache.

    cached: for sources that draw or decode slowly: that many examples are written to cache_dir as ArrayRecord once.
    """
    options = dict(options or {})
    opened = open_source(source, size=size, split=split, **options)
    if not cached or cache_dir is None:
        return opened
    settings, digest = _settings(source=source, options=options)
    name = f"{source.partition(':')[0]}-{split}-{size}-{cached}-{digest}"
    with in_turn():
        return cache_source(opened, Path(cache_dir) / name, cached, config=settings)


def _settings(**settings) -> tuple[str, str]:
    """The settings as JSON, and eight letters of its hash."""
    text = json.dumps(settings, sort_keys=True, default=str)
    return text, hashlib.sha256(text.encode()).hexdigest()[:8]


def sizes_of(
    opened: Source, source: str, *, size: int | None = None, split: str = "train", cached: int = 0,
    cache_dir: str | Path | None = None, options: Mapping[str, Any] | None = None,
) -> np.ndarray:  # fmt: skip
    """int32 [n, 2]: (height, width) of the pictures of a source that was opened with these settings.

    They are looked up once, and kept in cache_dir.
    """
    kind = source.partition(":")[0]
    if kind in ("scenes", "photos"):  # which draw at one size
        return np.full((len(opened), 2), size, np.int32)
    if cache_dir is None:
        return scan(opened)
    _, digest = _settings(source=source, split=split, cached=cached, options=options, count=len(opened))
    path = Path(cache_dir) / f"sizes-{kind}-{split}-{digest}.npy"
    with in_turn():
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_name(f".{path.name}.{os.getpid()}.part")
            with part.open("wb") as file:
                np.save(file, scan(opened))
            part.replace(path)
        return np.load(path)


def open_captions(
    source: str, *, size: int | None = None, split: str = "train", options: Mapping[str, Any] | None = None, **_
) -> Iterator[str]:
    """The captions of the first CORPUS examples of a source, for training a text tokenizer."""
    opened = open_source(source, size=size and min(size, 16), split=split, **dict(options or {}))
    for i in range(min(CORPUS, len(opened))):
        caption = opened[i].get("caption")
        yield from caption if isinstance(caption, list) else [caption or ""]


def rows_of(sharding: jax.sharding.Sharding, batch_size: int) -> tuple[int, ...]:
    """The rows of a batch of all processes that this one's devices hold, and which it therefore has to read.

    They follow from the mesh: processes along `tensor` hold the same rows, and on a pod they need not be neighbours.
    """
    held = sharding.addressable_devices_indices_map((batch_size,)).values()
    return tuple(sorted({row for (rows,) in held for row in range(batch_size)[rows]}))


def open_pipeline(
    source: str,
    *,
    batch_size: int,
    seed: int,
    sharding: jax.sharding.Sharding,
    train: bool,
    tokenizer: Texts | None = None,
    cache_dir: str | Path | None = None,
    size: int | None = None,
    split: str = "train",
    cached: int = 0,
    options: Mapping[str, Any] | None = None,
    buckets: int | Sequence[Sequence[int]] = (),
    features: Features | None = None,
    encode: tuple[str, ...] = (),
    crop: str = "center_crop",
    crop_scale: Sequence[float] = (),
    flip: bool = False,
    augment: Mapping[str, Any] | None = None,
    captions: str = "require",
    workers: int = 0,
    threads: int = 2,
    max_bad_fraction: float = 0.01,
    prefetch: int = 2,
):
    """Device batches of a stage: endless and shuffled to train, one pass in order to evaluate.

    source, size, split, cached, options: see `source_of`.  prefetch: batches ahead.  The rest: see `Pipeline`.
    augment: spec of a function of (picture, generator), for training alone.
    buckets: picture sizes (height, width), or N for the published ones of about N^2 pixels, see `vgen.data.buckets`.
    features: what is read in the place of pictures, or of texts, or both.
    encode: the kinds of features ("latents", "text") that the batches are wanted for: one pass over every example, the
      last batches filled up, with what else there is to keep of an example.
    """
    opened = sizes = keys = None
    if features is None or not features.standalone:
        where = dict(size=size, split=split, cached=cached, cache_dir=cache_dir, options=options)
        opened = source_of(source, **where)
        if (isinstance(buckets, int) or len(buckets)) and (not encode or "latents" in encode):
            sizes = Buckets(table_of(buckets), sizes_of(opened, source, **where))
    if features is not None:
        opened, sizes, keys = _from_features(features, opened, sizes, tokenizer is not None)
    pipeline = Pipeline(
        OneCaption(opened) if encode else opened,
        batch_size=batch_size,
        seed=seed,
        shuffle=train,
        repeat=train,
        size=size,
        buckets=sizes,
        crop=crop,
        crop_scale=tuple(crop_scale) or None,
        flip=flip,
        augment=build(augment, "data.augment") if augment else None,
        tokenizer=tokenizer and tokenizer.tokenizer,
        text_length=tokenizer.length if tokenizer else 0,
        captions=captions,
        keys=keys,
        remainder="pad" if encode else "drop",
        workers=workers,
        threads=threads,
        rows=rows_of(sharding, batch_size),
        max_bad_fraction=max_bad_fraction,
    )
    if encode:
        drop = ("image", *MICRO) * ("latents" not in encode)
        keys = ["caption" if key == "text" and "text" not in encode else key for key in pipeline.keys]
        pipeline = dataclasses.replace(pipeline, keys=tuple(key for key in keys if key not in drop))
    return prefetch_to_device(iter(pipeline), sharding, size=prefetch)


def _from_features(features: Features, opened: Source | None, sizes: Buckets | None, text: bool):
    """(source, sizes of its pictures, keys of a batch); opened, sizes: of the pictures, where they are still needed."""
    keys = (*features.keys, *("text",) * text)
    if features.standalone:
        return features.source(), features.buckets(), keys
    if sizes is not None:
        keys, sizes = (*keys, *MICRO), sizes._replace(sizes=sizes.sizes[features.indices()])
    return features.source(opened), sizes, (*keys, "image")
