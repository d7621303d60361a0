"""How fast the input pipeline reads each kind of source, beside a bare loop over the same examples.

The data sets are written for this: `count` pictures of the embedded world, 512 pixels wide where the kind keeps files,
as JPEG where it keeps those.  A row tells pictures a second of one thread that opens, decodes, cuts and resizes them
one by one, of the pipeline in threads, and of it in worker processes; `size` pixels, batches of 32.
"""

import io
import json
import re
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from vgen.config import UserError
from vgen.data.cache import cache_source
from vgen.data.images import decode, resize
from vgen.data.pipeline import Pipeline
from vgen.data.scenes import Scenes
from vgen.data.sources import Source, open_source

HEAD = (
    "source",
    "what it holds",
    "one thread, images/s",
    "pipeline, threads",
    "pipeline, processes",
    "best / one thread",
)
BATCH = 32


def table(only: str = "", count: int = 512, size: int = 256, workers: int = 2, runs: int = 3) -> Iterator[str]:
    """Rows of a Markdown table, a kind of source each (`tfds` reads records, too; it needs a data set that is there).

    only: regular expression of their names.  count: examples, at least a batch.  workers: processes, and threads.
    runs: of each; the fastest counts, and of the pipeline what comes behind the batches that it makes ahead.
    Raises UserError for a count below a batch, or where nothing is left.
    """
    if count < BATCH or workers < 1 or runs < 1:
        raise UserError(f"--count must be at least {BATCH}, --workers and --runs at least 1")
    kinds = {name: make for name, make in KINDS.items() if re.search(only, name)}
    if not kinds:
        raise UserError(f"--only={only} matches none of {', '.join(KINDS)}")
    yield "| " + " | ".join(HEAD) + " |"
    yield "|" + "---|" * len(HEAD)
    with tempfile.TemporaryDirectory() as folder:
        pictures = [Image.fromarray(Scenes(size=128, count=64)[i]["image"]).resize((512, 512)) for i in range(64)]
        for name, make in kinds.items():
            source, told = make(Path(folder), pictures, count, size)
            one = max(_bare(source, count, size) for _ in range(runs))
            threads = max(_batches(source, count, size, 0, workers) for _ in range(runs))
            processes = max(_batches(source, count, size, workers, 2) for _ in range(runs))
            best = max(threads, processes) / one
            yield f"| {name} | {told} | {one:,.0f} | {threads:,.0f} | {processes:,.0f} | {best:.2f} |"


def _bare(source: Source, count: int, size: int) -> float:
    """Pictures a second of a loop."""
    start = time.perf_counter()
    for i in range(count):
        image = source[i]["image"]
        resize(decode(image, size), size)
    return count / (time.perf_counter() - start)


def _batches(source: Source, count: int, size: int, workers: int, threads: int) -> float:
    """Pictures a second of the pipeline."""
    pipeline = Pipeline(source, BATCH, size=size, workers=workers, threads=threads, keys=("image",))
    with iter(pipeline) as batches:
        for _ in range(5 * max(workers, threads)):  # more than are made ahead
            next(batches)
        start = time.perf_counter()
        for _ in range(count // BATCH):
            next(batches)
        return count // BATCH * BATCH / (time.perf_counter() - start)


# ---------------------------------------------------------------------------------------------- a data set of each kind


def _jpeg(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=90)
    return file.getvalue()


def _folder(folder: Path, pictures: list[Image.Image], count: int, size: int) -> tuple[Source, str]:
    place = folder / "folder"
    place.mkdir()
    for i in range(count):
        (place / f"{i:05d}.jpg").write_bytes(_jpeg(pictures[i % len(pictures)]))
        (place / f"{i:05d}.txt").write_text("a picture")
    return open_source(f"folder:{place}"), "JPEG, 512 pixels"


def _webdataset(folder: Path, pictures: list[Image.Image], count: int, size: int) -> tuple[Source, str]:
    with tarfile.open(folder / "data-00000.tar", "w") as tar:
        for i in range(count):
            for suffix, content in (("jpg", _jpeg(pictures[i % len(pictures)])), ("txt", b"a picture")):
                entry = tarfile.TarInfo(f"{i:05d}.{suffix}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    return open_source(f"webdataset:{folder}/data-*.tar"), "JPEG, 512 pixels"


def _arrayrecord(encoded: bool) -> Callable[..., tuple[Source, str]]:
    def make(folder: Path, pictures: list[Image.Image], count: int, size: int) -> tuple[Source, str]:
        place = folder / f"records-{encoded}"
        kept = [_jpeg(each) if encoded else np.asarray(each.resize((size, size))) for each in pictures]
        cache_source([{"image": kept[i % len(kept)], "caption": "a picture"} for i in range(count)], place)
        return open_source(f"arrayrecord:{place}"), "JPEG, 512 pixels" if encoded else f"arrays, {size} pixels"

    return make


def _npz(folder: Path, pictures: list[Image.Image], count: int, size: int) -> tuple[Source, str]:
    kept = [np.asarray(each.resize((size, size))) for each in pictures]
    np.savez(folder / "data.npz", image=np.stack([kept[i % len(kept)] for i in range(count)]))
    return open_source(f"npz:{folder}/data.npz"), f"arrays, {size} pixels, in memory"


def _sa1b(folder: Path, pictures: list[Image.Image], count: int, size: int) -> tuple[Source, str]:
    place = folder / "sa1b"
    place.mkdir()
    whole = {"size": [512, 512], "counts": [0, 512 * 512]}
    for i in range(count):
        (place / f"sa_{i}.jpg").write_bytes(_jpeg(pictures[i % len(pictures)]))
        (place / f"sa_{i}.json").write_text(json.dumps({"annotations": [{"segmentation": whole, "area": 512 * 512}]}))
    return open_source(f"sa1b:{place}", size=size), "JPEG, 512 pixels, a mask each"


def _scenes(folder: Path, pictures: list[Image.Image], count: int, size: int) -> tuple[Source, str]:
    return open_source("scenes", size=size, count=count), f"drawn at {size} pixels"


def _photos(folder: Path, pictures: list[Image.Image], count: int, size: int) -> tuple[Source, str]:
    return open_source("photos", size=size, count=count), f"cut out at {size} pixels"


def _digits(folder: Path, pictures: list[Image.Image], count: int, size: int) -> tuple[Source, str]:
    return open_source("digits", count=count), "arrays, 8 pixels, in memory"


KINDS = {
    "folder": _folder,
    "webdataset": _webdataset,
    "arrayrecord, files": _arrayrecord(True),
    "arrayrecord, arrays": _arrayrecord(False),
    "npz": _npz,
    "sa1b": _sa1b,
    "scenes": _scenes,
    "photos": _photos,
    "digits": _digits,
}
