"""What an ensemble takes to store: one table of tensors, and three counts over it.

`table` lists every tensor of a `Program` with its layer, kind, role and copies. Three sums over it
have a name:

============== ====================================================================================
tentaclenet    the first paper's (TentacleNet, 2020, Tables 1 and 2): weights and biases of
               convolutions and dense layers; 1 bit each in binary layers, 32 bits each in others.
               In a TentacleNet's classifier block every tentacle counts K * C weights and C biases
               where the backbone has a dense layer; where it has none, the last 1x1 convolution
               counts once and the dense layer that mixes the logits not at all. Shown in KiB,
               rounded up.
filter_sharing the second paper's (Kim et al. 2022, Tables 1 and 2): weights only, 1 bit each in
               binary layers, 32 bits each in others. Shown in bits.
file           everything that the packed file holds: also scales, shifts, slopes, thresholds
               and their directions, vote weights, the graph and the header. Shown in bytes.
============== ====================================================================================

Everything here counts Programs with numpy alone. Programs that are not trained yet come from
`lowering.blueprint` (torch, imported only when asked for): `count`, `file_bound`, and the command
line's ``--papers`` and ``--params``.

Legend: `M` members, `O C kh kw` filters, `K` features of a dense layer, `C` classes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bnncore.packed import execute, packfile
from bnncore.packed.program import KINDS, Program

if TYPE_CHECKING:
    from bnncore.networks.ensemble import EnsembleSpec
    from bnncore.params import PackParams

FOLDED = "folded"  # the kind of a bias that only a threshold remembers: no bits in the file
COUNTED_ROLES = ("weight", "bias")


@dataclass(frozen=True)
class Row:
    """One entry of the table of tensors.

    Attributes:
        layer: the trained layer's name; ``combine`` for what joins the members.
        slot: what the operator calls the tensor.
        role: `program.Tensor.role`.
        kind: a key of `program.KINDS`, or `FOLDED`.
        shape: of one copy.
        binary: whether the layer's weights are binary.
        own: whether each member has its own.
        copies: M where own, else 1.
    """

    layer: str
    slot: str
    role: str
    kind: str
    shape: tuple[int, ...]
    binary: bool
    own: bool
    copies: int

    @property
    def elements(self) -> int:
        """Values in one copy."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def counted_bits(self) -> int:
        """Bits of all copies as both papers count: 1 a value of a binary layer, else 32."""
        return self.elements * self.copies * (1 if self.binary else 32)

    @property
    def copy_bytes(self) -> int:
        """Bytes of one copy in the packed file."""
        if self.kind == FOLDED:
            return 0
        if self.kind == "binary":
            return -(-self.elements // 8)
        return self.elements * KINDS[self.kind].itemsize

    @property
    def file_bytes(self) -> int:
        """Bytes of all copies in the packed file."""
        return self.copy_bytes * self.copies


def table(program: Program, members: int | None = None) -> list[Row]:
    """Every tensor of `program`, in the order of its nodes, as if it had `members` members."""
    m = program.members if members is None else members
    tensors = program.tensors
    weights = [n for n in program.nodes if n.op in ("conv", "bconv", "dense")]
    binary = {n.name: tensors[n.tensors["weight"]].kind == "binary" for n in weights}
    folded = {n.name for n in weights if "biases" in n.attrs}
    rows = []
    for node in program.nodes:
        for slot, name in node.tensors.items():
            t = tensors[name]
            # Biases of these layers are counted below, from what the layer had when trained.
            role = "shift" if t.role == "bias" and node.name in folded else t.role
            rows.append(
                Row(node.name, slot, role, t.kind, tuple(t.shape), binary.get(node.name, False),
                    t.own, m if t.own else 1)
            )  # fmt: skip
        biases = int(node.attrs.get("biases", 0))
        if biases:
            own = tensors[node.tensors["weight"]].own
            rows.append(
                Row(node.name, "bias", "bias", FOLDED, (biases,), True, own, m if own else 1)
            )
    for slot, name in program.combine_tensors.items():
        t = tensors[name]
        shape = (m,) if slot == "weight" else tuple(t.shape)
        rows.append(Row("combine", slot, t.role, t.kind, shape, False, False, 1))
    return rows


def tentaclenet_bits(rows: Iterable[Row], members: int) -> int:
    """Bits by the first paper's convention, its quirks included."""
    rows = list(rows)
    mixed = any(_mixing(row) for row in rows)
    total = sum(r.counted_bits for r in rows if r.role in COUNTED_ROLES and not _mixing(r))
    if not mixed:
        # The dense layer over N * K features has C biases; the paper counts N * C.
        total += sum(
            members * row.counted_bits
            for row in rows
            if row.layer == "combine" and row.slot == "bias"
        )
    return total


def filter_sharing_bits(rows: Iterable[Row]) -> int:
    """Bits by the second paper's convention."""
    return sum(row.counted_bits for row in rows if row.role == "weight")


def _mixing(row: Row) -> bool:
    return row.layer.split(".")[0] == "mix"


def kib(bits: int) -> int:
    """KiB, rounded up, as the first paper prints sizes (it writes kB)."""
    return -(-bits // (8 * 1024))


def block(layer: str) -> str:
    """The block of the papers' tables that a layer belongs to: conv1, layer1 .., linear."""
    part, _, rest = layer.partition(".")
    if part == "body":
        return rest.partition(".")[0]
    return {"stem": "conv1", "head": "linear", "mix": "mixing"}.get(part, part)


@dataclass(frozen=True)
class Count:
    """What one ensemble takes.

    Attributes:
        members: M.
        tentaclenet: bits by the first paper's convention.
        filter_sharing: bits by the second paper's convention.
        file: bytes of the packed file; of one not trained yet, the most it can take.
        file_least: the same; of one not trained yet, the least.
        binary_macs, float_macs: multiply-accumulates for one image, all members.
        rows: the table that was counted.
    """

    members: int
    tentaclenet: int
    filter_sharing: int
    file: int
    file_least: int
    binary_macs: int
    float_macs: int
    rows: tuple[Row, ...]

    @property
    def kib(self) -> int:
        """KiB by the first paper's convention."""
        return kib(self.tentaclenet)


def counted(program: Program, file_bytes: int | None = None) -> Count:
    """The counts of a trained Program.

    Args:
        file_bytes: the size of its file, where there is one.
    """
    rows = table(program)
    size = len(packfile.encode(program)) if file_bytes is None else file_bytes
    macs = execute.cost(program)
    m = program.members
    return Count(m, tentaclenet_bits(rows, m), filter_sharing_bits(rows), size, size, *macs,
                 tuple(rows))  # fmt: skip


def count(
    spec: EnsembleSpec,
    pack: PackParams | None = None,
    classes: Sequence[str] | None = None,
    info: dict[str, Any] | None = None,
) -> Count:
    """The counts of an ensemble before it is trained; see `blueprint.file_range` for `file`.

    Args:
        spec: the ensemble.
        pack: what its file keeps; the defaults where None.
        classes, info: what the file will say of itself; room for usual ones where None.
    """
    from bnncore.lowering import blueprint

    drawn = blueprint.draw(spec)
    rows = table(drawn.most, spec.members)
    least, most = blueprint.file_range(spec, pack, classes, info)
    return Count(
        spec.members,
        tentaclenet_bits(rows, spec.members),
        filter_sharing_bits(rows),
        most,
        least,
        *drawn.macs(spec.members),
        tuple(rows),
    )


def file_bound(
    spec: EnsembleSpec,
    pack: PackParams | None = None,
    classes: Sequence[str] | None = None,
    info: dict[str, Any] | None = None,
) -> int:
    """The most bytes that the packed file of `spec` can take, known before it is trained."""
    from bnncore.lowering import blueprint

    return blueprint.file_bound(spec, pack, classes, info)


def layout_table(program: Program, members: int | None = None) -> list[dict[str, Any]]:
    """Bits by layer in the papers' layout.

    Returns:
        One dict a layer with weights, in forward order: ``block``, ``layer``, ``shape`` (of the
        weights), ``kind`` (binary or float32), ``own``, ``bits`` (of one copy's weights, as both
        papers count), ``bias_bits`` (of one copy), ``copies``, ``total`` (weights of all copies)
        and ``file_bytes`` (everything the file holds for the layer, all copies; where batch norm
        and activation were folded into a threshold they count to the layer before).
    """
    rows = table(program, members)
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row.role == "weight":
            found[row.layer] = {
                "block": block(row.layer),
                "layer": row.layer,
                "shape": row.shape,
                "kind": "binary" if row.binary else "float32",
                "own": row.own,
                "bits": row.counted_bits // row.copies,
                "bias_bits": 0,
                "copies": row.copies,
                "total": row.counted_bits,
                "file_bytes": 0,
            }
    last = next(iter(found), "")
    for row in rows:
        last = row.layer if row.layer in found else last
        if row.role == "bias" and row.layer in found:
            found[row.layer]["bias_bits"] = row.counted_bits // row.copies
        if row.layer != "combine":
            found[last]["file_bytes"] += row.file_bytes
    return list(found.values())


def by_block(rows: Iterable[Row]) -> dict[str, int]:
    """Block -> bits by the second paper's convention, as its Tables 1 and 2 list them."""
    total: dict[str, int] = {}
    for row in rows:
        if row.role == "weight":
            name = block(row.layer)
            total[name] = total.get(name, 0) + row.counted_bits
    return total


# Roles in the words of the printed breakdown.
PARTS = {
    "weight": "weights",
    "weight_scale": "scales of narrowed weights",
    "bias": "biases",
    "scale": "batch norm and XNOR scales",
    "shift": "batch norm and ReAct shifts",
    "slope": "PReLU slopes",
    "threshold": "thresholds",
    "direction": "directions of thresholds",
    "input": "normalisation of the input",
    "combine": "votes and biases of the combination",
}


def by_part(rows: Iterable[Row]) -> dict[str, tuple[int, int]]:
    """Part of `PARTS` -> (bytes that are shared, bytes of one member's own)."""
    total: dict[str, tuple[int, int]] = {}
    for row in rows:
        if row.kind == FOLDED:
            continue
        name = f"binary {PARTS[row.role]}" if row.kind == "binary" and row.role == "weight" else (
            PARTS[row.role]
        )  # fmt: skip
        shared, own = total.get(name, (0, 0))
        if row.own:
            own += row.copy_bytes
        else:
            shared += row.copy_bytes
        total[name] = shared, own
    return total


# -- the command line ------------------------------------------------------------------------------


def print_count(counts: Count, layout: list[dict[str, Any]], write=print) -> None:
    """One ensemble: bits by layer in the papers' layout, the counted totals, bytes of the file."""
    width = max([len(row["layer"]) for row in layout] + [5])
    write(f"{'layer':<{width}}  {'weights':>16}  {'kind':<7}  {'':<6}  {'bits a copy':>12} "
          f"{'copies':>6} {'bits':>12} {'file bytes':>11}")  # fmt: skip
    for row in layout:
        shape = "x".join(map(str, row["shape"]))
        owner = "own" if row["own"] else "shared"
        write(
            f"{row['layer']:<{width}}  {shape:>16}  {row['kind']:<7}  {owner:<6}  "
            f"{row['bits']:>12,} {row['copies']:>6} {row['total']:>12,} {row['file_bytes']:>11,}"
        )
    m = counts.members
    write(f"counted as TentacleNet does    {counts.tentaclenet:>13,} bits = {counts.kib:,} KiB")
    write(f"counted as Kim et al. do       {counts.filter_sharing:>13,} bits")
    write(f"in the packed file, of {m} member{'s' if m > 1 else ''}:")
    tensors = 0
    for name, (shared, own) in by_part(counts.rows).items():
        tensors += shared + m * own
        write(f"  {name:<36} {shared:>11,} shared + {m} x {own:>9,} own = {shared + m * own:>11,}")
    write(f"  {'graph, names, header':<36} {counts.file - tensors:>41,}")
    if counts.file == counts.file_least:
        write(f"  {'the file':<36} {counts.file:>41,} bytes")
    else:
        write(f"  {'the file, once trained: at most':<36} {counts.file:>41,} bytes")
        write(f"  {'                        at least':<36} {counts.file_least:>41,} bytes")
    write(
        f"one image, {m} member{'s' if m > 1 else ''}: {counts.binary_macs / 1e6:,.2f} M binary, "
        f"{counts.float_macs / 1e6:,.2f} M float multiply-accumulates"
    )


# Images and classes of the data sets that come with their own; nothing has to be read for them.
SHAPES = {
    "digits": ((8, 8, 1), 10),
    "cifar10": ((32, 32, 3), 10),
    "cifar100": ((32, 32, 3), 100),
    "fer2013": ((48, 48, 1), 7),
}


def _shape(data_params, root: Path) -> tuple[tuple[int, int, int], int, tuple[str, ...] | None]:
    """(H, W, C), the number of classes, and their names where the images had to be read."""
    from bnncore import data

    if data_params.name in SHAPES:
        (h, w, c), classes = SHAPES[data_params.name]
        if data_params.size:
            h = w = data_params.size
        return (h, w, c), classes, None
    found = data.load(data_params, root)
    return found.image, len(found.classes), found.classes


def _print_params(path: Path) -> int:
    """Everything that a parameter file asks for, counted without training."""
    from bnncore import check, params
    from bnncore.lowering import blueprint
    from bnncore.training import plans

    p = params.load(path)
    image, classes, names = _shape(p.data, path.parent)
    check.check(p, image, classes)
    specs = {
        "fp32": plans.single_spec(p, image, classes, binary=False),
        "bnn": plans.single_spec(p, image, classes, binary=True),
        **{e.name: plans.ensemble_spec(p, e, image, classes) for e in p.ensembles.train},
    }
    summary = []
    for name, spec in specs.items():
        counts = count(spec, p.pack, names)
        print(f"== {name} ==")
        print_count(counts, layout_table(blueprint.draw(spec).most, spec.members))
        print()
        summary.append((name, counts))
    wide = max(len(name) for name in specs)
    print(f"{'model':<{wide}} {'members':>7} {'KiB (TentacleNet)':>18} {'bits (Kim et al.)':>18} "
          f"{'file bytes, at most':>20} {'binary MMAC':>12} {'float MMAC':>11}")  # fmt: skip
    for name, c in summary:
        print(f"{name:<{wide}} {c.members:>7} {c.kib:>18,} {c.filter_sharing:>18,} {c.file:>20,} "
              f"{c.binary_macs / 1e6:>12,.2f} {c.float_macs / 1e6:>11,.2f}")  # fmt: skip
    return 0


def _print_file(path: Path) -> int:
    program = packfile.load(path)
    for key, fact in program.info.items():
        print(f"{key}: {fact}")
    print_count(counted(program, path.stat().st_size), layout_table(program))
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m bnncore.storage", description="What ensembles take to store."
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--papers", action="store_true",
                      help="every storage figure of both papers beside ours")  # fmt: skip
    what.add_argument("--params", type=Path, metavar="FILE",
                      help="count what a parameter file asks for, without training")  # fmt: skip
    what.add_argument("--file", type=Path, metavar="PACKED", help="count a packed file")
    parser.add_argument("--expected", type=Path, metavar="FILE",
                        help="the published figures (default: those of the tests)")  # fmt: skip
    options = parser.parse_args(arguments)
    try:
        if options.papers:
            from bnncore import paper

            return paper.storage_report(options.expected or paper.FIGURES)
        return _print_params(options.params) if options.params else _print_file(options.file)
    except (ValueError, OSError) as error:
        print(f"storage: {error}", file=sys.stderr)
        return 1
