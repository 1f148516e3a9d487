"""What a terminal is given: printable text, columns, and a command's errors in one line."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Sequence

from bnncore.errors import UserError


def printable(text: str) -> str:
    r"""`text` with escapes (``\x1b``) for all that a terminal would obey instead of showing.

    These are Unicode's "other" and "separator" characters but for the space: controls, formats
    (those that turn the direction of writing among them), line ends, halves of surrogate pairs,
    private and unassigned ones.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def columns(rows: Sequence[Sequence[object]], align: str = "<", rule: bool = False) -> list[str]:
    """Rows of cells as printable lines with their columns under each other.

    Args:
        rows: all of one length; the first may be a head.
        align: ``<`` or ``>`` a column; the last serves all that follow.
        rule: draw a line of dashes under the first row.
    """
    cells = [[printable(str(cell)) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    if rule:
        cells.insert(1, ["-" * width for width in widths])
    sides = align.ljust(len(widths), align[-1])
    return [
        "  ".join(f"{c:{s}{w}}" for c, s, w in zip(row, sides, widths, strict=True)).rstrip()
        for row in cells
    ]


def command(name: str, work: Callable[[], int | None]) -> int:
    """Run a command and return its exit status.

    What the user can mend ends in one line on stderr; anything else is a bug with its traceback.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal of another encoding shows escapes
            stream.reconfigure(errors="backslashreplace")
    try:
        status = work() or 0
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # `... | head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        message = f"{error.filename}: {error.strerror}" if error.filename else str(error)
    except UserError as error:
        message = str(error)
    print(f"{name}: {printable(message)}", file=sys.stderr)
    return 1
