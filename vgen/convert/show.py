"""A checkpoint as a tree of names with shapes, dtypes and bytes."""

import re
from collections.abc import Mapping
from typing import Any

from vgen.convert.formats import Stored


def tree(tensors: Mapping[str, Stored]) -> list[str]:
    """Lines: one per array, one with a total per part; numbered parts that are alike share theirs ("0..23")."""
    root: dict[str, Any] = {}
    for name, stored in tensors.items():
        node = root
        *parents, leaf = re.split(r"[./]", name)
        for parent in parents:
            node = node.setdefault(parent + "/", {})
        node[leaf] = stored
    return _lines(root, 0)


def total(tensors: Mapping[str, Stored]) -> str:
    """One line: how many arrays, values, bytes, and of which types."""
    types: dict[str, int] = {}
    for stored in tensors.values():
        types[str(stored.dtype)] = types.get(str(stored.dtype), 0) + _values(stored)
    parts = ", ".join(f"{count:,} {name}" for name, count in sorted(types.items(), key=lambda item: -item[1]))
    return f"{len(tensors)} arrays, {size(sum(s.nbytes for s in tensors.values()))}: {parts or 'nothing'}"


def size(nbytes: float) -> str:
    """Bytes for people."""
    for unit in ("B", "kB", "MB"):
        if nbytes < 999.5:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} GB"


def _values(node: Any) -> int:
    if isinstance(node, Stored):
        count = 1
        for n in node.shape:
            count *= n
        return count
    return sum(_values(inner) for inner in node.values())


def _bytes(node: Any) -> int:
    return node.nbytes if isinstance(node, Stored) else sum(_bytes(inner) for inner in node.values())


def _form(node: Any) -> Any:
    """What must be equal for two parts to share their lines."""
    if isinstance(node, Stored):
        return node.shape, str(node.dtype)
    return tuple((key, _form(inner)) for key, inner in sorted(node.items()))


def _lines(node: Mapping[str, Any], depth: int) -> list[str]:
    lines: list[str] = []
    for first, last, inner, count in _runs(node):
        name = "  " * depth + (last if first == last else f"{first.rstrip('/')}..{last}")
        while isinstance(inner, dict) and len(inner) == 1:  # a part of one array takes one line
            ((only, inner),) = inner.items()
            name += only
        times = f"{count} x " if count > 1 else ""
        if isinstance(inner, Stored):
            shape = "x".join(map(str, inner.shape)) or "scalar"
            lines.append(f"{name:<44} {times}{shape} {inner.dtype}  {size(count * inner.nbytes)}")
        else:
            values, nbytes = count * _values(inner), count * _bytes(inner)
            lines.append(f"{name:<44} {times}{values // count:,} values  {size(nbytes)}")
            lines += _lines(inner, depth + 1)
    return lines


def _runs(node: Mapping[str, Any]) -> list[tuple[str, str, Any, int]]:
    """(first name, last name, part, how many) of neighbours in number whose parts are alike."""
    number = lambda key: int(key[:-1]) if key[:-1].isdecimal() else -1  # a part's name ends in a slash
    runs: list[tuple[str, str, Any, int]] = []
    for key in sorted(node, key=number):
        first, last, inner, count = runs[-1] if runs else ("", "", None, 0)
        if number(key) > 0 and number(key) == number(last) + 1 and _form(inner) == _form(node[key]):
            runs[-1] = (first, key, inner, count + 1)
        else:
            runs.append((key, key, node[key], 1))
    return runs
