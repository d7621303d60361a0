"""Folders, shards and pipelines of weights, and the hub: what is read, and what is refused with one sentence."""

import json

import numpy as np
import pytest

from tests.convert.files import ARRAYS, mutated, refused, safetensors, same
from vgen.config import UserError
from vgen.convert import families, formats, hub, sources


def shard(folder, stem="model"):
    """ARRAYS in two files and an index."""
    files = [f"{stem}-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for file, prefix in zip(files, "ab"):
        safetensors(folder / file, {name: a for name, a in ARRAYS.items() if name[0] == prefix})
    places = {name: files["ab".index(name[0])] for name in ARRAYS}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(dict(metadata={}, weight_map=places)))
    return places


@pytest.mark.parametrize("stem", ["model", "diffusion_pytorch_model"])
def test_shards(stem, tmp_path):
    shard(tmp_path, stem)
    (tmp_path / "config.json").write_text('{"architectures": ["T"]}')
    same(sources.read_weights(tmp_path))
    assert sources.open_source(tmp_path).config == {"architectures": ["T"]}


@pytest.mark.parametrize(
    "file", ["../model.safetensors", "/etc/model.safetensors", "sub/x.safetensors", "..\\x.safetensors", "..", "",
             "c:x.bin", "x\0.safetensors", "passwd"],
)  # fmt: skip
def test_an_index_that_points_elsewhere(file, tmp_path):
    places = shard(tmp_path)
    safetensors(tmp_path.parent / "model.safetensors")  # it is there, and must not be read
    places["a.weight"] = file
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(dict(weight_map=places)))
    refused(tmp_path, "suffix" if file == "passwd" else "points outside its folder")


@pytest.mark.parametrize(
    "index, message",
    [
        ("", "JSON"),
        ("[]", "object"),
        ("{}", "weight_map"),
        ('{"weight_map": {}}', "weight_map"),
        ('{"weight_map": ["a"]}', "weight_map"),
        ('{"weight_map": {"a": 3}}', "weight_map"),
        ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "'a' stands there twice"),
        ('{"weight_map": {"a": "gone.safetensors"}}', "there is no weight file"),
        ("[" * 100_000, "JSON"),
    ],
)
def test_indices_that_are_none(index, message, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(index)
    refused(tmp_path, message)


def test_an_index_and_its_files_must_agree(tmp_path):
    places = shard(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps(dict(weight_map=places | {"new": places["a.half"]})))
    refused(tmp_path, "has not 'new'")
    del places["b.mask"]
    index.write_text(json.dumps(dict(weight_map=places)))
    refused(tmp_path, "also has 'b.mask'")


def test_fuzzed_indices_and_configs(tmp_path):
    shard(tmp_path)
    rng, index = np.random.default_rng(2), tmp_path / "model.safetensors.index.json"
    good = index.read_bytes()
    config = b'{"architectures": ["T5EncoderModel"], "d_model": 8, "deep": {"a": [1, 2.5, null]}}'
    for i in range(400):
        index.write_bytes(mutated(good, rng) if i % 2 else good)
        (tmp_path / "config.json").write_bytes(config if i % 2 else mutated(config, rng))
        try:
            sources.read_weights(tmp_path)
        except UserError as error:
            assert "\n" not in str(error)


def test_which_file_of_a_folder(tmp_path):
    refused(tmp_path, "no weights in this folder")
    np.savez(tmp_path / "odd.npz", a=np.zeros(2))
    assert set(sources.read_weights(tmp_path)) == {"a"}
    safetensors(tmp_path / "x.safetensors")
    safetensors(tmp_path / "y.safetensors")
    refused(tmp_path, "several weight files", "x.safetensors, y.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    safetensors(tmp_path / "model.safetensors")
    same(sources.read_weights(tmp_path))
    refused(tmp_path / "gone.safetensors", "there is no weight file")
    (tmp_path / "w.onnx").write_bytes(b"")
    refused(tmp_path / "w.onnx", "expected .safetensors")


def test_pipelines(tmp_path):
    for part in ("vae", "text_encoder", "scheduler"):
        (tmp_path / part).mkdir()
    safetensors(tmp_path / "vae" / "diffusion_pytorch_model.safetensors")
    shard(tmp_path / "text_encoder")
    (tmp_path / "scheduler" / "scheduler_config.json").write_text("{}")
    kinds = dict(
        _class_name="P", vae=["diffusers", "V"], text_encoder=["transformers", "T"], safety_checker=[None, None]
    )
    kinds |= dict(scheduler=["diffusers", "S"], tokenizer=["transformers", "T"], force_zeros=True)
    (tmp_path / "model_index.json").write_text(json.dumps(kinds))
    found = sources.open_source(tmp_path)
    assert list(found) == ["vae", "text_encoder"]
    same({name: t.read() for name, t in found["vae"].tensors.items()})
    refused(tmp_path, "pipeline of vae, text_encoder")
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text("{}")
    (tmp_path / "model_index.json").write_text(json.dumps(kinds | dict(unet=["diffusers", "U"])))
    refused(tmp_path, "config.json but no weights")
    (tmp_path / "model_index.json").write_text(json.dumps(kinds | {"../elsewhere": ["diffusers", "U"]}))
    refused(tmp_path, "points outside its folder")


def test_vgens_own_form_with_a_family_of_elsewhere(tmp_path):
    safetensors(tmp_path / "model.safetensors")
    own = dict(family="os:system", config={}, shapes={})
    (tmp_path / "vgen.json").write_text(json.dumps(own))
    with pytest.raises(UserError, match="'os:system' is not a family of vgen.convert"):
        families.find(sources.open_source(tmp_path))
    for change in (dict(family=3), dict(config=[]), dict(shapes={"a": [-1]})):
        (tmp_path / "vgen.json").write_text(json.dumps(own | change))
        refused(tmp_path, "vgen.json")


# --------------------------------------------------------------------------------------------------------------- hub


def test_addresses():
    assert hub.parse("hf:google/t5-v1_1-xxl") == ("google/t5-v1_1-xxl", "", None)
    assert hub.parse("hf:a/b/unet@refs/pr/1") == ("a/b", "unet", "refs/pr/1")
    for bad in ("hf:", "hf:t5", "hf:a/b@", "hf:../b", "hf:a/../b", "hf:a/b@../c", "hf:a/b c", "hf:/a/b"):
        with pytest.raises(UserError, match="not an address of the form"):
            hub.parse(bad)


def test_only_what_will_be_read_is_fetched():
    files = ["config.json", "README.md", "model.safetensors", "pytorch_model.bin", "flax_model.msgpack", "tf_model.h5"]
    assert hub.choose(files, sources.weight_files) == ["config.json", "model.safetensors"]
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)] + ["model.safetensors.index.json"]
    assert set(hub.choose(["model.fp16.safetensors", *shards], sources.weight_files)) == set(shards)
    vae = ["vae/config.json", "vae/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.fp16.safetensors"]
    assert hub.choose(["model_index.json", "sd.ckpt", *vae], sources.weight_files) == ["model_index.json", *vae[:2]]


def test_offline_there_is_one_sentence_and_the_cache(monkeypatch, tmp_path):
    hf = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    refused("hf:owner/name@v1", "hf:owner/name@v1: huggingface_hub is set to be offline; nothing of it is cached here")
    repo = tmp_path / "models--owner--name"
    snapshot = repo / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "v1").write_text("0" * 40)
    safetensors(snapshot / "model.safetensors")
    monkeypatch.setattr(hf, "snapshot_download", _with_cache(hf.snapshot_download, tmp_path))
    same(sources.read_weights("hf:owner/name@v1"))
    refused("hf:owner/name/unet@v1", "no folder 'unet'")


def _with_cache(function, folder):
    return lambda *args, **kwargs: function(*args, **kwargs, cache_dir=folder)


def test_what_the_hub_says(monkeypatch):
    hf = pytest.importorskip("huggingface_hub")

    class RepositoryNotFoundError(Exception):
        pass

    def fail(self, *args, **kwargs):
        raise error

    monkeypatch.setattr(hf.HfApi, "list_repo_files", fail)
    monkeypatch.setattr(hub, "_cached", lambda *args: None)
    error = RepositoryNotFoundError()
    refused("hf:owner/name", "there is no such repository")
    error = OSError("no route to host")
    refused("hf:owner/name", "cannot be reached (OSError: no route to host)")


def test_without_huggingface_hub(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refused("hf:owner/name", "pip install 'vgen[hub]'")


def test_open_clip_config_beside_its_weights(tmp_path):
    """A folder of both libraries: each weight file goes with its own config."""
    array = {"x": np.zeros(2, np.float32)}
    for name, config in (("config", {"architectures": ["CLIPModel"]}), ("open_clip_config", {"model_cfg": {}})):
        (tmp_path / f"{name}.json").write_text(json.dumps(config))
    for stem, family in (("open_clip_model", "OPEN_CLIP"), ("model", "HF_CLIP")):
        formats.write_safetensors(tmp_path / f"{stem}.safetensors", array)
        assert families.find(sources.open_source(tmp_path)) == f"vgen.convert.clip:{family}"
    alone = sources.open_source(tmp_path / "open_clip_model.safetensors")
    assert families.find(alone) == "vgen.convert.clip:OPEN_CLIP"
