"""What a compiled program does on one device, read from its optimised HLO text.

XLA's own cost analysis counts the body of a loop once; here it counts as often as it runs. A floating
point operation is one multiplication or addition of a matrix product; the rest is next to nothing.
"""

import dataclasses
import math
import re
from collections import Counter
from typing import NamedTuple

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_BYTES = dict(pred=1, s8=1, u8=1, s16=2, u16=2, f16=2, bf16=2, s32=4, u32=4, f32=4)
_BYTES |= dict(s64=8, u64=8, f64=8, c64=8, f8e4m3fn=1, f8e5m2=1)
# They move nothing: their operands are where their results are.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional"}
_FREE |= {"call", "after-all", "partition-id", "replica-id", "opt-barrier"}

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_CALLED = re.compile(r"(?:calls|body|to_apply)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


@dataclasses.dataclass
class Cost:
    """Of one run of a program on one device.

    `bytes` go between the device's main memory and its cores. `collectives` counts how often each
    kind runs, `collective_bytes` the size of what they give.
    """

    flops: float = 0.0
    bytes: float = 0.0
    collectives: Counter = dataclasses.field(default_factory=Counter)
    collective_bytes: Counter = dataclasses.field(default_factory=Counter)

    def add(self, other: "Cost", times: int):
        """Adds what runs that many times."""
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


def cost(text: str) -> Cost:
    """The cost of a program from the text of its compiled module (`compiled.as_text()`).

    Raises:
      ValueError: a loop's count cannot be told.
    """
    computations, entry = _parse(text)
    return _cost(computations, entry, {})


def _parse(text: str):
    computations: dict[str, dict[str, _Instruction]] = {}
    entry, current = "", {}
    for line in text.splitlines():
        head = _COMPUTATION.match(line)
        if head:
            current = computations[head[1]] = {}
            entry = head[1] if line.startswith("ENTRY") else entry
            continue
        found = _INSTRUCTION.match(line)
        if found:
            root, name, shape, op, rest = found.groups()
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
    """Bytes in main memory; a layout with S(n) lies in a memory of the core's own."""
    return sum(
        _BYTES[kind] * math.prod(sizes)
        for kind, sizes, layout in _arrays(shape)
        if "S(" not in layout
    )


def _dims(shape: str) -> list[int]:
    return _arrays(shape)[0][1]


def _cost(computations, name: str, known: dict[str, Cost]) -> Cost:
    if name in known:
        return known[name]
    total, own = Cost(), computations[name]
    for instruction in own.values():
        called = _CALLED.findall(instruction.rest)
        if instruction.op == "while":
            count = _trips(computations, instruction)
            total.add(_cost(computations, called[0], known), count)
        elif instruction.op == "conditional":
            branches = re.findall(r"[\w.\-]+", (_BRANCHES.search(instruction.rest) or ["", ""])[1])
            costs = [_cost(computations, branch, known) for branch in branches]
            if costs:
                total.add(max(costs, key=lambda c: c.flops), 1)
        elif instruction.op == "call":
            total.add(_cost(computations, called[0], known), 1)
        elif instruction.op == "fusion":
            total.flops += _cost(computations, called[0], known).flops
        elif instruction.op == "dot":
            total.flops += _dot_flops(own, instruction)
        elif instruction.op == "convolution":
            total.flops += _convolution_flops(own, instruction)
        kind = instruction.op.removesuffix("-start")
        if kind in COLLECTIVES:
            # What is started gives a tuple with its operand in front.
            given = _arrays(instruction.shape)
            given = given[len(given) // 2 :] if instruction.op.endswith("-start") else given
            total.collectives[kind] += 1
            total.collective_bytes[kind] += sum(_BYTES[k] * math.prod(n) for k, n, _ in given)
        if instruction.op not in _FREE and not instruction.op.endswith("-done"):
            total.bytes += _moved(computations, own, instruction)
    known[name] = total
    return total


def _trips(computations, loop: _Instruction) -> int:
    stated = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest)
    if stated:
        return int(stated[1])
    condition = computations[re.search(r"condition=%?([\w.\-]+)", loop.rest)[1]]
    limits = [
        int(i.operands[0])
        for i in condition.values()
        if i.op == "constant" and i.shape.startswith("s32[]")
    ]
    if len(limits) != 1:
        raise ValueError(f"loop {loop.name} does not say how often it runs")
    return limits[0]


def _dot_flops(own, instruction) -> float:
    lhs = _dims(own[instruction.operands[0]].shape)
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.rest)
    summed = math.prod(lhs[int(d)] for d in contracted[1].split(",") if d) if contracted else 1
    return 2.0 * math.prod(_dims(instruction.shape)) * summed


def _convolution_flops(own, instruction) -> float:
    """Twice the products that are not with padding: a TPU writes matrix products this way."""
    lhs_labels, rhs_labels, out_labels = re.search(
        r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.rest
    ).groups()
    lhs, rhs = (_dims(own[name].shape) for name in instruction.operands[:2])
    out = _dims(instruction.shape)
    window = dict(re.findall(r"(\w+)=([\dx_\-]+)", _window(instruction.rest)))
    products = 1
    for i, label in enumerate(sorted(c for c in out_labels if c.isdigit())):

        def setting(name, default, i=i):
            return window[name].split("x")[i] if name in window else default

        stride, spread = int(setting("stride", "1")), int(setting("lhs_dilate", "1"))
        step, low = int(setting("rhs_dilate", "1")), int(setting("pad", "0_0").split("_")[0])
        length = (lhs[lhs_labels.index(label)] - 1) * spread + 1
        positions = (
            o * stride + k * step - low
            for o in range(out[out_labels.index(label)])
            for k in range(rhs[rhs_labels.index(label)])
        )
        products *= sum(0 <= at < length and at % spread == 0 for at in positions)
    batch_and_features = out[out_labels.index("b")] * out[out_labels.index("f")]
    groups = re.search(r"batch_group_count=(\d+)", instruction.rest)
    return (
        2.0
        * batch_and_features
        * rhs[rhs_labels.index("i")]
        * products
        / int(groups[1] if groups else 1)
    )


def _window(rest: str) -> str:
    found = re.search(r"window=\{([^}]*)\}", rest)
    return found[1] if found else ""


def _moved(computations, own, instruction) -> int:
    """Bytes an instruction reads and writes; of an array it only takes a slice of, the slice's."""
    called = _CALLED.search(instruction.rest) if instruction.op == "fusion" else None
    if called is None:
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
            return 2 * _size(own[instruction.operands[1]].shape)
        read = sum(_size(own[name].shape) for name in instruction.operands if name in own)
        return read + _size(instruction.shape)
    inside = computations[called[1]]
    parameters = {int(i.operands[0]): i for i in inside.values() if i.op == "parameter"}
    read = sum(
        min(_size(own[name].shape), _read(computations, inside, parameters[number].name))
        for number, name in enumerate(instruction.operands)
        if _size(own[name].shape)
    )
    return read + (_written(inside) if _size(instruction.shape) else 0)


def _read(computations, inside, name: str) -> int:
    """Bytes a fused computation reads of one of its arrays."""
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
            called = computations[_CALLED.search(user.rest)[1]]
            for number, operand in enumerate(user.operands):
                if operand == name:
                    parameter = next(
                        i.name
                        for i in called.values()
                        if i.op == "parameter" and int(i.operands[0]) == number
                    )
                    total += _read(computations, called, parameter)
        else:
            return _size(inside[name].shape)
    return min(total, _size(inside[name].shape))


def _written(inside) -> int:
    """Bytes a fused computation writes."""
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
