"""What each recipe and each piece of a backbone is worth, one by one.

    python benchmarks/ablation.py [--seeds 201 202 203] [--data digits cifar10] [--json FILE]

For each data set and seed (of the split and of all training) it trains a lean ResNet-8, in FP32 and
from that the BNN once for each row below: the base, and the base with one thing changed. Then all
that helped together: of each group the best row, if its mean gain over the seeds is above their
standard deviation.
Last come ensembles, on digits: with and without a teacher, and single students of one. Accuracies
are of the validation part; the test part is not looked at.

Rows that the JSON file holds already are not trained again, so it can be stopped and started; it
is written after each. A row of other parameters, or a data set of other images, is refused; all
that helped is trained anew once it is made of something else. The table and the plot stand beside
it. CIFAR-10 is looked for in BNNCORE_DATA and left out where it is not.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from bnncore import data, params
from bnncore.data import Dataset
from bnncore.lowering import blueprint
from bnncore.networks.ensemble import EnsembleSpec
from bnncore.params import Params
from bnncore.training import loop, plans, schemes
from bnncore.training.ensembled import Ensembled
from bnncore.training.jobs import State

Row = dict[str, Any]
Change = dict[str, Any]  # of the binarizer under its own keys, of the recipe under "recipe"

SETTINGS: dict[str, dict[str, Any]] = {
    "digits": {
        "data": {"name": "digits"},
        "width": 8,
        "recipe": {"epochs": 30, "batch_size": 64, "lr": 0.01},
    },
    "cifar10": {
        "data": {"name": "cifar10", "subset": 0.1, "size": 16, "val_fraction": 0.06},
        "width": 16,
        "recipe": {"epochs": 10, "batch_size": 64, "lr": 0.01, "augment": "crop_flip", "pad": 2},
    },
}
# (group, name): what changes. Of a group at most one row goes into what is put together.
SINGLE: dict[tuple[str, str], Change] = {
    ("", "base"): {},
    ("scale", "no scales (weight: sign)"): {"weight": "sign"},
    ("scale", "learned scales"): {"weight": "learned"},
    ("gradient", "bireal gradient"): {"activation": "bireal"},
    ("stem", "binary stem"): {"stem": "binary"},
    ("head", "binary head"): {"head": "binary"},
    ("act", "PReLU"): {"act": "prelu"},
    ("act", "RPReLU"): {"act": "rprelu"},
    ("shift", "RSign"): {"shift": True},
    ("schedule", "cosine"): {"recipe": {"schedule": "cosine"}},
    ("warmup", "warm-up, 3 epochs"): {"recipe": {"warmup": 3}},
    ("optimizer", "AdamW, decay 0.01"): {"recipe": {"optimizer": "adamw", "weight_decay": 0.01}},
    ("smoothing", "label smoothing 0.1"): {"recipe": {"label_smoothing": 0.1}},
    ("distill", "distill 0.5, T 2"): {"recipe": {"distill": 0.5, "temperature": 2.0}},
    ("distill", "distill 0.9, T 4"): {"recipe": {"distill": 0.9, "temperature": 4.0}},
    ("steps", "two steps"): {"recipe": {"two_step": True}},
}
SHARED: Row = {"scheme": "fusion", "members": 3, "sharing": "no_shared", "start": "bnn"}
ALONE: Row = {"scheme": "fusion", "members": 1, "sharing": "no_shared", "start": "bnn"}
TAUGHT: Row = {"distill": 0.5, "temperature": 2.0}
ENSEMBLES: list[Row] = [
    {"name": "fusion-3", **SHARED},
    {"name": "fusion-3-fp32", **SHARED, "recipe": TAUGHT},
    {"name": "fusion-3-itself", **SHARED, "recipe": TAUGHT, "teacher": "ensemble"},
    {"name": "again", **ALONE},  # as long as a student, without a teacher
    {"name": "student-of-fp32", **ALONE, "recipe": TAUGHT},
    {"name": "student-of-fusion-3", **ALONE, "recipe": TAUGHT, "teacher": "fusion-3"},
]
TOGETHER = "all that helped"


def parsed(setting: dict[str, Any], seed: int, change: Change) -> Params:
    recipe = setting["recipe"]
    binarizer = {key: value for key, value in change.items() if key != "recipe"}
    return params.parse(
        {
            "seed": seed,
            "data": {**setting["data"], "seed": seed},
            "model": {
                "backbone": "leanresnet8", "width": setting["width"], "binarizer": binarizer,
            },
            "pretrain": recipe,
            "binarize": {**recipe, **change.get("recipe", {})},
            "ensembles": {"recipe": recipe, "train": ENSEMBLES},
            "pack": {"affine": "float16", "weights": "int8"},
        }
    )  # fmt: skip


@lru_cache(maxsize=2)
def pretrained(name: str, seed: int) -> tuple[Dataset, State]:
    p = parsed(SETTINGS[name], seed, {})
    images = data.load(p.data)
    (fp32,) = loop.train_many([plans.first_job(p, images, None)], images)
    return images, fp32.state


def measured(p: Params, spec: EnsembleSpec, epoch: Any, classes: tuple[str, ...]) -> Row:
    """What is kept of a trained model: percent, nats, the most bytes its packed file can have."""
    size = blueprint.file_bound(spec, p.pack, classes)
    found = {key: epoch[key] for key in ("train_top1", "val_top1", "val_loss")}
    return {**found, "file_bytes": size}


def single(name: str, seed: int, change: Change) -> Row:
    p = parsed(SETTINGS[name], seed, change)
    images, fp32 = pretrained(name, seed)
    (bnn,) = loop.train_many([plans.first_job(p, images, fp32)], images)
    return measured(p, bnn.job.spec, bnn.history[-1], images.classes)


def ensembles(name: str, seed: int) -> Iterator[tuple[str, Row]]:
    p = parsed(SETTINGS[name], seed, {})
    images, fp32 = pretrained(name, seed)
    many = partial(loop.train_many, data=images)
    (bnn,) = many([plans.first_job(p, images, fp32)])
    trained: dict[str, Ensembled] = {}
    for section in p.ensembles.train:
        made = schemes.train(plans.plan(p, section, images, fp32, bnn.state, trained), many)
        trained[section.name] = made
        (history,) = made.histories.values()
        yield section.name, measured(p, made.spec, history[-1], images.classes)


def gains(rows: list[Row], name: str, row: str, key: str = "val_top1") -> list[float]:
    """What `key` is in a row of data set `name`, less what it is in the base: seed by seed."""
    base, mine = (
        {r["seed"]: r[key] for r in rows if r["data"] == name and r["row"] == which}
        for which in ("base", row)
    )
    return [mine[seed] - base[seed] for seed in sorted(mine.keys() & base.keys())]


def together(rows: list[Row], name: str) -> tuple[list[str], Change]:
    """The best row of each group, if its mean gain is above its deviation: names, and changes."""
    best: dict[str, tuple[float, str, Change]] = {}
    for (group, row), change in SINGLE.items():
        each = gains(rows, name, row)
        gain = statistics.mean(each)
        if gain > spread(each) and gain > (best[group][0] if group in best else 0):
            best[group] = gain, row, change
    merged: Change = {"recipe": {}}
    for _, _, change in best.values():
        merged["recipe"] |= change.get("recipe", {})
        merged |= {key: value for key, value in change.items() if key != "recipe"}
    return [row for _, row, _ in best.values()], merged


def run(found: dict[str, Any], names: list[str], seeds: list[int], path: Path) -> None:
    rows: list[Row] = found["rows"]

    def known(name: str, seed: int, row: str, change: Change) -> bool:
        mine = [r for r in rows if (r["data"], r["seed"], r["row"]) == (name, seed, row)]
        if mine and mine[0]["of"] != params.digest(SETTINGS[name], change):
            sys.exit(f"{path}: expected {row!r} of {name}, seed {seed}, by these parameters, got "
                     "it by others; name another file with --json")  # fmt: skip
        return bool(mine)

    def add(name: str, seed: int, row: str, change: Change, values: Row) -> None:
        of = params.digest(SETTINGS[name], change)
        rows.append({"data": name, "seed": seed, "row": row, "of": of, **values})
        path.write_text(json.dumps(found, indent=1) + "\n")
        print(f"{time.process_time():6.0f} s {name} {seed} {row:>24}: {values['val_top1']:.2f} %")

    for name in names:
        for seed in seeds:
            for (_, row), change in SINGLE.items():
                if not known(name, seed, row, change):
                    add(name, seed, row, change, single(name, seed, change))
        helped, change = together(rows, name)
        rows[:] = [r for r in rows if r["data"] != name or r.get("made_of", helped) == helped]
        for seed in seeds:
            if not known(name, seed, TOGETHER, change):
                values = single(name, seed, change)
                add(name, seed, TOGETHER, change, {**values, "made_of": helped})
    for name in set(names) & {"digits"}:  # on one core the other would take half a day
        sections = {section["name"]: section for section in ENSEMBLES}
        for seed in seeds:
            if not all(known(name, seed, row, section) for row, section in sections.items()):
                for row, values in ensembles(name, seed):
                    if not known(name, seed, row, sections[row]):
                        add(name, seed, row, sections[row], values)


def spread(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def markdown(rows: list[Row]) -> str:
    lines = [
        "# What each recipe is worth",
        "",
        "`python benchmarks/ablation.py`: a lean ResNet-8, validation accuracy in percent, means "
        "over seeds. *Gain* is over the base with the same seed, with its standard deviation over "
        "seeds; *loss* the same of the validation cross entropy, less is better. *Bytes* is the "
        "most that the packed file can have (float16, int8).",
    ]
    for name in dict.fromkeys(r["data"] for r in rows):
        setting = SETTINGS[name]
        recipe = ", ".join(f"{k} {v}" for k, v in setting["recipe"].items())
        where = ", ".join(f"{k} {v}" for k, v in setting["data"].items() if k != "name")
        seeds = sorted({r["seed"] for r in rows if r["data"] == name})
        lines += ["", f"## {name}{f' ({where})' if where else ''}, width {setting['width']}", ""]
        lines += [f"Recipe: {recipe}. Seeds: {', '.join(map(str, seeds))}.", ""]
        lines += ["| row | top-1 | gain | loss | train | bytes |", "| --- | " + "---: | " * 5]
        for row in dict.fromkeys(r["row"] for r in rows if r["data"] == name):
            mine = [r for r in rows if r["data"] == name and r["row"] == row]
            gain, loss = (gains(rows, name, row, key) for key in ("val_top1", "val_loss"))
            means = [statistics.mean(r[k] for r in mine) for k in ("val_top1", "train_top1")]
            cells = [
                row, f"{means[0]:.2f}",
                f"{statistics.mean(gain):+.2f} ± {spread(gain):.2f}" if row != "base" else "",
                f"{statistics.mean(loss):+.3f}" if row != "base" else "",
                f"{means[1]:.1f}", f"{max(r['file_bytes'] for r in mine):,}",
            ]  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
        made = next((r["made_of"] for r in rows if r["data"] == name and "made_of" in r), None)
        if made is not None:
            lines += ["", f"All that helped: {', '.join(made) or 'nothing'}."]
    return "\n".join(lines) + "\n"


def plot(rows: list[Row], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = list(dict.fromkeys(r["data"] for r in rows))
    figure, axes = plt.subplots(1, len(names), figsize=(6 * len(names), 6), squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        found = dict.fromkeys(r["row"] for r in rows if r["data"] == name and r["row"] != "base")
        each = {row: gains(rows, name, row) for row in reversed(found)}
        means = [statistics.mean(values) for values in each.values()]
        axis.barh(list(each), means, xerr=[spread(v) for v in each.values()], color="#8ab")
        for at, values in enumerate(each.values()):
            axis.plot(values, [at] * len(values), ".", color="#345")
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_xlabel("gain over the base, points of validation accuracy")
        axis.set_title(name)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[201, 202, 203])
    parser.add_argument("--data", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--table", action="store_true", help="train nothing; write what is known")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = {"images": {}, "rows": []}  # their digests (null: not known), results
    if args.json.exists():
        found = json.loads(args.json.read_text())
    rows: list[Row] = found["rows"]
    names = []
    for name in () if args.table else args.data:
        try:
            images = data.load(parsed(SETTINGS[name], 0, {}).data).digest
        except data.DataError as error:
            print(f"{name} is left out: {error}")
            continue
        if found["images"].setdefault(name, images) != images:
            parser.error(f"{args.json}: expected results of the images of {name} that there are, "
                         "got others or unknown ones; name another file with --json")  # fmt: skip
        names.append(name)
    run(found, names, args.seeds, args.json)
    if rows:
        args.json.with_suffix(".md").write_text(markdown(rows))
        plot(rows, args.json.with_suffix(".png"))
        print(markdown(rows))


if __name__ == "__main__":
    main()
