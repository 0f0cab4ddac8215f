"""What a compiled program sends between devices, read from its HLO text.

XLA has no interface for this; the text is the one thing that every backend gives. Counted are the
payloads per device of every collective: of an all-gather its result, of an all-reduce or a
reduce-scatter its operand, else what is sent. Loop bodies count once per trip. Asynchronous pairs
(-start, -done) and TPU's fused "all-reduce-scatter" are the operations that they stand for.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable

import numpy as np

KINDS = (
    "all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all",
    "collective-broadcast",
)  # fmt: skip
# Bits per number; what is not listed (tokens, tuples) carries nothing.
_BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128}
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
# Kernels have attributes that go on over several lines, some of which start with braces, too.
_END = re.compile(r"^\}(, execution_thread=.*)?$")
_INSTRUCTION = re.compile(
    r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([a-z][\w\-]*)\((.*)$"
)  # name, type, operation, the rest
_SHAPE = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"\b(?:calls|body|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_GROUPS = re.compile(r"replica_groups=(\{\{[\d,{}]*\}\}|\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?)")
_PAIRS = re.compile(r"source_target_pairs=\{\{(\d+),(\d+)\}")
_SCOPE = re.compile(r'op_name="([^"]*)"')


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation of the program.

    Attributes:
      kind: one of `KINDS`.
      dtype: of the payload, as HLO writes it ("bf16", …); "mixed" if several.
      bytes: payload per device and run of the operation.
      group: devices that take part together.
      times: how often a step runs it.
      members: the first group, as positions in the mesh; tells the mesh axes it runs along.
      scope: the JAX operation it comes from.
    """

    kind: str
    dtype: str
    bytes: int
    group: int
    times: int
    members: tuple[int, ...] = ()
    scope: str = ""

    @property
    def total_bytes(self) -> int:
        """Payload per device and step."""
        return self.bytes * self.times

    @property
    def wire_bytes(self) -> float:
        """What each device sends per step if the group is a ring."""
        if self.kind in ("collective-permute", "collective-broadcast"):
            return float(self.total_bytes)
        rounds = 2 if self.kind == "all-reduce" else 1
        return rounds * self.total_bytes * (self.group - 1) / self.group

    def axes(self, mesh_shape: dict[str, int]) -> tuple[str, ...]:
        """Names of the mesh axes along which the operation runs."""
        places = np.unravel_index(self.members, tuple(mesh_shape.values()))
        return tuple(axis for axis, place in zip(mesh_shape, places) if len(set(place)) > 1)


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    result: str
    operation: str
    rest: str


def parse_collectives(text: str, devices: int) -> tuple[list[Collective], int]:
    """Collectives of a compiled program, and the number of loops whose length is not known.

    Args:
      text: `Compiled.as_text()`.
      devices: number of devices, the group of operations that name none.

    Loops of unknown length count as one trip.
    """
    computations, entry = _computations(text)
    times, unknown = _multiplicities(computations, entry)
    found = []
    for name, instructions in computations.items():
        for instruction in instructions:
            if times.get(name):
                found += _collective(instruction, name, times[name], devices)
    return found, unknown


def totals(collectives: Iterable[Collective]) -> dict[str, dict[str, float]]:
    """{kind and dtype: {"operations", "bytes", "wire_bytes", "largest"}} of a step on a device."""
    sums: dict[str, dict[str, float]] = {}
    for one in collectives:
        entry = sums.setdefault(
            f"{one.kind} {one.dtype}",
            {"operations": 0, "bytes": 0, "wire_bytes": 0.0, "largest": 0},
        )
        entry["operations"] += one.times
        entry["bytes"] += one.total_bytes
        entry["wire_bytes"] += one.wire_bytes
        entry["largest"] = max(entry["largest"], one.bytes)
    return dict(sorted(sums.items(), key=lambda item: -item[1]["bytes"]))


def _computations(text: str) -> tuple[dict[str, list[_Instruction]], str]:
    """{computation: instructions}, and the name of the entry."""
    found: dict[str, list[_Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if current is None:
            header = _HEADER.match(line)
            if header:
                current = found.setdefault(header[2], [])
                entry = header[2] if header[1] else entry
        elif _END.match(line):
            current = None
        else:
            match = _INSTRUCTION.match(line)
            if match:
                current.append(_Instruction(*match.groups()))
    if not entry:
        raise ValueError("not the text of a compiled HLO module: it has no ENTRY computation")
    return found, entry


def _multiplicities(
    computations: dict[str, list[_Instruction]], entry: str
) -> tuple[dict[str, int], int]:
    """How often each computation runs per step, and how many loops are of unknown length."""
    times: dict[str, int] = {}
    unknown = 0

    def visit(name: str, factor: int) -> None:
        nonlocal unknown
        times[name] = times.get(name, 0) + factor
        for instruction in computations.get(name, ()):
            trips = 1
            if instruction.operation == "while":
                known = _trip_count(instruction, computations)
                unknown += known is None
                trips = known or 1
            for called in _called(instruction):
                visit(called, factor * trips)

    visit(entry, 1)
    return times, unknown


def _called(instruction: _Instruction) -> list[str]:
    """Computations that an instruction runs (not those that combine two numbers)."""
    if instruction.operation.startswith(("all-reduce", "reduce", "scatter", "sort")):
        return []
    if instruction.operation in ("async-update", "async-done"):  # what async-start began
        return []
    called = _CALLED.findall(instruction.rest)
    for branches in _BRANCHES.findall(instruction.rest):
        called += [name.strip().lstrip("%") for name in branches.split(",")]
    return called


def _trip_count(
    instruction: _Instruction, computations: dict[str, list[_Instruction]]
) -> int | None:
    """From the backend's note, else the limit that the condition compares the counter with."""
    noted = _TRIPS.search(instruction.rest)
    if noted:
        return int(noted[1])
    condition = re.search(r"condition=%?([\w.\-]+)", instruction.rest)
    body = computations.get(condition[1], []) if condition else []
    compares = [i for i in body if i.operation == "compare" and "direction=LT" in i.rest]
    if len(compares) != 1:
        return None
    limits = [
        int(i.rest.partition(")")[0])
        for i in body
        if i.operation == "constant" and f"%{i.name})" in compares[0].rest
    ]
    return limits[0] if len(limits) == 1 else None


def _collective(
    instruction: _Instruction, computation: str, times: int, devices: int
) -> list[Collective]:
    kind = instruction.operation.removesuffix("-start")
    if kind not in KINDS:
        return []
    shapes = _SHAPE.findall(instruction.result)
    if instruction.operation == "collective-permute-start":
        shapes = shapes[1:2]  # (operand, result, two handles)
    elif instruction.operation in ("all-gather-start", "reduce-scatter-start"):
        shapes = shapes[len(shapes) // 2 :]  # (operands, results)
    members = _members(instruction.rest, devices)
    size = sum(_bytes(*shape) for shape in shapes)
    if len(members) == 1 and kind != "collective-permute":
        return []
    if kind == "reduce-scatter":
        size *= len(members)
    if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"
    dtypes = {dtype for dtype, _ in shapes}
    scope = _SCOPE.search(instruction.rest)
    return [
        Collective(
            kind=kind,
            dtype=dtypes.pop() if len(dtypes) == 1 else "mixed",
            bytes=size,
            group=len(members),
            times=times,
            members=members,
            scope=scope[1] if scope else "",
        )
    ]


def _bytes(dtype: str, dimensions: str) -> int:
    digits = re.search(r"\d+", dtype)  # s32, u8, f8e4m3fn …
    bits = _BITS.get(dtype) or (int(digits[0]) if digits else 0)
    count = math.prod(int(size) for size in dimensions.split(",") if size)
    return count * bits // 8


def _members(rest: str, devices: int) -> tuple[int, ...]:
    """The first replica group, written out or as [groups, size]<=[shape]T(permutation)."""
    pair = _PAIRS.search(rest)
    if pair:
        return int(pair[1]), int(pair[2])
    written = _GROUPS.search(rest)
    if not written:
        return tuple(range(devices))
    if written[1].startswith("{"):
        first = written[1].strip("{}").partition("}")[0]
        return tuple(int(member) for member in first.split(",") if member)
    shape, _, source = written[1].partition("<=")
    base, _, permutation = source.partition("T")
    dims = [int(size) for size in base.strip("[]").split(",")]
    order = np.arange(math.prod(dims)).reshape(dims)
    if permutation:
        order = order.transpose([int(axis) for axis in permutation.strip("()").split(",")])
    groups = order.reshape([int(size) for size in shape.strip("[]").split(",")])
    return tuple(int(member) for member in groups[0])
