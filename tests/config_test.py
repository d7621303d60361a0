"""Specs become objects, and every mistake in one names its key."""

import dataclasses
from typing import Any

import pytest
from flax import linen as nn
from ml_collections import ConfigDict

from vgen.config import ConfigError, UserError, arguments, build, call, diff, resolve, to_dict, to_json


@dataclasses.dataclass(frozen=True)
class Leaf:
    rate: float = 0.5
    sizes: tuple[int, ...] = ()
    name: str | None = None

    def __post_init__(self):
        if self.rate < 0:
            raise ValueError(f"rate must not be negative, got {self.rate}")


@dataclasses.dataclass(frozen=True)
class Tree:
    leaf: Leaf
    depth: int = 1
    others: Any = None


class Layer(nn.Module):
    width: int


def opened(path: str):
    raise FileNotFoundError(f"looked for {path}")


LEAF, TREE = f"{__name__}:Leaf", f"{__name__}:Tree"


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """This module under its name, however the test runner imported it."""
    import sys

    monkeypatch.setitem(sys.modules, __name__, sys.modules.get(__name__) or type(sys)(__name__))
    for thing in (Leaf, Tree, Layer, opened):
        monkeypatch.setattr(sys.modules[__name__], thing.__name__, thing, raising=False)


def test_build_nests_through_dicts_lists_and_tuples():
    leaf = dict(target=LEAF, rate=1)
    built = build(ConfigDict(dict(target=TREE, leaf=leaf, others=dict(a=[leaf], b=(dict(leaf, rate=2.0), 3)))))
    assert built == Tree(Leaf(1), 1, {"a": [Leaf(1)], "b": (Leaf(2.0), 3)})


def test_lists_become_tuples_and_ints_are_floats():
    assert build(dict(target=LEAF, sizes=[1, 2], rate=2)) == Leaf(2, (1, 2))
    assert build(dict(target=LEAF), name="given") == Leaf(name="given")


@pytest.mark.parametrize(
    "spec, message",
    [
        (dict(target=LEAF, rats=1.0), r"config\.rats: .*Leaf does not take it; did you mean 'rate'\?"),
        (dict(target=LEAF, xyz=1), r"config\.xyz: .* it takes rate, sizes, name"),
        (dict(target=LEAF, rate="fast"), r"config\.rate: expected float, got 'fast' \(str\)"),
        (dict(target=LEAF, rate=True), r"config\.rate: expected float, got True"),
        (dict(target=LEAF, sizes=("a",)), r"config\.sizes: expected tuple"),
        (dict(target=TREE), r"config: .*Tree also needs leaf"),
        (dict(target=TREE, leaf=dict(target=LEAF, rte=1)), r"config\.leaf\.rte: .* did you mean 'rate'"),
        (dict(target=TREE, leaf=dict(target=LEAF), others=[0, dict(target=LEAF, rte=1)]), r"config\.others\[1\]\.rte"),
        (dict(target=TREE, leaf=3), r"config\.leaf: expected Leaf, got 3"),
        (dict(target=LEAF, rate=-1.0), r"config: rate must not be negative, got -1\.0"),
        (dict(target=f"{__name__}:opened", path="/x"), r"config: looked for /x"),
        (dict(rate=1), r"config: a spec needs a 'target'.*\['rate'\]"),
        (dict(target=f"{__name__}:Leef"), r"has no 'Leef'; did you mean 'Leaf'\?"),
        (dict(target="vgen.nowhere:Leaf"), r"there is no module 'vgen\.nowhere'"),
        (dict(target="vgen.config.build"), r"must look like 'package\.module:Name'"),
        (dict(target=":build"), r"must look like"),
        (dict(target=f"{__name__}:Layer", width=3, parent=None), r"config\.parent: .* does not take it"),
    ],
)
def test_errors_name_the_key(spec, message):
    with pytest.raises(ConfigError, match=message) as caught:
        build(spec)
    assert isinstance(caught.value, UserError) and isinstance(caught.value, ValueError)


def test_a_key_set_twice():
    with pytest.raises(ConfigError, match=r"here\.rate: is set by the program, remove it"):
        build(dict(target=LEAF, rate=1.0), where="here", rate=2.0)


def test_a_missing_dependency_is_not_taken_for_a_missing_target(tmp_path, monkeypatch):
    (tmp_path / "needs_it.py").write_text("import needs_it_not_installed\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="needs_it_not_installed"):
        resolve("needs_it:Thing")


def test_arguments_checks_without_calling():
    assert arguments(Leaf, dict(rate=-1.0), "here") == dict(rate=-1.0)
    with pytest.raises(ConfigError, match=r"here\.depht: Tree .*did you mean 'depth'"):
        arguments(Tree, dict(leaf=Leaf(), depht=2), "here")
    assert call(Leaf, dict(rate=0.25), "here") == Leaf(0.25)


def test_diff_and_json():
    old, new = dict(a=dict(b=1, c=[1, 2]), d=1), dict(a=dict(b=2, c=[1, 2]), e="x")
    assert diff(old, new) == ["a.b: 1 -> 2", "d: 1 -> '(unset)'", "e: '(unset)' -> 'x'"]
    assert diff(old, old) == []
    config = ConfigDict(dict(b=(1, dict(c=2)), a=None))
    assert to_dict(config) == {"a": None, "b": (1, {"c": 2})}
    assert to_json(config).split() == '{ "a": null, "b": [ 1, { "c": 2 } ] }'.split()
