"""What the search is worth on digits: against its rivals, and against the default ensembles.

    python benchmarks/search.py [--budgets 24 8] [--trials 40] [--seeds 0 1 2] [--splits 10]
    python benchmarks/search.py --only counting workers

Four parts, each of pieces that are written to the JSON file as soon as they are done; what is there
is not done again, so it can be stopped and started at any time.

* ``counting``: what it takes to open a study, and to say of 200 random choices how wide they may be
  and what they take, in CPU time of the thread, those seen for the first time included.
* ``studies``: for each budget and seed one study, as the parameters say.
* ``retrain``: the best of a study, its rivals, and all ensembles of params.yaml that fit the
  budget, trained in full on splits that no study has seen, one seed for the split and all
  training; test accuracy of the packed file. The images are the studies', split anew: most that are
  tested on were in their training or validation part. Splits are dealt out to the studies of a
  budget: the first of them to the first seed's, the next to the second's.
* ``workers``: one study of 20 configurations with one Ray worker and with two. Nothing else should
  run meanwhile, so it must be asked for.

Differences are paired by split; the interval is Student's t over splits, so it holds the spread of
studies, too.
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np

from benchmarks import seeds
from benchmarks.pieces import Pieces
from benchmarks.rows import processor
from bnncore import data, metrics, params
from bnncore.cluster.cluster import Cluster
from bnncore.lowering import packing
from bnncore.packed import execute, packfile
from bnncore.params import Params
from bnncore.search import space, trial
from bnncore.search import study as S
from bnncore.search.run import Search
from bnncore.training import loop, plans, schemes
from bnncore.training.devices import Place

ROOT = Path(__file__).parent.parent
SCRATCH = ROOT / "checkpoints" / "benchmark-search"
FIRST_SPLIT = 1001  # no study's seed, and none of the other benchmarks'
PARTS = ("counting", "studies", "retrain", "workers")
SEARCH = "search"


def surroundings() -> dict[str, Any]:
    machine = f"{processor()[0] or 'unknown'}, {len(os.sched_getaffinity(0))} in use"
    return {"machine": machine, "load": round(os.getloadavg()[0], 1)}


# -- counting ----------------------------------------------------------------------------------


def counting(p: Params, images: data.Dataset, pieces: Pieces, count: int = 200) -> None:
    if "counting" in pieces:
        return
    started = time.process_time()
    found = space.Space(p, images)
    opening = time.process_time() - started
    gc.collect()
    gc.freeze()  # as the pipeline does
    rng = np.random.default_rng(0)
    seconds: list[float] = []
    over, used = 0, []
    while len(seconds) < count:
        choice = {k: v[rng.integers(len(v))] for k, v in found.values.items()}
        at = time.thread_time()
        config = found.config(choice)
        problem = found.problem(config)
        taken = None if problem else found.cost(config)
        seconds.append(time.thread_time() - at)
        if taken:
            over += max(taken.constraints(p.search).values()) > 0
            used.append(taken.counted_kib / p.search.budget_kib / choice.get("fill", 1.0))
    ms = 1000 * np.array(seconds)
    figures = {"mean": ms.mean(), "median": np.median(ms), "p99": np.percentile(ms, 99)}
    pieces["counting"] = {
        "count": count, "buildable": len(used), "over": int(over),
        "filled": round(statistics.mean(used), 3), "opening_s": round(opening, 2),
        "ms": {k: round(float(v), 2) for k, v in (figures | {"most": ms.max()}).items()},
        **surroundings(),
    }  # fmt: skip


# -- studies -----------------------------------------------------------------------------------


def study_name(kib: float, trials: int, seed: int) -> str:
    return f"study/{kib:g}/{trials}/{seed}"


def study(p: Params, images: data.Dataset, pieces: Pieces, name: str) -> None:
    if name in pieces:
        return
    print(f"{name}:", flush=True)
    # A folder a study, so that no study's time profits from networks that another has made.
    folder = SCRATCH / name.replace("/", "-")
    asked: list[float] = []  # when the trials were done, and again before the finalists
    with Search(p, images, folder) as search, Cluster(p.ray) as here:
        before, started = len(search.report().rows), time.monotonic()
        report = search.run(here, answered=lambda _: asked.append(time.monotonic() - started))
        slots = here.slots()
    if report.ended == "interrupted":
        sys.exit(130)
    assert report.winner is not None
    pieces[name] = {
        "configs": {SEARCH: report.winner, **{r["rival"]: r for r in report.rivals}},
        "outcomes": {o: sum(r["outcome"] == o for r in report.rows)
                     for o in (*S.COUNTED, S.REJECTED)},
        "folds": [[r["file_bytes"], 100 * float(right.mean())] for r, right in report.told_apart],
        # Of a study that was stopped and went on, the wall time is not known.
        "trials_s": None if before else round(asked[0], 1),
        "seconds": None if before else round(report.seconds, 1),
        "cpu_s": round(sum(r["cpu_s"] or 0 for r in report.rows), 1),
        "workers": slots, **surroundings(),
    }  # fmt: skip


# -- retraining --------------------------------------------------------------------------------


def defaults(p: Params, images: data.Dataset) -> dict[str, Params]:
    """The ensembles of params.yaml whose files fit the budget, whatever is trained."""
    found = {}
    for ensemble in p.ensembles.train:
        one = replace(p, ensembles=replace(p.ensembles, train=(ensemble,)))
        spec = plans.ensemble_spec(one, ensemble, images.image, len(images.classes))
        sizes = [space.cost(spec, replace(one, pack=pack), images.classes).counted_kib
                 for pack in packing.packings(p.pack)]  # fmt: skip
        if min(sizes) <= p.search.budget_kib:
            found[f"default {ensemble.name}"] = one
    return found


Groups = dict[str, tuple[str, Params]]  # label -> piece without the split, what to train


def groups(p: Params, images: data.Dataset, known: dict[str, Any], name: str) -> Groups:
    """What is compared within one budget, of the study of this name."""
    found = {
        label: (f"retrain/{space.described(row)}", space.preset(p, row))
        for label, row in known[name]["configs"].items()
    }
    return found | {
        label: (f"retrain/{label}", one) for label, one in defaults(p, images).items()
    }  # fmt: skip


def retrain(p: Params, chosen: dict[str, Params], split: int) -> dict[str, Any]:
    """The pieces of one split."""
    bases: dict[tuple, tuple] = {}
    pieces = {}
    images = data.load(seeds.seeded(p, split).data, ROOT)
    for name, one in chosen.items():
        one = seeds.seeded(one, split)
        if one.ensembles.train:
            key = (one.model.backbone, one.model.width)
            if key not in bases:
                bases[key] = seeds.base(one, images)
            plan = plans.plan(one, one.ensembles.train[0], images, *bases[key])
            made = schemes.train(plan.over(1), partial(loop.train_many, data=images))
        else:
            made = trial.network(Place(), images, one)
        content = packfile.encode(packing.packed(made, one, images, *space.model(one)).program)
        size, model = len(content), execute.Model(packfile.decode(content), ops="numpy")
        top1 = 100 * metrics.accuracy(model.predict(images.test.images), images.test.labels)
        print(f"{name}/{split}: {top1:.2f} %, {size:,} bytes", flush=True)
        pieces[f"{name}/{split}"] = {"test_top1": top1, "file_bytes": size}
    return pieces


# -- workers -----------------------------------------------------------------------------------


def workers(p: Params, images: data.Dataset, pieces: Pieces, trials: int = 20) -> None:
    """The same configurations (at random, in batches of 10, none stopped early), 1 worker or 2."""
    for count in (1, 2):
        name = f"workers/{count}"
        if name in pieces:
            continue
        search = replace(
            p.search, trials=trials, sampler="random", rungs=(), rivals=False, finalists=0, batch=10
        )
        ray = replace(p.ray, actors=count)
        with (
            tempfile.TemporaryDirectory() as folder,
            Search(replace(p, search=search, ray=ray), images, Path(folder) / "search") as study,
            Cluster(ray) as cluster,
        ):
            report = study.run(cluster)
            pieces[name] = {
                "trials": trials, "seconds": round(report.seconds, 1),
                "results": [r["val_top1"] for r in report.rows], **surroundings(),
            }  # fmt: skip


# -- what it says ------------------------------------------------------------------------------


def interval(differences: list[float]) -> tuple[float, float]:
    """(mean, half of the 95 % interval, Student's t; infinite for fewer than two)."""
    from scipy import stats

    n = len(differences)
    if n < 2:
        return differences[0], math.inf
    half = stats.t.ppf(0.975, n - 1) * statistics.stdev(differences) / math.sqrt(n)
    return statistics.mean(differences), float(half)


def summary(known: dict[str, Any], compared: dict[int, Groups]) -> dict[str, Any]:
    """What the pieces of one budget amount to: only splits for which all is there count.

    Args:
        compared: split -> what is compared there.
    """
    done = {
        split: {label: known[f"{name}/{split}"] for label, (name, _) in group.items()}
        for split, group in compared.items()
        if all(f"{name}/{split}" in known for name, _ in group.values())
    }
    rows = []
    for label in dict.fromkeys(label for found in done.values() for label in found):
        mine = {split: found[label] for split, found in done.items() if label in found}
        mean, half = interval([r["test_top1"] for r in mine.values()])
        row = {"label": label, "mean": mean, "half": half, "splits": len(mine),
               "bytes": statistics.mean(r["file_bytes"] for r in mine.values())}  # fmt: skip
        if label != SEARCH:
            differences = [done[s][SEARCH]["test_top1"] - r["test_top1"] for s, r in mine.items()]
            row["difference"], row["difference_half"] = interval(differences)
        rows.append(row)
    return {"splits": list(done), "rows": rows}


def markdown(pieces: Pieces, found: dict[float, dict[str, Any]], trials: int) -> str:
    known = pieces.known
    lines = ["Written by `python benchmarks/search.py`, which says how each figure is taken.", ""]

    def spread(mean: float, half: float) -> str:
        return f"{mean:.2f} ± {half:.2f}" if math.isfinite(half) else f"{mean:.2f} (one split)"

    for kib, part in found.items():
        lines += [
            f"## Digits, {kib:g} KiB, {trials} trials: retrained on fresh splits", "",
            f"Study seeds: **{part['seeds'] or 'none'}**; splits: **{part['splits'] or 'none'}**.",
            "",
        ]  # fmt: skip
        if not part["rows"]:
            continue
        lines += [
            "| what | test accuracy, % | search minus this, points | bytes |",
            "| --- | ---: | ---: | ---: |",
        ]
        for r in part["rows"]:
            less = spread(r["difference"], r["difference_half"]) if "difference" in r else ""
            few = f" ({r['splits']} splits)" if r["splits"] < len(part["splits"]) else ""
            top1 = spread(r["mean"], r["half"])
            lines.append(f"| {r['label']}{few} | {top1} | {less} | {r['bytes']:,.0f} |")
        lines += ["", "± is a 95 % interval over splits, which are new ones of the images that the "
                  "studies had; differences are paired by split.", ""]  # fmt: skip
        if len(part["splits"]) < 10 or len(part["seeds"]) < 3:
            lines += [
                "**Short of what was meant** (3 study seeds, 10 splits): take these as a trial run "
                "of the script.",
                "",
            ]
    rows = [(n, v) for n, v in known.items() if n.startswith("study/")]
    if rows:
        lines += [
            "## Studies",
            "",
            "| KiB | trials | seed | best | validation, % | bytes | told apart, % | trained, "
            "stopped, failed; rejected | s for trials, in all | CPU s in trials | workers | load |",
            "| ---: | ---: | ---: | --- | ---: | ---: | --- | --- | --- | ---: | ---: | ---: |",
        ]
        for name, v in sorted(rows):
            _, size, count, seed = name.split("/")
            o, best = v["outcomes"], v["configs"][SEARCH]
            took = "in pieces" if v["seconds"] is None else f"{v['trials_s']}, {v['seconds']}"
            folds = ", ".join(f"{top1:.2f}" for _, top1 in v["folds"])
            lines.append(
                f"| {size} | {count} | {seed} | {space.described(best)} | {best['val_top1']:.2f} | "
                f"{best['file_bytes']:,} | {folds} | "
                f"{o[S.TRAINED]}, {o[S.STOPPED]}, {o[S.FAILED]}; {o[S.REJECTED]} | {took} | "
                f"{v['cpu_s']} | {v['workers']} | {v['load']} |"
            )
        lines += ["", "Wall time says something only where the machine's load was that of the "
                  "workers alone.", ""]  # fmt: skip
    if "counting" in known:
        v = known["counting"]
        ms = ", ".join(f"{value} ({key})" for key, value in v["ms"].items())
        lines += [
            "## Counting",
            "",
            f"Opening a study: {v['opening_s']} s of CPU time. {v['count']} random choices: {ms} "
            f"ms each; of {v['buildable']} that can be built {v['over']} are over the budget, and "
            f"they fill {v['filled']:.0%} of the share that they may. Load: {v['load']}.",
            "",
        ]
    if "workers/1" in known and "workers/2" in known:
        one, two = known["workers/1"], known["workers/2"]
        same = "the same" if one["results"] == two["results"] else "NOT the same"
        lines += [
            "## Workers",
            "",
            f"{one['trials']} configurations: {one['seconds']} s with one Ray worker, "
            f"{two['seconds']} s with two, {one['seconds'] / two['seconds']:.2f} times as fast; "
            f"results are {same}. Load before: {one['load']}, {two['load']}; {two['machine']}.",
            "",
        ]
    return "\n".join(lines)


def plot(found: dict[float, dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    parts = {kib: part for kib, part in found.items() if part["rows"]}
    most = max(len(part["rows"]) for part in parts.values())
    size = 1 + 7 * len(parts), 1.2 + 0.42 * most
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    for ax, (kib, part) in zip(figure.subplots(1, len(parts), squeeze=False)[0], parts.items(),
                               strict=True):  # fmt: skip
        rows = part["rows"][::-1]
        for y, r in enumerate(rows):
            half = r["half"] if math.isfinite(r["half"]) else 0
            ax.errorbar(r["mean"], y, xerr=half, fmt="o", capsize=3,
                        color="#009e73" if r["label"] == SEARCH else "#0072b2")  # fmt: skip
        ax.set_yticks(range(len(rows)), [r["label"] for r in rows])
        ax.set_xlabel("test accuracy, % (mean and 95 % interval over splits)")
        ax.set_title(f"{kib:g} KiB, {len(part['seeds'])} study seeds, {len(part['splits'])} splits",
                     fontsize=9)  # fmt: skip
        ax.grid(alpha=0.3)
        ax.set_axisbelow(True)
    figure.savefig(path, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budgets", type=float, nargs="+", default=[24.0, 8.0], help="KiB")
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--splits", type=int, default=10, help="how many")
    parser.add_argument("--workers", type=int, default=2, help="processes that train splits")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS[:3]))
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--params", type=Path, default=ROOT / "params.yaml")
    args = parser.parse_args()
    p = params.load(args.params)
    images = data.load(p.data, ROOT)
    pieces = Pieces(args.json)
    same = replace(p, ray=params.RayParams(), mlflow=params.MlflowParams())  # change no result
    asked = {"params": params.digest(asdict(same), args.trials), "data": images.digest}
    if pieces.known.setdefault("asked", asked) != asked:
        parser.error(f"{args.json}: expected results of these parameters and as many trials, got "
                     "others; name another file with --json")  # fmt: skip
    splits = list(range(FIRST_SPLIT, FIRST_SPLIT + args.splits))
    within = {kib: replace(p, search=replace(p.search, budget_kib=kib)) for kib in args.budgets}

    dealt = {s: args.seeds[i * len(args.seeds) // len(splits)] for i, s in enumerate(splits)}

    def compared(kib: float) -> dict[int, Groups]:
        """By split, where its study is known."""
        names = {seed: study_name(kib, args.trials, seed) for seed in args.seeds}
        found = {seed: groups(within[kib], images, pieces.known, name)
                 for seed, name in names.items() if name in pieces}  # fmt: skip
        return {split: found[seed] for split, seed in dealt.items() if seed in found}

    def report() -> None:
        found = {kib: summary(pieces.known, compared(kib)) for kib in within}
        for part in found.values():
            part["seeds"] = sorted({dealt[split] for split in part["splits"]})
        args.json.with_suffix(".md").write_text(markdown(pieces, found, args.trials))
        if any(part["rows"] for part in found.values()):
            plot(found, args.json.with_suffix(".png"))

    if "counting" in args.only:
        counting(p, images, pieces)
    if "workers" in args.only:
        workers(p, images, pieces)
    if "studies" in args.only:
        for seed in args.seeds:
            for kib, one in within.items():
                search = replace(one.search, trials=args.trials, seed=seed)
                study(replace(one, search=search), images, pieces,
                      study_name(kib, args.trials, seed))  # fmt: skip
                report()
    if "retrain" in args.only:
        with ProcessPoolExecutor(args.workers, get_context("spawn")) as pool:
            running = []
            for split in splits:
                for kib, one in within.items():
                    chosen = {n: each for n, each in compared(kib).get(split, {}).values()
                              if f"{n}/{split}" not in pieces}  # fmt: skip
                    if chosen:
                        running.append(pool.submit(retrain, one, chosen, split))
            for each in as_completed(running):
                for name, value in each.result().items():
                    pieces[name] = value
                report()
    report()
    print(args.json.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
