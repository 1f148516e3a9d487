"""The page: `page.html` with the data of a run in it, which needs nothing but a browser."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bnncore.report import live
from bnncore.report.table import ReportError, complete, families, plain


def read(file: Path, kind: type[list] | type[dict]) -> Any:
    """What a JSON file holds.

    Raises:
        ReportError: it is not JSON, or not a list or object as expected; names the file.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ReportError(f"{file}: expected JSON, got {error}") from None
    if not isinstance(content, kind):
        raise ReportError(f"{file}: expected a {kind.__name__}, got {type(content).__name__}")
    return content


def results(reports: Path) -> list[dict[str, Any]]:
    """The rows of results.json, complete."""
    file = reports / "results.json"
    if not file.exists():
        raise ReportError(f"expected {file}: run the pipeline, or a search, first")
    rows = read(file, list)
    try:
        return complete(rows)
    except ReportError as error:
        raise ReportError(f"{file}: {error}") from None


def write(
    reports: Path | str, path: Path | str | None = None, packed: Path | str | None = None
) -> Path:
    """Writes the page, reports/index.html unless told otherwise, from the files that are there.

    Reads what `report.write` wrote, and search/front.json ({"budget_bytes", "trials":
    [{configuration..., "val_top1", "file_bytes", "feasible"}]}; a trial with "rival", a text, is
    marked as one; "winner" is the number or the rival's text of the best, "rivals" says which
    trials were rivals). Each may be missing, but not both results.json and search/front.json.
    The page holds its data, styles and scripts; it loads nothing. Where samples.json is there
    it runs the binarized models in the folder `packed`, by default the one beside `reports`.

    Raises:
        ReportError: there is neither, or a file is not what it should be; names the path.
        PackedFormatError: a packed file is none.
    """
    reports = Path(reports)

    def known(name: str) -> dict[str, Any] | None:
        return read(reports / name, dict) if (reports / name).exists() else None

    search = known("search/front.json")
    rows = results(reports) if search is None or (reports / "results.json").exists() else []
    shown = known("samples.json")
    packed = Path(packed or reports.parent / "packed")
    names = [packed / f"{row['name']}.bnn" for row in rows if row["kind"] != "fp32"]
    data = {
        "results": rows,
        "members": families(rows),
        "histories": known("histories.json") or {},
        "anytime": known("anytime.json") or {},
        "confusion": known("confusion.json"),
        "about": known("about.json"),
        "search": search,
        "live": live.models(names, shown) if shown else None,
    }
    # "</script>" in a name must not end the script element that holds the data.
    text = json.dumps(plain(data), ensure_ascii=False, allow_nan=False)
    text = text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    template, panel = (Path(__file__).with_name(name).read_text(encoding="utf-8")
                       for name in ("page.html", "panel.js"))  # fmt: skip
    whole = template.replace("{{panel}}", panel).replace("{{data}}", text)
    path = Path(path or reports / "index.html")
    path.write_text(whole, encoding="utf-8", errors="replace")
    return path
