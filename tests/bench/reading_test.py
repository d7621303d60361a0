"""The table of what sources give: every kind is written, read and told; rates are of whole batches."""

import re

import pytest

from vgen.bench import reading
from vgen.bench.__main__ import main
from vgen.data import sources


def test_every_kind_is_read(capsys):
    """In threads and in processes, from data sets written for it."""
    assert main(["input", "--count=32", "--size=16", "--runs=1", "--only=^(webd|sa1b)"]) == 0
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in rows[2:]] == ["webdataset", "sa1b"]
    for row in rows[2:]:
        one, threads, processes, best = (float(cell.replace(",", "")) for cell in row[2:])
        assert min(one, threads, processes) > 0
        assert best == pytest.approx(max(threads, processes) / one, rel=0.1, abs=0.006)


def test_all_kinds_have_a_row():
    kinds = {kind.partition(":")[0] for kind in sources.KINDS} - {"tfds"}
    assert {re.split(",", name)[0] for name in reading.KINDS} == kinds


def test_pictures_are_counted(monkeypatch, tmp_path):
    """As many as are told, behind those that were made ahead; one second a batch gives the size of a batch."""
    now = iter(range(1000))
    monkeypatch.setattr(reading.time, "perf_counter", lambda: next(now))
    source, _ = reading._digits(tmp_path, [], 64, 8)
    assert reading._batches(source, 96, 8, 0, 1) == 96.0 and reading._bare(source, 64, 8) == 64.0


@pytest.mark.parametrize(
    "args, sentence",
    [(["--count=5"], "--count must be at least 32"), (["--only=nothing"], "--only=nothing matches none of folder")],
)
def test_mistakes(args, sentence, capsys):
    assert main(["input", *args]) == 2
    assert sentence in capsys.readouterr().err
