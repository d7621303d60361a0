"""What the README says holds: its commands parse, its flags, files, scales and configs exist, its examples run."""

import dataclasses
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from vgen import main
from vgen.data.images import save_png
from vgen.fields import GenerateConfig, RunConfig
from vgen.stages import Run

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
LAUNCH = (ROOT / "launch/README.md").read_text(encoding="utf-8")
PIXELS = re.search(r'```python\n("""pixels.py.*?)```', README, re.S).group(1)

SCRIPTS = ("tpu_pod.sh", "gke.sh", "slurm.sbatch", "local_multiprocess.sh")

# Every program that a block may call, replaced by one that prints its arguments; nothing else is found.
STUBS = "".join(
    f"{name}() {{ printf '%s\\x1f' {name} \"$@\"; printf '\\x1e'; }}\n"
    for name in ("python", "pip", *(f"launch/{script}" for script in SCRIPTS))
)


def commands(text, name="python"):
    """Argument lists of every call of `name` in the text's shell blocks, as the shell passes them."""
    calls = []
    for block in re.findall(r"```bash\n(.*?)```", text, re.S):
        done = subprocess.run(["/bin/bash", "-euc", STUBS + block], env={"PATH": ""}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        calls += [call.split("\x1f")[:-1] for call in done.stdout.split("\x1e")[:-1]]
    return [args for program, *args in calls if program == name]


def vgen_commands():
    found = [args[2:] for args in commands(README) if args[:2] == ["-m", "vgen.main"]]
    for script in SCRIPTS:
        found += [args[args.index("--") + 1 :] for args in commands(LAUNCH, f"launch/{script}") if "--" in args]
    for args in commands(LAUNCH):  # python launch/sweep.py: the first point of its grid
        shown = subprocess.run(
            [sys.executable, *args[:1], "--dry_run", *args[1:]], capture_output=True, text=True, cwd=ROOT
        )
        found.append(shlex.split(shown.stdout.splitlines()[0])[3:])
    return found


@pytest.fixture
def there(tmp_path, monkeypatch):
    """A folder like a fresh clone, with the README's example beside it."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "pixels.py").write_text(PIXELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_the_two_commands_and_the_tests():
    start, *_ = re.findall(r"```bash\n(.*?)```", README, re.S)
    assert start == "pip install -e .\npython -m vgen.main --config=configs/muse.py --workdir=runs/muse\n"
    assert re.findall(r"(?m)^    (python -m pytest.*)$", README) == ["python -m pytest -n 2"]


@pytest.mark.parametrize("args", vgen_commands(), ids=lambda args: " ".join(args)[:80])
def test_command_is_accepted(args, there):
    """Flags exist, and the config that they make can be built: every key is read by something."""
    options = main.parse(["vgen", *args])
    mesh = dict(options.config.get("mesh", {})).values()
    run = Run(options.config, options.workdir, devices=jax.devices()[:1] * max(1, abs(int(np.prod([1, *mesh])))))
    assert options.stage is None or options.stage in run.stages
    assert options.mode in ("train", "plan") or run.config.generate
    assert options.mode != "sample" or options.prompt


@pytest.mark.parametrize("script", SCRIPTS)
def test_launch_command_is_accepted(script):
    found = commands(LAUNCH, f"launch/{script}")
    assert found
    for args in found:
        at = 1 if script in ("tpu_pod.sh", "gke.sh") else 0  # behind the step
        done = subprocess.run([ROOT / "launch" / script, *args[:at], "--dry_run", *args[at:]], capture_output=True)
        assert done.returncode == 0 and done.stdout, done.stderr


def test_inline_flags_exist(there):
    config = main.parse(["vgen", "--config=configs/muse.py", "--workdir=x"]).config.to_dict()
    known = main._flags(["vgen"])
    flags = re.findall(r"`--([\w.]+)[^`]*`", README)
    assert len(flags) >= 6
    for flag in flags:
        head, *keys = flag.split(".")
        value = config
        assert head in known, flag
        for key in keys:
            key = "base" if key == "STAGE" else key
            fields = RunConfig if value is config else GenerateConfig if value is config["generate"] else None
            if fields and key not in value:  # of another system, or left out
                assert key in {field.name for field in dataclasses.fields(fields)}, flag
                break
            assert key in value, flag
            value = value[key]


def test_extras_exist():
    used = set(re.findall(r"\.\[(\w+)\]", README))
    assert used == set(re.findall(r'(?m)^        "(\w+)": ', (ROOT / "setup.py").read_text())) - {"notebooks"}


def test_table_names_every_config_and_scale():
    from configs import muse

    rows = re.findall(r"(?m)^\| .*$", README)
    for path in sorted((ROOT / "configs").glob("*.py")):
        assert any(f"(configs/{path.name})" in row for row in rows), f"{path.name} has no row in the table of systems"
    scales = re.findall(r"(?m)^\| `(\w+)` \|", README)
    assert tuple(scales[: len(muse.SCALES)]) == muse.SCALES
    assert set(scales) <= {s for path in ROOT.glob("configs/*.py") for s in runpy.run_path(str(path))["SCALES"]}


@pytest.mark.parametrize("name", ["README.md", "launch/README.md"])
def test_links_lead_somewhere(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not link.startswith("https://")]
    missing = [link for link in links if not (ROOT / name).parent.joinpath(link).is_file()]
    assert not missing


def test_every_number_is_measured():
    assert "TODO" not in README


def test_own_folder(there):
    """The README's flags open a folder of captioned pictures in every stage, training and held-out."""
    rng = np.random.default_rng(0)
    for i in range(60):
        save_png(there / f"cats/{i}.png", rng.integers(0, 256, (150, 140, 3), np.uint8))
        (there / f"cats/{i}.txt").write_text(f"cat number {i}")
    args = next(args for args in vgen_commands() if "--config.stages.base.data.source=folder:/data/cats" in args)
    args = [arg.replace("/data/cats", str(there / "cats")) for arg in args]
    stages = ("tokenizer", "decoder", "base", "superres")
    args += [f"--config.stages.{stage}.train.batch_size=3" for stage in stages]  # 5 % of 60 pictures
    options = main.parse(["vgen", *args])
    run = Run(options.config, there / "run")
    for stage, size in zip(stages, (128, 128, 64, 128), strict=True):
        for held_out in (False, True):
            with run.batches(stage, held_out=held_out) as batches:
                batch = next(batches)
            assert batch["image"].shape == (3, size, size, 3)
            assert ("text" in batch) == (stage in ("base", "superres"))


def test_example_system_trains(there):
    steps = ["--config.stages.denoise.train.steps=2", "--config.stages.denoise.train.batch_size=4"]
    flags = ["--config=pixels.py", "--workdir=run", "--compilation_cache="]
    assert main.main(["vgen", *flags, *steps]) == 0
    assert (there / "run/denoise/metrics.jsonl").is_file()
