"""C compilers for other machines: zig's, from PyPI's `ziglang` (extra `device`); Arm's gcc."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

from bnncore.device.export import Exported
from bnncore.errors import UserError

FREESTANDING = Path(__file__).with_name("freestanding")
GCC = "arm-none-eabi-gcc"
TOOLS = {"ziglang": "ziglang", "unicorn": "unicorn", "elftools": "pyelftools"}  # module -> package


class DeviceError(UserError, RuntimeError):
    """A tool is missing, or code does not compile or run on a device; says which and why."""


def missing(*modules: str) -> list[str]:
    """Packages that are not installed, of these modules (default: all of `TOOLS`)."""
    return [TOOLS[name] for name in modules or TOOLS if importlib.util.find_spec(name) is None]


def expect(gone: list[str]) -> None:
    """Raises DeviceError, which says how to install what is gone, if anything is."""
    if gone:
        raise DeviceError(f"expected the packages {', '.join(gone)}: pip install 'bnncore[device]'")


def by_zig(made: Exported, target: str, flags: list[str], files: dict[str, str]) -> bytes:
    """The model's code, linked for a target without an operating system.

    Args:
        made: from `export.generate`.
        target: as zig names it.
        flags: the compiler's; a file is named by ``{folder}/NAME``.
        files: what lies beside the header, name -> content; those that end in .c are compiled.

    Raises:
        DeviceError: it does not compile.
    """
    command = [sys.executable, "-m", "ziglang", "cc", "-target", target, "-fomit-frame-pointer",
               "-fno-sanitize=all", "-nostdlib", "-rtlib=compiler-rt",
               "-isystem", str(FREESTANDING)]  # fmt: skip
    return _linked(made, [*command, *flags], files, target)


def by_gcc(made: Exported, flags: list[str], files: dict[str, str]) -> bytes:
    """The same by Arm's gcc and its newlib, where a system has them."""
    if shutil.which(GCC) is None:
        raise DeviceError(f"expected {GCC} on the path: Debian's gcc-arm-none-eabi has it")
    return _linked(made, [GCC, "-nostartfiles", "-specs=nosys.specs", *flags], files, GCC)


def versions() -> dict[str, str]:
    """The compilers that are there, ``zig`` and ``gcc``, and what to call them."""
    found = {}
    if not missing("ziglang"):
        found["zig"] = f"zig {metadata.version('ziglang')}"
    if shutil.which(GCC) is not None:
        asked = subprocess.run([GCC, "-dumpfullversion"], capture_output=True, text=True)
        found["gcc"] = f"{GCC} {asked.stdout.strip()}"
    return found


def _linked(made: Exported, command: list[str], files: dict[str, str], what: str) -> bytes:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file, text in {f"{made.name}.h": made.header, **files}.items():
            (folder / file).write_text(text)
        command = [
            *(word.replace("{folder}", name) for word in command), "-std=c99", "-ffp-contract=off",
            "-o", str(folder / "linked"), *(str(folder / f) for f in files if f.endswith(".c")),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if "error" in line] or ["?"]
            raise DeviceError(f"{made.name} for {what}: does not compile: {errors[0]}")
        return (folder / "linked").read_bytes()
