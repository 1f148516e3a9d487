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

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from bnncore import storage

if TYPE_CHECKING:
    from bnncore.ensemble import EnsembleSpec

FIGURES = Path(__file__).parent.parent / "tests" / "data" / "paper_figures.yaml"
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
    from bnncore.backbones import ModelSpec
    from bnncore.ensemble import SHARING, EnsembleSpec
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
    from bnncore import blueprint

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
                write(f"  {f.row:<28} {_number(f.published):>12} {_number(f.ours):>12} "
                      f"{f.bits:>14,}  {'equal' if f.ours == f.published else 'DIFFERENT'}")  # fmt: skip
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
        write(f"  the paper quotes {quoted['resnet18'] / 1e6:.0f} M for ResNet-18 from elsewhere; it "
              "grows linearly in M, as ours does")  # fmt: skip
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
    from bnncore import blueprint

    return storage.layout_table(blueprint.draw(of).most, of.members)
