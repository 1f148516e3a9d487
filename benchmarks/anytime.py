"""What a prefix of an ensemble is worth, and what making every prefix good costs at m = M.

    python benchmarks/anytime.py [--seeds 101 102 ...] [--json benchmarks/anytime.json]

Power changes at run time, so one file has to serve with any number of members m. For each seed (of
the split and of all training) this trains the ensembles named in params.yaml that have more than
one member, each joint one twice: on the loss of all M members, and on the mean loss over its
prefixes 1..M (``recipe: {prefixes: true}``). Accuracies are of packed files on the test part.
Early exit: an image stops when the margin of the averaged scores passes a threshold, chosen on the
validation part so that it loses at most 0.2 points there.

Seeds that the JSON file holds already are not trained again. Table and plot stand beside it;
`--table` trains nothing and writes them from it. The committed file is of earlier parameters, as it
says; a run by today's needs another, `--json`.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import seeds
from bnncore import data
from bnncore.lowering import lower
from bnncore.packed import execute, exits
from bnncore.params import EnsembleParams, Params
from bnncore.training import loop, plans, schemes

JOINT = ("tentaclenet", "fusion")
LOSS = 0.002  # of the validation images, that early exit may lose


def wanted(p: Params) -> Iterator[tuple[EnsembleParams, bool]]:
    """(ensemble, whether it is trained on its prefixes)."""
    for ensemble in p.ensembles.train:
        if ensemble.members > 1:
            yield ensemble, False
            if ensemble.scheme in JOINT:
                recipe = {**ensemble.recipe, "prefixes": True}
                yield replace(ensemble, recipe=recipe), True


def one_seed(p: Params, seed: int) -> list[dict[str, Any]]:
    images = data.load(p.data, seeds.ROOT)
    bases = seeds.base(p, images)
    rows = []
    for ensemble, prefixes in wanted(p):
        plan = plans.plan(p, ensemble, images, *bases)
        made = schemes.train(plan, partial(loop.train_many, data=images))
        program = lower.lower(made.ensemble(), images.mean, images.std, images.classes)
        model = execute.Model(program)
        threshold = exits.choose_threshold(model, images.val.images, images.val.labels, LOSS)
        test = images.test.images, images.test.labels
        outputs = model.outputs(images.test.images)
        (early,) = exits.exit_curve(model, *test, [threshold], outputs)
        curve = exits.curve(model, *test, outputs)
        rows.append({"seed": seed, "name": ensemble.name, "scheme": ensemble.scheme,
                     "prefixes": prefixes, "curve": curve, "early": early})  # fmt: skip
        shown = " ".join(f"{100 * r['accuracy']:.1f}" for r in curve)
        kind = "prefixes" if prefixes else "all members"
        print(f"seed {seed} {ensemble.name:>16}, loss over {kind:>11}: {shown} %", flush=True)
    return rows


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and spread over the seeds of each ensemble and loss, in the order trained."""
    table = []
    for name, prefixes in dict.fromkeys((r["name"], r["prefixes"]) for r in rows):
        mine = [r for r in rows if (r["name"], r["prefixes"]) == (name, prefixes)]
        by_members = list(
            zip(*([100 * c["accuracy"] for c in r["curve"]] for r in mine), strict=True)
        )
        table.append({
            "name": name, "prefixes": prefixes, "seeds": len(mine),
            "mean": [statistics.mean(top1) for top1 in by_members],
            "sd": [statistics.stdev(top1) if len(top1) > 1 else 0.0 for top1 in by_members],
            "cost": [c["binary_macs"] / mine[0]["curve"][0]["binary_macs"]
                     for c in mine[0]["curve"]],
            "early_top1": statistics.mean(100 * r["early"]["accuracy"] for r in mine),
            "early_members": statistics.mean(r["early"]["mean_members"] for r in mine),
        })  # fmt: skip
    return table


def markdown(table: list[dict[str, Any]]) -> str:
    longest = max(len(r["mean"]) for r in table)
    head = ["ensemble", "loss over", *(f"m = {m + 1}" for m in range(longest)),
            "early exit", "its mean members", "seeds"]  # fmt: skip
    lines = ["Test accuracy in % (mean ± sd over the seeds) with the first m members.", ""]
    lines += [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    for r in table:
        cells = [f"{mean:.1f} ± {sd:.1f}" for mean, sd in zip(r["mean"], r["sd"], strict=True)]
        cells += [""] * (longest - len(cells))
        lines.append(
            f"| {r['name']} | {'prefixes' if r['prefixes'] else 'all members'} | "
            f"{' | '.join(cells)} | {r['early_top1']:.1f} | {r['early_members']:.2f} | "
            f"{r['seeds']} |"
        )
    return "\n".join(lines) + "\n"


def plot(table: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    ax = figure.subplots()
    colours: dict[str, str] = {}
    for r in table:
        colour = colours.setdefault(r["name"], f"C{len(colours)}")
        style = "-o" if r["prefixes"] else "--x"
        label = f"{r['name']}, loss over {'prefixes' if r['prefixes'] else 'all members'}"
        ax.plot(range(1, len(r["mean"]) + 1), r["mean"], style, color=colour, label=label)
        ax.plot(r["early_members"], r["early_top1"], "*", color=colour, markersize=12,
                markerfacecolor=colour if r["prefixes"] else "none")  # fmt: skip
    ax.plot([], [], "k*", markersize=12, label="early exit, at its mean members")
    ax.set(xlabel="members used", ylabel="test accuracy, % (mean over seeds)")
    ax.set_xticks(range(1, 1 + max(len(r["mean"]) for r in table)))
    ax.grid(alpha=0.3)
    ax.legend(fontsize="small")
    figure.savefig(path)


if __name__ == "__main__":
    seeds.main(__file__, __doc__.splitlines()[0], one_seed, summary, markdown, plot)
