"""What the search is worth on digits: against random search, and against the default ensembles.

    python benchmarks/search.py [--trials 40] [--seeds 0 1 2] [--splits 10]
    python benchmarks/search.py --only rejections workers

Four parts, each of pieces that are written to the JSON file as soon as they are done; what is there
is not done again, so it can be stopped and started at any time.

* ``rejections``: 200 random configurations over the budget, what it takes to count and reject each,
  in CPU time of the thread, those seen for the first time included.
* ``studies``: for each seed one study with the parameters' sampler and one with random proposals,
  same budget, same number of trials.
* ``retrain``: the best of every study and all ensembles of params.yaml that fit the budget, trained
  in full on splits of the data that no study has seen, one seed for the split and all training;
  test accuracy of the packed file.
* ``workers``: one study of 20 configurations with one Ray worker and with two. Nothing else should
  run meanwhile, so it must be asked for.

Differences are paired by split, and of studies averaged over the study seeds first; the interval is
Student's t over splits.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np

from benchmarks import seeds
from benchmarks.rows import processor
from bnncore import data, metrics, params
from bnncore.cluster.cluster import Cluster
from bnncore.lowering import packing
from bnncore.packed import execute, packfile
from bnncore.params import EnsembleParams, Params
from bnncore.search import space
from bnncore.search import study as S
from bnncore.search.run import Search
from bnncore.training import loop, plans, schemes

ROOT = Path(__file__).parent.parent
SCRATCH = ROOT / "checkpoints" / "benchmark-search"
FIRST_SPLIT = 1001  # no study's seed, and none of the other benchmarks'
PARTS = ("rejections", "studies", "retrain", "workers")


class Pieces:
    """Results by name in a JSON file, written whole after each."""

    def __init__(self, path: Path):
        self.path = path
        self.known: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def __setitem__(self, name: str, value: Any) -> None:
        self.known[name] = value
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps(self.known, indent=1, sort_keys=True) + "\n")
        os.replace(new, self.path)

    def __contains__(self, name: str) -> bool:
        return name in self.known


def surroundings() -> dict[str, Any]:
    machine = f"{processor()[0] or 'unknown'}, {len(os.sched_getaffinity(0))} in use"
    return {"machine": machine, "load": round(os.getloadavg()[0], 1)}


# -- rejections --------------------------------------------------------------------------------


def rejections(p: Params, images: data.Dataset, pieces: Pieces, count: int = 200) -> None:
    if "rejections" in pieces:
        return
    started = time.process_time()
    with (
        tempfile.TemporaryDirectory() as folder,
        Search(p, images, Path(folder) / "search", say=lambda _: None) as search,
    ):
        opening = time.process_time() - started
        gc.collect()
        gc.freeze()  # as the pipeline does
        rng, seen = np.random.default_rng(0), set()
        whole: list[float] = []
        while len(whole) < count:
            config = {k: v[rng.integers(len(v))] for k, v in search.space.values.items()}
            if space.identity(config) in seen:
                continue
            seen.add(space.identity(config))
            at = time.thread_time()
            trial = search.study.count(config, len(seen), batch=0)
            if not trial.feasible:
                search.study.reject(trial)
                whole.append(time.thread_time() - at)
        counting = search.study.rejecting_s

    def figures(values: list[float]) -> dict[str, float]:
        ms = 1000 * np.array(values)
        found = {"mean": ms.mean(), "median": np.median(ms), "p99": np.percentile(ms, 99)}
        return {k: round(float(v), 2) for k, v in (found | {"max": ms.max()}).items()}

    pieces["rejections"] = {
        "count": count, "counting_ms": figures(counting), "with_journal_ms": figures(whole),
        "opening_s": round(opening, 2), **surroundings(),
    }  # fmt: skip


# -- studies -----------------------------------------------------------------------------------


def study_name(sampler: str, trials: int, seed: int) -> str:
    return f"study/{sampler}/{trials}/{seed}"


def studies(p: Params, images: data.Dataset, pieces: Pieces, trials: int, seed: int) -> None:
    for sampler in (p.search.sampler, "random"):
        name = study_name(sampler, trials, seed)
        if name in pieces:
            continue
        print(f"{name}:", flush=True)
        search = replace(p.search, trials=trials, seed=seed, sampler=sampler, rivals=False)
        # A folder a study, so that no study's time profits from networks that another has made.
        folder = SCRATCH / name.replace("/", "-")
        with Search(replace(p, search=search), images, folder) as study, Cluster(p.ray) as here:
            before = len(study.report().rows)
            report = study.run(here)
            slots = here.slots()
            if report.ended == "interrupted":
                sys.exit(130)
            assert report.best is not None
            pieces[name] = {
                "best": report.best, "config": {k: report.best[k] for k in study.space.values},
                "outcomes": {o: sum(r["outcome"] == o for r in report.rows)
                             for o in (*S.COUNTED, S.REJECTED)},
                # Of a study that was stopped and went on, the wall time is not known.
                "seconds": None if before else round(report.seconds, 1),
                "cpu_s": round(sum(r["cpu_s"] or 0 for r in report.rows), 1),
                "workers": slots, **surroundings(),
            }  # fmt: skip


# -- retraining --------------------------------------------------------------------------------


def defaults(p: Params, images: data.Dataset) -> dict[str, EnsembleParams]:
    """The ensembles of params.yaml whose files fit the budget, whatever is trained."""
    found = {}
    for ensemble in p.ensembles.train:
        spec = plans.ensemble_spec(p, ensemble, images.image, len(images.classes))
        if space.cost(spec, p, images.classes, p.search.count).counted_kib <= p.search.budget_kib:
            found[ensemble.name] = ensemble
    return found


def candidates(
    p: Params, images: data.Dataset, pieces: Pieces, trials: int, seeds: list[int]
) -> dict[str, Params]:
    """What is retrained: piece name (without the split) -> params with one ensemble."""
    found = {}
    for sampler in (p.search.sampler, "random"):
        for seed in seeds:
            known = pieces.known.get(study_name(sampler, trials, seed))
            if known:
                config = known["config"]
                found[f"retrain/{space.identity(config)}"] = space.preset(p, config)
    for name, ensemble in defaults(p, images).items():
        one = replace(p, ensembles=replace(p.ensembles, train=(ensemble,)))
        found[f"retrain/default {name}"] = one
    return found


def retrain(p: Params, pieces: Pieces, chosen: dict[str, Params], split: int) -> None:
    bases: dict[tuple, tuple] = {}
    images = None
    for name, one in chosen.items():
        piece = f"{name}/{split}"
        if piece in pieces:
            continue
        one = seeds.seeded(one, split)
        images = images or data.load(one.data, ROOT)
        key = (one.model.backbone, one.model.width)
        if key not in bases:
            bases[key] = seeds.base(one, images)
        plan = plans.plan(one, one.ensembles.train[0], images, *bases[key])
        made = schemes.train(plan, partial(loop.train_many, data=images))
        program, _ = packing.packed(made, one, images, *space.model(one))
        content = packfile.encode(program)
        size, model = len(content), execute.Model(packfile.decode(content), ops="numpy")
        top1 = 100 * metrics.accuracy(model.predict(images.test.images), images.test.labels)
        print(f"{piece}: {top1:.2f} %, {size:,} bytes", flush=True)
        pieces[piece] = {"test_top1": top1, "file_bytes": size}


# -- workers -----------------------------------------------------------------------------------


def workers(p: Params, images: data.Dataset, pieces: Pieces, trials: int = 20) -> None:
    """The same configurations (at random, in batches of 10, none stopped early), 1 worker or 2."""
    for count in (1, 2):
        name = f"workers/{count}"
        if name in pieces:
            continue
        search = replace(
            p.search, trials=trials, sampler="random", rungs=(), rivals=False, batch=10
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


def summary(p: Params, images, pieces: Pieces, trials: int, seeds: list[int], splits: list[int]):
    """What the pieces amount to: only splits and seeds for which all is there count."""
    known = pieces.known
    mine = p.search.sampler
    seeds = [s for s in seeds if all(study_name(k, trials, s) in known for k in (mine, "random"))]
    fitting = list(defaults(p, images))
    configs = {
        k: [space.identity(known[study_name(k, trials, s)]["config"]) for s in seeds]
        for k in (mine, "random")
    }
    names = {k: [f"retrain/{c}" for c in v] for k, v in configs.items()}
    rivals = {f"default {n}": [f"retrain/default {n}"] for n in fitting}
    groups = {f"{mine} search": names[mine], "random search": names["random"], **rivals}
    splits = [
        s for s in splits if all(f"{n}/{s}" in known for group in groups.values() for n in group)
    ]
    found: dict[str, Any] = {"trials": trials, "seeds": seeds, "splits": splits}
    if not seeds or not splits:
        return found | {"rows": []}
    top1 = {
        label: [statistics.mean(known[f"{n}/{s}"]["test_top1"] for n in group) for s in splits]
        for label, group in groups.items()
    }
    ours = top1[f"{mine} search"]
    rows = []
    for label, group in groups.items():
        differences = [a - b for a, b in zip(ours, top1[label], strict=True)]
        mean, half = interval(top1[label])
        row = {"label": label, "mean": mean, "half": half,
               "bytes": statistics.mean(known[f"{n}/{s}"]["file_bytes"] for n in group
                                        for s in splits)}  # fmt: skip
        if label != f"{mine} search":
            row["difference"], row["difference_half"] = interval(differences)
        rows.append(row)
    return found | {"rows": rows}


def markdown(p: Params, pieces: Pieces, found: dict[str, Any]) -> str:
    known = pieces.known
    lines = [
        "Written by `python benchmarks/search.py`, which says how each figure is taken.",
        "",
        f"Digits, budget {p.search.budget_kib:g} KiB. Studies of **{found['trials']} trials**; "
        f"study seeds complete: **{found['seeds'] or 'none'}**; splits complete: "
        f"**{found['splits'] or 'none'}**.",
        "",
    ]

    def spread(mean: float, half: float) -> str:
        return f"{mean:.2f} ± {half:.2f}" if math.isfinite(half) else f"{mean:.2f} (one split)"

    if found["rows"]:
        lines += [
            "## Retrained on fresh splits",
            "",
            "| what | test accuracy, % | search minus this, points | bytes |",
            "| --- | ---: | ---: | ---: |",
        ]
        for r in found["rows"]:
            less = spread(r["difference"], r["difference_half"]) if "difference" in r else ""
            lines.append(
                f"| {r['label']} | {spread(r['mean'], r['half'])} | {less} | {r['bytes']:,.0f} |"
            )
        lines += ["", "± is a 95 % interval over splits; differences are paired by split.", ""]
        if len(found["splits"]) < 10 or len(found["seeds"]) < 3:
            lines += [
                "**Short of what was meant** (3 study seeds, 10 splits): take these as a trial run "
                "of the script.",
                "",
            ]
    else:
        lines += ["No seed has been retrained yet: there is no comparison here.", ""]
    rows = [(n, v) for n, v in known.items() if n.startswith("study/")]
    if rows:
        lines += [
            "## Studies",
            "",
            "| sampler | trials | seed | best | validation, % | KiB | trained, stopped, failed; "
            "rejected | wall s | CPU s in trials | workers | load |",
            "| --- | ---: | ---: | --- | ---: | ---: | --- | ---: | ---: | ---: | ---: |",
        ]
        for name, v in sorted(rows):
            _, sampler, trials, seed = name.split("/")
            o = v["outcomes"]
            lines.append(
                f"| {sampler} | {trials} | {seed} | {space.described(v['config'])} | "
                f"{v['best']['val_top1']:.2f} | {v['best']['file_bytes'] / 1024:.2f} | "
                f"{o[S.TRAINED]}, {o[S.STOPPED]}, {o[S.FAILED]}; {o[S.REJECTED]} | "
                f"{v['seconds'] if v['seconds'] is not None else 'in pieces'} | {v['cpu_s']} | "
                f"{v['workers']} | {v['load']} |"
            )
        lines += ["", "Wall time says something only where the machine's load was that of the "
                  "workers alone.", ""]  # fmt: skip
    if "rejections" in known:
        v = known["rejections"]
        lines += [
            "## Rejections",
            "",
            f"{v['count']} random configurations that are over the budget or cannot be built, in "
            "CPU ms (load of the "
            f"machine meanwhile: {v['load']}); opening the study, with the checks of the whole "
            f"space: {v['opening_s']} s.",
            "",
            "| | mean | median | 99th percentile | most |",
            "| --- | ---: | ---: | ---: | ---: |",
        ]
        for key, label in (("counting_ms", "counting"), ("with_journal_ms", "and writing it down")):
            f = v[key]
            lines.append(f"| {label} | {f['mean']} | {f['median']} | {f['p99']} | {f['max']} |")
        lines.append("")
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


def plot(found: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    rows = found["rows"][::-1]
    figure = Figure(figsize=(8, 1.2 + 0.42 * len(rows)), dpi=120, layout="constrained")
    ax = figure.subplots()
    for y, r in enumerate(rows):
        half = r["half"] if math.isfinite(r["half"]) else 0
        ours = "search" in r["label"]
        ax.errorbar(r["mean"], y, xerr=half, fmt="o", capsize=3,
                    color="#009e73" if ours else "#0072b2")  # fmt: skip
    ax.set_yticks(range(len(rows)), [r["label"] for r in rows])
    ax.set_xlabel(f"test accuracy, % (mean and 95 % interval over {len(found['splits'])} splits)")
    ax.set_title(f"best of {found['trials']} trials, {len(found['seeds'])} study seeds", fontsize=9)
    ax.grid(alpha=0.3)
    ax.set_axisbelow(True)
    figure.savefig(path, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--splits", type=int, default=10, help="how many")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS[:3]))
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--params", type=Path, default=ROOT / "params.yaml")
    args = parser.parse_args()
    p = params.load(args.params)
    images = data.load(p.data, ROOT)
    pieces = Pieces(args.json)
    asked = {"search": params.digest(asdict(p.search), args.trials), "data": images.digest}
    if pieces.known.setdefault("asked", asked) != asked and "retrain" in args.only:
        parser.error(f"{args.json}: expected results of these parameters and as many trials, got "
                     "others; name another file with --json")  # fmt: skip
    splits = list(range(FIRST_SPLIT, FIRST_SPLIT + args.splits))
    seeds: list[int] = []

    def report() -> None:
        found = summary(p, images, pieces, args.trials, args.seeds, splits)
        args.json.with_suffix(".md").write_text(markdown(p, pieces, found))
        if found["rows"]:
            plot(found, args.json.with_suffix(".png"))

    if "rejections" in args.only:
        rejections(p, images, pieces)
    if "workers" in args.only:
        workers(p, images, pieces)
    # Seed by seed, so that what is there when it is stopped is complete for some seeds.
    for seed in args.seeds:
        if "studies" in args.only:
            studies(p, images, pieces, args.trials, seed)
        seeds.append(seed)
        report()
        if "retrain" in args.only:
            chosen = candidates(p, images, pieces, args.trials, seeds)
            for split in splits:
                retrain(p, pieces, chosen, split)
                report()
    report()
    print(args.json.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
