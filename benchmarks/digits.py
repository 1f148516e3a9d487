"""The papers' story on digits, over seeds on which nothing was chosen.

    python benchmarks/digits.py [--seeds 101 102 ...] [--json benchmarks/digits.json]

For each seed (of the split and of all training) it trains what params.yaml names, and single BNNs
made wider until their packed file is as large as that of the largest ensemble of each kind. All
accuracies are of the packed files on the test part. Seeds that the JSON file holds already are not
trained again, so it can be stopped and started. The table and the plot stand beside the JSON;
`--table` trains nothing and writes them from it.
"""

from __future__ import annotations

import statistics
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import seeds
from bnncore import data, metrics
from bnncore.lowering import blueprint, packing
from bnncore.packed import execute, packfile
from bnncore.params import EnsembleParams, PackParams, Params
from bnncore.training import loop, plans, schemes
from bnncore.training.ensembled import Ensembled

RIVALS = ("tentaclenet", "fusion")  # kinds whose largest ensemble a wider BNN is set against


SMALL = PackParams(affine="float16", weights="int8")  # by which a width is found


def packed_top1(
    p: Params, images: data.Dataset, name: str, trained: Ensembled, section: EnsembleParams | None
) -> tuple[float, int]:
    """(test top-1 in percent, bytes) of the packed file, packed as the parameters say."""
    program = packing.packed(trained, p, images, name, section).program
    predicted = execute.Model(program).predict(images.test.images)
    return 100 * metrics.accuracy(predicted, images.test.labels), len(packfile.encode(program))


def wider(p: Params, images: data.Dataset, size: int) -> Params:
    """The widest single BNN whose file is at most `size` bytes."""
    width = p.model.width or 1
    while True:
        next_one = replace(p, model=replace(p.model, width=width + 1))
        spec = plans.single_spec(next_one, images.image, len(images.classes), binary=True)
        if blueprint.file_bound(spec, SMALL) > size:
            return replace(p, model=replace(p.model, width=width))
        width += 1


def one_seed(p: Params, seed: int) -> list[dict]:
    images = data.load(p.data, seeds.ROOT)
    rows: list[dict] = []

    def many(jobs):
        return loop.train_many(jobs, images)

    def add(
        p: Params, name: str, kind: str, trained: Ensembled, section: EnsembleParams | None = None
    ) -> int:
        model = section.name if section else "fp32" if kind == "fp32" else "bnn"
        top1, size = packed_top1(p, images, model, trained, section)
        members = section.members if section else 1
        rows.append({"seed": seed, "name": name, "kind": kind, "members": members,
                     "test_top1": top1, "file_bytes": size})  # fmt: skip
        print(f"seed {seed} {name:>24}: {top1:6.2f} %  {size:8,} bytes", flush=True)
        return size

    def single(p: Params, prefix: str = "") -> tuple[dict, dict]:
        states = []
        for name, kind in (("fp32", "fp32"), ("bnn", "bnn")):
            job = plans.first_job(p, images, states[0] if states else None)
            (done,) = many([job])
            states.append(done.state)
            if not prefix or kind == "bnn":
                label = f"{prefix}{name}"
                trained = Ensembled(job.spec, done.state, {})
                add(p, label, "wide" if prefix else kind, trained)
        return states[0], states[1]

    fp32, bnn = single(p)
    largest: dict[str, int] = {}
    for ensemble in p.ensembles.train:
        made = schemes.train(plans.plan(p, ensemble, images, fp32, bnn), many)
        size = add(p, ensemble.name, ensemble.scheme, made, ensemble)
        largest[ensemble.scheme] = max(size, largest.get(ensemble.scheme, 0))
    for kind in RIVALS:
        if kind in largest:
            wide = wider(p, images, largest[kind])
            single(wide, f"width {wide.model.width} as {kind}: ")
    return rows


def summary(rows: list[dict]) -> list[dict]:
    """Mean, spread and bytes of each model over the seeds, in the order trained."""
    names = list(dict.fromkeys(r["name"] for r in rows))
    table = []
    for name in names:
        mine = [r for r in rows if r["name"] == name]
        top1 = [r["test_top1"] for r in mine]
        table.append({
            "name": name, "kind": mine[0]["kind"], "members": mine[0]["members"],
            "seeds": len(mine), "mean": statistics.mean(top1),
            "sd": statistics.stdev(top1) if len(top1) > 1 else 0.0,
            "min": min(top1), "max": max(top1),
            "bytes": round(statistics.mean(r["file_bytes"] for r in mine)),
        })  # fmt: skip
    return table


def markdown(table: list[dict]) -> str:
    head = (
        "model",
        "members",
        "test accuracy, % (mean ± sd)",
        "lowest to highest",
        "bytes",
        "seeds",
    )
    lines = [
        "Epochs are not equal: fusion and voting start from the trained BNN and have an ensemble's "
        "epochs on top, which wider BNNs have not; TentacleNets, from Hadamard filters, have these "
        "alone.", "",
        f"| {' | '.join(head)} |", "|" + " --- |" * len(head),
    ]  # fmt: skip
    for r in table:
        lines.append(
            f"| {r['name']} | {r['members']} | {r['mean']:.1f} ± {r['sd']:.1f} | "
            f"{r['min']:.1f} to {r['max']:.1f} | {r['bytes']:,} | {r['seeds']} |"
        )
    return "\n".join(lines) + "\n"


def plot(table: list[dict], path: Path) -> None:
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    ax = figure.subplots()
    marks = {"fp32": "s", "bnn": "o", "wide": "D", "tentaclenet": "^", "fusion": "v", "voting": "P"}
    for kind, mark in marks.items():
        mine = [r for r in table if r["kind"] == kind]
        if mine:
            ax.errorbar([r["bytes"] / 1024 for r in mine], [r["mean"] for r in mine],
                        [r["sd"] for r in mine], fmt=mark, capsize=3, label=kind)  # fmt: skip
    ax.set(
        xscale="log", xlabel="packed file, KiB", ylabel="test accuracy, % (mean ± sd over seeds)"
    )
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 4, 6, 8)))
    ax.xaxis.set_major_formatter("{x:g}")
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.grid(alpha=0.3)
    ax.legend(title="model")
    figure.savefig(path)


if __name__ == "__main__":
    seeds.main(__file__, __doc__.splitlines()[0], one_seed, summary, markdown, plot)
