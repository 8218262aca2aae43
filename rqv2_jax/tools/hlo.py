"""The cost of a compiled program on one device, read from its optimised HLO text.

XLA's own cost analysis counts the body of a loop once; here it counts as often as it runs. A floating
point operation is one multiplication or addition of a matrix product; the rest is next to nothing.
"""

import dataclasses
import math
import re
from collections import Counter
from typing import NamedTuple

import numpy as np

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_BYTES = dict(pred=1, s8=1, u8=1, s16=2, u16=2, f16=2, bf16=2, s32=4, u32=4, f32=4)
_BYTES |= dict(s64=8, u64=8, f64=8, c64=8, f8e4m3fn=1, f8e5m2=1)
# Operations that move nothing: their operands are where their results are.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional"}
_FREE |= {"call", "after-all", "partition-id", "replica-id", "opt-barrier"}

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_CALLED = re.compile(r"(?:calls|body|to_apply)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


@dataclasses.dataclass
class Cost:
    """The cost of one run of a program on one device."""

    flops: float = 0.0
    bytes: float = 0.0  # between the device's main memory and its cores
    collectives: Counter = dataclasses.field(default_factory=Counter)  # runs of each kind
    collective_bytes: Counter = dataclasses.field(default_factory=Counter)  # what they give

    def add(self, other: "Cost", times: int) -> None:
        """Adds the cost of what runs that many times."""
        self.flops += times * other.flops
        self.bytes += times * other.bytes
        for kind, count in other.collectives.items():
            self.collectives[kind] += times * count
            self.collective_bytes[kind] += times * other.collective_bytes[kind]


class _Instruction(NamedTuple):
    name: str
    shape: str
    op: str
    operands: list[str]
    rest: str
    root: bool


# Instructions by name, in order.
_Body = dict[str, _Instruction]


def cost(text: str) -> Cost:
    """Returns the cost of a compiled module's text; raises ValueError if a loop has no known count."""
    return _cost(*_parse(text), {})


def _parse(text: str) -> tuple[dict[str, _Body], str]:
    """Returns the computations by name, and the name of the first to run."""
    computations: dict[str, _Body] = {}
    entry = ""
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            current = computations[head[1]] = {}
            entry = head[1] if line.startswith("ENTRY") else entry
        elif instruction := _INSTRUCTION.match(line):
            root, name, shape, op, rest = instruction.groups()
            inside, rest = _split_operands(rest)
            operands = re.findall(r"%([\w.\-]+)", inside)
            if op in ("parameter", "constant"):
                # Its number or value stands where others have operands.
                operands = [inside]
            current[name] = _Instruction(name, shape, op, operands, rest, root is not None)
    return computations, entry


def _split_operands(rest: str) -> tuple[str, str]:
    depth = 1
    for i, char in enumerate(rest):
        depth += (char == "(") - (char == ")")
        if depth == 0:
            return rest[:i], rest[i + 1 :]
    return rest, ""


def _arrays(shape: str) -> list[tuple[str, list[int], str]]:
    return [
        (kind, [int(n) for n in sizes.split(",") if n], layout)
        for kind, sizes, layout in _ARRAY.findall(shape)
        if kind in _BYTES
    ]


def _size(shape: str) -> int:
    """Returns the bytes in main memory; an array whose layout has S(n) is in a core's memory."""
    return sum(
        _BYTES[kind] * math.prod(sizes)
        for kind, sizes, layout in _arrays(shape)
        if "S(" not in layout
    )


def _dims(shape: str) -> list[int]:
    return _arrays(shape)[0][1]


def _cost(computations: dict[str, _Body], name: str, known: dict[str, Cost]) -> Cost:
    if name in known:
        return known[name]
    total, body = Cost(), computations[name]
    for instruction in body.values():
        called = _CALLED.findall(instruction.rest)
        if instruction.op in ("while", "call"):
            times = _trips(computations, instruction) if instruction.op == "while" else 1
            total.add(_cost(computations, called[0], known), times)
        elif instruction.op == "conditional":
            branches = re.findall(r"[\w.\-]+", "".join(_BRANCHES.findall(instruction.rest)))
            costs = [_cost(computations, branch, known) for branch in branches]
            total.add(max(costs, key=lambda c: c.flops, default=Cost()), 1)
        elif instruction.op == "fusion":
            total.flops += _cost(computations, called[0], known).flops
        elif instruction.op == "dot":
            total.flops += _dot_flops(body, instruction)
        elif instruction.op == "convolution":
            total.flops += _convolution_flops(body, instruction)
        kind = instruction.op.removesuffix("-start")
        if kind in COLLECTIVES:
            # The result of a start is a tuple with its operand in front.
            given = _arrays(instruction.shape)
            given = given[len(given) // 2 :] if instruction.op.endswith("-start") else given
            total.collectives[kind] += 1
            total.collective_bytes[kind] += sum(_BYTES[k] * math.prod(n) for k, n, _ in given)
        if instruction.op not in _FREE and not instruction.op.endswith("-done"):
            total.bytes += _moved(computations, body, instruction)
    known[name] = total
    return total


def _trips(computations: dict[str, _Body], loop: _Instruction) -> int:
    stated = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest)
    if stated:
        return int(stated[1])
    condition = computations[re.findall(r"condition=%?([\w.\-]+)", loop.rest)[0]]
    limits = [
        int(i.operands[0])
        for i in condition.values()
        if i.op == "constant" and i.shape.startswith("s32[]")
    ]
    if len(limits) != 1:
        raise ValueError(f"loop {loop.name} does not say how often it runs")
    return limits[0]


def _dot_flops(body: _Body, instruction: _Instruction) -> float:
    lhs = _dims(body[instruction.operands[0]].shape)
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.rest)
    summed = math.prod(lhs[int(d)] for d in contracted[1].split(",") if d) if contracted else 1
    return 2.0 * math.prod(_dims(instruction.shape)) * summed


def _convolution_flops(body: _Body, instruction: _Instruction) -> float:
    """Returns twice the products that are not with padding; TPUs write matrix products this way."""
    labels = re.findall(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.rest)
    lhs_labels, rhs_labels, out_labels = labels[0]
    lhs, rhs = (_dims(body[name].shape) for name in instruction.operands[:2])
    out = _dims(instruction.shape)
    spatial = sorted(c for c in out_labels if c.isdigit())
    window = dict.fromkeys(("stride", "lhs_dilate", "rhs_dilate"), "x".join("1" for _ in spatial))
    window["pad"] = "x".join("0_0" for _ in spatial)
    settings = "".join(re.findall(r"window=\{([^}]*)\}", instruction.rest))
    window |= re.findall(r"(\w+)=([\dx_\-]+)", settings)
    products = 1
    for i, label in enumerate(spatial):
        stride, spread, step = (
            int(window[name].split("x")[i]) for name in ("stride", "lhs_dilate", "rhs_dilate")
        )
        low = int(window["pad"].split("x")[i].split("_")[0])
        length = (lhs[lhs_labels.index(label)] - 1) * spread + 1
        outputs = np.arange(out[out_labels.index(label)]) * stride
        at = np.add.outer(outputs, np.arange(rhs[rhs_labels.index(label)]) * step) - low
        products *= int(((at >= 0) & (at < length) & (at % spread == 0)).sum())
    products *= out[out_labels.index("b")] * out[out_labels.index("f")] * rhs[rhs_labels.index("i")]
    groups = re.search(r"batch_group_count=(\d+)", instruction.rest)
    return 2.0 * products / int(groups[1] if groups else 1)


def _moved(computations: dict[str, _Body], body: _Body, instruction: _Instruction) -> int:
    """Returns the bytes an instruction reads and writes; for a slice of an array the slice's."""
    if instruction.op != "fusion":
        if 'custom_call_target="AllocateBuffer"' in instruction.rest:
            return 0
        if instruction.op in ("copy-start", "slice-start"):
            # A tuple of both ends, in an order that differs, and what counts the progress.
            ends = [array for array in _arrays(instruction.shape) if array[1]]
            least = min(_BYTES[kind] * math.prod(sizes) for kind, sizes, _ in ends)
            return least * sum("S(" not in layout for *_, layout in ends)
        if instruction.op in ("dynamic-slice", "slice", "gather"):
            return 2 * _size(instruction.shape)
        if instruction.op == "dynamic-update-slice":
            return 2 * _size(body[instruction.operands[1]].shape)
        read = sum(_size(body[name].shape) for name in instruction.operands if name in body)
        return read + _size(instruction.shape)
    inside = computations[_CALLED.findall(instruction.rest)[0]]
    parameters = _parameters(inside)
    read = sum(
        min(_size(body[name].shape), _read(computations, inside, parameters[number]))
        for number, name in enumerate(instruction.operands)
        if _size(body[name].shape)
    )
    return read + (_written(inside) if _size(instruction.shape) else 0)


def _parameters(body: _Body) -> dict[int, str]:
    """Returns the names of a computation's parameters by number."""
    return {int(i.operands[0]): i.name for i in body.values() if i.op == "parameter"}


def _read(computations: dict[str, _Body], inside: _Body, name: str) -> int:
    """Returns the bytes that a fused computation reads of one of its arrays."""
    total = 0
    for user in inside.values():
        if name not in user.operands:
            continue
        if user.op == "bitcast":
            total += _read(computations, inside, user.name)
        elif user.op in ("dynamic-slice", "slice", "gather") and user.operands[0] == name:
            total += _size(user.shape)
        elif user.op == "dynamic-update-slice" and user.operands[0] == name:
            continue
        elif user.op == "fusion":
            called = computations[_CALLED.findall(user.rest)[0]]
            for number, operand in enumerate(user.operands):
                if operand == name:
                    total += _read(computations, called, _parameters(called)[number])
        else:
            return _size(inside[name].shape)
    return min(total, _size(inside[name].shape))


def _written(inside: _Body) -> int:
    """Returns the bytes that a fused computation writes."""
    root = next(i for i in inside.values() if i.root)
    parts = [inside[name] for name in root.operands] if root.op == "tuple" else [root]
    total = 0
    for part in parts:
        while part.op == "bitcast":
            part = inside[part.operands[0]]
        if part.op == "dynamic-update-slice":
            part = inside[part.operands[1]]
        total += _size(part.shape)
    return total
