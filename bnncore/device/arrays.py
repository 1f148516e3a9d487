"""Tensors as C arrays: ``const``, shared ones once, a member's own by member."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from bnncore.packed.program import Program, Shape, Tensor, unpack_bits

Make = Callable[[Tensor, int], np.ndarray]  # a tensor and a member: that copy, laid out


@dataclass
class Code:
    """C code on its way: arrays, step functions, and the kernels they call."""

    program: Program
    shapes: list[Shape]
    kinds: list[str]  # of values in memory: bits, f32, i32, i16, i8
    arrays: list[str] = field(default_factory=list)
    known: dict[tuple[str, str], str] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)
    shared: int = 0  # bytes of shared arrays
    own: int = 0  # of a member's own
    dry: bool = False  # only count them

    def call(self, kernel: str, *arguments: object) -> str:
        self.used.add(kernel)
        return f"bnn_{kernel}({', '.join(map(str, arguments))});"

    def array(self, name: str, layout: str, kind: str, make: Make) -> str:
        """The name of a tensor's array, laid out by `make` for each copy; ``[m]`` where own."""
        tensor = self.program.tensors[name]
        return self._named((name, layout), kind, tensor.own, lambda m: make(tensor, m))

    def group(
        self,
        names: list[str],
        layout: str,
        kind: str,
        make: Callable[[list[np.ndarray]], np.ndarray],
    ) -> str:
        """An array made of several tensors; a member's own where one of them is."""
        tensors = [self.program.tensors[name] for name in names]
        own = any(tensor.own for tensor in tensors)
        return self._named((" ".join(names), layout), kind, own,
                           lambda m: make([one_copy(tensor, m) for tensor in tensors]))  # fmt: skip

    def table(self, name: str, kind: str, values: np.ndarray) -> str:
        """The name of an array of what is in no tensor."""
        return self._named((name, ""), kind, False, lambda _: values)

    def _named(
        self, key: tuple[str, str], kind: str, own: bool, make: Callable[[int], np.ndarray]
    ) -> str:
        if key not in self.known:
            label = f"t{len(self.known)}_{re.sub(r'[^A-Za-z0-9]', '_', key[0].split('.')[-1])}"
            count = self.program.members if own and not self.dry else 1
            copies = [make(m) for m in range(count)]
            if not self.dry:
                self.arrays.append(c_array(label, kind, copies, own))
            self.shared += copies[0].nbytes * (not own)
            self.own += copies[0].nbytes * own
            self.known[key] = label
        return f"{self.known[key]}[m]" if own else self.known[key]


def one_copy(tensor: Tensor, m: int) -> np.ndarray:
    data = unpack_bits(tensor) if tensor.kind == "binary" else tensor.data
    return data[m] if tensor.own else data


def c_array(name: str, kind: str, copies: list[np.ndarray], own: bool) -> str:
    count = copies[0].size
    if not own:
        return f"static const {kind} {name}[{count}] = {{\n{c_values(copies[0], kind)}\n}};"
    rows = ",\n".join(f"{{\n{c_values(copy, kind)}\n}}" for copy in copies)
    return f"static const {kind} {name}[{len(copies)}][{count}] = {{\n{rows}\n}};"


def c_values(values: np.ndarray, kind: str) -> str:
    flat = values.reshape(-1)
    if kind == "float":
        words = [c_float(value) for value in flat]
    elif kind in ("uint32_t", "uint16_t"):
        words = [f"0x{int(value):x}u" for value in flat]
    else:
        words = [str(int(value)) for value in flat]
    lines, line = [], "   "
    for word in words:
        if len(line) + len(word) > 96:
            lines.append(line)
            line = "   "
        line += f" {word},"
    return "\n".join([*lines, line])


def c_float(value: float) -> str:
    text = np.format_float_scientific(np.float32(value), unique=True, trim="0")
    return f"{text}f"


def words(bits: np.ndarray) -> np.ndarray:
    """Booleans (..., n) as words (..., ceil(n / 32)), the first in the lowest bit."""
    n = bits.shape[-1]
    room = np.zeros((*bits.shape[:-1], -(-n // 32) * 32), bool)
    room[..., :n] = bits
    packed = np.packbits(room, axis=-1, bitorder="little")
    return np.ascontiguousarray(packed).view("<u4")
