"""The answer of a search: printed, as CSV, JSON and PNG, and as a preset that the pipeline runs."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

from bnncore import metrics
from bnncore import params as P
from bnncore.params import Params
from bnncore.search.journal import writing
from bnncore.search.plot import plot
from bnncore.search.space import FP32, Config, Cost, Row, described, preset
from bnncore.search.study import COUNTED, FAILED, REJECTED, STOPPED, TRAINED


@dataclass
class Report:
    """What a search found.

    Attributes:
        params: those of the whole run, by which the answer is to be trained.
        wanted: how many trials the study shall have.
        rows: one dict a configuration, in the order asked.
        rivals: rows with ``rival``, a text; where a trial was one, the trial's, with its number.
        images: of the validation part.
        right: of a row, which images cross-validation got right; None where that is not known.
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
    images: int
    right: Callable[[Row], np.ndarray | None]
    retried: int = 0
    seconds: float = 0.0

    @property
    def trained(self) -> list[Row]:
        """Trials that were trained to the end."""
        return [r for r in self.rows if r["outcome"] == TRAINED]

    @property
    def validated(self) -> list[Row]:
        """Everything that was trained, by validation accuracy, then bytes, then validation loss."""
        return _ranked(self.trained + [r for r in self.rivals if "number" not in r])

    @property
    def finalists(self) -> list[Row]:
        """What the validation part cannot tell from its best: within the best's 95 % interval, and
        no more than ``search.finalists``. Empty where that is one alone.
        """
        rows = self.validated[: self.params.search.finalists]
        low = 100 * metrics.wilson(rows[0]["val_top1"] / 100, self.images)[0] if rows else 0.0
        near = [row for row in rows if row["val_top1"] >= low]
        return near if len(near) > 1 else []

    @property
    def told_apart(self) -> list[tuple[Row, np.ndarray]]:
        """Finalists with what cross-validation got right, the most accurate first; none before all
        of them have all folds, as one that was not compared cannot lose.
        """
        finalists = self.finalists
        told = [(r, right) for r in finalists if (right := self.right(r)) is not None]
        told.sort(key=lambda one: (-one[1].mean(), one[0]["file_bytes"]))
        return told if len(told) == len(finalists) else []

    @property
    def compared(self) -> list[Row]:
        """Everything that was trained, the best first.

        Of finalists that is the smallest file that cross-validation finds within one standard error
        of the most accurate one (Breiman et al. 1984, section 3.4.3), errors taken in pairs.
        """
        told = self.told_apart
        first: list[Row] = []
        if told:
            near = [r for r, right in told if _difference(told[0][1], right)[0]
                    <= _difference(told[0][1], right)[1]]  # fmt: skip
            first = [min(near, key=lambda row: row["file_bytes"])]
        rows = [*first, *(row for row, _ in told), *self.validated]
        return list({id(row): row for row in rows}.values())

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
        return [
            rows[i] for i in metrics.pareto_front([(r["file_bytes"], r["val_top1"]) for r in rows])
        ]

    def preset(self, row: Row) -> Params:
        """What the pipeline runs to train what a row is about, packed as it was."""
        return preset(self.params, row)


def _difference(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """By how much `a` is more often right than `b`, of the same images, and the standard error."""
    difference = a.astype(int) - b
    return float(difference.mean()), float(difference.std() / math.sqrt(len(difference)))


def _ranked(rows: Sequence[Row]) -> list[Row]:
    def key(row: Row) -> tuple[float, ...]:
        return -row["val_top1"], row["file_bytes"], row.get("val_loss", 0.0)

    return sorted(rows, key=key)


def about(row: Row) -> str:
    """A row in words: ``nin 37, one BNN, start bnn (the rival 'one wider BNN', not a trial)``."""
    trial = "number" in row
    which = f"trial {row['number']}" if trial else f"the rival {row['rival']!r}, not a trial"
    return f"{described(row)} ({which})"


# What ``pipeline.search --finish`` writes beside them, of the answer trained in full.
FINISHED = ("best.bnn", "finished.json")


def write(report: Report, out: Path) -> list[Path]:
    """Write what `report` says into `out`; returns the paths.

    front.csv and front.json (every configuration that was asked for, then the rivals), front.png,
    importances.json, and where anything fits best.yaml: ``cp best.yaml params.yaml`` and the
    pipeline trains the best of everything that was trained. Files of `FINISHED` that are of another
    answer are removed.

    Raises:
        SearchError: a file cannot be written.
    """
    search, winner = report.params.search, report.winner
    front = [id(row) for row in report.front]
    folds = {id(row): 100 * float(right.mean()) for row, right in report.told_apart}
    rows = [
        {**r, "about": described(r), "front": id(r) in front, "fold_top1": folds.get(id(r))}
        for r in (*report.rows, *(r for r in report.rivals if "number" not in r))
    ]
    content = {
        "study": report.name,
        "data": P.plain(report.params.data),
        "budget_bytes": round(1024 * search.budget_kib) if search.count == "file" else None,
        "budget_kib": search.budget_kib,
        "counted": search.count,
        "objectives": search.objectives,
        "best": report.best["number"] if report.best else None,
        "winner": winner and winner.get("number", winner.get("rival")),
        "rivals": {r["rival"]: r.get("number") for r in report.rivals},
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
        before = best.read_text(encoding="utf-8") if best.exists() else ""
        best.unlink(missing_ok=True)
        text = ""
        if winner:
            whole = report.preset(winner)
            text = _comment(report, winner) + yaml.safe_dump(P.plain(whole), sort_keys=False)
        if text != before:
            for name in FINISHED:  # of another answer
                (out / name).unlink(missing_ok=True)
        if winner:
            best.write_text(text, encoding="utf-8")
            if P.plain(P.load(best)) != P.plain(whole):
                raise ValueError(f"{best}: expected to read back as written")
            written.append(best)
    return written


def _comment(report: Report, winner: Row) -> str:
    """What best.yaml is; its second line is a preset's description."""
    lines = ["@package _global_", f"{report.name}, {winner['val_top1']:.2f} %: {about(winner)}"]
    if "number" not in winner and report.best:
        lines.append(
            f"The best configuration of the search: {report.best['val_top1']:.2f} %, "
            f"{about(report.best)}"
        )
    if winner["scheme"] == FP32:
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
    said = f"the best within {p.budget_kib:g} KiB{unit}: {about(winner)}"
    say(f"{said}\n  {_figures(winner, report.images)}")
    if "number" not in winner and report.best:
        say(
            f"it beat the best configuration of the search: {about(report.best)}\n"
            f"  {_figures(report.best, report.images)}"
        )
    if told := report.told_apart:
        right = {id(row): right for row, right in told}
        best = right[id(winner)]
        low, high = (100 * end for end in metrics.wilson(float(best.mean()), len(best)))
        say(
            f"told apart by cross-validation, on {len(best):,} images; the smallest within a "
            f"standard error of the most accurate: {100 * best.mean():.2f} % ({low:.2f} to "
            f"{high:.2f})"
        )
        for row, other in told:
            mean, error = (100 * figure for figure in _difference(other, best))
            than = "the best" if row is winner else f"{mean:+.2f} ± {1.96 * error:.2f} points"
            say(f"  {row['file_bytes'] / 1024:7.2f} KiB {100 * other.mean():6.2f} %  {than}: "
                f"{described(row)}")  # fmt: skip
    elif finalists := report.finalists:
        whole = sum(report.right(row) is not None for row in finalists)
        say(
            f"not told apart from what the validation part puts near it: {whole} of "
            f"{len(finalists)} finalists have all folds of cross-validation"
        )
    say("accuracy that bytes buy:")
    for row in report.front:
        say(_line(row))
    if report.rivals:
        say("rivals of the same bytes:")
    for row in report.rivals:
        say(_line(row))
    if report.importances:
        say("what accuracy depended on: " + ", ".join(
            f"{name} {share:.0%}" for name, share in report.importances.items()))  # fmt: skip


def _figures(row: Row, images: int) -> str:
    low, high = (100 * end for end in metrics.wilson(row["val_top1"] / 100, images))
    return (
        f"validation {row['val_top1']:.2f} % ({low:.2f} to {high:.2f}), file "
        f"{row['file_bytes']:,} bytes (at most {row['bound_bytes']:,}), {row['megaops']:.2f} "
        f"million operations an image, {row['activation_kib']:.2f} KiB of activations"
    )


def _line(row: Row) -> str:
    said = f"{row['rival']}: {described(row)}" if "rival" in row else described(row)
    said += f", trial {row['number']}" if "rival" in row and "number" in row else ""
    return f"  {row['file_bytes'] / 1024:7.2f} KiB {row['val_top1']:6.2f} %  {said}"
