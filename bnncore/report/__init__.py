"""The report of a run: one table, plots as PNG, and a page that needs nothing but a browser.

`results` is a list with one object a model::

    {"name", "scheme", "sharing", "members", "val_top1", "test_top1",   (top1 in percent)
     "file_bytes", "counted_kib", "images_compared", "images_different", "max_logit_difference"}

and, where known, ``kind`` ("fp32", "bnn" or "ensemble"), ``backbone``, ``width``, ``fp32_ratio``
(bytes of the FP32 file over bytes of this one), ``disagreement``, ``ece``. `histories` is
``{model: [{"epoch", "train_loss", "train_top1", "val_loss", "val_top1"}, ...]}`` and `anytime`
``{model: [{"members", "top1", "mean_members"}, ...]}``, accuracy by the members evaluated. A value
that is not known is missing or None.

    python -m bnncore.report --html          # reports/index.html from what `write` left there

Nothing here imports torch.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = Mapping[str, Any]
Histories = Mapping[str, Sequence[Row]]

KINDS = {  # marker and colour (Okabe and Ito's palette, told apart by the colour-blind too)
    "fp32": ("FP32", "s", "#d55e00"),
    "bnn": ("one BNN", "o", "#0072b2"),
    "ensemble": ("ensemble of BNNs", "^", "#009e73"),
}
_LINES = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#4d4d4d", "#8c6d1f"]
_DASHES = ["-", "--", ":", "-."]
_COLUMNS = ["name", "kind", "backbone", "width", "scheme", "sharing", "members", "val_top1"]
_COLUMNS += ["test_top1", "file_bytes", "counted_kib", "fp32_ratio", "disagreement", "ece"]
_COLUMNS += ["images_compared", "images_different", "max_logit_difference"]


# ---------------------------------------------------------------- the table


def complete(results: Iterable[Row]) -> list[dict[str, Any]]:
    """The rows with ``kind`` and ``fp32_ratio`` filled in, numbers plain, NaN as None.

    fp32_ratio = bytes of the FP32 model's file / bytes of the row's file; of several FP32 models
    the one of the row's backbone and width, else none is better than a wrong one.

    Raises ValueError naming the row and the key if a row has no name or a name comes twice.
    """
    rows = [{key: _plain(value) for key, value in row.items()} for row in results]
    seen: set[str] = set()
    for i, row in enumerate(rows):
        name = row.get("name")
        if not name or not isinstance(name, str):
            raise ValueError(f"result {i}: expected a text as 'name', got {name!r}")
        if name in seen:
            raise ValueError(f"result {i}: expected a name of its own, got {name!r} again")
        seen.add(name)
        row.setdefault("kind", _kind(row))
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


def _plain(value: Any) -> Any:
    """numpy's numbers as Python's, and what JSON cannot say as None."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
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
        show("fp32_ratio", "{:.1f}×"),
    ]


_HEAD = ["model", "test, %", "validation, %", "bytes in the file", "KiB, paper's count"]
_HEAD += ["FP32 / file"]


def table_markdown(results: Iterable[Row]) -> str:
    """The table as Markdown; "FP32 / file" says how many times smaller the file is."""
    lines = ["| " + " | ".join(_HEAD) + " |", "| --- |" + " ---: |" * (len(_HEAD) - 1)]
    for row in complete(results):
        cells = [cell.replace("|", "\\|") for cell in _cells(row)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def table_csv(results: Iterable[Row], path: Path | str) -> None:
    """All that is known of every model, one row each, an empty field where it is not."""
    rows = complete(results)
    names = dict.fromkeys(key for row in rows for key in row)
    columns = [c for c in _COLUMNS if c in names] + [c for c in names if c not in _COLUMNS]
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def print_table(results: Iterable[Row], file: TextIO | None = None) -> None:
    """Prints the table in aligned columns."""
    table = [_HEAD, *map(_cells, complete(results))]
    wide = [max(map(len, column)) for column in zip(*table, strict=True)]
    for i, cells in enumerate(table):
        first = cells[0].ljust(wide[0])
        rest = [cell.rjust(w) for cell, w in zip(cells[1:], wide[1:], strict=True)]
        print("  ".join([first, *rest]), file=file or sys.stdout)
        if i == 0:
            print("  ".join("-" * w for w in wide), file=file or sys.stdout)


# ---------------------------------------------------------------- plots


def _figure(width: float = 8.0, height: float = 5.0, panels: int = 1) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    axes = [figure.add_subplot(1, panels, i + 1) for i in range(panels)]
    for ax in axes:
        ax.grid(True, color="#e4e4e4", linewidth=0.8)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Figure, path: Path | str) -> None:
    figure.savefig(path, metadata={"Software": None})  # the same plot, the same bytes


def plot_accuracy_bytes(results: Iterable[Row], path: Path | str) -> None:
    """Test accuracy against KiB of the file (log), every model by name, with the Pareto front."""
    rows = [r for r in complete(results) if r.get("file_bytes") and r.get("test_top1") is not None]
    figure, (ax,) = _figure()
    points = [(r["file_bytes"] / 1024, r["test_top1"], r["name"]) for r in rows]
    front = _front(points)
    # The front: the best accuracy that so many bytes buy.
    ax.step(*zip(*front, strict=True) if front else ([], []), where="post", color="#b5b5b5", lw=1.2)
    for kind, (label, marker, colour) in KINDS.items():
        mine = [p for p, r in zip(points, rows, strict=True) if r["kind"] == kind]
        if mine:
            x, y, _ = zip(*mine, strict=True)
            ax.scatter(x, y, 64, colour, marker=marker, label=label, zorder=3, edgecolors="white")
    ax.set_xscale("log")
    _log_ticks(ax, [x for x, *_ in points])
    ax.set_xlabel("KiB of the packed file (log scale)")
    ax.set_ylabel("test accuracy, %")
    ax.margins(0.12, 0.14)
    if points:
        ax.legend(loc="lower right", frameon=False)
    _labels(figure, ax, points, front)
    _save(figure, path)


def _front(points: Sequence[tuple[float, float, Any]]) -> list[tuple[float, float]]:
    """The points that no other beats in both size and accuracy, by size."""
    front: list[tuple[float, float]] = []
    for x, y, *_ in sorted(points, key=lambda p: (p[0], -p[1])):
        if not front or y > front[-1][1]:
            front.append((x, y))
    return front


def _log_ticks(ax: Axes, xs: Sequence[float]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    few = bool(xs) and max(xs) / min(xs) < 1000
    ax.xaxis.set_major_locator(LogLocator(10, (1, 2, 5) if few else (1,), numticks=20))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))


def _whole_numbers(ax: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    ax.xaxis.set_major_locator(MaxNLocator("auto", integer=True))


def _labels(
    figure: Figure,
    ax: Axes,
    points: Sequence[tuple[float, float, str]],
    front: Sequence[tuple[float, float]],
    others: Sequence[tuple[float, float]] = (),
) -> None:
    """Puts each point's name beside it where it covers no name, point or legend.

    `others` are points without a name. Of the places left the one that the front's steps cross
    least, then the nearest.
    """
    from matplotlib.transforms import Bbox

    figure.draw_without_rendering()
    frame = ax.get_window_extent()
    to_pixels = ax.transData.transform
    taken = [
        Bbox.from_bounds(x - 7, y - 7, 14, 14)
        for x, y in map(to_pixels, [*(p[:2] for p in points), *others])
    ]
    if legend := ax.get_legend():
        taken.append(legend.get_window_extent())
    steps = []
    for (x0, y0), (x1, y1) in pairwise(front):
        (a, b), (c, d) = to_pixels((x0, y0)), to_pixels((x1, y1))
        steps += [Bbox.from_extents(a, b - 1, c, b + 1), Bbox.from_extents(c - 1, b, c + 1, d)]
    sides: list[tuple[float, float, str, str]]
    sides = [(1, 0, "left", "center"), (-1, 0, "right", "center"), (0, 1, "center", "bottom")]
    sides += [
        (0, -1, "center", "top"),
        (0.75, 0.75, "left", "bottom"),
        (0.75, -0.75, "left", "top"),
    ]
    sides += [(-0.75, 0.75, "right", "bottom"), (-0.75, -0.75, "right", "top")]
    places = [(r * dx, r * dy, h, v) for r in (8, 14, 22, 32, 44) for dx, dy, h, v in sides]
    for x, y, name in sorted(points, key=lambda p: -p[1]):
        note = ax.annotate(
            name, (x, y), (8, 0), textcoords="offset points", fontsize=8, color="#333333"
        )
        best: tuple[float, int] | None = None
        for i, (dx, dy, ha, va) in enumerate(places):
            note.set(position=(dx, dy), ha=ha, va=va)
            box = note.get_window_extent().padded(1)
            inside = frame.containsx(box.x0) and frame.containsx(box.x1)
            inside = inside and frame.containsy(box.y0) and frame.containsy(box.y1)
            if inside and not any(box.overlaps(other) for other in taken):
                crossed = sum(box.overlaps(step) for step in steps)
                best = min(best or (math.inf, 0), (crossed * 20.0 + math.hypot(dx, dy), i))
        if best is None:
            note.remove()  # no room: the table names it
            continue
        dx, dy, ha, va = places[best[1]]
        note.set(position=(dx, dy), ha=ha, va=va)
        taken.append(note.get_window_extent().padded(1))
        if math.hypot(dx, dy) > 20:  # far enough to need a line to its point
            line = {"arrowstyle": "-", "color": "#999999", "lw": 0.6, "shrinkA": 0, "shrinkB": 4}
            ax.annotate("", (x, y), (dx, dy), textcoords="offset points", arrowprops=line)


def members_curves(results: Iterable[Row]) -> dict[str, list[dict[str, Any]]]:
    """The ensembles in families that differ only by how many members they have, each by members.

    A family's name holds only what tells it from the others.
    """
    rows = [r for r in complete(results) if r["kind"] != "fp32" and r.get("members")]
    keys = ("scheme", "sharing", "backbone", "width", "combine", "classifier")
    texts = {k: [str(r[k]) for r in rows if r.get(k) is not None] for k in keys}
    usual = {k: max(t, key=t.count) for k, t in texts.items() if t}
    telling = [k for k in keys if len(set(texts[k])) > 1]

    def family(row: Row) -> str:
        words = []
        for k in telling:
            if row.get(k) is None or (k in ("backbone", "width") and str(row[k]) == usual[k]):
                continue
            words.append(f"{k} {row[k]}" if k == "width" else str(row[k]))
        return ", ".join(dict.fromkeys(words)) or KINDS[row["kind"]][0]

    rows.sort(key=lambda r: (family(r), r["members"]))
    return {name: list(group) for name, group in groupby(rows, family)}


def plot_accuracy_members(results: Sequence[Row], path: Path | str) -> None:
    """Test accuracy against the number of members, a line a family, FP32 as a level."""
    figure, (ax,) = _figure()
    for i, (name, rows) in enumerate(members_curves(results).items()):
        known = [(r["members"], r["test_top1"]) for r in rows if r.get("test_top1") is not None]
        if known:
            x, y = zip(*known, strict=True)
            ax.plot(x, y, label=name, **_line(i), marker="o^sDvP*X"[i % 8], markersize=7)
    for row in complete(results):
        if row["kind"] == "fp32" and row.get("test_top1") is not None:
            ax.axhline(row["test_top1"], color=KINDS["fp32"][2], lw=1, ls=(0, (6, 3)))
            ax.annotate(
                f"{row['name']} {row['test_top1']:.1f}",
                (1, row["test_top1"]),
                (-2, 3),
                xycoords=("axes fraction", "data"),
                textcoords="offset points",
                ha="right",
                fontsize=8,
                color=KINDS["fp32"][2],
            )
    _whole_numbers(ax)
    ax.set_xlabel("members")
    ax.set_ylabel("test accuracy, %")
    ax.margins(0.05, 0.1)
    _legend(ax)
    _save(figure, path)


def plot_curves(histories: Histories, path: Path | str) -> None:
    """Training loss and validation accuracy against the epoch, a line a model.

    Members trained on their own ("NAME.0", "NAME.1", ...) are thin lines in NAME's colour.
    """
    figure, (left, right) = _figure(11, 4.6, panels=2)
    groups = list(dict.fromkeys(_group(name) for name in histories))
    for ax, metric, label in (
        (left, "train_loss", "training loss"),
        (right, "val_top1", "validation accuracy, %"),
    ):
        for name, history in histories.items():
            known = [(r["epoch"], r[metric]) for r in history if r.get(metric) is not None]
            if not known:
                continue
            x, y = zip(*known, strict=True)
            style = _line(groups.index(_group(name)))
            if name != _group(name):
                style |= {"lw": 0.8, "alpha": 0.7}
            ax.plot(x, y, label=_group(name), **style, marker="o" if len(known) < 3 else None)
        ax.set_xlabel("epoch")
        ax.set_ylabel(label)
        _whole_numbers(ax)
    lines = {str(line.get_label()): line for ax in (left, right) for line in ax.get_lines()}
    if lines:
        handles = list(lines.values())
        figure.legend(handles, list(lines), loc="outside right upper", frameon=False, fontsize=9)
    _save(figure, path)


def _group(name: str) -> str:
    """The ensemble of a member's history, else the name itself."""
    group, dot, member = name.rpartition(".")
    return group if dot and member.isdecimal() else name


def plot_anytime(curves: Histories, path: Path | str) -> None:
    """Accuracy against the members evaluated (their mean, where images leave early)."""
    figure, (ax,) = _figure()
    for i, (name, points) in enumerate(curves.items()):
        known = sorted((_evaluated(p), p["top1"]) for p in points if p.get("top1") is not None)
        if known:
            x, y = zip(*known, strict=True)
            ax.plot(x, y, label=name, **_line(i), marker="o^sDvP*X"[i % 8], markersize=6)
    _whole_numbers(ax)
    ax.set_xlabel("members evaluated, mean over images")
    ax.set_ylabel("accuracy, %")
    ax.margins(0.05, 0.1)
    _legend(ax)
    _save(figure, path)


def _evaluated(point: Row) -> float:
    mean = point.get("mean_members")
    return float(point["members"] if mean is None else mean)


def _line(i: int) -> dict[str, Any]:
    dash = _DASHES[i // len(_LINES) % len(_DASHES)]
    return {"color": _LINES[i % len(_LINES)], "ls": dash, "lw": 1.6}


def _legend(ax: Axes) -> None:
    if ax.get_legend_handles_labels()[0]:
        ax.legend(frameon=False, fontsize=9, loc="best")


# ---------------------------------------------------------------- files


def write(
    results: Sequence[Row],
    histories: Histories,
    out_dir: Path | str,
    anytime: Histories | None = None,
) -> list[Path]:
    """Writes the tables and plots into out_dir; returns their paths.

    results.json, histories.json, table.md, table.csv, accuracy_bytes.png, accuracy_members.png,
    curves.png, and unless anytime is None also anytime.json and anytime.png.
    """
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    rows = complete(results)
    files = {"results.json": rows, "histories.json": _plain(histories)}
    if anytime is not None:
        files["anytime.json"] = _plain(anytime)
    for name, content in files.items():
        text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
        (out / name).write_text(text + "\n", encoding="utf-8")
    (out / "table.md").write_text(table_markdown(rows), encoding="utf-8")
    table_csv(rows, out / "table.csv")
    plot_accuracy_bytes(rows, out / "accuracy_bytes.png")
    plot_accuracy_members(rows, out / "accuracy_members.png")
    plot_curves(histories, out / "curves.png")
    names = [*files, "table.md", "table.csv", "accuracy_bytes.png", "accuracy_members.png"]
    names.append("curves.png")
    if anytime is not None:
        plot_anytime(anytime, out / "anytime.png")
        names.append("anytime.png")
    return [out / name for name in names]


def page(reports: Path | str, path: Path | str | None = None) -> Path:
    """Writes the page, reports/index.html unless told otherwise, from the files that are there.

    Reads results.json, histories.json, anytime.json and search/front.json ({"budget_bytes",
    "trials": [{configuration..., "val_top1", "file_bytes", "feasible"}]}; a trial with "rival", a
    text, is marked as one). Each may be missing, but not both results.json and search/front.json.
    The page holds its data, styles and scripts; it loads nothing.

    Raises FileNotFoundError if there is neither, ValueError if a file is not what it should be,
    both naming the path.
    """
    reports = Path(reports)
    if not any((reports / name).exists() for name in ("results.json", "search/front.json")):
        raise FileNotFoundError(
            f"expected {reports / 'results.json'}: run the pipeline, or a search, first"
        )

    def read(name: str, kind: type) -> Any:
        file = reports / name
        if not file.exists():
            return None
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{file}: expected JSON, got {error}") from None
        if not isinstance(content, kind):
            raise ValueError(f"{file}: expected a {kind.__name__}, got {type(content).__name__}")
        return content

    results = complete(read("results.json", list) or [])
    data = {
        "results": results,
        "members": members_curves(results),
        "histories": read("histories.json", dict) or {},
        "anytime": read("anytime.json", dict) or {},
        "search": read("search/front.json", dict),
    }
    # "</script>" in a name must not end the script element that holds the data.
    text = json.dumps(_plain(data), ensure_ascii=False, allow_nan=False)
    text = text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    path = Path(path or reports / "index.html")
    path.write_text(template.replace("{{data}}", text), encoding="utf-8")
    return path


def main(argv: list[str] | None = None) -> int:
    """Prints the table of a finished run; --html also writes the page."""
    parser = argparse.ArgumentParser(prog="python -m bnncore.report", description=main.__doc__)
    parser.add_argument("--reports", type=Path, default=Path("reports"), help="its directory")
    parser.add_argument("--html", action="store_true", help="write index.html there")
    args = parser.parse_args(argv)
    try:
        where = page(args.reports) if args.html else None
        results = args.reports / "results.json"
        if results.exists() or not where:  # after a search alone there is the page only
            print_table(json.loads(results.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 1
    if where:
        print(f"\n{where.resolve().as_uri()}")
    return 0
