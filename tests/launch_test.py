"""The launch scripts: their arguments, what they would run, and that flags reach vgen.main unharmed by the shells."""

import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[1] / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))
HARD = ["--config=configs/muse.py:tiny", "--workdir=/a b/run", "--config.prompts=('it is $5', \"a `b`\")", "--prompt=*"]


def run(script, *args, env=None, **kwargs):
    return subprocess.run(
        [LAUNCH / script, *args],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **(env or {})},
        **kwargs,
    )


def program(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/usr/bin/env bash\n" + text)
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_syntax_and_help(script):
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    assert os.access(script, os.X_OK)
    done = run(script.name, "--help")
    assert done.returncode == 0 and done.stdout.startswith(f"launch/{script.name} ") and not done.stderr
    named = set(re.findall(r"--[a-z-]+[a-z]", done.stdout)) - {"--config", "--workdir", "--stage", "--partition"}
    accepted = set(re.findall(r"(?m)^    (--[a-z-]+[a-z])(?:=\*)?\)", script.read_text()))
    assert named == accepted


@pytest.mark.parametrize(
    "args, complaint",
    [
        (["local.sh", "--processes=0", "--", "--config=c"], "--processes must be a positive number, got '0'"),
        (["local.sh", "--proceses=2", "--", "--config=c"], "unknown argument '--proceses=2'"),
        (["local.sh"], "no flags for vgen.main"),
        (["slurm.sh", "--nodes=two", "--", "--config=c"], "--nodes must be a positive number, got 'two'"),
        (["slurm.sh", "--time=soon", "--", "--config=c"], "--time looks like"),
        (["slurm.sh", "--config=c"], "unknown argument '--config=c'; the flags of vgen.main go behind --"),
        (["slurm.sh", "--nodes=2"], "no flags for vgen.main"),
        (["tpu.sh", "start", "--name=a", "--zone=b"], "got 'start'"),
        (["tpu.sh", "create", "--name=a", "--zone=b"], "create needs --type"),
        (["tpu.sh", "logs", "--name=a"], "needs --name=NAME and --zone=ZONE"),
        (["tpu.sh", "setup", "--name=a", "--zone=b", "--nfs=share"], "--nfs looks like"),
        (["tpu.sh", "train", "--name=a", "--zone=b"], "no flags for vgen.main"),
        (["tpu.sh", "delete", "--name=a", "--zone=b", "--", "--config=c"], "delete takes nothing behind --"),
    ],
    ids=lambda value: " ".join(value[:3]) if isinstance(value, list) else "",
)
def test_wrong_arguments(args, complaint):
    done = run(*args)
    assert done.returncode == 2 and not done.stdout
    assert complaint in done.stderr and len(done.stderr.splitlines()) == 1


def test_local_dry_run():
    done = run(
        "local.sh", "--processes=3", "--devices=4", "--port=1234", "--dry-run", "--", *HARD, env={"PYTHON": "py"}
    )
    assert done.returncode == 0, done.stderr
    lines = [shlex.split(line) for line in done.stdout.splitlines()]
    assert len(lines) == 3
    for i, line in enumerate(lines):
        assert line[-4:] == HARD and line[-6:-4] == ["py", str(LAUNCH / "worker.py")]
        assert {f"VGEN_PROCESS_ID={i}", "VGEN_NUM_PROCESSES=3", "JAX_COORDINATOR_ADDRESS=localhost:1234"} <= set(line)
        assert any(part.endswith("--xla_force_host_platform_device_count=4") for part in line)


def test_local_starts_all_and_ends_all_when_one_fails(tmp_path):
    """Process 0 would wait for ever; process 1 fails with code 7 once process 0 is there."""
    python = program(
        tmp_path / "python",
        f"cd {tmp_path}; touch started$VGEN_PROCESS_ID; [[ $VGEN_PROCESS_ID == 0 ]] && exec sleep 50\n"
        "until [[ -e started0 ]]; do sleep 0.02; done; exit 7",
    )
    done = run("local.sh", "--processes=2", "--", "--config=c", env={"PYTHON": python})
    assert done.returncode == 7
    assert {path.name for path in tmp_path.glob("started*")} == {"started0", "started1"}


def test_local_hands_on_sigterm(tmp_path):
    python = program(
        tmp_path / "python",
        f'me={tmp_path}/$VGEN_PROCESS_ID; trap "touch $me.stopped; exit 0" TERM; touch $me.started\n'
        "for i in {1..300}; do sleep 0.1; done",
    )
    command = [LAUNCH / "local.sh", "--processes=2", "--", "--config=c"]
    with subprocess.Popen(command, env=os.environ | {"PYTHON": python}) as process:
        for i in range(2):
            wait_for(tmp_path / f"{i}.started")
        process.terminate()
        assert process.wait(timeout=20) == 0
    assert (tmp_path / "0.stopped").exists() and (tmp_path / "1.stopped").exists()


def test_slurm(tmp_path):
    """sbatch and srun are replaced by programs that do here what Slurm would do on the machines it gives."""
    program(
        tmp_path / "bin/sbatch",
        f'printf "%s\\n" "$@" > {tmp_path}/sbatch; last="${{@: -1}}"; bash -c "${{last#--wrap=}}"',
    )
    program(tmp_path / "bin/srun", f'printf "%s\\n" "$@" > {tmp_path}/srun')
    env = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "PYTHON": "py"}
    given = ["--nodes=2", "--gpus=4", "--time=1:00:00", f"--logs={tmp_path}/logs", "--sbatch=--partition=fast queue"]
    done = run("slurm.sh", *given, "--", *HARD, env=env)
    assert done.returncode == 0, done.stderr
    sbatch, srun = ((tmp_path / name).read_text().splitlines() for name in ("sbatch", "srun"))
    wanted = {"--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4", "--time=1:00:00", "--partition=fast queue"}
    assert wanted <= set(sbatch)
    assert srun[-6:] == ["py", str(LAUNCH / "worker.py"), *HARD]
    assert (tmp_path / "logs").is_dir()


def test_tpu_steps():
    place = ["--name=muse", "--zone=us-east5-a", "--project=mine", "--dry-run"]
    lines = {}
    for step, more in (("create", ["--type=v5p-64", "--spot"]), ("setup", ["--nfs=10.0.0.2:/share"]), ("delete", [])):
        done = run("tpu.sh", step, *place, *more)
        assert done.returncode == 0, done.stderr
        lines[step] = [shlex.split(line) for line in done.stdout.splitlines()]
    prefix = ["gcloud", "compute", "tpus", "tpu-vm"]
    where = ["--zone=us-east5-a", "--project=mine"]
    version = "--version=v2-alpha-tpuv5"
    assert lines["create"] == [[*prefix, "create", "muse", *where, "--accelerator-type=v5p-64", version, "--spot"]]
    assert lines["delete"] == [[*prefix, "delete", "muse", *where]]
    archive, copy, *rest = lines["setup"]
    assert archive[0] == "git" and copy[:5] == [*prefix, "scp"] and copy[5] == archive[-2].removeprefix("--output=")
    assert all(line[:6] == [*prefix, "ssh", "muse"] and "--worker=all" in line for line in rest)
    assert "mount 10.0.0.2:/share /mnt/shared" in rest[-1][-1]


def test_tpu_train_and_stop(tmp_path):
    """gcloud is replaced by a program that runs the remote command here, in a home of its own."""
    program(
        tmp_path / "bin/gcloud",
        f'cd {tmp_path}; export HOME={tmp_path}; last="${{@: -1}}"; bash -c "${{last#--command=}}"',
    )
    program(
        tmp_path / "venv/bin/python",
        f'printf "%s\\n" "$@" > {tmp_path}/args.part; trap "touch {tmp_path}/stopped; exit" TERM\n'
        f"mv {tmp_path}/args.part {tmp_path}/args; for i in {{1..300}}; do sleep 0.1; done",
    )
    (tmp_path / "vgen").mkdir()
    env = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
    assert run("tpu.sh", "train", "--name=a", "--zone=b", "--", *HARD, env=env).returncode == 0
    wait_for(tmp_path / "args")
    assert (tmp_path / "args").read_text().splitlines() == ["launch/worker.py", *HARD]
    assert run("tpu.sh", "stop", "--name=a", "--zone=b", env=env).returncode == 0
    wait_for(tmp_path / "stopped")


def wait_for(path, seconds=20):
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.05)


@pytest.mark.parametrize("names", [("VGEN_PROCESS_ID",), ("VGEN_PROCESS_ID", "VGEN_NUM_PROCESSES")])
def test_worker_wants_all_of_its_variables(names):
    env = {key: value for key, value in os.environ.items() if not key.startswith(("VGEN_", "JAX_COORD"))}
    command = [sys.executable, LAUNCH / "worker.py", "--config=c"]
    done = subprocess.run(command, env=env | dict.fromkeys(names, "0"), capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "set JAX_COORDINATOR_ADDRESS, VGEN_NUM_PROCESSES and VGEN_PROCESS_ID together" in done.stderr
