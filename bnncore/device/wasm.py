"""A Program as WebAssembly: the same C for browsers, and whatever else runs it. Extra `device`.

The module imports nothing and exports its ``memory`` and

=================== ============================================================================
image()             where the image's bytes go, H W C
scores(members)     runs the first so many members: the class, -1 where there are not so many
out()               where the scores of all classes lie after it, float32
outputs()           where those of the last member that ran lie
early(margin)       runs members until the best score leads by `margin`: the class
used()              how many members that took
=================== ============================================================================
"""

from __future__ import annotations

from bnncore.device import compilers, export
from bnncore.packed.program import Program

TARGET = "wasm32-freestanding"


def module(program: Program) -> bytes:
    """`program` as a WebAssembly module.

    Raises:
        DeviceError: the compiler is missing.
        ExportError: something has no kernel.
    """
    compilers.expect(compilers.missing("ziglang"))
    made = export.generate(program, "model")
    interface = export.filled("wasm", {"LAST": len(program.nodes)})
    flags = ["-O2", "-Wl,--no-entry", "-Wl,--strip-all", "-Wl,-z,stack-size=65536"]
    return compilers.by_zig(made, TARGET, flags, {"interface.c": made.source + interface})
