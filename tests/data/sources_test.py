"""Sources: every layout is read, every broken one is named; caches round-trip, reappear, and are rebuilt when stale."""

import io
import json
import logging as std_logging
import pickle
import subprocess
import sys
import tarfile
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from vgen.data import cache, images, photos
from vgen.data.images import DataError
from vgen.data.sources import Source, open_source


def png(value, size=(8, 8)):
    file = io.BytesIO()
    Image.fromarray(np.full((*size, 3), value, np.uint8)).save(file, "PNG")
    return file.getvalue()


def value_of(example):
    return int(images.decode(example["image"])[0, 0, 0])


# ------------------------------------------------------------------------------------------------------------- specs


@pytest.mark.parametrize("spec", ["scene", "folder", "folder:", "http://x", "npz"])
def test_unknown_specs_list_the_known(spec):
    with pytest.raises(ValueError, match="folder:DIR, tfds:NAME"):
        open_source(spec)


def test_unknown_keywords_are_named(tmp_path):
    (tmp_path / "a.png").write_bytes(png(1))
    with pytest.raises(ValueError, match="does not take 'cuont'"):
        open_source(f"folder:{tmp_path}", cuont=3)
    with pytest.raises(ValueError, match="size"):
        open_source("photos")


def test_scenes():
    source = open_source("scenes", size=16, count=5)
    assert isinstance(source, Source) and len(source) == 5
    assert source[3]["image"].shape == (16, 16, 3) and isinstance(source[3]["caption"], str)


# ------------------------------------------------------------------------------------------------------------- folder


def test_folder_with_captions(tmp_path):
    for i, name in enumerate(["b.png", "a.PNG", "c.png", ".hidden.png", "notes.md"]):
        (tmp_path / name).write_bytes(png(i))
    (tmp_path / "a.txt").write_text("\ufeffa cat,\n  sitting ", "utf-8")
    (tmp_path / "b.txt").write_text("")
    source = open_source(f"folder:{tmp_path}")
    assert [value_of(source[i]) for i in range(len(source))] == [1, 0, 2]
    assert source[0]["caption"] == "a cat, sitting" and source[1]["caption"] == "" and "caption" not in source[2]
    assert source[2]["name"].endswith("c.png") and "label" not in source[0]


def test_folder_with_classes(tmp_path):
    for name in ("dog/1.png", "cat/2.png", "cat/deep/3.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(png(int(name[-5])))
    source = open_source(f"folder:{tmp_path}")
    assert source.classes == ["cat", "dog"]
    assert [(value_of(source[i]), source[i]["label"]) for i in range(3)] == [(2, 0), (3, 0), (1, 1)]


def test_folder_with_metadata(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "x.png").write_bytes(png(7))
    (tmp_path / "y.png").write_bytes(png(8))
    rows = [{"file_name": "sub/x.png", "text": "seven", "label": "odd"}, {"file_name": "y.png", "caption": "eight"}]
    (tmp_path / "metadata.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    source = open_source(f"folder:{tmp_path}")
    assert [(value_of(source[i]), source[i]["caption"]) for i in range(2)] == [(7, "seven"), (8, "eight")]
    assert source[0]["label"] == 0 and "label" not in source[1] and source.classes == ["odd"]
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "y.png"}\n{"nothing": 1}\n')
    with pytest.raises(DataError, match="line 2"):
        open_source(f"folder:{tmp_path}")


def test_folder_split_and_holdout(tmp_path):
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        for i in range(10):
            (tmp_path / split / f"{i}.png").write_bytes(png(i + 100 * (split == "val")))
    assert value_of(open_source(f"folder:{tmp_path}", split="val")[0]) == 100
    with pytest.raises(DataError, match="train, val"):
        open_source(f"folder:{tmp_path}", split="test")
    with pytest.raises(DataError, match="holdout"):
        open_source(f"folder:{tmp_path}/train", split="heldout")
    parts = [open_source(f"folder:{tmp_path}/train", split=s, holdout=0.3) for s in ("train", "heldout")]
    values = [{value_of(part[i]) for i in range(len(part))} for part in parts]
    assert [len(v) for v in values] == [7, 3] and values[0] | values[1] == set(range(10))


def test_empty_and_missing_folders(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        open_source(f"folder:{tmp_path}/absent")
    with pytest.raises(DataError, match="no images"):
        open_source(f"folder:{tmp_path}")


# --------------------------------------------------------------------------------------------------------------- TFDS

TFDS_BUILDER = """
import io, sys
import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

class Toy(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({
            "picture": tfds.features.Image(shape=(None, None, 3)), "caption": tfds.features.Text(),
            "label": tfds.features.ClassLabel(names=["even", "odd"])}))

    def _split_generators(self, manager):
        return {"train": self._generate_examples(12), "test": self._generate_examples(3)}

    def _generate_examples(self, n):
        for i in range(n):
            file = io.BytesIO()  # encoded here, because tfds encodes arrays with TensorFlow
            Image.fromarray(np.full((8, 9, 3), 10 * i, np.uint8)).save(file, "PNG")
            file.seek(0)
            yield i, {"picture": file, "caption": f"number {i}", "label": i % 2}

Toy(data_dir=sys.argv[1], file_format="array_record").download_and_prepare()
assert "tensorflow" not in sys.modules
"""


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory):
    pytest.importorskip("tensorflow_datasets")
    folder = tmp_path_factory.mktemp("tfds")
    subprocess.run([sys.executable, "-c", TFDS_BUILDER, str(folder)], check=True, capture_output=True)
    return folder


def test_tfds(tfds_dir):
    source = open_source("tfds:toy", data_dir=str(tfds_dir))
    assert len(source) == 12 and source.classes == ["even", "odd"] and isinstance(source[0]["image"], bytes)
    for copy in (source, pickle.loads(pickle.dumps(source))):
        seen = {(value_of(e), e["caption"], e["label"]) for e in copy.__getitems__(list(range(12)))}
        assert seen == {(10 * i, f"number {i}", i % 2) for i in range(12)}
    assert len(open_source("tfds:toy", split="test", data_dir=str(tfds_dir))) == 3
    assert len(open_source("tfds:toy", split="heldout", holdout=0.25, data_dir=str(tfds_dir))) == 3
    assert set(open_source("tfds:toy", data_dir=str(tfds_dir), keys={"image": "picture"})[0]) == {"image", "name"}
    assert "tensorflow" not in sys.modules


def test_tfds_missing(tmp_path):
    pytest.importorskip("tensorflow_datasets")
    with pytest.raises(DataError, match="tfds:nothing_like_this"):
        open_source("tfds:nothing_like_this", data_dir=str(tmp_path))


# --------------------------------------------------------------------------------------------------------- webdataset


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def members(start, stop):
    for i in range(start, stop):
        for suffix, data in (("png", png(i)), ("txt", f"number {i}".encode()), ("cls", b"3")):
            yield f"part/{i:04d}.{suffix}", data


def test_webdataset(tmp_path):
    write_tar(tmp_path / "a-000.tar", members(0, 3))
    extra = {"caption": "from json", "label": 5}
    write_tar(tmp_path / "a-001.tar", [*members(3, 5), ("x.webp", png(9)), ("x.json", json.dumps(extra).encode())])
    source = pickle.loads(pickle.dumps(open_source(f"webdataset:{tmp_path}/a-*.tar")))
    assert [value_of(source[i]) for i in (5, 0, 4)] == [9, 0, 4]
    assert source[4]["caption"] == "number 4" and source[4]["label"] == 3 and source[4]["name"].endswith("part/0004")
    assert (source[5]["caption"], source[5]["label"]) == ("from json", 5) and len(source) == 6


def test_webdataset_truncated(tmp_path, caplog):
    write_tar(tmp_path / "whole.tar", members(0, 4))
    data = (tmp_path / "whole.tar").read_bytes()
    cut = data.index(b"part/0003.png") + 512 + 20  # inside the last picture
    (tmp_path / "cut.tar").write_bytes(data[:cut])
    with caplog.at_level(std_logging.WARNING, "absl"):
        source = open_source(f"webdataset:{tmp_path}/cut.tar")
    assert [source[i]["caption"] for i in range(len(source))] == ["number 0", "number 1", "number 2"]
    assert "cut.tar" in caplog.text
    (tmp_path / "junk.tar").write_bytes(b"junk" * 1000)
    with pytest.raises(DataError, match="junk.tar"):
        open_source(f"webdataset:{tmp_path}/junk.tar")
    with pytest.raises(DataError, match="no files"):
        open_source(f"webdataset:{tmp_path}/none-*.tar")


# --------------------------------------------------------------------------------------------------------------- npz


def test_npz(tmp_path):
    np.savez(tmp_path / "a.npz", images=np.arange(12, dtype=np.uint8).reshape(3, 2, 2), labels=[4, 5, 6],
             captions=["x", "ÿ", "z"])  # fmt: skip
    source = open_source(f"npz:{tmp_path}/a.npz")
    assert len(source) == 3 and source[1]["label"] == 5 and source[1]["caption"] == "ÿ"
    assert images.decode(source[2]["image"]).shape == (2, 2, 3) and value_of(source[2]) == 8
    np.savez(tmp_path / "b.npz", image=np.zeros((3, 2, 2), np.uint8), label=[1, 2])
    np.savez(tmp_path / "c.npz", image=np.zeros((2, 2, 2), np.uint8), caption=np.array(["a", None], object))
    for name in ("b", "c", "absent"):
        with pytest.raises(DataError, match=f"{name}.npz"):
            open_source(f"npz:{tmp_path}/{name}.npz")


# -------------------------------------------------------------------------------------------------------------- photos


def test_photos_splits_share_no_pixel(monkeypatch):
    pytest.importorskip("skimage"), pytest.importorskip("sklearn")
    marked = {}

    def mark(image):  # every pixel of every photograph becomes its own number
        array = np.asarray(image)
        start = sum(marked.values())
        marked[len(marked)] = array.shape[0] * array.shape[1]
        code = start % 2**24 + np.arange(array.shape[0] * array.shape[1]).reshape(array.shape[:2])
        return np.stack([code >> 16 & 255, code >> 8 & 255, code & 255], -1).astype(np.uint8)

    monkeypatch.setattr(photos, "to_rgb8", mark)
    seen = {}
    for split in ("train", "heldout"):
        marked.clear()
        source = open_source("photos", size=48, split=split, count=140, min_scale=1.0)
        crops = np.stack([source[i]["image"] for i in range(140)]).astype(np.int64)
        seen[split] = set((crops @ [65536, 256, 1]).ravel().tolist())
    assert seen["train"] and seen["heldout"] and not seen["train"] & seen["heldout"]


def test_photos_are_deterministic_and_varied():
    pytest.importorskip("skimage"), pytest.importorskip("sklearn")
    one, two = (open_source("photos", size=32, count=50) for _ in range(2))
    crops = [one[i]["image"] for i in range(50)]
    assert all((crops[i] == two[i]["image"]).all() for i in range(50)) and crops[0].shape == (32, 32, 3)
    assert len({crop.tobytes() for crop in crops}) == 50 and np.mean([crop.std() for crop in crops]) > 20
    assert Counter(one[i]["label"] for i in range(49)) == {k: 7 for k in range(7)}
    with pytest.raises(IndexError):
        one[50]
    with pytest.raises(DataError, match="smaller size"):
        open_source("photos", size=2000)


# --------------------------------------------------------------------------------------------------------------- cache


class Numbers:
    """n examples with an array, a caption and more; counts how often it is read."""

    def __init__(self, n=30, shift=0):
        self.n, self.shift, self.reads = n, shift, 0

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        self.reads += 1
        image = np.random.default_rng(i + self.shift).integers(0, 256, (6, 5, 3), np.uint8)
        boxes = np.full((2, 4), i, np.float32)
        return {"image": image, "caption": f"number {i} é", "label": np.int64(i), "boxes": boxes}


@pytest.mark.parametrize("encoding", ["raw", "png"])
def test_cache_round_trips(tmp_path, encoding):
    source = Numbers()
    cache.cache_source(source, tmp_path / "c", encoding=encoding, shard_size=8)
    back = pickle.loads(pickle.dumps(open_source(f"arrayrecord:{tmp_path}/c")))
    assert len(back) == 30 and len(list((tmp_path / "c").glob("*.arrayrecord"))) == 4
    for i, example in zip((29, 0, 7), back.__getitems__([29, 0, 7])):
        np.testing.assert_array_equal(images.decode(example["image"]), source[i]["image"])
        np.testing.assert_array_equal(example["boxes"], source[i]["boxes"])
        assert example["caption"] == f"number {i} é" and example["label"] == i and example["boxes"].dtype == np.float32


def test_cache_is_reused_and_rebuilt(tmp_path):
    path = tmp_path / "c"
    cache.cache_source(Numbers(), path, config={"size": 5})
    again = Numbers()
    cache.cache_source(again, path, config={"size": 5})
    assert again.reads == 16  # the fingerprint's samples only
    others = (Numbers(), {"size": 6}, None), (Numbers(shift=1), {"size": 6}, None), (Numbers(), {"size": 6}, 9)
    for source, config, count in others:
        cached = cache.cache_source(source, path, count, config=config)
        assert source.reads > 16 or count == 9
        assert (cached[8]["image"] == source[8]["image"]).all() and len(cached) == (count or 30)
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_cache_is_atomic(tmp_path):
    class Breaks(Numbers):
        def __getitem__(self, i):
            if i == 21:
                raise OSError("gone")
            return super().__getitem__(i)

    cache.cache_source(Numbers(), tmp_path / "c")
    with pytest.raises(DataError, match="example 21"):
        cache.cache_source(Breaks(), tmp_path / "c", config="new")
    assert [p.name for p in tmp_path.iterdir()] == ["c"] and len(open_source(f"arrayrecord:{tmp_path}/c")) == 30
    with pytest.raises(DataError, match="no files"):
        open_source(f"arrayrecord:{tmp_path}/absent-*")


def test_cache_never_replaces_other_files(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(DataError, match="not a cache"):
        cache.cache_source(Numbers(), tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "precious"


def test_cache_written_by_workers_is_the_same(tmp_path):
    cached = cache.cache_source(Numbers(), tmp_path / "c", workers=2)
    assert len(list((tmp_path / "c").glob("*.arrayrecord"))) == 2
    assert [cached[i]["label"] for i in range(30)] == list(range(30))


def test_records_hold_no_objects(tmp_path):
    with pytest.raises(TypeError, match="objects"):
        cache.pack({"a": np.array([None, {}], object)})
    with pytest.raises(TypeError):
        cache.pack({"a": object()})
    with pytest.raises(DataError, match="another format"):
        cache.unpack(b"\x10\0\0\0 something else")


def test_digits_are_scikit_learns_and_in_two_parts():
    from sklearn.datasets import load_digits

    train, held = (open_source("digits", split=split) for split in ("train", "heldout"))
    assert (len(train), len(held)) == (1438, 359)
    theirs = load_digits()
    first = held[0]
    assert first["label"] == theirs.target[4] and first["image"].shape == (8, 8, 3)
    assert np.abs(first["image"][..., 0] / 255 * 16 - theirs.images[4]).max() < 0.04
    words = "zero one two three four five six seven eight nine".split()
    assert first["caption"] == f"a handwritten {words[first['label']]}"
    assert np.array_equal(train[4]["image"][..., 1], np.rint(theirs.images[5] * 255 / 16))
    assert len(open_source("digits", count=10)) == 10
    with pytest.raises(ValueError, match="nothing behind a colon"):
        open_source("digits:x")
    with pytest.raises(ValueError, match="train or heldout"):
        open_source("digits", split="test")
