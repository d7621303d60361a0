"""Rules that map the arrays of a published checkpoint to vgen's parameters and back.

A table is data: one `Rule` per kind of array, read from left to right to import and from right to left to export.

    Rule("encoder.layer.{i}.attention.query.weight", "layers/attn/q/kernel", LINEAR)

`{i}` stands for a number. Where the path on the right has the same placeholder, each array becomes a parameter of its
own; where it has not, the arrays of all numbers 0, 1, ... are stacked along a new first axis, as `nn.scan` keeps them.
A rule may join or split arrays: both sides may be tuples of names, and its operation sees and returns lists.
"""

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from vgen.config import UserError


class ConvertError(UserError):
    """A checkpoint does not fit the network; the message lists everything that is wrong."""


class _Misfit(ConvertError):
    """Arrays that an operation cannot treat, whatever their values."""


class Op(NamedTuple):
    """How arrays change on their way in (`forward`) and out (`backward`), which is its inverse.

    Both map a list of arrays, one per source name (or one per path, for `backward`), to a list of the other side.
    `forward` may raise ConvertError about their values; about shapes, whatever numpy raises is caught and explained.
    """

    forward: Callable[[list[np.ndarray]], list[np.ndarray]]
    backward: Callable[[list[np.ndarray]], list[np.ndarray]]


def each(forward: Callable[[np.ndarray], np.ndarray], backward: Callable[[np.ndarray], np.ndarray]) -> Op:
    """An Op that treats one array at a time."""
    return Op(lambda arrays: [forward(a) for a in arrays], lambda arrays: [backward(a) for a in arrays])


def transpose(*axes: int) -> Op:
    """An Op that permutes axes; `axes` as for numpy.transpose on the way in."""
    back = tuple(int(i) for i in np.argsort(axes))
    return each(lambda a: a.transpose(axes), lambda a: a.transpose(back))


def reshape(inside: Sequence[int], outside: Sequence[int]) -> Op:
    """An Op that gives arrays the shape `inside` on the way in and `outside` on the way out; -1 as in numpy."""
    return each(lambda a: a.reshape(inside), lambda a: a.reshape(outside))


def chain(*ops: Op) -> Op:
    """Ops one after the other on the way in, and backwards on the way out."""

    def forward(arrays):
        for op in ops:
            arrays = op.forward(arrays)
        return arrays

    def backward(arrays):
        for op in reversed(ops):
            arrays = op.backward(arrays)
        return arrays

    return Op(forward, backward)


def split(parts: int, axis: int = 0) -> Op:
    """One source array is cut into `parts` equal pieces along `axis` (a fused qkv), and joined again."""
    return Op(lambda a: np.split(a[0], parts, axis), lambda a: [np.concatenate(a, axis)])


COPY = each(lambda a: a, lambda a: a)
LINEAR = transpose(1, 0)  # torch Linear weight [out, in] <-> kernel [in, out]
CONV = transpose(2, 3, 1, 0)  # torch Conv2d weight [out, in, h, w] <-> kernel [h, w, in, out]
CONV_1X1 = chain(each(lambda a: a[:, :, 0, 0], lambda a: a[:, :, None, None]), LINEAR)  # as a dense kernel [in, out]
# torch ConvTranspose2d weight [in, out, h, w] <-> kernel [h, w, in, out] of flax's ConvTranspose, which does not flip.
CONV_TRANSPOSE = each(
    lambda a: a[:, :, ::-1, ::-1].transpose(2, 3, 0, 1), lambda a: a.transpose(2, 3, 0, 1)[:, :, ::-1, ::-1]
)
QKV = chain(split(3), LINEAR)  # torch Linear [3 width, in] in the order q, k, v <-> three kernels [in, width]
QKV_BIAS = split(3)


class Rule(NamedTuple):
    """src: name or names in the checkpoint.  dst: path or paths here.  op: between the two (see the module)."""

    src: str | tuple[str, ...]
    dst: str | tuple[str, ...]
    op: Op = COPY


class Table(NamedTuple):
    """The rules of one layout of a family.

    ignore: regular expressions of source names that carry nothing (counters, tables that code computes): left unread,
      and not written.  rename: (regular expression, replacement) pairs applied to source names before anything else,
      so that published and renamed spellings of one layout share the rules; export writes the names of the rules.
    tied: (name, other name) pairs, after renaming: the first holds the same values as the second and is left unread
      where both are stored, and read in its place where only the first is.
    """

    rules: tuple[Rule, ...]
    ignore: tuple[str, ...] = ()
    rename: tuple[tuple[str, str], ...] = ()
    tied: tuple[tuple[str, str], ...] = ()


class Match(NamedTuple):
    """One application of a rule: names[row][k] is the k-th source of row `row`; paths its targets; several rows are
    stacked."""

    names: tuple[tuple[str, ...], ...]
    paths: tuple[str, ...]
    op: Op
    stacked: bool


def _tuple(x) -> tuple[str, ...]:
    return (x,) if isinstance(x, str) else tuple(x)


_HOLE = re.compile(r"\{(\w+)\}")


def _pattern(template: str) -> re.Pattern:
    """A regular expression with a named group of digits per placeholder."""
    seen: set[str] = set()

    def hole(name: str) -> str:
        if name in seen:
            return f"(?P={name})"
        seen.add(name)
        return rf"(?P<{name}>\d+)"

    parts = _HOLE.split(template)
    return re.compile("".join(hole(p) if i % 2 else re.escape(p) for i, p in enumerate(parts)))


def renamed(names: Iterable[str], table: Table) -> dict[str, str]:
    """{name as the table knows it: name as stored}, without the ignored ones; ConvertError where two become one."""
    known: dict[str, str] = {}
    for stored in names:
        name = stored
        for pattern, replacement in table.rename:
            name = re.sub(pattern, replacement, name)
        if name in known:
            raise ConvertError(f"checkpoint: {known[name]!r} and {stored!r} both mean {name!r}")
        known[name] = stored
    for name, other in table.tied:
        if name in known:
            stored = known.pop(name)
            known.setdefault(other, stored)
    return {name: s for name, s in known.items() if not any(re.fullmatch(p, name) for p in table.ignore)}


def plan(names: Iterable[str], paths: Iterable[str], table: Table) -> list[Match]:
    """Which arrays make which parameters, for every rule, ahead of reading anything.

    names: as the table knows them (see `renamed`).  paths: of all parameters.
    Raises ConvertError listing names that no rule reads, paths that no rule fills, and gaps in numbered arrays.
    """
    matches, problems = _plan(names, paths, table)
    if problems:
        raise ConvertError(listed("the checkpoint does not fit the network", problems))
    return matches


def prepare(stored: Mapping[str, Any], table: Table, shapes: Mapping[str, Any]) -> tuple[list[Match], dict[str, str]]:
    """(`plan`, `renamed`) of a whole checkpoint whose arrays are all known to fit, before any of them is read.

    stored: {name as stored: anything with a shape and a dtype}.  shapes: {path: the same}, from jax.eval_shape.
    Raises ConvertError listing everything that is wrong at once: what `plan` lists, shapes, and integers that should be
    floating-point numbers or the reverse; between floating-point types any will do.
    """
    known = renamed(stored, table)
    matches, problems = _plan(known, shapes, table)
    for match in matches:
        problems += _misfits(match, {name: stored[known[name]] for row in match.names for name in row}, shapes)
    if problems:
        raise ConvertError(listed("the checkpoint does not fit the network", problems))
    return matches, known


def _misfits(match: Match, stored: Mapping[str, Any], shapes: Mapping[str, Any]) -> list[str]:
    """Where the arrays of a match have not the shapes and kinds of the parameters, found by hollow arrays."""
    want = {path: tuple(shapes[path].shape) for path in match.paths if path in shapes}
    got: dict[str, Any] = {}
    try:
        for row in rows(match, lambda name: np.broadcast_to(np.zeros((), stored[name].dtype), stored[name].shape)):
            got = {path: ((len(match.names),) * match.stacked + a.shape, a.dtype) for path, a in zip(match.paths, row)}
    except _Misfit as error:
        return [f"{error}, expected {', '.join(f'{path} {shape}' for path, shape in want.items())}"]
    except ConvertError:  # an operation that looks at values, for which zeros stand here: it will see the true ones
        return []
    wrong = [_unlike(path, *got[path], shapes[path]) for path in want]
    return [f"{line} (from {match.names[0][0]})" for line in wrong if line]


def _unlike(path: str, shape: Sequence[int], dtype: Any, want: Any) -> str:
    """What is wrong with an array for a parameter, "" if nothing is."""
    if tuple(shape) != tuple(want.shape):
        return f"{path}: got {tuple(shape)}, expected {tuple(want.shape)}"
    kinds = (jnp.bool_, jnp.integer, jnp.floating, jnp.complexfloating)
    if hasattr(want, "dtype") and any(jnp.issubdtype(dtype, k) != jnp.issubdtype(want.dtype, k) for k in kinds):
        return f"{path}: got {dtype}, expected {want.dtype}"
    return ""


def _plan(names: Iterable[str], paths: Iterable[str], table: Table) -> tuple[list[Match], list[str]]:
    """(matches, what is wrong)."""
    names, paths = sorted(names), set(paths)
    read, filled, problems, matches = set(), {}, [], []
    for rule in table.rules:
        for match in _matches(rule, names, problems):
            if not any(path in paths for path in match.paths):
                continue  # a part that this network lacks: its sources, if any, are reported as unread
            for path in match.paths:
                if path in filled:
                    problems.append(f"{path}: filled by {filled[path]} and by {match.names[0][0]}")
                filled[path] = match.names[0][0]
                if path not in paths:
                    problems.append(f"{path}: the network has no such parameter (from {match.names[0][0]})")
            read |= set(itertools.chain(*match.names))
            matches.append(match)
    problems += [f"unread {name}" for name in names if name not in read]
    problems += [f"unfilled {path}" for path in sorted(paths) if path not in filled]
    return matches, problems


def _matches(rule: Rule, names: Sequence[str], problems: list[str]) -> list[Match]:
    """The applications of one rule to a checkpoint's names."""
    sources, targets = _tuple(rule.src), _tuple(rule.dst)
    holes = _HOLE.findall(sources[0])
    outside = set(_HOLE.findall(targets[0]))
    stacked = [hole for hole in holes if hole not in outside]
    if len(stacked) > 1 or any(set(_HOLE.findall(s)) != set(holes) for s in sources):
        raise ValueError(f"Rule {rule.src!r}: one placeholder at most may be stacked, the same in all sources")
    pattern, have = _pattern(sources[0]), set(names)
    groups: dict[tuple, dict[int, tuple[str, ...]]] = {}
    for name in names:
        if found := pattern.fullmatch(name):
            values = found.groupdict()
            row = tuple(source.format(**values) for source in sources)
            if lacking := [s for s in row if s not in have]:
                problems.append(f"missing {', '.join(lacking)} (beside {name})")
                continue
            fixed = tuple(sorted((hole, values[hole]) for hole in set(holes) & outside))
            number = int(values[stacked[0]]) if stacked else 0
            groups.setdefault(fixed, {})[number] = row
    matches = []
    for fixed, rows in groups.items():
        if sorted(rows) != list(range(len(rows))):
            gone = sorted(set(range(max(rows) + 1)) - set(rows))
            problems.append(f"{sources[0]}: numbers {gone[:5]} are missing below {max(rows)}")
            continue
        paths = tuple(target.format(**dict(fixed)) for target in targets)
        matches.append(Match(tuple(rows[i] for i in range(len(rows))), paths, rule.op, bool(stacked)))
    return matches


def rows(match: Match, read: Callable[[str], np.ndarray]) -> Iterator[list[np.ndarray]]:
    """The arrays of a match row by row, one array per path; `read` gives an array by its name.

    Raises ConvertError where the rule cannot treat an array, or two rows have different shapes.
    """
    first = None
    for names in match.names:
        arrays = [read(name) for name in names]
        shapes = ", ".join(f"{name} {a.shape}" for name, a in zip(names, arrays))
        try:
            row = list(match.op.forward(arrays))
        except (ValueError, IndexError, TypeError) as error:
            raise _Misfit(f"{shapes}: {error}") from None
        if len(row) != len(match.paths):
            raise _Misfit(f"{shapes}: gives {len(row)} arrays for {', '.join(match.paths)}")
        first = first or [a.shape for a in row]
        if first != [a.shape for a in row]:
            raise _Misfit(f"{shapes}: not of the shape that {match.names[0][0]} has")
        yield row


def convert(match: Match, read: Callable[[str], np.ndarray]) -> dict[str, np.ndarray]:
    """{path: array} of one match; `read` gives an array by its name."""
    if not match.stacked:
        (row,) = rows(match, read)
        return dict(zip(match.paths, row, strict=True))
    whole: list[np.ndarray] = []
    for i, row in enumerate(rows(match, read)):  # row by row: one layer is held twice, and not the whole stack
        if not whole:
            whole = [np.empty((len(match.names), *a.shape), a.dtype) for a in row]
        for target, a in zip(whole, row, strict=True):
            target[i] = a
    return dict(zip(match.paths, whole, strict=True))


def load(
    read: Callable[[str], np.ndarray], names: Iterable[str], table: Table, shapes: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """All parameters of a checkpoint on the host, {path: array}; for large ones see `vgen.convert.load`.

    read: gives the array of a stored name.  shapes: {path: anything with a shape}, from jax.eval_shape.
    Raises ConvertError listing every unread name, unfilled path and wrong shape.
    """
    known = renamed(names, table)
    flat: dict[str, np.ndarray] = {}
    for match in plan(known, shapes, table):
        flat |= convert(match, lambda name: read(known[name]))
    check_shapes(flat, shapes)
    return flat


def check_shapes(flat: Mapping[str, Any], shapes: Mapping[str, Any]) -> None:
    """ConvertError listing every array whose shape, or kind of number, is not the parameter's."""
    wrong = [line for path, a in flat.items() if (line := _unlike(path, a.shape, a.dtype, shapes[path]))]
    if wrong:
        raise ConvertError(listed("the checkpoint's shapes are not the network's", wrong))


def export(flat: Mapping[str, Any], table: Table) -> dict[str, np.ndarray]:
    """{source name: array} of all parameters {path: array}, by the same rules backwards.

    Raises ConvertError listing parameters that no rule reads.
    """
    return dict(exported(flat, table))


def exported(flat: Mapping[str, Any], table: Table) -> Iterator[tuple[str, np.ndarray]]:
    """(source name, array) of all parameters {path: array}, one after the other; errors as of `export`, at once."""
    # np.ascontiguousarray would give scalars an axis
    return ((name, np.asarray(array, order="C")) for name, array in _written(flat, table))


def exported_shapes(shapes: Mapping[str, Any], table: Table) -> dict[str, tuple[int, ...]]:
    """{source name: shape} of what `exported` would write for {path: anything with a shape and a dtype}."""
    hollow = {path: np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape) for path, leaf in shapes.items()}
    return {name: array.shape for name, array in _written(hollow, table)}


def _written(flat: Mapping[str, Any], table: Table) -> Iterator[tuple[str, np.ndarray]]:
    used: set[str] = set()
    uses: list[tuple[Rule, dict[str, str], list[str]]] = []
    for rule in table.rules:
        pattern = _pattern(_tuple(rule.dst)[0])
        for path in flat:
            if path in used or not (found := pattern.fullmatch(path)):
                continue
            paths = [target.format(**found.groupdict()) for target in _tuple(rule.dst)]
            if all(p in flat for p in paths):
                used |= set(paths)
                uses.append((rule, found.groupdict(), paths))
    if lost := sorted(set(flat) - used):
        raise ConvertError(listed("no rule writes these parameters", lost))
    written = (_backward(rule, values, [flat[p] for p in paths]) for rule, values, paths in uses)
    return itertools.chain.from_iterable(written)


def _backward(rule: Rule, values: Mapping[str, str], arrays: Sequence[Any]) -> Iterator[tuple[str, np.ndarray]]:
    """(source name, array) of one use of a rule; values: of the placeholders on its right."""
    sources = _tuple(rule.src)
    stacked = set(_HOLE.findall(sources[0])) - set(_HOLE.findall(_tuple(rule.dst)[0]))
    arrays = [np.asarray(a) for a in arrays]
    for i in range(len(arrays[0])) if stacked else (None,):
        row = rule.op.backward(arrays if i is None else [a[i] for a in arrays])
        numbers = {**values, **{hole: str(i) for hole in stacked}}
        for source, a in zip(sources, row, strict=True):
            yield source.format(**numbers), a


def listed(what: str, problems: Sequence[str]) -> str:
    """A message that lists the first 40 of the problems, one a line."""
    more = f"\n  (and {len(problems) - 40} more)" if len(problems) > 40 else ""
    return f"{what}:\n  " + "\n  ".join(problems[:40]) + more
