"""The reproduction report: the papers' tables as Markdown and CSV, their figures as plots."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Sequence
from pathlib import Path

from bnncore.paper import plots, sizes
from bnncore.paper.figures import FIGURES, FiguresError, published
from bnncore.paper.runs import Line, collect, lines

INTRODUCTION = """\
# The papers' tables and figures, and ours

Accuracies are top-1 in % on the test images (Table 2 and Figure 3 of TentacleNet: points
above the FP32 model of the same run). Ours are means over seeds, with the standard
deviation where there are several. What is blank has not been run, or has no published
number. The second paper's curves are the last epoch of its authors' published runs.
Sizes are counted from the models as the papers count.
"""
HEAD = ["", "published", "ours", "difference", "epochs", "seeds", "setting", "file, bytes"]


def write(
    folders: Sequence[Path], out: Path, expected: Path = FIGURES, beside: Sequence[Path] = ()
) -> list[Path]:
    """Write the papers' tables and plots from the finished runs in `folders`.

    Args:
        beside: Markdown files that follow on the page, such as what `benchmarks/front.py` writes of
            rivals in one budget; a plot of the same name (.png) with each.

    Returns:
        The files written: ``paper.md``, ``paper.csv`` and the plots.

    Raises:
        FiguresError: the published figures, the results of a run or a file beside cannot be read.
    """
    figures = published(expected)
    found = lines(collect(folders), figures.series)
    tables: dict[str, sizes.Rows] = {}
    for line in found:
        tables.setdefault(line.series.place, [HEAD]).append(_cells(line))
    tables |= sizes.tables(figures)
    out.mkdir(parents=True, exist_ok=True)
    drawn = plots.write(found, out)
    text = [INTRODUCTION]
    for title, rows in tables.items():
        text.append(f"## {title}\n")
        image = out / plots.name(title.partition(":")[0])
        if image in drawn:
            text.append(f"![{title}]({image.name})\n")
        head, *body = ("| " + " | ".join(row) + " |" for row in rows)
        text += [head, "| --- |" + " ---: |" * (len(rows[0]) - 1), *body, ""]
    text += [_section(file, out) for file in beside]
    (out / "paper.md").write_text("\n".join(text), encoding="utf-8")
    _csv(found, out / "paper.csv")
    return [out / "paper.md", out / "paper.csv", *drawn]


def _section(file: Path, out: Path) -> str:
    """A file as a section of the page in `out`."""
    try:
        title, _, rest = file.read_text(encoding="utf-8").partition("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise FiguresError(f"{file}: expected a text to stand beside: {error}") from None
    plot = file.with_suffix(".png").resolve()
    image = f"![{title.lstrip('# ')}]({os.path.relpath(plot, out.resolve())})\n\n"
    lower = re.sub(r"^#", "##", f"{title}\n\n{image * plot.exists()}{rest.lstrip()}", flags=re.M)
    return f"{lower.rstrip()}\n"


def _cells(line: Line) -> list[str]:
    s = line.setting
    form = "{:+.2f}" if line.series.delta else "{:.2f}"
    ours = "" if line.ours is None else form.format(line.ours)
    return [
        line.row,
        "" if line.published is None else form.format(line.published),
        ours if line.spread is None else f"{ours} ± {line.spread:.2f}",
        "" if line.difference is None else f"{line.difference:+.2f}",
        str(s.epochs) if s and s.epochs is not None else "",
        str(line.seeds or ""),
        str(s or ""),
        f"{line.file_bytes:,}" if line.file_bytes else "",
    ]


def _csv(found: list[Line], path: Path) -> None:
    def rounded(value: float | None) -> float | None:
        return None if value is None else round(value, 4)

    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["place", "row", "unit", "published", "ours", "spread", "difference",
                         "seeds", "epochs", "width", "subset", "file_bytes"])  # fmt: skip
        for line in found:
            s = line.setting
            unit = "points to FP32" if line.series.delta else "% top-1"
            values = map(rounded, (line.ours, line.spread, line.difference))
            about = (
                (s.epochs, "paper" if s.width is None else s.width, s.subset) if s else [None] * 3
            )
            writer.writerow([line.series.place, line.row, unit, line.published, *values, line.seeds,
                             *about, line.file_bytes])  # fmt: skip
