"""Generated C on emulated processors: compiled by zig or gcc, run and counted by unicorn. Extra
`device`.

Counts are instructions, not cycles; they are exact and the same everywhere.
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bnncore.device import compilers
from bnncore.device.compilers import DeviceError
from bnncore.device.export import Exported

FLASH, RAM = 0x0800_0000, 0x2000_0000  # where the linker puts what
STACK, DATA = 0x5000_0000, 0x6000_0000  # the image and the scores are data
STACK_BYTES = 1 << 16
FLASH_BYTES, RAM_BYTES = 0x0700_0000, 0x2000_0000  # at most
END = 0x0FFF_0000  # where a call returns to


@dataclass(frozen=True)
class Core:
    """A processor: how zig, unicorn and gcc name it, and whether it has floats."""

    target: str
    cpu: str
    arch: str
    mode: tuple[str, ...]
    model: str | None = None
    fpu: bool = False
    gcc: tuple[str, ...] = ()


CORES = {
    "cortex-m4": Core("thumb-freestanding-eabihf", "cortex_m4+vfp4d16sp", "ARM",
                      ("THUMB", "MCLASS"), "CORTEX_M4", fpu=True,
                      gcc=("-mcpu=cortex-m4", "-mfpu=fpv4-sp-d16", "-mfloat-abi=hard")),
    "cortex-m3": Core("thumb-freestanding-eabi", "cortex_m3", "ARM", ("THUMB", "MCLASS"),
                      "CORTEX_M3", gcc=("-mcpu=cortex-m3",)),
    "cortex-m0+": Core("thumb-freestanding-eabi", "cortex_m0plus", "ARM", ("THUMB", "MCLASS"),
                       "CORTEX_M0", gcc=("-mcpu=cortex-m0plus",)),
    "riscv32": Core("riscv32-freestanding-none", "generic_rv32+m", "RISCV", ("RISCV32",)),
}  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """What a linked model takes: bytes of machine code, of constants, of static memory."""

    code: int
    constants: int
    ram: int


class Device:
    """A model's code on an emulated core.

    Args:
        made: from `export.generate`.
        core: a key of `CORES`.
        optimize: the compiler's flags.
        compiler: ``zig``, or ``gcc`` for Arm's.

    Raises:
        DeviceError: a tool is missing; the code does not compile.
    """

    def __init__(
        self, made: Exported, core: str, optimize: str = "-O2", compiler: str = "zig"
    ) -> None:
        compilers.expect(compilers.missing())
        if core not in CORES:
            raise DeviceError(f"cpu: expected one of {', '.join(CORES)}, got {core!r}")
        self.made, self.core = made, CORES[core]
        if compiler == "gcc" and not self.core.gcc:
            raise DeviceError(f"compiler: expected zig for {core}, got 'gcc'")
        self.elf = _compiled(made, self.core, optimize, compiler)
        self.segments, self.symbols, self.sizes = _read(self.elf)
        if self.sizes.code + self.sizes.constants > FLASH_BYTES or self.sizes.ram > RAM_BYTES:
            raise DeviceError(
                f"expected at most {FLASH_BYTES:,} bytes of flash and {RAM_BYTES:,} of RAM, "
                f"got {self.sizes}"
            )
        self.deepest = 0
        self.visits = Counter[tuple[int, int]]()  # of a basic block, by address and size
        self.profiled = Counter[str]()  # instructions of the last counted image by function

    def _machine(self) -> Any:
        import unicorn
        from unicorn import arm_const

        mode = sum(getattr(unicorn, f"UC_MODE_{word}") for word in self.core.mode)
        uc = unicorn.Uc(getattr(unicorn, f"UC_ARCH_{self.core.arch}"), mode)
        if self.core.model:
            uc.ctl_set_cpu_model(getattr(arm_const, f"UC_CPU_ARM_{self.core.model}"))
        for address, size in (
            (FLASH, self.sizes.code + self.sizes.constants),
            (RAM, self.sizes.ram),
            (STACK, STACK_BYTES),
            (DATA, _pages(self.made.image) + 4 * self.made.classes),
        ):
            uc.mem_map(address, _pages(size))
        uc.mem_map(END & ~0xFFF, 0x1000)
        if self.core.arch == "ARM":
            uc.mem_map(0xE000_E000, 0x1000)
        for address, data in self.segments:
            uc.mem_write(address, data)
        if self.core.fpu:
            uc.mem_write(0xE000_ED88, (0xF << 20).to_bytes(4, "little"))
        return uc

    def call(
        self, function: str, images: np.ndarray, members: int, count: bool = False
    ) -> tuple[list[tuple[int, np.ndarray]], int]:
        """Call ``NAME_scores`` for each image.

        Args:
            images: uint8 (B, H, W, C).
            count: count instructions (slower: every basic block is seen).

        Returns:
            (class, scores float32 (classes,)) an image; instructions an image, of the last one, 0
            where they are not counted. `deepest` then is the stack's bytes.
        """
        import unicorn

        name = self.made.name
        uc = self._machine()
        image, out = DATA, DATA + _pages(self.made.image)
        top = STACK + STACK_BYTES - 64
        found, low = [], [top]
        sp = self._register("SP")

        def block(machine: Any, address: int, size: int, data: Any) -> None:
            self.visits[address, size] += 1
            low[0] = min(low[0], machine.reg_read(sp))

        def write(machine: Any, access: int, address: int, *_: Any) -> None:
            # Also in a function of one block, which was seen before it pushed anything.
            low[0] = min(low[0], address)

        if count:
            uc.hook_add(unicorn.UC_HOOK_BLOCK, block)
            uc.hook_add(unicorn.UC_HOOK_MEM_WRITE, write, begin=STACK, end=STACK + STACK_BYTES)
        if (symbol := f"{name}_{function}") not in self.symbols:
            raise DeviceError(
                "--optimize: expected flags that leave functions where they are: the linked code "
                f"has no {symbol}"
            )
        entry = self.symbols[symbol]
        for picture in images:
            self.visits.clear()
            uc.mem_write(image, picture.tobytes())
            for register, value in zip(self._arguments(), (image, members, out), strict=False):
                uc.reg_write(register, value)
            uc.reg_write(sp, top)
            uc.reg_write(self._register("LR" if self.core.arch == "ARM" else "RA"), END | 1
                         if self.core.arch == "ARM" else END)  # fmt: skip
            start = entry | 1 if self.core.arch == "ARM" else entry
            uc.emu_start(start, END)
            label = uc.reg_read(self._arguments()[0])
            label -= (label >> 31) << 32
            scores = np.frombuffer(bytes(uc.mem_read(out, 4 * self.made.classes)), "<f4")
            found.append((label, scores.copy()))
        self.deepest = top - low[0]
        self.profiled = self._profile(uc)
        return found, self.profiled.total()

    def _profile(self, machine: Any) -> Counter[str]:
        """Instructions by function; what is inlined counts for its caller."""
        names = sorted((address, name) for name, address in self.symbols.items())
        starts = [address for address, _ in names]
        found = Counter[str]()
        for (address, size), visits in self.visits.items():
            code = bytes(machine.mem_read(address, size))
            name = names[bisect.bisect_right(starts, address) - 1][1]
            found[name] += visits * self._instructions(code)
        return found

    def _instructions(self, code: bytes) -> int:
        """How many instructions of 2 and 4 bytes a basic block has."""
        at = count = 0
        while at < len(code):
            half = int.from_bytes(code[at : at + 2], "little")
            long = half >> 11 >= 0b11101 if self.core.arch == "ARM" else half & 3 == 3
            at += 4 if long else 2
            count += 1
        return count

    def _register(self, name: str) -> int:
        from unicorn import arm_const, riscv_const

        if self.core.arch == "ARM":
            return int(getattr(arm_const, f"UC_ARM_REG_{name}"))
        return int(getattr(riscv_const, f"UC_RISCV_REG_{name}"))

    def _arguments(self) -> Sequence[int]:
        prefix = "R" if self.core.arch == "ARM" else "A"
        return [self._register(f"{prefix}{k}") for k in range(3)]


def _pages(size: int) -> int:
    return -(-size // 4096) * 4096 + 4096  # one more: a page of its own between regions


def _compiled(made: Exported, core: Core, optimize: str, compiler: str) -> bytes:
    script = (
        f"ENTRY({made.name}_scores)\n"
        f"SECTIONS {{ . = 0x{FLASH:x}; .text : {{ KEEP(*(.text.{made.name}_*)) *(.text*) }} "
        f".rodata : {{ *(.rodata*) *(.srodata*) }} . = 0x{RAM:x}; "
        ".data : { *(.data*) *(.sdata*) } .bss : { *(.bss*) *(.sbss*) *(COMMON) } }\n"
    )
    flags = ["-g", *optimize.split(), "-ffunction-sections",
             "-Wl,-T,{folder}/device.ld", "-Wl,--gc-sections"]  # fmt: skip
    files = {"device.ld": script, f"{made.name}.c": made.source}
    if compiler == "gcc":
        return compilers.by_gcc(made, [*core.gcc, "-mthumb", *flags], files)
    return compilers.by_zig(made, core.target, [f"-mcpu={core.cpu}", *flags], files)


def _read(elf: bytes) -> tuple[list[tuple[int, bytes]], dict[str, int], Sizes]:
    """(address, content) of what is loaded, functions, sizes."""
    import io

    from elftools.elf.elffile import ELFFile
    from elftools.elf.sections import SymbolTableSection

    file = ELFFile(io.BytesIO(elf))
    segments, sizes = [], {"code": 0, "constants": 0, "ram": 0}
    for section in file.iter_sections():
        address, size, flags = section["sh_addr"], section["sh_size"], section["sh_flags"]
        if not flags & 2 or not size:
            continue
        if section["sh_type"] != "SHT_NOBITS":
            segments.append((address, section.data()))
        kind = "code" if flags & 4 else "ram" if address >= RAM else "constants"
        sizes[kind] += size
    table = file.get_section_by_name(".symtab")
    assert isinstance(table, SymbolTableSection)
    symbols = {s.name: s["st_value"] & ~1 if file["e_machine"] == "EM_ARM" else s["st_value"]
               for s in table.iter_symbols() if s["st_info"]["type"] == "STT_FUNC"}  # fmt: skip
    return segments, symbols, Sizes(**sizes)
