"""Parameter trees by path: flat dicts {"encoder/conv_in/kernel": array}, matched by regular expressions."""

import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from vgen.config import ConfigError


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dict -> {"a/b/c": leaf}, in sorted order of the paths."""
    return dict(sorted(traverse_util.flatten_dict(dict(tree), sep="/").items()))


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{"a/b/c": leaf} -> nested dict."""
    return traverse_util.unflatten_dict(dict(flat), sep="/")


def subtree(flat: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The entries below `prefix`, named relative to it ("" gives everything)."""
    if not prefix:
        return dict(flat)
    return {path[len(prefix) + 1 :]: leaf for path, leaf in flat.items() if path.startswith(prefix + "/")}


def add_prefix(flat: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The inverse of `subtree`."""
    return {f"{prefix}/{path}" if prefix else path: leaf for path, leaf in flat.items()}


def group_paths(paths, groups: Mapping[str, str]) -> dict[str, list[str]]:
    """{group: the paths whose first fully matching regex is the group's}; ConfigError if a group matches nothing."""
    found: dict[str, list[str]] = {name: [] for name in groups}
    for path in paths:
        for name, pattern in groups.items():
            if re.fullmatch(pattern, path):
                found[name].append(path)
                break
    for name, members in found.items():
        if not members:
            raise ConfigError(
                f"group {name!r} ({groups[name]!r}) matches no parameter; there are e.g. {list(paths)[:5]}"
            )
    return found


def count(tree) -> int:
    """Number of values in a tree of arrays or shape structs."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def num_bytes(tree) -> int:
    """Bytes held by a tree of arrays or shape structs."""
    return sum(int(np.prod(leaf.shape)) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))


def check_same(got: Mapping[str, Any], want: Mapping[str, Any], what: str) -> None:
    """ConfigError listing every missing, unexpected or misshapen entry of flat dict `got` against `want`."""
    problems = [f"missing {path} {tuple(want[path].shape)}" for path in want if path not in got]
    problems += [f"unexpected {path} {tuple(got[path].shape)}" for path in got if path not in want]
    problems += [
        f"{path}: got {tuple(got[path].shape)}, expected {tuple(want[path].shape)}"
        for path in want
        if path in got and tuple(got[path].shape) != tuple(want[path].shape)
    ]
    if problems:
        more = f" (and {len(problems) - 20} more)" if len(problems) > 20 else ""
        raise ConfigError(f"{what} does not fit: " + "; ".join(problems[:20]) + more)
