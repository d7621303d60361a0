"""Aspect-ratio buckets: one size a batch, everything used once an epoch, the same on any hosts, resumable anywhere."""

import io
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from tests.conftest import quick_compilation
from tests.convert.tables import draw
from vgen import features as caches
from vgen import trees
from vgen.config import ConfigError, build
from vgen.data import buckets, images
from vgen.data.buckets import Buckets, Plan, nearest, published, table_of
from vgen.data.images import DataError, ImageError
from vgen.data.pipeline import Pipeline
from vgen.stages import Run
from vgen.types import Context

TABLE = ((8, 16), (12, 12), (16, 8))
SIZES = [(20, 40), (30, 31), (40, 22), (24, 24), (11, 23), (30, 38)]  # twice as many squares as others


class Pictures:
    """Example i: its red is i, green runs down and blue to the right; those in `bad` do not decode."""

    def __init__(self, n=47, bad=()):
        self.n, self.bad = n, set(bad)

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        h, w = SIZES[i % len(SIZES)]
        rows, columns = np.meshgrid(np.linspace(0, 255, h), np.linspace(0, 255, w), indexing="ij")
        image = np.stack([np.full((h, w), i), rows, columns], -1).astype(np.uint8)
        return {"image": b"junk" if i in self.bad else image, "label": i, "name": f"picture-{i}", "caption": str(i)}


def sizes(n=47):
    return np.array([SIZES[i % len(SIZES)] for i in range(n)], np.int32)


def make(source=None, **options):
    source = source or Pictures()
    plan = Buckets(table_of(TABLE), sizes(len(source)))
    return Pipeline(source, **{"batch_size": 4, "buckets": plan, "seed": 3, **options})


def take(batches, n):
    return list(itertools.islice(batches, n))


def same(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b):
        assert x.keys() == y.keys()
        for key in x:
            np.testing.assert_array_equal(x[key], y[key], err_msg=key)


# ----------------------------------------------------------------------------------------------------------- the sizes


def test_published_tables():
    """SDXL's appendix I, which PixArt's ASPECT_RATIO_1024 repeats; 512 and 256 are half and a quarter of it."""
    table = published(1024)
    assert len(table) == len(set(table)) == 40 and (1344, 704) not in table
    assert table[:5] == ((512, 2048), (512, 1984), (512, 1920), (512, 1856), (576, 1792))
    assert table[19:22] == ((960, 1024), (1024, 1024), (1024, 960)) and table[-1] == (2048, 512)
    assert {(832, 1216), (1216, 832), (768, 1344), (1664, 576), (1472, 704)} < set(table)
    ratios = [height / width for height, width in table]
    assert ratios == sorted(ratios) and all(0.9 < h * w / 1024**2 <= 1 for h, w in table)
    assert published(256) == tuple((h // 4, w // 4) for h, w in table)
    np.testing.assert_array_equal(table_of(512), np.array(table) // 2)


@pytest.mark.parametrize("wrong", [(), ((8,),), ((8, 0),), ((8, 8), (8, 8)), 100, 0])
def test_wrong_tables(wrong):
    with pytest.raises(ValueError, match="buckets: "):
        table_of(wrong)


def test_nearest_ratio():
    rng, table = np.random.default_rng(0), table_of(1024)
    some = rng.integers(64, 3000, (2000, 2)).astype(np.int32)
    far = np.abs(some[:, :1] / some[:, 1:] - (table[:, 0] / table[:, 1])[None])
    np.testing.assert_allclose(far[np.arange(2000), nearest(some, table)], far.min(1))
    order = rng.permutation(40)
    np.testing.assert_array_equal(table[order][nearest(some, table[order])], table[nearest(some, table)])
    assert nearest(some, table_of([(8, 8)])).max() == 0


def test_sizes_from_headers(tmp_path):
    def encoded(height, width, turned=1, kind="JPEG"):
        exif = Image.Exif()
        exif[0x0112] = turned
        file = io.BytesIO()
        Image.fromarray(np.zeros((height, width, 3), np.uint8)).save(file, kind, exif=exif)
        return file.getvalue()

    data = [encoded(20, 30), encoded(20, 30, turned=6), encoded(31, 17, kind="PNG"), np.zeros((5, 6, 3), np.uint8)]
    assert [images.size_of(one) for one in data] == [(20, 30), (30, 20), (31, 17), (5, 6)]
    assert all(images.decode(one).shape[:2] == images.size_of(one) for one in data)
    assert images.size_of(data[0][:-20]) == (20, 30)  # no pixel is looked at
    with pytest.raises(ImageError, match="without a size"):
        images.size_of(b"junk")
    found = buckets.scan([{"image": one} for one in [*data, b"junk"]])
    assert found.tolist() == [[20, 30], [30, 20], [31, 17], [5, 6], [1, 1]]


# ---------------------------------------------------------------------------------------------------------------- plans


def test_everything_comes_once_an_epoch_and_leftovers_wait():
    """Against the queues that the plan stands for: each example joins its bucket's, a full one leaves as a batch."""
    plan = Plan(Buckets(table_of(TABLE), sizes()), 4, 3, shuffle=True, repeat=True)
    counts = np.bincount(plan.which)
    assert (counts == [16, 23, 8]).all() and len(plan) == 12
    rows = [plan[k] for k in range(141)]  # 12 epochs of 47 are 141 batches of 4
    seen = np.bincount(np.concatenate([row.indices for row in rows]), minlength=47)
    assert (seen == 12).all()
    assert all((plan.which[row.indices] == row.bucket).all() and row.valid == 4 for row in rows)
    for bucket, count in enumerate(counts):
        stream = np.concatenate([row.indices for row in rows if row.bucket == bucket])
        epochs = stream.reshape(12, count)
        assert (np.sort(epochs, 1) == np.flatnonzero(plan.which == bucket)).all() and (epochs[0] != epochs[1]).any()
    waiting, given, epoch = [0, 0, 0], [], 0
    while len(given) < 141:
        for i in buckets._permutation(47, 3, epoch):
            waiting[plan.which[i]] += 1
            if waiting[plan.which[i]] == 4:
                given.append(plan.which[i])
                waiting[plan.which[i]] = 0
        epoch += 1
    assert [row.bucket for row in rows] == given
    far = 3_000_000_000  # any batch, at once
    same_epoch = [plan[far + k] for k in range(3)]
    assert all((plan.which[row.indices] == row.bucket).all() for row in same_epoch)


def test_rare_and_unused_buckets():
    few = np.array([(10, 10)] * 30 + [(8, 16)], np.int32)
    plan = Plan(Buckets(table_of(TABLE), few), 4, 0, shuffle=True, repeat=True)
    rows = [plan[k] for k in range(31)]  # four epochs
    assert sum(row.bucket == 0 for row in rows) == 1  # the one wide picture, four times
    assert [row.indices.tolist() for row in rows if row.bucket == 0] == [[30] * 4]
    assert not any(row.bucket == 2 for row in rows)
    with pytest.raises(DataError, match="no bucket with 32 pictures"):
        Plan(Buckets(table_of(TABLE), few), 32, 0, shuffle=False, repeat=False)


def test_one_pass_drops_or_pads():
    dropped = list(make(shuffle=False, repeat=False))
    assert len(dropped) == 4 + 5 + 2
    padded = list(make(shuffle=False, repeat=False, remainder="pad"))
    assert len(padded) == len(make(shuffle=False, repeat=False, remainder="pad")) == 12
    index, valid = (np.concatenate([batch[key] for batch in padded]) for key in ("index", "valid"))
    assert sorted(index[valid].tolist()) == list(range(47)) and valid.sum() == 47 and (~valid).sum() == 1
    same([{k: v for k, v in batch.items() if k != "valid"} for batch in padded[:11]], dropped)


# -------------------------------------------------------------------------------------------------------------- batches


def placed(image, whole, corner):
    """Whether the picture's colours say that this part of it was kept."""
    got = image[..., 1].mean(), image[..., 2].mean()
    return all(
        abs(mean - (first + (side - 1) / 2) / (sides - 1) * 255) < 6
        for mean, first, side, sides in zip(got, corner, image.shape, whole)
    )


def parts(batch):
    """(picture, its place in the source, size before the crop, corner, size in the file) of each example."""
    h, w = batch["image"].shape[1:3]
    for image, i, original, corner in zip(*(batch[key] for key in ("image", "index", "original", "corner"))):
        scale = max(h / original[0], w / original[1])
        yield image, i, np.maximum((h, w), np.round(original * scale)), corner, original


def test_a_batch_has_one_size_and_says_what_was_done():
    for batch in take(make(), 24):
        h, w = batch["image"].shape[1:3]
        assert (h, w) in TABLE and (batch["target"] == (h, w)).all() and batch["label"].dtype == np.int32
        for image, i, whole, corner, original in parts(batch):
            assert tuple(original) == SIZES[i % 6] and (image[..., 0] == i).all()
            assert (corner == (whole - (h, w)) // 2).all() and 0 in corner and placed(image, whole, corner)
    assert all(batch[key].dtype == np.float32 for key in ("original", "corner", "target"))


def test_random_crops_and_flips_say_where_they_are():
    seen = set()
    for batch in take(make(crop="random_crop", flip=True), 60):
        for image, _, whole, corner, _ in parts(batch):
            flipped = bool(image[0, 0, 2] > image[0, -1, 2])
            # mirrored, the corner is that of the mirrored picture
            where = (corner[0], whole[1] - image.shape[1] - corner[1]) if flipped else corner
            assert placed(image[:, ::-1] if flipped else image, whole, where)
            assert (corner >= 0).all() and (corner + image.shape[:2] <= whole).all()
            seen.add((flipped, *corner.tolist()))
    assert {flipped for flipped, *_ in seen} == {True, False} and {left for *_, left in seen} >= {0, 1, 2, 3}


def test_hosts_share_one_batch():
    options = dict(crop="random_crop", flip=True)
    whole = take(make(**options), 9)
    parts = [take(make(**options, process_index=p, process_count=2), 9) for p in range(2)]
    same(whole, [{key: np.concatenate([b[key] for b in bs]) for key in bs[0]} for bs in zip(*parts)])


def test_exact_continuation():
    options, want = dict(crop="random_crop", flip=True), take(make(crop="random_crop", flip=True), 30)
    for k in (1, 11, 17, 29):
        with iter(make(**options)) as first:
            take(first, k)
            state = json.loads(json.dumps(first.get_state()))
        with iter(make(**options)) as second:
            second.set_state(state)
            same(take(second, 30 - k), want[k:])
    other = Buckets(table_of(((12, 12), (16, 8))), sizes())
    with pytest.raises(DataError, match="position in the data: got buckets="):
        iter(make(buckets=other)).set_state(state)


def test_bad_pictures_are_replaced_by_some_of_their_bucket():
    source = Pictures(200, bad={6, 7})
    batches = iter(make(source, shuffle=False, max_bad_fraction=0.02))
    seen = take(batches, 49)
    assert batches.bad == 2 and not {6, 7} & set(np.concatenate([batch["index"] for batch in seen]).tolist())
    assert [row for row in seen if 10 in row["index"]][0]["index"].tolist().count(10) == 2  # for 6, of the same shape


@pytest.mark.parametrize("crop", ["resize", "pad"])
def test_wrong_crops(crop):
    with pytest.raises(ValueError, match="with buckets, crop must be center_crop or random_crop"):
        make(crop=crop)


# ------------------------------------------------------------------------------------------------------------- training

TASK = dict(
    target="vgen.tasks.diffuse:Diffuse", size=12, max_steps=6, micro="crop", drop=0.4,
    network=dict(target="tests.data.toy_net:Net", added=True),
    schedule=dict(target="vgen.diffusion.schedules:discrete",
                  betas=dict(target="vgen.diffusion.schedules:betas", name="scaled_linear")),
    vae=dict(target="vgen.models.autoencoder:AutoencoderKL", channels=8, multipliers=(1,), patch=4, blocks=1,
             latent_channels=4, groups=4, mid_attention=False,
             layout=dict(target="vgen.models.vqgan:Layout", local=True, mid_blocks=1, mid_attention=False,
                         decoder_extra=0, out_kernel=1)),
    text_encoder=dict(target="vgen.models.text:TextTransformer", vocab=260, length=4, depth=1, width=8, heads=2,
                      mlp_dim=16),
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Captioned pictures of three shapes, of which one batch of four holds two."""
    path = tmp_path_factory.mktemp("pictures")
    for i in range(12):
        image = Pictures()[6 * (i // 3) + i % 3]["image"]
        images.save_png(path / f"{i:02d}.png", image)
        (path / f"{i:02d}.txt").write_text(f"{i}")
    return path


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    batch = {"text": jnp.ones((1, 4), jnp.int32), "text_mask": jnp.ones((1, 4), bool)}
    file = tmp_path_factory.mktemp("weights") / "weights.npz"
    np.savez(file, **trees.flatten(draw(build(TASK), batch)))
    return file


def config(folder, weights, steps=6, cache=None, table=TABLE):
    stage = dict(
        task=TASK, data=dict(source=f"folder:{folder}", buckets=table), cache=cache or {},
        train=dict(steps=steps, batch_size=4, optim=dict(main=dict(lr=1e-3)), log_every=1),
        init={part: dict(file=str(weights), part=part) for part in ("vae", "text_encoder")},
    )  # fmt: skip
    text = dict(kind="bpe", length=4, vocab_size=260)
    return ConfigDict(dict(name="t", scale="tiny", seed=0, order=("unet",), stages=dict(unet=stage), text=text))


@pytest.fixture
def steps_compiled():
    """A list that grows by one with every compilation of a train step."""
    found = []

    def listen(event, duration, **kwargs):
        if event == "/jax/core/compile/backend_compile_duration" and kwargs.get("fun_name") == "jit(step)":
            found.append(kwargs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield found
    jax.monitoring.unregister_event_duration_listener(listen)


def losses(run):
    rows = [json.loads(line) for line in (run.folder("unet") / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def trained(tmp_path, *args, **kwargs):
    run = Run(config(*args, **kwargs), tmp_path)
    run.claim()
    with quick_compilation():
        run.train_stage("unet")
    return run


def test_training_compiles_once_a_bucket_and_the_cache_changes_nothing(folder, weights, tmp_path, steps_compiled):
    """Six batches of four in three shapes, two epochs of twelve: each shape is one program."""
    plain = trained(tmp_path / "plain", folder, weights)
    assert len(steps_compiled) == 3
    assert len(list((tmp_path / "plain/cache").glob("sizes-folder-train-*.npy"))) == 1
    both = dict(features=("latents", "text"), dtype="float32", shard_size=4)
    cached = Run(config(folder, weights, cache=both), tmp_path / "cached")
    with quick_compilation():
        caches.build(cached, "unet")
    features = caches.kept(cached, "unet")
    assert {"original", "corner", "target", "latent_mean", "context"} < set(features.keys) and len(features) == 12
    table = features.buckets()
    assert {tuple(size) for size in table.table.tolist()} == set(TABLE) and len(table.sizes) == 12
    assert len(losses(plain)) == 6 and np.isfinite(losses(plain)).all()
    with plain.batches("unet") as a, cached.batches("unet", cached=True) as b:
        for one, two in itertools.islice(zip(a, b), 3):
            assert two["latent_mean"].shape[1:3] == tuple(two["target"][0].astype(int) // 4)
            assert one["image"].shape[1:3] == tuple(one["target"][0].astype(int))
    # the same examples with the same key: their order is another one, as the files hold them by bucket
    task = plain.task("unet")
    with np.load(weights) as file:
        params = trees.unflatten({name: jnp.asarray(file[name]) for name in file.files})
    empty = {name: jnp.asarray(x) for name, x in features.empty().items()}
    value = jax.jit(lambda p, b: task.losses(p, Context(jnp.int32(3)), b, jax.random.key(0))["main"].value)
    source, indices = features.source(), features.indices()
    with plain.batches("unet") as batches, quick_compilation():
        batch = next(batches)
        rows = [source[int(np.flatnonzero(indices == i)[0])] for i in np.asarray(batch["index"])]
        stacked = {key: jnp.stack([jnp.asarray(row[key]) for row in rows]) for key in features.keys}
        want, got = value(params, batch), value({**params, "empty": empty}, stacked)
        moved = value({**params, "empty": empty}, stacked | {"original": stacked["original"] + 100})
    np.testing.assert_allclose(got, want, rtol=1e-6)
    assert abs(moved - want) > 1e-4 * want


def test_wrong_buckets_are_named(folder, weights, tmp_path):
    with pytest.raises(ValueError, match="a picture of 10 x 14 is no multiple of 4 pixels per latent"):
        trained(tmp_path / "a", folder, weights, table=((10, 14),))
    with pytest.raises(ConfigError, match="stages.unet.data.buckets: expected"):
        Run(config(folder, weights, table="square"), tmp_path / "b")
    with pytest.raises(ConfigError, match="buckets: the side of the published table must be a multiple of 16"):
        Run(config(folder, weights, table=500), tmp_path / "c").layout("unet")
