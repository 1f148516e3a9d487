"""The table of a run: complete rows, as text, Markdown and CSV."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from bnncore.errors import UserError
from bnncore.terminal import columns

Row = Mapping[str, Any]
Histories = Mapping[str, Sequence[Row]]

KINDS = {"fp32": "FP32", "bnn": "one BNN", "ensemble": "ensemble of BNNs"}
COLUMNS = (
    *("name", "kind", "backbone", "width", "scheme", "sharing", "members", "val_top1", "test_top1"),
    *("file_bytes", "counted_kib", "counted_by", "fp32_ratio", "disagreement", "ece"),
    *("images_compared", "images_different", "max_logit_difference"),
)
NUMBERS = frozenset(COLUMNS) - {"name", "kind", "backbone", "scheme", "sharing", "counted_by"}
HEAD = ("model", "test, %", "validation, %", "bytes in the file", "KiB, paper's count",
        "counted as", "FP32 / file")  # fmt: skip
PAPERS = {"tentaclenet": "TentacleNet", "filter_sharing": "Kim et al."}  # whose count it is


class ReportError(UserError, ValueError):
    """Results that are missing or not as expected; says which and what."""


def complete(results: Iterable[Row]) -> list[dict[str, Any]]:
    """The rows with ``kind`` and ``fp32_ratio`` filled in, numbers plain, NaN as None.

    fp32_ratio = bytes of the FP32 model's file / bytes of the row's file; of several FP32 models
    the one of the row's backbone and width, else none is better than a wrong one.

    Raises:
        ReportError: names the row and the key: a row without a name, a name that comes twice, a
            text for a number.
    """
    rows: list[dict[str, Any]] = []
    seen: set[str] = set()
    for i, result in enumerate(results):
        if not isinstance(result, Mapping):
            raise ReportError(f"result {i}: expected an object, got {type(result).__name__}")
        row = {key: plain(value) for key, value in result.items()}
        name = row.get("name")
        if not name or not isinstance(name, str):
            raise ReportError(f"result {i}: expected a text as 'name', got {name!r}")
        if name in seen:
            raise ReportError(f"result {i}: expected a name of its own, got {name!r} again")
        for key in NUMBERS & row.keys():
            value = row[key]
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if value is not None and not (number and abs(value) < 1e18):
                raise ReportError(f"result {i}: expected a number as {key!r}, got {value!r:.50}")
        seen.add(name)
        if row.setdefault("kind", _kind(row)) not in tuple(KINDS):
            raise ReportError(
                f"result {i}: expected a kind of {', '.join(KINDS)}, got {row['kind']!r}"
            )
        rows.append(row)
    whole = [row for row in rows if row["kind"] == "fp32" and row.get("file_bytes")]
    for row in rows:
        if row.get("fp32_ratio") is None and row.get("file_bytes"):
            same = [w for w in whole if all(_agree(w, row, key) for key in ("backbone", "width"))]
            if len(same) == 1:
                row["fp32_ratio"] = same[0]["file_bytes"] / row["file_bytes"]
    return rows


def _kind(row: Row) -> str:
    if "fp32" in (row.get("scheme"), row.get("name")):
        return "fp32"
    return "ensemble" if (row.get("members") or 1) > 1 else "bnn"


def _agree(a: Row, b: Row, key: str) -> bool:
    return a.get(key) is None or b.get(key) is None or a[key] == b[key]


def plain(value: Any) -> Any:
    """numpy's numbers as Python's, and what JSON cannot say as None."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def _cells(row: Row) -> list[str]:
    def show(key: str, form: str) -> str:
        value = row.get(key)
        return "–" if value is None else form.format(value)

    return [
        row["name"],
        show("test_top1", "{:.2f}"),
        show("val_top1", "{:.2f}"),
        show("file_bytes", "{:,}"),
        show("counted_kib", "{:.2f}"),
        PAPERS.get(str(row.get("counted_by")), "–"),
        show("fp32_ratio", "{:.1f}×"),
    ]


def markdown(results: Iterable[Row]) -> str:
    """The table as Markdown; "FP32 / file" says how many times smaller the file is."""
    lines = ["| " + " | ".join(HEAD) + " |", "| --- |" + " ---: |" * (len(HEAD) - 1)]
    for row in complete(results):
        cells = [cell.replace("|", "\\|") for cell in _cells(row)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def write_csv(results: Iterable[Row], path: Path | str) -> None:
    """All that is known of every model, one row each, an empty field where it is not."""
    rows = complete(results)
    names = dict.fromkeys(key for row in rows for key in row)
    order = [c for c in COLUMNS if c in names] + [c for c in names if c not in COLUMNS]
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, order, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def text(results: Iterable[Row]) -> str:
    """The table in aligned columns."""
    return "\n".join(columns([HEAD, *map(_cells, complete(results))], "<>", rule=True))


def families(results: Iterable[Row]) -> dict[str, list[dict[str, Any]]]:
    """The ensembles in families that differ only by how many members they have, each by members.

    A family's name holds only what tells it from the others.
    """
    rows = [r for r in complete(results) if r["kind"] != "fp32" and r.get("members")]
    keys = ("scheme", "sharing", "backbone", "width")
    texts = {k: [str(r[k]) for r in rows if r.get(k) is not None] for k in keys}
    usual = {k: max(t, key=t.count) for k, t in texts.items() if t}
    telling = [k for k in keys if len(set(texts[k])) > 1]

    def kin(row: Row) -> str:
        words = []
        for k in telling:
            if row.get(k) is None or (k in ("backbone", "width") and str(row[k]) == usual[k]):
                continue
            words.append(f"{k} {row[k]}" if k == "width" else str(row[k]))
        return ", ".join(dict.fromkeys(words)) or KINDS[row["kind"]]

    settings: dict[str, set[str]] = {}
    for row in rows:
        settings.setdefault(kin(row), set()).add(row.get("settings") or "")

    def family(row: Row) -> str:
        own = row.get("settings")
        return f"{kin(row)}, {own}" if own and len(settings[kin(row)]) > 1 else kin(row)

    rows.sort(key=lambda r: (family(r), r["members"]))
    return {name: list(group) for name, group in groupby(rows, family)}
