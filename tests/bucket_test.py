"""Runs whose workdir is in a bucket: gs:// of an emulator on this machine, memory:// for what orbax does not know."""

import json
import shutil
from pathlib import Path

import fsspec
import jax
import numpy as np
import pytest
from PIL import Image

import vgen
from vgen import bucket as buckets
from vgen.bucket import Bucket
from vgen.checkpoint import Checkpoints
from vgen.checkpoint_show import main as checkpoint
from vgen.config import UserError
from vgen.data.text import BPE
from vgen.main import main

ROOT = Path(__file__).parents[1]
TOY = f"--config={ROOT}/tests/toy_config.py"


def run(*argv: str) -> int:
    return main(["vgen", TOY, "--compilation_cache=", *argv])


def weights(url: str, stage: str, scratch: Path) -> tuple[dict[str, np.ndarray], int]:
    bucket = Bucket(url, scratch)
    found, step = Checkpoints(bucket.folder / stage, read_only=True, bucket=bucket).weights()
    return {path: np.asarray(value) for path, value in found.items()}, step


def files(url: str) -> dict[str, bytes]:
    there, root = fsspec.url_to_fs(url)
    return {name.removeprefix(root).strip("/"): there.cat_file(name) for name in there.find(root)}


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("local") / "run"
    assert run(f"--workdir={workdir}") == 0
    return workdir


@pytest.fixture(params=["gs", "memory"])
def url(request, tmp_path, monkeypatch):
    """The address of a run that is not there yet; this machine has an empty scratch."""
    if request.param == "gs":
        request.getfixturevalue("gs")
    monkeypatch.setenv("VGEN_SCRATCH", str(tmp_path / "scratch"))
    return f"{request.param}://runs/{tmp_path.name}"


def test_a_run_goes_on_from_the_bucket_on_another_machine(url, local, tmp_path, monkeypatch, capsys):
    two = ["--config.stages.first.train.steps=4", f"--workdir={url}"]
    assert run(*two, "--stage=first") == 0
    held = files(url)
    assert {"config.json", "tokenizer.json", "first/metrics.jsonl", "first/eval.json"} <= set(held)
    assert not any(name.endswith(".tmp") or "cache" in name or "damaged" in name for name in held)
    assert any(name.startswith("first/checkpoints/4/") for name in held)
    assert any(name.startswith("first/tensorboard/") for name in held)

    monkeypatch.setenv("VGEN_SCRATCH", str(tmp_path / "another"))
    assert run(f"--workdir={url}") == 0
    printed = capsys.readouterr()
    assert f"1 pictures of stage second in {url}/samples" in printed.out
    assert f"written to {url}/eval.json" in printed.out
    held = files(url)
    for name in ("config.json", "tokenizer.json", "first/eval.json", "eval.json", "samples/second_0000.png"):
        assert held[name] == (local / name).read_bytes()
    steps = [json.loads(line)["step"] for line in held["first/metrics.jsonl"].decode().splitlines()]
    assert steps == [1, 2, 3, 4, 4]  # as the first machine left it
    assert any(name.startswith("second/tensorboard/") for name in held) and "samples/second_grid.png" in held

    shown = checkpoint(["show", url])
    printed = capsys.readouterr()
    if url.startswith("gs"):
        assert shown == 0 and "toy, seed 0, stages first, second" in printed.out
        assert "first: step 4" in printed.out and "with checksums" in printed.out and "frozen   fixed" in printed.out
        assert checkpoint(["show", f"{url}/second"]) == 0
        assert printed.out.split("second: step")[1] == capsys.readouterr().out.split("second: step")[1]
    else:
        assert shown == 2 and "only gs:// is read where it is" in printed.err

    third = tmp_path / "third"
    for stage in ("first", "second"):
        found, step = weights(url, stage, third)
        wanted, _ = Checkpoints(local / stage, read_only=True).weights()
        assert step == 4 and set(found) == set(wanted)
        for path, value in wanted.items():
            np.testing.assert_array_equal(found[path], np.asarray(value), err_msg=path)
    monkeypatch.setenv("VGEN_SCRATCH", str(third))
    sample = [f"--workdir={url}", "--mode=sample", "--prompt=a red circle", f"--out={tmp_path / 'out'}"]
    assert run(*sample) == 0 and run("--mode=eval", f"--workdir={url}") == 0
    drawn = np.asarray(Image.open(tmp_path / "out" / "second_0000.png"))
    np.testing.assert_array_equal(drawn, np.asarray(Image.open(local / "samples" / "second_0000.png")))


def test_another_config_and_a_bucket_without_a_run(url, capsys):
    assert run(f"--workdir={url}", "--mode=sample", "--prompt=x") == 2
    assert f"{url} holds no run: train first with --mode=train --workdir={url}" in capsys.readouterr().err
    Bucket(url).begin()
    there, root = fsspec.url_to_fs(url)
    there.pipe_file(f"{root}/config.json", (json.dumps({"name": "toy", "scale": "x"})).encode())
    assert run(f"--workdir={url}", "--stage=first") == 2
    assert f"{url} was made by another config" in capsys.readouterr().err


def test_what_was_deleted_in_the_bucket_is_gone(url):
    """And what another run there had left on this machine is not taken for the new one's."""
    assert run(f"--workdir={url}", "--stage=first") == 0
    first = files(url)["first/metrics.jsonl"]
    there, root = fsspec.url_to_fs(url)
    there.rm(root, recursive=True)
    assert run(f"--workdir={url}", "--stage=first", "--config.seed=1") == 0
    held = files(url)
    assert json.loads(held["config.json"])["seed"] == 1 and held["first/metrics.jsonl"] != first
    assert len([name for name in held if name.startswith("first/tensorboard/")]) == 1


def test_a_stopped_run_goes_on(url, tmp_path, monkeypatch):
    """Steps that a stopped run logged beyond its checkpoint are taken again, on any machine."""
    steps = ["--config.stages.first.train.checkpoint_every=3", "--stage=first", f"--workdir={url}"]
    with monkeypatch.context() as patch:
        saved = []
        original = Checkpoints.save

        def save(self, step, *args):
            original(self, step, *args)
            saved.append(step)
            if step == 3:
                self.wait()
                raise KeyboardInterrupt

        patch.setattr(Checkpoints, "save", save)
        with pytest.raises(KeyboardInterrupt):
            run(*steps)
    monkeypatch.setenv("VGEN_SCRATCH", str(tmp_path / "another"))
    begun = []
    with monkeypatch.context() as patch:
        restore = Checkpoints.restore

        def noting(self, *args):
            found = restore(self, *args)
            begun.append(int(found[0].step))
            return found

        patch.setattr(Checkpoints, "restore", noting)
        assert run(*steps) == 0
    assert begun == [3]
    held = files(url)
    logged = [json.loads(line)["step"] for line in held["first/metrics.jsonl"].decode().splitlines()]
    assert logged in ([1, 2, 4, 4], [1, 2, 3, 4, 4])  # the stop may have come ahead of the third line


# ------------------------------------------------------------------------------------ copies of what orbax cannot write


@pytest.fixture
def memory(tmp_path, monkeypatch):
    monkeypatch.setenv("VGEN_SCRATCH", str(tmp_path / "scratch"))
    return f"memory://runs/{tmp_path.name}"


def state(value: float):
    from vgen.state import State

    leaf = jax.numpy.full(3, value)
    zero = jax.numpy.zeros((), jax.numpy.int32)
    return State(params={"a": leaf}, buffers={}, ema={}, opt={}, step=zero, key=zero, skipped=zero, bad_in_row=zero)


def test_a_damaged_copy_is_seen(memory, tmp_path):
    bucket, told = Bucket(memory), []
    checkpoints = Checkpoints(bucket.folder / "first", bucket=bucket, keep=3)
    for step in (1, 2):
        checkpoints.save(step, state(step))
    checkpoints.close()
    there, root = fsspec.url_to_fs(memory)
    victim = max(there.find(f"{root}/first/checkpoints/2/weights"), key=lambda name: len(there.cat_file(name)))
    there.pipe_file(victim, there.cat_file(victim)[:-1] + b"?")
    other = Bucket(memory, tmp_path / "another")
    reading = Checkpoints(other.folder / "first", bucket=other, warn=told.append)
    found, step = reading.weights()
    assert step == 1 and found["a"].tolist() == [1, 1, 1]
    assert len(told) == 1 and "checkpoints/2 is damaged (1 files changed" in told[0]
    reading.close()
    assert "2.crc.json" not in Bucket(memory).names(bucket.folder / "first" / "checkpoints")


def test_as_many_as_here_and_half_a_copy_is_not_read(memory, tmp_path):
    bucket = Bucket(memory)
    checkpoints = Checkpoints(bucket.folder / "first", bucket=bucket)
    for step in (0, 1, 2):
        checkpoints.save(step, state(step))
    checkpoints.close()
    assert bucket.names(bucket.folder / "first" / "checkpoints") == ["1", "1.crc.json", "2", "2.crc.json"]
    bucket.remove(bucket.folder / "first" / "checkpoints" / "2.crc.json")  # which is copied last
    for place in (Bucket(memory, tmp_path / "another"), bucket):  # nor what this machine has and the bucket has not
        reading = Checkpoints(place.folder / "first", bucket=place)
        assert reading.weights()[1] == 1
        reading.close()


def test_a_bucket_that_fails(memory, monkeypatch, capsys):
    """Training goes on, and tells in the end what has not been copied and where it is."""
    bucket, told = Bucket(memory), []
    checkpoints = Checkpoints(bucket.folder / "first", bucket=bucket, warn=told.append)
    with monkeypatch.context() as patch:
        patch.setattr(type(bucket.files), "pipe_file", _fail)
        checkpoints.save(1, state(1))
        checkpoints.wait()
    assert len(told) == 1 and f"cannot write to {memory}: no room" in told[0] and "tries again" in told[0]
    checkpoints.save(2, state(2))
    checkpoints.close()
    assert weights(memory, "first", bucket.folder.parent / "another")[1] == 2
    with monkeypatch.context() as patch:
        patch.setattr(type(bucket.files), "pipe_file", _fail)
        checkpoints = Checkpoints(bucket.folder / "first", bucket=bucket, warn=told.append)
        checkpoints.save(3, state(3))
        with pytest.raises(UserError, match=r"has not got checkpoints \[3\]; they are in .*/first/checkpoints"):
            checkpoints.close()
        assert run(f"--workdir={memory}", "--stage=first") == 2
    error = capsys.readouterr().err
    assert f"cannot write to {memory}: no room" in error and "Traceback" not in error


def _fail(*_, **__):
    raise OSError("no room")


def test_what_grows_is_copied_now_and_then(memory, monkeypatch):
    bucket, told = Bucket(memory, warn=lambda sentence: told.append(sentence)), []
    bucket.begin()
    log = bucket.folder / "metrics.jsonl"
    log.write_text("1\n")
    bucket.push_soon()
    bucket._copying.result()
    log.write_text("1\n2\n")
    bucket.push_soon()  # too soon
    assert files(memory) == {"metrics.jsonl": b"1\n"}
    monkeypatch.setattr("vgen.bucket.EVERY", 0)
    with monkeypatch.context() as patch:
        patch.setattr(type(bucket.files), "pipe_file", _fail)
        bucket.push_soon()
        bucket._copying.result()
    assert len(told) == 1 and "no room" in told[0]
    bucket.push_soon()
    bucket._copying.result()
    assert files(memory) == {"metrics.jsonl": b"1\n2\n"}
    sent = []
    monkeypatch.setattr(Bucket, "send", lambda self, path: sent.append(path))
    bucket.push()
    assert not sent  # nothing is new


def test_large_files_and_whole_folders(memory, monkeypatch):
    monkeypatch.setattr("vgen.bucket.SMALL", 4)
    bucket = Bucket(memory)
    folder = bucket.folder / "a" / "b"
    folder.mkdir(parents=True)
    (folder / "large").write_bytes(b"0123456789")
    (folder / "small").write_bytes(b"012")
    bucket.send(bucket.folder / "a")
    assert bucket.names(bucket.folder / "a" / "b") == ["large", "small"] and bucket.names(bucket.folder / "c") == []
    shutil.rmtree(bucket.folder)
    bucket.fetch(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {"large": b"0123456789", "small": b"012"}
    bucket.remove(folder)
    bucket.remove(folder)
    assert files(memory) == {} and (folder / "large").exists()


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--workdir=gs://"], "gs:// names no bucket: it looks like gs://BUCKET/FOLDER"),
        (["--workdir=nothing://a/b"], "cannot open nothing://a/b: Protocol not known: nothing"),
        (["--workdir=memory://a/b", "--out=gs://a/b"], "--out=gs://a/b is no folder of this machine"),
    ],
)
def test_mistakes(argv, message, capsys):
    assert run(*argv) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_package_that_is_not_there(monkeypatch):
    def missing(*_, **__):
        raise ImportError("Please install s3fs to access S3")

    monkeypatch.setattr(fsspec, "url_to_fs", missing)
    with pytest.raises(UserError, match=r"s3://a/b needs a package .* pip install 'vgen\[s3\]'"):
        Bucket("s3://a/b")


def test_two_buckets_with_names_alike_do_not_share_a_folder(tmp_path):
    assert Bucket("memory://a/b-c", tmp_path).folder != Bucket("memory://a/b/c", tmp_path).folder
    assert Bucket("memory://a/b/", tmp_path).folder == Bucket("memory://a/b", tmp_path).folder


# ------------------------------------------------------------------------------------------------- weights and words


def test_files_of_a_bucket_are_read_here(tmp_path, monkeypatch):
    """Copied once, again where they have changed, and of a folder what is asked for."""
    monkeypatch.setenv("VGEN_SCRATCH", str(tmp_path))
    there, root = fsspec.url_to_fs("memory://read/net")
    for name in ("config.json", "a.bin", "part/b.bin"):
        there.pipe_file(f"{root}/{name}", name.encode())
    fetched = []
    fetch = Bucket.fetch
    monkeypatch.setattr(Bucket, "fetch", lambda self, path: fetched.append(path.name) or fetch(self, path))
    assert buckets.local(tmp_path) == tmp_path and buckets.local("~") == Path.home()
    folder = buckets.local("memory://read/net/")
    assert {path.name: path.read_text() for path in folder.rglob("*n")} == {
        "config.json": "config.json", "a.bin": "a.bin", "b.bin": "part/b.bin"
    }  # fmt: skip
    assert sorted(fetched) == ["a.bin", "b.bin", "config.json"]
    there.pipe_file(f"{root}/a.bin", b"another")
    assert buckets.local("memory://read/net") == folder and (folder / "a.bin").read_text() == "another"
    assert buckets.local("memory://read/net/a.bin") == folder / "a.bin" and fetched[3:] == ["a.bin"]
    (folder / "a.bin").unlink()
    assert buckets.local("memory://read/net/a.bin").read_text() == "another"
    few = buckets.local(
        "memory://read/net/part", lambda names: [name for name in names if name == "c.bin"] or ["b.bin"]
    )
    assert [path.name for path in few.iterdir() if path.suffix == ".bin"] == ["b.bin"]
    with pytest.raises(UserError, match="there is no file at memory://read/none"):
        buckets.local("memory://read/none")
    there.store[f"{root}/../../out.bin"] = there.store[f"{root}/a.bin"]
    with pytest.raises(UserError, match="lie outside of the copy"):
        buckets.local("memory://read/net")
    assert not list(tmp_path.rglob("out.bin"))


def test_weights_and_tokenizers_come_from_buckets(tmp_path, monkeypatch, capsys):
    """A stage begins with a file of one; what is wrong with it is one sentence."""
    monkeypatch.setenv("VGEN_SCRATCH", str(tmp_path / "scratch"))
    there, root = fsspec.url_to_fs("memory://weights")
    np.savez(tmp_path / "fixed.npz", kernel=np.full((8, 4), 0.25, np.float32))
    there.pipe_file(f"{root}/fixed.npz", (tmp_path / "fixed.npz").read_bytes())
    BPE.train(["a red circle"] * 3, 260).save(tmp_path / "bpe.json")
    there.pipe_file(f"{root}/words/bpe.json", (tmp_path / "bpe.json").read_bytes())
    flags = ["--config.stages.second.init={'fixed': {'file': 'memory://weights/%s.npz'}}", "--stage=second"]
    flags += ["--config.text.path=memory://weights/words/bpe.json"]
    assert run(flags[0] % "none", *flags[1:], f"--workdir={tmp_path}/none") == 2
    assert "there is no file at memory://weights/none.npz" in capsys.readouterr().err
    assert run(flags[0] % "fixed", *flags[1:], f"--workdir={tmp_path}/run") == 0
    shape = Checkpoints(tmp_path / "run" / "second", read_only=True).weights()[0]["dense/kernel"].shape
    assert shape == (8, 4) and list((tmp_path / "scratch" / "read").glob("*/bpe.json"))
    with pytest.raises(UserError, match="there is no file at memory://weights/none"):
        vgen.load("memory://weights/none")
