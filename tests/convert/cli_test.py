"""python -m vgen.convert: what it prints, what it writes, and how it ends."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import vgen
from tests.convert.load_test import SMALL, checkpoint
from vgen.convert import sources
from vgen.convert.__main__ import main
from vgen.convert.formats import held
from vgen.convert.show import size, total, tree
from vgen.convert.t5 import T5

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path):
    checkpoint(tmp_path / "t5", **SMALL)
    return tmp_path / "t5"


def fails(capsys, *args):
    """The sentence on stderr of a command that ends with code 2."""
    assert main([str(a) for a in args]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("vgen.convert: ") and "Traceback" not in err
    return err


def test_inspect(folder, capsys):
    assert main(["inspect", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(folder)
    assert any(line.split() == ["shared/weight", "40x16", "float32", "2.6", "kB"] for line in lines)
    assert any(line.split()[:3] == ["encoder/", "4,448", "values"] for line in lines)
    assert lines[-1] == "family: vgen.convert.t5:T5"
    count = sum(stored.nbytes for stored in sources.open_source(folder).tensors.values())
    assert lines[-2] == f"{len(sources.open_source(folder).tensors)} arrays, {size(count)}: {count // 4:,} float32"
    (folder / "config.json").write_text('{"architectures": ["GPT9"]}')
    assert main(["inspect", str(folder)]) == 0 and "family: not known" in capsys.readouterr().out


def test_numbered_parts_that_are_alike_share_their_lines():
    blocks = {f"b.{i}.{name}": held(np.zeros(n, np.float32)) for i in range(12) for name, n in (("w", 4), ("v", 1))}
    blocks["b.7.w"] = held(np.zeros(4, np.float16))
    lines = [line.split() for line in tree(blocks)]
    assert [line[0] for line in lines] == ["b/", "0..6/", "w", "v", "7/", "w", "v", "8..11/", "w", "v"]
    assert lines[0][1:] == ["60", "values", "232", "B"] and lines[1][1:] == ["7", "x", "5", "values", "140", "B"]
    assert total(blocks) == "24 arrays, 232 B: 56 float32, 4 float16"
    mixed = {"a": held(np.zeros(())), "a.b": held(np.zeros(2)), "a/c": held(np.zeros(1))}
    assert [line.split()[0] for line in tree(mixed)] == ["a", "a/", "b", "c"]
    assert [size(n) for n in (0, 999, 1000, 999_600, 2_345_000_000)] == ["0 B", "999 B", "1.0 kB", "1.0 MB", "2.35 GB"]


def test_import_and_export(folder, tmp_path, capsys):
    own, out = tmp_path / "own", tmp_path / "out"
    assert main(["import", str(folder), str(own)]) == 0
    assert sorted(path.name for path in own.iterdir()) == ["model.safetensors", "vgen.json"]
    jax.tree.map(np.testing.assert_array_equal, vgen.load(own)[1], vgen.load(folder)[1])
    assert main(["export", str(own), str(out)]) == 0
    want, got = sources.read_weights(folder), sources.read_weights(out)
    assert {name: a.tobytes() for name, a in got.items()} == {name: a.tobytes() for name, a in want.items()}
    assert json.loads((out / "config.json").read_text()) == json.loads((folder / "config.json").read_text())
    assert main(["export", str(own), str(tmp_path / "half" / "t5.npz"), "--dtype=float16"]) == 0
    assert {a.dtype for a in sources.read_weights(tmp_path / "half" / "t5.npz").values()} == {np.dtype(np.float16)}
    assert "written to" in capsys.readouterr().out


def test_verify(folder, capsys, monkeypatch):
    pytest.importorskip("transformers")
    assert main(["verify", str(folder)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("states") and "agrees: largest relative error" in out
    (folder / "config.json").rename(folder / "not_a_config.json")  # as a file of the authors has none
    assert main(["verify", str(folder), "--layout=vgen.convert.t5:T5"]) == 0 and "agrees" in capsys.readouterr().out
    (folder / "not_a_config.json").rename(folder / "config.json")
    assert main(["verify", str(folder), "--tolerance=0"]) == 1 and "DIFFERS" in capsys.readouterr().out
    monkeypatch.setattr("vgen.convert.families.get", lambda name: T5._replace(reference=None))
    assert "no package has a reference network" in fails(capsys, "verify", folder)
    monkeypatch.setattr("vgen.convert.families.get", lambda name: T5._replace(reference="not_installed.models:T5"))
    assert "needs not_installed: pip install not_installed" in fails(capsys, "verify", folder)


def test_a_reference_that_is_a_function(folder, tmp_path, capsys, monkeypatch):
    transformers = pytest.importorskip("transformers")

    def reference(config):
        return transformers.T5EncoderModel(transformers.T5Config(**config))

    tied = (*T5.table(vgen.load(folder)[0]).ignore, r"encoder\.embed_tokens\.weight")
    family = T5._replace(reference=reference, table=lambda model: T5.table(model)._replace(ignore=tied))
    monkeypatch.setattr("vgen.convert.families.get", lambda name: family)
    assert main(["verify", str(folder)]) == 0
    assert main(["import", str(folder), str(tmp_path / "own")]) == 0
    assert main(["verify", str(tmp_path / "own")]) == 0
    monkeypatch.setattr("vgen.convert.families.get", lambda name: family._replace(table=T5.table))
    assert "differs in encoder.embed_tokens.weight" in fails(capsys, "verify", folder)


def test_a_pipeline(tmp_path, capsys):
    (tmp_path / "pipe").mkdir()
    for part in ("one", "two"):
        checkpoint(tmp_path / "pipe" / part, **SMALL)
    kinds = {part: ["transformers", "T5EncoderModel"] for part in ("one", "two")}
    (tmp_path / "pipe" / "model_index.json").write_text(json.dumps(kinds))
    pipe = str(tmp_path / "pipe")
    assert main(["inspect", pipe]) == 0 and "\ntwo: " in capsys.readouterr().out
    assert main(["import", pipe, str(tmp_path / "own")]) == 0 and capsys.readouterr().out
    assert vgen.load(tmp_path / "own" / "two")[0] == vgen.load(tmp_path / "pipe" / "two")[0]
    assert main(["inspect", pipe, "--part=one"]) == 0 and "two" not in capsys.readouterr().out
    assert "has no part 'three'; there are one, two" in fails(capsys, "inspect", pipe, "--part=three")
    assert "--family needs --part" in fails(capsys, "inspect", pipe, "--family=vgen.convert.t5:T5")


def test_mistakes_end_as_one_sentence(folder, tmp_path, capsys):
    assert "there is no weight file" in fails(capsys, "inspect", tmp_path / "gone.safetensors")
    assert "no weights in this folder" in fails(capsys, "inspect", tmp_path)
    assert "is not empty" in fails(capsys, "import", folder, folder)
    assert "cannot write to" in fails(capsys, "import", folder, folder / "config.json" / "x")
    assert "this is one network" in fails(capsys, "verify", folder, "--part=unet")
    assert "expected one of float32, bfloat16" in fails(capsys, "export", folder, tmp_path / "x", "--dtype=int8")
    assert "no module 'vgen.convert.t6'" in fails(capsys, "verify", folder, "--family=vgen.convert.t6:T5")
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    assert "speaks of" in fails(capsys, "export", folder, tmp_path / "x") and not (tmp_path / "x").exists()


def test_as_a_process(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "vgen.convert", "inspect", "hf:../x"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.startswith("vgen.convert: 'hf:../x' is not an address")
    assert len(done.stderr.splitlines()) == 1 and not done.stdout
