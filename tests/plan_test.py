"""Plans: the real steps compiled ahead of time, what they are said to take, and what is tried where it does not fit."""

import dataclasses
import json
import math
import os
import runpy
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tests.toy_config import get_config
from vgen import plan
from vgen.bench import plan as bench
from vgen.bench.__main__ import main as bench_main
from vgen.config import UserError, to_dict
from vgen.main import main
from vgen.sharding import make_mesh
from vgen.stages import Run

ROOT = Path(__file__).parents[1]
TOY = f"--config={ROOT}/tests/toy_config.py"
PLAN = dict(flops=1e9, bytes=dict(peak=2000), collectives={"all-gather": dict(count=1, bytes=1000)})
KINDS = {"v3": "TPU v3", "v4": "TPU v4", "v5e": "TPU v5 lite"}
CHIP = plan.Chip(flops=1e12, memory=1e9, bandwidth=1e10, network=1e9, chips=0.5, watts=200.0)


def here(**chip):
    """One device of this machine, said to be a chip."""
    return plan.target("cpu:1")._replace(chip=dataclasses.replace(CHIP, **chip))


def test_a_run_is_planned_before_it_has_data_or_weights(tmp_path):
    """Numbers of the toy's two stages by hand; nothing is written."""
    report = plan.plan(get_config(), tmp_path / "run", here())
    assert list(report["train"]) == ["first", "second"] and report["fits"] and not (tmp_path / "run").exists()
    first, second = report["train"].values()
    run = Run(get_config(), tmp_path)
    made = jax.eval_shape(run.task("first").init, jax.random.key(0), plan.batch_shapes(run, "first"))
    sizes = {part: sum(x.size for x in made[part].values()) for part in ("dense", "fixed")}
    assert first["parameters"] == dict(trained=sum(sizes.values()), frozen=0)  # its first stage trains both
    assert second["parameters"] == dict(trained=sizes["dense"], frozen=sizes["fixed"])
    assert first["steps"] == run.train_config("first").steps
    seconds = first["roofline"]
    assert seconds["step"] == max(seconds["computing"], seconds["memory"], seconds["network"]) > 0
    assert seconds["computing"] == pytest.approx(first["flops"] / 1e12)
    assert seconds["memory"] == pytest.approx(first["memory_bytes_moved"] / 1e10)
    hours = seconds["step"] * first["steps"] * 0.5 / 3600
    assert first["chip_hours"] == pytest.approx(hours) and first["kilowatt_hours"] == pytest.approx(hours * 0.2)
    assert first["images_per_second"] == pytest.approx(first["batch_size"] / seconds["step"])
    held = first["bytes"]
    assert held["peak"] == held["arguments"] + held["outputs"] - held["shared"] + held["temporaries"]
    assert held["shared"] > 0, "the state's memory is given away"
    assert set(report["sample"]) == set(run.config.generate["stages"])
    text = "\n".join(plan.lines(report))
    assert "train first: 0.0M trained" in text and "images/s" in text and "sample second" in text


@pytest.mark.parametrize("name", ["pixart", "sam", "clip"])
def test_batches_have_the_shapes_of_the_data(name, tmp_path):
    """All that the pipeline gives is foreseen, with its shape and type; labels may be more than it has."""
    run = Run(runpy.run_path(str(ROOT / "configs" / f"{name}.py"))["get_config"]("tiny"), tmp_path)
    for stage in run.config.order:
        with run.batches(stage) as batches:
            batch = next(iter(batches))
        foreseen = plan.batch_shapes(run, stage)
        given = {key: value for key, value in batch.items() if key not in ("index", "caption")}
        assert set(given) <= set(foreseen), stage
        assert {key: (x.shape, x.dtype) for key, x in given.items()} == {
            key: (foreseen[key].shape, foreseen[key].dtype) for key in given
        }


def test_features_are_foreseen():
    """A stage trains on what its frozen encoders said, and no encoder is among its parameters; to draw they are."""
    config = runpy.run_path(str(ROOT / "configs" / "pixart.py"))["get_config"]("paper")
    config.mesh = {}
    run = Run(config, "nowhere")
    shapes = plan.batch_shapes(run, "quality_1024")
    side = config.stages.quality_1024.task.network.sample_size
    assert shapes["latent_mean"].shape[1:3] == (side, side) and not {"image", "text"} & set(shapes)
    ((name, _, (params, _, conds, _)),) = plan.sample_steps(run)
    assert name == "quality_1024" and {"text", "text_mask"} <= set(conds) and {"text_encoder", "vae"} <= set(params)


def test_what_is_too_large_is_said_and_helped(tmp_path, capsys, monkeypatch):
    """Exit code 3, plan.json, and the first setting under which it fits."""
    small = here(memory=1.0)
    monkeypatch.setattr(plan, "target", lambda name: small)
    args = ["vgen", TOY, f"--workdir={tmp_path}", "--mode=plan", "--topology=cpu:1", "--stage=first"]
    assert main(args) == 3
    out = capsys.readouterr().out
    assert "DOES NOT FIT" in out and "none fits; take more or larger devices" in out
    written = json.loads((tmp_path / "plan.json").read_text())
    assert (
        written["fits"] is False
        and written["fitting"] == {"train": {"first": None}, "sample": {}}
        and list(written["train"]) == ["first"]
    )

    peak = lambda config, *args, **kwargs: dict(fits=config["stages"]["first"]["train"].get("accumulate", 1) >= 4)
    monkeypatch.setattr(plan, "plan", peak)
    found = plan.fitting(get_config(), tmp_path, "first", here())
    assert found["stages.first.train.accumulate"] == 4


def test_sampling_that_is_too_large_is_helped_by_fewer_pictures(tmp_path, capsys, monkeypatch):
    asked = []

    def peak(config, *args, stages=(), sampled=()):
        count = config["generate"]["batch_size"]
        asked.append((count, *sampled))
        told = PLAN | dict(bytes=dict(peak=1.0, arguments=1.0, temporaries=0.0), compile_seconds=0.0, fits=count < 20)
        target = dict(topology="cpu:1", devices=1)
        return dict(config="toy", scale="short", target=target, mesh={}, train={}, sample=dict(second=told),
                    fits=count < 20)  # fmt: skip

    place = here()
    monkeypatch.setattr(plan, "target", lambda name: place)
    monkeypatch.setattr(plan, "plan", peak)
    args = ["vgen", TOY, f"--workdir={tmp_path}", "--mode=plan", "--topology=cpu:1", "--config.generate.batch_size=64"]
    assert main(args) == 3
    assert asked == [(64,), (32, "second"), (16, "second")]
    assert "sample second: fits with --config.generate.batch_size=16" in capsys.readouterr().out
    assert json.loads((tmp_path / "plan.json").read_text())["fitting"]["sample"] == {
        "second": {"generate.batch_size": 16}
    }


def test_what_the_compiler_finds_no_room_for():
    """A TPU's compiler gives no program then, but says how much it would take."""

    class Full:
        def __init__(self, text):
            self.text = text

        def __wrapped__(self, x, key):
            return x @ x

        def lower(self, *arguments):
            return self

        def compile(self):
            raise jax.errors.JaxRuntimeError(self.text)

    said = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (26.50G) exceeds"
    )
    mesh = make_mesh(devices=jax.devices()[:1])
    x = jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=NamedSharding(mesh, P("fsdp")))
    arguments = (x, jax.eval_shape(lambda: jax.random.key(0)))
    found, compiled = plan.measured(Full(said), arguments, here())
    given = 64 * 64 * 4 + arguments[1].dtype.itemsize
    assert compiled is None and found["fits"] is False and found["flops"] == pytest.approx(2 * 64**3, rel=0.1)
    assert found["bytes"] == dict(arguments=given, temporaries=26.5 * 2**30, peak=given + 26.5 * 2**30)
    target = dict(topology="c", devices=1)
    report = dict(config="a", scale="b", mesh={}, target=target, train={"first": found}, sample={})
    assert "DOES NOT FIT" in "\n".join(plan.lines(report))
    with pytest.raises(UserError, match="cpu:1: XLA cannot compile it: INTERNAL: no such thing"):
        plan.measured(Full("INTERNAL: no such\nthing"), arguments, here())


def test_changes_are_tried_from_the_cheapest_on():
    config = to_dict(runpy.run_path(str(ROOT / "configs" / "dit.py"))["get_config"]("mini"))
    config["stages"]["dit"]["task"]["network"]["remat"] = "none"
    tried = list(plan.changes(config, "dit", 8))
    assert tried[0] == {"mesh.data": -1, "mesh.fsdp": 8}
    assert tried[1] == {"stages.dit.task.network.remat": "full"} and tried[2] == tried[0] | tried[1]
    assert [each["stages.dit.train.accumulate"] for each in tried[3:]] == [2, 4]  # 32 pictures on 8 devices
    assert plan.changed(config, tried[2])["mesh"]["fsdp"] == 8 and config["mesh"]["fsdp"] == 1


@pytest.mark.parametrize(
    ("topology", "sentence"),
    [
        (None, "this config names no slice"),
        ("cpu:0", "expected cpu:N"),
        ("cpu:many", "expected cpu:N"),
        ("cpu:513", "expected cpu:N, 1 to 512"),
        ("cpu:512", "JAX runs already"),
        ("v4", "expected such as v4:4x4x16"),
        ("h100:8", "expected such as v4:4x4x16"),
        ("v4:3x3x3x3", "libtpu does not know it, or is not installed"),
    ],
)
def test_bad_topologies(topology, sentence, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("vgen.main.emulate_devices", lambda count: None)  # it tells later processes, too
    given = [f"--topology={topology}"] if topology else []
    assert main(["vgen", TOY, f"--workdir={tmp_path}/run", "--mode=plan", *given]) == 2
    assert sentence in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_the_slice_of_the_config_is_taken(tmp_path, capsys, monkeypatch):
    """And another one where it is said."""
    asked, place = [], here()
    monkeypatch.setattr(plan, "target", lambda name: asked.append(name) or place)
    monkeypatch.setattr("vgen.main.emulate_devices", lambda count: None)
    args = ["vgen", TOY, f"--workdir={tmp_path}", "--mode=plan", "--stage=first"]
    assert main([*args, "--config.topology=cpu:4"]) == 0 and main([*args, "--topology=cpu:2"]) == 0
    assert asked == ["cpu:4", "cpu:2"] and "train first" in capsys.readouterr().out


def test_the_table_of_all_plans(tmp_path, capsys, monkeypatch):
    """A row a stage; a config that trains the same is named with it, one that cannot be planned says why."""
    place = here()
    monkeypatch.setattr(bench, "target", lambda name: place)
    toy = "from tests.toy_config import get_config as toy\nSCALES = ('paper', 'mini')\ndef get_config(scale):\n"
    toy += "    config = toy()\n    config.topology = 'cpu:1' if scale == 'paper' else ''\n    {}\n    return config\n"
    for name, more in dict(a="", b="config.prompts = ('0',)", c="config.mesh = dict(data=3)").items():
        (tmp_path / f"{name}.py").write_text(toy.format(more))
    args = ["plan", f"--configs={tmp_path}", f"--out={tmp_path}/all.json"]
    assert bench_main(args) == 0
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines()]
    assert tuple(rows[0]) == bench.HEAD and [row[0] for row in rows[2:]] == ["a", "a", "a", "b", "c"]
    assert [row[3] for row in rows[2:5]] == ["first", "second", "second, sampled"] and rows[5][3] == "is trained as a"
    assert "does not cover 1 devices" in rows[6][3]
    written = json.loads((tmp_path / "all.json").read_text())
    assert (
        list(written) == ["a"]
        and rows[2][4] == f"{written['a']['train']['first']['parameters']['trained'] / 1e6:,.0f} + 0 frozen"
    )
    for only, found in (("second$", ["second"]), ("sampled", ["second, sampled"]), ("irs", ["first"])):
        assert bench_main(["plan", f"--configs={tmp_path}", f"--only=a/.*{only}"]) == 0
        assert [line.split("|")[4].strip() for line in capsys.readouterr().out.splitlines()[2:]] == found
    assert bench_main(["plan", f"--configs={tmp_path}", "--scale=mini"]) == 2
    assert "names a slice" in capsys.readouterr().err
    assert bench_main(["plan", f"--configs={tmp_path}", f"--out={tmp_path}/none/all.json"]) == 2
    assert "cannot write" in capsys.readouterr().err
    assert bench_main(["plan", f"--configs={tmp_path}/none"]) == 2
    assert "no configs in" in capsys.readouterr().err


def test_how_hard_the_compiler_tried_is_told(tmp_path):
    report = plan.plan(get_config(), tmp_path, here(), ["first"])
    quick = report | {"target": report["target"] | {"optimization_level": "O0"}}
    more = set(plan.lines(quick)) - set(plan.lines(report))
    assert any("JAX_OPTIMIZATION_LEVEL=O0" in line for line in more) and plan.effort() == ""
    cells = [list(bench._row("a", each, "train", "first", report["train"]["first"])) for each in (report, quick)]
    assert cells[1] == [*cells[0][:-1], f"{cells[0][-1]} at O0"]
    told = subprocess.run(
        [sys.executable, "-c", "from vgen import plan; print(plan.effort())"], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"JAX_OPTIMIZATION_LEVEL": "O0"},
    )  # fmt: skip
    assert told.stdout.strip() == "O0", told.stderr


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda path: path.stem)
def test_every_config_names_a_slice_that_its_batches_divide_over(path):
    """Its published scale, on as many devices as the slice has; nothing is compiled."""
    config = runpy.run_path(str(path))["get_config"]("paper")
    kind, _, shape = config.topology.partition(":")
    chips = math.prod(int(side) for side in shape.split("x"))
    count = round(chips / plan.CHIPS[KINDS[kind]].chips)
    run = Run(config, "nowhere", devices=[object() for _ in range(count)])
    assert run.mesh.size == count


# Of Muse all, of every other family a config: the published parameters of what is trained, as the configs have them.
PLANNED = {
    "muse/tokenizer_low": (57e6, 61e6), "muse/decoder_low": (218e6, 224e6), "muse/tokenizer_high": (52e6, 56e6),
    "muse/decoder_high": (197e6, 203e6), "muse/base": (3.0e9, 3.5e9), "muse/superres": (700e6, 800e6),
    "dit/dit": (674e6, 676e6), "mae/mae": (329e6, 330e6), "clip/clip": (149e6, 151e6), "ddpm/unet": (35e6, 37e6),
    "ldm/unet": (1.45e9, 1.6e9), "maskgit/generator": (170e6, 230e6), "dalle/prior": (11e9, 13e9),
    "pixart/quality_1024": (600e6, 620e6), "sam/sam": (640e6, 642e6), "vqgan/prior": (1.3e9, 1.5e9),
    "blip/blip": (250e6, 255e6),
}  # fmt: skip
DRAWN = ("muse/base, sampled", "dit/dit, sampled", "dalle/prior, sampled", "pixart/quality_1024, sampled")


@pytest.mark.slow
@pytest.mark.parametrize("case", (*PLANNED, *DRAWN))
def test_published_systems_fit_their_slices(case, tmp_path):
    """Compiled by a TPU's compiler, quickly, in a process of its own: half a minute to four each."""
    pytest.importorskip("libtpu")
    name, stage = case.removesuffix(", sampled").split("/")
    command = [sys.executable, "-m", "vgen.bench", "plan", f"--only=^{case}$", f"--out={tmp_path}/plan.json"]
    env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_OPTIMIZATION_LEVEL": "O0"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "plan.json").read_text())[name]
    found = report["train" if case in PLANNED else "sample"][stage]
    assert report["fits"] and 1e8 < found["bytes"]["peak"] <= report["target"]["memory"], done.stdout
    assert found["collectives"] and len(report["train"]) + len(report["sample"]) == 1
    if case in PLANNED:
        least, most = PLANNED[case]
        assert found["chip_hours"] > 1 and least <= found["parameters"]["trained"] <= most
        sent = sum(each["bytes"] for each in found["collectives"].values())
        assert sent < 8 * 4 * sum(found["parameters"].values()), "parameters are sent a few times, activations are not"


def test_a_step_on_more_devices(capsys, monkeypatch):
    """Weak scaling by what is compiled: each device computes the same, and sends more kinds of things with fsdp."""
    place = here()
    monkeypatch.setattr(bench, "target", lambda name: place)
    with pytest.raises(UserError, match="there is no stage 'third'; toy has first, second"):
        list(bench.scaling(get_config(), "third"))
    lines = list(bench.scaling(get_config(), "first", counts=(1,)))
    assert len(lines) == 3 and lines[2].startswith("| data 1 | 4 | ")
    asked = []
    monkeypatch.setattr(bench, "plan", lambda config, *rest: asked.append(config) or dict(train=dict(first=PLAN)))
    rows = [line.split("|") for line in bench.scaling(get_config(), "first")][2:]
    assert [row[1].strip() for row in rows] == [f"data {n}" for n in (1, 2, 4, 8)] + [f"fsdp {n}" for n in (2, 4, 8)]
    assert [row[2].strip() for row in rows] == ["4", "8", "16", "32", "8", "16", "32"]
    assert all(row[5].strip() == "1.0 kB" and row[6].strip() == "" for row in rows)
    assert asked[-1]["mesh"] == dict(data=1, fsdp=8) and asked[-1]["stages"]["second"]["train"]["batch_size"] == 32


def test_loops_until_a_draw_is_accepted_count_once():
    """Of Mixup's Beta distribution: how often they run nobody knows."""
    mixed = jax.jit(lambda key, x: jax.random.beta(key, 0.2, 0.2, (8, 1)) * (x @ x))
    x = jax.ShapeDtypeStruct((8, 8), jnp.float32)
    found, _ = plan.measured(mixed, (jax.eval_shape(lambda: jax.random.key(0)), x), here())
    assert 2 * 8**3 < found["flops"] < 1e5 and found["memory_bytes_moved"] > 3 * 4 * 8**2


def test_chips_are_per_device():
    """libtpu's v4 has two devices a chip: together they are the published 275 TFLOP/s and 32 GiB."""
    chip = plan.CHIPS["TPU v4"]
    assert (chip.flops / chip.chips, chip.memory / chip.chips) == (275e12, 32 * 2**30)
    assert all(each.memory > 1.5e10 and 1e13 < each.flops < 1e16 for each in plan.CHIPS.values())


def test_programs_may_be_for_another_platform():
    from vgen import platform

    assert platform.backend() == jax.default_backend()
    with platform.target("tpu"):
        assert platform.backend() == "tpu"
    assert platform.backend() == jax.default_backend()
