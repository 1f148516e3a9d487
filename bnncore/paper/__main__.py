"""``python -m bnncore.paper``: the papers' tables and plots, with finished runs beside."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bnncore.paper import figures, report
from bnncore.terminal import command, printable


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m bnncore.paper",
        description="The papers' tables and plots, with the accuracies of finished runs beside.",
    )
    parser.add_argument("results", nargs="*", type=Path, metavar="RESULTS_DIR",
                        help="folders with results.json somewhere below")  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("reports/paper"), metavar="DIR")
    parser.add_argument("--expected", type=Path, default=figures.FIGURES, metavar="FILE",
                        help="the published figures (default: the package's own)")  # fmt: skip
    parser.add_argument("--beside", nargs="+", type=Path, default=[], metavar="FILE",
                        help="Markdown that follows, with the plot of its name: "
                             "tables of benchmarks/front.py")  # fmt: skip
    options = parser.parse_args(arguments)

    def work() -> None:
        for path in report.write(options.results, options.out, options.expected, options.beside):
            print(printable(str(path)))

    return command("paper", work)


if __name__ == "__main__":
    sys.exit(main())
