"""The pipeline: exact continuation, the same data on any hosts and workers, bad images counted and bounded."""

import io
import itertools
import json
import logging as std_logging

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from PIL import Image

from vgen.data import pipeline as pipelines
from vgen.data.cache import cache_source
from vgen.data.images import DataError
from vgen.data.pipeline import Pipeline
from vgen.data.prefetch import prefetch_to_device
from vgen.data.sources import open_source
from vgen.data.text import BPE


class Numbers:
    """Example i: a picture whose first pixel says i, a caption, a label; those in `bad` do not decode."""

    def __init__(self, n=40, bad=(), silent=(), size=12):
        self.n, self.bad, self.silent, self.size = n, set(bad), set(silent), size

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        if not 0 <= i < self.n:
            raise IndexError(i)
        image = np.random.default_rng(i).integers(0, 256, (self.size, self.size + 4, 3), np.uint8)
        example = {"image": b"junk" if i in self.bad else image, "label": i % 5, "name": f"picture-{i}"}
        return example if i in self.silent else example | {"caption": f"number {i}"}


TOKENIZER = BPE.train(["number 1 2 3 4"], 258)


def make(source=None, **options):
    return Pipeline(Numbers() if source is None else source, **{"batch_size": 8, "size": 8, "seed": 3, **options})


def take(batches, n):
    return list(itertools.islice(batches, n))


def assert_same(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b):
        assert x.keys() == y.keys()
        for key in x:
            np.testing.assert_array_equal(x[key], y[key], err_msg=key)


# ------------------------------------------------------------------------------------------------------ what is in it


def test_batch_contents():
    source = Numbers()
    batch = next(iter(make(source, tokenizer=TOKENIZER, text_length=12, keys=("image", "text", "label", "caption"))))
    kinds = {key: (value.shape, value.dtype.kind) for key, value in batch.items()}
    assert kinds == {"image": ((8, 8, 8, 3), "u"), "text": ((8, 12), "i"), "text_mask": ((8, 12), "b"),
                     "label": ((8,), "i"), "caption": ((8,), "U"), "index": ((8,), "i")}  # fmt: skip
    assert batch["text"].dtype == batch["label"].dtype == batch["index"].dtype == np.int32
    assert all(type(value) is np.ndarray for value in batch.values())
    assert TOKENIZER.decode(batch["text"]) == [f"number {i}" for i in batch["index"]] == batch["caption"].tolist()
    np.testing.assert_array_equal(batch["label"], batch["index"] % 5)


def test_an_epoch_sees_everything_once_and_the_next_is_shuffled_anew():
    batches = take(make(), 10)
    epochs = [np.concatenate([b["index"] for b in batches[i : i + 5]]) for i in (0, 5)]
    assert all(sorted(epoch.tolist()) == list(range(40)) for epoch in epochs)
    assert (epochs[0] != epochs[1]).any() and (epochs[0] != np.arange(40)).any()
    assert (epochs[0] != np.concatenate([b["index"] for b in take(make(seed=4), 5)])).any()


def test_large_sources_use_an_index_shuffle():
    n = 2**20 + 7
    order = pipelines._permutation(n, 1, 0)
    some = [int(order[i]) for i in range(2000)]
    assert len(set(some)) == 2000 and 0 <= min(some) and max(some) < n and max(some) > n // 2
    assert some != [int(pipelines._permutation(n, 1, 1)[i]) for i in range(2000)]


def test_one_pass_drops_or_pads_its_end():
    source = Numbers(21)
    dropped = list(make(source, repeat=False, shuffle=False))
    assert [b["index"].tolist() for b in dropped] == [list(range(8)), list(range(8, 16))]
    padded = list(make(source, repeat=False, remainder="pad"))
    assert len(padded) == len(make(source, repeat=False, remainder="pad")) == 3
    index, valid = (np.concatenate([b[key] for b in padded]) for key in ("index", "valid"))
    assert sorted(index[valid].tolist()) == list(range(21)) and len(valid) == 24


def test_a_small_source_fills_large_batches():
    assert sorted(next(iter(make(Numbers(3), batch_size=6)))["index"].tolist()) == [0, 0, 1, 1, 2, 2]
    with pytest.raises(DataError, match="smaller batch_size"):
        make(Numbers(3), batch_size=6, repeat=False)


def test_hosts_share_one_global_batch():
    options = {"crop": "random_crop", "flip": True, "tokenizer": TOKENIZER, "text_length": 12}
    whole = take(make(**options), 6)
    parts = [take(make(**options, process_index=p, process_count=4), 6) for p in range(4)]
    joined = [{key: np.concatenate([b[key] for b in bs]) for key in bs[0]} for bs in zip(*parts)]
    assert_same(whole, joined)


def test_random_crops_differ_between_epochs():
    first, second = (b["image"] for b in take(make(Numbers(8), crop="random_crop", shuffle=False), 2))
    assert (first != second).any((1, 2, 3)).all()


@pytest.mark.parametrize("options, message", [({"crop": "zoom"}, "center_crop"), ({"captions": "no"}, "require, empty"),
                                              ({"batch_size": 6, "process_count": 4}, "multiple"),
                                              ({"keys": ("text",)}, "tokenizer"), ({"seed": -1}, "seed")])  # fmt: skip
def test_wrong_settings(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_missing_keys_and_mixed_sizes_are_named():
    with pytest.raises(DataError, match="mask of picture-"):
        next(iter(make(keys=("image", "mask"))))

    class Mixed(Numbers):
        def __getitem__(self, i):
            return {"image": np.zeros((4 + i % 2, 4, 3), np.uint8)}

    with pytest.raises(DataError, match="set size"):
        next(iter(make(Mixed(), size=None)))
    with pytest.raises(DataError, match="empty source"):
        make(Numbers(0))


# ---------------------------------------------------------------------------------------------------------- positions


@pytest.mark.parametrize("workers", [0, 2])
def test_exact_continuation(workers):
    options = {"crop": "random_crop", "flip": True, "tokenizer": TOKENIZER, "text_length": 12, "max_bad_fraction": 0.2}
    source = Numbers(40, bad={4, 17})
    want = take(make(source, **options), 9)
    with iter(make(source, **options, workers=workers)) as first:
        head = take(first, 4)
        state = json.loads(json.dumps(first.get_state()))
        assert_same(take(first, 2), want[4:6])
    with iter(make(source, **options, workers=workers)) as second:
        second.set_state(state)
        tail = take(second, 5)
        assert second.seen == 72 and second.bad == sum(i in source.bad for b in _orders(source, 9) for i in b)
    assert_same(head + tail, want)


def _orders(source, n):
    p = make(source)
    return [[p._order(k * 8 + j) for j in range(8)] for k in range(n)]


def test_state_of_other_data_is_refused():
    state = iter(make()).get_state()
    with pytest.raises(DataError, match="examples=40"):
        iter(make(Numbers(41))).set_state(state)


def test_state_at_the_end_of_a_pass():
    batches = iter(make(repeat=False))
    assert len(list(batches)) == 5
    fresh = iter(make(repeat=False))
    fresh.set_state(batches.get_state())
    assert list(fresh) == []


# --------------------------------------------------------------------------------------------------- bad and missing


def test_bad_images_are_replaced_named_once_and_counted(caplog):
    source = Numbers(200, bad={5, 6})
    with caplog.at_level(std_logging.WARNING, "absl"):
        batches = iter(make(source, shuffle=False, batch_size=10))
        seen = take(batches, 40)  # two epochs
    assert seen[0]["index"].tolist() == [0, 1, 2, 3, 4, 7, 7, 7, 8, 9]
    assert all(b["image"].shape == (10, 8, 8, 3) for b in seen)
    assert (batches.bad, batches.seen) == (4, 400)
    assert [caplog.text.count(f"skipped picture-{i}:") for i in (5, 6)] == [1, 1]


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_bad_images(workers):
    source = Numbers(200, bad={5, 60, 61})  # 1.5 %
    with pytest.raises(DataError, match=r"3 of \d+ .*picture-\d+.*at most 1.00%"):
        with iter(make(source, workers=workers)) as batches:
            take(batches, 25)
    assert len(take(make(source, max_bad_fraction=0.015), 50)) == 50
    with pytest.raises(DataError, match="picture-"):
        take(make(Numbers(200, bad={5}), max_bad_fraction=0.0), 25)


def test_a_large_source_full_of_bad_images_stops_early():
    source = Numbers(100_000, bad=range(0, 100_000, 5))
    batches = iter(make(source))
    with pytest.raises(DataError, match="cannot be decoded"):
        take(batches, 100)
    assert batches.seen < 200


def test_chance_is_not_an_error():
    source = Numbers(100_000, bad={0, 1, 2})  # at once three in the first hundred, of three in a hundred thousand
    assert len(take(make(source, shuffle=False), 20)) == 20


def test_nothing_but_bad_images():
    with pytest.raises(DataError, match="no usable example among 40"):
        next(iter(make(Numbers(40, bad=range(40)))))


def test_unreadable_files_count_as_bad(tmp_path):
    class Vanishing(Numbers):
        def __getitem__(self, i):
            if i == 3:
                raise FileNotFoundError("picture-3.png")
            return super().__getitem__(i)

        def __getitems__(self, indices):
            return [self[i] for i in indices]

    batches = iter(make(Vanishing(200), shuffle=False))
    assert next(batches)["index"].tolist() == [0, 1, 2, 4, 4, 5, 6, 7] and batches.bad == 1


def test_missing_captions():
    source, text = Numbers(40, silent={2}), {"tokenizer": TOKENIZER, "text_length": 12, "shuffle": False}
    with pytest.raises(DataError, match="caption of picture-2"):
        next(iter(make(source, **text)))
    assert TOKENIZER.decode(next(iter(make(source, **text, captions="empty")))["text"])[1:4] == [
        "number 1",
        "",
        "number 3",
    ]
    assert next(iter(make(source, **text, captions="skip")))["index"].tolist()[:4] == [0, 1, 3, 3]
    assert next(iter(make(source, shuffle=False)))["index"].tolist()[:3] == [0, 1, 2]  # no text, nothing missing


def test_several_captions_are_drawn_from():
    class Several(Numbers):
        def __getitem__(self, i):
            return super().__getitem__(i) | {"caption": ["one", "two"]}

    batch = next(iter(make(Several(200), batch_size=100, keys=("caption",))))
    assert 25 < (batch["caption"] == "one").sum() < 75


def test_files_of_every_mode_through_the_pipeline(tmp_path):
    rng = np.random.default_rng(0)
    kinds = {
        "L": ("PNG", ()),
        "RGBA": ("PNG", (4,)),
        "CMYK": ("JPEG", (4,)),
        "RGB": ("WEBP", (3,)),
        "I;16": ("PNG", ()),
    }
    for mode, (kind, channels) in kinds.items():
        high, dtype = (65536, np.uint16) if mode == "I;16" else (256, np.uint8)
        pixels = rng.integers(0, high, (20, 30, *channels), dtype)
        file = io.BytesIO()
        image = Image.fromarray(pixels) if mode != "CMYK" else Image.frombytes("CMYK", (30, 20), pixels.tobytes())
        assert image.mode == mode
        image.save(file, kind)
        (tmp_path / f"{mode.replace(';', '')}.{kind.lower()}").write_bytes(file.getvalue())
        (tmp_path / f"{mode.replace(';', '')}.txt").write_text(mode)
    source = open_source(f"folder:{tmp_path}")
    batch = next(iter(make(source, batch_size=5, keys=("image", "caption"), max_bad_fraction=0.0)))
    assert batch["image"].shape == (5, 8, 8, 3) and set(batch["caption"]) == set(kinds)
    assert (batch["image"].reshape(5, -1).std(1) > 5).all()


def test_cached_records_through_workers(tmp_path):
    cache_source(Numbers(), tmp_path / "c")
    source = open_source(f"arrayrecord:{tmp_path}/c")
    with iter(make(source, workers=1)) as batches:
        assert_same(take(batches, 3), take(make(), 3))


# ----------------------------------------------------------------------------------------------------------- devices


@pytest.fixture(scope="module")
def sharding():
    return NamedSharding(Mesh(np.array(jax.devices()), ("data",)), PartitionSpec("data"))


def test_prefetch_gives_the_same_batches_on_the_mesh(sharding):
    want = take(make(keys=("image", "caption")), 6)
    with prefetch_to_device(iter(make(keys=("image", "caption"))), sharding) as batches:
        got = take(batches, 6)
    assert isinstance(got[0]["image"], jax.Array) and got[0]["image"].sharding == sharding
    assert isinstance(got[0]["caption"], np.ndarray) and batches.wait_seconds > 0
    assert_same(want, got)


def test_prefetch_state_is_that_of_consumed_batches(sharding):
    want = take(make(), 9)
    batches = prefetch_to_device(iter(make()), sharding, size=3)
    start = batches.get_state()
    head = take(batches, 4)
    while batches._ready.qsize() < 3:  # three more wait on the device; they must not count
        pass
    state = json.loads(json.dumps(batches.get_state()))
    assert state["batches"] == 4
    resumed = prefetch_to_device(iter(make()), sharding)
    resumed.set_state(state)
    assert_same(head + take(resumed, 5), want)
    batches.close()  # what was prepared is dropped, the position stays
    assert_same(take(batches, 2), want[4:6])
    batches.set_state(start)
    assert_same(take(batches, 2), want[:2])
    batches.close(), resumed.close()


def test_prefetch_ends_and_raises(sharding):
    with prefetch_to_device(iter(make(repeat=False)), sharding) as batches:
        assert len(list(batches)) == 5 and list(batches) == []
    with prefetch_to_device(
        iter(make(Numbers(40, silent={39}), tokenizer=TOKENIZER, shuffle=False)), sharding
    ) as batches:
        assert len(take(batches, 4)) == 4
        for _ in range(2):
            with pytest.raises(DataError, match="picture-39"):
                next(batches)
