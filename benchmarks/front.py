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
and seed, which share what they start from. Checkpoints and trained files lie in a folder of
`checkpoints` that has the JSON file's name; what was trained there by other parameters, or on other
images, is refused.

Intervals are 95 %. A difference is taken seed by seed, over the seeds that both rows have, and
image by image; it varies with images and, where there are several, with seeds. With one seed it is
of these trained networks alone, not of their recipes: "images only".
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
from benchmarks.rows import commit
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
PARAMS = Path(__file__).with_name("front16.yaml")
SUBSET = 0.2  # of the training images, in the search
FIRST, SECOND, MEMBERS, STUDENT = "search", "search, second", "search, ensemble", "student"
SEEDS = {FIRST: 3, SECOND: 3, WIDER: 3}  # all others have one
MOST = max(SEEDS.values())
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


def place(name: str, scratch: Path) -> Path:
    """Where a result is written; its trained file and its parameters lie beside it."""
    return scratch / "pieces" / f"{name.replace('/', ' seed ')}.json"


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


def resolved(p: Params, label: str, config: Config) -> Params:
    """What a result is trained by: the full recipes."""
    q = space.preset(p, _bare(config))
    if label != STUDENT:
        return q
    (above,) = q.ensembles.train
    taught = replace(above, name="taught", teacher=above.name)
    recipe = replace(q.ensembles.recipe, distill=0.5, temperature=2.0)
    return replace(q, ensembles=replace(q.ensembles, recipe=recipe, train=(above, taught)))


def group(
    p: Params, jobs: list[tuple[str, Config]], seed: int, known: Config, scratch: Path,
    origin: dict[str, str],
) -> str:  # fmt: skip
    """Train configurations of one network, and its student, each into a file of its own."""
    p = seeds.seeded(p, seed)
    images = data.load(p.data, ROOT)
    (scratch / "pieces").mkdir(parents=True, exist_ok=True)
    for label, config in jobs:
        name = piece(label, config, seed)
        path = place(name, scratch)
        row = measured(p, label, config, known, images, scratch / f"seed-{seed}", path) | origin
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
    q = resolved(p, label, config)
    if label == STUDENT:
        above = trained(resolved(p, MEMBERS, known), images, train_many)
        made = student(q, above, images, train_many)
    else:
        made = trained(q, images, train_many)
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


def trained(q: Params, images: data.Dataset, train_many: schemes.TrainMany) -> Ensembled:
    """A configuration, what it starts from included."""
    if not q.ensembles.train:
        (fp32,) = train_many([plans.first_job(q, images, None)])
        return Ensembled(fp32.job.spec, fp32.state, {fp32.job.name: fp32.history})
    plan = plans.plan(q, q.ensembles.train[0], images, *bases(q, images, train_many))
    return schemes.train(plan, train_many)


def student(
    q: Params, teacher: Ensembled, images: data.Dataset, train_many: schemes.TrainMany
) -> Ensembled:
    """The same of one that is taught by a trained ensemble."""
    above, taught = q.ensembles.train
    fp32, bnn = bases(q, images, train_many)
    plan = plans.plan(q, taught, images, fp32, bnn, {above.name: teacher})
    return schemes.train(plan, train_many)


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
    origin = {"commit": commit(), "data": pieces.known["data"]}
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
                pool.submit(group, p, jobs, key[0], teacher(configs), scratch, origin)
                for key, jobs in groups.items() if (key[1] == "after") == after
            ]  # fmt: skip
            for one in as_completed(running):
                print(f"done: {one.result()}", flush=True)
                gather(pieces, scratch, p)


def gather(pieces: Pieces, scratch: Path, p: Params | None = None) -> None:
    """Take in what was trained.

    Args:
        p: by which it has to be trained, as the parameters beside each result say; those of
            `PARAMS` by default. Results that say nothing of their images are older than that.
    """
    p = p or params.load(PARAMS)
    for label, config, seed in wanted(pieces.known["search"]["configs"], MOST):
        path = place(name := piece(label, config, seed), scratch)
        if not path.exists():
            continue
        row = json.loads(path.read_text())[name]
        asked, got = resolved(seeds.seeded(p, seed), label, config), path.with_suffix(".yaml")
        other = [k for k in seeds.SECTIONS if getattr(params.load(got), k) != getattr(asked, k)]
        if row.get("data", pieces.known.get("data")) != pieces.known.get("data"):
            other.append("images")
        if other:
            said = f"expected what {pieces.path} asks for, got other {', '.join(other)}"
            sys.exit(f"{path}: {said}; move it away, or name another file with --json")
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


RANGED = ("ece", "nll")  # beside WORSE: with their range over seeds


def summary(pieces: Pieces, most: int) -> list[Row]:
    if "search" not in pieces:
        return []
    found: dict[str, dict[int, Row]] = {}
    labels: dict[str, list[str]] = {}
    for label, config, seed in wanted(pieces.known["search"]["configs"], most):
        if (name := piece(label, config, seed)) in pieces:
            about = name.rsplit("/", 1)[0]
            found.setdefault(about, {})[seed] = pieces.known[name]
            if label not in labels.setdefault(about, []):
                labels[about].append(label)
    first = next((found[about] for about in found if FIRST in labels[about]), {})
    rows = []
    for about, by_seed in found.items():
        runs = list(by_seed.values())
        names = sorted(labels[about], key=lambda label: label != FIRST)
        row = {
            "label": " = ".join(names), "about": about, "seeds": len(runs),
            "mean": statistics.mean(r["test_top1"] for r in runs),
            "half": 100 * half([right(r) for r in runs]),
            "bytes": max(r["file_bytes"] for r in runs),
            "val": statistics.mean(r["val_top1"] for r in runs),
            **{k: statistics.mean(r[k] for r in runs) for k in ("ram", "minstructions")},
            **{k: [r[k] for r in runs] for k in RANGED},
            **{k: [r["worse"][k] for r in runs] for k in WORSE},
            "anytime": np.mean([r["anytime"] for r in runs], axis=0).tolist(),
            "passes": statistics.mean(r["passes"] for r in runs),
            "hours": statistics.mean(r["cpu_s"] for r in runs) / 3600,
        }  # fmt: skip
        common = first.keys() & by_seed.keys() if FIRST not in labels[about] else ()
        if common:
            each = [right(first[seed]) - right(by_seed[seed]) for seed in common]
            row |= {"difference": 100 * float(np.mean(each)), "common": len(each),
                    "difference_half": 100 * half(each)}  # fmt: skip
        rows.append(row)
    return rows


def half(each: list[np.ndarray]) -> float:
    """Half of the 95 % interval of a mean over images and seeds.

    Images vary around the mean over seeds, and seeds around one another. Student's t, its degrees
    of freedom by Welch and Satterthwaite: those of so many images count as infinite.

    Args:
        each: of every seed, a value an image.
    """
    from scipy import stats

    n = len(each)
    images = np.mean(each, axis=0).var(ddof=1) / len(each[0])
    seeds = statistics.variance(float(values.mean()) for values in each) / n if n > 1 else 0.0
    freedom = (n - 1) * ((images + seeds) / seeds) ** 2 if seeds else math.inf
    return float(stats.t.ppf(0.975, freedom) * math.sqrt(images + seeds))


def spread(half: float, seeds: int) -> str:
    return f"{half:.2f}{' (images only)' if seeds == 1 else ''}"


def ranged(values: list[float], digits: int) -> str:
    """The mean and, of several, the lowest and the highest."""
    mean, *ends = (f"{v:.{digits}f}" for v in (statistics.mean(values), min(values), max(values)))
    return f"{mean} ({' to '.join(ends)})" if len(values) > 1 else mean


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
            "± is a 95 % interval, over images and seeds; of one seed, over images only. *Search "
            "minus this* is over the seeds that both have. *Image passes* are of all that a row "
            "starts from, except a student's teacher; *processor hours* are of what was trained "
            "for this row: what it shares with others of its network and seed (FP32 network, BNN) "
            "counts for whichever came first. The papers' ensembles are on "
            f"{p.model.backbone} of width {p.model.width}, whatever backbone the search found: its "
            "table says how far single networks on both are apart.", "",
            "| what | network | seeds | test, % | search minus this, points | validation, % | "
            "bytes | million image passes | processor hours |",
            "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        ]  # fmt: skip
    for r in sorted(rows, key=lambda r: -r["mean"]):
        less = ""
        if "difference" in r:
            less = f"{r['difference']:+.2f} ± {spread(r['difference_half'], r['common'])}"
        lines.append(
            f"| {r['label']} | {r['about']} | {r['seeds']} | "
            f"{r['mean']:.2f} ± {spread(r['half'], r['seeds'])} | {less} | {r['val']:.2f} | "
            f"{r['bytes']:,} | {r['passes'] / 1e6:.2f} | {r['hours']:.2f} |"
        )
    if rows:
        lines += [
            "", "## What else they differ in", "",
            "On the test images; *noise* is Gaussian of standard deviation 20 (of 255), *blur* a "
            "mean of 3x3 pixels; in brackets the range over seeds, where there are several. RAM "
            "and instructions an image are estimates of Cortex-M4.", "",
            "| what | test, % | with noise | with blur | negative log-likelihood | "
            "calibration error | first 1, 2, .. members | RAM, bytes | million instructions |",
            "| --- | ---: | ---: | ---: | ---: | ---: | --- | ---: | ---: |",
        ]  # fmt: skip
    for r in sorted(rows, key=lambda r: -r["mean"]):
        few = ", ".join(f"{top1:.1f}" for top1 in r["anytime"])
        lines.append(
            f"| {r['label']} | {r['mean']:.2f} | {ranged(r['noise'], 2)} | "
            f"{ranged(r['blur'], 2)} | {ranged(r['nll'], 3)} | {ranged(r['ece'], 3)} | {few} | "
            f"{r['ram']:,.0f} | {r['minstructions']:.2f} |"
        )
    meant = wanted(pieces.known["search"]["configs"], MOST) if "search" in pieces else ()
    missing = sum(piece(*one) not in pieces for one in meant)
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
    ax.set_ylabel("test accuracy, %")
    ax.set_title(f"{p.data.name}{' (JPEG copy)' if p.data.name == 'cifar10' else ''}, "
                 f"{p.search.budget_kib:g} KiB; bars are 95 % intervals, of one seed over images "
                 "only", fontsize=10)  # fmt: skip
    ax.grid(alpha=0.3)
    figure.legend(loc="outside lower center", fontsize=7, ncols=1, frameon=False)
    figure.savefig(path, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--params", type=Path, default=PARAMS)
    parser.add_argument("--seeds", type=int, default=MOST, help="the most of one configuration")
    parser.add_argument("--workers", type=int, default=2, help="processes, a thread each")
    parser.add_argument("--json", type=Path, help="results; in docs/reproduction by default")
    parser.add_argument("--table", action="store_true", help="train nothing")
    args = parser.parse_args()
    p = params.load(args.params)
    results = ROOT / "docs" / "reproduction" / f"{args.params.stem}.json"
    pieces = Pieces(args.json or results)
    scratch = ROOT / "checkpoints" / pieces.path.stem
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
        digest = data.load(p.data, ROOT).digest
        if pieces.known.setdefault("data", digest) != digest:
            parser.error(f"{pieces.path}: expected results of the images in {p.data.name}, got "
                         "those of others; name another file with --json")  # fmt: skip
        if "search" not in pieces:
            pieces["search"] = searched(p, scratch)
        gather(pieces, scratch, p)
        report()
        try:
            train(p, pieces, args.workers, args.seeds, scratch)
        finally:
            gather(pieces, scratch, p)
    report()
    print(pieces.path.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
