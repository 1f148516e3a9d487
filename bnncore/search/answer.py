"""The answer of a search: printed, as CSV, JSON and PNG, and as a preset that the pipeline runs."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from bnncore import params as P
from bnncore.params import Params, SearchParams
from bnncore.report import plots
from bnncore.search import study as S
from bnncore.search.space import described, preset

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = dict[str, Any]


def pareto(rows: Sequence[Row]) -> list[Row]:
    """The rows that no other beats in both ``file_bytes`` and ``val_top1``, by bytes."""
    found: list[Row] = []
    for row in sorted(rows, key=lambda r: (r["file_bytes"], -r["val_top1"])):
        if not found or row["val_top1"] > found[-1]["val_top1"]:
            found.append(row)
    return found


def write(report: S.Report, search: S.Search, out: Path) -> list[Path]:
    """Write what `report` says into `out`; returns the paths.

    front.csv and front.json (every configuration that was asked for, then the rivals), front.png,
    importances.json, and where anything fits best.yaml: ``cp best.yaml params.yaml`` and the
    pipeline trains it.
    """
    out.mkdir(parents=True, exist_ok=True)
    trained = [r for r in report.rows if r["outcome"] == S.TRAINED]
    numbers = {r["number"] for r in pareto(trained)}
    rows = [{**r, "front": r["number"] in numbers} for r in report.rows]
    rows += [{**r, "feasible": True} for r in report.rivals]
    budget = search.search.budget_kib if search.search.count == "file" else None
    content = {
        "study": report.name,
        "budget_bytes": None if budget is None else round(1024 * budget),
        "budget_kib": search.search.budget_kib,
        "counted": search.search.count,
        "objectives": search.search.objectives,
        "best": report.best["number"] if report.best else None,
        "importances": report.importances,
        "trials": rows,
    }
    text = json.dumps(content, indent=1, allow_nan=False)
    (out / "front.json").write_text(text + "\n", encoding="utf-8")
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with open(out / "front.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    text = json.dumps(report.importances, indent=1)
    (out / "importances.json").write_text(text + "\n", encoding="utf-8")
    plot(report, search.search, out / "front.png")
    written = [out / n for n in ("front.json", "front.csv", "front.png", "importances.json")]
    best = out / "best.yaml"
    best.unlink(missing_ok=True)
    if report.best:
        config = search.config(report.best)
        whole = preset(search.full, config)
        head = (
            "# @package _global_\n"
            f"# {report.name}, trial {report.best['number']}: {described(config)}\n"
        )
        best.write_text(head + yaml.safe_dump(P.plain(whole), sort_keys=False), encoding="utf-8")
        _check(best, whole)
        written.append(best)
    return written


def _check(path: Path, meant: Params) -> None:
    if P.plain(P.load(path)) != P.plain(meant):
        raise ValueError(f"{path}: expected to read back as written")


def show(report: S.Report, search: S.Search, say: Callable[[str], None] = print) -> None:
    """Print the answer."""
    p = search.search
    count = {o: sum(r["outcome"] == o for r in report.rows) for o in (*S.COUNTED, S.REJECTED)}
    done = sum(count[o] for o in S.COUNTED)
    say(
        f"\nstudy {report.name}: {done} of {search.wanted} trials "
        f"({count[S.TRAINED]} trained, {count[S.STOPPED]} stopped early, {count[S.FAILED]} "
        f"failed), {count[S.REJECTED]} rejected untrained; {report.seconds:.0f} s now"
        + (f"; ended because {report.ended}" if report.ended else "")
    )
    if report.rejecting_s:
        mean, most = (1000 * s for s in report.rejecting_s)
        say(f"a rejection took {mean:.1f} ms of CPU time (mean), {most:.0f} ms at most")
    if report.retried:
        say(f"{report.retried} tasks crashed and were run once more")
    unit = "" if p.count == "file" else f" by the count of {p.count}"
    if report.best is None:
        least = search.space.least
        say(
            f"nothing that was trained fits {p.budget_kib:g} KiB{unit} and the other limits; the "
            f"smallest configuration of the space, {described(search.space.smallest)}, takes "
            f"{least.counted_kib:.2f} KiB, {least.megaops:.2f} million operations an image and "
            f"{least.activation_kib:.2f} KiB of activations"
        )
        return
    best = report.best
    say(
        f"the best within {p.budget_kib:g} KiB{unit}: {described(search.config(best))} (trial "
        f"{best['number']})\n"
        f"  validation {best['val_top1']:.2f} %, file {best['file_bytes']:,} bytes (at most "
        f"{best['bound_bytes']:,}), {best['megaops']:.2f} million operations an image, "
        f"{best['activation_kib']:.2f} KiB of activations"
    )
    trained = [r for r in report.rows if r["outcome"] == S.TRAINED]
    say("accuracy that bytes buy:")
    for row in pareto(trained):
        say(
            f"  {row['file_bytes'] / 1024:7.2f} KiB {row['val_top1']:6.2f} %  "
            f"{described(search.config(row))}"
        )
    if report.rivals:
        say("rivals within the same budget:")
    for row in report.rivals:
        say(
            f"  {row['file_bytes'] / 1024:7.2f} KiB {row['val_top1']:6.2f} %  {row['rival']}: "
            f"{row['about']}"
        )
    if report.importances:
        say("what accuracy depended on: " + ", ".join(
            f"{name} {share:.0%}" for name, share in report.importances.items()))  # fmt: skip


# -- plot --------------------------------------------------------------------------------------

_TRAINED, _RIVAL, _OVER = "#009e73", "#d55e00", "#b22222"


def plot(report: S.Report, search: SearchParams, path: Path) -> None:
    """Validation accuracy against KiB of the file (log): trials, the front, rivals, the budget; and
    beside it what accuracy depended on.

    Trials far below the others are drawn at the lower edge, rejections as ticks on it.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.4), dpi=130, layout="constrained")
    grid = figure.add_gridspec(1, 2, width_ratios=(3.4, 1)) if report.importances else None
    ax = figure.add_subplot(grid[0] if grid else 111)
    ax.grid(True, color="#e4e4e4", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    trained = [r for r in report.rows if r["outcome"] == S.TRAINED]
    stopped = [r for r in report.rows if r["outcome"] == S.STOPPED]
    rows = [r for r in report.rows if r["outcome"] == S.REJECTED and r["file_bytes"]]
    rejected = [_kib(r) for r in rows]
    budget = search.budget_kib if search.count == "file" else None
    front = [(_kib(r), r["val_top1"]) for r in pareto(trained)]

    # Few bad trials shall not press all good ones together.
    usual = [r["val_top1"] for r in trained] + [r["stopped_top1"] for r in stopped]
    shown = sorted(usual)[len(usual) // 2 :] + [r["val_top1"] for r in report.rivals]
    low, high = min(shown, default=0.0), max(shown, default=100.0)
    span = max(high - low, 2.0)
    bottom = low - 0.12 * span
    ax.set_ylim(bottom, high + 0.1 * span)
    edge = bottom + 0.035 * span
    below = sum(y < bottom for y in usual)

    def scatter(rows: Sequence[Row], key: str, label: str, **style: Any) -> list:
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
    if report.best:
        best = _kib(report.best), report.best["val_top1"]
        ax.scatter(*best, 170, facecolors="none", edgecolors=_TRAINED, lw=1.6, label="the answer")
        named.append((*best, f"the answer, {best[1]:.1f}"))
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
