"""What a compiled program does, read from its text: collectives, and bytes that go to and from memory.

XLA's own analysis counts the body of a loop once; here it counts as often as it runs.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

BITS = {
    "pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "bf16": 16, "f16": 16, "s32": 32, "u32": 32,
    "f32": 32, "s64": 64, "u64": 64, "f64": 64, "c64": 64, "c128": 128,
}  # fmt: skip
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# These name what is there, or stand for what is inside of them.
FREE = {
    "parameter", "tuple", "get-tuple-element", "bitcast", "constant", "while", "conditional", "call", "after-all",
    "opt-barrier", "partition-id", "replica-id", "iota",
}  # fmt: skip


class Instruction(NamedTuple):
    """One line of a program: its result's type as text, its operation, its operands' names, and all that follows."""

    name: str
    type: str
    operation: str
    operands: tuple[str, ...]
    rest: str


class Traffic(NamedTuple):
    """Of one run of a program on one device.

    collectives: {kind: (how many, bytes)}, the bytes being those of the whole array as a device has it behind an
      all-gather, ahead of a reduce-scatter, and of what it sends otherwise.
    memory: bytes read and written by all instructions, arrays that stay on the chip left out.
    """

    collectives: dict[str, tuple[int, float]]
    memory: float


def traffic(text: str, steps: int | None = None) -> Traffic:
    """Of `compiled.as_text()`.

    steps: how often a loop runs whose number is an argument of the program.  Raises ValueError for one without it.
    """
    computations, entry = parse(text)
    counts: dict[str, list[float]] = {}
    memory, seen = 0.0, {}
    for times, computation, fused in _walk(computations, entry, steps):
        types = {each.name: each.type for each in computation}
        for each in computation:
            kind = each.operation.removesuffix("-start")
            # One that runs inside of several products, a piece in each, is there several times by one number.
            channel = re.search(r"channel_id=(\d+)", each.rest)
            first = seen.setdefault((kind, channel[1]), each.name) == each.name if channel else True
            if kind in COLLECTIVES and first:
                found = counts.setdefault(kind, [0, 0.0])
                found[0] += times
                given = [n for name in each.operands for n in _sizes(types.get(name, ""))]
                found[1] += times * max(_sizes(each.type) + given)
            if not fused and each.operation not in FREE and not each.operation.endswith("-done"):
                memory += times * _moved(each, types, computations)
    return Traffic({kind: (int(n), size) for kind, (n, size) in sorted(counts.items())}, memory)


def parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """({computation: its instructions}, the name of the first one that runs)."""
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{\s*$", line):
            current = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and (found := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*)", line)):
            if (instruction := _instruction(found[1], found[2])) is not None:
                current.append(instruction)
    if not entry:
        raise ValueError("hlo: there is no ENTRY in this text; give that of a compiled program")
    return computations, entry


def _instruction(name: str, text: str) -> Instruction | None:
    """text: "type operation(operands), attributes"."""
    end = _closing(text, 0) if text.startswith("(") else text.find(" ") - 1
    call = re.match(r" ([\w\-]+)\(", text[end + 1 :])
    if call is None:
        return None
    start = end + 1 + call.end() - 1
    close = _closing(text, start)
    inside = text[start + 1 : close]
    literal = call[1] in ("constant", "parameter")  # a value, a number
    operands = (inside,) if literal else tuple(re.findall(r"%([\w.\-]+)", inside))
    return Instruction(name, text[: end + 1], call[1], operands, text[close + 1 :])


def _closing(text: str, start: int) -> int:
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if not depth:
            return i
    return len(text) - 1


def _walk(
    computations: Mapping[str, list[Instruction]], name: str, steps: int | None, times: float = 1, fused: bool = False
) -> Iterator[tuple[float, list[Instruction], bool]]:
    """(how often it runs, instructions, whether it is inside of a fusion) of a computation and all that it calls."""
    yield times, computations[name], fused
    for each in computations[name]:
        if each.operation == "while":
            body, condition = (re.search(rf"{part}=%?([\w.\-]+)", each.rest)[1] for part in ("body", "condition"))
            often = trips(each, computations[condition], steps)
            yield from _walk(computations, body, steps, times * often, fused)
        elif each.operation in ("fusion", "call", "conditional", "async-start", "custom-call"):
            called = re.findall(r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)", each.rest)
            if branches := re.search(r"branch_computations=\{([^}]*)\}", each.rest):
                called += [branch.strip().lstrip("%") for branch in branches[1].split(",")][:1]
            for other in called[: 1 if each.operation == "conditional" else None]:  # one branch runs
                if other in computations:
                    yield from _walk(computations, other, steps, times, fused or each.operation == "fusion")


def trips(loop: Instruction, condition: list[Instruction], steps: int | None = None) -> int:
    """How often a loop runs: as it is annotated, or what its counter is compared with, or, not known, `steps`."""
    if known := re.search(r'known_trip_count"?[:=]\s*\{"?n"?[:=]\s*"?(\d+)', loop.rest):
        return int(known[1])
    numbers = {each.name: int(value[1]) for each in condition if (value := _constant(each))}
    compared = [each for each in condition if each.operation == "compare"]
    found = [numbers[name] for each in compared for name in each.operands if name in numbers]
    found = found or list(numbers.values())  # the comparison may be inside of a fusion
    if not found and steps is None:
        raise ValueError(f"hlo: it is not told how often {loop.name} runs")
    return max(found) if found else steps


def _constant(each: Instruction) -> re.Match | None:
    return re.match(r"(\d+)$", each.operands[0]) if each.operation == "constant" and each.operands else None


def _sizes(type_: str) -> list[float]:
    """Bytes of each array of a type."""
    found = []
    for kind, shape in re.findall(r"\b([a-z]\w*)\[([\d,]*)\]", type_):
        bits = BITS.get(kind, 8 if kind.startswith("f8") else 0)
        found.append(math.prod(int(n) for n in shape.split(",") if n) * bits / 8)
    return found


def _in_memory(type_: str) -> float:
    """Bytes of a type's arrays that are in the main memory; the others have another space in their layout, S(n)."""
    arrays = re.findall(r"\b([a-z]\w*\[[\d,]*\])(\{[^}]*\})?", type_)
    return sum(sum(_sizes(array)) for array, layout in arrays if not re.search(r"S\([1-9]", layout))


def _moved(each: Instruction, types: Mapping[str, str], computations: Mapping[str, list[Instruction]]) -> float:
    """Bytes that an instruction reads and writes: of an array that is looked into, or changed in place, its part."""
    read = [_in_memory(types[name]) if name in types else 0.0 for name in each.operands]
    written = _in_memory(each.type)
    if each.operation in ("dynamic-slice", "slice", "gather"):
        read[0] = min(read[0], written)
    elif each.operation in ("dynamic-update-slice", "scatter"):
        part = read[1] if each.operation == "dynamic-update-slice" else read[2]
        read[0], written = 0.0, min(written, part)
    elif each.operation == "fusion" and (inside := re.search(r"calls=%?([\w.\-]+)", each.rest)):
        body = computations.get(inside[1], [])
        for i, part in _looked_into(body).items():
            if i < len(read):
                read[i] = min(read[i], part)
        written = min(written, _changed(body, written))
    return sum(read) + written


def _looked_into(body: list[Instruction]) -> dict[int, float]:
    """{parameter: bytes} of those parameters of a fusion of which parts alone are read or changed in place."""
    types = {each.name: each.type for each in body}
    found = {}
    for parameter in body:
        if parameter.operation != "parameter" or not parameter.operands:
            continue
        users = [each for each in body if parameter.name in each.operands]
        slices = [each for each in users if each.operation in ("dynamic-slice", "slice", "gather")]
        into = lambda each, name=parameter.name: each.operation == "dynamic-update-slice" and each.operands[0] == name
        placed = [each for each in users if into(each)]
        if users and len(slices) + len(placed) == len(users):
            found[int(parameter.operands[0])] = sum(sum(_sizes(types[each.name])) for each in slices)
    return found


def _changed(body: list[Instruction], written: float) -> float:
    """Bytes that a fusion writes: of arrays that it changes in place, their new parts."""
    types = {each.name: each.type for each in body}
    placed = [each for each in body if each.operation == "dynamic-update-slice"]
    whole = sum(sum(_sizes(each.type)) for each in placed)
    parts = sum(sum(_sizes(types[each.operands[1]])) for each in placed if each.operands[1] in types)
    return max(written - whole, 0.0) + parts if placed else written
