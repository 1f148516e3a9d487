"""The storage figures of both papers, counted from the models, beside what is published."""

from __future__ import annotations

import math
from dataclasses import dataclass

from bnncore import storage
from bnncore.networks.backbones import BACKBONES
from bnncore.networks.ensemble import EnsembleSpec
from bnncore.networks.parts import ModelSpec
from bnncore.networks.sharing import SHARING
from bnncore.paper.figures import FiguresError, Published, Size
from bnncore.params import Binarizer
from bnncore.storage import untrained
from bnncore.terminal import columns

Rows = list[list[str]]
OPERATIONS = (("nin", "cifar10"), ("resnet9", "cifar100"), ("fernet", "fer2013"),
              ("resnet20", "cifar10"), ("resnet18", "cifar10"), ("birealnet18", "cifar100"),
              ("reactnet10", "cifar100"))  # fmt: skip
FILES = (
    ("nin", "cifar10", "tentaclenet", 5, "TentacleNet, Table 2"),
    ("resnet9", "cifar100", "tentaclenet", 14, "TentacleNet, Table 2"),
    ("fernet", "fer2013", "tentaclenet", 3, "TentacleNet, Table 2"),
    ("resnet20", "cifar100", "fusion", 10, "Kim et al., Fig. 5A"),
    ("resnet18", "cifar100", "fusion", 10, "Kim et al., Fig. 5B"),
)


def spec(
    backbone: str, dataset: str, kind: str, members: int = 1, sharing: str = "shared_conv"
) -> EnsembleSpec:
    """The structure of a row of the papers, at the papers' width.

    Args:
        kind: ``fp32``, ``bnn``, ``benn`` (nothing shared), ``tentaclenet`` or ``fusion`` (with
            `sharing`).
    """
    image, classes = untrained.SHAPES[dataset]
    model = ModelSpec(backbone, image, classes, binarizer=Binarizer() if kind != "fp32" else None)
    if kind == "tentaclenet":
        classifier = "logits" if backbone == "nin" else "features"
        return EnsembleSpec(model, members, SHARING["tentaclenet"], "sum", classifier)
    if kind == "fusion":
        return EnsembleSpec(model, members, SHARING[sharing])
    return EnsembleSpec(model, members, SHARING["no_shared"], "soft_vote")


@dataclass(frozen=True)
class Counted:
    """A published size and ours.

    Attributes:
        ours: in the paper's unit and precision; NaN where the models have no such thing.
        bits: exactly.
    """

    of: Size
    ours: float
    bits: int

    @property
    def equal(self) -> bool:
        """Whether ours is what the paper prints."""
        return self.ours == self.of.published


def counted(figures: Published) -> list[Counted]:
    """Every published size beside that of the model.

    Raises:
        FiguresError: names a model or a data set that is not here.
    """
    found = []
    for size in figures.sizes:
        if not (size.backbone in BACKBONES and size.dataset in untrained.SHAPES and size.members):
            raise FiguresError(f"{size.table}: expected models and data sets that are here, got "
                               f"{size.members} {size.backbone} on {size.dataset}")  # fmt: skip
        if size.table.startswith("TentacleNet"):
            of = spec(size.backbone, size.dataset, size.kind, size.members)
            bits = storage.tentaclenet_bits(untrained.table(of), of.members)
            found.append(Counted(size, storage.kib(bits), bits))
        else:
            of = spec(size.backbone, size.dataset, "bnn")
            known = storage.by_block(untrained.table(of)).get(size.kind)
            # Table 2 is printed to three digits.
            exact = known is None or size.backbone == "resnet20"
            ours = math.nan if known is None else known if exact else float(f"{known:.2E}")
            found.append(Counted(size, ours, known or 0))
    return found


def tables(figures: Published) -> dict[str, Rows]:
    """Title -> rows, the head first: every published size beside ours, and Figure 7B."""
    found: dict[str, Rows] = {}
    sizes = counted(figures)
    fp32 = {c.of.backbone: c.ours for c in sizes if c.of.kind == "fp32"}
    benn: dict[str, float] = {}
    for c in sizes:
        if c.of.kind == "benn":
            benn[c.of.backbone] = min(c.ours, benn.get(c.of.backbone, math.inf))
    for c in sizes:
        first = c.of.table.startswith("TentacleNet")
        title = f"{c.of.table}: {'KiB, rounded up' if first else 'bits of a binarized network'}"
        head = ["", "published", "ours", "exact bits", "is"]
        if c.of.table == "TentacleNet, Table 2":
            head += ["saved of FP32", "of the smaller BENN", "published saving"]
        row = [c.of.row, _number(c.of.published), _number(c.ours), f"{c.bits:,}",
               "equal" if c.equal else "DIFFERENT"]  # fmt: skip
        if c.of.saving is not None:
            wholes = fp32.get(c.of.backbone, math.nan), benn.get(c.of.backbone, math.nan)
            row += [f"{100 * (1 - c.ours / whole):.1f} %" for whole in wholes]
            row.append(f"{c.of.saving:.1f} %")
        found.setdefault(title, [head]).append(row + [""] * (len(head) - len(row)))
    title = "Kim et al., Figure 7B: bits of M binarized ResNet-20 for CIFAR-100, by sharing"
    found[title] = [["M", *map(str, range(1, 11))]]
    for sharing, curve in curves_7b().items():
        found[title].append([sharing, *(f"{bits:,}" for bits in curve.values())])
    return found


def curves_7b() -> dict[str, dict[int, int]]:
    """Figure 7B: sharing -> M -> bits by the second paper's convention, for M = 1 .. 10."""
    return {
        sharing: {
            m: storage.filter_sharing_bits(
                untrained.table(spec("resnet20", "cifar100", "fusion", m, sharing))
            )
            for m in range(1, 11)
        }
        for sharing in ("no_shared", "shared_conv", "all_frozen", "c1", "c2", "c3", "c3_blocks")
    }


def _number(value: float) -> str:
    return "none" if math.isnan(value) else f"{value:,.0f}"


def report(figures: Published) -> tuple[list[str], bool]:
    """Every storage figure of both papers beside ours, and what surrounds them.

    Returns:
        lines to print, and whether all figures are equal.
    """
    lines: list[str] = []
    for title, rows in tables(figures).items():
        lines += [title, *_indented(rows), ""]
    lines += [*_operations(figures), *_left_out()]
    verdicts = [c.equal for c in counted(figures)]
    lines.append(f"{sum(verdicts)} of {len(verdicts)} figures equal")
    return lines, all(verdicts)


def _indented(rows: Rows) -> list[str]:
    return [f"  {line}" for line in columns(rows, "<>")]


def _operations(figures: Published) -> list[str]:
    rows: Rows = [["", "binary", "float", "M = 1", "M = 10"]]
    totals = {}
    for model, dataset in OPERATIONS:
        one, ten = (untrained.count(spec(model, dataset, "benn", m)) for m in (1, 10))
        totals[model] = one.binary_macs + one.float_macs
        macs = one.binary_macs, one.float_macs, totals[model], ten.binary_macs + ten.float_macs
        rows.append([f"{model} {dataset}", *(f"{count / 1e6:.2f}" for count in macs)])
    told = figures.operations
    return [
        "operations an image: multiply-accumulates of convolutions and dense layer, in millions",
        *_indented(rows),
        f"  ResNet-18 over ResNet-20: {totals['resnet18'] / totals['resnet20']:.1f} "
        f"(the paper: {told['resnet18_over_resnet20']})",
        f"  the paper quotes {told['resnet18'] / 1e6:.0f} M for ResNet-18 from elsewhere; it grows "
        "linearly in M, as ours does",
        "",
    ]


def _left_out() -> list[str]:
    lines = ["what the papers' counts leave out, and what our packed files take (bytes)"]
    for model, dataset, kind, m, note in FILES:
        counts = untrained.count(spec(model, dataset, kind, m))
        paper = counts.tentaclenet if kind == "tentaclenet" else counts.filter_sharing
        rows: Rows = [
            [f"  {name}", f"{shared:,} shared + {m} x", f"{own:,} own"]
            for name, (shared, own) in storage.by_part(counts.entries).items()
        ]
        lines += [
            f"  {model} {kind}, M = {m} ({note}): counted {-(-paper // 8):,}",
            *_indented(rows),
            f"    the whole file: {counts.file_least:,} to {counts.file:,}, as trained values fold",
            "    by layer, all copies: "
            + ", ".join(f"{w.layer} {size:,}" for w, size in storage.by_layer(counts.entries)),
        ]
    return [*lines, ""]
