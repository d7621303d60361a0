"""Features computed once: the same losses as without, refused where they are stale, resumed where they were cut off."""

import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from tests.conftest import quick_compilation
from tests.convert.tables import draw
from vgen import features as caches
from vgen import trees
from vgen.config import ConfigError, UserError, build
from vgen.data.features import Features, OneCaption
from vgen.data.images import DataError
from vgen.data.pipeline import Pipeline
from vgen.stages import Run
from vgen.train import Stopped
from vgen.types import Context

WORLD = dict(max_objects=1)
LENGTH, SIZE, COUNT = 40, 16, 22
LOCAL = dict(target="vgen.models.vqgan:Layout", local=True, mid_blocks=1, mid_attention=False, decoder_extra=0,
             out_kernel=1)  # fmt: skip
TASK = dict(
    target="vgen.tasks.diffuse:Diffuse", size=SIZE, max_steps=6, scale_by_std=True, drop=0.4,
    network=dict(target="tests.data.toy_net:Net"),
    schedule=dict(target="vgen.diffusion.schedules:discrete",
                  betas=dict(target="vgen.diffusion.schedules:betas", name="scaled_linear")),
    vae=dict(target="vgen.models.autoencoder:AutoencoderKL", channels=8, multipliers=(1,), patch=4, blocks=1,
             latent_channels=4, groups=4, mid_attention=False, layout=LOCAL),
    text_encoder=dict(target="vgen.models.text:TextTransformer", vocab=260, length=LENGTH, depth=1, width=8, heads=2,
                      mlp_dim=16),
)  # fmt: skip
CONTEXT, KEY = Context(jnp.int32(3)), jax.random.key(0)
BOTH = dict(features=("latents", "text"), dtype="float32", shard_size=8)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file with random parameters of every part of the task."""
    batch = {"text": jnp.ones((1, LENGTH), jnp.int32), "text_mask": jnp.ones((1, LENGTH), bool)}
    file = tmp_path_factory.mktemp("weights") / "weights.npz"
    np.savez(file, **trees.flatten(draw(build(TASK), batch)))
    return file


def config(weights, cache, task=(), data=(), evaluate=True, **train):
    """One stage of two steps; every part of it begins with the weights of the file."""
    world = dict(world=WORLD, count=COUNT)
    stage = dict(
        task={**TASK, **dict(task)}, data=dict(source="scenes", size=SIZE, options=world, **dict(data)), cache=cache,
        train=dict(steps=2, batch_size=4, optim=dict(main=dict(lr=1e-3)), log_every=1) | train,
        init={part: dict(file=str(weights), part=part) for part in ("vae", "text_encoder", "network")},
        evaluate=dict(batches=2, split="heldout", options=world | dict(count=9)) if evaluate else {},
    )  # fmt: skip
    text = dict(kind="bpe", length=LENGTH, vocab_size=260)
    return ConfigDict(dict(name="t", scale="tiny", seed=0, order=("unet",), stages=dict(unet=stage), text=text))


def made(weights, workdir, cache=BOTH, **changed):
    run = Run(config(weights, cache, **changed), workdir)
    run.claim()
    return run


@pytest.fixture(scope="module")
def trained(weights, tmp_path_factory):
    """{whether features are cached: a run trained for two steps}."""
    folder, runs = tmp_path_factory.mktemp("runs"), {}
    for name, cache in (("plain", {}), ("cached", BOTH)):
        runs[name] = made(weights, folder / name, cache)
        with quick_compilation():
            runs[name].train_stage("unet")
    return runs


def logged(run):
    rows = [json.loads(line) for line in (run.folder("unet") / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row], json.loads((run.folder("unet") / "eval.json").read_text())


def test_a_run_from_the_cache_is_the_run_without(trained):
    """The same batches, keys and losses, training and held-out, and the same weights after two steps."""
    (plain, held_plain), (cached, held_cached) = (logged(trained[name]) for name in ("plain", "cached"))
    assert len(plain) == 2 and plain[0] != plain[1]
    np.testing.assert_allclose(cached, plain, rtol=1e-6)
    assert {"loss", "loss_no_condition"} < set(held_plain) == set(held_cached)
    for name, value in held_plain.items():
        np.testing.assert_allclose(held_cached[name], value, rtol=2e-6)
    (a, step), (b, _) = (trained[name].weights("unet") for name in ("plain", "cached"))
    assert step == 2 and set(a) == set(b)
    for path, value in a.items():
        np.testing.assert_allclose(b[path], value, rtol=1e-4, atol=1e-5)


def test_encoders_are_not_in_memory(trained):
    parts = lambda cached: {path.split("/")[0] for path in trained["cached"].layout("unet", cached).shapes}
    assert parts(False) == {"latents", "network", "text_encoder", "vae"}
    assert parts(True) == {"latents", "network", "empty"}


def test_what_is_kept(trained):
    features = caches.kept(trained["cached"], "unet")
    assert len(features) == COUNT and len(list(features.folder.glob("*.arrayrecord"))) == 3
    assert set(features.keys) == {"latent_mean", "latent_std", "context", "context_mask"}
    examples = [features.source()[i] for i in range(COUNT)]
    assert [example["source_index"] for example in examples] == list(range(COUNT)) == features.indices().tolist()
    assert examples[0]["latent_mean"].shape == (4, 4, 4) and examples[0]["context"].shape == (LENGTH, 8)
    assert set(features.empty()) == {"context", "context_mask"}
    assert len(caches.kept(trained["cached"], "unet", held_out=True)) == 8  # two batches are measured on


def test_losses_depend_on_every_feature_and_the_dropped_ones_on_none(trained):
    run = trained["cached"]
    task, (flat, _) = run.task("unet"), run.weights("unet")
    with run.batches("unet", cached=True) as batches:
        batch = next(batches)
    empty = trees.add_prefix(caches.kept(run, "unet").empty(), "empty")
    params = trees.unflatten({path: value for path, value in flat.items() if path[0] in "nl"} | empty)

    @functools.partial(jax.jit, static_argnums=2)
    def value(batch, params, drop):
        return build(TASK | dict(drop=drop)).losses(params, CONTEXT, batch, KEY)["main"].value

    loss = lambda changed={}, params=params, drop=1e-9: float(value({**batch, **changed}, params, drop))
    with quick_compilation():
        plain, dropped = loss(), loss(drop=1.0)
        for name in ("latent_mean", "latent_std", "context"):
            changed = {name: jnp.flip(batch[name], 0)}
            assert loss(changed) != plain and (name[0] == "l" or loss(changed, drop=1.0) == dropped)
        assert loss({"context_mask": jnp.ones_like(batch["context_mask"])}) != plain
        other = {**params, "empty": {**params["empty"], "context": params["empty"]["context"] + 1}}
        assert loss(params=other) == plain and loss(params=other, drop=1.0) != dropped
    assert task.feature_parts(("latents",)) == ["vae"]


@pytest.mark.parametrize("dtype, far", [("float16", 1e-3), ("bfloat16", 8e-3)])
def test_half_precision(trained, tmp_path, dtype, far):
    """As far from what was computed as rounding, and read back in the dtype that it lies in."""
    whole = caches.kept(trained["cached"], "unet").source()
    examples = [{key: x for key, x in whole[i].items() if key != "name"} for i in range(9)]
    features = Features(tmp_path / "f", {"a": 1}, dtype)
    features.begin()
    for shard in range(2):
        features.write(shard, 2, examples[shard * 5 : shard * 5 + 5])
    features.finish(True, {})
    again = Features(tmp_path / "f", {"a": 1}, dtype)
    assert len(again) == 9 and again.complete and again.empty() == {} and again.buckets() is None
    batch = next(iter(Pipeline(again.source(), batch_size=9, shuffle=False, keys=again.keys)))
    assert batch["context"].dtype.name == batch["latent_mean"].dtype.name == dtype
    assert batch["context_mask"].dtype == bool and batch["index"].tolist() == list(range(9))
    for name in ("latent_mean", "latent_std", "context"):
        want = np.stack([example[name] for example in examples])
        assert 0 < np.abs(batch[name].astype(np.float32) - want).max() <= far * np.abs(want).max()


def test_a_number_that_float16_does_not_hold(tmp_path):
    features = Features(tmp_path / "f", {}, "float16")
    features.begin()
    with pytest.raises(DataError, match=r"context of 7e\+04.*float16.*set dtype='bfloat16'"):
        features.write(0, 1, [{"source_index": 0, "context": np.float32([1, 7e4])}])
    assert features.missing(1) == [0]


def test_a_killed_pass_goes_on(trained, weights, tmp_path, monkeypatch):
    run = made(weights, tmp_path / "run", evaluate=False)
    seen = iter([False] * 3 + [True])  # in the second file of three
    with quick_compilation(), pytest.raises(Stopped, match="stopped after 3 of 6 batches of features"):
        caches.build(run, "unet", lambda: next(seen))
    features = caches.kept(run, "unet")
    first = sorted(features.folder.glob("*.arrayrecord"))
    assert [path.name for path in first] == ["data-00000-of-00003.arrayrecord"] and not features.complete
    before = first[0].stat().st_mtime_ns
    (features.folder / "data-00001-of-00003.part").write_bytes(b"half")
    again = Run(config(weights, BOTH, evaluate=False), tmp_path / "run")
    with quick_compilation():
        caches.build(again, "unet")
    assert first[0].stat().st_mtime_ns == before and not list(features.folder.glob("*.part"))
    got, want = caches.kept(again, "unet").source(), caches.kept(trained["cached"], "unet").source()
    assert len(got) == len(want)
    for i in range(COUNT):
        np.testing.assert_allclose(got[i]["latent_mean"], want[i]["latent_mean"], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(got[i]["context"], want[i]["context"], rtol=1e-5, atol=1e-6)
    monkeypatch.setattr(caches, "_Encoder", None)  # complete: no encoder is made any more
    assert set(caches.build(again, "unet")) == {"empty/context", "empty/context_mask"}


def test_stale_features_are_refused(trained, weights, tmp_path):
    folder = tmp_path / "features"
    shutil.copytree(trained["cached"].workdir / "cache" / "features-unet", folder)
    there = BOTH | dict(path=str(folder))
    assert caches.kept(made(weights, tmp_path / "same", there), "unet").complete  # another workdir, the same weights
    other = dict(np.load(weights))
    other["vae/encoder/conv_in/bias"] = other["vae/encoder/conv_in/bias"] + 1
    np.savez(tmp_path / "other.npz", **other)
    cases = {
        "encoders.weights.vae.file": dict(weights=tmp_path / "other.npz"),
        "data.captions": dict(data=dict(captions="empty")),
        "dtype: 'float32' -> 'bfloat16'": dict(cache=there | dict(dtype="bfloat16")),
        "encoders.networks.text_encoder.depth": dict(task=dict(text_encoder=TASK["text_encoder"] | dict(depth=2))),
    }
    for i, (named, changed) in enumerate(cases.items()):
        run = made(**{"weights": weights, "workdir": tmp_path / f"run{i}", "cache": there, **changed})
        with pytest.raises(UserError, match=rf"stale.*delete the folder.*cache.path(?s:.*){named}"):
            run.train_stage("unet")
    lost = sorted(folder.glob("train/*.arrayrecord"))[1]
    lost.unlink()
    with pytest.raises(DataError, match=f"missing {lost.name}"):
        made(weights, tmp_path / "last", there).train_stage("unet")
    (tmp_path / "full" / "train").mkdir(parents=True)
    (tmp_path / "full" / "train" / "x").touch()
    with pytest.raises(DataError, match="files but no manifest.json"):
        made(weights, tmp_path / "full_run", BOTH | dict(path=str(tmp_path / "full"))).train_stage("unet")


@pytest.mark.parametrize(
    "changed, message",
    [
        (dict(cache=BOTH, task=dict(train_text=True)), "'text' cannot be computed once: the text_encoder is trained"),
        (dict(cache=BOTH, data=dict(flip=True)), "data.flip = True changes pictures at random"),
        (dict(cache=BOTH, data=dict(crop="random_crop")), "data.crop = 'random_crop' changes pictures at random"),
        (dict(cache=dict(features=("latents",)), task=dict(vae=None)), "need a vae, which the task has not"),
        (dict(cache=dict(features=("pixels",))), "features must be some of latents, text"),
        (dict(cache=BOTH | dict(dtype="int8")), "dtype must be one of float32"),
        (dict(cache=BOTH | dict(shards=3)), "cache.shards: CacheConfig does not take it"),
        (dict(cache=BOTH, task=dict(target="tests.toy:Linear")), "Linear trains on pictures alone"),
    ],
)
def test_what_cannot_be_cached_is_refused_at_once(weights, tmp_path, changed, message):
    changed = dict(changed)
    if "target" in changed.get("task", {}):
        made_config = config(weights, changed["cache"], evaluate=False)
        made_config.stages.unet.task = ConfigDict(changed["task"])
    else:
        made_config = config(weights, **changed)
    with pytest.raises(ConfigError, match=message):
        Run(made_config, tmp_path)


def test_several_captions_are_refused():
    source = OneCaption([{"caption": ["one"], "name": "a"}, {"caption": ["one", "two"], "name": "b"}])
    assert len(source) == 2 and source[0]["caption"] == ["one"]
    with pytest.raises(DataError, match="captions of b: got 2, of which training draws one"):
        source[1]


@pytest.mark.parametrize(
    "kind, more", [("text", dict(data=dict(flip=True))), ("latents", dict(task=dict(train_text=True)))]
)
def test_one_kind_alone(weights, tmp_path, kind, more):
    """With the text alone, pictures are read and mirrored; with the latents alone, the text is read and trained."""
    run = made(weights, tmp_path / "run", BOTH | dict(features=(kind,)), evaluate=False, **more)
    with quick_compilation():
        caches.build(run, "unet")
    layout = run.layout("unet", True)
    parts = {path.split("/")[0] for path in layout.shapes}
    assert parts == {"latents", "network"} | ({"vae", "empty"} if kind == "text" else {"text_encoder"})
    with run.batches("unet", cached=True) as batches:
        batch = next(batches)
    has = {"image", "context", "context_mask"} if kind == "text" else {"latent_mean", "latent_std", "text", "text_mask"}
    assert set(batch) == has | {"index"}
    with run.batches("unet") as raw:
        name = "image" if kind == "text" else "text"
        np.testing.assert_array_equal(batch[name], next(raw)[name])
    task = run.task("unet")
    value = jax.eval_shape(lambda p: task.losses(trees.unflatten(p), CONTEXT, batch, KEY)["main"].value, layout.shapes)
    assert value.shape == ()
