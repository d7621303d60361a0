"""From a stage's `data` settings to batches on the devices."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from vgen.data.cache import cache_source
from vgen.data.pipeline import Pipeline
from vgen.data.prefetch import prefetch_to_device
from vgen.data.sources import Source, open_source
from vgen.data.text import Texts

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
    settings = json.dumps({"source": source, "options": options}, sort_keys=True, default=str)
    name = f"{source.partition(':')[0]}-{split}-{size}-{cached}-{hashlib.sha256(settings.encode()).hexdigest()[:8]}"
    return cache_source(opened, Path(cache_dir) / name, cached, config=settings)


def open_captions(
    source: str, *, size: int | None = None, split: str = "train", options: Mapping[str, Any] | None = None, **_
) -> Iterator[str]:
    """The captions of the first CORPUS examples of a source, for training a text tokenizer."""
    opened = open_source(source, size=size and min(size, 16), split=split, **dict(options or {}))
    for i in range(min(CORPUS, len(opened))):
        caption = opened[i].get("caption")
        yield from caption if isinstance(caption, list) else [caption or ""]


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
    crop: str = "center_crop",
    flip: bool = False,
    captions: str = "require",
    workers: int = 0,
    threads: int = 2,
    max_bad_fraction: float = 0.01,
    prefetch: int = 2,
):
    """Device batches of a stage: endless and shuffled to train, one pass in order to evaluate.

    source, size, split, cached, options: see `source_of`.  The rest: see `Pipeline`.  prefetch: batches ahead.
    """
    opened = source_of(source, size=size, split=split, cached=cached, cache_dir=cache_dir, options=options)
    pipeline = Pipeline(
        opened,
        batch_size=batch_size,
        seed=seed,
        shuffle=train,
        repeat=train,
        size=size,
        crop=crop,
        flip=flip,
        tokenizer=tokenizer and tokenizer.tokenizer,
        text_length=tokenizer.length if tokenizer else 0,
        captions=captions,
        workers=workers,
        threads=threads,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        max_bad_fraction=max_bad_fraction,
    )
    return prefetch_to_device(iter(pipeline), sharding, size=prefetch)
