"""A budget's answer on real images: what a search finds, trained in full beside its rivals.

    BNNCORE_DATA=... python benchmarks/front.py [--params benchmarks/front16.yaml] [--workers 2]
    python benchmarks/front.py --table      # trains nothing; writes table and plot of what is known

First a search on a fifth of the training images. Then, on all of them and by the same recipes: the
best two of everything that it trained, the best ensemble if none of them is one, the papers'
ensembles, one BNN and one int8 network as wide as fit, and that BNN taught by the best ensemble.
The best two and the wide BNN have three seeds, of the split into training and validation part and
of all training. What is chosen is chosen on validation images; a trained file sees the test images
once.

Everything is written when it is done, training goes on from its last epoch, and what the JSON file
holds is not done again: it can be stopped and started at any time (ended, not halted by SIGSTOP:
Ray gives up a worker that does not answer). Each process trains the configurations of one network
and seed, which share what they start from.

Intervals are 95 %: of a difference, from what differs image by image (averaged over seeds) and from
the spread over seeds where both have several.
"""

from __future__ import annotations

import argparse
import base64
import json
import math
import os
import statistics
import sys
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np

from benchmarks import seeds
from benchmarks.pieces import Pieces
from bnncore import data, metrics, params
from bnncore.cluster.cluster import Cluster
from bnncore.device import costs
from bnncore.lowering import packing
from bnncore.packed import execute, packfile, votes
from bnncore.packed.program import Program
from bnncore.params import Params
from bnncore.search import space
from bnncore.search.rivals import INT8, WIDER
from bnncore.search.run import Search
from bnncore.training import loop, plans, schemes
from bnncore.training.ensembled import Ensembled

ROOT = Path(__file__).parent.parent
SUBSET = 0.2  # of the training images, in the search
FIRST, SECOND, MEMBERS, STUDENT = "search", "search, second", "search, ensemble", "student"
SEEDS = {FIRST: 3, SECOND: 3, WIDER: 3}  # all others have one
Config = dict[str, Any]
Row = dict[str, Any]


# -- what is compared --------------------------------------------------------------------------


def searched(p: Params, scratch: Path) -> dict[str, Any]:
    """The search: label -> configuration, and what it tried."""
    p = replace(p, data=replace(p.data, subset=SUBSET))
    images = data.load(p.data, ROOT)
    found = space.Space(p, images)
    with Search(p, images, scratch / "search") as search, Cluster(p.ray) as cluster:
        report = search.run(cluster)
    if report.ended is not None:
        sys.exit(f"the search ended early: {report.ended}")
    keys = (*space.KEYS, "val_top1", "file_bytes")
    ranked = [{k: row[k] for k in keys} for row in report.validated]
    configs = {FIRST: ranked[0], SECOND: ranked[1]}
    if not any(_several(row) for row in ranked[:2]):
        configs[MEMBERS] = next(row for row in ranked if _several(row))
    for row in report.rivals:
        configs[row["rival"]] = {k: row[k] for k in keys}
    for label in {WIDER, INT8} & configs.keys():
        configs[label] = _widest(found, configs[label])
    return {"configs": configs, "rows": ranked, "seconds": round(report.seconds),
            "images": len(images.train)}  # fmt: skip


def _several(config: Config) -> bool:
    return config["members"] > 1


def _widest(found: space.Space, config: Config) -> Config:
    """In single channels, where the search goes in steps."""
    config = {k: config[k] for k in space.KEYS}
    while found.packings(config | {"width": config["width"] + 1}, enough=1):
        config["width"] += 1
    return config


def piece(label: str, config: Config, seed: int) -> str:
    """The name of a result; labels may share one."""
    taught = f", {STUDENT}" if label == STUDENT else ""
    return f"{space.described(_bare(config))}{taught}/{seed}"


def _bare(config: Config) -> Config:
    return {k: config[k] for k in space.KEYS}


def teacher(configs: dict[str, Config]) -> Config:
    """The best ensemble of the search."""
    return next(
        configs[k] for k in (FIRST, SECOND, MEMBERS) if k in configs and _several(configs[k])
    )


def wanted(configs: dict[str, Config], most: int) -> Iterator[tuple[str, Config, int]]:
    """All first seeds before all second ones."""
    named = {**configs, STUDENT: configs[WIDER]}
    for seed in range(most):
        for label, config in named.items():
            if seed < SEEDS.get(label, 1):
                yield label, config, seed


# -- training ----------------------------------------------------------------------------------


def group(
    p: Params, jobs: list[tuple[str, Config]], seed: int, known: Config, scratch: Path
) -> str:
    """Train configurations of one network, and its student, each into a file of its own."""
    p = seeds.seeded(p, seed)
    images = data.load(p.data, ROOT)
    (scratch / "pieces").mkdir(parents=True, exist_ok=True)
    for label, config in jobs:
        name = piece(label, config, seed)
        path = scratch / "pieces" / f"{name.replace('/', ' seed ')}.json"
        if not path.exists():
            row = measured(p, label, config, known, images, scratch / f"seed-{seed}", path)
            path.with_suffix(".new").write_text(json.dumps({name: row}))
            os.replace(path.with_suffix(".new"), path)
            print(f"{name}: validation {row['val_top1']:.2f} %, test {row['test_top1']:.2f} %, "
                  f"{row['file_bytes']:,} bytes", flush=True)  # fmt: skip
    return f"seed {seed}: {', '.join(label for label, _ in jobs)}"


def measured(
    p: Params, label: str, config: Config, known: Config, images: data.Dataset, folder: Path,
    path: Path,
) -> Row:  # fmt: skip
    cpu = Clock(path.with_suffix(".cpu"))
    train_many = partial(loop.train_many, data=images, checkpoints=folder, on_epoch=cpu)
    if label == STUDENT:
        _, above = trained(p, known, images, train_many)
        q, made = student(p, config, above, images, train_many)
    else:
        q, made = trained(p, config, images, train_many)
    section = q.ensembles.train[-1] if q.ensembles.train else None
    done = packing.packed(made, q, images, section.name if section else "fp32", section)
    content = packfile.encode(done.program)
    path.with_suffix(".bnn").write_bytes(content)
    params.save(q, path.with_suffix(".yaml"))
    program = packfile.decode(content)
    model, labels = execute.Model(program), images.test.labels
    outputs = model.outputs(images.test.images)
    scores, predicted = votes.combine(program, outputs)
    hits = predicted == labels
    members = [votes.combine(program, outputs[:m])[1] for m in range(1, len(outputs) + 1)]
    probabilities = votes.probabilities(program, scores)
    epochs = [q.pretrain.epochs]
    if q.ensembles.train:
        epochs += [q.binarize.epochs, q.ensembles.recipe.epochs * config["members"]]
    return {
        "val_top1": done.top1, "drop": done.drop, "packing": packing.words(done.pack),
        "test_top1": 100 * float(hits.mean()), "images": len(hits), "file_bytes": len(content),
        "anytime": [100 * metrics.accuracy(m, labels) for m in members],
        "worse": {name: 100 * metrics.accuracy(model.predict(spoil(images.test.images)), labels)
                  for name, spoil in WORSE.items()},
        "nll": metrics.nll(probabilities, labels),
        "ece": metrics.calibration_error(probabilities, predicted, labels),
        "passes": sum(epochs) * len(images.train),
        "cpu_s": round(cpu.seconds),
        "curves": {name: [[round(e["train_loss"], 4), round(e["val_top1"], 2)] for e in history]
                   for name, history in made.histories.items()},
        "right": base64.b64encode(zlib.compress(np.packbits(hits).tobytes(), 9)).decode(),
    }  # fmt: skip


def bases(p: Params, images: data.Dataset, train_many: schemes.TrainMany) -> tuple[Any, Any]:
    (fp32,) = train_many([plans.first_job(p, images, None)])
    (bnn,) = train_many([plans.first_job(p, images, fp32.state)])
    return fp32.state, bnn.state


def trained(
    p: Params, config: Config, images: data.Dataset, train_many: schemes.TrainMany
) -> tuple[Params, Ensembled]:
    """A configuration by the full recipes, what it starts from included."""
    q = space.preset(p, _bare(config))
    if not q.ensembles.train:
        (fp32,) = train_many([plans.first_job(q, images, None)])
        return q, Ensembled(fp32.job.spec, fp32.state, {fp32.job.name: fp32.history})
    plan = plans.plan(q, q.ensembles.train[0], images, *bases(q, images, train_many))
    return q, schemes.train(plan, train_many)


def student(
    p: Params, config: Config, teacher: Ensembled, images: data.Dataset,
    train_many: schemes.TrainMany,
) -> tuple[Params, Ensembled]:  # fmt: skip
    """The same of one that is taught by a trained ensemble."""
    q = space.preset(p, _bare(config))
    (above,) = q.ensembles.train
    taught = replace(above, name="taught", teacher=above.name)
    recipe = replace(q.ensembles.recipe, distill=0.5, temperature=2.0)
    q = replace(q, ensembles=replace(q.ensembles, recipe=recipe, train=(above, taught)))
    fp32, bnn = bases(q, images, train_many)
    plan = plans.plan(q, taught, images, fp32, bnn, {above.name: teacher})
    return q, schemes.train(plan, train_many)


def noise(images: np.ndarray) -> np.ndarray:
    """Gaussian noise of standard deviation 20, seeded, on uint8 (N, H, W, C)."""
    rng = np.random.default_rng(0)
    return np.stack([
        np.clip(np.round(i + rng.normal(0, 20, i.shape)), 0, 255).astype(np.uint8) for i in images
    ])  # fmt: skip


def blur(images: np.ndarray) -> np.ndarray:
    """A mean of 3x3 pixels."""
    height, width = images.shape[1:3]
    wide = np.pad(images.astype(np.uint16), ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    parts = [wide[:, y : y + height, x : x + width] for y in range(3) for x in range(3)]
    return np.asarray((np.sum(parts, axis=0, dtype=np.uint16) + 4) // 9, np.uint8)


WORSE = {"noise": noise, "blur": blur}


class Clock:
    """Seconds of the processor, those of runs that were stopped included, written every epoch."""

    def __init__(self, path: Path):
        self.path = path
        self.seconds = float(path.read_text()) if path.exists() else 0.0
        self.at = time.process_time()

    def __call__(self, *_: Any) -> None:
        self.seconds += time.process_time() - self.at
        self.at = time.process_time()
        self.path.write_text(f"{self.seconds:.1f}")


def train(p: Params, pieces: Pieces, workers: int, most: int, scratch: Path) -> None:
    configs = pieces.known["search"]["configs"]
    groups: dict[tuple, list[tuple[str, Config]]] = {}
    seen = set()
    for label, config, seed in wanted(configs, most):
        name = piece(label, config, seed)
        if name not in pieces and name not in seen:
            seen.add(name)
            # The FP32 rival starts from nothing that others do.
            base = config["scheme"] == space.FP32 or config["backbone"], config["width"]
            # The student comes after its teacher, whose checkpoints it reads.
            key = (seed, "after") if label == STUDENT else (seed, *base)
            groups.setdefault(key, []).append((label, config))
    for after in (False, True):
        with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
            running = [
                pool.submit(group, p, jobs, key[0], teacher(configs), scratch)
                for key, jobs in groups.items() if (key[1] == "after") == after
            ]  # fmt: skip
            for one in as_completed(running):
                print(f"done: {one.result()}", flush=True)
                gather(pieces, scratch)


def gather(pieces: Pieces, scratch: Path) -> None:
    for path in sorted((scratch / "pieces").glob("*.json")):
        for name, row in json.loads(path.read_text()).items():
            # Here alone: by the estimate as it is now, whenever the file was trained.
            row |= figures(packfile.load(path.with_suffix(".bnn")))
            if pieces.known.get(name) != row:
                pieces[name] = row


def figures(program: Program) -> Row:
    """RAM and instructions, in millions, of all members for an image."""
    estimated = costs.estimate(program)
    count = round(estimated.instructions[-1] / 1e6, 3)
    return {"ram": estimated.ram, "minstructions": count}


# -- what it says ------------------------------------------------------------------------------


def right(row: Row) -> np.ndarray:
    """Of each test image, whether it was classified right."""
    bits = np.frombuffer(zlib.decompress(base64.b64decode(row["right"])), np.uint8)
    return np.unpackbits(bits, count=row["images"]).astype(float)


MEANS = ("ece", "nll", "ram", "minstructions")


def summary(pieces: Pieces, most: int) -> list[Row]:
    if "search" not in pieces:
        return []
    found: dict[str, dict[str, Row]] = {}
    labels: dict[str, list[str]] = {}
    for label, config, seed in wanted(pieces.known["search"]["configs"], most):
        if (name := piece(label, config, seed)) in pieces:
            about = name.rsplit("/", 1)[0]
            found.setdefault(about, {})[name] = pieces.known[name]
            if label not in labels.setdefault(about, []):
                labels[about].append(label)
    first = next((list(found[about].values()) for about in found if FIRST in labels[about]), None)
    rows = []
    for about, by_name in found.items():
        runs = list(by_name.values())
        top1 = [r["test_top1"] for r in runs]
        names = sorted(labels[about], key=lambda label: label != FIRST)
        row = {
            "label": " = ".join(names), "about": about, "seeds": len(runs),
            "mean": statistics.mean(top1), "bytes": max(r["file_bytes"] for r in runs),
            "val": statistics.mean(r["val_top1"] for r in runs),
            **{k: statistics.mean(r[k] for r in runs) for k in MEANS},
            **{k: statistics.mean(r["worse"][k] for r in runs) for k in WORSE},
            "anytime": np.mean([r["anytime"] for r in runs], axis=0).tolist(),
            "half": 100 * 1.96 * _error([runs]),
            "passes": statistics.mean(r["passes"] for r in runs),
            "hours": statistics.mean(r["cpu_s"] for r in runs) / 3600,
        }  # fmt: skip
        if first is not None and FIRST not in labels[about]:
            row["difference"] = statistics.mean(r["test_top1"] for r in first) - row["mean"]
            row["difference_half"] = 100 * 1.96 * _error([first, runs])
        rows.append(row)
    return rows


def _error(groups: list[list[Row]]) -> float:
    """The standard error of a mean accuracy, or of the difference of two."""
    each = [np.mean([right(r) for r in runs], axis=0) for runs in groups]
    image = each[0] - each[1] if len(each) == 2 else each[0]
    seeds = [statistics.variance(right(r).mean() for r in runs) / len(runs)
             for runs in groups if len(runs) > 1]  # fmt: skip
    return math.sqrt(image.var(ddof=1) / len(image) + sum(seeds))


def markdown(p: Params, pieces: Pieces, rows: list[Row]) -> str:
    kib = p.search.budget_kib
    lines = [
        f"# {p.data.name}, {kib:g} KiB", "",
        "Written by `python benchmarks/front.py`, which says how each figure is taken.", "",
    ]  # fmt: skip
    if p.data.name == "cifar10":
        lines += ["The images are a JPEG copy (quality 75, colour at half resolution): accuracies "
                  "published for CIFAR-10 do not compare.", ""]  # fmt: skip
    if "search" in pieces:
        found = pieces.known["search"]
        lines += [
            f"## The search, on {found['images']:,} images", "",
            "| configuration | validation, % | bytes |", "| --- | ---: | ---: |",
            *(f"| {space.described(_bare(r))} | {r['val_top1']:.2f} | {r['file_bytes']:,} |"
              for r in found["rows"]), "",
        ]  # fmt: skip
    if rows:
        lines += [
            "## Trained on all images", "",
            "| what | network | seeds | test, % | search minus this, points | validation, % | "
            "bytes | million image passes | processor hours |",
            "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        ]  # fmt: skip
    for r in sorted(rows, key=lambda r: -r["mean"]):
        less = f"{r['difference']:+.2f} ± {r['difference_half']:.2f}" if "difference" in r else ""
        lines.append(
            f"| {r['label']} | {r['about']} | {r['seeds']} | {r['mean']:.2f} ± {r['half']:.2f} | "
            f"{less} | {r['val']:.2f} | {r['bytes']:,} | "
            f"{r['passes'] / 1e6:.2f} | {r['hours']:.2f} |"
        )
    if rows:
        lines += [
            "", "## What else they differ in", "",
            "On the test images; *noise* is Gaussian of standard deviation 20 (of 255), *blur* a "
            "mean of 3x3 pixels; RAM and instructions an image are estimates of Cortex-M4.", "",
            "| what | test, % | with noise | with blur | negative log-likelihood | "
            "calibration error | first 1, 2, .. members | RAM, bytes | million instructions |",
            "| --- | ---: | ---: | ---: | ---: | ---: | --- | ---: | ---: |",
        ]  # fmt: skip
    for r in sorted(rows, key=lambda r: -r["mean"]):
        few = ", ".join(f"{top1:.1f}" for top1 in r["anytime"])
        lines.append(
            f"| {r['label']} | {r['mean']:.2f} | {r['noise']:.2f} | {r['blur']:.2f} | "
            f"{r['nll']:.3f} | {r['ece']:.3f} | {few} | {r['ram']:,.0f} | "
            f"{r['minstructions']:.2f} |"
        )
    missing = sum(piece(*one) not in pieces for one in wanted(pieces.known["search"]["configs"], 3)
                  ) if "search" in pieces else 0  # fmt: skip
    if missing:
        lines += ["", f"**{missing} trainings of those meant are missing.**"]
    return "\n".join(lines) + "\n"


def plot(p: Params, pieces: Pieces, rows: list[Row], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.2), dpi=120, layout="constrained")
    ax = figure.subplots()
    ordered = sorted(rows, key=lambda r: -r["mean"])
    for r in ordered:
        ours = r["label"].startswith("search")
        name = f"{r['mean']:.1f} %  {r['label']}: {r['about']}"
        ax.errorbar(r["bytes"] / 1024, r["mean"], yerr=r["half"], fmt="o" if ours else "s",
                    capsize=3, label=name)  # fmt: skip
    ax.axvline(p.search.budget_kib, color="black", linestyle=":", linewidth=1)
    ax.set_xlabel("packed file, KiB")
    ax.set_ylabel("test accuracy, % (95 % interval)")
    ax.set_title(f"{p.data.name}{' (JPEG copy)' if p.data.name == 'cifar10' else ''}, "
                 f"{p.search.budget_kib:g} KiB", fontsize=10)  # fmt: skip
    ax.grid(alpha=0.3)
    figure.legend(loc="outside lower center", fontsize=7, ncols=1, frameon=False)
    figure.savefig(path, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--params", type=Path, default=Path(__file__).with_name("front16.yaml"))
    parser.add_argument("--seeds", type=int, default=3, help="the most of one configuration")
    parser.add_argument("--workers", type=int, default=2, help="processes, a thread each")
    parser.add_argument("--json", type=Path, help="results; in docs/reproduction by default")
    parser.add_argument("--table", action="store_true", help="train nothing")
    args = parser.parse_args()
    p = params.load(args.params)
    results = ROOT / "docs" / "reproduction" / f"{args.params.stem}.json"
    pieces = Pieces(args.json or results)
    scratch = ROOT / "checkpoints" / args.params.stem
    sections = params.read_yaml(args.params).items()  # those that change no result left out
    asked = params.digest({k: v for k, v in sections if k not in ("ray", "mlflow", "evaluate")})
    if "asked" not in pieces:
        pieces["asked"] = asked
    if pieces.known["asked"] != asked:
        parser.error(f"{pieces.path}: expected results of {args.params}, got those of others; name "
                     "another file with --json")  # fmt: skip

    def report() -> None:
        rows = summary(pieces, args.seeds)
        pieces.path.with_suffix(".md").write_text(markdown(p, pieces, rows))
        if rows:
            plot(p, pieces, rows, pieces.path.with_suffix(".png"))

    if not args.table:
        if "search" not in pieces:
            pieces["search"] = searched(p, scratch)
        report()
        try:
            train(p, pieces, args.workers, args.seeds, scratch)
        finally:
            gather(pieces, scratch)
    report()
    print(pieces.path.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
