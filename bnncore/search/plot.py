"""The plot of a search: accuracy against bytes, and what accuracy depended on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bnncore.report import plots
from bnncore.search.space import Row
from bnncore.search.study import REJECTED, STOPPED

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from bnncore.search.answer import Report

_TRAINED, _RIVAL, _OVER = "#009e73", "#d55e00", "#b22222"


def plot(report: Report, path: Path) -> None:
    """Validation accuracy against KiB of the file (log): trials, the front, rivals, the budget; and
    beside it what accuracy depended on.

    Trials far below the others are drawn at the lower edge, rejections as ticks on it.
    """
    from matplotlib.figure import Figure

    search = report.params.search
    figure = Figure(figsize=(9, 5.4), dpi=130, layout="constrained")
    grid = figure.add_gridspec(1, 2, width_ratios=(3.4, 1)) if report.importances else None
    ax = figure.add_subplot(grid[0] if grid else 111)
    ax.grid(True, color="#e4e4e4", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    trained = report.trained
    stopped = [r for r in report.rows if r["outcome"] == STOPPED]
    rejected = [_kib(r) for r in report.rows if r["outcome"] == REJECTED and r["file_bytes"]]
    budget = search.budget_kib if search.count == "file" else None
    front = [(_kib(r), r["val_top1"]) for r in report.front]

    # Few bad trials shall not press all good ones together.
    usual = [r["val_top1"] for r in trained] + [r["stopped_top1"] for r in stopped]
    shown = sorted(usual)[len(usual) // 2 :] + [r["val_top1"] for r in report.rivals]
    low, high = min(shown, default=0.0), max(shown, default=100.0)
    span = max(high - low, 2.0)
    bottom = low - 0.12 * span
    ax.set_ylim(bottom, high + 0.1 * span)
    edge = bottom + 0.035 * span
    below = sum(y < bottom for y in usual)

    def scatter(
        rows: Sequence[Row], key: str, label: str, **style: Any
    ) -> list[tuple[float, float]]:
        points = [(_kib(r), max(r[key], edge) if r[key] < bottom else r[key]) for r in rows]
        if points:
            x, y = zip(*points, strict=True)
            ax.scatter(x, y, s=40, label=label, edgecolors="white", **style)
        return points

    others = scatter(trained, "val_top1", "trained", color=_TRAINED, marker="^", zorder=3)
    others += scatter(stopped, "stopped_top1", "stopped early, at its rung", color="#9a9a9a",
                      marker="v", zorder=2)  # fmt: skip
    named = [(_kib(r), r["val_top1"], f"{r['rival']}, {r['val_top1']:.1f}") for r in report.rivals]
    if report.rivals:
        scatter(report.rivals, "val_top1", "rivals", color=_RIVAL, marker="D", zorder=4)
    if winner := report.winner:
        best = _kib(winner), winner["val_top1"]
        edge_colour = _RIVAL if "rival" in winner else _TRAINED
        ax.scatter(*best, 170, facecolors="none", edgecolors=edge_colour, lw=1.6,
                   label="the best of all")  # fmt: skip
        if "rival" not in winner:
            named.append((*best, f"the best of all, {best[1]:.1f}"))
    # Rejections far over the budget need not be seen.
    near = [x for x in rejected if budget is None or x < 6 * budget]
    sizes = [x for x, *_ in others + named] + near + ([budget] if budget else [])
    left, right = min(sizes, default=1.0), max(sizes, default=10.0)
    right = max(right, 2.2 * budget) if budget else right
    ax.set_xscale("log")
    ax.set_xlim(left / 1.15, 1.15 * right)
    if front:
        steps = [*front, ((budget or 1.15 * right), front[-1][1])]
        ax.step(*zip(*steps, strict=True), where="post", color=_TRAINED, lw=1.2, zorder=1)
    if rejected:
        ax.plot(near, [bottom] * len(near), "|", color=_OVER, ms=14, label="rejected untrained")
    if budget is not None:
        ax.axvspan(budget, 1.15 * right, color=_OVER, alpha=0.08, lw=0)
        ax.axvline(budget, color=_OVER, lw=1, ls="--", label=f"budget, {budget:g} KiB")
    plots.log_ticks(ax, [left / 1.15, 1.15 * right])
    ax.set_xlabel("KiB of the packed file (log scale)")
    ax.set_ylabel("validation accuracy, %")
    said = []
    if not usual:
        said.append("nothing that was asked for fits")
        ax.set_yticks([])
    if budget is None:
        said.append(f"the budget, {search.budget_kib:g} KiB, is by the count of {search.count}, "
                    "not on this axis")  # fmt: skip
    if below:
        said.append(f"{below} at the lower edge are below it, down to {min(usual):.1f} %")
    ax.set_title("; ".join(said), fontsize=8, color="#555555", loc="left")
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    if grid:
        _bars(figure.add_subplot(grid[1]), report.importances)
    plots.labels(figure, ax, named, front, [(x, max(y, edge)) for x, y in others])
    figure.savefig(path, metadata={"Software": None})


def _kib(row: Row) -> float:
    return row["file_bytes"] / 1024


def _bars(ax: Axes, importances: dict[str, float]) -> None:
    names = list(importances)[::-1]
    bars = ax.barh(names, [100 * importances[n] for n in names], color="#0072b2", height=0.6)
    ax.bar_label(bars, fmt="%.0f %%", fontsize=8, padding=2)
    ax.set_title("what accuracy depended on", fontsize=9)
    ax.set_xlim(right=1.25 * max(100 * share for share in importances.values()) or 1)
    ax.spines[["top", "right", "bottom"]].set_visible(False)
    ax.tick_params(left=False, labelsize=8)
    ax.set_xticks([])
