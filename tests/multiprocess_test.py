"""Real processes of launch/worker.py on this machine: one, two or four of them with four devices in all.

What a run does must not depend on how many processes share its devices: the same losses, weights and pictures to the
bit.  And processes end together, whichever of them is stopped, killed or fails.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from tests import toy_config
from tests.toy import Linear, features
from vgen.bucket import Bucket
from vgen.checkpoint import Checkpoints
from vgen.config import UserError
from vgen.data.features import Features

ROOT = Path(__file__).parents[1]
SPLITS = (1, 2, 4)  # numbers of processes
DEVICES = 4
# Forks a process for each line {"env", "argv", "out", "err"}: what every one of them imports is imported once.
FORGE = """
import json, os, runpy, sys
import jax, grain, tensorboardX, torch
import vgen.main, vgen.stages, vgen.system, tests.multiprocess_test
for line in sys.stdin:
    order = json.loads(line)
    if "wait" in order:
        pid, status = os.waitpid(order["wait"], os.WNOHANG)
        print(json.dumps(os.waitstatus_to_exitcode(status) if pid else None), flush=True)
        continue
    pid = os.fork()
    if pid:
        print(pid, flush=True)
        continue
    os.setpgid(0, 0)
    for number, name in enumerate(("/dev/null", order["out"], order["err"])):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC), number)
    os.environ.update(order["env"])
    sys.argv = order["argv"]
    code = 1
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        code = end.code
    finally:
        import atexit
        atexit._run_exitfuncs()
        sys.stdout.flush(); sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)
"""


class Forge:
    """Starts processes of launch/worker.py quickly."""

    def __init__(self, cache: Path):
        env = os.environ | {
            "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "VGEN_HEARTBEAT_SECONDS": "10", "PYTHONWARNINGS": "ignore",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "TESTS_CACHE": str(cache),
        }  # fmt: skip
        self.cache = cache
        self.process = subprocess.Popen(
            [sys.executable, "-c", FORGE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, cwd=ROOT, text=True
        )

    def ask(self, order) -> int | None:
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


class Job:
    """Processes that run one command together, with the same number of devices in all."""

    def __init__(self, forge: Forge, processes: int, folder: Path, *argv: str, **env: str):
        self.forge, self.codes = forge, {}
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        folder.mkdir(parents=True, exist_ok=True)
        self.logs = [folder / f"{len(list(folder.iterdir())):03d}-{i}" for i in range(processes)]
        shared = {
            "JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "VGEN_NUM_PROCESSES": str(processes),
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES // processes}",
        }  # fmt: skip
        for log in self.logs:
            Path(f"{log}.err").touch()
        command = [f"{ROOT}/launch/worker.py", f"--compilation_cache={forge.cache}", *argv]
        self.pids = []
        for i, log in enumerate(self.logs):
            own = {name: value.replace("PROCESS", str(i)) for name, value in env.items()} | {"VGEN_PROCESS_ID": str(i)}
            order = {"env": shared | own, "argv": command, "out": f"{log}.out", "err": f"{log}.err"}
            self.pids.append(forge.ask(order))

    def err(self) -> str:
        return "".join(Path(f"{log}.err").read_text() for log in self.logs)

    def out(self, process: int) -> str:
        return re.sub(r"\[Gloo\].*\n", "", Path(f"{self.logs[process]}.out").read_text())

    def poll(self) -> list[int | None]:
        for pid in self.pids:
            if self.codes.get(pid) is None:
                self.codes[pid] = self.forge.ask({"wait": pid})
        return [self.codes[pid] for pid in self.pids]

    def wait(self, seconds: float = 120) -> list[int]:
        """The exit codes of all."""
        end = time.monotonic() + seconds
        while None in self.poll():
            assert time.monotonic() < end, f"still there after {seconds} s: {self.poll()}\n{self.err()}"
            time.sleep(0.05)
        return self.poll()

    def until(self, condition, seconds: float = 120) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert set(self.poll()) == {None} and time.monotonic() < end, f"{self.poll()}\n{self.err()}"
            time.sleep(0.01)

    def send(self, number: signal.Signals, *processes: int) -> None:
        for process in processes:
            os.kill(self.pids[process], number)

    def stop(self) -> None:
        for pid in self.pids:
            if self.codes.get(pid) is None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self.wait(20)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """start(processes, *argv): a Job; whatever is left of it in the end is killed."""
    forge, jobs = Forge(tmp_path_factory.mktemp("cache")), []

    def run(processes: int, *argv: str, **env: str) -> Job:
        jobs.append(Job(forge, processes, tmp_path_factory.mktemp("logs"), *argv, **env))
        return jobs[-1]

    yield run
    for job in jobs:
        job.stop()
    forge.process.kill()  # it holds nothing, and libraries may take long to end
    forge.process.wait(20)


def metrics(folder: Path) -> list[dict]:
    timing = ("step_seconds", "images_per_second", "data_wait")
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in row.items() if name not in timing} for row in rows]


def weights(folder: Path) -> tuple[dict[str, np.ndarray], int]:
    """Read on the one device of this process, whatever has written them."""
    found, step = Checkpoints(folder, read_only=True).weights()
    return {path: np.asarray(value) for path, value in found.items()}, step


def same(a, b) -> None:
    assert a[1] == b[1] and set(a[0]) == set(b[0])
    for path, value in a[0].items():
        np.testing.assert_array_equal(value, b[0][path], err_msg=path)


# ---------------------------------------------------------------------------------------------------------- the config


@dataclasses.dataclass(frozen=True)
class Net(Linear):
    """The toy, with pictures of noise of their own each, and features that can be cached."""

    def sample(self, params, key, conds, *, steps=2, guidance_scale=1.0):
        x = jax.random.normal(key, (len(next(iter(conds.values()))), self.size, self.size, 3))
        for i in range(4):
            noise = jax.random.normal(jax.random.fold_in(key, i), x.shape)
            x = jnp.where(i < steps, 0.7 * x + 0.3 * noise + params["dense"]["bias"].mean(), x)
        return {"image_out": jnp.clip(128 + 60 * guidance_scale * x, 0, 255).astype(jnp.uint8)}

    def evaluate(self, params, batches, key):
        loss = jax.jit(lambda params, batch: self.losses(params, None, batch, key)["main"].value)
        return {"loss": float(np.mean([loss(params, batch) for batch in batches]))}

    def feature_parts(self, kinds):
        return ["fixed"]

    def features(self, params, batch, kinds):
        return {"x": features(batch) @ params["fixed"]["kernel"] @ params["fixed"]["kernel"].T}


@dataclasses.dataclass(frozen=True)
class Seen:
    """An augmentation that changes nothing, and notes which pictures a process has read; or fails in one of them."""

    folder: str
    fails: int = -1

    def __call__(self, picture, rng):
        process = int(os.environ.get("VGEN_PROCESS_ID", "0"))
        if process == self.fails:
            raise UserError("the disk of this machine is broken")
        with (Path(self.folder) / f"seen-{process}").open("a") as file:
            file.write(hashlib.sha256(picture.tobytes()).hexdigest() + "\n")
        return picture


@dataclasses.dataclass(frozen=True)
class Shades:
    """How bright each picture of a system is."""

    def __call__(self, system):
        texts = [f"a blue square, {i}" for i in range(10)]  # of batches of 8: the last one is not full
        return {"scores": {stage: {str(i): float(x.mean()) for i, x in enumerate(drawn)}
                           for stage, drawn in system(texts, seed=1).items()}}  # fmt: skip


def get_config(scale: str = "short"):
    """Of the toy: a stage, and one that has what it needs from there and is trained on cached features."""
    config = toy_config.get_config("short")
    first, second = config.stages.first, config.stages.second
    second.cache = dict(features=("latents",), dtype="float32", shard_size=16)
    second.data = ConfigDict(second.data.to_dict())  # they are one object there
    for stage in (first, second):
        stage.task.target = "tests.multiprocess_test:Net"
        stage.train.batch_size = 8
        stage.train.min_shard_size = 8
    first.evaluate.batches = 1
    config.generate.batch_size = 8
    config.prompts = tuple(f"a red circle, {i}" for i in range(10))
    config.eval = dict(target="tests.multiprocess_test:Shades")
    return config


CONFIG = f"--config={__file__}"


def noting(folder: Path, fails: int = -1) -> str:
    """The flag for `Seen` in the first stage."""
    spec = dict(target="tests.multiprocess_test:Seen", folder=str(folder), fails=fails)
    return f"--config.stages.first.data.augment={spec}"


# --------------------------------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def runs(start, tmp_path_factory):
    """{processes: (workdir, Job)}: trained, drawn and measured; two replicas of two shards each."""
    found = {}
    for n in SPLITS:
        workdir = tmp_path_factory.mktemp(f"run{n}")
        found[n] = workdir, start(n, CONFIG, f"--workdir={workdir}", "--config.mesh.fsdp=2", noting(workdir))
    for n, (_, job) in found.items():
        assert job.wait(300) == [0] * n, job.err()
    return found


STAGES = ("first", "second")


@pytest.mark.parametrize("n", SPLITS[1:])
def test_the_same_run_on_any_number_of_processes(runs, n):
    one, other = runs[1][0], runs[n][0]
    for stage in STAGES:
        rows = metrics(one / stage)
        assert rows == metrics(other / stage) and sum("loss" in row for row in rows) == 4
        same(weights(one / stage), weights(other / stage))
    for name in ("first/eval.json", "eval.json", "tokenizer.json"):
        assert (one / name).read_text() == (other / name).read_text()
    pictures = {path.name: np.asarray(Image.open(path)) for path in (one / "samples").glob("*.png")}
    assert len(pictures) == 11 and len({picture.tobytes() for picture in pictures.values()}) == 11
    for name, picture in pictures.items():
        np.testing.assert_array_equal(picture, np.asarray(Image.open(other / "samples" / name)), err_msg=name)


@pytest.mark.parametrize("n", SPLITS[1:])
def test_the_first_process_alone_speaks_and_writes(runs, n):
    workdir, job = runs[n]
    assert "10 pictures of stage second" in job.out(0) and not any(job.out(i) for i in range(1, n))
    assert job.err().count("stage second finished") == 1 and "Traceback" not in job.err()
    assert len(list(workdir.glob("*/tensorboard/*"))) == 2 and not list(workdir.rglob("*.part"))
    lines = (workdir / "first" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 4]


def test_each_process_reads_its_own_share(runs):
    seen = {}
    for n in SPLITS:
        folder = runs[n][0]
        seen[n] = [set((folder / f"seen-{i}").read_text().split()) for i in range(n)]
        trained = 4 * 8 // n  # reading runs ahead of training
        assert all(trained <= len(mine) <= trained + 9 * 8 // n for mine in seen[n])
        assert len(set.union(*seen[n])) == sum(map(len, seen[n]))
    for four, two in ((0, 0), (1, 0), (2, 1), (3, 1)):
        assert len(seen[4][four] & seen[2][two]) >= 8 and not seen[4][four] & seen[2][1 - two]


def cached(workdir: Path) -> tuple[list[dict], list[int]]:
    folder = workdir / "cache" / "features-second" / "train"
    made_from = json.loads((folder / "manifest.json").read_text())["made_from"]
    found = Features(folder, {key: made_from[key] for key in made_from if key not in ("dtype", "format")}, "float32")
    source = found.source()
    return [{key: each[key] for key in ("x", "source_index")} for each in source.__getitems__(range(200))], (
        found.indices().tolist()
    )


def same_features(a, b) -> None:
    assert a[1] == b[1] == list(range(200))
    for mine, other in zip(a[0], b[0], strict=True):
        np.testing.assert_array_equal(mine["x"], other["x"])
        assert mine["source_index"] == other["source_index"]


def test_the_same_features(runs):
    for n in SPLITS[1:]:
        same_features(cached(runs[1][0]), cached(runs[n][0]))
        names = {path.name for path in runs[n][0].glob("cache/features-second/train/*.arrayrecord")}
        assert len(names) == 13 * n and f"data-00012-of-00013-001-of-{n:03d}.arrayrecord" in names


def test_checkpoints_go_onto_other_meshes_and_numbers_of_processes(runs, start, tmp_path):
    """Written by four with fsdp=2, drawn and measured by one, by two with tensor=2, and by one device."""
    from vgen.main import main

    workdir = runs[4][0]
    want = np.asarray(Image.open(workdir / "samples" / "second_0003.png"))
    more = ("--mode=sample", *(f"--prompt=a red circle, {i}" for i in range(10)), CONFIG, f"--workdir={workdir}")
    more = (*more, noting(workdir))
    job = start(2, *more, "--config.mesh.fsdp=2", "--config.mesh.tensor=2", f"--out={tmp_path / 'two'}")
    assert main(["vgen", *more, f"--out={tmp_path / 'one'}", "--compilation_cache="]) == 0
    assert job.wait() == [0, 0], job.err()
    for name in ("one", "two"):
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / name / "second_0003.png")), want)
    few = (*more, "--config.generate.batch_size=2")  # too few for all four: they are split in two
    job = start(2, *few, "--config.mesh.fsdp=2", f"--out={tmp_path / 'few2'}")
    assert main(["vgen", *few, f"--out={tmp_path / 'few1'}", "--compilation_cache="]) == 0
    assert job.wait() == [0, 0], job.err()
    drawn = [np.asarray(Image.open(tmp_path / name / "second_0003.png")) for name in ("few1", "few2")]
    np.testing.assert_array_equal(*drawn)
    assert (drawn[0] != want).any()
    told = subprocess.run(
        [sys.executable, "-m", "vgen.checkpoint", "show", workdir / "first"], capture_output=True, text=True, cwd=ROOT
    )
    assert told.returncode == 0, told.stderr
    assert "fsdp 2" in told.stdout and "batches 4, seen 32" in told.stdout, told.stdout


def test_measured_by_any_number_of_processes(runs, start, tmp_path):
    """What four have trained and measured, two measure again, and the first alone tells and writes it."""
    trained = runs[4][0]
    want = json.loads((trained / "eval.json").read_text())
    assert len(set(want["scores"]["second"].values())) == 10 and set(want["stages"]) == {"first"}
    shutil.copytree(trained, tmp_path / "run", ignore=shutil.ignore_patterns("cache"))
    (tmp_path / "run" / "eval.json").unlink()
    job = start(2, CONFIG, f"--workdir={tmp_path}/run", "--mode=eval", "--config.mesh.fsdp=2", noting(trained))
    assert job.wait() == [0, 0], job.err()
    assert json.loads((tmp_path / "run" / "eval.json").read_text()) == want
    assert job.out(0) and not job.out(1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["clip", "mae", "sam"])
def test_encoders_are_measured_by_any_number_of_processes(name, start, tmp_path):
    """Features and masks come from all devices; trained by two, measured by two and by one."""
    flags = (f"--config=configs/{name}.py:tiny", f"--workdir={tmp_path}", "--config.mesh.fsdp=2")
    reports = []
    for n, mode in ((2, "train"), (2, "eval"), (1, "eval")):
        job = start(n, *flags, f"--mode={mode}")
        assert job.wait(600) == [0] * n, job.err()
        reports.append(json.loads((tmp_path / "eval.json").read_text())["scores"])
        (tmp_path / "eval.json").unlink()
    assert reports[0]
    for other in reports[1:]:
        assert other.keys() == reports[0].keys()
        for row, found in other.items():
            for key, value in found.items():
                np.testing.assert_allclose(value, reports[0][row][key], rtol=1e-4, atol=1e-5, err_msg=f"{row} {key}")


def test_processes_along_tensor_read_the_same_rows(runs, start, tmp_path):
    """Two processes of one replica: both read and encode all, one writes it; rounding differs, nothing else."""
    workdir, noted = begun(runs, tmp_path)
    job = start(2, CONFIG, f"--workdir={workdir}", "--stage=second", noted, "--config.mesh.tensor=4")
    assert job.wait() == [0, 0], job.err()
    for one, other in zip(metrics(runs[1][0] / "second"), metrics(workdir / "second"), strict=True):
        for name, value in one.items():
            np.testing.assert_allclose(other[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    assert len(list(workdir.glob("cache/features-second/train/*.arrayrecord"))) == 13
    same_features(cached(runs[1][0]), cached(workdir))


def begun(runs, folder: Path) -> tuple[Path, str]:
    """(workdir, flag): a copy of the first run without what its second stage made."""
    shutil.copytree(runs[1][0], folder / "run", ignore=shutil.ignore_patterns("second", "features-second"))
    return folder / "run", noting(runs[1][0])


# ------------------------------------------------------------------------------------------------- stopped and killed

LONG = (
    CONFIG,
    "--stage=first",
    "--config.stages.first.train.steps=60",
    "--config.stages.first.train.checkpoint_every=5",
)


def steps(workdir: Path) -> list[int]:
    return sorted(int(path.name) for path in (workdir / "first" / "checkpoints").glob("*") if path.name.isdigit())


def test_killed_and_stopped_runs_go_on_with_other_numbers_of_processes(start, tmp_path):
    calm, stormy = tmp_path / "calm", tmp_path / "stormy"
    beyond = lambda step: lambda: max(steps(stormy), default=0) >= step
    undisturbed = start(1, *LONG, f"--workdir={calm}")

    job = start(2, *LONG, f"--workdir={stormy}")  # one of two is killed
    job.until(beyond(10))
    job.send(signal.SIGKILL, 1)
    assert job.wait(60) == [4, -signal.SIGKILL], job.err()
    sentence = "is gone; start all again with the same command, it goes on from the last checkpoint"
    assert job.err().count(f"vgen: process 1 of 2 {sentence}\n") == 1 and "Traceback" not in job.err(), job.err()
    killed = steps(stormy)[-1]
    assert 10 <= killed < 50

    job = start(4, *LONG, f"--workdir={stormy}")  # one of four is told to stop
    job.until(beyond(killed + 5))
    job.send(signal.SIGTERM, 2)
    assert job.wait(60) == [0] * 4, job.err()
    stopped = int(job.err().split("stopped at step ")[1].split()[0])
    assert steps(stormy)[-1] == stopped > killed and job.err().count("the same command goes on from there") == 1

    job = start(2, *LONG, f"--workdir={stormy}")  # the first is killed, which holds the coordination service
    job.until(lambda: "step " in job.err())
    job.send(signal.SIGKILL, 0)
    assert job.wait(60) == [-signal.SIGKILL, 4], job.err()
    assert f"vgen: process 0 of 2 {sentence}\n" in job.err()

    job = start(2, *LONG, f"--workdir={stormy}")  # all are told to stop, as by a pod's preemption
    job.until(lambda: "step " in job.err())
    job.send(signal.SIGTERM, 0, 1)
    assert job.wait(60) == [0, 0] and steps(stormy)[-1] >= stopped, job.err()

    assert start(1, *LONG, f"--workdir={stormy}").wait() == [0]
    assert undisturbed.wait() == [0]
    same(weights(calm / "first"), weights(stormy / "first"))
    losses = [{row["step"]: row["loss"] for row in metrics(run / "first") if "loss" in row} for run in (calm, stormy)]
    assert losses[0] == losses[1] and list(losses[0]) == list(range(1, 61))


def test_features_go_on_where_they_were_cut_off(runs, start, tmp_path):
    """Two processes, the first killed; then one alone, which reads and trains on what there is."""
    workdir, noted = begun(runs, tmp_path)
    written = lambda: list((workdir / "cache" / "features-second").rglob("*.arrayrecord"))
    command = (CONFIG, f"--workdir={workdir}", "--stage=second", noted, "--config.mesh.fsdp=2")
    job = start(2, *command)
    job.until(lambda: len(written()) >= 6)
    job.send(signal.SIGKILL, 0)
    assert job.wait(60) == [-signal.SIGKILL, 4], job.err()
    there = {path: path.stat().st_mtime_ns for path in written()}
    assert 6 <= len(there) < 26
    assert start(1, *command).wait() == [0]
    kept = [path for path, when in there.items() if path.exists() and path.stat().st_mtime_ns == when]
    assert len(kept) >= 4 and len(kept) % 2 == 0
    same_features(cached(runs[1][0]), cached(workdir))
    assert metrics(runs[1][0] / "second") == metrics(workdir / "second")


# ------------------------------------------------------------------------------------------------------------- mistakes


def test_mistakes_end_all_processes_with_one_sentence(start, tmp_path):
    jobs = {
        "there is no stage 'third'; toy has first, second": start(
            2, CONFIG, f"--workdir={tmp_path / 'a'}", "--stage=third"
        ),
        "process 1 of 2: the disk of this machine is broken": start(
            2, CONFIG, f"--workdir={tmp_path / 'b'}", noting(tmp_path, fails=1)
        ),
    }
    for sentence, job in jobs.items():
        assert job.wait(60) == [2, 2], job.err()
        told = [line for line in job.err().splitlines() if not line.startswith("first: ")]
        assert len(told) == 1 and told[0].startswith("vgen: ") and sentence in told[0], job.err()


@pytest.mark.parametrize("processes", [1, 2])
def test_a_checkpoint_that_cannot_be_written_ends_all(start, tmp_path, processes):
    """One of them may write small files alone: the others, which wait for its part, do not wait for long."""
    config = tmp_path / "full.py"
    config.write_text(
        "import os, resource\nfrom tests.toy_config import get_config as toy\ndef get_config():\n"
        f"    if os.environ['VGEN_PROCESS_ID'] == '{processes - 1}':\n"
        "        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "    return toy('long')\n"
    )
    job = start(processes, f"--config={config}", f"--workdir={tmp_path}/run", "--config.mesh.fsdp=2")
    assert job.wait(60) == [2] * processes, job.err()
    told = f"cannot write a checkpoint to {tmp_path}/run/first/checkpoints: "
    assert job.err().count(told) == 1 and "too large" in job.err() and "Traceback" not in job.err(), job.err()
    assert not steps(tmp_path / "run")


TOGETHER = """
import os, sys, time
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
address, me, path = sys.argv[1], int(sys.argv[2]), sys.argv[3]
jax.distributed.initialize(address, 2, me)
from vgen import hosts
place = NamedSharding(Mesh(jax.devices(), "x"), P("x"))
split = jax.make_array_from_callback((4,), place, lambda index: np.arange(4.0)[index])
assert not split.is_fully_addressable
told = [hosts.whole(split).tolist(), hosts.whole(np.ones(2)).tolist(), hosts.everyone({"me": me})]
with hosts.in_turn():
    if not me:
        time.sleep(0.5)
        open(path, "w").write("written first")
    told.append(open(path).read())
print(told, flush=True)
jax.distributed.shutdown()  # together: without process 0 the other is aborted
os._exit(0)
"""


def test_what_processes_tell_each_other(tmp_path):
    """Arrays of which each has a part come whole; what the first has written the others find."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    command = [sys.executable, "-c", TOGETHER, address]
    started = [
        subprocess.Popen([*command, str(i), str(tmp_path / "file")], env=env, stdout=subprocess.PIPE, text=True)
        for i in range(2)
    ]
    told = [re.sub(r"\[Gloo\].*\n", "", process.communicate(timeout=120)[0]).splitlines()[-1] for process in started]
    want = [[0.0, 1.0, 2.0, 3.0], [1.0, 1.0], [{"me": 0}, {"me": 1}], "written first"]
    assert told == [str(want)] * 2


def test_the_launch_script_itself(tmp_path):
    """Processes of their own, which also have to come to an end of their own."""
    script = ROOT / "launch" / "local_multiprocess.sh"
    args = ["--processes=2", "--devices=1", "--", CONFIG, f"--workdir={tmp_path / 'run'}", "--stage=first"]
    env = os.environ | {"PYTHON": sys.executable}
    done = subprocess.run([script, *args], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "[0] stage first finished" in done.stderr and "[1] stage" not in done.stderr
    assert (tmp_path / "run" / "first" / "eval.json").is_file()


@pytest.mark.slow
def test_processes_with_disks_of_their_own_share_a_bucket(runs, gs, start, tmp_path):
    """As machines of a pod do: each writes its part of a checkpoint to gs://, and one process goes on from there."""
    url = f"gs://runs/{tmp_path.name}"
    flags = (CONFIG, f"--workdir={url}", "--config.mesh.fsdp=2", noting(tmp_path))
    job = start(2, *flags, "--stage=first", VGEN_SCRATCH=f"{tmp_path}/disk-PROCESS", **gs)
    assert job.wait(180) == [0, 0], job.err()
    assert (tmp_path / "disk-1").is_dir() and not list(tmp_path.glob("disk-1/*/first/metrics.jsonl"))
    job = start(1, *flags, VGEN_SCRATCH=f"{tmp_path}/third", **gs)
    assert job.wait(180) == [0], job.err()
    disk, one = next((tmp_path / "third").iterdir()), runs[1][0]
    for stage in STAGES:
        assert metrics(disk / stage) == metrics(one / stage)
    assert (disk / "first" / "eval.json").read_text() == (one / "first" / "eval.json").read_text()
    found, step = Checkpoints(disk / "second", read_only=True, bucket=Bucket(url, tmp_path / "third")).weights()
    same(({path: np.asarray(value) for path, value in found.items()}, step), weights(one / "second"))
