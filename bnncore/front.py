"""The answer of a search: printed, as CSV, JSON and PNG, and as a preset that the pipeline runs."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from bnncore import params as P
from bnncore import search as S
from bnncore.params import Params
from bnncore.space import described, preset

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
    plot(report, budget, out / "front.png")
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
        f"\nstudy {report.name}: {done} of {p.trials} trials "
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

_RIVALS = {"marker": "D", "color": "#d55e00", "zorder": 4}


def plot(report: S.Report, budget_kib: float | None, path: Path) -> None:
    """Validation accuracy against KiB of the file (log): trials, the front, rivals, the budget."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=130, layout="constrained")
    ax = figure.add_subplot()
    ax.grid(True, color="#e4e4e4", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    trained = [r for r in report.rows if r["outcome"] == S.TRAINED]
    _scatter(ax, trained, "val_top1", label="trained", color="#009e73", marker="^", zorder=3)
    stopped = [r for r in report.rows if r["outcome"] == S.STOPPED]
    _scatter(ax, stopped, "stopped_top1", label="stopped early, at its rung", color="#9a9a9a",
             marker="v", zorder=2)  # fmt: skip
    front = [(r["file_bytes"] / 1024, r["val_top1"]) for r in pareto(trained)]
    if front:
        ax.step(*zip(*front, strict=True), where="post", color="#009e73", lw=1.2)
    _scatter(ax, report.rivals, "val_top1", label="rivals", **_RIVALS)
    for k, row in enumerate(sorted(report.rivals, key=lambda r: r["val_top1"])):
        at = (row["file_bytes"] / 1024, row["val_top1"])
        style: dict[str, Any] = {
            "textcoords": "offset points",
            "ha": "right",
            "fontsize": 8,
            "color": "#7a3600",
        }
        ax.annotate(row["rival"], at, (-8, -3 + 4 * (k % 2)), **style)
    rows = [r for r in report.rows if r["outcome"] == S.REJECTED and r["file_bytes"]]
    rejected = [r["file_bytes"] / 1024 for r in rows]
    sizes = [x for x, _ in front] + [r["file_bytes"] / 1024 for r in report.rivals]
    if rejected:
        low = ax.get_ylim()[0]
        ax.plot(rejected, [low] * len(rejected), "|", color="#b22222", ms=9, clip_on=False,
                label="rejected untrained")  # fmt: skip
        ax.set_ylim(bottom=low)
    ax.set_xscale("log")
    # Rejections far over the budget need not be seen.
    near = [x for x in rejected if budget_kib is None or x < 8 * budget_kib]
    right = max([*sizes, *near, 1.6 * (budget_kib or 0.625)])
    ax.set_xlim(right=1.1 * right)
    if budget_kib is not None:
        ax.axvspan(budget_kib, 1.1 * right, color="#b22222", alpha=0.08, lw=0)
        ax.axvline(budget_kib, color="#b22222", lw=1, ls="--", label=f"budget, {budget_kib:g} KiB")
    ax.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    ax.set_xlabel("KiB of the packed file (log scale)")
    ax.set_ylabel("validation accuracy, %")
    ax.legend(frameon=False, fontsize=8, loc="lower left")
    figure.savefig(path, metadata={"Software": None})


def _scatter(ax: Axes, rows: Sequence[Row], key: str, **style: Any) -> None:
    if rows:
        x = [r["file_bytes"] / 1024 for r in rows]
        ax.scatter(x, [r[key] for r in rows], 36, edgecolors="white", **style)
