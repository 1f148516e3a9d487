"""The answer of a search: printed, as CSV, JSON and PNG, and as a preset that the pipeline runs."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from bnncore import params as P
from bnncore.metrics import pareto_front
from bnncore.params import Params
from bnncore.search import rivals
from bnncore.search.journal import writing
from bnncore.search.plot import plot
from bnncore.search.space import Config, Cost, Row, described, preset
from bnncore.search.study import COUNTED, FAILED, REJECTED, STOPPED, TRAINED


@dataclass
class Report:
    """What a search found.

    Attributes:
        params: those of the whole run, by which the answer is to be trained.
        wanted: how many trials the study shall have.
        rows: one dict a configuration, in the order asked.
        rivals: rows with ``rival``, a text.
        smallest: of the space, and what it takes.
        importances: share of the variance in validation accuracy that each parameter explains.
        rejecting_s: CPU seconds to count and reject a configuration, in this run: (mean, most).
        retried: tasks that crashed and were run once more, in this run.
        ended: why the study ended before its number of trials, or None.
    """

    name: str
    params: Params
    wanted: int
    rows: list[Row]
    rivals: list[Row]
    smallest: tuple[Config, Cost]
    importances: dict[str, float]
    rejecting_s: tuple[float, float] | None
    ended: str | None
    retried: int = 0
    seconds: float = 0.0

    @property
    def trained(self) -> list[Row]:
        """Trials that were trained to the end."""
        return [r for r in self.rows if r["outcome"] == TRAINED]

    @property
    def compared(self) -> list[Row]:
        """Everything that was trained and is within the limits, rivals too, the best first."""
        return _ranked(self.trained + [r for r in self.rivals if r.get("feasible")])

    @property
    def winner(self) -> Row | None:
        """The best of everything that was trained: a trial's row or a rival's."""
        return next(iter(self.compared), None)

    @property
    def best(self) -> Row | None:
        """The best configuration of the search."""
        return next(iter(_ranked(self.trained)), None)

    @property
    def front(self) -> list[Row]:
        """What no other beats in both bytes and accuracy, by bytes."""
        rows = self.compared
        return [rows[i] for i in pareto_front([(r["file_bytes"], r["val_top1"]) for r in rows])]

    def preset(self, row: Row) -> Params:
        """What the pipeline runs to train what a row is about."""
        if "rival" in row:
            return rivals.rival_preset(self.params, row["rival"], row)
        return preset(self.params, row)


def _ranked(rows: Sequence[Row]) -> list[Row]:
    """By validation accuracy, then bytes, then validation loss."""

    def key(row: Row) -> tuple[float, ...]:
        return -row["val_top1"], row["file_bytes"], row.get("val_loss", 0.0)

    return sorted(rows, key=key)


def about(row: Row) -> str:
    """A row in words: ``nin 37, one BNN (the rival 'one wider BNN', not a trial)``."""
    if "rival" in row:
        return f"{row['about']} (the rival {row['rival']!r}, not a trial)"
    return f"{described(row)} (trial {row['number']})"


def write(report: Report, out: Path) -> list[Path]:
    """Write what `report` says into `out`; returns the paths.

    front.csv and front.json (every configuration that was asked for, then the rivals), front.png,
    importances.json, and where anything fits best.yaml: ``cp best.yaml params.yaml`` and the
    pipeline trains the best of everything that was trained.

    Raises:
        SearchError: a file cannot be written.
    """
    search, winner = report.params.search, report.winner
    front = [id(row) for row in report.front]
    rows = [{**r, "front": id(r) in front} for r in (*report.rows, *report.rivals)]
    content = {
        "study": report.name,
        "budget_bytes": round(1024 * search.budget_kib) if search.count == "file" else None,
        "budget_kib": search.budget_kib,
        "counted": search.count,
        "objectives": search.objectives,
        "best": report.best["number"] if report.best else None,
        "winner": winner and winner.get("rival", winner.get("number")),
        "importances": report.importances,
        "trials": rows,
    }
    columns = list(dict.fromkeys(key for row in rows for key in row))
    written = [out / n for n in ("front.json", "front.csv", "front.png", "importances.json")]
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        text = json.dumps(content, indent=1, allow_nan=False)
        (out / "front.json").write_text(text + "\n", encoding="utf-8")
        with open(out / "front.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        text = json.dumps(report.importances, indent=1)
        (out / "importances.json").write_text(text + "\n", encoding="utf-8")
        plot(report, out / "front.png")
        best = out / "best.yaml"
        best.unlink(missing_ok=True)
        if winner:
            whole = report.preset(winner)
            text = _comment(report, winner) + yaml.safe_dump(P.plain(whole), sort_keys=False)
            best.write_text(text, encoding="utf-8")
            if P.plain(P.load(best)) != P.plain(whole):
                raise ValueError(f"{best}: expected to read back as written")
            written.append(best)
    return written


def _comment(report: Report, winner: Row) -> str:
    """What best.yaml is; its second line is a preset's description."""
    lines = ["@package _global_", f"{report.name}, {winner['val_top1']:.2f} %: {about(winner)}"]
    if "rival" in winner and report.best:
        lines.append(
            f"The best configuration of the search: {report.best['val_top1']:.2f} %, "
            f"{about(report.best)}"
        )
    if winner.get("rival") == rivals.INT8:
        lines.append("It is the model fp32 of the pipeline; there is no ensemble to train.")
    return "".join(f"# {line}\n" for line in lines)


def show(report: Report, say: Callable[[str], None] = print) -> None:
    """Print the answer."""
    p = report.params.search
    count = {o: sum(r["outcome"] == o for r in report.rows) for o in (*COUNTED, REJECTED)}
    done = sum(count[o] for o in COUNTED)
    say(
        f"\nstudy {report.name}: {done} of {report.wanted} trials "
        f"({count[TRAINED]} trained, {count[STOPPED]} stopped early, {count[FAILED]} "
        f"failed), {count[REJECTED]} rejected untrained; {report.seconds:.0f} s now"
        + (f"; ended because {report.ended}" if report.ended else "")
    )
    if report.rejecting_s:
        mean, most = (1000 * s for s in report.rejecting_s)
        say(f"a rejection took {mean:.1f} ms of CPU time (mean), {most:.0f} ms at most")
    if report.retried:
        say(f"{report.retried} tasks crashed and were run once more")
    unit = "" if p.count == "file" else f" by the count of {p.count}"
    winner = report.winner
    if winner is None:
        smallest, least = report.smallest
        say(
            f"nothing that was trained fits {p.budget_kib:g} KiB{unit} and the other limits; the "
            f"smallest configuration of the space, {described(smallest)}, takes "
            f"{least.counted_kib:.2f} KiB, {least.megaops:.2f} million operations an image and "
            f"{least.activation_kib:.2f} KiB of activations"
        )
        return
    say(f"the best within {p.budget_kib:g} KiB{unit}: {about(winner)}\n  {_figures(winner)}")
    if "rival" in winner and report.best:
        say(
            f"it beat the best configuration of the search: {about(report.best)}\n"
            f"  {_figures(report.best)}"
        )
    say("accuracy that bytes buy:")
    for row in report.front:
        say(_line(row))
    if report.rivals:
        say("rivals of the same bytes:")
    for row in report.rivals:
        say(_line(row) + ("" if row.get("feasible") else "; over another limit"))
    if report.importances:
        say("what accuracy depended on: " + ", ".join(
            f"{name} {share:.0%}" for name, share in report.importances.items()))  # fmt: skip


def _figures(row: dict[str, Any]) -> str:
    return (
        f"validation {row['val_top1']:.2f} %, file {row['file_bytes']:,} bytes (at most "
        f"{row['bound_bytes']:,}), {row['megaops']:.2f} million operations an image, "
        f"{row['activation_kib']:.2f} KiB of activations"
    )


def _line(row: Row) -> str:
    said = f"{row['rival']}: {row['about']}" if "rival" in row else described(row)
    return f"  {row['file_bytes'] / 1024:7.2f} KiB {row['val_top1']:6.2f} %  {said}"
