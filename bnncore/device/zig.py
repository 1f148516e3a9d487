"""zig's C compiler for other machines, from PyPI's `ziglang`. Extra `device`."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
from pathlib import Path

from bnncore.device.export import Exported
from bnncore.errors import UserError

FREESTANDING = Path(__file__).with_name("freestanding")
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


def compiled(made: Exported, target: str, flags: list[str], files: dict[str, str]) -> bytes:
    """The model's code, linked for a target without an operating system.

    Args:
        made: from `export.generate`.
        target: as zig names it.
        flags: the compiler's; a file is named by ``{folder}/NAME``.
        files: what lies beside the header, name -> content; those that end in .c are compiled.

    Raises:
        DeviceError: it does not compile.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file, text in {f"{made.name}.h": made.header, **files}.items():
            (folder / file).write_text(text)
        command = [
            sys.executable, "-m", "ziglang", "cc", "-target", target, "-std=c99",
            *(flag.replace("{folder}", name) for flag in flags), "-fomit-frame-pointer",
            "-fno-sanitize=all", "-ffp-contract=off", "-nostdlib", "-rtlib=compiler-rt",
            "-isystem", str(FREESTANDING), "-o", str(folder / "linked"),
            *(str(folder / file) for file in files if file.endswith(".c")),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if "error" in line] or ["?"]
            raise DeviceError(f"{made.name} for {target}: does not compile: {errors[0]}")
        return (folder / "linked").read_bytes()
