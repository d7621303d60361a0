"""Loading: which network, how much memory, on which devices; and vgen's own form."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import vgen
from tests.convert.files import safetensors
from vgen import trees
from vgen.config import UserError
from vgen.convert import export, formats, load, rules, sources
from vgen.convert.t5 import T5, config, table
from vgen.models.t5 import T5Encoder
from vgen.sharding import make_mesh

ROOT = Path(__file__).parents[2]
FAMILY = "vgen.convert.t5:T5"
SMALL = dict(depth=2, width=16, heads=2, head_dim=8, mlp_dim=24, vocab=40, buckets=8)
MB = 1 << 20


def checkpoint(folder, dtype=np.float32, shard=1 << 30, **sizes):
    """A T5 of random weights as transformers would save it, written tensor by tensor: (model, bytes)."""
    model = T5Encoder(**sizes)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    shapes = rules.exported_shapes(trees.flatten(shapes), table(model))
    rng = np.random.default_rng(0)
    folder.mkdir()
    arrays = ((name, rng.standard_normal(shape, np.float32).astype(dtype)) for name, shape in shapes.items())
    export.write_folder(folder, arrays, "model", shard)
    (folder / "config.json").write_text(json.dumps(config(model)))
    return model, sum(np.prod(shape) for shape in shapes.values()) * np.dtype(dtype).itemsize


def flat(params):
    return {path: np.asarray(leaf) for path, leaf in trees.flatten(params).items()}


def test_load_and_types(tmp_path):
    want, _ = checkpoint(tmp_path / "t5", ml_dtypes.bfloat16, **SMALL)
    model, params = vgen.load(str(tmp_path / "t5"))
    assert model == want and {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    wide = vgen.load(tmp_path / "t5", dtype=jnp.float32)[1]
    assert {leaf.dtype for leaf in jax.tree.leaves(wide)} == {jnp.dtype(jnp.float32)}
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a.astype(np.float32), b), params, wide)
    stored = sources.read_weights(tmp_path / "t5")
    np.testing.assert_array_equal(
        params["layers"]["mlp"]["fc2"]["kernel"][1], stored["encoder.block.1.layer.1.DenseReluDense.wo.weight"].T
    )


def test_shards_load_like_one_file(tmp_path):
    checkpoint(tmp_path / "one", **SMALL)
    checkpoint(tmp_path / "many", shard=4000, **SMALL)
    assert len(list((tmp_path / "many").glob("model-*-of-*.safetensors"))) > 3
    jax.tree.map(np.testing.assert_array_equal, vgen.load(tmp_path / "one")[1], vgen.load(tmp_path / "many")[1])


def test_classes_are_listed(tmp_path):
    safetensors(tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"architectures": ["GPT9"]}')
    with pytest.raises(UserError, match="does not read a GPT9; it reads .*T5EncoderModel"):
        vgen.load(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "Unknown3DModel"}')
    with pytest.raises(UserError, match="does not read a Unknown3DModel"):
        vgen.load(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match="no array has a name that tells the family .*a.half.*such as vgen.convert"):
        vgen.load(tmp_path)
    for bad in ("vgen.convert.t5:table", "vgen.convert.t5:T6", "t5"):
        with pytest.raises(UserError):
            vgen.load(tmp_path, family=bad)


def test_every_row_of_the_table_names_a_family():
    from vgen.convert import families

    for name in {*families.BY_CLASS.values(), *(family for _, family in families.BY_NAME)}:
        assert families.get(name).build


def test_own_form(tmp_path):
    model, _ = checkpoint(tmp_path / "t5", ml_dtypes.bfloat16, **SMALL)
    _, params = vgen.load(tmp_path / "t5")
    export.save(tmp_path / "own", model, params, FAMILY)
    again, same = vgen.load(tmp_path / "own")
    assert again == model
    jax.tree.map(np.testing.assert_array_equal, same, params)
    # what a stage's `init` reads, from the folder or the file
    for where in (tmp_path / "own", tmp_path / "own" / "model.safetensors"):
        read = sources.read_weights(where)
        assert set(read) == set(trees.flatten(params)) and trees.flatten(read) == read
    with pytest.raises(UserError, match="is not empty"):
        export.save(tmp_path / "own", model, params, FAMILY)
    # a layout without a config is built from the shapes of its own names again
    index = json.loads((tmp_path / "own" / "vgen.json").read_text())
    (tmp_path / "own" / "vgen.json").write_text(json.dumps(index | dict(config={})))
    assert vgen.load(tmp_path / "own")[0] == model
    # and a file that has lost an array is named as any other
    del read["norm/scale"]
    formats.write_safetensors(tmp_path / "own" / "model.safetensors", read)
    with pytest.raises(UserError, match="unfilled norm/scale"):
        vgen.load(tmp_path / "own")


def test_pipelines(tmp_path):
    first, _ = checkpoint(tmp_path / "text_encoder", **SMALL)
    second, _ = checkpoint(tmp_path / "text_encoder_2", **SMALL | dict(depth=3))
    kinds = {part: ["transformers", "T5EncoderModel"] for part in ("text_encoder", "text_encoder_2")}
    (tmp_path / "model_index.json").write_text(json.dumps(kinds | dict(scheduler=["diffusers", "S"])))
    models, params = vgen.load(tmp_path)
    assert models == dict(text_encoder=first, text_encoder_2=second) and set(params) == set(models)
    jax.tree.map(np.testing.assert_array_equal, params["text_encoder"], vgen.load(tmp_path / "text_encoder")[1])
    assert list(vgen.load(tmp_path, parts=["text_encoder_2"])[0]) == ["text_encoder_2"]
    with pytest.raises(UserError, match="has no part 'unet'; there are text_encoder, text_encoder_2"):
        vgen.load(tmp_path, parts=["unet"])
    with pytest.raises(UserError, match="this is a pipeline"):
        vgen.load(tmp_path, family=FAMILY)
    with pytest.raises(UserError, match="is a pipeline of text_encoder"):
        load.params(tmp_path)
    with pytest.raises(UserError, match="this is one network"):
        vgen.load(tmp_path / "text_encoder", parts=["x"])


def test_parameters_may_be_donated(tmp_path):
    """They lie in memory that JAX took over from numpy: giving it away must not change what others hold."""
    checkpoint(tmp_path / "t5", **SMALL)
    mesh = make_mesh(devices=jax.devices()[:1])
    _, params = vgen.load(tmp_path / "t5", mesh=mesh)
    before = flat(params)
    changed = jax.jit(lambda tree: jax.tree.map(lambda a: a + 1, tree), donate_argnums=0)(params)
    for path, leaf in flat(changed).items():
        np.testing.assert_array_equal(leaf, before[path] + 1)


# --------------------------------------------------------------------------------------- in processes of their own


def run(name, *args, devices=1):
    """What a function of this file prints as JSON in a fresh process."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    env = os.environ | dict(XLA_FLAGS=flags, JAX_PLATFORMS="cpu")
    done = subprocess.run(
        [sys.executable, "-m", "tests.convert.load_test", name, *map(str, args)],
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def peak():
    """The most memory this process has held, in bytes."""
    text = Path("/proc/self/status").read_text()
    return 1024 * int(text.split("VmHWM:")[1].split()[0])


def measure(folder, dtype, *sizes) -> dict:
    """Load a checkpoint; the peak of memory above that of loading a tiny one, which compiles and imports the same."""
    mesh = None if not sizes else make_mesh(*map(int, sizes))
    vgen.load(Path(folder).with_name("tiny"), mesh=mesh, dtype=dtype)
    before = peak()
    put: dict = {}
    original = jax.device_put

    def device_put(x, device):
        put[str(device)] = put.get(str(device), 0) + x.nbytes
        return original(x, device)

    jax.device_put = device_put
    _, params = vgen.load(folder, mesh=mesh, dtype=dtype)
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    return dict(peak=peak() - before, total=total, put=put, sum=float(jnp.sum(params["embed"]["embedding"][0])))


WIDE = dict(width=512, heads=8, head_dim=64, mlp_dim=2048, vocab=2048)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("dtype, devices", [("float32", 1), ("bfloat16", 1), ("float32", 8)])
def test_memory_is_the_model_and_little_more(dtype, devices, tmp_path):
    checkpoint(tmp_path / "tiny", **SMALL)
    _, stored = checkpoint(tmp_path / "t5", shard=32 * MB, depth=10, **WIDE)
    assert stored > 150 * MB
    report = run("measure", tmp_path / "t5", dtype, *((1, 8, 1) if devices > 1 else ()), devices=devices)
    assert report["total"] == stored * np.dtype(dtype).itemsize // 4
    assert report["peak"] <= 1.3 * report["total"] + 16 * MB, {k: v / MB for k, v in report.items() if k != "put"}
    if devices > 1:
        assert len(report["put"]) == 8
        # every parameter divides by 8 but the norms, which are small: no device was ever given more than its share
        assert max(report["put"].values()) <= report["total"] / 8 + MB


@pytest.mark.slow
def test_two_gigabytes(tmp_path):
    checkpoint(tmp_path / "tiny", **SMALL)
    sizes = dict(depth=24, width=1024, heads=16, head_dim=64, mlp_dim=5120, vocab=32_128)
    _, stored = checkpoint(tmp_path / "t5", shard=500 * MB, **sizes)
    report = run("measure", tmp_path / "t5", "float32")
    print(f"\n{stored / 1e9:.2f} GB of weights, peak {report['peak'] / 1e9:.2f} GB")
    assert stored > 2e9 and report["peak"] <= 1.3 * stored


def places(folder) -> dict:
    """Load onto 8 devices by rules; compare with one device; say what was split how."""
    mesh = make_mesh(2, 2, 2)
    rules_ = ((r".*(q|k|v|fc1|gate)/kernel", ("fsdp", "tensor")), (r".*(out|fc2)/kernel", ("tensor", "fsdp")))
    _, params = vgen.load(folder, mesh=mesh, rules=rules_, min_shard_size=0)
    _, want = vgen.load(folder)
    equal = jax.tree.map(lambda a, b: bool((np.asarray(a) == np.asarray(b)).all()), params, want)
    split = {path: list(leaf.sharding.spec) for path, leaf in trees.flatten(params).items()}
    held: dict = {}
    for leaf in jax.tree.leaves(params):
        for shard in leaf.addressable_shards:
            held[str(shard.device)] = held.get(str(shard.device), 0) + shard.data.nbytes
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    before = flat(params)  # arrays held by several devices share memory: one may not disturb the other
    changed = jax.jit(lambda tree: jax.tree.map(lambda a: a + 1, tree), donate_argnums=0)(params)
    donated = all((leaf == before[path] + 1).all() for path, leaf in flat(changed).items())
    donated &= all((shard.data == before_shard(before[path], shard) + 1).all()
                   for path, leaf in trees.flatten(changed).items() for shard in leaf.addressable_shards)  # fmt: skip
    return dict(equal=all(jax.tree.leaves(equal)), split=split, held=held, total=total, donated=bool(donated))


def before_shard(array, shard):
    return array[shard.index]


def test_rules_place_parameters_as_they_arrive(tmp_path):
    checkpoint(tmp_path / "t5", **SMALL)
    report = run("places", tmp_path / "t5", devices=8)
    assert report["equal"] and report["donated"]
    assert report["split"]["layers/attn/q/kernel"] == [None, "fsdp", "tensor"]
    assert report["split"]["layers/mlp/fc2/kernel"] == [None, "tensor", "fsdp"]
    assert report["split"]["embed/embedding"] == ["fsdp", None]
    assert len(report["held"]) == 8 and max(report["held"].values()) < 0.5 * report["total"]


def test_the_inputs_of_the_family_fit():
    model = T5Encoder(**SMALL)
    states = jax.eval_shape(model.init_with_output, jax.random.key(0), **T5.inputs(model, np.random.default_rng(0)))[0]
    assert set(T5.outputs(states)) == {"states"} and states.shape == (2, 24, 16)


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]](*sys.argv[2:])))
