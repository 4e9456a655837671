"""Reading a compiled program: its instructions, how often each runs, its floating-point operations and memory traffic.

The input is the text of an optimized HLO module (`jax.stages.Compiled.as_text()`), the program as the compiler
scheduled it. XLA's own cost analysis takes the body of a loop once; here every loop counts as often as it turns.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator

_BYTES = {"pred": 1, "token": 0, "opaque": 0} | {
    f"{kind}{bits}": bits / 8 for kind in "suf" for bits in (2, 4, 8, 16, 32, 64)
}
_BYTES |= {"bf16": 2, "c64": 8, "c128": 16}
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_OPCODE = re.compile(r"\s([a-z][a-z0-9\-]*)\(")
_ARRAY = re.compile(r"([a-z]+[0-9a-z]*)\[([0-9,]*)\](?:\{([^}]*)\})?")
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# They name or regroup what is there, or end what another instruction began.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "iota"}


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of a shape: `dtype[dims]`, and whether it lies in the chip's main memory (not in vector memory)."""

    dtype: str
    dims: tuple[int, ...]
    in_hbm: bool

    @property
    def bytes(self) -> float:
        if self.dtype not in _BYTES and not self.dtype.startswith("f8"):
            raise ValueError(f"{self.dtype}{list(self.dims)}: how large its elements are is not known")
        return math.prod(self.dims) * _BYTES.get(self.dtype, 1)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a program; `text` is what follows the operands: attributes and metadata."""

    name: str
    opcode: str
    shape: tuple[Array, ...]
    operands: tuple[str, ...]
    text: str
    root: bool

    def called(self, attribute: str) -> str | None:
        found = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.text)
        return found.group(1) if found else None

    @property
    def op_name(self) -> str:
        """Where in the traced Python program it comes from."""
        found = re.search(r'op_name="([^"]*)"', self.text)
        return found.group(1) if found else ""


Computation = dict[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Step:
    """An instruction that the device executes, with how often, and the instructions fused into it."""

    instruction: Instruction
    computation: str
    times: int
    inner: tuple[Instruction, ...]


class Module:
    """A parsed program.

    Attributes:
      computations: by name, their instructions by name, in the order of the schedule.
      entry: name of the one that runs.
    """

    def __init__(self, text: str):
        self.computations: dict[str, Computation] = {}
        self.entry = ""
        current: Computation | None = None
        # A string among the attributes may hold line breaks; such lines belong to the one before.
        for line in re.sub(r"\n(?![ ]+(?:ROOT )?%|[%\n]|\}(?!\})|ENTRY|HloModule)", " ", text).splitlines():
            if current is None:
                if header := _HEADER.match(line):
                    current = self.computations.setdefault(header.group(2), {})
                    self.entry = header.group(2) if header.group(1) else self.entry
            elif line.startswith("}"):
                current = None
            elif instruction := _parse(line):
                current[instruction.name] = instruction
        if not self.entry:
            raise ValueError("this is no HLO module: it has no ENTRY computation")

    def steps(self) -> Iterator[Step]:
        """Every instruction that runs, loops unrolled into `times`; of a conditional, every branch once."""
        yield from self._steps(self.entry, 1)

    def _steps(self, name: str, times: int) -> Iterator[Step]:
        for instruction in self.computations[name].values():
            if instruction.opcode == "while":
                yield from self._steps(instruction.called("body"), times * self.trips(instruction, name))
            elif instruction.opcode in ("call", "call-start", "async-start"):
                callee = instruction.called("to_apply") or instruction.called("calls")
                yield from self._steps(callee, times)
            elif instruction.opcode == "conditional":
                branches = re.search(r"branch_computations=\{([^}]*)\}", instruction.text)
                named = branches.group(1).split(",") if branches else []
                named += [instruction.called(f"{side}_computation") for side in ("true", "false")]
                for branch in filter(None, named):
                    yield from self._steps(branch.strip().lstrip("%"), times)
            elif instruction.opcode not in _FREE:
                yield Step(instruction, name, times, tuple(self._fused(instruction)))

    def _fused(self, instruction: Instruction) -> Iterator[Instruction]:
        callee = instruction.called("calls") if instruction.opcode == "fusion" else None
        if callee:
            for inner in self.computations[callee].values():
                yield inner
                yield from self._fused(inner)

    def trips(self, loop: Instruction, name: str) -> int:
        """How often a loop turns: what the compiler notes, or counted from its condition `counter < bound`.

        Raises:
          ValueError: the condition is of another form.
        """
        if known := re.search(r'known_trip_count"?:\{"n":"(\d+)"', loop.text):
            return int(known.group(1))
        condition = self.computations[loop.called("condition")]
        compares = [i for i in condition.values() if i.opcode == "compare" and "direction=LT" in i.text]
        if len(compares) != 1:
            compares = [
                inner
                for i in condition.values()
                for inner in self._fused(i)
                if inner.opcode == "compare" and "direction=LT" in inner.text
            ]
        bounds = [int(i.text) for i in condition.values() if i.opcode == "constant" and i.text.isdecimal()]
        counters = [i for i in condition.values() if i.opcode == "get-tuple-element"]
        if len(compares) != 1 or len(bounds) != 1 or len(counters) != 1:
            raise ValueError(f"loop {loop.name}: its condition is not of the form 'counter < bound'")
        index = int(re.search(r"index=(\d+)", counters[0].text).group(1))
        start = self._constant(name, self.computations[name][loop.operands[0]].operands[index])
        body = self.computations[loop.called("body")]
        root = next(i for i in body.values() if i.root)
        stride = self._stride(loop.called("body"), root.operands[index])
        return max(-(-(bounds[0] - start) // stride), 0)

    def _constant(self, name: str, operand: str) -> int:
        instruction = self.computations[name][operand]
        while instruction.opcode in ("copy", "bitcast", "convert"):
            instruction = self.computations[name][instruction.operands[0]]
        if instruction.opcode == "constant" and re.match(r"-?\d+$", instruction.text):
            return int(instruction.text)
        raise ValueError(f"{operand} in {name}: a loop's counter starts at {instruction.opcode}, which is no number")

    def _stride(self, name: str, operand: str) -> int:
        """What one turn adds to the counter: the sum of the constants on the way from its old to its new value."""
        body, total = self.computations[name], 0
        instruction = body.get(operand)
        while instruction is not None and instruction.opcode != "get-tuple-element":
            inner = list(self._fused(instruction)) or [instruction]
            if any(i.opcode == "add" for i in inner):
                constants = [i for i in inner if i.opcode == "constant"]
                constants += [body[o] for o in instruction.operands if body[o].opcode == "constant"]
                total += int(constants[0].text) if constants and constants[0].text.isdecimal() else 1
            onward = [o for o in instruction.operands if body[o].opcode != "constant"]
            instruction = body.get(onward[0]) if onward else None
        return total or 1

    def flops(self, step: Step, unit: int = 1) -> int:
        """Floating-point operations of one execution: its matrix products, a multiply-add being 2.

        Args:
          step: of this module.
          unit: side of the matrix unit, to which the contracted and the last side of a product are filled up: what the
            hardware is busy with; 1 for what the program asks for.

        Raises:
          ValueError: a Pallas kernel whose work is not known.
        """
        total = 0
        for inner in step.inner or (step.instruction,):
            if inner.opcode in ("dot", "convolution"):
                total += _product_flops(inner, self._operand_arrays(inner, step), unit)
            elif _target(inner) == "tpu_custom_call":
                total += _kernel_flops(inner, self._operand_arrays(inner, step), unit)
        return total

    def _operand_arrays(self, inner: Instruction, step: Step) -> list[Array]:
        scope = self.computations[step.computation]
        if inner.name not in scope:
            scope = next(c for c in self.computations.values() if inner.name in c)
        return [scope[name].shape[0] for name in inner.operands]

    def traffic(self, step: Step) -> float:
        """Bytes of main memory that one execution reads and writes.

        An array counts once for each instruction that takes or makes it, wherever it is not in vector memory. An
        operand that is only sliced counts as its slice, a result that is updated in place as the update.
        """
        instruction = step.instruction
        if instruction.opcode.endswith(("-done", "-update")) or _target(instruction) in _ALIASING:
            return 0
        if self.is_transfer(step) and instruction.opcode == "fusion":
            ends = any(_target(inner) == "AsyncCollectiveDone" for inner in step.inner)
            return sum(array.bytes for array in instruction.shape if array.in_hbm) if ends else 0
        if instruction.opcode in ("send", "recv"):
            return instruction.shape[0].bytes  # what the result holds beside the array is a context
        scope = self.computations[step.computation]
        operands = [scope[name].shape for name in instruction.operands]
        if instruction.opcode in ("copy-start", "slice-start"):
            source, made = operands[0][0], instruction.shape[1 if instruction.opcode == "slice-start" else 0]
            return made.bytes * (source.in_hbm + made.in_hbm)
        if instruction.opcode == "dynamic-slice":
            return 2 * sum(a.bytes for a in instruction.shape if a.in_hbm)
        if instruction.opcode == "dynamic-update-slice":
            return 2 * sum(a.bytes for a in operands[1] if a.in_hbm)
        read, written = {}, {}
        callee = instruction.called("calls") if instruction.opcode == "fusion" else None
        if callee:
            read, written = self._sliced(callee)
        total = 0.0
        for position, arrays in enumerate(operands):
            total += sum(read.get(position, a.bytes) for a in arrays if a.in_hbm)
        for position, array in enumerate(instruction.shape):
            total += written.get(position, array.bytes) if array.in_hbm else 0
        return total

    def is_transfer(self, step: Step) -> bool:
        """Whether an instruction only moves data, between devices or into vector memory, beside what computes."""
        opcode = step.instruction.opcode
        if opcode.endswith(("-start", "-done", "-update")) or opcode in (*COLLECTIVES, "send", "recv"):
            return True
        marks = {_target(inner) for inner in step.inner}
        products = any(inner.opcode in ("dot", "convolution") for inner in step.inner)
        return bool(marks & {"AsyncCollectiveStart", "AsyncCollectiveDone"}) and not products

    def _sliced(self, callee: str) -> tuple[dict[int, float], dict[int, float]]:
        """Of a fusion: bytes read of parameters that are only sliced, bytes written of results updated in place."""
        body = self.computations[callee]
        users = collections.defaultdict(list)
        for instruction in body.values():
            for operand in instruction.operands:
                users[operand].append(instruction)

        def passes_on(instruction: Instruction) -> bool:
            """Whether it only renames; within a fusion a copy does: it arranges in registers what goes through."""
            if instruction.opcode == "fusion":
                inner = self.computations[instruction.called("calls")].values()
                return all(i.opcode == "parameter" or passes_on(i) for i in inner)
            return instruction.opcode in ("bitcast", "copy")

        def source(name: str) -> str:
            while passes_on(body[name]):
                name = body[name].operands[0]
            return name

        def ends(name: str) -> list[tuple[str, Instruction]]:
            found = []
            for user in users[name]:
                found += ends(user.name) if passes_on(user) else [(name, user)]
            return found

        read: dict[int, float] = {}
        for instruction in body.values():
            if instruction.opcode != "parameter":
                continue
            uses = ends(instruction.name)
            total = 0.0
            for name, user in uses:
                if user.opcode == "dynamic-slice" and user.operands[0] == name:
                    total += user.shape[0].bytes
                elif user.opcode == "fusion":
                    inner, _ = self._sliced(user.called("calls"))
                    places = [place for place, operand in enumerate(user.operands) if operand == name]
                    if not all(place in inner for place in places):
                        break
                    total += sum(inner[place] for place in places)
                elif user.opcode != "dynamic-update-slice" or user.operands[0] != name:
                    break
            else:
                if uses:  # what goes to the result as it is, is read whole
                    read[int(instruction.text)] = total
        root = next(i for i in body.values() if i.root)
        results = root.operands if root.opcode == "tuple" else (root.name,)
        written: dict[int, float] = {}
        for position, name in enumerate(results):
            made = body[source(name)]
            if made.opcode == "dynamic-update-slice":
                written[position] = body[made.operands[1]].shape[0].bytes
            elif made.opcode == "fusion" and 0 in (inner := self._sliced(made.called("calls"))[1]):
                written[position] = inner[0]
        return read, written


# Matrix products in splash's kernels, of which the fused backward pass makes the scores anew.
KERNEL_PRODUCTS = {"splash_mha_fwd": 2, "splash_mha_dkv": 5}
# Custom calls that only mark or regroup buffers.
_ALIASING = {"AllocateBuffer", "AssumeGatherIndicesInBound", "ConcatBitcast", "AsyncCollectiveStart"}
_ALIASING |= {"AsyncCollectiveDone", "Sharding"}


def _target(instruction: Instruction) -> str | None:
    found = re.search(r'custom_call_target="([^"]*)"', instruction.text)
    return found.group(1) if found else None


def kernels(module: Module) -> dict[str, int]:
    """Pallas kernels in a program by name, with how often each runs."""
    found: collections.Counter[str] = collections.Counter()
    for step in module.steps():
        for inner in (step.instruction, *step.inner):
            if _target(inner) == "tpu_custom_call":
                found[re.sub(r"\.\d+$", "", re.sub(r"\.clone|\.remat", "", inner.name))] += step.times
    return dict(found)


def _parse(line: str) -> Instruction | None:
    head, equals, rest = line.strip().partition(" = ")
    opcode = _OPCODE.search(" " + rest) if equals else None
    if not opcode:
        return None
    shape = rest[: max(opcode.start() - 1, 0)]
    arguments, depth = rest[opcode.end() - 1 :], 1
    end = 0
    while depth and end < len(arguments):
        depth += (arguments[end] == "(") - (arguments[end] == ")")
        end += depth > 0
    inside, after = arguments[:end], arguments[end + 1 :]
    arrays = tuple(
        Array(
            m.group(1), tuple(int(d) for d in m.group(2).split(",") if d), not re.search(r"S\([1-9]", m.group(3) or "")
        )
        for m in _ARRAY.finditer(shape)
    )
    operands = tuple(re.findall(r"%([\w.\-]+)", inside))
    literal = inside if opcode.group(1) in ("constant", "parameter") else after
    name = head.removeprefix("ROOT ").lstrip("%")
    return Instruction(name, opcode.group(1), arrays, operands, literal, head.startswith("ROOT "))


def _kernel_flops(instruction: Instruction, operands: list[Array], unit: int) -> int:
    """Of an attention kernel: its products of queries and keys, `[B, H, D, T]`, without B where that is 1.

    They are its first operands but for the mask's tables, which are of integers.
    """
    products = next((n for name, n in KERNEL_PRODUCTS.items() if instruction.name.startswith(name)), None)
    if products is None:
        raise ValueError(f"kernel {instruction.name}: how many products it makes is not known; see KERNEL_PRODUCTS")
    query, key = [array for array in operands if array.dtype in ("bf16", "f32")][:2]
    *rows, size, length = query.dims
    return products * 2 * math.prod(rows) * length * key.dims[-1] * _filled(size, unit)


def _filled(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def _product_flops(instruction: Instruction, operands: list[Array], unit: int) -> int:
    left, right = operands[:2]
    if instruction.opcode == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([0-9,]*)\}", instruction.text).group(1)
        inner = math.prod(left.dims[int(d)] for d in contracted.split(",") if d)
        last = instruction.shape[0].dims[-1] if instruction.shape[0].dims else 1
        return 2 * math.prod(instruction.shape[0].dims) // last * _filled(last, unit) * _filled(inner, unit)
    # TPUs write every product as a convolution: batch axes become spatial ones, of which padding leaves the diagonal.
    inputs, kernel, out = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.text).groups()
    window = {
        key: value.split("x")
        for key, value in re.findall(
            r"(\w+)=([^\s}]+)", (re.search(r"window=\{([^}]*)\}", instruction.text) or [""])[0]
        )
    }
    result = instruction.shape[0]
    sides = result.dims[out.index("f")], right.dims[kernel.index("i")]
    total = 2 * result.dims[out.index("b")] * _filled(sides[0], unit) * _filled(sides[1], unit)
    for axis in sorted(set(inputs) - {"b", "f"}):
        i = int(axis)
        low = int(window["pad"][i].split("_")[0]) if "pad" in window else 0
        stride, dilation, spread = (
            int(window[key][i]) if key in window else 1 for key in ("stride", "rhs_dilate", "lhs_dilate")
        )
        size = (left.dims[inputs.index(axis)] - 1) * spread + 1
        pairs = 0
        for tap in range(right.dims[kernel.index(axis)]):
            for position in range(result.dims[out.index(axis)]):
                at = position * stride + tap * dilation - low
                pairs += 0 <= at < size and at % spread == 0
        total *= pairs
    return total
