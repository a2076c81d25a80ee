"""Runs the PTX of inline assembly in Triton's interpreter: all threads of one program, instruction by instruction.

Hides how threads diverge: of all threads those at the earliest instruction go next, so that they meet again where paths
join. Warps that exchange values must be whole, shared memory is poisoned and its bounds and alignment are checked, and
atomics of one instruction happen in a random order. What races between barriers is not seen.
"""

from __future__ import annotations

import ctypes
import operator
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

_MASK = np.uint64(0xFFFFFFFF)
_SHARED_BYTES = 48 * 1024
_COMPARE = {
    "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge, "eq": operator.eq, "ne": operator.ne,
}  # fmt: skip
_LOGIC = {"and": operator.and_, "or": operator.or_, "xor": operator.xor}


@dataclass(frozen=True, slots=True)
class _Instruction:
    """One instruction, with the predicate that guards it and whether that is negated."""

    guard: str | None
    is_negated: bool
    parts: tuple[str, ...]
    operands: tuple[str, ...]


def _signed(values: np.ndarray) -> np.ndarray:
    return (values & _MASK).astype(np.uint32).view(np.int32)


def _floats(values: np.ndarray) -> np.ndarray:
    return (values & _MASK).astype(np.uint32).view(np.float32)


def _unsigned(values: np.ndarray) -> np.ndarray:
    return values.astype(np.int64).astype(np.uint64) & _MASK


class PtxThreads:
    """The threads of the program that the interpreter runs, and their shared memory.

    Attributes:
        num_threads: of the program; a block on scalars runs in one warp.
        texts: every block that was run, to see which path was taken.
    """

    def __init__(self, num_threads: int) -> None:
        self.num_threads = num_threads
        self.texts: set[str] = set()
        self._memory = np.full(_SHARED_BYTES, 0xA5, np.uint8)
        self._top = 16  # so that address 0 is out of bounds
        self._symbols: dict[str, int] = {}
        self._random = np.random.default_rng(num_threads)
        self._programs: dict[str, tuple[list[_Instruction], dict[str, int]]] = {}

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Give the interpreter this in place of its refusal to run inline assembly."""
        from triton.runtime import interpreter

        def create_inline_asm(builder: Any, text: str, constraints: str, values: Any, types: Any, *_: Any) -> Any:
            shape = np.broadcast_shapes(*(value.data.shape for value in values))
            size = int(np.prod(shape))
            assert size in (1, self.num_threads), "a block acts once per element, so there must be one per thread"
            inputs = [np.resize(np.broadcast_to(value.data, shape), max(size, 32)) for value in values]
            wide = [array.astype(np.uint64) if array.itemsize == 8 else array.view(np.uint32) for array in inputs]
            outputs = self.run(text, constraints.count("="), [array.astype(np.uint64) for array in wide])
            handles = []
            for output, kind in zip(outputs, types):
                scalar = getattr(kind, "element_ty", kind)
                bits = (output[:size] & _MASK).astype(np.uint32).reshape(shape)
                data = bits.view(np.float32 if str(scalar) == "fp32" else np.int32)
                handles.append(interpreter.TensorHandle(data, scalar))
            return type("Call", (), {"get_result": lambda _, index: handles[index]})()

        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_inline_asm", create_inline_asm)
        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_barrier", lambda builder: None)

    def run(self, text: str, num_outputs: int, inputs: list[np.ndarray]) -> list[np.ndarray]:
        """Run a block; inputs and outputs are uint64, one per thread."""
        self.texts.add(text)
        if text not in self._programs:
            self._programs[text] = self._parse(text)
        instructions, labels = self._programs[text]
        self._size = len(inputs[0])
        self._values = {f"${num_outputs + i}": values.copy() for i, values in enumerate(inputs)}
        self._predicates: dict[str, np.ndarray] = {}
        counters = np.zeros(self._size, np.int64)
        for _ in range(100_000):
            if (counters == len(instructions)).all():
                return [self._values[f"${i}"] for i in range(num_outputs)]
            current = counters.min()
            active = counters == current
            counters[active] += 1
            instruction = instructions[current]
            if instruction.guard is not None:
                active = active & (self._predicates[instruction.guard] ^ instruction.is_negated)
            if instruction.parts[0] == "bra":
                counters[active] = labels[instruction.operands[0]]
            elif active.any():
                self._step(instruction, active)
        raise AssertionError(f"no end in sight: {text}")

    def _parse(self, text: str) -> tuple[list[_Instruction], dict[str, int]]:
        body = text.strip()
        body = body[1 : body.rindex("}")] if body.startswith("{") else body
        instructions: list[_Instruction] = []
        labels: dict[str, int] = {}
        for statement in body.split(";"):
            part = statement.strip()
            while label := re.match(r"(\w+):\s*", part):
                labels[label[1]] = len(instructions)
                part = part[label.end() :]
            if allocation := re.match(r"\.shared \.align \d+ \.b(\d+) (\w+)\[(\d+)\]", part):
                self._allocate(allocation[2], int(allocation[1]) // 8 * int(allocation[3]))
            elif part and not part.startswith(".reg"):
                guard = re.match(r"@(!?)(\w+)\s+", part)
                code, _, rest = part[guard.end() if guard else 0 :].partition(" ")
                operands = tuple(operand.strip() for operand in re.split(r",(?![^{]*\})", rest))
                name, is_negated = (guard[2], guard[1] == "!") if guard else (None, False)
                instructions.append(_Instruction(name, is_negated, tuple(code.split(".")), operands))
        return instructions, labels

    def _allocate(self, name: str, num_bytes: int) -> None:
        if name not in self._symbols:
            self._symbols[name] = self._top
            self._top += num_bytes
            assert self._top <= _SHARED_BYTES, "more static shared memory than a block has"

    def _read(self, operand: str) -> np.ndarray:
        if operand in self._values:
            return self._values[operand]
        if operand == "%laneid":
            return np.arange(self._size, dtype=np.uint64) % np.uint64(32)
        if operand in self._symbols:
            return np.full(self._size, self._symbols[operand], np.uint64)
        digits = f"0x{operand[2:]}" if operand.startswith("0f") else operand
        return np.full(self._size, int(digits, 0) & 0xFFFFFFFF, np.uint64)

    def _write(self, name: str, values: np.ndarray, active: np.ndarray) -> None:
        if name not in self._values:  # whatever a register holds
            self._values[name] = self._random.integers(0, 2**32, self._size).astype(np.uint64)
        self._values[name] = np.where(active, values, self._values[name])

    def _set(self, name: str, values: np.ndarray, active: np.ndarray) -> None:
        before = self._predicates.get(name, self._random.integers(0, 2, self._size).astype(bool))
        self._predicates[name] = np.where(active, values, before)

    def _step(self, instruction: _Instruction, active: np.ndarray) -> None:
        parts, operands = instruction.parts, instruction.operands
        if parts[0] in ("ld", "st", "atom", "red"):
            self._access(parts, operands, active)
        elif parts[0] in ("shfl", "redux", "bar", "barrier"):
            by_warp = active.reshape(-1, 32)
            assert (by_warp.any(1) == by_warp.all(1)).all(), "a warp exchanges values while it is split"
            self._exchange(parts, operands, active)
        elif parts[0] == "setp":
            self._compare(parts, operands, active)
        else:
            with np.errstate(all="ignore"):
                self._write(operands[0], self._compute(parts, operands[1:]), active)

    def _compute(self, parts: tuple[str, ...], operands: tuple[str, ...]) -> np.ndarray:
        code, kind = parts[0], parts[-1]
        if code == "selp":
            return np.where(self._predicates[operands[2]], self._read(operands[0]), self._read(operands[1]))
        a, b, c = (*(self._read(operand) for operand in operands), *[np.zeros(self._size, np.uint64)] * 2)[:3]
        if code == "mov":
            return a
        if code == "add":
            return _unsigned((_floats(a) + _floats(b)).view(np.int32)) if kind == "f32" else (a + b) & _MASK
        if code == "sub":
            return (a - b) & _MASK
        if code == "mad":
            if parts[1] == "wide":
                return (_signed(a).astype(np.int64) * _signed(b) + c.astype(np.int64)).astype(np.uint64)
            return (a * b + c) & _MASK
        if code in _LOGIC:
            return _LOGIC[code](a, b)
        if code == "not":
            return ~a & _MASK
        if code == "min":
            return np.minimum(a, b) if kind == "u32" else _unsigned(np.minimum(_signed(a), _signed(b)))
        if code in ("shl", "shr"):
            places = np.minimum(b, np.uint64(32))
            if kind == "s32":
                return _unsigned(_signed(a).astype(np.int64) >> places.astype(np.int64))
            return (a << places) & _MASK if code == "shl" else (a & _MASK) >> places
        bits = np.unpackbits((a & _MASK).astype(">u4").view(np.uint8)).reshape(-1, 32).astype(np.uint64)
        if code == "popc":
            return bits.sum(1, dtype=np.uint64)
        if code == "clz":
            return np.where(bits.any(1), bits.argmax(1), 32).astype(np.uint64)
        assert code == "brev", f"{code} is not known here"
        return (bits << np.arange(32, dtype=np.uint64)).sum(1, dtype=np.uint64)

    def _compare(self, parts: tuple[str, ...], operands: tuple[str, ...], active: np.ndarray) -> None:
        a, b = self._read(operands[1]), self._read(operands[2])
        convert = {"f32": _floats, "u32": lambda values: values & _MASK}.get(parts[-1], _signed)
        result = _COMPARE[parts[1]](convert(a), convert(b))
        if parts[2] == "and":
            result = result & self._predicates[operands[3]]
        self._set(operands[0], result, active)

    def _exchange(self, parts: tuple[str, ...], operands: tuple[str, ...], active: np.ndarray) -> None:
        if parts[0] == "barrier":
            assert active.all(), "threads miss a barrier"
            self._write(operands[0], np.full(self._size, self._predicates[operands[2]].sum(), np.uint64), active)
        elif parts[0] == "redux":
            sums = _signed(self._read(operands[1])).reshape(-1, 32).sum(1, dtype=np.int64)
            self._write(operands[0], _unsigned(np.repeat(sums, 32)), active)
        elif parts[0] == "shfl":
            lanes = np.arange(32)
            distance = int(operands[2], 0)
            source = {"up": lanes - distance, "bfly": lanes ^ distance, "idx": lanes * 0 + distance}[parts[2]]
            moved = self._read(operands[1]).reshape(-1, 32)[:, np.where(source >= 0, source, lanes)].reshape(-1)
            name, _, predicate = operands[0].partition("|")
            self._write(name, moved, active)
            if predicate:
                self._set(predicate, np.tile(source >= 0, self._size // 32), active)

    def _access(self, parts: tuple[str, ...], operands: tuple[str, ...], active: np.ndarray) -> None:
        position = 0 if parts[0] in ("st", "red") else 1
        place = re.fullmatch(r"\[\s*(\S+?)\s*(?:\+\s*(\d+))?\s*\]", operands[position])
        assert place is not None, operands
        addresses = (self._read(place[1]) + np.uint64(place[2] or 0)).astype(np.int64)
        if parts[0] in ("atom", "red"):
            self._update(parts, operands, addresses, active)
            return
        names = [name.strip() for name in operands[1 - position].strip("{}").split(",")]
        width = 1 if parts[-1] == "u8" else 4
        assert not (addresses[active] % (width * len(names))).any(), f"misaligned: {parts} {operands}"
        for offset, name in enumerate(names):
            self._access_one(parts, name, addresses + offset * width, active)

    def _access_one(self, parts: tuple[str, ...], name: str, addresses: np.ndarray, active: np.ndarray) -> None:
        if parts[1] == "global":
            assert parts[0] == "ld"
            loaded = np.zeros(self._size, np.uint64)
            for thread in np.flatnonzero(active):
                loaded[thread] = ctypes.c_uint32.from_address(int(addresses[thread])).value
            self._write(name, loaded, active)
            return
        self._check(addresses[active])
        if parts[-1] == "u8":
            self._memory[addresses[active]] = (self._read(name)[active] & np.uint64(0xFF)).astype(np.uint8)
            return
        words = self._memory.view(np.uint32)
        if parts[0] == "st":
            words[addresses[active] // 4] = (self._read(name)[active] & _MASK).astype(np.uint32)
        else:
            loaded = np.zeros(self._size, np.uint64)
            loaded[active] = words[addresses[active] // 4]
            self._write(name, loaded, active)

    def _update(
        self, parts: tuple[str, ...], operands: tuple[str, ...], addresses: np.ndarray, active: np.ndarray
    ) -> None:
        assert parts[1] == "shared"
        assert not (addresses[active] % 4).any(), f"misaligned: {parts} {operands}"
        self._check(addresses[active])
        words = self._memory.view(np.uint32)
        values = self._read(operands[-1])
        before = np.zeros(self._size, np.uint64)
        for thread in self._random.permutation(np.flatnonzero(active)):
            before[thread] = word = int(words[addresses[thread] // 4])
            value = int(values[thread]) & 0xFFFFFFFF
            words[addresses[thread] // 4] = (word + value if parts[2] == "add" else word | value) & 0xFFFFFFFF
        if parts[0] == "atom":
            self._write(operands[0], before, active)

    def _check(self, addresses: np.ndarray) -> None:
        assert ((addresses >= 16) & (addresses < self._top)).all(), "outside shared memory"
