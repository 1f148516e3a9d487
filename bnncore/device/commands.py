"""The commands ``export`` and ``device`` of ``python -m bnncore``."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from bnncore.device import compilers, costs, emulate, export, wasm
from bnncore.errors import UserError
from bnncore.packed import packfile
from bnncore.packed.program import Program

CYCLES = 1.25  # an instruction: about what Cortex-M code of this kind takes from fast memory
ESTIMATED = "cortex-m4"  # what `costs` is a model of


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add both to the command line."""
    text = "write the model as C code for a microcontroller, or as WebAssembly for a browser"
    command = commands.add_parser("export", help=text, description=text)
    command.add_argument("file", type=Path, help="a packed file, or zoo:NAME")
    command.add_argument("--c", type=Path, metavar="FOLDER",
                         help="where to; its last part names the model")  # fmt: skip
    command.add_argument("--wasm", type=Path, metavar="FILE", help="where to")
    command.set_defaults(run=run_export)
    text = "flash, RAM, stack and instructions an image on an emulated microcontroller"
    command = commands.add_parser("device", help=text, description=text)
    command.add_argument("file", type=Path, help="a packed file, or zoo:NAME")
    command.add_argument("--cpu", help=f"{', '.join(emulate.CORES)} (default {ESTIMATED})")
    command.add_argument("--mhz", type=float, help="also milliseconds, at this clock")
    command.add_argument("--cycles", type=float, default=CYCLES,
                         help=f"an instruction, for --mhz (default {CYCLES})")  # fmt: skip
    command.add_argument("--members", type=int, help="up to so many (default all)")
    command.add_argument("--estimate", action="store_true",
                         help=f"by a model of {ESTIMATED} at -O2: nothing is compiled")  # fmt: skip
    command.add_argument(
        "--compiler",
        choices=("zig", "gcc"),
        help=f"default zig; gcc is {compilers.GCC}, where it is installed",
    )
    command.add_argument("--optimize", help="the compiler's flags (default -O2)")
    command.set_defaults(run=run_device)


def run_export(options: argparse.Namespace) -> None:
    """Write NAME.h, NAME.c, NAME_test.c and NAME.md, or a WebAssembly module, or both.

    Raises:
        PackedFormatError: not a packed file.
        UserError: neither is asked for; the folder's name is no C identifier; no compiler.
        OSError: the file cannot be read, or the folder or module not written.
    """
    if options.c is None and options.wasm is None:
        raise UserError("export: expected --c FOLDER or --wasm FILE")
    program = packfile.load(options.file)
    if options.c is not None:
        made = export.export(program, Path(os.path.abspath(options.c)))
        print(f"{options.c}: {', '.join(made.files)}")
        print(f"RAM {made.arena:,} bytes beside the stack; "
              f"flash {made.flash:,} bytes for the model beside the code")  # fmt: skip
    if options.wasm is not None:
        code = wasm.module(program)
        options.wasm.parent.mkdir(parents=True, exist_ok=True)
        options.wasm.write_bytes(code)
        print(f"{options.wasm}: {len(code):,} bytes")


def run_device(options: argparse.Namespace) -> None:
    """Print what the model takes on a core.

    Raises:
        PackedFormatError: not a packed file.
        UserError: an option is out of range; a tool is missing; the model does not fit.
        OSError: the file cannot be read.
    """
    program = packfile.load(options.file)
    members = program.members if options.members is None else options.members
    if not 1 <= members <= program.members:
        raise UserError(f"--members: expected 1 to {program.members}, got {members}")
    for option in ("mhz", "cycles"):
        value = getattr(options, option)
        if value is not None and not 0 < value < float("inf"):
            raise UserError(f"--{option}: expected a number above 0, got {value}")
    if options.estimate:
        for option, only in (("cpu", ESTIMATED), ("compiler", None), ("optimize", "-O2")):
            if (asked := getattr(options, option)) not in (None, only):
                raise UserError(
                    f"--{option}: the estimate is for {ESTIMATED} at -O2 alone, got {asked}; "
                    "expected it without --estimate"
                )
        figures = costs.estimate(program)
        print(f"{options.file}, estimated for {ESTIMATED}")
        print(f"flash  {figures.flash:,} bytes: code {figures.code:,}, "
              f"weights and tables {figures.constants:,}")  # fmt: skip
        print(f"RAM    {figures.ram:,} bytes, exactly, and a stack")
        _print_counts(dict(enumerate(figures.instructions[:members], 1)), options)
        return
    cpu, compiled = options.cpu or ESTIMATED, options.compiler or "zig"
    optimize = options.optimize or "-O2"
    device = emulate.Device(export.generate(program, "model"), cpu, optimize, compiled)
    counts = instructions(device, program, members)
    sizes = device.sizes
    compiler = compilers.versions()[compiled]
    print(f"{options.file} on {cpu} ({compiler}, {optimize})")
    print(f"flash  {sizes.code + sizes.constants:,} bytes: code {sizes.code:,}, "
          f"weights and tables {sizes.constants:,}")  # fmt: skip
    print(f"RAM    {sizes.ram:,} bytes, and a stack of {device.deepest:,}")
    _print_counts(counts, options)


def _print_counts(counts: dict[int, int], options: argparse.Namespace) -> None:
    """Instructions by members, and what time they take at the clock that was asked for."""
    print()
    print(f"{'members':>7}  {'instructions an image':>21}" + (
        "" if options.mhz is None else f"  ms at {options.mhz:g} MHz"))  # fmt: skip
    for count, number in counts.items():
        line = f"{count:>7}  {number:>21,}"
        if options.mhz is not None:
            line += f"  {number * options.cycles / options.mhz / 1e3:.2f}"
        print(line)
    if options.mhz is not None:
        print(f"\nInstructions are counted; milliseconds assume {options.cycles:g} cycles for each "
              "and memory that keeps up.")  # fmt: skip


def instructions(device: emulate.Device, program: Program, members: int) -> dict[int, int]:
    """Instructions for one image by members: each up to 8, then doubling, and the last."""
    image = export.self_images(program, 1)
    wanted = {count for count in range(1, members + 1) if count <= 8 or count & (count - 1) == 0}
    return {count: device.call("scores", image, count, count=True)[1]
            for count in sorted(wanted | {members})}  # fmt: skip
