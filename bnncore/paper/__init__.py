"""The tables and figures of the two papers, beside ours.

``python -m bnncore.storage --papers`` prints the storage figures (`storage_report`): they need no
training and have to be equal. ``python -m bnncore.paper RESULTS_DIR ...`` collects finished runs
and writes the papers' tables and plots with their accuracies: published value, ours, difference,
epochs, seeds. What has not been run stays blank.

Papers: TentacleNet (2020); Kim, Alnemari and Bagherzadeh, "A storage-efficient ensemble
classification using filter sharing on binarized convolutional neural networks" (2022).

Legend: `M` members.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from bnncore import storage

if TYPE_CHECKING:
    from bnncore.networks.ensemble import EnsembleSpec

FIGURES = Path(__file__).with_name("figures.yaml")
TABLE1 = (("nin", "cifar10"), ("resnet9", "cifar100"), ("fernet", "fer2013"))
TABLE2 = (
    ("nin", {"benn_bagging": 12, "benn_boosting": 8, "tentaclenet": 5}),
    ("resnet9", {"benn_bagging": 30, "benn_boosting": 25, "tentaclenet": 14}),
    ("fernet", {"benn_bagging": 11, "benn_boosting": 26, "tentaclenet": 3}),
)
# Figure 7: what the paper calls each sharing.
FIGURE7 = {
    "no_shared": "no shared",
    "shared_conv": "fusion (shared_conv)",
    "all_frozen": "all frozen",
    "c1": "C1",
    "c2": "C2",
    "c3": "C3, the paper's words",
    "c3_blocks": "C3, the authors' runs (c3_blocks)",
}
# Figure -> (title, backbone, data set, curves: label -> (scheme, sharing)).
SCHEMES = {s: (s, "shared_conv") for s in ("fusion", "voting", "bagging")}
CURVES: dict[str, tuple[str, str, str, dict[str, tuple[str, str]]]] = {
    "5A": ("binarized ResNet-20 on CIFAR-100", "resnet20", "cifar100",
           {**SCHEMES, "gradient_boosting": ("gradient_boosting", "shared_conv")}),
    "5B": ("binarized ResNet-18 on CIFAR-100", "resnet18", "cifar100", SCHEMES),
    "6": ("binarized ResNet-20 on CIFAR-10", "resnet20", "cifar10", SCHEMES),
    "7A": ("what members share: binarized ResNet-20 on CIFAR-100", "resnet20", "cifar100",
           {label: ("fusion", sharing) for sharing, label in FIGURE7.items()}),
    "8": ("Bi-Real-Net-18 on CIFAR-100", "birealnet18", "cifar100", SCHEMES),
    "9": ("ReActNet-10 on CIFAR-100", "reactnet10", "cifar100", SCHEMES),
}  # fmt: skip
SHAPES = {"cifar10": ((32, 32, 3), 10), "cifar100": ((32, 32, 3), 100), "fer2013": ((48, 48, 1), 7)}


class FiguresError(ValueError):
    """The file of published figures, or a results file, is missing or not as expected."""


def published(path: Path = FIGURES) -> dict[str, Any]:
    """The published figures."""
    try:
        found = yaml.safe_load(path.read_text())
        if {"tentaclenet", "filter_sharing"} <= found.keys():
            return found
    except (OSError, yaml.YAMLError, AttributeError) as error:
        raise FiguresError(
            f"{path}: expected the papers' figures, got: {error}; name the file with --expected"
        ) from None
    raise FiguresError(f"{path}: expected sections tentaclenet and filter_sharing, got others")


def spec(
    backbone: str, dataset: str, kind: str, members: int = 1, sharing: str = "shared_conv"
) -> EnsembleSpec:
    """The structure of a row of the papers, at the papers' width.

    Args:
        kind: ``fp32``, ``bnn``, ``benn`` (nothing shared), ``tentaclenet`` or ``fusion`` (with
            `sharing`).
    """
    from bnncore.networks.ensemble import EnsembleSpec
    from bnncore.networks.parts import ModelSpec
    from bnncore.networks.sharing import SHARING
    from bnncore.params import Binarizer

    image, classes = SHAPES[dataset]
    model = ModelSpec(backbone, image, classes, binarizer=Binarizer() if kind != "fp32" else None)
    if kind == "tentaclenet":
        classifier = "logits" if backbone == "nin" else "features"
        return EnsembleSpec(model, members, SHARING["tentaclenet"], "sum", classifier)
    if kind == "fusion":
        return EnsembleSpec(model, members, SHARING[sharing])
    return EnsembleSpec(model, members, SHARING["no_shared"], "soft_vote")


# -- storage figures -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Figure:
    """One storage figure.

    Attributes:
        table: ``tentaclenet 1`` ... ``filter_sharing 2``.
        row: what the table's row is about.
        ours: in the table's unit and precision.
        bits: exactly.
        published: what the paper prints; None where it is not in the file.
    """

    table: str
    row: str
    ours: float
    bits: int
    published: float | None = None


def storage_figures() -> list[Figure]:
    """Every storage figure of both papers, counted from the models."""
    found = []
    for model, dataset in TABLE1:
        for kind in ("fp32", "bnn"):
            bits = _tentaclenet_bits(spec(model, dataset, kind))
            found.append(Figure("tentaclenet 1", f"{model} {kind}", storage.kib(bits), bits))
    datasets = dict(TABLE1)
    for model, templates in TABLE2:
        for template, members in templates.items():
            kind = "tentaclenet" if template == "tentaclenet" else "benn"
            bits = _tentaclenet_bits(spec(model, datasets[model], kind, members))
            row = f"{model} {template} {members}"
            found.append(Figure("tentaclenet 2", row, storage.kib(bits), bits))
    for table, model, sets in (
        ("filter_sharing 1", "resnet20", ("cifar10", "cifar100")),
        ("filter_sharing 2", "resnet18", ("cifar10",)),
    ):
        for dataset in sets:
            for block, bits in storage.by_block(_rows(spec(model, dataset, "bnn"))).items():
                linear = block == "linear"
                if dataset == sets[0] or linear:
                    row = f"{block}_{dataset}" if linear else block
                    # Table 2 is printed to three digits.
                    ours = bits if model == "resnet20" else float(f"{bits:.2E}")
                    found.append(Figure(table, row, ours, bits))
    return found


def _rows(of: EnsembleSpec) -> list[storage.Row]:
    from bnncore.lowering import blueprint

    return storage.table(blueprint.draw(of).most, of.members)


def _tentaclenet_bits(of: EnsembleSpec) -> int:
    return storage.tentaclenet_bits(_rows(of), of.members)


def with_published(figures: list[Figure], expected: dict[str, Any]) -> list[Figure]:
    """`figures` with the published values; those that only the file has are added as nan."""
    values: dict[tuple[str, str], float] = {}
    for row in expected["tentaclenet"]["table1"]:
        values["tentaclenet 1", f"{row['model']} {row['kind']}"] = row["kib"]
    for row in expected["tentaclenet"]["table2"]:
        name = f"{row['model']} {row['template']} {row['members']}"
        values["tentaclenet 2", name] = row["kib"]
    for number in ("1", "2"):
        for name, bits in expected["filter_sharing"][f"table{number}"].items():
            values[f"filter_sharing {number}", name] = bits
    found = [replace(f, published=values.pop((f.table, f.row), None)) for f in figures]
    return found + [Figure(table, row, float("nan"), 0, v) for (table, row), v in values.items()]


def storage_report(expected: Path = FIGURES, write: Callable[[str], None] = print) -> int:
    """Print every storage figure of both papers beside ours, and what surrounds them.

    Returns:
        0 if all are equal, else 1.
    """
    figures = with_published(storage_figures(), published(expected))
    for table in dict.fromkeys(f.table for f in figures):
        paper, number = table.split()
        unit = "KiB, rounded up" if paper == "tentaclenet" else "bits"
        write(f"{'TentacleNet' if paper == 'tentaclenet' else 'Kim et al. 2022'}, Table {number} "
              f"({unit})")  # fmt: skip
        write(f"  {'':<28} {'published':>12} {'ours':>12} {'exact bits':>14}")
        for f in figures:
            if f.table == table:
                verdict = "equal" if f.ours == f.published else "DIFFERENT"
                write(
                    f"  {f.row:<28} {_number(f.published):>12} {_number(f.ours):>12} "
                    f"{f.bits:>14,}  {verdict}"
                )
        write("")
    _savings(figures, write)
    _curves_7b(write)
    _operations(published(expected)["filter_sharing"].get("operations", {}), write)
    _left_out(write)
    equal = sum(f.ours == f.published for f in figures)
    write(f"{equal} of {len(figures)} figures equal")
    return 0 if equal == len(figures) else 1


def _number(value: float | None) -> str:
    if value is None:
        return "none"
    return f"{value:,.0f}" if value == value else "none"


def _savings(figures: list[Figure], write) -> None:
    ours = {f.row: f.ours for f in figures if f.table.startswith("tentaclenet")}
    write("savings of TentacleNet (computed): against FP32, and against the smaller BENN")
    for model, templates in TABLE2:
        names = {t: f"{model} {t} {m}" for t, m in templates.items()}
        kept = ours[names.pop("tentaclenet")]
        benn = min(ours[name] for name in names.values())
        fp32 = ours[f"{model} fp32"]
        write(f"  {model:<10} {templates['tentaclenet']:>3} tentacles: "
              f"{100 * (1 - kept / fp32):5.1f} % {100 * (1 - kept / benn):5.1f} %")  # fmt: skip
    write("")


def curves_7b() -> dict[str, dict[int, int]]:
    """Figure 7B: sharing -> M -> bits by the second paper's convention, for M = 1 .. 10."""
    return {
        sharing: {
            m: storage.filter_sharing_bits(
                _rows(spec("resnet20", "cifar100", "fusion", m, sharing))
            )
            for m in range(1, 11)
        }
        for sharing in FIGURE7
    }


def _curves_7b(write) -> None:
    write("Kim et al. 2022, Figure 7B: bits of M binarized ResNet-20 (CIFAR-100), by sharing")
    write(f"  {'M':<12}" + "".join(f"{m:>11}" for m in range(1, 11)))
    for sharing, curve in curves_7b().items():
        write(f"  {sharing:<12}" + "".join(f"{bits:>11,}" for bits in curve.values()))
    write("")


def _operations(quoted: dict[str, float], write) -> None:
    write("operations an image: multiply-accumulates of convolutions and dense layer, in millions")
    write(f"  {'':<24} {'binary':>10} {'float':>10} {'M = 1':>10} {'M = 10':>10}")
    totals = {}
    for model, dataset in (*TABLE1, ("resnet20", "cifar10"), ("resnet18", "cifar10"),
                           ("birealnet18", "cifar100"), ("reactnet10", "cifar100")):  # fmt: skip
        one, ten = (storage.count(spec(model, dataset, "fusion", m, "no_shared")) for m in (1, 10))
        totals[model] = one.binary_macs + one.float_macs
        write(f"  {model + ' ' + dataset:<24} {one.binary_macs / 1e6:>10.2f} "
              f"{one.float_macs / 1e6:>10.2f} {totals[model] / 1e6:>10.2f} "
              f"{(ten.binary_macs + ten.float_macs) / 1e6:>10.2f}")  # fmt: skip
    ratio = totals["resnet18"] / totals["resnet20"]
    write(f"  ResNet-18 over ResNet-20: {ratio:.1f}"
          + (f" (the paper: {quoted['resnet18_over_resnet20']})" if quoted else ""))  # fmt: skip
    if quoted:
        write(
            f"  the paper quotes {quoted['resnet18'] / 1e6:.0f} M for ResNet-18 from elsewhere; "
            "it grows linearly in M, as ours does"
        )
    write("")


def _left_out(write) -> None:
    write("what the papers' counts leave out, and what our packed files take (bytes)")
    for model, dataset, kind, m, note in (
        ("nin", "cifar10", "tentaclenet", 5, "TentacleNet, Table 2"),
        ("resnet9", "cifar100", "tentaclenet", 14, "TentacleNet, Table 2"),
        ("fernet", "fer2013", "tentaclenet", 3, "TentacleNet, Table 2"),
        ("resnet20", "cifar100", "fusion", 10, "Kim et al., Fig. 5A"),
        ("resnet18", "cifar100", "fusion", 10, "Kim et al., Fig. 5B"),
    ):
        of = spec(model, dataset, kind, m)
        counts = storage.count(of)
        paper = counts.tentaclenet if kind == "tentaclenet" else counts.filter_sharing
        write(f"  {model} {kind}, M = {m} ({note}): counted {-(-paper // 8):,}")
        for name, (shared, own) in storage.by_part(counts.rows).items():
            write(f"    {name:<38} {shared:>10,} shared + {m} x {own:>9,} own")
        write(
            f"    the whole file: {counts.file_least:,} to {counts.file:,}, as trained values fold"
        )
        write("    by layer, all copies: " + ", ".join(
            f"{row['layer']} {row['file_bytes']:,}" for row in _layers(of)))  # fmt: skip
    write("")


def _layers(of: EnsembleSpec) -> list[dict[str, Any]]:
    from bnncore.lowering import blueprint

    return storage.layout_table(blueprint.draw(of).most, of.members)


# -- the reproduction report ---------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """Under what conditions something was run.

    Attributes:
        dataset, backbone: what was trained on what.
        width: channels of the first convolution; None for the paper's.
        subset: fraction of the training images.
        epochs: of the model's own training; None where the run does not say.
    """

    dataset: str
    backbone: str
    width: int | None
    subset: float
    epochs: int | None

    def __str__(self) -> str:
        width = "the paper's width" if self.width is None else f"width {self.width}"
        images = "" if self.subset == 1 else f", {self.subset:.0%} of the images"
        return f"{width}{images}"


@dataclass(frozen=True)
class Run:
    """One finished model.

    Attributes:
        what: (``fp32``,), (``bnn``,) or (scheme, sharing, members).
        top1: test accuracy in percent.
        fp32: that of the FP32 model of the same run, None where there is none.
        file_bytes: of its packed file.
    """

    setting: Setting
    what: tuple[Any, ...]
    seed: int
    top1: float
    fp32: float | None
    file_bytes: int | None


def _found(folder: Path) -> list[Path]:
    # MLflow keeps copies of its own.
    return [f for f in sorted(folder.rglob("results.json")) if "mlruns" not in f.parts]


def collect(folders: Iterable[Path]) -> list[Run]:
    """The finished runs below `folders`: every ``results.json``.

    What a row does not say itself (``dataset``, ``backbone``, ``width``, ``subset``, ``epochs``,
    ``seed``) is taken from the resolved parameters of the run: ``params.yaml`` or
    ``packed/params.yaml`` beside the results or in the folder above.

    Raises:
        FiguresError: a folder without results, or results that cannot be read; names it.
    """
    runs: list[Run] = []
    for folder in folders:
        files = [folder] if folder.is_file() else _found(folder)
        if not files:
            raise FiguresError(f"{folder}: expected a finished run, found no results.json below it")
        for file in files:
            runs += _read(file)
    return runs


def _read(file: Path) -> list[Run]:
    try:
        rows = json.loads(file.read_text())
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ValueError("expected a list of objects")
        known = _parameters(file)
        fp32 = next((r["test_top1"] for r in rows if _what(r) == ("fp32",)), None)
        return [_run(row, known, fp32) for row in rows if row.get("test_top1") is not None]
    except (OSError, ValueError, KeyError, TypeError) as error:
        text = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise FiguresError(f"{file}: expected the results of a run: {text}") from None


def _parameters(file: Path) -> dict[str, Any]:
    for folder in (file.parent, file.parent.parent):
        for path in (folder / "params.yaml", folder / "packed" / "params.yaml"):
            if path.exists():
                return yaml.safe_load(path.read_text())
    return {}


def _what(row: dict[str, Any]) -> tuple[Any, ...]:
    kind = row.get("kind") or (row["name"] if row["name"] in ("fp32", "bnn") else "ensemble")
    return (kind,) if kind != "ensemble" else (row["scheme"], row["sharing"], row["members"])


def _run(row: dict[str, Any], p: dict[str, Any], fp32: float | None) -> Run:
    what = _what(row)
    data, model = p.get("data", {}), p.get("model", {})
    section = {"fp32": p.get("pretrain"), "bnn": p.get("binarize")}.get(what[0])
    if section is None:
        train = p.get("ensembles", {}).get("train", ())
        own: dict[str, Any] = next((e for e in train if e["name"] == row["name"]), {})
        section = {**p.get("ensembles", {}).get("recipe", {}), **(own.get("recipe") or {})}
    backbone = row.get("backbone") or model["backbone"]
    width = row.get("width", model.get("width"))
    if width == _paper_width(backbone):
        width = None
    setting = Setting(
        row.get("dataset") or _dataset(data),
        backbone,
        width,
        float(row.get("subset", data.get("subset", 1.0))),
        row.get("epochs", section.get("epochs")),
    )
    seed = int(row.get("seed", p.get("seed", 0)))
    return Run(setting, what, seed, row["test_top1"], fp32, row.get("file_bytes"))


def _dataset(data: dict[str, Any]) -> str:
    """A folder is taken for the data set that it is named after."""
    return Path(data["path"]).name if data["name"] == "folder" else data["name"]


def _paper_width(backbone: str) -> int | None:
    from bnncore.networks.backbones import BACKBONES

    return BACKBONES[backbone][1] if backbone in BACKBONES else None


@dataclass(frozen=True)
class Line:
    """One line of a table: a published value and ours under one setting.

    Attributes:
        place: ``table 2`` ...
        row: what the value is of.
        unit: of the values.
        published: None where the paper (or its authors' logs) gives no number.
        ours, spread: mean and sample standard deviation over the seeds; None: not run, or one seed.
        seeds: how many; 0: not run.
        setting: None: not run.
        file_bytes: of the packed file; None: not run.
    """

    place: str
    row: str
    unit: str
    published: float | None
    ours: float | None = None
    spread: float | None = None
    seeds: int = 0
    setting: Setting | None = None
    file_bytes: int | None = None

    @property
    def difference(self) -> float | None:
        """Ours minus published."""
        if self.ours is None or self.published is None:
            return None
        return self.ours - self.published


def _lines(
    runs: list[Run],
    place: str,
    row: str,
    dataset: str,
    backbone: str,
    what: tuple[Any, ...],
    value: float | None,
    delta: bool = False,
) -> list[Line]:
    """The lines of one published value: one a setting in which it was run, or a blank one."""
    unit = "points to FP32" if delta else "% top-1"
    found: dict[Setting, list[Run]] = {}
    for run in runs:
        here = (run.setting.dataset, run.setting.backbone, run.what) == (dataset, backbone, what)
        if here and not (delta and run.fp32 is None):
            found.setdefault(run.setting, []).append(run)
    lines = []
    for setting, same in sorted(found.items(), key=lambda item: _nearness(item[0])):
        last = {run.seed: run for run in same}  # a seed that was run twice counts once
        values = [r.top1 - (r.fp32 or 0) if delta else r.top1 for r in last.values()]
        spread = statistics.stdev(values) if len(values) > 1 else None
        size = next((r.file_bytes for r in last.values()), None)
        lines.append(Line(place, row, unit, value, statistics.mean(values), spread, len(values),
                          setting, size))  # fmt: skip
    return lines or [Line(place, row, unit, value)]


def _nearness(setting: Setting) -> tuple:
    """Settings like the paper's first."""
    return (setting.width is not None, -(setting.width or 0), -setting.subset,
            -(setting.epochs or 0))  # fmt: skip


def accuracy_lines(runs: list[Run], figures: dict[str, Any]) -> list[Line]:
    """Every accuracy of both papers, published and ours; then what was run beside."""
    lines: list[Line] = []
    asked = set()

    def add(
        place: str, row: str, dataset: str, backbone: str, what: tuple[Any, ...],
        value: float | None, delta: bool = False,
    ) -> None:  # fmt: skip
        asked.add((dataset, backbone, what))
        lines.extend(_lines(runs, place, row, dataset, backbone, what, value, delta))

    first, second = figures["tentaclenet"], figures["filter_sharing"]
    for row in first["table1"]:
        add(
            "TentacleNet, Table 1",
            f"{row['model']} {row['kind']}",
            row["dataset"],
            row["model"],
            (row["kind"],),
            row["top1"],
        )
    for row in first["table2"]:
        scheme, sharing = {
            "benn_bagging": ("bagging", "no_shared"),
            "benn_boosting": ("boosting", "no_shared"),
            "tentaclenet": ("tentaclenet", "tentaclenet"),
        }[row["template"]]
        what = (scheme, sharing, row["members"])
        add(
            "TentacleNet, Table 2",
            f"{row['model']} {row['template']}, {row['members']}",
            row["dataset"],
            row["model"],
            what,
            row["delta"],
            delta=True,
        )
    for row in first["fig3"]:
        counts = set(row["delta"])
        counts |= {
            run.what[2]
            for run in runs
            if run.what[:1] == ("tentaclenet",) and run.setting.backbone == row["model"]
        }
        for n in sorted(counts):
            what = ("tentaclenet", "tentaclenet", n)
            add(
                "TentacleNet, Figure 3",
                f"{row['model']}, n = {n}",
                row["dataset"],
                row["model"],
                what,
                row["delta"].get(n),
                delta=True,
            )
    for row in second["singles"]:
        add(
            "Kim et al., in the text",
            f"{row['model']} {row['dataset']} {row['kind']}",
            row["dataset"],
            row["model"],
            (row["kind"],),
            row["top1"],
        )
    values = {
        (c["model"], c["dataset"], c["scheme"], c["sharing"]): c["top1"] for c in second["curves"]
    }
    for number, (_, model, dataset, curves) in CURVES.items():
        for label, (scheme, sharing) in curves.items():
            known = values.get((model, dataset, scheme, sharing), {})
            counts = set(known) | {
                run.what[2]
                for run in runs
                if run.what[:2] == (scheme, sharing)
                and (run.setting.backbone, run.setting.dataset) == (model, dataset)
            }
            for m in sorted(counts or {2, 4, 6, 8, 10}):
                add(
                    f"Kim et al., Figure {number}",
                    f"{label}, M = {m}",
                    dataset,
                    model,
                    (scheme, sharing, m),
                    known.get(m),
                )
    for run in runs:
        dataset, backbone, what = key = (run.setting.dataset, run.setting.backbone, run.what)
        if key not in asked:
            name = what[0] if len(what) == 1 else "{}, {}, M = {}".format(*what)
            add("Not in the papers", f"{backbone} {dataset} {name}", *key, None)
    return lines


def report(folders: Sequence[Path], out: Path, expected: Path = FIGURES) -> list[Path]:
    """Write the papers' tables and plots from the finished runs in `folders`.

    Returns:
        The files written: ``paper.md``, ``paper.csv`` and the plots.
    """
    figures = published(expected)
    runs = collect(folders)
    lines = accuracy_lines(runs, figures)
    sizes = with_published(storage_figures(), figures)
    out.mkdir(parents=True, exist_ok=True)
    plots = _plots(lines, figures, out)
    text = _markdown(lines, sizes, figures, [path.name for path in plots])
    (out / "paper.md").write_text(text)
    with open(out / "paper.csv", "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["place", "row", "unit", "published", "ours", "spread", "difference",
                         "seeds", "epochs", "width", "subset", "file_bytes"])  # fmt: skip
        for line in lines:
            s = line.setting
            width = "paper" if s and s.width is None else s.width if s else None
            writer.writerow(
                [line.place, line.row, line.unit, line.published, _round(line.ours),
                 _round(line.spread), _round(line.difference), line.seeds,
                 s.epochs if s else None, width, s.subset if s else None, line.file_bytes]
            )  # fmt: skip
    return [out / "paper.md", out / "paper.csv", *plots]


def _round(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def _cell(value: float | None, sign: bool = False) -> str:
    if value is None:
        return ""
    return f"{value:+.2f}" if sign else f"{value:.2f}"


def _markdown(lines: list[Line], sizes: list[Figure], figures: dict, plots: list[str]) -> str:
    text = [
        "# The papers' tables and figures, and ours",
        "",
        "Accuracies are top-1 in % on the test images (Table 2 and Figure 3 of TentacleNet: points",
        "above the FP32 model of the same run). Ours are means over seeds, with the standard",
        "deviation where there are several. What is blank has not been run, or has no published",
        "number.",
        "The second paper's curves are the last epoch of its authors' published runs.",
        "",
    ]
    for place in dict.fromkeys(line.place for line in lines):
        here = [line for line in lines if line.place == place]
        text += [f"## {place}", ""]
        name = _plot_name(place)
        if name in plots:
            text += [f"![{place}]({name})", ""]
        text += ["| | published | ours | difference | epochs | seeds | setting | file, bytes |",
                 "| --- | ---: | ---: | ---: | ---: | ---: | --- | ---: |"]  # fmt: skip
        for line in here:
            delta = line.unit != "% top-1"
            ours = _cell(line.ours, delta)
            if line.spread is not None:
                ours += f" ± {line.spread:.2f}"
            s = line.setting
            cells = [
                line.row, _cell(line.published, delta), ours, _cell(line.difference, True),
                str(s.epochs) if s and s.epochs is not None else "", str(line.seeds or ""),
                str(s) if s else "", f"{line.file_bytes:,}" if line.file_bytes else "",
            ]  # fmt: skip
            text.append("| " + " | ".join(cells) + " |")
        text.append("")
        if place.startswith("TentacleNet, Table"):
            text += _size_table(place[-1], sizes, figures)
    text += _storage_tables(sizes)
    text += ["## Kim et al., Figure 7B", "", f"![Figure 7B]({_plot_name('Figure 7B')})", "",
             "Bits of M binarized ResNet-20 for CIFAR-100, computed from the model.", "",
             "| M | " + " | ".join(map(str, range(1, 11))) + " |",
             "| --- |" + " ---: |" * 10]  # fmt: skip
    for sharing, curve in curves_7b().items():
        text.append(f"| {sharing} | " + " | ".join(f"{bits:,}" for bits in curve.values()) + " |")
    return "\n".join(text) + "\n"


def _size_table(number: str, sizes: list[Figure], figures: dict) -> list[str]:
    """Sizes of Table 1 or 2 of the first paper, and the savings."""
    savings = {
        f"{r['model']} {r['template']} {r['members']}": r["saving"]
        for r in figures["tentaclenet"]["table2"]
        if "saving" in r
    }
    ours = {f.row: f.ours for f in sizes if f.table == "tentaclenet 2"}
    text = ["Sizes, counted from the models as the paper counts:", "",
            "| | published, KiB | ours, KiB | published saving | our saving |",
            "| --- | ---: | ---: | ---: | ---: |"]  # fmt: skip
    for f in sizes:
        if f.table != f"tentaclenet {number}":
            continue
        saving = ""
        if f.row in savings:
            model = f.row.split()[0]
            benn = min(v for row, v in ours.items() if row.startswith(f"{model} benn"))
            saving = f"{100 * (1 - f.ours / benn):.1f} %"
        told = f"{savings[f.row]:.1f} %" if f.row in savings else ""
        text.append(f"| {f.row} | {_number(f.published)} | {_number(f.ours)} | {told} | {saving} |")
    return [*text, ""]


def _storage_tables(sizes: list[Figure]) -> list[str]:
    text = []
    for number, model in (("1", "ResNet-20"), ("2", "ResNet-18")):
        text += [f"## Kim et al., Table {number}", "", f"Bits of binarized {model}.", ""]
        text += ["| block | published | ours | exact |", "| --- | ---: | ---: | ---: |"]
        for f in sizes:
            if f.table == f"filter_sharing {number}":
                text.append(f"| {f.row} | {_number(f.published)} | {_number(f.ours)} | "
                            f"{f.bits:,} |")  # fmt: skip
        text.append("")
    return text


def _plot_name(place: str) -> str:
    return place.split("Figure ")[-1].lower().join(("figure_", ".png"))


# Okabe and Ito's palette, told apart by the colour-blind too.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#4d4d4d")
MARKERS = "os^Dv<P"


def _plots(lines: list[Line], figures: dict[str, Any], out: Path) -> list[Path]:
    import matplotlib

    matplotlib.use("Agg")
    written = [_plot_7b(out)]
    places = dict.fromkeys(line.place for line in lines if "Figure" in line.place)
    for place in places:
        here = [line for line in lines if line.place == place]
        if any(line.published is not None or line.ours is not None for line in here):
            written.append(_plot(place, here, lines, out))
    return written


def _canvas(title: str, x: str, y: str):
    from matplotlib.figure import Figure as Canvas
    from matplotlib.ticker import MaxNLocator

    canvas = Canvas(figsize=(10, 4.8), layout="constrained")
    axes = canvas.subplots()
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return canvas, axes


def _plot(place: str, here: list[Line], lines: list[Line], out: Path) -> Path:
    """Published values dashed and hollow, ours solid and filled, with the spread over seeds."""
    delta = here[0].unit != "% top-1"
    number = place.split("Figure ")[-1]
    title = place if delta else f"{place}: {CURVES[number][0]}"
    canvas, axes = _canvas(
        title,
        "tentacles" if delta else "members M",
        "top-1 minus FP32's, points" if delta else "top-1, %",
    )
    labels = dict.fromkeys(line.row.rpartition(", ")[0] for line in here)
    settings = dict.fromkeys(str(line.setting) for line in here if line.setting)
    # Settings share the colour of their scheme, and differ in how dark they are.
    shades = {name: 1 - 0.6 * k / max(1, len(settings) - 1) for k, name in enumerate(settings)}
    for index, label in enumerate(labels):
        style = {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]}
        same = [line for line in here if line.row.rpartition(", ")[0] == label]
        told = {_members(line): line.published for line in same if line.published is not None}
        if told:
            # Figure 3's few known points are not joined: between them the paper gives no numbers.
            axes.plot(list(told), list(told.values()), fillstyle="none",
                      linestyle="none" if delta else "--",
                      label=f"{label}, published", **style)  # fmt: skip
        for setting in dict.fromkeys(line.setting for line in same if line.setting):
            ours = [line for line in same if line.setting == setting]
            about = f"{setting}, {setting.epochs} epochs" if setting.epochs else str(setting)
            axes.errorbar([_members(line) for line in ours], [line.ours for line in ours],
                          [line.spread or 0 for line in ours], capsize=3,
                          label=f"{label}, ours: {about}", alpha=shades[str(setting)],
                          **style)  # fmt: skip
    if delta:
        axes.axhline(0, color="black", linestyle=":", linewidth=1)
    else:
        _, model, dataset, _ = CURVES[number]
        single = f"{model} {dataset} bnn"
        for line in (line for line in lines if line.row == single):
            if line.published is not None:
                axes.axhline(line.published, color="black", linestyle=":", linewidth=1,
                             label="one BNN, published")  # fmt: skip
            if line.ours is not None:
                axes.axhline(line.ours, color="black", linewidth=1,
                             alpha=shades.get(str(line.setting), 1),
                             label=f"one BNN, ours: {line.setting}")  # fmt: skip
    handles, names = axes.get_legend_handles_labels()
    unique = dict(zip(names, handles, strict=True))
    canvas.legend(unique.values(), unique.keys(), fontsize=8, loc="outside right upper")
    path = out / _plot_name(place)
    canvas.savefig(path, dpi=120)
    return path


def _members(line: Line) -> int:
    return int(line.row.rpartition("= ")[2])


def _plot_7b(out: Path) -> Path:
    canvas, axes = _canvas(
        "Kim et al., Figure 7B: storage of M binarized ResNet-20 (computed)",
        "members M", "kilobits, weights only",
    )  # fmt: skip
    for index, (sharing, curve) in enumerate(curves_7b().items()):
        axes.plot(list(curve), [bits / 1000 for bits in curve.values()], label=FIGURE7[sharing],
                  color=COLOURS[index], marker=MARKERS[index], markersize=4)  # fmt: skip
    canvas.legend(fontsize=8, loc="outside right upper")
    path = out / _plot_name("Figure 7B")
    canvas.savefig(path, dpi=120)
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m bnncore.paper",
        description="The papers' tables and plots, with the accuracies of finished runs beside.",
    )
    parser.add_argument("results", nargs="*", type=Path, metavar="RESULTS_DIR",
                        help="folders with results.json somewhere below")  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("reports/paper"), metavar="DIR")
    parser.add_argument("--expected", type=Path, default=FIGURES, metavar="FILE",
                        help="the published figures (default: those of the tests)")  # fmt: skip
    options = parser.parse_args(arguments)
    try:
        for path in report(options.results, options.out, options.expected):
            print(path)
    except (FiguresError, OSError) as error:
        print(f"paper: {error}", file=sys.stderr)
        return 1
    return 0
