"""``python -m bnncore.report``: the table of a finished run, and its page."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bnncore.report import page, table
from bnncore.terminal import command


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table of a finished run; --html also writes the page."""
    parser = argparse.ArgumentParser(prog="python -m bnncore.report", description=main.__doc__)
    parser.add_argument("--reports", type=Path, default=Path("reports"), help="its directory")
    parser.add_argument("--html", action="store_true", help="write index.html there")
    parser.add_argument("--packed", type=Path,
                        help="packed files that it runs (default: beside it)")  # fmt: skip
    options = parser.parse_args(arguments)

    def work() -> None:
        where = page.write(options.reports, packed=options.packed) if options.html else None
        # After a search alone there is the page only.
        if not where or (options.reports / "results.json").exists():
            print(table.text(page.results(options.reports)))
            about = options.reports / "about.json"
            chance = page.read(about, dict).get("chance_top1") if about.exists() else None
            if isinstance(chance, int | float):
                print(f"\nby chance, always the commonest class: {chance:.2f} % of the test images")
        if where:
            print(f"\n{where.resolve().as_uri()}")

    return command("report", work)


if __name__ == "__main__":
    sys.exit(main())
