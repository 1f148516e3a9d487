"""The plots of a run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bnncore.metrics import pareto_front
from bnncore.report.table import KINDS, Histories, Row, complete, families

if TYPE_CHECKING:  # importing matplotlib takes a second: where something is drawn
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, told apart by the colour-blind too.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#4d4d4d", "#8c6d1f")
MARKERS = "o^sDvP*X"
_DASHES = ("-", "--", ":", "-.")
# Ticks of a decade, where the axis spans no more than so many times its least.
_STEPS: dict[float, tuple[float, ...]] = {
    8: (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9), 60: (1, 2, 3, 5, 7), 2000: (1, 2, 5), math.inf: (1,),
}  # fmt: skip
# Where a name may stand beside its point: direction, and its own sides there.
_SIDES = (
    (1, 0, "left", "center"), (-1, 0, "right", "center"), (0, 1, "center", "bottom"),
    (0, -1, "center", "top"), (0.75, 0.75, "left", "bottom"), (0.75, -0.75, "left", "top"),
    (-0.75, 0.75, "right", "bottom"), (-0.75, -0.75, "right", "top"),
)  # fmt: skip
_STYLES = {"fp32": ("s", "#d55e00"), "bnn": ("o", "#0072b2"), "ensemble": ("^", "#009e73")}


def canvas(width: float = 8.0, height: float = 5.0, panels: int = 1) -> tuple[Figure, list[Axes]]:
    """An empty figure, with so many panels side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    axes = [figure.add_subplot(1, panels, i + 1) for i in range(panels)]
    for ax in axes:
        ax.grid(True, color="#e4e4e4", linewidth=0.8)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save(figure: Figure, path: Path | str) -> None:
    """Write it as PNG."""
    figure.savefig(path, metadata={"Software": None})  # the same plot, the same bytes


def accuracy_bytes(results: Iterable[Row], path: Path | str) -> None:
    """Test accuracy against KiB of the file (log), every model by name, with the Pareto front."""
    rows = [
        r
        for r in complete(results)
        if (r.get("file_bytes") or 0) > 0 and r.get("test_top1") is not None
    ]
    figure, (ax,) = canvas()
    points = [(r["file_bytes"] / 1024, r["test_top1"], r["name"]) for r in rows]
    front = [points[i][:2] for i in pareto_front([p[:2] for p in points])]
    # The front: the best accuracy that so many bytes buy.
    ax.step(*zip(*front, strict=True) if front else ([], []), where="post", color="#b5b5b5", lw=1.2)
    for kind, (marker, colour) in _STYLES.items():
        mine = [p for p, r in zip(points, rows, strict=True) if r["kind"] == kind]
        if mine:
            x, y, _ = zip(*mine, strict=True)
            ax.scatter(
                x, y, 64, colour, marker=marker, label=KINDS[kind], zorder=3, edgecolors="white"
            )
    ax.set_xscale("log")
    log_ticks(ax, [x for x, *_ in points])
    ax.set_xlabel("KiB of the packed file (log scale)")
    ax.set_ylabel("test accuracy, %")
    ax.margins(0.12, 0.14)
    if points:
        ax.legend(loc="lower right", frameon=False)
    labels(figure, ax, points, front)
    save(figure, path)


def log_ticks(ax: Axes, xs: Sequence[float]) -> None:
    """Plain numbers along a logarithmic axis, as many a decade as have room."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    low, high = (min(xs), max(xs)) if xs else (1.0, 10.0)
    decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    steps = next(steps for most, steps in _STEPS.items() if high / low <= most)
    ax.xaxis.set_major_locator(FixedLocator([m * 10.0**d for d in decades for m in steps]))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))


def whole_numbers(ax: Axes) -> None:
    """Whole numbers only along the x axis, however short it is."""
    from matplotlib.ticker import MaxNLocator

    ax.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))


def labels(
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
    places = [(r * dx, r * dy, h, v) for r in (8, 14, 22, 32, 44) for dx, dy, h, v in _SIDES]
    style: dict[str, Any] = {"textcoords": "offset points", "fontsize": 8, "color": "#333333"}
    for x, y, name in sorted(points, key=lambda p: -p[1]):
        note = ax.annotate(plain_label(name), (x, y), (8, 0), **style)
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


def accuracy_members(results: Sequence[Row], path: Path | str) -> None:
    """Test accuracy against the number of members, a line a family, FP32 as a level."""
    figure, (ax,) = canvas()
    for i, (name, rows) in enumerate(families(results).items()):
        known = [(r["members"], r["test_top1"]) for r in rows if r.get("test_top1") is not None]
        if known:
            x, y = zip(*known, strict=True)
            ax.plot(x, y, label=plain_label(name), **_line(i), marker=_marker(i), markersize=7)
    for row in complete(results):
        if row["kind"] == "fp32" and row.get("test_top1") is not None:
            label = plain_label(f"{row['name']}, {row['test_top1']:.1f}")
            dashes, color = (0, (6, 3)), _STYLES["fp32"][1]
            ax.axhline(row["test_top1"], lw=1, label=label, color=color, ls=dashes)
    whole_numbers(ax)
    ax.set_xlabel("members")
    ax.set_ylabel("test accuracy, %")
    ax.margins(0.05, 0.1)
    _legend(ax)
    save(figure, path)


def curves(histories: Histories, path: Path | str) -> None:
    """Training loss and validation accuracy against the epoch, a line a model.

    Members trained on their own ("NAME.0", "NAME.1", ...) are thin lines in NAME's colour.
    """
    figure, (left, right) = canvas(11, 4.6, panels=2)
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
            style = {**_line(groups.index(_group(name))), "marker": "o" if len(x) < 3 else None}
            if name != _group(name):
                style |= {"lw": 0.8, "alpha": 0.7}
            ax.plot(x, y, label=plain_label(_group(name)), **style)
        ax.set_xlabel("epoch")
        ax.set_ylabel(label)
        whole_numbers(ax)
    lines = {str(line.get_label()): line for ax in (left, right) for line in ax.get_lines()}
    if lines:
        handles = list(lines.values())
        figure.legend(handles, list(lines), loc="outside right upper", frameon=False, fontsize=9)
    save(figure, path)


def _group(name: str) -> str:
    """The ensemble of a member's history, else the name itself."""
    group, dot, member = name.rpartition(".")
    return group if dot and member.isdecimal() else name


def anytime(curves: Histories, path: Path | str) -> None:
    """Accuracy against the members evaluated (their mean, where images leave early)."""
    figure, (ax,) = canvas()
    for i, (name, points) in enumerate(curves.items()):
        known = sorted((_evaluated(p), p["top1"]) for p in points if p.get("top1") is not None)
        if known:
            x, y = zip(*known, strict=True)
            ax.plot(x, y, label=plain_label(name), **_line(i), marker=_marker(i), markersize=6)
    whole_numbers(ax)
    ax.set_xlabel("members evaluated, mean over images")
    ax.set_ylabel("accuracy, %")
    ax.margins(0.05, 0.1)
    _legend(ax)
    save(figure, path)


def _evaluated(point: Row) -> float:
    mean = point.get("mean_members")
    return float(point["members"] if mean is None else mean)


def _line(i: int) -> dict[str, Any]:
    dash = _DASHES[i // len(COLOURS) % len(_DASHES)]
    return {"color": COLOURS[i % len(COLOURS)], "ls": dash, "lw": 1.6}


def _marker(i: int) -> str:
    return MARKERS[i % len(MARKERS)]


def plain_label(name: str) -> str:
    """`name` without what matplotlib would read into it: formulas, and lines to leave out."""
    return (" " if name.startswith("_") else "") + name.replace("$", r"\$")


def _legend(ax: Axes) -> None:
    if ax.get_legend_handles_labels()[0]:
        ax.legend(frameon=False, fontsize=9, loc="best")
