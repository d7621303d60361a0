"""Every mistake at the command line ends as one clear sentence on stderr and exit code 2."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vgen.main import main

ROOT = Path(__file__).parents[1]
TOY = f"--config={ROOT}/tests/toy_config.py"
MUSE = f"--config={ROOT}/configs/muse.py:tiny"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run of the toy, made through the command line in this process."""
    workdir = tmp_path_factory.mktemp("toy") / "run"
    before = signal.getsignal(signal.SIGINT)
    assert main(["vgen", TOY, f"--workdir={workdir}", "--compilation_cache="]) == 0
    assert signal.getsignal(signal.SIGINT) is before
    return workdir


@pytest.fixture
def fails(capsys, tmp_path):
    """Call main with a mistake: it must return 2 and print one line, which is returned."""

    def run(*argv, lines=1):
        argv = list(argv)
        if not any(arg.startswith("--workdir") for arg in argv):
            argv.append(f"--workdir={tmp_path / 'run'}")
        capsys.readouterr()
        assert main(["vgen", "--compilation_cache=", *argv]) == 2
        out, err = capsys.readouterr()
        err = "".join(
            line for line in err.splitlines(True) if not re.match("stage |first: |second: ", line)
        )  # what went well before
        assert not out and err.startswith("vgen: ") and "Traceback" not in err, err
        if lines == 1:
            assert err.count("\n") == 1, err
        return err

    return run


def test_training_samples_and_measures(trained, capsys):
    assert {path.name for path in trained.iterdir()} >= {"config.json", "eval.json", "first", "second", "samples"}
    assert (trained / "samples" / "second_0000.png").is_file() and (trained / "first" / "eval.json").is_file()
    assert list((trained / "first" / "pictures").glob("input_*.png"))
    argv = [
        "vgen",
        TOY,
        f"--workdir={trained}",
        "--compilation_cache=",
        "--mode=sample",
        "--prompt=x",
        "--num_images=2",
    ]
    out = trained.parent / "out"
    assert main([*argv, f"--out={out}"]) == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "prompts.txt", "second_0000.png", "second_0001.png", "second_grid.png",
    ]  # fmt: skip
    first = np.asarray(Image.open(out / "second_0000.png"))
    for extra, same in (([], True), (["--seed=5"], False), (["--steps=9"], False)):
        assert main([*argv, f"--out={out}", *extra]) == 0
        assert np.array_equal(first, np.asarray(Image.open(out / "second_0000.png"))) == same
    capsys.readouterr()
    assert main([*argv, f"--out={out}", "--prompt=" + "a red circle " * 40]) == 0
    told = capsys.readouterr().err
    assert told.startswith("vgen: a prompt is longer than") and told.count("\n") == 1 and "red circle" in told
    assert main(["vgen", TOY, f"--workdir={trained}", "--mode=eval", "--compilation_cache="]) == 0
    assert "stages.first.seen" in capsys.readouterr().out
    assert (
        main(["vgen", TOY, f"--workdir={trained}", "--stage=first", "--compilation_cache="]) == 0
    )  # nothing left to do


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "needs --config=configs/<system>.py and --workdir=DIR"),
        ([TOY, "--promt=x"], "Unknown command line flag 'promt'. Did you mean: prompt"),
        ([TOY, "something"], "unexpected argument 'something': flags look like --name=value"),
        ([TOY, "--mode=draw"], "--mode=draw: value should be one of <train|sample|eval|plan>"),
        ([TOY, "--num_images=-1"], "--num_images=-1: -1 is not a positive integer"),
        ([TOY, "--steps=0"], "--steps=0: 0 is not a positive integer"),
        ([TOY, "--seed=-1"], "--seed=-1"),
        ([TOY, "--guidance_scale=big"], "--guidance_scale=big: could not convert string to float"),
        (["--config=configs/nowhere.py:mini"], "there is no config file configs/nowhere.py"),
        ([f"{TOY}:huge"], "scale must be short or long, got 'huge'"),
        ([MUSE.replace("tiny", "huge")], "scale must be one of tiny, mini, small, paper, photos, got 'huge'"),
        ([TOY, "--config.sed=1"], "config.sed: RunConfig does not take it; did you mean 'seed'?"),
        ([TOY, "--config.stages.frist.train.steps=1"], "the config has no 'frist' there. Did you mean \"first\""),
        (
            [TOY, "--config.stages.second.train.stepz=1"],
            "config.stages.second.train.stepz: TrainConfig does not take it",
        ),
        ([TOY, "--config.stages.first.train.optim.main.rl=1"], "optim.main.rl: optimizer does not take it"),
        ([TOY, "--config.stages.first.train.optim.main.kind=step"], "schedule kind 'step': expected constant, cosine"),
        (
            [TOY, "--config.stages.first.task.nois=1"],
            "task.nois: tests.toy:Linear does not take it; did you mean 'noise'",
        ),
        (
            [TOY, "--config.stages.first.task.target=tests.toy:Liner"],
            "tests.toy has no 'Liner'; did you mean 'Linear'?",
        ),
        (
            [TOY, "--config.stages.first.data.sorce=x"],
            "data.sorce: open_pipeline does not take it; did you mean 'source'?",
        ),
        ([TOY, "--config.stages.first.train.steps=many"], "invalid literal for int() with base 10: 'many'"),
        ([TOY, "--config.stages.first.train.keep='often'"], "train.keep: expected int, got 'often' (str)"),
        ([TOY, "--config.stages.first.train.steps=-1"], "config.stages.first.train: steps must be at least 0, got -1"),
        ([TOY, "--config.stages.first.train.steps=0"], "without a source: dense, fixed, seen (4 parameters, e.g. "),
        (
            [TOY, "--config.stages.second.init.fixed.stage=third"],
            "init.fixed.stage: 'third' is not a stage before 'second'",
        ),
        ([TOY, "--config.stages.second.init.fixed.wihout=x"], "init.fixed.wihout: InitConfig does not take it"),
        ([TOY, "--config.stages.second.init.fixed.part=dense"], "init of 'fixed' from"),
        ([TOY, "--config.generate.knobs.second.stpes=1"], "the stage's `sample` has no knob 'stpes'"),
        ([TOY, "--config.order=('first', 'last')"], "config.order names stage 'last'; config.stages has first, second"),
        ([TOY, "--config.mesh.fsdp=3"], "does not cover"),
        ([TOY, "--config.mesh.fspd=1"], "config.mesh.fspd: make_mesh does not take it; did you mean 'fsdp'?"),
        ([TOY, "--config.text.kind=bpee"], "kind must be 'bpe', 'clip', 't5' or 'bert', got 'bpee'"),
        ([TOY, "--config.text.path=/nowhere"], "config.text: BPE.load: looked for /nowhere"),
        ([TOY, "--config.stages.first.data.source=folder:/nowhere"], "/nowhere"),
        ([TOY, "--stage=third"], "there is no stage 'third'; toy has first, second"),
        ([TOY, "--stage=second"], "stage 'first' has no checkpoint"),
        ([TOY, "--mode=sample", "--prompt=x"], "holds no run: train first with --mode=train"),
        ([TOY, "--mode=eval"], "holds no run: train first"),
        ([TOY, f"--workdir={ROOT}/LICENSE/run"], "cannot write to the workdir"),
        ([TOY, "--workdir=/proc/vgen"], "cannot write to the workdir /proc/vgen"),
    ],
)
def test_mistakes_before_a_run(fails, argv, message):
    assert message in fails(*argv)


@pytest.mark.parametrize(
    "text, message",
    [
        ("raise RuntimeError('boom')", "fails: RuntimeError: boom"),
        ("import no_such_module", "fails: ModuleNotFoundError: No module named 'no_such_module'"),
        ("def get_config(:", "SyntaxError"),
        ("x = 1", "has no attribute 'get_config'"),
        ("def get_config(): return {}['a']", "fails: KeyError"),
        ("def get_config(): raise ValueError('no such luck')", "fails: ValueError: no such luck"),
        ("def get_config(): return None", "get_config() must return a ConfigDict, got None"),
        ("def get_config(): return 3", "get_config() must return a ConfigDict, got 3"),
        (
            "from ml_collections import ConfigDict\ndef get_config(): return ConfigDict(dict(name='x'))",
            "also needs scale",
        ),
    ],
)
def test_config_files_that_fail(fails, tmp_path, text, message):
    path = tmp_path / "broken.py"
    path.write_text(text)
    assert message in fails(f"--config={path}")


def test_overrides_and_flags_do_not_leak_into_the_next_call(fails):
    assert "'often'" in fails(TOY, "--config.stages.first.train.log_every='often'", "--mode=eval")
    assert "there is no stage 'x'" in fails(TOY, "--stage=x")


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "--mode=sample needs --prompt='...' (may be repeated) or --prompts=FILE"),
        (["--prompts=/nowhere.txt"], "cannot read --prompts=/nowhere.txt"),
        (["--prompt=x", "--steps=11"], "steps of stage second: expected 1 to 10, got 11"),
        (["--prompt=x", "--stage=first"], "--stage=first does not generate; the generating stages are second"),
        (["--prompt=x", "--mask=mask.png"], "--mask needs --image"),
        (["--prompt=x", "--image=/nowhere.png"], "/nowhere.png: got No such file or directory, expected an image file"),
        (["--prompt=x", "--image=text.png"], "text.png"),
        (["--prompt=x", "--image=wide.png", "--mask=text.png"], "text.png"),
        (["--prompt=x", "--image=wide.png", "--mask=mask.png"], "--mask is (20, 20), --image is (40, 20)"),
        (["--prompt=x", "--image=square.png", "--mask=black.png"], "--mask has no white pixel"),
        (["--prompt=x", f"--out={ROOT}/LICENSE"], "cannot write to --out"),
        (["--prompt=x", "--config.seed=7"], "made by another config"),
    ],
)
def test_mistakes_in_sampling(fails, trained, tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    for name, size, value in (
        ("wide", (20, 40), 9),
        ("square", (20, 20), 9),
        ("mask", (20, 20), 255),
        ("black", (20, 20), 0),
    ):
        Image.fromarray(np.full((*size, 3), value, np.uint8)).save(f"{name}.png")
    Path("text.png").write_text("not a picture")
    assert message in fails(
        TOY, f"--workdir={trained}", "--mode=sample", *argv, lines=0 if argv and "seed" in argv[-1] else 1
    )


def test_pictures_of_any_shape_can_be_edited(trained, tmp_path):
    image = np.zeros((30, 50, 3), np.uint8)
    image[:, 25:] = 200
    Image.fromarray(image).save(tmp_path / "in.png")
    Image.fromarray(image).save(tmp_path / "mask.png")
    argv = [
        "vgen",
        TOY,
        f"--workdir={trained}",
        "--mode=sample",
        "--prompt=x",
        f"--out={tmp_path}",
        "--compilation_cache=",
    ]
    assert main([*argv, f"--image={tmp_path}/in.png", f"--mask={tmp_path}/mask.png"]) == 0
    got = np.asarray(Image.open(tmp_path / "second_0000.png"))
    assert got.shape == (16, 16, 3) and got[:, 0].max() == 0 and got[:, -1].min() == 200


def test_a_workdir_of_another_config_is_refused_with_a_diff(fails, trained):
    sentence = fails(
        TOY,
        f"--workdir={trained}",
        "--config.stages.first.train.steps=5",
        "--config.stages.second.task.noise=0.5",
        lines=0,
    )
    assert "was made by another config" in sentence
    assert "stages.first.train.steps: 4 -> 5" in sentence and "stages.second.task.noise: 0.1 -> 0.5" in sentence


def test_a_workdir_whose_record_is_damaged(fails, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "copy")
    (tmp_path / "copy" / "config.json").write_text("{")
    assert "cannot read" in fails(TOY, f"--workdir={tmp_path / 'copy'}")


def test_weight_files(fails, tmp_path):
    argv = [TOY, "--config.stages.second.init.fixed={'file': ''}", f"--workdir={tmp_path / 'run'}"]
    assert "init.fixed.file is empty: name the weight file" in fails(*argv)
    argv = [TOY, "--config.stages.second.init.fixed={'file': '/nowhere.npz'}", f"--workdir={tmp_path / 'run2'}"]
    assert "there is no weight file /nowhere.npz" in fails(*argv)


def test_as_a_process(tmp_path):
    """Without any set-up by a test: exit codes, one line, and help."""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    run = lambda *argv: subprocess.run(
        [sys.executable, "-m", "vgen.main", *argv], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    done = run("--config=nowhere.py", f"--workdir={tmp_path}")
    assert (done.returncode, done.stderr) == (2, "vgen: there is no config file nowhere.py\n")
    done = run(TOY, f"--workdir={tmp_path}/run", "--config.stages.first.train.step=3")
    assert done.returncode == 2 and re.fullmatch(
        r"vgen: config\.stages\.first\.train\.step: .*'steps'\?\n", done.stderr
    )
    done = run("--help")
    assert done.returncode == 0 and "--prompt:" in done.stdout and not done.stderr
