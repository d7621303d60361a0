"""What a run writes: JSON lines, TensorBoard events, pictures and progress without a terminal."""

import json
import struct

import numpy as np
import pytest
from PIL import Image

from vgen.log import Log


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def events(folder):
    """{tag: {step: value}} of the event files, read as TensorBoard does: a restart at a step drops what came after.

    Records are length (uint64), its checksum (uint32), data, its checksum (uint32).
    """
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    found = {}
    for path in sorted((folder / "tensorboard").glob("events.*")):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            event = Event.FromString(data[at + 12 : at + 12 + length])
            at += 12 + length + 4
            if event.session_log.status == SessionLog.START:
                found = {tag: {s: v for s, v in seen.items() if s < event.step} for tag, seen in found.items()}
            for value in event.summary.value:
                size = (value.image.width, value.image.height)
                found.setdefault(value.tag, {})[event.step] = size if value.image.width else value.simple_value
    return found


@pytest.fixture
def log(tmp_path):
    log = Log(tmp_path / "stage", "stage")
    log.start(0, 10, 8)
    return log


def test_json_lines_with_null_for_what_is_not_finite(log):
    log.scalars(1, {"loss": np.float32(0.5), "norm": float("nan")})
    log.scalars(2, {"loss": float("inf"), "norm": 3})
    assert rows(log.folder) == [{"step": 1, "loss": 0.5, "norm": None}, {"step": 2, "loss": None, "norm": 3.0}]


def test_lines_beyond_the_checkpoint_are_taken_out_on_resuming(log):
    for step in (1, 2, 3, 4):
        log.scalars(step, {"loss": float(step)})
    log.finish()
    path = log.folder / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 5, "lo')  # killed while writing
    again = Log(log.folder, "stage")
    again.start(2, 10, 8)
    again.scalars(3, {"loss": 30.0})
    again.finish()
    assert [(row["step"], row["loss"]) for row in rows(log.folder)] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    assert events(log.folder)["loss"] == {1: 1.0, 2: 2.0, 3: 30.0}


def test_tensorboard_reads_numbers_and_pictures(log):
    image = np.zeros((4, 6, 3), np.uint8)
    image[1, 2] = (255, 128, 0)
    path = log.picture(7, "samples", image)
    log.scalars(7, {"loss": 0.25, "norm": float("nan")})
    log.finish()
    assert path == log.folder / "pictures" / "samples_0000007.png"
    np.testing.assert_array_equal(np.asarray(Image.open(path)), image)
    assert events(log.folder) == {"loss": {7: 0.25}, "samples": {7: (6, 4)}}


def test_progress_without_a_terminal(log, capsys):
    log.tick(1)
    log.tick(2)  # less than ten seconds later: silent
    log.scalars(10, {"loss": 0.125, "images_per_second": 7.0})
    log.scalars(10, {"eval/loss": 0.5})
    log.finish()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("stage: step 1/10, ") and " left" in lines[0]
    assert lines[1].startswith("stage: step 10/10, 0:00 left, loss 0.125, img/s 7")


def test_the_bar_on_a_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    log = Log(tmp_path, "base")
    log.start(4, 10, 8)
    log.scalars(5, {"loss": 0.125})
    log.tick(10)
    assert log.bar.n == 10
    log.finish()
    err = capsys.readouterr().err
    assert "base" in err and "10/10" in err and "loss 0.125" in err


def test_other_hosts_are_quiet(tmp_path, capsys):
    log = Log(tmp_path / "stage", "stage", quiet=True)
    log.start(0, 10, 8)
    log.tick(10)
    log.scalars(10, {"loss": 1.0})
    assert log.picture(10, "samples", np.zeros((2, 2, 3), np.uint8)) is None
    log.finish()
    assert not (tmp_path / "stage").exists() and not capsys.readouterr().err
