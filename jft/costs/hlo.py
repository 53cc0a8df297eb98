"""What a compiled step really costs: FLOPs from its HLO text, bytes from XLA's own analysis.

XLA's `cost_analysis` counts the body of a loop once whatever its trip count, so the products are
counted here: dots, convolutions, library calls that stand for them, and shifted depthwise products.
Everything is per device: under a mesh the text is the program of one device.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from jft.costs.products import DEPTHWISE, Axis, convolution_flops, dot_flops

Shape = tuple[str, tuple[int, ...]]  # (element type, dimensions)

_UNSIZED = {"pred": 1}  # every other array type carries its bits in its name: bf16, s32, f8e4m3
_SHAPE = re.compile(r"([a-z][a-z0-9]*)\[([0-9<=,]*)\]")
_HEADER = re.compile(r"^\s*(?:(ENTRY)\s+)?%?([\w.\-]+)\s+\(.*\)\s*->\s*.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT\s+)?%?([\w.\-]+)\s+=\s+(.*)$")
_OPCODE = re.compile(r"\s*([\w\-]+)\(")
_NESTED = re.compile(r'"(?:[^"\\]|\\.)*"|[()]')
_OPERAND = re.compile(r"%([\w.\-]+)")
_OP_NAME = re.compile(r'op_name="((?:[^"\\]|\\.)*)"')
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_TRIPS = re.compile(r'"known_trip_count":\s*\{\s*"n":\s*"?(\d+)')
# XLA writes thin dots as multiply and reduce; the multiply keeps the name of the product, or of the
# transpose after it in a gradient. No multiply that a user wrote has such a name.
_THIN = re.compile(r"/(?:dot_general|conv_general_dilated|transpose)$")
_SAME_VALUES = ("bitcast", "broadcast", "convert", "copy", "reshape", "transpose")


@dataclass(frozen=True)
class Cost:
    """What one call of a compiled function costs on one device.

    Attributes:
      flops: products only, 2 a multiply-add, loops times their trip counts.
      argument_bytes: inputs, frozen leaves included, as far as the program uses them.
      output_bytes: results, those that alias a donated input included.
      temp_bytes: peak of what lives only during the call.
      alias_bytes: results that reuse the memory of donated inputs.
      all_reduce_bytes: operands of all all-reduces.
      loops: (op_name, trip count) of each while loop; None where the count is not static, and then
        its body is counted once.
      kinds: flops by kind: "dot", "convolution", "library", "depthwise".
      uncounted: targets of custom calls whose products, if any, are not in `flops`.
      scopes: flops by op_name, which holds the module and whether it is a gradient.
    """

    flops: int
    argument_bytes: int
    output_bytes: int
    temp_bytes: int
    alias_bytes: int
    all_reduce_bytes: int
    loops: tuple[tuple[str, int | None], ...]
    kinds: dict[str, int] = field(default_factory=dict)
    uncounted: tuple[str, ...] = ()
    scopes: dict[str, int] = field(default_factory=dict)


def count(compiled: Any) -> Cost:
    """Returns the cost of `compiled`, the result of `jax.jit(f).lower(...).compile()`.

    Raises:
      ValueError: the backend gives no HLO text or no memory analysis.
    """
    memory, text = compiled.memory_analysis(), compiled.as_text()
    if memory is None or not text:
        raise ValueError("this backend shows neither the HLO text nor the memory of a program")
    program = count_text(text)
    kinds = dict(sorted(program.kinds.items()))
    reduced = kinds.pop("all-reduce", 0)
    return Cost(
        flops=program.flops,
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
        alias_bytes=memory.alias_size_in_bytes,
        all_reduce_bytes=reduced,
        loops=tuple(program.loops),
        kinds=kinds,
        uncounted=tuple(sorted(program.uncounted)),
        scopes=dict(program.scopes),
    )


@dataclass
class _Instruction:
    name: str
    shapes: list[Shape]  # of the result, one per element of a tuple
    opcode: str
    inner: str  # between the parentheses: operands, or the value of a constant
    attributes: str

    @property
    def operands(self) -> list[str]:
        return _OPERAND.findall(self.inner)

    @property
    def op_name(self) -> str:
        return found.group(1) if (found := _OP_NAME.search(self.attributes)) else self.name


@dataclass
class Program:
    """What a computation holds, with everything that it calls; fields as in `Cost`.

    `kinds` has the bytes of operands of all-reduces as well, under "all-reduce".
    """

    kinds: Counter[str] = field(default_factory=Counter)
    loops: list[tuple[str, int | None]] = field(default_factory=list)
    uncounted: set[str] = field(default_factory=set)
    scopes: Counter[str] = field(default_factory=Counter)

    @property
    def flops(self) -> int:
        """All products."""
        return sum(value for kind, value in self.kinds.items() if kind != "all-reduce")

    def add(self, other: Program, times: int = 1) -> None:
        """Adds what `times` calls of `other` cost."""
        for kind, value in other.kinds.items():
            self.kinds[kind] += value * times
        self.scopes.update({name: value * times for name, value in other.scopes.items()})
        self.loops.extend(other.loops)
        self.uncounted |= other.uncounted


def count_text(text: str) -> Program:
    """Returns the totals of the entry computation of an HLO module's text.

    Raises:
      ValueError: the text holds no entry computation.
    """
    computations, entry = _parse(text)
    if entry is None:
        raise ValueError("the HLO text holds no ENTRY computation")
    return _Counter(computations).total(entry)


def _parse(text: str) -> tuple[dict[str, dict[str, _Instruction]], str | None]:
    computations: dict[str, dict[str, _Instruction]] = {}
    entry, current = None, None
    for line in text.splitlines():
        if current is None:
            if header := _HEADER.match(line):
                current = computations.setdefault(header.group(2), {})
                if header.group(1):
                    entry = header.group(2)
        elif line.strip() == "}":
            current = None
        elif found := _INSTRUCTION.match(line):
            instruction = _instruction(found.group(1), found.group(2))
            current[instruction.name] = instruction
    return computations, entry


def _instruction(name: str, rest: str) -> _Instruction:
    end = _closing(rest, 0) if rest.startswith("(") else rest.index(" ")
    found = _SHAPE.findall(rest[:end])
    shapes = [(kind, tuple(int(x.lstrip("<=")) for x in s.split(",") if x)) for kind, s in found]
    opcode = _OPCODE.match(rest, end)
    if opcode is None:
        raise ValueError(f"cannot read the HLO instruction {name} = {rest[:200]}")
    close = _closing(rest, opcode.end() - 1)
    inner = rest[opcode.end() : close - 1]
    return _Instruction(name, shapes, opcode.group(1), inner, rest[close:])


def _closing(text: str, start: int) -> int:
    """The index after the parenthesis that closes the one at `start`."""
    depth = 0
    for found in _NESTED.finditer(text, start):
        depth += {"(": 1, ")": -1}.get(found.group(), 0)
        if depth == 0:
            return found.end()
    return len(text)


class _Counter:
    def __init__(self, computations: dict[str, dict[str, _Instruction]]) -> None:
        self.computations = computations
        self.totals: dict[str, Program] = {}

    def total(self, name: str) -> Program:
        """Each computation is counted once and added per call site."""
        if name not in self.totals:
            total = Program()
            for instruction in self.computations[name].values():
                before = total.flops
                self._own(total, instruction, self.computations[name])
                if total.flops > before:
                    total.scopes[instruction.op_name] += total.flops - before
                self._calls(total, instruction)
            self.totals[name] = total
        return self.totals[name]

    def _own(
        self, total: Program, instruction: _Instruction, scope: dict[str, _Instruction]
    ) -> None:
        opcode, shapes = instruction.opcode, instruction.shapes
        inputs = [scope[name].shapes[0] for name in instruction.operands if scope[name].shapes]
        # A product with ones is a sum, of products that are counted where they are made.
        if opcode == "dot" and not any(self._ones(name, scope) for name in instruction.operands):
            contracted = _dims(instruction.attributes, "lhs_contracting_dims")
            total.kinds["dot"] += dot_flops(inputs[0][1], contracted, shapes[0][1])
        elif opcode == "convolution":
            dims = (inputs[0][1], inputs[1][1], shapes[0][1])
            total.kinds["convolution"] += _convolution_flops(instruction.attributes, *dims)
        elif opcode == "custom-call":
            flops = _library_flops(instruction, inputs)
            if flops is None:
                total.uncounted.add(_target(instruction) or instruction.name)
            else:
                total.kinds["library"] += flops
        elif opcode in ("all-reduce", "all-reduce-start"):
            operands = [scope[name].shapes for name in instruction.operands]
            total.kinds["all-reduce"] += sum(_bytes(shape) for s in operands for shape in s)
        elif opcode == "multiply" and re.match(r"b?f\d", shapes[0][0]):
            if DEPTHWISE.search(instruction.op_name):
                total.kinds["depthwise"] += 2 * math.prod(shapes[0][1])
            elif _THIN.search(instruction.op_name):
                total.kinds["dot"] += 2 * math.prod(shapes[0][1])

    def _calls(self, total: Program, instruction: _Instruction) -> None:
        opcode, attributes = instruction.opcode, instruction.attributes
        if opcode == "while":
            trips = self._trips(instruction)
            total.loops.append((instruction.op_name, trips))
            for role in ("body", "condition"):
                total.add(self.total(_called(attributes, role)[0]), 1 if trips is None else trips)
        elif opcode == "conditional":
            roles = ("branch_computations", "true_computation", "false_computation")
            branches = [self.total(name) for role in roles for name in _called(attributes, role)]
            total.add(max(branches, key=lambda branch: branch.flops))
        elif opcode in ("fusion", "call", "async-start", "custom-call"):
            for role in ("calls", "to_apply", "called_computations"):
                for name in _called(attributes, role):
                    total.add(self.total(name))

    def _ones(self, name: str, scope: dict[str, _Instruction]) -> bool:
        """Whether the value is the constant 1, everywhere."""
        instruction = scope[name]
        if instruction.opcode in _SAME_VALUES:
            return self._ones(instruction.operands[0], scope)
        if instruction.opcode == "fusion":
            inner = self.computations[_called(instruction.attributes, "calls")[0]]
            return self._ones(next(reversed(inner)), inner)  # the root stands last
        return instruction.opcode == "constant" and instruction.inner == "1"

    def _trips(self, loop: _Instruction) -> int | None:
        """The trip count that XLA states, or the one bound of the condition (from 0, by 1)."""
        if known := _TRIPS.search(loop.attributes):
            return int(known.group(1))
        pending = _called(loop.attributes, "condition")
        bounds: list[int] = []
        directions: list[str] = []
        while pending:
            for instruction in self.computations[pending.pop()].values():
                pending += _called(instruction.attributes, "calls")
                pending += _called(instruction.attributes, "to_apply")
                if instruction.opcode == "constant" and re.fullmatch(r"\d+", instruction.inner):
                    bounds.append(int(instruction.inner))
                elif instruction.opcode == "compare":
                    directions += re.findall(r"direction=(\w+)", instruction.attributes)
        if len(bounds) != 1 or directions not in (["LT"], ["LE"]):
            return None
        return bounds[0] + (directions == ["LE"])


def _called(attributes: str, role: str) -> list[str]:
    """Names of the computations under `role=%name` or `role={%a, %b}`."""
    found = re.search(rf"\b{role}=(\{{[^}}]*\}}|%?[\w.\-]+)", attributes)
    return re.findall(r"[\w.\-]+", found.group(1)) if found else []


def _bytes(shape: Shape) -> int:
    kind, dims = shape
    bits = re.search(r"\d+", kind)
    width = int(bits.group()) / 8 if bits else _UNSIZED.get(kind, 0)
    return math.ceil(math.prod(dims) * width)


def _dims(attributes: str, key: str) -> list[int]:
    """The integers of `key={0,1}`, or of `"key":["0","1"]` in a backend configuration."""
    found = re.search(rf'\b{key}"?[=:]\s*[{{\[]([^}}\]]*)[}}\]]', attributes)
    return [int(number) for number in re.findall(r"\d+", found.group(1))] if found else []


def _convolution_flops(
    attributes: str, lhs: Sequence[int], rhs: Sequence[int], out: Sequence[int]
) -> int:
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", attributes)
    if labels is None:
        raise ValueError(f"cannot read the convolution {attributes[:200]}")
    lhs_labels, rhs_labels, out_labels = labels.groups()
    window = re.search(r"window=\{([^}]*)\}", attributes)
    parts = dict(part.split("=") for part in window.group(1).split()) if window else {}

    def axis(at: int) -> Axis:
        digit = str(at)
        own = {key: value.split("x")[at] for key, value in parts.items()}
        return Axis(
            size=lhs[lhs_labels.index(digit)],
            window=rhs[rhs_labels.index(digit)],
            output=out[out_labels.index(digit)],
            stride=int(own.get("stride", 1)),
            low=int(own.get("pad", "0_0").split("_")[0]),
            lhs_dilation=int(own.get("lhs_dilate", 1)),
            rhs_dilation=int(own.get("rhs_dilate", 1)),
        )

    axes = [axis(at) for at in range(len(lhs_labels) - 2)]
    batch, features = out[out_labels.index("b")], out[out_labels.index("f")]
    return convolution_flops(batch, features, rhs[rhs_labels.index("i")], axes)


def _target(call: _Instruction) -> str:
    return found.group(1) if (found := _TARGET.search(call.attributes)) else ""


def _library_flops(call: _Instruction, inputs: Sequence[Shape]) -> int | None:
    """Flops of a vendor library's product, or None for any other custom call.

    cuBLAS keeps the dot's dimension numbers in its configuration; oneDNN contracts the last axis of
    the left operand, or the one before it if transposed. cuDNN keeps the labels and the window of
    the forward convolution in its two gradients as well: only the roles of the arrays differ.
    """
    target = _target(call)
    if target.startswith("__cublas$"):
        contracted = _dims(call.attributes, "lhs_contracting_dimensions")
        return dot_flops(inputs[0][1], contracted, call.shapes[0][1])
    if target.startswith("__onednn$matmul"):
        transposed = re.search(r'"transpose_a":\s*true', call.attributes) is not None
        return dot_flops(inputs[0][1], [-2 if transposed else -1], call.shapes[0][1])
    if target.startswith("__cudnn$conv"):
        first, second, result = inputs[0][1], inputs[1][1], call.shapes[0][1]
        if "BackwardInput" in target:
            first, result = result, first
        elif "BackwardFilter" in target:
            second, result = result, second
        return _convolution_flops(call.attributes, first, second, result)
    return None
